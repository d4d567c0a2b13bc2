"""A checkpoint of any layout loads into any other: weights and optimizer state bit for bit, and training goes on alike.

The model has tables of 25 rows and a vocabulary of 101, which nothing divides. `reshard.py` has what runs on the ranks.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from harness import run_ranks
from reshard import START, VOCABULARY, different, layout, visit, whole_tensors, write_start

from umv2_megatron.training.checkpoint_store import CheckpointStore

# Name -> (ranks, settings). The quick tests go from "one" to each and back; the slow ones from each to each.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, layout()),
    "one-dist": (1, layout(dist=True)),
    "dp2": (2, layout()),
    "dp2-dist": (2, layout(dist=True)),
    "tp2": (2, layout(tp=2)),
    "tp2-dist": (2, layout(tp=2, dist=True)),
    "pp2": (2, layout(pp=2)),
    "pp2-vpp-dist": (2, layout(pp=2, vpp=True, dist=True)),
    "m2-dim": (2, layout(m=2)),
    "m2-row": (2, layout(m=2, mode="row")),
    "m2-row-dist": (2, layout(m=2, mode="row", dist=True)),
    "tp2-m2-dim-dist": (2, layout(tp=2, m=2, dist=True)),
    "dp4-m4-row": (4, layout(m=4, mode="row")),
    "dp4-m4-dim-dist": (4, layout(m=4, dist=True)),
    "dp4-m2-row-dist": (4, layout(m=2, mode="row", dist=True)),
    "tp2-pp2-m2-row-dist": (4, layout(tp=2, pp=2, m=2, mode="row", dist=True)),
    "tp2-pp2-vpp-m2-dim": (4, layout(tp=2, pp=2, vpp=True, m=2)),
    "tp2-dp2-m4-row-dist": (4, layout(tp=2, m=4, mode="row", dist=True)),
    "tp2-dp2-m2-row-dist-overlap": (
        4,
        layout(tp=2, m=2, mode="row", dist=True, overlap_grad_reduce=True, overlap_param_gather=True),
    ),
}
QUICK = ["one-dist", "pp2-vpp-dist", "tp2-m2-dim-dist", "m2-row-dist", "tp2-pp2-m2-row-dist", "dp4-m4-row"]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> tuple[str, list[tuple[float, float]]]:
    """A checkpoint of one rank, and the losses and gradient norms that follow."""
    directory = str(tmp_path_factory.mktemp("start"))
    return directory, run_ranks(1, write_start, directory, LAYOUTS["one"][1])[0]


def check(results: list[list[dict[str, Any]]], numbers: list[tuple[float, float]]) -> None:
    """Of all ranks (outer) and layouts (inner): everything arrived, nothing was gathered, training goes on alike."""
    for rank in results:
        for result in rank:
            assert result["wrong"] == []
            assert result.get("collectives", 0) == 0
            assert result.get("largest", 0) <= result.get("own", 0)
            for ours, theirs in zip(result["numbers"], numbers, strict=True):
                assert ours == pytest.approx(theirs, rel=1e-6)


def by_world(names: list[str]) -> list[tuple[int, list[str]]]:
    return [(world, list(group)) for world, group in itertools.groupby(names, key=lambda name: LAYOUTS[name][0])]


@pytest.mark.parametrize("world, names", by_world(QUICK), ids=lambda value: "+".join(value) if value is list else None)
def test_one_rank_to_every_layout_and_back(start, tmp_path, world, names):
    source, numbers = start
    check(run_ranks(world, visit, source, [(LAYOUTS[name][1], str(tmp_path / name)) for name in names]), numbers)
    for name in names:
        assert different(source, tmp_path / name) == []
    # Back onto one rank, and from one sharded layout to the other.
    for name in names:
        check(run_ranks(1, visit, str(tmp_path / name), [(LAYOUTS["one"][1], "")]), numbers)


def test_from_one_sharded_layout_to_another(start, tmp_path):
    source, numbers = start
    through = ["tp2-dp2-m4-row-dist", "dp4-m4-dim-dist", "tp2-pp2-vpp-m2-dim"]
    for name in through:
        check(run_ranks(4, visit, source, [(LAYOUTS[name][1], str(tmp_path / name))]), numbers)
        assert different(start[0], tmp_path / name) == []
        source = str(tmp_path / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_to_every_layout(start, tmp_path, name):
    origin, numbers = start
    world, settings = LAYOUTS[name]
    check(run_ranks(world, visit, origin, [(settings, str(tmp_path / "source"))]), numbers)
    for world, names in by_world(list(LAYOUTS)):
        targets = [(LAYOUTS[other][1], str(tmp_path / other)) for other in names]
        check(run_ranks(world, visit, str(tmp_path / "source"), targets), numbers)
        for other in names:
            assert different(origin, tmp_path / other) == [], other


BF16 = {"bf16": True}
PRECISION = {
    "bf16": (layout(tp=2, m=2, mode="row", dist=True, **BF16), layout(pp=2, **BF16)),
    "bf16 without the distributed optimizer": (layout(m=2, **BF16), layout(tp=2, dist=True, **BF16)),
}


@pytest.mark.parametrize("case", PRECISION)
def test_main_parameters_arrive(tmp_path, case):
    first, second = PRECISION[case]
    run_ranks(2, write_start, str(tmp_path / "start"), first, 0)
    results = run_ranks(2, visit, str(tmp_path / "start"), [(second, str(tmp_path / "second"))], 0)
    check(results, [])
    assert different(tmp_path / "start", tmp_path / "second") == []
    stored = whole_tensors(CheckpointStore(tmp_path / "second").path(START))
    weights = [key for key in stored if not key.startswith("optimizer.") and f"optimizer.state.exp_avg.{key}" in stored]
    assert len(weights) > 20
    for key in weights:
        main = stored[f"optimizer.state.fp32_param.{key}"]
        assert main.dtype.itemsize == 4 and (main.to(stored[key].dtype) == stored[key]).all()
