"""Figures of a run for Prometheus, on rank 0, over HTTP (--metrics-port).

They are the numbers of metrics.jsonl under Prometheus' names and units, and what the log line tells beside them. What
metrics.jsonl calls ``memory/dead_rows/layer_003`` is ``umv2_memory_dead_rows{layer="3"}``. The names are a contract
with dashboards and alerts: docs/observation.md lists them.
"""

from __future__ import annotations

import os
import re
import threading
import weakref
from collections.abc import Iterator, Mapping
from wsgiref.simple_server import WSGIServer

from prometheus_client import start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from umv2_megatron.observation import task_names

# Name in metrics.jsonl, or of what the trainer tells beside -> (name, factor, meaning).
GAUGES = {
    "lm loss": ("umv2_loss", 1, "training loss in nats per token, mean since the last log line"),
    "lm loss validation": ("umv2_validation_loss", 1, "validation loss in nats per token"),
    "lm loss test": ("umv2_test_loss", 1, "test loss in nats per token"),
    "learning-rate": ("umv2_learning_rate", 1, "learning rate of dense parameters"),
    "value-learning-rate": ("umv2_value_learning_rate", 1, "learning rate of value tables"),
    "engram-value-learning-rate": (
        "umv2_engram_value_learning_rate", 1, "learning rate of tables of n-gram layers beside other memory layers"),
    "grad-norm": ("umv2_gradient_norm", 1, "norm of the gradients before clipping"),
    "params-norm": ("umv2_parameter_norm", 1, "norm of the parameters"),
    "iteration-time": ("umv2_iteration_seconds", 1, "time of a step, mean since the last log line"),
    "tokens-per-second": ("umv2_tokens_per_second", 1, "tokens per second of all ranks together"),
    "throughput": ("umv2_model_flops_per_second", 1e12, "model FLOP/s of a rank"),
    "mfu": ("umv2_mfu_ratio", 1, "model FLOP/s over the device's peak, 0 to 1"),
    "batch-size": ("umv2_batch_size_samples", 1, "samples of a step"),
    "memory-gib": ("umv2_memory_peak_bytes", 2**30, "most memory in use so far on this rank"),
    "eta": ("umv2_remaining_seconds", 1, "time that the remaining steps take at the present rate"),
    "last-iteration": ("umv2_last_iteration", 1, "step with which the run ends"),
    "checkpoint-iteration": ("umv2_checkpoint_iteration", 1, "step of the newest checkpoint of this process"),
    "checkpoint-time": ("umv2_checkpoint_timestamp_seconds", 1, "when it was published, seconds since 1970"),
    "checkpoint-seconds": ("umv2_checkpoint_duration_seconds", 1, "time that it took"),
    "non-persistent-iteration": (
        "umv2_non_persistent_checkpoint_iteration", 1, "step of the newest non-persistent one of this process"),
    "non-persistent-seconds": ("umv2_non_persistent_checkpoint_duration_seconds", 1, "time that it took"),
}
COUNTERS = {
    "consumed-samples": ("umv2_consumed_samples", "samples since the run's first step"),
    "consumed-tokens": ("umv2_consumed_tokens", "tokens since the run's first step"),
    "skipped-iterations": ("umv2_skipped_iterations", "steps without an update since the run's first step"),
    "nan-iterations": ("umv2_nan_iterations", "steps with a NaN or Inf since the run's first step"),
}
_LAYERED = re.compile(r"(?P<name>.+)/layer_(?P<layer>\d+)")


class Exporter(Collector):
    """Serves the newest numbers at ``http://<host>:<port>/metrics`` from a thread of its own.

    Raises OSError where the port cannot be taken.
    """

    def __init__(self, host: str, port: int, version: str, ranks: int):
        self._info = {"version": version, "ranks": str(ranks)}
        self._lock = threading.Lock()
        self._numbers: dict[str, float] = {}
        self._iteration: int | None = None
        registry = CollectorRegistry()
        registry.register(self)
        self._server, self._thread = start_http_server(port, host, registry)
        # a forked child (data loader worker) shares the socket, and would keep the port after its parent's end
        server = weakref.ref(self._server)
        os.register_at_fork(after_in_child=lambda: _close_socket(server))

    def set(self, iteration: int, numbers: Mapping[str, float | None]) -> None:
        """Take new numbers over; those that are None, and those not named, keep their last values."""
        with self._lock:
            self._iteration = iteration
            self._numbers.update({name: float(value) for name, value in numbers.items() if value is not None})

    def collect(self) -> Iterator[Metric]:
        """Called by prometheus_client for every scrape."""
        with self._lock:
            numbers, iteration = dict(self._numbers), self._iteration
        yield InfoMetricFamily("umv2_run", "version and number of ranks", self._info)
        if iteration is not None:
            yield GaugeMetricFamily("umv2_iteration", "finished steps", iteration)
        for key, (name, factor, meaning) in GAUGES.items():
            if key in numbers:
                yield GaugeMetricFamily(name, meaning, numbers[key] * factor)
        for key, (name, meaning) in COUNTERS.items():
            if key in numbers:
                yield CounterMetricFamily(name, meaning, numbers[key])
        families: dict[str, GaugeMetricFamily] = {}
        for key, value in numbers.items():
            match = _LAYERED.fullmatch(key)
            if match:
                name = "umv2_" + re.sub(r"[^a-zA-Z0-9_]", "_", match["name"])
                made = GaugeMetricFamily(name, f"{match['name']} of a layer", labels=["layer"])
                family = families.setdefault(name, made)
                family.add_metric([str(int(match["layer"]))], value)
        yield from families.values()
        for what in ("validation", "test"):
            of_set = GaugeMetricFamily(
                f"umv2_{what}_set_loss", f"{what} loss of a set with a name in nats per token", labels=["set"]
            )
            for key, value in numbers.items():
                if key.startswith(f"lm loss {what}/") and not key.endswith(" ppl"):
                    of_set.add_metric([key.partition("/")[2]], value)
            if of_set.samples:
                yield of_set
        scores = GaugeMetricFamily("umv2_task_score", "score on a task of --eval-tasks", labels=["task", "metric"])
        for key, value in numbers.items():
            labels = task_names.parts(key)
            if labels is not None:
                scores.add_metric(list(labels), value)
        if scores.samples:
            yield scores

    def close(self) -> None:
        """Give the port back."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _close_socket(reference: weakref.ref[WSGIServer]) -> None:
    server = reference()
    if server is not None:
        server.socket.close()
