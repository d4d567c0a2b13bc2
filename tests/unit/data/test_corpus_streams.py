"""The training set over changes of its blend: each corpus goes on where it stood, whatever comes in between.

The reference is slow and plain: a corpus's stream, written out as a list of samples, is mcore's dataset of the first
blend, then datasets of one epoch with the next seeds; a run takes them one by one.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from data_helpers import ROOT, write_corpus

from umv2_megatron.config.data_config import DataConfig
from umv2_megatron.data.datasets import build_datasets, data_identity
from umv2_megatron.data.phases import (
    Corpus,
    Phase,
    current_corpora,
    drawn_from,
    most_drawn_from,
    samples_built,
    saved_phases,
    with_new_blend,
)
from umv2_megatron.data.tokenizers import build_tokenizer
from umv2_megatron.durable_files import CheckpointError

TOKENIZER = build_tokenizer("NullTokenizer", vocab_size=30_000)
LENGTH, SEED = 16, 3
SIZES = {"a": 40, "b": 12, "c": 25, "d": 6}  # documents
FIRST = {name: 7000 * place for place, name in enumerate(SIZES)}


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory) -> dict[str, str]:
    """Corpora in which every token occurs once, and tells which corpus it is of."""
    folder = tmp_path_factory.mktemp("corpora")
    return {name: make_corpus(folder / name, SIZES[name], FIRST[name]) for name in SIZES}


def make_corpus(path: Path, documents: int, first: int) -> str:
    numbers = np.random.default_rng(first)
    parts = []
    for _ in range(documents):
        size = int(numbers.integers(5, 60))
        parts.append(list(range(first + 1, first + 1 + size)))
        first += size
    return write_corpus(path, parts, 30_001)


def config_of(blend: list[str], **options) -> DataConfig:
    config = DataConfig(vocab_size=30_000, tokenizer_type="NullTokenizer", **{"data_path": blend, **options})
    config.validate()
    return config


def train_set(config: DataConfig, samples: int, phases=(), seed: int = SEED):
    return build_datasets(config, TOKENIZER, LENGTH, seed, (samples, 0, 0), phases)[0]


def tokens_of(dataset, first: int, end: int) -> list[list[int]]:
    return [dataset[number]["tokens"].tolist() for number in range(first, end)]


def corpus_of(sample: list[int]) -> str:
    return next(name for name in reversed(SIZES) if sample[0] > FIRST[name])


@dataclass
class Run:
    """A run whose blend changes: what it reads, and what it has to read."""

    prefixes: dict[str, str]
    cache: Path
    split: str = "80,20,0"
    data_order: str = "shuffled"
    phases: list[Phase] = field(default_factory=list)
    consumed: int = 0
    read: list[list[int]] = field(default_factory=list)
    firsts: dict[str, list[list[int]]] = field(default_factory=dict)

    def take(self, weights: dict[str, float], samples: int, planned: int) -> list[list[int]]:
        """Go on with another blend for ``samples`` samples, of ``planned`` in all; the samples."""
        blend = [text for name, weight in weights.items() for text in (str(weight), self.prefixes[name])]
        options = {"split": self.split, "data_order": self.data_order}
        config = config_of(blend, data_cache_path=str(self.cache), **options)
        corpora = current_corpora(config, LENGTH)
        if self.phases:
            self.phases = with_new_blend(self.phases, corpora, self.consumed, planned)
        else:
            self.phases = [Phase(0, planned, corpora, {})]
        # as they come back from a checkpoint
        self.phases = saved_phases({"training_blends": _json(self.phases)}, {}, 0, config, LENGTH)
        dataset = train_set(config, planned, self.phases)
        assert len(dataset) >= planned
        if len(self.phases) == 1:
            parts = getattr(dataset, "datasets", [dataset])
            self.firsts = {name: tokens_of(part, 0, len(part)) for name, part in zip(weights, parts)}
            surplus = parts[0].config.mid_level_dataset_surplus
            assert [part.num_samples for part in parts] == samples_built(self.phases[0], surplus)
        found = tokens_of(dataset, self.consumed, self.consumed + samples)
        self.read += found
        self.consumed += samples
        return found

    def stream(self, name: str, samples: int) -> tuple[list[list[int]], list[int]]:
        """The first samples of a corpus, and how many each epoch (mcore's of the first blend count as one) has."""
        stream, ends, seed = list(self.firsts.get(name, [])), [], SEED
        if stream:
            ends.append(len(stream))
            most = Counter(token for sample in stream for token in sample).most_common(1)[0][1]
            seed += most
        while len(stream) < samples:
            options = {"split": self.split, "data_order": self.data_order}
            config = config_of([self.prefixes[name]], data_cache_path=str(self.cache / "other"), **options)
            epoch = train_set(config, 1, seed=seed)  # one sample asked for is one epoch built
            stream += tokens_of(epoch, 0, len(epoch))
            ends.append(len(epoch))
            seed += 1
        return stream, ends

    def check(self) -> None:
        for name in SIZES:
            found = [sample for sample in self.read if corpus_of(sample) == name]
            stream, epochs = self.stream(name, len(found))
            assert found == stream[: len(found)], name
            at = 0
            for number, size in enumerate(epochs):
                seen = Counter(token for sample in found[at : at + size] for token in sample)
                together = number == 0 and name in self.firsts
                assert together or not seen or max(seen.values()) == 1, "a document twice in an epoch"
                at += size


def _json(phases: list[Phase]) -> list[dict]:
    return json.loads(json.dumps([phase.as_json() for phase in phases]))


@pytest.mark.parametrize("data_order", ["shuffled", "sequential"])
def test_a_corpus_goes_on_where_it_stood(data_order, prefixes, tmp_path):
    """Another share, dropped and taken back, new, and through several epochs."""
    run = Run(prefixes, tmp_path, data_order=data_order)
    run.take({"a": 0.7, "b": 0.3}, samples=20, planned=40)
    found = run.take({"a": 1, "c": 3}, samples=33, planned=90)
    assert [corpus_of(sample) for sample in found].count("c") == pytest.approx(0.75 * 33, abs=1)
    found = run.take({"b": 0.5, "a": 0.2, "c": 0.3}, samples=150, planned=203)
    assert [corpus_of(sample) for sample in found].count("b") == pytest.approx(75, abs=1)
    per_epoch = run.phases[-1].corpora[0].samples_per_epoch
    assert per_epoch and 3 * per_epoch < 75, "the next blend is to begin in a later epoch of b"
    run.take({"d": 1, "b": 1}, samples=50, planned=300)
    run.check()


def test_one_corpus_after_another(prefixes, tmp_path):
    run = Run(prefixes, tmp_path)
    run.take({"a": 1}, samples=10, planned=30)
    run.take({"c": 1}, samples=10, planned=30)
    run.take({"a": 1}, samples=80, planned=100)
    run.check()


@pytest.mark.parametrize("draw", range(4))
def test_drawn_histories(draw, prefixes, tmp_path):
    numbers = random.Random(draw)
    run = Run(prefixes, tmp_path)
    for _ in range(numbers.randrange(2, 5)):
        names = numbers.sample(sorted(SIZES), numbers.randrange(1, 4))
        samples = numbers.randrange(0, 60)
        weights = {name: round(numbers.uniform(0.05, 1), 3) for name in names}
        run.take(weights, samples, planned=run.consumed + samples + numbers.randrange(1, 120))
    run.check()


def test_the_order_does_not_depend_on_how_many_samples_follow(prefixes, tmp_path):
    config = config_of([prefixes["a"], prefixes["d"]], split="1,0,0", data_cache_path=str(tmp_path))
    first = Phase(0, 50, current_corpora(config, LENGTH), {})
    phases = with_new_blend([first], first.corpora[::-1], 30, 1)
    config = config_of([prefixes["d"], prefixes["a"]], split="1,0,0", data_cache_path=str(tmp_path))
    short, long = (train_set(config, samples, phases) for samples in (60, 500))
    assert tokens_of(short, 30, 60) == tokens_of(long, 30, 60)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert tokens_of(train_set(config, 500, phases), 30, 500) == tokens_of(long, 30, 500)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files, "the cache was not used"


def test_documents_are_rearranged_alike_wherever_a_blend_begins(prefixes, tmp_path):
    """--fim-rate draws by the sample's number in its epoch."""
    fim = {"fim_rate": 1.0, "fim_prefix_token": "29001", "fim_middle_token": "29002", "fim_suffix_token": "29003"}
    config = config_of([prefixes["d"]], split="1,0,0", data_cache_path=str(tmp_path), **fim)
    old = config_of([prefixes["a"]], split="1,0,0", data_cache_path=str(tmp_path), **fim)
    phases = with_new_blend([Phase(0, 9, current_corpora(old, LENGTH), {})], current_corpora(config, LENGTH), 5, 99)
    whole = tokens_of(train_set(config, 99, phases), 5, 99)
    phases = with_new_blend(phases, phases[-1].corpora, 60, 99)
    assert whole[55:] == tokens_of(train_set(config, 99, phases), 60, 99)
    assert phases[-1].corpora[0].samples_per_epoch < 25 and all(29_001 in sample for sample in whole)


def test_only_the_last_blend_is_needed(prefixes, tmp_path):
    gone = make_corpus(tmp_path / "gone", 20, 21_000)
    first = config_of(["1", gone, "1", prefixes["a"]], split="1,0,0", data_cache_path=str(tmp_path / "cache"))
    phases = [Phase(0, 40, current_corpora(first, LENGTH), {})]
    before = tokens_of(train_set(first, 40), 0, 10)
    for end in (".idx", ".bin"):
        os.remove(gone + end)
    now = config_of([prefixes["a"]], split="1,0,0", data_cache_path=str(tmp_path / "cache"))
    phases = with_new_blend(phases, current_corpora(now, LENGTH), 10, 40)
    dataset = train_set(now, 40, phases)
    after = tokens_of(dataset, 10, 30)
    seen = Counter(token for sample in before + after for token in sample if token < 7000)
    assert max(seen.values()) == 1 and phases[-1].consumed[phases[-1].corpora[0].fingerprint] == 5
    with pytest.raises(IndexError, match="sample 9 is of an earlier blend.* begins with sample 10"):
        dataset[9]


def test_corpora_per_split_and_their_other_sets(prefixes, tmp_path):
    options = {"data_path": None, "valid_data_path": [prefixes["d"]], "data_cache_path": str(tmp_path)}
    first = config_of([], train_data_path=["1", prefixes["a"], "2", prefixes["b"]], **options)
    phases = [Phase(0, 30, current_corpora(first, LENGTH), {})]
    now = config_of([], train_data_path=["1", prefixes["b"], "2", prefixes["c"]], **options)
    phases = with_new_blend(phases, current_corpora(now, LENGTH), 12, 30)
    old = build_datasets(first, TOKENIZER, LENGTH, SEED, (30, 4, 0))
    new = build_datasets(now, TOKENIZER, LENGTH, SEED, (30, 4, 0), phases)
    assert tokens_of(old[1], 0, 4) == tokens_of(new[1], 0, 4) and new[2] is None
    read = tokens_of(old[0], 0, 12) + tokens_of(new[0], 12, 30)
    of_b = [sample for sample in read if corpus_of(sample) == "b"]
    assert of_b == tokens_of(old[0].datasets[1], 0, len(of_b)) and len(of_b) > 12


def test_validation_documents_stay_out_of_training(prefixes, tmp_path):
    run = Run(prefixes, tmp_path, split="50,50,0")
    run.take({"a": 1, "b": 1}, samples=10, planned=30)
    config = config_of(["1", prefixes["b"], "3", prefixes["d"]], split="50,50,0", data_cache_path=str(tmp_path))
    phases = with_new_blend(run.phases, current_corpora(config, LENGTH), 10, 100)
    train, valid, _ = build_datasets(config, TOKENIZER, LENGTH, SEED, (100, 20, 0), phases)
    trained = {token for sample in run.read + tokens_of(train, 10, 100) for token in sample}
    assert not trained & {token for sample in tokens_of(valid, 0, 20) for token in sample}


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1, 1, 1], [5, 1e-3, 2, 0.1], [1], [3, 3.0000001]])
def test_counts_are_those_of_the_blend(weights):
    phase = Phase(7, 0, tuple(Corpus(str(i), str(i), weight, None) for i, weight in enumerate(weights)), {"0": 5})
    share = phase.shares()
    taken: list[int] = [0] * len(weights)
    for number in range(300):
        counts = phase.consumed_at(7 + number)
        assert [counts.get(str(i), 0) - 5 * (i == 0) for i in range(len(weights))] == taken == drawn_from(share, number)
        assert all(most >= count for most, count in zip(most_drawn_from(share, number), taken))
        taken[int(np.argmax([each * max(number, 1) - count for each, count in zip(share, taken)]))] += 1


def test_what_cannot_be_gone_on_in(prefixes, tmp_path):
    config = config_of([prefixes["a"], prefixes["b"]], split="1,0,0")
    corpora = current_corpora(config, LENGTH)
    copy = Corpus("elsewhere/a", corpora[0].fingerprint, 1.0, 10)
    for old, new, whose in ((corpora, (*corpora, copy), "the new"), ((*corpora, copy), corpora, "the checkpoint's")):
        with pytest.raises(ValueError, match=f"{whose} blend names twice: .*a and elsewhere/a have the same content"):
            with_new_blend([Phase(0, 50, old, {})], new, 10, 50)
    short = write_corpus(tmp_path / "short", [[1, 2, 3]], 30_001)
    with pytest.raises(ValueError, match="cannot read .*short: its training documents are shorter than one sample"):
        with_new_blend([Phase(0, 50, corpora, {})], current_corpora(config_of([short]), LENGTH), 10, 50)


@pytest.mark.parametrize("given", [["2", "1"], None], ids=["weights", "tokens"])
def test_a_checkpoint_that_records_no_blends(given, prefixes, tmp_path):
    moved = {name: make_corpus(tmp_path / name, SIZES[name], FIRST[name]) for name in "ab"}
    paths = [moved["a"], moved["b"]]
    blend = [text for pair in zip(given, paths) for text in pair] if given else paths
    config = config_of(blend, split="80,20,0")
    data = json.loads(json.dumps(data_identity(config, TOKENIZER, LENGTH, SEED)))
    expected = [Phase(0, 60, current_corpora(config, LENGTH), {})]
    values = {"data_path": blend}
    now = config_of([prefixes["c"]], split="80,20,0")
    assert saved_phases(data, values, 60, now, LENGTH) == expected
    for end in (".idx", ".bin"):
        os.remove(moved["b"] + end)
    if given:
        found = saved_phases(data, values, 60, now, LENGTH)[0].corpora
        assert [each.weight for each in found] == [2, 1] and found[1].samples_per_epoch is None
    else:
        with pytest.raises(ValueError, match=r"in proportion to its tokens, and .*/b is gone or has changed"):
            saved_phases(data, values, 60, now, LENGTH)
        there = config_of([prefixes["c"], prefixes["b"]], split="80,20,0")
        found = saved_phases(data, values, 60, there, LENGTH)[0].corpora
        assert found == expected[0].corpora, "the same files at another place"
    assert saved_phases({"corpora": {}, "mock_data": True}, {}, 60, now, LENGTH) == []


@pytest.mark.parametrize(
    "damage", [{"corpora": []}, {"from_sample": -1}, {"consumed": 3}, {"corpora": [{"prefix": "a"}]}, {"samples": None}]
)
def test_damaged_records(damage, prefixes):
    config = config_of([prefixes["a"]])
    record = {**Phase(0, 60, current_corpora(config, LENGTH), {}).as_json(), **damage}
    with pytest.raises(CheckpointError, match="config.json has damaged training_blends"):
        saved_phases({"training_blends": [record]}, {}, 60, config, LENGTH)


RANKS = """
    import json, sys
    import torch.distributed as dist
    from umv2_megatron.config.data_config import DataConfig
    from umv2_megatron.data.datasets import build_datasets
    from umv2_megatron.data.phases import saved_phases
    from umv2_megatron.data.tokenizers import build_tokenizer

    rank, store, cache, record, *blend = sys.argv[1:]
    dist.init_process_group("gloo", init_method="file://" + store, rank=int(rank), world_size=2)
    config = DataConfig(data_path=blend, tokenizer_type="NullTokenizer", vocab_size=30000, split="80,20,0",
                        data_cache_path=cache, num_dataset_builder_threads=2)
    phases = saved_phases({"training_blends": json.loads(record)}, {}, 0, config, 16)
    tokenizer = build_tokenizer("NullTokenizer", vocab_size=30000)
    train, valid, _ = build_datasets(config, tokenizer, 16, 3, (120, 5, 0), phases)
    print(json.dumps([train[i]["tokens"].tolist() for i in range(25, 120)]))
    print(len(valid))
    dist.barrier()
    dist.destroy_process_group()
"""


def test_two_ranks_read_what_one_reads(prefixes, tmp_path):
    run = Run(prefixes, tmp_path / "alone")
    run.take({"a": 1, "b": 1}, samples=25, planned=60)
    expected = run.take({"b": 2, "c": 1, "d": 1}, samples=95, planned=120)
    blend = ["2", prefixes["b"], "1", prefixes["c"], "1", prefixes["d"]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(RANKS), str(rank), str(tmp_path / "store"), str(tmp_path / "both"),
             json.dumps(_json(run.phases)), *blend],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    for output, _ in outputs:
        samples, valid = output.splitlines()[-2:]
        assert json.loads(samples) == expected and int(valid) >= 5
