"""How healthy a memory layer is: how much of its table it uses, how evenly, and how strongly.

Counting happens on the layer's device during the training forwards of an interval, only while it is switched on
(``MemoryLayer.collect_statistics``). The caller sums ``tensors()`` over the data-parallel ranks, then reads
``summary()``.
Letters: V rows of the layer's window, T tokens, h heads, K values kept per head, C cores.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Places in UsageStatistics.sums.
OUTPUT_SUM, OUTPUT_SQUARES, TOP1_SUM, TOPK_SUM, OUTPUT_ELEMENTS, TOP1_ELEMENTS, TOPK_ELEMENTS = range(7)


class UsageStatistics:
    """Row usage and score sums of one layer since its creation."""

    def __init__(self, window: int, num_heads: int, device: torch.device) -> None:
        self.num_heads = num_heads
        self.counts = torch.zeros(window, dtype=torch.int64, device=device)
        """[V]: how often each row of the window was picked."""
        self.sums = torch.zeros(7, dtype=torch.float64, device=device)
        """Sums and element counts, see the names above; those of the last forwards come with ``tensors``."""
        self._sizes = [0, 0, 0]
        self.served_picks = 0
        """Picks of any rank that fell on this rank's rows, where a table is sharded by row."""

    @torch.no_grad()
    def record(self, window_rows: Tensor, scores: Tensor, output: Tensor) -> None:
        """Add one forward: ``window_rows`` [T, h*K] in [0, V), ``scores`` [T, h*K, C], ``output`` [T, H]."""
        flat = window_rows.flatten()
        self.counts.index_add_(0, flat, torch.ones_like(flat))
        summed = scores.sum(-1).view(scores.shape[0], self.num_heads, -1)
        exact, best = output.float(), summed[:, :, 0]
        self.sums[:4] += torch.stack([exact.sum(), exact.square().sum(), best.sum(), summed.sum()])
        # The host knows sizes: a copy of them to the device would make it wait in every forward.
        self._sizes = [known + new.numel() for known, new in zip(self._sizes, (output, best, summed))]

    def tensors(self) -> list[Tensor]:
        """The tensors to be summed, in place, over data-parallel ranks before ``summary``."""
        self.sums[4:] += torch.tensor(self._sizes, device=self.sums.device)
        self._sizes = [0, 0, 0]
        return [self.counts, self.sums]

    def summary(self, singular_values: Tensor) -> dict[str, float]:
        """The layer's numbers under the names of the log (``memory/<name>/layer_000``).

        ``singular_values`` is what ``Retrieval.singular_values`` returned, [h, R]; its mean over heads is reported.
        Without cores it is [h, 0], and the sigmas are left out.
        ``value_coverage`` is the share of rows picked at least once, ``value_kl_uniform`` the Kullback-Leibler
        divergence of row usage from even usage, in nats. Without a recorded forward all but sigmas are nan.
        """
        numbers: dict[str, float] = {}
        if singular_values.shape[-1]:
            sigma = singular_values.mean(0).tolist() + [0.0]
            numbers = {"tucker_sigma1": sigma[0], "tucker_sigma2": sigma[1]}
        picked = int((self.counts > 0).sum())
        total = int(self.counts.sum())
        sums = self.tensors()[1].tolist()
        if total == 0:
            names = ("value_coverage", "value_kl_uniform", "dead_rows", "output_std", "score_top1_mean",
                     "score_topk_mean")
            return {**dict.fromkeys(names, math.nan), **numbers}
        share = self.counts[self.counts > 0].double() / total
        mean = sums[OUTPUT_SUM] / sums[OUTPUT_ELEMENTS]
        return {
            "value_coverage": picked / self.counts.numel(),
            "value_kl_uniform": float((share * (share * self.counts.numel()).log()).sum()),
            "dead_rows": float(self.counts.numel() - picked),
            "output_std": math.sqrt(max(sums[OUTPUT_SQUARES] / sums[OUTPUT_ELEMENTS] - mean**2, 0.0)),
            "score_top1_mean": sums[TOP1_SUM] / sums[TOP1_ELEMENTS],
            "score_topk_mean": sums[TOPK_SUM] / sums[TOPK_ELEMENTS],
            **numbers,
        }
