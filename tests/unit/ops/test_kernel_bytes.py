"""Bytes and launches of the Triton lookup, counted by benchmarks/kernel_bytes.py, against the least by arithmetic."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from umv2_megatron.planning.launches import AROUND, DENSE_BLOCK, FORWARD_SHARE, MEMORY_LAYER

pytest.importorskip("triton", reason="triton is not installed: pip install -r requirements-triton.txt")

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
SIZES = ("small", "227m")
LOADED, STORED = "loaded", "stored"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("bytes") / "bytes.json"
    command = [sys.executable, "benchmarks/kernel_bytes.py", "--json", str(path), "--size", "small", "--size", "227m"]
    command += ["--size", "row"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(path.read_text())["results"]


@pytest.fixture(params=SIZES)
def counted(request: pytest.FixtureRequest, results: dict[str, Any]) -> dict[str, Any]:
    return next(each for each in results["bytes"] if each["size"] == request.param)


def moved(kernels: dict[str, Any], kind: str, ways: tuple[str, ...] = (LOADED, STORED)) -> int:
    return sum(each[way].get(kind, 0) for each in kernels.values() for way in ways)


def test_rows_are_read_once_in_each_direction(counted: dict[str, Any]) -> None:
    """A row that a tile holds twice counts once, so that it may be less: of the small size all tokens share a tile."""
    for part in ("forward", "backward"):
        found, least = moved(counted[part], "rows"), counted["least"][part]["rows"]
        seen = counted["distinct"] if counted["size"] == "small" else 0.9 * counted["picks"]
        assert seen * least <= found * counted["picks"] <= least * counted["picks"], part


def test_sums_are_read_and_written_once(counted: dict[str, Any]) -> None:
    """But for rows that run on over a multiple of PIECE."""
    adding = {"add_to_rows": counted["backward"]["add_to_rows"]}
    for way in (LOADED, STORED):
        found, least = moved(adding, "sums", (way,)), counted["least"]["backward"]["sums"] / 2
        assert found == least
    assert moved(counted["backward"], "sums") <= 1.02 * counted["least"]["backward"]["sums"]


def test_what_else_is_moved_is_small(counted: dict[str, Any]) -> None:
    """Per pick: row id, scores, rho; in the backward their gradients, the weights, and the lists of the sort."""
    assert moved(counted["forward"], "others") / counted["picks"] < 36
    assert moved(counted["backward"], "others") / counted["picks"] < 170
    assert moved(counted["forward"], "tokens") < 0.05 * counted["least"]["forward"]["rows"]
    # Projected input and gradient of the output, once for each pick and table; 3 MB in all that stay in the cache.
    assert moved(counted["backward"], "tokens") <= 1.1 * counted["least"]["backward"]["rows"]


def test_launches_and_programs(counted: dict[str, Any]) -> None:
    names = {name: each["launches"] for part in ("forward", "backward") for name, each in counted[part].items()}
    long_rows = {"add_long_rows": 1} if counted["picks"] > 128 else {}
    assert names == {"fused_forward": 1, "row_dots": 1, "find_segments": 1, "add_to_rows": 1, **long_rows}
    assert counted["backward"]["add_to_rows"]["programs"] <= counted["picks"] / 2
    tokens = {"small": 8, "227m": 1}[counted["size"]]  # of a program
    for found in (counted["forward"]["fused_forward"], counted["backward"]["row_dots"]):
        assert found["programs"] == -(-counted["tokens"] // tokens)
    if counted["size"] == "227m":
        both = {**counted["forward"], **counted["backward"]}
        assert all(both[name]["idle"] < 0.05 for name in ("fused_forward", "row_dots", "add_to_rows"))


def test_operations_of_a_block(results: dict[str, Any]) -> None:
    """No more than when this was written."""
    ops = {name: sum(found["block"].values()) for name, found in results["ops"].items()}
    assert ops["dense"] == DENSE_BLOCK, "the planner counts with it"
    assert {name: ops[name] - DENSE_BLOCK for name in ("triton", "scatter")} == {
        name: MEMORY_LAYER[name] for name in ("triton", "scatter")
    }
    for found in results["ops"].values():
        assert found["around"] == pytest.approx(AROUND, abs=3)
        assert found["forward"] == pytest.approx(FORWARD_SHARE, abs=0.03)
    # A further layer adds none to the refresh of u and t.
    assert all(sum(found["refresh"].values()) == 0 for found in results["ops"].values())


def test_planner_counts_the_same_bytes(counted: dict[str, Any]) -> None:
    """But for the tokens' own vectors, which the planner has read once, and for torch's sort; rows that a tile holds
    twice, which the interpreter counts once, are those of the least."""
    from benchmarks.kernel_bytes import SIZES as LOOKUPS
    from umv2_megatron.config.memory_config import MemoryConfig
    from umv2_megatron.planning.device_bytes import SORT_BYTES, by_triton
    from umv2_megatron.planning.layout import Layout

    tokens, picks, rows, pre, values, cores = LOOKUPS[counted["size"]]
    memory = MemoryConfig(num_keys=picks, topk=picks, num_cores=cores, pre_value_dim=pre, value_dim=values)
    planned = by_triton(memory, Layout(bf16=True), counted["picks"], tokens, rows, pre, values)
    forward, backward = (
        counted["least"][part]["rows"] + moved(counted[part], "sums") + moved(counted[part], "others")
        for part in ("forward", "backward")
    )
    assert planned.forward == pytest.approx(forward + moved(counted["forward"], "tokens"), rel=0.05)
    not_counted = SORT_BYTES * counted["picks"] + tokens * (pre + values) * 2
    assert planned.backward - not_counted == pytest.approx(backward, rel=0.05)


def test_planner_counts_the_same_bytes_of_a_shard_by_row(results: dict[str, Any]) -> None:
    """Tokens' vectors once in the order of tokens and once for each pick; PyTorch's products are not counted."""
    from benchmarks.kernel_bytes import LISTS
    from umv2_megatron.config.memory_config import MemoryConfig
    from umv2_megatron.planning.device_bytes import FP32, SORT_BYTES, by_triton
    from umv2_megatron.planning.layout import Layout

    counted = next(each for each in results["bytes"] if each["size"] == "row")
    tokens, _, rows, pre, values, cores = LISTS["row"]
    picks = counted["picks"]
    memory = MemoryConfig(num_keys=64, topk=64, num_cores=cores, pre_value_dim=pre, value_dim=values)
    layout = Layout(world=64, bf16=True, memory_size=64, memory_mode="row")
    planned = by_triton(memory, layout, picks, tokens, rows, pre, values, cache=0.0)
    scaled, others = (2 * cores + 1) * FP32, (4 * cores + 1) * FP32
    forward, backward = (counted["least"][part]["rows"] + moved(counted[part], "sums") + moved(counted[part], "others")
                         + moved(counted[part], "tokens") for part in ("forward", "backward"))  # fmt: skip
    assert planned.forward - picks * scaled == pytest.approx(forward, rel=0.05)
    assert planned.backward - picks * (2 * scaled + others + SORT_BYTES) == pytest.approx(backward, rel=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_planner_counts_the_additions_of_gradients(precision: str, results: dict[str, Any]) -> None:
    """To the buffer, of dense weights; the planner counts what the product writes, too."""
    from umv2_megatron.planning import device_bytes
    from umv2_megatron.planning.layout import Layout

    layout = Layout(engine=False, bf16=precision == "bf16")
    added = device_bytes.accumulation(1, layout).backward - layout.weight_bytes
    assert results["block"][precision]["parameters"] == pytest.approx(added, rel=0.02)
