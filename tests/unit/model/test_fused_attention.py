"""Local core attention equals megatron-core's, gradients included, and holds no scores where it need not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "distributed"))
from harness import run_ranks  # noqa: E402

SEQUENCE, BATCH, HEADS, WIDTH = 24, 3, 4, 8
SCORES = BATCH * HEADS * SEQUENCE**2

FUSED: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped-queries": {"num_query_groups": 2},
    "scaled": {"softmax_scale": 0.05},
    "masked": {"masked": True},
    "one-query": {"queries": 1},
    "one-sample": {"batch": 1},
    "bf16": {"bf16": True, "params_dtype": torch.bfloat16},
    "dropout-off-in-evaluation": {"attention_dropout": 0.5},
}
LEFT_TO_MCORE: dict[str, dict[str, Any]] = {
    "layer-scaled": {"apply_query_key_layer_scaling": True},
    "window": {"window_size": (5, 0)},
    "sink": {"softmax_type": "learnable"},
}


class Largest(TorchDispatchMode):
    """Elements of the largest floating-point tensor that is made inside this context."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def compare(settings: dict[str, Any]) -> tuple[float, int, int]:
    """Largest difference of output and gradients from megatron-core's, relative to the largest number, and the largest
    tensors that ours and theirs made."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from umv2_megatron.model.fused_attention import FusedAttention

    settings = {"num_query_groups": HEADS, "attention_dropout": 0.0, **settings}
    scale, masked = settings.pop("softmax_scale", None), settings.pop("masked", False)
    queries, batch = settings.pop("queries", SEQUENCE), settings.pop("batch", BATCH)
    config = TransformerConfig(
        num_layers=2, hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, **settings
    )
    generator = torch.Generator().manual_seed(3)
    shapes = [(queries, HEADS), *[(SEQUENCE, settings["num_query_groups"])] * 2, (queries, HEADS)]
    *inputs, weight = (torch.randn(length, batch, heads, WIDTH, generator=generator, dtype=config.params_dtype)
                       for length, heads in shapes)
    mask = None
    if masked:  # two documents in one sample
        mask = torch.ones(batch, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
        mask[:, :, 7:, :7] = True
    found, largest = [], []
    for kind in (FusedAttention, DotProductAttention):
        module = kind(config, 2, AttnMaskType.causal, "self", softmax_scale=scale).eval()
        for parameter in module.parameters():
            torch.nn.init.constant_(parameter, 0.3)
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        with Largest() as watch:
            output = module(*leaves, mask)
            (output * weight.flatten(2)).sum().backward()
        found.append([output.detach(), *(leaf.grad for leaf in leaves), *(each.grad for each in module.parameters())])
        largest.append(watch.elements)
    difference = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*found))
    return difference, largest[0], largest[1]


def all_cases() -> dict[str, tuple[float, int, int]]:
    """``compare`` of every case."""
    from megatron.core import tensor_parallel

    from umv2_megatron.parallel import groups

    groups.initialize_groups()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    return {name: compare(settings) for name, settings in {**FUSED, **LEFT_TO_MCORE}.items()}


@pytest.fixture(scope="module")
def results() -> dict[str, tuple[float, int, int]]:
    """One rank's results of all cases."""
    (found,) = run_ranks(1, all_cases)
    return found


@pytest.mark.parametrize("name", [*FUSED, *LEFT_TO_MCORE])
def test_equals_mcore(results: dict[str, tuple[float, int, int]], name: str) -> None:
    assert results[name][0] < (2e-2 if name == "bf16" else 2e-6), results[name]


@pytest.mark.parametrize("name", [name for name in FUSED if name not in ("one-query", "one-sample")])
def test_holds_no_scores(results: dict[str, tuple[float, int, int]], name: str) -> None:
    _, ours, theirs = results[name]
    assert theirs >= SCORES > 2 * ours, (ours, theirs)


def what_runs() -> list[bool]:
    """Whether all scores are made: as it is, with dropout in training, and with two values of --attention-backend."""
    from megatron.core import tensor_parallel
    from megatron.core.transformer.enums import AttnBackend, AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from umv2_megatron.model.fused_attention import FusedAttention
    from umv2_megatron.parallel import groups

    groups.initialize_groups()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    found = []
    for settings in ({}, {"attention_dropout": 0.1}, {"attention_backend": AttnBackend.local},
                     {"attention_backend": AttnBackend.unfused}):  # fmt: skip
        config = TransformerConfig(
            num_layers=2, hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, **{"attention_dropout": 0.0, **settings}
        )
        module = FusedAttention(config, 1, AttnMaskType.causal, "self")
        inputs = [torch.randn(SEQUENCE, BATCH, HEADS, WIDTH) for _ in range(3)]
        with Largest() as watch:
            module(*inputs, None)
        found.append(watch.elements >= SCORES)
    return found


def on_a_gpu() -> list[bool]:
    """Whether megatron-core's code runs for tensors of a GPU (of which only the shapes are there), as it is and with
    --deterministic-mode."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from umv2_megatron.model.fused_attention import FusedAttention
    from umv2_megatron.parallel import groups

    groups.initialize_groups()
    found = []
    for deterministic in (False, True):
        config = TransformerConfig(
            num_layers=2, hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, attention_dropout=0.0,
            deterministic_mode=deterministic,
        )  # fmt: skip
        module = FusedAttention(config, 1, AttnMaskType.causal, "self")
        with FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(DotProductAttention, "forward", lambda *arguments: None)
            inputs = (torch.empty(SEQUENCE, BATCH, HEADS, WIDTH, device="cuda") for _ in range(3))
            found.append(module(*inputs, None) is None)
    return found


def test_mcore_runs_on_a_gpu_in_deterministic_mode() -> None:
    assert run_ranks(1, on_a_gpu) == [[False, True]]


def test_mcore_runs_where_it_is_asked_for() -> None:
    assert run_ranks(1, what_runs) == [[False, True, True, True]]
