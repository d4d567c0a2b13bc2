"""What counts as a collective's failure, what ``watched`` lets through, and what is seen of a neighbour's process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from umv2_megatron.parallel import members, roll_call

GLOO = "[/somewhere/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:7. This is typical."


@pytest.fixture
def alone(tmp_path):
    """The process group of one rank."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("text", [GLOO, "Application timeout caused pair closure", "NCCL error: remote process exited"])
def test_collective_failures(text):
    assert roll_call.is_collective_failure(RuntimeError(text))
    assert roll_call.is_collective_failure(torch.distributed.DistNetworkError("anything"))


def test_own_errors():
    assert not roll_call.is_collective_failure(RuntimeError("shape '[2]' is invalid for input of size 3"))
    assert not roll_call.is_collective_failure(ValueError("Connection closed by peer"))


def test_failure_inside_another_error():
    with pytest.raises(ValueError) as told:
        try:
            raise RuntimeError(GLOO)
        except RuntimeError as error:
            raise ValueError("saving failed") from error
    assert roll_call.is_collective_failure(told.value)


@pytest.mark.parametrize("hidden", [False, True])
def test_failure_that_another_error_followed(hidden):
    """Unless whoever raised the second one hid the first: ``from None``."""
    with pytest.raises(KeyError) as told:
        try:
            raise RuntimeError(GLOO)
        except RuntimeError:
            if hidden:
                raise KeyError("x") from None
            raise KeyError("x")  # noqa: B904
    assert roll_call.is_collective_failure(told.value) is not hidden


def test_watched_tells_group_step_and_the_backends_first_sentence(alone):
    with pytest.raises(roll_call.ExchangeError) as told, roll_call.watched(alone, "memory-parallel group", "weights"):
        raise RuntimeError(GLOO)
    assert str(told.value) == (
        "memory-parallel group [0]: weights failed on rank 0 and no culprit was found; "
        + GLOO.removesuffix(". This is typical.")
    )


def test_watched_lets_other_errors_through(alone):
    with pytest.raises(RuntimeError, match="^dtypes differ$"), roll_call.watched(alone, "group", "step"):
        raise RuntimeError("dtypes differ")


def test_watched_costs_next_to_nothing(alone):
    """Less than 20 microseconds, where a collective of two gloo ranks takes about 100."""
    start = time.perf_counter()
    for _ in range(1000):
        with roll_call.watched(alone, "group", "step"):
            pass
    assert time.perf_counter() - start < 0.02


def test_joining_again_ends_the_former_part_and_one_rank_needs_none(alone, monkeypatch):
    told = []
    monkeypatch.setattr(roll_call, "_roll", None)
    roll_call.join(SimpleNamespace(world_size=1))
    assert not roll_call.joined()
    monkeypatch.setattr(roll_call, "_roll", SimpleNamespace(stop=lambda: told.append("stopped"), leave=told.append))
    assert roll_call.joined()
    roll_call.leave(3)
    roll_call.join(SimpleNamespace(world_size=1))
    assert told == [3, "stopped"] and not roll_call.joined()
    roll_call.leave(4)
    assert told == [3, "stopped"]


def test_what_ends_a_rank_is_explained_and_told(alone, monkeypatch):
    told = []
    monkeypatch.setattr(roll_call, "_roll", None)
    assert roll_call.explain(KeyError("x")) is None
    assert roll_call.explain(roll_call.ExchangeError("what happened")) == "what happened"
    text = roll_call.explain(RuntimeError(GLOO))
    assert text is not None and text.startswith("the ranks did not meet") and "Connection closed by peer" in text
    monkeypatch.setattr(roll_call, "_roll", SimpleNamespace(tell=told.append))
    assert roll_call.explain(KeyError("x")) is None
    assert told == ["failed: KeyError: 'x'"]


def test_a_member_is_named_by_rank_process_and_host():
    neighbour = replace(members.myself(3), host="node7", pid=42)
    assert str(neighbour) == "rank 3 (pid 42 on node7)" and members.member(neighbour.to_text()) == neighbour


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_condition_of_a_neighbour():
    process = subprocess.Popen([sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"], stdout=-1)
    try:
        process.stdout.readline()
        _, started = members._state(process.pid)
        neighbour = replace(members.myself(3), pid=process.pid, started=started)
        assert members.member(neighbour.to_text()) == neighbour
        assert neighbour.condition() == ""
        assert replace(neighbour, started="7").condition() == "gone"  # another process that got its number
        os.kill(process.pid, signal.SIGSTOP)
        assert_soon(neighbour, "stopped")
        process.kill()
        assert_soon(neighbour, "gone")  # still a zombie
        process.wait()
        assert neighbour.condition() == "gone"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def assert_soon(neighbour: members.Member, condition: str) -> None:
    deadline = time.monotonic() + 10
    while neighbour.condition() != condition:
        assert time.monotonic() < deadline, neighbour.condition()
        time.sleep(0.01)
