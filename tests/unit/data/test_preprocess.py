"""Token files: the same bytes as mcore's, whatever the number of workers; whole or absent, whatever happens."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_helpers import ROOT, hashes, run_tool, sources, write_corpus, write_jsonl

from umv2_megatron.data import indexing
from umv2_megatron.data.corpus import CorpusError, CorpusOptions
from umv2_megatron.data.indexing import IndexWriter, check_corpus, read_index, read_meta, read_tokens
from umv2_megatron.data.preprocessing import Job, preprocess

BYTES = ("--tokenizer-type", "ByteLevelTokenizer", "--append-eod")


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_same_bytes_as_mcore(tmp_path):
    texts = ["one", "zwei €", "x" * 70_000, "\n"]
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [texts[0], "", *texts[1:]])
    summary = preprocess(Job((str(corpus),), str(tmp_path / "p"), "ByteLevelTokenizer", append_eod=True))
    assert (summary.documents, summary.empty, summary.bad) == (4, 1, 0)
    documents = [[*text.encode(), 256] for text in texts]
    expected = write_corpus(tmp_path / "mcore", documents)
    assert hashes_of_data(summary.prefixes[0]) == hashes_of_data(expected)

    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(summary.prefixes[0])
    assert [dataset[i].tolist() for i in range(len(dataset))] == documents


def hashes_of_data(prefix):
    return [hashlib.sha256(Path(prefix + end).read_bytes()).hexdigest() for end in (".bin", ".idx")]


def test_large_vocabularies_take_four_bytes(tmp_path):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", ["1 70000 3", "5"])
    job = Job((str(corpus),), str(tmp_path / "p"), "NullTokenizer", vocab_size=80_000, append_eod=True)
    prefix = preprocess(job).prefixes[0]
    expected = write_corpus(tmp_path / "mcore", [[1, 70000, 3, 80000], [5, 80000]], 80_001)
    assert hashes_of_data(prefix) == hashes_of_data(expected)
    assert read_index(prefix).dtype == np.int32


def test_index_written_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(indexing, "_BLOCK", 7)
    lengths = np.arange(1, 41, dtype=np.int32)
    tokens = np.arange(lengths.sum(), dtype=np.uint16) % 250
    writer = IndexWriter(str(tmp_path / "p"), np.uint16)
    writer.add(tokens.tobytes(), lengths)
    writer.publish({})
    documents = [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]
    assert hashes_of_data(str(tmp_path / "p")) == hashes_of_data(write_corpus(tmp_path / "mcore", documents))
    assert check_corpus(str(tmp_path / "p"), 257).lengths.tolist() == lengths.tolist()


def test_same_files_for_any_number_of_workers(tmp_path):
    texts = sources(40)
    halves = [write_jsonl(tmp_path / "a.jsonl", texts[:20]), write_jsonl(tmp_path / "b.jsonl", texts[20:])]
    halves[0].write_text(halves[0].read_text() + "{broken\n")
    (tmp_path / "out").mkdir()
    found = []
    for workers in (1, 2, 3):
        prefix = tmp_path / "out" / f"w{workers}"
        flags = ["--output-prefix", prefix, "--workers", workers, "--on-bad-line", "quarantine", "--log-interval", 1]
        done = run_tool("preprocess_data.py", "--input", tmp_path / "*.jsonl", *BYTES, *flags)
        assert done.returncode == 0, done.stderr
        assert "40 documents" in done.stdout and "1 bad lines" in done.stdout and "MB/s" in done.stdout
        quarantined = read_jsonl(f"{prefix}_quarantine.jsonl")
        assert [(entry["file"], entry["line"]) for entry in quarantined] == [(str(halves[0]), 21)]
        found.append(hashes(f"{prefix}_text_document"))
    assert found[0] == found[1] == found[2]
    tokens = read_tokens(f"{prefix}_text_document").tolist()
    assert bytes(t for t in tokens if t < 256).decode() == "".join(texts) and tokens.count(256) == 40
    meta = read_meta(f"{prefix}_text_document")
    assert (meta["documents"], meta["tokens"], meta["max_token_id"]) == (40, len(tokens), 256)
    assert meta["text_bytes"] == len(tokens) - 40


def test_several_keys(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "a", "title": "b"}\n{"text": "c", "title": ""}\n')
    flags = ["--output-prefix", tmp_path / "p", "--json-keys", "text", "title"]
    done = run_tool("preprocess_data.py", "--input", corpus, *BYTES, *flags)
    assert done.returncode == 0, done.stderr
    assert read_tokens(str(tmp_path / "p_text_document")).tolist() == [97, 256, 99, 256]
    assert read_tokens(str(tmp_path / "p_title_document")).tolist() == [98, 256]


def test_a_key_with_dots_names_files(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"data": {"text": "a"}}\n{"data.text": "b"}\n')
    flags = ["--output-prefix", tmp_path / "p", "--json-keys", "data.text"]
    done = run_tool("preprocess_data.py", "--input", corpus, *BYTES, *flags)
    assert done.returncode == 0, done.stderr
    prefix = str(tmp_path / "p_data.text_document")
    dataset = IndexedDataset(prefix)
    assert dataset[1].tolist() == [98, 256] and check_corpus(prefix, 257).lengths.tolist() == [2, 2]


BAD = {
    "invalid JSON": b'{"text": "x"',
    "bad UTF-8": b'{"text": "\xff"}',
    "missing key": b'{"body": "x"}',
    "non-string": b'{"text": 7}',
    "NUL": b'{"text": "a\\u0000"}',
    "lone surrogate": b'{"text": "\\ud800"}',
    "long line": b'{"text": "' + b"7 " * 100_000 + b'"}',
    "token beyond vocabulary": b'{"text": "5 100 7"}',
    "negative token": b'{"text": "-1"}',
    "huge token": b'{"text": "99999999999999999999999"}',
    "not a number": b'{"text": "word"}',
}


@pytest.mark.parametrize("name", BAD)
def test_bad_lines_fail_or_are_quarantined(tmp_path, name):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(b'{"text": "1 2"}\n' + BAD[name] + b'\n{"text": "3"}\n')
    options = {"vocab_size": 99, "corpus": CorpusOptions(max_line_bytes=1 << 16)}
    job = Job((str(corpus),), str(tmp_path / "p"), "NullTokenizer", **options)
    with pytest.raises(CorpusError, match=f"{corpus}:2: "):
        preprocess(job)
    assert names(tmp_path) == ["corpus.jsonl"]
    summary = preprocess(Job((str(corpus),), str(tmp_path / "p"), "NullTokenizer", on_bad_line="quarantine", **options))
    assert (summary.documents, summary.bad) == (2, 1)
    assert read_tokens(summary.prefixes[0]).tolist() == [1, 2, 3]
    (entry,) = read_jsonl(tmp_path / "p_quarantine.jsonl")
    assert (entry["file"], entry["line"]) == (str(corpus), 2) and entry["reason"]


def test_a_word_that_the_tokenizer_lacks_is_a_bad_line(tmp_path):
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<|endoftext|>": 0, "one": 1}))
    words.save(str(tmp_path / "tokenizer.json"))
    corpus = write_jsonl(tmp_path / "corpus.jsonl", ["one", "two", "one"])
    job = Job((str(corpus),), str(tmp_path / "p"), "HuggingFaceTokenizer", str(tmp_path / "tokenizer.json"))
    with pytest.raises(CorpusError, match=f"{corpus}:2: the tokenizer cannot encode this text"):
        preprocess(job)
    summary = preprocess(replace(job, on_bad_line="quarantine"))
    assert (summary.documents, summary.bad) == (2, 1)


def test_truncated_file(tmp_path):
    import gzip

    corpus = tmp_path / "corpus.jsonl.gz"
    corpus.write_bytes(gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(50_000)))[:-2000])
    arguments = ["preprocess_data.py", "--input", corpus, "--output-prefix", tmp_path / "p", *BYTES, "--workers", 2]
    done = run_tool(*arguments)
    assert done.returncode == 1 and f"{corpus}:" in done.stderr and "Traceback" not in done.stderr
    assert names(tmp_path) == ["corpus.jsonl.gz"]
    done = run_tool(*arguments, "--on-bad-line", "quarantine")
    assert done.returncode == 0 and ", 1 bad lines" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workers", "0"], "--workers"),
        (["--max-line-mb", "0"], "--max-line-mb"),
        (["--input", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--output-prefix", "/nowhere/p"], "/nowhere"),
        (["--tokenizer-type", "SentencePieceTokenizer"], "--tokenizer-model"),
        (["--tokenizer-type", "GPT"], "--tokenizer-type"),
        (["--json-keys", "a/b"], "--json-keys"),
        (["--json-keys", "a", "a"], "--json-keys"),
        (["--partitions", "2"], "--partitions"),
    ],
)
def test_wrong_flags(tmp_path, arguments, words):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", ["a"])
    done = run_tool("preprocess_data.py", "--input", corpus, "--output-prefix", tmp_path / "p", *BYTES, *arguments)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert names(tmp_path) == ["corpus.jsonl"]


def test_an_earlier_quarantine_file_is_not_read_as_corpus(tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", ["a"])
    job = Job((str(tmp_path / "*.jsonl"),), str(tmp_path / "p"), "ByteLevelTokenizer", on_bad_line="quarantine")
    preprocess(job)
    with pytest.raises(ValueError, match="p_quarantine.jsonl"):
        preprocess(job)


def test_no_documents(tmp_path):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", ["", ""])
    with pytest.raises(CorpusError, match="no usable document"):
        preprocess(Job((str(corpus),), str(tmp_path / "p"), "ByteLevelTokenizer"))
    assert names(tmp_path) == ["corpus.jsonl"]


def start(corpus, prefix, workers):
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", str(corpus)]
    command += ["--output-prefix", str(prefix), *BYTES, "--workers", str(workers)]

    def heed_interrupts():
        # A shell without job control starts its background jobs, and so this test, with SIGINT ignored.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=heed_interrupts)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_and_started_again(tmp_path, sent):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", sources(40) * 12)
    process = start(corpus, tmp_path / "p", 2)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "p.parts").glob("0*[0-9].json")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(sent)
    code = process.wait(60)
    assert code == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[sent]
    assert not (tmp_path / "p_text_document.idx").exists()
    assert names(tmp_path) == ["corpus.jsonl", "p.parts"]
    for prefix, workers in ((tmp_path / "p", 1), (tmp_path / "whole", 2)):
        assert start(corpus, prefix, workers).wait(120) == 0
    assert hashes(tmp_path / "p_text_document") == hashes(tmp_path / "whole_text_document")
    assert not [name for name in names(tmp_path) if "incomplete" in name or "parts" in name]


def test_publication_shows_the_old_corpus_or_the_new_or_none(tmp_path, monkeypatch):
    """Stop at every rename and removal of a publication over an older corpus; what is visible must be whole."""
    prefix = str(tmp_path / "p")

    def publish(documents):
        writer = IndexWriter(prefix, np.uint16)
        for document in documents:
            writer.add(np.array(document, dtype=np.uint16).tobytes(), np.array([len(document)], dtype=np.int32))
        writer.publish({"max_token_id": 9})

    old, new = [[1, 2, 3], [4]], [[5] * 100]
    replace = os.replace
    for step in range(3):
        publish(old)
        calls = iter(range(10))

        def stop_at(source, target, step=step, calls=calls):
            if next(calls) == step:
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(os, "replace", stop_at)
        with pytest.raises(KeyboardInterrupt):
            publish(new)
        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(ValueError, match="p.idx does not exist"):
            check_corpus(prefix, 10)
    publish(new)
    assert check_corpus(prefix, 10).lengths.tolist() == [100]


def test_one_writer_at_a_time(tmp_path):
    first = IndexWriter(str(tmp_path / "p"), np.uint16)
    with pytest.raises(ValueError, match="another process"):
        IndexWriter(str(tmp_path / "p"), np.uint16)
    first.close()
    IndexWriter(str(tmp_path / "p"), np.uint16).close()
    assert names(tmp_path) == []


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Peak resident memory of the reading and writing process, for a corpus and one eight times as large.

    Not ru_maxrss: that starts at the memory of the process which started it.
    """
    script = (
        "import runpy, sys\nsys.argv.pop(0)\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])\n"
    )
    peaks = []
    text = "\n".join(sources(10))
    documents = [text[i : i + 50] for i in range(0, len(text), 50)]
    for copies in (9, 72):
        corpus = write_jsonl(tmp_path / f"{copies}.jsonl", documents * copies)
        tool = [str(ROOT / "tools/preprocess_data.py"), "--input", str(corpus), "--output-prefix", str(tmp_path / "p")]
        command = [sys.executable, "-c", script, *tool, *BYTES, "--workers", "2"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    # Lengths kept in Python lists, 100 bytes each, would add 11 MiB to what is under way (8 on Python 3.12, 5 on 3.11).
    assert len(documents) * 72 > 110_000
    assert peaks[1] < peaks[0] + 10, f"{peaks} MiB"


def test_check_names_the_file(tmp_path):
    prefix = write_corpus(tmp_path / "p", [[1, 2, 3], [4, 5]])
    assert check_corpus(prefix, 257).lengths.tolist() == [3, 2]
    with pytest.raises(ValueError, match=r"p.bin holds the token id 5 but the vocabulary has 5 ids"):
        check_corpus(prefix, 5)
    index, data = (Path(prefix + end).read_bytes() for end in (".idx", ".bin"))
    broken = {
        "size": (index[:-8], data, "p.idx has"),
        "magic": (b"X" + index[1:], data, "p.idx is not an index"),
        "empty": (b"", data, "p.idx is not an index"),
        "short bin": (index, data[:-2], "outside of"),
        "long bin": (index, data + b"\x00\x00", "p.bin has 12 bytes"),
        "offset": (index[:42] + b"\xff" * 8 + index[50:], data, "outside of"),
        "length": (index[:34] + b"\xff" * 4 + index[38:], data, "outside of"),
        "documents": (index[:-8] + bytes(8), data, "does not cover"),
    }
    for changed, values, words in broken.values():
        (tmp_path / "p.idx").write_bytes(changed)
        (tmp_path / "p.bin").write_bytes(values)
        with pytest.raises(ValueError, match=words) as caught:
            check_corpus(prefix, 257)
        assert "\n" not in str(caught.value)
    os.unlink(prefix + ".bin")
    with pytest.raises(ValueError, match="p.bin does not exist"):
        check_corpus(prefix, 257)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_a_sidecar_that_holds_no_json_object_is_none(tmp_path, content):
    prefix = write_corpus(tmp_path / "p", [[1, 2, 3], [4, 5]])
    Path(prefix + ".meta.json").write_bytes(content)
    assert read_meta(prefix) is None and check_corpus(prefix, 257).lengths.tolist() == [3, 2]


def test_another_tokenizer_is_refused(tmp_path):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", ["12"])
    prefix = preprocess(Job((str(corpus),), str(tmp_path / "p"), "ByteLevelTokenizer")).prefixes[0]
    from umv2_megatron.data.tokenizers import build_tokenizer

    check_corpus(prefix, 257, build_tokenizer("ByteLevelTokenizer").sha256)
    with pytest.raises(ValueError, match="another tokenizer"):
        check_corpus(prefix, 1000, build_tokenizer("NullTokenizer", vocab_size=999).sha256)


def test_demo_corpus(tmp_path):
    for name in ("a", "b"):
        done = run_tool("demo_corpus.py", "--output", tmp_path / name, "--max-mb", 2)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    documents = read_jsonl(tmp_path / "a")
    assert 2.0 <= sum(len(document["text"].encode()) for document in documents) / 1e6 < 4
    assert max(len(document["text"]) for document in documents) <= 64 << 10
    from tools.demo_corpus import cut

    for text in sources(30):
        assert "".join(cut(text, 1000)) == text and max(map(len, cut(text, 1000))) <= 1000
