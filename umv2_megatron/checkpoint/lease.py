"""One job per save directory where there are no kernel locks: a file that its owner renews, and that lapses.

The file is created exclusively, where the store can (S3: If-None-Match), and written anew every RENEW_S seconds. A
second job that finds it waits until it is renewed, and is refused, or until it is LEASE_S seconds old by the store's
own clock, and takes it over; at once where the owner was a process of this machine that is gone. An owner that finds
another one in the file stops publishing: it asks before each save begins and before the file that publishes it.

Not excluded: an owner that hangs for longer than LEASE_S between that question and its last request, and a store that
neither creates exclusively nor shows a write at once.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any

from umv2_megatron.durable_files import CheckpointError
from umv2_megatron.parallel.members import member, myself

if TYPE_CHECKING:
    from umv2_megatron.remote_path import RemotePath

LEASE_S = 60.0
"""Age at which a lease that nobody has renewed is taken over."""
RENEW_S = 10.0
_LOOK_S = 1.0
"""Seconds between two looks at another one's lease."""
_SETTLE_S = 0.5
"""After taking a lapsed lease over: seconds until another job that does so, too, has written its own."""


class Lease:
    """Holds the file `path` until `release()`, the end of a `with` block, or LEASE_S after the end of the process.

    Raises CheckpointError naming the owner where another job holds it, or where the store fails.
    """

    def __init__(self, path: RemotePath, warn: Callable[[str], None], flag: str = "--save") -> None:
        self._flag = flag
        self.path = path
        self._warn = warn
        self._over = threading.Event()
        self._owner: dict[str, Any] = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "start": datetime.now().astimezone().isoformat(timespec="seconds"),
            "token": uuid.uuid4().hex,
            "process": myself(0).to_text(),
        }
        try:
            self._acquire()
        except OSError as error:
            raise CheckpointError(
                f"{flag} {path.parent} cannot be locked ({error.strerror}): choose a place this job may write to, and "
                "check endpoint and credentials"
            ) from error
        self._thread = threading.Thread(target=self._renew, name="lease of --save", daemon=True)
        self._thread.start()

    def confirm(self) -> None:
        """Raise CheckpointError where the lease is not this job's any more; OSError where the store fails."""
        found = self._read()
        if found is not None and found.get("token") == self._owner["token"]:
            return
        taken = "is gone" if found is None else f"was taken over by {_told(found)}"
        raise CheckpointError(
            f"{self._flag} {self.path.parent}: the lock {taken}, as this job had not renewed it for {LEASE_S:.0f} "
            "seconds; nothing was published; start one of the jobs again"
        )

    def release(self) -> None:
        """Give the directory up."""
        if self._over.is_set():
            return
        self._over.set()
        self._thread.join(LEASE_S)
        try:
            self.confirm()
            self.path.unlink(missing_ok=True)
        except (OSError, CheckpointError) as error:
            self._warn(f"{self.path} was not removed: {error}")

    # ------------------------------------------------------------------ acquiring

    def _acquire(self) -> None:
        if self.path.create(self._content()):
            return
        first = self._read()
        while True:
            found = self._read()
            if found is None:
                if self.path.create(self._content()):
                    return
                continue
            if first is None or found.get("token") != first.get("token"):
                first = found  # another owner than before
            if found.get("renewed") != first.get("renewed"):
                raise CheckpointError(
                    f"{self._flag} {self.path.parent} is in use by {_told(found)}: stop that job or choose another "
                    "directory"
                )
            if _is_gone(found) or self._age() > LEASE_S:
                break
            time.sleep(_LOOK_S)
        self._warn(f"{self.path} was left by {_told(found)}, which is gone: this job takes it over")
        self.path.unlink(missing_ok=True)
        self.path.create(self._content())
        time.sleep(_SETTLE_S)
        found = self._read()
        if found is None or found.get("token") != self._owner["token"]:
            raise CheckpointError(
                f"{self._flag} {self.path.parent} is in use by {_told(found or {})}: stop that job or choose another "
                "directory"
            )

    def _age(self) -> float:
        """Seconds since the lease was renewed, by the store's clock alone: hosts may have others."""
        probe = self.path.with_name(f".lock_{self._owner['token']}")
        probe.write_bytes(b"")
        try:
            return probe.modified() - self.path.modified()
        except FileNotFoundError:
            return 0.0  # given up meanwhile
        finally:
            probe.unlink(missing_ok=True)

    # ------------------------------------------------------------------ holding

    def _renew(self) -> None:
        while not self._over.wait(RENEW_S):
            try:
                found = self._read()
                if found is None or found.get("token") != self._owner["token"]:
                    self._warn(f"{self.path} is not this job's any more: the next save will fail")
                    return
                self.path.write_bytes(self._content())
            except OSError as error:
                self._warn(f"{self.path} could not be renewed, and will be again: {error.strerror}")

    def _content(self) -> bytes:
        return json.dumps({**self._owner, "renewed": uuid.uuid4().hex}).encode()

    def _read(self) -> dict[str, Any] | None:
        """What the file says; None where it is not there, nothing where it cannot be understood."""
        try:
            found = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()


def _told(owner: dict[str, Any]) -> str:
    if {"pid", "host", "start"} <= owner.keys():
        return f"process {owner['pid']} on {owner['host']}, started {owner['start']}"
    return "another process (its lock file does not say which)"


def _is_gone(owner: dict[str, Any]) -> bool:
    """Whether the owner was a process of this machine, and has ended."""
    try:
        other = member(owner["process"])
    except (KeyError, ValueError, TypeError):
        return False
    return other.place == myself(0).place and other.condition() == "gone"
