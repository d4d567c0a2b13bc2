"""A run watched from outside: figures over HTTP, MFU, garbage collections, and flags that are refused in time."""

from __future__ import annotations

import gc
import re
import socket
import sys
import urllib.request
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from program_runs import Job, _free_port, tiny_run, train
from prometheus_client.parser import text_string_to_metric_families

from umv2_megatron.training.metrics import read_metrics


def scrape(port: int) -> dict[str, float]:
    """Sample, with its layer if it has one -> value."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        text = answer.read().decode()
    return {
        f"{sample.name} {sample.labels['layer']}" if "layer" in sample.labels else sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_figures_of_a_run_that_goes_on(tmp_path: Path) -> None:
    """Rank 0 serves what the last rank writes into metrics.jsonl, also with two pipeline stages."""
    port, save = _free_port(), tmp_path / "run"
    argv = tiny_run(metrics_port=port, save=save, train_iters=5000, save_interval=4, memory_log_interval=2,
                    eval_interval=3, eval_iters=1, peak_tflops=0.25, pipeline_model_parallel_size=2)  # fmt: skip
    job = Job(2, argv, tmp_path / "o")
    try:
        job.wait_for(r"iteration +10/")
        first = scrape(port)
        job.wait_for(rf"iteration +{int(first['umv2_iteration']) + 3}/")
        second = scrape(port)
        job.send(15)
        assert job.wait().codes == [0, 0]
    finally:
        job.kill()
    assert 9 <= first["umv2_iteration"] < second["umv2_iteration"]
    step = int(second["umv2_iteration"])
    record = next(each for each in read_metrics(save) if each["iteration"] == step and "lm loss" in each)
    assert second["umv2_loss"] == pytest.approx(record["lm loss"])
    assert second["umv2_gradient_norm"] == pytest.approx(record["grad-norm"])
    rate = second["umv2_model_flops_per_second"]  # by the clock of rank 0; the record is by that of the last rank
    assert second["umv2_mfu_ratio"] == pytest.approx(rate / 0.25e12) and rate > 0
    assert record["mfu"] == pytest.approx(record["throughput"] / 0.25)
    assert second["umv2_consumed_samples_total"] == 8 * step and second["umv2_consumed_tokens_total"] == 256 * step
    assert second["umv2_tokens_per_second"] == pytest.approx(256 / second["umv2_iteration_seconds"])
    assert second["umv2_checkpoint_iteration"] % 4 == 0 and second["umv2_checkpoint_iteration"] >= 8
    assert second["umv2_last_iteration"] == 5000 and second["umv2_validation_loss"] > 0
    for layer in (0, 1):
        assert 0 < second[f"umv2_memory_value_coverage {layer}"] <= 1
    line = next(line for line in job.output().splitlines() if re.search(rf"iteration +{step}/", line))
    assert f"MFU: {100 * record['mfu']:.1f}% |" in line


def test_no_peak_no_mfu(tmp_path: Path) -> None:
    save = tmp_path / "run"
    finished = train(1, tiny_run(save=save, train_iters=1), tmp_path / "o")
    assert "MFU" not in finished.text and not any("mfu" in record for record in read_metrics(save))


def test_a_taken_port_is_told_before_training(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        save = tmp_path / "run"
        refused = train(2, tiny_run(metrics_port=port, save=save, train_iters=1), tmp_path / "o", codes=2)
    told = (
        f"pretrain_umv2.py: error: --metrics-port is {port}; expected a free port on 127.0.0.1 (--metrics-host): "
        "Address already in use; choose another"
    )
    assert refused.text.count(told) == 1 and "Traceback" not in refused.text
    assert not save.exists(), "nothing is written"


def test_memory_history_needs_cuda(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("it is recorded here")
    refused = train(1, tiny_run(record_memory_history=True, train_iters=1), tmp_path / "o", codes=2)
    assert "--record-memory-history is on; expected it left out on a machine without CUDA" in refused.text
    assert "configuration:" not in refused.text


# -- garbage -----------------------------------------------------------------------------------------------------------


def tell_collections() -> None:
    """Print every collection of this rank while it trains: the steps that the loop has finished, the generation, and
    whether Python may collect by itself."""

    def told(phase: str, info: dict[str, Any]) -> None:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and not (
            frame.f_code.co_name == "train" and frame.f_code.co_filename.endswith("training/loop.py")
        ):
            frame = frame.f_back
        if phase == "start" and frame is not None:
            iteration = frame.f_locals["self"].state.progress.iteration
            print(f"collected {gc.isenabled()} {info['generation']} {iteration}", flush=True)

    gc.callbacks.append(told)


def collections(output: str, by_itself: bool = False) -> list[tuple[int, int]]:
    """(generation, finished iterations) of every collection, of those by Python itself or of the others."""
    found = re.findall(rf"^collected {by_itself} (\d) (\d+)$", output, re.M)
    return [(int(generation), int(step)) for generation, step in found]


@pytest.mark.slow
def test_garbage_is_collected_on_all_ranks_after_the_same_steps(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"train_iters": 10, "manual_gc": True, "manual_gc_interval": 3, "eval_interval": 5,
                                "eval_iters": 1}  # fmt: skip
    finished = train(2, tiny_run(**settings), tmp_path / "o", tell_collections)
    expected = [(2, 0), (2, 3), (2, 5), (0, 5), (2, 6), (2, 9), (2, 10), (0, 10)]
    assert [collections(output) for output in finished.outputs] == [expected, expected]
    assert {step for output in finished.outputs for _, step in collections(output, by_itself=True)} <= {10}

    settings |= {"no_manual_gc_eval": True, "manual_gc_interval": None}
    finished = train(2, tiny_run(**settings), tmp_path / "o", tell_collections)
    assert [collections(output) for output in finished.outputs] == [[(2, 0)], [(2, 0)]]


def test_without_the_flag_python_collects_as_it_likes(tmp_path: Path) -> None:
    finished = train(1, tiny_run(train_iters=40), tmp_path / "o", tell_collections)
    assert len({step for _, step in collections(finished.outputs[0], by_itself=True)}) > 1


def test_an_interval_needs_the_switch(tmp_path: Path) -> None:
    refused = train(1, tiny_run(manual_gc_interval=3, train_iters=1), tmp_path / "o", codes=2)
    assert "--manual-gc-interval is 3; expected no value without --manual-gc" in refused.text
