"""The loss of answers only: which tokens bear one, in samples and in whole corpora, and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import write_corpus

from umv2_megatron.config.checks import check_data
from umv2_megatron.config.data_config import DataConfig, marks_prefix
from umv2_megatron.config.resolve import resolve
from umv2_megatron.config.usage import UsageError
from umv2_megatron.data.datasets import build_datasets, data_identity
from umv2_megatron.data.indexing import read_index
from umv2_megatron.data.phases import Phase, current_corpora, with_new_blend
from umv2_megatron.data.scored_tokens import ScoredTokens, scored_tokens
from umv2_megatron.data.tokenizers import build_tokenizer
from umv2_megatron.data.whole_corpora import WholeCorpora, corpus_parts

EOD, START, STOP = 0, 8, 9
LENGTH = 32


def by_reading(tokens: list[int], stop: int | None) -> list[float]:
    """Token by token: the slow, clear reference."""
    found, inside = [], False
    for token in tokens:
        if token == START:
            inside = True
        elif token in (EOD, stop):
            inside = False
        found.append(float(inside))
    return found


@pytest.mark.parametrize("stop", [STOP, None])
def test_the_mask_is_that_of_reading_token_by_token(stop: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        tokens = torch.randint(0, 12, (LENGTH,), generator=generator)
        assert ScoredTokens(START, stop, EOD).mask(tokens).tolist() == by_reading(tokens.tolist(), stop)
    for tokens in ([START], [1, 2, 3], [STOP, START, 5, STOP], [START, 5, EOD, 6]):
        assert ScoredTokens(START, stop, EOD).mask(torch.tensor(tokens)).tolist() == by_reading(tokens, stop)


def corpus(folder) -> str:
    generator = np.random.default_rng(2)
    documents = [generator.integers(1, 12, generator.integers(3, 40)).tolist() for _ in range(200)]
    return write_corpus(folder / "p", [[*each, EOD] for each in documents], EOD)


def test_samples_and_whole_corpora_bear_the_loss_of_answers(tmp_path) -> None:
    prefix = corpus(tmp_path)
    tokenizer = build_tokenizer("NullTokenizer", vocab_size=64)
    tokenizer.eod = EOD
    config = DataConfig(data_path=[prefix], split="8,1,1", tokenizer_type="NullTokenizer", vocab_size=64,
                        loss_start_token=str(START), loss_stop_token=str(STOP), eod_mask_loss=True)  # fmt: skip
    scored = scored_tokens(config, tokenizer)
    assert scored == ScoredTokens(START, STOP, EOD)
    train, valid, _ = build_datasets(config, tokenizer, LENGTH, 1, (40, 4, 0))
    (part,) = corpus_parts(config, "validation", None)
    whole = WholeCorpora([part], config, EOD, LENGTH, 1, scored)
    seen = 0.0
    for dataset in (train, valid, whole):
        for number in range(min(len(dataset), 40)):
            item = dataset[number]
            tokens = item["tokens"].tolist()
            expected = [score * (token != EOD) for score, token in zip(by_reading(tokens, STOP), tokens)]
            if dataset is whole and number == len(whole) - 1:  # has tokens in common with the window before
                assert all(found <= score for found, score in zip(item["loss_mask"].tolist(), expected))
                continue
            assert item["loss_mask"].tolist() == expected
            seen += sum(expected)
    assert seen > 100


def with_marks(folder) -> tuple[str, list[int], list[int]]:
    """A corpus of rising numbers with its marks (2 is no mark that counts): the prefix, all tokens, all marks."""
    generator = np.random.default_rng(3)
    documents, marks, first = [], [], 1
    for _ in range(150):
        size = int(generator.integers(3, 50))
        documents.append(list(range(first, first + size)))
        marks.append(generator.integers(0, 3, size).tolist())
        first += size
    write_corpus(folder / "p_loss_document", marks, 3)
    prefix = write_corpus(folder / "p_text_document", documents, 30_000)
    return prefix, [token for each in documents for token in each], [mark for each in marks for mark in each]


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_marked_tokens_bear_the_loss(order, tmp_path) -> None:
    """In samples of several epochs, in blends, in phases of a blend, and in whole corpora."""
    prefix, tokens, marks = with_marks(tmp_path)
    counts = dict(zip(tokens, marks))
    tokenizer = build_tokenizer("NullTokenizer", vocab_size=30_000)
    options = {"split": "8,2,0", "tokenizer_type": "NullTokenizer", "vocab_size": 30_000, "loss_mask_key": "loss"}
    config = DataConfig(data_path=[prefix], data_order=order, **options)
    config.validate()
    train, valid, _ = build_datasets(config, tokenizer, LENGTH, 1, (3 * len(tokens) // LENGTH, 4, 0))
    blend = DataConfig(data_path=["1", prefix, "2", prefix], data_order=order, **options)
    corpora = current_corpora(config, LENGTH)
    phases = with_new_blend([Phase(0, 50, corpora, {})], corpora, 30, 100)
    whole = WholeCorpora(corpus_parts(config, "validation", None), config, tokenizer.eod, LENGTH, 1)
    others = (build_datasets(blend, tokenizer, LENGTH, 1, (40, 0, 0))[0],
              build_datasets(config, tokenizer, LENGTH, 1, (100, 0, 0), phases)[0])  # fmt: skip
    for dataset, first in ((train, 0), (valid, 0), (others[0], 0), (others[1], 30), (whole, 0)):
        for number in range(first, len(dataset)):
            item = dataset[number]
            expected = [float(counts[token] == 1) for token in item["labels"].tolist()]
            if dataset is whole and number == len(whole) - 1:  # has tokens in common with the window before
                assert all(found <= score for found, score in zip(item["loss_mask"].tolist(), expected))
                continue
            assert item["loss_mask"].tolist() == expected, number


def test_marks_that_do_not_fit_are_refused(tmp_path) -> None:
    prefix, _, _ = with_marks(tmp_path)
    tokenizer = build_tokenizer("NullTokenizer", vocab_size=30_000)

    def build(path: str, key: str) -> None:
        config = DataConfig(data_path=[path], tokenizer_type="NullTokenizer", vocab_size=30_000, loss_mask_key=key)
        build_datasets(config, tokenizer, LENGTH, 1, (4, 0, 0))

    with pytest.raises(ValueError, match=r"--loss-mask-key none: .*p_none_document.idx"):
        build(prefix, "none")
    write_corpus(tmp_path / "p_short_document", [[1] * 5] * 150, 3)
    with pytest.raises(ValueError, match=r"has not one mark for each token of .*\(document 0 differs\)"):
        build(prefix, "short")
    with pytest.raises(ValueError, match="has no key in its name"):
        build(write_corpus(tmp_path / "other", [[1, 2, 3]] * 90, 30_000), "loss")
    with pytest.raises(ValueError, match="p_text_document is the corpus of that key itself"):
        build(prefix, "text")
    write_corpus(tmp_path / "p_none_document", [[0] * length for length in read_index(prefix).lengths.tolist()], 3)
    with pytest.raises(ValueError, match=r"--loss-mask-key none: .*p_none_document has no 1, so that no token of"):
        build(prefix, "none")
    with open(tmp_path / "p_loss_document.bin", "r+b") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match=r"--loss-mask-key loss: .*p_loss_document.idx places document \d+ outside of"):
        build(prefix, "loss")


def test_marks_of_a_key_with_underscores(tmp_path) -> None:
    """P_my_text_document may be of the key text, or of my_text: its sidecar says, and the default is text."""
    (tmp_path / "a_b").mkdir()
    prefix = str(tmp_path / "a_b" / "p_my_text_document")
    for own, made in ((None, "p_my_"), ("my_text", "p_"), ("text", "p_my_"), ("content", "p_my_"), (7, "p_my_")):
        if own is not None:
            Path(f"{prefix}.meta.json").write_text(json.dumps({"json_key": own}))
        assert marks_prefix(prefix, "loss") == str(tmp_path / "a_b" / f"{made}loss_document"), own


def test_marks_of_another_corpus_are_not_taken(tmp_path) -> None:
    """p_loss_document fits p_my_text_document in the length of every document, but marks p_text_document."""
    prefix, _, _ = with_marks(tmp_path)
    for suffix in (".bin", ".idx"):
        shutil.copy(prefix + suffix, tmp_path / f"p_my_text_document{suffix}")
    other = str(tmp_path / "p_my_text_document")
    config = DataConfig(data_path=[other], tokenizer_type="NullTokenizer", vocab_size=30_000, loss_mask_key="loss")
    with pytest.raises(ValueError, match=r"--loss-mask-key loss: .*p_my_loss_document.idx does not exist"):
        build_datasets(config, build_tokenizer("NullTokenizer", vocab_size=30_000), LENGTH, 1, (4, 0, 0))
    argv = ["--model-preset", "umv2-tiny", "--data-path", other, "--tokenizer-type", "NullTokenizer",
            "--vocab-size", "30000", "--lr", "1e-3", "--train-iters", "1", "--loss-mask-key", "loss"]  # fmt: skip
    told = r"there is no file .*p_my_loss_document.idx with the marks of .*p_my_text_document"
    with pytest.raises(UsageError, match=told):
        check_data(resolve(argv, 1))


def test_marks_are_part_of_the_data(tmp_path) -> None:
    """Other marks under the same name are other data; they must be there when a run starts."""
    prefix, _, marks = with_marks(tmp_path)
    tokenizer = build_tokenizer("NullTokenizer", vocab_size=30_000)
    config = DataConfig(data_path=[prefix], tokenizer_type="NullTokenizer", vocab_size=30_000, loss_mask_key="loss")
    first = data_identity(config, tokenizer, LENGTH, 1)
    assert first["marks"].keys() == set(first["corpora"]["data_path"]["fingerprints"])
    write_corpus(tmp_path / "p_loss_document", [[1 - min(mark, 1) for mark in marks]], 3)
    again = data_identity(config, tokenizer, LENGTH, 1)
    assert again["marks"] != first["marks"] and {**again, "marks": first["marks"]} == first
    argv = ["--model-preset", "umv2-tiny", "--data-path", prefix, "--tokenizer-type", "NullTokenizer",
            "--vocab-size", "30000", "--lr", "1e-3", "--train-iters", "1", "--loss-mask-key"]  # fmt: skip
    check_data(resolve([*argv, "loss"], 1))
    for key, told in (("none", r"there is no file .*p_none_document.idx with the marks of"), ("text", "key itself")):
        with pytest.raises(UsageError, match=f"--loss-mask-key {key}: .*{told}"):
            check_data(resolve([*argv, key], 1))


def test_loaders_that_begin_anew_get_the_marks(tmp_path) -> None:
    """A dataset travels to them pickled, before or after its marks have been read."""
    prefix, _, _ = with_marks(tmp_path)
    tokenizer = build_tokenizer("NullTokenizer", vocab_size=30_000)
    config = DataConfig(data_path=[prefix], tokenizer_type="NullTokenizer", vocab_size=30_000, loss_mask_key="loss")
    train = build_datasets(config, tokenizer, LENGTH, 1, (20, 0, 0))[0]
    fresh = pickle.dumps(train)
    expected = train[3]["loss_mask"].tolist()
    assert 0 < sum(expected) < LENGTH
    for each in (fresh, pickle.dumps(train)):
        assert pickle.loads(each)[3]["loss_mask"].tolist() == expected


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"mock_data": True}, "leave it out with --mock-data"),
        ({"data_path": ["p"], "loss_start_token": "7"}, "and --loss-start-token is '7': keep one of them"),
        ({"data_path": ["p"], "fim_rate": 0.5}, "leave it out with --fim-rate"),
        ({"data_path": ["p"], "loss_mask_key": "a/b"}, "--loss-mask-key is 'a/b': expected a key"),
    ],
)
def test_what_marks_exclude(options, told) -> None:
    with pytest.raises(ValueError, match=told):
        DataConfig(**{"tokenizer_type": "ByteLevelTokenizer", "loss_mask_key": "loss", **options}).validate()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"loss_start_token": "="}, "--loss-start-token is '=': the tokenizer has no such token"),
        ({"loss_start_token": "63", "loss_stop_token": "65"}, "--loss-stop-token is '65': the tokenizer has no"),
        ({"loss_start_token": "7", "loss_stop_token": "7"}, "--loss-stop-token is '7', with the id 7 of --loss-start"),
    ],
)
def test_tokens_that_can_not_be(given: dict[str, str], told: str) -> None:
    tokenizer = build_tokenizer("NullTokenizer", vocab_size=64)
    with pytest.raises(ValueError) as error:
        scored_tokens(DataConfig(**given), tokenizer)
    assert told in str(error.value)


def test_the_end_of_documents_begins_nothing() -> None:
    tokenizer = build_tokenizer("NullTokenizer", vocab_size=64)
    with pytest.raises(ValueError, match="the end-of-document token: expected another token"):
        scored_tokens(DataConfig(loss_start_token=str(tokenizer.eod)), tokenizer)
