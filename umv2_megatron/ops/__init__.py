"""Table lookup behind one small interface: see ``interface.py`` for the contract, one file per backend."""

from umv2_megatron.ops.interface import TableLookup, get_backend, pre_value_scores

__all__ = ["TableLookup", "get_backend", "pre_value_scores"]
