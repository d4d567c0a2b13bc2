"""From token ids to rows: which n-grams end at each place of a sequence, and where they point (arXiv 2601.07372).

A token's *context* is one int64: the n ids that end with its own, and how far back it may look, in bits

    [ reach | id of the token n-1 before | ... | own id ]

``reach`` is the number of tokens before it in its document, or a limit that n-grams and convolution do not exceed.
Contexts are made of whole sequences, once for a micro-batch. From then on a token carries all that its address needs:
sequences may be cut for tensor-parallel ranks, and pipeline stages and recomputed blocks need no neighbours.

The row of an n-gram of m tokens and hash j, in integers of 64 bits that never overflow:

    ( a_0 c_0  xor  a_1 c_1  xor ... xor  a_(m-1) c_(m-1) )  mod  p_j,  behind the tables of the hashes before it

where c_k is the canonical id of the token k places before, a_k an odd multiplier of the layer, p_j a prime.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from umv2_megatron.config.memory_config import MemoryConfig, hash_sizes
from umv2_megatron.memory.initialization import seeded_generator

BITS = 63


def id_bits(vocabulary: int) -> int:
    """Bits of one id of a context."""
    return max(1, (vocabulary - 1).bit_length())


def reach_limit(config: MemoryConfig) -> int:
    """How far back n-grams and convolution look at most, in tokens."""
    return max(config.ngram_size - 1, config.conv_reach)


def check_contexts(config: MemoryConfig, vocabulary: int) -> None:
    """Raise ``ValueError`` where a context does not fit into 63 bits."""
    needed = config.ngram_size * id_bits(vocabulary) + reach_limit(config).bit_length()
    if needed > BITS:
        raise ValueError(
            f"--{config.family}-ngram-size is {config.ngram_size}; expected n-grams of at most {BITS} bits, and with a "
            f"vocabulary of {vocabulary:,} these take {needed}"
        )


def contexts(tokens: Tensor, config: MemoryConfig, vocabulary: int, starts: Optional[Tensor] = None) -> Tensor:
    """The context of every token, [b, s] int64.

    Args:
        tokens: [b, s] ids.
        config: n and the convolution.
        vocabulary: ids are below it.
        starts: int32 [documents + 1], where documents begin in a single row of tokens and the number of tokens at the
            end; None where each row is one document.
    """
    length = tokens.shape[1]
    reach = torch.arange(length, device=tokens.device)
    if starts is not None:
        begins = starts[:-1].long()
        document = torch.zeros(length, dtype=torch.int64, device=tokens.device)
        document[begins] = begins
        reach = reach - document.cummax(0).values
    bits = id_bits(vocabulary)
    packed = reach.clamp(max=reach_limit(config)).expand_as(tokens).clone()
    for back in reversed(range(config.ngram_size)):
        # tokens of another document are packed, too; what says that they are none is the reach
        packed = (packed << bits) | _shifted(tokens, back)
    return packed


def _shifted(tokens: Tensor, back: int) -> Tensor:
    """The token ``back`` places before each; 0 where there is none."""
    if back == 0:
        return tokens
    shifted = torch.zeros_like(tokens)
    shifted[:, back:] = tokens[:, :-back]
    return shifted


def reach_of(packed: Tensor, config: MemoryConfig, vocabulary: int) -> Tensor:
    """How far back each token of the contexts ``packed`` may look."""
    return packed >> (config.ngram_size * id_bits(vocabulary))


def addresses(
    packed: Tensor, config: MemoryConfig, vocabulary: int, canonical: Tensor, multipliers: Tensor
) -> Tensor:
    """Rows [T, h] of the contexts ``packed`` [T]: all hashes of 2-grams first, then those of 3-grams, and so on.

    Args:
        canonical: [vocabulary], the canonical id of each id, below ``vocabulary``; a token that is not there has the
            number ``vocabulary``.
        multipliers: [n] int64, see ``draw_multipliers``.
    """
    bits, reach = id_bits(vocabulary), reach_of(packed, config, vocabulary)
    heads = config.num_heads // (config.ngram_size - 1)
    primes = hash_sizes(config.rows_per_layer, config.num_heads)
    rows, first = [], 0
    mixed = torch.zeros_like(packed)
    for back in range(config.ngram_size):
        ids = canonical[(packed >> (back * bits)) & ((1 << bits) - 1)].long()
        mixed = mixed ^ torch.where(reach >= back, ids, vocabulary) * multipliers[back]
        if back == 0:
            continue
        for prime in primes[(back - 1) * heads : back * heads]:
            rows.append(mixed % prime + first)
            first += prime
    return torch.stack(rows, -1)


def draw_multipliers(config: MemoryConfig, vocabulary: int, layer_index: int) -> Tensor:
    """The odd multipliers [n] int64 of a layer: products with ids up to ``vocabulary`` stay below 2^63."""
    half = (2**BITS - 1) // (vocabulary + 1) // 2
    generator = seeded_generator(config.seed, "multipliers", layer_index)
    return torch.randint(0, half, (config.ngram_size,), generator=generator) * 2 + 1
