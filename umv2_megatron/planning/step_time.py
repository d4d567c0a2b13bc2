"""Predicted time of a training step, from rates of a device (``device.py``); docs/planning.md says what overlaps.

Of a stage's micro-batch:

    products    FLOPs / (peak x efficiency); a backward is two forwards, recomputation one more
    memory      what operations other than products read and write (``device_bytes.py``) over the rates of memory
    launches    operations that the host starts (``launches.py``): beside the device, or before each on a CPU
    exchange    the steps of planning/exchange.py. Those that are under way while the FFN computes count only as far
                as they take longer than it; the others count in full
    collectives of tensor, context and pipeline parallelism

    step = (micro-batches + (PP - 1) / virtual stages) x the slowest stage + data parallelism not hidden + optimizer

A collective takes latency + bytes / bandwidth. Of a group that reaches over nodes, an all-to-all sends each byte for
another node through the rank's own link; in all-gather and reduce-scatter the ranks of a node share what crosses.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.planning import device_bytes
from umv2_megatron.planning.device import Device
from umv2_megatron.planning.device_bytes import Moved
from umv2_megatron.planning.exchange import EARLY, FORWARD, OVERLAPPED, WHOLE, exchange_bytes
from umv2_megatron.planning.flops import FlopsPerToken, memory_layer_flops
from umv2_megatron.planning.launches import FORWARD_SHARE, micro_batch_launches
from umv2_megatron.planning.layout import Layout
from umv2_megatron.planning.model_shape import ModelShape
from umv2_megatron.planning.newton_schulz import muon_flops
from umv2_megatron.planning.overlap import Sent, Work, slot_seconds
from umv2_megatron.planning.rank_parameters import table_rows
from umv2_megatron.planning.state_bytes import FP32, StateBytes
from umv2_megatron.planning.traffic import Traffic, traffic

# Exchanges in which every pair of ranks has messages of its own; the others gather or reduce.
ALL_TO_ALL = {
    "dim": ("projected", "weights", "output", "output_grad", "weight_grads", "projected_grad"),
    "row": ("pick_counts", "rows", "scores", "score_grads"),
}
KINDS = ("early", "beside", "waited")


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step. ``forward``, ``backward``: one micro-batch on the slowest stage, exposed communication
    included; of both together ``exchange`` and ``collectives`` are exposed communication. ``step``: all of it."""

    forward: float
    backward: float
    exchange: float
    collectives: float
    bubble: float
    data_parallel: float
    optimizer: float
    step: float
    tokens_per_second: float
    mfu: float


def step_time(
    shape: ModelShape,
    memory: MemoryConfig | None,
    layout: Layout,
    flops: FlopsPerToken,
    states: dict[int, StateBytes],
    device: Device,
) -> StepTime:
    """Predicted time of one step.

    Args:
        flops: of the whole model, per token.
        states: bytes held on pipeline stages, by stage; the ones whose time is looked at.
    """
    stages = [_Stage(shape, memory, layout, flops, device, stage, states[stage]) for stage in states]
    slowest = max(stages, key=lambda each: each.forward + each.backward)
    both = slowest.forward + slowest.backward
    bubble = (layout.pp - 1) / layout.chunks * both
    idle = [max(0.0, total - busy) for total, busy in zip((slowest.forward, slowest.backward), slowest.links())]
    hidden_by = {
        "gradients": idle[1] if layout.overlap_grad_reduce else 0.0,
        "weights": idle[0] if layout.overlap_param_gather else 0.0,
    }
    data_parallel = max(each.data_parallel(hidden_by) for each in stages)
    optimizer = max(each.optimizer() for each in stages)
    step = layout.micro_batches * both + bubble + data_parallel + optimizer
    tokens = layout.micro_batches * layout.micro_batch * layout.dp * shape.seq_length
    return StepTime(
        forward=slowest.forward,
        backward=slowest.backward,
        exchange=slowest.exchange,
        collectives=slowest.collectives,
        bubble=bubble,
        data_parallel=data_parallel,
        optimizer=optimizer,
        step=step,
        tokens_per_second=tokens / step,
        mfu=flops.training * tokens / (step * layout.world * device.peak_tflops * 1e12),
    )


class _Stage:
    """One micro-batch on one pipeline stage, all its virtual stages."""

    def __init__(
        self, shape: ModelShape, memory: MemoryConfig | None, layout: Layout, flops: FlopsPerToken, device: Device,
        stage: int, state: StateBytes,
    ) -> None:
        self.shape, self.memory, self.layout, self.device, self.state = shape, memory, layout, device, state
        self.sent: Traffic = traffic(shape, memory, layout, state)
        self.muon = muon_flops(shape, memory, layout, stage)
        blocks = [block for chunk in range(layout.chunks)
                  for block in layout.stage_blocks(shape.num_layers, stage, chunk)]
        self.blocks = len(blocks)
        self.families = shape.families(memory)
        here = [family.memory_layers(shape.num_layers) for family in self.families]
        kinds = [tuple(index for index, layers in enumerate(here) if layers[block]) for block in blocks]
        self.slots = Counter(kind for kind in kinds if kind)
        """Blocks by which families they have memory layers of, where they have any."""
        self.memory_layers = sum(map(len, kinds))
        self._compute(flops, layout.is_last(stage))
        self._communicate(stage)

    def _compute(self, flops: FlopsPerToken, has_logits: bool) -> None:
        """Seconds of products, memory traffic, exchanges and launches, ``forward`` and ``backward``."""
        layout, count = self.layout, self.shape.num_layers
        rate = self.device.peak_tflops * 1e12 * self.device.flops_efficiency
        tokens = layout.tokens(self.shape.seq_length) / layout.tp / rate
        core = tokens * flops.attention_scores / count * self.device.flops_efficiency / self.device.attention_efficiency
        attention = tokens * flops.attention_projections / count + core
        ffn = tokens * flops.ffn / count
        rest = self._seconds(device_bytes.block(self.shape, layout, self.shape.seq_length))
        self.forward = self.blocks * (attention + rest[0])
        self.backward = self.blocks * (2 * attention + rest[1])
        alone = (self.blocks - self.slots.total()) * ffn
        self.forward, self.backward = self.forward + alone, self.backward + 2 * alone
        slots = self._slots(tokens, ffn)
        blocks = self.forward
        dense = (self.state.gradients - self.state.table_gradients) / layout.grad_bytes
        self.backward += self._seconds(device_bytes.accumulation(dense, layout, self._linear(has_logits)))[1]
        if has_logits:
            logits = tokens * flops.logits
            passes = self._seconds(device_bytes.loss(self.shape, layout, self.shape.seq_length))
            self.forward, self.backward = self.forward + logits + passes[0], self.backward + 2 * logits + passes[1]
        self.again = 0.0  # the share of the forward's communication that recomputation repeats
        if layout.recompute == "full":
            share = 1.0
            if layout.recompute_method == "block":
                share = min(1.0, layout.recompute_layers * layout.chunks / max(1, self.blocks))
            self.again = share
            self.backward += share * blocks
        elif layout.recompute == "selective":
            if "core_attn" in layout.recompute_modules:
                self.backward += self.blocks * core
            if "mlp" in layout.recompute_modules:
                self.backward += alone + slots
        self._launch()

    def _linear(self, has_logits: bool) -> float:
        """Weights of megatron-core's linear layers on this rank."""
        shape, tp = self.shape, self.layout.tp
        attention = shape.hidden_size * (2 * shape.query_size + 2 * shape.key_value_size)
        ffn = shape.hidden_size * shape.ffn_hidden_size * (3 if shape.gated else 2)
        logits = shape.hidden_size * shape.vocab_size if has_logits else 0
        return (self.blocks * (attention + ffn) + logits) / tp

    def _slots(self, tokens: float, ffn: float) -> float:
        """Add FFNs with memory layers to ``forward`` and ``backward``; returns the forward of all of them.

        ``tokens``: a micro-batch's over products per second.
        """
        self.exchange, self.busy = 0.0, (0.0, 0.0)
        layout, hides, total = self.layout, bool(self.device.starts_ahead), 0.0
        again = 1 + (layout.recompute == "full" or "mlp" in layout.recompute_modules)
        work = [self._work(family, tokens) for family in self.families]
        links = [self._sent(family) for family in self.families]
        for kind, blocks in self.slots.items():
            computed = [sum((work[index][way] for index in kind), Work(ffn=(1 + way) * ffn)) for way in (0, 1)]
            sent = [sum((links[index][way] for index in kind), Sent()) for way in (0, 1)]
            taken = [slot_seconds(each, other, layout.exchange_parts, stream=layout.memory_stream, hides=hides)
                     for each, other in zip(computed, sent)]  # fmt: skip
            self.forward += blocks * taken[0]
            self.backward += blocks * taken[1]
            total += blocks * taken[0]
            # never below 0 but by rounding: the slot's sum has another order
            exposed = [max(0.0, both - own.all) for both, own in zip(taken, computed)]
            self.exchange += blocks * (again * exposed[0] + exposed[1])
            busy = (blocks * sent[0].all, blocks * (sent[1].all + (again - 1) * sent[0].all))
            self.busy = (self.busy[0] + busy[0], self.busy[1] + busy[1])
        return total

    def _work(self, m: MemoryConfig, tokens: float) -> tuple[Work, Work]:
        """Forward and backward of one memory layer."""
        own = self.layout.own_tokens(self.shape.seq_length)
        rows = self._seconds(device_bytes.lookup(m, self.layout, own, self.device.cache_bytes))
        scores = self._seconds(device_bytes.retrieval(m, self.layout, own))
        looked_at = own * m.num_heads * (2 * m.scored_keys + m.key_topk**2) / (self.device.search_rate * 1e9)
        *searching, looking_up = memory_layer_flops(m, self.shape.hidden_size)
        found = tokens * looking_up
        last = tokens * (0 if m.value_expansion == "none" else 2 * self.shape.hidden_size * m.summed_dim)
        search = tokens * sum(searching) - last
        return (
            Work(search + scores[0] + looked_at, found + rows[0], last),
            Work(2 * search + scores[1], 2 * found + rows[1], 2 * last),
        )

    def _sent(self, m: MemoryConfig) -> tuple[Sent, Sent]:
        """Seconds of one memory layer's exchanges, forward and backward."""
        layout, device = self.layout, self.device
        if layout.memory_size == 1:
            return Sent(), Sent()
        seconds = {True: dict.fromkeys(KINDS, 0.0), False: dict.fromkeys(KINDS, 0.0)}
        for name, count in layer_exchange(self.shape, m, layout).items():
            kind = "early" if name in EARLY else "beside" if name in OVERLAPPED else "waited"
            taken = device.seconds(count, layout.memory_size, 1, all_to_all=name in ALL_TO_ALL[layout.memory_mode])
            if name not in WHOLE:
                taken += (layout.exchange_parts - 1) * device.link_latency_us * 1e-6
            seconds[name in FORWARD][kind] += taken
        return Sent(**seconds[True]), Sent(**seconds[False])

    def _seconds(self, moved: Moved) -> tuple[float, float]:
        """Forward and backward of operations that move so many bytes."""
        device = self.device
        forward = (moved.rows_forward, moved.streamed_forward, moved.cached_forward)
        backward = (moved.rows_backward, moved.streamed_backward, moved.cached_backward)
        rates = (device.row_bandwidth, device.memory_bandwidth, device.cache_bandwidth)
        once, again = (sum(count / rate for count, rate in zip(way, rates)) / 1e9 for way in (forward, backward))
        return once, again

    def _launch(self) -> None:
        """The host's time to start operations: beside the device's own, or in addition to it."""
        host = micro_batch_launches(self.layout, self.blocks, self.memory_layers) * self.device.launch_us * 1e-6
        forward, backward = FORWARD_SHARE * host, (1 - FORWARD_SHARE) * host
        if self.device.starts_ahead:
            self.forward, self.backward = max(self.forward, forward), max(self.backward, backward)
        else:
            self.forward, self.backward = self.forward + forward, self.backward + backward

    def _communicate(self, stage: int) -> None:
        """Add exposed communication to ``forward`` and ``backward``."""
        layout, device, sent = self.layout, self.device, self.sent
        latencies = device.link_latency_us * 1e-6
        reduced = device.reduced(sent.tensor_reduced) - sent.tensor_reduced
        forward = device.seconds(sent.tensor_forward + reduced, layout.tp, 1)
        backward = device.seconds(sent.tensor_backward - sent.tensor_hidden + reduced, layout.tp, 1)
        if layout.tp > 1:  # four collectives each way, one latency is counted
            forward, backward = forward + 3 * latencies, backward + 3 * latencies
        context = device.seconds(sent.context, layout.cp, layout.tp)
        forward, backward = self.blocks * (forward + context), self.blocks * (backward + context)
        backward += self.again * forward
        hop = 0.0
        if layout.pp > 1 and layout.chunks == 1:  # with virtual stages messages are sent beside the computation
            hop = device.seconds(sent.pipeline, 2, layout.world // layout.pp)
        self.collectives = forward + backward + 2 * hop
        self.between_layers = (forward, backward)
        self.forward += forward + hop
        self.backward += backward + hop

    def links(self) -> tuple[float, float]:
        """Seconds of a micro-batch's forward and backward in which other communication keeps the links busy that data
        parallelism needs: those between nodes, or those inside the only node."""
        layout, device = self.layout, self.device
        crosses = device.crosses_nodes(layout.world // layout.pp, 1)
        groups = ((layout.memory_size, self.busy), (layout.tp * layout.cp, self.between_layers))
        both = [busy for ranks, busy in groups if device.crosses_nodes(ranks, 1) == crosses]
        return sum(each[0] for each in both), sum(each[1] for each in both)

    def data_parallel(self, hidden_by: dict[str, float]) -> float:
        """Seconds that reducing gradients and gathering weights take beside the computation."""
        layout, device, sent = self.layout, self.device, self.sent
        dense, tables = (layout.dense_replicas, layout.tp), (layout.table_replicas, layout.memory_size)
        whole = layout.gradients_all_to_all  # every pair of ranks: nothing is summed inside a node first
        both = [(sent.dense_gradients, dense), (sent.table_gradients, tables)]
        if not layout.distributed_optimizer:
            both = [(device.reduced(count), ranks) for count, ranks in both]
        gradients = sum(device.seconds(count, *ranks, all_to_all=whole) for count, ranks in both)
        weights = device.seconds(sent.dense_weights, *dense) + device.seconds(sent.table_weights, *tables)
        return max(0.0, gradients - hidden_by["gradients"]) + max(0.0, weights - hidden_by["weights"])

    def optimizer(self) -> float:
        """Seconds that Adam, Muon and the passes over gradients take.

        The buffer is set to zero and, where there are replicas, divided by their number (with
        --ddp-average-in-collective only that of tables: it is reduced over fewer ranks than share a loss). Of what is
        updated here, gradients are copied to float32 in 16-bit runs; their norm is taken, and they are scaled
        (megatron-core without Apex and Transformer Engine: into a copy, which is copied back).
        """
        state, layout = self.state, self.layout
        divided = state.table_gradients if layout.average_in_collective else state.gradients
        buffer = state.gradients + (0 if layout.dense_replicas == 1 else 2 * divided)
        copied = 0 if layout.weight_bytes == FP32 else layout.grad_bytes + FP32
        clipped = (1 + (2 if layout.engine else 4)) * FP32
        weights = layout.weight_bytes * (2 if layout.weight_bytes == FP32 else 1)
        moved = 2 * state.optimizer + state.updated * (copied + clipped + FP32 + weights) + buffer
        products = self.muon / (self.device.peak_tflops * 1e12 * self.device.flops_efficiency)
        return moved / (self.device.update_bandwidth * 1e9) + products + self._on_host()

    def _on_host(self) -> float:
        """Seconds of --memory-value-optimizer-offload: gradients come down, in float32 runs weights too, and weights go
        up, beside the update on the host; the slowest of the three takes its time."""
        layout, device, elements = self.layout, self.device, self.state.updated_on_host
        up = elements * layout.weight_bytes
        down = elements * FP32 + (0 if layout.bf16 else up)
        # the host writes and reads what comes down and goes up, and its state
        beside = 2 * self.state.host + 2 * (down + up)
        bus = max(down, up) / device.host_bandwidth
        return max(bus, beside / device.host_memory_bandwidth) / 1e9


def layer_exchange(shape: ModelShape, memory: MemoryConfig, layout: Layout) -> dict[str, float]:
    """Bytes that a rank sends for one memory layer and micro-batch, by step; recomputation left out."""
    rows = table_rows(memory, sum(memory.memory_layers(shape.num_layers)))
    tokens = layout.own_tokens(shape.seq_length)
    return exchange_bytes(memory, layout.memory_mode, layout.memory_size, tokens, rows, layout.weight_bytes)
