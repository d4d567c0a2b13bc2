"""Unigram entropy of token files against the definition."""

import math

import numpy as np
import pytest

from umv2_megatron.data.indexing import IndexWriter
from umv2_megatron.evaluation import entropy


def write(prefix, tokens, meta):
    writer = IndexWriter(prefix, np.uint16)
    writer.add(np.array(tokens, dtype=np.uint16).tobytes(), np.array([len(tokens)], dtype=np.int32))
    writer.publish(meta)


def test_entropy_of_known_frequencies(tmp_path, monkeypatch):
    monkeypatch.setattr(entropy, "_BLOCK", 3)
    tokens = [1, 7, 1, 300, 1, 1, 7, 300]
    write(str(tmp_path / "p"), tokens, {"text_bytes": 24})
    found = entropy.unigram_entropy(str(tmp_path / "p"))
    expected = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25))
    assert found.nats_per_token == pytest.approx(expected, rel=1e-12)
    assert found.bytes_per_token == 3.0


def test_uniform_and_constant(tmp_path):
    write(str(tmp_path / "u"), list(range(64)) * 3, {})
    write(str(tmp_path / "c"), [5] * 10, {})
    assert entropy.unigram_entropy(str(tmp_path / "u")) == (pytest.approx(math.log(64), rel=1e-12), None)
    assert entropy.unigram_entropy(str(tmp_path / "c")).nats_per_token == 0.0
    with pytest.raises(ValueError, match="nothing.idx"):
        entropy.unigram_entropy(str(tmp_path / "nothing"))
