"""Turns, places, faults and the end of the thread that generates."""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from umv2_megatron.serving.choices import Piece
from umv2_megatron.serving.engine import Engine
from umv2_megatron.serving.errors import ApiError


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def pieces(count: int, gate: threading.Event | None = None) -> Iterator[Piece]:
    if gate is not None:
        assert gate.wait(20)
    for number in range(count):
        yield Piece(number)


def endless() -> Iterator[Piece]:
    while True:
        time.sleep(0.001)
        yield Piece(0)


def unpaced() -> Iterator[Piece]:
    while True:
        yield Piece(0)


def taken(engine: Engine, count: int) -> None:
    """``count`` further jobs find a place."""
    gate, last = threading.Event(), queue.Queue()
    for _ in range(count):
        engine.submit(pieces(0, gate), last.put)
    with pytest.raises(ApiError) as refused:
        engine.submit(pieces(0), last.put)
    assert refused.value.status == 429 and refused.value.headers == {"Retry-After": "1"}
    gate.set()
    for _ in range(count):
        assert last.get(timeout=20) is None


def test_requests_take_turns_and_a_short_one_ends_first() -> None:
    engine, gate, came = Engine(3), threading.Event(), queue.Queue()
    engine.submit(pieces(0, gate), came.put)  # until the others wait, too
    engine.submit(pieces(5), lambda piece: came.put(("long", piece)))
    engine.submit(pieces(2), lambda piece: came.put(("short", piece)))
    gate.set()
    assert came.get(timeout=20) is None
    order = [came.get(timeout=20)[0] for _ in range(9)]
    assert order == ["long", "short", "long", "short", "long", "short", "long", "long", "long"]


def test_places_are_given_back_by_ends_faults_and_cancelled_jobs() -> None:
    engine, came = Engine(2), queue.Queue()

    def faulty() -> Iterator[Piece]:
        yield Piece(0)
        raise RuntimeError("out of memory")

    engine.submit(faulty(), came.put)
    job = engine.submit(endless(), lambda piece: None if piece else came.put("ended"))
    assert came.get(timeout=20) == Piece(0)
    fault = came.get(timeout=20)
    assert isinstance(fault, ApiError) and fault.status == 500 and "memory" not in fault.message
    job.cancel()
    assert came.get(timeout=20) == "ended"
    wait_until(lambda: not engine._jobs)
    taken(engine, 2)


def test_the_first_and_only_end_of_a_job_that_is_broken_off_is_the_error() -> None:
    """While another thread breaks them off, the engine's goes on taking turns."""
    engine, interval = Engine(2), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # seconds: threads change places at any moment
    try:
        for _ in range(300):
            ends: list[ApiError | None] = []
            for _ in range(2):
                engine.submit(unpaced(), lambda piece, ends=ends: isinstance(piece, Piece) or ends.append(piece))
            engine._break_off()
            wait_until(lambda: not engine._jobs)
            assert [getattr(end, "code", end) for end in ends] == ["server_shutting_down"] * 2
    finally:
        sys.setswitchinterval(interval)


def test_a_client_that_cannot_be_told_harms_no_other() -> None:
    engine, came = Engine(2), queue.Queue()

    def closed(piece: Any) -> None:
        raise RuntimeError("the event loop is closed")

    engine.submit(pieces(3), closed)
    engine.submit(pieces(1), came.put)
    assert came.get(timeout=20) == Piece(0) and came.get(timeout=20) is None


def test_stop_lets_short_jobs_end_and_breaks_off_long_ones() -> None:
    engine, short, long = Engine(3), queue.Queue(), queue.Queue()
    engine.submit(endless(), long.put)
    engine.submit(pieces(3), short.put)
    engine.stop(grace=0.5)
    with pytest.raises(ApiError) as refused:
        engine.submit(pieces(1), short.put)
    assert refused.value.status == 503
    assert [short.get(timeout=20) for _ in range(4)] == [Piece(0), Piece(1), Piece(2), None]
    deadline = time.monotonic() + 20
    while not isinstance(last := long.get(timeout=20), ApiError):
        assert time.monotonic() < deadline
    assert last.status == 503


def test_stop_breaks_off_what_waits_for_a_pass_that_does_not_end() -> None:
    engine, gate, stuck, waiting = Engine(3), threading.Event(), queue.Queue(), queue.Queue()
    engine.submit(pieces(1, gate), stuck.put)
    engine.submit(pieces(1), waiting.put)
    engine.stop(grace=0.1)
    assert stuck.get(timeout=20).status == 503 and waiting.get(timeout=20).status == 503
    gate.set()
