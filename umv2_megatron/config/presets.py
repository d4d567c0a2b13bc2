"""Sizes of known models, by name: what ``--model-preset`` stands for.

A preset holds model fields by Megatron's flag names (with underscores) and memory fields by ``MemoryConfig``'s names.
Flags override it. Each preset says where its sizes come from:

- *published*: arXiv 2508.18756, table 10 and text. What the paper leaves out (the FFN size of all but the 227M model,
  the number of heads of the ablation models) is chosen so that the counts come out.
- *released script*: the authors' run scripts, where they say more than the paper.
- *our choice*: the paper names the model but prints no sizes, or we need one for tests and demonstrations. Sizes follow
  the rules the paper found: memory about 17% of a block's FLOPs, Dp:Dv = 1:3, one head, a memory layer in every block.
  The paper's Dk = H/2 goes past 17% once N nears H, so Dk is what 17% leaves. For sharding, Dp, Dv and N*N are
  multiples of 64 in the 2.5B models, layers multiples of 8, and there are 8 query groups.

Where a published size and the counts in the model's name contradict each other, the counts win and N gives way, because
N changes little but the total; the description says so (1B/7B: N 528 gives 6.21B instead of 6.70B; 500M/6B: N 964
gives 6.87B).

How counts are taken: ``total`` leaves embeddings out. ``activated`` counts the vocabulary matrix once, as the 227M rows
of table 10 do (20 blocks hold 185.7M; the tied matrix brings 38.6M). The 1B/7B rows leave it out: OLMoE-1B/7B has 1.07B
activated parameters only without its two 103M matrices. ``ExpectedCounts.embeddings_in_activated`` tells which.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.config.variants import OLMOE_LOSSES, variant_defaults

PAPER = "arXiv 2508.18756, table 10"
OUR_CHOICE = "our choice"


@dataclass(frozen=True)
class ExpectedCounts:
    """Parameter counts that a preset should reach within 3%, and who states them.

    ``activated`` and ``total`` are numbers of parameters; ``total`` (None: nobody states one) is without embeddings.
    """

    activated: float
    total: float | None
    stated_by: str
    embeddings_in_activated: bool = True


@dataclass(frozen=True)
class Preset:
    """Sizes of one model. ``model``: Megatron's flag names with underscores; ``memory``: fields of ``MemoryConfig``."""

    name: str
    description: str
    source: str
    model: dict[str, Any]
    memory: dict[str, Any]
    expected: ExpectedCounts | None = None

    def flags(self) -> dict[str, Any]:
        """All fields in one dictionary by flag name; memory fields carry the prefix ``memory_``."""
        return {**self.model, **{f"memory_{name}": value for name, value in self.memory.items()}}

    @property
    def variant(self) -> str:
        """What ``--ffn-variant`` is with this preset."""
        return self.model.get("ffn_variant", "umv2")

    def memory_config(self) -> MemoryConfig:
        """The memory fields as a ``MemoryConfig``; what a preset leaves out is its variant's default."""
        made = variant_defaults(self.variant, self.model, self.flags()) if self.variant != "umv2" else {}
        switches = {name.removeprefix("memory_"): value for name, value in made.items() if name.startswith("memory_")}
        return MemoryConfig(**{**switches, **self.memory})


def _model(
    num_layers: int,
    hidden_size: int,
    heads: int,
    ffn_hidden_size: int,
    *,
    seq_length: int = 4096,
    vocab_size: int = 50280,
    query_groups: int | None = None,
    untied: bool = False,
) -> dict[str, Any]:
    """Model fields of a decoder with RMSNorm, rotary embedding, query and key norms and SwiGLU, without biases."""
    return {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "ffn_hidden_size": ffn_hidden_size,
        "num_attention_heads": heads,
        "group_query_attention": query_groups is not None,
        "num_query_groups": heads if query_groups is None else query_groups,
        "kv_channels": hidden_size // heads,
        "seq_length": seq_length,
        "max_position_embeddings": seq_length,
        "vocab_size": vocab_size,
        "make_vocab_size_divisible_by": 128,
        "untie_embeddings_and_output_weights": untied,
        "normalization": "RMSNorm",
        "norm_epsilon": 1e-5,
        "qk_layernorm": True,
        "swiglu": True,
        "disable_bias_linear": True,
        "position_embedding_type": "rope",
        "rotary_base": 10000,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }


def _memory(num_keys: int, key_dim: int, topk: int, pre_value_dim: int, value_dim: int) -> dict[str, Any]:
    """Memory fields in which the presets differ, and the ones that make a layer UltraMemV2."""
    return {
        "num_keys": num_keys,
        "key_dim": key_dim,
        "topk": topk,
        "pre_value_dim": pre_value_dim,
        "value_dim": value_dim,
        "num_heads": 1,
        "tucker_rank": 2,
        "num_cores": 2,
        "query_mode": "per_rank",
        "key_expansion": 1,
        "value_expansion": "single",
        "layer_freq": "1",
        "sharing": "none",
    }


def _bytes_3m(ffn_variant: str, ffn_hidden_size: int | None, **others: Any) -> dict[str, Any]:
    """Model fields of a byte-level model of 3M activated parameters; ``others`` are experts' fields."""
    model = _model(8, 160, 4, ffn_hidden_size or 440, seq_length=256, vocab_size=257)
    return {**model, "ffn_variant": ffn_variant, **others}


def _paper_227m(ffn_variant: str, ffn_hidden_size: int, **others: Any) -> dict[str, Any]:
    """Model fields of the paper's 227M/1.2B comparison."""
    return {**_model(20, 768, 12, ffn_hidden_size), "ffn_variant": ffn_variant, **others}


def _sizes(num_keys: int, key_dim: int, topk: int, value_dim: int, pre_value_dim: int | None = None) -> dict[str, Any]:
    """Memory fields of a baseline; its switches are the variant's."""
    sizes = {"num_keys": num_keys, "key_dim": key_dim, "topk": topk, "value_dim": value_dim}
    return sizes if pre_value_dim is None else {**sizes, "pre_value_dim": pre_value_dim}


_EQUAL_3M = "as umv2-3m in activated FLOPs per token{} (tools/match.py); bytes"
_BASELINES = (
    Preset(
        "umv2-3m",
        "3M activated and 12.6M total parameters for bytes (vocabulary of 257); the *-3m presets cost as much",
        OUR_CHOICE,
        _bytes_3m("umv2", 432),
        _memory(num_keys=112, key_dim=40, topk=16, pre_value_dim=24, value_dim=72),
        ExpectedCounts(3.03e6, 12.59e6, "tools/match.py"),
    ),
    Preset(
        "ultramem-3m",
        _EQUAL_3M.format(" and total parameters"),
        OUR_CHOICE,
        _bytes_3m("ultramem", 440),
        _sizes(num_keys=224, key_dim=40, topk=32, value_dim=96),
        ExpectedCounts(3.03e6, 12.59e6, "tools/match.py"),
    ),
    Preset(
        "memory-plus-3m",
        _EQUAL_3M.format(" and total parameters"),
        OUR_CHOICE,
        _bytes_3m("memory-plus", 464),
        _sizes(num_keys=173, key_dim=80, topk=32, value_dim=160),
        ExpectedCounts(3.03e6, 12.59e6, "tools/match.py"),
    ),
    Preset(
        "pkm-3m",
        _EQUAL_3M.format(" and total parameters"),
        OUR_CHOICE,
        _bytes_3m("pkm", 472),
        _sizes(num_keys=174, key_dim=80, topk=32, value_dim=160),
        ExpectedCounts(3.03e6, 12.59e6, "tools/match.py"),
    ),
    Preset(
        "peer-3m",
        _EQUAL_3M.format(" and total parameters"),
        OUR_CHOICE,
        _bytes_3m("peer", 360),
        _sizes(num_keys=123, key_dim=80, topk=8, value_dim=160, pre_value_dim=160),
        ExpectedCounts(3.03e6, 12.59e6, "tools/match.py"),
    ),
    Preset(
        "moe-3m",
        _EQUAL_3M.format(" and total parameters"),
        OUR_CHOICE,
        _bytes_3m("moe", None, num_moe_experts=45, moe_router_topk=8, moe_ffn_hidden_size=68, **OLMOE_LOSSES),
        {},
        ExpectedCounts(3.03e6, 12.59e6, "tools/match.py"),
    ),
    Preset(
        "dense-3m",
        _EQUAL_3M.format(""),
        OUR_CHOICE,
        _bytes_3m("dense", 560),
        {},
        ExpectedCounts(3.03e6, None, "tools/match.py"),
    ),
    Preset(
        "ultramem-227m-1.2b",
        "UltraMem-227M/1.2B: published N, Dk, K, Dv; FFN of the released script",
        PAPER,
        _paper_227m("ultramem", 2752),
        _sizes(num_keys=808, key_dim=192, topk=80, value_dim=384),
        ExpectedCounts(225e6, 1.18e9, PAPER),
    ),
    Preset(
        "memory-plus-227m-1.2b",
        "Memory+-227M/1.2B: published N (569 per layer, 1138 for the four that share), Dk, K; Dv 768 as in the "
        "released script, because the printed 384 gives half the printed total; FFN fitted to the printed counts",
        f"{PAPER}; Dv and FFN fitted to its counts",
        _paper_227m("memory-plus", 2720),
        _sizes(num_keys=569, key_dim=384, topk=80, value_dim=768),
        ExpectedCounts(228e6, 1.19e9, PAPER),
    ),
    Preset(
        "olmoe-227m-1.2b",
        "OLMoE-227M/1.2B: 64 experts, 8 active; their width fitted to the published counts",
        f"{PAPER}; width of the experts fitted",
        _paper_227m("moe", 3072, num_moe_experts=64, moe_router_topk=8, moe_ffn_hidden_size=384, **OLMOE_LOSSES),
        {},
        ExpectedCounts(227e6, 1.18e9, PAPER),
    ),
)

_ALL = (
    Preset(
        "umv2-tiny",
        "4 blocks that train in seconds on a CPU, for tests (vocabulary of 512)",
        OUR_CHOICE,
        _model(4, 64, 4, 128, seq_length=128, vocab_size=512),
        _memory(num_keys=16, key_dim=32, topk=4, pre_value_dim=8, value_dim=24),
    ),
    Preset(
        "umv2-8m",
        "8M activated parameters, for minutes on a CPU (vocabulary of 4096)",
        OUR_CHOICE,
        _model(6, 256, 4, 896, seq_length=256, vocab_size=4096),
        _memory(num_keys=96, key_dim=128, topk=16, pre_value_dim=32, value_dim=96),
        ExpectedCounts(8e6, None, "the preset's name"),
    ),
    Preset(
        "umv2-227m-1.2b",
        "UltraMemV2-227M/1.2B as published; no sharing fits the published counts best",
        PAPER,
        _model(20, 768, 12, 2496),
        _memory(num_keys=360, key_dim=192, topk=32, pre_value_dim=192, value_dim=192),
        ExpectedCounts(225e6, 1.18e9, PAPER),
    ),
    Preset(
        "umv2-430m-5b",
        "the paper's 430M/5B ablation model: N, Dv, Dp and K published; layers, H, Dk and FFN our choice",
        "arXiv 2508.18756, text; rest our choice",
        _model(26, 1024, 16, 2432),
        _memory(num_keys=558, key_dim=384, topk=24, pre_value_dim=288, value_dim=288),
        ExpectedCounts(430e6, 5e9, "the preset's name"),
    ),
    Preset(
        "umv2-500m-6b",
        "the paper's 500M/6B ablation model; N 896 instead of the printed 964 (6.87B) to reach 6B",
        "arXiv 2508.18756, text; N, FFN and heads our choice",
        _model(24, 1152, 16, 2432),
        _memory(num_keys=896, key_dim=524, topk=94, pre_value_dim=72, value_dim=216),
        ExpectedCounts(500e6, 6e9, "the preset's name"),
    ),
    Preset(
        "umv2-1b-7b",
        "UltraMemV2-1B/7B; N 552 instead of the printed 528 (6.21B) to reach the printed 6.70B; FFN fitted",
        f"{PAPER}; N and FFN fitted to its counts",
        _model(16, 2048, 16, 6912, untied=True),
        _memory(num_keys=552, key_dim=512, topk=128, pre_value_dim=384, value_dim=768),
        ExpectedCounts(1079e6, 6.70e9, PAPER, embeddings_in_activated=False),
    ),
    Preset(
        "umv2-2.5b-25b",
        "sizes of our choice for the counts of the paper's 2.5B/25B model",
        OUR_CHOICE,
        _model(24, 3072, 24, 5888, query_groups=8, untied=True),
        _memory(num_keys=960, key_dim=896, topk=256, pre_value_dim=256, value_dim=768),
        ExpectedCounts(2.5e9, 25e9, "the preset's name"),
    ),
    Preset(
        "umv2-2.5b-60b-top768",
        "sizes of our choice for the counts and K of the paper's 2.5B/60B-top768 model",
        OUR_CHOICE,
        _model(24, 3072, 24, 5888, query_groups=8, untied=True),
        _memory(num_keys=1536, key_dim=768, topk=768, pre_value_dim=256, value_dim=768),
        ExpectedCounts(2.5e9, 60e9, "the preset's name"),
    ),
    Preset(
        "umv2-2.5b-120b-top256",
        "sizes of our choice for the counts and K of the paper's 2.5B/120B-top256 model",
        OUR_CHOICE,
        _model(24, 3072, 24, 5760, query_groups=8, untied=True),
        _memory(num_keys=2176, key_dim=768, topk=256, pre_value_dim=256, value_dim=768),
        ExpectedCounts(2.5e9, 120e9, "the preset's name"),
    ),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in (*_ALL, *_BASELINES)}


def find_preset(name: str) -> Preset:
    """The preset called ``name``; ``ValueError`` with the known names otherwise."""
    if name not in PRESETS:
        raise ValueError(f"--model-preset is {name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]
