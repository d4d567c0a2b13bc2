"""The training loop: step, look, report, evaluate, save, stop.

Everything that decides what the next step will be is in ``TrainingState`` and goes into every checkpoint; the loop
itself keeps only clocks. So a run that was killed and started again does the same steps.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from umv2_megatron.checkpoint.save_load import gathered_parameters
from umv2_megatron.config.engram_config import NgramLayers
from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.config.usage import TrainingStopped
from umv2_megatron.durable_files import CheckpointError
from umv2_megatron.observation.device import peak_tflops
from umv2_megatron.observation.events import EventLog
from umv2_megatron.parallel import cpu_platform
from umv2_megatron.planning.flops import flops_per_token
from umv2_megatron.training import health
from umv2_megatron.training.evaluation_sets import EvaluationSet
from umv2_megatron.training.initialize import TrainingState, device_memory_gib, tell_batch
from umv2_megatron.training.manual_gc import ManualCollection
from umv2_megatron.training.optimizer import StepResult
from umv2_megatron.training.profiling import StepProfiler
from umv2_megatron.training.replicas import check_replicas
from umv2_megatron.training.reporting import Reporter, iteration_line, perplexity, task_lines, validation_line
from umv2_megatron.training.saving import Saver
from umv2_megatron.training.signals import StopRequests
from umv2_megatron.training.step import evaluate, refresh_singular_vectors, train_step
from umv2_megatron.training.step_policies import StepPolicies
from umv2_megatron.training.stragglers import StragglerReport
from umv2_megatron.training.task_evaluation import TaskEvaluation, TaskScores


class Trainer:
    """Runs a ``TrainingState`` from where it stands to the last iteration.

    Args:
        run: the resolved configuration.
        state: model, optimizer, schedule, progress.
        train_iterator: this rank's micro-batches from ``progress.consumed_samples`` on.
        validation_sets: what the loss is evaluated on.
        reporter: where numbers go.
        events: where the history goes.
        saver: publishes checkpoints of the present state, None without --save.
        vocab_size: entries of the tokenizer, for the throughput.
        started_at: ``time.monotonic()`` in seconds when the program started, for --exit-duration-in-mins.
        tasks: of --eval-tasks, None without it; ``tokenizer``: the run's, for them.
    """

    def __init__(
        self,
        run: RunConfig,
        state: TrainingState,
        train_iterator: Any,
        validation_sets: list[EvaluationSet],
        reporter: Reporter,
        events: EventLog,
        saver: Saver | None,
        vocab_size: int,
        started_at: float,
        tasks: TaskEvaluation | None = None,
        tokenizer: Any = None,
    ):
        self.run = run
        self.state = state
        self.train_iterator = train_iterator
        self.validation_sets = validation_sets
        self.reporter = reporter
        self.events = events
        self.saver = saver
        self.tasks, self.tokenizer = tasks, tokenizer
        self.stragglers = StragglerReport(run, state.chunks, reporter)
        self.policies = StepPolicies(run, state, reporter, saver, events)
        self.last_iteration = run.last_iteration(state.progress.iteration, state.progress.consumed_samples)
        self.stop_requests = StopRequests(
            run.training.exit_signal_handler, run.training.exit_duration_in_mins, started_at
        )
        flops = flops_per_token({**run.values, "vocab_size": vocab_size}, run.memory)
        self.flops_per_token = flops.training_of(run.training.trainable)
        self.peak_tflops = peak_tflops(run.observation.peak_tflops, run.bf16)
        training = run.training
        self.collection = ManualCollection(training.manual_gc, training.manual_gc_interval, training.manual_gc_eval)
        self._micro_batches = 0  # since the last report that --iterations-to-skip has not left out
        self._batch = run.rampup.size(state.progress.consumed_samples)  # of the last step
        self._told_skipped, self._told_nan = state.progress.skipped_iterations, state.progress.nan_iterations

    def train(self) -> bool:
        """Train to the end or to a request to stop. Returns whether to go on to the test set: all iterations are done,
        and nobody has asked to stop.

        SIGTERM and SIGUSR1 are requests while this runs; before and after, when nothing is to save, they end the rank.
        Raises ``TrainingStopped`` where --nan-policy or --spike-policy end it; the step is neither applied nor saved.
        """
        run, progress = self.run, self.state.progress
        interval_start, interval_first, used = time.perf_counter(), progress.iteration, progress.consumed_samples
        if run.training.memory_log_interval and run.has_memory:
            health.start_counting(self.state.chunks)
        stragglers = contextlib.closing(self.stragglers)
        profiling = StepProfiler(run, progress.iteration, self.state.chunks)
        with stragglers, self.stop_requests, self.collection, profiling as profiler, self._save_before_stopping():
            if progress.iteration >= self.last_iteration:
                self.save_now()  # the last one may be non-persistent
            while progress.iteration < self.last_iteration:
                step = self._step(profiler)
                profiler.step(progress.iteration)
                if progress.iteration % run.training.log_interval == 0 or progress.iteration == self.last_iteration:
                    cpu_platform.synchronize()
                    steps = progress.iteration - interval_first
                    samples = progress.consumed_samples - used
                    self._report(step, samples, steps, (time.perf_counter() - interval_start) / steps)
                    self.stragglers.report(progress.iteration)
                    interval_start, interval_first = time.perf_counter(), progress.iteration
                    used = progress.consumed_samples
                self._report_memory_health()
                self.collection.step(progress.iteration)
                pause = time.perf_counter()
                with profiler.ranges("evaluation and checkpoint"):
                    leaving = self._between_steps()
                if leaving:
                    break
                interval_start += time.perf_counter() - pause
            stopping = self.stop_requests.agreed()  # maybe since the last step, during an evaluation or a save
        done = progress.iteration >= self.last_iteration
        if stopping and done:
            self._tell_stop()
        return done and not stopping

    # -- one step --------------------------------------------------------------------------------------------------

    def _step(self, profiler: StepProfiler) -> StepResult | None:
        """The next step, or None where it is left out by its number; the progress is advanced."""
        progress = self.state.progress
        step = None
        batch = self.run.rampup.size(progress.consumed_samples)
        tell_batch(self.run, batch)
        if self.policies.skips_next():
            self.policies.skip_next(self.train_iterator)
            self.stop_requests.agreed()
        else:
            with self.stragglers.step():
                step = train_step(
                    self.run,
                    self.state.chunks,
                    self.state.optimizer,
                    self.state.scheduler,
                    self.train_iterator,
                    profiler.ranges,
                    wants_to_stop=lambda: self.stop_requests.wanted,
                    accepts=self.policies.accepts,
                    batch=batch,
                )
            self._micro_batches += self.run.microbatches_of(batch)
            self.stop_requests.settle(step.stopping)
            self.policies.settle(step)
        progress.iteration += 1
        progress.consumed_samples += batch
        self._batch = batch
        return step

    def _report(self, step: StepResult | None, samples: int, steps: int, seconds: float) -> None:
        """The console line and the numbers of an interval of ``steps`` steps, ``seconds`` each and ``samples`` in all;
        its losses are averaged."""
        run, progress, scheduler = self.run, self.state.progress, self.state.scheduler
        loss = progress.interval_loss_sum / progress.interval_steps if progress.interval_steps else None
        progress.interval_loss_sum, progress.interval_steps = 0.0, 0
        tokens_per_second = samples / steps * run.model.seq_length / seconds / run.world_size
        tflops = tokens_per_second * self.flops_per_token / 1e12
        mfu = tflops / self.peak_tflops if self.peak_tflops else None
        seconds_left = (self.last_iteration - progress.iteration) * seconds
        norm = None
        if run.training.log_params_norm:
            with gathered_parameters(self.state.chunks):
                norm = health.params_norm(self.state.chunks)
        loss_scale = float(self.state.optimizer.get_loss_scale().item())
        self.reporter.line(
            iteration_line(
                {
                    "iteration": progress.iteration,
                    "train_iters": self.last_iteration,
                    "consumed_samples": progress.consumed_samples,
                    "elapsed_ms": seconds * 1000,
                    "tflops": tflops if run.training.log_throughput else None,
                    "learning_rate": scheduler.dense_lr,
                    "batch_size": self._batch,
                    "loss": loss,
                    "loss_scale": loss_scale,
                    "grad_norm": step.grad_norm if step else None,
                    "num_zeros": step.num_zeros if step else None,
                    "params_norm": norm,
                    "skipped": progress.skipped_iterations - self._told_skipped,
                    "nan": progress.nan_iterations - self._told_nan,
                    "tokens_per_second_per_rank": tokens_per_second,
                    "mfu": mfu,
                    "value_learning_rate": scheduler.value_lr,
                    "eta_seconds": seconds_left,
                }
            )
        )
        self._told_skipped, self._told_nan = progress.skipped_iterations, progress.nan_iterations
        counted = run.has_experts and self._micro_batches
        experts = health.expert_losses(self._micro_batches) if counted else {}
        self._micro_batches = 0
        self.reporter.numbers(
            progress.iteration,
            {
                **experts,
                "lm loss": loss,
                "learning-rate": scheduler.dense_lr,
                "value-learning-rate": scheduler.value_lr,
                "engram-value-learning-rate": scheduler.value_lr_of(NgramLayers.family),
                "batch-size": self._batch,
                "grad-norm": step.grad_norm if step else None,
                "params-norm": norm,
                "throughput": tflops,
                "mfu": mfu,
                "iteration-time": seconds,
                "consumed-samples": progress.consumed_samples,
                "num-zeros": step.num_zeros if step else None,
                "memory-gib": device_memory_gib() if run.training.log_memory_to_tensorboard else None,
            },
            served={
                "tokens-per-second": tokens_per_second * run.world_size,
                "eta": seconds_left,
                "last-iteration": self.last_iteration,
                "consumed-tokens": progress.consumed_samples * run.model.seq_length,
                "skipped-iterations": progress.skipped_iterations,
                "nan-iterations": progress.nan_iterations,
                "memory-gib": device_memory_gib(),
            },
        )

    def _report_memory_health(self) -> None:
        run, iteration = self.run, self.state.progress.iteration
        if run.has_memory and run.training.memory_log_interval and iteration % run.training.memory_log_interval == 0:
            with gathered_parameters(self.state.chunks):
                numbers = health.memory_statistics(self.state.chunks)
            self.reporter.numbers(iteration, {**numbers})
            health.start_counting(self.state.chunks)

    # -- between steps ---------------------------------------------------------------------------------------------

    def _between_steps(self) -> bool:
        """Compare replicas, evaluate, save, and say whether to leave the loop."""
        training, iteration = self.run.training, self.state.progress.iteration
        if self.saver is not None:
            self.saver.look()
        if training.check_replicas_interval and iteration % training.check_replicas_interval == 0:
            check_replicas(self.state.chunks, iteration)
        last = iteration >= self.last_iteration
        stopping = self.stop_requests.stopping
        leaving = last or stopping or bool(training.exit_interval and iteration % training.exit_interval == 0)
        due = bool(training.eval_interval and iteration % training.eval_interval == 0)
        tasks_interval = training.eval_tasks_interval or training.eval_interval
        tasks_due = bool(tasks_interval and iteration % tasks_interval == 0)
        # a stop that was asked for leaves little time: the checkpoint matters, the evaluation can be made from it
        if last and stopping:
            self.save_now()
        if last or (due and not stopping):
            self.evaluate("validation", self.validation_sets)
        if self.tasks is not None and (last or (tasks_due and not stopping)):
            if last:
                self.save_now()  # it may take long; until then nothing would be left of a run that is killed
            self.evaluate_tasks(leave=lambda: self.stop_requests.wanted and not last)
        if leaving or (training.save_interval and iteration % training.save_interval == 0):
            self.save_now(wait=leaving)
        elif training.non_persistent_save_interval and iteration % training.non_persistent_save_interval == 0:
            self.refresh()
            if self.saver is not None:
                self.saver.save_non_persistent()
        if stopping and not last:
            self._tell_stop()
        return leaving

    def _tell_stop(self) -> None:
        iteration = self.state.progress.iteration
        self.events.tell("stop", reason=self.stop_requests.reason())
        self.reporter.line(f" stopping after iteration {iteration} as asked by a signal or --exit-duration-in-mins")

    def save_now(self, *, wait: bool = True) -> None:
        """A checkpoint, once per iteration. ``wait``: until it is published, --async-save or not."""
        self.refresh()
        if self.saver is not None:
            self.saver.save(wait=wait)

    @contextlib.contextmanager
    def _save_before_stopping(self) -> Iterator[None]:
        """What is being saved when a policy stops the run is from before the step at fault: publish it."""
        try:
            yield
        except TrainingStopped:
            try:
                if self.saver is not None:
                    self.saver.finish()
            except CheckpointError as error:
                self.reporter.line(f"WARNING: {error}")
            raise

    def refresh(self) -> None:
        """u, t of the present cores, so that what is saved or hashed does not depend on what else was run since."""
        with gathered_parameters(self.state.chunks):
            refresh_singular_vectors(self.state.chunks)

    def evaluate(self, what: str, sets: list[EvaluationSet]) -> None:
        """Report the loss on ``sets``, "validation" or "test": on each with a name, and on all tokens together."""
        if not sets:
            return
        losses: dict[str | None, tuple[float, float]] = {}
        with self.collection.evaluation(), gathered_parameters(self.state.chunks):
            for each in sets:
                losses[each.name] = evaluate(self.run, self.state.chunks, each.make_iterator(), each.batches)
        iteration = self.state.progress.iteration
        numbers: dict[str, float] = {}
        if None not in losses:
            losses[None] = (sum(loss for loss, _ in losses.values()), sum(tokens for _, tokens in losses.values()))
        for name, (total, tokens) in losses.items():
            loss = total / tokens if tokens else math.nan
            self.reporter.line(validation_line(iteration, loss, what, name))
            told = what if name is None else f"{what}/{name}"
            numbers |= {f"lm loss {told}": loss, f"lm loss {told} ppl": perplexity(loss)}
        self.reporter.numbers(iteration, numbers)

    def evaluate_tasks(self, leave: Callable[[], bool] = lambda: False) -> TaskScores | None:
        """Report the scores on the tasks of --eval-tasks. A task that fails is warned of: training goes on.

        Where ``leave`` becomes true, there are no scores.
        """
        if self.tasks is None:
            return None
        iteration = self.state.progress.iteration
        with self.collection.evaluation(), gathered_parameters(self.state.chunks):
            refresh_singular_vectors(self.state.chunks)
            found = self.tasks.evaluate(self.state.chunks, self.tokenizer, iteration, leave)
        if found.left:
            self.reporter.line(f" --eval-tasks at iteration {iteration} is left out: the run was asked to stop")
            return found
        if found.failure is not None:
            self.reporter.line(f" WARNING: --eval-tasks at iteration {iteration} failed: {found.failure}")
            self.events.tell("tasks-failed", text=found.failure)
            return found
        for line in task_lines(iteration, found.scores):
            self.reporter.line(line)
        self.reporter.numbers(iteration, found.scores)
        self.events.tell("tasks", seconds=round(found.seconds, 1), scores=found.scores)
        return found
