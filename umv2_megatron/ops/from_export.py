"""Modules of ``hf/`` that training uses, too: what stands in the files of every export stands there once.

They are loaded by their paths, because an import of their package would import transformers, which takes seconds.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

_FILES = Path(__file__).parents[1] / "hf"


def module_of_exports(name: str) -> Any:
    """The module ``name`` of ``hf/``, which imports nothing of its package."""
    full = f"{__name__}.{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, _FILES / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[full] = module
        spec.loader.exec_module(module)
    return sys.modules[full]
