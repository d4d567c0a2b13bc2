"""A pruned set of the layouts that ``make layouts`` runs, with fewer steps; and recomputation, which it leaves out."""

from __future__ import annotations

import pytest
from layout_matrix import IN_PARTS, Layout, Matrix, all_layouts

pytestmark = pytest.mark.thorough

FULL = (("recompute_granularity", "full"), ("recompute_method", "uniform"), ("recompute_num_layers", 1))
SELECTIVE = (("recompute_granularity", "selective"), ("recompute_modules", "mlp"))
INTERLEAVED = (("num_layers_per_virtual_pipeline_stage", 1),)


def slow(layout: Layout) -> object:
    """Each difference from one rank is in a quick layout, too, or in test_resharding.py's shared tables."""
    return pytest.param(layout, marks=pytest.mark.slow)


PRUNED = [
    slow(Layout(2, m=2, mode="dim", distributed_optimizer=True, extra=FULL)),
    Layout(2, m=2, mode="row", sharing="block", extra=(*SELECTIVE, *IN_PARTS)),
    slow(Layout(2, tp=2, m=2, mode="row", distributed_optimizer=True)),
    Layout(4, tp=2, sp=True, m=4, mode="row", distributed_optimizer=True, sharing="block", extra=IN_PARTS),
    Layout(4, tp=2, sp=True, cp=2, m=2, mode="dim"),
    slow(Layout(4, pp=2, m=2, mode="row", distributed_optimizer=True, sharing="block")),
    Layout(4, pp=2, m=2, mode="dim", extra=INTERLEAVED),
    slow(Layout(4, tp=2, sp=True, pp=2, m=2, mode="row", distributed_optimizer=True, sharing="engram", extra=IN_PARTS)),
    slow(Layout(2, tp=2, m=2, mode="dim", sharing="engram", extra=FULL)),
    slow(Layout(4, pp=2, m=2, mode="dim", sharing="engram", extra=INTERLEAVED)),
    slow(Layout(2, m=2, mode="row", distributed_optimizer=True, sharing="both", extra=(*FULL, *IN_PARTS))),
    slow(Layout(2, m=2, mode="dim", sharing="both")),
    slow(Layout(2, tp=2, m=2, mode="dim", distributed_optimizer=True, sharing="both")),
    slow(Layout(2, tp=2, sp=True, m=2, mode="row", sharing="both")),
    slow(Layout(2, pp=2, sharing="both", extra=SELECTIVE)),
    slow(Layout(4, pp=2, m=2, mode="dim", sharing="both", extra=INTERLEAVED)),
    slow(Layout(2, sharing="both", distributed_optimizer=True)),
]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory) -> Matrix:
    return Matrix(tmp_path_factory.mktemp("layouts"), steps=2, resumed=False)


@pytest.mark.parametrize("layout", PRUNED, ids=lambda layout: f"{layout.world}-{layout.name}")
def test_layout_equals_one_rank(layout, matrix):
    figures, _, missed = matrix.agreement(layout)
    assert not missed, figures


def test_the_whole_matrix_has_every_combination():
    layouts = all_layouts()
    wanted = {"tp": (1, 2), "pp": (1, 2), "cp": (1, 2), "m": (1, 2, 4), "sharing": ("none", "block", "engram")}
    for field, values in wanted.items():
        assert {getattr(layout, field) for layout in layouts} == set(values)
    assert {(layout.tp, layout.pp, layout.cp) for layout in layouts if layout.m == 4} >= {(2, 2, 2), (1, 1, 1)}
