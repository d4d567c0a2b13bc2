"""Outputs of memory layers on their way to a later block (--memory-read-delay, UltraMem, arXiv 2411.12364 section 3.1).

With a delay of k the memory layer of block i reads that block's normalised FFN input, and its output joins the residual
stream together with the FFN's output of block i + k. The blocks of a pipeline stage run in order, one micro-batch at a
time, so between two of them the output waits here. ``config/checks.py`` sees to it that both blocks lie on one stage
and within one stretch of activation recompute: otherwise the output would arrive without its gradient, or not at all.
"""

from __future__ import annotations

from torch import Tensor


class DelayedOutputs:
    """What the blocks of one pipeline stage hand to later ones; travels in the layer spec's params."""

    def __init__(self) -> None:
        self._waiting: dict[int, Tensor] = {}

    def put(self, block: int, output: Tensor) -> None:
        """Keep ``output`` [s, b, H] for ``block``; one that a forward that failed left behind is replaced."""
        self._waiting[block] = output

    def take(self, block: int) -> Tensor:
        """What waits for ``block``, which is forgotten here."""
        assert block in self._waiting, f"no output of a memory layer waits for block {block}"
        return self._waiting.pop(block)
