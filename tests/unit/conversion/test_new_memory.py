"""Memory layers of an upcycled model are those that training would begin with, number by number."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "tests" / "unit" / "hf"), str(ROOT / "tests" / "distributed")]
import megatron_pair  # noqa: E402
from harness import run_ranks  # noqa: E402

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"bf16": True, "memory_layer_freq": "[0,1,0,1]"},
    "ring": {"memory_sharing": "ring", "memory_sharing_size": 2, "memory_num_heads": 2},
    "fixed": {"memory_init": "fixed", "memory_sharing": "block", "memory_sharing_size": 2},
    "ultramem": {"ffn_variant": "ultramem", "memory_layer_freq": "[1,0,0,0]", "swiglu": False},
    "memory-plus": {"ffn_variant": "memory-plus", "memory_layer_freq": "2"},
    "peer": {"ffn_variant": "peer", "memory_layer_freq": "2", "memory_num_heads": 2},
}


def different(changes: dict[str, Any]) -> list[str]:
    """Tensors of the memory layers of a built model that are others in ``NewMemory``, which is asked for parts of them,
    the last layer first."""
    from umv2_megatron.conversion.new_memory import NewMemory
    from umv2_megatron.model.builder import build_model
    from umv2_megatron.model.ffn_with_memory import memory_layers

    megatron_pair.start()
    run = megatron_pair.configured(**changes)
    built = memory_layers(build_model(run, run.values["vocab_size"]))
    new = NewMemory(run.memory, run.values, run.params_dtype, silent=False)
    silent = NewMemory(run.memory, run.values, run.params_dtype, silent=True)
    quiet = "value_proj.weight" if run.memory.value_expansion != "none" else "table.values"
    found = []
    for block, layer in reversed(built):
        layer.refresh_singular_vectors()
        for name, tensor in layer.state_dict().items():
            half = len(tensor) // 2
            parts = [new.rows(block, name, half, len(tensor)), new.rows(block, name, 0, half)]
            if not torch.equal(torch.cat(parts[::-1]), tensor) or parts[0].dtype != tensor.dtype:
                found.append(f"{block} {name}")
            if bool(silent.rows(block, name, 0, len(tensor)).any()) == (name == quiet):
                found.append(f"silent {block} {name}")
    assert built
    return found


@pytest.mark.parametrize("name", CASES)
def test_its_numbers_are_those_of_a_run_from_scratch(name: str) -> None:
    assert run_ranks(1, different, CASES[name])[0] == []
