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


class _NoGradient:
    """In the place of a gradient that a captured backward does not have, None, where mcore asks for its ``clone``."""

    def clone(self) -> None:
        return None


class _Replay:
    """A captured backward, after whose replay the parameters that it adds to in ``main_grad`` are marked as before."""

    def __init__(self, graph: Any, marks: list[tuple[torch.nn.Parameter, torch.Tensor]]) -> None:
        self._graph, self._marks = graph, marks

    def replay(self) -> None:
        self._graph.replay()
        for parameter, gradient in self._marks:
            parameter.grad = gradient
            parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]


def _repair_graphs(module: ModuleType) -> None:
    """cuda_graphs.py, for --cuda-graph-impl local.

    Line 112: the end of a warm-up is not noted, so that it never ends.
    Line 995: the input of a block that is not the output of another graph (that of the first block) goes back to the
    pool after the forward. The next graph that asks for a buffer of this shape gets it, a gradient's for example, while
    the block's backward still has to read the input.
    Line 663: a parameter whose gradient is None, because the backward adds it to ``main_grad`` itself (value tables),
    has no ``clone``; and the marks that DDP's hook wants to see are set only with fused gradient accumulation (657).

    Later versions are made otherwise; there config/graph_checks.py refuses graphs.
    """
    runner, record = module._CudaGraphRunner, module._CudagraphGlobalRecord
    if not hasattr(record, "tensor_reuse_pool"):
        return
    create_forward, create_backward = runner.create_fwd_graph, runner.create_bwd_graph

    def end_warmup() -> None:
        module._IS_GRAPH_WARMUP = False  # type: ignore[attr-defined]

    def create_fwd_graph(self: Any, *args: Any, **kwargs: Any) -> None:
        pool = record.tensor_reuse_pool
        if self.grad_enabled:
            pool.insert = lambda tensor: None
        try:
            create_forward(self, *args, **kwargs)
        finally:
            vars(pool).pop("insert", None)

    def create_bwd_graph(self: Any) -> None:
        for parameter in self.params_to_backprop:
            parameter.grad = None
        create_backward(self)
        gradients = list(self.static_grad_inputs)
        marks = []
        for place, parameter in enumerate(self.params_to_backprop, self.num_dgrads):
            if gradients[place] is None:
                gradients[place] = _NoGradient()
                if parameter.grad is not None:
                    marks.append((parameter, parameter.grad))
                    parameter.grad = None
        self.static_grad_inputs = tuple(gradients)
        self.bwd_graph = _Replay(self.bwd_graph, marks)

    module._set_warmup_end = end_warmup  # type: ignore[attr-defined]
    runner.create_fwd_graph, runner.create_bwd_graph = create_fwd_graph, create_bwd_graph


_REPAIRS: dict[str, Change] = {
    "megatron.core.transformer.cuda_graphs": _repair_graphs,
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
