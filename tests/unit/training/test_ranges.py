"""Ranges with a clock of their own: nesting, sections, ends that nobody reports, the table."""

from __future__ import annotations

import pytest

from umv2_megatron.parallel import cpu_platform
from umv2_megatron.training.ranges import NO_RANGES, Ranges, Spent, rows_of, table


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds since some time; tests move it on."""
    now = [0.0]
    monkeypatch.setattr(cpu_platform, "mark", lambda: now[0])
    return now


def test_nesting_and_names(clock: list[float]) -> None:
    named: list[str] = []

    def annotate(name: str):
        named.append(name)
        return lambda: named.append(f"end of {name}")

    ranges = Ranges(annotate)
    for _ in range(2):
        with ranges("retrieval", "forward"):
            clock[0] += 1
            with ranges("scores", "forward"):
                clock[0] += 2
    clock[0] += 4
    whole, spent = ranges.stop()
    assert whole == 10_000
    assert spent == {
        ("forward", "retrieval"): Spent(6000, 2),
        ("forward", "retrieval", "scores"): Spent(4000, 2),
    }
    assert named[:4] == [
        "forward: retrieval", "forward: retrieval: scores", "end of forward: retrieval: scores",
        "end of forward: retrieval",
    ]  # fmt: skip
    rows = {tuple(row["path"]): row for row in rows_of(whole, spent, steps=2)}
    assert {path: row["ms"] for path, row in rows.items()} == {
        ("forward",): 3000,
        ("forward", "retrieval"): 3000,
        ("forward", "retrieval", "scores"): 2000,
        ("forward", "retrieval", "rest"): 1000,
        ("other",): 2000,
    }
    assert rows["forward",]["share"] == 0.6 and rows["forward", "retrieval"]["calls"] == 1


def test_a_range_without_an_end_of_its_own_ends_with_the_next(clock: list[float]) -> None:
    ranges = Ranges(lambda name: lambda: None)
    ranges.open("loss", "backward", until_next=True)
    clock[0] += 1
    with ranges("output layer", "backward"):
        clock[0] += 2
    last = ranges.open("embedding", "backward", until_next=True)
    clock[0] += 3
    with ranges("optimizer"):
        clock[0] += 4
    ranges.close(last)  # closed already
    assert ranges.stop()[1] == {
        ("backward", "loss"): Spent(1000, 1),
        ("backward", "output layer"): Spent(2000, 1),
        ("backward", "embedding"): Spent(3000, 1),
        ("optimizer",): Spent(4000, 1),
    }


def test_a_forgotten_range_ends_with_the_one_around_it(clock: list[float]) -> None:
    ranges = Ranges(lambda name: lambda: None)
    with ranges("outer"):
        ranges.open("inner")
        clock[0] += 1
    assert ranges.stop()[1] == {("outer", "inner"): Spent(1000, 1), ("outer",): Spent(1000, 1)}


def test_order_and_text() -> None:
    spent = {
        ("optimizer",): Spent(10, 2),
        ("backward", "FFN"): Spent(5, 2),
        ("backward", "attention"): Spent(20, 2),
        ("forward", "FFN"): Spent(5, 2),
        ("data",): Spent(1, 4),
        ("checkpoint",): Spent(9, 1),
    }
    text = table(rows_of(100.0, spent, 2), "profile").splitlines()
    assert [line.split()[0] for line in text] == [
        *("profile", "part", "data", "forward", "FFN", "backward", "attention", "FFN", "optimizer", "checkpoint"),
        "other",
    ]
    assert text[2].split() == ["data", "0.50", "1.0%", "2"] and text[6].startswith("   attention")
    with NO_RANGES("nothing"):
        pass
