"""Steps that are left out: a loss or gradient that is not finite, a spike, an iteration that the user names.

A step that is left out counts as an iteration and uses up its samples, but makes no update, and the learning-rate
schedule stays where it is. Going back to a checkpoint leaves out all steps since it: weights, optimizer, schedule,
random states and the window of spikes.py are the checkpoint's, and training goes on with the next samples, under the
next iteration number. So no number is used twice, the order of the samples stays, and a run that is killed and started
again comes to the same decisions.
"""

from __future__ import annotations

from typing import Any

import torch

from umv2_megatron.checkpoint.save_load import Candidate
from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.config.usage import TrainingStopped
from umv2_megatron.data.batches import next_batch
from umv2_megatron.observation.events import EventLog
from umv2_megatron.training import spikes
from umv2_megatron.training.initialize import Progress, TrainingState
from umv2_megatron.training.load_state import checkpoint_before, load_state
from umv2_megatron.training.optimizer import StepResult
from umv2_megatron.training.reporting import Reporter
from umv2_megatron.training.saving import Saver
from umv2_megatron.training.step import non_finite_parameters


class StepPolicies:
    """Decides whether a step updates the weights, and what follows where it does not.

    Args:
        run: the resolved configuration.
        state: model, optimizer, schedule, progress.
        reporter: where it is told.
        saver: saves the checkpoints of this run, None without --save.
        events: the history, which it becomes part of.
    """

    def __init__(
        self,
        run: RunConfig,
        state: TrainingState,
        reporter: Reporter,
        saver: Saver | None,
        events: EventLog,
    ):
        self.run = run
        self.state = state
        self.reporter = reporter
        self.saver = saver
        self.events = events
        self._to_skip = set(run.training.iterations_to_skip or [])
        self._seen = (0.0, 0.0)
        self._spike: str | None = None

    @property
    def _batch(self) -> int:
        """Samples of the present step."""
        return self.run.rampup.size(self.state.progress.consumed_samples)

    # -- before the update -----------------------------------------------------------------------------------------

    def accepts(self, loss: float, grad_norm: float) -> bool:
        """Whether a step with this loss and gradient norm, finite and the same on all ranks, may update the weights."""
        self._seen = (loss, grad_norm)
        self._spike = spikes.limits(self.run.training, self.state.progress).exceeded(loss, grad_norm)
        return self._spike is None or self.run.training.spike_policy == "warn"

    def skips_next(self) -> bool:
        """Whether --iterations-to-skip names the next iteration."""
        return self.state.progress.iteration + 1 in self._to_skip

    def skip_next(self, iterator: Any) -> None:
        """Read the samples of the next iteration and leave them out."""
        for each in iterator if isinstance(iterator, list) else [iterator]:
            for _ in range(self.run.microbatches_of(self._batch) if each is not None else 0):
                next_batch(each)
        progress = self.state.progress
        progress.skipped_iterations += 1
        self._leave_out(progress.consumed_samples)
        told = f"iteration {progress.iteration + 1} is left out by --iterations-to-skip{self._told_samples()}"
        self._tell("skipped", told, "")

    # -- after it --------------------------------------------------------------------------------------------------

    def settle(self, step: StepResult) -> None:
        """Take the result of a step into the progress, before iteration and samples are advanced.

        Raises ``TrainingStopped`` where the policies say so.
        """
        progress, training = self.state.progress, self.run.training
        if step.updated:
            progress.skipped_in_a_row = 0
            progress.interval_loss_sum += step.loss
            progress.interval_steps += 1
            if self._spike is not None:
                progress.spikes += 1
                self._tell("spike", f"{self._told_spike()}; the update was made (--spike-policy warn)")
            spikes.remember(training, progress, *self._seen)
        elif step.finite:
            self._handle_spike()
        else:
            self._handle_non_finite(step)

    def _handle_spike(self) -> None:
        progress, training = self.state.progress, self.run.training
        progress.spikes += 1
        target = None
        if training.spike_policy == "rewind":
            assert self.saver is not None and training.save_interval
            self.saver.finish()  # the decision must not depend on how far a save in the background is
            others = self.saver.non_persistent.place if self.saver.non_persistent is not None else None
            intervals = [training.save_interval]
            if training.non_persistent_save_interval:
                intervals.append(training.non_persistent_save_interval)
            target = checkpoint_before(self.saver.store, progress.iteration, intervals, others)
        if target is not None:
            self._go_back(target)
            return
        why = "--spike-policy skip" if training.spike_policy == "skip" else "there is no checkpoint yet to go back to"
        self._count_skipped(self._told_spike())
        self._tell("skipped", f"{self._told_spike()}; the update is left out ({why}){self._told_samples()}")

    def _go_back(self, candidate: Candidate) -> None:
        """Restore the checkpoint ``candidate`` and leave out the steps since, this one among them."""
        progress, training, target = self.state.progress, self.run.training, candidate.iteration
        assert self.saver is not None
        again = progress.rewinds_to_same + 1 if progress.rewound_to == target else 1
        if again > training.max_rewinds:
            raise TrainingStopped(
                f"{self._told_spike()}; the run has gone back to the checkpoint of iteration {target} "
                f"{again - 1} times, as often as --max-rewinds {training.max_rewinds} allows; go back to an older "
                "checkpoint with --ckpt-step, lower --lr, or give --spike-policy skip"
            )
        spike = self._told_spike()
        saved = load_state(self.run, self.state, [candidate], only=True).extra_state
        progress.rewound_to, progress.rewinds_to_same = target, again
        progress.rewinds += 1
        progress.skipped_in_a_row = 0
        progress.skipped_iterations += 1
        progress.undone_iterations += progress.iteration - target
        progress.window_losses = list(saved.get("window_losses", []))
        progress.window_grad_norms = list(saved.get("window_grad_norms", []))
        self._leave_out(saved["consumed_samples"])
        self._tell(
            "rewind",
            f"{spike}; went back to the checkpoint of iteration {target}: iterations {target + 1} to "
            f"{progress.iteration + 1} are left out{self._told_samples(saved['consumed_samples'])}; training "
            f"goes on with iteration {progress.iteration + 2}",
        )

    def _handle_non_finite(self, step: StepResult) -> None:
        progress, training = self.state.progress, self.run.training
        found = non_finite_parameters(self.state.chunks)
        rank = torch.distributed.get_rank()
        where = f"; rank {rank}: {', '.join(found[:4])}" + (f" and {len(found) - 4} more" if len(found) > 4 else "")
        message = (
            f"iteration {progress.iteration + 1}: loss {step.loss}, gradient norm {step.grad_norm} is not "
            f"finite{where if found else ''}"
        )
        if found:
            print(f"WARNING: {message}", flush=True)
        progress.nan_iterations += 1
        if training.nan_policy == "stop":
            raise TrainingStopped(
                f"{message}; stopped before the update by --nan-policy stop (the checkpoints are "
                "from before this step); --nan-policy skip leaves such steps out"
            )
        self._count_skipped(message)
        self.events.tell("skipped", text=message)

    # -- counts ----------------------------------------------------------------------------------------------------

    def _count_skipped(self, message: str) -> None:
        progress, training = self.state.progress, self.run.training
        progress.skipped_iterations += 1
        progress.skipped_in_a_row += 1
        self._leave_out(progress.consumed_samples)
        if progress.skipped_in_a_row > training.max_skipped_iterations:
            raise TrainingStopped(
                f"{message}; more than --max-skipped-iterations {training.max_skipped_iterations} "
                "steps in a row were skipped"
            )

    def _leave_out(self, first_sample: int) -> None:
        """Record that the samples from ``first_sample`` to the end of this step are in no update."""
        end = self.state.progress.consumed_samples + self._batch
        self.state.progress.left_out = joined([*self.state.progress.left_out, [first_sample, end]])

    def _told_spike(self) -> str:
        return f"spike at iteration {self.state.progress.iteration + 1}: {self._spike}"

    def _told_samples(self, first: int | None = None) -> str:
        progress = self.state.progress
        start = progress.consumed_samples if first is None else first
        end = progress.consumed_samples + self._batch
        so_far = left_out_samples(progress)
        return f"; samples {start} to {end - 1} of the training order are left out ({so_far} so far)"

    def _tell(self, event: str, text: str, prefix: str = "WARNING:") -> None:
        progress = self.state.progress
        self.events.tell(event, text=text)
        self.reporter.line(f"{prefix} {text}")
        self.reporter.numbers(
            progress.iteration + 1,
            {"spikes": progress.spikes, "rewinds": progress.rewinds, "left-out-samples": left_out_samples(progress)},
        )


def joined(ranges: list[list[int]]) -> list[list[int]]:
    """Ranges [first, end) of samples in rising order, those that touch or overlap as one."""
    found: list[list[int]] = []
    for first, end in sorted(ranges):
        if found and first <= found[-1][1]:
            found[-1][1] = max(found[-1][1], end)
        else:
            found.append([first, end])
    return found


def left_out_samples(progress: Progress) -> int:
    """How many samples the run has used up without an update that is in its weights."""
    return sum(end - first for first, end in progress.left_out)
