"""A layer of transformers' ``DynamicCache`` that grows in place.

``DynamicLayer`` copies all keys and values of a layer for every new token. Here they are the front of a buffer that is
larger, and a token is written behind them. Everything else is that class's: what crops, reorders or selects puts other
tensors in their place, and if these are no longer the front of the buffer, the next token moves them into a new one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

# Room for this many tokens, and this part of those that are there.
_SPARE_TOKENS, _SPARE_PART = 64, 8


class UMv2CacheLayer(DynamicLayer):
    """Keys and values [b, groups, s, d], each the front of a buffer [b, groups, room, d]."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As of ``DynamicLayer``; in place without autograd on a CPU."""
        if not grows_in_place(key_states):
            return super().update(key_states, value_states, *args, **kwargs)
        keys, values, seen = self.make_room(key_states, value_states)
        keys[:, :, seen : seen + key_states.shape[2]] = key_states
        values[:, :, seen : seen + key_states.shape[2]] = value_states
        return self.take(seen + key_states.shape[2])

    def make_room(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor, int]:
        """Buffers with the cached tokens and room for new ones of the shapes of ``key_states`` and ``value_states``
        [b, groups, new, d], and how many are cached. ``take`` makes those written into them part of the layer."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        seen = self.get_seq_length()
        if self._buffers is None or not all(
            _continues(buffer, cached, new, seen)
            for buffer, cached, new in zip(self._buffers, (self.keys, self.values), (key_states, value_states))
        ):
            self._buffers = _moved(self.keys, key_states, seen), _moved(self.values, value_states, seen)
        return *self._buffers, seen

    def take(self, length: int) -> tuple[Tensor, Tensor]:
        """Have the layer's keys and values be the first ``length`` tokens of the buffers."""
        assert self._buffers is not None
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)
        return self.keys, self.values

    def reset(self) -> None:
        self._buffers = None
        super().reset()


def grows_in_place(states: Tensor) -> bool:
    """Whether ``states`` can be written into a buffer: on a CPU, without autograd and compilers."""
    return (
        type(states) is Tensor
        and states.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def _continues(buffer: Tensor, cached: Tensor, new: Tensor, seen: int) -> bool:
    """Whether ``new`` can be written into ``buffer`` behind ``cached``, which is its front."""
    batch, groups, room, size = buffer.shape
    return (
        (batch, groups, size) == (*new.shape[:2], new.shape[3])
        and room >= seen + new.shape[2]
        and buffer.dtype == new.dtype
        and (not buffer.is_inference() or torch.is_inference_mode_enabled())
        and (
            not seen
            or cached.data_ptr() == buffer.data_ptr()
            and cached.stride() == buffer.stride()
            and cached.shape == (batch, groups, seen, size)
        )
    )


def _moved(cached: Tensor, new: Tensor, seen: int) -> Tensor:
    """A buffer with ``cached`` in front and room for ``new`` and more."""
    needed = seen + new.shape[2]
    buffer = new.new_empty(*new.shape[:2], needed + max(_SPARE_TOKENS, needed // _SPARE_PART), new.shape[3])
    if seen:
        buffer[:, :, :seen] = cached
    return buffer


def let_grow(cache: Any) -> None:
    """Put layers that grow in place where ``cache``, a ``DynamicCache`` on a CPU, has plain ones without contents."""
    if type(cache) is not DynamicCache or cache.offloading:
        return
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and not layer.is_initialized:
            cache.layers[index] = UMv2CacheLayer()
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = UMv2CacheLayer
