"""The compiled kernels for CPUs: which files they are made of. How they are built: ``hf/build_umv2.py``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from umv2_megatron.ops.from_export import module_of_exports

_HERE = Path(__file__).parent
_SOURCES = tuple(f"cpu_{name}.cpp" for name in ("attention", "blocks", "kernels", "retrieval", "search"))
_HEADERS = tuple(f"cpu_{name}.h" for name in ("exponential", "picks", "product", "rows", "threads"))


def library() -> ctypes.CDLL:
    """``load()``, once in a process, also where it fails: steps of a block ask for it in every forward."""
    made = _loaded()
    if isinstance(made, str):
        raise ImportError(made)
    return made


@cache
def _loaded() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    try:
        return load()
    except ImportError as problem:
        return str(problem)


def load(name: str = "cpu_kernels", sources: Sequence[Path] = ()) -> ctypes.CDLL:
    """The library, or the one called ``name`` of other ``sources`` that include its headers, built if need be. Raises
    ``ImportError`` with the reason where it cannot be built."""
    paths = [*(sources or [_HERE / each for each in _SOURCES]), *(_HERE / each for each in _HEADERS)]
    files = {path.name: path.read_text(encoding="utf-8") for path in paths}
    files["selection.h"] = module_of_exports("selection_umv2").SELECTION
    return module_of_exports("build_umv2").load(name, files)


def find_compiler() -> str:
    """Path of the C++ compiler. Raises ``ImportError`` without any."""
    return module_of_exports("build_umv2").find_compiler()
