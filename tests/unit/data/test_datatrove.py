"""Token files of datatrove's own writer, as a corpus to train on."""

import logging
from pathlib import Path

import numpy as np
import pytest
from data_helpers import sources, write_jsonl
from test_tokenizers import tokenizer_json  # noqa: F401  a fixture

from umv2_megatron.config.data_config import DataConfig
from umv2_megatron.data.corpus import CorpusOptions
from umv2_megatron.data.datasets import build_datasets
from umv2_megatron.data.indexing import check_corpus, read_meta, read_tokens
from umv2_megatron.data.preprocessing import Job, preprocess
from umv2_megatron.data.tokenizers import build_tokenizer

pytest.importorskip("datatrove", reason="requirements-inputs.txt is not installed")


@pytest.fixture(scope="module")
def written(tmp_path_factory, tokenizer_json):  # noqa: F811
    """(prefix of datatrove's files, path of the tokenizer, texts)."""
    import tokenizers
    from datatrove.data import Document
    from datatrove.pipeline.tokens import MegatronDocumentTokenizer

    folder = tmp_path_factory.mktemp("datatrove")
    whole = tokenizers.Tokenizer.from_file(str(tokenizer_json))
    whole.no_truncation()
    whole.save(str(folder / "tokenizer.json"))
    texts = [text for text in sources(30) if "<|endoftext|>" not in text]
    writer = MegatronDocumentTokenizer(
        str(folder / "out"), tokenizer_name_or_path=str(folder / "tokenizer.json"), eos_token="<|endoftext|>"
    )
    writer.run((Document(text=text, id=str(i)) for i, text in enumerate(texts)), 0, 1)
    return str(folder / "out/00000_tokens"), str(folder / "tokenizer.json"), texts


def test_the_bytes_are_ours(written, tmp_path):
    prefix, model, texts = written
    corpus = write_jsonl(tmp_path / "a.jsonl", texts)
    job = Job((str(corpus),), str(tmp_path / "p"), "HuggingFaceTokenizer", model, append_eod=True)
    ours = preprocess(job).prefixes[0]
    for end in (".bin", ".idx"):
        assert Path(prefix + end).read_bytes() == Path(ours + end).read_bytes()
    # its .bin as token ids, which gives a sidecar
    as_ids = CorpusOptions(input_format="tokens")
    again = Job((prefix + ".bin",), str(tmp_path / "q"), "HuggingFaceTokenizer", model, corpus=as_ids)
    converted = preprocess(again).prefixes[0]
    assert Path(converted + ".idx").read_bytes() == Path(prefix + ".idx").read_bytes()
    assert read_meta(converted)["tokenizer"] == read_meta(ours)["tokenizer"] and read_meta(prefix) is None


def test_it_trains(written, caplog):
    prefix, model, texts = written
    tokenizer = build_tokenizer("HuggingFaceTokenizer", model)
    assert len(check_corpus(prefix, tokenizer.vocab_size, tokenizer.sha256).lengths) == len(texts)
    kind = "HuggingFaceTokenizer"
    config = DataConfig(data_path=[prefix], split="80,20,0", tokenizer_type=kind, tokenizer_model=model)
    with caplog.at_level(logging.WARNING):
        train, valid, _ = build_datasets(config, tokenizer, 64, 1, (20, 2, 0))
    assert not [record for record in caplog.records if "end-of-document" in record.message]
    stream = read_tokens(prefix).astype(np.int64).tobytes()
    assert all(train[i]["tokens"].numpy()[:8].tobytes() in stream for i in range(20))


def test_a_tokenizer_that_did_not_make_it_is_warned_of(written, caplog):
    prefix = written[0]
    tokenizer = build_tokenizer("NullTokenizer", None, 5000)
    config = DataConfig(data_path=[prefix], split="80,20,0", tokenizer_type="NullTokenizer", vocab_size=5000)
    with caplog.at_level(logging.WARNING):
        build_datasets(config, tokenizer, 64, 1, (20, 2, 0))
    (message,) = [record.message for record in caplog.records if "end-of-document" in record.message]
    assert message.startswith(f"{prefix}: no document looked at ends with the end-of-document token 5000")
