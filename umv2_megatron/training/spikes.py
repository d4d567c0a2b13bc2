"""What is a spike: a loss or gradient norm far above those of the last updates.

The comparison is with the median of the last --spike-window updates, which a few spikes do not move:

    loss > median + threshold * max(1.4826 * MAD, 0.01 * |median|)      MAD: median of |loss - median|
    gradient norm > factor * median

1.4826 MAD is the standard deviation of normally distributed losses; the floor of 1 % keeps a window of nearly equal
losses from making a spike of every difference. Only additions, products and orders of float64 numbers are used, so
that all machines come to the same decision. The window is part of every checkpoint (``Progress``).
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from umv2_megatron.config.training_config import TrainingConfig
from umv2_megatron.training.initialize import Progress

_TO_SIGMA = 1.4826
_FLOOR = 0.01
"""Smallest standard deviation that is assumed, as a share of the median loss."""


@dataclass(frozen=True)
class Limits:
    """Above which a step is a spike; infinite where nothing is judged."""

    loss: float = float("inf")
    grad_norm: float = float("inf")
    told_loss: str = ""
    told_grad_norm: str = ""

    def exceeded(self, loss: float, grad_norm: float) -> str | None:
        """What is too large and why, as a clause; None where nothing is."""
        found = []
        if loss > self.loss:
            found.append(f"loss {loss:.6g} is above {self.told_loss}")
        if grad_norm > self.grad_norm:
            found.append(f"gradient norm {grad_norm:.6g} is above {self.told_grad_norm}")
        return " and ".join(found) or None


def limits(training: TrainingConfig, progress: Progress) -> Limits:
    """The limits of the next step; none with --spike-policy off and before the window is full."""
    window = training.spike_window
    losses, norms = progress.window_losses[-window:], progress.window_grad_norms[-window:]
    if training.spike_policy == "off" or len(losses) < window:
        return Limits()
    loss_limit, told_loss = float("inf"), ""
    if training.spike_loss_threshold:
        median = statistics.median(losses)
        spread = statistics.median(abs(loss - median) for loss in losses)
        sigma = max(_TO_SIGMA * spread, _FLOOR * abs(median))
        loss_limit = median + training.spike_loss_threshold * sigma
        told_loss = f"{loss_limit:.6g} (median {median:.6g}, standard deviation {sigma:.3g})"
    norm_limit, told_norm = float("inf"), ""
    if training.spike_grad_norm_factor:
        median = statistics.median(norms)
        norm_limit = training.spike_grad_norm_factor * median
        told_norm = f"{norm_limit:.6g} (median {median:.6g})"
    return Limits(loss_limit, norm_limit, told_loss, told_norm)


def remember(training: TrainingConfig, progress: Progress, loss: float, grad_norm: float) -> None:
    """Take an update that was made into the window."""
    if training.spike_policy == "off":
        return
    keep = training.spike_window
    progress.window_losses = [*progress.window_losses, loss][-keep:]
    progress.window_grad_norms = [*progress.window_grad_norms, grad_norm][-keep:]
