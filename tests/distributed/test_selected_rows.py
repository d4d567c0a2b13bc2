"""Training of selected rows of value tables alone (--trainable rows): every other number stays bit for bit, with weight
decay too, the selected rows learn alike in every layout, and a run goes on bit by bit. Tables have 25 rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from reshard import (
    START,
    different,
    go_on,
    layout,
    open_layout,
    save,
    train,
    visit,
    what_loading_says,
    whole_tensors,
    write_start,
)

from umv2_megatron.checkpoint.save_load import load_checkpoint
from umv2_megatron.checkpoint.store import CheckpointStore
from umv2_megatron.memory.row_adam import ROW_MOMENT
from umv2_megatron.memory.row_counts import RowSelection
from umv2_megatron.parallel import groups

pytestmark = pytest.mark.thorough

# Of the three tables one has no selected row; the first and the last row, neighbours, and rows in which shares end.
ROWS = {0: [0, 3, 4, 11, 12, 13, 24], 1: [], 2: [7, 8, 20]}
TABLES = {"memory_value_dim": 28, "memory_pre_value_dim": 20, "memory_layer_freq": [1, 1, 1, 0], "weight_decay": 0.1}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one-dist": (1, layout(dist=True)),
    "dp2-dist": (2, layout(dist=True)),
    "m2-dim": (2, layout(m=2)),
    "tp2-m2-row-dist": (2, layout(tp=2, m=2, mode="row", dist=True)),
    "dp4-m2-dim-dist-overlap": (
        4,
        layout(m=2, dist=True, overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=3000),
    ),
    "dp4-dist": (4, layout(dist=True)),
    "pp2-dist": (2, layout(pp=2, dist=True)),
}
QUICK = ("tp2-m2-row-dist",)


def selection(path: Path, rows: dict[int, list[int]]) -> str:
    RowSelection({layer: torch.tensor(each, dtype=torch.int64) for layer, each in rows.items()}).write(path)
    return str(path)


def settings(path: str, moments: str, changes: dict[str, Any]) -> dict[str, Any]:
    return {**TABLES, "trainable": "rows", "trainable_rows": path, "memory_value_second_moment": moments, **changes}


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """For both kinds of moments: the file of rows, a checkpoint of one rank, and what follows there."""
    found = {}
    for moments in ("full", "row"):
        folder = tmp_path_factory.mktemp(moments)
        path = selection(folder / "rows.safetensors", ROWS)
        changes = settings(path, moments, layout())
        found[moments] = (path, str(folder / "start"), run_ranks(1, write_start, str(folder / "start"), changes, 3)[0])
    return found


def initial(changes: dict[str, Any], directory: str) -> None:
    """Save the model of ``write_start`` before its first step."""
    _run, state = open_layout(changes, seed=1)
    save(directory, state)


def test_nothing_but_the_selected_rows_moves(starts: Any, tmp_path: Path) -> None:
    for moments, (path, start, _) in starts.items():
        before = str(tmp_path / moments)
        run_ranks(1, initial, settings(path, moments, layout()), before)
        first, then = (whole_tensors(CheckpointStore(each).path(START)) for each in (before, start))
        weights = [key for key in first if not key.startswith("optimizer.")]
        moved = []
        for key in weights:
            if ".table." not in key:
                assert torch.equal(first[key], then[key]) or key.endswith((".u", ".t")), key
                continue
            rows = ROWS[int(key.split(".")[2])]
            others = [row for row in range(25) if row not in rows]
            assert torch.equal(first[key][others], then[key][others]), key
            moved += [not torch.equal(first[key][row], then[key][row]) for row in rows]
        assert all(moved) and len(moved) == 2 * 10  # weight decay moves also a row that nobody picks


def test_optimizer_state_is_of_the_selected_rows(starts: Any) -> None:
    for moments, (_, start, _) in starts.items():
        stored = whole_tensors(CheckpointStore(start).path(START))
        second = "exp_avg_sq" if moments == "full" else ROW_MOMENT
        state = {key: tuple(tensor.shape) for key, tensor in stored.items() if key.startswith("optimizer.state.")}
        widths = {"values": 28, "pre_values": 20}
        expected = {}
        for block, rows in ROWS.items():
            for name, width in widths.items() if rows else ():
                key = f"decoder.layers.{block}.mlp.memory.table.{name}"
                expected[f"optimizer.state.exp_avg.{key}"] = (len(rows), width)
                expected[f"optimizer.state.{second}.{key}"] = (len(rows), width)[: 1 if second == ROW_MOMENT else 2]
        assert state == expected


@pytest.mark.parametrize(
    "name", [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in LAYOUTS]
)
def test_one_state_goes_on_alike_in_every_layout(starts: Any, tmp_path: Path, name: str) -> None:
    world, changes = LAYOUTS[name]
    for moments, (path, start, numbers) in starts.items():
        here = settings(path, moments, changes)
        target = str(tmp_path / moments)
        for rank in run_ranks(world, visit, start, [(here, target)], 3):
            for ours, theirs in zip(rank[0]["numbers"], numbers, strict=True):
                assert ours == pytest.approx(theirs, rel=1e-6)
        assert different(start, target) == []


def ended(source: str, changes: dict[str, Any], directory: str) -> None:
    """Go on from ``source`` for three steps and save."""
    run, state = open_layout(changes, seed=7)
    load_checkpoint(CheckpointStore(source), state.chunks, state.optimizer, state.scheduler)
    train(run, state, range(START, START + 3))
    save(directory, state)
    groups.destroy_groups()


@pytest.mark.slow
def test_every_layout_ends_with_the_same_rows(starts: Any, tmp_path: Path) -> None:
    """Every number of tables and moments, and not only the losses."""
    for moments, (path, start, _) in starts.items():
        stored = {}
        for name, (world, changes) in {"one": (1, layout()), **LAYOUTS}.items():
            target = str(tmp_path / f"{moments}-{name}")
            run_ranks(world, ended, start, settings(path, moments, changes), target)
            stored[name] = whole_tensors(CheckpointStore(target).path(START))
        tables = [key for key in stored["one"] if ".table." in key]
        assert len(tables) == 6 + 2 * 4
        for name in LAYOUTS:
            for key in tables:
                torch.testing.assert_close(stored[name][key], stored["one"][key], rtol=2e-4, atol=2e-6, msg=key)


RESUMED = {
    "one": (1, "full", layout()),
    "m2-dim-dist-bf16": (2, "row", layout(m=2, dist=True, bf16=True)),
    "dp2-bf16": (2, "full", layout(bf16=True)),
    "m2-row-dist-bf16": (2, "full", layout(m=2, mode="row", dist=True, bf16=True)),
}


@pytest.mark.parametrize(
    "name", [each if each == "m2-dim-dist-bf16" else pytest.param(each, marks=pytest.mark.slow) for each in RESUMED]
)
def test_resumption_is_bitwise(tmp_path: Path, name: str) -> None:
    world, moments, changes = RESUMED[name]
    here = settings(selection(tmp_path / "rows.safetensors", ROWS), moments, changes)
    before = run_ranks(world, go_on, str(tmp_path / "run"), here, False)
    assert run_ranks(world, go_on, str(tmp_path / "run"), here, True) == before


def test_other_rows_are_refused(starts: Any, tmp_path: Path) -> None:
    _, start, _ = starts["full"]
    other = selection(tmp_path / "other.safetensors", {**ROWS, 1: [2]})
    message = run_ranks(1, what_loading_says, start, [settings(other, "full", layout())])[0][0]
    assert "--trainable-rows is a file with SHA-256" in message and "--no-load-optim" in message and "\n" not in message
    assert run_ranks(1, visit, start, [(settings(other, "full", layout()), "")], 1, False)[0][0]["numbers"]
