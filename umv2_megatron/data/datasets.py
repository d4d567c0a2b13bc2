"""Samples for training from token files: mcore's GPT datasets, built from our options.

mcore decides what a sample is (documents are shuffled, joined and cut into windows of ``seq_length + 1`` tokens) and in
which order samples come; both follow from the corpus, the seed and the number of samples asked for. It keeps these
orders as ``.npy`` files (``cached_datasets.py``, which can also leave the corpus in its own order). After a change of
the blend the training set is ``streams.py``'s.

The corpora are checked before anything is built, on every rank alike. mcore itself loops forever over a split without
tokens, and a bad offset would only show when its sample is drawn.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Optional

from megatron.core.datasets.gpt_dataset import MockGPTDataset

from umv2_megatron.config.data_config import DataConfig, marks_prefix
from umv2_megatron.data.cached_datasets import Builder, CorpusConfig, CorpusDataset
from umv2_megatron.data.indexing import Index, check_corpus, ends_with, fingerprint, read_meta
from umv2_megatron.data.infilling import infilling_of
from umv2_megatron.data.phases import Phase, training_part, weighted
from umv2_megatron.data.scored_tokens import check_marks, scored_tokens
from umv2_megatron.data.streams import build_last_phase
from umv2_megatron.data.tokenizers import Tokenizer

_SPLITS = ("train", "validation", "test")
_PATH_FLAGS = ("--train-data-path", "--valid-data-path", "--test-data-path")


def build_datasets(
    config: DataConfig,
    tokenizer: Tokenizer,
    seq_length: int,
    seed: int,
    sizes: tuple[int, int, int],
    phases: Sequence[Phase] = (),
    is_built_on_rank: Callable[[], bool] = lambda: True,
) -> list[Optional[Any]]:
    """The train, validation and test datasets, each with at least as many samples as ``sizes`` asks for.

    An item is a dict of ``tokens``, ``labels``, ``position_ids`` ([seq_length] int64), ``loss_mask`` ([seq_length]
    float32) and, if asked for, ``attention_mask``; blends add ``dataset_id``. A split of size 0 is None, and so is
    every split on a rank for which ``is_built_on_rank`` is false. phases: the history of the training blend
    (``phases.py``), where it has changed; samples of the training set from before its last change are not there.

    Call it on all ranks: when torch.distributed runs, rank 0 builds and the others wait for it, then read the cache.
    Raises ``ValueError`` (on every rank, before any waiting) when a corpus cannot be used; see ``check_corpus``.
    """
    assert len(sizes) == 3 and min(sizes) >= 0
    options: dict[str, Any] = {
        "random_seed": seed,
        "sequence_length": seq_length,
        "tokenizer": tokenizer,
        "num_dataset_builder_threads": config.num_dataset_builder_threads,
        "reset_position_ids": config.reset_position_ids,
        "reset_attention_mask": config.reset_attention_mask and not config.packs_documents,
        "eod_mask_loss": config.eod_mask_loss,
        "create_attention_mask": config.create_attention_mask_in_dataloader,
    }
    if config.mock_data:
        mcore_config = CorpusConfig(**options)
        _leave_out_empty(mcore_config, sizes)
        return Builder(MockGPTDataset, list(sizes), is_built_on_rank, mcore_config).build()
    options["data_order"] = config.data_order
    options["infilling"] = infilling_of(config, tokenizer)
    options["scored"] = scored_tokens(config, tokenizer)
    options["loss_mask_key"] = config.loss_mask_key
    indices = check_corpora(config, tokenizer)
    if not any(sizes):
        return [None, None, None]  # without any, mcore builds mock data
    options["fingerprints"] = {prefix: fingerprint(prefix) for prefix in indices}
    options["path_to_cache"] = config.data_cache_path or f"{next(iter(indices))}.cache"
    blend = config.blend()
    if blend is None:
        wanted = [weighted(b, indices) if size and b else None for b, size in zip(config.split_blends(), sizes)]
        for name, flag, size, given in zip(_SPLITS, _PATH_FLAGS, sizes, wanted):
            if size and given is None:
                raise ValueError(f"{flag} is missing: the run asks for {size} {name} samples")
        mcore_config = CorpusConfig(blend_per_split=wanted, **options)
    else:
        mcore_config = CorpusConfig(blend=weighted(blend, indices), split=config.split, **options)
        _leave_out_empty(mcore_config, sizes)
        _check_splits(config.split, mcore_config.split_matrix, indices)
    if len(phases) > 1 and sizes[0]:
        train = build_last_phase(phases, mcore_config, training_part(config), sizes[0], is_built_on_rank)
        if not any(sizes[1:]):
            return [train, None, None]
        _leave_out_training(mcore_config)
        others = Builder(CorpusDataset, [0, *sizes[1:]], is_built_on_rank, mcore_config).build()
        return [train, *others[1:]]
    return Builder(CorpusDataset, list(sizes), is_built_on_rank, mcore_config).build()


def check_corpora(config: DataConfig, tokenizer: Tokenizer) -> dict[str, Index]:
    """Check every corpus that ``config`` names; the indices by prefix, in the order of the flags.

    Raises ``ValueError`` naming the file, as ``check_corpus`` does.
    """
    blends = [config.blend(), *config.split_blends()]
    prefixes = [prefix for blend in blends if blend is not None for prefix in blend[0]]
    found = {prefix: check_corpus(prefix, tokenizer.vocab_size, tokenizer.sha256) for prefix in dict.fromkeys(prefixes)}
    for prefix, index in found.items():
        if config.loss_mask_key is not None:
            check_marks(prefix, index, config.loss_mask_key)
        if read_meta(prefix) is None and not ends_with(prefix, index, tokenizer.eod):
            logging.getLogger(__name__).warning(
                "%s: no document looked at ends with the end-of-document token %d of the run's tokenizer, and no "
                ".meta.json says which tokenizer made the corpus: was it this one?",
                prefix,
                tokenizer.eod,
            )
    return found


def data_identity(config: DataConfig, tokenizer: Tokenizer, seq_length: int, seed: int) -> dict[str, Any]:
    """What determines the samples and their order, as JSON: a resumed run must find the same, or the user must say so.

    marks: fingerprints of the marks of --loss-mask-key, by those of their corpora; None without it.
    """
    blends = {"data_path": config.blend()}
    blends.update(zip(("train_data_path", "valid_data_path", "test_data_path"), config.split_blends()))
    corpora = {
        name: {"weights": blend[1], "fingerprints": [fingerprint(prefix) for prefix in blend[0]]}
        for name, blend in blends.items()
        if blend is not None
    }
    prefixes = [prefix for blend in blends.values() if blend is not None for prefix in blend[0]]
    key = config.loss_mask_key
    marks = None if key is None else {fingerprint(each): fingerprint(marks_prefix(each, key)) for each in prefixes}
    return {
        "corpora": corpora,
        "split": config.split if config.data_path is not None else None,
        "mock_data": config.mock_data,
        "tokenizer": dict(tokenizer.unique_identifiers),
        "seq_length": seq_length,
        "seed": seed,
        "data_order": config.data_order,
        "marks": marks,
        "infilling": list(infilling) if (infilling := infilling_of(config, tokenizer)) else None,
    }


def _leave_out_empty(mcore_config: CorpusConfig, sizes: tuple[int, int, int]) -> None:
    """Build nothing for splits of which no sample is asked for."""
    matrix = mcore_config.split_matrix
    mcore_config.split_matrix = [part if size else None for part, size in zip(matrix, sizes)]


def _leave_out_training(mcore_config: CorpusConfig) -> None:
    """Build the validation and test sets only."""
    if mcore_config.blend_per_split is not None:
        mcore_config.blend_per_split = [None, *mcore_config.blend_per_split[1:]]
    else:
        mcore_config.split_matrix = [None, *mcore_config.split_matrix[1:]]


def _check_splits(split: str, matrix: list, indices: dict[str, Index]) -> None:
    """Raise ``ValueError`` when a part of a corpus from which samples are wanted has no tokens.

    A test set that would be empty is left out: a small corpus has none by the default --split, and training needs none.
    """
    for prefix, index in indices.items():
        for place, (name, part) in enumerate(zip(_SPLITS, matrix)):
            if part is None:
                continue
            first, end = (round(part[i] * len(index.lengths)) for i in (0, 1))
            if index.lengths[first:end].any():
                continue
            found = f"--split {split} leaves the {name} set no document of {prefix} ({len(index.lengths)} documents)"
            if name != "test":
                raise ValueError(f"{found}: enlarge its share or the corpus, or give --eval-iters 0")
            matrix[place] = None
            logging.getLogger(__name__).warning("%s: there is none", found)
