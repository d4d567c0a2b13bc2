"""Who is missing when a collective fails.

A collective that fails says little: gloo's "connection closed by peer" comes from any neighbour that gave up before,
and its timeout blames whoever it waited for, which may itself have waited for another rank. So the ranks call the roll
through the store that they met at:

1. ``join``: every rank tells its host and process number, and starts a thread that looks at the store now and then.
2. A rank whose collective fails raises the alarm and notes that it failed (``missing``). A rank that fails by itself
   notes its own error (``explain``). A thread that finds a neighbour on its own host dead raises the alarm too.
3. At the alarm every rank's thread answers, and tells where its main thread is; a stopped or lost process does not.
4. The culprits are, the first that applies: ranks that told an error of their own; processes of this host that are
   gone or stopped; ranks that do not answer; ranks that answer but do not come to the collective.
5. Every rank ends. One whose main thread does not fail by itself soon is ended by its thread.

The rank that hosts the store (rank 0, unless torchrun's agent does) leaves last. A run without faults pays one
question to the store per rank every half second (in worlds above 1000, less often).
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Optional

import torch
from torch.distributed import distributed_c10d

from umv2_megatron.parallel.collective_place import collective, place_in_code, ranks_of, told
from umv2_megatron.parallel.members import Member, member, myself

GRACE = 4.0
"""Seconds that the ranks have to answer."""
PATIENCE = 3.0
"""Seconds that a rank's main thread has to end by itself once the culprit is known."""


class ExchangeError(RuntimeError):
    """A collective failed; one sentence tells the group, the step, this rank, the culprits and the backend's error."""


class watched:  # noqa: N801 - used as a function: ``with watched(group, "memory-parallel group", "weights"):``
    """Context in which a failing collective of ``group`` becomes an ``ExchangeError``, after the roll call.

    Args:
        group: the ranks of the collective.
        group_name: what the group is, for example "memory-parallel group".
        step: what is done, for example "all-to-all 'weights' of memory layer 3".
    """

    __slots__ = ("_group", "_group_name", "_step")

    def __init__(self, group: Any, group_name: str, step: str) -> None:
        self._group, self._group_name, self._step = group, group_name, step

    def __enter__(self) -> None:
        global _inside
        _inside = self

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        global _inside
        _inside = None
        if error is None or isinstance(error, ExchangeError) or not is_collective_failure(error):
            return
        raise ExchangeError(_sentence(str(self), missing(self._group, str(self)), error)) from error

    def __str__(self) -> str:
        return f"{self._group_name} {told(ranks_of(self._group, _world_size()))}: {self._step}"


def is_collective_failure(error: BaseException) -> bool:
    """Whether ``error``, or what it was raised from, is a collective's complaint about other ranks or the network."""
    seen: Optional[BaseException] = error
    while seen is not None:
        if isinstance(seen, (ExchangeError, torch.distributed.DistError)):
            return True
        text = str(seen).lower()
        if isinstance(seen, RuntimeError) and any(word in text for word in _COMPLAINTS):
            return True
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return False


# of gloo, most of them with a path of its sources, and of NCCL; torch has no type of its own for gloo's
_COMPLAINTS = ("/gloo/", "pair closure", "closed by peer", "reset by peer", "broken pipe", "timed out waiting", "nccl")


def missing(group: Any, name: str, seconds: Optional[float] = None) -> list[str]:
    """The culprits of a failed collective, each as a clause ("rank 2 (pid 7 on host) is gone"); [] if none is found.

    Args:
        group: whose collective failed on this rank.
        name: the group and the step, told to the other ranks.
        seconds: how long the other ranks have to answer (default: GRACE). The call takes at most about 2 s longer.
    """
    if _roll is None:
        return []
    return _roll.call(ranks_of(group, _world_size()), name, GRACE if seconds is None else seconds)


def explain(error: BaseException) -> Optional[str]:
    """For an exception that ends this rank: one sentence with the culprits if it is a collective's failure, else None.

    The other ranks learn of it: in the second case that this rank is the culprit.
    """
    if isinstance(error, ExchangeError):
        return str(error)
    if not is_collective_failure(error):
        if _roll is not None:
            _roll.tell(f"failed: {type(error).__name__}: {_first_line(error)}")
        return None
    if _roll is None:
        return f"the ranks did not meet, or one of them ended meanwhile; {_first_line(error)}"
    group, name = collective(list(traceback.walk_tb(error.__traceback__)), _world_size())
    return _sentence(name, missing(group, name), error)


def join(launch: Any) -> None:
    """Take part in roll calls from now on. To be called once the process group of the run exists, on every rank.

    Args:
        launch: this process among all (``launch.Launch``).
    """
    global _roll
    if _roll is not None:
        _roll.stop()
    _roll = None
    if launch.world_size > 1 and torch.distributed.is_initialized():
        _roll = _RollCall(distributed_c10d._get_default_store(), launch)


def at_sudden_end(tell: Callable[[str], object]) -> None:
    """``tell`` is given why, before a monitoring thread ends this process whose main thread hangs."""
    if _roll is not None:
        _roll.last_words = tell


def leave(code: int) -> None:
    """This rank is about to end with exit code ``code``; waits where others still need this rank's store."""
    if _roll is not None:
        _roll.leave(code)


def joined() -> bool:
    """Whether this process takes part in roll calls."""
    return _roll is not None


class _RollCall:
    """One rank's part in the roll call."""

    def __init__(self, store: Any, launch: Any) -> None:
        self.rank: int = launch.rank
        self.world_size: int = launch.world_size
        self.tick = min(max(0.5, self.world_size / 2000), GRACE / 2)
        self._local_world_size: int = launch.local_world_size
        self._keep = store  # the server that the store may hold must outlive the process group
        # a connection of its own: the process group may hold the other one for minutes
        self._store = torch.distributed.PrefixStore("roll_call", store.clone())
        self._store.set_timeout(datetime.timedelta(seconds=GRACE))
        self._me = myself(self.rank)
        self._here: dict[int, Member] = {}
        self._over = threading.Event()
        self._lost = False
        self.last_words: Callable[[str], object] = lambda text: None
        self._hosts_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        """Whether rank 0 hosts the store; torchrun's agent does otherwise."""
        self._store.set(f"member/{self.rank}", self._me.to_text())
        number = self._store.add(f"place/{self._me.place}", 1)
        self._store.set(f"place/{self._me.place}/{number}", self._me.to_text())
        self._meet_neighbours()
        with contextlib.suppress(RuntimeError):  # only for a message
            self._store.wait(["member/0"])
        self._first = self._of(0)
        self._thread = threading.Thread(target=self._listen, name="roll call", daemon=True)
        atexit.register(self._end)
        self._thread.start()

    # -- what the main thread does -----------------------------------------------------------------------------------

    def call(self, ranks: Sequence[int], name: str, seconds: float) -> list[str]:
        """See ``missing``."""
        found: list[str] = []
        self._lost |= self._host_of_store_is() is not None
        if self._ask(lambda: found.extend(self._search(ranks, name, seconds)), seconds + 2.0):
            return found
        return [self._without_store()]

    def tell(self, what: str) -> None:
        """Accuse this rank itself."""

        def accuse() -> None:
            self._accuse(self.rank, f"{self._me} {what}")

        self._ask(accuse, 2.0)

    def leave(self, code: int) -> None:
        """See the function ``leave``."""
        self._ask(lambda: self._store.set(f"left/{self.rank}", str(code)), 2.0)
        self._over.set()
        if self.rank == 0 and self._hosts_store:
            limit = GRACE + PATIENCE + 2 * self.tick if code else 30.0
            self._ask(lambda: self._wait_for_others(limit), limit)

    def stop(self) -> None:
        """Take no part any more."""
        self._over.set()

    def _end(self) -> None:
        """The interpreter ends, and ``leave`` may not have been called."""
        if not self._over.is_set():
            self._over.set()
            with contextlib.suppress(RuntimeError):
                self._store.set(f"left/{self.rank}", "unknown")
                if self.rank == 0 and self._hosts_store:
                    self._wait_for_others(GRACE + PATIENCE)
        # a thread that the interpreter's end meets inside the store would abort the process
        self._thread.join(GRACE)

    def _wait_for_others(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            lost = self._absent("here", [rank for rank, _ in self._accusations()])
            if set(lost).issuperset(self._absent("left", range(self.world_size))):
                return
            time.sleep(0.05)

    def _ask(self, question: Callable[[], object], seconds: float) -> bool:
        """Do something with the store in at most ``seconds``; returns whether it was done.

        In a thread: asking a store whose process is stopped never returns. A store that failed once is not asked again.
        """
        done = threading.Event()

        def work() -> None:
            try:
                question()
                done.set()
            except RuntimeError:
                self._lost = True

        if not self._lost:
            thread = threading.Thread(target=work, daemon=True)
            thread.start()
            thread.join(seconds)
        return done.is_set()

    # -- who is it ---------------------------------------------------------------------------------------------------

    def _search(self, ranks: Sequence[int], name: str, seconds: float) -> list[str]:
        self._store.set(f"failed/{self.rank}", name)
        self._store.set("alarm", f"rank {self.rank}, {name}")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            told = self._accusations()
            if told:
                return [text for _, text in told]
            self._look_around(failing=True)
            time.sleep(self.tick / 5)
        for rank in self._absent("failed", self._absent("here", range(self.world_size))):
            self._accuse(rank, f"{self._of(rank)} does not answer")
        if not self._accusations():
            self._accuse_late(ranks)
        return [text for _, text in self._accusations()]

    def _look_around(self, failing: bool) -> None:
        """Accuse the processes of this host that are gone or, where a collective has failed, stopped or done."""
        for rank, text in self._neighbours(failing):
            self._accuse(rank, text)

    def _neighbours(self, failing: bool) -> Iterable[tuple[int, str]]:
        conditions = [(other, other.condition()) for other in self._here.values()]
        gone = [other for other, condition in conditions if condition == "gone"]
        codes = {other.rank: self._get(f"left/{other.rank}") for other in gone}
        for other, condition in conditions:  # first, as others may have died of waiting for it
            if condition == "stopped" and (failing or None in codes.values()):
                yield other.rank, f"{other} is stopped"
        for other in gone:
            code = codes[other.rank]
            if code is None:
                yield other.rank, f"{other} is gone"
            elif code in ("0", "unknown") and failing:
                yield other.rank, f"{other} has ended with exit code {code} before the others"

    def _host_of_store_is(self) -> Optional[str]:
        """That the rank that hosts the store is gone or stopped, if it can be seen from here."""
        host = self._here.get(0) if self._hosts_store else None
        return f"{host} is {host.condition()}" if host is not None and host.condition() else None

    def _without_store(self) -> str:
        if not self._hosts_store:
            return "torchrun's agent, which hosts the store of the run, does not answer"
        deadline = time.monotonic() + 1.0
        while 0 in self._here and time.monotonic() < deadline:  # a dying process closes its connections first
            known = self._host_of_store_is()
            if known is not None:
                return known
            time.sleep(0.02)
        return f"{self._first}, which hosts the store of the run, does not answer"

    def _accuse_late(self, ranks: Sequence[int]) -> None:
        """All ranks answer: accuse those that did not fail in a collective too, first of this group, then of all."""
        late = self._absent("failed", ranks) or self._absent("failed", range(self.world_size))
        places = {rank: json.loads(self._get(f"here/{rank}") or '["?", false]') for rank in late[:64]}
        # the others may wait in a collective that has not timed out yet
        elsewhere = {rank: place for rank, (place, waits) in places.items() if not waits}
        for rank, place in (elsewhere or {rank: place for rank, (place, _) in places.items()}).items():
            self._accuse(rank, f"{self._of(rank)} answers but does not come: it is at {place}")

    def _absent(self, key: str, ranks: Sequence[int]) -> list[int]:
        """Those of ``ranks`` without an entry ``key``; halving asks little where few are absent."""
        if not ranks or self._store.check([f"{key}/{rank}" for rank in ranks]):
            return []
        if len(ranks) == 1:
            return [ranks[0]]
        half = len(ranks) // 2
        return self._absent(key, ranks[:half]) + self._absent(key, ranks[half:])

    # -- what the thread does ----------------------------------------------------------------------------------------

    def _listen(self) -> None:
        try:
            while not self._over.wait(self.tick):
                if self._store.check(["alarm"]):
                    break
                self._look_around(failing=False)
            doing, waits = _main_thread()
            if not self._over.is_set():
                self._store.set(f"here/{self.rank}", json.dumps([doing, waits]))
                self._await_accusation()
            culprits = [text for _, text in self._accusations()]
        except RuntimeError:
            self._lost = True
            doing, _ = _main_thread()
            culprits = [self._without_store()]
        # the main thread's own failure tells more
        if not self._over.wait(PATIENCE):
            because = ", ".join(culprits) or "a collective failed on another rank"
            text = f"rank {self.rank} ends, from {doing}, because {because}"
            print(f"error: {text}", file=sys.stderr, flush=True)
            self.last_words(text)
            self.leave(1)
            os._exit(1)

    def _await_accusation(self) -> None:
        """Until somebody is accused, at most as long as the rank that raised the alarm may take to find out."""
        deadline = time.monotonic() + GRACE + 2.0
        while not self._accusations() and time.monotonic() < deadline and not self._over.is_set():
            self._look_around(failing=True)
            time.sleep(self.tick / 5)

    # -- entries of the store ----------------------------------------------------------------------------------------

    def _accuse(self, rank: int, text: str) -> None:
        if self._store.add(f"accusers/{rank}", 1) == 1:
            number = self._store.add("accusations", 1)
            self._store.set(f"accusation/{number}", json.dumps([rank, text]))
        self._store.set("alarm", text)

    def _accusations(self) -> list[tuple[int, str]]:
        """(rank, clause) of every accusation, in the order in which they were made."""
        if not self._store.check(["alarm"]):
            return []
        count = self._store.add("accusations", 0)
        texts = [self._get(f"accusation/{number}") for number in range(1, count + 1)]
        return [(rank, text) for rank, text in (json.loads(text) for text in texts if text)]

    def _meet_neighbours(self) -> None:
        """Learn who else is on this host; they join at about the same time as this rank."""
        deadline = time.monotonic() + 1.0
        place = f"place/{self._me.place}"
        while len(self._here) < self._local_world_size and time.monotonic() < deadline:
            for number in range(1, self._store.add(place, 0) + 1):
                text = self._get(f"{place}/{number}")
                if text is not None:
                    other = member(text)
                    self._here[other.rank] = other

    def _get(self, key: str) -> Optional[str]:
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _of(self, rank: int) -> str:
        text = self._get(f"member/{rank}")
        return f"rank {rank}" if text is None else str(member(text))


_roll: Optional[_RollCall] = None
_inside: Optional[watched] = None
_WAITING = ("/torch/distributed/", "/megatron/core/", "/umv2_megatron/parallel/")


def _main_thread() -> tuple[str, bool]:
    """What the main thread does, and whether it seems to wait in a collective."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    inside = _inside
    if frame is None or inside is not None:
        return str(inside or "an unknown place"), True
    if any(part in frame.f_code.co_filename for part in _WAITING):
        return collective(list(traceback.walk_stack(frame))[::-1], _world_size())[1], True
    return place_in_code(frame, frame.f_lineno), False


def _world_size() -> int:
    return 0 if _roll is None else _roll.world_size


def _first_line(error: BaseException) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line.partition(". ")[0]


def _sentence(what: str, culprits: list[str], error: BaseException) -> str:
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else "?"
    because = f"because {', '.join(culprits)}" if culprits else "and no culprit was found"
    return f"{what} failed on rank {rank} {because}; {_first_line(error)}"
