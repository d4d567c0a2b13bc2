"""The n-gram layer (Engram, arXiv 2601.07372): rows that hashes of the last tokens address, and a gate.

    e     = the rows of all hashes, joined,   k = Wk e,   v = Wv e
    alpha = sigmoid( sign(z) sqrt|z| ),       z = < norm(x), norm(k) > / sqrt(H)
    y     = u + SiLU( conv( norm(u) ) ),      u = alpha v

Which rows these are follows from token ids alone: ``UMv2Model`` knows them before its first block computes, and has
tables outside the device fetch them from then on. What a new token needs of earlier ones lies in further layers of the
cache, behind those of the blocks: their ids, and for each n-gram layer what is convolved.

Letters: b sequences, s new tokens, S tokens cached and new, H hidden, h hashes (n-grams of all lengths together), n the
longest n-gram, Dv dimension of a row.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .configuration_umv2 import UMv2Config
from .linear_umv2 import project
from .retrieval_umv2 import at_least_float32
from .tables_umv2 import UMv2Table

# |z| below this has the root of this, as in training.
_LEAST_ROOT = 1e-6
_NO_TOKEN = -1


class UMv2HistoryLayer(DynamicLayer):
    """A layer of a ``DynamicCache`` with something else than keys and values of attention: [b, 1, S, ...] of each."""


@dataclass
class UMv2Ngrams:
    """What an n-gram layer is told about the new tokens: ``rows`` [b * s, h] as ``UMv2Table.announce`` gave them,
    ``reach`` [b, s], how many tokens back each may look, and the ``cache`` of what is convolved, if there is one."""

    rows: Tensor
    reach: Tensor
    cache: UMv2HistoryLayer | None


class UMv2Engram(nn.Module):
    """One n-gram layer. Its input [b, s, H] is the FFN's normalised input, its output is added to the FFN's.

    ``key_proj.weight`` and ``value_proj.weight`` [H, h * Dv]; ``query_norm`` and ``key_norm`` [H]; ``conv_norm`` [H]
    and ``conv`` [H, taps]; ``multipliers`` [n] int64; ``canonical`` [vocabulary]; ``table``.

    Args:
        config: of the model.
        index: 0-based among the n-gram layers.
        tables: see ``UMv2Table``.
    """

    multipliers: Tensor
    canonical: Tensor

    def __init__(self, config: UMv2Config, index: int, tables: str) -> None:
        super().__init__()
        sizes, hidden = config.ngrams, config.hidden_size
        joined = sizes.heads * sizes.value_dim
        self.index, self.seed = index, config.memory_seed
        self.size, self.taps = sizes.size, sizes.taps
        self.epsilon, self.vocabulary = config.memory_norm_epsilon, config.vocab_size
        self.primes = hash_sizes(sizes.rows, sizes.heads)
        self.key_proj = nn.Linear(joined, hidden, bias=False)
        self.value_proj = nn.Linear(joined, hidden, bias=False)
        self.query_norm = nn.Parameter(torch.empty(hidden))
        self.key_norm = nn.Parameter(torch.empty(hidden))
        self.conv_norm = nn.Parameter(torch.empty(hidden)) if self.taps else None
        self.conv = nn.Parameter(torch.empty(hidden, self.taps)) if self.taps else None
        self.register_buffer("multipliers", torch.empty(self.size, dtype=torch.int64))
        self.register_buffer("canonical", torch.empty(config.vocab_size, dtype=torch.int32))
        if not self.canonical.is_meta:
            self.multipliers.copy_(self.draw_multipliers())
            self.canonical.copy_(torch.arange(config.vocab_size))
        self.table = UMv2Table(config, sizes.rows, tables, sizes.value_dim)

    def find_table(self) -> UMv2Table:
        """The table."""
        return self.table

    def draw_multipliers(self) -> Tensor:
        """Odd multipliers [n] until weights are loaded. (Training draws others.)"""
        generator = torch.Generator().manual_seed(self.seed + self.index)
        half = (2**63 - 1) // (self.vocabulary + 1) // 2
        return torch.randint(0, half, (self.size,), generator=generator, device="cpu") * 2 + 1

    def addresses(self, grams: Tensor, reach: Tensor) -> Tensor:
        """Rows [b * s, h] of the n-grams ``grams`` [b, s, n], own token first, of which ``reach`` [b, s] and the own
        one are there: hashes of 2-grams first."""
        here = self.canonical.device
        grams, reach = grams.to(here), reach.to(here)
        heads, rows, first = len(self.primes) // (self.size - 1), [], 0
        mixed = torch.zeros_like(reach)
        for back in range(self.size):
            there = reach >= back
            ids = self.canonical[torch.where(there, grams[..., back], 0)].long()
            mixed = mixed ^ torch.where(there, ids, self.vocabulary) * self.multipliers[back]
            for prime in self.primes[(back - 1) * heads : back * heads] if back else ():
                rows.append(mixed % prime + first)
                first += prime
        return torch.stack(rows, -1).flatten(0, 1)

    def forward(
        self, x: Tensor | None = None, begun: tuple[Any, ...] | None = None, ngrams: UMv2Ngrams | None = None
    ) -> Any:
        """One half of the layer: ``x`` [b, s, H] to what is begun for it, or that to the output; as ``UMv2Memory``,
        whose place it takes."""
        if begun is None:
            return x, ngrams
        x, ngrams = begun
        assert x is not None and ngrams is not None, "n-grams without token ids"
        return self._convolved(self._gated(x, ngrams), ngrams)

    def _gated(self, x: Tensor, ngrams: UMv2Ngrams) -> Tensor:
        rows = ngrams.rows
        joined = self.find_table().pick("values", rows.flatten(), x.device)
        joined = joined.view(rows.shape[0], -1).to(self.value_proj.weight.dtype)
        query = self._normalised(x.reshape(-1, x.shape[-1]), self.query_norm)
        key = self._normalised(project(self.key_proj, joined), self.key_norm)
        gate = (query * key).sum(-1, keepdim=True) / math.sqrt(x.shape[-1])
        alpha = torch.sigmoid(gate.abs().clamp(min=_LEAST_ROOT).sqrt() * gate.sign())
        value = project(self.value_proj, joined)
        return (alpha * value).to(value.dtype).view(x.shape)

    def _convolved(self, gated: Tensor, ngrams: UMv2Ngrams) -> Tensor:
        if self.conv is None or self.conv_norm is None:
            return gated
        normed = self._normalised(gated, self.conv_norm).to(gated.dtype)
        before, length = 0, gated.shape[1]
        if ngrams.cache is not None:
            seen = ngrams.cache.update(normed.unsqueeze(1), normed.new_empty(*normed.shape[:1], 1, length, 0))[0]
            normed = seen.squeeze(1)[:, -(length + self.size * (self.taps - 1)) :]
            before = normed.shape[1] - length
        reach = ngrams.reach.to(gated.device)
        total = torch.zeros((), dtype=gated.dtype, device=gated.device)
        for tap in range(self.taps):
            back = (self.taps - 1 - tap) * self.size
            # as many zeros in front as tokens are missing
            padded = functional.pad(normed, (0, 0, max(back - before, 0), 0))
            first = max(before - back, 0)
            part = padded[:, first : first + length]
            total = total + torch.where((reach >= back).unsqueeze(-1), part, 0) * self.conv[:, tap]
        return gated + functional.silu(total)

    def _normalised(self, x: Tensor, gain: Tensor) -> Tensor:
        exact = at_least_float32(x)
        scaled = exact * (exact.square().mean(-1, keepdim=True) + self.epsilon).rsqrt()
        return scaled * at_least_float32(gain)


def ngrams_of(
    config: UMv2Config,
    layers: dict[int, Any],
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Cache | None,
) -> dict[int, UMv2Ngrams]:
    """What the n-gram layers ``layers``, by block, are told about ``input_ids`` [b, s]; their tables begin to fetch.

    Args:
        attention_mask: [b, S], zero where a token is padding; None without padding.
        position_ids: those that the caller gave, [b or 1, s]; where they do not go on by one, and there is neither a
            mask nor a cache, a document begins, as for attention.
        cache: of the model; has layers for n-grams afterwards.

    Raises ``ValueError`` for what does not say which tokens come before which.
    """
    if input_ids is None:
        raise ValueError(
            "inputs_embeds is given; expected input_ids, whose n-grams this model reads (memory_scoring, "
            "engram_layer_freq)"
        )
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2):
        raise ValueError(
            "attention_mask is no matrix [batch, tokens]; expected one, which says which tokens are padding: n-grams "
            "(memory_scoring, engram_layer_freq) do not follow other masks"
        )
    histories = _histories(cache, len(layers), config)
    ids, begins = _tokens(input_ids, attention_mask, position_ids if cache is None else None)
    length, limit = ids.shape[1], _limit(config)
    if histories:
        keys, values = histories[0].update(ids[:, None, :, None], begins[:, None, :, None])
        ids, begins = (tensor[:, 0, -(length + limit) :, 0] for tensor in (keys, values))
    reach = _reach(ids, begins)[:, -length:].clamp(max=limit)
    grams = torch.stack([_shifted(ids, back) for back in range(config.ngrams.size)], -1)[:, -length:]
    found = {}
    for index, (block, layer) in enumerate(layers.items()):
        rows = layer.find_table().announce(layer.addresses(grams, reach))
        found[block] = UMv2Ngrams(rows, reach, histories[1 + index] if histories else None)
    return found


def _limit(config: UMv2Config) -> int:
    size, taps = config.ngrams.size, config.ngrams.taps
    return max(size - 1, size * (taps - 1))


def _tokens(ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """``ids`` [b, s] with ``_NO_TOKEN`` for padding, and [b, s] int64 whether a document begins with a token (1)."""
    begins = torch.zeros_like(ids)
    if mask is not None:
        ids = torch.where(mask[:, -ids.shape[1] :].to(ids.device) == 0, _NO_TOKEN, ids)
    elif positions is not None:
        begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    return ids, begins


def _reach(ids: Tensor, begins: Tensor) -> Tensor:
    """How many tokens before it each token of ``_tokens`` sees, [b, S]; none, where it is padding or behind it."""
    blind = (begins > 0) | (ids == _NO_TOKEN)
    blind[:, 1:] |= ids[:, :-1] == _NO_TOKEN
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return place - torch.where(blind, place, 0).cummax(1).values


def _shifted(ids: Tensor, back: int) -> Tensor:
    return functional.pad(ids, (back, 0), value=0)[:, : ids.shape[1]]


def _histories(cache: Cache | None, count: int, config: UMv2Config) -> list[UMv2HistoryLayer]:
    """The cache's layers for n-grams, made where they are not there: one of ids, one for each n-gram layer."""
    if cache is None:
        return []
    if not isinstance(cache, DynamicCache) or not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
        raise ValueError(
            f"the cache is a {type(cache).__name__}; expected a DynamicCache of layers that grow, to which n-grams "
            "(memory_scoring, engram_layer_freq) add layers of their own: leave cache_implementation out"
        )
    blocks = config.num_hidden_layers
    while len(cache.layers) < blocks and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    while len(cache.layers) < blocks + 1 + count:
        cache.layers.append(UMv2HistoryLayer())
    histories: list[Any] = cache.layers[blocks:]
    return histories


@functools.cache
def hash_sizes(rows: int, heads: int) -> tuple[int, ...]:
    """Rows of the table of each of ``heads`` hashes: the largest different primes that are at most rows / heads; fewer
    where there are no more."""
    found: list[int] = []
    size = rows // heads
    while len(found) < heads and size >= 2:
        if all(size % divisor for divisor in range(2, math.isqrt(size) + 1)):
            found.append(size)
        size -= 1
    return tuple(found)
