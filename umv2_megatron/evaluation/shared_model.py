"""A model of many ranks that one of them drives: rank 0 asks, the others take part until it is done.

A program around a model that was written for one process (lm-eval) then runs on rank 0 alone. So its requests cannot
differ between ranks, and what it prints and writes is there once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from umv2_megatron.checkpoint.agreement import tell_all
from umv2_megatron.evaluation.generation import CachedMegatronModel
from umv2_megatron.evaluation.megatron_scoring import MegatronScoringModel
from umv2_megatron.evaluation.scoring_model import TokenScores
from umv2_megatron.model.builder import evaluation_mode, unwrap
from umv2_megatron.training.restore import RestoredModel

_FINISH = "finish"


class EvaluationLeft(Exception):
    """Somebody waits for this evaluation to end; its results are not wanted any more."""


class SharedModel:
    """A ``ScoringModel`` on rank 0; the other ranks call ``follow``.

    Args:
        restored: the model, its configuration and its tokenizer; of a checkpoint or in training.
        micro_batch_size: rows per rank and forward pass.
        leave: asked on rank 0 before every forward pass; True raises ``EvaluationLeft`` instead.
    """

    def __init__(
        self, restored: RestoredModel, micro_batch_size: int, leave: Callable[[], bool] = lambda: False
    ) -> None:
        self._leave = leave
        self._chunks = restored.chunks
        self._scoring = MegatronScoringModel(restored, micro_batch_size)
        self._cached: CachedMegatronModel | None = None
        self.tokenizer = restored.tokenizer
        self.context = self._scoring.context
        self.longest_context = self._scoring.longest_context
        self.first_token = self._scoring.first_token
        self.rows = micro_batch_size * restored.run.data_parallel_size
        """Rows that fill a forward pass of all ranks."""
        self.asking = False
        """Whether all ranks are computing: an error of this rank in there leaves the others waiting."""

    def logprobs(self, tokens: torch.Tensor) -> TokenScores:
        """See ``ScoringModel``; on rank 0."""
        scores: TokenScores = self._ask("scores", tokens)
        return scores

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [1, vocabulary] of the token after ``tokens`` [1, s] int64, with keys and values of earlier calls
        kept; on rank 0. Not for models whose blocks or sequences are split (``cannot_generate``)."""
        logits: torch.Tensor = self._ask("next", tokens)
        return logits

    def _ask(self, what: str, tokens: torch.Tensor) -> Any:
        if self._leave():
            raise EvaluationLeft
        self.asking = True
        tell_all((what, tokens))
        answer = self._answer(what, tokens)
        self.asking = False
        return answer

    def _answer(self, what: str, tokens: torch.Tensor) -> Any:
        """What every rank computes."""
        if what == "scores":
            return self._scoring.logprobs(tokens)
        if self._cached is None:
            self._cached = CachedMegatronModel(unwrap(self._chunks[0]), self.context)
        with evaluation_mode(self._chunks):
            return self._cached(tokens)

    def finish(self, outcome: Any = None) -> None:
        """End ``follow`` on the other ranks, which return ``outcome``; on rank 0."""
        tell_all((_FINISH, outcome))

    def follow(self) -> Any:
        """Take part in what rank 0 asks for until it is done; returns what it has told with ``finish``."""
        while True:
            what, told = tell_all(("", None))
            if what == _FINISH:
                return told
            self._answer(what, told)


def cannot_generate(run: Any) -> str | None:
    """The flag, with its value, because of which ``next_logits`` does not work on a model of ``run``; None: it does."""
    for key in ("pipeline_model_parallel_size", "context_parallel_size"):
        if run.values[key] > 1:
            return f"--{key.replace('_', '-')} {run.values[key]}"
    return "--sequence-parallel" if run.sequence_parallel else None
