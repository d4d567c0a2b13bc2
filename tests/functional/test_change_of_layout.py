"""A run goes on from its checkpoint in another layout by the same command; tools/inspect_checkpoint.py shows both."""

from __future__ import annotations

import json
import runpy
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from program_runs import ROOT, tiny_run, train

from umv2_megatron.training.metrics import read_metrics

COMMON = {"lr": 1e-3, "min_lr": 1e-3, "make_vocab_size_divisible_by": 1024, "lr_decay_iters": 4, "save_interval": 2,
          "memory_num_keys": 9, "train_iters": 4}  # fmt: skip
SHARDED = {"memory_parallel_size": 2, "memory_parallel_mode": "row", "use_distributed_optimizer": True}


def numbers(save: Path) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step."""
    return [(line["lm loss"], line["grad-norm"]) for line in read_metrics(save) if "lm loss" in line]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Two steps on two ranks with tables sharded by row, two more on one rank."""
    save = tmp_path_factory.mktemp("run") / "run"
    train(2, tiny_run(**COMMON, **SHARDED, save=save, exit_interval=2), save.parent / "two")
    train(1, tiny_run(**COMMON, save=save), save.parent / "one")
    return save


@pytest.fixture
def inspect(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Calls the tool as a command does, in this process: exit code, output and errors."""

    def call(*arguments: str) -> tuple[int, str, str]:
        handler = signal.getsignal(signal.SIGTERM)
        monkeypatch.setattr(sys, "argv", ["inspect_checkpoint.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "tools" / "inspect_checkpoint.py"), run_name="__main__")
        signal.signal(signal.SIGTERM, handler)
        told = capsys.readouterr()
        return ended.value.code, told.out, told.err

    return call


def test_the_same_command_goes_on_in_another_layout(run, tmp_path):
    train(1, tiny_run(**COMMON, save=tmp_path / "whole"), tmp_path)
    ours, theirs = numbers(run), numbers(tmp_path / "whole")
    assert len(ours) == 4
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_inspect_says_what_is_there_and_who_saved_it(run, inspect):
    first = json.loads(inspect(str(run), "--iteration", "2", "--keys", "*table.values", "--json", "--verify")[1])
    assert first["iteration"] == 2 and first["verified"] is True
    assert first["saved_by"]["memory parallel"] == 2 and first["saved_by"]["memory parallel mode"] == "row"
    assert first["saved_by"]["distributed optimizer"] is True and first["saved_by"]["ranks"] == 2
    assert first["saved_by"]["optimizer state"] == "by parameter"
    weight = next(entry for entry in first["keys"] if entry["key"] == "decoder.layers.0.mlp.memory.table.values")
    assert weight == {"key": weight["key"], "kind": "tables", "dtype": "float32", "shape": [81, 24],
                      "bytes": 81 * 24 * 4, "shards": 2}  # fmt: skip
    assert {entry["kind"] for entry in first["keys"]} == {"tables", "moments"}
    totals = first["totals"]
    parameters = totals["tables"]["bytes"] + totals["weights"]["bytes"]
    assert totals["moments"]["bytes"] == 2 * parameters and totals["main parameters"] == {"keys": 0, "bytes": 0}
    assert totals["buffers"]["keys"] == 6

    code, second, _ = inspect(str(run / "iter_0000004"))
    assert code == 0 and "iteration 4" in second
    assert "ranks 1, tensor parallel 1," in second and "distributed optimizer off" in second
    lines = {line.split()[0]: line.split()[1:] for line in second.splitlines() if line}
    assert lines["decoder.layers.0.mlp.memory.table.values"] == ["float32", "81x24", "7,776", "1"]


def test_inspect_refuses_in_one_line(run, inspect, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shard = copy / "iter_0000002" / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    cases = [
        (["--verify", "--iteration", "2", str(copy)], 1, "__0_0.distcp has SHA-256"),
        (["--iteration", "3", str(copy)], 2, "holds 2, 4"),
        ([str(tmp_path / "nowhere")], 2, "holds no checkpoint"),
    ]
    for arguments, expected, words in cases:
        code, output, errors = inspect(*arguments)
        assert code == expected and words in errors and errors.startswith("inspect_checkpoint.py: error: ")
        assert output == "" and len(errors.splitlines()) == 1
