"""The process that writes shards from a snapshot: the same files as `write_shard`, errors told, and a clean end."""

from __future__ import annotations

import os
import resource
import signal
import time

import pytest
import torch
from test_shard_writing import pieces

from umv2_megatron.checkpoint.shard_writing import Piece, write_shard
from umv2_megatron.checkpoint.snapshot import Snapshot
from umv2_megatron.checkpoint.writer_process import WriterProcess
from umv2_megatron.durable_files import CheckpointError


@pytest.mark.slow
def test_files_errors_and_the_end(tmp_path):
    """One process for all, as it takes seconds to start."""
    snapshot = Snapshot()
    writer = WriterProcess(3, snapshot.descriptor)
    first = writer.pid

    # the same files, while the run changes its own tensors; then a larger snapshot in the same process
    more = pieces() + [Piece("large", torch.arange(300_000.0), "0" * 16, (0,), (300_000,))]
    for name, wanted in {"small": pieces(), "large": more}.items():
        for folder in (tmp_path / name, tmp_path / f"{name} here"):
            folder.mkdir()
        expected = write_shard(tmp_path / f"{name} here", 3, wanted)
        placed = snapshot.take(wanted)
        for piece in wanted:
            if isinstance(piece.data, torch.Tensor):
                piece.data.zero_()
        writer.write(tmp_path / name, snapshot.size, placed)
        assert writer.result() == expected
        files = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        assert files == {path.name: path.read_bytes() for path in (tmp_path / f"{name} here").iterdir()}
        assert len(files) == 2

    # a write that fails in the process only
    placed = snapshot.take(more)
    resource.prlimit(first, resource.RLIMIT_FSIZE, (100_000, 100_000))
    (tmp_path / "limited").mkdir()
    writer.write(tmp_path / "limited", snapshot.size, placed)
    with pytest.raises(OSError, match="File too large"):
        writer.result()

    # killed while it should write; then, as it is gone, another one takes its place
    os.kill(first, signal.SIGSTOP)
    writer.write(tmp_path / "limited", snapshot.size, placed)
    os.kill(first, signal.SIGKILL)
    with pytest.raises(CheckpointError, match=rf"process {first}, .* rank 3 \(--async-save\), was ended by SIGKILL"):
        writer.result()
    writer.write(tmp_path / "limited", snapshot.size, placed)
    assert writer.pid != first and writer.result().pieces

    # requests to stop are the rank's; a fork of the rank holds the pipe, and does not keep the process alive
    os.kill(writer.pid, signal.SIGTERM)
    fork = os.fork()
    if not fork:
        time.sleep(60)
        os._exit(0)
    (tmp_path / "after").mkdir()
    writer.write(tmp_path / "after", snapshot.size, placed)
    assert writer.result().pieces
    writer.close()
    os.kill(fork, signal.SIGKILL)
    os.waitpid(fork, 0)
    assert writer._process.returncode == 0
    snapshot.close()
