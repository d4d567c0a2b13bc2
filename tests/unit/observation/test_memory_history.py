"""--record-memory-history with a stand-in for torch's functions of CUDA devices, which this machine may not have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from umv2_megatron.observation import memory_history


@pytest.fixture
def observers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was told to torch: how many entries to keep, then the observer."""
    told: list[Any] = []

    def dump(path: str) -> None:
        Path(path).write_bytes(b"snapshot")

    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda max_entries: told.append(max_entries))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    monkeypatch.setattr(torch._C, "_cuda_attach_out_of_memory_observer", told.append, raising=False)
    return told


def test_a_snapshot_when_memory_is_out(
    tmp_path: Path, observers: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run" / "memory-snapshot"
    memory_history.record_memory_history(folder, 3)
    entries, observer = observers
    assert entries == memory_history.ENTRIES and not folder.exists(), "nothing is written before"
    observer(1, 2048, 10, 512)
    assert (folder / "rank3.pickle").read_bytes() == b"snapshot"
    assert capsys.readouterr().out == (
        f"rank 3: CUDA device 1 has no 2,048 bytes left (512 free); who holds what is in {folder}/rank3.pickle\n"
    )


def test_a_snapshot_that_cannot_be_written_hides_nothing(
    tmp_path: Path, observers: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    memory_history.record_memory_history(tmp_path / "file", 0)
    observers[1](0, 1, 2, 3)  # must not raise: torch's own error follows
    assert "no snapshot of the memory" in capsys.readouterr().out
