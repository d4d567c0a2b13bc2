"""What a model is, in Megatron's words (settings by key) and in those of the Hugging Face configuration, both ways.

``config.json`` of a checkpoint and ``config.json`` of an export each say all of it, so conversions take no flags about
the model. A setting that would change what the model computes and that the other side cannot express is refused.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from umv2_megatron.config.engram_config import EngramConfig, NgramLayers, ngram_layers
from umv2_megatron.config.memory_config import MemoryConfig, model_keys
from umv2_megatron.config.option_table import option_table
from umv2_megatron.config.variants import has_memory
from umv2_megatron.conversion.safetensors_files import ConversionError
from umv2_megatron.hf.configuration_umv2 import UMv2Config
from umv2_megatron.hf.name_table import ExpertSizes, MemorySizes, Sizes
from umv2_megatron.memory.sharing import table_windows

MEMORY_KEYS = (*model_keys(), *(each.name for each in fields(EngramConfig)))
"""Settings of all memory layers, which have the same names on both sides."""
# Megatron's key -> the other side's, where value and meaning are the same.
SAME = {
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "kv_channels": "head_dim",
    "init_method_std": "initializer_range",
    "normalization": "normalization",
    "layernorm_epsilon": "norm_eps",
    "layernorm_zero_centered_gamma": "norm_zero_centered",
    "qk_layernorm": "qk_norm",
    "swiglu": "gated_mlp",
    "position_embedding_type": "position_embedding_type",
    "rotary_interleaved": "rope_interleaved",
    "attention_dropout": "attention_dropout",
    "hidden_dropout": "hidden_dropout",
}
# What mcore's --use-rope-scaling has beside its factor: the values of Llama 3.1.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# The same for the settings of experts, which other models do not have.
OF_EXPERTS = {
    "num_moe_experts": "num_experts",
    "moe_router_topk": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    **{
        key: key
        for key in (
            "moe_router_score_function",
            "moe_router_pre_softmax",
            "moe_router_topk_scaling_factor",
            "moe_router_enable_expert_bias",
            "moe_router_num_groups",
            "moe_router_group_topk",
            "moe_router_dtype",
            "moe_shared_expert_intermediate_size",
            "moe_shared_expert_gate",
            "moe_router_load_balancing_type",
            "moe_router_bias_update_rate",
            "moe_aux_loss_coeff",
            "moe_z_loss_coeff",
        )
    },
}
# Settings that change what the model computes and that the Hugging Face model does not know, with the value it has.
_FIXED = {
    "activation_func_clamp_value": None,
    "attention_output_gate": False,
    "glu_linear_offset": 0.0,
    "no_rope_freq": None,
    "qk_l2_norm": False,
    "softmax_scale": None,
    "softmax_type": "vanilla",
    # of experts: what one token gets would depend on the others in its batch, or on chance
    "moe_expert_capacity_factor": None,
    "moe_input_jitter_eps": None,
}


def refuse_unsupported(config: dict[str, Any]) -> None:
    """Raise ``ConversionError`` naming a setting of a checkpoint's ``config`` that an export cannot express."""
    values = config["values"]
    known, table = UMv2Config().to_dict(), option_table()
    fixed = {**_FIXED, **{key: table[key].default for key in MEMORY_KEYS if key not in known}}
    if values["ffn_variant"] == "moe" and values["moe_router_load_balancing_type"] == "sinkhorn":
        raise ConversionError(
            "the model was trained with --moe-router-load-balancing-type sinkhorn, which the Hugging Face model does "
            "not know; expected aux_loss, seq_aux_loss, global_aux_loss or none"
        )
    capacity = values.get("moe_expert_capacity_factor")
    if capacity is not None and capacity < 0:  # which is mcore's other word for no limit
        values = {**values, "moe_expert_capacity_factor": None}
    for key, expected in fixed.items():
        if key in values and values[key] != expected:
            raise ConversionError(
                f"the model was trained with --{key.replace('_', '-')} {values[key]}, which the Hugging Face model "
                f"does not know; expected {expected}"
            )
    if values.get("bias_activation_fusion") and not values["swiglu"]:
        raise ConversionError(
            "the model was trained with --bias-activation-fusion, which approximates GELU by tanh; the Hugging Face "
            "model has the exact GELU of training without it"
        )


def context_of(values: dict[str, Any]) -> int:
    """The export's ``max_position_embeddings``: the context of training, which is where readers of an export (lm-eval,
    chat templates, our evaluator) cut; learned positions keep all that they have."""
    learned = values["position_embedding_type"] == "learned_absolute"
    return values["max_position_embeddings"] if learned else values["seq_length"]


def hf_config(config: dict[str, Any], dtype: torch.dtype, chunk_rows: int, eod: int | None) -> UMv2Config:
    """The export's configuration for a checkpoint's ``config``; ``eod`` is the end-of-document token, which in training
    begins documents, too."""
    values = with_sizes(config["values"])
    known = UMv2Config().to_dict()
    with_memory = has_memory(values["ffn_variant"])
    experts = _expert_settings(values)
    made = UMv2Config(
        **{theirs: values[ours] for ours, theirs in SAME.items()},
        **{key: values[key] for key in MEMORY_KEYS if key in known and key in values},
        **{theirs: experts[ours] for ours, theirs in OF_EXPERTS.items() if ours in experts},
        # variants with memory layers differ in the fields of those only
        ffn_variant="umv2" if with_memory else values["ffn_variant"],
        vocab_size=config["tokenizer_vocab_size"],
        max_position_embeddings=context_of(values),
        num_key_value_heads=_groups(values),
        hidden_act="silu" if values["swiglu"] else "gelu",
        tie_word_embeddings=not values["untie_embeddings_and_output_weights"],
        rope_parameters=rope_parameters(values),
        **_window_of(values),
        # older checkpoints know neither
        norm_placement=values.get("norm_placement", "pre"),
        qk_norm_span=values.get("qk_norm_span", "head"),
        attention_bias=values["add_bias_linear"] or values["add_qkv_bias"],
        attention_out_bias=values["add_bias_linear"],
        mlp_bias=values["add_bias_linear"],
        memory_table_chunk_rows=chunk_rows if with_memory else None,
        bos_token_id=eod,
        eos_token_id=eod,
        dtype=str(dtype).removeprefix("torch."),
        architectures=["UMv2ForCausalLM"],
        auto_map={
            "AutoConfig": "configuration_umv2.UMv2Config",
            "AutoModel": "modeling_umv2.UMv2Model",
            "AutoModelForCausalLM": "modeling_umv2.UMv2ForCausalLM",
        },
    )
    return made


def with_sizes(values: dict[str, Any]) -> dict[str, Any]:
    """``values`` with the sizes that megatron-core derives where no flag gives them."""
    derived = {
        "kv_channels": values["hidden_size"] // values["num_attention_heads"],
        "ffn_hidden_size": 4 * values["hidden_size"],
    }
    return {**values, **{key: size for key, size in derived.items() if values[key] is None}}


def _window_of(values: dict[str, Any]) -> dict[str, Any]:
    """The window of attention in transformers' words, which count the token itself."""
    window, skipped = values.get("window_size"), values.get("window_attn_skip_freq")
    if window is None:
        return {}
    if window[0] < 0 or window[1] != 0:
        raise ConversionError(
            f"the model was trained with --window-size {list(window)}, which the Hugging Face model does not know; "
            "expected 0 or more tokens before each, and 0 behind it"
        )
    blocks = range(1, values["num_layers"] + 1)
    here = skipped if isinstance(skipped, list) else [skipped is None or block % skipped != 0 for block in blocks]
    kinds = ["sliding_attention" if each else "full_attention" for each in here]
    return {"sliding_window": window[0] + 1, "layer_types": None if all(here) else kinds}


def window_values(window: int | None, kinds: list[str] | None) -> dict[str, Any]:
    """The reverse: settings by key for transformers' ``sliding_window`` and ``layer_types``, {} without a window."""
    unknown = set(kinds or ()) - {"sliding_attention", "full_attention"}
    if unknown:
        raise ConversionError(f"layer_types name {unknown.pop()!r}; expected sliding_attention or full_attention")
    if window is None or (kinds is not None and "sliding_attention" not in kinds):
        return {}
    here = [int(kind == "sliding_attention") for kind in kinds or ()]
    return {"window_size": [window - 1, 0], "window_attn_skip_freq": None if all(here) else here}


def rope_parameters(values: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding of settings by key in transformers' words."""
    made = {
        "rope_type": "default",
        "rope_theta": float(values["rotary_base"]),
        "partial_rotary_factor": values["rotary_percent"],
    }
    if values.get("use_rope_scaling"):  # older checkpoints know neither
        made |= {"rope_type": "llama3", "factor": float(values["rope_scaling_factor"]), **LLAMA3}
    elif values.get("rotary_seq_len_interpolation_factor") is not None:
        made |= {"rope_type": "linear", "factor": float(values["rotary_seq_len_interpolation_factor"])}
    return made


def rotary_values(rope: dict[str, Any]) -> dict[str, Any]:
    """The reverse: settings by key for transformers' ``rope_parameters``.

    Raises ``ConversionError`` naming a value that training does not know.
    """
    kind, theta = rope.get("rope_type", "default"), rope.get("rope_theta", 10000)
    values: dict[str, Any] = {
        "rotary_base": int(theta),
        "rotary_percent": float(rope.get("partial_rotary_factor") or 1.0),
        "use_rope_scaling": kind == "llama3",
        "rotary_seq_len_interpolation_factor": None,
    }
    if int(theta) != float(theta):
        raise ConversionError(f"rope_theta is {theta}; expected a whole number, as --rotary-base takes")
    if kind == "llama3":
        for name, expected in LLAMA3.items():
            if rope.get(name) != expected:
                raise ConversionError(
                    f"rope_parameters say {name} {rope.get(name)}; expected {expected} with rope_type llama3, which is "
                    "what megatron-core's --use-rope-scaling has"
                )
        values["rope_scaling_factor"] = float(rope["factor"])
    elif kind == "linear":
        values["rotary_seq_len_interpolation_factor"] = int(rope["factor"])
        if int(rope["factor"]) != rope["factor"]:
            raise ConversionError(
                f"rope_parameters say factor {rope['factor']}; expected a whole number with rope_type linear, as "
                "--rotary-seq-len-interpolation-factor takes"
            )
    elif kind != "default":
        raise ConversionError(f"rope_parameters say rope_type {kind!r}; expected default, linear or llama3")
    return values


def _expert_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Settings of the experts by key, with the width that mcore gives them where none is set; {} without experts."""
    if values["ffn_variant"] != "moe":
        return {}
    found = {key: values[key] for key in OF_EXPERTS if key in values}
    return {**found, "moe_ffn_hidden_size": values["moe_ffn_hidden_size"] or values["ffn_hidden_size"]}


def read_hf_config(directory: Path) -> UMv2Config:
    """config.json of an export. Raises ``ConversionError`` naming the file, the setting, or the other model."""
    path = directory / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kind = content.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ConversionError(f"{path} is not a readable configuration: {error}") from error
    if kind != "umv2":
        raise ConversionError(f"{path} is of model_type {kind!r}; expected umv2")
    try:
        return UMv2Config.from_dict(content)
    except (ValueError, TypeError) as error:
        raise ConversionError(f"{path}: {' '.join(str(error).split())}") from error


def megatron_values(config: UMv2Config) -> dict[str, Any]:
    """Settings by key that make the model of an export's configuration, and nothing else.

    Raises ``ConversionError`` naming a value that training does not know.
    """
    if config.hidden_act != ("silu" if config.gated_mlp else "gelu"):
        raise ConversionError(
            f"hidden_act is {config.hidden_act!r} with gated_mlp {config.gated_mlp}; expected silu where it is true, "
            "gelu where it is false"
        )
    if config.attention_out_bias != config.mlp_bias or (config.mlp_bias and not config.attention_bias):
        raise ConversionError(
            f"attention_bias, attention_out_bias and mlp_bias are {config.attention_bias}, "
            f"{config.attention_out_bias}, {config.mlp_bias}; expected all alike, or attention_bias alone"
        )
    theirs = config.to_dict()
    values = {ours: theirs[name] for ours, name in SAME.items()}
    values.update({key: theirs[key] for key in MEMORY_KEYS if key in theirs})
    if config.ffn_variant == "moe":
        values.update({ours: theirs[name] for ours, name in OF_EXPERTS.items()})
    grouped = config.num_key_value_heads != config.num_attention_heads
    values.update(
        ffn_variant=config.ffn_variant,
        seq_length=config.max_position_embeddings,
        max_position_embeddings=config.max_position_embeddings,
        group_query_attention=grouped,
        num_query_groups=config.num_key_value_heads,
        untie_embeddings_and_output_weights=not config.tie_word_embeddings,
        **rotary_values(dict(config.rope_parameters or {})),
        **window_values(config.sliding_window, config.layer_types),
        norm_placement=config.norm_placement,
        qk_norm_span=config.qk_norm_span,
        add_bias_linear=config.mlp_bias,
        add_qkv_bias=config.attention_bias and not config.mlp_bias,
        vocab_size=config.vocab_size,
    )
    for key in ("memory_layer_freq", "engram_layer_freq"):
        values[key] = None if values[key] is None else str(values[key])
    return values


def sizes_of(values: dict[str, Any], vocabulary: int, chunk_rows: int | None) -> Sizes:
    """Sizes for the name table, from settings by key; ``chunk_rows`` None keeps every value table whole."""
    values = with_sizes(values)
    none: list[MemorySizes | None] = [None] * values["num_layers"]
    layers = {MemoryConfig.family: none, **{family.family: list(none) for family in families(values)}}
    largest = 1
    for memory in families(values):
        blocks = [block for block, here in enumerate(memory.memory_layers(values["num_layers"])) if here]
        for index, (block, window) in enumerate(zip(blocks, table_windows(memory, len(blocks)))):
            largest = max(largest, window.rows)
            layers[memory.family][block] = MemorySizes(
                heads=memory.num_heads,
                keys=memory.key_expansion * window.side,
                key_dim=memory.key_dim,
                rank=memory.tucker_rank,
                cores=memory.num_cores if memory.scoring == "tucker" else 0,
                query_norm=memory.qk_norm != "none" and not memory.hashes,
                key_norm=memory.qk_norm == "both" and not memory.hashes,
                gate_rows=0 if memory.hashes else memory.gate_rows,
                projects_input=memory.has_pre_projection,
                query_rows=memory.query_rows,
                pre_value_dim=memory.pre_value_dim,
                value_dim=memory.value_dim,
                projected=0 if memory.value_expansion == "none" else memory.summed_dim,
                table_rows=window.rows if window.owner == index else 0,
                ngram_size=memory.ngram_size if memory.hashes else 0,
                conv_kernel=memory.conv_kernel if memory.hashes else 0,
            )
    return Sizes(
        vocabulary=vocabulary,
        positions=values["max_position_embeddings"] if values["position_embedding_type"] == "learned_absolute" else 0,
        hidden=values["hidden_size"],
        ffn=values["ffn_hidden_size"],
        heads=values["num_attention_heads"],
        groups=_groups(values),
        head_dim=values["kv_channels"],
        tied=not values["untie_embeddings_and_output_weights"],
        gated=values["swiglu"],
        linear_bias=values["add_bias_linear"],
        qkv_bias=values["add_bias_linear"] or values["add_qkv_bias"],
        norm_bias=values["normalization"] == "LayerNorm",
        qk_norm=values["qk_layernorm"],
        post_norm=values.get("norm_placement") == "post",
        wide_qk_norm=values.get("qk_norm_span") == "projection",
        memory=tuple(layers[MemoryConfig.family]),
        ngrams=tuple(layers.get(NgramLayers.family, ())),
        chunk_rows=chunk_rows or largest,
        experts=_expert_sizes(values),
    )


def _expert_sizes(values: dict[str, Any]) -> ExpertSizes | None:
    found = _expert_settings(values)
    if not found:
        return None
    return ExpertSizes(
        count=found["num_moe_experts"],
        ffn=found["moe_ffn_hidden_size"],
        shared=found["moe_shared_expert_intermediate_size"] or 0,
        shared_gate=found["moe_shared_expert_gate"],
        bias_of_choice=found["moe_router_enable_expert_bias"],
    )


def memory_config(values: dict[str, Any]) -> MemoryConfig | None:
    """The memory layers of a model, None where it has none."""
    if not has_memory(values["ffn_variant"]):
        return None
    return MemoryConfig(**{key.removeprefix("memory_"): values[key] for key in model_keys() if key in values})


def families(values: dict[str, Any]) -> list[MemoryConfig]:
    """All kinds of memory layers of a model: none, those of its variant, or n-gram layers beside them, too."""
    memory = memory_config(values)
    beside = None if memory is None else ngram_layers(values)
    return [family for family in (memory, beside) if family is not None]


def chunk_rows_below(values: dict[str, Any], max_bytes: int, itemsize: int) -> int:
    """The most rows of a chunk of a value table that fit into ``max_bytes``, or all rows of the largest table."""
    largest = widest = 1
    for memory in families(values):
        count = sum(memory.memory_layers(values["num_layers"]))
        largest = max(largest, *(window.rows for window in table_windows(memory, count)))
        widest = max(widest, memory.value_dim, memory.pre_value_dim)
    return max(1, min(largest, max_bytes // (widest * itemsize)))


def _groups(values: dict[str, Any]) -> int:
    """Key-value heads."""
    return values["num_query_groups"] if values["group_query_attention"] else values["num_attention_heads"]
