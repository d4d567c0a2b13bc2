"""Samples for training from token files: mcore's GPT datasets, built from our options.

mcore decides what a sample is (documents are shuffled, joined and cut into windows of ``seq_length + 1`` tokens) and in
which order samples come; both follow from the corpus, the seed and the number of samples asked for. It keeps these
orders as ``.npy`` files. Added here, because weeks-long runs need them:

- The corpora are checked before anything is built, on every rank alike. mcore itself loops forever over a split
  without tokens, and a bad offset would only show when its sample is drawn.
- A cached order belongs to the content of a corpus, not only to its path: mcore names cache files after the path, so a
  corpus made anew under the old name would be read in the order, and by the offsets, of the former one.
- Documents of training samples can be rearranged to teach filling in the middle (``infilling.py``).
- Cache files appear at once and complete, so a run killed while writing them can start again; they are read without
  pickle, which mcore allows; and a blend can be built without torch.distributed.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.utils import Split

from umv2_megatron.config.data_config import Blend, DataConfig
from umv2_megatron.data.indexing import Index, check_corpus, ends_with, fingerprint, read_meta
from umv2_megatron.data.infilling import Infilling, draws_of, infill, infilling_of
from umv2_megatron.data.tokenizers import Tokenizer

_SPLITS = ("train", "validation", "test")
_PATH_FLAGS = ("--train-data-path", "--valid-data-path", "--test-data-path")


@dataclass
class _Config(GPTDatasetConfig):
    """mcore's options, the content of each corpus, which becomes part of the names of cache files, and how documents
    are rearranged."""

    fingerprints: Optional[dict[str, str]] = None
    infilling: Optional[Infilling] = None


# -- cached sample orders -----------------------------------------------------------------------------------------


def _cached(dataset: Any, split: str, suffixes: tuple[str, ...], build: Callable[[], tuple]) -> tuple:
    """The arrays of ``dataset`` from its cache, or built and then cached.

    A cache file that is incomplete or not a plain array counts as missing. Every rank that misses builds the same
    arrays for itself, so nodes without a common file system work too.
    """
    directory = dataset.config.path_to_cache
    if directory is None:
        return build()
    name = f"{dataset.unique_description_hash}-{type(dataset).__name__}-{split}"
    paths = [Path(directory, f"{name}-{suffix}.npy") for suffix in suffixes]
    try:
        return tuple(np.load(path, mmap_mode="r", allow_pickle=False) for path in paths)
    except (OSError, ValueError, EOFError):
        arrays = build()
    try:
        os.makedirs(directory, exist_ok=True)
        _write(Path(directory, f"{name}-description.txt"), lambda file: file.write(dataset.unique_description.encode()))
        for path, array in zip(paths, arrays):
            _write(path, functools.partial(_save_array, array=array))
    except OSError as error:
        raise ValueError(
            f"--data-cache-path {directory} cannot be written ({error.strerror}): name a directory that can"
        ) from None
    return arrays


def _save_array(file: Any, array: np.ndarray) -> None:
    np.save(file, array, allow_pickle=False)


def _write(path: Path, write: Callable[[Any], Any]) -> None:
    """Write a file under a name of its own and rename it; ranks and jobs may do so at the same time."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    try:
        with open(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextlib.contextmanager
def _without_cache(dataset: Any) -> Iterator[None]:
    """Let mcore build in memory only. It would warn that nothing is saved, which is not so."""
    config, logger = dataset.config, logging.getLogger(type(dataset).__mro__[1].__module__)

    def is_wanted(record: logging.LogRecord) -> bool:
        return "because path_to_cache is None" not in record.getMessage()

    dataset.config = copy.copy(config)
    # ``mock`` is what keeps mcore from falling back to a cache of its own choice.
    dataset.config.path_to_cache, dataset.config.mock = None, True
    logger.addFilter(is_wanted)
    try:
        yield
    finally:
        dataset.config = config
        logger.removeFilter(is_wanted)


class CorpusDataset(GPTDataset):
    """mcore's GPTDataset with the cache described at the top of this file."""

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*GPTDataset._key_config_attributes(), "fingerprints"]

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        def build() -> tuple:
            with _without_cache(self):
                return super(CorpusDataset, self)._build_document_sample_shuffle_indices()

        return _cached(self, self.index_split.name, ("document_index", "sample_index", "shuffle_index"), build)

    def _query_document_sample_shuffle_indices(self, idx: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of sample ``idx`` [seq_length + 1] and the documents that they are from."""
        sample, documents = super()._query_document_sample_shuffle_indices(idx)
        config = self.config
        # losses of validation stay those of texts as they are
        if config.infilling is not None and self.index_split is Split.train:
            draws = draws_of(config.random_seed, config.fingerprints[self.dataset_path], int(idx))
            sample = infill(sample, config.infilling, draws)
        return sample, documents


class CorpusBlend(BlendedDataset):
    """mcore's BlendedDataset with the same cache."""

    def _build_indices(self) -> tuple[np.ndarray, np.ndarray]:
        def build() -> tuple:
            with _without_cache(self):
                return super(CorpusBlend, self)._build_indices()

        return _cached(self, self.split.name, ("dataset_index", "dataset_sample_index"), build)


class _Builder(BlendedMegatronDatasetBuilder):
    @staticmethod
    def build_generic_dataset(cls: Any, *arguments: Any) -> Any:
        # mcore names its blend class in the middle of a method; this is the one place it passes through.
        cls = CorpusBlend if cls is BlendedDataset else cls
        return BlendedMegatronDatasetBuilder.build_generic_dataset(cls, *arguments)


# -- from options to datasets -------------------------------------------------------------------------------------


def build_datasets(
    config: DataConfig,
    tokenizer: Tokenizer,
    seq_length: int,
    seed: int,
    sizes: tuple[int, int, int],
    is_built_on_rank: Callable[[], bool] = lambda: True,
) -> list[Optional[Any]]:
    """The train, validation and test datasets, each with at least as many samples as ``sizes`` asks for.

    An item is a dict of ``tokens``, ``labels``, ``position_ids`` ([seq_length] int64), ``loss_mask`` ([seq_length]
    float32) and, if asked for, ``attention_mask``; blends add ``dataset_id``. A split of size 0 is None, and so is
    every split on a rank for which ``is_built_on_rank`` is false.

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
        mcore_config = _Config(**options)
        _leave_out_empty(mcore_config, sizes)
        return _Builder(MockGPTDataset, list(sizes), is_built_on_rank, mcore_config).build()
    options["infilling"] = infilling_of(config, tokenizer)
    indices = check_corpora(config, tokenizer)
    if not any(sizes):
        return [None, None, None]  # without any, mcore builds mock data
    options["fingerprints"] = {prefix: fingerprint(prefix) for prefix in indices}
    options["path_to_cache"] = config.data_cache_path or f"{next(iter(indices))}.cache"
    blend = config.blend()
    if blend is None:
        wanted = [_weighted(b, indices) if size else None for b, size in zip(config.split_blends(), sizes)]
        for name, flag, size, given in zip(_SPLITS, _PATH_FLAGS, sizes, wanted):
            if size and given is None:
                raise ValueError(f"{flag} is missing: the run asks for {size} {name} samples")
        mcore_config = _Config(blend_per_split=wanted, **options)
    else:
        mcore_config = _Config(blend=_weighted(blend, indices), split=config.split, **options)
        _leave_out_empty(mcore_config, sizes)
        _check_splits(config.split, mcore_config.split_matrix, indices)
    return _Builder(CorpusDataset, list(sizes), is_built_on_rank, mcore_config).build()


def check_corpora(config: DataConfig, tokenizer: Tokenizer) -> dict[str, Index]:
    """Check every corpus that ``config`` names; the indices by prefix, in the order of the flags.

    Raises ``ValueError`` naming the file, as ``check_corpus`` does.
    """
    blends = [config.blend(), *config.split_blends()]
    prefixes = [prefix for blend in blends if blend is not None for prefix in blend[0]]
    found = {prefix: check_corpus(prefix, tokenizer.vocab_size, tokenizer.sha256) for prefix in dict.fromkeys(prefixes)}
    for prefix, index in found.items():
        if read_meta(prefix) is None and not ends_with(prefix, index, tokenizer.eod):
            logging.getLogger(__name__).warning(
                "%s: no document looked at ends with the end-of-document token %d of the run's tokenizer, and no "
                ".meta.json says which tokenizer made the corpus: was it this one?",
                prefix,
                tokenizer.eod,
            )
    return found


def data_identity(config: DataConfig, tokenizer: Tokenizer, seq_length: int, seed: int) -> dict[str, Any]:
    """What determines the order of samples, as JSON: a resumed run must find the same, or the user must say so."""
    blends = {"data_path": config.blend()}
    blends.update(zip(("train_data_path", "valid_data_path", "test_data_path"), config.split_blends()))
    corpora = {
        name: {"weights": blend[1], "fingerprints": [fingerprint(prefix) for prefix in blend[0]]}
        for name, blend in blends.items()
        if blend is not None
    }
    return {
        "corpora": corpora,
        "split": config.split if config.data_path is not None else None,
        "mock_data": config.mock_data,
        "tokenizer": dict(tokenizer.unique_identifiers),
        "seq_length": seq_length,
        "seed": seed,
        "infilling": list(infilling) if (infilling := infilling_of(config, tokenizer)) else None,
    }


def _weighted(blend: Optional[Blend], indices: dict[str, Index]) -> Optional[Blend]:
    """A blend with weights: those given, or the corpora's tokens; none for a single corpus.

    mcore would go through unweighted corpora once only, and then hand out fewer samples than asked for.
    """
    if blend is None:
        return None
    prefixes, weights = blend
    if len(prefixes) == 1:
        return prefixes, None
    return prefixes, weights or [float(indices[prefix].lengths.sum(dtype=np.int64)) for prefix in prefixes]


def _leave_out_empty(mcore_config: _Config, sizes: tuple[int, int, int]) -> None:
    """Build nothing for splits of which no sample is asked for."""
    matrix = mcore_config.split_matrix
    mcore_config.split_matrix = [part if size else None for part, size in zip(matrix, sizes)]


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
