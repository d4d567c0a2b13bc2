"""From a command line to a checked ``RunConfig``: flags over file over preset over checkpoint over defaults.

A layer that sets ``ffn_variant`` brings that variant's defaults (``variants.py``) in just below itself, if it is
another variant than the layers below have.

``resolve`` is the only door: it returns a ``RunConfig`` or raises ``UsageError`` with one sentence, and starts nothing.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from umv2_megatron.config.checks import check
from umv2_megatron.config.engram_config import EngramConfig
from umv2_megatron.config.flags import parse_flags, read_mapping
from umv2_megatron.config.fusions import resolve_fusions
from umv2_megatron.config.mcore_settings import TransformerSettings
from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.config.model_config import ModelConfig
from umv2_megatron.config.noted_flags import translate
from umv2_megatron.config.option_table import SECTIONS, option_table
from umv2_megatron.config.presets import find_preset
from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.config.training_config import TrainingConfig
from umv2_megatron.config.usage import UsageError
from umv2_megatron.config.variants import NO_ENGRAM, variant_defaults
from umv2_megatron.config.yaml_text import parse_yaml


def resolve(
    argv: list[str],
    world_size: int = 1,
    *,
    program: str = "pretrain_umv2.py",
    description: str = "",
    for_training: bool = True,
    checkpoint_values: Callable[[TrainingConfig], tuple[str, dict[str, Any]] | None] | None = None,
    before_mcore: Callable[[RunConfig], object] = lambda run: None,
) -> RunConfig:
    """Read a command line and check it. Raises ``UsageError``; starts nothing and writes nothing.

    ``before_mcore(run)`` is called before megatron-core is loaded, which checks last what it knows better; that takes
    seconds, and most mistakes are told before.

    ``checkpoint_values(training)`` gives the directory and the settings of the checkpoint that a run of these flags
    loads, None where it loads none; with --use-checkpoint-args its model and memory sizes take the place of a preset.
    """
    flags, preset, config_file = parse_flags(argv, program, description)
    layers: list[tuple[str, dict[str, Any]]] = []
    file = {} if config_file is None else read_mapping(_read_yaml(config_file), config_file)
    given = {**file, **flags}
    if given.get("use_checkpoint_args") and checkpoint_values is not None:
        own = {field.name for field in dataclasses.fields(TrainingConfig)}
        try:
            found = checkpoint_values(TrainingConfig(**{key: given[key] for key in own & given.keys()}))
        except ValueError as error:
            raise UsageError(f"--use-checkpoint-args: {error}") from error
        if found is None:
            raise UsageError(
                "--use-checkpoint-args is on; expected a checkpoint in --load or --save to take the sizes from; give "
                "its directory, or leave the flag out"
            )
        layers.append((f"checkpoint in {found[0]}", model_values(found[1])))
    if preset is not None:
        layers.append((f"preset {preset}", read_mapping(find_preset(preset).flags(), f"preset {preset}")))
    if "ffn_variant" in flags:
        file["ffn_variant"] = flags["ffn_variant"]  # the file's settings, too, are over the variant's defaults
    if file:
        layers.append((config_file or "flag", file))
    layers.append(("flag", flags))
    run = from_layers(layers, world_size, for_training=for_training, before_mcore=before_mcore)
    run.notes = translate(argv)[1]
    return run


def virtual_world_size(argv: list[str], program: str, description: str) -> int | None:
    """The number of ranks that --dry-run-world-size on this command line asks for, if any.

    Raises:
        UsageError: no number of ranks, or --dry-run is missing.
    """
    flags, _, _ = parse_flags(argv, program, description)
    size: int | None = flags.get("dry_run_world_size")
    if size is not None and size < 1:
        raise UsageError(f"--dry-run-world-size is {size}; expected the number of ranks, at least 1")
    if not flags.get("dry_run"):
        for key in ("dry_run_world_size", "dry_run_rank"):
            if flags.get(key) is not None:
                raise UsageError(f"--{key.replace('_', '-')} is {flags[key]}; expected --dry-run too, or neither")
    elif size is None and flags.get("dry_run_rank") is not None:
        raise UsageError(f"--dry-run-rank is {flags['dry_run_rank']}; expected --dry-run-world-size too")
    return size


def model_values(values: dict[str, Any]) -> dict[str, Any]:
    """Of settings by key, those that say what the model is (not how it is split, trained or logged)."""
    parts = (ModelConfig, MemoryConfig, EngramConfig, TransformerSettings)
    sections = {SECTIONS[part] for part in parts}
    own = {key for key, made in option_table().items() if made.section in sections} | {"vocab_size"}
    return {key: value for key, value in values.items() if key in own and not _is_layout(key)}


def _is_layout(key: str) -> bool:
    """Whether a setting belongs to one run's machines or precision rather than to the model."""
    parts = (
        "parallel",
        "pipeline",
        "recompute",
        "fusion",
        "overlap",
        "comm",
        "fp8",
        "amax",
        "transpose_cache",
        "bf16",
        "backend",
        "memory_backward",
        "memory_stream",
        "memory_exchange_parts",
        "impl",
        "initialization",
        "deterministic",
        "virtual",
        "wgrad",
        "microbatch",
        "dispatcher",
        "grouped_gemm",
        "saved_activations",
        "p2p",
    )
    return any(part in key for part in parts)


def from_layers(
    layers: list[tuple[str, dict[str, Any]]],
    world_size: int,
    *,
    for_training: bool = True,
    before_mcore: Callable[[RunConfig], object] = lambda run: None,
) -> RunConfig:
    """A checked ``RunConfig`` from defaults and layers ``(source, values by key)``; later layers win."""
    values = {key: made.default for key, made in option_table().items()}
    sources: dict[str, str] = {}
    for source, layer in _with_variant_defaults(layers, values):
        values.update(layer)
        sources.update(dict.fromkeys(layer, source))
    run = RunConfig(values, sources, world_size)
    _fill_derived_defaults(run)
    check(run, for_training=for_training)
    before_mcore(run)
    resolve_fusions(run, for_training=for_training)
    run.transformer_config()
    if for_training or not run.use_precision_aware_optimizer:  # mcore makes that one with Transformer Engine only
        run.optimizer_config()
    return run


def _with_variant_defaults(
    layers: list[tuple[str, dict[str, Any]]], defaults: dict[str, Any]
) -> list[tuple[str, dict[str, Any]]]:
    """``layers`` with those of the variants that they choose; see the top."""
    found: list[tuple[str, dict[str, Any]]] = []
    below, variant = dict(defaults), defaults["ffn_variant"]
    for place, (source, layer) in enumerate(layers):
        chosen = layer.get("ffn_variant", variant)
        if chosen != variant:
            variant = chosen
            given = {key: value for _, later in layers[place:] for key, value in later.items()}
            made = variant_defaults(variant, {**below, **given}, given)
            found.append((f"variant {variant}", made))
            below.update(made)
        if below.get("engram_layer_freq") is not None and layer.get("engram_layer_freq", "") is None:
            found.append((source, NO_ENGRAM))  # a null switches n-gram layers off, with all that was said of them
        found.append((source, layer))
        below.update(layer)
    return found


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        content = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config is {path!r}; expected a readable YAML file ({error.strerror})") from error
    except ValueError as error:
        raise UsageError(f"--config is {path!r}; not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UsageError(f"--config is {path!r}; expected a mapping of flag names to values")
    return content


def _has_engine() -> bool:
    if importlib.util.find_spec("transformer_engine") is None:
        return False
    import torch  # takes seconds, which a usage error on a machine without the engine is spared

    return torch.cuda.is_available()


def _fill_derived_defaults(run: RunConfig) -> None:
    """Defaults that follow from other settings."""
    changes: dict[str, Any] = {}
    for value, fraction in (("lr_warmup_iters", "lr_warmup_fraction"), ("lr_warmup_init", "lr_warmup_init_fraction")):
        if run.sources.get(value) == "flag" and run.sources.get(fraction, "flag") != "flag":
            changes[fraction] = None  # a flag is over a file, whose fraction would be over the value
    if run.transformer_impl == "auto":
        changes["transformer_impl"] = "transformer_engine" if _has_engine() else "local"
    if run.init_method_std is None and run.hidden_size:
        # ultramemv2 "paper" initialisation: every linear layer sqrt(2/(5H)); the released code uses 0.02
        changes["init_method_std"] = math.sqrt(2 / (5 * run.hidden_size)) if run.memory.init == "paper" else 0.02
    if run.min_lr is None:
        changes["min_lr"] = run.lr / 10 if run.lr is not None else None
    if run.main_grads_dtype == "bf16" and "grad_reduce_in_fp32" not in run.sources:
        changes["grad_reduce_in_fp32"] = False  # gradients are kept in the buffers in which they are reduced
    if run.model.max_position_embeddings is None:
        changes["max_position_embeddings"] = run.model.seq_length
    split = run.tensor_model_parallel_size * run.pipeline_model_parallel_size * run.context_parallel_size
    if run.training.global_batch_size is None and split > 0 and run.world_size % split == 0:
        # as a value, so that a resume on another number of ranks notices that its batch would be another one
        changes["global_batch_size"] = run.global_batch_size
    run._replace(**changes)
    if run.training.lr_warmup_fraction is not None and run.training.global_batch_size:
        horizon = run.schedule.decay // run.global_batch_size
        run._replace(lr_warmup_iters=int(run.training.lr_warmup_fraction * horizon))
