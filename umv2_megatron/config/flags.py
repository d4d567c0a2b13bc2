"""Command-line flags, generated from dataclasses so that flags, YAML keys and code cannot drift apart.

An ``Option`` is one setting: its key in the flat dictionary of values, its section in ``--help``, how a text becomes
a value, and the flags that set it. Our dataclasses describe their fields with ``option(...)`` (``memory_config.py``);
megatron-core's are read as they are: type annotations, defaults, the docstring under a field, and the flag names that
mcore itself keeps in a field's ``argparse_meta``. The same table reads presets and ``--config`` files.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import enum
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

import yaml
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from umv2_megatron.config.data_config import DataConfig
from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.config.training_config import ModelConfig, TrainingConfig
from umv2_megatron.config.usage import OneLineParser, UsageError
from umv2_megatron.config.yaml_lists import list_reader


@dataclasses.dataclass(frozen=True)
class Option:
    """One setting. ``parse`` turns text into a value; ``switches`` maps flags without an argument to the value set;
    ``nullable`` says that None (null in a file) is a value."""

    key: str
    section: str
    help: str
    default: Any
    parse: Callable[[str], Any] | None
    expected: str
    choices: tuple | None
    flags: tuple[str, ...]
    switches: dict[str, bool]
    repeated: bool = False
    nullable: bool = False


# Fields of mcore's dataclasses that are no flags here, with the reason.
NOT_FLAGS = {
    # derived from other flags
    "virtual_pipeline_model_parallel_size",
    "gated_linear_unit",
    "expert_tensor_parallel_size",
    "fp8_param",
    "overlap_p2p_comm",
    "batch_p2p_comm",
    # mcore's deprecated spellings of other fields
    "enable_cuda_graph",
    "external_cuda_graph",
    "use_custom_fsdp",
    # other models or modules than ours
    "is_hybrid_model",
    "heterogeneous_block_specs",
    "hetereogenous_dist_checkpoint",
    "multi_latent_attention",
    "experimental_attention_variant",
    "use_mamba_mem_eff_path",
    "mrope_section",
    "mlp_chunks_for_prefill",
    "flash_decode",
    "init_model_with_meta_device",
    "use_inference_optimized_layers",
    "config_logger_dir",
    "test_mode",
    "fp16",
    "use_megatron_fsdp",
    "data_parallel_sharding_strategy",
    "preserve_fp32_weights",
    "sgd_momentum",
    "symmetric_ar_type",
    "batch_invariant_mode",
    "qk_clip",
    "qk_clip_alpha",
    "qk_clip_threshold",
    # the check before the update is our own (--nan-policy)
    "check_for_nan_in_grad",
    "check_for_large_grads",
    # experts: every block has them; and what needs other packages, another schedule, or is deprecated
    "moe_layer_freq",
    "moe_enable_routing_replay",
    "moe_router_topk_limited_devices",
    "moe_router_padding_for_quantization",
    "moe_router_padding_for_fp8",
    "moe_router_force_load_balancing",
    "moe_use_legacy_grouped_gemm",
    "moe_token_dropping",
    "moe_enable_deepep",
    "moe_flex_dispatcher_backend",
    "moe_deepep_num_sms",
    "moe_hybridep_num_sms",
    "moe_shared_expert_overlap",
    "moe_per_layer_logging",
    "moe_layer_recompute",
    "moe_apply_probs_on_input",
    "moe_latent_size",
    "overlap_moe_expert_parallel_comm",
    "ep_overlap_early_attn_memory_release",
    # nothing here reads them
    "use_te_rng_tracker",
    "pipeline_model_parallel_comm_backend",
    "barrier_with_L1_time",
    "log_max_attention_logit",
    "async_tensor_model_parallel_allreduce",
    "apply_residual_connection_post_layernorm",
    "gradient_reduce_div_fusion",
    "suggested_communication_unit_size",
    # fp16's loss scaling
    "loss_scale",
    "initial_loss_scale",
    "min_loss_scale",
    "loss_scale_window",
    "hysteresis",
}
NOT_FLAG_PREFIXES = (
    "_",
    "mtp_",
    "mamba_",
    "dsa_",
    "linear_",
    "muon_",
    "fsdp_",
    "outer_dp_",
    "use_kitchen",
    "kitchen_",
    "inference_",
    "hybrid_context",
    "hierarchical_context",
    "max_seqlen_per",
    "fp4",
    "disable_symmetric",
    "nccl_ub",
    "cpu_offloading",
    "fine_grained",
    "offload_",
    "min_offloaded",
    "tp_comm_",  # Transformer Engine's user buffers are not set up
    "cuda_graph_",  # u and t are refreshed inside a forward, which a captured graph would leave out
)

# Where a language-model trainer wants another default than mcore's.
DEFAULTS: dict[str, Any] = {
    "num_layers": None,
    "hidden_size": None,
    "num_attention_heads": None,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "init_method_std": None,
    "transformer_impl": "auto",
    "lr": 4e-4,
    "min_lr": None,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "grad_reduce_in_fp32": True,
    "optimizer": "adam",
    "moe_token_dispatcher_type": "alltoall",
}
# Megatron-LM's names where they differ from the field's.
ALIASES = {
    "num_moe_experts": ("num-experts",),
    "bucket_size": ("ddp-bucket-size",),
    "grad_reduce_in_fp32": ("accumulate-allreduce-grads-in-fp32",),
}
EXTRA_CHOICES = {
    "transformer_impl": ("auto", "local", "transformer_engine"),
    "optimizer": ("adam",),
    "moe_token_dispatcher_type": ("alltoall", "allgather"),
}
SECTIONS = {
    ModelConfig: "model",
    TransformerConfig: "transformer (megatron-core)",
    MemoryConfig: "memory layers",
    TrainingConfig: "training, checkpoints, logging",
    DataConfig: "data",
    OptimizerConfig: "optimizer (megatron-core)",
    DistributedDataParallelConfig: "data parallelism (megatron-core)",
}


@functools.lru_cache(maxsize=1)
def option_table() -> dict[str, Option]:
    """Every option by key, in the order of ``--help``. A key that two dataclasses share is one option."""
    table: dict[str, Option] = {}
    for cls, section in SECTIONS.items():
        documentation = _field_docstrings(cls)
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            key = f"memory_{field.name}" if cls is MemoryConfig else field.name
            if key in table or field.name in NOT_FLAGS or field.name.startswith(NOT_FLAG_PREFIXES):
                continue
            made = _make_option(key, section, field, hints[field.name], documentation.get(field.name, ""))
            if made is not None:
                table[key] = made
    return table


def _make_option(key: str, section: str, field: dataclasses.Field, hint: Any, documentation: str) -> Option | None:
    """The option of one dataclass field, or None where its type has no form on a command line."""
    kind, repeated = _strip_type(hint)
    nullable = type(None) in typing.get_args(hint)
    default = field.default
    if default is dataclasses.MISSING:
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else None
    default = DEFAULTS.get(key, default)
    nullable = nullable or default is None
    if isinstance(default, enum.Enum):
        default = default.name
    choices = EXTRA_CHOICES.get(key, field.metadata.get("choices"))
    name = key.replace("_", "-")
    meta_flags = [flag.lstrip("-") for flag in field.metadata.get("argparse_meta", {}).get("arg_names", [])]
    names = [name, *meta_flags, *ALIASES.get(key, ())]
    text = " ".join((field.metadata.get("help") or documentation).split())
    if kind is bool:
        switches = {}
        for alias in dict.fromkeys(names):
            negative = alias in meta_flags and alias.startswith(("no-", "disable-"))
            switches[alias] = not negative
            if not negative:
                switches[f"no-{alias}"] = False
        return Option(key, section, text, default, None, "true or false", None, (), switches, False, nullable)
    if typing.get_origin(kind) is typing.Literal:
        choices = choices or typing.get_args(kind)
        kind = type(typing.get_args(kind)[0])
    elif isinstance(kind, type) and issubclass(kind, enum.Enum):
        choices, kind = tuple(kind.__members__), str
    parsers: dict[Any, tuple[Callable[[str], Any], str]] = {
        int: (int, "an integer"),
        float: (float, "a number"),
        str: (str, "a text"),
        list: (list_reader(hint), "a list such as '[1, 0]', or a plain value"),
    }
    if kind not in parsers:
        return None
    parse, expected = parsers[kind]
    if choices:
        expected = "one of " + ", ".join(str(choice) for choice in choices)
    return Option(
        key, section, text, default, parse, expected, choices, tuple(dict.fromkeys(names)), {}, repeated, nullable
    )


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


def _field_docstrings(cls: type) -> dict[str, str]:
    """The string literal under each field of a dataclass and its bases, by field name."""
    found: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        definition = ast.parse(inspect.cleandoc(inspect.getsource(base))).body[0]
        assert isinstance(definition, ast.ClassDef)
        body = definition.body
        for statement, following in zip(body, body[1:]):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
            ):
                found[statement.target.id] = str(following.value.value)
    return found


# -- reading values ------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _names() -> dict[str, tuple[Option, bool | None]]:
    """Every flag name (with dashes, without the leading ones) -> its option and, for switches, the value it sets."""
    names: dict[str, tuple[Option, bool | None]] = {}
    for made in option_table().values():
        names.update(dict.fromkeys(made.flags, (made, None)))
        names.update({flag: (made, value) for flag, value in made.switches.items()})
    return names


def read_mapping(mapping: dict[str, Any], source: str) -> dict[str, Any]:
    """Values by key from a preset or a YAML mapping whose keys are flag names (dashes or underscores).

    Raises ``UsageError`` that names ``source``, the key, its value and what was expected.
    """
    values: dict[str, Any] = {}
    for name, value in mapping.items():
        flag = str(name).replace("_", "-")
        if flag not in _names():
            raise UsageError(f"{source}: unknown key {name!r}{_suggest(flag, _names())}")
        made, switch = _names()[flag]
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
    except (ValueError, yaml.YAMLError):
        raise UsageError(f"{where} is {item!r}; expected {made.expected}") from None
    if made.choices and result not in made.choices:
        raise UsageError(f"{where} is {item!r}; expected {made.expected}")
    return result


def _suggest(flag: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(flag, list(known), n=1)
    return f"; did you mean --{close[0]}?" if close else "; see --help for all flags"


def build_parser(program: str, description: str) -> OneLineParser:
    """A parser of every option. Only flags that were given appear in the result, as raw text or switch values."""
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
    groups: dict[str, Any] = {}
    for made in option_table().values():
        if made.section not in groups:
            groups[made.section] = parser.add_argument_group(made.section)
        _add_to_parser(groups[made.section], made)
    return parser


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
            help=argparse.SUPPRESS if made.default is not True else f"turn --{made.key.replace('_', '-')} off",
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
    given, unknown = build_parser(program, description).parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0].lstrip("-")
        if not unknown[0].startswith("-"):
            raise UsageError(f"unexpected argument {unknown[0]!r}; flags start with --")
        raise UsageError(f"unknown flag --{flag}{_suggest(flag, [*_names(), 'model-preset', 'config'])}")
    raw = vars(given)
    preset, config = raw.pop("model_preset", None), raw.pop("config", None)
    values: dict[str, Any] = {}
    for key, text in raw.items():
        made = option_table()[key]
        where = "--" + (made.flags[0] if made.flags else key.replace("_", "-"))
        values[key] = text if isinstance(text, bool) else _check(made, text, None, where)
    return values, preset, config
