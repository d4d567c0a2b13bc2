"""Which backends there are, and which one a device gets: ``--memory-backend``.

``auto`` is cpu on CPUs, where it can be compiled, and on CUDA devices triton, once its GPU tests have passed on such a
device (``proven.py``); otherwise scatter.

    reference  plain PyTorch, the oracle of the tests; no sharded tables
    scatter    embedding_bag and index_add_, wherever PyTorch runs
    cpu        compiled C++, built at first use
    triton     kernels for NVIDIA GPUs

Backends are imported when they are asked for, because some need what a machine may lack. To add one: a file with the
functions of ``interface.Search``, ``TableLookup``, ``GridParts`` and ``RaggedParts`` and one function here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch

from umv2_megatron.ops import proven
from umv2_megatron.ops.interface import Backend

logger = logging.getLogger(__name__)


def _reference() -> Backend:
    from umv2_megatron.ops import reference, search

    return Backend("reference", search, reference.lookup)


def _scatter() -> Backend:
    from umv2_megatron.ops import ragged, scatter, search, whole_table

    return Backend("scatter", search, partial(whole_table.lookup, scatter), scatter, ragged)


def _cpu() -> Backend:
    from umv2_megatron.ops import cpu, cpu_build, cpu_ragged, cpu_retrieval, cpu_search, whole_table

    cpu_build.library()
    lookup = partial(whole_table.lookup, cpu, one_pass=whole_table.OnePass(cpu.one_pass, cpu.one_pass_backward))
    return Backend("cpu", cpu_search, lookup, cpu, cpu_ragged, retrieve=cpu_retrieval.retrieve)


def _triton() -> Backend:
    from umv2_megatron.ops import triton_lookup, triton_ragged, triton_search

    triton_lookup.require_device()
    parts = (triton_lookup, triton_ragged)
    return Backend("triton", triton_search, triton_lookup.lookup, *parts, triton_lookup.sort_ahead)


@cache
def _triton_atomic() -> Backend:
    from umv2_megatron.ops import triton_lookup, triton_ragged

    ordered = _triton()
    grid, ragged = (_atomic(parts) for parts in (triton_lookup, triton_ragged))
    return replace(ordered, lookup=triton_lookup.atomic_lookup, grid=grid, ragged=ragged, sort_ahead=None)


def _atomic(parts: Any) -> Any:
    """Triton's ``parts``, with atomic additions to the gradients of tables."""
    backwards = ("weighted_sum_backward", "pre_scores_backward")
    return SimpleNamespace(
        pre_scores=parts.pre_scores,
        weighted_sum=parts.weighted_sum,
        **{name: partial(getattr(parts, name), deterministic=False) for name in backwards},
    )


BACKENDS: dict[str, Callable[[], Backend]] = {
    "reference": _reference,
    "scatter": _scatter,
    "cpu": _cpu,
    "triton": _triton,
}
"""By name. Each raises ImportError with a reason where it cannot run on this machine."""

def _preferred(device: str) -> str:
    """What ``auto`` takes on a kind of device. Raises ImportError with the reason where that is not the fastest there
    might be."""
    if device == "cpu":
        _cpu()
        return "cpu"
    if device == "cuda":
        doubt = proven.doubt()
        if doubt is not None:
            raise ImportError(doubt)
        _triton()
        return "triton"
    return "scatter"


@cache
def choice(device: str) -> tuple[str, str]:
    """(what ``auto`` takes on a kind of device, "cpu" or "cuda", and why it is not a faster one, or "")."""
    try:
        return _preferred(device), ""
    except ImportError as problem:
        return "scatter", str(problem)


def get_backend(name: str, device: torch.device | str, backward: str = "ordered") -> Backend:
    """Return the backend called ``name``; "auto" is the fastest there is for ``device``.

    ``backward`` is --memory-backward: how the gradients of tables are added up, "ordered" or, with triton, "atomic".

    Raises ``ValueError`` for an unknown name, and for a backend that was asked for by name and cannot run here.
    """
    backend = _get_backend(name, torch.device(device).type)
    if backward == "ordered":
        return backend
    assert backend.name == "triton", f"a backward {backward} with {backend.name}"  # MemoryConfig.validate
    return _triton_atomic()


@cache
def _get_backend(name: str, device: str) -> Backend:
    if name == "auto":
        name, reason = choice(device)
        if reason and os.environ.get("LOCAL_RANK", "0") == "0":  # once per machine
            logger.warning("--memory-backend auto is %s here: %s", name, reason)
        return BACKENDS[name]()
    if name not in BACKENDS:
        raise ValueError(f"--memory-backend is {name}; expected one of auto, {', '.join(BACKENDS)}")
    if name == "cpu" and device != "cpu":
        raise ValueError(f"--memory-backend is cpu and the model is on {device}; expected auto, scatter or triton")
    try:
        return BACKENDS[name]()
    except ImportError as problem:
        raise ValueError(
            f"--memory-backend is {name}, which cannot run here ({problem}); expected auto or scatter"
        ) from problem
