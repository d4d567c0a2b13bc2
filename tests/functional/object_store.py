"""A local S3 server (moto) in a process of its own, for tests; it notes every request, and fails those it is told to.

    with running(folder) as server:
        os.environ.update(server.environment)
        ... s3://bucket/anything ...
        server.fail(r"PUT .*distcp", 403)
        server.requests(r"GET .*distcp")
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BUCKET = "bucket"
_CODES = {403: "AccessDenied", 500: "InternalError", 507: "InsufficientStorage"}


class Server:
    """The running server. ``environment``: what a program needs to find it, with credentials that it takes."""

    def __init__(self, folder: Path, process: subprocess.Popen, port: int) -> None:
        self.process = process
        self._log, self._failing = folder / "requests", folder / "failing"
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def fail(self, pattern: str | None, status: int = 403) -> None:
        """Answer requests ``METHOD /path?query range`` that match with an error from now on; None: no more."""
        temporary = self._failing.with_suffix(".new")
        temporary.write_text(json.dumps([pattern, status]) if pattern else "")
        os.replace(temporary, self._failing)

    def requests(self, pattern: str = "") -> list[str]:
        """The requests so far that match, ``METHOD /path?query range``."""
        return [line for line in self._log.read_text().splitlines() if re.search(pattern, line)]

    def forget(self) -> None:
        """Begin to count anew."""
        self._log.write_text("")


@contextlib.contextmanager
def known_here(folder: Path) -> Iterator[Server]:
    """``running``, and this process finds it."""
    import pytest

    with running(folder) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Server]:
    """The server, with an empty BUCKET, until the end of the block."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "failing").write_text("")
    (folder / "requests").write_text("")
    process = subprocess.Popen(
        [sys.executable, __file__, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "MOTO_S3_CUSTOM_ENDPOINTS": ""},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()  # it remembers the server of another module in this process
        yield Server(folder, process, port)
    finally:
        process.kill()
        process.wait(30)


def use(environment: dict[str, str]) -> None:
    """In a forked process, before the program: where the store is."""
    os.environ.update(environment)


def files(directory: str) -> dict[str, bytes]:
    """Everything below a URL, by relative path."""
    from umv2_megatron.user_paths import user_path

    root: Any = user_path(directory)
    return {name: (root / name).read_bytes() for name in root.sizes_below()}


def _serve(folder: Path) -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from moto.s3 import s3_backends
    from werkzeug.serving import make_server
    from werkzeug.wrappers import Request, Response

    s3_backends["123456789012"]["aws"].create_bucket(BUCKET, "us-east-1")
    application: Any = DomainDispatcherApplication(create_backend_app)
    log = open(folder / "requests", "a", buffering=1)  # noqa: SIM115

    @Request.application
    def noted(request: Request) -> Any:
        query = request.query_string.decode()
        line = f"{request.method} {request.path}{'?' if query else ''}{query} {request.headers.get('Range', '')}"
        log.write(line + "\n")
        told = (folder / "failing").read_text()
        pattern, status = json.loads(told) if told else (None, 0)
        if pattern and re.search(pattern, line):
            request.get_data()
            text = f"<Error><Code>{_CODES[status]}</Code><Message>refused by the test</Message></Error>"
            return Response(text, status, content_type="application/xml")
        return application

    server = make_server("127.0.0.1", 0, noted, threaded=True)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    parent = os.getppid()
    import threading

    def leave_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    _serve(Path(sys.argv[1]))
