"""Reading what a rank needs out of the shards of mcore's `torch_dist` format, in any layout, and nothing more.

Every rank computes which stored parts overlap its own pieces (`torch.distributed.checkpoint.planner_helpers`), reads
each of those once, one at a time, and copies the overlaps into its tensors, in place. Everything is unpickled with
`weights_only=True`. Nothing here is collective but `compare`.

torch's own `FileSystemReader` is not used: it reads a stored part again for every overlap, and has no place to check
one.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Container, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict, ShardedTensor, StateDict
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from umv2_megatron.checkpoint.agreement import gather, tell_all
from umv2_megatron.checkpoint.checksum_files import Checksums
from umv2_megatron.checkpoint.fp8_state import from_plain
from umv2_megatron.checkpoint.tensor_checks import checksum
from umv2_megatron.checkpoint.torch_dist_io import is_extra_state, load_plain, unique_key
from umv2_megatron.durable_files import CheckpointError, DamageError, FileWindow, open_to_read, unreadable
from umv2_megatron.user_paths import is_remote


class ShardReader:
    """Reads pieces of the checkpoint in ``directory``, which ``metadata`` describes, and counts the bytes.

    checksums: of the stored parts; each part is compared with its own after it was read.
    """

    def __init__(self, directory: Path, metadata: Metadata, checksums: Checksums) -> None:
        self.directory = directory
        self.metadata = metadata
        self._checksums = checksums
        self._remote: tuple[str, BinaryIO] | None = None
        self.bytes_read = 0

    def fill(self, sharded: ShardedStateDict, recipe: Callable[[], Any]) -> StateDict:
        """``sharded`` with tensors, filled in place, and objects where it has their descriptions.

        recipe: gives Transformer Engine's FP8 recipe of this run, None without FP8. Raises DamageError naming a tensor
        or object that is not what was saved, CheckpointError for one that is not stored whole or not plain data.
        """
        reads: dict[MetadataIndex, list[ReadItem]] = {}
        parts: dict[str, list[ShardedTensor]] = {}
        for item in nested_values(sharded):
            if isinstance(item, ShardedTensor):
                parts.setdefault(item.key, []).append(item)
            else:
                reads[MetadataIndex(item.unique_key)] = []
        for key, items in parts.items():
            for read in self._reads(key, items):
                reads.setdefault(read.storage_index, []).append(read)
        targets = {key: [_target(item) for item in items] for key, items in parts.items()}
        objects = {}
        places = self.metadata.storage_data
        try:
            for index in sorted(reads, key=lambda index: (places[index].relative_path, places[index].offset)):
                if index.offset is None:
                    objects[index.fqn] = self._object(index)
                else:
                    stored = self._tensor(index)
                    for read in reads[index]:
                        target = targets[index.fqn][read.dest_index.index]  # type: ignore[index]
                        part = _narrow(stored, read.storage_offsets, read.lengths)
                        _narrow(target, read.dest_offsets, read.lengths).copy_(part)
        finally:
            self._close()

        def result(item: ShardedTensor | ShardedObject) -> Any:
            if isinstance(item, ShardedTensor):
                return item.data.detach()
            held = objects[item.unique_key][0]  # mcore stores a list of one
            return from_plain(item.unique_key, held, recipe) if is_extra_state(item.unique_key) else held

        return dict_list_map_outplace(result, sharded)

    def _reads(self, key: str, items: Sequence[ShardedTensor]) -> list[ReadItem]:
        """The overlaps of this rank's parts of one tensor with those that are stored."""
        held = self.metadata.state_dict_metadata[key]
        assert isinstance(held, TensorStorageMetadata)
        chunks = [ChunkStorageMetadata(torch.Size(item.global_offset), _sizes(item)) for item in items]
        reads = create_read_items_for_chunk_list(key, held, chunks)
        found = [0] * len(items)
        for read in reads:
            found[read.dest_index.index] += math.prod(read.lengths)  # type: ignore[index]
        for item, chunk, elements in zip(items, chunks, found):
            if elements != math.prod(chunk.sizes) and not item.allow_shape_mismatch:
                raise CheckpointError(
                    f"{self.directory} holds {elements} of the {math.prod(chunk.sizes)} elements of {key} from "
                    f"{tuple(chunk.offsets)} on: do not use this checkpoint"
                )
        return reads

    def _open(self, name: str) -> AbstractContextManager[BinaryIO]:
        """A shard file to read one piece from. Behind a URL it stays open for the next: pieces are read in order, and
        those side by side come with one request."""
        path = self.directory / name
        if not is_remote(path):
            return open(path, "rb", buffering=0)  # type: ignore[return-value]
        if self._remote is None or self._remote[0] != name:
            self._close()
            self._remote = (name, open_to_read(self.directory / name))
        return nullcontext(self._remote[1])

    def _close(self) -> None:
        if self._remote is not None:
            self._remote[1].close()
            self._remote = None

    def _object(self, index: MetadataIndex) -> list[Any]:
        place = self.metadata.storage_data[index]
        path = self.directory / place.relative_path
        try:
            with self._open(str(place.relative_path)) as file:
                data = FileWindow(file, place.offset, place.length).read()
        except OSError as error:
            raise unreadable(path, error) from error
        self.bytes_read += place.length
        self._check(f"{path}: {index.fqn}", place, data)
        held = load_plain(io.BytesIO(data), f"the checkpoint's object {index.fqn}")
        if not isinstance(held, list) or len(held) != 1:
            raise CheckpointError(f"the checkpoint's object {index.fqn} is no list of one: do not use this checkpoint")
        return held

    def _tensor(self, index: MetadataIndex) -> torch.Tensor:
        """One stored part, in main memory."""
        place = self.metadata.storage_data[index]
        path = self.directory / place.relative_path
        what = f"{path}: {index.fqn} at {tuple(index.offset or ())}"
        try:
            with self._open(str(place.relative_path)) as file:
                stored = load_plain(FileWindow(file, place.offset, place.length), what)
        except OSError as error:
            raise unreadable(path, error) from error
        except CheckpointError as error:
            if self._checksums.of(place.relative_path, place.offset) is None:
                raise  # the file has its hash: it was written like that
            raise DamageError(str(error)) from error
        self.bytes_read += place.length
        held = self.metadata.state_dict_metadata[index.fqn]
        expected = (held.properties.dtype, tuple(held.chunks[index.index].sizes))  # type: ignore[union-attr, index]
        actual = (stored.dtype, tuple(stored.shape)) if isinstance(stored, torch.Tensor) else (type(stored), ())
        if actual != expected:
            raise DamageError(
                f"{what} is {actual[0]} of shape {actual[1]}: the metadata says {expected[0]} of shape {expected[1]}"
            )
        self._check(what, place, stored)
        return stored

    def _check(self, what: str, place: Any, data: torch.Tensor | bytes) -> None:
        expected = self._checksums.of(place.relative_path, place.offset)
        if expected is not None and (actual := checksum(data)) != expected:
            raise DamageError(f"{what} has checksum {actual}: it had {expected} in memory when it was saved")


def _sizes(item: ShardedTensor) -> torch.Size:
    """Of a part, with axes that only the whole tensor has (experts), which are of size 1."""
    return torch.Size((1,) * item.prepend_axis_num + tuple(item.local_shape))


def _target(item: ShardedTensor) -> torch.Tensor:
    """What to copy into; padding that is not stored stays zero."""
    assert item.data is not None and item.flattened_range is None, f"{item.key} is not a rectangle of data"
    data = item.data.detach()
    if item.allow_shape_mismatch:
        data.zero_()
    return data[(None,) * item.prepend_axis_num]


def _narrow(tensor: torch.Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
    return tensor[tuple(slice(offset, offset + length) for offset, length in zip(offsets, lengths))]


# ---------------------------------------------------------------------- what is asked for and what is there


def drop_unknown_extra_states(sharded: ShardedStateDict, keep: Container[str]) -> None:
    """Do not ask for extra states that the checkpoint does not hold; their modules keep their own."""
    for name, item in list(sharded.items()):
        if isinstance(item, dict):
            drop_unknown_extra_states(item, keep)
        elif isinstance(item, (ShardedObject, ShardedTensor)):
            key = unique_key(item)
            if is_extra_state(key) and key not in keep:
                del sharded[name]


def compare(
    sharded: ShardedStateDict,
    metadata: Metadata,
    directory: Path,
    may_remain: Callable[[str], bool],
    *,
    alone: bool = False,
) -> None:
    """Raise CheckpointError naming every key and shape in which the run's model and the checkpoint differ. Collective,
    unless ``alone``: then the checkpoint is this rank's own.

    may_remain: says of a key in the checkpoint that nobody asks for whether that is intended.
    """
    stored = metadata.state_dict_metadata
    names = sorted(stored)
    place = {key: number for number, key in enumerate(names)}
    asked = np.zeros(len(names), dtype=bool)  # a bit per stored key: rank 0 gets those of all ranks
    unknown, shapes = set(), []
    for item in nested_values(sharded):
        key = unique_key(item)
        found = stored.get(key)
        if found is None:
            unknown.add(key)
            continue
        asked[place[key]] = True
        if not isinstance(item, ShardedTensor):
            continue
        if not isinstance(found, TensorStorageMetadata):
            shapes.append(f"{key}: an object there, {tuple(item.global_shape)} here")
            continue
        # mcore lets embeddings differ, for the sake of padded vocabularies: that concerns the first axis.
        compared = slice(1, None) if item.allow_shape_mismatch else slice(None)
        if tuple(found.size)[compared] != tuple(item.global_shape)[compared]:
            shapes.append(f"{key}: {tuple(found.size)} there, {tuple(item.global_shape)} here")
    mine = (np.packbits(asked), unknown, shapes)
    everyone = [mine] if alone else gather(mine)
    differences = ""
    if everyone:
        by_anyone = np.unpackbits(np.bitwise_or.reduce([bits for bits, _, _ in everyone]), count=len(names))
        remaining = (names[number] for number in np.flatnonzero(by_anyone == 0))
        lists = (
            ("only in the model", sorted(set().union(*(keys for _, keys, _ in everyone)))),
            ("only in the checkpoint", [key for key in remaining if not is_extra_state(key) and not may_remain(key)]),
            ("other shape", sorted(set().union(*(texts for _, _, texts in everyone)))),
        )
        differences = "; ".join(f"{what}: {_first(found)}" for what, found in lists if found)
    if not alone:
        differences = tell_all(differences)
    if differences:
        raise CheckpointError(
            f"{directory} does not fit this model and layout ({differences}): use the model's "
            "flags it was saved with (config.json beside the shards)"
        )


def _first(names: list[str], count: int = 4) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
