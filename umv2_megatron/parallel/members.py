"""The ranks of a run as processes of an operating system: who they are, and whether they live, seen from the same host.

A process number alone does not name a process: numbers are used again, and every container counts its own. So a member
also carries the start of its process, and a name of the host that differs between containers and between boots.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import astuple, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Member:
    """One rank. ``place``: the boot and process namespace; ``started``: the kernel's clock ticks, "" if unknown."""

    rank: int
    host: str
    pid: int
    place: str
    started: str

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"

    def to_text(self) -> str:
        """For the store; ``member`` reads it."""
        return json.dumps(astuple(self))

    def condition(self) -> str:
        """What the kernel says: "gone", "stopped" or "" (it runs, or cannot be known).

        Of use for members of this process's own ``place`` only.
        """
        if not self.started:
            return ""
        state, started = _state(self.pid)
        if not state:
            return ""
        if started != self.started or state in "ZX":
            return "gone"
        return "stopped" if state in "Tt" else ""


def member(text: str) -> Member:
    """The member that ``to_text`` wrote."""
    return Member(*json.loads(text))


def myself(rank: int) -> Member:
    """This process."""
    pid = os.getpid()
    return Member(rank, socket.gethostname(), pid, _place(), _state(pid)[1])


def _place() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}.{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def _state(pid: int) -> tuple[str, str]:
    """State letter and start of a process, as /proc tells them; a process that is not there is in state "X".

    Both are "" where /proc cannot be read for another reason (no file descriptor left): nobody may be accused for that.
    """
    try:
        # the second field, the program's name in brackets, may hold blanks and brackets
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], fields[19]
    except (FileNotFoundError, ProcessLookupError):
        return "X", ""
    except (OSError, IndexError):
        return "", ""
