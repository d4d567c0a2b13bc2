"""Figures for Prometheus: names, units, types, and the port."""

from __future__ import annotations

import os
import signal
import socket
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from umv2_megatron.observation.exporter import COUNTERS, GAUGES, Exporter


@pytest.fixture
def exporter() -> Iterator[tuple[Exporter, int]]:
    """One on a free port, and the port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    made = Exporter("127.0.0.1", port, "1.2", 4)
    yield made, port
    made.close()


def scrape(port: int) -> dict[str, tuple[str, dict[tuple, float]]]:
    """name -> (type, labels -> value)."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        families = text_string_to_metric_families(answer.read().decode())
    return {
        family.name: (family.type, {(sample.name, *sorted(sample.labels.items())): sample.value
                                    for sample in family.samples})
        for family in families
    }  # fmt: skip


def test_names_units_and_types(exporter: tuple[Exporter, int]) -> None:
    made, port = exporter
    assert list(scrape(port)) == ["umv2_run_info"], "before the first step nothing is known"
    made.set(7, {"lm loss": 2.5, "grad-norm": None, "throughput": 0.5, "memory-gib": 2.0, "consumed-samples": 56,
                 "memory/dead_rows/layer_003": 12.0, "memory/dead_rows/layer_010": 1.0, "unknown": 3.0})  # fmt: skip
    found = scrape(port)
    assert found["umv2_iteration"] == ("gauge", {("umv2_iteration",): 7})
    assert found["umv2_loss"] == ("gauge", {("umv2_loss",): 2.5})
    assert found["umv2_model_flops_per_second"][1] == {("umv2_model_flops_per_second",): 5e11}
    assert found["umv2_memory_peak_bytes"][1] == {("umv2_memory_peak_bytes",): 2 * 1024**3}
    assert found["umv2_consumed_samples"] == ("counter", {("umv2_consumed_samples_total",): 56})
    rows = found["umv2_memory_dead_rows"]
    assert rows == ("gauge", {("umv2_memory_dead_rows", ("layer", "3")): 12.0,
                              ("umv2_memory_dead_rows", ("layer", "10")): 1.0})  # fmt: skip
    info = {("umv2_run_info", ("ranks", "4"), ("version", "1.2")): 1.0}
    assert found["umv2_run_info"][1] == info
    assert len(found) == 7, "nothing that was not told, and nothing unknown"
    made.set(8, {"grad-norm": 1.0, "lm loss": None})
    found = scrape(port)
    assert found["umv2_loss"][1] == {("umv2_loss",): 2.5} and "umv2_gradient_norm" in found


def test_every_figure_by_its_name(exporter: tuple[Exporter, int]) -> None:
    made, port = exporter
    made.set(1, dict.fromkeys([*GAUGES, *COUNTERS], 1.0))
    found = scrape(port)
    names = [name for name, *_ in (*GAUGES.values(), *COUNTERS.values())]
    assert len(set(names)) == len(names) and set(names) <= found.keys()
    assert all(found[name][0] == "counter" for name, _ in COUNTERS.values())


def test_numbers_that_are_not_finite(exporter: tuple[Exporter, int]) -> None:
    made, port = exporter
    made.set(1, {"lm loss": float("nan"), "grad-norm": float("inf")})
    found = scrape(port)
    assert str(found["umv2_loss"][1][("umv2_loss",)]) == "nan"
    assert found["umv2_gradient_norm"][1][("umv2_gradient_norm",)] == float("inf")


def test_the_port_is_taken_and_given_back() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(OSError):
            Exporter("127.0.0.1", port, "1", 1)
    Exporter("127.0.0.1", port, "1", 1).close()
    Exporter("127.0.0.1", port, "1", 1).close()


def test_a_data_loaders_worker_does_not_keep_the_port(exporter: tuple[Exporter, int]) -> None:
    made, port = exporter
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(tell, b"x")  # the hooks of a fork have run
        signal.pause()
        os._exit(0)
    try:
        assert os.read(told, 1) == b"x"
        made.close()
        Exporter("127.0.0.1", port, "1", 1).close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(told), os.close(tell)


def test_scores_of_tasks_and_losses_of_sets(exporter: tuple[Exporter, int]) -> None:
    made, port = exporter
    made.set(3, {"lm-eval/a/b/acc": 0.5, "lm-eval/a/acc_stderr": 0.1, "lm loss validation": 2.0,
                 "lm loss validation/web": 2.5, "lm loss validation/web ppl": 12.2,
                 "lm loss test/code": 1.0})  # fmt: skip
    found = scrape(port)
    assert found["umv2_task_score"] == ("gauge", {
        ("umv2_task_score", ("metric", "acc"), ("task", "a/b")): 0.5,
        ("umv2_task_score", ("metric", "acc_stderr"), ("task", "a")): 0.1,
    })  # fmt: skip
    assert found["umv2_validation_set_loss"][1] == {("umv2_validation_set_loss", ("set", "web")): 2.5}
    assert found["umv2_test_set_loss"][1] == {("umv2_test_set_loss", ("set", "code")): 1.0}
    assert found["umv2_validation_loss"][1] == {("umv2_validation_loss",): 2.0}
