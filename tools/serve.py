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
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

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


def check(argv: list[str]) -> None:
    """Refuse, in one sentence, what the server would answer with a traceback at the first request."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"not installed: {', '.join(missing)}; install them with: pip install {' '.join(NEEDED)}")
    model = argv[0] if argv and not argv[0].startswith("-") else None
    if model is None:
        raise ValueError("the export to serve is missing: give its directory as the first argument")
    if not (Path(model) / "config.json").is_file():
        raise ValueError(f"{model} is no export: expected a directory with a config.json (convert_checkpoint.py to-hf)")


def main(argv: list[str]) -> int:
    """Make our classes known to transformers, then run its server."""
    asked_for_help = "--help" in argv
    try:
        tables = take_memory_tables(argv)
        if not asked_for_help:
            check(argv)
    except ValueError as error:
        print(f"serve.py: error: {error}", file=sys.stderr)
        return 2
    if asked_for_help:
        print(__doc__ + "\n--memory-tables device|cpu|mmap: where value tables stay (default: device)\n")
    import transformers
    from transformers.cli.transformers import main as transformers_main

    from umv2_megatron.hf import UMv2ForCausalLM  # registers the configuration, too

    options = {} if tables is None else {"memory_tables": tables}
    # the server takes the class of a model from the package by the name in config.json, and only loads from it
    loader = SimpleNamespace(from_pretrained=partial(UMv2ForCausalLM.from_pretrained, **options))
    transformers.UMv2ForCausalLM = loader  # type: ignore[attr-defined]
    sys.argv = ["transformers", "serve", *argv]
    transformers_main()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
