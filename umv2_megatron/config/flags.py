"""The command line and YAML files: from flags to values by key, each refusal one sentence. Loads no torch, no mcore.

A flag is one of ``option_table``'s. What else Megatron-LM knows is refused by name, with the reason and the nearest
thing here (``refused_flags.yaml``).
"""

from __future__ import annotations

import argparse
import difflib
import fnmatch
import functools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from umv2_megatron.config.noted_flags import FILES, entries, translate
from umv2_megatron.config.option import Option
from umv2_megatron.config.option_table import names, option_table
from umv2_megatron.config.text_numbers import LARGEST
from umv2_megatron.config.usage import OneLineParser, UsageError

REFUSED = Path(__file__).with_name("refused_flags.yaml")


@functools.cache
def _refusals() -> list[dict[str, Any]]:
    """What ``refused_flags.yaml`` says."""
    listed: list[dict[str, Any]] = yaml.safe_load(REFUSED.read_text(encoding="utf-8"))
    return listed


def refused(flag: str) -> str | None:
    """Why ``flag`` (with dashes, without the leading ones), which Megatron-LM knows, is none here; None where it is not
    known to it either."""
    for entry in _refusals():
        if any(fnmatch.fnmatchcase(flag, pattern) for pattern in entry["flags"]):
            return " ".join(entry["reason"].split())
    return None


def read_mapping(mapping: dict[str, Any], source: str) -> dict[str, Any]:
    """Values by key from a preset or a YAML mapping whose keys are flag names (dashes or underscores).

    Raises ``UsageError`` that names ``source``, the key, its value and what was expected.
    """
    values: dict[str, Any] = {}
    for name, value in mapping.items():
        flag = str(name).replace("_", "-")
        if flag not in names():
            raise UsageError(f"{source}: {_unknown(flag, repr(name), 'key')}")
        made, switch = names()[flag]
        values[made.key] = _check(made, value, switch, f"{source}: {name}")
    return values


def _check(made: Option, value: Any, switch: bool | None, where: str) -> Any:
    """``value`` brought to the option's type; ``UsageError`` when it does not fit."""
    if value is None:
        if not made.nullable:
            raise UsageError(f"{where} is null; expected {made.expected}")
        return None
    if switch is not None:
        if not isinstance(value, bool):
            raise UsageError(f"{where} is {value!r}; expected true or false")
        return value is switch
    values = value if made.repeated and isinstance(value, list) else [value]
    read = [_read_one(made, item, where) for item in values]
    return read if made.repeated else read[0]


def _read_one(made: Option, item: Any, where: str) -> Any:
    assert made.parse is not None
    if made.parse is int and isinstance(item, float) and item.is_integer():
        item = int(item)  # YAML reads 1e6 as a float
    try:
        result = made.parse(str(item))
        if isinstance(result, float) and not math.isfinite(result):
            raise ValueError
    except (ValueError, yaml.YAMLError, RecursionError):  # the last: a list in a list in a list...
        raise UsageError(f"{where} is {item!r}; expected {made.expected}") from None
    if made.choices and result not in made.choices:
        raise UsageError(f"{where} is {item!r}; expected {made.expected}")
    for number in result if isinstance(result, list) else [result]:
        if isinstance(number, (int, float)) and not made.within(number):
            raise UsageError(f"{where} is {item}; expected {made.range()}")
        if isinstance(number, int) and abs(number) > LARGEST:
            raise UsageError(f"{where} is {item}; expected a number that fits 64 bits")
    return result


def _unknown(flag: str, shown: str, kind: str) -> str:
    if kind == "key" and (flag in entries() or flag in FILES):
        return f"{shown} of Megatron-LM is for a command line; leave it out, or give what docs/flags.md says instead"
    reason = refused(flag)
    if reason is not None:
        return f"{shown} of Megatron-LM is not supported: {reason}"
    known: Iterable[str] = [*names(), *(("model-preset", "config") if kind == "flag" else ())]
    close = difflib.get_close_matches(flag, list(known), n=1)
    return f"unknown {kind} {shown}" + (f"; did you mean --{close[0]}?" if close else "; see --help for all flags")


@functools.cache  # three hundred flags take more time to add than to read
def build_parser(program: str, description: str) -> OneLineParser:
    """A parser of every option. Only flags that were given appear in the result, as raw text or switch values.

    Every caller of one program gets the same parser; nothing may be added to it."""
    parser = OneLineParser(
        prog=program,
        usage="%(prog)s [--model-preset NAME] [--config FILE] [flags]",
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    general = parser.add_argument_group("where values come from (later ones win): defaults, preset, file, flags")
    general.add_argument(
        "--model-preset", metavar="NAME", help="sizes of a known model; tools/plan.py --list shows all"
    )
    general.add_argument("--config", metavar="FILE", help="YAML file with flag names as keys")
    add_options(parser, option_table())
    return parser


def add_options(parser: argparse.ArgumentParser, keys: Iterable[str]) -> None:
    """Add the flags of these options, in groups by section. The parser's default must be ``argparse.SUPPRESS``;
    ``read_options`` reads what was given."""
    groups: dict[str, Any] = {}
    for key in keys:
        made = option_table()[key]
        if made.section not in groups:
            groups[made.section] = parser.add_argument_group(made.section)
        _add_to_parser(groups[made.section], made)


def read_options(raw: dict[str, Any]) -> dict[str, Any]:
    """Values by key from what the flags of ``add_options`` were given; raises ``UsageError`` as ``parse_flags``."""
    values: dict[str, Any] = {}
    for key, text in raw.items():
        made = option_table()[key]
        values[key] = text if isinstance(text, bool) else _check(made, text, None, f"--{made.flag}")
    return values


def _add_to_parser(group: Any, made: Option) -> None:
    shown = "none" if made.default is None else made.default
    stated = "" if "(default" in made.help or "off by default" in made.help else f" (default: {shown})"
    lines = _wrap(f"{made.help.rstrip('.')}{stated}".replace("%", "%%"))
    if made.switches:
        positive = [f"--{flag}" for flag, value in made.switches.items() if value]
        negative = [f"--{flag}" for flag, value in made.switches.items() if not value]
        group.add_argument(*positive, dest=made.key, action="store_const", const=True, help=lines)
        group.add_argument(
            *negative,
            dest=made.key,
            action="store_const",
            const=False,
            help=argparse.SUPPRESS if made.default is False else f"turn --{made.key.replace('_', '-')} off",
        )
        return
    metavar = (
        "{" + ",".join(str(choice) for choice in made.choices) + "}"
        if made.choices
        else made.key.split("_")[-1].upper()
    )
    group.add_argument(
        *[f"--{flag}" for flag in made.flags],
        dest=made.key,
        metavar=metavar,
        help=lines,
        nargs="+" if made.repeated else None,
    )


def _wrap(text: str, width: int = 92) -> str:
    lines, line = [], ""
    for word in text.split():
        if len(line) + len(word) + 1 > width:
            lines.append(line)
            line = ""
        line = f"{line} {word}".strip()
    return "\n".join([*lines, line])


def parse_flags(argv: list[str], program: str, description: str) -> tuple[dict[str, Any], str | None, str | None]:
    """Read a command line: ``(values by key, preset name or None, config file or None)``.

    Raises ``UsageError`` naming the flag, its value and what was expected, or suggesting the flag that was meant.
    """
    given, unknown = build_parser(program, description).parse_known_args(translate(argv)[0])
    if unknown:
        flag = unknown[0].split("=")[0].lstrip("-")
        if not unknown[0].startswith("-"):
            raise UsageError(f"unexpected argument {unknown[0]!r}; flags start with --")
        raise UsageError(_unknown(flag, f"--{flag}", "flag"))
    raw = vars(given)
    preset, config = raw.pop("model_preset", None), raw.pop("config", None)
    return read_options(raw), preset, config
