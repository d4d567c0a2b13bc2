"""One resolved configuration of a run (``resolve.py`` makes it from a command line).

It makes megatron-core's own configuration dataclasses, and is what is printed, saved as ``config.yaml`` and stored in
every checkpoint.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import typing
from collections.abc import Mapping
from typing import Any

import yaml

from umv2_megatron.config.batch_rampup import BatchRampup
from umv2_megatron.config.data_config import DataConfig
from umv2_megatron.config.engram_config import ngram_layers
from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.config.model_config import ModelConfig
from umv2_megatron.config.observation_config import ObservationConfig
from umv2_megatron.config.option_table import option_table
from umv2_megatron.config.training_config import TrainingConfig
from umv2_megatron.config.usage import UsageError
from umv2_megatron.config.variants import has_memory

if typing.TYPE_CHECKING:
    import torch
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import TransformerConfig


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Samples after which the learning rate has decayed, those of its warm-up, of WSD's last part (0: none), and of the
    whole run."""

    decay: int
    warmup: int
    last_part: int
    whole: int


@dataclasses.dataclass
class RunConfig:
    """All settings of a run by key (``values``) and where each came from (``sources``: default, preset, file, flag)."""

    values: dict[str, Any]
    sources: dict[str, str]
    world_size: int = 1
    notes: list[str] = dataclasses.field(default_factory=list)
    """Of flags of Megatron-LM that change nothing here or stand for others (``noted_flags.py``)."""

    def __post_init__(self) -> None:
        self.model: ModelConfig = self._fill(ModelConfig)
        self.training: TrainingConfig = self._fill(TrainingConfig)
        self.observation: ObservationConfig = self._fill(ObservationConfig)
        self.data: DataConfig = self._fill(DataConfig)
        self.memory: MemoryConfig = self._fill(MemoryConfig, prefix="memory_")
        self.ngrams: MemoryConfig | None = ngram_layers(self.values)
        """The n-gram layers beside those of ``memory`` (--engram-layer-freq)."""

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
        return has_memory(self.model.ffn_variant)

    @property
    def families(self) -> list[MemoryConfig]:
        """The kinds of memory layers that the blocks have: none, those of --ffn-variant, or n-gram layers, too."""
        first = [self.memory] if self.has_memory else []
        return first if self.ngrams is None else [*first, self.ngrams]

    @property
    def hashing(self) -> MemoryConfig | None:
        """The family whose rows are addressed by n-grams, of which there is at most one."""
        return next((family for family in self.families if family.hashes), None)

    @property
    def has_experts(self) -> bool:
        """Whether megatron-core's experts stand in the place of the FFN."""
        return self.model.ffn_variant == "moe"

    @property
    def holds_scores(self) -> bool:
        """Whether local attention holds the scores of all pairs of tokens in training (model/fused_attention.py)."""
        return holds_scores(self.values)

    @property
    def non_persistent_type(self) -> str:
        """Of non-persistent checkpoints: local or global."""
        training = self.training
        if training.non_persistent_ckpt_type is not None:
            return training.non_persistent_ckpt_type
        only_global = training.non_persistent_global_ckpt_dir and not training.non_persistent_local_ckpt_dir
        return "global" if only_global else "local"

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
        """Forward passes per rank and optimizer step, with the whole batch."""
        return self.microbatches_of(self.global_batch_size)

    def microbatches_of(self, batch: int) -> int:
        """Forward passes per rank for ``batch`` samples of all ranks."""
        return batch // (self.training.micro_batch_size * self.data_parallel_size)

    @property
    def rampup(self) -> BatchRampup:
        """The batch of each step. (A flag that cannot be is refused later, by ``schedule_checks.py``.)"""
        full, given = self.global_batch_size, self.training.rampup_batch_size or []
        return BatchRampup(full, *given) if len(given) == 3 and given[0] < full else BatchRampup(full, full)

    @property
    def train_iters(self) -> int:
        """Optimizer steps of the whole run, with this batch from its first step on."""
        return self.last_iteration(0, 0)

    @property
    def samples(self) -> int:
        """Samples of the whole run, with this batch from its first step on."""
        return self.rampup.samples_after(self.train_iters, 0)

    def last_iteration(self, iteration: int, consumed_samples: int) -> int:
        """The iteration at which a run ends that stands at ``iteration`` and has used ``consumed_samples``.

        It differs from ``train_iters`` where --train-samples says the length and earlier steps had another batch.
        """
        if self.training.train_samples:
            return iteration + self.rampup.steps_to(self.training.train_samples, consumed_samples)
        return self.training.train_iters or 0

    @property
    def schedule(self) -> Schedule:
        """The learning rate's schedule in samples."""
        training, batch = self.training, self.global_batch_size
        decay = training.lr_decay_samples or (training.lr_decay_iters or max(self.train_iters, 1)) * batch
        warmup = training.lr_warmup_samples
        last = training.lr_wsd_decay_samples or (training.lr_wsd_decay_iters or 0) * batch
        whole = training.train_samples or max(self.samples, 1)
        return Schedule(decay, training.lr_warmup_iters * batch if warmup is None else warmup, last, whole)

    @property
    def params_dtype(self) -> torch.dtype:
        """Data type of the weights that the forward pass uses."""
        import torch

        return torch.bfloat16 if self.bf16 else torch.float32

    def padded_vocab_size(self, vocab_size: int) -> int:
        """``vocab_size`` rounded up to a multiple of --make-vocab-size-divisible-by times the TP size."""
        multiple = self.model.make_vocab_size_divisible_by * self.tensor_model_parallel_size
        return math.ceil(vocab_size / multiple) * multiple

    # -- megatron-core's dataclasses ----------------------------------------------------------------------------

    def transformer_config(self) -> TransformerConfig:
        """The TransformerConfig of this run. Raises ``UsageError`` with mcore's own sentence when it refuses."""
        import torch.nn.functional as F
        from megatron.core.transformer.transformer_config import TransformerConfig

        arguments = self._fields_of(TransformerConfig)
        arguments["params_dtype"] = self.params_dtype
        arguments["pipeline_dtype"] = self.params_dtype
        arguments["hetereogenous_dist_checkpoint"] = True  # keys by layer: memory layers need not be in every block
        arguments["expert_tensor_parallel_size"] = 1
        if self.has_experts:
            arguments["moe_ffn_hidden_size"] = self.moe_ffn_hidden_size or self.ffn_hidden_size
        else:  # value tables are split over mcore's expert groups, but mcore is to know of no experts
            arguments["expert_model_parallel_size"] = 1
        # mcore sums gradients of norms of heads over tensor-parallel ranks; a norm over all heads is split over them
        arguments["qk_layernorm"] = self.qk_layernorm and self.model.qk_norm_span == "head"
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
        import torch
        from megatron.core.optimizer import OptimizerConfig

        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.uint8}
        arguments = self._fields_of(OptimizerConfig)
        for key in ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
            arguments[key] = dtypes[arguments[key]]
        arguments["store_param_remainders"] = False  # checkpoints hold whole main parameters
        arguments["optimizer"] = "adam"  # mcore's part in Muon, too: training/matrix_optimizer.py
        return _build(OptimizerConfig, {**arguments, "params_dtype": self.params_dtype})

    def ddp_config(self) -> DistributedDataParallelConfig:
        """The DistributedDataParallelConfig of this run."""
        from megatron.core.distributed import DistributedDataParallelConfig

        return _build(DistributedDataParallelConfig, self._fields_of(DistributedDataParallelConfig))

    def _fields_of(self, cls: type) -> dict[str, Any]:
        keys = {field.name for field in dataclasses.fields(cls)} & self.values.keys()
        hints = _hints(cls)
        return {key: _as_member(hints[key], self.values[key]) for key in keys}

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
        return "\n".join([*lines, *(f"  note: {each}" for each in self.notes)])


def holds_scores(values: Mapping[str, Any]) -> bool:
    """Of settings by key, whether local attention holds the scores of all pairs of tokens in training
    (model/fused_attention.py); settings that are missing have mcore's defaults."""
    return bool(
        values.get("attention_backend") in ("local", "unfused")
        or values.get("attention_dropout")
        or values.get("apply_query_key_layer_scaling")
        or values.get("window_size")
        or values.get("softmax_type", "vanilla") != "vanilla"
    )


def _as_member(hint: Any, value: Any) -> Any:
    """``value``, or the member of that name where the field is of an Enum type (settings hold the names)."""
    kinds = [kind for kind in (hint, *typing.get_args(hint)) if isinstance(kind, type) and issubclass(kind, enum.Enum)]
    return kinds[0][value] if kinds and isinstance(value, str) else value


_hints = functools.cache(typing.get_type_hints)  # of a hundred fields with names in quotes: milliseconds


def _build(cls: type, arguments: dict[str, Any]) -> Any:
    try:
        return cls(**arguments)
    except (ValueError, AssertionError) as error:
        raise UsageError(" ".join(str(error).split()) or f"{cls.__name__} refuses these flags") from error
