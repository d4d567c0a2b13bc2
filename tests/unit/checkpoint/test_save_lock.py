"""A save directory belongs to one job at a time, and to the next as soon as that one is dead. Real processes."""

import os
import signal
import subprocess
import sys
import time

import pytest

from umv2_megatron.checkpoint.store import CheckpointError, CheckpointStore


def test_a_file_in_place_of_the_save_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file"):
        CheckpointStore(tmp_path / "file").lock()


HOLD = """
import os, sys, time
from umv2_megatron.checkpoint.store import CheckpointStore
lock = CheckpointStore(sys.argv[1]).lock()
if os.fork() == 0:      # as a data loader worker: outlives the killed owner
    time.sleep(60); os._exit(0)
print("held", flush=True)
time.sleep(60)
"""


def test_two_jobs_in_one_directory(tmp_path):
    store = CheckpointStore(tmp_path / "run")
    store.root.mkdir()
    owner = subprocess.Popen([sys.executable, "-c", HOLD, store.root], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert owner.stdout is not None and owner.stdout.readline() == b"held\n"
        start = time.monotonic()
        with pytest.raises(CheckpointError, match=f"in use by process {owner.pid} on .*, started 20"):
            store.lock(timeout_s=0.5)
        assert time.monotonic() - start < 5
        owner.kill()
        owner.wait(10)
        with store.lock():  # the kernel freed it, although the worker still runs
            pass
        with store.lock():
            pass
    finally:
        os.killpg(owner.pid, signal.SIGKILL)
        owner.wait(10)
