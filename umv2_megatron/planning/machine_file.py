"""The file of a machine's measured rates, which ``tools/plan.py --machine`` reads:

    {"format": 1, "device": "NVIDIA H100 80GB HBM3", "rates": {"memory_bandwidth": 2610.0, ...}, "source": "..."}

``benchmarks/machine.py`` writes it for a CPU, ``tools/gpu_check.sh`` for a GPU. Rates that it lacks keep the defaults
of ``device.Device``.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from umv2_megatron.planning.device import Device

FORMAT = 1


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
