"""A fine-tuned model is the one that is saved, whatever wrote its parameters: reloaded, its loss has the same bits.

Singular vectors and normalised keys are derived from parameters; a value that is kept too long shows in the reloaded
model, or in the one in memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from tiny_model import VARIANTS as ALL_VARIANTS  # noqa: E402
from tiny_model import tiny_model, tokens  # noqa: E402

from umv2_megatron.hf import UMv2ForCausalLM  # noqa: E402
from umv2_megatron.hf.experts_umv2 import UMv2Router  # noqa: E402
from umv2_megatron.hf.retrieval_umv2 import UMv2Retrieval  # noqa: E402

BATCH = tokens(3, 20)
VARIANTS = {name: ALL_VARIANTS[name] for name in ("plain", "v1", "memory-plus", "delayed")}


def loss(model: UMv2ForCausalLM) -> Tensor:
    return model(BATCH, labels=BATCH).loss


def evaluated(model: UMv2ForCausalLM) -> float:
    with torch.no_grad():
        return loss(model.eval()).item()


def by_optimizer(**options: Any) -> Callable[[UMv2ForCausalLM], None]:
    def train(model: UMv2ForCausalLM) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2, weight_decay=0.1, **options)
        for _ in range(3):
            model.train()
            loss(model).backward()
            optimizer.step()
            optimizer.zero_grad()

    return train


def without_a_change_of_mode(model: UMv2ForCausalLM) -> None:
    """A loop that never calls train() nor eval()."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2, fused=True)
    for _ in range(3):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            loss(model)


def by_data(model: UMv2ForCausalLM) -> None:
    """As averages of weights are swapped in: past autograd and versions."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def by_state(model: UMv2ForCausalLM) -> None:
    """Loaded in evaluation mode, after values were derived."""
    other = tiny_model(seed=8, **model.made_with)
    model.load_state_dict(other.state_dict())


WRITERS = {
    "plain": by_optimizer(foreach=False, fused=False), "foreach": by_optimizer(foreach=True),
    "fused": by_optimizer(fused=True), "one mode": without_a_change_of_mode, "data": by_data, "state": by_state,
}  # fmt: skip


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_what_is_saved_is_what_is_in_memory(
    write: Callable[[UMv2ForCausalLM], None], changes: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_model(**changes)
    model.made_with = changes
    before = evaluated(model)  # derives and keeps
    write(model)
    in_memory = evaluated(model)
    assert abs(in_memory - before) > 1e-3
    fresh = tiny_model(seed=9, **changes)
    evaluated(fresh)
    fresh.load_state_dict(model.state_dict())
    assert evaluated(fresh) == in_memory
    model.save_pretrained(tmp_path)
    assert evaluated(UMv2ForCausalLM.from_pretrained(tmp_path)) == in_memory
    for module in model.modules():
        if isinstance(module, UMv2Retrieval):
            left, _, right = torch.linalg.svd(module.cores.detach().sum(0))
            for found, exact in ((module.u, left[:, :, 0]), (module.t, right[:, 0])):
                torch.testing.assert_close(found.abs(), exact.abs(), rtol=0, atol=2e-5)


def test_a_run_that_is_resumed_goes_on_to_the_bit(tmp_path: Path) -> None:
    def step(model: UMv2ForCausalLM, optimizer: torch.optim.Optimizer) -> float:
        value = loss(model.train())
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2, fused=True)
    for _ in range(3):
        step(model, optimizer)
        evaluated(model)
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    again = UMv2ForCausalLM.from_pretrained(tmp_path)
    resumed = torch.optim.AdamW(again.parameters(), lr=3e-2, fused=True)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    for _ in range(3):
        assert step(model, optimizer) == step(again, resumed)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("variant", ["plain", "delayed", "moe"])
def test_checkpointed_activations_give_the_same_gradients(reentrant: bool, variant: str) -> None:
    """Also through a memory layer's output that waits for a later block."""
    grads = []
    for checkpointed in (False, True):
        model = tiny_model(**ALL_VARIANTS[variant]).double().train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        loss(model).backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    plain, again = grads
    assert [name for name, grad in plain.items() if grad is None] == [n for n, grad in again.items() if grad is None]
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, rtol=1e-9, atol=1e-12, msg=name)


def test_linear_layers_are_torch_s_own_and_the_router_is_none() -> None:
    """Quantizers and adapters ask for exactly nn.Linear, and replace all of them."""
    for variant in ("plain", "memory-plus", "moe"):
        modules = list(tiny_model(**ALL_VARIANTS[variant]).modules())
        assert {type(module) for module in modules if isinstance(module, nn.Linear)} == {nn.Linear}
        assert any(isinstance(module, UMv2Router) for module in modules) is (variant == "moe")
