"""A Megatron checkpoint as a ``ScoringModel``, on one rank or on any layout of many.

The rows of a batch are spread over the data-parallel ranks, which under memory parallelism hold the tables together;
mcore's forward-only schedule runs them through the pipeline stages; the vocabulary stays split over tensor-parallel
ranks, which exchange four numbers per token instead of logits; context-parallel ranks each score their part of the
rows. In the end every rank knows every score, so the program around it is the same on all ranks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from umv2_megatron.data.batches import next_batch
from umv2_megatron.evaluation.scoring_model import TokenScores, parts_of_logits, rows_at_once, scores_of_logits
from umv2_megatron.model.builder import evaluation_mode
from umv2_megatron.parallel import cpu_platform
from umv2_megatron.training.restore import RestoredModel


class MegatronScoringModel:
    """Scores rows with a model of ``restore.restore_model`` or in training, ``micro_batch_size`` rows per rank and
    forward pass."""

    def __init__(self, restored: RestoredModel, micro_batch_size: int = 8) -> None:
        run = restored.run
        self.tokenizer = restored.tokenizer
        self.context: int = run.model.seq_length
        learned = run.model.position_embedding_type == "learned_absolute"
        self.longest_context: int | None = run.max_position_embeddings if learned else None
        self.first_token: int = self.tokenizer.eod
        self._chunks = restored.chunks
        self._micro_batch_size = micro_batch_size
        self._columns = run.padded_vocab_size(self.tokenizer.vocab_size) // run.tensor_model_parallel_size
        tensor, context = run.tensor_model_parallel_size, run.context_parallel_size
        # tokens are split over tensor-parallel ranks, and over two parts of each context-parallel rank
        self._multiple = tensor * (2 * context if context > 1 else 1)
        # mcore's interleaved schedule takes micro-batches in whole groups
        self._group: int = 1
        if run.virtual_pipeline_size is not None:
            config = get_model_config(restored.chunks[0])
            self._group = config.microbatch_group_size_per_vp_stage or run.pipeline_model_parallel_size

    def logprobs(self, tokens: torch.Tensor) -> TokenScores:
        """See ``ScoringModel``; collective over all ranks."""
        rows, length = len(tokens), tokens.shape[1] - 1
        ranks = parallel_state.get_data_parallel_world_size()
        size = min(rows_at_once(self._micro_batch_size, length, self._columns), math.ceil(rows / ranks))
        count = math.ceil(rows / (ranks * size * self._group)) * self._group
        padded = torch.nn.functional.pad(
            tokens, (0, -length % self._multiple, 0, count * size * ranks - rows), value=self.tokenizer.eod
        )
        first = parallel_state.get_data_parallel_rank() * count * size
        own = padded[first : first + count * size]
        found = self._forward(own, count, size)
        likelihood, best = (self._gather(part, ranks)[:rows, :length] for part in found)
        return TokenScores(likelihood.float().cpu(), best.long().cpu())

    def _forward(self, tokens: torch.Tensor, count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-likelihood and argmax [rows, s] (float32, int64) of this data-parallel rank's rows, on every stage."""
        length = tokens.shape[1] - 1
        schedule = get_forward_backward_func()
        iterators = [_micro_batches(tokens, size) for _ in self._chunks]
        with evaluation_mode(self._chunks):
            reports: list[TokenScores] = schedule(
                forward_step_func=functools.partial(_forward_step, self.tokenizer.num_tokens),
                data_iterator=iterators if len(self._chunks) > 1 else iterators[0],
                model=self._chunks,
                num_microbatches=count,
                seq_length=length,
                micro_batch_size=size,
                decoder_seq_length=length,
                forward_only=True,
                collect_non_loss_data=True,
            )
        here = length // parallel_state.get_context_parallel_world_size()
        device = cpu_platform.device()
        likelihood = torch.empty(len(tokens), here, dtype=torch.float32, device=device)
        best = torch.empty(len(tokens), here, dtype=torch.int64, device=device)
        if reports:
            likelihood, best = (torch.cat(parts) for parts in zip(*reports))
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            last, group = (
                parallel_state.get_pipeline_model_parallel_last_rank(),
                parallel_state.get_pipeline_model_parallel_group(),
            )
            for part in (likelihood, best):
                torch.distributed.broadcast(part, last, group=group)
        return _whole_sequence(likelihood), _whole_sequence(best)

    @staticmethod
    def _gather(part: torch.Tensor, ranks: int) -> torch.Tensor:
        """Rows of all data-parallel ranks, in order."""
        if ranks == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(ranks)]
        torch.distributed.all_gather(parts, part.contiguous(), group=parallel_state.get_data_parallel_group())
        return torch.cat(parts)


def _micro_batches(tokens: torch.Tensor, size: int) -> Iterator[dict[str, torch.Tensor]]:
    """The batches that ``next_batch`` takes; position ids count from 0 in every row."""
    positions = torch.arange(tokens.shape[1] - 1).expand(size, -1)
    for rows in tokens.split(size):
        yield {"tokens": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous(), "position_ids": positions}


def _forward_step(vocab_size: int, iterator: Iterator, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """mcore's ``forward_step_func``, for logits instead of a loss."""
    batch = next_batch(iterator)
    output = model(batch["tokens"], batch["position_ids"], batch["attention_mask"])
    return output, functools.partial(_score, batch["labels"], vocab_size)


def _score(labels: torch.Tensor, vocab_size: int, logits: torch.Tensor, non_loss_data: bool = True) -> TokenScores:
    """Scores [b, s] of logits [b, s, V / TP], the same on all tensor-parallel ranks."""
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    if ranks == 1:
        return scores_of_logits(logits, labels, vocab_size)
    first = parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
    own = parts_of_logits(logits[..., : max(0, vocab_size - first)], labels - first)
    # double precision keeps the ids of any vocabulary exact beside the numbers
    mine = torch.stack([own.target.double(), own.log_sum, own.highest, own.argmax + first])
    parts = [torch.empty_like(mine) for _ in range(ranks)]
    torch.distributed.all_gather(parts, mine, group=parallel_state.get_tensor_model_parallel_group())
    targets, sums, peaks, ids = torch.stack(parts, 1)
    winner = peaks.argmax(0, keepdim=True)  # the first of equals: the lowest id
    return TokenScores((targets.sum(0) - sums.logsumexp(0)).float(), ids.gather(0, winner)[0].long())


def _whole_sequence(part: torch.Tensor) -> torch.Tensor:
    """From the parts of the context-parallel ranks, [rows, s / CP] each, to [rows, s].

    Rank r of CP holds the chunks r and 2 CP - 1 - r of 2 CP (mcore's ``get_batch_on_this_cp_rank``).
    """
    ranks = parallel_state.get_context_parallel_world_size()
    if ranks == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(ranks)]
    torch.distributed.all_gather(parts, part.contiguous(), group=parallel_state.get_context_parallel_group())
    fronts, backs = zip(*(held.chunk(2, dim=1) for held in parts))
    return torch.cat([*fronts, *reversed(backs)], dim=1)
