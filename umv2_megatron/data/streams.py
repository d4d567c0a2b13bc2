"""The training set after a change of the blend (``--allow-new-blend``): every corpus goes on where it stood.

A corpus is one endless row of samples, its stream, of which a run reads one after another whatever the blend is:

- A corpus of the run's first blend begins with mcore's dataset as that was built for the first blend: some whole
  epochs, more than one of them shuffled together.
- Then, or at once for a corpus that came later, epochs follow one by one. Each has its documents and its samples in an
  order of its own, drawn from the seed plus the number of the epoch. So nothing depends on how many samples are read.
  (With --data-order sequential all epochs have the order of the corpus.)

``phases.py`` says how many samples of each stream have been read before.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Optional, TypeVar

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split, normalize

from umv2_megatron.data.cached_datasets import (
    Builder,
    CorpusBlend,
    CorpusConfig,
    CorpusDataset,
    cached,
)
from umv2_megatron.data.phases import (
    Corpus,
    Phase,
    most_drawn_from,
    samples_built,
    training_documents,
)

T = TypeVar("T")


class CorpusEpochs(CorpusDataset):
    """Whole epochs of a corpus, one after another, from ``config.first_epoch`` on.

    mcore's dataset of several epochs would shuffle them together, and cut samples across their ends.
    """

    config: CorpusConfig

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*CorpusDataset._key_config_attributes(), "first_epoch", "epochs"]

    def __len__(self) -> int:
        return len(self.shuffle_index)

    def _seed_and_number(self, idx: int) -> tuple[int, int]:
        epoch, number = divmod(idx, len(self) // self.config.epochs)
        return self.config.random_seed + self.config.first_epoch + epoch, number

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return cached(
            self,
            self.index_split.name,
            ("document_index", "sample_index", "shuffle_index"),
            lambda: _one_after_another([self._epoch(each) for each in range(self.config.epochs)]),
        )

    def _epoch(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """mcore's document, sample and shuffle index of one epoch; ``number`` counts from ``config.first_epoch``."""
        config = self.config
        self.config = copy.copy(config)
        self.config.random_seed += config.first_epoch + number
        try:
            return self._order()
        finally:
            self.config = config


def _one_after_another(epochs: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple:
    """The indices of several epochs as those of one dataset; rows between two epochs begin no sample."""
    documents = np.concatenate([each[0] for each in epochs])
    count, rows = len(epochs[0][0]), len(epochs[0][1])
    wide = len(documents) > np.iinfo(np.int32).max
    samples = [each[1].astype(np.int64) if wide else each[1] for each in epochs]
    samples = [each + np.array([number * count, 0], dtype=each.dtype) for number, each in enumerate(samples)]
    shuffled = [each[2].astype(np.int64) + number * rows for number, each in enumerate(epochs)]
    return documents, np.concatenate(samples), np.concatenate(shuffled)


class CorpusStream(torch.utils.data.Dataset):
    """Samples of one corpus from some place of its stream on: each piece's dataset from its first sample given."""

    def __init__(self, pieces: Sequence[tuple[CorpusDataset, int]]) -> None:
        self.pieces = list(pieces)
        # what mcore's blend asks of its datasets
        self.index_split = Split.train
        self.unique_identifiers = {
            "class": type(self).__name__,
            "pieces": [[dataset.unique_identifiers, first] for dataset, first in self.pieces],
        }

    def __len__(self) -> int:
        return sum(len(dataset) - first for dataset, first in self.pieces)

    def __getitem__(self, index: int) -> dict[str, Any]:
        for dataset, first in self.pieces:
            if index < len(dataset) - first:
                return dataset[first + index]
            index -= len(dataset) - first
        raise IndexError(f"{self.pieces[0][0].dataset_path} has no further samples here")


class LastPhase(torch.utils.data.Dataset):
    """A run's training set by the run's own numbers of samples, of which those of its last phase are there."""

    def __init__(self, dataset: Any, from_sample: int) -> None:
        self.dataset = dataset
        self.from_sample = from_sample

    def __len__(self) -> int:
        return self.from_sample + len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index < self.from_sample:
            raise IndexError(
                f"sample {index} is of an earlier blend: the corpora of the present one, which begins with sample "
                f"{self.from_sample}, are the only ones that are open"
            )
        return self.dataset[index - self.from_sample]


def build_last_phase(
    phases: Sequence[Phase],
    config: CorpusConfig,
    part: tuple[float, float],
    samples: int,
    is_built_on_rank: Callable[[], bool],
) -> Optional[LastPhase]:
    """The training set of a run of ``samples`` samples whose blend has changed, after the last change.

    config: mcore's options, with the fingerprints of the corpora. part: which documents are for training. Call it on
    all ranks: rank 0 builds, the others wait for it, then read the cache. None where ``is_built_on_rank`` is false.
    """
    phase = phases[-1]
    count = max(1, samples - phase.from_sample)
    wanted = most_drawn_from(phase.shares(), count)
    first_sizes = samples_built(phases[0], config.mid_level_dataset_surplus)
    built = dict(zip((corpus.fingerprint for corpus in phases[0].corpora), first_sizes))

    def build(corpus: Corpus, number: int) -> CorpusStream:
        start = phase.consumed.get(corpus.fingerprint, 0)
        return _stream(corpus, built.get(corpus.fingerprint), start, number, config, part)

    def build_all() -> list[CorpusStream]:
        if not is_built_on_rank():
            return []
        with ThreadPoolExecutor(config.num_dataset_builder_threads) as threads:
            return list(threads.map(build, phase.corpora, wanted))

    streams = _on_rank_0_first(build_all)
    if len(phase.corpora) == 1:
        return LastPhase(streams[0], phase.from_sample) if streams else None
    weights = normalize([corpus.weight for corpus in phase.corpora])  # and again by mcore's blend: ``Phase.shares``
    blend = Builder.build_generic_dataset(CorpusBlend, is_built_on_rank, True, streams, weights, count, config)
    return None if blend is None else LastPhase(blend, phase.from_sample)


def _stream(
    corpus: Corpus, built_for: Optional[int], start: int, count: int, config: CorpusConfig, part: tuple[float, float]
) -> CorpusStream:
    """At least ``count`` samples of a corpus from its sample ``start`` on.

    built_for: the samples for which mcore has built it in the first blend; None where it was not in it.
    """
    config = copy.copy(config)
    config.fingerprints = {corpus.prefix: corpus.fingerprint}  # whatever other corpora there are: their order is theirs
    config.split_matrix = [part, None, None]
    tokens = CorpusDataset.build_low_level_dataset(corpus.prefix, config)
    first, end = training_documents(part, CorpusDataset.numel_low_level_dataset(tokens))
    documents = np.arange(first, end, dtype=np.int32)
    per_epoch_tokens = int(tokens.sequence_lengths[first:end].sum(dtype=np.int64))
    length, per_epoch = config.sequence_length, (per_epoch_tokens - 1) // config.sequence_length
    make = functools.partial(_dataset, tokens, corpus.prefix, documents, config)
    pieces: list[tuple[CorpusDataset, int]] = []
    epochs_before, samples_before = 0, 0
    if built_for is not None:
        epochs_before = max(1, -(-(built_for * length + 1) // per_epoch_tokens))
        samples_before = (epochs_before * per_epoch_tokens - 1) // length
        if start < samples_before:
            pieces.append((make(CorpusDataset, built_for), start))
            assert len(pieces[0][0]) == samples_before, "mcore counts epochs in another way"
    missing = start + count - samples_before  # of the epochs' samples, those up to here are wanted
    if missing > 0:
        skipped, inside = divmod(max(0, start - samples_before), per_epoch)
        config.first_epoch = epochs_before + skipped
        config.epochs = -(-missing // per_epoch) - skipped
        pieces.append((make(CorpusEpochs, None), inside))
    return CorpusStream(pieces)


def _dataset(
    tokens: IndexedDataset, prefix: str, documents: np.ndarray, config: CorpusConfig, cls: type, samples: Optional[int]
) -> CorpusDataset:
    return cls(tokens, prefix, documents, samples, Split.train, config)


def _on_rank_0_first(build: Callable[[], T]) -> T:
    """``build()`` of this rank; where there are others, that of rank 0 comes first, and fills the cache."""
    if not torch.distributed.is_initialized():
        return build()
    made = [build()] if torch.distributed.get_rank() == 0 else []
    torch.distributed.barrier()
    return made[0] if made else build()
