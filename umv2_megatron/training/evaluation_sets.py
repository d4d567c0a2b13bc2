"""What the loss is evaluated on: the validation or test set, or several with names; a number of batches, or whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.data.batches import batch_iterator
from umv2_megatron.data.datasets import build_datasets
from umv2_megatron.data.scored_tokens import scored_tokens
from umv2_megatron.data.tokenizers import Tokenizer
from umv2_megatron.data.whole_corpora import WholeCorpora, corpus_parts


@dataclass(frozen=True)
class EvaluationSet:
    """``batches`` global batches of ``make_iterator()``: always the same, so that losses compare and a resume needs no
    state. ``name`` is None for the one set of a plain --valid-data-path or --split."""

    name: str | None
    make_iterator: Callable[[], Any]
    batches: int


def builds_itself(run: RunConfig, split: str) -> bool:
    """Whether the sets of ``split`` ("validation" or "test") are no part of what ``build_datasets`` makes with the
    training set."""
    return run.training.full_validation or bool(run.data.named_sets(split))


def evaluation_sets(run: RunConfig, tokenizer: Tokenizer, split: str, built: Any) -> list[EvaluationSet]:
    """The sets of ``split``; ``built`` is the dataset made with the training set, if any. Collective.

    Raises ``ValueError`` where a set has no tokens.
    """
    if not run.training.eval_iters or _has_none(run, split):
        return []
    named = run.data.named_sets(split)
    if not run.training.full_validation:
        if not named:
            return [] if built is None else [_set(run, None, built, tokenizer, run.training.eval_iters)]
        size = run.training.eval_iters * run.global_batch_size
        found = []
        for name, words in named.items():
            config = dataclasses.replace(run.data, train_data_path=words, valid_data_path=words, test_data_path=None)
            dataset = build_datasets(config, tokenizer, run.model.seq_length, run.training.seed, (0, size, 0))[1]
            found.append(_set(run, name, dataset, tokenizer, run.training.eval_iters))
        return found
    blends = run.data.set_blends(split)
    sets: dict[str | None, list[str] | None] = {name: blend[0] for name, blend in blends.items()} or {None: None}
    return _whole_sets(run, tokenizer, split, sets)


def _whole_sets(
    run: RunConfig, tokenizer: Tokenizer, split: str, sets: dict[str | None, list[str] | None]
) -> list[EvaluationSet]:
    """Sets of every token of corpora, by name; of the ``split`` of --data-path where the corpora are None."""
    found, batch = [], run.global_batch_size
    for name, prefixes in sets.items():
        parts = corpus_parts(run.data, split, prefixes)
        dataset = WholeCorpora(
            parts, run.data, tokenizer.eod, run.model.seq_length, batch, scored_tokens(run.data, tokenizer)
        )
        if dataset.tokens == 0 and split == "test" and prefixes is None:
            return []  # a small corpus has none by the default --split
        if dataset.tokens == 0:
            source = f"--split {run.data.split}" if prefixes is None else " ".join(prefixes)
            raise ValueError(f"--full-validation finds no token in {source}; give a {split} set with some")
        found.append(_set(run, name, dataset, tokenizer, len(dataset) // batch))
    return found


def _has_none(run: RunConfig, split: str) -> bool:
    paths = {"validation": run.data.valid_data_path, "test": run.data.test_data_path}
    return run.data.has_split_paths and paths[split] is None


def _set(run: RunConfig, name: str | None, dataset: Any, tokenizer: Tokenizer, batches: int) -> EvaluationSet:
    def iterator() -> Any:
        return batch_iterator(
            dataset,
            0,
            run.training.micro_batch_size,
            run.data.num_workers,
            run.virtual_pipeline_size,
            apart_at=tokenizer.eod if run.data.packs_documents else None,
        )

    return EvaluationSet(name, iterator, batches)
