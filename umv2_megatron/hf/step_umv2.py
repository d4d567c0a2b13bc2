"""A block's step of decoding by the compiled kernels: attention in one call, FFN and memory layer in another.

What a call reads of the modules, their parameters' places above all, is put together once and used as long as the same
modules hold the same parameters (``_Contents``); that is asked in every step, because tools replace modules, and
optimizers or loaders parameters. Where a block has something that the kernels do not compute, or ``native_umv2`` says
that modules must run as they are, the answer is None, and the block's own forward computes that half.

Not computed by kernels: layer norms, norms behind attention and FFN or over whole projections, windows of
attention, gates without SiLU, experts, product keys (``memory_scoring`` "additive"), ranks other than 1, 2 and 4, read
delays, and whatever is not all float32 or all bfloat16 (but u and t), tables included.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, StaticCache, StaticLayer

from .attention_umv2 import UMv2Attention, UMv2Norm
from .cache_umv2 import UMv2CacheLayer
from .experts_umv2 import UMv2MLP
from .lookup_umv2 import OUT_OF_RANGE, RANKS, point_at_table, set_search, set_sum
from .memory_umv2 import UMv2Memory
from .native_umv2 import (
    LARGEST_BATCH,
    AttentionPart,
    FeedforwardPart,
    LinearPart,
    MemoryPart,
    NormPart,
    SequencePart,
    is_plain,
    kernel,
    readable,
    usable,
)
from .retrieval_umv2 import UMv2Retrieval

# What transformers computes for a single query by the same equation.
_ATTENTION = ("sdpa", "eager")
_SILU = (nn.SiLU, type(ACT2FN["silu"]))


class _Contents:
    """The modules and tensors that a call was made for. ``complete`` is false where kernels cannot take one of them."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.complete = True
        self.dtype = dtype
        self._modules: list[tuple[dict[str, Any], str, Any, type]] = []
        self._tensors: list[tuple[dict[str, Any], str, Any, int]] = []

    def module(self, parent: nn.Module, name: str, kind: type) -> Any:
        """The module ``name`` of ``parent``, which is to be a plain ``kind`` or None."""
        found: Any = parent._modules.get(name)
        if found is not None:
            self.complete &= is_plain(found, kind)
            self._modules.append((parent._modules, name, found, kind))
        return found

    def tensor(self, owner: nn.Module, name: str, *dtypes: torch.dtype) -> Any:
        """Place of the parameter or buffer ``name``, of one of ``dtypes`` (none: that of the call), or None where there
        is none."""
        kept: dict[str, Any] = owner._parameters if name in owner._parameters else owner._buffers
        found = kept.get(name)
        if found is None:
            return None
        if not any(readable(found, dtype) for dtype in dtypes or (self.dtype,)):
            self.complete = False
            return None
        self._tensors.append((kept, name, found, found.data_ptr()))
        return found.data_ptr()

    def linear(self, parent: nn.Module, name: str) -> LinearPart:
        """A plain ``nn.Linear`` or None."""
        layer = self.module(parent, name, nn.Linear)
        if layer is None or not self.complete:
            return LinearPart()
        weight, bias = self.tensor(layer, "weight"), self.tensor(layer, "bias")
        return LinearPart(weight, bias, layer._parameters["weight"].shape[0])

    def norm(self, parent: nn.Module, name: str) -> NormPart:
        """A root-mean-square norm or None."""
        norm = self.module(parent, name, UMv2Norm)
        if norm is None or not self.complete:
            return NormPart()
        self.complete &= norm.bias is None
        return NormPart(self.tensor(norm, "weight"), float(norm.zero_centered), norm.epsilon)

    def stand(self, dtype: torch.dtype) -> bool:
        """Whether they are all as they were; those that kernels cannot take are looked at anew."""
        if not self.complete or self.dtype is not dtype:
            return False
        for modules, name, module, kind in self._modules:
            if id(modules.get(name)) != id(module) or not is_plain(module, kind):
                return False
        for tensors, name, tensor, place in self._tensors:
            if id(tensors.get(name)) != id(tensor) or tensor.data_ptr() != place:
                return False
        return True


class UMv2Step:
    """The calls of one block; copies and pickles of it are empty."""

    def __init__(self) -> None:
        self._attention: tuple[_Contents, AttentionPart] | None = None
        self._feedforward: tuple[_Contents, FeedforwardPart, _MemoryCall | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_attention": None, "_feedforward": None}

    def attention(
        self,
        block: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None,
        angles: tuple[Tensor, Tensor] | None,
    ) -> Tensor | None:
        """``hidden_states`` [b, 1, H] and what attention adds to them, or None."""
        if not _is_step(hidden_states) or block.training and (block.hidden_dropout or block.attention_dropout):
            return None
        made = self._attention
        if made is None or not made[0].stand(hidden_states.dtype):
            made = self._attention = _attention_call(block, hidden_states.dtype)
        contents, call = made
        if not contents.complete:
            return None
        attention: Any = block._modules["self_attn"]
        if attention.config._attn_implementation not in _ATTENTION:
            return None
        batch = hidden_states.shape[0]
        room = _room(cache, attention.layer_idx, (batch, call.groups, 1, call.size), hidden_states)
        mask = _mask(attention_mask, hidden_states, room, cache)
        turned = _angles(angles, hidden_states)
        if room is None or mask is None or turned is None:
            return None
        keys, values, seen = room
        sequence = SequencePart(
            *turned, keys.data_ptr(), values.data_ptr(),
            (ctypes.c_int64 * 3)(*keys.stride()[:3]), (ctypes.c_int64 * 3)(*values.stride()[:3]), seen, *mask,
        )  # fmt: skip
        result = hidden_states.clone(memory_format=torch.contiguous_format)
        _run("umv2_attention", call, sequence, result)
        if cache is not None:
            layer: Any = cache.layers[attention.layer_idx]
            if type(layer) is StaticLayer:
                layer.cumulative_length.add_(1)
            else:
                layer.take(seen + 1)
        return result

    def feedforward(self, block: Any, hidden_states: Tensor) -> Tensor | None:
        """``hidden_states`` [b, 1, H] and what FFN and memory layer add to them, or None."""
        if not _is_step(hidden_states) or block.delayed or block.training and block.hidden_dropout:
            return None
        made = self._feedforward
        if made is None or not made[0].stand(hidden_states.dtype) or (made[2] is not None and not made[2].stands()):
            made = self._feedforward = _feedforward_call(block, hidden_states.dtype)
        contents, call, memory = made
        if not contents.complete:
            return None
        if memory is not None:
            memory.prepare()
        result = hidden_states.clone(memory_format=torch.contiguous_format)
        _run("umv2_feedforward", call, memory.call if memory is not None else None, result)
        return result


def _is_step(hidden_states: Tensor) -> bool:
    return (
        hidden_states.ndim == 3
        and hidden_states.shape[1] == 1
        and 1 <= hidden_states.shape[0] <= LARGEST_BATCH
        and usable(hidden_states)
    )


def _run(function: str, call: ctypes.Structure, other: ctypes.Structure | None, hidden_states: Tensor) -> None:
    wrong = kernel(function, hidden_states.dtype)(
        ctypes.byref(call),
        None if other is None else ctypes.byref(other),
        ctypes.c_void_p(hidden_states.data_ptr()),
        ctypes.c_int64(hidden_states.shape[0]),
        ctypes.c_int64(torch.get_num_threads()),
    )
    if wrong:
        raise IndexError(OUT_OF_RANGE)


# -- attention ------------------------------------------------------------------------------------------------------


def _attention_call(block: Any, dtype: torch.dtype) -> tuple[_Contents, AttentionPart]:
    contents, call = _Contents(dtype), AttentionPart()
    contents.complete = _norms_come_first(block)
    call.norm = contents.norm(block, "input_layernorm")
    attention = contents.module(block, "self_attn", UMv2Attention)
    if not contents.complete:
        return contents, call
    contents.complete = attention.sliding_window is None and (attention.norms_heads or attention.q_norm is None)
    if not contents.complete:
        return contents, call
    call.query_norm, call.key_norm = contents.norm(attention, "q_norm"), contents.norm(attention, "k_norm")
    for name, part in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("output", "o_proj")):
        setattr(call, name, contents.linear(attention, part))
    call.size, call.scaling = attention.head_dim, attention.scaling
    call.interleaved = attention.rope_interleaved
    call.hidden, call.heads, call.groups = (
        call.output.rows, call.query.rows // call.size, call.key.rows // call.size
    )  # fmt: skip
    return contents, call


def _norms_come_first(block: Any) -> bool:
    modules = block._modules
    return modules.get("input_layernorm") is not None and modules.get("post_feedforward_layernorm") is None


def _room(
    cache: Cache | None, index: int, shape: tuple[int, int, int, int], like: Tensor
) -> tuple[Tensor, Tensor, int] | None:
    """Keys and values [b, groups, room, d] that the new token is written into, and how many are there; None for caches
    that do something else."""
    if cache is None:
        return like.new_empty(shape), like.new_empty(shape), 0
    if type(cache) not in (DynamicCache, StaticCache) or cache.offloading:
        return None
    if cache.layer_class_to_replicate is UMv2CacheLayer:
        while len(cache.layers) <= index:
            cache.layers.append(UMv2CacheLayer())
    layer: Any = cache.layers[index] if index < len(cache.layers) else None
    if type(layer) is UMv2CacheLayer:
        new = like.new_empty(shape)
        keys, values, seen = layer.make_room(new, new)
    elif type(layer) is StaticLayer and layer.is_initialized:
        keys, values, seen = layer.keys, layer.values, int(layer.cumulative_length)
    else:
        return None
    fits = all(
        type(part) is Tensor and part.dtype is like.dtype and part.device.type == "cpu" and part.stride(3) == 1
        and part.shape[:2] == shape[:2] and part.shape[3] == shape[3] and seen < part.shape[2]
        for part in (keys, values)
    )  # fmt: skip
    return (keys, values, seen) if fits else None


def _mask(
    mask: Tensor | None, like: Tensor, room: tuple[Tensor, Tensor, int] | None, cache: Cache | None
) -> tuple[int | None, int, int] | None:
    """Place, stride by sequence and kind of the mask; None for one of another form."""
    if mask is None:
        # Without a mask all places of a static cache are seen, those that are still empty as well.
        return None if type(cache) is StaticCache else (None, 0, 0)
    if type(mask) is not Tensor or mask.device.type != "cpu" or mask.dtype not in (torch.bool, like.dtype):
        return None
    if mask.ndim != 4 or mask.shape[0] not in (1, like.shape[0]) or mask.shape[1:3] != (1, 1) or mask.stride(3) != 1:
        return None
    if room is None or mask.shape[3] <= room[2]:
        return None
    return mask.data_ptr(), mask.stride(0) if mask.shape[0] > 1 else 0, 1 if mask.dtype == torch.bool else 2


def _angles(angles: tuple[Tensor, Tensor] | None, like: Tensor) -> tuple[int | None, int | None, int, int] | None:
    """Places of cosines and sines, how many there are of a head, and their stride by sequence."""
    if angles is None:
        return None, None, 0, 0
    cos, sin = angles
    if not (readable(cos, like.dtype) and readable(sin, like.dtype)) or cos.shape != sin.shape:
        return None
    if cos.ndim != 4 or cos.shape[0] not in (1, like.shape[0]) or cos.shape[1:3] != (1, 1):
        return None
    return cos.data_ptr(), sin.data_ptr(), cos.shape[3], cos.shape[3] if cos.shape[0] > 1 else 0


# -- FFN and memory layer -------------------------------------------------------------------------------------------


def _feedforward_call(
    block: Any, dtype: torch.dtype
) -> tuple[_Contents, FeedforwardPart, _MemoryCall | None]:
    contents, call = _Contents(dtype), FeedforwardPart()
    contents.complete = _norms_come_first(block) and block.engram is None
    call.norm = contents.norm(block, "post_attention_layernorm")
    mlp = contents.module(block, "mlp", UMv2MLP)
    contents.complete &= type(mlp) is UMv2MLP and mlp.gate_proj is not None and type(mlp.act_fn) in _SILU
    if not contents.complete:
        return contents, call, None
    for name, part in (("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj")):
        setattr(call, name, contents.linear(mlp, part))
    call.hidden = call.down.rows
    memory: Any = contents.module(block, "memory", UMv2Memory)
    if memory is None or not contents.complete:
        return contents, call, None
    return contents, call, _MemoryCall(contents, memory)


class _MemoryCall:
    """What a call reads of a memory layer and of its table."""

    def __init__(self, contents: _Contents, memory: UMv2Memory) -> None:
        self.memory, self.call = memory, MemoryPart()
        self._kept: list[Any] = []  # arrays that the call points to
        self._chunks: dict[str, list[tuple[Tensor, int]]] = {}
        retrieval: Any = contents.module(memory, "retrieval", UMv2Retrieval)
        contents.complete &= retrieval is not None and retrieval.rank in RANKS
        self.retrieval, self.table = retrieval, memory.find_table()
        contents.complete &= self.table.is_plain()
        if contents.complete:
            self._take_retrieval(contents)
        if contents.complete:
            self._take_table(contents)

    def _take_retrieval(self, contents: _Contents) -> None:
        call, memory, retrieval = self.call, self.memory, self.retrieval
        call.query = contents.linear(retrieval, "query")
        for name, part in (("pre", "pre_proj"), ("gate", "gate_proj"), ("value", "value_proj")):
            setattr(call, name, contents.linear(memory, part))
        for name, part in (("query_gain", "query_norm"), ("key_gain", "key_norm")):
            setattr(call, name, contents.tensor(retrieval, part))
        for name in ("keys", "cores"):
            setattr(call, name, contents.tensor(retrieval, name))
        for name in ("u", "t"):
            setattr(call, name, contents.tensor(retrieval, name, torch.float32))
        call.perm = contents.tensor(memory, "perm", torch.int32, torch.int64)
        call.wide_perm = memory.perm.dtype == torch.int64
        set_search(call, retrieval)
        call.dim, call.epsilon = retrieval.dim, retrieval.epsilon
        call.per_rank = call.query.rows == 2 * call.rank * call.dim
        set_sum(call, memory)
        call.plain = memory._plain
        call.window, call.offset = memory.window, memory.offset

    def _take_table(self, contents: _Contents) -> None:
        table = self.table
        kept = point_at_table(self.call, table, contents.dtype)
        contents.complete &= kept is not None
        if kept is not None:
            self._kept = kept
            self._chunks = {
                kind: [(chunk, chunk.data_ptr()) for chunk in getattr(table, kind)] for kind in table.widths
            }

    def stands(self) -> bool:
        """Whether the table is where it was, with the same chunks."""
        table = self.table
        if self.memory.find_table() is not table or not table.is_plain():
            return False
        for kind, chunks in self._chunks.items():
            held = getattr(table, kind)
            if len(held) != len(chunks):
                return False
            if any(held[i] is not chunk or chunk.data_ptr() != place for i, (chunk, place) in enumerate(chunks)):
                return False
        return True

    def prepare(self) -> None:
        """Have the singular vectors belong to the cores, and say whether rows are to be fetched ahead."""
        self.retrieval._refresh_if_changed(with_gradients=False)
        self.call.fetch = self.table.place == "mmap" and self.table.waits_for_disk()
