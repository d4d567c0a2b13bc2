"""Parquet corpora: the rows of their JSONL twins, by any cut, and words for what cannot be used."""

import json
import random
import sys

import pytest
from data_helpers import hashes, run_tool, sources, write_jsonl

pa = pytest.importorskip("pyarrow", reason="requirements-inputs.txt is not installed")
import pyarrow.parquet as pq  # noqa: E402

from umv2_megatron.data.corpus import CorpusError, CorpusOptions, Segment, expand_inputs, texts_of  # noqa: E402
from umv2_megatron.data.indexing import read_tokens  # noqa: E402
from umv2_megatron.data.readers import check_files, read_chunks, reader_of  # noqa: E402
from umv2_megatron.data.row_filter import parse_filter  # noqa: E402

BYTES = ("--tokenizer-type", "ByteLevelTokenizer", "--append-eod")


def write(path, columns, rows_of_a_group=3, **options):
    pq.write_table(pa.table(columns), path, row_group_size=rows_of_a_group, **options)
    return path


def read(path, *keys, row_filter=None, **options):
    """[(row, text of the first key or None, fault)] of one file."""
    keys = keys or ("text",)
    found = []
    for chunk in read_chunks([str(path)], CorpusOptions(columns=keys, row_filter=row_filter, **options)):
        for record in chunk.records:
            try:
                found.append((record.line, texts_of(record, chunk.is_json, keys)[0], ""))
            except ValueError as error:
                found.append((record.line, None, str(error)))
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_same_tokens_as_jsonl(tmp_path, ranks):
    from test_preprocess_ranks import outcome, start

    texts = sources(40)
    lines = write_jsonl(tmp_path / "a.jsonl", texts)
    write(tmp_path / "a.parquet", {"text": texts, "id": list(range(len(texts)))}, compression="zstd")
    done = run_tool("preprocess_data.py", "--input", lines, *BYTES, "--output-prefix", tmp_path / "jsonl")
    assert done.returncode == 0, done.stderr
    flags = ["--input", tmp_path / "a.parquet", *BYTES, "--output-prefix", tmp_path / "parquet", "--part-mb", 0.02]
    ended = outcome(start(ranks, "--workers", 2, *flags))
    assert [code for code, _ in ended] == [0] * ranks, ended
    assert hashes(tmp_path / "parquet_text_document") == hashes(tmp_path / "jsonl_text_document")


def test_every_row_belongs_to_one_range(tmp_path):
    generator = random.Random(0)
    path = tmp_path / "a.parquet"
    for _ in range(20):
        texts = [generator.choice(["", "a", "bc" * 30, None]) for _ in range(generator.randrange(40))]
        write(path, {"text": pa.array(texts, pa.string())}, generator.randrange(1, 9), use_dictionary=False)
        whole = read(path)
        size, stride = path.stat().st_size, generator.choice([50, 200, 1000])
        found, lines = [], 0
        for begin in range(0, size, stride):
            segment = Segment(str(path), begin, begin + stride if begin + stride < size else None)
            reader = reader_of(str(path), CorpusOptions())
            for chunk in reader.chunks(segment):
                found += [record.line + reader.lines_before() for record in chunk.records]
            lines += reader.lines_read()
            reader.close()
        assert found == [line for line, _, _ in whole] == list(range(1, len(texts) + 1)) and lines == len(texts)


def test_kinds_of_columns_and_bad_rows(tmp_path):
    columns = {
        "text": pa.array([b"a", "\u20ac".encode(), None, b"caf\xe9", b"x\x00", b"y" * 300], pa.binary()),
        "large": pa.array(list("abcdef"), pa.large_string()),
        "words": pa.array(["x", "y"] * 3).dictionary_encode(),
        "data": pa.array([{"text": "inner", "n": 1}, None, {"text": None, "n": 2}] + [{"text": "z", "n": 3}] * 3),
        "data.id": pa.array(["whole"] * 6),
    }
    path = write(tmp_path / "a.parquet", columns)
    found = read(path, max_line_bytes=200)
    assert [entry[1] for entry in found] == ["a", "\u20ac", None, None, None, None]
    assert [entry[2] for entry in found[2:]] == [
        "the value of 'text' is not a string but NoneType",
        "the value of 'text' is not UTF-8 at byte 4",
        "the text contains a NUL character",
        "the row is longer than --max-line-mb 0.000190735",
    ]
    assert [text for _, text, _ in read(path, "large")] == list("abcdef")
    assert [text for _, text, _ in read(path, "words")] == ["x", "y"] * 3
    assert [text for _, text, _ in read(path, "data.text")] == ["inner", None, None, "z", "z", "z"]
    assert read(path, "data.id")[0][1] == "whole"


FILTERS = {
    'language == "en"': [1, 3, 6],
    "score >= 0.5 and language != 'de'": [3, 6],
    "not language in ['en', 'de']": [5],
    "language not in ('en',)": [2, 4, 5],
    "0.25 < score < 0.75": [3, 4],
    "meta.url is not None or score == 1": [1, 2, 6],
    'field("meta", "url") is None': [3, 4, 5, 6],
    "-score < -0.9": [6],
    "score * 2 == 1": [3],
    'utf8_length(text) > 1 and match_substring(text, "w")': [2],
    "field('odd name') == True": [2],
}


@pytest.mark.parametrize("text", FILTERS)
def test_filters(tmp_path, text):
    columns = {
        "text": ["one", "two", "three", "four", "five", "six"],
        "language": ["en", "de", "en", "de", "fr", "en"],
        "score": [0.1, 0.2, 0.5, 0.7, None, 1.0],
        "meta": [{"url": "u"}, {"url": "v"}, {"url": None}, None, None, None],
        "odd name": [None, True, False, False, False, False],
    }
    path = write(tmp_path / "a.parquet", columns, 4)
    assert [line for line, _, _ in read(path, row_filter=text)] == FILTERS[text]


def test_rows_left_out_are_counted(tmp_path):
    write(tmp_path / "a.parquet", {"text": list("abcdefg"), "n": list(range(7))}, 2)
    flags = ["--input", tmp_path / "a.parquet", *BYTES, "--output-prefix", tmp_path / "p", "--part-mb", 0.0001]
    done = run_tool("preprocess_data.py", *flags, "--filter", "n > 1 and n < 5")
    assert done.returncode == 0, done.stderr
    assert "3 documents" in done.stdout and "4 rows left out by --filter" in done.stdout
    assert read_tokens(str(tmp_path / "p_text_document")).tolist() == [99, 256, 100, 256, 101, 256]


WRONG = {
    "language = 'en'": "invalid syntax",
    "__import__('os').system('x')": "is no function of pyarrow.compute",
    "language == None": "write 'is None'",
    "language in 'en'": "'in' goes with a list",
    "n is 3": "'is' goes with None only",
    "[n for n in language]": "is not understood",
    "language.strip() == 'a'": "is no function of pyarrow.compute",
    "sum(n) > 3": "is no function of pyarrow.compute on single values",
    "utf8_length(n, n, n) == 3": "utf8_length",
    "lang == 'en'": "there is no column 'lang': the file has text, language, n",
    "language > 3": "--filter does not fit its columns",
    "n": "--filter does not fit its columns",
    "n == 18446744073709551616": "a number in it has more than 64 bits",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_filters(tmp_path, text):
    path = write(tmp_path / "a.parquet", {"text": ["a"], "language": ["en"], "n": [1]})
    with pytest.raises(ValueError, match="filter|column") as raised:
        check_files([str(path)], CorpusOptions(row_filter=text))
    assert WRONG[text] in str(raised.value) and "\n" not in str(raised.value)


def test_wrong_columns_and_files(tmp_path):
    path = write(tmp_path / "a.parquet", {"text": ["a"], "n": [1]})
    flags = ["--input", tmp_path / "*.[pj]*", *BYTES, "--output-prefix", tmp_path / "p"]
    done = run_tool("preprocess_data.py", *flags, "--json-keys", "body")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(f"error: {path}: there is no column 'body': the file has text, n\n")
    with pytest.raises(ValueError, match="the column 'n' holds int64: expected strings"):
        check_files([str(path)], CorpusOptions(columns=("n",)))
    lines = write_jsonl(tmp_path / "b.jsonl", ["x"])
    with pytest.raises(ValueError, match=f"--filter is for rows of Parquet files, and {lines} is none"):
        check_files([str(path), str(lines)], CorpusOptions(row_filter="n > 0"))
    with pytest.raises(CorpusError, match=f"{path}: --filter fails: divide by zero"):
        read(path, row_filter="n / 0 > 1")
    for content in (b"", b"PAR1", b"PAR1 and no more PAR1", path.read_bytes()[:-9]):
        path.write_bytes(content)
        done = run_tool("preprocess_data.py", *flags)
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and str(path) in done.stderr, done.stderr


def test_a_damaged_row_group_is_one_bad_row_and_the_others_are_read(tmp_path):
    texts = [str(i) * 50 for i in range(9)]
    path = write(tmp_path / "a.parquet", {"text": texts}, write_page_checksum=True, use_dictionary=False)
    group = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[group.data_page_offset + group.total_compressed_size - 3] ^= 0xFF
    path.write_bytes(data)
    found = read(path)
    assert [(line, text) for line, text, _ in found] == [
        *enumerate(texts[:3], 1), (4, None), *enumerate(texts[6:], 7)
    ]  # fmt: skip
    assert found[3][2].startswith("the row group is damaged here (")
    flags = ["--input", path, *BYTES, "--output-prefix", tmp_path / "p", "--on-bad-line", "quarantine"]
    done = run_tool("preprocess_data.py", *flags, "--part-mb", 0.0001)
    assert done.returncode == 0 and "the rest of the row group is lost" in done.stderr
    entries = [json.loads(line) for line in (tmp_path / "p_quarantine.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in entries] == [4]


def test_pyarrow_comes_only_when_it_is_asked_for(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    path = write(tmp_path / "a.parquet", {"text": ["a"]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert read(tmp_path / "a.jsonl") == [(1, "x", "")]
    with pytest.raises(CorpusError, match="needs the module pyarrow, which is not installed: pip install"):
        expand_inputs([str(path)])


def test_filters_are_parsed_not_run():
    assert parse_filter("a.b > 1 and field('c d') is None").columns == ["a.b", "c d"]
