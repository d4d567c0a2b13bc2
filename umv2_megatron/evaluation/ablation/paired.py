"""Paired differences of two runs over the seeds that both have, with confidence intervals.

What a seed decides (data order, initial weights) moves both runs of a pair, so the differences of pairs spread less
than the runs. The interval of their mean is Student's: mean +- t sd / sqrt(n) with n - 1 degrees of freedom. Two seeds
give a wide one (t = 12.7), and rightly.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# 97.5% points of Student's t for 1, 2, ... degrees of freedom
_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)


def t_point(degrees: int) -> float:
    """The 97.5% point of Student's t. Beyond the table it is Cornish and Fisher's expansion, within 0.001."""
    assert degrees >= 1
    if degrees <= len(_T):
        return _T[degrees - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    return z + (z**3 + z) / (4 * degrees) + second + third


def half_width(differences: Sequence[float]) -> float | None:
    """Half of the 95% confidence interval of the mean of ``differences``, one of each seed; None for fewer than two."""
    count = len(differences)
    if count < 2:
        return None
    return t_point(count - 1) * statistics.stdev(differences) / math.sqrt(count)


def shown(differences: Sequence[float], digits: int) -> str:
    """ "+mean ± half width" of the interval, or the one difference. Where a run diverged the mean alone, and "-" where
    that is not a number (both diverged), or no seed is shared."""
    mean = sum(differences) / len(differences) if differences else math.nan
    if math.isnan(mean):
        return "-"
    half = half_width(differences) if math.isfinite(mean) else None
    return f"{mean:+,.{digits}f}" + ("" if half is None else f" ± {half:,.{digits}f}")
