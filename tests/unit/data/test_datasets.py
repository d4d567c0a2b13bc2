"""Datasets from token files: the right tokens, the same for every rank and every start, and no hang or stale order."""

import json
import os
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from data_helpers import ROOT, write_corpus, write_jsonl

from umv2_megatron.config.data_config import DataConfig, parse_blend, parse_split
from umv2_megatron.data.datasets import build_datasets, data_identity
from umv2_megatron.data.preprocessing import Job, preprocess
from umv2_megatron.data.tokenizers import build_tokenizer

TOKENIZER = build_tokenizer("NullTokenizer", vocab_size=30_000)
LENGTH = 16


def corpus(path, documents=100, first=0, seed=0):
    """Documents of distinct ids in rising order, so that each token tells where it comes from; 0 ends a document."""
    generator = np.random.default_rng(seed)
    parts = []
    for _ in range(documents):
        size = int(generator.integers(5, 60))
        parts.append([*range(first + 1, first + 1 + size), 0])
        first += size
    return write_corpus(path, parts, 30_001)


def build(sizes=(50, 5, 0), seed=3, **options):
    options.setdefault("tokenizer_type", "NullTokenizer")
    config = DataConfig(vocab_size=30_000, **options)
    config.validate()
    return build_datasets(config, TOKENIZER, LENGTH, seed, sizes)


def tokens_of(dataset, count=None):
    return np.stack([dataset[i]["tokens"].numpy() for i in range(count or len(dataset))])


def test_samples_are_windows_of_the_corpus(tmp_path):
    prefix = corpus(tmp_path / "p")
    train, valid, test = build(data_path=[prefix], split="80,20,0")
    assert test is None and len(train) >= 50 and len(valid) >= 5
    for dataset in (train, valid):
        for i in range(len(dataset)):
            sample = dataset[i]
            assert set(sample) == {"tokens", "labels", "loss_mask", "position_ids"}
            tokens, labels = sample["tokens"].numpy(), sample["labels"].numpy()
            assert len(tokens) == LENGTH and (tokens[1:] == labels[:-1]).all()
            inside = tokens != 0
            assert (labels[inside][labels[inside] != 0] == tokens[inside][labels[inside] != 0] + 1).all()
            assert sample["position_ids"].tolist() == list(range(LENGTH)) and sample["loss_mask"].sum() == LENGTH
    seen = [set(tokens_of(dataset).ravel()) - {0} for dataset in (train, valid)]
    assert max(seen[0]) < min(seen[1]), "documents of training and validation must not mix"


def test_every_token_once_per_epoch(tmp_path):
    prefix = corpus(tmp_path / "p")
    epoch = int(np.fromfile(prefix + ".bin", dtype=np.uint16).size - 1) // LENGTH
    (train, _, _) = build((epoch, 0, 0), data_path=[prefix], split="1,0,0")
    values, counts = np.unique(tokens_of(train), return_counts=True)
    assert len(train) == epoch and counts[values != 0].max() == 1


def test_order_follows_the_seed(tmp_path):
    prefix = corpus(tmp_path / "p")
    first, again = (tokens_of(build(data_path=[prefix])[0]) for _ in range(2))
    assert (first == again).all()
    fresh = tokens_of(build(data_path=[prefix], data_cache_path=str(tmp_path / "other"))[0])
    assert (first == fresh).all()
    assert not (first == tokens_of(build(data_path=[prefix], seed=4)[0])[: len(first)]).all()


def test_sequential_order_is_that_of_the_corpus(tmp_path):
    """Over two epochs and a half; with the cache of the shuffled order beside it; validation as ever."""
    prefix = corpus(tmp_path / "p")
    shuffled, valid, _ = build(data_path=[prefix], split="80,20,0")
    training = np.unique(tokens_of(shuffled))[1:]
    tokens = np.fromfile(prefix + ".bin", dtype=np.uint16)
    tokens = tokens[: np.flatnonzero(np.isin(tokens, training))[-1] + 2]  # with the end of the last document
    samples = int(2.5 * len(tokens)) // LENGTH
    train, again, _ = build((samples, 5, 0), data_path=[prefix], split="80,20,0", data_order="sequential")
    assert len(train) >= samples and (tokens_of(again) == tokens_of(valid)).all()
    found = tokens_of(train, samples).ravel()
    assert (found == np.tile(tokens, 3)[: len(found)]).all()


def test_options_reach_mcore(tmp_path):
    prefix = write_corpus(tmp_path / "p", [[1, 2, 3, 30_000]] * 100, 30_001)
    options = {"eod_mask_loss": True, "reset_position_ids": True, "reset_attention_mask": True}
    train = build(data_path=[prefix], create_attention_mask_in_dataloader=True, **options)[0]
    sample = train[0]
    ends = sample["tokens"] == 30_000
    assert ends.any() and (sample["loss_mask"] == (~ends).float()).all()
    assert sample["position_ids"].max() == 3
    assert sample["attention_mask"].shape == (1, LENGTH, LENGTH)
    assert not sample["attention_mask"][0, 0, 0] and sample["attention_mask"][0, -1, 0]


@pytest.mark.parametrize("weights", [True, False])
def test_blends(tmp_path, weights):
    small, large = corpus(tmp_path / "a", 40), corpus(tmp_path / "b", 160, first=10_000)
    path = ["3", small, "1", large] if weights else [small, large]
    sizes = (400, 40, 0)
    train, valid, _ = build(sizes, data_path=path, split="80,20,0")
    assert 400 <= len(train) <= 402 and 40 <= len(valid) <= 42  # mcore rounds each corpus up
    from_small = np.mean([train[i]["dataset_id"] == 0 for i in range(400)])
    sizes_in_tokens = [os.path.getsize(prefix + ".bin") for prefix in (small, large)]
    expected = 0.75 if weights else sizes_in_tokens[0] / sum(sizes_in_tokens)
    assert from_small == pytest.approx(expected, abs=0.01)
    again = build(sizes, data_path=path, split="80,20,0")[0]
    threads = {"num_dataset_builder_threads": 3, "data_cache_path": str(tmp_path / "fresh")}
    threaded = build(sizes, data_path=path, split="80,20,0", **threads)[0]
    assert (tokens_of(train) == tokens_of(again)).all() and (tokens_of(train) == tokens_of(threaded)).all()


def test_a_blend_without_weights_is_drawn_by_tokens_not_by_documents(tmp_path):
    """Three documents of four are in the first corpus, and one token of four."""
    words = np.arange(1, 10_000)
    short = write_corpus(tmp_path / "short", [[*words[5 * i : 5 * i + 9], 0] for i in range(120)], 30_001)
    long = write_corpus(tmp_path / "long", [[*words[5 * i : 5 * i + 89], 0] for i in range(40)], 30_001)
    train = build((400, 0, 0), data_path=[short, long], split="1,0,0")[0]
    assert np.mean([train[i]["dataset_id"] == 0 for i in range(400)]) == pytest.approx(0.25, abs=0.01)


def test_corpora_per_split(tmp_path):
    one, two, three = (corpus(tmp_path / name, 30, first=9000 * i) for i, name in enumerate("abc"))
    blend = ["1", two, "1", three]
    train, valid, test = build((10, 6, 5), train_data_path=[one], valid_data_path=blend, test_data_path=[three])
    assert tokens_of(train).max() < 9000 and len(valid) == 6
    assert [valid[i]["dataset_id"] for i in range(6)].count(0) == 3
    assert tokens_of(test)[tokens_of(test) > 0].min() > 18_000
    with pytest.raises(ValueError, match="--test-data-path is missing"):
        build((10, 0, 5), train_data_path=[one])
    assert build((10, 0, 0), train_data_path=[one], valid_data_path=[two])[1] is None


def test_mock_data():
    train, valid, test = build((100, 10, 0), mock_data=True)
    assert len(train) >= 100 and len(valid) >= 10 and test is None
    assert train[0]["tokens"].shape == (LENGTH,) and int(tokens_of(train, 20).max()) <= TOKENIZER.eod
    assert (tokens_of(train, 20) == tokens_of(build((100, 10, 0), mock_data=True)[0], 20)).all()


def test_split_without_tokens_is_refused(tmp_path):
    """mcore would loop forever."""
    prefix = corpus(tmp_path / "p", 10)
    with pytest.raises(ValueError, match="--split 969,30,1 leaves the validation set no document of"):
        build((5, 5, 0), data_path=[prefix])
    assert build((5, 0, 0), data_path=[prefix])[0] is not None


def test_a_test_set_without_documents_is_left_out(tmp_path, caplog):
    """As the default --split leaves it for a small corpus."""
    prefix = corpus(tmp_path / "p", 400)
    train, valid, test = build((5, 5, 5), data_path=[prefix])
    assert len(train) >= 5 and len(valid) >= 5 and test is None
    assert "leaves the test set no document of" in caplog.text
    assert all(made is not None for made in build((5, 5, 5), data_path=[prefix], split="90,5,5"))


def test_broken_corpus_is_refused(tmp_path):
    prefix = corpus(tmp_path / "p")
    with open(prefix + ".bin", "ab") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match="p.idx places document"):
        build(data_path=[prefix])
    with pytest.raises(ValueError, match="nothing.idx does not exist"):
        build(data_path=[str(tmp_path / "nothing")])


class Canary:
    def __reduce__(self):
        return os.mkdir, (os.environ["UMV2_TEST_CANARY"],)


@pytest.mark.parametrize("damage", ["truncated", "empty", "pickle"])
@pytest.mark.parametrize("blend", [False, True])
def test_damaged_cache_is_built_again(tmp_path, monkeypatch, damage, blend):
    prefix = corpus(tmp_path / "p")
    path = [prefix, corpus(tmp_path / "q")] if blend else [prefix]
    cache = tmp_path / "cache"
    expected = tokens_of(build(data_path=path, split="80,20,0", data_cache_path=str(cache))[0])
    monkeypatch.setenv("UMV2_TEST_CANARY", str(tmp_path / "canary"))
    files = sorted(cache.glob("*.npy"))
    assert len(files) == (16 if blend else 6)
    for file in files:
        content = file.read_bytes()
        if damage == "pickle":
            np.save(file, np.array([Canary()], dtype=object), allow_pickle=True)
            assert pickle.dumps(Canary())[:40] and file.read_bytes() != content
        else:
            file.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    again = tokens_of(build(data_path=path, split="80,20,0", data_cache_path=str(cache))[0])
    assert (expected == again).all() and not (tmp_path / "canary").exists()
    assert sorted(cache.glob("*.npy")) == files and not [p for p in cache.iterdir() if p.suffix not in (".npy", ".txt")]
    for file in files:
        np.load(file, allow_pickle=False)


def test_a_corpus_made_anew_is_not_read_in_the_old_order(tmp_path):
    prefix = corpus(tmp_path / "p", 100)
    build(data_path=[prefix])
    corpus(tmp_path / "p", 60, first=500, seed=1)
    found = tokens_of(build(data_path=[prefix])[0])
    other = corpus(tmp_path / "q", 60, first=500, seed=1)
    assert (found == tokens_of(build(data_path=[other])[0])).all()


def test_identity_changes_with_what_determines_the_samples(tmp_path):
    prefix = corpus(tmp_path / "p")
    config = DataConfig(data_path=[prefix])
    first = data_identity(config, TOKENIZER, LENGTH, 3)
    assert json.loads(json.dumps(first)) == data_identity(config, TOKENIZER, LENGTH, 3)
    others = [
        data_identity(config, TOKENIZER, LENGTH, 4),
        data_identity(config, TOKENIZER, 2 * LENGTH, 3),
        data_identity(config, build_tokenizer("ByteLevelTokenizer"), LENGTH, 3),
        data_identity(DataConfig(data_path=[prefix], split="1,1,1"), TOKENIZER, LENGTH, 3),
        data_identity(DataConfig(data_path=["2", prefix, "1", prefix]), TOKENIZER, LENGTH, 3),
        data_identity(DataConfig(data_path=[prefix], data_order="sequential"), TOKENIZER, LENGTH, 3),
    ]
    corpus(tmp_path / "p", seed=9)
    others.append(data_identity(config, TOKENIZER, LENGTH, 3))
    assert all(other != first for other in others)


def test_preprocessed_text_comes_back(tmp_path):
    text = "".join(f"line {i}\n" for i in range(400))
    source = write_jsonl(tmp_path / "c.jsonl", [text] * 3)
    job = Job((str(source),), str(tmp_path / "p"), "ByteLevelTokenizer", append_eod=True)
    tokenizer = build_tokenizer("ByteLevelTokenizer")
    config = DataConfig(data_path=preprocess(job).prefixes, tokenizer_type="ByteLevelTokenizer", split="1,0,0")
    train = build_datasets(config, tokenizer, 64, 0, (20, 0, 0))[0]
    for i in range(20):
        pieces = tokenizer.detokenize(train[i]["tokens"]).split("line 0\n")
        assert all(piece in text for piece in pieces)


RANKS = """
    import sys, json, os
    import torch, torch.distributed as dist
    from umv2_megatron.config.data_config import DataConfig
    from umv2_megatron.data.datasets import build_datasets
    from umv2_megatron.data.tokenizers import build_tokenizer

    rank, store, *paths = sys.argv[1:]
    dist.init_process_group("gloo", init_method="file://" + store, rank=int(rank), world_size=2)
    tokenizer = build_tokenizer("NullTokenizer", vocab_size=30000)
    for path in (paths[:1], paths):
        config = DataConfig(data_path=path, tokenizer_type="NullTokenizer", vocab_size=30000, split="80,20,0")
        train, valid, _ = build_datasets(config, tokenizer, 16, 3, (50, 5, 0))
        print(json.dumps([train[i]["tokens"].tolist() for i in range(50)]))
    dist.barrier()
    dist.destroy_process_group()
"""


def test_two_ranks_agree_with_one(tmp_path):
    """A single corpus and a blend."""
    paths = [corpus(tmp_path / "a"), corpus(tmp_path / "b", first=10_000)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(RANKS), str(rank), str(tmp_path / "store"), *paths],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    for i, path in enumerate((paths[:1], paths)):
        found = [json.loads(output[0].splitlines()[i - 2]) for output in outputs]
        alone = build(data_path=path, split="80,20,0", data_cache_path=str(tmp_path / "fresh"))[0]
        assert found[0] == found[1] == tokens_of(alone, 50).tolist()


def test_blend_and_split_forms():
    assert parse_blend("--data-path", ["a"]) == (["a"], None)
    assert parse_blend("--data-path", ["a", "b"]) == (["a", "b"], None)
    assert parse_blend("--data-path", ["0.3", "a", "7", "b"]) == (["a", "b"], [0.3, 7.0])
    for wrong in ([], [""], ["1"], ["1", "a", "b"], ["a", "1"], ["1", "2"], ["0", "a"], ["-1", "a"], ["nan", "a"]):
        with pytest.raises(ValueError, match="--data-path"):
            parse_blend("--data-path", wrong)
    assert parse_split("969, 30, 1") == pytest.approx([0.969, 0.03, 0.001])
    assert parse_split("9,1") == pytest.approx([0.9, 0.1, 0])
    for wrong_split in ("", "a,b,c", "0,0,0", "1,-1,1", "1,1,1,1", "inf,1,1"):
        with pytest.raises(ValueError, match="--split"):
            parse_split(wrong_split)


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({}, "no data"),
        ({"data_path": ["p"], "mock_data": True}, "exclude each other"),
        ({"data_path": ["p"], "train_data_path": ["p"]}, "exclude each other"),
        ({"valid_data_path": ["p"]}, "--train-data-path"),
        ({"data_path": ["p"], "tokenizer_type": None}, "--tokenizer-type"),
        ({"data_path": ["p"], "tokenizer_type": "BPE"}, "--tokenizer-type"),
        ({"data_path": ["p"], "tokenizer_type": "HuggingFaceTokenizer"}, "--tokenizer-model"),
        ({"mock_data": True, "tokenizer_type": "NullTokenizer"}, "--vocab-size"),
        ({"data_path": ["p"], "num_workers": -1}, "--num-workers"),
        ({"data_path": ["p"], "num_dataset_builder_threads": 0}, "--num-dataset-builder-threads"),
        ({"data_path": ["p"], "split": "x"}, "--split"),
        ({"mock_data": True, "data_order": "sequential"}, "--data-order"),
    ],
)
def test_refused_options(options, flag):
    with pytest.raises(ValueError, match=flag) as caught:
        DataConfig(**{"tokenizer_type": "ByteLevelTokenizer", **options}).validate()
    assert "\n" not in str(caught.value)
