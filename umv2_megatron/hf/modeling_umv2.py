"""UltraMemV2 for transformers: a decoder whose blocks add a memory layer to the FFN (arXiv 2508.18756); for comparison
also the dense decoder, and one with a sparse layer of experts in the FFN's place.

    s' = s + attention(norm(s)),   s'' = s' + FFN(x) + Memory(x),   x = norm(s')

Self-contained: an export carries this file, the other files of this folder named
``*_umv2.py``. The parameters of the decoder are named as in transformers' other models, those of the memory layers as
in training.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import cached_file, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_umv2 import UMv2Config
from .experts_umv2 import UMv2MLP, UMv2SparseMLP, init_experts
from .memory_umv2 import UMv2Memory
from .retrieval_umv2 import UMv2ProductKeys, UMv2Retrieval
from .tables_umv2 import PLACES, UMv2Table, attach_tables, tensor_files


class UMv2Norm(nn.Module):
    """RMS norm or layer norm over the last dimension, computed in float32 or better."""

    def __init__(self, config: UMv2Config, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if config.normalization == "LayerNorm" else None
        self.epsilon = config.norm_eps
        self.zero_centered = config.norm_zero_centered

    def forward(self, x: Tensor) -> Tensor:
        gain = (self.weight + 1 if self.zero_centered else self.weight).to(x.dtype)  # which autocast may have changed
        if self.bias is None:
            return functional.rms_norm(x, gain.shape, gain, self.epsilon)
        return functional.layer_norm(x, gain.shape, gain, self.bias.to(x.dtype), self.epsilon)


class UMv2RotaryEmbedding(nn.Module):
    """cos and sin of the rotary embedding, for the part of the head dimension that is rotated."""

    inv_freq: Tensor
    original_inv_freq: Tensor

    def __init__(self, config: UMv2Config) -> None:
        super().__init__()
        self.config = config
        self.rope_type: str = (config.rope_parameters or {})["rope_type"]
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        compute = self.compute_default_rope_parameters
        if self.rope_type != "default":
            compute = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = compute(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: UMv2Config, **_: Any) -> tuple[Tensor, float]:
        """Frequencies base^(-2i/d) for i < d/2, d the rotated part of the head dimension, and a factor of 1."""
        rope = config.rope_parameters or {}
        size = int(head_dim(config) * rope.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
        return rope["rope_theta"] ** -exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Both [b, 1, s, d] for ``position_ids`` [b, s], in the dtype of ``x``."""
        angles = position_ids[:, None, :, None].float() * self.inv_freq.to(device=x.device, dtype=torch.float32)
        if self.config.rope_interleaved:
            angles = angles.repeat_interleave(2, dim=-1)
        else:
            angles = torch.cat([angles, angles], dim=-1)
        return (angles.cos() * self.attention_scaling).to(x.dtype), (angles.sin() * self.attention_scaling).to(x.dtype)


def head_dim(config: UMv2Config) -> int:
    """Numbers of a head's query, key and value."""
    return config.head_dim or config.hidden_size // config.num_attention_heads


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn pairs of the first d numbers of each head of ``x`` [b, heads, s, head_dim]; cos and sin are [b, 1, s, d]."""
    size = cos.shape[-1]
    turned, rest = (x, None) if size == x.shape[-1] else (x[..., :size], x[..., size:])
    if interleaved:
        partner = torch.stack([-turned[..., 1::2], turned[..., ::2]], dim=-1).flatten(-2)
    else:
        partner = torch.cat([-turned[..., size // 2 :], turned[..., : size // 2]], dim=-1)
    turned = turned * cos + partner * sin
    return turned if rest is None else torch.cat([turned, rest], dim=-1)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, for ``output_attentions``: query [b, heads, s, d], key and value [b, groups, s', d]."""
    groups = module.num_key_value_groups
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class UMv2Attention(nn.Module):
    """Causal attention with grouped keys and values, of any head dimension."""

    def __init__(self, config: UMv2Config, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = head_dim(config)
        groups = config.num_key_value_heads or config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // groups
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        inner, shared = config.num_attention_heads * self.head_dim, groups * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, shared, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, shared, bias=config.attention_bias)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=config.attention_out_bias)
        self.q_norm = UMv2Norm(config, self.head_dim) if config.qk_norm else None
        self.k_norm = UMv2Norm(config, self.head_dim) if config.qk_norm else None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape)
        key = self.k_proj(hidden_states).view(shape)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        if position_embeddings is not None:
            cos, sin = position_embeddings
            query = rotate(query, cos, sin, self.config.rope_interleaved)
            key = rotate(key, cos, sin, self.config.rope_interleaved)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


class UMv2DecoderLayer(GradientCheckpointingLayer):
    """One block: attention, then FFN and memory.

    ``memory`` is the memory layer that reads in this block, ``adds`` the one whose output is added in it: the same, or
    with ``memory_read_delay`` that of an earlier block.
    """

    def __init__(self, config: UMv2Config, layer_idx: int, memory: UMv2Memory | None, adds: UMv2Memory | None) -> None:
        super().__init__()
        self.hidden_dropout = config.hidden_dropout
        self.delayed = config.memory_read_delay > 0
        object.__setattr__(self, "adds", adds)  # past nn.Module's registration: it has its name elsewhere
        self.self_attn = UMv2Attention(config, layer_idx)
        self.mlp = UMv2SparseMLP(config) if config.ffn_variant == "moe" else UMv2MLP(config)
        self.memory = memory
        self.input_layernorm = UMv2Norm(config, config.hidden_size)
        self.post_attention_layernorm = UMv2Norm(config, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        begun: tuple[Tensor, ...] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...] | None]:
        """The next hidden states. With a read delay ``begun`` is what the memory layer ``adds`` started in its block,
        and what this block's own has started is returned beside them."""
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states), position_embeddings, attention_mask, past_key_values, **kwargs
        )
        hidden_states = hidden_states + self._dropped(attended)
        x = self.post_attention_layernorm(hidden_states)
        # Rows that lie outside the device are on their way while the FFN computes.
        started = self.memory.start(x) if self.memory is not None else None
        added = self.mlp(x)
        if self.adds is not None:
            added = added + self.adds.finish(begun if self.delayed else started).to(added.device)
        hidden_states = hidden_states + self._dropped(added)
        return (hidden_states, started) if self.delayed else hidden_states

    def _dropped(self, x: Tensor) -> Tensor:
        if self.hidden_dropout and self.training:
            return functional.dropout(x, self.hidden_dropout)
        return x


class UMv2PreTrainedModel(PreTrainedModel):
    """What the models share: their configuration, what transformers may do with them, and random weights."""

    config_class = UMv2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["UMv2DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": UMv2DecoderLayer, "attentions": UMv2Attention}

    def __init__(self, config: UMv2Config, memory_tables: str = "device") -> None:
        super().__init__(config)
        self.memory_tables = memory_tables
        if memory_tables != "device":
            # transformers shall leave them in the files
            self._keys_to_ignore_on_load_unexpected = [r"\.memory\.table\."]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, memory_tables: str = "device", **kwargs: Any
    ) -> Any:
        """As transformers' own, with the place of the value tables: "device", "cpu" or "mmap" (``tables_umv2``).

        Tables off the device take no part in training, and stay where they are when the model is moved.
        """
        if memory_tables not in PLACES:
            raise ValueError(f"memory_tables is {memory_tables!r}; expected one of {', '.join(PLACES)}")
        if memory_tables == "device":
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if pretrained_model_name_or_path is None or kwargs.get("variant") or kwargs.get("gguf_file"):
            raise ValueError(f"memory_tables is {memory_tables!r}; expected 'device' without safetensors files to read")
        result = super().from_pretrained(pretrained_model_name_or_path, *args, memory_tables=memory_tables, **kwargs)
        source = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
        options = {name: kwargs[name] for name in source if name in kwargs}
        options |= {"_raise_exceptions_for_missing_entries": False}
        model = result[0] if isinstance(result, tuple) else result
        attach_tables(
            model.value_tables(), tensor_files(lambda name: cached_file(pretrained_model_name_or_path, name, **options))
        )
        return result

    def value_tables(self) -> dict[str, UMv2Table]:
        """The value tables by their names inside UMv2Model."""
        decoder: nn.Module = self.model if isinstance(self, UMv2ForCausalLM) else self
        return {name: module for name, module in decoder.named_modules() if isinstance(module, UMv2Table)}

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        **kwargs: Any,
    ) -> None:
        """As transformers' own; tables off the device are written too, but not over the files that are mapped."""
        if self.memory_tables != "device":
            prefix = "model." if isinstance(self, UMv2ForCausalLM) else ""
            state_dict = dict(self.state_dict() if state_dict is None else state_dict)
            for name, table in self.value_tables().items():
                for file in table.files():
                    if os.path.isdir(save_directory) and os.path.samefile(os.path.dirname(file), save_directory):
                        raise ValueError(
                            f"{save_directory} holds the tables that this model reads (memory_tables='mmap'); expected "
                            "another directory"
                        )
                for kind in table.widths:
                    chunks = enumerate(getattr(table, kind))
                    state_dict |= {f"{prefix}{name}.{kind}.{index}": chunk for index, chunk in chunks}
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Random weights, for tests and benchmarks: a model that is to be trained gets them from training."""
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, UMv2Norm):
            (init.zeros_ if module.zero_centered else init.ones_)(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (UMv2Retrieval, UMv2ProductKeys)):
            init.normal_(module.keys, std=1.0)
            for gain in (module.query_norm, module.key_norm):
                if gain is not None:
                    init.constant_(gain, self.config.memory_key_dim**-0.25)
            if isinstance(module, UMv2Retrieval):
                init.normal_(module.cores, std=1.0)
                init.zeros_(module.u)  # computed in the first forward
                init.zeros_(module.t)
        elif isinstance(module, UMv2Memory):
            init.copy_(module.perm, torch.randperm(module.perm.numel()).to(module.perm))
        elif isinstance(module, nn.ParameterList):
            for chunk in module:
                init.normal_(chunk, std=std)
        init_experts(module, std)


class UMv2Model(UMv2PreTrainedModel):
    """The decoder without its output layer."""

    def __init__(self, config: UMv2Config, memory_tables: str = "device") -> None:
        super().__init__(config, memory_tables)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embed_positions = None
        if config.position_embedding_type == "learned_absolute":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList()
        memories = _memory_layers(config, memory_tables)
        for block, memory in enumerate(memories):
            reader = block - config.memory_read_delay
            self.layers.append(UMv2DecoderLayer(config, block, memory, memories[reader] if reader >= 0 else None))
        self.norm = UMv2Norm(config, config.hidden_size)
        self.rotary_emb = UMv2RotaryEmbedding(config) if config.position_embedding_type == "rope" else None
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states [b, s, H] of ``input_ids`` [b, s], or of ``inputs_embeds`` [b, s, H]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids or inputs_embeds is needed, and only one of them")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(seen, seen + inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden_states = inputs_embeds
        if self.embed_positions is not None:
            hidden_states = hidden_states + self.embed_positions(position_ids)
        if self.config.hidden_dropout and self.training:
            hidden_states = functional.dropout(hidden_states, self.config.hidden_dropout)
        position_embeddings = self.rotary_emb(hidden_states, position_ids) if self.rotary_emb is not None else None
        delay = self.config.memory_read_delay
        begun: list[tuple[Tensor, ...] | None] = [None] * delay
        for layer in self.layers:
            output = layer(
                hidden_states,
                begun.pop(0) if delay else None,
                attention_mask=mask,
                past_key_values=past_key_values,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                use_cache=use_cache,
                **kwargs,
            )
            if delay:
                hidden_states, started = output
                begun.append(started)
            else:
                hidden_states = output
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


def _memory_layers(config: UMv2Config, tables: str) -> list[UMv2Memory | None]:
    """The memory layer of each block, None where there is none; layers that share a table share it here."""
    owners = [window[0] for window in config.memory_windows()]
    made: list[UMv2Memory] = []
    layers: list[UMv2Memory | None] = []
    for has_memory in config.memory_layers:
        if has_memory:
            owner = owners[len(made)]
            made.append(UMv2Memory(config, len(made), made[owner].table if owner < len(made) else None, tables))
        layers.append(made[-1] if has_memory else None)
    return layers


class UMv2ForCausalLM(UMv2PreTrainedModel, GenerationMixin):
    """The decoder with its output layer; tied to the embeddings where the configuration says so."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: UMv2Config, memory_tables: str = "device") -> None:
        super().__init__(config, memory_tables)
        self.model = UMv2Model(config, memory_tables)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [b, s, vocabulary]; of the last ``logits_to_keep`` positions, or of those in that index tensor.

        ``labels`` [b, s] (-100: ignored) add the loss of predicting each next token.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["UMv2ForCausalLM", "UMv2Model", "UMv2PreTrainedModel"]
