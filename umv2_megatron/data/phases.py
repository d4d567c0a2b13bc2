"""The history of a run's training blend: from which sample on which corpora were drawn, and in which shares.

A phase is a stretch of samples with one blend. A run has one, and one more after each change by ``--allow-new-blend``.
With them a sample of the run is found in its corpus: the blend of its phase says which corpus, and how many samples of
it the phase has drawn before; the phase says how many the earlier ones had. So every corpus is read on where it stood,
and only the corpora of the last phase have to be there (``streams.py``).

mcore's blend is greedy: a sample is drawn from the corpus that lags most behind its share of the samples so far
(``build_blending_indices`` in helpers.cpp). The first n samples are therefore the same however many follow.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.utils import normalize

from umv2_megatron.config.data_config import Blend, DataConfig, parse_blend
from umv2_megatron.data.indexing import Index, fingerprint, read_index
from umv2_megatron.durable_files import CheckpointError

TRAINING_BLENDS = ("data_path", "train_data_path")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """One corpus of a phase. ``weight``: its share times any common factor. ``samples_per_epoch``: whole samples of its
    training documents; None where nobody knows it any more."""

    prefix: str
    fingerprint: str
    weight: float
    samples_per_epoch: Optional[int]


@dataclasses.dataclass(frozen=True)
class Phase:
    """Samples ``from_sample`` and on are drawn from ``corpora``.

    samples: those of the whole run as the phase was built; mcore's order of the corpora of the first phase depends on
    it. consumed: samples drawn before this phase of every corpus of the run, by fingerprint.
    """

    from_sample: int
    samples: int
    corpora: tuple[Corpus, ...]
    consumed: dict[str, int]

    def consumed_at(self, sample: int) -> dict[str, int]:
        """Samples of every corpus of the run, by fingerprint, that the first ``sample`` samples of the run hold."""
        assert sample >= self.from_sample
        drawn = drawn_from(self.shares(), sample - self.from_sample)
        found = dict(self.consumed)
        for corpus, count in zip(self.corpora, drawn):
            found[corpus.fingerprint] = found.get(corpus.fingerprint, 0) + count
        return found

    def shares(self) -> list[float]:
        """The corpora's shares, which sum to 1, to the last bit as mcore's builder and blend make them: both
        normalise."""
        return normalize(normalize([corpus.weight for corpus in self.corpora]))

    def as_json(self) -> dict[str, Any]:
        """For config.json."""
        return dataclasses.asdict(self)


def drawn_from(shares: list[float], count: int) -> list[int]:
    """How many of the first ``count`` samples of a blend come from each corpus."""
    if len(shares) == 1:
        return [count]
    from megatron.core.datasets import helpers

    corpus_of, sample_of = np.zeros(count, dtype=np.int16), np.zeros(count, dtype=np.int64)
    helpers.build_blending_indices(corpus_of, sample_of, shares, len(shares), count, False)
    return np.bincount(corpus_of, minlength=len(shares)).tolist()


def most_drawn_from(shares: list[float], count: int) -> list[int]:
    """At least as much as ``drawn_from``, without going through the samples.

    The corpus that is drawn from lags behind its share, or is even with it: after it, it is ahead by one at most. One
    more is for rounding.
    """
    return [count] if len(shares) == 1 else [math.floor(share * count) + 2 for share in shares]


def samples_built(phase: Phase, surplus: float) -> list[int]:
    """The number of samples for which mcore has built each corpus of a first phase (``num_samples``); its order depends
    on it. mcore adds ``surplus`` to each corpus of a blend (``_get_size_per_split_per_dataset``, 0.16.1)."""
    if len(phase.corpora) == 1:
        return [phase.samples]
    shares = normalize([corpus.weight for corpus in phase.corpora])
    return [math.ceil(math.ceil(phase.samples * share) * (1 + surplus)) for share in shares]


# -- from options and checkpoints ------------------------------------------------------------------------------------


def training_blend(config: DataConfig) -> Optional[tuple[str, Blend]]:
    """The flag, as a key, and the corpora of the training set; None for --mock-data."""
    blends = zip(TRAINING_BLENDS, (config.blend(), config.split_blends()[0]))
    return next(((key, blend) for key, blend in blends if blend is not None), None)


def weighted(blend: Blend, indices: dict[str, Index]) -> Blend:
    """A blend with weights: those given, or the corpora's tokens; none for a single corpus.

    mcore would go through unweighted corpora once only, and then hand out fewer samples than asked for.
    """
    prefixes, weights = blend
    if len(prefixes) == 1:
        return prefixes, None
    return prefixes, weights or [_tokens(indices[prefix]) for prefix in prefixes]


def training_part(config: DataConfig) -> tuple[float, float]:
    """Where the training documents of a corpus begin and end, as shares of all its documents."""
    if config.data_path is None:
        return 0.0, 1.0
    return convert_split_vector_to_split_matrix(parse_and_normalize_split(config.split))[0] or (0.0, 0.0)


def training_documents(part: tuple[float, float], documents: int) -> tuple[int, int]:
    """First document and end of the training set of a corpus of ``documents``; mcore's rounding."""
    return round(part[0] * documents), round(part[1] * documents)


def current_corpora(config: DataConfig, seq_length: int) -> tuple[Corpus, ...]:
    """The corpora of the run's training set, none for --mock-data. Raises ``ValueError`` for files that are none."""
    found = training_blend(config)
    if found is None:
        return ()
    prefixes = found[1][0]
    indices = {prefix: read_index(prefix) for prefix in prefixes}
    weights = weighted(found[1], indices)[1] or [1.0]
    part = training_part(config)
    return tuple(
        Corpus(prefix, fingerprint(prefix), weight, _samples_per_epoch(indices[prefix], part, seq_length))
        for prefix, weight in zip(prefixes, weights)
    )


def saved_phases(
    data: dict[str, Any], values: dict[str, Any], samples: int, config: DataConfig, seq_length: int
) -> list[Phase]:
    """The phases of a checkpoint, none for mock data.

    Checkpoints of earlier versions do not record them: they have one, which follows from what they say. data, values:
    of its config.json. samples: of the whole run, for such a checkpoint. config: of this run, whose corpora may be the
    old ones at another place. Raises ``CheckpointError`` for a record that is none, and ``ValueError`` where weights
    were the corpora's tokens and these are gone.
    """
    if "training_blends" in data:
        try:
            return [_phase(record) for record in data["training_blends"]]
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"the checkpoint's config.json has damaged training_blends: {error!r}") from error
    key = next((key for key in TRAINING_BLENDS if key in data.get("corpora", {})), None)
    if key is None:
        return []
    prefixes = parse_blend(f"--{key.replace('_', '-')}", list(map(str, values[key])))[0]
    known, weights = data["corpora"][key]["fingerprints"], data["corpora"][key]["weights"]
    current = training_blend(config)
    indices = [_index_of(each, [prefix, *(current[1][0] if current else [])]) for prefix, each in zip(prefixes, known)]
    if weights is None and len(prefixes) > 1:
        missing = [prefix for prefix, index in zip(prefixes, indices) if index is None]
        if missing:
            raise ValueError(
                f"the checkpoint's blend drew from each corpus in proportion to its tokens, and {missing[0]} is gone "
                "or has changed; bring its .idx and .bin back for the first start with --allow-new-blend"
            )
        weights = [_tokens(index) for index in indices if index is not None]
    part = training_part(config)
    sizes = [None if index is None else _samples_per_epoch(index, part, seq_length) for index in indices]
    return [Phase(0, samples, tuple(map(Corpus, prefixes, known, map(float, weights or [1.0]), sizes)), {})]


def with_new_blend(
    phases: Sequence[Phase], corpora: tuple[Corpus, ...], consumed_samples: int, samples: int
) -> list[Phase]:
    """``phases`` and one of ``corpora`` that begins after ``consumed_samples`` samples.

    Raises ``ValueError`` where a blend names a corpus twice: each of the two would be read from its start.
    """
    for whose, blend in (("the checkpoint's", phases[-1].corpora), ("the new", corpora)):
        seen: dict[str, str] = {}
        for corpus in blend:
            if corpus.fingerprint in seen:
                raise ValueError(
                    f"--allow-new-blend cannot go on in a corpus that {whose} blend names twice: "
                    f"{seen[corpus.fingerprint]} and {corpus.prefix} have the same content"
                )
            seen[corpus.fingerprint] = corpus.prefix
    for corpus in corpora:
        if corpus.samples_per_epoch == 0:
            raise ValueError(
                f"--allow-new-blend cannot read {corpus.prefix}: its training documents are shorter than one sample "
                "of --seq-length + 1 tokens; join it with another corpus"
            )
    return [*phases, Phase(consumed_samples, samples, corpora, phases[-1].consumed_at(consumed_samples))]


def _phase(record: dict[str, Any]) -> Phase:
    corpora = tuple(
        Corpus(str(each["prefix"]), str(each["fingerprint"]), float(each["weight"]),
               None if each["samples_per_epoch"] is None else int(each["samples_per_epoch"]))
        for each in record["corpora"]
    )  # fmt: skip
    consumed = {str(key): int(count) for key, count in record["consumed"].items()}
    found = Phase(int(record["from_sample"]), int(record["samples"]), corpora, consumed)
    weights = [corpus.weight for corpus in corpora]
    if not weights or not all(0 < weight < math.inf for weight in weights) or min(found.from_sample, found.samples) < 0:
        raise ValueError("weights and samples must be numbers above 0")
    return found


def _index_of(known: str, prefixes: Sequence[str]) -> Optional[Index]:
    """The index of the first of ``prefixes`` whose fingerprint is ``known``."""
    for prefix in prefixes:
        try:
            if fingerprint(prefix) == known:
                return read_index(prefix)
        except (OSError, ValueError):
            continue
    return None


def _tokens(index: Index) -> float:
    return float(index.lengths.sum(dtype=np.int64))


def _samples_per_epoch(index: Index, part: tuple[float, float], seq_length: int) -> int:
    first, end = training_documents(part, len(index.lengths))
    return max(0, int(index.lengths[first:end].sum(dtype=np.int64)) - 1) // seq_length
