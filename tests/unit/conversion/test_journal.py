"""A directory is written by one conversion at a time."""

import fcntl
from pathlib import Path

import pytest

from umv2_megatron.conversion.journal import sole_user
from umv2_megatron.conversion.safetensors_files import ConversionError


def test_sole_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with sole_user(tmp_path), pytest.raises(ConversionError, match="being written by another"), sole_user(tmp_path):
        pass
    with sole_user(tmp_path):
        assert not list(tmp_path.iterdir())

    def no_locks(*_: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(ConversionError, match="cannot be locked .No locks available."), sole_user(tmp_path):
        pass
