"""--full-validation reads every token once, wherever sequences, windows, parts and batches end."""

from __future__ import annotations

import numpy as np
import pytest
from data_helpers import write_corpus

from umv2_megatron.config.data_config import DataConfig, parse_sets
from umv2_megatron.data.whole_corpora import CorpusPart, WholeCorpora, corpus_parts

EOD, LENGTH = 256, 8


def documents(seed: int, count: int) -> list[list[int]]:
    """Token ids that end with an end-of-document token each."""
    random = np.random.default_rng(seed)
    return [[*random.integers(1, 200, random.integers(0, 20)).tolist(), EOD] for _ in range(count)]


@pytest.mark.parametrize("multiple", [1, 5])
def test_the_scored_targets_are_the_corpora(tmp_path, multiple):
    held = {name: documents(seed, 9) for seed, name in enumerate(("a", "b"))}
    prefixes = [write_corpus(tmp_path / name, texts) for name, texts in held.items()]
    dataset = WholeCorpora([CorpusPart(prefix, 0, 9) for prefix in prefixes], DataConfig(), EOD, LENGTH, multiple)
    streams = [[token for text in texts for token in text] for texts in held.values()]
    assert dataset.tokens == sum(map(len, streams)) and len(dataset) % multiple == 0
    targets, inputs = [], []
    for number in range(len(dataset)):
        window = dataset[number]
        scored = window["loss_mask"].bool()
        assert scored.int().diff().abs().sum() <= 2  # one run of targets
        targets += window["labels"][scored].tolist()
        inputs += window["tokens"][scored].tolist()
        assert window["position_ids"].tolist() == list(range(LENGTH)) and window["tokens"].max() <= EOD
    assert targets == streams[0] + streams[1]
    assert inputs == [EOD, *streams[0][:-1], EOD, *streams[1][:-1]]


def test_a_part_of_a_corpus_and_masked_ends(tmp_path):
    held = documents(3, 10)
    prefix = write_corpus(tmp_path / "c", held)
    config = DataConfig(data_path=[prefix], split="5,3,2", eod_mask_loss=True)
    (part,) = corpus_parts(config, "validation", None)
    assert (part.first, part.end) == (5, 8)
    dataset = WholeCorpora([part], config, EOD, LENGTH, 1)
    stream = [token for text in held[5:8] for token in text]
    windows = [dataset[number] for number in range(len(dataset))]
    targets = [token for window in windows for token in window["labels"][window["loss_mask"].bool()].tolist()]
    assert targets == [token for before, token in zip([EOD, *stream], stream) if before != EOD]


def test_names_of_sets():
    flag = "--valid-data-path"
    assert parse_sets(flag, ["a", "b"]) == {None: ["a", "b"]}
    assert parse_sets(flag, ["./x=1/a", "dir/run=3/b"]) == {None: ["./x=1/a", "dir/run=3/b"]}
    assert parse_sets(flag, ["web=0.7", "a", "0.3", "b", "code=c=d"]) == {
        "web": ["0.7", "a", "0.3", "b"],
        "code": ["c=d"],
    }
    for words, message in ((["a=x", "a=y"], "two sets named a"), (["x", "a=y"], "expected a name before the first")):
        with pytest.raises(ValueError, match=message):
            parse_sets(flag, words)
    config = DataConfig(train_data_path=["t"], valid_data_path=["web=0.7", "a", "0.3", "b", "code=c"])
    assert config.split_blends() == [(["t"], None), (["a", "b", "c"], None), None]
    assert config.set_blends("validation") == {"web": (["a", "b"], [0.7, 0.3]), "code": (["c"], None)}
    with pytest.raises(ValueError, match="--valid-data-path is empty"):
        DataConfig(train_data_path=["t"], valid_data_path=["web=", "code=c"]).split_blends()
