"""One job per save directory: two jobs that publish into the same place would prune each other's checkpoints.

The lock is the kernel's (`flock` on `<save>/.lock`), so it vanishes with the process that held it, however it died;
the text inside the file only tells a second job whom it met.
"""

import fcntl
import json
import os
import socket
import time
import weakref
from datetime import datetime
from pathlib import Path

from umv2_megatron.durable_files import CheckpointError


def locked(descriptor: int) -> bool:
    """Lock an open file or directory until it is closed; False where another open one holds the lock.

    Raises OSError where the file system cannot lock.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def last_host(path: Path) -> str | None:
    """The host whose process has last held the lock file `path`; None where the file does not say."""
    try:
        return str(json.loads(path.read_bytes())["host"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _close_in_child(reference: "weakref.ref[SaveLock]") -> None:
    lock = reference()
    if lock is not None:
        lock._close()


class SaveLock:
    """Holds the lock file `path` until `release()`, the end of a `with` block or the end of the process.

    Raises CheckpointError naming the owner when it is still taken after `timeout_s` seconds, or when the file cannot
    be made. flag: that has named the directory, for messages.
    """

    def __init__(self, path: Path, timeout_s: float = 5.0, flag: str = "--save") -> None:
        self.path = path
        self._flag = flag
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            self._acquire(time.monotonic() + timeout_s)
            self._write_owner()
        except OSError as error:
            self._close()
            raise CheckpointError(
                f"{flag} {path.parent} cannot be locked ({error.strerror}): choose a directory this job may write to"
            ) from error
        # A forked child (data loader worker) shares the open file, and would keep the lock after its parent is killed.
        reference = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _close_in_child(reference))

    def _acquire(self, deadline: float) -> None:
        while not locked(self._descriptor):
            if time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            owner = self._read_owner()
            self._close()
            raise CheckpointError(
                f"{self._flag} {self.path.parent} is in use by {owner}: stop that job or choose another directory"
            )

    def _read_owner(self) -> str:
        try:
            owner = json.loads(os.pread(self._descriptor, 4096, 0))
            return f"process {owner['pid']} on {owner['host']}, started {owner['start']}"
        except (ValueError, KeyError, TypeError, OSError):
            return "another process (its lock file does not say which)"

    def _write_owner(self) -> None:
        owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "start": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(owner).encode(), 0)

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def release(self) -> None:
        """Give the directory up. The file stays: removing it would let two jobs hold two different files."""
        if self._descriptor >= 0:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        self._close()

    def __enter__(self) -> "SaveLock":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()
