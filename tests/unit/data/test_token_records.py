"""Token files of dolma: the same documents by any cut, and words for ids that cannot be what they are said to be."""

import json
import random

import numpy as np
import pytest
from data_helpers import hashes, run_tool

from umv2_megatron.data import token_records
from umv2_megatron.data.corpus import CorpusError, CorpusOptions, Segment, TokenIds
from umv2_megatron.data.indexing import check_corpus, read_meta, read_tokens
from umv2_megatron.data.preprocessing import Job, preprocess
from umv2_megatron.data.readers import read_chunks, reader_of

EOD = 99
NULL = ("--tokenizer-type", "NullTokenizer", "--vocab-size", EOD)


def write(path, documents, dtype="<u2", end=True):
    """As dolma's MemmapWriter does: ids one after another, without a header."""
    ids = [i for document in documents for i in [*document, EOD]]
    np.array(ids if end else ids[:-1], dtype).tofile(path)
    return path


def job(path, prefix, vocab_size=EOD, **options):
    return Job((str(path),), str(prefix), "NullTokenizer", vocab_size=vocab_size, **options)


def documents_of(prefix):
    index = check_corpus(prefix, 1 << 20)
    ends = np.cumsum(index.lengths)
    tokens = read_tokens(prefix)
    return [tokens[end - length : end].tolist() for end, length in zip(ends, index.lengths)]


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize("header", [False, True])
def test_documents_come_as_they_are(tmp_path, dtype, header):
    documents = [[1, 2], [3], [], [4] * 1000, [98]]
    path = write(tmp_path / "part-0-00000.npy", documents, dtype)
    if header:
        np.save(path, np.fromfile(path, dtype))
    done = preprocess(job(path, tmp_path / "p", token_dtype="uint32" if dtype == "<u4" and not header else "auto"))
    assert (done.documents, done.empty, done.bad) == (4, 1, 0)
    assert documents_of(done.prefixes[0]) == [[*document, EOD] for document in documents if document]
    meta = read_meta(done.prefixes[0])
    assert meta["tokenizer"]["type"] == "NullTokenizer" and len(meta["tokenizer"]["sha256"]) == 64
    assert (meta["append_eod"], meta["text_bytes"], meta["max_token_id"], meta["dtype"]) == (True, None, 99, "uint16")


def test_a_large_vocabulary(tmp_path):
    documents = [[70_000, 5], [6]]
    ids = np.array([70_000, 5, 100_000, 6, 100_000], "<u4")
    ids.tofile(tmp_path / "a.npy")
    done = preprocess(job(tmp_path / "a.npy", tmp_path / "p", 100_000))
    assert documents_of(done.prefixes[0]) == [[*document, 100_000] for document in documents]
    assert read_tokens(done.prefixes[0]).dtype == np.int32


def test_every_document_belongs_to_one_range(tmp_path, monkeypatch):
    generator = random.Random(0)
    path = tmp_path / "a.npy"
    options = CorpusOptions(max_line_bytes=40, ids=TokenIds("uint16", EOD + 1, EOD))

    def found(segments):
        lines, all_ids = [], []
        for segment in segments:
            reader = reader_of(str(path), options)
            count = 0
            for chunk in reader.chunks(segment):
                before = reader.lines_before()
                lines += [before + record.line for record in chunk.records]
                if chunk.lengths is not None:
                    lines += range(before + chunk.first, before + chunk.first + len(chunk.lengths))
                    all_ids += chunk.tokens.tolist()
                    count += len(chunk.lengths)
                if chunk.rest is not None:
                    lines += [before + chunk.first + (0 if chunk.lengths is None else len(chunk.lengths))]
                    all_ids += chunk.rest.tolist()
                    count += 1
                count += len(chunk.records)
            assert reader.lines_read() == count
            reader.close()
        return sorted(lines), all_ids

    for _ in range(150):
        monkeypatch.setattr(token_records, "_BLOCK", generator.choice([1, 3, 8, 1000]))
        lengths = [generator.choice([0, 1, 2, 5, 19, 20, 60]) for _ in range(generator.randrange(12))]
        documents = [[generator.randrange(EOD) for _ in range(length)] for length in lengths]
        end = generator.random() < 0.7 or not documents
        write(path, documents, end=end)
        size, stride = path.stat().st_size, generator.choice([1, 2, 5, 7, 30, 1000])
        cuts = list(range(0, size, stride)) or [0]
        whole = found([Segment(str(path))])
        monkeypatch.setattr(token_records, "_BLOCK", 4)
        parts = found([Segment(str(path), at, at + stride if at != cuts[-1] else None) for at in cuts])
        count = len(documents) - (not end and not lengths[-1])
        # a document that is too long may be read whole or dropped as it is read; which of them is left out is the same
        assert whole[0] == parts[0] == list(range(1, count + 1))
        kept = [ids for ids in documents if len(ids) < 20]
        if generator.random() < 0.5 and all(len(ids) < 20 for ids in documents):
            expected = [i for ids in kept for i in [*ids, EOD]]
            assert whole[1] == parts[1] == (expected if end else expected[:-1])


def test_same_files_for_any_number_of_ranks(tmp_path):
    from test_preprocess_ranks import outcome, start

    generator = random.Random(1)
    documents = [[generator.randrange(EOD) for _ in range(generator.randrange(300))] for _ in range(400)]
    documents[150][0] = 5000
    write(tmp_path / "a.npy", documents)
    write(tmp_path / "b.npy", documents[:50], end=False)
    flags = ["--input", tmp_path / "[ab].npy", *NULL, "--on-bad-line", "quarantine", "--log-interval", 1]
    found = []
    for ranks, workers, part_mb in ((1, 1, 100), (2, 2, 0.01)):
        prefix = tmp_path / f"p{ranks}"
        more = ["--output-prefix", prefix, "--workers", workers, "--part-mb", part_mb]
        ended = outcome(start(ranks, *flags, *more))
        assert [code for code, _ in ended] == [0] * ranks, ended
        entries = [json.loads(line) for line in (tmp_path / f"{prefix.name}_quarantine.jsonl").read_text().splitlines()]
        found.append((hashes(f"{prefix}_text_document"), entries))
    assert found[0] == found[1]
    first, last = found[0][1]
    assert (first["line"], first["reason"][:14], first["beginning"][:5]) == (151, "the token id 5", "5000 ")
    assert last["line"] == 50 and "does not end with the end-of-document token 99" in last["reason"]


def test_an_end_that_is_missing(tmp_path):
    path = write(tmp_path / "a.npy", [[1, 2], [3]], end=False)
    with pytest.raises(CorpusError, match=f"{path}:2: the last document does not end .* token 99: is the file whole"):
        preprocess(job(path, tmp_path / "p"))
    done = preprocess(job(path, tmp_path / "p", append_eod=True))
    assert documents_of(done.prefixes[0]) == [[1, 2, EOD], [3, EOD]]


def test_wrong_types_and_vocabularies(tmp_path):
    generator = np.random.default_rng(0)
    path = tmp_path / "a.npy"

    def message(**options):
        with pytest.raises((CorpusError, ValueError)) as raised:
            preprocess(job(path, tmp_path / "p", **options))
        assert not (tmp_path / "p.parts").exists()
        return str(raised.value)

    write(path, [generator.integers(0, 99, 1000)], "<u4")
    assert "every other id is about 0, as in uint32 ids: give --token-dtype uint32" in message()
    write(path, [generator.integers(0, 99, 1001)], "<u2")
    assert "most ids are outside of the vocabulary of 100: give --token-dtype uint16" in message(token_dtype="uint32")
    path.write_bytes(path.read_bytes()[:-1])
    assert "are no whole number of uint16 ids: the file is cut" in message()
    np.save(path, np.zeros((3, 4), np.int64))
    assert "it is an array [3, 4] of int64: expected one row of integers" in message()
    write(path, [[1]])
    (tmp_path / "b.jsonl").write_text('{"text": "1"}\n')
    mixed = Job((str(path), str(tmp_path / "b.jsonl")), str(tmp_path / "p"), "NullTokenizer", vocab_size=EOD)
    with pytest.raises(ValueError, match="--input names token ids .* and text .*: make a data set of each"):
        preprocess(mixed)
    assert message(json_keys=("a", "b")).endswith("a.npy is a file of token ids: give one key")
    path.write_bytes(b"")
    assert "no usable document" in message()
    with pytest.raises(CorpusError, match="it holds token ids, and text is needed here"):
        list(read_chunks([str(path)], CorpusOptions()))


def test_a_long_document_is_one_bad_line(tmp_path):
    path = write(tmp_path / "a.npy", [[1], [2] * 50_000, [3]])
    small = CorpusOptions(max_line_bytes=1000)
    done = preprocess(job(path, tmp_path / "p", corpus=small, on_bad_line="quarantine"))
    assert (done.documents, done.bad) == (2, 1)
    (entry,) = [json.loads(line) for line in (tmp_path / "p_quarantine.jsonl").read_text().splitlines()]
    assert entry["line"] == 2 and entry["reason"].startswith("the document is longer than --max-line-mb")
    assert entry["beginning"].startswith("2 2 2")


def test_the_tool(tmp_path):
    write(tmp_path / "a.npy", [[1, 2], [3]])
    done = run_tool("preprocess_data.py", "--input", tmp_path / "a.npy", *NULL, "--output-prefix", tmp_path / "p")
    assert done.returncode == 0, done.stderr
    assert "2 documents, 5 tokens, 0 empty texts left out" in done.stdout and "M tokens/s" in done.stdout
