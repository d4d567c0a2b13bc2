"""The process of the server: its socket, its signals and its end.

SIGTERM and SIGINT: no connection is accepted any more; requests have ``GRACE`` seconds to be answered in full, and
those that still run then get 503, within a stream as its last event; then the process exits, at the latest ``LATEST``
seconds after the signal. The exit code is 0 after SIGTERM, because a server that was told to end has done what it
should and no supervisor need restart it, and 130 after SIGINT, as of every program here.
"""

from __future__ import annotations

import copy
import os
import signal
import socket
import sys
import threading
from types import FrameType
from typing import NoReturn

import uvicorn
from starlette.types import ASGIApp
from uvicorn.config import LOGGING_CONFIG

from umv2_megatron.serving.engine import Engine

GRACE = 2.0
LATEST = 4.0


def listen_on(host: str, port: int) -> socket.socket:
    """A socket at ``port`` of ``host``, 0 for a free one. It takes no connection before the server does.

    Raises ``ValueError`` naming the flag where there is no such address or the port is taken.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host is {host!r}; expected an address of this machine: {error}") from error
    family, kind, protocol, _, address = found[0]
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        raise ValueError(
            f"--host is {host!r} and --port is {port}; expected an address of this machine and a free port, or port 0 "
            f"for any: {error.strerror}"
        ) from error
    return made


def url_of(listening: socket.socket) -> str:
    """The address in the form that clients take."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


def serve(app: ASGIApp, engine: Engine, listening: socket.socket, log_level: str, ready: str) -> NoReturn:
    """Serve until a signal, then exit. ``ready`` is printed once requests are taken."""
    logs = copy.deepcopy(LOGGING_CONFIG)
    logs["handlers"]["access"]["stream"] = "ext://sys.stderr"  # stdout has the line that says where it listens
    config = uvicorn.Config(
        app,
        log_config=logs,
        http="h11",  # one implementation, whatever else is installed
        ws="none",
        lifespan="off",
        log_level=log_level,
        server_header=False,
        timeout_graceful_shutdown=int(LATEST - 1),
    )
    server = _Server(config, engine, ready)
    # uvicorn raises the signals again that it got; these handlers let them pass
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: None)
    server.run(sockets=[listening])
    leave(server.exit_code)


def leave(code: int) -> NoReturn:
    """Exit without waiting for the thread of the engine, which may be inside a pass of the model."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class _Server(uvicorn.Server):
    """uvicorn's, which tells the engine of a signal and says when it takes requests."""

    def __init__(self, config: uvicorn.Config, engine: Engine, ready: str) -> None:
        super().__init__(config)
        self._engine = engine
        self._ready = ready
        self.exit_code = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._ready, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The handler of signals."""
        self.exit_code = 130 if sig == signal.SIGINT else 0
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._engine.stop(GRACE)
        timer = threading.Timer(LATEST, leave, [self.exit_code])  # whatever hangs
        timer.daemon = True
        timer.start()
        await super().shutdown(sockets)
