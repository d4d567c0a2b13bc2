"""benchmarks/checkpoints.py: a rank that fails ends it, and the disk's rate is of as many bytes as a rank saves."""

from __future__ import annotations

import os
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from benchmarks import checkpoints


def test_a_rank_that_fails_ends_the_benchmark() -> None:
    context = get_context("spawn")
    results = context.SimpleQueue()
    ranks = [context.Process(target=time.sleep, args=(300,)), context.Process(target=sys.exit, args=(3,))]
    try:
        for process in ranks:
            process.start()
        with pytest.raises(SystemExit, match="rank 1 ended with exit code 3"):
            checkpoints.result_of(ranks, results)
        assert ranks[0].is_alive()
        results.put("rates")
        assert checkpoints.result_of(ranks[:1], results) == "rates"
    finally:
        for process in ranks:
            process.kill()
            process.join()


@pytest.mark.parametrize("size", [0, 1000, (64 << 20) + 5])
def test_the_disk_writes_as_many_bytes(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    checkpoints.plain_write(tmp_path / "plain", size)
    assert synced == [size] and not list(tmp_path.iterdir())
