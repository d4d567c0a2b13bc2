"""benchmarks/history.py: what is kept, and what counts as slower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.history import file_of, keep
from benchmarks.spread import Spread

MACHINE = {"device": "Intel(R) Xeon(R) @ 2.10GHz", "threads": 2, "busy_processors": 0.0, "copy_bytes_per_s": 1e10}
OPTIONS = {"rounds": 3, "quick": False, "json": "out.json"}


def kept(folder: Path, seconds: Spread, options: dict[str, Any] = OPTIONS, **machine: Any) -> list[str]:
    return keep(folder, "layer.py", options, {**MACHINE, **machine}, {"forward": seconds})


def test_only_what_left_its_spread_is_slower(tmp_path: Path) -> None:
    assert "the first quiet run" in kept(tmp_path, Spread(1.0, 0.9, 1.2))[0]
    assert "nothing became slower" in kept(tmp_path, Spread(1.15, 1.1, 1.3), {**OPTIONS, "json": "other.json"})[0]
    (told,) = kept(tmp_path, Spread(1.5, 1.4, 1.6))
    assert "forward became slower, 1.5e+03 ms (1.4e+03-1.6e+03) after 1.15e+03 ms (1.1e+03-1.3e+03)" in told
    assert "nothing became slower" in kept(tmp_path, Spread(0.5, 0.4, 0.6))[0]
    lines = file_of(tmp_path, MACHINE).read_text().splitlines()
    assert [json.loads(line)["times"]["forward"][0] for line in lines] == [1.0, 1.15, 1.5, 0.5]


@pytest.mark.parametrize("options, machine", [({"rounds": 4}, {}), (OPTIONS, {"threads": 1})])
def test_other_options_and_machines_are_not_compared(options: dict, machine: dict, tmp_path: Path) -> None:
    kept(tmp_path, Spread(1.0, 0.9, 1.2))
    assert "the first quiet run" in kept(tmp_path, Spread(9.0, 9.0, 9.0), options, **machine)[0]


def test_busy_runs_are_kept_and_never_compared(tmp_path: Path) -> None:
    kept(tmp_path, Spread(1.0, 0.9, 1.2))
    assert "other programs used 1.5 processors" in kept(tmp_path, Spread(9.0, 9.0, 9.0), busy_processors=1.5)[0]
    assert "forward became slower" in kept(tmp_path, Spread(2.0, 2.0, 2.0))[0]
    assert file_of(tmp_path, MACHINE).name == "intel-r-xeon-r-2-10ghz-2-threads.jsonl"
