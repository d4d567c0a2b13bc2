"""Flags of Megatron-LM's scripts that are no settings here, but may stand on a command line: noted, or translated.

``noted_flags.yaml`` lists those that say what is so here anyway, with the note that a run prints, and those that stand
for flags of ours. Two read other files: ``--data-args-path`` and ``--per-split-data-args-path`` become the flags whose
values they hold, so that a checkpoint names the corpora themselves. What is refused stands in ``refused_flags.yaml``.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import yaml

from umv2_megatron.config.usage import UsageError

NOTED = Path(__file__).with_name("noted_flags.yaml")
SPLITS = ("train", "valid", "test")
FILES = {
    "data-args-path": "a file with the values of --data-path, separated by blanks",
    "per-split-data-args-path": 'a JSON file {"train": [...], "valid": [...], "test": [...]} with the values of '
    "--train-data-path, --valid-data-path and --test-data-path",
}


@functools.cache
def entries() -> dict[str, dict[str, Any]]:
    """What ``noted_flags.yaml`` says of each flag, by its name without dashes."""
    listed = yaml.safe_load(NOTED.read_text(encoding="utf-8"))
    return {flag: entry for entry in listed for flag in entry["flags"]}


def translate(argv: list[str]) -> tuple[list[str], list[str]]:
    """The command line in flags of ours, and the notes, one sentence for each flag that changes nothing.

    Raises ``UsageError`` naming the flag, its value or file, and what was expected.
    """
    translated: list[str] = []
    notes: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        flag, equals, value = word[2:].partition("=") if word.startswith("--") else ("", "", "")
        if flag in FILES:
            translated += _from_file(flag, value if equals else _value(flag, words, FILES[flag]))
            continue
        entry = entries().get(flag)
        if entry is None:
            translated.append(word)
            continue
        if "only" in entry:
            value = value if equals else _value(flag, words, entry["only"])
            if value != entry["only"]:
                raise UsageError(f"--{flag} is {value!r}; expected {entry['only']}: {entry['note']}")
        elif equals:
            raise UsageError(f"--{flag} is {value!r}; expected no value")
        translated += entry.get("means", [])
        stands = f"stands for {' '.join(entry['means'])}" if "means" in entry else entry["note"]
        notes.append(f"--{flag}: {stands}")
    return translated, notes


def _value(flag: str, words: list[str], expected: str) -> str:
    if not words or words[0].startswith("--"):
        raise UsageError(f"--{flag} has no value; expected {expected}")
    return words.pop(0)


def _from_file(flag: str, path: str) -> list[str]:
    """The flags that the file of ``flag`` stands for."""
    expected = f"expected {FILES[flag]}"
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as problem:
        raise UsageError(f"--{flag} is {path}, which cannot be read ({problem.strerror}); {expected}") from None
    except UnicodeDecodeError:
        raise UsageError(f"--{flag} is {path}, which is no text; {expected}") from None
    if flag == "data-args-path":
        if not text.split():
            raise UsageError(f"--{flag} is {path}, which is empty; {expected}")
        return ["--data-path", *text.split()]
    try:
        held = json.loads(text)
        if not isinstance(held, dict) or not held or not held.keys() <= set(SPLITS):
            raise ValueError
        lists = {name: [str(word) for word in held[name]] for name in SPLITS if isinstance(held.get(name), list)}
        if lists.keys() != held.keys() or not all(lists.values()):
            raise ValueError
    except (ValueError, RecursionError):
        raise UsageError(f"--{flag} is {path}; {expected}") from None
    return [word for name, values in lists.items() for word in (f"--{name}-data-path", *values)]
