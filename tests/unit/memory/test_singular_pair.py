"""The leading singular pair against torch's SVD, near and at equal singular values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.memory.retrieval import Retrieval, refresh_together
from umv2_megatron.memory.singular_pair import leading_pair, singular_values


def random_matrices(rank: int, count: int = 200) -> Tensor:
    return torch.randn(count, rank, rank, generator=torch.Generator().manual_seed(rank))


def with_values(*values: float) -> Tensor:
    """[20, R, R] with these singular values, descending."""
    size = len(values)
    generator = torch.Generator().manual_seed(size)
    left, right = (torch.linalg.qr(torch.randn(20, size, size, generator=generator).double()).Q for _ in range(2))
    return (left @ torch.diag(torch.tensor(values).double()) @ right).float()


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 8])
def test_as_the_svd_has_it(rank):
    matrices = random_matrices(rank)
    u, t = leading_pair(matrices)
    left, sigma, right = torch.linalg.svd(matrices.double())
    sign = (t * right[:, 0]).sum(-1, keepdim=True).sign()
    gap = (sigma[:, 0] / sigma[:, 1] - 1).clamp(max=1) if rank > 1 else torch.ones(len(sigma))
    for ours, exact in ((u, left[:, :, 0]), (t, right[:, 0])):
        error = (ours * sign - exact).abs().amax(-1)
        assert bool((error < 1e-7 / gap).all())
    assert u.dtype == t.dtype == torch.float32
    largest = t.gather(-1, t.abs().argmax(-1, keepdim=True))
    assert bool((largest > 0).all())


@pytest.mark.parametrize("values", [(2.0, 2.0 - 2e-6, 1.0), (3.0, 1e-6, 1e-7), (1e-12, 1e-13, 1e-14), (1.0, 0.999)])
def test_close_and_small_singular_values(values):
    matrices = with_values(*values)
    u, t = leading_pair(matrices)
    reached = torch.einsum("hr,hrs,hs->h", u.double(), matrices.double(), t.double())
    assert bool(((reached / values[0] - 1).abs() < 1e-5).all())


@pytest.mark.parametrize("matrix", [torch.zeros(1, 3, 3), torch.zeros(1, 2, 2), torch.zeros(1, 1, 1),
                                    torch.eye(3)[None], -torch.eye(2)[None] * 2])  # fmt: skip
def test_matrices_without_a_leading_pair(matrix):
    u, t = leading_pair(matrix)
    torch.testing.assert_close(u.norm(dim=-1), torch.ones(1))
    torch.testing.assert_close(t.norm(dim=-1), torch.ones(1))
    torch.testing.assert_close((matrix @ t.unsqueeze(-1)).squeeze(-1), u * torch.linalg.svdvals(matrix)[:, :1])


@pytest.mark.parametrize("rank", [2, 3])
def test_singular_values_and_their_slopes(rank):
    matrices = random_matrices(rank).double().requires_grad_()
    ours, exact = singular_values(matrices), torch.linalg.svdvals(matrices)
    torch.testing.assert_close(ours, exact)
    weights = torch.arange(1.0, rank + 1).double()
    (slope,) = torch.autograd.grad((ours * weights).sum(), matrices)
    (expected,) = torch.autograd.grad((exact * weights).sum(), matrices)
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-6)


def test_slopes_stay_finite_at_zero_and_at_equal_values():
    for matrix in (torch.zeros(1, 2, 2), torch.eye(2)[None], torch.tensor([[[0.0, 1.0], [-1.0, 0.0]]])):
        matrix = matrix.clone().requires_grad_()
        singular_values(matrix).sum().backward()
        assert bool(matrix.grad.isfinite().all())


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_layers_refreshed_together_are_as_refreshed_alone(rank):
    def build() -> list[Retrieval]:
        config = MemoryConfig(num_keys=6, key_dim=4, topk=2, tucker_rank=rank, num_heads=2)
        layers = [Retrieval(config, 8, 6) for _ in range(4)]
        generator = torch.Generator().manual_seed(rank)
        for layer in layers:
            for tensor in (layer.cores.data, layer.u, layer.t):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            layer.refresh_due = True
        return layers

    alone, together = build(), build()
    for layer in alone:
        layer.refresh_singular_vectors()
    refresh_together(together)
    for one, other in zip(alone, together):
        assert torch.equal(one.u, other.u) and torch.equal(one.t, other.t) and not other.refresh_due
