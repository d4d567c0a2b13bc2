"""Sizes of known models, by name: what ``--model-preset`` stands for.

Presets are data: one YAML file per family in ``preset_files/``, whose comments say where sizes come from and whose form
docs/presets.md describes. This file reads them when a preset is first asked for, so that ``--help`` does not, and
refuses what it does not know: a preset with a mistyped key would be another model under the same name.
"""

from __future__ import annotations

import functools
import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypedDict

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.config.usage import UsageError
from umv2_megatron.config.variants import has_memory, variant_defaults
from umv2_megatron.config.yaml_text import parse_yaml

DIRECTORY = Path(__file__).parent / "preset_files"
FAMILIES = ("umv2", "bytes_3m", "paper_227m")
"""Files of presets without ``.yaml``, in the order in which presets are listed."""


@dataclass(frozen=True)
class ExpectedCounts:
    """Parameter counts that a preset should reach within 3%, and who states them.

    ``activated`` and ``total`` are numbers of parameters; ``total`` (None: nobody states one) is without embeddings.
    ``embeddings_in_activated``: whether ``activated`` counts the vocabulary matrix, once.
    """

    activated: float
    total: float | None
    stated_by: str
    embeddings_in_activated: bool = True


@dataclass(frozen=True)
class Preset:
    """Sizes of one model. ``model``: Megatron's flag names with underscores; ``memory``: fields of ``MemoryConfig``."""

    name: str
    description: str
    source: str
    model: dict[str, Any]
    memory: dict[str, Any] = field(default_factory=dict)
    expected: ExpectedCounts | None = None

    def flags(self) -> dict[str, Any]:
        """All fields in one dictionary by flag name; memory fields carry the prefix ``memory_``."""
        return {**self.model, **{f"memory_{name}": value for name, value in self.memory.items()}}

    @property
    def variant(self) -> str:
        """What ``--ffn-variant`` is with this preset."""
        return self.model.get("ffn_variant", "umv2")

    def memory_config(self) -> MemoryConfig:
        """The memory fields as a ``MemoryConfig``; what a preset leaves out is its variant's default."""
        made = variant_defaults(self.variant, self.model, self.flags()) if self.variant != "umv2" else {}
        switches = {name.removeprefix("memory_"): value for name, value in made.items() if name.startswith("memory_")}
        return MemoryConfig(**{**switches, **self.memory})


class _Decoder(TypedDict):
    """Model fields that every preset says. The flags themselves, with mcore's types, are seconds to load."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    group_query_attention: bool
    num_query_groups: int
    kv_channels: int
    seq_length: int
    max_position_embeddings: int
    vocab_size: int
    make_vocab_size_divisible_by: int
    untie_embeddings_and_output_weights: bool
    normalization: str
    norm_epsilon: float
    qk_layernorm: bool
    swiglu: bool
    disable_bias_linear: bool
    position_embedding_type: str
    rotary_base: int
    attention_dropout: float
    hidden_dropout: float


class _Model(_Decoder, total=False):
    """All model fields that a preset may have."""

    ffn_variant: str
    num_moe_experts: int
    moe_router_topk: int
    moe_ffn_hidden_size: int
    moe_aux_loss_coeff: float
    moe_z_loss_coeff: float


_SIZES = ("num_keys", "key_dim", "topk", "value_dim")
"""Memory fields that every preset with a memory says."""
_FAMILY = {"common": dict, "presets": dict}
_COMMON = {"model": dict, "memory": dict}
_PRESET = {"description": str, "source": str, **_COMMON, "expected": dict}
_EXPECTED = {
    float: "a number (YAML takes 1e-5 for a text: write 1.0e-5)", int: "an integer", bool: "true or false",
    str: "a text", type(None): "null", dict: "a mapping of keys to values",
}  # fmt: skip


class _Presets(Mapping[str, Preset]):
    """All presets by name, read at the first use. Raises ``UsageError`` where a file is not as it should be."""

    @functools.cached_property
    def _all(self) -> dict[str, Preset]:
        return read_presets([DIRECTORY / f"{family}.yaml" for family in FAMILIES])

    def __getitem__(self, name: str) -> Preset:
        return self._all[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)


PRESETS: Mapping[str, Preset] = _Presets()


def find_preset(name: str) -> Preset:
    """The preset called ``name``; ``UsageError`` with the known names otherwise."""
    if name not in PRESETS:
        raise UsageError(f"--model-preset is {name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def read_presets(files: list[Path]) -> dict[str, Preset]:
    """The presets of ``files`` by name, in the order of the files.

    Raises ``UsageError`` that names file, preset and key of what is unknown, missing, there twice or of a wrong type.
    """
    found: dict[str, Preset] = {}
    for path in files:
        family = _checked(_read_yaml(path), _FAMILY, f"{path}", required=["presets"])
        common = _checked(family.get("common", {}), _COMMON, f"{path}: common")
        for name, given in family["presets"].items():
            _value(name, str, f"{path}: a preset's name")
            if name in found:
                raise UsageError(f"{path}: preset {name} is in another file too; expected every name once")
            found[name] = _preset(name, given, common, f"{path}: preset {name}")
    return found


def _preset(name: str, given: Any, common: dict[str, Any], where: str) -> Preset:
    """One preset from its mapping, over what its family has in common."""
    texts = _checked(given, _PRESET, where, required=["description", "source"])
    groups = {key: {**common.get(key, {}), **texts.pop(key, {})} for key in _COMMON}
    model = _checked(groups["model"], typing.get_type_hints(_Model), f"{where}: model", _Decoder.__required_keys__)
    variant = model.get("ffn_variant", "umv2")
    sizes: tuple[str, ...] = _SIZES if has_memory(variant) else ()
    if variant == "engram":  # which searches for nothing
        sizes = ("num_keys", "value_dim")
    memory = _checked(groups["memory"], typing.get_type_hints(MemoryConfig), f"{where}: memory", sizes)
    counts = texts.pop("expected", None)
    if counts is not None:
        required = [each.name for each in fields(ExpectedCounts) if each.default is MISSING]
        hints = typing.get_type_hints(ExpectedCounts)
        counts = ExpectedCounts(**_checked(counts, hints, f"{where}: expected", required))
    return Preset(name=name, model=model, memory=memory, expected=counts, **texts)


def _checked(found: Any, kinds: dict[str, Any], where: str, required: typing.Iterable[str] = ()) -> dict[str, Any]:
    """``found`` with its values brought to the types that ``kinds`` gives by key; ``UsageError`` if they do not fit."""
    found = _value(found, dict, where)
    unknown = [key for key in found if key not in kinds]
    if unknown:
        raise UsageError(f"{where}: unknown key {unknown[0]!r}; expected one of {', '.join(kinds)}")
    missing = [key for key in kinds if key in required and key not in found]
    if missing:
        raise UsageError(f"{where}: {missing[0]} is missing")
    return {key: _value(value, kinds[key], f"{where}: {key}") for key, value in found.items()}


def _value(value: Any, hint: Any, where: str) -> Any:
    """``value`` if it is of a type that ``hint`` names; an integer is a number, true and false are not."""
    kinds = typing.get_args(hint) or (hint,)
    if type(value) is int and int not in kinds and float in kinds:
        value = float(value)
    if type(value) not in kinds or (isinstance(value, float) and not math.isfinite(value)):
        raise UsageError(f"{where} is {value!r}; expected {' or '.join(_EXPECTED[kind] for kind in kinds)}")
    return value


def _read_yaml(path: Path) -> Any:
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), fast=True)
    except ValueError as error:
        raise UsageError(f"{path}: not valid YAML: {error}") from error
