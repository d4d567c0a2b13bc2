"""Configuration of an UltraMemV2 model for transformers: ``config.json``.

The decoder is described in transformers' own words, the memory layers by the fields that training calls
``--memory-<name>``, here ``memory_<name>``. The fields that only training reads are kept, so that a model can go back.
This file, like its neighbours, imports nothing of the package: an export carries a copy of it.
"""

from __future__ import annotations

import inspect
import math
import re
import types
import typing
from dataclasses import field
from typing import Any, NamedTuple

from transformers.configuration_utils import PreTrainedConfig

# The values that the model can compute; any other is refused, because ignoring it would give another model.
_CHOICES: dict[str, tuple] = {
    "normalization": ("RMSNorm", "LayerNorm"),
    "position_embedding_type": ("rope", "learned_absolute", "none"),
    "norm_placement": ("pre", "post"),
    "qk_norm_span": ("head", "projection"),
    "ffn_variant": ("umv2", "moe", "dense"),
    "moe_router_score_function": ("softmax", "sigmoid"),
    "moe_router_dtype": (None, "fp32", "fp64"),
    "memory_scoring": ("tucker", "additive", "ngram"),
    "memory_ngram_tokens": ("folded", "ids"),
    "engram_ngram_tokens": ("folded", "ids"),
    "memory_score_normalization": ("none", "softmax"),
    "memory_query_mode": ("per_rank", "shared", "per_head"),
    "memory_qk_norm": ("both", "query", "none"),
    "memory_gate": ("none", "silu"),
    "memory_pre_projection": ("linear", "none"),
    "memory_value_expansion": ("single", "per-block", "none"),
    "memory_pre_value_activation": ("none", "gelu"),
    "memory_sharing": ("none", "block", "ring", "noring"),
}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "max_position_embeddings", "memory_num_keys", "memory_key_dim", "memory_value_dim", "memory_topk",
          "memory_key_topk_cap", "memory_num_heads", "memory_tucker_rank", "memory_num_cores", "memory_key_expansion",
          "memory_sharing_size", "engram_num_keys", "engram_num_heads")  # fmt: skip
_KINDS = {bool: "True or False", int: "an integer", float: "a number", str: "a string", list: "a list",
          dict: "a dictionary", types.NoneType: "None"}  # fmt: skip


class UMv2NgramSizes(NamedTuple):
    """Of an n-gram layer: rows of its table, hashes of n-grams of all lengths together, columns of a row, the longest
    n-gram, and taps of the convolution (0: none)."""

    rows: int
    heads: int
    value_dim: int
    size: int
    taps: int


class UMv2Config(PreTrainedConfig):
    r"""
    Sizes and switches of an UltraMemV2 decoder (arXiv 2508.18756).

    Args:
        vocab_size, hidden_size (H), intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads,
            head_dim, max_position_embeddings, initializer_range, hidden_act, attention_dropout: as in other models.
        normalization: "RMSNorm" or "LayerNorm", with ``norm_eps``; ``norm_zero_centered`` adds 1 to the gains.
        norm_placement: "pre": norms before attention and FFN; "post": behind them.
        qk_norm: norms of queries and keys, of each head ("head") or of all heads together ("projection") by
            ``qk_norm_span``.
        attention_bias: biases of the query, key and value projections; ``attention_out_bias``: of the output's.
        mlp_bias: biases of the FFN. ``gated_mlp``: act(gate) * up, otherwise act(up).
        position_embedding_type: "rope" (see ``rope_parameters``), "learned_absolute" or "none".
        rope_interleaved: rotate pairs of neighbours instead of halves.
        sliding_window: tokens that a token attends to, itself among them; None: all before it. ``layer_types``: of each
            block, "sliding_attention" or "full_attention"; None: the window in every block.
        hidden_dropout: dropout of what attention and FFN add to the residual, and of the embeddings.
        ffn_variant: "umv2", "moe" (experts in the FFN's place, no memory layers) or "dense" (neither).
        num_experts, num_experts_per_tok, moe_intermediate_size: of "moe", otherwise None; where they are not given, 64
            experts of 1/8 of the FFN's width of which 8 are active.
        moe_*: router and shared expert, the fields of training's flags ``--moe-<name>`` (``experts_umv2``).
        auto_map: where transformers finds the classes when it trusts the code beside an export.
        memory_table_chunk_rows: rows of one chunk of a value table; None keeps every table in one.
        memory_*: the fields of training's MemoryConfig.
        engram_*: of n-gram layers beside the memory layers, where ``engram_layer_freq`` is not None; training's flags
            ``--engram-<name>``.

    Raises ``ValueError``, one sentence, for sizes and switches that the model cannot compute, and for values of another
    type than their field's.
    """

    model_type = "umv2"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 50304
    hidden_size: int = 768
    intermediate_size: int = 2496
    num_hidden_layers: int = 20
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    gated_mlp: bool = True
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    normalization: str = "RMSNorm"
    norm_eps: float = 1e-5
    norm_zero_centered: bool = False
    norm_placement: str = "pre"
    qk_norm: bool = True
    qk_norm_span: str = "head"
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True
    position_embedding_type: str = "rope"
    rope_parameters: dict | None = None
    rope_interleaved: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0

    auto_map: dict = field(
        default_factory=lambda: {
            "AutoConfig": "configuration_umv2.UMv2Config",
            "AutoModel": "modeling_umv2.UMv2Model",
            "AutoModelForCausalLM": "modeling_umv2.UMv2ForCausalLM",
        }
    )

    ffn_variant: str = "umv2"
    num_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    moe_router_score_function: str = "softmax"
    moe_router_pre_softmax: bool = False
    moe_router_topk_scaling_factor: float | int | None = None
    moe_router_enable_expert_bias: bool = False
    moe_router_num_groups: int | None = None
    moe_router_group_topk: int | None = None
    moe_router_dtype: str | None = None
    moe_shared_expert_intermediate_size: int | None = None
    moe_shared_expert_gate: bool = False
    # read by training alone
    moe_router_load_balancing_type: str | list[str] = "aux_loss"
    moe_router_bias_update_rate: float | int = 1e-3
    moe_aux_loss_coeff: float | int | list[float | int] = 0.0
    moe_z_loss_coeff: float | int | None = None

    memory_table_chunk_rows: int | None = None
    memory_num_keys: int = 360
    memory_key_dim: int = 192
    memory_value_dim: int = 192
    memory_pre_value_dim: int = 192
    memory_topk: int = 32
    memory_key_topk_cap: int = 128
    memory_num_heads: int = 1
    memory_tucker_rank: int = 2
    memory_num_cores: int = 2
    memory_scoring: str = "tucker"
    memory_ngram_size: int = 3
    memory_ngram_tokens: str = "folded"
    memory_conv_kernel: int = 4
    memory_score_normalization: str = "none"
    memory_query_mode: str = "per_rank"
    memory_qk_norm: str = "both"
    memory_key_expansion: int = 1
    memory_value_expansion: str = "single"
    memory_gate: str = "none"
    memory_pre_projection: str = "linear"
    memory_pre_value_activation: str = "none"
    memory_norm_epsilon: float = 1e-5
    memory_layer_freq: str | int = "1"
    memory_read_delay: int = 0
    memory_sharing: str = "none"
    memory_sharing_size: int = 1
    # read by training alone
    memory_value_lr_mult: float | int = 4.0
    memory_value_lr_decay_iters: int | None = None
    memory_value_lr: float | None = None
    memory_value_weight_decay: float | None = None
    memory_balance_loss_coeff: float | int = 0.0
    memory_tucker_penalty_coeff: float | int = 0.0
    memory_tucker_penalty_margin: float | int = 0.15
    memory_init: str = "paper"
    memory_norm_gain_exponent: float | int = 0.4
    memory_seed: int = 1234

    engram_layer_freq: str | int | None = None
    engram_num_keys: int = 128
    engram_value_dim: int | None = None
    engram_num_heads: int = 16
    engram_ngram_size: int = 3
    engram_ngram_tokens: str = "folded"
    engram_conv_kernel: int = 4
    # read by training alone
    engram_value_lr_mult: float | int = 5.0
    engram_value_lr_decay_iters: int | None = 0
    engram_value_weight_decay: float | None = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_types()
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.ffn_variant == "moe":
            self._take_olmoe()
        unknown = sorted(key for key in kwargs if key.startswith(("memory_", "moe_", "engram_")))
        if unknown:
            raise ValueError(
                f"{unknown[0]} is {kwargs[unknown[0]]!r}, a setting that this version of the model does not know; "
                "use the modeling files that were exported with the model (trust_remote_code=True)"
            )
        super().__post_init__(**kwargs)
        self._check()
        self.base_model_tp_plan = self._tensor_parallel_plan()
        self.base_model_pp_plan = self._pipeline_plan()

    def _check_types(self) -> None:
        for name, hint in inspect.get_annotations(UMv2Config, eval_str=True).items():
            members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
            allowed = {typing.get_origin(member) or member for member in members}
            value = getattr(self, name)
            fits = isinstance(value, (*allowed, int) if float in allowed else tuple(allowed))
            if not fits or (isinstance(value, bool) and bool not in allowed):
                words = " or ".join(words for kind, words in _KINDS.items() if kind in allowed)
                raise ValueError(f"{name} is {value!r}; expected {words}")
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more")

    def _check(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(map(str, choices))}")
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise ValueError(
                f"num_key_value_heads is {self.num_key_value_heads}; expected a divisor of num_attention_heads "
                f"({self.num_attention_heads})"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window is {self.sliding_window}; expected 1 or more, or None")
        kinds = self.layer_types or []
        if self.layer_types is not None and (
            len(kinds) != self.num_hidden_layers or set(kinds) - {"sliding_attention", "full_attention"}
        ):
            raise ValueError(
                f"layer_types is {kinds}; expected sliding_attention or full_attention for each of the "
                f"{self.num_hidden_layers} blocks"
            )
        if self.engram_layer_freq is not None:
            self._check_engram()
        if self.ffn_variant == "umv2":
            self._check_memory()
        elif self.ffn_variant == "moe":
            self._check_experts()

    def _take_olmoe(self) -> None:
        if self.num_experts is None:
            self.num_experts = 64
        if self.num_experts_per_tok is None:
            self.num_experts_per_tok = 8
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size // 8

    def _check_experts(self) -> None:
        experts, picks, size = self.num_experts, self.num_experts_per_tok, self.moe_intermediate_size
        assert experts is not None and picks is not None and size is not None
        if not 1 <= picks <= experts:
            raise ValueError(f"num_experts_per_tok is {picks}; expected an integer from 1 to num_experts ({experts})")
        if size < 1:
            raise ValueError(f"moe_intermediate_size is {size}; expected 1 or more")
        groups, chosen = self.moe_router_num_groups, self.moe_router_group_topk
        if chosen and (not groups or experts % groups or not chosen <= min(groups, picks)):
            raise ValueError(
                f"moe_router_group_topk is {chosen}; expected at most num_experts_per_tok ({picks}) and "
                f"moe_router_num_groups ({groups}), a divisor of num_experts ({experts})"
            )
        if chosen and groups and picks > chosen * (experts // groups):
            raise ValueError(
                f"moe_router_group_topk is {chosen}; expected groups that hold num_experts_per_tok ({picks}) experts"
            )
        if self.moe_router_enable_expert_bias and self.moe_router_score_function != "sigmoid":
            raise ValueError(
                f"moe_router_score_function is {self.moe_router_score_function!r}; expected 'sigmoid' with "
                "moe_router_enable_expert_bias"
            )
        if picks == 1 and self.moe_router_score_function == "softmax" and not self.moe_router_pre_softmax:
            raise ValueError("moe_router_pre_softmax is False; expected True with num_experts_per_tok 1")

    def _check_memory(self) -> None:
        last = max((block for block, here in enumerate(self.memory_layers) if here), default=self.num_hidden_layers)
        if last + self.memory_read_delay >= self.num_hidden_layers:
            raise ValueError(
                f"memory_layer_freq is {self.memory_layer_freq!r}; expected a memory layer, and none in the last "
                f"{self.memory_read_delay} (memory_read_delay) of the {self.num_hidden_layers} blocks"
            )
        if self.memory_scoring == "ngram":
            self._check_ngrams()
            return
        tucker = {"memory_score_normalization": ("none",), "memory_qk_norm": ("both",),
                  "memory_query_mode": ("per_rank", "shared")}  # fmt: skip
        additive = {"memory_tucker_rank": (1,), "memory_num_cores": (1,), "memory_query_mode": ("per_head", "shared")}
        for name, allowed in (tucker if self.memory_scoring == "tucker" else additive).items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; expected {' or '.join(map(str, allowed))} where "
                    f"memory_scoring is {self.memory_scoring}"
                )
        if self.memory_pre_projection == "none" and self.memory_pre_value_dim != self.hidden_size:
            raise ValueError(
                f"memory_pre_value_dim is {self.memory_pre_value_dim}; expected hidden_size ({self.hidden_size}) where "
                "memory_pre_projection is none"
            )
        if self.memory_value_dim % self.memory_num_cores:
            raise ValueError(
                f"memory_value_dim is {self.memory_value_dim}; expected a multiple of memory_num_cores "
                f"({self.memory_num_cores})"
            )
        if self.memory_value_expansion == "none" and self.memory_value_dim != self.hidden_size:
            raise ValueError(
                f"memory_value_dim is {self.memory_value_dim}; expected hidden_size ({self.hidden_size}) where "
                "memory_value_expansion is none"
            )
        kept = min(self.memory_topk, self.memory_key_topk_cap)
        if kept > self.memory_scored_keys or self.memory_topk > kept**2:
            raise ValueError(
                f"memory_topk is {self.memory_topk}; expected at most the {self.memory_scored_keys} keys that a layer "
                f"scores per side and the square of memory_key_topk_cap ({self.memory_key_topk_cap})"
            )
        if self.memory_table_chunk_rows is not None and self.memory_table_chunk_rows < 1:
            raise ValueError(f"memory_table_chunk_rows is {self.memory_table_chunk_rows}; expected 1 or more, or null")

    def _check_ngrams(self) -> None:
        fixed = {"memory_topk": 1, "memory_pre_value_dim": 0, "memory_num_cores": 1, "memory_gate": "none",
                 "memory_value_expansion": "single", "memory_key_expansion": 1, "memory_read_delay": 0,
                 "memory_sharing": "none"}  # fmt: skip
        for name, expected in fixed.items():
            if getattr(self, name) != expected:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; expected {expected} where memory_scoring is ngram"
                )
        self._check_hashes("memory")

    def _check_engram(self) -> None:
        if self.ffn_variant != "umv2" or self.memory_scoring == "ngram":
            raise ValueError(
                f"engram_layer_freq is {self.engram_layer_freq!r}; expected None but beside memory layers (ffn_variant "
                "umv2) that are no n-gram layers (memory_scoring)"
            )
        if not any(self.engram_layers):
            raise ValueError(f"engram_layer_freq is {self.engram_layer_freq!r}; expected an n-gram layer")
        if self.engram_value_dim is not None and self.engram_value_dim < 1:
            raise ValueError(f"engram_value_dim is {self.engram_value_dim}; expected 1 or more")
        self._check_hashes("engram")

    def _check_hashes(self, prefix: str) -> None:
        """Of the n-gram layers whose fields begin with ``prefix``."""
        size, taps, heads = (getattr(self, f"{prefix}_{name}") for name in ("ngram_size", "conv_kernel", "num_heads"))
        if size < 2:
            raise ValueError(f"{prefix}_ngram_size is {size}; expected 2 or more")
        if taps < 0:
            raise ValueError(f"{prefix}_conv_kernel is {taps}; expected 0 or more")
        if heads % (size - 1):
            raise ValueError(
                f"{prefix}_num_heads is {heads}; expected a multiple of {size - 1} with {prefix}_ngram_size {size}"
            )

    def _tensor_parallel_plan(self) -> dict[str, str]:
        """How transformers shards the modules of UMv2Model over ranks. Memory layers stay whole on each rank: their
        work is small, and tables that do not fit lie in host memory (``memory_tables``)."""
        plan = {f"layers.*.self_attn.{side}_proj": "colwise" for side in "qkv"}
        if self.qk_norm and self.qk_norm_span == "projection":  # which needs all heads
            plan = {f"layers.*.self_attn.{side}_proj": "colwise_gather_output" for side in "qkv"}
        elif self.qk_norm:
            plan |= {f"layers.*.self_attn.{side}_norm": "replicated_with_grad_allreduce" for side in "qk"}
        wide = self.qk_norm and self.qk_norm_span == "projection"
        plan["layers.*.self_attn.o_proj"] = "rowwise_split_input" if wide else "rowwise"
        dense = "layers.*.mlp"
        if self.ffn_variant == "moe":
            # experts with biases stay whole: transformers has no rule that adds the second bias once
            plan |= {} if self.mlp_bias else {
                f"layers.*.mlp.experts.{'gate_up_proj' if self.gated_mlp else 'up_proj'}": (
                    "packed_colwise" if self.gated_mlp else "colwise"
                ),
                "layers.*.mlp.experts.down_proj": "rowwise",
                "layers.*.mlp.experts": "moe_tp_experts",
            }
            if not self.moe_shared_expert_intermediate_size:
                return plan
            dense = "layers.*.mlp.shared_expert"
        plan |= {f"{dense}.up_proj": "colwise", f"{dense}.down_proj": "rowwise"}
        return plan | ({f"{dense}.gate_proj": "colwise"} if self.gated_mlp else {})

    def _pipeline_plan(self) -> dict[str, tuple[list[str], list[str]]] | None:
        """What goes into and comes out of the modules of UMv2Model, for tools that put them on several devices one
        after the other; None where blocks are not independent or alike: they share a table, one adds what another read,
        or they differ in their masks; or they read n-grams, which their inputs do not hold."""
        if self.layer_types is not None and len(set(self.layer_types)) > 1:
            return None
        if self.ffn_variant == "umv2" and (self.memory_sharing != "none" or self.memory_read_delay):
            return None
        if self.has_ngrams:
            return None
        return {
            "embed_tokens": (["input_ids"], ["inputs_embeds"]),
            "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
            "norm": (["hidden_states"], ["hidden_states"]),
        }

    # -- what follows from the fields -------------------------------------------------------------------------------

    @property
    def memory_layers(self) -> list[bool]:
        """For each block, whether it has a memory layer."""
        if self.ffn_variant != "umv2":
            return [False] * self.num_hidden_layers
        return parse_layer_freq(self.memory_layer_freq, self.num_hidden_layers)

    @property
    def engram_layers(self) -> list[bool]:
        """For each block, whether it has an n-gram layer beside its memory layer, or where it has none."""
        if self.engram_layer_freq is None:
            return [False] * self.num_hidden_layers
        return parse_layer_freq(self.engram_layer_freq, self.num_hidden_layers, "engram_layer_freq")

    @property
    def memory_hashes(self) -> bool:
        """Whether the rows of memory layers are addressed by n-grams of token ids."""
        return self.ffn_variant == "umv2" and self.memory_scoring == "ngram"

    @property
    def has_ngrams(self) -> bool:
        """Whether any layer reads n-grams of token ids: memory layers, or those beside them."""
        return self.memory_hashes or self.engram_layer_freq is not None

    @property
    def ngrams(self) -> UMv2NgramSizes:
        """The sizes of the n-gram layers, of a model that has some."""
        prefix = "memory" if self.memory_hashes else "engram"
        names = ("num_keys", "num_heads", "value_dim", "ngram_size", "conv_kernel")
        keys, heads, width, size, taps = (getattr(self, f"{prefix}_{name}") for name in names)
        return UMv2NgramSizes(keys**2, heads, width or max(1, self.hidden_size // heads), size, taps)

    def has_window(self, block: int) -> bool:
        """Whether attention of this block sees the last ``sliding_window`` tokens alone."""
        here = self.layer_types is None or self.layer_types[block] == "sliding_attention"
        return here and self.sliding_window is not None

    @property
    def memory_window_side(self) -> int:
        """floor(sqrt(g N^2)), the side of the square of table rows that one layer sees."""
        seen = 1 if self.memory_sharing == "none" else self.memory_sharing_size
        return math.isqrt(seen * self.memory_num_keys**2)

    @property
    def memory_scored_keys(self) -> int:
        """Keys per side that a layer scores."""
        return self.memory_key_expansion * self.memory_window_side

    @property
    def memory_query_rows(self) -> int:
        """Output rows of a layer's query projection."""
        queries = {"per_rank": self.memory_tucker_rank, "per_head": self.memory_num_heads, "shared": 1}
        return 2 * queries[self.memory_query_mode] * self.memory_key_dim

    @property
    def memory_num_blocks(self) -> int:
        """E: virtual blocks that have a projection of their own."""
        return self.memory_key_expansion**2 if self.memory_value_expansion == "per-block" else 1

    def memory_windows(self) -> list[tuple[int, int, int, int]]:
        """For each memory layer ``(owner, rows, offset, window)``: the memory layer that owns its table, the rows of
        that table, and the first and the number of the rows that the layer sees; the window wraps round at ``rows``."""
        layers, brought, seen = sum(self.memory_layers), self.memory_num_keys**2, self.memory_sharing_size
        window = self.memory_window_side**2
        if self.memory_sharing == "none":
            return [(layer, brought, 0, window) for layer in range(layers)]
        if self.memory_sharing == "block":
            return [(i - i % seen, seen * brought, i % seen * brought, window) for i in range(layers)]
        first = list(range(layers))
        if self.memory_sharing == "noring":
            first = [min(max(layer - seen // 2, 0), layers - seen) for layer in range(layers)]
        return [(0, layers * brought, start * brought, window) for start in first]


def parse_layer_freq(pattern: str | int, num_layers: int, name: str = "memory_layer_freq") -> list[bool]:
    """Which of ``num_layers`` blocks have a memory layer: "n" means every n-th from the first, otherwise a list of
    zeros and ones in Python's notation with + and * such as "[1,0]*4". ``ValueError`` when it does not fit."""
    text = str(pattern).replace(" ", "")
    flags: list[bool] = []
    # 18 digits at most: int() refuses thousands of them.
    if re.fullmatch(r"0*[1-9][0-9]{0,17}", text):
        return [layer % int(text) == 0 for layer in range(num_layers)]
    for term in text.split("+"):
        found = re.fullmatch(r"\[([01](?:,[01])*)\](?:\*0*([0-9]{1,18}))?", term)
        digits, repeats = (found[1].split(","), int(found[2] or 1)) if found is not None else ([], 0)
        # A list that is too long is never made: a mistyped repeat would fill the memory.
        if found is None or len(flags) + len(digits) * repeats > num_layers:
            flags = []
            break
        flags += [digit == "1" for digit in digits] * repeats
    if len(flags) != num_layers:
        raise ValueError(
            f"{name} is {pattern!r}; expected a positive integer or a list of {num_layers} zeros and ones such as "
            "'[1,0]*2'"
        )
    return flags


__all__ = ["UMv2Config"]
