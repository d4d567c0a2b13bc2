"""Serve an export over HTTP with the API of OpenAI, by transformers' own server.

    python tools/serve.py exports/demo --port 8000
    python tools/serve.py exports/demo --memory-tables mmap --device cpu
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"model": "exports/demo", "prompt": "def main(", "max_tokens": 40, "stream": true}'

This is ``transformers serve`` with our classes made known to it, and takes all its flags (``--help`` lists them). The
command of transformers itself cannot serve a model whose class is not its own: it looks for the class in its own
package, with --trust-remote-code, too (transformers 5.23.0). Here no code of the export is run.

Needs what ``pip install transformers[serving]`` installs beside torch: accelerate, fastapi, openai, uvicorn.
"""

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

from umv2_megatron.training.tool_entry import program_name

NEEDED = ("accelerate", "fastapi", "openai", "uvicorn")
PLACES = ("device", "cpu", "mmap")


def take_memory_tables(argv: list[str]) -> str | None:
    """Remove --memory-tables from ``argv`` and return its value; ``ValueError`` when it has none that we know."""
    for index, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag == "--memory-tables":
            if not equals:
                value = argv[index + 1] if index + 1 < len(argv) else ""
            if value not in PLACES:
                raise ValueError(f"--memory-tables is {value!r}; expected one of {', '.join(PLACES)}")
            del argv[index : index + (1 if equals else 2)]
            return value
    return None


def check(argv: list[str], tables: str | None) -> None:
    """Refuse, in one sentence, what the server would answer with a traceback at the first request.

    ``tables`` is the value of --memory-tables.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"not installed: {', '.join(missing)}; install them with: pip install {' '.join(NEEDED)}")
    model = argv[0] if argv and not argv[0].startswith("-") else None
    if model is None:
        raise ValueError("the export to serve is missing: give its directory as the first argument")
    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        kind = config["model_type"]  # the config.json of a checkpoint, iter_*, has none
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{model} is no export: expected a directory with a config.json that names a model_type "
            "(convert_checkpoint.py to-hf)"
        ) from None
    if tables is not None and kind != "umv2":
        raise ValueError(f"--memory-tables is {tables}; leave it out: {model} is of model_type {kind}")
    from umv2_megatron.evaluation.huggingface_scoring import holds_tokenizer

    if not holds_tokenizer(model):
        raise ValueError(f"{model} holds no tokenizer: export it without --no-tokenizer, or bring the tokenizer.json")


def main(argv: list[str]) -> int:
    """Make our classes known to transformers, then run its server."""
    asked_for_help = bool({"-h", "--help"} & set(argv))
    try:
        tables = take_memory_tables(argv)
        if not asked_for_help:
            check(argv, tables)
    except ValueError as error:
        print(f"{program_name()}: error: {error}", file=sys.stderr)
        return 2
    if asked_for_help:
        print(__doc__ + "\n--memory-tables device|cpu|mmap: where value tables stay (default: device)")
        print("--host, --port, --device, --dtype and others are the server's own: `transformers serve --help`")
        return 0
    import transformers
    from transformers.cli.transformers import main as transformers_main

    import umv2_megatron.hf  # noqa: F401  (registers our classes)
    from umv2_megatron.evaluation.huggingface_scoring import load_whole_model

    options = {} if tables is None else {"memory_tables": tables}
    # the server takes the class of a model from the package by the name in config.json, and only loads from it
    loader = SimpleNamespace(from_pretrained=partial(load_whole_model, flag="the export", **options))
    transformers.UMv2ForCausalLM = loader  # type: ignore[attr-defined]
    sys.argv = ["transformers", "serve", *argv]
    try:
        transformers_main()
    except ValueError as error:  # the server loads its model before it answers
        print(f"{program_name()}: error: {error}", file=sys.stderr)
        return 2
    return 0


def run() -> NoReturn:
    """The program."""
    sys.exit(main(sys.argv[1:]))
