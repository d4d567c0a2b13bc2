"""The norm over all heads of queries or keys, which ranks share out: outputs and gradients of one rank."""

from __future__ import annotations

import torch
from harness import run_ranks

TOKENS, HEADS, WIDTH = (5, 2), 4, 6
EPSILON = 1e-5


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_one_rank() -> list[torch.Tensor]:
    """Output, gradient of the input [5, 2, 4, 6] and of the gain [24], written out."""
    x, gain = drawn(*TOKENS, HEADS, WIDTH, seed=1).requires_grad_(), drawn(HEADS * WIDTH, seed=2).requires_grad_()
    flat = x.flatten(-2)
    y = flat / (flat.square().mean(-1, keepdim=True) + EPSILON).sqrt() * gain
    y = y.view(x.shape)
    y.backward(drawn(*x.shape, seed=3))
    assert x.grad is not None and gain.grad is not None
    return [y.detach(), x.grad, gain.grad.view(HEADS, WIDTH)]


def of_this_rank() -> list[torch.Tensor]:
    """The same for the heads of this rank."""
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import TransformerConfig

    from umv2_megatron.model.post_norm import ProjectionNorm

    ranks = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    config = TransformerConfig(
        num_layers=1, hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, tensor_model_parallel_size=ranks,
        params_dtype=torch.float64,
    )  # fmt: skip
    here = slice(*(torch.distributed.get_rank() * HEADS // ranks + each for each in (0, HEADS // ranks)))
    norm = ProjectionNorm(WIDTH, config, EPSILON, HEADS)
    with torch.no_grad():
        norm.weight.copy_(drawn(HEADS * WIDTH, seed=2).view(HEADS, WIDTH)[here].flatten())
    x = drawn(*TOKENS, HEADS, WIDTH, seed=1)[..., here, :].clone().requires_grad_()
    y = norm(x)
    y.backward(drawn(*TOKENS, HEADS, WIDTH, seed=3)[..., here, :].contiguous())
    assert x.grad is not None and norm.weight.grad is not None
    return [y.detach(), x.grad, norm.weight.grad.view(-1, WIDTH)]


def test_ranks_together_compute_what_one_does() -> None:
    parts = run_ranks(2, of_this_rank)
    for expected, *found in zip(of_one_rank(), *parts):
        assert torch.allclose(torch.cat(found, dim=-2), expected, rtol=0, atol=1e-12)
