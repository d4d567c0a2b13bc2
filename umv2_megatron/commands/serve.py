"""Serve an export over HTTP with the API of OpenAI.

    python tools/serve.py exports/demo --port 8000
    python tools/serve.py exports/demo --memory-tables mmap --device cpu
    curl 127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"model": "demo", "prompt": "def main(", "max_tokens": 40, "stream": true}'

Routes: POST /v1/completions, POST /v1/chat/completions (of a model with a chat template), GET /v1/models,
GET /v1/models/NAME, GET /health. Requests and answers are those that OpenAI documents; a parameter that is not
supported is refused with status 400, never ignored. docs/inference.md lists what is supported.

The model is a directory on this machine: nothing is downloaded and no code of the export is run. There is no
authentication. SIGTERM ends the server within 5 seconds, with exit code 0.
"""

from __future__ import annotations

import argparse
import importlib.util
from typing import NoReturn

from umv2_megatron.evaluation.local_export import MEMORY_TABLES, check_export
from umv2_megatron.training.tool_entry import run_tool

NEEDED = ("starlette", "uvicorn")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def check(arguments: argparse.Namespace) -> None:
    """Refuse, in one sentence, what needs no model to be seen as wrong."""
    for flag, value, low, high in (
        ("--port", arguments.port, 0, 65535),
        ("--max-concurrent", arguments.max_concurrent, 1, 10_000),
        ("--max-request-bytes", arguments.max_request_bytes, 1000, 2**31),
    ):
        if not low <= value <= high:
            raise ValueError(f"{flag} is {value}; expected an integer from {low} to {high}")
    if "" in (arguments.served_model_name or []):
        raise ValueError("--served-model-name is empty; expected a name, or leave it out")
    check_export(arguments.model, "the export", arguments.memory_tables)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"not installed: {', '.join(missing)}; install them: pip install -r requirements-serve.txt")


def main(arguments: argparse.Namespace) -> None:
    """Take the address, load the model, then serve until a signal."""
    check(arguments)
    from umv2_megatron.serving.server import listen_on, serve, url_of

    listening = listen_on(arguments.host, arguments.port)  # before the model, whose loading may take minutes
    import torch

    from umv2_megatron.evaluation.local_export import open_export
    from umv2_megatron.serving.app import Api
    from umv2_megatron.serving.engine import Engine
    from umv2_megatron.serving.names import ModelNames

    export = open_export(
        arguments.model,
        "the export",
        memory_tables=arguments.memory_tables,
        dtype="auto" if arguments.dtype == "auto" else getattr(torch, arguments.dtype),
        device=device_of(arguments.device),
    )
    names = ModelNames(arguments.model, arguments.served_model_name)
    engine = Engine(arguments.max_concurrent)
    app = Api(export, names, engine, arguments.max_request_bytes).app()
    serve(app, engine, listening, arguments.log_level, f"serving {names.id} at {url_of(listening)}")


def device_of(name: str) -> object:
    """The ``torch.device`` of --device. Raises ``ValueError`` where this machine has none of that name."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device is {name}; expected auto, cpu, cuda or cuda:N of this machine: {reason}") from error


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model", help="directory of the export (convert_checkpoint.py to-hf), with its tokenizer")
    made.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)"
    )
    made.add_argument("--port", type=int, default=8000, help="port to listen on; 0: a free one (default: 8000)")
    made.add_argument(
        "--served-model-name",
        action="append",
        metavar="NAME",
        help="name of the model for clients; may be given several times, the first is the one in answers. The path as "
        "given, relative or absolute, and its last part are always accepted (default: the path)",
    )
    made.add_argument(
        "--memory-tables",
        choices=MEMORY_TABLES,
        help="where value tables stay; mmap reads the picked rows from the files (default: device)",
    )
    made.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto, a GPU if there is one)"
    )
    made.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: auto, as in the files)")
    made.add_argument(
        "--max-concurrent",
        type=int,
        default=64,
        metavar="N",
        help="requests worked on at a time, each with its own cache of keys and values; they take turns, one token "
        "each. There is no queue beyond: a further request is answered 429 at once (default: 64)",
    )
    made.add_argument(
        "--max-request-bytes",
        type=int,
        default=4 * 2**20,
        metavar="BYTES",
        help="largest body of a request; a larger one is answered 413 (default: 4194304)",
    )
    made.add_argument(
        "--log-level",
        choices=("critical", "error", "warning", "info", "debug"),
        default="info",
        help="what goes to stderr; info has a line for each request (default: info)",
    )
    return made


def run() -> NoReturn:
    """The program."""
    run_tool(parser(), main)
