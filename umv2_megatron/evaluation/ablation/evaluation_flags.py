"""The key ``evaluate`` of a plan as flags of tools/evaluate.py, checked by that program's own parser.

So a flag that cannot work is refused before the first trial, and not when hours of training are over.
"""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import Any, NoReturn

from umv2_megatron.evaluation import evaluate_flags

OURS = ("load", "output", "label", "hf-model", "help", "h")
"""What the runner gives to each trial's evaluation, or what gives none."""


def evaluation_words(settings: dict[str, Any], path: Path) -> list[str]:
    """The command line of ``settings``, which are flags without their dashes; [] where there are none.

    Raises ``ValueError`` naming the plan ``path`` and the key at fault; looks at no other file.
    """
    if not settings:
        return []
    actions = evaluate_flags.parser("")._option_string_actions
    words = []
    for key, value in settings.items():
        name = key.replace("_", "-")
        if name in OURS:
            raise ValueError(f"{path}: evaluate: {key} is set; expected it left out, because every trial gets its own")
        action = actions.get("--" + name)
        if action is None:
            close = difflib.get_close_matches("--" + name, actions, n=1)
            hint = f"did you mean {close[0][2:]}?" if close else "tools/evaluate.py --help shows all flags"
            raise ValueError(f"{path}: evaluate: unknown key {key!r}; {hint}")
        if value is None:
            continue  # null in a plan: the flag's default
        if isinstance(value, bool):
            words += [f"--{name}"] if value else []
        elif isinstance(value, list):
            values = [str(item) for item in value]
            words += [f"--{name}", *(values if action.nargs == "+" else [",".join(values)])]
        else:
            words += [f"--{name}", str(value)]
    _parsed(words, path)
    return words


def check_evaluation_files(words: list[str], path: Path) -> None:
    """Raises ``ValueError`` naming the plan and the flag of a file to evaluate on that is not there."""
    if words:
        arguments = _parsed(words, path)
        try:
            evaluate_flags.check_files(arguments)
        except ValueError as error:
            raise ValueError(f"{path}: evaluate: {error}") from error


def _parsed(words: list[str], path: Path) -> argparse.Namespace:
    def refuse(message: str) -> NoReturn:
        raise ValueError(message)

    parser = evaluate_flags.parser("")
    parser.error = refuse  # type: ignore[assignment, method-assign]
    try:
        arguments = parser.parse_args(["--load", "a-trial", *words])
        evaluate_flags.check_flags(arguments)
    except ValueError as error:
        raise ValueError(f"{path}: evaluate: {' '.join(str(error).split())}") from error
    return arguments
