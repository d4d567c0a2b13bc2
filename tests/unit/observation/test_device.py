"""The peak by which MFU is counted: given, of a known GPU, or none."""

from __future__ import annotations

import pytest
import torch

from umv2_megatron.observation.device import device_name, peak_tflops


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA H20", 148.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA GH200 480GB", 989.0),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA RTX A1000 Laptop GPU", None),
        ("NVIDIA A10G", None),
        ("Radeon", None),
    ],
)
def test_known_devices(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert peak_tflops(None, bf16=True) == peak
    assert peak_tflops(None, bf16=False) is None, "the table is that of bfloat16"
    assert peak_tflops(50.0, bf16=True) == 50.0


def test_a_cpu_has_no_peak_but_the_given_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert peak_tflops(None, bf16=True) is None and peak_tflops(0.5, bf16=False) == 0.5
    assert device_name()
