"""The picks of one model imposed on another, where the other's own scores say that it is a tie.

Memory layers pick rows and routers pick experts. Where two scores lie within rounding of each other, two right models
pick differently, and the logits of that token move by 0.1 and more. So two models are compared with the same picks:

    recorded_picks   (pick_recording.py) what the checkpoint's model picks: the keys of each side, then the cells of
                     their grid, or the groups and the experts
    followed_picks   during the export's forward each of its selections is compared with the recorded one. If they
                     differ in a tie, the recorded one takes its place; all that follows, weights included, is computed
                     by the export's own code from its own scores. If not, the export keeps its own, so that the logits
                     part as well, and the pick is wrong.

A tie. Let both models' scores of one token differ by at most d. Where one picks a set A and the other a set B, every
score of A not in B is at least every score of B not in A in one model, so it falls behind by at most 2 d in the other.
Hence the gap: the largest score of the own picks left out, less the smallest of those imposed. It is a tie where the
gap is at most ``TIE`` times the rounding unit of the dtype times the token's scale: the magnitude of its largest score,
or, for scores that are sums of other scores, what the largest magnitudes of the terms add up to, for terms may cancel.
Each selection is judged as a whole, both stages apart, so that the grid that is searched is the same in both models.

With additive scores the order of the kept keys is part of the choice, because it decides which sums are looked at
(``memory/product_keys.py``): keys are compared place by place, and 2 d bounds the distance of the scores in each place.

Selections are followed where they are made: the calls of ``topk`` in the export's own modules, seen by a
``TorchFunctionMode``. Its code is the one that runs outside, and nothing of this remains in it afterwards.

Letters: T tokens (windows one after the other), h heads, N keys per side, K' keys kept per side, K cells kept per head,
E experts, k of them for a token, g groups of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from umv2_megatron.conversion.pick_recording import TOPK, RecordedPicks, RetrievalPicks, RouterPicks, replaced
from umv2_megatron.conversion.safetensors_files import ConversionError
from umv2_megatron.hf.experts_umv2 import UMv2Router, UMv2SparseMLP
from umv2_megatron.hf.modeling_umv2 import UMv2ForCausalLM
from umv2_megatron.hf.retrieval_umv2 import UMv2ProductKeys, UMv2Retrieval

TIE = 512.0
"""Rounding units of a token's scale by which a pick may fall behind in a tie: 6.1e-05 in float32, 1.1e-13 in float64.
Scores of right models were seen to differ by up to 82 units, at the sizes of umv2-227m (20 blocks; in the first of them
by 9), so gaps of 164 are possible, and deeper models round more often."""
SAME_VECTOR = 1e-5
"""Singular vectors of two machines, float32 in any model, may differ by this; more is a fault."""


@dataclass
class PickReport:
    """How the picks of two models compare: ``compared`` in all, ``ties`` that differ within rounding and were followed,
    ``wrong`` that differ otherwise. ``first`` says where the first wrong one is, "" where there is none.

    ``widest`` is the largest gap of all ties, in rounding units of the token's scale.
    """

    compared: int = 0
    ties: int = 0
    wrong: int = 0
    first: str = ""
    widest: float = 0.0


@contextlib.contextmanager
def followed_picks(model: UMv2ForCausalLM, recorded: RecordedPicks) -> Iterator[PickReport]:
    """Let one forward of ``model`` follow ``recorded`` where they differ in a tie, and count.

    Picks of ``recorded`` that are compared with none count as wrong in the end.

    Raises ``ConversionError`` where they are of other blocks than those of ``model`` that pick.
    """
    report = PickReport()
    memory: dict[int, UMv2Retrieval | UMv2ProductKeys] = {}
    routers: dict[int, UMv2Router] = {}
    for block, layer in enumerate(model.model.layers):
        if getattr(layer.memory, "retrieval", None) is not None:  # n-grams are no choice: the same in both models
            memory[block] = layer.memory.retrieval
        if isinstance(layer.mlp, UMv2SparseMLP):
            routers[block] = layer.mlp.router
    for what, ours, theirs in (("memory layers", recorded.memory, memory), ("experts", recorded.routers, routers)):
        if set(ours) != set(theirs):
            raise ConversionError(
                f"the export has {what} in blocks {sorted(theirs)}, the checkpoint's model in {sorted(ours)}"
            )
    with contextlib.ExitStack() as undo:
        for block, retrieval in memory.items():
            kind = _FollowCells if isinstance(retrieval, UMv2Retrieval) else _FollowSums
            name = f"model.layers.{block}.memory.retrieval"
            undo.enter_context(_inside(retrieval, partial(kind, retrieval, name, recorded.memory[block], report)))
        for block, router in routers.items():
            name = f"model.layers.{block}.mlp.router"
            undo.enter_context(_inside(router, partial(_FollowExperts, router, name, recorded.routers[block], report)))
        yield report
    missing = recorded.count() - report.compared
    if missing and not report.wrong:
        report.wrong = abs(missing)
        report.first = f"{recorded.count():,} picks of the checkpoint's model, {report.compared:,} of the export's"


def _inside(module: torch.nn.Module, mode: Callable[[], _Follow]) -> contextlib.AbstractContextManager[None]:
    """Each forward of ``module`` in a ``mode`` of its own."""
    plain = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        current = mode()
        with current.beside(module), current:
            return plain(*args, **kwargs)

    return replaced(module, "forward", forward)


class _Follow(TorchFunctionMode):
    """Stands beside the calls of ``topk`` in one forward of the module called ``name``; subclasses say what the
    recorded picks are among the scores of the ``call``-th."""

    def __init__(self, name: str, report: PickReport) -> None:
        super().__init__()
        self.name, self.report, self.call = name, report, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in TOPK:
            return result
        scores = args[0] if args else (kwargs or {})["input"]
        chosen = self.choose(scores, result.indices)
        self.call += 1
        if chosen is result.indices:
            return result
        return torch.return_types.topk((scores.gather(-1, chosen), chosen))

    def beside(self, module: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
        """What else is changed in ``module`` meanwhile."""
        return contextlib.nullcontext()

    def choose(self, scores: Tensor, own: Tensor) -> Tensor:
        """What to pick from ``scores`` [..., N] instead of ``own`` [..., K]."""
        raise NotImplementedError

    def follow(
        self,
        scores: Tensor,
        own: Tensor,
        wanted: Tensor,
        what: str,
        unit: float,
        scale: Tensor | None = None,
        ordered: bool = False,
        at: int = 0,
    ) -> Tensor:
        """``own`` [..., K] with the selections replaced by ``wanted`` that differ in a tie.

        Args:
            scores: [..., N], of which both are indices; -1 in ``wanted`` is one that is not there.
            what: the kind of pick, for the report.
            unit: what the scores are rounded to, as a share of ``scale``.
            scale: [...], by default the magnitude of the largest score.
            ordered: whether places count, and not the sets alone.
            at: the number of the first token of this call.
        """
        self.report.compared += own.numel()
        if wanted.shape != own.shape:
            self._wrong(own.numel(), f"{own.shape[-1]} {what} a token instead of {wanted.shape[-1]}")
            return own
        wanted = wanted.masked_fill(wanted >= scores.shape[-1], -1)  # a model with fewer keys has them not
        if ordered:
            rows = (own != wanted).any(-1)
        else:
            rows = (own.sort(-1).values != wanted.sort(-1).values).any(-1)
        if not bool(rows.any()):
            return own
        ours, theirs, among = own[rows], wanted[rows], scores[rows]
        gap, differing = _gap(among, ours, theirs, ordered)
        if scale is None:
            largest = among.abs().masked_fill(~among.isfinite(), 0).amax(-1)
        else:
            largest = scale[rows]
        tie = gap <= TIE * unit * largest  # not a number is none
        self.report.ties += int(differing[tie].sum())
        behind = gap / largest.clamp(min=torch.finfo(scores.dtype).tiny)
        if bool(tie.any()):
            self.report.widest = max(self.report.widest, float(behind[tie].max()) / unit)
        if not bool(tie.all()):
            first = int((~tie).nonzero()[0, 0])
            token = at + rows.nonzero()[first].tolist()[1 if what == "keys" else 0]
            self._wrong(
                int(differing[~tie].sum()),
                f"{what} of token {token}: those of the checkpoint are behind by {float(behind[first]):.1e} of the "
                f"scores' scale, in a tie it is at most {TIE * unit:.1e}",
            )
        chosen = own.clone()
        chosen[rows] = torch.where(tie.unsqueeze(-1), theirs, ours)
        return chosen

    def _wrong(self, count: int, where: str) -> None:
        self.report.wrong += count
        self.report.first = self.report.first or f"{self.name}, {where}"


def _gap(scores: Tensor, own: Tensor, wanted: Tensor, ordered: bool) -> tuple[Tensor, Tensor]:
    """By how much ``wanted`` [n, K] falls behind ``own`` [n, K] among ``scores`` [n, N], and in how many picks it
    differs; [n] each. Infinite where a pick is not there, or twice."""
    foreign = ~(wanted.unsqueeze(-1) == own.unsqueeze(-2)).any(-1)
    left_out = ~(own.unsqueeze(-1) == wanted.unsqueeze(-2)).any(-1)
    theirs, ours = scores.gather(-1, wanted.clamp(min=0)), scores.gather(-1, own)
    infinity = float("inf")
    best, worst = ours.masked_fill(~left_out, -infinity).amax(-1), theirs.masked_fill(~foreign, infinity).amin(-1)
    same_set = ~(foreign.any(-1) | left_out.any(-1))
    gap = torch.where(same_set, 0.0, best - worst)
    differing = foreign.sum(-1)
    if ordered:
        gap = torch.maximum(gap, (ours - theirs).abs().amax(-1))
        differing = (own != wanted).sum(-1)
    impossible = (wanted < 0).any(-1) | (foreign.sum(-1) != left_out.sum(-1))
    return gap.masked_fill(impossible, infinity), differing.clamp(min=1)


def _unit(scores: Tensor) -> float:
    return torch.finfo(scores.dtype).eps


class _FollowCells(_Follow):
    """Tucker scores: the first call keeps keys, the others pick cells of their grids, some tokens each."""

    def __init__(self, module: UMv2Retrieval, name: str, picks: RetrievalPicks, report: PickReport) -> None:
        super().__init__(name, report)
        self.module, self.picks, self.at = module, picks, 0
        self.keys: Tensor
        self.largest: Tensor
        """[2, R, T, h]: magnitude of the largest score of all keys."""

    def beside(self, module: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
        """Look at the scores of all keys."""
        plain = self.module.key_scores

        def key_scores(x: Tensor) -> Tensor:
            scores = plain(x)
            self.largest = scores.abs().amax(-1)
            return scores

        return replaced(module, "key_scores", key_scores)

    def choose(self, scores: Tensor, own: Tensor) -> Tensor:
        """See ``_Follow``."""
        unit = _unit(scores)
        if self.call == 0:
            vectors = torch.stack([self.module.u, self.module.t]).to(scores.dtype)
            scale = torch.einsum("ahr,arth->ath", vectors.abs() + self._apart(vectors) / (TIE * unit), self.largest)
            self.keys = self.follow(scores, own, self.picks.keys, "keys", unit, scale)
            return self.keys
        start, self.at = self.at, self.at + len(own)
        kept = self.keys.shape[-1]
        places = torch.arange(kept * kept, device=own.device)
        wanted = _places(
            self.picks.cells[start : self.at],
            self.keys[:, start : self.at],
            self.module.num_keys,
            places // kept,
            places % kept,
        )
        row, column = self.largest[:, :, start : self.at]
        scale = torch.einsum("rth,hrs,sth->th", row, self.module.cores.abs().sum(0).to(row), column)
        return self.follow(scores, own, wanted, "cells", _unit(scores), scale, at=start)

    def _apart(self, vectors: Tensor) -> Tensor:
        """By what the scores of two keys may part beside rounding, for each number of ``vectors`` [2, h, R]: u and t
        are float32 in any model and may come from another machine, or from a step before."""
        theirs = self.picks.vectors
        if theirs is None or theirs.shape != vectors.shape:
            return torch.zeros_like(vectors)
        apart = (vectors - theirs.to(vectors)).abs()
        return 2 * apart.masked_fill(apart > SAME_VECTOR, 0)


class _FollowSums(_Follow):
    """Additive scores: the first call keeps keys in order, the second picks among their sums."""

    def __init__(self, module: UMv2ProductKeys, name: str, picks: RetrievalPicks, report: PickReport) -> None:
        super().__init__(name, report)
        self.module, self.picks = module, picks
        self.keys: Tensor
        self.largest: Tensor
        """[T, h]: the magnitudes of both sides' largest scores together."""

    def choose(self, scores: Tensor, own: Tensor) -> Tensor:
        """See ``_Follow``."""
        unit = _unit(scores)
        if self.call == 0:
            self.largest = scores.abs().amax(-1).sum(0)
            self.keys = self.follow(scores, own, self.picks.keys, "keys", unit, ordered=True)
            return self.keys
        rows, columns = self.module._places(own.device)
        wanted = _places(self.picks.cells, self.keys, self.module.num_keys, rows, columns)
        return self.follow(scores, own, wanted, "cells", unit, self.largest)


class _FollowExperts(_Follow):
    """A router: its only call picks experts; with groups there are three, as in mcore: the best experts of each group,
    of which the sum alone is used, the best groups, and the best experts in them."""

    def __init__(self, module: UMv2Router, name: str, picks: RouterPicks, report: PickReport) -> None:
        super().__init__(name, report)
        config = module.config
        self.picks, self.with_groups = picks, bool(config.moe_router_group_topk)
        # Sigmoid and the softmax before the choice are computed in float32, whatever the dtype of the logits.
        self.plain = config.moe_router_score_function == "softmax" and not config.moe_router_pre_softmax

    def choose(self, scores: Tensor, own: Tensor) -> Tensor:
        """See ``_Follow``."""
        unit = max(_unit(scores), 0.0 if self.plain else torch.finfo(torch.float32).eps)
        if self.with_groups and self.call == 0:
            return own
        if self.with_groups and self.call == 1:
            return own if self.picks.groups is None else self.follow(scores, own, self.picks.groups, "groups", unit)
        return self.follow(scores, own, self.picks.experts, "experts", unit)


def _places(cells: Tensor, keys: Tensor, num_keys: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Where ``cells`` [T, h, K] (i * N + j) are among the candidates, of which the p-th consists of the ``rows[p]``-th
    and the ``columns[p]``-th of ``keys`` [2, T, h, K']; -1 for those that are none."""
    kept = keys.shape[-1]
    place = torch.full((*keys.shape[:-1], num_keys), kept, device=keys.device)
    place.scatter_(-1, keys, torch.arange(kept, device=keys.device).expand_as(keys))
    candidate = torch.full((kept + 1, kept + 1), -1, device=keys.device)
    candidate[rows, columns] = torch.arange(len(rows), device=keys.device)
    row, column = (cells // num_keys).clamp(max=num_keys - 1), cells % num_keys  # clamped: of another model's grid
    return candidate[place[0].gather(-1, row), place[1].gather(-1, column)]
