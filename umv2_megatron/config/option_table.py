"""Every setting of a run, made from the dataclasses that describe them, so that flags, YAML keys and code cannot drift
apart; loads neither torch nor mcore.

Each field of ``SECTIONS``' dataclasses is one ``Option``: its key in the flat dictionary of values, its section in
``--help``, how a text becomes a value, and the flags that set it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable
from typing import Any

import yaml

from umv2_megatron.config.data_config import DataConfig
from umv2_megatron.config.engram_config import EngramConfig
from umv2_megatron.config.fusion_settings import FusionSettings
from umv2_megatron.config.mcore_settings import DataParallelSettings, OptimizerSettings, TransformerSettings
from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.config.model_config import ModelConfig
from umv2_megatron.config.muon_settings import MuonSettings
from umv2_megatron.config.observation_config import ObservationConfig
from umv2_megatron.config.option import Option
from umv2_megatron.config.training_config import TrainingConfig

SECTIONS: dict[type, str] = {
    ModelConfig: "model",
    TransformerSettings: "transformer (megatron-core)",
    FusionSettings: "fused kernels (megatron-core)",
    MemoryConfig: "memory layers",
    EngramConfig: "n-gram layers beside other memory layers",
    TrainingConfig: "training, checkpoints, logging",
    ObservationConfig: "observation",
    DataConfig: "data",
    OptimizerSettings: "optimizer (megatron-core)",
    MuonSettings: "Muon",
    DataParallelSettings: "data parallelism (megatron-core)",
}


@functools.lru_cache(maxsize=1)
def option_table() -> dict[str, Option]:
    """Every option by key, in the order of ``--help``."""
    table: dict[str, Option] = {}
    for cls, section in SECTIONS.items():
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            key = f"memory_{field.name}" if cls is MemoryConfig else field.name
            assert key not in table, key
            table[key] = _make_option(key, section, field, hints[field.name])
    return table


@functools.lru_cache(maxsize=1)
def names() -> dict[str, tuple[Option, bool | None]]:
    """Every flag name (with dashes, without the leading ones) -> its option and, for switches, the value it sets."""
    found: dict[str, tuple[Option, bool | None]] = {}
    for made in option_table().values():
        found.update(dict.fromkeys(made.flags, (made, None)))
        found.update({flag: (made, value) for flag, value in made.switches.items()})
    return found


def _make_option(key: str, section: str, field: dataclasses.Field, hint: Any) -> Option:
    kind, repeated = _strip_type(hint)
    default = field.default
    if default is dataclasses.MISSING:
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else None
    given = field.metadata
    choices, extra = given["choices"], given["flags"]
    limits = {word: limit for word, limit in given["limits"].items() if limit is not None}
    rest = {
        "nullable": type(None) in typing.get_args(hint) or default is None,
        "limits": limits,
        "needs": given["needs"],
        "read_by": given["read_by"],
    }
    flags = tuple(dict.fromkeys([key.replace("_", "-"), *extra]))
    text = " ".join(given["help"].split())
    if kind is bool:
        switches = {}
        for flag in flags:
            negative = flag in extra and (flag.startswith(("no-", "disable-")) or "-no-" in flag)
            switches[flag] = not negative
            if not negative:
                switches[f"no-{flag}"] = False
        return Option(key, section, text, default, None, "true or false", None, (), switches, **rest)
    parsers: dict[Any, tuple[Callable[[str], Any], str]] = {
        int: (int, "an integer"),
        float: (float, "a number"),
        str: (str, "a text"),
        list: (_list_reader(hint), "a list such as '[1, 0]', or a plain value"),
    }
    parse, expected = parsers[kind]
    if choices:
        expected = "one of " + ", ".join(str(choice) for choice in choices)
    return Option(key, section, text, default, parse, expected, choices, flags, {}, repeated, **rest)


def _strip_type(hint: Any) -> tuple[Any, bool]:
    """``(type without Optional, whether it is a list of strings or numbers)``; unions with a list become list."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        members = [member for member in arguments if member is not type(None)]
        if len(members) == 1:
            return _strip_type(members[0])
        simple = {int, float, str}
        if all(member in simple or typing.get_origin(member) in (list, tuple) for member in members):
            return list, False
        return hint, False
    if origin in (list, tuple):
        return (
            (arguments[0], True)
            if origin is list and arguments and arguments[0] in (int, float, str)
            else (list, False)
        )
    return hint, False


def _list_reader(hint: Any) -> Callable[[str], Any]:
    """A function from text to a value or a list of values of the types that ``hint`` mentions.

    ``hint``: an annotation made of int, float or str, alone or in lists and tuples. The function raises ``ValueError``
    (or ``yaml.YAMLError``) where the text is nothing of the kind, or holds a number that is not finite.
    """
    kinds = _mentioned(hint)

    def value_of(found: Any) -> Any:
        if isinstance(found, list):
            return [value_of(item) for item in found]
        if str in kinds and isinstance(found, str):
            return found
        if isinstance(found, (str, int, float)) and not isinstance(found, bool) and kinds & {int, float}:
            number = float(str(found))
            if math.isfinite(number) and (float in kinds or number.is_integer()):
                return number if float in kinds else int(number)
        raise ValueError

    return lambda text: value_of(yaml.safe_load(text))


def _mentioned(hint: Any) -> set[Any]:
    inner = typing.get_args(hint)
    return set().union(*map(_mentioned, inner)) if inner else {hint}
