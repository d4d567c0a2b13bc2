"""The planner's bytes against those of real ranks: parameters, gradients, optimizer state and exchanges exactly,
activations within 15%.

Every rank builds the model, DDP and the optimizer of a command line, takes one step, and compares what it holds with
what ``umv2_megatron.planning`` says about its place in the layout; a test fails with every difference found.
"""

from __future__ import annotations

import itertools
import weakref
from collections import Counter, defaultdict
from typing import Any

import pytest
import torch
from harness import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.thorough

SMALL: dict[str, Any] = {
    "num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 80, "num_attention_heads": 4, "num_query_groups": 2,
    "group_query_attention": True, "kv_channels": 8, "seq_length": 16, "max_position_embeddings": 16, "vocab_size": 250,
    "memory_num_keys": 9, "memory_key_dim": 6, "memory_value_dim": 16, "memory_pre_value_dim": 8, "memory_topk": 5,
    "memory_init": "fixed", "micro_batch_size": 1, "make_vocab_size_divisible_by": 16,
}


def prepare(preset: str, changes: dict[str, Any]) -> Any:
    """The run of a preset and changed flags on this world, with mcore's groups made."""
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator

    from umv2_megatron.config.flags import read_mapping
    from umv2_megatron.config.presets import PRESETS
    from umv2_megatron.config.resolve import from_layers
    from umv2_megatron.parallel import groups
    from umv2_megatron.training.initialize import seed_everything

    world = torch.distributed.get_world_size()
    layers = [("preset", read_mapping(PRESETS[preset].flags(), "preset")), ("test", read_mapping(changes, "test"))]
    run = from_layers(layers, world, for_training=False)
    groups.initialize_groups(
        tp=run.tensor_model_parallel_size,
        pp=run.pipeline_model_parallel_size,
        vpp=run.virtual_pipeline_size,
        cp=run.context_parallel_size,
        memory_parallel_size=run.memory.parallel_size,
    )
    init_num_microbatches_calculator(
        torch.distributed.get_rank(), None, run.global_batch_size, run.training.micro_batch_size, run.data_parallel_size
    )
    seed_everything(run.training.seed)
    return run


def plan_of(run: Any) -> tuple[Any, Any, Any]:
    """Shape, memory and layout as the planner reads them."""
    from umv2_megatron.planning.layout import Layout
    from umv2_megatron.planning.model_shape import ModelShape

    layout = Layout.from_values(run.values, run.world_size)
    shape = ModelShape.from_fields(run.values)
    memory = run.memory if run.has_memory else None
    assert layout.complaint(shape, memory) is None
    return shape, memory, layout


# -- what stays from step to step --------------------------------------------------------------------------------------


def state_differences(changes: dict[str, Any]) -> list[str]:
    """What this rank holds against the plan, one sentence for each difference."""
    from megatron.core import parallel_state

    from umv2_megatron.model.builder import unwrap
    from umv2_megatron.parallel import groups
    from umv2_megatron.planning.rank_parameters import chunk_parameters
    from umv2_megatron.planning.state_bytes import state_bytes
    from umv2_megatron.training.initialize import build_training_state

    run = prepare("umv2-tiny", {**SMALL, **changes})
    state = build_training_state(run, run.values["vocab_size"])
    state.optimizer.step()  # Adam makes its moments in the first step
    shape, memory, layout = plan_of(run)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    place = groups.get_memory_parallel_rank()
    differences = []
    for index, chunk in enumerate(state.chunks):
        built = [(name, each.numel()) for name, each in unwrap(chunk).named_parameters()]
        planned = [(each.name, each.elements) for each in chunk_parameters(shape, memory, layout, stage, index, place)]
        differences += [f"{one} planned as {other}"
                        for one, other in itertools.zip_longest(built, planned) if one != other]
    dense = parallel_state.get_data_parallel_group(with_context_parallel=True)
    planned_bytes = state_bytes(shape, memory, layout, stage, place, dense.rank(),
                                groups.get_memory_data_parallel_group().rank())
    upper = state_bytes(shape, memory, layout, stage)
    for name, held in held_bytes(state).items():
        if held != getattr(planned_bytes, name):
            differences.append(f"{name}: {held} bytes held, {getattr(planned_bytes, name)} planned")
        if held > getattr(upper, name):
            differences.append(f"{name}: {held} bytes held, at most {getattr(upper, name)} planned for any rank")
    return differences


def held_bytes(state: Any) -> dict[str, int]:
    """Bytes of this rank's weights, gradients, optimizer state and buffers, each storage once."""
    from umv2_megatron.memory.host_adam import HostAdam, HostRowAdam
    from umv2_megatron.model.builder import unwrap

    weights = {each.untyped_storage().data_ptr(): each for chunk in state.chunks for each in chunk.parameters()}
    buffers = [each for chunk in state.chunks for each in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    kept: dict[int, torch.Tensor] = {}
    on_host: dict[int, torch.Tensor] = {}
    for part in state.optimizer.chained_optimizers:
        if getattr(part, "optimizer", None) is None:
            continue
        tensors = [each for group in part.optimizer.param_groups for each in group["params"]]
        for moments in part.optimizer.state.values():
            tensors += [each for each in moments.values() if torch.is_tensor(each) and each.dim() > 0]
        offloaded = isinstance(part.optimizer, (HostAdam, HostRowAdam))
        if offloaded:
            assert all(each.untyped_storage().nbytes() == 4 or each.untyped_storage().data_ptr() in weights
                       for group in part.optimizer.param_groups for each in group["params"])
            tensors = [each for moments in part.optimizer.state.values() for each in moments.values()]
            tensors += [table.main for table in part.optimizer.tables.values() if table.main is not None]
        for each in tensors:
            if each.untyped_storage().data_ptr() not in weights:
                (on_host if offloaded else kept)[id(each)] = each
    layers = [buffer for chunk in state.chunks for name, buffer in unwrap(chunk).named_buffers()
              if ".memory." in name or ".engram." in name]
    return {
        "parameters": sum(each.numel() for chunk in state.chunks for each in chunk.parameters()),
        "weights": sum(each.untyped_storage().nbytes() for each in weights.values()),
        "gradients": sum(each.grad_data.untyped_storage().nbytes() for each in buffers),
        "optimizer": sum(each.numel() * each.element_size() for each in kept.values()),
        "host": sum(each.numel() * each.element_size() for each in on_host.values()),
        "buffers": sum(each.numel() * each.element_size() for each in layers),
    }


SHARDED = {"use_distributed_optimizer": True}
DIM2 = {"memory_parallel_size": 2}
PEER = {"memory_value_dim": 32, "memory_pre_value_dim": 32}  # the hidden size
ROW2 = {"memory_parallel_size": 2, "memory_parallel_mode": "row"}
STATE_CASES: list[tuple[int, dict[str, Any]]] = [
    (1, {"bf16": True, "ffn_variant": "dense", "disable_bias_linear": False, "normalization": "LayerNorm",
         "position_embedding_type": "learned_absolute", "add_qkv_bias": True}),
    (1, {"bf16": True, "grad_reduce_in_fp32": False, "memory_pre_value_dim": 0, "memory_query_mode": "shared",
         "memory_key_expansion": 2, "memory_value_expansion": "per-block", "memory_layer_freq": "2"}),
    (2, {**SHARDED, "overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 3000, "swiglu": False}),
    (2, {**SHARDED, **DIM2, "bf16": True, "tensor_model_parallel_size": 2, "sequence_parallel": True}),
    (2, {**SHARDED, "pipeline_model_parallel_size": 2, "memory_sharing": "block", "memory_sharing_size": 2}),
    (4, {**SHARDED, **ROW2, "bf16": True, "overlap_grad_reduce": True, "bucket_size": 2000}),
    (2, {**SHARDED, **ROW2, "ffn_variant": "memory-plus", "memory_layer_freq": "2"}),
]
# Second moments by row; three tables, and shares of the state that end inside rows.
BY_ROW = {"memory_value_second_moment": "row", "memory_value_dim": 28, "memory_pre_value_dim": 20,
          "memory_layer_freq": "[1,1,1,0]", "memory_num_keys": 5}
STATE_CASES += [
    (2, {**SHARDED, **DIM2, **BY_ROW, "bf16": True}),
    (3, {**SHARDED, **BY_ROW, "global_batch_size": 3}),
    (4, {**SHARDED, **ROW2, **BY_ROW, "overlap_grad_reduce": True, "bucket_size": 2000}),
]
ON_HOST = {"memory_value_optimizer_offload": True}
STATE_CASES += [
    (2, {**SHARDED, **ON_HOST, "bf16": True}),
    (3, {**SHARDED, **ON_HOST, **BY_ROW, "global_batch_size": 3}),
    (2, {**SHARDED, "bf16": True, "trainable": "memory"}),
    (2, {"tensor_model_parallel_size": 2, "norm_placement": "post", "qk_norm_span": "projection"}),
]
MUON = {"optimizer": "muon"}
DEALT = {"optimizer": "dist_muon", "overlap_grad_reduce": True}
STATE_CASES += [(4, {**DEALT, **ROW2, "bf16": True, "tensor_model_parallel_size": 2})]
ENGRAM = {"ffn_variant": "engram", "memory_num_heads": 4, "memory_num_keys": 12, "memory_topk": 1,
          "memory_pre_value_dim": 0}
STATE_CASES += [(2, {**SHARDED, **ROW2, **ENGRAM, "tensor_model_parallel_size": 2, "sequence_parallel": True})]
BOTH = {"engram_layer_freq": "[1,0,1,0]", "engram_num_heads": 4, "engram_num_keys": 12,
        "memory_layer_freq": "[1,1,0,1]"}
RARER_STATE_CASES: list[tuple[int, dict[str, Any]]] = [
    (1, {**MUON, "bf16": True}),
    (2, {**MUON, "bf16": True, "trainable": "memory"}),
    (2, {**DEALT, **BY_ROW}),
    (4, {**DEALT, "bf16": True, "pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}),
    (1, {}),
    (1, {**ENGRAM, "memory_conv_kernel": 0, "bf16": True}),
    (2, {**SHARDED, **ROW2, **BOTH, **BY_ROW, "bf16": True}),
    (2, {**BOTH, "pipeline_model_parallel_size": 2}),
    (1, {"ffn_variant": "peer", **PEER}),
    (1, {"ffn_variant": "pkm", "memory_qk_norm": "query", "memory_num_heads": 3}),
    (1, {"ffn_variant": "ultramem", "bf16": True}),
    (1, BY_ROW),
    (1, {**BY_ROW, **ON_HOST, "bf16": True}),
    (2, {**ROW2, **ON_HOST}),
    (4, {**SHARDED, **DIM2, **BY_ROW, "pipeline_model_parallel_size": 2, "bf16": True}),
    (2, {**SHARDED, "bf16": True}),
    (2, {**ROW2, "tensor_model_parallel_size": 2, "untie_embeddings_and_output_weights": True}),
    (2, {"bf16": True, "pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1,
         "global_batch_size": 2}),
    (2, {**SHARDED, **ROW2, "context_parallel_size": 2, "memory_sharing": "noring", "memory_sharing_size": 3}),
    (4, {**SHARDED, **DIM2, "pipeline_model_parallel_size": 2}),
]


def iterations(changes: dict[str, Any]) -> tuple[float, float]:
    """FLOPs of Muon's products in a step of this rank, counted and planned."""
    from megatron.core import parallel_state
    from torch.utils.flop_counter import FlopCounterMode

    from umv2_megatron.planning.newton_schulz import muon_flops
    from umv2_megatron.training.initialize import build_training_state
    from umv2_megatron.training.muon import Muon

    run = prepare("umv2-tiny", {**SMALL, **changes})
    state = build_training_state(run, run.values["vocab_size"])
    with FlopCounterMode(display=False) as counter:
        for part in state.optimizer.chained_optimizers:
            if isinstance(getattr(part, "optimizer", None), Muon):
                for parameter in (each for group in part.optimizer.param_groups for each in group["params"]):
                    parameter.grad = torch.ones_like(parameter)
                part.optimizer.step()
    planned = muon_flops(*plan_of(run), parallel_state.get_pipeline_model_parallel_rank())
    return float(counter.get_total_flops()), planned


TP2 = {"tensor_model_parallel_size": 2}


@pytest.mark.parametrize(
    "world, changes",
    [
        (2, {**MUON, **TP2, "muon_tp_mode": "duplicated", "muon_num_ns_steps": 3}),
        *(pytest.param(world, changes, marks=pytest.mark.slow) for world, changes in (
            (1, {**MUON, "ffn_variant": "ultramem"}),
            (2, {**MUON, **TP2}),
            (2, {**MUON, **TP2, "muon_tp_mode": "distributed"}),
            (2, {**MUON, "pipeline_model_parallel_size": 2, "bf16": True, "memory_layer_freq": "[1,0,0,0]"}),
        )),
    ],
)  # fmt: skip
def test_products_of_muon_are_the_planned_ones(world: int, changes: dict[str, Any]) -> None:
    for counted, planned in run_ranks(world, iterations, changes):
        assert counted == planned > 0


@pytest.mark.slow
def test_of_products_of_muon_that_are_dealt_out_the_most_are_planned() -> None:
    found = run_ranks(2, iterations, DEALT)
    assert found[0][0] != found[1][0] and max(counted for counted, _ in found) == found[0][1]


# -- exchanges ---------------------------------------------------------------------------------------------------------


def batches(run: Any) -> Any:
    """Random micro-batches, the same on every rank."""
    generator = torch.Generator().manual_seed(7)
    size, length = run.training.micro_batch_size, run.model.seq_length // run.context_parallel_size
    mask = None
    if run.data.create_attention_mask_in_dataloader:
        mask = torch.ones(size, 1, run.model.seq_length, run.model.seq_length, dtype=torch.bool).triu(1)[:, :, :length]
    while True:
        tokens = torch.randint(0, run.values["vocab_size"], (size, length), generator=generator)
        positions = torch.arange(length).expand(size, length).contiguous()
        yield {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(size, length), "position_ids": positions,
               "attention_mask": mask, "packed_seq_params": None}


def forward_backward(run: Any, state: Any) -> None:
    """All micro-batches of a step, forward and backward."""
    from umv2_megatron.training import step

    step.next_batch = next  # type: ignore[assignment]
    step.connect(run, state.chunks, state.optimizer)
    for chunk in state.chunks:
        chunk.zero_grad_buffer()
    iterators = [batches(run) for _ in state.chunks]
    step._run_schedule(run, state.chunks, iterators if len(iterators) > 1 else iterators[0], forward_only=False)


def exchange_differences(changes: dict[str, Any]) -> list[str]:
    """Bytes by step that the counter found in one micro-batch of every layer, where they are not the planned ones."""
    from umv2_megatron.memory import row_sharded
    from umv2_megatron.model.builder import unwrap
    from umv2_megatron.model.ffn_with_memory import memory_layers
    from umv2_megatron.planning.exchange import FORWARD, exchange_bytes
    from umv2_megatron.planning.rank_parameters import table_rows
    from umv2_megatron.training.initialize import build_training_state

    run = prepare("umv2-tiny", {**SMALL, **changes})
    state = build_training_state(run, run.values["vocab_size"])
    shape, _, layout = plan_of(run)
    passes: list[tuple[int, int]] = []
    start = row_sharded.RowShardedLookup.start

    def recording(self: Any, *arguments: Any) -> Any:
        started = start(self, *arguments)
        rank = self.exchange.rank
        calls = [span.call for span in started.spans]
        both = ([each.send for each in calls], [each.receive for each in calls])
        passes.append(tuple(sum(sum(each) - each[rank] for each in every) for every in both))
        return started

    row_sharded.RowShardedLookup.start = recording  # type: ignore[method-assign, assignment]
    forward_backward(run, state)
    layers = [layer for chunk in state.chunks for _, layer in memory_layers(unwrap(chunk))]
    found = sum((layer.table.exchange.sent for layer in layers if layer.owns_table), Counter())
    again = layout.recompute == "full"
    planned: dict[str, float] = defaultdict(float)
    tokens = layout.own_tokens(shape.seq_length)
    for index, layer in enumerate(layers * run.num_microbatches):
        family = layer.config
        rows = table_rows(family, sum(family.memory_layers(shape.num_layers)))
        # with recomputation every layer has two forward passes, with the same picks
        sent, received = passes[index] if passes else (None, None)
        for name, count in exchange_bytes(family, layout.memory_mode, layout.memory_size, tokens, rows,
                                          layout.weight_bytes, sent, received).items():
            planned[name] += count * (2 if again and name in FORWARD else 1)
    return [f"{name}: {found[name]} bytes sent, {planned[name]} planned"
            for name in {*found, *planned} if found[name] != planned[name]]


EXCHANGE_CASES: list[tuple[int, dict[str, Any]]] = [
    (2, {**ROW2, "bf16": True, "memory_exchange_parts": 3}),
    (2, {**ROW2, "memory_pre_value_dim": 0, "recompute_granularity": "full", "recompute_method": "uniform",
         "recompute_num_layers": 1, "memory_query_mode": "shared", "memory_key_expansion": 2,
         "memory_value_expansion": "per-block"}),
    (2, {**DIM2, "tensor_model_parallel_size": 2, "seq_length": 15, "max_position_embeddings": 15,
         "memory_num_heads": 2, "memory_sharing": "block", "memory_sharing_size": 2}),
    (4, {"memory_parallel_size": 4, "memory_parallel_mode": "row", "memory_num_keys": 11}),
]
RARER_EXCHANGE_CASES: list[tuple[int, dict[str, Any]]] = [
    (2, {**DIM2, **ENGRAM}),
    (2, {**DIM2, **BOTH}),
    (2, {**ROW2, **BOTH, "global_batch_size": 4}),
    (2, {**ROW2, **ENGRAM, "bf16": True}),
    (2, {**DIM2, "ffn_variant": "peer", **PEER}),
    (2, {**ROW2, "ffn_variant": "memory-plus", "memory_layer_freq": "2"}),
    (2, DIM2),
    (4, {"memory_parallel_size": 4, "memory_num_cores": 1, "bf16": True, "memory_layer_freq": "2",
         "global_batch_size": 8, "recompute_granularity": "full", "recompute_method": "uniform",
         "recompute_num_layers": 1}),
]


# -- activations -------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensor storages made inside this context that are alive, and the most there ever were."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.known = {each.untyped_storage()._cdata for each in known}
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.alive and key not in self.known:
            self.alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self.alive.pop(key)


def activation_peak(preset: str, changes: dict[str, Any]) -> tuple[int, int]:
    """(measured, planned) peak bytes of activations of one step on this rank."""
    from megatron.core import parallel_state

    from umv2_megatron.planning.activations import activation_bytes
    from umv2_megatron.training.initialize import build_training_state

    run = prepare(preset, {"memory_init": "fixed", **changes})
    state = build_training_state(run, run.values["vocab_size"])
    shape, memory, layout = plan_of(run)
    known = [each for chunk in state.chunks for each in (*chunk.parameters(), *chunk.module.buffers())]
    known += [each.grad_data for chunk in state.chunks for each in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    live = LiveBytes(known)
    with live:
        forward_backward(run, state)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    return live.peak, activation_bytes(shape, memory, layout, stage).peak


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
MID: dict[str, Any] = {"num_layers": 4, "micro_batch_size": 2}
SELECTIVE = {"recompute_granularity": "selective"}
SMALL_LOGITS = {**MID, "vocab_size": 256}
LONG = {"seq_length": 2048, "max_position_embeddings": 2048, "micro_batch_size": 1}
ACTIVATION_CASES: list[tuple[int, dict[str, Any]]] = [
    (1, {**MID, "bf16": True}),
    (1, {**SMALL_LOGITS, "memory_backend": "scatter"}),
    (1, {**SMALL_LOGITS, **FULL, "bf16": True, "num_layers": 8}),
    (1, {**SMALL_LOGITS, **SELECTIVE, "recompute_modules": ["mlp"]}),
    (1, {**SMALL_LOGITS, "memory_num_keys": 400, "memory_topk": 64, "bf16": True, "group_query_attention": True,
         "num_query_groups": 2}),
    (1, {**SMALL_LOGITS, "attention_backend": "unfused"}),
    (1, {**SMALL_LOGITS, **LONG, "ffn_variant": "dense", "create_attention_mask_in_dataloader": True}),
    (2, {**MID, "tensor_model_parallel_size": 2, "sequence_parallel": True}),
    (2, {**MID, "pipeline_model_parallel_size": 2, "global_batch_size": 8, "bf16": True}),
    (2, {**SMALL_LOGITS, **DIM2, "memory_topk": 64}),
    (2, {**SMALL_LOGITS, **ROW2, "memory_topk": 64, "bf16": True}),
]
RARER_ACTIVATION_CASES: list[tuple[int, dict[str, Any]]] = [
    (1, MID),
    (1, {**SMALL_LOGITS, "ffn_variant": "engram"}),
    (1, {**SMALL_LOGITS, "engram_layer_freq": "2"}),
    (1, {**SMALL_LOGITS, "bf16": True}),
    (1, {**SMALL_LOGITS, **FULL}),
    (1, {**SMALL_LOGITS, **FULL, "recompute_method": "block", "recompute_num_layers": 2}),
    (1, {**SMALL_LOGITS, **FULL, "recompute_num_layers": 2}),
    (1, {**SMALL_LOGITS, **SELECTIVE}),
    (1, {**SMALL_LOGITS, **SELECTIVE, "recompute_modules": ["layernorm"]}),
    (1, {**SMALL_LOGITS, **FULL, "memory_num_keys": 400, "memory_topk": 8}),
    (1, {**SMALL_LOGITS, "ffn_variant": "dense"}),
    (1, {**SMALL_LOGITS, "ffn_variant": "memory-plus", "memory_layer_freq": "1", "memory_topk": 32}),
    (1, {**SMALL_LOGITS, "ffn_variant": "peer", "memory_layer_freq": "1", "bf16": True}),
    (1, {**SMALL_LOGITS, "ffn_variant": "peer", "memory_layer_freq": "1", "memory_num_keys": 200}),
    (1, {**SMALL_LOGITS, "ffn_variant": "pkm", "memory_layer_freq": "1", "memory_qk_norm": "query", "bf16": True,
         "memory_num_heads": 4, "memory_value_dim": 256}),
    (1, {**SMALL_LOGITS, "ffn_variant": "ultramem"}),
    (1, {**SMALL_LOGITS, "seq_length": 512, "max_position_embeddings": 512, "micro_batch_size": 1}),
    (1, {**SMALL_LOGITS, "memory_query_mode": "shared", "memory_key_expansion": 2, "memory_num_heads": 2,
         "memory_value_expansion": "per-block", "memory_pre_value_dim": 0, "qk_layernorm": False, "swiglu": False}),
    (2, {**MID, "tensor_model_parallel_size": 2, "bf16": True}),
    (2, {**MID, "pipeline_model_parallel_size": 2, "global_batch_size": 8, "num_layers_per_virtual_pipeline_stage": 1}),
    (2, {**SMALL_LOGITS, "context_parallel_size": 2}),
    (2, {**SMALL_LOGITS, "context_parallel_size": 2, "attention_backend": "unfused"}),
    (2, {**SMALL_LOGITS, **LONG, "context_parallel_size": 2, "create_attention_mask_in_dataloader": True}),
    (1, {**SMALL_LOGITS, **LONG, **SELECTIVE, "ffn_variant": "dense", "create_attention_mask_in_dataloader": True,
         "bf16": True}),
    (1, {**SMALL_LOGITS, **SELECTIVE, "attention_backend": "unfused", "group_query_attention": True,
         "num_query_groups": 2}),
    (1, {**SMALL_LOGITS, "attention_backend": "unfused", "bf16": True}),
    (4, {**SMALL_LOGITS, **FULL, "memory_parallel_size": 4, "memory_topk": 64, "bf16": True, "micro_batch_size": 1}),
    (4, {**SMALL_LOGITS, **ROW2, "memory_parallel_size": 4, "memory_topk": 64, "bf16": True, "micro_batch_size": 1}),
]


def named(cases: list[tuple[int, dict[str, Any]]], slow: list[tuple[int, dict[str, Any]]]) -> Any:
    """Cases as pytest parameters, those of ``slow`` for `make test-slow`."""
    marked = [(case, ()) for case in cases] + [(case, (pytest.mark.slow,)) for case in slow]
    return pytest.mark.parametrize("world,changes", [
        pytest.param(*case, marks=marks, id=" ".join([f"{case[0]} ranks", *(f"{key}={value}" for key, value in
                                                                              case[1].items() if key not in SMALL)]))
        for case, marks in marked
    ])


@named(STATE_CASES, RARER_STATE_CASES)
def test_weights_gradients_and_optimizer_state_are_those_of_the_ranks(world: int, changes: dict[str, Any]) -> None:
    for rank, differences in enumerate(run_ranks(world, state_differences, changes)):
        assert not differences, f"rank {rank}: " + "; ".join(differences)


@named(EXCHANGE_CASES, RARER_EXCHANGE_CASES)
def test_exchanged_bytes_are_those_of_the_counter(world: int, changes: dict[str, Any]) -> None:
    for rank, differences in enumerate(run_ranks(world, exchange_differences, changes)):
        assert not differences, f"rank {rank}: " + "; ".join(differences)


@named(ACTIVATION_CASES, RARER_ACTIVATION_CASES)
def test_peak_of_activations_is_within_15_percent(world: int, changes: dict[str, Any]) -> None:
    for rank, (measured, planned) in enumerate(run_ranks(world, activation_peak, "umv2-8m", changes)):
        print(f"rank {rank}: measured {measured:,} planned {planned:,} {planned / measured - 1:+.1%}")
        assert abs(planned / measured - 1) < 0.15, f"rank {rank}: {measured:,} bytes measured, {planned:,} planned"
