"""A disk that is full, read-only or fails during a save: the older checkpoint stays, and the run goes on from it."""

from __future__ import annotations

import errno
import os
import re
import subprocess
from pathlib import Path

import pytest
from program_runs import tiny_run, train

from umv2_megatron.checkpoint.store import CheckpointStore

pytestmark = pytest.mark.faults

SETTINGS = {"train_iters": 6, "save_interval": 2, "num_layers": 1}


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same run on a good disk: its weights, and the bytes of a checkpoint."""
    folder = tmp_path_factory.mktemp("whole")
    finished = train(2, tiny_run(**SETTINGS, save=folder / "run"), folder / "o")
    return finished.weights, size_of(folder / "run" / "iter_0000006")


def failed(argv: list[str], folder: Path, prepare=None, arguments: tuple = ()) -> str:
    """The one sentence with which all ranks end."""
    ended = train(2, argv, folder, prepare, arguments, codes=1)
    errors = [re.search("pretrain_umv2.py: error: (.*)", output) for output in ended.outputs]
    assert all(errors) and "Traceback" not in ended.text, ended.text[-4000:]
    return errors[0][1]


@pytest.mark.parametrize("share", [1.05, 1.3, 1.6, 1.9])
def test_full(share, small_disk, whole, figure, tmp_path):
    """A file system with room for one checkpoint and a part of the second."""
    weights, bytes_of_one = whole
    disk = small_disk(int(share * bytes_of_one) + 65536)
    argv = tiny_run(**SETTINGS, save=disk / "run")
    told = failed(argv, tmp_path / "o")
    # torch.save tells a full disk in words of its own
    assert "No space left on device" in told or "RuntimeError: [enforce fail" in told, told
    assert "published checkpoints" in told and "are untouched" in told
    needed, free = re.search(r"bytes needed: (\d+), bytes free: (\d+)", told).groups()
    assert 0 <= int(free) < int(needed) <= bytes_of_one
    assert CheckpointStore(disk / "run").resolve() == 2
    assert not list((disk / "run").glob(".tmp_*"))
    subprocess.run(["mount", "-o", f"remount,size={8 * bytes_of_one}", str(disk)], check=True)
    assert train(2, argv, tmp_path / "o").weights == weights
    figure(
        "5  disk full",
        f"room for {share} checkpoints: {needed} bytes needed, {free} free told; older one intact, bitwise",
    )


def test_read_only(small_disk, whole, figure, tmp_path):
    """After an error a file system turns read-only; then the command is started again."""
    weights, bytes_of_one = whole
    disk = small_disk(8 * bytes_of_one)
    argv = tiny_run(**SETTINGS, save=disk / "run")
    train(2, [*argv, "--exit-interval", "4"], tmp_path / "o")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    told = failed(argv, tmp_path / "o")
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert "Read-only file system" in told and str(disk) in told, told
    assert CheckpointStore(disk / "run").resolve() == 4
    assert train(2, argv, tmp_path / "o").weights == weights
    figure("5  disk read-only", "error named; checkpoints intact, bitwise after it")


def break_writes(kind: str, number: int, iteration: int) -> None:
    """A system call that writes fails with error ``number`` from the save of ``iteration`` on, as on a broken disk."""
    begin = CheckpointStore.begin

    def broken(*arguments, **named):
        raise OSError(number, os.strerror(number), str(arguments[0]))

    def begun(store, number, bytes_needed=None):
        if number == iteration:
            setattr(os, kind, broken)
        return begin(store, number, bytes_needed)

    CheckpointStore.begin = begun


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EDQUOT], ids=lambda number: errno.errorcode[number])
@pytest.mark.parametrize("kind", ["fsync", "rename"])
def test_input_output_error(kind, number, whole, figure, tmp_path):
    argv = tiny_run(**SETTINGS, save=tmp_path / "run")
    told = failed(argv, tmp_path / "o", break_writes, (kind, number, 4))
    assert os.strerror(number) in told and "are untouched" in told, told
    assert CheckpointStore(tmp_path / "run").resolve() == 2
    assert train(2, argv, tmp_path / "o").weights == whole[0]
    figure("5  a write that fails", f"{errno.errorcode[number]} of {kind}: named; older one intact, bitwise after it")
