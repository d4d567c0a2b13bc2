"""Reading raw corpora: every fault is found, with its line, and nothing that is well is lost."""

import gzip
import json
import os

import pytest

from umv2_megatron.data.corpus import CorpusOptions, expand_inputs, texts_of
from umv2_megatron.data.readers import read_chunks

GOOD = b'{"text": "good"}\n'


def read(path, keys=("text",), **options):
    """[(line, text or None, fault)] of one file."""
    found = []
    for chunk in read_chunks([str(path)], CorpusOptions(**options)):
        for record in chunk.records:
            try:
                found.append((record.line, texts_of(record, chunk.is_json, keys)[0], ""))
            except ValueError as error:
                found.append((record.line, None, str(error)))
    return found


# What a line holds, and words of the reason for which it is refused.
BAD_LINES = {
    "invalid JSON": (b'{"text": "x"', "invalid JSON"),
    "two objects": (b'{"text": "x"} {"text": "y"}', "invalid JSON"),
    "bad UTF-8": (b'{"text": "caf\xe9"}', "not UTF-8 at byte 14"),
    "overlong UTF-8": (b'{"text": "\xc0\x80"}', "not UTF-8"),
    "BOM inside": (b'\xef\xbb\xbf{"text": "x"}', "invalid JSON"),
    "missing key": (b'{"body": "x"}', "the key 'text' is missing"),
    "number": (b'{"text": 7}', "not a string but int"),
    "null": (b'{"text": null}', "not a string but NoneType"),
    "list": (b'["text"]', "expected a JSON object, found list"),
    "escaped NUL": (b'{"text": "a\\u0000b"}', "NUL"),
    "raw NULs": (b"\x00" * 50, "invalid JSON"),
    "lone surrogate": (b'{"text": "a\\ud83db"}', "lone surrogate at character 2"),
    "UTF-16": ('{"text": "x"}'.encode("utf-16-le"), "invalid JSON"),
    "deep nesting": (b"[" * 100_000, "nested more deeply than this reader follows"),
    "long line": (b'{"text": "' + b"x" * 3000 + b'"}', "longer than --max-line-mb"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_lines(tmp_path, name):
    line, reason = BAD_LINES[name]
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(GOOD * 2 + line + b"\n" + GOOD)
    limit = 2000 if name == "long line" else 64 << 20
    found = read(path, max_line_bytes=limit)
    assert [entry[:2] for entry in found] == [(1, "good"), (2, "good"), (3, None), (4, "good")]
    assert reason in found[2][2]


# Key, record, and the text or words of the reason for which there is none.
NESTED = [
    ("data.text", {"data": {"text": "inner"}}, "inner"),
    ("data.text", {"data.text": "whole", "data": {"text": "inner"}}, "whole"),
    ("a.b.c", {"a": {"b": {"c": "deep"}}}, "deep"),
    ("a.b.c", {"a.b": {"c": "longest"}, "a": {"b": {"c": "deep"}, "b.c": "other"}}, "longest"),
    ("a.b.c", {"a": {"b.c": "whole", "b": {"c": "deep"}}}, "whole"),
    (".text", {".text": "x"}, "x"),
    ("data.text", {"data": {"body": "x"}}, "the key 'data.text' is missing: 'data' holds no 'text'"),
    ("data.text", {"text": "x"}, "the key 'data.text' is missing"),
    ("data.text", {"data": "x"}, "the key 'data.text' is missing"),
    ("data.text", {"data": {"text": ["x"]}}, "the value of 'data.text' is not a string but list"),
]


@pytest.mark.parametrize(("key", "record", "expected"), NESTED)
def test_keys_of_objects_in_objects(tmp_path, key, record, expected):
    path = tmp_path / "corpus.jsonl"
    path.write_text(json.dumps(record))
    ((_, text, fault),) = read(path, (key,))
    assert (text or fault) == expected


def test_what_is_accepted(tmp_path):
    path = tmp_path / "corpus.jsonl"
    paired = json.dumps({"text": "\U0001f600"}).encode()  # escaped as a pair of surrogates
    crlf = GOOD.replace(b"\n", b"\r\n")
    number = b'{"text": "x", "n": ' + b"9" * 10_000 + b"}\n"  # more digits than Python converts
    path.write_bytes(b"\xef\xbb\xbf" + crlf + b"\r\n" + paired + b'\n{"text": ""}\n' + number + GOOD[:-1])
    assert [entry[1] for entry in read(path)] == ["good", "", "\U0001f600", "", "x", "good"]


def test_lines_up_to_the_limit_and_beyond(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"a" * 10 + b"\r\n" + b"b" * 11 + b"\n" + b"c" * 5_000_000 + b"\n" + b"d" * 12)
    found = read(path, text_split="line", max_line_bytes=10)
    assert [(line, bool(fault)) for line, _, fault in found] == [(1, False), (2, True), (3, True), (4, True)]


def test_a_long_line_is_not_held(tmp_path):
    import tracemalloc

    path = tmp_path / "corpus.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(GOOD + b'{"text": "')
        for _ in range(100):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n' + GOOD)
    tracemalloc.start()
    found = read(path, max_line_bytes=4 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [entry[1] for entry in found] == ["good", None, "good"]
    assert peak < 24 << 20


def test_plain_text(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes("one\ntwo\n\n \nthrée\r\n\n".encode())
    assert read(path) == [(1, "one\ntwo\n\n \nthrée\r\n\n", "")]
    assert [entry[1] for entry in read(path, text_split="line")] == ["one", "two", "", " ", "thrée", ""]
    assert read(path, text_split="blank-line") == [(1, "one\ntwo", ""), (5, "thrée", "")]
    found = read(path, text_split="blank-line", max_line_bytes=6)
    assert [(line, bool(fault)) for line, _, fault in found] == [(1, True), (5, False)]
    found = read(path, max_line_bytes=6)
    assert found[0][1] is None and "--text-split" in found[0][2]
    assert read(path, input_format="jsonl")[0][2].startswith("invalid JSON")


def test_inputs(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).write_bytes(GOOD)
    names = expand_inputs([str(tmp_path / "c.txt"), str(tmp_path / "*.jsonl")])
    assert [name.rsplit("/")[-1] for name in names] == ["c.txt", "a.jsonl", "b.jsonl"]
    for wrong in (["nothing*"], [str(tmp_path)], [str(tmp_path / "a.jsonl"), str(tmp_path / "*.jsonl")]):
        with pytest.raises(ValueError, match="--input"):
            expand_inputs([str(tmp_path / name) for name in wrong])
    with pytest.raises(ValueError, match="twice"):
        expand_inputs([str(tmp_path / "a.jsonl"), f"{tmp_path}/./a.jsonl"])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        expand_inputs([str(tmp_path / "pipe")])


def test_many_inputs_are_not_compared_with_each_other(tmp_path):
    class Path(str):
        compared = 0
        __hash__ = str.__hash__

        def __eq__(self, other):
            Path.compared += 1
            return str.__eq__(self, other)

    paths = [Path(tmp_path / f"{i}.jsonl") for i in range(200)]
    for path in paths:
        open(path, "wb").close()
    assert len(expand_inputs(paths)) == 200
    assert Path.compared < 1000
