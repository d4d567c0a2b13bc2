"""The device that a run is planned for: rates of its memory, its products and its links, assumed or measured.

A machine file holds measured ones:

    {"format": 1, "device": "NVIDIA H100 80GB HBM3", "rates": {"memory_bandwidth": 2610.0, ...}, "source": "..."}

``benchmarks/machine.py`` writes it for a CPU, ``tools/gpu_check.sh`` for a GPU. Rates that it lacks keep their
defaults.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 1


@dataclass(frozen=True)
class Device:
    """Figures of a rank's device and links; bandwidths in GB/s (1e9 bytes), in one direction, as achieved.

    ``row_bandwidth``: of rows read at random places of a table; ``update_bandwidth``: of the optimizer, whose state is
    read and written; ``launch_us``: microseconds that the host takes to start an operation; ``starts_ahead``: 1 where
    the host starts operations while the device computes (a GPU), 0 where it computes itself.
    """

    peak_tflops: float = 989.0
    flops_efficiency: float = 0.6
    memory_bandwidth: float = 2500.0
    row_bandwidth: float = 2000.0
    update_bandwidth: float = 2500.0
    intra_node_bandwidth: float = 360.0
    inter_node_bandwidth: float = 40.0
    gpus_per_node: int = 8
    link_latency_us: float = 20.0
    launch_us: float = 5.0
    starts_ahead: int = 1
    host_bandwidth: float = 20.0
    host_memory_bandwidth: float = 30.0

    def seconds(self, sent: float, ranks: int, stride: int, *, all_to_all: bool = False) -> float:
        """Time to send ``sent`` bytes in a group of ``ranks`` whose members are ``stride`` ranks apart."""
        if ranks == 1 or sent <= 0:
            return 0.0
        here = max(1, min(ranks, self.gpus_per_node // stride))
        crossing = sent * (ranks - here) / (ranks - 1)
        inside = sent - crossing
        if not all_to_all:
            crossing /= here
        longest = max(inside / self.intra_node_bandwidth, crossing / self.inter_node_bandwidth)
        return self.link_latency_us * 1e-6 + longest / 1e9


def read_machine(path: str) -> tuple[str, dict[str, Any]]:
    """Name and rates of a machine file. Raises ``ValueError`` naming --machine, the file and what is wrong in it."""
    expected = "expected the JSON that benchmarks/machine.py or tools/gpu_check.sh writes"
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}")
        name, rates = str(content["device"]), dict(content["rates"])
    except OSError as problem:
        raise ValueError(f"--machine is {path}, which cannot be read ({problem.strerror}); {expected}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as problem:
        raise ValueError(f"--machine is {path}; {expected} ({problem!r})") from None
    kinds: dict[str, Any] = {field.name: type(field.default) for field in dataclasses.fields(Device)}
    for key, rate in rates.items():
        if key not in kinds:
            raise ValueError(f"--machine is {path}, which has the rate {key!r}; expected some of {', '.join(kinds)}")
        number = isinstance(rate, (int, float)) and not isinstance(rate, bool) and math.isfinite(rate)
        if not number or (rate <= 0 and key != "starts_ahead") or (kinds[key] is int and rate != int(rate)):
            raise ValueError(f"--machine is {path}, which has {key} {rate!r}; expected a number above 0")
    return name, {key: kinds[key](rate) for key, rate in rates.items()}


def write_machine(path: Path, device: str, rates: dict[str, float], source: str) -> None:
    """Write a machine file. ``source``: the command and the date."""
    unknown = rates.keys() - {field.name for field in dataclasses.fields(Device)}
    assert not unknown, unknown
    content = {"format": FORMAT, "device": device, "rates": rates, "source": source}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
