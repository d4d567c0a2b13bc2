"""Bytes of activations on a rank: what a micro-batch keeps for its backward, and the most that is alive at once.

Counted tensor by tensor from the modules. A block keeps

- norms: input and output; the final one of --transformer-impl local, megatron-core's own, keeps input, normalised
  input and output, in float32 copies in a bf16 run;
- attention: queries, keys and values, the output and the denominators of its softmax; megatron-core's own module the
  probabilities [b, heads, S, S] instead of these, in float32 and in bf16;
- FFN: the first linear layer's output, and the product of the activated gate and its other half;
- memory layer: queries, the picks and the scores of their keys, and what the lookup needs, which differs between whole
  and sharded tables.

``activation_bytes`` adds the micro-batches in flight on the stage (1F1B or interleaved) and the largest of four working
sets: logits and loss; and in the last block's backward, in this order, the lookup, the FFN, the key scores, attention.
Letters: T tokens that this rank looks up, P picks of a token, C cores, E virtual blocks, S sequence, b micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.planning.layout import Layout
from umv2_megatron.planning.model_shape import ModelShape

# Elements of a table that a lookup holds at once (ops/scatter.py): on a CPU, and on a GPU.
CHUNK_ELEMENTS = {False: 128 * 32 * 192, True: 1 << 26}
FP32 = 4
INT32 = 4
INT64 = 8


@dataclass(frozen=True)
class BlockBytes:
    """What one block keeps for its backward, by part; ``core`` is the part of attention that selective recomputation
    drops, ``lookup`` all of the memory layer after retrieval. ``key_scores``, the scores of all keys, are not kept:
    they are there while a layer picks, and their gradient in the backward."""

    norms: int
    projections: int
    core: int
    ffn: int
    retrieval: int
    key_scores: int
    lookup: int

    @property
    def all(self) -> int:
        """Everything kept."""
        return self.norms + self.projections + self.core + self.ffn + self.retrieval + self.lookup

    @property
    def attention(self) -> int:
        """Projections and core attention."""
        return self.projections + self.core

    @property
    def memory(self) -> int:
        """The memory layer."""
        return self.retrieval + self.lookup


@dataclass(frozen=True)
class ActivationBytes:
    """``kept``: of one micro-batch between its forward and its backward; ``in_flight``: micro-batches (of virtual
    stages, with several) kept at once; ``working``: what the current one needs beside that; ``exchange``: of this, the
    buffers of the memory-parallel exchanges; ``peak``: all together."""

    kept: int
    in_flight: int
    working: int
    exchange: int
    peak: int


def activation_bytes(shape: ModelShape, memory: MemoryConfig | None, layout: Layout, stage: int) -> ActivationBytes:
    """Activations of a rank of pipeline stage ``stage`` at their peak."""
    families = [(family, family.memory_layers(shape.num_layers)) for family in shape.families(memory)]
    hidden = layout.resident_tokens(shape.seq_length) * shape.hidden_size * layout.weight_bytes
    blocks = [[_Block(shape, [family for family, here in families if here[block]], layout)
               for block in layout.stage_blocks(shape.num_layers, stage, chunk)] for chunk in range(layout.chunks)]
    kept = [_kept(chunk, layout, hidden) for chunk in blocks]
    if layout.is_first(stage):
        kept[0] += hidden  # the embedding's output
    in_flight = micro_batches_in_flight(layout, stage)
    # An interleaved stage keeps about as much of each chunk; the first ones are in flight longest.
    waiting = sum(kept[index % layout.chunks] for index in range(in_flight - 1))
    if layout.pp > 1:
        waiting += (in_flight - 1) * hidden  # what was sent to the next stage
    last = blocks[-1]
    together = _recomputed(len(last) - 1, len(last), layout)
    looked_at = last[-1:] + [each for each in last[:-1] if each.memory][-1:]
    sets = [each for block in looked_at for each in block.working_sets(together, hidden)]
    working, exchange = max(sets, default=(0, 0))
    if layout.is_last(stage):
        working = max(working, _logits(shape, layout))
    workspace = 0 if not layout.holds_scores else _probabilities(shape, layout) * layout.weight_bytes
    now = kept[-1] if layout.is_last(stage) else max(kept)
    return ActivationBytes(kept[0], in_flight, working + workspace, exchange, waiting + now + working + workspace)


def micro_batches_in_flight(layout: Layout, stage: int) -> int:
    """Micro-batches (times virtual stages) whose activations stage ``stage`` holds at once under mcore's schedules."""
    if layout.pp == 1:
        return 1
    if layout.chunks == 1:
        return min(layout.pp - stage, layout.micro_batches)
    warm_up = (layout.pp - stage - 1) * 2 + (layout.chunks - 1) * layout.pp
    return min(warm_up + 1, layout.micro_batches * layout.chunks)


def _kept(blocks: list[_Block], layout: Layout, hidden: int) -> int:
    """What the blocks of one virtual stage keep of a micro-batch under the recomputation asked for."""
    total = 0
    for place, block in enumerate(blocks):
        if not _recomputed(place, len(blocks), layout):
            total += block.kept()
        elif layout.recompute_method == "block" or place % layout.recompute_layers == 0:
            total += hidden
    return total


def _recomputed(place: int, count: int, layout: Layout) -> int:
    """Blocks that are recomputed together with the one at ``place`` of ``count``; 0 where none is."""
    if layout.recompute != "full":
        return 0
    if layout.recompute_method == "block":
        return 1 if place < layout.recompute_layers else 0
    return min(layout.recompute_layers, count)


def _logits(shape: ModelShape, layout: Layout) -> int:
    """Final norm, logits and loss: in a bf16 run the logits also in float32; in the backward their gradient beside that
    of the output matrix."""
    tokens, width = layout.tokens(shape.seq_length), shape.vocab_size // layout.tp
    size = layout.weight_bytes
    norm = _plain_norm(layout.resident_tokens(shape.seq_length) * shape.hidden_size, layout)
    gathered = tokens * shape.hidden_size * size
    forward = tokens * width * (FP32 if size == FP32 else FP32 + size)
    backward = tokens * width * size + width * shape.hidden_size * size + gathered
    return norm + max(forward, backward)


def _norm(elements: int, layout: Layout) -> int:
    """Kept by one norm of a block over tensors of ``elements``, its input included."""
    return 2 * elements * layout.weight_bytes


def _plain_norm(elements: int, layout: Layout) -> int:
    """The same of the norm behind the last block."""
    size = layout.weight_bytes
    if layout.engine:
        return 2 * elements * size
    return elements * (3 * size if size == FP32 else 2 * FP32 + size)


def _probabilities(shape: ModelShape, layout: Layout) -> int:
    """Attention probabilities of one block on one rank; with context parallelism a bit over half of an equal share."""
    return layout.micro_batch * (shape.num_attention_heads // layout.tp) * _masks(shape, layout)


def _masks(shape: ModelShape, layout: Layout) -> int:
    """Pairs of a query and a key that one rank's attention looks at, the masked ones among them."""
    if layout.cp == 1:
        return shape.seq_length**2
    piece = shape.seq_length // (2 * layout.cp)
    return (2 * layout.cp + 1) * piece**2


class _Block:
    """The sizes of one block on one rank. ``memory`` are its memory layers: none, one, or n-grams beside it."""

    def __init__(self, shape: ModelShape, memory: list[MemoryConfig], layout: Layout) -> None:
        self.shape, self.memory, self.layout = shape, memory, layout
        self.tokens = layout.tokens(shape.seq_length)
        self.own = layout.own_tokens(shape.seq_length)
        self.inner = self.tokens * shape.ffn_hidden_size // layout.tp * layout.weight_bytes
        core, projections = self._attention()
        retrieval = key_scores = lookup = 0
        for parts in map(self._memory_parts, memory):
            retrieval, key_scores, lookup = retrieval + parts[0], key_scores + parts[1], lookup + parts[2]
        norms = 2 * _norm(layout.resident_tokens(shape.seq_length) * shape.hidden_size, layout)
        self.bytes = BlockBytes(norms, projections, core, self._ffn(), retrieval, key_scores, lookup)

    def kept(self) -> int:
        """Bytes kept without recomputation, or with the selective kind."""
        parts = self.bytes
        total = parts.all
        if self.layout.recompute == "selective":
            if "core_attn" in self.layout.recompute_modules:
                total -= parts.core
            if "mlp" in self.layout.recompute_modules:
                total -= parts.ffn + parts.memory
            if "layernorm" in self.layout.recompute_modules:
                total -= parts.norms // 2
        return total

    def working_sets(self, recomputed: int, hidden: int) -> list[tuple[int, int]]:
        """(bytes beside ``kept``, of which exchange buffers) at four points of this block's backward.

        ``recomputed``: blocks that are first brought back; ``hidden``: bytes of the hidden state.
        """
        parts, size = self.bytes, self.layout.weight_bytes
        missing = parts.all - self.kept()
        if recomputed:
            missing = recomputed * parts.all + (recomputed - 1) * hidden
        in_attention = 0
        if self.layout.holds_scores:
            in_attention = _probabilities(self.shape, self.layout) * (2 * FP32 if size == FP32 else 2 * FP32 + size)
        gated = 2 if self.shape.gated else 1
        found = [(missing + hidden + gated * self.inner - parts.lookup, 0)]
        if self.memory:
            exchange = sum(map(self._exchange_buffers, self.memory))
            found.append((missing + hidden + max(map(self._chunk, self.memory)) + exchange, exchange))
            first = self.memory[0]
            scoring = self._scoring(first, parts.key_scores) + self._queries_again(first)
            found.append((missing + hidden + scoring - parts.lookup - parts.ffn, 0))
        found.append((missing + 2 * hidden + in_attention - parts.memory - parts.ffn, 0))
        return found

    def _attention(self) -> tuple[int, int]:
        """(core attention, the rest): bytes kept."""
        shape, layout = self.shape, self.layout
        size, tokens = layout.weight_bytes, self.tokens
        query, key = tokens * shape.query_size // layout.tp, tokens * shape.key_value_size // layout.tp
        grouped = key < query
        qkv = (query + 2 * key) * size
        if layout.engine:
            # input of the query and key norms, both after the rotation, output and its softmax statistics
            out = query * size + FP32 * tokens * shape.num_attention_heads // layout.tp
            return 0, qkv + (query + key) * size + out
        everyone = key * layout.cp  # keys are gathered over the context-parallel ranks
        rotation = 4 * shape.seq_length // layout.cp * shape.kv_channels * FP32
        rotated = (query + everyone) * size
        # the norms of queries and keys keep their input, a part of one tensor with the values
        values = qkv if layout.cp == 1 or shape.qk_norm else everyone * size
        if layout.holds_scores:
            core = self._probabilities_kept()
            if grouped:  # keys and values again, one for each head
                core += 2 * query * layout.cp * size
                rotated = query * size + (key * size if layout.recompute == "selective" else 0)
                values = qkv if shape.qk_norm else 0
        else:
            core = FP32 * tokens * shape.num_attention_heads // layout.tp
            compiled = layout.one_pass and size == FP32 and not layout.masked  # ops/cpu_attention.py
            if layout.cp > 1 or (layout.micro_batch > 1 and not compiled):
                core += query * size  # the output before its samples, or the parts of the sequence, are put in order
            if layout.cp > 1 or layout.masked:  # PyTorch keeps them as numbers, for every block
                core += _masks(shape, layout) * size * (layout.micro_batch if layout.masked else 1)
        return core, rotated + values + rotation + query * size

    def _probabilities_kept(self) -> int:
        """Attention probabilities, and the mask."""
        size = self.layout.weight_bytes
        kept = _probabilities(self.shape, self.layout) * (FP32 if size == FP32 else FP32 + size)
        return kept + self.shape.seq_length**2 // self.layout.cp

    def _ffn(self) -> int:
        """Output of the first linear layer and what the activation keeps."""
        if not self.shape.gated:
            return 2 * self.inner
        return (3 if self.layout.fused_activation or self.layout.one_pass else 5) * self.inner

    def _memory_parts(self, m: MemoryConfig) -> tuple[int, int, int]:
        """(retrieval, key scores, lookup): bytes kept, but for the second."""
        size, tokens = self.layout.weight_bytes, self.own
        picks = tokens * m.num_heads * m.topk
        if m.hashes:  # of both norms and their product, the value; and of the convolution its input, norm, taps and sum
            kept = 6 + (3 + m.conv_kernel if m.conv_kernel else 0)
            return tokens * self.shape.hidden_size * kept * FP32, 0, self._lookup(m, picks)
        retrieval = tokens * m.query_rows * size  # their norms are computed again (memory/key_scores.py)
        scores = 2 * m.tucker_rank * tokens * m.num_heads * m.scored_keys * FP32
        if m.balance_loss_coeff > 0:
            retrieval += 4 * tokens * m.num_heads * m.scored_keys * FP32
        if m.scoring == "additive":
            if m.qk_norm == "query":  # a norm of its own, which keeps what it returns
                retrieval += tokens * m.query_rows * (size if size == FP32 else 2 * FP32)
            # kept keys of both sides, the places of the best sums, their softmax
            retrieval += tokens * m.num_heads * 2 * m.key_topk * INT32 + picks * (INT32 + FP32)
        else:
            # kept keys [.., K] of both sides, and their scores
            retrieval += picks * (2 * INT32 + 2 * m.tucker_rank * FP32)
        return retrieval, scores, self._lookup(m, picks)

    def _lookup(self, m: MemoryConfig, picks: int) -> int:
        """Kept by the lookup, and its result where the value projection needs it."""
        layout, tokens, size = self.layout, self.own, self.layout.weight_bytes
        shards = layout.memory_size
        summed = tokens * m.summed_dim * size
        result = 0 if m.value_expansion == "none" else summed
        if m.gate != "none":
            result += 3 * summed  # Wg x, its SiLU, and the sum that it multiplies
        projected = tokens * m.pre_value_dim * size
        if m.pre_projection == "none" and shards == 1:
            projected = 0  # the FFN's input, which the norm keeps
        rho = picks * FP32 if m.has_pre_values else 0
        kept = result + rho + picks * m.num_cores * FP32
        if shards == 1:
            if m.stream and m.backend in ("auto", "triton") and m.backward == "ordered":
                # the picks sorted ahead: rows and order, and start, end and target of at most so many segments
                kept += picks * (INT32 + INT64) + min(picks, m.window_rows) * 3 * INT32
            return kept + projected + picks * INT64 * (2 if m.num_blocks > 1 else 1)
        if layout.memory_mode == "dim":
            columns = len(layout.shard().cores(m.value_dim, m.num_cores))
            return kept + projected + shards * picks * (4 + columns * FP32)
        return kept + shards * projected + picks * (INT64 + 4) + shards * tokens * INT64

    def _scoring(self, m: MemoryConfig, key_scores: int) -> int:
        """What the backward of the scores of all keys holds at once: their gradient, or, where retrieval is in one
        piece, the keys in float32 with their gradient, and the lists of what is not zero in the scores'."""
        if not self.layout.retrieves_in_one_piece or m.scoring == "additive" or m.balance_loss_coeff > 0:
            return int(2.5 * key_scores)
        keys = 2 * m.tucker_rank * m.num_heads * m.scored_keys * m.key_dim * FP32
        lists = self.own * m.num_heads * m.topk * (2 * INT32 + 2 * m.tucker_rank * FP32)
        return 3 * keys + self.own * m.query_rows * FP32 + lists

    def _queries_again(self, m: MemoryConfig) -> int:
        """Queries, normalised again in the backward, with their gradients; of one head in float32 they are small beside
        the scores of its keys. A norm of queries alone is not computed again, and has float32 gradients."""
        size = self.layout.weight_bytes
        if m.scoring != "additive" and size == FP32:
            return 0
        again = 2 * FP32 if m.qk_norm == "query" else 4 * FP32 + (3 * size if size < FP32 else 0)
        return self.own * m.query_rows * again

    def _exchange_buffers(self, m: MemoryConfig) -> int:
        """What the lookup's exchanges hold beside what is kept, in the backward, where they are largest."""
        layout, shards = self.layout, self.layout.memory_size
        if shards == 1:
            return 0
        picks = self.own * m.num_heads * m.topk
        size = layout.weight_bytes
        if layout.memory_mode == "dim":
            columns = len(layout.shard().cores(m.value_dim, m.num_cores))
            return shards * picks * (INT64 + 2 * columns * FP32) + self.own * m.num_blocks * m.value_dim * 2 * size
        everyone = shards * self.own
        return everyone * m.num_blocks * m.value_dim * size + picks * (2 * INT64 + 2 * m.num_cores * FP32)

    def _chunk(self, m: MemoryConfig) -> int:
        """Picked rows that the lookup's backward holds at once, and their gradient or float32 copy.

        Lookups made of PyTorch's operations do, compiled ones do not; on a GPU those of picks from other ranks do.
        """
        layout = self.layout
        elements = self.own * m.num_heads * m.topk * m.value_dim
        by_row = layout.memory_mode == "row" and layout.memory_size > 1
        if layout.lookup == "cpu" or (layout.lookup == "triton" and not by_row):
            return 0
        if by_row:
            return min(elements, CHUNK_ELEMENTS[layout.engine]) * (3 * FP32)
        return min(elements, CHUNK_ELEMENTS[layout.engine]) * (layout.weight_bytes % FP32 + FP32)
