"""The compiled kernels for CPUs: which files they are made of. How they are built: ``hf/build_umv2.py``.

Exports carry that file and a header of theirs (``hf/selection_umv2.py``). Both are loaded by their paths, because an
import of their package would import transformers, which takes seconds.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
_SOURCES = tuple(f"cpu_{name}.cpp" for name in ("attention", "blocks", "kernels", "retrieval", "search"))
_HEADERS = tuple(f"cpu_{name}.h" for name in ("exponential", "product", "rows", "threads"))


def _from_export(name: str) -> Any:
    """The module ``name`` of the files that every export carries, without the rest of them."""
    full = f"umv2_megatron.ops._{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, _HERE.parent / "hf" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[full] = module
        spec.loader.exec_module(module)
    return sys.modules[full]


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
    files["selection.h"] = _from_export("selection_umv2").SELECTION
    return _from_export("build_umv2").load(name, files)


def find_compiler() -> str:
    """Path of the C++ compiler. Raises ``ImportError`` without any."""
    return _from_export("build_umv2").find_compiler()
