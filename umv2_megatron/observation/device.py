"""What this rank computes on: its name, and the most operations per second that its maker promises."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch

# Words of the name that torch gives a device -> TFLOP/s of dense products in bfloat16, without sparsity, from NVIDIA's
# data sheets. The first that fits counts.
BF16_PEAKS = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H200", 989.0),
    ("GH200", 989.0),
    ("H800", 989.0),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("A40", 149.7),
    ("A30", 165.0),
    ("A10", 125.0),
)


def device_name() -> str:
    """Name of this rank's device: of the GPU, or of the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.machine()


def peak_tflops(given: float | None, bf16: bool) -> float | None:
    """TFLOP/s of one device, by which MFU is counted: ``given`` (--peak-tflops), else from the table.

    None where neither says it: on a CPU, on a device that is not in the table, and without ``bf16``, because the peak
    of float32 depends on whether TF32 is allowed.
    """
    if given is not None or not bf16 or not torch.cuda.is_available():
        return given
    name = device_name()
    # whole words: an RTX A4000 is no A40, and an A10G no A10
    return next((peak for words, peak in BF16_PEAKS if re.search(rf"\b{words}\b", name)), None)
