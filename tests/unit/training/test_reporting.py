"""The console line that people grep, and metrics.jsonl across restarts."""

from __future__ import annotations

import datetime
import json
import re

import pytest

from umv2_megatron.observation.run_files import read_run
from umv2_megatron.training.metrics import METRICS_FILE, MetricsFile, read_metrics
from umv2_megatron.training.reporting import format_duration, iteration_line, perplexity, validation_line

VALUES = {
    "iteration": 12, "train_iters": 100, "consumed_samples": 96, "elapsed_ms": 12.34, "tflops": 1.26,
    "learning_rate": 1e-3, "batch_size": 8, "loss": 5.5, "loss_scale": 1.0, "grad_norm": 1.2345, "num_zeros": 7,
    "params_norm": 58.4, "skipped": 1, "nan": 2, "tokens_per_second_per_rank": 1000.0, "value_learning_rate": 4e-3,
    "eta_seconds": 90061,
}  # fmt: skip


def test_the_line_field_by_field():
    line = iteration_line(VALUES, datetime.datetime(2026, 1, 2, 3, 4, 5, 678))
    assert line == (
        " [2026-01-02 03:04:05.000678] iteration       12/     100 | consumed samples:           96 | "
        "elapsed time per iteration (ms): 12.3 | throughput per GPU (TFLOP/s/GPU): 1.3 | "
        "learning rate: 1.000000E-03 | global batch size:     8 | lm loss: 5.500000E+00 | loss scale: 1.0 | "
        "grad norm: 1.234 | num zeros: 7 | params norm: 58.400 | number of skipped iterations:   1 | "
        "number of nan iterations:   2 | tokens/s/rank: 1000.0 | value learning rate: 4.000000E-03 | "
        "ETA: 1-01:01:01 |"
    )


def test_fields_without_a_value_are_left_out():
    left_out = ("tflops", "loss", "grad_norm", "num_zeros", "params_norm", "value_learning_rate")
    line = iteration_line({**VALUES, **dict.fromkeys(left_out)})
    assert re.match(r" \[[-\d]+ [:.\d]+\] iteration +12/ +100 \| consumed samples: +96 \| ", line)
    assert "lm loss" not in line and "None" not in line


def test_validation_line_and_durations():
    assert validation_line(6, 2.0).startswith(
        " validation loss at iteration 6 | lm loss value: 2.000000E+00 | lm loss PPL"
    )
    assert perplexity(1000.0) == perplexity(20.0)
    assert [format_duration(seconds) for seconds in (-1, 59.9, 3600)] == ["00:00:00", "00:00:59", "01:00:00"]


def test_a_restart_cuts_what_the_checkpoint_does_not_know(tmp_path):
    file = MetricsFile(tmp_path, 0)
    for iteration in range(1, 7):
        file.write(iteration, {"lm loss": 1.0 / iteration, "grad-norm": float("nan")})
    file.write(4, {"lm loss test": 1.0})
    file.close()
    with open(tmp_path / METRICS_FILE, "a") as half:
        half.write('{"iteration": 3, "lm lo')  # a kill in the middle of a line
    assert len(read_metrics(tmp_path)) == 7
    again = MetricsFile(tmp_path, 4)
    again.write(5, {"lm loss": 0.2})
    again.close()
    records = read_metrics(tmp_path)
    assert [record["iteration"] for record in records] == [1, 2, 3, 4, 5]
    assert records[2]["lm loss"] == 1.0 / 3 and records[0]["grad-norm"] is None
    assert "NaN" not in (tmp_path / METRICS_FILE).read_text() and not list(tmp_path.glob("*.tmp"))
    assert all(json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines())


def test_lines_that_are_no_records_are_left_out_and_the_others_stay(tmp_path):
    """As the page of a run does: a line that a full disk has cut does not hide what follows it."""
    path = tmp_path / METRICS_FILE
    odd = ['{"iteration": 2, "lm lo', "[1]", '{"lm loss": 1.0}', '{"iteration": "3"}', '{"iteration": true}', ""]
    odd += ['{"iteration": -1}', f'{{"iteration": {10**400}}}']
    path.write_text("\n".join(['{"iteration": 1, "lm loss": 3.0}', *odd, '{"iteration": 4, "lm loss": 2.0}', ""]))
    kept = [{"iteration": 1, "lm loss": 3.0}, {"iteration": 4, "lm loss": 2.0}]
    assert read_metrics(tmp_path) == kept
    run = read_run(tmp_path)
    assert run.series["lm loss"].iterations == [1, 4] and run.unreadable == 7
    again = MetricsFile(tmp_path, 9)
    again.close()
    assert list(again.records()) == kept and len(path.read_text().splitlines()) == 2
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path / "none")
