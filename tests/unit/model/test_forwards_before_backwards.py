"""Several forwards before their backwards, as the 1F1B schedule of pipeline parallelism runs them.

Whatever a forward hands to autograd must not be written before its backward: neither by the refresh of u and t, which a
standalone model does in every forward, nor by anything else. So gradients must be equal to the last bit whether
each backward follows its forward or both come at the end.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.parallel import cpu_platform, streams

cpu_platform.install()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer.spec_utils import import_module  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from umv2_megatron.model import layer_specs  # noqa: E402
from umv2_megatron.model.ffn_with_memory import memory_layers  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "distributed"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "parallel"))
from harness import run_ranks  # noqa: E402

pytestmark = pytest.mark.thorough

LOSSES = {"balance_loss_coeff": 0.3, "tucker_penalty_coeff": 0.1, "tucker_penalty_margin": 0.0}
MEMORY = {"num_keys": 12, "key_dim": 8, "value_dim": 12, "pre_value_dim": 4, "topk": 4}
VOCABULARY, SEQUENCE, MICRO_BATCHES = 32, 6, 4
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    # One of a stage's two layers is recomputed, between forward and backward of the other.
    "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["layernorm", "mlp"]},
}


def build(memory: dict[str, Any], standalone: bool, changes: dict[str, Any]) -> GPTModel:
    """A model of two layers a stage, from the specs of a stock Megatron-LM or from those of our own program."""
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    config = TransformerConfig(
        num_layers=2 * stages, hidden_size=16, num_attention_heads=2, ffn_hidden_size=24, normalization="RMSNorm",
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False,
        bias_activation_fusion=False, hidden_dropout=0.0, attention_dropout=0.0,
        pipeline_model_parallel_size=stages, pipeline_dtype=torch.float32, hetereogenous_dist_checkpoint=True,
        transformer_impl="local", **changes,
    )  # fmt: skip
    os.environ[layer_specs.MEMORY_CONFIG_VARIABLE] = json.dumps(memory)
    spec = import_module(("umv2_megatron.model.layer_specs", "umv2_local"))
    if not standalone:
        spec = layer_specs.umv2_layer_spec(config, MemoryConfig(**memory))
    torch.manual_seed(1)
    model = GPTModel(
        config=config, transformer_layer_spec=spec, vocab_size=VOCABULARY, max_sequence_length=SEQUENCE,
        pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope", share_embeddings_and_output_weights=False,
    )  # fmt: skip
    return model.train()


def loss_of(model: GPTModel, seed: int) -> torch.Tensor:
    tokens = torch.randint(VOCABULARY, (2, SEQUENCE), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(SEQUENCE, SEQUENCE).triu(1).bool()[None, None]
    return model(tokens, torch.arange(SEQUENCE).expand(2, -1), mask, labels=tokens.roll(-1, 1))


def step_begins(model: GPTModel, standalone: bool) -> None:
    """Cores have moved since the last refresh, as after an optimizer step."""
    with torch.no_grad():
        for _, layer in memory_layers(model):
            if layer.config.scoring == "tucker":
                layer.retrieval.cores.mul_(torch.linspace(0.5, 1.5, layer.retrieval.cores.numel()).view_as(
                    layer.retrieval.cores))  # fmt: skip
            layer.retrieval.refresh_due = not standalone


def gradients(model: GPTModel) -> dict[str, torch.Tensor]:
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


KINDS: dict[str, dict[str, Any]] = {
    "umv2": {**MEMORY, **LOSSES},
    "two heads, shared table": {**MEMORY, **LOSSES, "num_heads": 2, "sharing": "block", "sharing_size": 2},
    "ultramem": {
        **MEMORY, **LOSSES, "query_mode": "shared", "key_expansion": 2, "value_expansion": "per-block",
        "pre_value_dim": 0, "num_heads": 2,
    },
    "product keys": {
        **MEMORY, "balance_loss_coeff": 0.3, "scoring": "additive", "score_normalization": "softmax",
        "query_mode": "per_head", "tucker_rank": 1, "num_cores": 1, "num_heads": 2, "gate": "silu",
        "pre_value_activation": "gelu",
    },
    "plain PyTorch": {**MEMORY, **LOSSES, "backend": "reference"},
    "scatter": {**MEMORY, **LOSSES, "backend": "scatter"},
}  # fmt: skip


def compare(kinds: list[str], standalone: bool, stream: bool) -> None:
    """All recompute settings on one rank: backward right after its forward, against two forwards first."""
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(3)
    if stream:
        from test_streams import Recorder

        side = streams.SideStream(Recorder())
        streams.branch_for = lambda *_: side  # type: ignore[assignment]  # this process is ours
    for kind in kinds:
        for name, changes in RECOMPUTE.items():
            first, second = (build(KINDS[kind], standalone, changes) for _ in range(2))
            second.load_state_dict(first.state_dict())
            for model in (first, second):
                step_begins(model, standalone)
            for seed in (0, 1):
                loss_of(first, seed).mean().backward()
            waiting = [loss_of(second, seed).mean() for seed in (0, 1)]
            for loss in waiting:
                loss.backward()
            same_gradients(gradients(first), gradients(second), f"{kind}, recompute {name}")


def same_gradients(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], where: str) -> None:
    for name, gradient in expected.items():
        assert torch.equal(gradient, found[name]), (where, name)
        assert gradient.abs().sum() > 0, (where, name)


@pytest.mark.parametrize(
    ("standalone", "stream"),
    [
        (True, False),
        pytest.param(False, False, marks=pytest.mark.slow),
        (True, True),
        pytest.param(False, True, marks=pytest.mark.slow),
    ],
)
def test_two_forwards_then_two_backwards(standalone: bool, stream: bool) -> None:
    run_ranks(1, compare, list(KINDS) if not stream else ["umv2"], standalone, stream)


def buffers_that_autograd_keeps() -> dict[str, list[str]]:
    """Names of the buffers of which a forward keeps more than a copy, by kind of memory."""
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(3)
    found = {}
    for kind, memory in KINDS.items():
        model = build(memory, True, {})
        owners = {buffer.untyped_storage().data_ptr(): name for name, buffer in model.named_buffers() if buffer.numel()}
        kept: set[str] = set()

        def pack(tensor: torch.Tensor, owners: dict[int, str] = owners, kept: set[str] = kept) -> torch.Tensor:
            kept.add(owners.get(tensor.untyped_storage().data_ptr(), ""))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss_of(model, 0)
        found[kind] = sorted(name for name in kept if ".memory." in name)
    return found


def test_no_buffer_of_a_memory_layer_is_handed_to_autograd() -> None:
    assert run_ranks(1, buffers_that_autograd_keeps)[0] == {kind: [] for kind in KINDS}


def pipeline(standalone: bool, micro_batches_at_once: int) -> list[dict[str, torch.Tensor]]:
    """Gradients of ``MICRO_BATCHES`` micro-batches on this stage, for every recompute setting; mcore's schedule gets
    so many of them at once: with 1 each backward follows its forward."""
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    tensor_parallel.model_parallel_cuda_manual_seed(3)
    results = []
    for changes in RECOMPUTE.values():
        model = build(KINDS["umv2"], standalone, changes)
        step_begins(model, standalone)
        for _, layer in memory_layers(model):
            layer.loss_scale = lambda: 1 / MICRO_BATCHES
        rounds = MICRO_BATCHES // micro_batches_at_once

        def scaled(losses: torch.Tensor, rounds: int = rounds) -> tuple[torch.Tensor, dict]:
            return losses.mean() / rounds, {}

        def forward(seeds: Iterator[int], model: torch.nn.Module, scaled: Any = scaled) -> tuple[torch.Tensor, Any]:
            return loss_of(model, next(seeds)), scaled

        seeds = iter(range(MICRO_BATCHES))
        for _ in range(rounds):
            get_forward_backward_func()(
                forward_step_func=forward, data_iterator=seeds, model=[model], num_microbatches=micro_batches_at_once,
                seq_length=SEQUENCE, micro_batch_size=2, decoder_seq_length=SEQUENCE, forward_only=False,
            )  # fmt: skip
        results.append(gradients(model))
    return results


@pytest.mark.parametrize("standalone", [True, False])
def test_pipeline_stages_with_a_balance_loss(standalone: bool) -> None:
    one_by_one, scheduled = (run_ranks(2, pipeline, standalone, at_once) for at_once in (1, MICRO_BATCHES))
    for stage in (0, 1):
        for name, expected, found in zip(RECOMPUTE, one_by_one[stage], scheduled[stage]):
            same_gradients(expected, found, f"stage {stage}, recompute {name}")
