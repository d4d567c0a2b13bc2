"""Where a checkpoint goes: a directory that all ranks see, or one of each rank's own, which may be on its node's disk.

    SharedPlace   the ranks write one checkpoint together, each part of it once: --save, and
                  --non-persistent-ckpt-type global
    LocalPlace    every rank writes all that it holds, also what another rank holds as well, and never needs a file of
                  another rank: --non-persistent-ckpt-type local

        <dir>/rank_00003/iter_0001000/   a checkpoint as store.py describes it, of one shard

After every step all ranks agree, in both. Ranks that see only their own files cannot see whether the parts of a save
are all there. So rank 0 draws a token for each save, which is in the config.json of every part; a checkpoint is there
if every rank has its part of it, whole, in the same layout and with the same token. Old ones are removed when all ranks
have published theirs, so that a kill at any moment leaves a checkpoint of which all have a part.

Non-persistent checkpoints (of either kind) also carry the history that they belong to: they count only as long as the
run has not gone another way since (`training/non_persistent.py`).
"""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from umv2_megatron.checkpoint import publishing, saved_config
from umv2_megatron.checkpoint.agreement import attempt, tell_all
from umv2_megatron.checkpoint.checksum_files import read_verified
from umv2_megatron.checkpoint.manifest import Manifest
from umv2_megatron.checkpoint.shard_writing import Piece, WrittenShard, write_shard
from umv2_megatron.checkpoint.store import CheckpointStore
from umv2_megatron.checkpoint.verification import verify_alone, verify_together
from umv2_megatron.durable_files import CheckpointError, NotSavedError

ABOUT = "non_persistent"
"""Key of config.json under which a non-persistent checkpoint says which history, save, rank and layout it is of."""


@dataclass(frozen=True)
class Found:
    """Non-persistent checkpoints: ``usable`` ones, the newest first; for each other iteration ``why_not``. The same on
    all ranks."""

    usable: list[int]
    why_not: dict[int, str]


class SharedPlace:
    """A directory that all ranks see. ``history`` of non-persistent checkpoints; None: these are the persistent ones.
    Its methods are collectives, and raise CheckpointError on all ranks alike."""

    alone = False

    def __init__(self, store: CheckpointStore, history: str | None = None) -> None:
        self.store = store
        self.history = history
        self.kind = "persistent" if history is None else "global"

    def begin(self, iteration: int, pieces: list[Piece]) -> int:
        """Make the temporary directory, and return the bytes that are to be written."""
        with self._or_not_saved():
            return publishing.begin_together(self.store, iteration, pieces)

    def publish(
        self,
        iteration: int,
        write: Callable[[], WrittenShard],
        needed: int,
        common: dict[str, Any],
        config: dict[str, Any],
    ) -> None:
        """Publish what ``write`` says that each rank has written."""
        if self.history is not None:
            config = {**config, ABOUT: {"type": self.kind, "history": self.history}}
        with self._or_not_saved():
            publishing.publish_together(self.store, iteration, write, needed, common, config)

    def discard(self, iteration: int) -> None:
        """Remove what a save that failed has left. No collective."""
        if torch.distributed.get_rank() == 0:
            self.store.discard(iteration)

    def verify(self, iteration: int, *, full: bool) -> tuple[Manifest, int]:
        """See `verify_together`."""
        return verify_together(self.store, iteration, full=full)

    def find(self) -> Found:
        """The non-persistent checkpoints of this history; they can be loaded in any layout."""

        def look() -> Found:
            found = Found([], {})
            for iteration in reversed(self.store.iterations()) if torch.distributed.get_rank() == 0 else ():
                fault = _fault(self.store, iteration, {"history": self.history})
                if isinstance(fault, str):
                    found.why_not[iteration] = fault
                else:
                    found.usable.append(iteration)
            return found

        return tell_all(attempt("looking for non-persistent checkpoints", look))

    def remove_after(self, iteration: int) -> None:
        """Remove the checkpoints that are newer than ``iteration``. No collective."""
        if torch.distributed.get_rank() == 0:
            for each in self.store.iterations():
                if each > iteration:
                    self.store.remove(each)

    @contextlib.contextmanager
    def _or_not_saved(self) -> Iterator[None]:
        with _or_not_saved() if self.history is not None else contextlib.nullcontext():
            yield


class LocalPlace:
    """A directory of this rank alone, ``<directory>/rank_00003``. ``history`` as above, ``layout``: what must be the
    same for a rank to find in its files all that it holds.

    Its methods are collectives, and raise CheckpointError on all ranks alike.
    """

    alone = True
    kind = "local"

    def __init__(self, directory: Path, history: str, layout: dict[str, Any], flag: str) -> None:
        self.directory = directory
        self.rank = torch.distributed.get_rank()
        self.store = CheckpointStore(directory / f"rank_{self.rank:05d}", flag=flag, warn=self._warn)
        self.history = history
        self._layout = {**layout, "rank": self.rank}

    def _warn(self, message: str) -> None:
        print(f"WARNING: rank {self.rank}: {message}", flush=True)

    def begin(self, iteration: int, pieces: list[Piece]) -> int:
        """Make this rank's temporary directory, and return the bytes that it is to write."""
        needed = sum(piece.num_bytes for piece in pieces)
        with _or_not_saved():
            self._attempt("starting the local checkpoint", lambda: self.store.begin(iteration, needed))
        return needed

    def publish(
        self,
        iteration: int,
        write: Callable[[], WrittenShard],
        needed: int,
        common: dict[str, Any],
        config: dict[str, Any],
    ) -> None:
        """Publish what ``write`` says that this rank has written; where a rank fails, no rank keeps its part."""
        token = tell_all(secrets.token_hex(8))
        config = {**config, ABOUT: {"type": "local", "history": self.history, "token": token, **self._layout}}
        with _or_not_saved():
            shard = self._attempt(
                "writing the local checkpoint", lambda: publishing.written(self.store, iteration, write, needed)
            )
            try:
                self._attempt(
                    "publishing the local checkpoint",
                    lambda: publishing.publish(self.store, iteration, [shard], common, config, alone=True),
                )
            except BaseException:
                with contextlib.suppress(CheckpointError):
                    self.store.remove(iteration)
                raise
        self.store.prune(iteration)

    def discard(self, iteration: int) -> None:
        """Remove what a save that failed has left. No collective."""
        self.store.discard(iteration)

    def verify(self, iteration: int, *, full: bool) -> tuple[Manifest, int]:
        """See `verify_alone`."""
        return verify_alone(self.store, iteration, full=full)

    def find(self) -> Found:
        """The checkpoints of which every rank has its part, of one save, in the present layout."""
        expected = {"history": self.history, **self._layout}
        mine: dict[int, tuple[str | None, str]] = {}
        where = f"rank {self.rank} on {socket.gethostname()}"

        def look() -> None:
            for iteration in self.store.iterations():
                found = _fault(self.store, iteration, expected)
                mine[iteration] = (None, f"{where}: {found}") if isinstance(found, str) else (str(found["token"]), "")

        attempt("looking for local checkpoints", look)
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, (where, mine))
        found = Found([], {})
        for iteration in sorted({each for _, parts in everyone for each in parts}, reverse=True):
            fault = _missing(iteration, everyone)
            if fault is None:
                found.usable.append(iteration)
            else:
                found.why_not[iteration] = fault
        return found

    def remove_after(self, iteration: int) -> None:
        """Remove this rank's checkpoints that are newer than ``iteration``. No collective."""
        for each in self.store.iterations():
            if each > iteration:
                self.store.remove(each)

    def _attempt(self, doing: str, action: Callable[[], Any]) -> Any:
        """As `attempt`; the error names rank and host."""

        def named() -> Any:
            try:
                return action()
            except CheckpointError as error:
                raise CheckpointError(f"rank {self.rank} on {socket.gethostname()}: {error}") from error

        return attempt(doing, named)


Place = SharedPlace | LocalPlace


def write_and_publish(
    place: Place, iteration: int, pieces: list[Piece], common: dict[str, Any], config: dict[str, Any]
) -> None:
    """Write the pieces of all ranks and publish them with ``common`` and ``config``. Collective.

    Raises CheckpointError on every rank when any rank fails; the caller then discards what is there.
    """
    needed = place.begin(iteration, pieces)
    rank, directory = torch.distributed.get_rank(), place.store.temporary_path(iteration)
    place.publish(iteration, lambda: write_shard(directory, rank, pieces), needed, common, config)


@contextlib.contextmanager
def _or_not_saved() -> Iterator[None]:
    """A run goes on without a non-persistent checkpoint: an error of all ranks becomes one that says so."""
    try:
        yield
    except CheckpointError as error:
        raise NotSavedError(str(error)) from error


def _fault(store: CheckpointStore, iteration: int, expected: dict[str, Any]) -> dict[str, Any] | str:
    """What a non-persistent checkpoint says of itself, or why it cannot be used: damaged, or not as ``expected``."""
    try:
        manifest = store.verify(iteration, hashes=False)
        read_verified(store.path(iteration), saved_config.CONFIG_FILE, manifest)
        about = saved_config.read_config(store, iteration).get(ABOUT)
    except CheckpointError as error:
        return str(error)
    if not isinstance(about, dict):
        return f"{store.path(iteration)} is none of a run with --non-persistent-save-interval"
    for key, value in expected.items():
        if about.get(key) != value:
            if key == "history":
                return f"{store.path(iteration)} is of another run, or of a time before this run has gone back"
            return f"{store.path(iteration)} was saved with {key} {about.get(key)}, here it is {value}"
    return about


def _missing(iteration: int, everyone: list[tuple[str, dict[int, tuple[str | None, str]]]]) -> str | None:
    """Why the ranks have not all their part of one save; None where they have. everyone: name of each rank, and its
    checkpoints: token, or None and what is wrong."""
    without = [name for name, parts in everyone if iteration not in parts]
    faults = [fault for _, parts in everyone for token, fault in [parts.get(iteration, ("", ""))] if token is None]
    tokens = {token for _, parts in everyone for token, _ in [parts.get(iteration, ("", ""))] if token}
    if faults:
        return faults[0] + (f" (and {len(faults) - 1} ranks more)" if len(faults) > 1 else "")
    if without:
        more = f" and {len(without) - 1} more have" if len(without) > 1 else " has"
        return f"{without[0]}{more} no part of it"
    if len(tokens) > 1:
        return "the ranks' parts are of different saves"
    return None
