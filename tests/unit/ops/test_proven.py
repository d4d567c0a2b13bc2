"""The record of devices on which the Triton kernels are proven, and what --memory-backend auto makes of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from umv2_megatron.ops import get_backend, proven, registry

pytest.importorskip("triton", reason="triton is not installed: pip install -r requirements-triton.txt")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """A CUDA device of capability 9.0, and an empty record."""
    monkeypatch.setattr(proven, "RECORD", tmp_path / "proven.json")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a device")
    clear()
    yield monkeypatch
    clear()


def clear() -> None:
    for each in (registry._get_backend, registry.choice):
        each.cache_clear()


def test_without_a_record_scatter_stays(device: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert [get_backend("auto", "cuda").name for _ in range(2)] == ["scatter"] * 2
    (told,) = caplog.messages
    assert "auto is scatter here: the Triton kernels have not passed the GPU tests with compute capability 9.0" in told
    assert get_backend("triton", "cuda").name == "triton"


def test_triton_is_the_default_once_it_is_recorded(device: pytest.MonkeyPatch) -> None:
    assert proven.main() == 0 and proven.main() == 0
    (written,) = json.loads(proven.RECORD.read_text())
    assert written == {"device": "a device", **proven.kind_of_device()}
    assert get_backend("auto", "cuda").name == "triton"
    assert registry.choice("cuda") == ("triton", "")
    assert get_backend("auto", "meta").name == "scatter"


@pytest.mark.parametrize("change", ["capability", "torch", "kernels"])
def test_a_record_of_something_else_does_not_count(change: str, device: pytest.MonkeyPatch) -> None:
    proven.record()
    if change == "capability":
        device.setattr(torch.cuda, "get_device_capability", lambda *_: (10, 0))
    elif change == "torch":
        device.setattr(torch, "__version__", "2.99")
    else:
        device.setattr(proven, "kernel_digest", lambda: "another")
    assert get_backend("auto", "cuda").name == "scatter"
    assert ("other versions of the Triton kernels" in registry.choice("cuda")[1]) == (change == "kernels")
    proven.record()
    clear()
    assert get_backend("auto", "cuda").name == "triton" and len(proven.recorded()) == 2


@pytest.mark.parametrize("text", ["", "{}", "[1]", "no json"])
def test_a_damaged_record_proves_nothing(text: str, device: pytest.MonkeyPatch) -> None:
    proven.RECORD.write_text(text)
    assert registry.choice("cuda")[0] == "scatter"


def test_nothing_is_recorded_without_a_device(device: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    device.setattr(torch.cuda, "is_available", lambda: False)
    assert proven.main() == 2 and not proven.RECORD.exists()
    assert "nothing is recorded" in capsys.readouterr().err
