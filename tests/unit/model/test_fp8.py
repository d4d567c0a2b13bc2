"""FP8 reaches the dense FFNs and nothing else; what runs is noted by a stand-in for Transformer Engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BLOCKS = 4  # of umv2-tiny
RECIPES = {
    "delayed": "TEDelayedScaling",
    "tensorwise": "Float8CurrentScaling",
    "blockwise": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
}
HYBRID = ["--fp8-format", "hybrid"]
CASES = {recipe: [*HYBRID, "--fp8-recipe", recipe] for recipe in RECIPES}
for _recipe in ("delayed", "tensorwise", "blockwise"):
    CASES[_recipe].append("--fp8-param-gather")
CASES["none"] = []
CASES["norms behind"] = ["--norm-placement", "post", "--qk-norm-span", "projection"]
CASES["bf16 weights"] = [*HYBRID]
CASES["inner blocks"] = [*HYBRID, "--fp8-recipe", "tensorwise", "--first-last-layers-bf16", "--fp8-param-gather"]
CASES["recomputed norms"] = [
    *HYBRID, "--fp8-recipe", "tensorwise", "--recompute-granularity", "selective", "--recompute-modules", "layernorm",
]  # fmt: skip


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    program = Path(__file__).with_name("fp8_recorder.py")
    done = subprocess.run(
        [sys.executable, program, json.dumps(CASES)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RECORD")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(lines[0].removeprefix("RECORD"))


def modules(*names: str, blocks: range = range(BLOCKS)) -> list[str]:
    return sorted(f"decoder.layers.{block}.{name}" for block in blocks for name in names)


FFN = ("mlp.ffn.linear_fc1", "mlp.ffn.linear_fc2")
ATTENTION = tuple(f"self_attention.{name}" for name in ("core_attention", "linear_proj", "linear_qkv"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_ffns_alone_compute_in_fp8_and_hold_fp8_weights(record: dict[str, Any], recipe: str) -> None:
    ran = record[recipe]
    assert ran["fp8"] == modules(*FFN) and ran["recipes"] == [RECIPES[recipe]]
    assert ran["not"] == modules(*ATTENTION)
    assert ran["fp8_weights"] == (modules(*FFN) if "--fp8-param-gather" in CASES[recipe] else [])


def test_weights_stay_in_bfloat16_without_the_flag(record: dict[str, Any]) -> None:
    assert record["bf16 weights"]["fp8"] == modules(*FFN) and record["bf16 weights"]["fp8_weights"] == []
    assert record["none"]["fp8"] == [] and record["none"]["not"] == modules(*FFN, *ATTENTION)


def test_memory_layers_are_no_part_of_the_engine(record: dict[str, Any]) -> None:
    """Their projections are torch's own functions, which its FP8 context does not reach."""
    for ran in record.values():
        assert ran["in_memory"] == [] and ran["dtypes"] == ["torch.bfloat16"]


def test_delayed_scaling_reduces_once_for_a_forward_pass(record: dict[str, Any]) -> None:
    assert record["delayed"]["reductions"] == 1


def test_first_and_last_blocks_stay_in_bfloat16(record: dict[str, Any]) -> None:
    ran = record["inner blocks"]
    assert ran["fp8"] == ran["fp8_weights"] == modules(*FFN, blocks=range(1, BLOCKS - 1))


def test_recomputed_norms_have_the_ffn_keep_its_input(record: dict[str, Any]) -> None:
    """mcore looks for the FFN's first layer, which keeps FP8 copies of its input otherwise."""
    assert record["recomputed norms"]["fp8"] == modules(*FFN)
    assert set(modules(FFN[0])) <= set(record["recomputed norms"]["keeps_input"])
    assert not set(modules(FFN[0])) & set(record["bf16 weights"]["keeps_input"])


def test_norms_behind_attention_and_ffn(record: dict[str, Any]) -> None:
    """The engine's norms, too, and none in its linear layers; those over all heads are our own."""
    usual, behind = record["none"], record["norms behind"]
    assert usual["norms_in_linear_layers"] == modules("self_attention.linear_qkv")
    assert behind["norms_in_linear_layers"] == [] and behind["not"] == usual["not"]
    assert behind["norms"] == sorted(
        ["decoder.final_layernorm", *modules("self_attention.post_layernorm", "mlp.post_layernorm")]
    )
