"""--rampup-batch-size: the batch of each step while it grows, from the samples that the run has used.

As megatron-core counts (``num_microbatches_calculator.py``): from ``start`` samples a step to ``full``, ``increment``
more after every ``samples`` / ((full - start) / increment) samples. Here the same is known before megatron-core is
loaded, and summed up over steps; 0.19 no longer has it. tests/unit/config/test_batch_rampup.py compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchRampup:
    """``start``, ``increment``, ``samples``: the three numbers of the flag, all above 0; ``full``: the batch in the
    end, ``start`` and a multiple of ``increment``. Without a ramp-up ``start`` is ``full``."""

    full: int
    start: int
    increment: int = 1
    samples: int = 1

    def size(self, consumed: int) -> int:
        """Samples of the next step after ``consumed`` samples."""
        increments = (self.full - self.start) // self.increment
        if increments == 0 or consumed >= self.samples:
            return self.full
        return min(self.full, self.start + int(consumed / (self.samples / increments)) * self.increment)

    def samples_after(self, steps: int, consumed: int) -> int:
        """Samples used after ``steps`` more steps than ``consumed`` stand for."""
        while steps > 0 and (size := self.size(consumed)) < self.full:
            consumed, steps = consumed + size, steps - 1
        return consumed + max(0, steps) * self.full

    def steps_to(self, total: int, consumed: int) -> int:
        """Whole steps from ``consumed`` samples to at most ``total``."""
        steps = 0
        while (size := self.size(consumed)) < self.full and consumed + size <= total:
            consumed, steps = consumed + size, steps + 1
        if size < self.full:
            return steps
        return steps + max(0, total - consumed) // self.full

    def sizes(self) -> list[int]:
        """All sizes that occur, in rising order."""
        return [*range(self.start, self.full, self.increment), self.full]
