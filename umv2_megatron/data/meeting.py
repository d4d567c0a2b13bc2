"""Ranks of one program that meet at files of a directory which all of them see. No MPI and no network is needed.

Rank 0 writes ``call.json`` with a ticket drawn for this call. The others answer it in ``answer-<rank>.json`` with
tickets of their own. When all have answered, rank 0 writes what each is to do, beside its ticket, into ``call.json``.
Tickets tell these files from those that the killed ranks of an earlier call have left.

Each rank renews its ``rank-<rank>-<ticket>.json`` every few seconds, and says there when it is done or why it failed.
So a rank that waits, or works, learns that another one is gone: within seconds when it failed or was a process of the
same host, after a time limit otherwise.

Under SLURM the ranks know which start they belong to. Then nobody answers the rank 0 of another job that has the same
directory, and a rank 0 that may not begin says so in ``refused-<start>.json``. Other launchers give their processes no
such name; there mpirun and torchrun end the ranks that are left.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

from umv2_megatron.data.corpus import CorpusError
from umv2_megatron.data.parts import write_whole

_BEAT_SECONDS = 2.0
_POLL_SECONDS = 0.1
_FAREWELL_SECONDS = 5.0


class Meeting:
    """This rank among ``size``, meeting in ``directory``. Use as a context: leaving it by an error tells the others."""

    def __init__(self, directory: Path, rank: int, size: int, timeout: float, start: str = "") -> None:
        """``start``: what only the ranks of this start have in common, "" where nothing is known (``launch.py``)."""
        self.rank = rank
        self.size = size
        self._directory = directory
        self._timeout = timeout
        self._ticket = uuid.uuid4().hex
        self._call = self._ticket if rank == 0 else ""
        self._start = start
        self._refusal = f"refused-{hashlib.sha256(start.encode()).hexdigest()[:16]}.json"
        self._note: dict[str, Any] = {
            "state": "here", "beat": 0, "pid": os.getpid(), "host": socket.gethostname(),
            "system": _system(),
        }  # fmt: skip
        self._tickets: dict[int, str] = {}
        self._seen: dict[int, tuple[int, float]] = {}
        self._checked = 0.0
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._beats: Optional[threading.Thread] = None

    def __enter__(self) -> Meeting:
        if self.size > 1:
            self._beats = threading.Thread(target=self._beat, daemon=True)
            self._beats.start()
        return self

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        if self._beats is None:
            return
        self._stop.set()
        self._beats.join()
        message = f"{error}" if isinstance(error, Exception) else "it was told to end"
        with contextlib.suppress(OSError):  # the directory may be gone by now
            self._write_note(state="failed" if kind else "done", message=message)
            if kind is not None and self.rank == 0 and not self._tickets:
                self._call_off(message)

    # -- rank 0 -------------------------------------------------------------------------------------------------------

    def call(self) -> None:
        """Rank 0 announces this call."""
        if self.size > 1:
            self._write_note()
            self._announce()

    def refuse(self, message: str) -> None:
        """Rank 0 may not even call: tell the others of its start, if they can be told apart."""
        if self.size > 1 and self._start:
            with contextlib.suppress(OSError):
                self._write(self._refusal, {"start": self._start, "failed": message})

    def _announce(self, **more: Any) -> None:
        self._write("call.json", {"call": self._ticket, "size": self.size, "start": self._start, **more})

    def share(self, work: list[Any]) -> None:
        """Rank 0 waits until all have come, and gives each rank its element of ``work`` (JSON)."""
        if self.size == 1:
            return
        tickets = self._answers(self._timeout)
        missing = [rank for rank in range(1, self.size) if rank not in tickets]
        if missing:
            raise CorpusError(
                f"{_ranks(missing)} of {self.size} did not come to {self._directory} within {self._timeout:g} s: check "
                "that all ranks see this directory, or raise --rank-timeout"
            )
        shares = {str(rank): [tickets[rank], work[rank]] for rank in tickets}
        self._announce(shares=shares)
        self._tickets = tickets

    def wait(self, describe: Callable[[int], str]) -> None:
        """Until all other ranks are done. Raises as ``check``."""
        while "here" in self._states(describe):
            time.sleep(_POLL_SECONDS)

    def _answers(self, seconds: float) -> dict[int, str]:
        deadline = time.monotonic() + seconds
        tickets: dict[int, str] = {}
        while True:
            for rank in range(1, self.size):
                answer = self._read(f"answer-{rank}.json") if rank not in tickets else {}
                if answer.get("call") == self._ticket:
                    tickets[rank] = answer["ticket"]
            if len(tickets) == self.size - 1 or time.monotonic() > deadline:
                return tickets
            time.sleep(_POLL_SECONDS)

    def _call_off(self, message: str) -> None:
        """Tell the ranks that have come, or are about to, that there will be no work, and let them read it."""
        tickets = self._answers(min(self._timeout, _FAREWELL_SECONDS))
        heard = list(tickets.values())
        self._announce(failed=message, heard=heard)
        deadline = time.monotonic() + _FAREWELL_SECONDS
        while time.monotonic() < deadline and any(
            self._note_of(rank, ticket).get("state") == "here" for rank, ticket in tickets.items()
        ):
            time.sleep(_POLL_SECONDS)

    # -- the other ranks ----------------------------------------------------------------------------------------------

    def join(self) -> Any:
        """The work of this rank, when rank 0 has shared it out. Raises ``CorpusError`` when there is none in time."""
        deadline = time.monotonic() + self._timeout
        while True:
            call = self._read("call.json")
            ours = call.get("size") == self.size and call.get("start") == self._start
            if ours and call.get("call") and call["call"] != self._call:
                self._answer(call["call"])
            ticket, work = call.get("shares", {}).get(str(self.rank), ("", None))
            if ticket == self._ticket:
                self._tickets = {0: self._call}
                return work
            if self._ticket in call.get("heard", ()):
                raise CorpusError(f"rank 0 failed: {call['failed']}")
            if self._start and (refused := self._read(self._refusal)).get("start") == self._start:
                raise CorpusError(f"rank 0 failed: {refused.get('failed')}")
            if self._start and self._call:  # this call is no earlier one's: its rank 0 has to be there
                self._tickets = {0: self._call}
                self.check()
            if time.monotonic() > deadline:
                raise CorpusError(
                    f"rank {self.rank} of {self.size} has waited {self._timeout:g} s for rank 0 in {self._directory}: "
                    "check that rank 0 runs and sees the same directory, or raise --rank-timeout"
                )
            time.sleep(_POLL_SECONDS)

    def _answer(self, call: str) -> None:
        try:
            self._write_note()
            self._write(f"answer-{self.rank}.json", {"call": call, "ticket": self._ticket})
        except FileNotFoundError:
            return  # of a job that has just ended and removed the directory
        self._call = call

    # -- all ----------------------------------------------------------------------------------------------------------

    def check(self, describe: Callable[[int], str] = lambda rank: "") -> None:
        """Raise ``CorpusError`` when a rank that this one depends on has failed or is gone; ``describe`` adds to it."""
        now = time.monotonic()
        if not self._tickets or now < self._checked + _BEAT_SECONDS / 2:
            return
        self._checked = now
        self._states(describe)

    def _states(self, describe: Callable[[int], str]) -> list[str]:
        states = []
        for rank in self._tickets:
            try:
                states.append(self._state(rank))
            except CorpusError as error:
                raise CorpusError(f"{error}{describe(rank)}") from None
        return states

    def _state(self, rank: int) -> str:
        if rank == 0 and self._read("call.json").get("call", self._call) != self._call:
            raise CorpusError("another call of the tool has taken the place of this one")
        note = self._note_of(rank, self._tickets[rank])
        state = note.get("state", "here")
        if state == "failed":
            raise CorpusError(f"{_named(rank, note)} failed: {note.get('message')}")
        now = time.monotonic()
        beat, since = self._seen.get(rank, (-1, now))
        if rank not in self._seen or note.get("beat", beat) != beat:
            self._seen[rank] = beat, since = note.get("beat", beat), now
        if state == "here":
            if note.get("system") == self._note["system"] and not _exists(note["pid"]):
                if self._note_of(rank, self._tickets[rank]) != note:  # its last words
                    return self._state(rank)
                raise CorpusError(f"{_named(rank, note)} is gone")
            if now - since > self._timeout:
                raise CorpusError(f"{_named(rank, note)} has given no sign for {self._timeout:g} s")
        return state

    def _beat(self) -> None:
        while not self._stop.wait(_BEAT_SECONDS):
            try:
                self._write_note(beat=self._note["beat"] + 1)
            except OSError:
                continue  # a disk that comes back is no reason to end

    def _write_note(self, **changes: Any) -> None:
        with self._lock:
            self._note.update(changes)
            if self._directory.is_dir():
                self._write(f"rank-{self.rank}-{self._ticket}.json", self._note)

    def _note_of(self, rank: int, ticket: str) -> dict[str, Any]:
        return self._read(f"rank-{rank}-{ticket}.json")

    def _write(self, name: str, content: dict[str, Any]) -> None:
        write_whole(self._directory / name, json.dumps(content).encode(), f".incomplete-{self._ticket}")

    def _read(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads((self._directory / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _named(rank: int, note: dict[str, Any]) -> str:
    return f"rank {rank} (pid {note['pid']} on {note['host']})" if "pid" in note else f"rank {rank}"


def _system() -> str:
    """The same for two processes that can see each other by their pids."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return uuid.uuid4().hex


def _exists(pid: int) -> bool:
    """Whether the process runs; one that has ended and waits for its launcher to notice does not."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False
