"""Files read in ranges: each record belongs to exactly one range, with its line, wherever the cuts fall."""

import bz2
import gzip
import random

import pytest

from umv2_megatron.data.corpus import CorpusOptions, Segment
from umv2_megatron.data.records import FileReader

SPLITS = {"jsonl": {}, "line": {"text_split": "line"}, "blank-line": {"text_split": "blank-line"}}


def content(generator):
    """Lines of all kinds: empty, blank, CRLF, longer than the limit, without an end."""
    kinds = (b"", b"", b"  ", b"a", b"word " * 3, b"x" * 40, b"y" * 61, b"z" * 400)
    ends = (b"\n", b"\n", b"\r\n")
    lines = [generator.choice(kinds) + generator.choice(ends) for _ in range(generator.randrange(30))]
    data = generator.choice((b"", b"\xef\xbb\xbf")) + b"".join(lines)
    return data if generator.random() < 0.5 else data.rstrip(b"\r\n")


def records_of(reader, segment):
    """The records with their lines in the file, and the lines that were read."""
    found = [record for chunk in reader.chunks(segment) for record in chunk.records]
    before = reader.lines_before()
    return [record._replace(line=record.line + before) for record in found], reader.lines_read()


def check(path, options, size, stride, generator):
    whole, lines = records_of(FileReader(str(path), options), Segment(str(path)))
    cuts = list(range(0, size, stride)) or [0]
    segments = [Segment(str(path), at, at + stride if at != cuts[-1] else None) for at in cuts]
    going = FileReader(str(path), options, stride)
    # in order by one reader, and by readers of their own that leave some out
    assert sum([records_of(going, segment)[0] for segment in segments], []) == whole
    readers = [FileReader(str(path), options, stride) for _ in range(2)]
    parts = [records_of(generator.choice(readers), segment) for segment in segments]
    assert sum((found for found, _ in parts), []) == whole
    assert sum(count for _, count in parts) == lines


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", ["plain", "gzip", "bzip2", "cut gzip"])
def test_every_record_belongs_to_one_range(tmp_path, split, kind, monkeypatch):
    from umv2_megatron.data import compression

    generator = random.Random(f"{split} {kind}")
    name = "corpus.jsonl" if split == "jsonl" else "corpus.txt"
    options = CorpusOptions(max_line_bytes=60, **SPLITS[split])
    monkeypatch.setattr(compression, "_OUTPUT_BYTES", 64)
    for number in range(60):
        monkeypatch.setattr(compression, "_INPUT_BYTES", generator.choice((1, 7, 30)))
        data = content(generator)
        if kind != "plain":
            press = bz2.compress if kind == "bzip2" else gzip.compress
            members = generator.randrange(1, 4)
            size = len(data) // members + 1
            data = b"".join(press(data[i * size : (i + 1) * size]) for i in range(members))
        if kind == "cut gzip":
            data = data[: -generator.randrange(1, max(2, len(data) - 20))]
        path = tmp_path / f"{number}{name}"
        path.write_bytes(data)
        check(path, options, len(data), generator.choice((3, 17, 100)), generator)
