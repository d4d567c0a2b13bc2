"""What a checkpoint's model picks in one forward: the rows of its memory layers and the experts of its routers.

``picks.py`` imposes them on the export's model and has the letters. Both stages of a memory layer's selection are kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor
from torch.overrides import TorchFunctionMode

from umv2_megatron.memory.retrieval import Retrieval
from umv2_megatron.model.ffn_with_memory import memory_layers

TOPK = (torch.topk, torch.Tensor.topk)
"""The functions that a ``TorchFunctionMode`` sees where something is selected."""


@dataclass(frozen=True)
class RetrievalPicks:
    """What one memory layer picks. ``keys`` [2, T, h, K'] in descending order, ``cells`` [T, h, K] (i * N + j); the
    singular vectors ``vectors`` [2, h, R] that the keys were found with, None with additive scores."""

    keys: Tensor
    cells: Tensor
    vectors: Tensor | None


@dataclass(frozen=True)
class RouterPicks:
    """What one router picks: ``experts`` [T, k], and ``groups`` of experts [T, g] where it is limited to some."""

    experts: Tensor
    groups: Tensor | None


@dataclass
class RecordedPicks:
    """The picks of a model by block, from 0."""

    memory: dict[int, RetrievalPicks] = field(default_factory=dict)
    routers: dict[int, RouterPicks] = field(default_factory=dict)

    def count(self) -> int:
        """Picks in all."""
        picks = [each for layer in self.memory.values() for each in (layer.keys, layer.cells)]
        picks += [
            each for router in self.routers.values() for each in (router.experts, router.groups) if each is not None
        ]
        return sum(each.numel() for each in picks)


@contextlib.contextmanager
def recorded_picks(model: GPTModel, windows: int) -> Iterator[RecordedPicks]:
    """Record the picks of one forward of ``model``, whole on this rank, for ``windows`` windows of tokens."""
    found = RecordedPicks()
    with contextlib.ExitStack() as undo:
        for block, layer in memory_layers(model):
            if layer.retrieval is None:
                continue
            undo.enter_context(_recorded_retrieval(layer.retrieval, found.memory, block, windows))
        for module in model.modules():
            if isinstance(module, MoELayer):
                undo.enter_context(_recorded_router(module.router, found.routers, module.layer_number - 1, windows))
        yield found


@contextlib.contextmanager
def replaced(module: torch.nn.Module, name: str, value: Any) -> Iterator[None]:
    """``module`` with ``value`` in the place of a method."""
    before = module.__dict__.get(name)
    module.__dict__[name] = value
    try:
        yield
    finally:
        if before is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = before


class _RecordingSearch:
    """A backend's search that keeps the keys it has found, [2, T, h, K']."""

    def __init__(self, search: Any) -> None:
        self._search = search
        self.keys: Tensor | None = None

    def best_keys(self, *args: Any) -> Tensor:
        """See ``interface.Search``."""
        self.keys = self._search.best_keys(*args)
        return self.keys

    def __getattr__(self, name: str) -> Any:
        return getattr(self._search, name)


def _windows_first(picks: Tensor, dim: int, windows: int) -> Tensor:
    """Tokens along ``dim`` as the export has them, window by window; in mcore they are position by position."""
    return picks.unflatten(dim, (-1, windows)).transpose(dim, dim + 1).flatten(dim, dim + 1)


@contextlib.contextmanager
def _recorded_retrieval(module: Any, found: dict[int, RetrievalPicks], block: int, windows: int) -> Iterator[None]:
    plain, searches = module.forward, module.search

    def forward(x: Tensor) -> Any:
        seen: list[_RecordingSearch] = []

        def search(device: torch.device) -> Any:
            seen.append(_RecordingSearch(searches(device)))
            return seen[-1]

        with replaced(module, "search", search), replaced(module, "one_piece", lambda device: None):
            picks = plain(x)
        keys = seen[0].keys
        assert keys is not None
        cells = picks.grid.view(x.shape[0], module.config.num_heads, -1)
        vectors = torch.stack([module.u, module.t]) if isinstance(module, Retrieval) else None
        found[block] = RetrievalPicks(_windows_first(keys, 1, windows), _windows_first(cells, 0, windows), vectors)
        return picks

    with replaced(module, "forward", forward):
        yield


class Seen(TorchFunctionMode):
    """Keeps the indices of every ``topk``."""

    def __init__(self) -> None:
        super().__init__()
        self.indices: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in TOPK:
            self.indices.append(result.indices)
        return result


@contextlib.contextmanager
def _recorded_router(module: Any, found: dict[int, RouterPicks], block: int, windows: int) -> Iterator[None]:
    plain = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with Seen() as seen:
            probabilities, chosen = plain(*args, **kwargs)
        experts = chosen.nonzero()[:, 1].view(len(chosen), -1)
        # mcore: the best experts of each group for its score, the best groups, the best experts in them
        groups = _windows_first(seen.indices[1], 0, windows) if len(seen.indices) == 3 else None
        found[block] = RouterPicks(_windows_first(experts, 0, windows), groups)
        return probabilities, chosen

    with replaced(module, "forward", forward):
        yield
