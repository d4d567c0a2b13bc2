"""Shards are hashed while they are written, by a process that needs nothing of the run, and must be whole together."""

from __future__ import annotations

import builtins
import errno
import hashlib
import io
import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from umv2_megatron.checkpoint import shard_writing
from umv2_megatron.checkpoint.shard_writing import Piece, joined_metadata, write_shard
from umv2_megatron.checkpoint.snapshot import Snapshot
from umv2_megatron.checkpoint.tensor_checks import checksum
from umv2_megatron.checkpoint.verification import share_out
from umv2_megatron.durable_files import CheckpointError


def pieces() -> list[Piece]:
    """A column part of a matrix that lies in a larger buffer, a number, and an object."""
    buffer = torch.arange(1000, dtype=torch.float32)
    whole = buffer[100:220].view(10, 12)
    stream = io.BytesIO()
    torch.save([{"seed": 3}], stream)
    return [
        Piece("matrix", whole[:, :5], checksum(whole[:, :5]), (0, 0), (10, 12)),
        Piece("object/shard_0_1", stream.getvalue(), checksum(stream.getvalue())),
        Piece("matrix", whole[:, 5:], checksum(whole[:, 5:]), (0, 5), (10, 12)),
        Piece("number", torch.tensor(7, dtype=torch.int64), checksum(torch.tensor(7))),
    ]


def test_a_file_is_hashed_without_being_read(tmp_path, monkeypatch):
    opened = []
    real = builtins.open

    def watching(path: object, mode: str = "r", *args: object, **kwargs: object) -> object:
        opened.append(mode)
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", watching)
    shard = write_shard(tmp_path, 3, pieces())
    monkeypatch.undo()
    assert opened and all(mode == "wb" for mode in opened)
    assert shard.sealed.keys() == {"__3_0.distcp", "__3_0.checksums.json"} == {path.name for path in tmp_path.iterdir()}
    for name, (size, digest) in shard.sealed.items():
        data = (tmp_path / name).read_bytes()
        assert (size, digest) == (len(data), hashlib.sha256(data).hexdigest())
    parts = json.loads((tmp_path / "__3_0.checksums.json").read_text())["parts"]
    data = (tmp_path / "__3_0.distcp").read_bytes()
    for piece, place in zip(pieces(), shard.pieces, strict=True):
        stored = data[place.start : place.start + place.length]
        assert parts[str(place.start)] == piece.checksum
        if isinstance(piece.data, bytes):
            assert stored == piece.data
        else:
            tensor = torch.load(io.BytesIO(stored), weights_only=True)
            assert torch.equal(tensor, piece.data) and tensor.is_contiguous()
            assert place.length < tensor.nbytes + 2500, "more than the part was written"


def test_a_process_without_device_and_ranks_can_write(tmp_path):
    """What a save in the background does: descriptions of the pieces travel, and what comes back is small."""
    snapshot = Snapshot()
    (tmp_path / "placed").write_bytes(pickle.dumps(snapshot.take(pieces())))
    program = (
        "import pickle, sys, pathlib, torch; from umv2_megatron.checkpoint.shard_writing import write_shard\n"
        "from umv2_megatron.checkpoint.snapshot import read_snapshot\n"
        "here = pathlib.Path(sys.argv[1]); (here / 'out').mkdir()\n"
        "placed = pickle.loads((here / 'placed').read_bytes())\n"
        "shard = write_shard(here / 'out', 0, read_snapshot(int(sys.argv[2]), int(sys.argv[3]), placed))\n"
        "assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()\n"
        "assert not [name for name in sys.modules if name.startswith('megatron')]\n"
        "(here / 'shard').write_bytes(pickle.dumps(shard))\n"
    )
    subprocess.run(
        [sys.executable, "-c", program, tmp_path, str(snapshot.descriptor), str(snapshot.size)],
        check=True,
        cwd=Path(__file__).parents[3],
        pass_fds=[snapshot.descriptor],
    )
    snapshot.close()
    (tmp_path / "here").mkdir()
    assert pickle.loads((tmp_path / "shard").read_bytes()) == write_shard(tmp_path / "here", 0, pieces())


def test_nothing_to_write_makes_no_file(tmp_path):
    assert write_shard(tmp_path, 0, []).sealed == {} and not list(tmp_path.iterdir())


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shard_writing.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_shard(tmp_path, 0, pieces())


def test_the_parts_of_all_ranks_must_be_whole(tmp_path):
    shard = write_shard(tmp_path, 0, pieces())
    metadata, tensor_bytes = joined_metadata([shard])
    assert tensor_bytes == 480 + 8 and len(metadata.state_dict_metadata) == 3

    def refused(*changed: shard_writing.Written) -> str:
        with pytest.raises(CheckpointError) as caught:
            joined_metadata([replace(shard, pieces=list(changed))])
        return str(caught.value)

    left, thing, right, number = shard.pieces
    assert "matrix was not saved: its 1 parts hold 50 of 120 elements" in refused(left, thing, number)
    assert "lie on top of each other" in refused(left, replace(right, offset=(0, 4)))
    assert "lie on top of each other" in refused(left, right, left)
    assert "or outside" in refused(left, replace(right, offset=(0, 6)))
    assert "torch.float16" in refused(left, replace(right, dtype=torch.float16))
    assert "object/shard_0_1 was not saved: 2 ranks write it" in refused(thing, thing)
    # as many elements as there are, some of them twice
    assert "lie on top" in refused(replace(left, sizes=(5, 12)), replace(right, sizes=(5, 12), offset=(4, 0)))


def test_files_are_shared_out_evenly():
    sizes = {str(number): number * 10 for number in range(1, 101)}
    shares = share_out(sizes, 7)
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    totals = [sum(sizes[name] for name in share) for share in shares]
    assert max(totals) - min(totals) <= 20
    assert share_out({}, 3) == [[], [], []]
