"""Layer specs that put FFN and memory into the ``mlp`` slot of mcore's transformer layer.

``umv2_layer_spec(config, memory_config)`` makes the spec of a run. For a stock Megatron-LM ``pretrain_gpt.py`` the
module also holds ready-made specs, because ``--spec`` takes an object from a module and does not call it:

    --spec umv2_megatron.model.layer_specs umv2_local       megatron-core's own modules
    --spec umv2_megatron.model.layer_specs umv2_te          Transformer Engine's (exists where it is installed)

They read the memory configuration when the model is built: ``UMV2_MEMORY_CONFIG`` holds the path of a YAML or JSON
file, or the mapping itself; keys are the field names of ``MemoryConfig`` (``num_keys: 360``) or the flag names
(``memory-num-keys: 360``). See docs/megatron-lm.md.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

import yaml
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.memory.layer import MemoryLayer
from umv2_megatron.model.ffn_with_memory import FFNWithMemory, FFNWithMemorySubmodules, SharedTables

MEMORY_CONFIG_VARIABLE = "UMV2_MEMORY_CONFIG"


# mcore warns for every layer whose mlp slot holds a module that it does not know by name.
logging.getLogger("megatron.core.transformer.transformer_layer").addFilter(
    lambda record: not str(record.msg).startswith("Unknown MLP type")
)


def umv2_layer_spec(
    config: TransformerConfig,
    memory_config: MemoryConfig,
    *,
    with_memory: bool = True,
    standalone: bool = False,
) -> ModuleSpec:
    """The spec of one transformer layer for ``config.transformer_impl`` ("local" or "transformer_engine").

    ``with_memory=False`` leaves the FFN alone in the slot, with the same initialisation and parameter names.
    """
    use_engine = config.transformer_impl == "transformer_engine"
    spec = _base_spec(use_engine, config.qk_layernorm, config.qk_l2_norm, config.normalization)
    spec.submodules.mlp.params.update(memory_config=memory_config, tables=SharedTables(), standalone=standalone)
    if not with_memory:
        spec.submodules.mlp.submodules.memory = None
    return spec


def _base_spec(use_engine: bool, qk_layernorm: bool, qk_l2_norm: bool, normalization: str) -> ModuleSpec:
    """mcore's dense layer with its mlp slot replaced; the normalised FFN input must exist as a tensor, so the norm
    before the slot stands alone and is not fused into the FFN's first linear layer."""
    if use_engine:
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        backend: Any = TESpecProvider()
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_layernorm, qk_l2_norm=qk_l2_norm)
        norm = backend.layer_norm()
    else:
        from megatron.core.models.backends import LocalSpecProvider

        backend = LocalSpecProvider()
        spec = get_gpt_layer_local_spec(qk_layernorm=qk_layernorm, qk_l2_norm=qk_l2_norm, normalization=normalization)
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
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear()
                ),
            ),
            memory=MemoryLayer,
        ),
    )
    return ModuleSpec(module=spec.module, submodules=submodules, params=dict(spec.params))


# -- for a stock Megatron-LM ---------------------------------------------------------------------------------------


def read_memory_config(text: str | None = None) -> MemoryConfig:
    """The MemoryConfig that ``UMV2_MEMORY_CONFIG`` (or ``text``) names: a YAML/JSON file, or the mapping itself.

    Raises ``ValueError`` naming the variable when it is unset, unreadable, or holds an unknown key.
    """
    text = os.environ.get(MEMORY_CONFIG_VARIABLE) if text is None else text
    if not text:
        raise ValueError(
            f"{MEMORY_CONFIG_VARIABLE} is not set; expected the path of a YAML or JSON file of the memory "
            "configuration, or the mapping itself"
        )
    if not text.lstrip().startswith("{"):
        try:
            text = Path(text).read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"{MEMORY_CONFIG_VARIABLE} is {text!r}; not a readable file ({error.strerror})") from error
    content = yaml.safe_load(text)
    if not isinstance(content, dict):
        raise ValueError(f"{MEMORY_CONFIG_VARIABLE}: expected a mapping of field names to values")
    known = {field.name for field in dataclasses.fields(MemoryConfig)}
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_").removeprefix("memory_")
        if name not in known:
            raise ValueError(
                f"{MEMORY_CONFIG_VARIABLE}: unknown key {key!r}; expected one of {', '.join(sorted(known))}"
            )
        values[name] = value
    return MemoryConfig(**values)


class _FromEnvironment(FFNWithMemory):
    """``FFNWithMemory`` of a stock Megatron-LM: reads the memory configuration and refreshes u, t by itself."""

    def __init__(self, config: TransformerConfig, submodules: FFNWithMemorySubmodules, tables: SharedTables):
        memory_config = read_memory_config()
        memory_config.validate(config.hidden_size, config.num_layers)
        super().__init__(config, submodules, memory_config, tables, standalone=True)


def _stock_spec(use_engine: bool) -> ModuleSpec:
    spec = _base_spec(use_engine, qk_layernorm=False, qk_l2_norm=False, normalization="RMSNorm")
    slot = spec.submodules.mlp
    spec.submodules.mlp = ModuleSpec(
        module=_FromEnvironment, submodules=slot.submodules, params={"tables": SharedTables()}
    )
    return spec


umv2_local = _stock_spec(use_engine=False)
if HAVE_TE and importlib.util.find_spec("transformer_engine") is not None:
    umv2_te = _stock_spec(use_engine=True)
