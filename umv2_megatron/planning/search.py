"""What one layout costs a rank, whether it fits, and which of all legal layouts is fastest.

``evaluate`` looks at the first, a middle and the last pipeline stage (the embedding and most micro-batches in flight
are on the first, the output matrix is on the last). ``search`` tries TP x PP x virtual stages x CP x M x mode x
parts of exchanges x micro-batch x recomputation x precision of gradients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.planning.activations import ActivationBytes, activation_bytes
from umv2_megatron.planning.device import Device
from umv2_megatron.planning.flops import FlopsPerToken, flops_per_token
from umv2_megatron.planning.layout import Layout
from umv2_megatron.planning.model_shape import ModelShape
from umv2_megatron.planning.state_bytes import StateBytes, state_bytes
from umv2_megatron.planning.step_time import StepTime, step_time

GIB = 2**30
MICRO_BATCHES = (1, 2, 4, 8, 16)
EXCHANGE_PARTS = (1, 2, 4)
# Context parallelism pays for long sequences only.
SHORTEST_PART = 2048


@dataclass(frozen=True)
class RankBytes:
    """Bytes on a rank of one pipeline stage."""

    stage: int
    state: StateBytes
    activations: ActivationBytes

    @property
    def all(self) -> int:
        """Everything that is counted."""
        return self.state.all + self.activations.peak


@dataclass(frozen=True)
class Evaluation:
    """One layout: bytes by stage, time, and whether the largest stage fits beside ``reserve`` bytes."""

    layout: Layout
    ranks: tuple[RankBytes, ...]
    time: StepTime
    fits: bool | None

    @property
    def worst(self) -> RankBytes:
        """The stage whose ranks need the most memory."""
        return max(self.ranks, key=lambda each: each.all)


class Model:
    """A model by its flag values, ready to be asked about many layouts."""

    def __init__(self, values: Mapping[str, Any], memory: MemoryConfig | None) -> None:
        self.values, self.memory = values, memory
        self._shapes: dict[int, ModelShape] = {}
        self._states: dict[tuple[Layout, int], StateBytes] = {}
        self.flops: FlopsPerToken = flops_per_token(values, memory)

    def shape(self, tp: int) -> ModelShape:
        """Sizes with the vocabulary padded for ``tp`` tensor-parallel ranks."""
        if tp not in self._shapes:
            self._shapes[tp] = ModelShape.from_fields({**self.values, "tensor_model_parallel_size": tp})
        return self._shapes[tp]

    def state(self, layout: Layout, stage: int) -> StateBytes:
        """Bytes that stay from step to step, remembered for layouts that differ in nothing that matters to them."""
        alike = dataclasses.replace(layout, micro_batch=1, micro_batches=1, recompute="none", recompute_modules=())
        same = (alike, stage)
        if same not in self._states:
            self._states[same] = state_bytes(self.shape(layout.tp), self.memory, layout, stage)
        return self._states[same]


def evaluate(model: Model, layout: Layout, device: Device, memory_bytes: float | None = None) -> Evaluation:
    """Bytes and time of ``layout``, which must be legal; ``memory_bytes``: what a device has for what is counted."""
    shape = model.shape(layout.tp)
    stages = sorted({0, min(1, layout.pp - 1), layout.pp - 1})
    states = {stage: model.state(layout, stage) for stage in stages}
    ranks = tuple(
        RankBytes(stage, state, activation_bytes(shape, model.memory, layout, stage))
        for stage, state in states.items()
    )
    time = step_time(shape, model.memory, layout, model.flops, states, device)
    largest = max(each.all for each in ranks)
    return Evaluation(layout, ranks, time, None if memory_bytes is None else largest <= memory_bytes)


@dataclass(frozen=True)
class Found:
    """Outcome of a search: layouts that fit, fastest first; how many were legal; and, of those that do not fit, the one
    that needs the least memory."""

    fitting: list[Evaluation]
    legal: int
    smallest: Evaluation | None


def search(
    model: Model,
    start: Layout,
    global_batch: int,
    device: Device,
    memory_bytes: float,
    fixed: Mapping[str, Any] | None = None,
) -> Found:
    """Try every legal layout of ``start.world`` ranks.

    Args:
        start: everything that is not searched: precision, optimizer, overlap.
        global_batch: samples per step, the same for all layouts.
        memory_bytes: what a device has for what is counted.
        fixed: fields of ``Layout`` that keep their value.
    """
    fitting: list[Evaluation] = []
    smallest: Evaluation | None = None
    legal = 0
    for layout in candidates(model, start, global_batch, device.gpus_per_node, fixed or {}):
        legal += 1
        found = evaluate(model, layout, device, memory_bytes)
        if found.fits:
            fitting.append(found)
        elif smallest is None or found.worst.all < smallest.worst.all:
            smallest = found
    fitting.sort(key=lambda each: (each.time.step, each.worst.all))
    return Found(fitting, legal, smallest)


def candidates(
    model: Model, start: Layout, global_batch: int, gpus_per_node: int, fixed: Mapping[str, Any]
) -> Iterator[Layout]:
    """All legal layouts, those with tensor parallelism inside a node only and with sequence parallelism."""
    world, base = start.world, model.shape(1)
    for tp in _choice(fixed, "tp", [each for each in _divisors(world) if each <= gpus_per_node]):
        sequence = fixed.get("sequence_parallel", tp > 1) and tp > 1
        for pp in _choice(fixed, "pp", [each for each in _divisors(world) if base.num_layers % each == 0]):
            for cp in _choice(fixed, "cp", _context_sizes(base)):
                if world % (tp * pp * cp):
                    continue
                dp = world // (tp * pp * cp)
                for size, mode, parts in _table_splits(model.memory, world // pp, fixed):
                    layout = dataclasses.replace(start, tp=tp, pp=pp, cp=cp, memory_size=size, memory_mode=mode,
                                                 exchange_parts=parts, sequence_parallel=sequence)
                    for staged in _virtual_stages(layout, base.num_layers // pp, fixed):
                        yield from _batches(model, staged, global_batch, dp, fixed)


def _batches(model: Model, layout: Layout, global_batch: int, dp: int, fixed: Mapping[str, Any]) -> Iterator[Layout]:
    for micro in _choice(fixed, "micro_batch", MICRO_BATCHES):
        if global_batch % (micro * dp):
            continue
        sized = dataclasses.replace(layout, micro_batch=micro, micro_batches=global_batch // (micro * dp))
        if sized.chunks > 1 and sized.micro_batches % sized.pp:
            continue  # they go through a virtual stage in groups as large as the pipeline
        if sized.complaint(model.shape(sized.tp), model.memory) is not None:
            continue
        for recompute, modules in _recomputations(layout, fixed):
            again = dataclasses.replace(sized, recompute=recompute, recompute_modules=modules)
            for grads_in_fp32 in _choice(fixed, "grads_in_fp32", (True, False) if layout.bf16 else (True,)):
                yield dataclasses.replace(again, grads_in_fp32=grads_in_fp32)


def _virtual_stages(layout: Layout, per_stage: int, fixed: Mapping[str, Any]) -> Iterator[Layout]:
    """``layout`` without virtual stages, and with those whose lengths divide a stage's ``per_stage`` blocks."""
    if "per_chunk" in fixed:
        sizes = [fixed["per_chunk"]] if layout.pp > 1 and per_stage % fixed["per_chunk"] == 0 else []
    else:
        yield layout
        sizes = [size for size in _divisors(per_stage) if size < per_stage] if layout.pp > 1 else []
    for size in sizes:
        yield dataclasses.replace(layout, chunks=per_stage // size)


def _recomputations(layout: Layout, fixed: Mapping[str, Any]) -> list[tuple[str, tuple[str, ...]]]:
    """Kinds of recomputation and the modules of the selective one: attention only where it keeps something, and FFN
    with memory."""
    if "recompute" in fixed:
        return [(fixed["recompute"], fixed.get("recompute_modules", ()))]
    attention = [] if layout.engine else [("selective", ("core_attn",))]
    return [("none", ()), *attention, ("selective", ("mlp",)), ("full", ())]


def _table_splits(
    memory: MemoryConfig | None, per_stage: int, fixed: Mapping[str, Any]
) -> list[tuple[int, str, int]]:
    """M, mode and --memory-exchange-parts."""
    if memory is None:
        return [(1, "dim", 1)]
    modes = _choice(fixed, "memory_mode", ["dim", "row"])
    sizes = _choice(fixed, "memory_size", _divisors(per_stage))
    parts = {"dim": [1], "row": _choice(fixed, "exchange_parts", EXCHANGE_PARTS)}
    return [(size, mode, each) for size in sizes for mode in (modes if size > 1 else ["dim"])
            for each in parts[mode if size > 1 else "dim"]]  # fmt: skip


def _context_sizes(shape: ModelShape) -> list[int]:
    return [size for size in (1, 2, 4, 8, 16) if size == 1 or shape.seq_length // size >= SHORTEST_PART]


def _choice(fixed: Mapping[str, Any], name: str, otherwise: Sequence[Any]) -> Sequence[Any]:
    return [fixed[name]] if name in fixed else otherwise


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]
