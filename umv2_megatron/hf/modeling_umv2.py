"""UltraMemV2 for transformers: a decoder whose blocks add a memory layer to the FFN (arXiv 2508.18756); for comparison
also the dense decoder, and one with a sparse layer of experts in the FFN's place.

    s' = s + attention(norm(s)),   s'' = s' + FFN(x) + Memory(x),   x = norm(s')

or, with ``norm_placement`` "post",

    s' = s + norm(attention(s)),   s'' = s' + norm(FFN(s') + Memory(s' / rms(s')))

Self-contained: an export carries this file, the other files of this folder named
``*_umv2.py``. The parameters of the decoder are named as in transformers' other models, those of the memory layers as
in training.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, cached_file, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_umv2 import UMv2Attention, UMv2Norm, UMv2RotaryEmbedding
from .cache_umv2 import grows_in_place, let_grow
from .configuration_umv2 import UMv2Config
from .engram_umv2 import UMv2Engram, UMv2Ngrams, ngrams_of
from .experts_umv2 import UMv2MLP, UMv2SparseMLP, init_experts
from .linear_umv2 import project
from .memory_umv2 import UMv2Elsewhere, UMv2Memory
from .retrieval_umv2 import UMv2QueriesAndKeys, UMv2Retrieval
from .step_umv2 import UMv2Step
from .tables_umv2 import PLACES, UMv2Rows, UMv2Table, attach_tables, tensor_files


class UMv2DecoderLayer(GradientCheckpointingLayer):
    """One block: attention, then FFN and memory.

    ``memory`` is the memory layer that reads in this block, ``adds`` the one whose output is added in it: the same, or
    with ``memory_read_delay`` that of the earlier block ``reader``, if there is one.
    """

    def __init__(
        self,
        config: UMv2Config,
        layer_idx: int,
        memory: UMv2Memory | UMv2Engram | None,
        reader: UMv2DecoderLayer | None,
        engram: UMv2Engram | None = None,
    ) -> None:
        super().__init__()
        self.hidden_dropout, self.attention_dropout = config.hidden_dropout, config.attention_dropout
        self.delayed = config.memory_read_delay > 0
        self.reader = UMv2Elsewhere(reader)
        self.self_attn = UMv2Attention(config, layer_idx)
        self.mlp = UMv2SparseMLP(config) if config.ffn_variant == "moe" else UMv2MLP(config)
        self.memory = memory
        self.engram = engram
        self.epsilon = config.norm_eps
        post = config.norm_placement == "post"
        self.input_layernorm = None if post else UMv2Norm(config, config.hidden_size)
        self.post_attention_layernorm = UMv2Norm(config, config.hidden_size)
        self.post_feedforward_layernorm = UMv2Norm(config, config.hidden_size) if post else None
        self._step = UMv2Step()

    @property
    def hashing(self) -> UMv2Engram | None:
        """The n-gram layer of this block: its memory layer, or one beside it."""
        return self.memory if isinstance(self.memory, UMv2Engram) else self.engram

    @property
    def adds(self) -> nn.Module | None:
        """The memory layer whose output is added here, as it stands in its block now."""
        if not self.delayed:
            return self.memory
        return self.reader.block.memory if self.reader.block is not None else None

    def forward(
        self,
        hidden_states: Tensor,
        *begun: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        ngrams: UMv2Ngrams | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, ...]:
        """The next hidden states. With a read delay ``begun`` is what the memory layer ``adds`` started in its block,
        and what this block's own has started is returned after them; side by side, because checkpointing of activations
        finds gradients of plain arguments only. ``ngrams`` is for the layer of this block that reads some."""
        stepped = self._step.attention(self, hidden_states, attention_mask, past_key_values, position_embeddings)
        if stepped is not None:
            hidden_states = stepped
        else:
            x = hidden_states if self.input_layernorm is None else self.input_layernorm(hidden_states)
            attended, _ = self.self_attn(x, position_embeddings, attention_mask, past_key_values, **kwargs)
            if self.post_feedforward_layernorm is not None:
                attended = self.post_attention_layernorm(attended)
            hidden_states = hidden_states + self._dropped(attended)
        stepped = self._step.feedforward(self, hidden_states)
        if stepped is not None:
            return stepped
        if self.post_feedforward_layernorm is None:
            x = read = self.post_attention_layernorm(hidden_states)
        else:
            x, read = hidden_states, functional.rms_norm(hidden_states, hidden_states.shape[-1:], eps=self.epsilon)
        # Rows that lie outside the device are on their way while the FFN computes.
        known = {} if ngrams is None else {"ngrams": ngrams}
        started = None
        if self.memory is not None:
            started = self.memory(read, **known) if self.engram is None else self.memory(read)
        beside = self.engram(read, **known) if self.engram is not None else None
        added = self.mlp(x)
        adds = self.adds
        if adds is not None:
            added = added + adds(None, begun if self.delayed else started).to(added.device)
        if self.engram is not None:
            added = added + self.engram(None, beside).to(added.device)
        if self.post_feedforward_layernorm is not None:
            added = self.post_feedforward_layernorm(added)
        hidden_states = hidden_states + self._dropped(added)
        return (hidden_states, *(started or ())) if self.delayed else hidden_states

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
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": UMv2DecoderLayer, "attentions": UMv2Attention}

    def __init__(self, config: UMv2Config, memory_tables: str = "device") -> None:
        super().__init__(config)
        self.memory_tables = memory_tables
        if memory_tables != "device":
            # transformers shall leave them in the files
            self._keys_to_ignore_on_load_unexpected = [r"\.(memory|engram)\.table\."]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, memory_tables: str = "device", **kwargs: Any
    ) -> Any:
        """As transformers' own, with the place of the value tables: "device", "cpu" or "mmap", or in int8 "device-int8"
        or "cpu-int8" (``tables_umv2``).

        Tables off the device stay where they are when the model is moved. They, and those in int8, take no part in
        training.
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
        tables = model.value_tables()
        attach_tables(tables, tensor_files(lambda name: cached_file(pretrained_model_name_or_path, name, **options)))
        if memory_tables == "device-int8":
            model._move_tables(tables)
        return result

    def _move_tables(self, tables: dict[str, UMv2Table]) -> None:
        """Have ``tables`` lie where the rest of their memory layers does."""
        for name, table in tables.items():
            place = name.rpartition(".")[0]
            device = next(self.base_model.get_submodule(place).buffers(recurse=False)).device
            if device.type == "meta":
                raise ValueError(
                    f"memory_tables is 'device-int8' and device_map offloads {place}; expected layers that stay on "
                    "their device: give memory_tables='cpu-int8', or another device_map"
                )
            table.to(device)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers would look for its decorator in this file

    @staticmethod
    def create_masks_for_generate(
        config: UMv2Config,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        position_ids: Tensor | None = None,
        **_: Any,
    ) -> Tensor | None:
        """The mask that generation makes ahead for a cache of fixed size. Blocks with a window make theirs themselves
        from what is given; transformers' own function wants ``layer_types`` where there are none."""
        if config.sliding_window is not None:
            return attention_mask
        return create_causal_mask(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )

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
        """As transformers' own; tables off the device are written too, in the model's dtype, but not over the files
        that are mapped. Refused is what would be written rounded, or wrong."""
        self._check_saved_as_loaded()
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
                    state_dict |= {
                        f"{prefix}{name}.{kind}.{index}": _converted(chunk, table.dtype, save_directory)
                        for index, chunk in chunks
                    }
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)

    def _check_saved_as_loaded(self) -> None:
        if self.memory_tables.endswith("-int8"):
            raise ValueError(
                f"memory_tables is {self.memory_tables!r}, whose rows are rounded; expected exact ones to save: load "
                "with 'device', 'cpu' or 'mmap'"
            )
        for name, module in self.named_modules():
            # bitsandbytes rearranges 4-bit weights in their first forward on some CPUs, and does not restore the scales
            state = getattr(getattr(module, "weight", None), "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                raise ValueError(
                    f"{name} is quantized to 4 bits and has computed on this CPU, after which bitsandbytes saves other "
                    "scales; expected a model as it was loaded: load it again and save it before its first forward"
                )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Random weights, for tests and benchmarks: a model that is to be trained gets them from training."""
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, UMv2Norm):
            (init.zeros_ if module.zero_centered else init.ones_)(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, UMv2QueriesAndKeys):
            init.normal_(module.keys, std=1.0)
            for gain in (module.query_norm, module.key_norm):
                if gain is not None:
                    init.constant_(gain, self.config.memory_key_dim**-0.25)
            if isinstance(module, UMv2Retrieval):
                init.normal_(module.cores, std=1.0)
                # A compiled forward takes them as they are. Zeros (cores that are not here as a whole) are replaced by
                # the first forward that is not compiled.
                pair = module.leading_pair() if module.cores_are_whole() else torch.zeros(2, *module.u.shape)
                init.copy_(module.u, pair[0])
                init.copy_(module.t, pair[1])
        elif isinstance(module, UMv2Memory):
            init.copy_(module.perm, module.shuffle().to(module.perm))
        elif isinstance(module, UMv2Engram):
            init.copy_(module.multipliers, module.draw_multipliers())
            init.copy_(module.canonical, torch.arange(self.config.vocab_size).to(module.canonical))
            for gain in (module.query_norm, module.key_norm, module.conv_norm):
                if gain is not None:
                    init.ones_(gain)
            if module.conv is not None:
                init.zeros_(module.conv)
        elif isinstance(module, UMv2Rows):
            for chunk in module:
                init.normal_(chunk, std=std)
        init_experts(module, std)


def _converted(chunk: Tensor, dtype: torch.dtype, folder: str | os.PathLike) -> Tensor:
    """``chunk`` in ``dtype``. A copy lies in a file without a name in ``folder``, which goes with the tensor: all
    chunks of a model are held until they are written, and they may be larger than the machine's memory."""
    if chunk.dtype == dtype:
        return chunk
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryFile(dir=os.fspath(folder)) as file:
        file.truncate(chunk.numel() * dtype.itemsize)
        copy = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=dtype).view(chunk.shape)
    return copy.copy_(chunk)


class UMv2Model(UMv2PreTrainedModel):
    """The decoder without its output layer."""

    def __init__(self, config: UMv2Config, memory_tables: str = "device") -> None:
        super().__init__(config, memory_tables)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.embed_positions = None
        if config.position_embedding_type == "learned_absolute":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList()
        blocks: list[UMv2Elsewhere] = []  # of the memory layers
        beside = config.engram_layers
        for index, has_memory in enumerate(config.memory_layers):
            reader = index - config.memory_read_delay
            memory: UMv2Memory | UMv2Engram | None = None
            if has_memory and config.memory_hashes:
                memory = UMv2Engram(config, len(blocks), memory_tables)
            elif has_memory:
                memory = UMv2Memory(config, len(blocks), blocks, memory_tables)
            engram = UMv2Engram(config, sum(beside[:index]), memory_tables) if beside[index] else None
            source = self.layers[reader] if 0 <= reader < index else None
            layer = UMv2DecoderLayer(config, index, memory, source, engram)
            self.layers.append(layer)
            if has_memory:
                blocks.append(UMv2Elsewhere(layer))
        self.windows = [config.has_window(block) for block in range(config.num_hidden_layers)]
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Hidden states [b, s, H] of ``input_ids`` [b, s], or of ``inputs_embeds`` [b, s, H].

        Raises ``ValueError`` for none or both of them, and where s is 0.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids or inputs_embeds is needed, and only one of them")
        given = input_ids if inputs_embeds is None else inputs_embeds
        assert given is not None
        if given.shape[1] == 0:
            raise ValueError(
                f"the input has the shape {list(given.shape)}; expected at least one token: give that which begins "
                f"documents (bos_token_id, {self.config.bos_token_id}) where there is no text"
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if grows_in_place(inputs_embeds):
            let_grow(past_key_values)
        ngrams: dict[int, UMv2Ngrams] = {}
        if self.config.has_ngrams:
            readers = {block: layer.hashing for block, layer in enumerate(self.layers) if layer.hashing is not None}
            ngrams = ngrams_of(self.config, readers, input_ids, attention_mask, position_ids, past_key_values)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
        given_masks: dict[str, Any] = {
            "config": self.config,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "position_ids": position_ids,
        }
        mask = None if all(self.windows) else create_causal_mask(**given_masks)
        window_mask = create_sliding_window_causal_mask(**given_masks) if any(self.windows) else None
        hidden_states = inputs_embeds
        if self.embed_positions is not None:
            hidden_states = hidden_states + self.embed_positions(position_ids)
        if self.config.hidden_dropout and self.training:
            hidden_states = functional.dropout(hidden_states, self.config.hidden_dropout)
        position_embeddings = self.rotary_emb(hidden_states, position_ids) if self.rotary_emb is not None else None
        delay = self.config.memory_read_delay
        begun: list[tuple[Tensor, ...]] = [()] * delay
        for block, (layer, has_window) in enumerate(zip(self.layers, self.windows)):
            output = layer(
                hidden_states,
                *(begun.pop(0) if delay else ()),
                attention_mask=window_mask if has_window else mask,
                past_key_values=past_key_values,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                use_cache=use_cache,
                ngrams=ngrams.get(block),
                **kwargs,
            )
            if delay:
                hidden_states = output[0]
                begun.append(output[1:])
            else:
                hidden_states = output
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class UMv2ForCausalLM(UMv2PreTrainedModel, GenerationMixin):
    """The decoder with its output layer; tied to the embeddings where the configuration says so."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: UMv2Config, memory_tables: str = "device") -> None:
        super().__init__(config, memory_tables)
        self.model = UMv2Model(config, memory_tables)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        if config.base_model_pp_plan is not None:
            self._pp_plan["lm_head"] = (["hidden_states"], ["logits"])

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
        **kwargs: Unpack[TransformersKwargs],
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
        logits = project(self.lm_head, outputs.last_hidden_state[:, kept])
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
