"""Proving a checkpoint before and while it is loaded, by all ranks together; none reads more than its share.

`full`: every file is hashed, each by one rank. `read`: of shards only the parts that are read are checked, by their
checksums (`checksum_files.py`). A shard that has none (of earlier versions, of conversions) is hashed, by one rank,
whichever is asked for; so are the other files.
"""

from __future__ import annotations

from heapq import heapify, heapreplace
from pathlib import Path

import torch

from umv2_megatron.checkpoint.agreement import attempt, tell_all
from umv2_megatron.checkpoint.checksum_files import SHARD, check_hash, checksums_name
from umv2_megatron.checkpoint.manifest import Manifest
from umv2_megatron.checkpoint.store import CheckpointStore
from umv2_megatron.durable_files import CheckpointError, DamageError, UnreachableError, sha256_of, unreadable


def verify_together(store: CheckpointStore, iteration: int, *, full: bool) -> tuple[Manifest, int]:
    """The manifest of a checkpoint whose files are there in their sizes and, as far as asked for, have their hashes;
    and the bytes that this rank has read for that.

    Collective over all ranks; rank 0 looks at names and sizes. Raises DamageError naming the file, on all ranks.
    """
    directory = store.path(iteration)

    def look() -> Manifest | None:
        if torch.distributed.get_rank() != 0:
            return None
        try:
            return store.verify(iteration, hashes=False)
        except UnreachableError:
            raise
        except CheckpointError as error:
            raise DamageError(str(error)) from error

    manifest = tell_all(attempt("looking at the checkpoint's files", look))
    assert manifest is not None
    shares = share_out(
        {name: manifest.files[name][0] for name in _to_hash(manifest, full)}, torch.distributed.get_world_size()
    )
    mine = shares[torch.distributed.get_rank()]
    attempt("hashing the checkpoint's files", lambda: _check_hashes(directory, mine, manifest))
    return manifest, sum(manifest.files[name][0] for name in mine)


def verify_alone(store: CheckpointStore, iteration: int, *, full: bool) -> tuple[Manifest, int]:
    """The same for a checkpoint that this rank alone has written and reads. Collective, too: each rank proves its own,
    and where one is damaged, all raise."""

    def look() -> tuple[Manifest, int]:
        try:
            manifest = store.verify(iteration, hashes=False)
            names = _to_hash(manifest, full)
            _check_hashes(store.path(iteration), names, manifest)
        except CheckpointError as error:
            raise DamageError(f"rank {torch.distributed.get_rank()}: {error}") from error
        return manifest, sum(manifest.files[name][0] for name in names)

    return attempt("proving the checkpoint's files", look)


def _to_hash(manifest: Manifest, full: bool) -> list[str]:
    names = manifest.files.keys()
    if full:
        return sorted(names)
    checked = {name for name in names if name.endswith(SHARD) and checksums_name(name) in names}
    return sorted(names - checked - {checksums_name(name) for name in checked})


def share_out(sizes: dict[str, int], ranks: int) -> list[list[str]]:
    """Files by rank, so that the largest share is about as small as can be; the same on all ranks."""
    shares: list[list[str]] = [[] for _ in range(ranks)]
    load = [(0, rank) for rank in range(ranks)]
    heapify(load)
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        held, rank = load[0]
        shares[rank].append(name)
        heapreplace(load, (held + sizes[name], rank))
    return shares


def _check_hashes(directory: Path, names: list[str], manifest: Manifest) -> None:
    for name in names:
        try:
            actual = sha256_of(directory / name)
        except OSError as error:
            raise unreadable(directory / name, error) from error
        check_hash(directory / name, actual, manifest.files[name][1])
