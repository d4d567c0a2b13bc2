"""Dense decoders of transformers (Llama, Mistral, Qwen2, Qwen3, OLMo 2), and exports of dense models of ours, as
settings and tensors of training.

Their configuration is read by transformers' own classes, which know the defaults of each family. Their tensors have the
names that an export's decoder has, so the name table of exports pairs them with a checkpoint's. What a family computes
and training does not is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from umv2_megatron.conversion.export_files import ExportTensors
from umv2_megatron.conversion.safetensors_files import ConversionError, TensorInfo
from umv2_megatron.conversion.settings import megatron_values, read_hf_config, rotary_values, window_values

# Tensors of older files that are derived from the configuration.
_DERIVED = (".rotary_emb.inv_freq",)
_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Biases:
    """Which linear layers of a family have biases: queries, keys and values; attention's output; the FFN."""

    qkv: bool
    output: bool
    ffn: bool

    def has(self, name: str) -> bool:
        """Whether the bias called ``name`` is there."""
        if ".mlp." in name:
            return self.ffn
        return self.output if ".o_proj." in name else self.qkv


_FAMILIES: dict[str, Callable[[Any], Biases]] = {
    "llama": lambda config: Biases(config.attention_bias, config.attention_bias, config.mlp_bias),
    "mistral": lambda config: Biases(False, False, False),
    "qwen2": lambda config: Biases(True, False, False),
    "qwen3": lambda config: Biases(config.attention_bias, config.attention_bias, False),
    "olmo2": lambda config: Biases(config.attention_bias, config.attention_bias, False),
}
# The norms of families that have others than those before attention and FFN.
_NORMS: dict[str, dict[str, Any]] = {
    "qwen3": {"qk_layernorm": True},
    "olmo2": {"qk_layernorm": True, "qk_norm_span": "projection", "norm_placement": "post"},
}


@dataclass(frozen=True)
class DenseModel:
    """A dense model's directory, family, transformers' configuration of it, and its settings in training by key."""

    directory: Path
    family: str
    config: Any
    biases: Biases
    values: dict[str, Any]

    @property
    def zero_biases(self) -> bool:
        """Whether training has biases that the model has not, because it has them in all linear layers or in those of
        queries, keys and values."""
        return self.values["add_bias_linear"] and not (self.biases.qkv and self.biases.output and self.biases.ffn)


def is_dense_source(directory: Path, upcycled: bool) -> bool:
    """Whether ``directory`` holds a dense model that a checkpoint may be made of, and not an export of the checkpoint;
    ``upcycled``: whether the checkpoint has memory layers."""
    try:
        content = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        family, variant = content.get("model_type"), content.get("ffn_variant")
    except (OSError, ValueError, AttributeError):
        return False
    return family in _FAMILIES or (family == "umv2" and variant == "dense" and upcycled)


def read_dense_model(directory: Path) -> DenseModel:
    """The model in ``directory``.

    Raises ``ConversionError`` naming config.json and the setting that training does not know, or the other family.
    """
    path = directory / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        family = content.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ConversionError(f"{path} is not a readable configuration: {error}") from error
    if family == "umv2":
        return _read_export(directory)
    if family not in _FAMILIES:
        raise ConversionError(f"{path} is of model_type {family!r}; expected one of {', '.join(_FAMILIES)}")
    if content.get("quantization_config"):
        raise ConversionError(f"{path} has a quantization_config; expected weights in float32, bfloat16 or float16")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and huggingface_hub raise what they like
        raise ConversionError(f"{path}: {' '.join(str(error).split())}") from error
    biases = _FAMILIES[family](config)
    try:
        return DenseModel(directory, family, config, biases, _values(family, config, biases))
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}") from error


def _read_export(directory: Path) -> DenseModel:
    """A dense model of ours."""
    config = read_hf_config(directory)
    if config.ffn_variant != "dense":
        raise ConversionError(
            f"{directory}/config.json has ffn_variant {config.ffn_variant}; expected dense, without memory layers and "
            "experts"
        )
    values = megatron_values(config)
    kept = {key: value for key, value in values.items() if not key.startswith("memory_") and key != "ffn_variant"}
    return DenseModel(
        directory, "umv2", config, Biases(config.attention_bias, config.attention_out_bias, config.mlp_bias), kept
    )


def _values(family: str, config: Any, biases: Biases) -> dict[str, Any]:
    """Settings of training by key; the memory layers' are left out."""
    if config.hidden_act != "silu":
        raise ConversionError(f"hidden_act is {config.hidden_act!r}; expected silu")
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    every = biases.output or biases.ffn  # training has biases everywhere, for queries, keys and values alone, or none
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": heads,
        "group_query_attention": groups != heads,
        "num_query_groups": groups,
        "kv_channels": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "init_method_std": config.initializer_range,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.rms_norm_eps,
        **{"qk_layernorm": False, **_NORMS.get(family, {})},
        "swiglu": True,
        "add_bias_linear": every,
        "add_qkv_bias": biases.qkv and not every,
        "position_embedding_type": "rope",
        **rotary_values(dict(config.rope_parameters or {})),
        **window_values(getattr(config, "sliding_window", None), getattr(config, "layer_types", None)),
        "attention_dropout": float(config.attention_dropout or 0.0),
        "hidden_dropout": 0.0,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "seq_length": config.max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
    }


class DenseTensors:
    """The tensors of a dense model's files by name, without those that say nothing: derived ones, and an output layer
    that is the embedding."""

    def __init__(self, model: DenseModel) -> None:
        self.directory = model.directory
        self._files = ExportTensors(model.directory)
        self.unread = self._files.unread
        tied = not model.values["untie_embeddings_and_output_weights"]
        self.tensors: dict[str, TensorInfo] = {
            name: info
            for name, info in self._files.tensors.items()
            if not name.endswith(_DERIVED) and not (tied and name == _HEAD)
        }

    @property
    def dtype(self) -> torch.dtype:
        """That of most numbers: of the embedding's."""
        info = self.tensors.get("model.embed_tokens.weight")
        if info is None:
            raise ConversionError(f"{self.directory}: model.embed_tokens.weight is missing")
        if info.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ConversionError(
                f"{self.directory}: model.embed_tokens.weight has dtype {str(info.dtype).removeprefix('torch.')}; "
                "expected float32, bfloat16 or float16"
            )
        return info.dtype

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor."""
        found: torch.Tensor = self._files.rows(name, start, stop)
        return found

    def close(self) -> None:
        """Close all files."""
        self._files.close()
