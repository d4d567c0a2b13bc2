"""A hundred damages to the files of a real checkpoint: found, named, and the older checkpoint taken."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from program_runs import tiny_run, train
from test_store import delete, empty, flip_bit, truncate

from umv2_megatron.checkpoint.store import TRACKER, CheckpointError, CheckpointStore

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run with checkpoints of iterations 2 and 4, of two ranks."""
    save = tmp_path_factory.mktemp("damage") / "run"
    train(2, tiny_run(train_iters=4, save_interval=2, save=save, use_distributed_optimizer=True), save.parent / "o")
    return save


def swap(path: Path, rng: random.Random) -> None:
    """Exchange a file with another one."""
    other = rng.choice([each for each in sorted(path.parent.iterdir()) if each.is_file() and each != path])
    kept = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(kept)


def test_a_hundred_damages(saved, figure):
    """Each of five kinds twenty times, over all files of the newest checkpoint in turn."""
    newest, backup = saved / "iter_0000004", saved.parent / "backup"
    shutil.copytree(newest, backup)
    names = sorted(str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file())
    rng = random.Random(7)
    found: Counter[str] = Counter()
    for kind in (flip_bit, truncate, empty, delete, swap):
        for trial in range(20):
            damaged = newest / names[(trial + rng.randrange(len(names))) % len(names)]
            kind(damaged, rng)
            warnings: list[str] = []
            store = CheckpointStore(saved, warn=warnings.append)
            with pytest.raises(CheckpointError, match="iter_0000004"):
                store.verify(4)
            assert store.resolve() == 2 and "falling back to checkpoint 2" in warnings[-1], (kind, damaged)
            found[kind.__name__] += 1
            shutil.rmtree(newest)
            shutil.copytree(backup, newest)
    assert CheckpointStore(saved).resolve() == 4
    figure(
        "4  damaged files of a checkpoint",
        f"{found.total()}/100 found and passed over: {dict(found)}, {len(names)} files",
    )


@pytest.mark.parametrize("kind", [flip_bit, delete])
def test_a_run_goes_on_from_the_older_one(kind, saved, figure, tmp_path):
    save = tmp_path / "run"
    shutil.copytree(saved, save)
    kind(next((save / "iter_0000004").glob("*.distcp")), random.Random(1))
    argv = tiny_run(train_iters=4, save_interval=2, save=save, use_distributed_optimizer=True)
    finished = train(2, argv, tmp_path / "o")
    assert "loaded checkpoint of iteration 2 " in finished.text and "falling back to checkpoint 2" in finished.text
    whole = tiny_run(train_iters=4, use_distributed_optimizer=True)
    assert finished.weights == train(2, whole, tmp_path / "whole").weights
    figure("4  a run whose newest checkpoint is damaged", f"{kind.__name__}: goes on from the older one, bitwise")


def test_an_empty_tracker(saved, figure, tmp_path):
    save = tmp_path / "run"
    shutil.copytree(saved, save)
    (save / TRACKER).write_text("")
    argv = tiny_run(train_iters=4, save_interval=2, save=save, use_distributed_optimizer=True)
    finished = train(2, argv, tmp_path / "o")
    assert "is not a plain iteration number" in finished.text and "loaded checkpoint of iteration 4 " in finished.text
    figure("4  an empty tracker", "named; the newest valid checkpoint is taken")
