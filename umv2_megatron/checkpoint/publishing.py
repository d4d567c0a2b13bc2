"""A save from the pieces on: all ranks write theirs, rank 0 describes what they have written and publishes it.

    begin         rank 0 makes the temporary directory, if the disk has the space
    write_shard   every rank, for itself (`shard_writing.py`): the long part, and the only one that needs no other rank
    publish       rank 0, with what `write_shard` has returned on every rank

`places.py` says where to. A save in the background (`background.py`) runs the middle step in another process, on copies
of the pieces.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from umv2_megatron.checkpoint.agreement import attempt, gather, tell_all
from umv2_megatron.checkpoint.many_objects import many_objects
from umv2_megatron.checkpoint.saved_config import CONFIG_FILE
from umv2_megatron.checkpoint.shard_writing import (
    Piece,
    WrittenShard,
    joined_metadata,
    write_hashed,
    write_metadata,
)
from umv2_megatron.checkpoint.store import METADATA_FILE, CheckpointStore
from umv2_megatron.checkpoint.torch_dist_io import COMMON_FILE, FORMAT_FILE, format_text
from umv2_megatron.durable_files import CheckpointError


def begin_together(store: CheckpointStore, iteration: int, pieces: list[Piece]) -> int:
    """Make the temporary directory, and return the bytes of the pieces of all ranks. Collective.

    Raises CheckpointError on every rank, also where the disk has not the space.
    """
    needed = tell_all(sum(gather(sum(piece.num_bytes for piece in pieces))))
    is_main = torch.distributed.get_rank() == 0
    attempt("starting the checkpoint", lambda: store.begin(iteration, needed) if is_main else None)
    return needed


def publish_together(
    store: CheckpointStore,
    iteration: int,
    write: Callable[[], WrittenShard],
    needed: int,
    common: dict[str, Any],
    config: dict[str, Any],
) -> None:
    """Take from ``write`` what this rank has written, and publish that of all ranks. Collective.

    needed: from `begin_together`. Raises CheckpointError on every rank when any rank fails; the caller then removes the
    temporary directory.
    """
    shards = gather(attempt("writing the shards", lambda: written(store, iteration, write, needed)))
    attempt("publishing the checkpoint", lambda: publish(store, iteration, shards, common, config) if shards else None)


def written(
    store: CheckpointStore, iteration: int, write: Callable[[], WrittenShard], needed: int
) -> WrittenShard:
    """What ``write`` says that this rank has written; its failure as a CheckpointError. Not collective."""
    try:
        return write()
    except (OSError, RuntimeError) as error:  # the latter from torch.save
        raise explained(store, error, store.temporary_path(iteration), needed) from error


def publish(
    store: CheckpointStore,
    iteration: int,
    shards: Sequence[WrittenShard],
    common: dict[str, Any],
    config: dict[str, Any],
    *,
    alone: bool = False,
) -> None:
    """Write the files that describe the shards of all ranks, and publish it. Not collective: one process calls it.

    alone: ``shards`` is that of one rank, which need not be whole; and older checkpoints stay, until all ranks have
    published theirs. Raises CheckpointError, also where the shards are not whole together.
    """
    directory = store.temporary_path(iteration)
    sealed = {name: seal for shard in shards for name, seal in shard.sealed.items()}
    tensor_bytes = 0
    try:
        with many_objects():
            metadata, tensor_bytes = joined_metadata(shards, whole=not alone)
            sealed[METADATA_FILE] = write_metadata(directory / METADATA_FILE, metadata)
        text = json.dumps(config, indent=1, sort_keys=True) + "\n"
        sealed[CONFIG_FILE] = write_hashed(directory / CONFIG_FILE, text.encode())
        common_bytes = io.BytesIO()
        torch.save(common, common_bytes)
        # Not getbuffer(): where writing fails, the error's frames hold the view in a cycle, over which the garbage
        # collector of Python 3.12 can crash (CPython issue 111211). getvalue() copies nothing either.
        sealed[COMMON_FILE] = write_hashed(directory / COMMON_FILE, common_bytes.getvalue())
        sealed[FORMAT_FILE] = write_hashed(directory / FORMAT_FILE, format_text())
    except (OSError, RuntimeError) as error:
        raise explained(store, error, directory, tensor_bytes) from error
    num_keys = len(metadata.state_dict_metadata)
    store.publish(iteration, num_keys=num_keys, tensor_bytes=tensor_bytes, sealed=sealed, prune=not alone)


def explained(store: CheckpointStore, error: BaseException, directory: Path, tensor_bytes: int) -> CheckpointError:
    """A one-sentence CheckpointError for a failed write of ``directory``."""
    if not isinstance(error, OSError):
        error = OSError(None, f"{type(error).__name__}: {str(error).splitlines()[0]}")
    return store.explain(error, f"could not write {directory}", tensor_bytes)
