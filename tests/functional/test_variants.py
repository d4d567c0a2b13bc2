"""Every switch of the model trains: two steps with finite losses, tables stored once, numbers under their names."""

from __future__ import annotations

import math
import os

import pytest
from program_runs import losses, tiny_run, train

from umv2_megatron.training.metrics import read_metrics

pytestmark = pytest.mark.thorough

VARIANTS = {
    "dense": {"ffn_variant": "dense"},
    "experts-bf16": {
        "ffn_variant": "moe",
        "num_experts": 4,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_dtype": "fp32",
        "bf16": True,
        "log_params_norm": True,
    },
    "bf16": {"bf16": True},
    "bf16-distributed": {"bf16": True, "use_distributed_optimizer": True},
    "block": {"memory_sharing": "block", "memory_sharing_size": 2},
    "ring": {"memory_sharing": "ring", "memory_sharing_size": 2},
    "noring": {"memory_sharing": "noring", "memory_sharing_size": 2},
    "ultramem-v1": {
        "memory_num_heads": 2,
        "memory_value_expansion": "per-block",
        "memory_key_expansion": 2,
        "memory_pre_value_dim": 0,
        "memory_init": "fixed",
    },
    "engram": {"ffn_variant": "engram", "memory_num_heads": 4, "memory_num_keys": 24, "memory_log_interval": 1},
    "gelu-and-losses": {
        "memory_pre_value_activation": "gelu",
        "memory_balance_loss_coeff": 0.01,
        "memory_tucker_penalty_coeff": 0.01,
        "memory_layer_freq": 2,
    },
}

STATISTICS = (
    "value_coverage",
    "value_kl_uniform",
    "dead_rows",
    "output_std",
    "score_top1_mean",
    "score_topk_mean",
    "tucker_sigma1",
    "tucker_sigma2",
)


QUICK = ("experts-bf16", "bf16-distributed", "ultramem-v1", "engram", "gelu-and-losses")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
)
def test_two_steps(name, tmp_path):
    # the last evaluation refreshes u and t, as the load of the finished run does, so that the hashes compare
    argv = tiny_run(train_iters=2, save=tmp_path / "run", eval_iters=1, **VARIANTS[name])
    finished = train(1, argv, tmp_path / "o")
    found = losses(tmp_path / "run")
    assert len(found) == 2 and all(math.isfinite(loss) and 4 < loss < 8 for _, loss in found)
    resumed = train(1, argv, tmp_path / "o")
    assert resumed.weights == finished.weights
    if "memory_sharing" in VARIANTS[name]:
        # two layers, one table: 2 x 16 x 16 rows of 24 + 8 numbers
        from umv2_megatron.checkpoint.torch_dist_io import read_metadata_safely

        keys = read_metadata_safely(tmp_path / "run" / "iter_0000002").state_dict_metadata
        tables = [key for key in keys if key.endswith("table.values") and not key.startswith("optimizer")]
        assert len(tables) == 1 and tuple(keys[tables[0]].size) == (512, 24)


def test_memory_statistics_and_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"memory_log_interval": 2, "eval_iters": 1, "eval_interval": 2, "log_params_norm": True}
    argv = tiny_run(train_iters=2, save=tmp_path / "run", tensorboard_dir=tmp_path / "tb", **settings)
    train(1, argv, tmp_path / "o")
    wanted = {f"memory/{name}/layer_{layer:03d}" for name in STATISTICS for layer in (0, 1)}
    wanted |= {"lm loss", "lm loss validation", "lm loss validation ppl", "learning-rate", "value-learning-rate"}
    wanted |= {"batch-size", "grad-norm", "params-norm", "throughput", "iteration-time"}
    recorded = {name: value for line in read_metrics(tmp_path / "run") for name, value in line.items()}
    assert wanted <= recorded.keys()
    assert all(math.isfinite(recorded[name]) for name in wanted)
    assert 0 < recorded["memory/value_coverage/layer_000"] <= 1
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert wanted <= set(events.Tags()["scalars"])


def test_losses_of_the_layers_are_recorded(tmp_path):
    """Beside the statistics, where their coefficients are set; recording leaves the weights as they are."""
    losses = {"memory_balance_loss_coeff": 0.01, "memory_tucker_penalty_coeff": 0.01}
    argv = {"train_iters": 3, **losses}
    plain = train(1, tiny_run(**argv), tmp_path / "o")
    told = train(
        1, tiny_run(**argv, save=tmp_path / "run", memory_log_interval=1, log_params_norm=True), tmp_path / "o"
    )
    assert plain.weights == told.weights
    recorded = [line for line in read_metrics(tmp_path / "run") if "memory/balance_loss/layer_000" in line]
    assert len(recorded) == 3
    assert all(line["memory/balance_loss/layer_000"] > 0 for line in recorded)
    assert all(line["memory/tucker_penalty/layer_001"] >= 0 for line in recorded)


def fail_on_rank_1() -> None:
    """Let a bug befall the second rank, in its second step."""
    if os.environ["RANK"] == "1":
        from umv2_megatron.training.step_policies import StepPolicies

        def broken(*_):
            raise KeyError("a bug")

        assert StepPolicies.settle, "what every step calls"
        StepPolicies.settle = broken


@pytest.mark.timeout(100)
def test_a_bug_on_one_rank_ends_it_at_once(tmp_path):
    ended = train(2, tiny_run(train_iters=3), tmp_path / "o", fail_on_rank_1, codes=None)
    assert ended.codes[1] == 1 and "KeyError: 'a bug'" in ended.outputs[1] and "Traceback" in ended.outputs[1]
