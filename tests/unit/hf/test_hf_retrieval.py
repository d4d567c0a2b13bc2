"""The Hugging Face retrieval by itself: scores by their formula, u and t as in training, and the size of its grids."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_model import tiny_config
from torch import Tensor
from torch.overrides import TorchFunctionMode

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.hf import retrieval_umv2
from umv2_megatron.hf.retrieval_umv2 import UMv2ProductKeys, UMv2QueriesAndKeys, UMv2Retrieval
from umv2_megatron.memory.retrieval import Retrieval

PRODUCT_KEYS = {"memory_scoring": "additive", "memory_tucker_rank": 1, "memory_num_cores": 1, "memory_num_heads": 2,
                "memory_query_mode": "shared", "memory_pre_value_dim": 0}  # fmt: skip


def filled(kind: type, **changes: Any) -> Any:
    retrieval: UMv2QueriesAndKeys = kind(tiny_config(**changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in retrieval.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return retrieval


@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
@pytest.mark.parametrize("kind", [UMv2Retrieval, UMv2ProductKeys])
def test_scores_of_keys_are_products_of_normalised_queries_and_keys(kind: type, epsilon: float) -> None:
    changes = {} if kind is UMv2Retrieval else {**PRODUCT_KEYS, "memory_qk_norm": "both"}
    retrieval = filled(kind, memory_norm_epsilon=epsilon, **changes)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))

    def normed(vector: Tensor, gain: Tensor) -> Tensor:
        return vector / (vector.square().mean() + epsilon).sqrt() * gain

    query, rank = (x @ retrieval.query.weight.T).view(3, 2, -1, 32), retrieval.keys.shape[-1]
    if kind is UMv2ProductKeys:  # a head, then a side
        query = query.view(3, -1, 2, 32).transpose(1, 2)
    scores = retrieval.key_scores(x).view(2, rank, 3, -1, 16)
    last = rank - 1
    for side, r, token, head, key in [(0, 0, 0, 0, 0), (1, last, 2, -1, 15), (1, 0, 1, 0, 3), (0, last, 0, 0, 9)]:
        left = normed(query[token, side, r], retrieval.query_norm)
        right = normed(retrieval.keys[head, side, key, :, r], retrieval.key_norm)
        torch.testing.assert_close(scores[side, r, token, head, key], left @ right, rtol=1e-4, atol=1e-4)


def test_singular_vectors_are_those_of_training() -> None:
    """From the same pair to the same pair, also where the SVD turns the sign; and near what they were."""
    ours = filled(UMv2Retrieval, memory_num_heads=3, memory_tucker_rank=3)
    training = Retrieval(MemoryConfig(num_heads=3, tucker_rank=3, key_dim=32), 64, 16)
    generator = torch.Generator().manual_seed(3)
    cores = torch.rand(ours.cores.shape, generator=generator)
    for step in range(12):
        with torch.no_grad():
            cores = cores + 0.02 * torch.randn(cores.shape, generator=generator)
            ours.cores.copy_(cores)
            training.cores.copy_(cores)
            if step % 3 == 0:  # what was stored has the other sign than the SVD gives
                left, _, right = torch.linalg.svd(cores.sum(0))
                for retrieval in (ours, training):
                    retrieval.u.copy_(-left[:, :, 0])
                    retrieval.t.copy_(-right[:, 0])
        before = ours.u.clone(), ours.t.clone()
        ours.refresh_singular_vectors()
        training.refresh_singular_vectors()
        assert torch.equal(ours.u, training.u) and torch.equal(ours.t, training.t), step
        for old, new in zip(before, (ours.u, ours.t)):
            assert bool(((new * old).sum(-1) > 0.9).all()), (step, old, new)


def test_missing_singular_vectors_are_computed_by_the_first_forward() -> None:
    retrieval = filled(UMv2Retrieval)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(4))
    assert not retrieval.u.any() and not retrieval.t.any()
    with torch.no_grad():
        cells, scores = retrieval(x)
        assert retrieval.u.norm(dim=-1).allclose(torch.ones(1)) and retrieval.t.any()
        again = filled(UMv2Retrieval)
        again.refresh_singular_vectors()
        expected = again(x)
    assert torch.equal(cells, expected[0]) and torch.equal(scores, expected[1])


class LargestSearched(TorchFunctionMode):
    """The largest tensor that ``topk`` searches."""

    largest = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") == "topk":
            self.largest = max(self.largest, args[0].numel())
        return function(*args, **(kwargs or {}))


def test_grids_are_held_in_parts_of_a_limited_size(monkeypatch: pytest.MonkeyPatch) -> None:
    retrieval = filled(UMv2Retrieval, memory_num_heads=2, memory_topk=16)
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(4))
    whole, parts = LargestSearched(), LargestSearched()
    with torch.no_grad():
        with whole:
            expected = retrieval(x)
        assert whole.largest == 40 * 2 * 16**2
        monkeypatch.setattr(retrieval_umv2, "_GRID_CELLS", 7 * 2 * 16**2 + 1)
        with parts:
            found = retrieval(x)
    assert parts.largest == 7 * 2 * 16**2
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
