"""Fill-in-the-middle: documents can be put together again, samples keep their length, and the seed alone decides."""

import numpy as np
import pytest
from data_helpers import write_corpus

from umv2_megatron.config.data_config import DataConfig
from umv2_megatron.data.batches import batch_iterator
from umv2_megatron.data.datasets import build_datasets, data_identity
from umv2_megatron.data.infilling import Infilling, draws_of, infill
from umv2_megatron.data.tokenizers import build_tokenizer

EOD, PREFIX, MIDDLE, SUFFIX = 0, 1001, 1002, 1003
FIM = Infilling(0.5, 0.5, PREFIX, MIDDLE, SUFFIX, EOD)
LENGTH = 64


def put_together(sample):
    """(tokens in their order, documents that were PSM, SPM, not rearranged): the slow, clear inverse."""
    tokens, kinds = [], {"PSM": 0, "SPM": 0, "plain": 0}
    documents = [[]]
    for token in sample.tolist():
        documents[-1].append(token)
        if token == EOD:
            documents.append([])
    for document in documents:
        end = document[-1:] if document[-1:] == [EOD] else []
        content = document[: len(document) - len(end)]
        if not content or content[0] != PREFIX:
            kinds["plain"] += bool(content)
            assert not {PREFIX, MIDDLE, SUFFIX} & set(content)
            tokens += content + end
            continue
        after, gap = content.index(SUFFIX), content.index(MIDDLE)
        assert [content.count(sentinel) for sentinel in (PREFIX, MIDDLE, SUFFIX)] == [1, 1, 1]
        suffix = content[after + 1 : gap]
        if after == 1 and len(content) > gap + 1 and (not suffix or content[gap + 1] < suffix[0]):
            # prefix and middle follow each other (or the prefix is empty, where both forms are the same)
            kinds["SPM"] += 1
            tokens += content[gap + 1 :] + suffix
        else:
            kinds["PSM"] += 1
            tokens += content[1:after] + content[gap + 1 :] + suffix
        tokens += end
    return tokens, kinds


def sample_of(generator):
    """Rising numbers, so that order shows, with ends of documents among them."""
    sample = np.arange(2, LENGTH + 2)
    sample[generator.random(LENGTH) < generator.choice([0, 0.05, 0.3])] = EOD
    return sample


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_documents_can_be_put_together_again(rate):
    generator = np.random.default_rng(0)
    seen = {"PSM": 0, "SPM": 0, "plain": 0}
    for number in range(500):
        sample = sample_of(generator)
        made = infill(sample, FIM._replace(rate=rate), draws_of(1, "ab", number))
        assert made.shape == sample.shape and made.dtype == np.int64
        tokens, kinds = put_together(made)
        lost = LENGTH - len(tokens)
        assert tokens == sample[: len(tokens)].tolist() and lost == 3 * (kinds["PSM"] + kinds["SPM"])
        seen = {kind: seen[kind] + count for kind, count in kinds.items()}
    rearranged = seen["PSM"] + seen["SPM"]
    assert (rearranged == 0) if rate == 0 else (rearranged > 100)
    if rate == 1:
        assert 0.35 < seen["SPM"] / rearranged < 0.65  # and those whose prefix is empty
        assert seen["plain"] < 0.1 * rearranged, "only what no sentinels fit beside stays plain"


def test_the_two_forms_and_cuts():
    class Draws:
        def __init__(self, *numbers):
            self.numbers = np.array(numbers, np.uint64)

        def random_raw(self, count):
            taken, self.numbers = self.numbers[:count], self.numbers[count:]
            return taken

    sample = np.array([10, 11, 12, 13, EOD, 20, 21, 22, 23, 24])
    late = (1 << 64) - 1  # a share of almost 1
    psm = infill(sample, FIM, Draws(0, late, 3, 1, late, 0, 0, 0))
    assert psm.tolist() == [PREFIX, 10, SUFFIX, 13, MIDDLE, 11, 12, EOD, 20, 21]
    spm = infill(sample, FIM, Draws(late, 0, 0, 0, 0, 0, 0, 1))
    assert spm.tolist() == [10, 11, 12, 13, EOD, PREFIX, SUFFIX, 21, MIDDLE, 20]
    both = infill(sample, FIM, Draws(0, 0, 1, 2, 0, 0, 0, 0))
    assert both.tolist() == [PREFIX, SUFFIX, 12, 13, MIDDLE, 10, 11, EOD, 20, 21], "no room for three sentinels"
    padded = infill(np.array([10, 11, 12, 13, 14, -1, -1]), FIM, Draws(0, late, 1, 1))
    assert padded.tolist() == [PREFIX, 10, SUFFIX, 11, MIDDLE, -1, -1]


def fim_config(prefix, **options):
    tokens = {"fim_prefix_token": "1001", "fim_middle_token": "1002", "fim_suffix_token": "1003"}
    settings = {"fim_rate": 0.7, "vocab_size": 1003, **tokens, **options}
    return DataConfig(data_path=[prefix], tokenizer_type="NullTokenizer", split="80,20,0", **settings)


def corpus(tmp_path):
    generator = np.random.default_rng(1)
    documents = [[*generator.integers(1, 1000, generator.integers(1, 90)), 1003] for _ in range(200)]
    return write_corpus(tmp_path / "p", documents, 1004)


def tokens_of(dataset, numbers):
    return np.stack([np.append(dataset[i]["tokens"].numpy(), dataset[i]["labels"][-1]) for i in numbers])


def test_samples_of_training_and_no_others(tmp_path):
    prefix = corpus(tmp_path)
    tokenizer = build_tokenizer("NullTokenizer", None, 1003)
    tokens = {"fim_prefix_token": "1000", "fim_middle_token": "1001", "fim_suffix_token": "1002"}
    sizes = (100, 10, 0)
    train, valid, _ = build_datasets(fim_config(prefix, **tokens), tokenizer, LENGTH, 5, sizes)
    plain, plain_valid, _ = build_datasets(fim_config(prefix, fim_rate=0.0), tokenizer, LENGTH, 5, sizes)
    order = [int(i) for i in np.random.default_rng(2).permutation(100)]
    found = tokens_of(train, range(100))
    assert (tokens_of(train, order) == found[order]).all(), "a sample must not depend on those before it"
    again = build_datasets(fim_config(prefix, **tokens), tokenizer, LENGTH, 5, sizes)[0]
    assert (tokens_of(again, range(100)) == found).all()
    was = tokens_of(plain, range(100))
    assert (found != was).any(1).mean() > 0.5 and found.shape == was.shape
    for made, original in zip(found, was):
        ids = np.select([made == 1003, made == 1000, made == 1001, made == 1002], [EOD, PREFIX, MIDDLE, SUFFIX], made)
        # without sentinels the same tokens, but for those pushed out
        kept = ids[(ids != PREFIX) & (ids != MIDDLE) & (ids != SUFFIX)]
        assert sorted(kept) == sorted(np.where(original == 1003, EOD, original)[: len(kept)])
    assert (tokens_of(valid, range(10)) == tokens_of(plain_valid, range(10))).all()
    other = build_datasets(fim_config(prefix, **tokens), tokenizer, LENGTH, 6, sizes)[0]
    assert (tokens_of(other, range(100)) != found).any()
    identities = [data_identity(config, tokenizer, LENGTH, 5)["infilling"] for config in (
        fim_config(prefix, **tokens), fim_config(prefix, **tokens, fim_spm_rate=0.1), fim_config(prefix, fim_rate=0.0)
    )]  # fmt: skip
    assert identities[0] != identities[1] and identities[2] is None


def test_any_number_of_loaders(tmp_path, monkeypatch):
    from megatron.core import parallel_state

    monkeypatch.setattr(parallel_state, "get_data_parallel_rank", lambda: 0)
    monkeypatch.setattr(parallel_state, "get_data_parallel_world_size", lambda: 1)
    tokens = {"fim_prefix_token": "1000", "fim_middle_token": "1001", "fim_suffix_token": "1002"}
    tokenizer = build_tokenizer("NullTokenizer", None, 1003)
    train = build_datasets(fim_config(corpus(tmp_path), **tokens), tokenizer, LENGTH, 5, (40, 0, 0))[0]
    batches = {}
    for start, workers in ((0, 0), (0, 2), (20, 1)):
        loaded = batch_iterator(train, start, 4, workers)
        batches[start, workers] = [next(loaded)["tokens"].numpy() for _ in range((40 - start) // 4)]
    assert np.array_equal(batches[0, 0], batches[0, 2])
    assert np.array_equal(batches[0, 0][5:], batches[20, 1]), "a resumed run goes on with the same samples"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fim_middle_token": None}, "--fim-middle-token is missing"),
        ({"fim_middle_token": "<fim_middle>"}, "--fim-middle-token is '<fim_middle>': the tokenizer has no such token"),
        ({"fim_suffix_token": "1001"}, "the id 1001 of --fim-prefix-token: expected a token of its own"),
        ({"fim_prefix_token": "1003"}, "the id 1003 of the end-of-document token"),
        ({"fim_prefix_token": "1004"}, "expected one of its tokens, or a number below 1004"),
    ],
)
def test_refused(tmp_path, options, words):
    tokens = {"fim_prefix_token": "1001", "fim_middle_token": "1002", "fim_suffix_token": "1000"}
    config = fim_config("nowhere", **{**tokens, **options})
    with pytest.raises(ValueError) as raised:
        config.validate()
        build_datasets(config, build_tokenizer("NullTokenizer", None, 1003), LENGTH, 5, (1, 0, 0))
    assert words in str(raised.value)


def test_mock_data_is_refused():
    config = DataConfig(mock_data=True, tokenizer_type="NullTokenizer", vocab_size=9, fim_rate=0.5)
    with pytest.raises(ValueError, match="--fim-rate is 0.5: expected 0 with --mock-data"):
        config.validate()
