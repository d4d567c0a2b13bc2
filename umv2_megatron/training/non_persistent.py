"""Non-persistent checkpoints of a run: where they are, which of them a start goes on from, and when they are void.

--save-interval writes persistent checkpoints to --save. --non-persistent-save-interval writes others in between, which
may be lost: to the disks of the nodes, or to another directory. A start goes on from the newest of both.

What is on a node's disk may come from another time: the run has gone back with --ckpt-step, --save was emptied, the
ranks were on other nodes for a while. So the run has a history, a random number in ``<save>``/.non_persistent_history,
which every non-persistent checkpoint carries, and only those of the present history count. A start at which all ranks
have their part of one keeps the history, and removes what is newer than where it goes on: all there is of this history
is on the present nodes. Any other start draws a new one, with which all older ones are void.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
import socket
from collections.abc import Sequence
from pathlib import Path

import torch

from umv2_megatron.checkpoint.agreement import attempt, tell_all
from umv2_megatron.checkpoint.places import Found, LocalPlace, Place, SharedPlace
from umv2_megatron.checkpoint.save_load import Candidate, layout
from umv2_megatron.checkpoint.save_lock import SaveLock, last_host
from umv2_megatron.checkpoint.store import CheckpointStore
from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.durable_files import CheckpointError, DamageError, fsync_path, remove_path, replace_synced
from umv2_megatron.training.initialize import print_rank_0
from umv2_megatron.user_paths import user_path

HISTORY = ".non_persistent_history"
# Settings that decide which rank holds what, beside the numbers of ranks.
SAME_LAYOUT = (
    "optimizer", "use_distributed_optimizer", "num_distributed_optimizer_instances", "memory_parallel_mode",
    "overlap_grad_reduce", "overlap_param_gather", "bucket_size", "pad_buckets_for_high_nccl_busbw",
)  # fmt: skip


class NonPersistent:
    """The non-persistent checkpoints in ``place`` of the run that saves to ``save``. Methods are collectives."""

    def __init__(self, place: Place, save: CheckpointStore) -> None:
        self.place = place
        self.loaded = False  # whether this start has gone on from one of them
        self._save = save
        self._found: Found | None = None

    @property
    def found(self) -> Found:
        """What was there when this start began."""
        if self._found is None:
            self._found = self.place.find()
        return self._found

    def candidates(self, persistent: CheckpointStore, ckpt_step: int | None) -> list[Candidate]:
        """What to load, best first, of these and the checkpoints of ``persistent``; with ``ckpt_step`` that one.

        Where there is no persistent one, only what has been proved, every byte of it: nothing follows after it.
        """
        is_main = torch.distributed.get_rank() == 0
        there = tell_all(attempt("finding a checkpoint", lambda: _candidates(persistent) if is_main else []))
        if ckpt_step is not None and (ckpt_step in there or ckpt_step not in self.found.usable):
            return [Candidate(SharedPlace(persistent), ckpt_step)]
        wanted = self.found.usable if ckpt_step is None else [ckpt_step]
        ours = [Candidate(self.place, iteration) for iteration in wanted]
        if ckpt_step is not None:
            return ours
        if not there:
            ours = [each for each in ours if self._is_good(each)][:1]
        found = merged([Candidate(SharedPlace(persistent), iteration) for iteration in there], ours)
        self.tell_unused(found[0].iteration if found else -1)
        return found

    def tell_unused(self, iteration: int) -> None:
        """Warn of each that is newer than ``iteration`` and cannot be used, with the reason."""
        for each, why in self.found.why_not.items():
            if each > iteration and torch.distributed.get_rank() == 0:
                self._save.warn(f"{self.place.kind} checkpoint {each} is not used: {why}")

    def _is_good(self, candidate: Candidate) -> bool:
        try:
            self.place.verify(candidate.iteration, full=True)
        except DamageError as error:
            if torch.distributed.get_rank() == 0:
                self._save.warn(f"{self.place.kind} checkpoint {candidate.iteration} cannot be used: {error}")
            return False
        return True

    def go_on(self, iteration: int, *, loaded: bool) -> None:
        """The run goes on at ``iteration``; ``loaded``: from one of these."""
        self.loaded = loaded
        keep = iteration
        if not self.found.usable:
            self.place.history = self._new_history()
            keep = -1
        attempt("removing non-persistent checkpoints", lambda: self.place.remove_after(keep))

    def _new_history(self) -> str:
        drawn = tell_all(secrets.token_hex(8))

        def write() -> None:
            if torch.distributed.get_rank() == 0:
                replace_synced(self._save.root / HISTORY, drawn.encode())
                fsync_path(self._save.root)

        attempt("beginning a history of non-persistent checkpoints", write)
        return drawn

    def end(self) -> None:
        """All iterations are done and saved for good: give the space back. A disk that fails now is only told."""
        try:
            attempt("removing non-persistent checkpoints", lambda: self.place.remove_after(-1))
        except CheckpointError as error:
            if torch.distributed.get_rank() == 0:
                self._save.warn(str(error))


def _candidates(store: CheckpointStore) -> list[int]:
    return store.candidates() if store.iterations() else []


def merged(persistent: Sequence[Candidate], others: Sequence[Candidate]) -> list[Candidate]:
    """What to load, best first. persistent: the tracker's, older ones, then newer ones (`CheckpointStore.candidates`).

    Of equal iterations the persistent one; of the others those up to the tracker's count as persistent ones do, and
    those after it come first: they are of the present history.
    """
    tracked = persistent[0].iteration if persistent else -1
    older = [each for each in persistent if each.iteration <= tracked]
    known = {each.iteration for each in older}
    both = older + [each for each in others if each.iteration not in known]
    both.sort(key=lambda each: -each.iteration)
    return both + [each for each in persistent if each.iteration > tracked]


def open_non_persistent(run: RunConfig, save: CheckpointStore, stack: contextlib.ExitStack) -> NonPersistent:
    """Lock the directories of --non-persistent-save-interval for this job. A collective.

    Raises CheckpointError on all ranks where one cannot be made or locked.
    """
    is_main = torch.distributed.get_rank() == 0

    def known() -> tuple[str, str]:
        root = save.root.resolve()
        name = f"{root.parent.name}-{root.name}-{hashlib.sha256(str(root).encode()).hexdigest()[:8]}"
        file = save.root / HISTORY
        return name, file.read_text(encoding="ascii", errors="replace") if file.exists() else "none"

    name, history = tell_all(attempt("reading the history", lambda: known() if is_main else ("", "")))
    place: Place
    training = run.training
    if run.non_persistent_type == "local":
        assert training.non_persistent_local_ckpt_dir is not None
        here = {"ranks" if key == "world" else f"{key} parallel": size for key, size in layout().items()}
        here |= {f"--{key.replace('_', '-')}": run.values[key] for key in SAME_LAYOUT}
        directory = Path(training.non_persistent_local_ckpt_dir) / name
        place = LocalPlace(directory, history, here, "--non-persistent-local-ckpt-dir")
    else:
        given = training.non_persistent_global_ckpt_dir
        root = user_path(given, "--non-persistent-global-ckpt-dir") / name if given else save.root / "non_persistent"
        place = SharedPlace(CheckpointStore(root, keep=1, flag="--non-persistent-global-ckpt-dir"), history)

    def take() -> None:
        if is_main or place.alone:
            stack.enter_context(place.store.lock())

    attempt("owning the directory of non-persistent checkpoints", take)
    if isinstance(place, LocalPlace):
        _remove_strangers(place)
    where = place.store.root if place.kind == "global" else f"{place.store.root.parent}/rank_*"
    print_rank_0(f" {place.kind} checkpoints every {training.non_persistent_save_interval} iterations: {where}")
    return NonPersistent(place, save)


def _remove_strangers(place: LocalPlace) -> None:
    """Remove what ranks have left on this node that are on other nodes now. A collective.

    All ranks hold their locks. A folder whose lock is held belongs to one of them; one that was last locked on another
    host to a rank there, in a directory that is not a node's own after all.
    """
    hosts: list[str] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(hosts, socket.gethostname())
    mine = [rank for rank, host in enumerate(hosts) if host == hosts[place.rank]]
    if place.rank != mine[0]:
        return
    ours = {f"rank_{rank:05d}" for rank in mine}
    # Where a folder cannot be listed or removed, or is locked, only space is lost: no reason to end one rank.
    with contextlib.suppress(OSError):
        for folder in sorted(place.directory.glob("rank_*")):
            stranger = re.fullmatch(r"rank_\d{5,}", folder.name) and folder.name not in ours
            if stranger and last_host(folder / ".lock") == hosts[place.rank]:
                with contextlib.suppress(OSError, CheckpointError), SaveLock(folder / ".lock", 0.0):
                    for entry in folder.iterdir():
                        if entry.name != ".lock":
                            remove_path(entry)


def forget_history(save: CheckpointStore) -> None:
    """A start without non-persistent checkpoints goes its own way: those that are left are void."""
    if torch.distributed.get_rank() == 0:
        with contextlib.suppress(OSError):
            (save.root / HISTORY).unlink(missing_ok=True)
