"""EngramLayer against an independent layer written out in loops and Python's integers, gradients included.

The slow layer goes token by token through documents: it looks n-grams up in lists of ids, so that nothing of contexts,
their bits, or shifted tensors is shared.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from umv2_megatron.config.memory_config import MemoryConfig, hash_sizes
from umv2_megatron.memory.engram import EngramLayer
from umv2_megatron.memory.initialization import ffn_output_variance
from umv2_megatron.memory.ngrams import check_contexts, contexts, draw_multipliers

HIDDEN, VOCABULARY = 12, 19
BASE: dict[str, Any] = {
    "scoring": "ngram", "query_mode": "shared", "tucker_rank": 1, "num_cores": 1, "pre_value_dim": 0, "topk": 1,
    "num_keys": 16, "num_heads": 4, "value_dim": 3,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "engram": {},
    "two_grams": {"ngram_size": 2, "num_heads": 3, "conv_kernel": 2},
    "four_grams": {"ngram_size": 4, "num_heads": 6, "value_dim": 2},
    "without_convolution": {"conv_kernel": 0},
}
DOCUMENTS = ([3, 5, 7, 3, 5, 7, 18, 0, 3, 5, 7, 1, 2, 3], [4], [5, 7, 3, 5, 7, 9])


def build(case: str, backend: str) -> EngramLayer:
    config = MemoryConfig(**{**BASE, **CASES[case]}, backend=backend)
    config.validate(HIDDEN, 3)
    layer = EngramLayer(config, HIDDEN, 1, 3, 4 * HIDDEN, 3, VOCABULARY).double()
    torch.manual_seed(7)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, dtype=torch.float64))
    layer.set_canonical(torch.arange(VOCABULARY) // 2)
    return layer


@pytest.mark.parametrize("backend", ["reference", "scatter", "cpu"])
@pytest.mark.parametrize("case", CASES)
def test_layer_equals_loops(case: str, backend: str) -> None:
    layer = build(case, backend)
    tokens = torch.tensor([[token for document in DOCUMENTS for token in document]])
    starts = torch.tensor([0, 14, 15, 21], dtype=torch.int32)
    packed = contexts(tokens, layer.config, VOCABULARY, starts).T
    x, upstream = torch.randn(2, tokens.shape[1], 1, HIDDEN, dtype=torch.float64)
    fast_x, slow_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    fast = layer(fast_x, packed)
    fast.backward(upstream)
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert len(grads) == (7 if layer.config.conv_kernel else 5)
    layer.zero_grad()

    slow = slow_layer(layer, slow_x[:, 0])
    torch.testing.assert_close(fast[:, 0], slow, rtol=1e-10, atol=1e-10)
    slow.backward(upstream[:, 0])
    torch.testing.assert_close(fast_x.grad, slow_x.grad, rtol=1e-10, atol=1e-10)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-10, atol=1e-10, msg=name)


def slow_layer(layer: EngramLayer, x: Tensor) -> Tensor:
    config, outputs, place = layer.config, [], 0
    for document in DOCUMENTS:
        gated = []
        for at in range(len(document)):
            e = torch.cat([layer.table.values[row] for row in slow_rows(layer, document[: at + 1])])
            key = slow_norm(layer.key_proj.weight @ e, layer.key_norm)
            query = slow_norm(x[place + at], layer.query_norm)
            z = (query * key).sum() / math.sqrt(HIDDEN)
            root = torch.sqrt(z) if z > 0 else -torch.sqrt(-z)
            gated.append(layer.value_proj.weight @ e / (1 + torch.exp(-root)))
        for at, own in enumerate(gated):
            if layer.conv is None:
                outputs.append(own)
                continue
            total = torch.zeros(HIDDEN, dtype=torch.float64)
            for tap in range(config.conv_kernel):
                source = at - config.ngram_size * (config.conv_kernel - 1 - tap)
                if source >= 0:
                    total = total + layer.conv[:, tap] * slow_norm(gated[source], layer.conv_norm)
            outputs.append(own + total / (1 + torch.exp(-total)))
        place += len(document)
    return torch.stack(outputs)


def slow_rows(layer: EngramLayer, document: list[int]) -> list[int]:
    """Rows of the n-grams at the end of ``document``, in Python's integers."""
    config, multipliers = layer.config, layer.multipliers.tolist()
    canonical = [token // 2 for token in document]
    heads = config.num_heads // (config.ngram_size - 1)
    sizes, rows, number = slow_primes(config.num_keys**2 // config.num_heads, config.num_heads), [], 0
    for length in range(2, config.ngram_size + 1):
        mixed = 0
        for back in range(length):
            mixed ^= (canonical[-1 - back] if back < len(canonical) else VOCABULARY) * multipliers[back]
        assert 0 <= mixed < 2**63
        for _ in range(heads):
            rows.append(sum(sizes[:number]) + mixed % sizes[number])
            number += 1
    assert max(rows) < config.num_keys**2
    return rows


def slow_primes(largest: int, count: int) -> list[int]:
    return [n for n in range(largest, 1, -1) if all(n % d for d in range(2, n))][:count]


def slow_norm(x: Tensor, gain: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).sum() / HIDDEN + 1e-5) * gain


@pytest.mark.parametrize("init", ["paper", "fixed"])
def test_output_begins_as_large_as_that_of_the_ffn(init: str) -> None:
    hidden, inner = 64, 256
    config = MemoryConfig(**{**BASE, "num_keys": 100, "num_heads": 16, "value_dim": 4}, init=init)
    layer = EngramLayer(config, hidden, 0, 1, inner, 8, 1000)
    tokens = torch.randint(0, 1000, (8, 256), generator=torch.Generator().manual_seed(1))
    x = torch.randn(256, 8, hidden, generator=torch.Generator().manual_seed(2))
    output = layer(x * x.square().mean(-1, keepdim=True).rsqrt(), contexts(tokens, config, 1000).T)
    # of the demo: values of variance 1/3, gates of mean square 0.27
    expected = ffn_output_variance(hidden, inner, 8) if init == "paper" else 0.27 / 3
    assert float(output.detach().var()) == pytest.approx(expected, rel=0.1)


def test_contexts_do_not_depend_on_what_follows_or_lies_beside() -> None:
    config = MemoryConfig(**BASE)
    tokens = torch.randint(0, VOCABULARY, (2, 30))
    whole = contexts(tokens, config, VOCABULARY)
    assert torch.equal(contexts(tokens[1:, :20], config, VOCABULARY), whole[1:, :20])
    # a row of documents gives each the contexts that it has alone
    joined = contexts(tokens.reshape(1, 60), config, VOCABULARY, torch.tensor([0, 30, 60], dtype=torch.int32))
    own = whole & ((1 << 3 * 5) - 1)
    reach, joined_reach = whole >> 15, joined.view(2, 30) >> 15
    assert torch.equal(reach, joined_reach) and reach.max() == 9
    assert torch.equal((joined.view(2, 30) & ((1 << 15) - 1))[:, 2:], own[:, 2:])


def test_products_fill_the_integers_and_do_not_leave_them() -> None:
    config = MemoryConfig(**BASE)
    for vocabulary in (2, 257, 151_936, 1 << 20):
        for index in range(20):
            drawn = draw_multipliers(config, vocabulary, index).tolist()
            assert all(number % 2 == 1 and 0 < number * vocabulary < 2**63 for number in drawn)
            assert max(drawn) * vocabulary > 2**58 and len(set(drawn)) == 3


def test_sizes_of_hash_tables() -> None:
    assert list(hash_sizes(16 * 16, 4)) == slow_primes(64, 4) == [61, 59, 53, 47]
    assert hash_sizes(9, 4) == (2,)
    assert sum(hash_sizes(1000 * 1000, 16)) > 0.99 * 1000 * 1000


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"topk": 2}, "--memory-topk is 2; expected 1 when --memory-scoring is ngram"),
        ({"num_heads": 3}, "--memory-num-heads is 3; expected a multiple of 2"),
        ({"num_keys": 4}, "--memory-num-keys is 4; expected so many that N*N rows (16) hold 4 tables"),
        ({"read_delay": 1}, "--memory-read-delay is 1; expected 0 when"),
        ({"num_cores": 3}, "--memory-num-cores is 3; expected 1 when --memory-scoring is ngram"),
    ],
)
def test_what_an_ngram_layer_has_no_part_for_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError) as caught:
        MemoryConfig(**{**BASE, **changes}).validate(HIDDEN, 3)
    assert str(caught.value).startswith(told)


def test_ngrams_that_do_not_fit_into_a_context_are_refused() -> None:
    check_contexts(MemoryConfig(**BASE), 1 << 19)
    with pytest.raises(ValueError, match="--memory-ngram-size is 3; expected n-grams of at most 63 bits"):
        check_contexts(MemoryConfig(**BASE), (1 << 19) + 1)
