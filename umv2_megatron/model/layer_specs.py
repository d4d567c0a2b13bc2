"""Layer specs that put FFN and memory, or experts, into the ``mlp`` slot of mcore's transformer layer.

``umv2_layer_spec(config, memory_config)`` makes the spec of a run. For a stock Megatron-LM ``pretrain_gpt.py`` the
module also holds two ready-made specs, because ``--spec`` takes an object from a module and does not call it:

    --spec umv2_megatron.model.layer_specs umv2_local       megatron-core's own modules
    --spec umv2_megatron.model.layer_specs umv2_te          Transformer Engine's, where it is installed

Their parts are chosen when a layer is built, so they follow ``--qk-layernorm``, ``--normalization`` and the other flags
of the model. The memory configuration is read then, too: the environment variable ``UMV2_MEMORY_CONFIG`` holds the path
of a YAML or JSON file, or the mapping itself; keys are the field names of ``MemoryConfig`` (``num_keys: 360``) or the
flag names (``memory-num-keys: 360``). See docs/megatron-lm.md.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import os
from pathlib import Path
from typing import Any

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from umv2_megatron.config.flags import read_mapping
from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.config.yaml_text import parse_yaml
from umv2_megatron.memory.engram import EngramLayer
from umv2_megatron.memory.layer import MemoryLayer
from umv2_megatron.model.bf16_attention import Bf16Attention
from umv2_megatron.model.context_parallel_attention import ContextParallelAttention
from umv2_megatron.model.delayed_outputs import DelayedOutputs
from umv2_megatron.model.ffn_with_memory import FFNWithMemory, FFNWithMemorySubmodules, SharedTables
from umv2_megatron.model.fused_attention import FusedAttention
from umv2_megatron.model.one_pass import OnePassAttention, OnePassFFN, OnePassNorm, experts_in_one_pass
from umv2_megatron.model.post_norm import PostNormAttention, ProjectionNorm

MEMORY_CONFIG_VARIABLE = "UMV2_MEMORY_CONFIG"


# mcore warns for every layer whose mlp slot holds a module that it does not know by name.
logging.getLogger("megatron.core.transformer.transformer_layer").addFilter(
    lambda record: not str(record.msg).startswith("Unknown MLP type")
)


def umv2_layer_spec(
    config: TransformerConfig,
    memory_config: MemoryConfig,
    *,
    ngrams: MemoryConfig | None = None,
    with_memory: bool = True,
    standalone: bool = False,
    post_norm: bool = False,
    wide_qk_norm: bool = False,
    vocabulary: int | None = None,
) -> ModuleSpec:
    """The spec of one transformer layer for ``config.transformer_impl`` ("local" or "transformer_engine").

    ``ngrams``: n-gram layers beside those of ``memory_config``.
    ``with_memory=False`` leaves the FFN alone in the slot, with the same initialisation and parameter names. Where
    ``config.num_moe_experts`` is set, mcore's experts stand in the slot, without memory. ``post_norm``: norms behind
    attention and FFN; ``wide_qk_norm``: norms of queries and keys over all heads (``post_norm.py``). ``vocabulary``: of
    the tokenizer, for n-grams.
    """
    use_engine = config.transformer_impl == "transformer_engine"
    spec = _base_spec(config, use_engine)
    if wide_qk_norm:
        attention = spec.submodules.self_attention.submodules
        attention.q_layernorm = ModuleSpec(module=ProjectionNorm, params={"heads": config.num_attention_heads})
        attention.k_layernorm = ModuleSpec(module=ProjectionNorm, params={"heads": config.num_query_groups})
    if post_norm:
        _move_norms_behind(spec, use_engine)
    if config.num_moe_experts is not None:
        spec.submodules.mlp = _experts_spec(config, use_engine)
        return spec
    spec.submodules.mlp.params.update(
        memory_config=memory_config, tables=SharedTables(), delayed=DelayedOutputs(), standalone=standalone
    )
    if memory_config.hashes or ngrams is not None:
        spec.submodules.mlp.params.update(vocabulary=vocabulary, ngrams=ngrams)
    if memory_config.hashes:
        spec.submodules.mlp.submodules.memory = EngramLayer
    if not with_memory:
        spec.submodules.mlp.submodules.memory = None
    return spec


def _base_spec(config: TransformerConfig, use_engine: bool) -> ModuleSpec:
    """mcore's dense layer with its mlp slot replaced; the normalised FFN input must exist as a tensor, so the norm
    before the slot stands alone and is not fused into the FFN's first linear layer."""
    backend: Any
    ffn: type[MLP] = MLP
    if use_engine:
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        backend = TESpecProvider()
        spec = get_gpt_layer_with_transformer_engine_spec(
            qk_layernorm=config.qk_layernorm, qk_l2_norm=config.qk_l2_norm
        )
        norm = backend.layer_norm()
        if config.fp8:
            spec.submodules.self_attention.module = Bf16Attention
    else:
        from megatron.core.models.backends import LocalSpecProvider

        backend = LocalSpecProvider()
        spec = get_gpt_layer_local_spec(
            qk_layernorm=config.qk_layernorm, qk_l2_norm=config.qk_l2_norm, normalization=config.normalization
        )
        attention = spec.submodules.self_attention
        attention.submodules.core_attention = (
            ContextParallelAttention if config.context_parallel_size > 1 else FusedAttention
        )
        attention.module = OnePassAttention
        ffn = OnePassFFN
        _norms_in_one_pass(spec.submodules, attention.submodules)
        norm = spec.submodules.pre_mlp_layernorm
    submodules = copy.copy(spec.submodules)
    submodules.pre_mlp_layernorm = norm
    # Both implementations write the attention's norm under one name and keep the norm before the slot as it is.
    submodules.sharded_state_dict_keys_map = (
        {} if use_engine else {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    )
    submodules.mlp = ModuleSpec(
        module=FFNWithMemory,
        submodules=FFNWithMemorySubmodules(
            ffn=ModuleSpec(
                module=ffn,
                submodules=MLPSubmodules(
                    linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear()
                ),
            ),
            memory=MemoryLayer,
        ),
    )
    return ModuleSpec(module=spec.module, submodules=submodules, params=dict(spec.params))


def _move_norms_behind(spec: ModuleSpec, use_engine: bool) -> None:
    """Change a layer's spec: no norm before attention and the slot, one behind each."""
    submodules = spec.submodules
    norm = submodules.pre_mlp_layernorm
    submodules.pre_mlp_layernorm = submodules.input_layernorm = IdentityOp
    attention = submodules.self_attention
    if use_engine:  # whose first linear layer has the norm in it
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        attention.submodules.linear_qkv = TESpecProvider().column_parallel_linear()
    attention.module = PostNormAttention
    attention.params = {**attention.params, "post_norm": norm}
    submodules.sharded_state_dict_keys_map = {}
    submodules.mlp.params["post_norm"] = norm


def _norms_in_one_pass(*submodules: Any) -> None:
    """Put ``OnePassNorm`` where ``submodules`` have PyTorch's norms."""
    for each in submodules:
        for name, found in vars(each).items():
            if found is WrappedTorchNorm:
                setattr(each, name, OnePassNorm)


class Experts(MoELayer):
    """mcore's ``MoELayer`` whose experts' gradients are always reduced over the ranks that hold the same experts.

    mcore marks experts' parameters ``allreduce = False``, which says so, only where an expert-parallel group has
    several ranks. With one, tensor-parallel ranks would each go their own way, as their tokens differ.
    On a CPU the experts' SwiGLU takes one pass, as a dense FFN's does.

    Experts are split over the expert-parallel group, which consists of the same ranks as a memory-parallel group of
    that size, and are whole otherwise (expert tensor size 1): each tensor-parallel rank sends its own tokens.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        for parameter in self.experts.parameters():
            parameter.allreduce = False
        experts_in_one_pass(self.experts)


def _experts_spec(config: TransformerConfig, use_engine: bool) -> ModuleSpec:
    """The spec of a block's experts, and of its shared expert if it has one, for the ``mlp`` slot."""
    spec = get_moe_module_spec(
        use_te=use_engine, num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm
    )
    if isinstance(spec, functools.partial):  # since mcore 0.17
        return ModuleSpec(module=Experts, submodules=spec.keywords["submodules"])
    return ModuleSpec(module=Experts, submodules=spec.submodules, metainfo=spec.metainfo)


# -- for a stock Megatron-LM ---------------------------------------------------------------------------------------


def read_memory_config(text: str | None = None) -> MemoryConfig:
    """The MemoryConfig that ``UMV2_MEMORY_CONFIG`` (or ``text``) names: a YAML/JSON file, or the mapping itself.

    A key without a value (null) keeps its default. Raises ``ValueError`` naming the variable when it is unset, not
    readable, not a mapping, or holds an unknown key or a value of the wrong kind.
    """
    variable = MEMORY_CONFIG_VARIABLE
    text = os.environ.get(variable) if text is None else text
    if not text or not text.strip():
        raise ValueError(
            f"{variable} is not set; expected the path of a YAML or JSON file of the memory configuration, "
            "or the mapping itself"
        )
    where = variable
    if not text.lstrip().startswith("{"):
        where = f"{variable} ({text})"
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise ValueError(f"{variable} is {text!r}; expected a readable YAML or JSON file ({error})") from error
    try:
        content = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{where}: expected YAML or JSON; {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected a mapping of field names to values, not {content!r}")
    known = {field.name for field in dataclasses.fields(MemoryConfig)}
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_").removeprefix("memory_")
        if name not in known:
            raise ValueError(f"{where}: unknown key {key!r}; expected one of {', '.join(sorted(known))}")
        if value is not None:
            values[name] = read_mapping({f"memory_{name}": value}, where)[f"memory_{name}"]
    return MemoryConfig(**values)


class LayerFromEnvironment(TransformerLayer):
    """The transformer layer of a stock Megatron-LM: picks its own parts, and its memory configuration, when built.

    Args:
        config: of the model; what it says about norms decides the layer's parts. Its flag
            ``hetereogenous_dist_checkpoint`` (mcore's spelling) is switched on, see below.
        use_engine: Transformer Engine's modules instead of megatron-core's own.
        tables: where the layers of this stage find the value tables that they share.
        delayed: where their outputs wait for later layers.

    Raises:
        ValueError: the configuration cannot work; the sentence names the variable, the key or the flag.
    """

    def __init__(
        self, config: TransformerConfig, use_engine: bool, tables: SharedTables, delayed: DelayedOutputs, **others: Any
    ):
        memory_config = read_memory_config()
        _check_stock_run(config, memory_config, use_engine)
        # mcore stores a stack of alike layers as one tensor per parameter, of which layers without memory, or with
        # the table of another layer, would leave holes. Megatron-LM has no flag for this field.
        config.hetereogenous_dist_checkpoint = True
        spec = _base_spec(config, use_engine)
        spec.submodules.mlp.params.update(memory_config=memory_config, tables=tables, delayed=delayed, standalone=True)
        super().__init__(config, spec.submodules, **others)


def _check_stock_run(config: TransformerConfig, memory_config: MemoryConfig, use_engine: bool) -> None:
    """Refuse what these specs would silently leave out, or what cannot work."""
    try:
        memory_config.validate(config.hidden_size, config.num_layers)
    except ValueError as error:
        raise ValueError(f"{MEMORY_CONFIG_VARIABLE}: {error}") from error
    if memory_config.read_delay and (
        config.pipeline_model_parallel_size > 1 or config.recompute_granularity is not None
    ):
        raise ValueError(
            f"{MEMORY_CONFIG_VARIABLE}: read_delay is {memory_config.read_delay}; expected 0 with this --spec and "
            "--pipeline-model-parallel-size above 1 or activation recompute; use pretrain_umv2.py"
        )
    if memory_config.hashes:
        raise ValueError(
            f"{MEMORY_CONFIG_VARIABLE}: scoring is ngram; expected tucker or additive with this --spec, whose layers "
            "do not see token ids; use pretrain_umv2.py"
        )
    if memory_config.parallel_size != 1:
        raise ValueError(
            f"{MEMORY_CONFIG_VARIABLE}: parallel_size is {memory_config.parallel_size}; expected 1, because "
            "Megatron-LM makes no memory-parallel groups; use pretrain_umv2.py for sharded tables"
        )
    for name in ("balance_loss_coeff", "tucker_penalty_coeff"):
        if config.calculate_per_token_loss and getattr(memory_config, name) > 0:
            raise ValueError(
                f"{MEMORY_CONFIG_VARIABLE}: {name} is {getattr(memory_config, name)}; expected 0 with "
                "--calculate-per-token-loss, which would divide it by the number of tokens; leave that flag out"
            )
    if config.tensor_model_parallel_size > 1 and config.expert_tensor_parallel_size != 1:
        # Table gradients are reduced over expert-data-parallel ranks, which must include the tensor-parallel ones.
        raise ValueError(
            f"--expert-tensor-parallel-size is {config.expert_tensor_parallel_size}; expected 1 with this --spec and "
            f"--tensor-model-parallel-size {config.tensor_model_parallel_size}: tables of tensor-parallel ranks would "
            "drift apart; give --expert-tensor-parallel-size 1"
        )
    if config.num_moe_experts is not None:
        raise ValueError(
            f"--num-experts is {config.num_moe_experts}; expected none with this --spec, whose mlp slot holds a dense "
            "FFN and a memory layer; leave it out"
        )
    if config.multi_latent_attention:
        raise ValueError("--multi-latent-attention is on; expected off with this --spec; leave it out")
    if use_engine and not HAVE_TE:
        raise ValueError("--spec names umv2_te, but Transformer Engine is not installed; use umv2_local or install it")


def _stock_spec(use_engine: bool) -> ModuleSpec:
    params = {"use_engine": use_engine, "tables": SharedTables(), "delayed": DelayedOutputs()}
    return ModuleSpec(module=LayerFromEnvironment, params=params)


umv2_local = _stock_spec(use_engine=False)
umv2_te = _stock_spec(use_engine=True)
