"""What a checkpoint holds, from its metadata: no tensor is loaded, and nothing is unpickled freely."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.serialization import load_content_metadata
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from umv2_megatron.checkpoint import saved_config
from umv2_megatron.checkpoint.optimizer_state import is_main_param
from umv2_megatron.checkpoint.store import CheckpointError, CheckpointStore, NoCheckpointError
from umv2_megatron.checkpoint.torch_dist_io import (
    METADATA_FILE,
    is_optimizer_state,
    load_common,
    read_metadata_safely,
)
from umv2_megatron.user_paths import user_path

KINDS = ("tables", "weights", "buffers", "moments", "main parameters", "other")
_BUFFERS = re.compile(r"\.(memory|engram)\.(perm|multipliers|canonical|retrieval\.[ut])$")
TABLES = re.compile(r"\.(memory|engram)\.table\.")
"""In the key of a value table, here and in an export."""


@dataclass(frozen=True)
class Entry:
    """One tensor or object. ``shape`` is that of the whole tensor; an object has none and is stored in ``bytes``."""

    key: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    shards: int


@dataclass(frozen=True)
class Contents:
    """A checkpoint: what it holds and who saved it."""

    directory: Path
    iteration: int
    saved_by: dict[str, Any]
    entries: list[Entry]

    def totals(self) -> dict[str, tuple[int, int]]:
        """(keys, bytes) by kind."""
        found = {}
        for kind in KINDS:
            of_kind = [entry for entry in self.entries if entry.kind == kind]
            found[kind] = (len(of_kind), sum(entry.bytes for entry in of_kind))
        return found

    def matching(self, pattern: str) -> list[Entry]:
        """The entries whose key fits a pattern of the shell (``*`` and ``?``)."""
        return [entry for entry in self.entries if fnmatchcase(entry.key, pattern)]

    def as_json(self, pattern: str) -> dict[str, Any]:
        """Plain data for --json."""
        return {
            "directory": str(self.directory),
            "iteration": self.iteration,
            "saved_by": self.saved_by,
            "keys": [dataclasses.asdict(entry) for entry in self.matching(pattern)],
            "totals": {kind: {"keys": keys, "bytes": size} for kind, (keys, size) in self.totals().items()},
        }


def locate(directory: str | Path, iteration: int | None = None) -> tuple[CheckpointStore, int]:
    """The store and the iteration that ``directory`` means: a --save directory (without ``iteration`` the one that its
    tracker names, or the newest), or one of its iter_* directories.

    Raises ``CheckpointError`` when there is no such checkpoint.
    """
    path = user_path(directory)
    own = re.fullmatch(r"iter_(\d{7,})", path.name)
    if own and (path / METADATA_FILE).exists():
        if iteration not in (None, int(own[1])):
            raise CheckpointError(f"iteration {iteration} is asked for, but {path} is {int(own[1])}: leave it out")
        return CheckpointStore(path.parent), int(own[1])
    store = CheckpointStore(path)
    there = store.iterations()
    if not there:
        raise NoCheckpointError(f"{path} holds no checkpoint: give the --save directory of a run")
    if iteration is None:
        tracked = store.read_tracker()
        iteration = tracked if tracked in there else there[-1]
    if iteration not in there:
        raise CheckpointError(f"iteration {iteration} is asked for, but {path} holds {', '.join(map(str, there))}")
    return store, iteration


def read_contents(store: CheckpointStore, iteration: int) -> Contents:
    """Read metadata, common state and configuration. Raises ``CheckpointError`` naming the file at fault."""
    path = store.path(iteration)
    metadata = read_metadata_safely(path)
    stored_bytes: dict[str, int] = {}
    for index, part in metadata.storage_data.items():
        stored_bytes[index.fqn] = stored_bytes.get(index.fqn, 0) + part.length
    entries = []
    for key, held in sorted(metadata.state_dict_metadata.items()):
        if isinstance(held, TensorStorageMetadata):
            dtype = held.properties.dtype
            size = sum(math.prod(chunk.sizes) for chunk in held.chunks) * dtype.itemsize
            name = str(dtype).removeprefix("torch.")
            entries.append(Entry(key, _kind(key), name, tuple(held.size), size, len(held.chunks)))
        else:
            entries.append(Entry(key, "other", "object", (), stored_bytes.get(key, 0), 1))
    return Contents(path, iteration, _saved_by(store, iteration), entries)


def _kind(key: str) -> str:
    last = key.rsplit(".", 1)[-1]
    if is_main_param(key) or (is_optimizer_state(key) and last == "param"):
        return "main parameters"
    if is_optimizer_state(key):
        # by parameter, or (mcore's dp_reshardable) by gradient buffer
        return "moments" if key.startswith("optimizer.state.") or last.startswith("exp_avg") else "other"
    if _BUFFERS.search(key):
        return "buffers"
    return "tables" if TABLES.search(key) else "weights"


def _saved_by(store: CheckpointStore, iteration: int) -> dict[str, Any]:
    """The layout: parallel sizes by name, how tables are sharded, and the form of the optimizer's state."""
    try:
        common = load_common(store.path(iteration))
    except OSError as error:
        raise CheckpointError(f"{error.filename or store.path(iteration)} cannot be read: {error.strerror}") from error
    config = saved_config.read_config(store, iteration)
    values = config["values"]
    metadata = load_content_metadata(preloaded_state_dict=common) or {}
    layout = common.get("layout", {})
    found = {"ranks" if name == "world" else f"{name} parallel": size for name, size in layout.items()}
    if found.get("memory parallel", 1) > 1:
        found["memory parallel mode"] = values.get("memory_parallel_mode")
    found["distributed optimizer"] = values.get("use_distributed_optimizer")
    if values.get("optimizer", "adam") != "adam":
        found["optimizer"] = values["optimizer"]
    by_parameter = "by parameter" if "optimizer_groups" in common else None
    found["optimizer state"] = metadata.get("distrib_optim_sharding_type", by_parameter)
    return found
