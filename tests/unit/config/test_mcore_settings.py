"""The settings written down for megatron-core are mcore's: names, types, and defaults but for those listed."""

from __future__ import annotations

import dataclasses
import enum
import typing
from pathlib import Path

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from umv2_megatron.config.flags import refused
from umv2_megatron.config.fusion_settings import AUTOMATIC, FusionSettings
from umv2_megatron.config.mcore_settings import DataParallelSettings, OptimizerSettings, TransformerSettings
from umv2_megatron.config.muon_settings import MuonSettings
from umv2_megatron.config.noted_flags import FILES, entries
from umv2_megatron.config.option_table import names

PAIRS = [
    (TransformerSettings, TransformerConfig),
    (FusionSettings, TransformerConfig),
    (OptimizerSettings, OptimizerConfig),
    (DataParallelSettings, DistributedDataParallelConfig),
    (MuonSettings, OptimizerConfig),
]
RENAMED = {"muon_use_nesterov": "muon_nesterov"}
"""Fields that mcore 0.19 calls otherwise."""
# Where a trainer of language models wants another default than mcore's dataclass has.
OTHER_DEFAULTS = {
    "num_layers", "hidden_size", "num_attention_heads", "hidden_dropout", "attention_dropout", "normalization",
    "add_bias_linear", "transformer_impl", "lr", "weight_decay", "adam_beta2", "grad_reduce_in_fp32",
    "moe_token_dispatcher_type", "init_method_std", *AUTOMATIC,
}  # fmt: skip
DTYPES: dict[typing.Any, str] = {torch.float32: "fp32"}
MEGATRON_LM = (Path(__file__).parent / "megatron_lm_flags.txt").read_text(encoding="utf-8").split()


@pytest.mark.parametrize("ours, theirs", PAIRS, ids=lambda cls: cls.__name__)
def test_fields_are_those_of_mcore(ours: type, theirs: type) -> None:
    known = {field.name: field for field in dataclasses.fields(theirs)}
    hints, wanted = typing.get_type_hints(ours), typing.get_type_hints(theirs)
    others = set()
    for field in dataclasses.fields(ours):
        name = field.name if field.name in known else RENAMED.get(field.name)
        assert name in known, f"{theirs.__name__} has no {field.name}"
        default = known[name].default
        default = default.name if isinstance(default, enum.Enum) else DTYPES.get(default, default)
        if default is dataclasses.MISSING or default != field.default:
            others.add(field.name)
        assert _kinds(hints[field.name]) <= _kinds(wanted[name]), field.name
    assert others <= OTHER_DEFAULTS


def test_no_other_default_is_listed_in_vain() -> None:
    for name in OTHER_DEFAULTS:
        ours, theirs = next((o, t) for o, t in PAIRS if name in {field.name for field in dataclasses.fields(o)})
        mine = next(field.default for field in dataclasses.fields(ours) if field.name == name)
        assert mine != next(field.default for field in dataclasses.fields(theirs) if field.name == name), name


def _kinds(hint: typing.Any) -> set[typing.Any]:
    """The plain types in an annotation: texts for enumerations and literals."""
    if typing.get_origin(hint) is typing.Literal:
        return {type(value) for value in typing.get_args(hint)}
    inner = typing.get_args(hint)
    if inner:
        return set().union(*map(_kinds, inner)) - {type(None)}
    if hint is torch.dtype or (isinstance(hint, type) and issubclass(hint, enum.Enum)):
        return {str}
    return {hint}


def test_every_flag_of_megatron_lm_is_a_flag_or_refused_with_a_reason() -> None:
    assert len(MEGATRON_LM) == 680
    known = {*names(), *entries(), *FILES, "model-preset", "config"}
    assert [flag for flag in MEGATRON_LM if flag not in known and not refused(flag)] == []


def test_no_flag_is_refused_that_exists_or_that_nobody_knows() -> None:
    import fnmatch

    import yaml

    from umv2_megatron.config.flags import REFUSED

    entries = yaml.safe_load(REFUSED.read_text(encoding="utf-8"))
    mcore = {field.name.replace("_", "-") for _, cls in PAIRS for field in dataclasses.fields(cls)}
    mcore.add("async-tensor-model-parallel-allreduce")  # a field until mcore 0.16
    mcore |= {f"no-{name}" for name in mcore}
    for pattern in (pattern for entry in entries for pattern in entry["flags"]):
        matched = [flag for flag in {*MEGATRON_LM, *mcore} if fnmatch.fnmatchcase(flag, pattern)]
        assert set(matched) - set(names()), f"{pattern} refuses nothing"
    for entry in entries:
        for word in entry["reason"].replace(",", " ").replace(";", " ").replace(")", " ").replace("(", " ").split():
            if word.startswith("--") and not word.endswith("…") and "for" not in word:
                flag = word.lstrip("-").rstrip(".,")
                assert flag in names() or flag in ("config", "model-preset", "spec"), f"{flag} in {entry['reason']!r}"
