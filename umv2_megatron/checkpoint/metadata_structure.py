"""Whether unpickled `.metadata` of torch.distributed.checkpoint has the structure that its readers take for granted.

A pickle sets the attributes of allowed classes to whatever it holds; a damaged or forged one leaves some out.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)


def structure_fault(metadata: Any) -> str | None:
    """What is wrong with ``metadata``, in some words; None where every part has its type and tensors their chunks."""
    if not isinstance(metadata, Metadata):
        return "it is another object"
    stored = _of(metadata, "state_dict_metadata", dict)
    places = _of(metadata, "storage_data", dict)
    if stored is None or places is None:
        return "it lists no tensors or no files"
    for key, entry in stored.items():
        if not isinstance(key, str) or not (isinstance(entry, BytesStorageMetadata) or _is_tensor(entry)):
            return f"its entry {str(key)[:200]!r} describes no tensor"
    for index, place in places.items():
        known = isinstance(index, MetadataIndex) and isinstance(getattr(index, "fqn", None), str)
        if not known or index.fqn not in stored or not isinstance(getattr(place, "relative_path", None), str):
            return "its list of files is damaged"
        numbers = [getattr(place, name, None) for name in ("offset", "length")]
        if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            return f"it puts {index.fqn[:200]} at no place of {place.relative_path[:200]!r}"
    return None


def _of(owner: Any, name: str, kind: type) -> Any:
    """An attribute of ``owner``, None where it has none of this kind."""
    found = getattr(owner, name, None)
    return found if isinstance(found, kind) else None


def _is_tensor(entry: Any) -> bool:
    """Whether ``entry`` describes a tensor whose chunks lie inside it."""
    if not isinstance(entry, TensorStorageMetadata) or not _is_shape(getattr(entry, "size", None)):
        return False
    properties = _of(entry, "properties", TensorProperties)
    chunks = _of(entry, "chunks", list)
    if chunks is None or not isinstance(getattr(properties, "dtype", None), torch.dtype):
        return False
    return all(_is_chunk(chunk, entry.size) for chunk in chunks)


def _is_chunk(chunk: Any, size: torch.Size) -> bool:
    if not isinstance(chunk, ChunkStorageMetadata):
        return False
    offsets, sizes = getattr(chunk, "offsets", None), getattr(chunk, "sizes", None)
    if not _is_shape(offsets) or not _is_shape(sizes) or not len(offsets) == len(sizes) == len(size):
        return False
    return all(start + length <= whole for start, length, whole in zip(offsets, sizes, size))


def _is_shape(found: Any) -> TypeGuard[torch.Size]:
    return isinstance(found, torch.Size) and all(type(number) is int and number >= 0 for number in found)
