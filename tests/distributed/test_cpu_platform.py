"""mcore on CPU: the same small model in every layout gives the same losses and gradient norms."""

from __future__ import annotations

import math
from typing import Any

import pytest
from harness import run_ranks

STEPS = 5
SLOW = pytest.mark.slow  # variants of what the other cases show already
RECOMPUTE_ALL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
RECOMPUTE_SOME = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp", "layernorm"]}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}


def run(**layout: Any) -> dict[str, list[float]]:
    import tiny_gpt

    return tiny_gpt.run(tiny_gpt.Layout(**layout))


@pytest.fixture(scope="module")
def one_rank() -> Any:
    """Losses and norms on one rank with two micro-batches, by kind of model."""
    known: dict[tuple, dict[str, list[float]]] = {}

    def of(**kind: Any) -> dict[str, list[float]]:
        key = tuple(sorted(kind.items()))
        if key not in known:
            known[key] = run_ranks(1, run, **kind)[0]
        return known[key]

    return of


def assert_close(told: dict[str, list[float]], expected: dict[str, list[float]], relative: float = 1e-6) -> None:
    assert len(told["losses"]) == STEPS
    for name in ("losses", "norms"):
        assert all(math.isfinite(value) for value in told[name])
        assert told[name] == pytest.approx(expected[name], rel=relative), name


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        pytest.param(2, {}, id="dp2"),
        pytest.param(2, {"distributed_optimizer": True}, id="dp2-distopt"),
        pytest.param(2, {"overlap": True}, id="dp2-overlap", marks=SLOW),
        pytest.param(2, {"overlap": True, "distributed_optimizer": True}, id="dp2-distopt-overlap"),
        pytest.param(2, {"tp": 2}, id="tp2-sp"),
        pytest.param(2, {"pp": 2, "micro_batch": 1}, id="pp2"),
        pytest.param(2, {"pp": 2, "vpp": 2, "micro_batch": 1, "overlap": True}, id="pp2-vpp2-overlap"),
        pytest.param(4, {"tp": 2, "pp": 2, "distributed_optimizer": True}, id="tp2-pp2-distopt", marks=SLOW),
    ],
)
def test_layouts_agree(ranks: int, layout: dict[str, Any], one_rank: Any) -> None:
    for told in run_ranks(ranks, run, **layout):
        assert_close(told, one_rank())


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        pytest.param(2, {}, id="dp2"),
        pytest.param(2, {"tp": 2}, id="tp2-sp"),
        pytest.param(2, {"tp": 2, "model": {"sequence_parallel": False}}, id="tp2-without-sp"),
        pytest.param(4, {"tp": 2, "distributed_optimizer": True}, id="tp2-sp-dp2-distopt", marks=SLOW),
        pytest.param(2, {"pp": 2, "distributed_optimizer": True}, id="pp2-distopt"),
    ],
)
def test_layouts_agree_with_a_table(ranks: int, layout: dict[str, Any], one_rank: Any) -> None:
    """A parameter marked as value tables are is reduced, scaled and clipped alike in every layout."""
    for told in run_ranks(ranks, run, table=True, **layout):
        assert_close(told, one_rank(table=True))


def test_untied_embeddings_over_stages(one_rank: Any) -> None:
    told = run_ranks(2, run, untied=True, pp=2, micro_batch=1)[0]
    assert_close(told, one_rank(untied=True))
    assert told["losses"][0] != one_rank()["losses"][0]


@pytest.mark.parametrize(
    "recompute",
    [pytest.param(RECOMPUTE_ALL, id="full", marks=SLOW), pytest.param(RECOMPUTE_SOME, id="selective")],
)
def test_recompute_changes_nothing(recompute: dict[str, Any], one_rank: Any) -> None:
    assert_close(run_ranks(1, run, model=recompute)[0], one_rank())


def test_recompute_repeats_dropout() -> None:
    """The recomputed forward draws the masks of the first one, from the CPU generator and the tracker's states."""
    plain = run_ranks(2, run, tp=2, model=DROPOUT)[0]
    assert_close(run_ranks(2, run, tp=2, model=DROPOUT | RECOMPUTE_ALL)[0], plain)


@pytest.mark.parametrize("sharded", [pytest.param(False, marks=SLOW), True])
def test_bf16_with_fp32_masters(sharded: bool, one_rank: Any) -> None:
    """bf16 parameters with fp32 masters train, sharded optimizer or not, near the fp32 run."""
    told = run_ranks(2, run, bf16=True, distributed_optimizer=sharded)[0]
    assert_close(told, one_rank(), relative=2e-2)
    assert told["losses"] != one_rank()["losses"]


@pytest.mark.slow
def test_expert_parallel_agrees_with_one_rank() -> None:
    """Experts on one rank, and split over two by either dispatcher."""
    moe = {"num_moe_experts": 4, "moe_token_dispatcher_type": "alltoall"}
    expected = run_ranks(1, run, model=moe)[0]
    for dispatcher in ("alltoall", "allgather"):
        told = run_ranks(2, run, ep=2, model=moe | {"moe_token_dispatcher_type": dispatcher})[0]
        assert_close(told, expected)
