"""One resolved configuration of a run: flags over file over preset over defaults, checked before anything is started.

``resolve`` is the only door: it returns a ``RunConfig`` or raises ``UsageError`` with one sentence. The same object
makes megatron-core's own configuration dataclasses, and is what is printed, saved as ``config.yaml`` and stored in
every checkpoint.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from umv2_megatron.config.data_config import DataConfig
from umv2_megatron.config.flags import SECTIONS, UsageError, option_table, parse_flags, read_mapping
from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.config.presets import PRESETS
from umv2_megatron.config.training_config import ModelConfig, TrainingConfig


@dataclasses.dataclass
class RunConfig:
    """All settings of a run by key (``values``) and where each came from (``sources``: default, preset, file, flag)."""

    values: dict[str, Any]
    sources: dict[str, str]
    world_size: int = 1

    def __post_init__(self) -> None:
        self.model: ModelConfig = self._fill(ModelConfig)
        self.training: TrainingConfig = self._fill(TrainingConfig)
        self.data: DataConfig = self._fill(DataConfig)
        self.memory: MemoryConfig = self._fill(MemoryConfig, prefix="memory_")

    def __getattr__(self, key: str) -> Any:
        """A setting by key, for those that live in megatron-core's dataclasses (``num_layers``, ``bf16``, ...)."""
        values = self.__dict__.get("values", {})
        if key in values:
            return values[key]
        raise AttributeError(f"no setting {key!r}")

    def _fill(self, cls: type, prefix: str = "") -> Any:
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: self.values[prefix + name] for name in names if prefix + name in self.values})

    def _replace(self, **changes: Any) -> None:
        self.values.update(changes)
        self.__post_init__()

    # -- derived ----------------------------------------------------------------------------------------------

    @property
    def has_memory(self) -> bool:
        """Whether the blocks have memory layers."""
        return self.model.ffn_variant == "umv2"

    @property
    def data_parallel_size(self) -> int:
        """Replicas of the dense model."""
        return self.world_size // (
            self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        )

    @property
    def global_batch_size(self) -> int:
        """Samples per optimizer step."""
        return self.training.global_batch_size or self.training.micro_batch_size * self.data_parallel_size

    @property
    def num_microbatches(self) -> int:
        """Forward passes per rank and optimizer step."""
        return self.global_batch_size // (self.training.micro_batch_size * self.data_parallel_size)

    @property
    def train_iters(self) -> int:
        """Optimizer steps of the whole run."""
        if self.training.train_samples:
            return self.training.train_samples // self.global_batch_size
        return self.training.train_iters or 0

    @property
    def params_dtype(self) -> torch.dtype:
        """Data type of the weights that the forward pass uses."""
        return torch.bfloat16 if self.bf16 else torch.float32

    def padded_vocab_size(self, vocab_size: int) -> int:
        """``vocab_size`` rounded up to a multiple of --make-vocab-size-divisible-by times the TP size."""
        multiple = self.model.make_vocab_size_divisible_by * self.tensor_model_parallel_size
        return math.ceil(vocab_size / multiple) * multiple

    # -- megatron-core's dataclasses ----------------------------------------------------------------------------

    def transformer_config(self) -> TransformerConfig:
        """The TransformerConfig of this run. Raises ``UsageError`` with mcore's own sentence when it refuses."""
        arguments = self._fields_of(TransformerConfig)
        arguments["params_dtype"] = self.params_dtype
        arguments["pipeline_dtype"] = self.params_dtype
        arguments["hetereogenous_dist_checkpoint"] = True  # keys by layer: memory layers need not be in every block
        arguments["expert_model_parallel_size"] = 1  # the memory groups use mcore's expert groups; mcore has no experts
        arguments["num_query_groups"] = self.num_query_groups if self.model.group_query_attention else None
        arguments["virtual_pipeline_model_parallel_size"] = self.virtual_pipeline_size
        arguments["fp8_param"] = self.fp8_param_gather
        arguments["cuda_graph_scope"] = []  # mcore's own default is deprecated; with cuda_graph_impl it means "all"
        if self.model.swiglu:
            arguments.update(gated_linear_unit=True, activation_func=F.silu)
        # Batched, the messages of two stages that are both neighbours of each other would be taken for one another.
        arguments["overlap_p2p_comm"] = self.virtual_pipeline_size is not None
        arguments["batch_p2p_comm"] = self.virtual_pipeline_size is None
        return _build(TransformerConfig, arguments)

    def optimizer_config(self) -> OptimizerConfig:
        """The OptimizerConfig of this run."""
        return _build(OptimizerConfig, {**self._fields_of(OptimizerConfig), "params_dtype": self.params_dtype})

    def ddp_config(self) -> DistributedDataParallelConfig:
        """The DistributedDataParallelConfig of this run."""
        return _build(DistributedDataParallelConfig, self._fields_of(DistributedDataParallelConfig))

    def _fields_of(self, cls: type) -> dict[str, Any]:
        keys = {field.name for field in dataclasses.fields(cls)} & self.values.keys()
        return {key: self.values[key] for key in keys}

    @property
    def virtual_pipeline_size(self) -> int | None:
        """Virtual pipeline stages per rank, or None."""
        per_stage = self.model.num_layers_per_virtual_pipeline_stage
        return self.num_layers // self.pipeline_model_parallel_size // per_stage if per_stage else None

    # -- text ---------------------------------------------------------------------------------------------------

    def to_yaml(self, only_changed: bool = False) -> str:
        """YAML with flag names as keys, readable by ``--config``; ``only_changed`` leaves the defaults out."""
        chosen = {
            key: value
            for key, value in self.values.items()
            if not only_changed or self.sources.get(key, "default") != "default"
        }
        return yaml.safe_dump(chosen, sort_keys=False, default_flow_style=None, width=110)

    def describe(self) -> str:
        """One line per setting, grouped as in ``--help``, with the source of what is not a default."""
        lines: list[str] = []
        section = None
        for key, made in option_table().items():
            if made.section != section:
                section = made.section
                lines.append(f"  -- {section}")
            source = self.sources.get(key, "default")
            note = "" if source == "default" else f"   ({source})"
            lines.append(f"  {key} {'.' * max(2, 46 - len(key))} {self.values[key]}{note}")
        return "\n".join(lines)


def _build(cls: type, arguments: dict[str, Any]) -> Any:
    try:
        return cls(**arguments)
    except (ValueError, AssertionError) as error:
        raise UsageError(" ".join(str(error).split()) or f"{cls.__name__} refuses these flags") from error


def resolve(
    argv: list[str],
    world_size: int = 1,
    *,
    program: str = "pretrain_umv2.py",
    description: str = "",
    for_training: bool = True,
    checkpoint_values: Callable[[str, int | None], dict[str, Any]] | None = None,
) -> RunConfig:
    """Read a command line and check it. Raises ``UsageError``; starts nothing and writes nothing.

    ``checkpoint_values(directory, step)`` gives the settings of a checkpoint; with --use-checkpoint-args its model and
    memory sizes take the place of a preset.
    """
    flags, preset, config_file = parse_flags(argv, program, description)
    layers: list[tuple[str, dict[str, Any]]] = []
    file = {} if config_file is None else read_mapping(_read_yaml(config_file), config_file)
    given = {**file, **flags}
    directory = given.get("load") or given.get("save")
    if given.get("use_checkpoint_args") and directory and checkpoint_values is not None:
        try:
            saved = checkpoint_values(directory, given.get("ckpt_step"))
        except ValueError as error:
            raise UsageError(f"--use-checkpoint-args: {error}") from error
        layers.append((f"checkpoint in {directory}", model_values(saved)))
    if preset is not None:
        if preset not in PRESETS:
            raise UsageError(f"--model-preset is {preset!r}; expected one of {', '.join(PRESETS)}")
        layers.append((f"preset {preset}", read_mapping(PRESETS[preset].flags(), f"preset {preset}")))
    if config_file is not None:
        layers.append((config_file, file))
    layers.append(("flag", flags))
    return from_layers(layers, world_size, for_training=for_training)


def model_values(values: dict[str, Any]) -> dict[str, Any]:
    """Of settings by key, those that say what the model is (not how it is split, trained or logged)."""
    sections = {SECTIONS[ModelConfig], SECTIONS[MemoryConfig], SECTIONS[TransformerConfig]}
    own = {key for key, made in option_table().items() if made.section in sections}
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
        "bf16",
        "backend",
        "impl",
        "initialization",
        "deterministic",
        "virtual",
    )
    return any(part in key for part in parts)


def from_layers(layers: list[tuple[str, dict[str, Any]]], world_size: int, *, for_training: bool = True) -> RunConfig:
    """A checked ``RunConfig`` from defaults and layers ``(source, values by key)``; later layers win."""
    values = {key: made.default for key, made in option_table().items()}
    sources: dict[str, str] = {}
    for source, layer in layers:
        values.update(layer)
        sources.update(dict.fromkeys(layer, source))
    run = RunConfig(values, sources, world_size)
    _fill_derived_defaults(run)
    check(run, for_training=for_training)
    return run


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config is {path!r}; expected a readable YAML file ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config is {path!r}; not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UsageError(f"--config is {path!r}; expected a mapping of flag names to values")
    return content


def _fill_derived_defaults(run: RunConfig) -> None:
    """Defaults that follow from other settings."""
    changes: dict[str, Any] = {}
    if run.transformer_impl == "auto":
        has_engine = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
        changes["transformer_impl"] = "transformer_engine" if has_engine else "local"
    if run.init_method_std is None and run.hidden_size:
        # ultramemv2 "paper" initialisation: every linear layer sqrt(2/(5H)); the released code uses 0.02
        changes["init_method_std"] = math.sqrt(2 / (5 * run.hidden_size)) if run.memory.init == "paper" else 0.02
    if run.min_lr is None:
        changes["min_lr"] = run.lr / 10 if run.lr is not None else None
    if run.model.max_position_embeddings is None:
        changes["max_position_embeddings"] = run.model.seq_length
    split = run.tensor_model_parallel_size * run.pipeline_model_parallel_size * run.context_parallel_size
    if run.training.global_batch_size is None and split > 0 and run.world_size % split == 0:
        # as a value, so that a resume on another number of ranks notices that its batch would be another one
        changes["global_batch_size"] = run.global_batch_size
    run._replace(**changes)
    if run.training.lr_warmup_fraction is not None and run.training.global_batch_size:
        horizon = run.training.lr_decay_iters or run.train_iters
        run._replace(lr_warmup_iters=int(run.training.lr_warmup_fraction * horizon))


# -- checks ----------------------------------------------------------------------------------------------------------


def check(run: RunConfig, *, for_training: bool = True) -> None:
    """Raise ``UsageError`` naming the flag when the settings cannot work together on ``run.world_size`` ranks."""
    for key in ("num_layers", "hidden_size", "num_attention_heads"):
        if not run.values[key]:
            raise UsageError(f"--{key.replace('_', '-')} is missing; give it or choose a --model-preset")
    _check_shapes(run)
    _check_layout(run)
    if run.has_memory:
        try:
            run.memory.validate(run.hidden_size, run.num_layers)
        except ValueError as error:
            raise UsageError(str(error)) from error
        _check_memory_layout(run)
    if for_training:
        _check_schedule(run)
    run.transformer_config()
    run.optimizer_config()


def _refuse(flag: str, value: Any, expected: str) -> None:
    raise UsageError(f"--{flag} is {value}; expected {expected}")


def _check_shapes(run: RunConfig) -> None:
    for key in (
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "kv_channels",
        "ffn_hidden_size",
        "seq_length",
        "micro_batch_size",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "log_interval",
        "make_vocab_size_divisible_by",
        "global_batch_size",
        "num_layers_per_virtual_pipeline_stage",
    ):
        if run.values[key] is not None and run.values[key] < 1:
            _refuse(key.replace("_", "-"), run.values[key], "an integer of at least 1")
    if run.kv_channels is None and run.hidden_size % run.num_attention_heads:
        _refuse("hidden-size", run.hidden_size, f"a multiple of --num-attention-heads ({run.num_attention_heads})")
    if run.model.group_query_attention:
        groups = run.num_query_groups
        if not groups or groups < 1 or run.num_attention_heads % groups:
            _refuse(
                "num-query-groups",
                groups,
                f"a divisor of --num-attention-heads ({run.num_attention_heads}) with --group-query-attention",
            )
    if run.model.seq_length > run.max_position_embeddings:
        _refuse(
            "seq-length", run.model.seq_length, f"at most --max-position-embeddings ({run.max_position_embeddings})"
        )
    if run.num_moe_experts:
        _refuse("num-experts", run.num_moe_experts, "no value; blocks of experts are not built by this program yet")


def _check_layout(run: RunConfig) -> None:
    tp, pp, cp = run.tensor_model_parallel_size, run.pipeline_model_parallel_size, run.context_parallel_size
    if run.world_size % (tp * pp * cp):
        raise UsageError(
            f"--tensor-model-parallel-size {tp} x --pipeline-model-parallel-size {pp} x --context-parallel-size {cp} = "
            f"{tp * pp * cp} does not divide the {run.world_size} ranks; start a multiple of {tp * pp * cp} ranks"
        )
    if run.num_layers % pp and not (run.num_layers_in_first_pipeline_stage or run.num_layers_in_last_pipeline_stage):
        _refuse("pipeline-model-parallel-size", pp, f"a divisor of --num-layers ({run.num_layers})")
    per_stage = run.model.num_layers_per_virtual_pipeline_stage
    if per_stage and (pp == 1 or run.num_layers // pp % per_stage):
        _refuse(
            "num-layers-per-virtual-pipeline-stage",
            per_stage,
            f"a divisor of the {run.num_layers // pp} layers of a pipeline stage, with at least 2 stages",
        )
    if run.sequence_parallel and tp == 1:
        run._replace(sequence_parallel=False)  # nothing to split over one rank
    if run.sequence_parallel and run.model.seq_length % tp:
        _refuse("seq-length", run.model.seq_length, f"a multiple of --tensor-model-parallel-size ({tp})")
    if run.ffn_hidden_size and run.ffn_hidden_size % tp:
        _refuse("ffn-hidden-size", run.ffn_hidden_size, f"a multiple of --tensor-model-parallel-size ({tp})")
    if run.expert_model_parallel_size != 1:
        _refuse("expert-model-parallel-size", run.expert_model_parallel_size, "1; no blocks of experts are built yet")
    if run.transformer_impl == "local" and cp > 1:
        _refuse(
            "context-parallel-size", cp, "1 with --transformer-impl local; Transformer Engine's attention splits it"
        )
    if run.fp8 and run.transformer_impl != "transformer_engine":
        _refuse(
            "fp8-format", run.fp8, "no value without Transformer Engine; install requirements-gpu.txt on a GPU machine"
        )
    if run.transformer_impl == "transformer_engine" and importlib.util.find_spec("transformer_engine") is None:
        _refuse(
            "transformer-impl",
            "transformer_engine",
            "local, or a machine with Transformer Engine (requirements-gpu.txt)",
        )
    if run.overlap_param_gather and not (run.use_distributed_optimizer and run.overlap_grad_reduce):
        raise UsageError(
            "--overlap-param-gather is on; expected --use-distributed-optimizer and --overlap-grad-reduce too"
        )


def _check_memory_layout(run: RunConfig) -> None:
    memory, tp, pp = run.memory, run.tensor_model_parallel_size, run.pipeline_model_parallel_size
    if memory.parallel_size != 1:
        _refuse("memory-parallel-size", memory.parallel_size, "1; sharded value tables are not built yet")
    if tp > 1 and not run.sequence_parallel:
        _refuse(
            "tensor-model-parallel-size",
            tp,
            "1, or --sequence-parallel too, so that tensor-parallel ranks hold distinct tokens for the memory layers",
        )
    if memory.sharing in ("ring", "noring") and pp > 1:
        _refuse("memory-sharing", memory.sharing, "none or block with --pipeline-model-parallel-size above 1")
    if memory.sharing == "block" and pp > 1:
        stages = pp * (run.virtual_pipeline_size or 1)
        per_stage = run.num_layers // stages
        owners = memory.memory_layers(run.num_layers)
        for stage in range(stages):
            seen = sum(owners[: (stage + 1) * per_stage])
            if seen % memory.sharing_size:
                _refuse(
                    "memory-sharing-size",
                    memory.sharing_size,
                    f"a size whose blocks do not straddle the {stages} pipeline stages of {per_stage} layers",
                )


def _check_schedule(run: RunConfig) -> None:
    training = run.training
    _check_counts(run)
    if not training.skip_train and bool(training.train_iters) == bool(training.train_samples):
        raise UsageError("--train-iters or --train-samples is needed, and only one of them")
    unit = training.micro_batch_size * run.data_parallel_size
    if run.global_batch_size < unit or run.global_batch_size % unit:
        _refuse(
            "global-batch-size",
            run.global_batch_size,
            f"a multiple of --micro-batch-size x data-parallel size = {training.micro_batch_size} x "
            f"{run.data_parallel_size} = {unit}",
        )
    if run.lr is None or run.lr <= 0 or run.min_lr > run.lr or run.min_lr < 0:
        _refuse("lr", run.lr, f"a number above 0 and at least --min-lr ({run.min_lr})")
    horizon = training.lr_decay_iters or run.train_iters
    if not training.skip_train and training.lr_warmup_iters >= max(horizon, 1):
        _refuse("lr-warmup-iters", training.lr_warmup_iters, f"fewer than the {horizon} iterations of the decay")
    if training.lr_decay_style == "WSD" and not training.lr_wsd_decay_iters:
        _refuse("lr-wsd-decay-iters", training.lr_wsd_decay_iters, "a number of iterations with --lr-decay-style WSD")
    if training.save_interval and not training.save:
        _refuse("save-interval", training.save_interval, "--save with a directory too")
    if training.async_save:
        raise UsageError("--async-save is not supported; leave it out: checkpoints are written between two steps")
    if not all(rank.strip().isdigit() for rank in training.profile_ranks.split(",")):
        _refuse("profile-ranks", repr(training.profile_ranks), "ranks separated by commas, such as 0,1")


def _check_counts(run: RunConfig) -> None:
    """Ranges of the single settings of the schedule, the intervals and the counts."""
    at_least = {
        0: ("eval_iters", "lr_warmup_iters", "max_skipped_iterations", "memory_value_lr_decay_iters", "ckpt_step"),
        1: (
            "train_iters",
            "train_samples",
            "lr_decay_iters",
            "lr_wsd_decay_iters",
            "save_interval",
            "eval_interval",
            "exit_interval",
            "exit_duration_in_mins",
            "memory_log_interval",
            "save_retain_interval",
            "distributed_timeout_minutes",
        ),
    }
    for least, keys in at_least.items():
        for key in keys:
            value = run.values[key]
            if value is not None and value < least:
                _refuse(key.replace("_", "-"), value, f"an integer of at least {least}")
    fraction = run.training.lr_warmup_fraction
    if fraction is not None and not 0 <= fraction < 1:
        _refuse("lr-warmup-fraction", fraction, "a number from 0 up to, but not, 1")
    if run.training.train_samples and run.training.train_samples < run.global_batch_size:
        _refuse("train-samples", run.training.train_samples, f"at least --global-batch-size ({run.global_batch_size})")
