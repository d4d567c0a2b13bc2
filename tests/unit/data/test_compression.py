"""Compressed corpora: what is sound is read whole, and what cannot be read is told as what it is."""

import bz2
import gzip
import io
import json
import lzma
import random
import sys
import tarfile
from importlib.util import find_spec

import pytest
import zstandard
from data_helpers import run_tool

from umv2_megatron.data import compression
from umv2_megatron.data.corpus import CorpusError, CorpusOptions, expand_inputs
from umv2_megatron.data.readers import read_chunks

GOOD = b'{"text": "good"}\n'
COMPRESS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: zstandard.ZstdCompressor(write_checksum=True).compress(data),
    "lz4": lambda data: lz4_frame(data),
}
FORMATS = [
    pytest.param(name, marks=pytest.mark.skipif(find_spec("lz4") is None, reason="lz4 is not installed"))
    if name == "lz4"
    else name
    for name in COMPRESS
]
BYTES = ("--tokenizer-type", "ByteLevelTokenizer", "--append-eod")


def read(path):
    """[(line, bytes, fault)] of one file."""
    chunks = read_chunks([str(path)], CorpusOptions())
    return [tuple(record) for chunk in chunks for record in chunk.records]


def lz4_frame(data):
    import lz4.frame

    return lz4.frame.compress(data, content_checksum=True)


def zstd_frame(window_log, data, dictionary=b""):
    """A zstd frame with one raw block, and a window of 2**window_log bytes (RFC 8878, section 3.1.1)."""
    block = ((len(data) << 3) | 1).to_bytes(3, "little") + data
    head = bytes([1 if dictionary else 0, (window_log - 10) << 3])
    return b"\x28\xb5\x2f\xfd" + head + dictionary + block


def archive():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as made:
        entry = tarfile.TarInfo("corpus.jsonl")
        entry.size = len(GOOD)
        made.addfile(entry, io.BytesIO(GOOD))
    return file.getvalue()


@pytest.mark.parametrize("name", FORMATS)
def test_two_frames(tmp_path, name):
    path = tmp_path / f"corpus.jsonl.{name}"
    lines = b"".join(json.dumps({"text": str(i) * 20}).encode() + b"\n" for i in range(20_000))
    half = len(lines) // 2
    path.write_bytes(COMPRESS[name](lines[:half]) + COMPRESS[name](lines[half:]))  # cut inside a line
    assert b"".join(data + b"\n" for _, data, _ in read(path)) == lines


SOUND = {
    "corpus.jsonl.gzip": gzip.compress(GOOD),
    "corpus.jsonl.bzip2": bz2.compress(GOOD),
    "corpus.jsonl.zstd": zstd_frame(20, GOOD),
    "corpus.jsonl.lzma": lzma.compress(GOOD, lzma.FORMAT_ALONE),
    "corpus.jsonl": lzma.compress(GOOD),
    "other-name.jsonl.gz": zstd_frame(20, GOOD),
    "zeros-after.jsonl.gz": gzip.compress(GOOD[:5]) + b"\x00" * 512 + gzip.compress(GOOD[5:]) + b"\x00" * 512,
    "zeros-after.jsonl.xz": lzma.compress(GOOD[:5]) + b"\x00" * 8 + lzma.compress(GOOD[5:]) + b"\x00" * 4,
    "window-of-256-MiB.jsonl.zst": zstd_frame(28, GOOD),
    "window-of-2-GiB.jsonl.zst": zstd_frame(31, GOOD),
    "frame-to-skip.jsonl.zst": b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd" + zstd_frame(20, GOOD),
    "starts-like-bzip2.txt": b"BZh9 is how bzip2 files begin",
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_files(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(SOUND[name])
    assert expand_inputs([str(path)]) == [str(path)]
    assert read(path) == [(1, SOUND[name] if name.endswith("txt") else GOOD[:-1], "")]


def test_a_long_window_of_the_real_compressor(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = tmp_path / "corpus.jsonl.zst"
    path.write_bytes(stream.compress(GOOD * 3) + stream.flush())
    assert zstandard.get_frame_parameters(path.read_bytes()).window_size == 1 << 28
    assert len(read(path)) == 3


UNSUPPORTED = {
    "window.jsonl.zst": (zstd_frame(32, GOOD), "its zstd window is larger than 2048 MiB"),
    "dictionary.jsonl.zst": (zstd_frame(20, GOOD, b"\x07"), "the zstd dictionary 7"),
    "corpus.jsonl.lz4": (b"\x02\x21\x4c\x18 blocks", "compressed by lz4 in its old format"),
    "corpus.jsonl.sz": (b"\xff\x06\x00\x00sNaPpY", "compressed by snappy"),
    "corpus.jsonl.br": (b"anything", "the name says brotli"),
    "corpus.jsonl.zip": (b"PK\x03\x04 files", "a zip, 7z or rar archive"),
    "corpus.jsonl.Z": (b"\x1f\x9d codes", "lzip, lzop or compress"),
    "corpus.jsonl": (b"PAR1\x15\x04\x15", "a Parquet file, .*: name it .parquet"),
    "corpus.arrow": (b"ARROW1\x00\x00", "an Arrow, Avro or HDF5 file"),
    "corpus.tar": (archive(), "the file is a tar archive"),
    "corpus.tar.gz": (gzip.compress(archive()), "the content of the file is a tar archive"),
    "corpus.txt": ("text".encode("utf-16"), "text in UTF-16 or UTF-32"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_said_and_never_left_out(tmp_path, name):
    content, reason = UNSUPPORTED[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=reason):
        expand_inputs([str(path)])
    with pytest.raises(CorpusError, match=reason):
        read(path)


def test_lz4_frames_that_are_skipped_and_dictionaries(tmp_path):
    pytest.importorskip("lz4")
    path = tmp_path / "corpus.jsonl.lz4"
    skipped = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    path.write_bytes(skipped + lz4_frame(GOOD) + skipped + lz4_frame(GOOD))
    assert len(read(path)) == 2
    frame = bytearray(lz4_frame(GOOD))
    frame[4] |= 1
    path.write_bytes(frame)
    with pytest.raises(CorpusError, match="with an lz4 dictionary"):
        expand_inputs([str(path)])


def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lz4", None)
    path = tmp_path / "corpus.jsonl.lz4"
    path.write_bytes(b"\x04\x22\x4d\x18 frames")
    with pytest.raises(CorpusError, match="reading lz4 needs the module lz4, .* requirements-inputs.txt"):
        expand_inputs([str(path)])


def test_a_second_frame_that_is_not_supported(tmp_path):
    path = tmp_path / "corpus.jsonl.zst"
    path.write_bytes(zstd_frame(20, GOOD) + zstd_frame(32, GOOD))
    with pytest.raises(CorpusError, match=f"{path}:2: its zstd window is larger"):
        read(path)


def test_memory_that_is_missing_is_no_damage():
    stream = compression.Decompressed(io.BytesIO(), "zstd")
    assert isinstance(stream._fault(ValueError("Allocation error : not enough memory")), compression.Unsupported)
    assert isinstance(stream._fault(ValueError("Data corruption detected")), compression.Damaged)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("damage", ["truncated", "end cut", "flipped", "empty", "not compressed", "garbage after"])
def test_damaged_files(tmp_path, name, damage):
    path = tmp_path / f"corpus.jsonl.{name}"
    generator = random.Random(0)
    lines = [json.dumps({"text": str(generator.getrandbits(200))}) + "\n" for _ in range(20_000)]
    data = bytearray(COMPRESS[name]("".join(lines).encode()))
    if damage == "truncated":
        del data[len(data) // 2 :]
    elif damage == "end cut":
        del data[-3:]
    elif damage == "flipped":
        data[3 * len(data) // 4] ^= 0xFF
    elif damage == "garbage after":
        data += b"garbage"
    else:
        data = bytearray(GOOD if damage == "not compressed" else b"")
        path.write_bytes(data)
        with pytest.raises(CorpusError, match="the name says"):
            expand_inputs([str(path)])
    path.write_bytes(data)
    found = read(path)
    assert "truncated or damaged" in found[-1][2]
    assert found[-1][0] == len(found), "the fault follows the last whole line"
    if damage != "flipped":
        whole = [data.decode() + "\n" for _, data, fault in found if not fault]
        assert whole == lines[: len(whole)], "a cut line passed for a whole one"


def test_a_disk_that_fails_is_no_damage(tmp_path, monkeypatch):
    path = tmp_path / "corpus.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD))

    class Broken(io.BytesIO):
        def read(self, *_):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr("builtins.open", lambda *_: Broken())
    with pytest.raises(CorpusError, match=f"{path}: the file cannot be read: Input/output error"):
        read(path)


def test_quarantine_tells_of_files_that_lose_their_end_or_all(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "b.jsonl").write_bytes(b'{"content": "x"}\n\n{"content": "y"}\n')
    data = random.Random(0).randbytes(200_000).hex().encode()
    lines = b"".join(b'{"text": "%s"}\n' % data[i : i + 100] for i in range(0, len(data), 100))
    (tmp_path / "c.jsonl.bz2").write_bytes(bz2.compress(lines, 1)[:-30])
    flags = ["--output-prefix", tmp_path / "p", "--on-bad-line", "quarantine"]
    done = run_tool("preprocess_data.py", "--input", tmp_path / "*.jsonl*", *BYTES, *flags)
    assert done.returncode == 0, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors[0] == (
        f"error: {tmp_path}/b.jsonl: nothing of the file is used: all its 2 records are bad "
        "(the first, line 1: the key 'text' is missing)"
    )
    assert errors[1].startswith(f"error: {tmp_path}/c.jsonl.bz2:")
    assert errors[1].endswith("; the rest of the file is lost")
    assert len(errors) == 2 and "3 bad lines" in done.stdout and "1 files left out whole" in done.stdout


@pytest.mark.parametrize("tool", ["preprocess_data.py", "train_tokenizer.py"])
def test_a_file_that_is_not_supported_stops_the_tools(tmp_path, tool):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "b.jsonl.lz4").write_bytes(b"\x02\x21\x4c\x18 blocks")
    flags = (*BYTES, "--on-bad-line", "quarantine")
    if tool == "train_tokenizer.py":
        flags = ("--vocab-size", 300, "--on-bad-line", "skip")
    done = run_tool(tool, "--input", tmp_path / "*.jsonl*", *flags, "--output-prefix", tmp_path / "p")
    assert done.returncode == 1
    assert done.stderr == (
        f"{tool}: error: {tmp_path}/b.jsonl.lz4: the file is compressed by lz4 in its old format (lz4 -l), which is "
        "not supported as it is: recompress it without -l; or leave the file out of --input\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl.lz4"]
