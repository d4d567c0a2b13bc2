"""The files of mcore's `torch_dist` checkpoint format beside the shards, read without trusting them; names of keys.

`.metadata` is a pickle of data classes of torch.distributed.checkpoint, which says what each shard file holds; it is
read by an unpickler that knows nothing else. `common.pt` is read with `weights_only=True`. Shards are written by
`shard_writing.py` and read by `shard_reading.py`. mcore has only the format and the tensors' descriptions here
(`mapping.py`): its own writers and readers change from version to version, and trust what they read.
"""

import dataclasses
import io
import json
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from umv2_megatron.checkpoint.many_objects import many_objects
from umv2_megatron.checkpoint.metadata_structure import structure_fault
from umv2_megatron.checkpoint.store import METADATA_FILE
from umv2_megatron.durable_files import CheckpointError, FileWindow, check_relative_path
from umv2_megatron.user_paths import is_remote

COMMON_FILE = "common.pt"
FORMAT_FILE = "metadata.json"
"""mcore's own name for the file that says which format the directory has."""
_DCP = "torch.distributed.checkpoint"
_ALLOWED_GLOBALS = {
    *((f"{_DCP}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((f"{_DCP}.metadata", name) for name in ("TensorStorageMetadata", "BytesStorageMetadata")),
    *((f"{_DCP}.metadata", name) for name in ("ChunkStorageMetadata", "_MEM_FORMAT_ENCODING")),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    (f"{_DCP}.filesystem", "_StoragePrefix"),
    # mcore's own writer also stores every rank's plan.
    *((f"{_DCP}.planner", name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("collections", "OrderedDict"),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Builds only the plain data classes of `.metadata`; anything else in the pickle is refused before it is called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED_GLOBALS:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong there")


def read_metadata_safely(
    directory: Path, data: bytes | None = None, sizes: Mapping[str, int] | None = None
) -> Metadata:
    """Read `.metadata` of a torch_dist checkpoint without running anything that a forged file may name.

    data: the file's bytes, where the caller has read them. sizes: bytes of each file of the checkpoint by name, where
    the caller knows them, so that no file is looked at.

    Raises CheckpointError when the file is not plain metadata, or names a shard that is outside the directory,
    missing, or shorter than the metadata says.
    """
    path = directory / METADATA_FILE
    try:
        if sizes is None and is_remote(directory):
            sizes = directory.sizes_below()  # one request instead of one for each file
        with many_objects():
            metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes() if data is None else data)).load()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise CheckpointError(f"{path} is not the metadata of a torch_dist checkpoint: {error}") from error
    fault = structure_fault(metadata)
    if fault:
        raise CheckpointError(f"{path} is not the metadata of a torch_dist checkpoint: {fault}")
    needed: dict[str, int] = {}
    for info in metadata.storage_data.values():
        name = str(info.relative_path)
        needed[name] = max(needed.get(name, 0), info.offset + info.length)
    for name, size in needed.items():
        check_relative_path(name, path)
        shard = directory / name
        if sizes is not None:
            actual = sizes.get(name, 0)
        else:
            actual = shard.stat().st_size if shard.is_file() else 0
        if actual < size:
            raise CheckpointError(f"{shard} has {actual} bytes: {METADATA_FILE} needs at least {size}")
    return metadata


def count_written(directory: Path) -> tuple[int, int]:
    """Number of keys and bytes of tensor data that the shards in `directory` hold, by their metadata."""
    metadata = read_metadata_safely(directory)
    total = 0
    for entry in metadata.state_dict_metadata.values():
        if isinstance(entry, TensorStorageMetadata):
            elements = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
            total += elements * entry.properties.dtype.itemsize
    return len(metadata.state_dict_metadata), total


def load_plain(source: Any, name: str) -> Any:
    """torch.load for tensors and plain data only, whatever the environment says about its default.

    Raises CheckpointError naming ``name``, also for a damaged file, and OSError where ``source`` cannot be read.
    """
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL (\S+)", str(error))
        held = f"holds {match[1]}, which is not plain data" if match else "is damaged"
        raise CheckpointError(f"{name} {held}: do not use this checkpoint") from error
    except OSError:
        raise
    except Exception as error:  # a damaged archive or pickle can raise nearly anything
        if isinstance(source, FileWindow) and source.failure is not None:
            raise source.failure from error
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise CheckpointError(f"{name} is damaged ({text}): do not use this checkpoint") from error


def load_common(directory: Path, data: bytes | None = None) -> dict[str, Any]:
    """`common.pt`: iteration, schedule, counters, settings. data: the file's bytes, where the caller has read them."""
    path = directory / COMMON_FILE
    if data is None and is_remote(path):
        data = path.read_bytes()
    common = load_plain(str(path) if data is None else io.BytesIO(data), str(path))
    if not isinstance(common, dict):
        raise CheckpointError(f"{path} holds no mapping: do not use this checkpoint")
    return common


def format_text() -> bytes:
    """Content of `metadata.json`, as mcore's ``save_config`` writes it into a local directory."""
    return json.dumps(dataclasses.asdict(CheckpointingConfig("torch_dist", 1))).encode()


def is_extra_state(key: str) -> bool:
    """Whether a tensor's or object's name is that of a module's extra state.

    Transformer Engine's layers keep the state of their FP8 scaling there, the local layers nothing, and the two kinds
    have it in different places: it never decides whether a checkpoint fits a model.
    """
    return key.split("/")[0].endswith("._extra_state")  # objects are named KEY/shard_0_1


_OPTIMIZER_KEY = re.compile(r"(chained_\d+\.)?optimizer\.")


def is_optimizer_state(key: str) -> bool:
    """Whether a tensor's or object's name is that of optimizer state (a chain's parts once had a prefix)."""
    return _OPTIMIZER_KEY.match(key) is not None


def unique_key(item: ShardedTensor | ShardedObject) -> str:
    """The name of one tensor or object inside the checkpoint."""
    return item.unique_key if isinstance(item, ShardedObject) else item.key
