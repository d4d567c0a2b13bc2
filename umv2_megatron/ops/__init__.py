"""Table lookup behind one small interface: see ``interface.py`` for the contract, ``registry.py`` for the backends."""

from umv2_megatron.ops.interface import Backend, TableLookup, pre_value_scores
from umv2_megatron.ops.registry import BACKENDS, get_backend

__all__ = ["BACKENDS", "Backend", "TableLookup", "get_backend", "pre_value_scores"]
