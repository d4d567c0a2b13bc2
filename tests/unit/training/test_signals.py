"""Requests to stop: when signals are collected, and what becomes of those that nobody has agreed on."""

from __future__ import annotations

import signal
import time

import pytest

from umv2_megatron.parallel.launch import STOP_SIGNALS
from umv2_megatron.training.signals import StopRequests


@pytest.fixture
def received():
    """Signals that came to the handlers from before."""
    numbers: list[int] = []
    before = [signal.signal(number, lambda got, _: numbers.append(got)) for number in STOP_SIGNALS]
    yield numbers
    for number, handler in zip(STOP_SIGNALS, before):
        signal.signal(number, handler)


def agree(monkeypatch: pytest.MonkeyPatch, requests: StopRequests) -> bool:
    """``requests.agreed()`` of a job of one rank."""
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor, op: None)
    return requests.agreed()


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_collected_inside_the_block_only(number, received, monkeypatch):
    requests = StopRequests(True, None, time.monotonic())
    signal.raise_signal(number)
    assert received == [number]
    with requests:
        assert not agree(monkeypatch, requests)
    signal.raise_signal(number)
    assert received == [number] * 2


def test_a_signal_after_the_last_agreement_has_its_former_meaning(received, monkeypatch):
    requests = StopRequests(True, None, time.monotonic())
    with requests:
        assert not agree(monkeypatch, requests)
        signal.raise_signal(signal.SIGTERM)
        assert received == []
    assert received == [signal.SIGTERM]


def test_a_second_signal_does_not_disturb_the_end(received, monkeypatch):
    requests = StopRequests(True, None, time.monotonic())
    with requests:
        signal.raise_signal(signal.SIGTERM)
        assert agree(monkeypatch, requests)
    signal.raise_signal(signal.SIGTERM)
    assert received == []


def test_signals_left_alone_and_the_time_limit(received, monkeypatch):
    with StopRequests(False, None, time.monotonic()):
        signal.raise_signal(signal.SIGUSR1)
    assert received == [signal.SIGUSR1]
    limits = [StopRequests(False, 2, time.monotonic() - seconds) for seconds in (110, 121)]
    assert [agree(monkeypatch, each) for each in limits] == [False, True]


def test_a_failure_is_told_whatever_signal_comes(received):
    """torchrun sends SIGTERM as soon as one rank has died, and the others have yet to tell which."""
    with pytest.raises(RuntimeError), StopRequests(True, None, time.monotonic()):
        raise RuntimeError("a collective failed")
    signal.raise_signal(signal.SIGTERM)
    assert received == []
