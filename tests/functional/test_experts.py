"""Blocks of experts train alike however their experts are split, and their losses are recorded."""

from __future__ import annotations

from pathlib import Path

import pytest
from program_runs import tiny_run, train

from umv2_megatron.training.metrics import read_metrics

pytestmark = pytest.mark.thorough

STEPS = 3
EXPERTS = {
    "ffn_variant": "moe",
    "num_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 48,
    "moe_aux_loss_coeff": 0.01,
    "moe_z_loss_coeff": 0.001,
    "moe_shared_expert_intermediate_size": 32,
    "train_iters": STEPS,
    "min_lr": 1e-3,
    "make_vocab_size_divisible_by": 1024,
}
TENSOR = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "make_vocab_size_divisible_by": 512}


def records(ranks: int, save: Path, **changes) -> list[dict]:
    """The recorded numbers of every step of a run."""
    train(ranks, tiny_run(**{**EXPERTS, "save": save, **changes}), save.parent / f"o_{save.name}")
    found = [line for line in read_metrics(save) if "lm loss" in line]
    assert len(found) == STEPS
    return found


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A saved model from which every layout continues; experts of other layouts are drawn from other generators."""
    save = tmp_path_factory.mktemp("start") / "run"
    train(1, tiny_run(**{**EXPERTS, "save": save, "train_iters": 1}), save.parent)
    return save


@pytest.fixture(scope="module")
def alone(start) -> list[dict]:
    return records(1, start.parent / "one", load=start, finetune=True)


LAYOUTS = {
    "data": (2, {}),
    "split": (2, {"expert_model_parallel_size": 2}),
    "split-data-allgather": (
        4,
        {"expert_model_parallel_size": 2, "moe_token_dispatcher_type": "allgather", "use_distributed_optimizer": True},
    ),
    "one-each": (4, {"expert_model_parallel_size": 4}),
    "tensor": (2, TENSOR),
    "split-tensor-data": (4, {**TENSOR, "expert_model_parallel_size": 2}),
    "split-pipeline": (4, {"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "split-context-recompute": (
        2,
        {
            "expert_model_parallel_size": 2,
            "context_parallel_size": 2,
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    ),
}


SLOW = ("data", "split", "one-each", "tensor", "split-pipeline")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in LAYOUTS]
)
def test_layouts_continue_alike(name, start, alone, tmp_path):
    ranks, changes = LAYOUTS[name]
    for ours, theirs in zip(records(ranks, tmp_path / "run", load=start, finetune=True, **changes), alone):
        assert ours["lm loss"] == pytest.approx(theirs["lm loss"], rel=1e-6)
        assert ours["grad-norm"] == pytest.approx(theirs["grad-norm"], rel=1e-5)
        recorded = [key for key in theirs if key.startswith("moe/")]
        assert recorded == [f"moe/{loss}/layer_00{block}" for loss in ("load_balancing_loss", "z_loss")
                            for block in range(2)]  # fmt: skip
        for key in recorded:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4)


MUON = {
    "optimizer": "muon", "muon_tp_mode": "duplicated", "muon_fp32_matmul_prec": "highest",
    "muon_extra_scale_factor": 0.2,
}  # fmt: skip


@pytest.mark.slow
def test_muon_updates_experts_alike_in_every_layout(start, tmp_path):
    alone = records(1, tmp_path / "one", load=start, finetune=True, **MUON)
    split = {"expert_model_parallel_size": 2}
    layouts = {
        "split": (2, split),
        "split-tensor-data": (4, {**TENSOR, **split}),
        "split-dealt": (4, {**split, "optimizer": "dist_muon"}),
        "split-pipeline-bf16": (4, {**split, "pipeline_model_parallel_size": 2, "bf16": True}),
    }
    for name, (ranks, changes) in layouts.items():
        found = records(ranks, tmp_path / name, load=start, finetune=True, **{**MUON, **changes})
        near = 2e-2 if "bf16" in changes else 1e-5
        for ours, theirs in zip(found, alone, strict=True):
            assert ours["lm loss"] == pytest.approx(theirs["lm loss"], rel=near), name
            assert ours["grad-norm"] == pytest.approx(theirs["grad-norm"], rel=10 * near), name


def test_recorded_losses_are_means(start, alone):
    """1 for experts that are used evenly, and not a sum that grows from step to step or with the micro-batches."""
    values = [line["moe/load_balancing_loss/layer_000"] for line in alone]
    assert all(0.9 < value < 2 for value in values)
    settings = {"load": start, "finetune": True, "log_interval": STEPS}
    save = start.parent / "interval"
    train(1, tiny_run(**{**EXPERTS, "save": save, **settings}), start.parent / "o")
    found = [line for line in read_metrics(save) if "moe/load_balancing_loss/layer_000" in line]
    assert len(found) == 1
    assert found[0]["moe/load_balancing_loss/layer_000"] == pytest.approx(sum(values) / STEPS, rel=1e-5)


def test_a_step_left_out_by_number_is_not_in_the_mean(start, tmp_path):
    """Iteration 2 is left out: the mean over three iterations is that of two."""
    found = []
    for interval in (1, 3):
        save = tmp_path / str(interval)
        settings = {"load": start, "finetune": True, "save": save, "iterations_to_skip": "2", "log_interval": interval}
        train(1, tiny_run(**{**EXPERTS, **settings}), tmp_path / "o")
        found.append({line["iteration"]: line for line in read_metrics(save) if "moe/z_loss/layer_000" in line})
    each, together = found
    assert sorted(each) == [1, 3] and sorted(together) == [3]
    for name in ("moe/load_balancing_loss/layer_000", "moe/z_loss/layer_000"):
        assert together[3][name] == pytest.approx((each[1][name] + each[3][name]) / 2, rel=1e-5)


@pytest.mark.parametrize(
    "ranks, changes",
    [
        pytest.param(
            4, {**TENSOR, "expert_model_parallel_size": 2, "use_distributed_optimizer": True}, marks=pytest.mark.slow
        ),
        pytest.param(4, {"expert_model_parallel_size": 4, "use_distributed_optimizer": True}, marks=pytest.mark.slow),
        pytest.param(1, {}, marks=pytest.mark.slow),
    ],
    ids=["split-tensor-data", "one-each", "alone"],
)
def test_a_checkpoint_continues_in_other_layouts(ranks, changes, start, alone, tmp_path):
    """Weights and moments of experts that two ranks hold, in the first step, are split otherwise for the other two."""
    save = tmp_path / "run"
    shared = {**EXPERTS, "save": save, "load": start, "finetune": True}
    two = {"expert_model_parallel_size": 2, "use_distributed_optimizer": True, "exit_interval": 1}
    train(2, tiny_run(**shared, **two), tmp_path / "o")
    train(ranks, tiny_run(**{**shared, **changes}), tmp_path / "o")
    found = [line for line in read_metrics(save) if "lm loss" in line]
    for ours, theirs in zip(found, alone, strict=True):
        assert ours["lm loss"] == pytest.approx(theirs["lm loss"], rel=1e-6)
        assert ours["grad-norm"] == pytest.approx(theirs["grad-norm"], rel=1e-5)
