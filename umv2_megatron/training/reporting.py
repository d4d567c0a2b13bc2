"""What a run tells: the console lines people grep, TensorBoard, Weights & Biases, and ``metrics.jsonl``.

Only one rank reports, the last one: it sits on the last pipeline stage, where the loss is.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator, Mapping
from typing import Any

from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.observation.exporter import Exporter
from umv2_megatron.observation.task_names import error_of, is_error
from umv2_megatron.training.metrics import MetricsFile
from umv2_megatron.training.wandb_run import WandbRun
from umv2_megatron.user_paths import user_path


def iteration_line(values: dict[str, Any], now: datetime.datetime | None = None) -> str:
    """The console line of an iteration: Megatron-LM's fields in its order, then ours.

    ``values``: iteration, train_iters, consumed_samples, elapsed_ms, tflops (or None), learning_rate, batch_size,
    loss (None where every step of the interval was skipped), loss_scale, grad_norm, num_zeros, params_norm (the last
    two or None), skipped, nan, tokens_per_second_per_rank, mfu (0 to 1, or None), value_learning_rate (or None),
    eta_seconds.
    """
    now = now or datetime.datetime.now()
    parts = [
        f" [{now.strftime('%Y-%m-%d %H:%M:%S.%f')}] iteration {values['iteration']:8d}/{values['train_iters']:8d}",
        f"consumed samples: {values['consumed_samples']:12d}",
        f"elapsed time per iteration (ms): {values['elapsed_ms']:.1f}",
    ]
    if values.get("tflops") is not None:
        parts.append(f"throughput per GPU (TFLOP/s/GPU): {values['tflops']:.1f}")
    parts += [f"learning rate: {values['learning_rate']:.6E}", f"global batch size: {values['batch_size']:5d}"]
    if values.get("loss") is not None:
        parts.append(f"lm loss: {values['loss']:.6E}")
    parts.append(f"loss scale: {values['loss_scale']:.1f}")
    if values.get("grad_norm") is not None:
        parts.append(f"grad norm: {values['grad_norm']:.3f}")
    if values.get("num_zeros") is not None:
        parts.append(f"num zeros: {values['num_zeros']}")
    if values.get("params_norm") is not None:
        parts.append(f"params norm: {values['params_norm']:.3f}")
    parts += [
        f"number of skipped iterations: {values['skipped']:3d}",
        f"number of nan iterations: {values['nan']:3d}",
        f"tokens/s/rank: {values['tokens_per_second_per_rank']:.1f}",
    ]
    if values.get("mfu") is not None:
        parts.append(f"MFU: {100 * values['mfu']:.1f}%")
    if values.get("value_learning_rate") is not None:
        parts.append(f"value learning rate: {values['value_learning_rate']:.6E}")
    parts.append(f"ETA: {format_duration(values['eta_seconds'])}")
    return " | ".join(parts) + " |"


def validation_line(iteration: int, loss: float, what: str = "validation", name: str | None = None) -> str:
    """The console line of an evaluation, of the set ``name``; PPL is exp(loss), capped as Megatron-LM does."""
    place = f"iteration {iteration}" + ("" if name is None else f" on {name}")
    return f" {what} loss at {place} | lm loss value: {loss:.6E} | lm loss PPL: {perplexity(loss):.6E} | "


def task_lines(iteration: int, scores: Mapping[str, float]) -> Iterator[str]:
    """A console line for each task of ``scores`` (``lm-eval/<task>/<metric>``); "+-" is a metric's standard error."""
    for task in dict.fromkeys(name.rpartition("/")[0] for name in scores):
        found = {name.rpartition("/")[2]: value for name, value in scores.items() if name.rpartition("/")[0] == task}
        parts = []
        for metric, value in found.items():
            spread = found.get(error_of(metric))
            if not is_error(metric):
                parts.append(f"{metric}: {value:.6g}" + ("" if spread is None else f" +- {spread:.2g}"))
        yield f" {task.partition('/')[2]} at iteration {iteration} | {' | '.join(parts)} |"


def perplexity(loss: float) -> float:
    """exp(loss), with the loss capped at 20 nats per token."""
    return math.exp(min(20.0, loss))


def format_duration(seconds: float) -> str:
    """``seconds`` as [d-]hh:mm:ss."""
    total = int(max(0.0, seconds))
    days, rest = divmod(total, 86400)
    clock = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock


class Reporter:
    """Sends numbers to the console, TensorBoard, W&B and ``metrics.jsonl``; silent on every rank but the last. The rank
    that has an ``exporter`` serves them there.

    A run that resumes at ``resumed_at`` repeats the steps after its checkpoint; everywhere each step appears once.
    """

    def __init__(self, run: RunConfig, is_last_rank: bool, resumed_at: int, exporter: Exporter | None = None):
        self.active = is_last_rank
        self._exporter = exporter
        self._tensorboard: Any = None
        self._wandb: WandbRun | None = None
        self._metrics: MetricsFile | None = None
        if not self.active:
            return
        training = run.training
        save = None if training.save is None else user_path(training.save, "--save")
        if save is not None:
            save.mkdir(parents=True, exist_ok=True)
        if save is not None and not training.skip_train:
            self._metrics = MetricsFile(save, resumed_at)
        if training.tensorboard_dir:
            self._tensorboard = _start_tensorboard(run, resumed_at, self._metrics)
        if training.wandb_project:
            self._wandb = WandbRun(run, () if self._metrics is None else self._metrics.records())

    def line(self, text: str) -> None:
        """Print a line."""
        if self.active:
            print(text, flush=True)

    def numbers(
        self, iteration: int, numbers: Mapping[str, float | None], served: Mapping[str, float | None] | None = None
    ) -> None:
        """Record named numbers of ``iteration``; None is left out. ``served``: more, for --metrics-port only."""
        if self._exporter is not None:
            self._exporter.set(iteration, {**numbers, **(served or {})})
        given = {name: value for name, value in numbers.items() if value is not None}
        if not self.active or not given:
            return
        if self._metrics is not None:
            self._metrics.write(iteration, given)
        if self._tensorboard is not None:
            for name, value in given.items():
                self._tensorboard.add_scalar(name, value, iteration)
        if self._wandb is not None:
            self._wandb.log(iteration, given)

    def flush(self) -> None:
        """Write what is still in memory: before a checkpoint, whose steps will not be repeated."""
        if self._metrics is not None:
            self._metrics.flush()
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        """Flush everything."""
        if self._metrics is not None:
            self._metrics.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_tensorboard(run: RunConfig, resumed_at: int, metrics: MetricsFile | None) -> Any:
    """A writer that hides what an interrupted run has written past its checkpoint.

    The numbers of the checkpoint's own step are hidden, too, and written again: among them may be those of the test
    set, which is read after the last checkpoint and so once more.
    """
    from torch.utils.tensorboard import SummaryWriter

    training = run.training
    if training.skip_train:
        return SummaryWriter(training.tensorboard_dir, max_queue=5)
    kept = metrics.records() if metrics is not None else ()
    again = [record for record in kept if record["iteration"] == resumed_at]
    writer = SummaryWriter(training.tensorboard_dir, purge_step=resumed_at + (not again), max_queue=5)
    for record in again:
        for name, value in record.items():
            if name != "iteration":
                writer.add_scalar(name, math.nan if value is None else value, resumed_at)
    return writer
