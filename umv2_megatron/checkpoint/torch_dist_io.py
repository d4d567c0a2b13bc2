"""Reading and writing mcore's `torch_dist` checkpoint format without trusting the files and without forking.

mcore's own writer hands every file to a forked process and its results to a spawned manager process; forking a rank
that runs gloo, OpenMP or CUDA threads can hang, and both outlive a killed rank. `InProcessSave` writes the same format
with threads. mcore's own reader unpickles `.metadata` and every object with plain pickle; `SafeLoad` accepts only the
classes that the format needs, and objects only with `weights_only=True`. Both plug into `dist_checkpointing`.

Every error is raised on all ranks at once: a rank that stops alone leaves the others waiting in a collective.
"""

import io
import math
import os
import pickle
import re
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict, ShardedTensor, StateDict
from megatron.core.dist_checkpointing.strategies import torch as mcore_torch
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from umv2_megatron.checkpoint.fp8_state import from_plain, to_plain
from umv2_megatron.checkpoint.metadata_structure import structure_fault
from umv2_megatron.checkpoint.store import METADATA_FILE
from umv2_megatron.durable_files import CheckpointError, check_relative_path

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


def read_metadata_safely(directory: Path) -> Metadata:
    """Read `.metadata` of a torch_dist checkpoint without running anything that a forged file may name.

    Raises CheckpointError when the file is not plain metadata, or names a shard that is outside the directory,
    missing, or shorter than the metadata says.
    """
    path = directory / METADATA_FILE
    try:
        with open(path, "rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
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
        check_relative_path(name, path)
        needed[name] = max(needed.get(name, 0), info.offset + info.length)
    for name, size in needed.items():
        shard = directory / name
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


def raise_together(error: BaseException | None, doing: str) -> None:
    """Raise the same CheckpointError on every rank when any rank passes an error. Collective over all ranks.

    The first failing rank's error decides; a CheckpointError keeps its kind and words, anything else is told with the
    rank and what it was `doing`.
    """
    if isinstance(error, dcp.CheckpointException):  # every rank gets the failures of all: tell the first
        error = next((failure for failure, _ in error.failures.values()), error)
    mine: CheckpointError | None = None
    if isinstance(error, CheckpointError):
        mine = error
    elif error is not None:
        rank = torch.distributed.get_rank()
        mine = CheckpointError(f"{doing} failed on rank {rank}: {type(error).__name__}: {' '.join(str(error).split())}")
    errors: list[CheckpointError | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(errors, mine)
    first = next((item for item in errors if item is not None), None)
    if first is not None:
        raise first from error


def attempt(doing: str, action: Callable[[], Any]) -> Any:
    """Run `action` on this rank, then let all ranks agree: returns its result, or raises on every rank."""
    result, failure = None, None
    try:
        result = action()
    except (Exception, dcp.CheckpointException) as error:  # the latter is a BaseException
        failure = error
    raise_together(failure, doing)
    return result


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


def count_model(sharded: ShardedStateDict) -> tuple[int, int]:
    """Number of keys and bytes of tensor data that all ranks together mean to save. Collective over all ranks."""
    mine = {}
    for item in nested_values(sharded):
        size = math.prod(item.global_shape) * item.dtype.itemsize if isinstance(item, ShardedTensor) else 0
        mine[unique_key(item)] = size
    everyone: list[dict[str, int]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    union: dict[str, int] = {}
    for rank_sizes in everyone:
        union.update(rank_sizes)
    return len(union), sum(union.values())


class InProcessSave(SaveShardedStrategy):
    """Writes mcore's `torch_dist` format, version 1, from this process: one file per rank and thread."""

    def __init__(self, threads: int = 1) -> None:
        super().__init__("torch_dist", 1)
        self.threads = threads

    @property
    def can_handle_sharded_objects(self) -> bool:
        return True

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
        """Write this rank's main replicas of all tensors and objects. Collective over all ranks.

        Weights that the engine keeps in FP8 (--fp8-param-gather) are written in bfloat16, as mcore loads them: a
        checkpoint holds plain tensors only.
        """
        force_all_tensors_to_non_fp8(sharded_state_dict)
        for item in nested_values(sharded_state_dict):
            if isinstance(item, ShardedObject) and is_extra_state(item.unique_key):
                item.data = to_plain(item.unique_key, item.data)
        by_key, _, _ = mcore_torch._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        dcp.save(
            mcore_torch.mcore_to_pyt_state_dict(by_key, False),
            storage_writer=dcp.FileSystemWriter(checkpoint_dir, thread_count=self.threads),
            planner=mcore_torch.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


class _SafeReader(dcp.FileSystemReader):
    def __init__(self, directory: Path, metadata: Metadata) -> None:
        super().__init__(directory)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if getattr(self._metadata, "storage_meta", None) is None:
            self._metadata.storage_meta = StorageMeta()
        self._metadata.storage_meta.load_id = self.load_id
        return self._metadata


def _load_plain(source: Any, name: str) -> Any:
    """torch.load for tensors and plain data only, whatever the environment says about its default."""
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL (\S+)", str(error))
        held = f"holds {match[1]}, which is not plain data" if match else "is damaged"
        raise CheckpointError(f"{name} {held}: do not use this checkpoint") from error
    except OSError:
        raise
    except Exception as error:  # a damaged archive or pickle can raise nearly anything
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise CheckpointError(f"{name} is damaged ({text}): do not use this checkpoint") from error


class _SafeLoadPlanner(mcore_torch.MCoreLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        self.state_dict[name] = _load_plain(value, f"the checkpoint's object {name}")


class SafeCommonLoad(TorchCommonLoadStrategy):
    """Reads `common.pt`, tensors and plain data only."""

    def load_common(self, checkpoint_dir: str | Path) -> StateDict:
        path = os.path.join(checkpoint_dir, COMMON_STATE_FNAME)
        common = _load_plain(path, path)
        if not isinstance(common, dict):
            raise CheckpointError(f"{path} holds no mapping: do not use this checkpoint")
        return common


class SafeLoad(mcore_torch.TorchDistLoadShardedStrategy):
    """Loads `torch_dist` shards after comparing what the ranks ask for with what the checkpoint holds.

    may_remain: says of a key in the checkpoint that nobody asks for whether that is intended.
    recipe: gives Transformer Engine's FP8 recipe of this run, None without FP8.
    """

    def __init__(self, may_remain: Callable[[str], bool], recipe: Callable[[], Any] = lambda: None) -> None:
        super().__init__()
        self.may_remain = may_remain
        self.recipe = recipe

    @property
    def can_handle_sharded_objects(self) -> bool:
        return True

    def load(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> StateDict:
        """Fill the tensors of `sharded_state_dict`. Collective; raises CheckpointError on all ranks."""
        directory = Path(checkpoint_dir)
        metadata = attempt("reading the checkpoint's metadata", lambda: read_metadata_safely(directory))
        _drop_extra_states(sharded_state_dict, keep=metadata.state_dict_metadata.keys())
        self._compare(list(nested_values(sharded_state_dict)), metadata, directory)
        by_key, flat_mapping, renamed = mcore_torch._replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        loaded = mcore_torch.mcore_to_pyt_state_dict(by_key, True)
        tensors = [item for item in nested_values(sharded_state_dict) if isinstance(item, ShardedTensor)]
        strict = [item for item in tensors if not item.allow_shape_mismatch]
        loose = {item.key: item for item in tensors if item.allow_shape_mismatch}
        planner = _SafeLoadPlanner(
            flatten_state_dict=False,  # the keys are flat already
            flatten_sharded_tensors=False,
            shapes_validation_sharded_tensors=strict,
            allow_shape_mismatch_sharded_tensors=loose,
        )
        reader = _SafeReader(directory, metadata)
        attempt("reading the checkpoint's shards", lambda: dcp.load(loaded, storage_reader=reader, planner=planner))
        values = {key: mcore_torch._unwrap_pyt_sharded_tensor(value) for key, value in loaded.items()}
        extra = [key for key in values if is_extra_state(key)]
        attempt("restoring FP8 states", lambda: values.update({key: self._extra(key, values[key]) for key in extra}))
        result = mcore_torch._replace_sharded_keys_with_state_dict_keys(values, flat_mapping, renamed)
        mcore_torch._restore_dict_types(result, sharded_state_dict)
        return result

    def _extra(self, key: str, value: Any) -> Any:
        """``value`` as mcore has objects, in lists of one for each rank's part."""
        if isinstance(value, list):
            return [self._extra(key, part) for part in value]
        return from_plain(key, value, self.recipe)

    def _is_wanted(self, key: str) -> bool:
        """Whether somebody should have asked for this key of the checkpoint."""
        return not is_extra_state(key) and not self.may_remain(key)

    def _compare(self, items: Iterable[ShardedTensor | ShardedObject], metadata: Metadata, directory: Path) -> None:
        """Name every key and shape in which the run's model and the checkpoint differ."""
        stored = metadata.state_dict_metadata
        requested = {unique_key(item): getattr(item, "global_shape", None) for item in items}
        shapes = []
        for item in items:
            found = stored.get(unique_key(item))
            if not isinstance(found, TensorStorageMetadata) or not isinstance(item, ShardedTensor):
                continue
            # mcore lets embeddings differ, for the sake of padded vocabularies: that concerns the first axis.
            compared = slice(1, None) if item.allow_shape_mismatch else slice(None)
            if tuple(found.size)[compared] != tuple(item.global_shape)[compared]:
                shapes.append(f"{item.key}: {tuple(found.size)} there, {tuple(item.global_shape)} here")
        mine = (set(requested), sorted(shapes))
        everyone: list[tuple[set[str], list[str]]] = [mine] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, mine)
        asked = set().union(*(keys for keys, _ in everyone))
        differences = (
            ("only in the model", sorted(asked - stored.keys())),
            ("only in the checkpoint", sorted(filter(self._is_wanted, stored.keys() - asked))),
            ("other shape", sorted(set().union(*(set(texts) for _, texts in everyone)))),
        )
        found = [f"{what}: {_first(names)}" for what, names in differences if names]
        if found:
            raise CheckpointError(
                f"{directory} does not fit this model and layout ({'; '.join(found)}): use the model's "
                "flags it was saved with (config.json beside the shards)"
            )


def _drop_extra_states(state: ShardedStateDict, keep: Container[str]) -> None:
    """Do not ask for extra states that the checkpoint does not hold; their modules keep their own."""
    for name, item in list(state.items()):
        if isinstance(item, dict):
            _drop_extra_states(item, keep)
        elif isinstance(item, (ShardedObject, ShardedTensor)):
            key = unique_key(item)
            if is_extra_state(key) and key not in keep:
                del state[name]


def _first(names: list[str], count: int = 4) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
