"""What one memory layer is: the sizes and switches of UltraMemV2 and its family.

Letters (the same in the whole package): H hidden, N keys per side, R Tucker rank, C cores, K values kept per head,
Dk key dim, Dp pre-value dim, Dv value dim, e key expansion, E virtual blocks that keep a projection of their own,
V rows one layer sees, A rows of a whole table, L memory layers, g layers' worth of rows one layer sees.

Each memory layer brings N*N rows to its table. A layer that sees g layers' worth of rows scores
e * floor(sqrt(g * N * N)) keys per side, so with the defaults (e = 1, no sharing) it scores exactly N.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Optional

from umv2_megatron.config.option import option
from umv2_megatron.config.text_numbers import whole_number

OF_A_RUN = ("backend", "backward", "stream", "parallel_size", "parallel_mode", "exchange_parts", "value_second_moment",
            "value_optimizer_offload")  # fmt: skip
"""Fields of ``MemoryConfig`` that say how a run computes, not what."""


NGRAM_SETTINGS = {
    "topk": 1, "pre_value_dim": 0, "key_expansion": 1, "value_expansion": "single", "gate": "none",
    "score_normalization": "none", "query_mode": "shared", "qk_norm": "both", "read_delay": 0, "sharing": "none",
    "balance_loss_coeff": 0.0, "tucker_penalty_coeff": 0.0,
}  # fmt: skip
"""What is fixed in a layer whose rows are addressed by n-grams: one row a hash, and a gate of its own."""


@dataclass
class MemoryConfig:
    """Sizes and switches of the memory layers of one model (arXiv 2508.18756 and 2411.12364).

    Every field is also the flag ``--memory-<name>``. Errors are raised as ``ValueError`` with one sentence that
    names the flag, its value and what was expected.
    """

    family = "memory"
    """What the flags of these layers begin with, and the name of a layer in its block."""

    num_keys: int = option(128, "N: keys per side; every memory layer brings N*N rows to its value table", letter="N")
    key_dim: int = option(64, "Dk: dimension of queries and keys", letter="Dk")
    value_dim: int = option(64, "Dv: dimension of a value row", letter="Dv")
    pre_value_dim: int = option(64, "Dp: dimension of a pre-value row (PEER); 0 leaves pre-values out", letter="Dp")
    topk: int = option(16, "K: values kept per head", letter="K")
    key_topk_cap: int = option(128, "largest number of keys kept per side before the K x K grid is scored")
    num_heads: int = option(1, "h: retrieval heads that share the value table")
    tucker_rank: int = option(2, "R: Tucker rank of the score", letter="R")
    num_cores: int = option(2, "C: Tucker cores; core c scales the c-th slice of the value dimension", letter="C")
    scoring: str = option(
        "tucker",
        "score of a cell: the Tucker form of its keys' scores, or their sum (product keys); ngram: no scores, rows are "
        "addressed by hashes of the last tokens (Engram)",
        choices=("tucker", "additive", "ngram"),
    )
    ngram_size: int = option(
        3,
        "longest n-gram of token ids that addresses rows; there are n-grams of 2 up to this many tokens",
        at_least=2,
        needs=("memory_scoring=ngram",),
    )
    ngram_tokens: str = option(
        "folded",
        "what is hashed: token ids, of which those are one whose texts differ in case, accents or surrounding spaces "
        "alone (folded), or the ids as they are",
        choices=("folded", "ids"),
        needs=("memory_scoring=ngram",),
    )
    conv_kernel: int = option(
        4,
        "taps of the causal convolution over what n-grams give, as far apart as the longest n-gram is long; 0 leaves "
        "it out",
        at_least=0,
        needs=("memory_scoring=ngram",),
    )
    score_normalization: str = option(
        "none", "softmax: each head's K scores are replaced by their softmax", choices=("none", "softmax")
    )
    query_mode: str = option(
        "per_rank",
        "one query per side and rank (the paper), one per side, or one per head and side",
        choices=("per_rank", "shared", "per_head"),
    )
    qk_norm: str = option(
        "both", "which of queries and keys get an RMS norm over Dk", choices=("both", "query", "none")
    )
    key_expansion: int = option(1, "e: virtual expansion of the keys (UltraMem v1 uses 2)")
    value_expansion: str = option(
        "single",
        "one projection of the summed values, one per virtual block, or none (then Dv must equal the hidden size)",
        choices=("single", "per-block", "none"),
    )
    gate: str = option(
        "none",
        "silu: the summed values are multiplied by SiLU(Wg x) before the value projection",
        choices=("none", "silu"),
    )
    pre_projection: str = option(
        "linear",
        "what pre-values are multiplied with: Wp x, or x itself (then Dp must equal the hidden size)",
        choices=("linear", "none"),
        needs=("memory_pre_value_dim>0",),
    )
    pre_value_activation: str = option(
        "none",
        "activation of the pre-value score (the paper removed it)",
        choices=("none", "gelu"),
        needs=("memory_pre_value_dim>0",),
    )
    norm_epsilon: float = option(
        1e-5, "epsilon of the query and key RMS norms", above=0, needs=("memory_qk_norm!=none",)
    )
    layer_freq: str = option(
        "1",
        "which blocks have a memory layer: an integer n (every n-th block, starting with the first) or a 0/1 list "
        "such as '[1,0]*4'",
    )
    read_delay: int = option(
        0, "a memory layer reads the normalised FFN input of its block and adds its output this many blocks later"
    )
    sharing: str = option(
        "none",
        "how layers share value tables: none, block (groups of g consecutive layers), ring (g tables ahead, "
        "wrapping round), noring (g nearest tables, clipped at the ends)",
        choices=("none", "block", "ring", "noring"),
    )
    sharing_size: int = option(1, "g: layers' worth of rows that one layer sees", needs=("memory_sharing!=none",))
    value_lr_mult: float = option(4.0, "value tables learn at this multiple of the learning rate at step 0")
    value_lr_decay_iters: Optional[int] = option(
        None,
        "iterations over which the multiple decays linearly to 1 (default: those of the learning rate's decay; 0 keeps "
        "it constant)",
        at_least=0,
    )
    value_lr: Optional[float] = option(
        None, "constant learning rate of the value tables, instead of a multiple of the learning rate"
    )
    value_weight_decay: Optional[float] = option(
        None,
        "weight decay of the value tables, multiplied by their own learning rate (default: --weight-decay; a run of a "
        "few million tokens gains from ten times as much)",
    )
    value_second_moment: str = option(
        "full",
        "Adam's second moment of the value tables: a number for each element (full), or one for each row (row), the "
        "mean of its squared gradients over the columns",
        choices=("full", "row"),
    )
    value_optimizer_offload: bool = option(
        False,
        "keep moments and float32 main weights of the value tables in host memory and update them there; gradients "
        "come down and new weights go up in pieces",
        read_by="training/table_optimizer.py: where the state of tables is",
    )
    balance_loss_coeff: float = option(0.0, "weight of the balance loss on the first-stage key scores")
    tucker_penalty_coeff: float = option(
        0.0, "alpha: weight of the penalty on the cores' later singular values", needs=("memory_scoring=tucker",)
    )
    tucker_penalty_margin: float = option(
        0.15, "tau: singular values below this are not penalised", needs=("memory_tucker_penalty_coeff",)
    )
    init: str = option(
        "paper",
        "initialisation: equal output variance of memory and FFN, or the released code's",
        choices=("paper", "fixed"),
    )
    norm_gain_exponent: float = option(
        0.4,
        "x: the fixed initialisation starts the gains of query and key norms at Dk**-x (UltraMem v1: 0.33)",
        needs=("memory_init=fixed", "memory_qk_norm!=none"),
    )
    backend: str = option(
        "auto",
        "implementation of the search and the table lookup; auto picks the fastest that is proven on the device",
        choices=("auto", "reference", "scatter", "cpu", "triton"),
    )
    backward: str = option(
        "ordered",
        "how the triton backend adds up the tables' gradients: sorted by row, or with atomic additions, whose results "
        "vary in the last bits (--deterministic-mode sorts nevertheless)",
        choices=("ordered", "atomic"),
    )
    stream: bool = option(
        False,
        "run memory layers on a second CUDA stream beside the FFN of their block; no effect on a CPU",
        read_by="model/ffn_with_memory.py: the CUDA stream of memory layers",
    )
    parallel_size: int = option(1, "M: ranks over which a value table is sharded")
    parallel_mode: str = option("dim", "how a table is sharded: by dimension or by row", choices=("dim", "row"))
    exchange_parts: int = option(
        1,
        "spans of tokens whose rows are added up and sent one after the other with --memory-parallel-mode row, so that "
        "the sums of one travel beside the lookup of the next",
    )
    seed: int = option(
        1234, "seed of the row shuffle and of the initialisation of memory layers", at_least=0, at_most=2**31 - 1
    )

    # -- derived sizes ------------------------------------------------------------------------------------------

    @property
    def rows_per_layer(self) -> int:
        """Rows that one memory layer brings to its table: N * N."""
        return self.num_keys * self.num_keys

    def window_side(self, layers_seen: float | None = None) -> int:
        """floor(sqrt(g * N * N)), the side of the square of rows that one layer sees."""
        seen = self.effective_sharing_size if layers_seen is None else layers_seen
        return math.isqrt(math.floor(seen * self.rows_per_layer))

    @property
    def effective_sharing_size(self) -> int:
        """g, which is 1 without sharing."""
        return 1 if self.sharing == "none" else self.sharing_size

    @property
    def window_rows(self) -> int:
        """V: rows that one layer sees."""
        return self.window_side() ** 2

    @property
    def scored_keys(self) -> int:
        """Keys per side that one layer scores: e * floor(sqrt(V)); none where rows are addressed by hashes."""
        if self.hashes:
            return 0
        return self.key_expansion * self.window_side()

    @property
    def key_topk(self) -> int:
        """Keys kept per side by the first stage: min(K, cap), see ultramemv2.md step 3."""
        return min(self.topk, self.key_topk_cap)

    @property
    def num_blocks(self) -> int:
        """E: blocks with a projection of their own (e*e with per-block projections, else 1). Rows of n-grams are not
        added up but joined: every head is a block."""
        if self.scoring == "ngram":
            return self.num_heads
        return self.key_expansion**2 if self.value_expansion == "per-block" else 1

    @property
    def query_rows(self) -> int:
        """Output rows of the query projection; the query of an n-gram layer is the input itself."""
        if self.scoring == "ngram":
            return 0
        queries = {"per_rank": self.tucker_rank, "per_head": self.num_heads, "shared": 1}[self.query_mode]
        return 2 * queries * self.key_dim

    @property
    def has_pre_values(self) -> bool:
        """Whether the table has pre-value rows (PEER)."""
        return self.pre_value_dim > 0

    @property
    def has_pre_projection(self) -> bool:
        """Whether pre-values are multiplied with a projection of the input, and not with the input itself."""
        return self.has_pre_values and self.pre_projection == "linear"

    @property
    def summed_dim(self) -> int:
        """E * Dv: columns of a token's summed, or joined, values."""
        return self.num_blocks * self.value_dim

    @property
    def gate_rows(self) -> int:
        """Output rows of the gate's projection, or input columns of that to the keys of n-grams; 0 without a gate."""
        return self.summed_dim if self.gate != "none" or self.hashes else 0

    @property
    def core_parameters(self) -> int:
        """Parameters of the Tucker cores, C * h * R * R; 0 with other scores."""
        return self.num_cores * self.num_heads * self.tucker_rank**2 if self.scoring == "tucker" else 0

    @property
    def hashes(self) -> bool:
        """Whether rows are addressed by hashes of tokens; then nothing is searched for."""
        return self.scoring == "ngram"

    @property
    def conv_reach(self) -> int:
        """Tokens before its own that the convolution of an n-gram layer sees at most."""
        return self.ngram_size * (self.conv_kernel - 1) if self.hashes and self.conv_kernel else 0

    @property
    def norm_gains(self) -> int:
        """Parameters of the norms of queries and keys over Dk; those of n-gram layers are over H."""
        if self.hashes:
            return 0
        return {"both": 2, "query": 1, "none": 0}[self.qk_norm] * self.key_dim

    def memory_layers(self, num_layers: int) -> list[bool]:
        """For each of the ``num_layers`` blocks, whether it has a memory layer."""
        return parse_layer_freq(self.layer_freq, num_layers, f"{self.family}-layer-freq")

    # -- checks -------------------------------------------------------------------------------------------------

    def validate(self, hidden_size: int, num_layers: int) -> None:
        """Raise ``ValueError`` naming the flag when the sizes cannot work for a model of this shape."""

        def refuse(flag: str, expected: str) -> None:
            value = getattr(self, flag)
            raise ValueError(f"--{self.family}-{flag.replace('_', '-')} is {value}; expected {expected}")

        for name in (
            "num_keys",
            "key_dim",
            "value_dim",
            "topk",
            "key_topk_cap",
            "num_heads",
            "tucker_rank",
            "num_cores",
            "key_expansion",
            "sharing_size",
            "parallel_size",
            "exchange_parts",
        ):
            if getattr(self, name) < 1:
                refuse(name, "an integer of at least 1")
        at_least_zero = ("read_delay", "pre_value_dim", "balance_loss_coeff", "tucker_penalty_coeff")
        for name in (*at_least_zero, "tucker_penalty_margin"):
            if getattr(self, name) < 0:
                refuse(name, "0 or more")
        for name in (
            "scoring",
            "score_normalization",
            "query_mode",
            "qk_norm",
            "gate",
            "pre_projection",
            "value_expansion",
            "pre_value_activation",
            "sharing",
            "value_second_moment",
            "init",
            "backend",
            "backward",
            "parallel_mode",
        ):
            choices = self.__dataclass_fields__[name].metadata["choices"]
            if getattr(self, name) not in choices:
                refuse(name, f"one of {', '.join(choices)}")
        if self.value_dim % self.num_cores:
            refuse("value_dim", f"a multiple of --memory-num-cores ({self.num_cores})")
        if not self.hashes and self.key_topk > self.scored_keys:
            refuse(
                "topk",
                f"at most the {self.scored_keys} keys that a layer scores per side, or a smaller --memory-key-topk-cap",
            )
        if self.topk > self.key_topk**2:
            refuse("topk", f"at most the square of --memory-key-topk-cap ({self.key_topk_cap})")
        if self.value_expansion == "none" and self.value_dim != hidden_size:
            refuse("value_dim", f"the hidden size {hidden_size} when --memory-value-expansion is none")
        self._validate_scoring(refuse)
        if self.pre_projection == "none" and self.pre_value_dim != hidden_size:
            refuse("pre_value_dim", f"the hidden size {hidden_size} when --memory-pre-projection is none")
        if self.value_lr is not None and self.value_lr <= 0:
            refuse("value_lr", "a number above 0")
        if self.value_weight_decay is not None and not 0 <= self.value_weight_decay < math.inf:
            refuse("value_weight_decay", "a number of 0 or more")
        if self.value_lr_mult <= 0:
            refuse("value_lr_mult", "a number above 0")
        if self.value_lr_decay_iters is not None and self.value_lr_decay_iters < 0:
            refuse("value_lr_decay_iters", "0 or more")
        layers = sum(self.memory_layers(num_layers))
        if layers == 0:
            refuse("layer_freq", f"a pattern with at least one memory layer among {num_layers} blocks")
        last = max(block for block, here in enumerate(self.memory_layers(num_layers)) if here)
        if last + self.read_delay >= num_layers:
            refuse(
                "read_delay",
                f"at most {num_layers - 1 - last}, because the last memory layer is in block {last} of {num_layers} "
                "(counted from 0)",
            )
        if self.backward == "atomic" and self.backend != "triton":
            refuse("backward", f"ordered with --memory-backend {self.backend}; only triton has atomic additions")
        if self.sharing == "none" and self.sharing_size != 1:
            refuse("sharing_size", "1 when --memory-sharing is none")
        if self.sharing_size > layers:
            refuse("sharing_size", f"at most the {layers} memory layers of the model")
        if self.sharing == "block" and layers % self.sharing_size:
            refuse("sharing_size", f"a divisor of the {layers} memory layers when --memory-sharing is block")

    def _validate_ngrams(self, refuse: Callable[[str, str], None]) -> None:
        """What an n-gram layer has no part for, and whether its hashes have tables; ``refuse`` raises."""
        for name, needed in NGRAM_SETTINGS.items():
            if getattr(self, name) != needed:
                refuse(name, f"{needed} when --memory-scoring is ngram")
        if self.ngram_size < 2:
            refuse("ngram_size", "an integer of at least 2")
        if self.conv_kernel < 0:
            refuse("conv_kernel", "0 or more")
        lengths = self.ngram_size - 1
        if self.num_heads % lengths:
            refuse("num_heads", f"a multiple of {lengths}: as many hashes for n-grams of each length up to "
                   f"--{self.family}-ngram-size ({self.ngram_size})")  # fmt: skip
        if len(hash_sizes(self.rows_per_layer, self.num_heads)) < self.num_heads:
            refuse(
                "num_keys",
                f"so many that N*N rows ({self.rows_per_layer}) hold {self.num_heads} tables "
                f"(--{self.family}-num-heads) of different prime sizes",
            )

    def _validate_scoring(self, refuse: Callable[[str, str], None]) -> None:
        """The two kinds of scores and what goes with either; ``refuse`` raises."""
        if self.scoring == "tucker":
            for name, needed in (("score_normalization", "none"), ("qk_norm", "both")):
                if getattr(self, name) != needed:
                    refuse(name, f"{needed} when --memory-scoring is tucker")
            if self.query_mode == "per_head":
                refuse("query_mode", "per_rank or shared when --memory-scoring is tucker")
            return
        for name in ("tucker_rank", "num_cores"):
            if getattr(self, name) != 1:
                refuse(name, f"1 when --memory-scoring is {self.scoring}")
        if self.hashes:
            self._validate_ngrams(refuse)
            return
        if self.query_mode == "per_rank":
            refuse("query_mode", "per_head or shared when --memory-scoring is additive")
        if self.tucker_penalty_coeff > 0:
            refuse("tucker_penalty_coeff", "0 when --memory-scoring is additive: there are no cores")


@functools.cache
def hash_sizes(rows: int, heads: int) -> tuple[int, ...]:
    """Rows of the table of each of ``heads`` hashes: the largest different primes that are at most rows / heads, so
    that hashes of one value fall apart. Fewer where there are no more."""
    found: list[int] = []
    size = rows // heads
    while len(found) < heads and size >= 2:
        if all(size % divisor for divisor in range(2, math.isqrt(size) + 1)):
            found.append(size)
        size -= 1
    return tuple(found)


def model_keys() -> list[str]:
    """Keys of the settings that belong to the model."""
    return [f"memory_{field.name}" for field in fields(MemoryConfig) if field.name not in OF_A_RUN]


def parse_layer_freq(pattern: str | int, num_layers: int, flag: str = "memory-layer-freq") -> list[bool]:
    """Read ``--memory-layer-freq``: an integer n, or a list of 0 and 1 in Python's notation with ``+`` and ``*``.

    Returns one bool per block. Raises ``ValueError`` naming ``flag`` when the pattern cannot be read or has another
    length than ``num_layers``.
    """
    text = str(pattern).strip()
    every = whole_number(text)
    if every:
        return [layer % every == 0 for layer in range(num_layers)]
    flags = _evaluate_list(text, num_layers)
    if flags is None:
        raise ValueError(
            f"--{flag} is {pattern!r}; expected a positive integer or a list of {num_layers} zeros and ones such as "
            "'[1,0]*2'"
        )
    return flags


def _evaluate_list(text: str, length: int) -> list[bool] | None:
    """Evaluate ``[1,0]*2+[1]`` without eval: terms joined by +, each a literal list of 0 and 1 with an optional repeat.

    None for anything else, and for a list of another length than ``length``, which is never made: a mistyped repeat
    would fill the memory.
    """
    flags: list[bool] = []
    for term in text.replace(" ", "").split("+"):
        found = re.fullmatch(r"\[([01](?:,[01])*)\](?:\*([0-9]+))?", term)
        repeats = whole_number(found[2] or "1") if found else None
        if found is None or repeats is None:
            return None
        digits = found[1].split(",")
        if len(flags) + len(digits) * repeats > length:
            return None
        flags += [digit == "1" for digit in digits] * repeats
    return flags if len(flags) == length else None
