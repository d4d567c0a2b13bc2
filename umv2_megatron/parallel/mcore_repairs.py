"""Repairs of Megatron-Core 0.16.1 that every machine needs, with CUDA and without.

mcore is tested with Transformer Engine installed; some of its paths stop without it, on a GPU as on a CPU.
``install()`` mends them one by one below, each with the line of mcore 0.16.1 that needs it.

How: ``change_modules`` calls a function with every ``megatron.core.*`` module, those loaded already and, by an import
hook, those loaded later. The bridge for machines without CUDA (`cpu_platform.py`) comes in by the same door.
"""

from __future__ import annotations

import copy
import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

Change = Callable[[ModuleType], None]

_PREFIX = "megatron.core"


def install() -> None:
    """Repair mcore's modules, now and whenever one is loaded; safe to call again."""
    change_modules(_repair)


def change_modules(change: Change) -> None:
    """Call ``change`` once with every module of mcore: with the loaded ones now, with others when they are loaded.

    A change that is there already is not made again.
    """
    finder = next((item for item in sys.meta_path if isinstance(item, _ChangingFinder)), None)
    if finder is None:
        finder = _ChangingFinder()
        sys.meta_path.insert(0, finder)
    if change in finder.changes:
        return
    finder.changes.append(change)
    for name, module in list(sys.modules.items()):
        if name.startswith(_PREFIX):
            change(module)


def is_changed_by(change: Change) -> bool:
    """Whether ``change_modules`` was called with ``change``."""
    return any(isinstance(item, _ChangingFinder) and change in item.changes for item in sys.meta_path)


def _repair(module: ModuleType) -> None:
    if module.__name__ in _REPAIRS:
        _REPAIRS[module.__name__](module)


def _repair_norm(module: ModuleType) -> None:
    """torch_norm.py:31: the local spec's norm refuses sequence parallelism.

    Each rank normalises its own tokens, which torch's norms do as they are; the weights only have to be marked, so
    that finalize_model_grads sums their gradients over the tensor-parallel ranks.
    """
    make = module.WrappedTorchNorm.__new__

    def make_norm(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        without = copy.copy(config)
        without.sequence_parallel = False
        norm = make(cls, without, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    module.WrappedTorchNorm.__new__ = staticmethod(make_norm)


def _repair_moe(module: ModuleType) -> None:
    """moe_utils.py:1192: reads a name whose import (line 34) fails as a whole without Transformer Engine."""
    if not hasattr(module, "te_general_gemm"):
        module.te_general_gemm = None  # type: ignore[attr-defined]


def _repair_random(module: ModuleType) -> None:
    """tensor_parallel/random.py:631: ``fp8`` defaults to False, which its `is not None` takes for yes."""
    module.CheckpointWithoutOutput.__init__.__defaults__ = (None,)


_REPAIRS: dict[str, Change] = {
    "megatron.core.tensor_parallel.random": _repair_random,
    "megatron.core.transformer.torch_norm": _repair_norm,
    "megatron.core.transformer.moe.moe_utils": _repair_moe,
}


class _ChangingLoader(importlib.machinery.SourceFileLoader):
    """Loads a module from its file and makes the finder's changes."""

    changes: Sequence[Change] = ()

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        for change in self.changes:
            change(module)


class _ChangingFinder(importlib.abc.MetaPathFinder):
    """Finds the modules of mcore as Python does and has them changed once they are loaded."""

    def __init__(self) -> None:
        self.changes: list[Change] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(_PREFIX):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            loader = _ChangingLoader(spec.loader.name, os.fspath(spec.loader.path))
            loader.changes = self.changes
            spec.loader = loader
        return spec
