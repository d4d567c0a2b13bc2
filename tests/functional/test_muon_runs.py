"""Runs with Muon: they go on in other layouts, say what they refuse, and their checkpoints can be inspected."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from program_runs import ROOT, losses, tiny_run, train

MUON: dict[str, Any] = {
    "optimizer": "muon", "muon_extra_scale_factor": 0.2, "muon_fp32_matmul_prec": "highest",
    "muon_tp_mode": "duplicated", "make_vocab_size_divisible_by": 1024, "train_iters": 4,
}  # fmt: skip


@pytest.mark.slow
def test_a_run_goes_on_with_dist_muon_and_with_tensor_parallelism(tmp_path: Path) -> None:
    train(1, tiny_run(**MUON, save=tmp_path / "whole"), tmp_path / "o")
    save = tmp_path / "run"
    train(1, tiny_run(**MUON, save=save, exit_interval=2), tmp_path / "o")
    train(2, tiny_run(**{**MUON, "optimizer": "dist_muon"}, save=save, exit_interval=3), tmp_path / "o")
    tensor = {"tensor_model_parallel_size": 2, "make_vocab_size_divisible_by": 512}
    train(2, tiny_run(**{**MUON, **tensor}, save=save), tmp_path / "o")
    ours, theirs = ([loss for _, loss in losses(each)] for each in (save, tmp_path / "whole"))
    assert len(ours) == 4 and ours == pytest.approx(theirs, rel=1e-5)
    told = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "inspect_checkpoint.py"), str(save)],
        capture_output=True, text=True, timeout=100, check=True,
    ).stdout  # fmt: skip
    assert "optimizer.state.momentum_buffer.decoder.layers.0.self_attention.linear_qkv.weight" in told
    assert "optimizer muon" in told


def test_what_a_checkpoint_of_muon_refuses(tmp_path: Path) -> None:
    save = tmp_path / "run"
    train(1, tiny_run(**MUON, save=save, exit_interval=2), tmp_path / "o")
    without = dict.fromkeys(key for key in MUON if key.startswith("muon_"))
    for changes, words in (
        ({"optimizer": "adam", **without}, "--optimizer is adam, but the checkpoint was trained with muon"),
        ({"muon_momentum": 0.9}, "--muon-momentum is 0.9, but the checkpoint was trained with 0.95"),
    ):
        done = train(1, tiny_run(**{**MUON, **changes}, save=save), tmp_path / "o", codes=2)
        assert words in done.text, done.text[-2000:]
    fresh = {"optimizer": "adam", **without, "load": save, "no_load_optim": True, "save": tmp_path / "fresh"}
    train(1, tiny_run(**{**MUON, **fresh}), tmp_path / "o")
