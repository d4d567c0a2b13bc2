"""How a run is watched from outside while it goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from umv2_megatron.config.option import option


@dataclass
class ObservationConfig:
    """Figures for monitors, utilisation of the device, and what is kept for the case of a failure."""

    metrics_port: Optional[int] = option(
        None,
        "serve the run's figures for Prometheus on rank 0 at this port, under /metrics",
        at_least=1,
        at_most=65535,
        read_by="training/pretrain.py: where figures are served",
    )
    metrics_host: str = option(
        "127.0.0.1",
        "address on which --metrics-port listens; 0.0.0.0 lets other machines read it",
        needs=("metrics_port",),
        read_by="training/pretrain.py: where figures are served",
    )
    peak_tflops: Optional[float] = option(
        None,
        "most TFLOP/s of one device, by which MFU is counted (default: of known GPUs with --bf16; else no MFU is told)",
        above=0,
        read_by="training/loop.py: the log line",
    )
    record_memory_history: bool = option(
        False,
        "when a CUDA device runs out of memory, write who holds what to <save>/memory-snapshot",
        read_by="training/pretrain.py: what is recorded",
    )
