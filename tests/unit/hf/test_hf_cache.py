"""Cache layers that grow in place against transformers' own, through everything that is done with a cache."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from tiny_model import tiny_model, tokens
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from umv2_megatron.hf.cache_umv2 import UMv2CacheLayer, let_grow


def new_tokens(layer: DynamicLayer, count: int, batch: int = 3) -> tuple[Tensor, Tensor]:
    if layer.is_initialized and layer.keys.ndim == 4:
        batch = layer.keys.shape[0]
    return torch.randn(batch, 2, count, 5), torch.randn(batch, 2, count, 7)


@pytest.mark.parametrize("seed", range(8))
def test_equal_to_a_layer_that_copies(seed: int) -> None:
    """Drawn sequences of operations: after each both layers hold, and give, the same bits."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    ours, theirs = UMv2CacheLayer(), DynamicLayer()

    def both(function: str, *arguments: Any) -> None:
        results = [getattr(layer, function)(*arguments) for layer in (ours, theirs)]
        if function == "update":
            assert all(torch.equal(one, other) for one, other in zip(*results))

    with torch.no_grad():
        for _ in range(120):
            length = theirs.get_seq_length()
            action = draw.choice(["update"] * 8 + ["crop", "reorder", "select", "slice", "repeat", "copy", "reset"])
            if action == "update":
                both("update", *new_tokens(theirs, draw.choice([1, 1, 1, 2, 70])))
            elif not length:
                continue
            elif action == "crop":
                both("crop", -draw.randint(0, length))
            elif action == "reorder":
                both("reorder_cache", torch.randint(theirs.keys.shape[0], (theirs.keys.shape[0],)))
            elif action == "select":
                both("batch_select_indices", torch.randint(theirs.keys.shape[0], (draw.randint(1, 3),)))
            elif action == "slice":
                both("batch_select_indices", slice(0, max(1, theirs.keys.shape[0] - 1)))
            elif action == "repeat" and theirs.keys.shape[0] < 9:
                both("batch_repeat_interleave", 2)
            elif action == "copy":
                before = ours
                ours = copy.deepcopy(ours)
                before.update(*new_tokens(before, 1))  # which the copy must not see
            elif action == "reset" and draw.random() < 0.2:
                both("reset")
            assert ours.get_seq_length() == theirs.get_seq_length()
            if theirs.get_seq_length():
                assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


def test_nothing_is_copied_for_a_token() -> None:
    layer = UMv2CacheLayer()
    with torch.no_grad():
        layer.update(*new_tokens(layer, 10))
        place = layer.keys.data_ptr()
        for _ in range(50):
            layer.update(*new_tokens(layer, 1))
    assert layer.keys.data_ptr() == place and layer.keys.shape[2] == 60


def test_with_autograd_tokens_are_joined_as_before() -> None:
    layer = UMv2CacheLayer()
    with torch.no_grad():
        layer.update(*new_tokens(layer, 4))
    before, (key, value) = layer.keys.clone(), new_tokens(layer, 2)
    keys, _ = layer.update(key.requires_grad_(), value)
    keys.sum().backward()
    assert torch.equal(key.grad, torch.ones_like(key)) and torch.equal(layer.keys[:, :, :4], before)


def test_buffers_of_inference_mode_are_not_written_outside_of_it() -> None:
    layer = UMv2CacheLayer()
    with torch.inference_mode():
        layer.update(*new_tokens(layer, 4))
    before = layer.keys.clone()
    with torch.no_grad():
        layer.update(*new_tokens(layer, 1))
    assert torch.equal(layer.keys[:, :, :4], before) and layer.keys.shape[2] == 5


def test_only_plain_layers_without_contents_are_replaced() -> None:
    config = tiny_model().config
    filled, static, other = DynamicCache(), StaticCache(config=config, max_cache_len=8), DynamicCache(config=config)
    filled.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), 0)
    for cache in (filled, static, other, None):
        let_grow(cache)
    assert type(filled.layers[0]) is DynamicLayer and filled.layer_class_to_replicate is UMv2CacheLayer
    assert not any(isinstance(layer, UMv2CacheLayer) for layer in static.layers)
    assert all(type(layer) is UMv2CacheLayer for layer in other.layers)


def test_assisted_generation_crops() -> None:
    """A draft model's tokens are put into the cache and taken out again."""
    model, draft, prompt = tiny_model(), tiny_model(seed=3), tokens(1, 6)
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(prompt, assistant_model=draft, **options), model.generate(prompt, **options))
