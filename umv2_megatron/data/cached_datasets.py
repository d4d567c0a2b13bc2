"""mcore's datasets with a cache of sample orders that weeks-long runs can rely on.

mcore keeps the orders that it has built as ``.npy`` files. Here

- a cached order belongs to the content of a corpus, not only to its path: mcore names cache files after the path, so a
  corpus made anew under the old name would be read in the order, and by the offsets, of the former one;
- cache files appear at once and complete, so a run killed while writing them can start again; they are read without
  pickle, which mcore allows; and a blend can be built without torch.distributed.

Documents of training samples can be rearranged to teach filling in the middle (``infilling.py``), and read in the
order of their corpus (--data-order sequential), which is what a curriculum needs.
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
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from umv2_megatron.config.data_config import DATA_ORDERS, marks_prefix
from umv2_megatron.data.infilling import Infilling, draws_of, infill
from umv2_megatron.data.scored_tokens import COUNTS, ScoredTokens


@dataclass
class CorpusConfig(GPTDatasetConfig):
    """mcore's options, the content of each corpus, which becomes part of the names of cache files, the order of
    training documents, how they are rearranged, which tokens bear a loss (None: all) by tokens of the text or by the
    marks of another corpus, and which epochs ``streams.py`` wants of a corpus."""

    fingerprints: Optional[dict[str, str]] = None
    data_order: str = DATA_ORDERS[0]
    infilling: Optional[Infilling] = None
    scored: Optional[ScoredTokens] = None
    loss_mask_key: Optional[str] = None
    first_epoch: int = 0
    epochs: int = 1


def cached(dataset: Any, split: str, suffixes: tuple[str, ...], build: Callable[[], tuple]) -> tuple:
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
def without_cache(dataset: Any) -> Iterator[None]:
    """Let mcore build in memory only. It would warn that nothing is saved, which is not so."""
    modules = [cls.__module__ for cls in type(dataset).__mro__]
    config, logger = dataset.config, logging.getLogger(next(name for name in modules if name.startswith("megatron.")))

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

    _marks: Optional[CorpusDataset] = None  # the same samples of the corpus of marks

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*GPTDataset._key_config_attributes(), "fingerprints", "data_order"]

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return cached(self, self.index_split.name, ("document_index", "sample_index", "shuffle_index"), self._order)

    def _order(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The document, sample and shuffle index: mcore's, or of a training set those of its documents as they lie."""
        if self.config.data_order == "sequential" and self.index_split is Split.train:
            return self._sequential_order()
        with without_cache(self):
            return super()._build_document_sample_shuffle_indices()

    def _sequential_order(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        from megatron.core.datasets import helpers  # as late as mcore does, which may have to compile it first

        tokens = self._get_num_tokens_per_epoch()
        epochs = self._get_num_epochs(tokens)
        documents = np.tile(np.asarray(self.indices, dtype=np.int32), epochs)
        samples = helpers.build_sample_idx(
            self.dataset.sequence_lengths,
            documents,
            self.config.sequence_length,
            epochs,
            tokens,
            True,
            self.config.add_extra_token_to_sequence,
        )
        # the types are mcore's: its shuffle index is uint32 as long as it can be
        numbers = np.arange(len(samples) - 1, dtype=np.uint32 if len(samples) < 2**32 - 1 else np.int64)
        return documents, samples, numbers

    def __getitem__(self, idx: Optional[int]) -> dict[str, Any]:
        item = super().__getitem__(idx)
        if self.config.scored is not None:
            # mcore may keep the mask for all samples: make another
            item["loss_mask"] = item["loss_mask"] * self.config.scored.mask(item["tokens"])
        if self.config.loss_mask_key is not None:
            item["loss_mask"] = item["loss_mask"] * self._counts(0 if idx is None else idx)
        return item

    def _counts(self, idx: int) -> torch.Tensor:
        """[seq_length] float32: 1 where the label of sample ``idx`` is marked. The marks lie where the tokens do, so
        that the corpus of marks is read by the same query."""
        if self._marks is None:
            assert self.config.loss_mask_key is not None
            self._marks = copy.copy(self)
            prefix = marks_prefix(self.dataset_path, self.config.loss_mask_key)
            self._marks.dataset = self.build_low_level_dataset(prefix, self.config)
        marks = GPTDataset._query_document_sample_shuffle_indices(self._marks, idx)[0]
        return torch.from_numpy(marks[1:] == COUNTS).float()

    def _query_document_sample_shuffle_indices(self, idx: int) -> tuple:
        """The tokens of sample ``idx`` [seq_length + 1], the documents that they are from, and what mcore 0.19 adds."""
        sample, *others = super()._query_document_sample_shuffle_indices(idx)
        config = self.config
        # losses of validation stay those of texts as they are
        if config.infilling is not None and self.index_split is Split.train:
            seed, number = self._seed_and_number(int(idx))
            sample = infill(sample, config.infilling, draws_of(seed, config.fingerprints[self.dataset_path], number))
        return sample, *others

    def _seed_and_number(self, idx: int) -> tuple[int, int]:
        """The seed of the order that sample ``idx`` is in, and the sample's number in it."""
        return self.config.random_seed, idx


class CorpusBlend(BlendedDataset):
    """mcore's BlendedDataset with the same cache."""

    def _build_indices(self) -> tuple[np.ndarray, np.ndarray]:
        def build() -> tuple:
            with without_cache(self):
                return super(CorpusBlend, self)._build_indices()

        return cached(self, self.split.name, ("dataset_index", "dataset_sample_index"), build)


class Builder(BlendedMegatronDatasetBuilder):
    @staticmethod
    def build_generic_dataset(cls: Any, *arguments: Any) -> Any:
        # mcore names its blend class in the middle of a method; this is the one place it passes through.
        cls = CorpusBlend if cls is BlendedDataset else cls
        return BlendedMegatronDatasetBuilder.build_generic_dataset(cls, *arguments)
