"""The schedule against the released code's numbers, the parameter groups, and the step that looks before it leaps."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from umv2_megatron.config.resolve import resolve
from umv2_megatron.memory.value_table import TABLE_FAMILY, VALUE_GROUP
from umv2_megatron.training.optimizer import ParamScheduler, TableRates, ValueFactor, build_scheduler

ROWS = json.loads((Path(__file__).parents[2] / "golden" / "value_lr.json").read_text())["rows"]


def scheduler(row: dict, **changes) -> ParamScheduler:
    """The schedule of a golden row over one dense group and one group of tables."""
    groups = [
        {"params": [], "lr": 0.0, "weight_decay": 0.1},
        {"params": [], "lr": 0.0, "weight_decay": 0.1, VALUE_GROUP: row["times"]},
    ]
    settings = {
        "init_lr": row["warmup_min_lr"] or 0.0,
        "max_lr": row["peak_lr"],
        "min_lr": row["peak_lr"] * row["alpha_f"],
        "lr_warmup_steps": row["warmup"],
        "lr_decay_steps": row["t_max"] or row["max_steps"],
        "lr_decay_style": "cosine",
        "start_wd": 0.1,
        "end_wd": 0.1,
        "wd_incr_steps": 1,
        "wd_incr_style": "constant",
        "warmup_init_fraction": 0.1 if row["warmup_min_lr"] is None else None,
    }
    own = {key: changes.pop(key) for key in ("factor", "value_lr", "weight_decay") if key in changes}
    factor = ValueFactor(row["times"], int(row["rate"] * (row["t_max"] or row["max_steps"])))
    tables = {"memory": TableRates(**{"factor": factor, **own})}
    return ParamScheduler(SimpleNamespace(param_groups=groups), tables=tables, **{**settings, **changes})


@pytest.mark.parametrize("index", range(len(ROWS)))
def test_rates_of_the_released_code(index):
    row = ROWS[index]
    made = scheduler(row)
    made.step(row["step"])
    assert made.dense_lr == pytest.approx(row["lr"], rel=1e-12, abs=0)
    assert made.value_lr == pytest.approx(row["value_lr"], rel=1e-12, abs=0)


def test_the_horizon_is_part_of_the_state():
    first = scheduler(ROWS[0])
    first.step(300)
    second = scheduler(ROWS[0], factor=ValueFactor(9.0, 77), use_checkpoint_opt_param_scheduler=True)
    second.load_state_dict(first.state_dict())
    assert (second.tables["memory"].factor, second.num_steps) == (first.tables["memory"].factor, 300)
    assert (second.dense_lr, second.value_lr) == (first.dense_lr, first.value_lr)
    other = scheduler(
        ROWS[0],
        factor=ValueFactor(9.0, 77),
        override_opt_param_scheduler=True,
        use_checkpoint_opt_param_scheduler=False,
    )
    other.load_state_dict(first.state_dict())
    horizon = first.tables["memory"].factor.decay_steps
    assert other.tables["memory"].factor == ValueFactor(9.0, horizon) and other.num_steps == 300
    other.tables["memory"].keep_saved_horizon, other.tables["memory"].factor = False, ValueFactor(9.0, 77)
    other.load_state_dict(first.state_dict())
    assert other.tables["memory"].factor == ValueFactor(9.0, 77)


def test_a_rate_of_the_tables_own_has_no_schedule_and_is_part_of_the_state():
    first = scheduler(ROWS[0], value_lr=1e-3)
    rates = []
    for _ in range(3):
        first.step(100)
        rates.append((first.dense_lr, first.value_lr))
    assert {value for _, value in rates} == {1e-3} and len({dense for dense, _ in rates}) == 3
    second = scheduler(ROWS[0], use_checkpoint_opt_param_scheduler=True)
    second.load_state_dict(first.state_dict())
    assert (second.dense_lr, second.value_lr) == rates[-1]
    other = scheduler(ROWS[0], override_opt_param_scheduler=True, use_checkpoint_opt_param_scheduler=False)
    other.load_state_dict(first.state_dict())
    assert other.value_lr != 1e-3


def test_a_weight_decay_of_the_tables_own_is_theirs_alone_and_part_of_the_state():
    first = scheduler(ROWS[0], weight_decay=1.0)
    first.step(100)
    assert [group["weight_decay"] for group in first.optimizer.param_groups] == [0.1, 1.0]
    second = scheduler(ROWS[0], use_checkpoint_opt_param_scheduler=True)
    second.load_state_dict(first.state_dict())
    assert [group["weight_decay"] for group in second.optimizer.param_groups] == [0.1, 1.0]
    other = scheduler(ROWS[0], override_opt_param_scheduler=True, use_checkpoint_opt_param_scheduler=False)
    other.load_state_dict(first.state_dict())
    assert [group["weight_decay"] for group in other.optimizer.param_groups] == [0.1, 0.1]
    old = {key: value for key, value in first.state_dict().items() if key != "value_weight_decay"}
    second.load_state_dict(old)
    assert second.tables["memory"].weight_decay is None


def test_a_factor_without_decay_stays():
    assert ValueFactor(4.0, 0)(10**9) == 4.0
    assert [ValueFactor(4.0, 100)(step) for step in (0, 50, 100, 200)] == [4.0, 2.5, 1.0, 1.0]


def schedule_of(*flags: str) -> ParamScheduler:
    """The schedule of a run of 10 iterations of 8 samples."""
    fixed = ["--model-preset", "umv2-tiny", "--mock-data", "--train-iters", "10", "--lr", "1e-2"]
    fixed += ["--micro-batch-size", "1", "--global-batch-size", "8", "--memory-value-lr-mult", "3"]
    dense = {"params": [], "lr": 0.0, "weight_decay": 0.1}
    groups = SimpleNamespace(param_groups=[dense, {**dense, VALUE_GROUP: 3.0}])
    return build_scheduler(resolve([*fixed, *flags], 1), groups)


@pytest.mark.parametrize(
    ("flags", "value_steps", "decay_steps"),
    [
        ([], 80, 80),
        (["--lr-decay-iters", "20"], 160, 160),
        (["--memory-value-lr-decay-iters", "4"], 32, 80),
        (["--memory-value-lr-decay-iters", "0"], 0, 80),
        (["--memory-value-lr-decay-iters", "4", "--lr-decay-iters", "20"], 32, 160),
    ],
)
def test_the_horizon_of_the_multiple_follows_the_flags(flags, value_steps, decay_steps):
    made = schedule_of(*flags)
    assert made.tables["memory"].factor == ValueFactor(3.0, value_steps) and made.lr_decay_steps == decay_steps
    assert made.wd_incr_steps == decay_steps


@pytest.mark.parametrize(
    ("flags", "horizon"),
    [
        # the checkpoint's horizon is 10 iterations of 8 samples
        (["--train-iters", "20"], 80),
        (["--train-iters", "20", "--override-opt-param-scheduler"], 80),
        (["--memory-value-lr-decay-iters", "4"], 80),
        (["--memory-value-lr-decay-iters", "4", "--override-opt-param-scheduler"], 32),
        (["--memory-value-lr-decay-iters", "0", "--override-opt-param-scheduler"], 0),
    ],
)
def test_a_resumed_run_keeps_the_horizon_unless_told_otherwise(flags, horizon):
    saved = schedule_of()
    saved.step(40)
    assert saved.value_lr == pytest.approx(2 * saved.dense_lr)
    resumed = schedule_of(*flags)
    resumed.load_state_dict(saved.state_dict())
    assert resumed.tables["memory"].factor == ValueFactor(3.0, horizon) and resumed.num_steps == 40
    factor = {80: 2.0, 32: 1.0, 0: 3.0}[horizon]
    assert resumed.value_lr == pytest.approx(factor * resumed.dense_lr)


def test_tables_of_ngrams_beside_others_have_rates_of_their_own():
    dense = {"params": [], "lr": 0.0, "weight_decay": 0.1}
    tables = {**dense, VALUE_GROUP: 3.0}
    beside = {**dense, VALUE_GROUP: 7.0, TABLE_FAMILY: "engram"}
    fixed = ["--model-preset", "umv2-tiny", "--mock-data", "--train-iters", "10", "--lr", "1e-2"]
    fixed += ["--micro-batch-size", "1", "--global-batch-size", "8", "--memory-value-lr-mult", "3"]
    fixed += ["--engram-layer-freq", "2", "--memory-value-weight-decay", "1.0", "--weight-decay", "0.1"]

    def made(*flags: str) -> ParamScheduler:
        groups = SimpleNamespace(param_groups=[dict(dense), dict(beside), dict(tables)])
        return build_scheduler(resolve([*fixed, *flags], 1), groups)

    first = made()
    first.step(40)
    assert first.value_lr == pytest.approx(2 * first.dense_lr)
    assert first.value_lr_of("engram") == pytest.approx(5 * first.dense_lr)
    assert [group["weight_decay"] for group in first.optimizer.param_groups] == [0.1, 0.0, 1.0]
    other = made("--engram-value-lr-mult", "7", "--engram-value-lr-decay-iters", "10", "--memory-value-lr-mult", "3")
    other.step(40)
    assert other.value_lr_of("engram") == pytest.approx(4 * other.dense_lr)
    other.load_state_dict(first.state_dict())
    assert other.value_lr_of("engram") == pytest.approx(5 * other.dense_lr), "a resumed run keeps the saved one"


def in_samples(*flags: str) -> ParamScheduler:
    """The schedule of a run of 80 samples, 8 in a step."""
    dense = {"params": [], "lr": 0.0, "weight_decay": 0.1}
    groups = SimpleNamespace(param_groups=[dense, {**dense, VALUE_GROUP: 3.0}])
    fixed = ["--model-preset", "umv2-tiny", "--mock-data", "--lr", "1e-2", "--memory-value-lr-mult", "3"]
    fixed += ["--train-samples", "80", "--micro-batch-size", "1", "--global-batch-size", "8"]
    return build_scheduler(resolve([*fixed, *flags], 1), groups)


@pytest.mark.parametrize(
    ("samples", "iterations"),
    [
        ([], []),
        (["--lr-decay-samples", "64", "--lr-warmup-samples", "16"],
         ["--lr-decay-iters", "8", "--lr-warmup-iters", "2"]),
        (["--lr-decay-style", "WSD", "--lr-wsd-decay-samples", "24"],
         ["--lr-decay-style", "WSD", "--lr-wsd-decay-iters", "3"]),
    ],
)  # fmt: skip
def test_a_schedule_in_samples_is_the_same_in_iterations(samples, iterations):
    one, other = in_samples(*samples), schedule_of(*iterations)
    for _ in range(12):
        for each in (one, other):
            each.step(8)
        assert (one.dense_lr, one.value_lr) == (other.dense_lr, other.value_lr)


def test_a_warm_up_in_samples_need_not_be_whole_steps():
    made = in_samples("--lr-warmup-samples", "12")
    made.step(8)
    assert made.dense_lr == pytest.approx(1e-2 * 8 / 12)
    made.step(8)
    assert 9e-3 < made.dense_lr < 1e-2


@pytest.mark.parametrize(("style", "halfway"), [("linear", 0.15), ("cosine", 0.15)])
def test_weight_decay_grows_over_the_run(style, halfway):
    made = in_samples("--weight-decay-incr-style", style, "--start-weight-decay", "0.05", "--end-weight-decay", "0.25",
                      "--lr-decay-samples", "40")  # fmt: skip
    seen = []
    for _ in range(10):
        made.step(8)
        seen.append([group["weight_decay"] for group in made.optimizer.param_groups])
    assert all(dense == tables for dense, tables in seen)
    dense = [each[0] for each in seen]
    assert dense == sorted(dense) and dense[4] == pytest.approx(halfway) and dense[9] == pytest.approx(0.25)
    tables = in_samples("--weight-decay-incr-style", style, "--start-weight-decay", "0.05",
                        "--end-weight-decay", "0.25", "--memory-value-weight-decay", "0.7")  # fmt: skip
    tables.step(40)
    assert [group["weight_decay"] for group in tables.optimizer.param_groups] == [pytest.approx(halfway), 0.7]


def test_weight_decay_reaches_its_end_with_a_growing_batch():
    """The run has fewer samples than iterations x batch."""
    dense = {"params": [], "lr": 0.0, "weight_decay": 0.1}
    groups = SimpleNamespace(param_groups=[dense, {**dense, VALUE_GROUP: 3.0}])
    flags = ["--model-preset", "umv2-tiny", "--mock-data", "--train-iters", "6", "--global-batch-size", "8"]
    flags += ["--rampup-batch-size", "2", "2", "18", "--weight-decay-incr-style", "linear"]
    run = resolve([*flags, "--start-weight-decay", "0.05", "--end-weight-decay", "0.25"], 1)
    made = build_scheduler(run, groups)
    made.step(run.samples)
    assert run.samples == 20 and made.optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.25)
