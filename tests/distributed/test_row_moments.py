"""Second moments of value tables by row (--memory-value-second-moment row): the same training in every layout, the same
state after a change of layout, and bitwise resumption. Tables have 25 rows, which no number of ranks divides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from reshard import START, different, go_on, layout, open_layout, visit, what_loading_says, whole_tensors, write_start

from umv2_megatron.checkpoint import optimizer_state
from umv2_megatron.checkpoint.store import CheckpointStore
from umv2_megatron.memory.row_adam import ROW_MOMENT, RowAdam
from umv2_megatron.parallel import groups

pytestmark = pytest.mark.thorough

# Three tables, of widths with which the shares of the distributed optimizer end inside rows.
TABLES = {"memory_value_dim": 28, "memory_pre_value_dim": 20, "memory_layer_freq": [1, 1, 1, 0]}
ROW = {"memory_value_second_moment": "row", **TABLES}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one-dist": (1, layout(dist=True, **ROW)),
    "dp2-dist": (2, layout(dist=True, **ROW)),
    "m2-dim": (2, layout(m=2, **ROW)),
    "tp2-m2-row-dist": (2, layout(tp=2, m=2, mode="row", dist=True, **ROW)),
    "pp2-vpp-dist": (2, layout(pp=2, vpp=True, dist=True, **ROW)),
    "dp4-m2-dim-dist-overlap": (
        4,
        layout(m=2, dist=True, overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=3000, **ROW),
    ),
    "dp4-m2-row-dist": (4, layout(m=2, mode="row", dist=True, **ROW)),
    "dp4-dist": (4, layout(dist=True, **ROW)),
}


QUICK = ("one-dist", "tp2-m2-row-dist", "pp2-vpp-dist", "dp4-m2-dim-dist-overlap")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[tuple[float, float]]]:
    """A checkpoint of one rank, and the losses and gradient norms that follow."""
    directory = str(tmp_path_factory.mktemp("start"))
    return directory, run_ranks(1, write_start, directory, layout(**ROW), 3)[0]


def straddling(changes: dict[str, Any]) -> tuple[int, int]:
    """(rows that several ranks of the data-parallel group hold, ranges of tables that begin inside rows)."""
    _run, state = open_layout(changes, seed=1)
    shared = inside = 0
    for part in optimizer_state.optimizer_parts(state.optimizer):
        if isinstance(part.optimizer, RowAdam):
            shared += part.optimizer._shared[0] if part.optimizer._shared else 0
            inside += sum(each.begins_inside for each in part.optimizer.ranges.values())
    groups.destroy_groups()
    return shared, inside


def test_the_layouts_cut_through_rows() -> None:
    assert run_ranks(1, straddling, layout(dist=True, **ROW)) == [(0, 0)]
    found = run_ranks(4, straddling, LAYOUTS["dp4-m2-dim-dist-overlap"][1])
    assert found[0][0] > 0 and sum(inside for _, inside in found) > 0


@pytest.mark.parametrize(
    "name", [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in LAYOUTS]
)
def test_one_state_goes_on_alike_in_every_layout(start: Any, tmp_path: Path, name: str) -> None:
    source, numbers = start
    world, settings = LAYOUTS[name]
    for rank in run_ranks(world, visit, source, [(settings, str(tmp_path / name))], 3):
        assert rank[0]["wrong"] == [] and rank[0]["collectives"] == 0 and rank[0]["largest"] <= rank[0]["own"]
        for ours, theirs in zip(rank[0]["numbers"], numbers, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6)
    assert different(source, tmp_path / name) == []
    stored = whole_tensors(CheckpointStore(tmp_path / name).path(START))
    moments = {key: value for key, value in stored.items() if key.startswith(f"optimizer.state.{ROW_MOMENT}.")}
    assert len(moments) == 6 and all(value.shape == (25,) and value.gt(0).any() for value in moments.values())
    assert not any("exp_avg_sq." in key and ".table." in key for key in stored)


def test_training_from_scratch_updates_alike(tmp_path: Path) -> None:
    """Every number of tables and moments, and not only the losses, where ranks share rows and columns."""
    runs = {
        "one": (1, layout(**ROW)),
        "four": LAYOUTS["dp4-m2-dim-dist-overlap"],
        "three": (3, layout(dist=True, **ROW)),
    }
    stored = {}
    for name, (world, changes) in runs.items():
        batch = {"global_batch_size": 12, "memory_init": "fixed"}
        run_ranks(world, write_start, str(tmp_path / name), {**changes, **batch}, 0)
        stored[name] = whole_tensors(CheckpointStore(tmp_path / name).path(START))
    tables = [key for key in stored["one"] if ".table." in key]
    assert len(tables) == 6 * 3
    for name in ("four", "three"):
        for key in tables:
            torch.testing.assert_close(stored[name][key], stored["one"][key], rtol=2e-4, atol=2e-6, msg=key)


RESUMED = {
    "m2-dim-dist-bf16": (2, layout(m=2, dist=True, bf16=True, **ROW)),
    "dp2-dist": (2, layout(dist=True, **ROW)),
    "dp2-bf16": (2, layout(bf16=True, **ROW)),
}


@pytest.mark.parametrize(
    "name", [each if each == "m2-dim-dist-bf16" else pytest.param(each, marks=pytest.mark.slow) for each in RESUMED]
)
def test_resumption_is_bitwise(tmp_path: Path, name: str) -> None:
    world, changes = RESUMED[name]
    before = run_ranks(world, go_on, str(tmp_path), changes, False)
    assert run_ranks(world, go_on, str(tmp_path), changes, True) == before


def test_the_other_kind_is_refused(start: Any, tmp_path: Path) -> None:
    full = layout(**TABLES)
    run_ranks(1, write_start, str(tmp_path), full, 0)
    for source, changes, words in (
        (start[0], full, ["--memory-value-second-moment is full; expected row", "--no-load-optim"]),
        (str(tmp_path), layout(**ROW), ["--memory-value-second-moment is row; expected full", "--no-load-optim"]),
    ):
        message = run_ranks(1, what_loading_says, source, [changes])[0][0]
        assert all(word in message for word in words) and "\n" not in message, message
    assert run_ranks(1, visit, start[0], [(full, "")], 1, False)[0][0]["numbers"]  # the weights alone load
