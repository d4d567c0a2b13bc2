"""N-gram layers of the Hugging Face model: what a token needs of earlier ones comes out of caches, masks and positions.

That its numbers are those of training is tested in test_hf_against_megatron.py and by conversions.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, StaticCache

sys.path.insert(0, str(Path(__file__).resolve().parent))
from tiny_model import tiny_config, tiny_model, tokens  # noqa: E402

from umv2_megatron.config import memory_config  # noqa: E402
from umv2_megatron.hf import UMv2ForCausalLM, engram_umv2  # noqa: E402

ENGRAM: dict[str, Any] = {
    "memory_scoring": "ngram", "memory_num_heads": 4, "memory_topk": 1, "memory_pre_value_dim": 0,
    "memory_num_cores": 1, "memory_tucker_rank": 1, "memory_query_mode": "shared", "memory_layer_freq": "[1,1,0,0]",
    "memory_num_keys": 40,
}  # fmt: skip
BESIDE: dict[str, Any] = {
    "memory_scoring": "tucker", "memory_num_heads": 1, "memory_topk": 6, "memory_pre_value_dim": 12,
    "memory_num_cores": 2, "memory_tucker_rank": 2, "memory_query_mode": "per_rank", "memory_layer_freq": "[0,1,1,0]",
    "memory_num_keys": 14, "engram_layer_freq": "[1,1,0,0]", "engram_num_heads": 4, "engram_num_keys": 40,
}  # fmt: skip
"""Changes of ``ENGRAM``: the same n-gram layers beside others."""
CLOSE = {"rtol": 0, "atol": 1e-5}


def model_of(**changes: Any) -> UMv2ForCausalLM:
    """The tiny model with two n-gram layers, some equal tokens, and a convolution that does something."""
    model = tiny_model(**{**ENGRAM, **changes}).double()
    for layer in model.model.layers:
        if layer.hashing is not None:
            layer.hashing.canonical //= 2
            if layer.hashing.conv is not None:
                torch.nn.init.normal_(layer.hashing.conv)
    return model


def test_tables_of_an_export_have_the_sizes_of_training() -> None:
    """An export's files stand alone, so they hold a copy of the function that training uses. Also where N*N rows have
    room for fewer primes than heads."""
    for heads in (1, 2, 3, 4, 16):
        for keys in (1, 2, 3, 5, 24, 40, 333, 1000):
            sizes = engram_umv2.hash_sizes(keys * keys, heads)
            assert sizes == memory_config.hash_sizes(keys * keys, heads), (heads, keys)


@torch.no_grad()
@pytest.mark.parametrize(
    "changes", [{}, {"memory_ngram_size": 2, "memory_conv_kernel": 0}, {"sliding_window": 5}, BESIDE]
)
def test_decoding_with_a_cache_is_decoding_without(changes: dict[str, Any]) -> None:
    model, prompt = model_of(**changes), tokens(3, 7)
    options = {"max_new_tokens": 14, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    if changes.get("sliding_window"):
        greedy = model.generate(prompt, **options)
    else:
        greedy = model.generate(prompt, **options, num_beams=1)
        beams = [model.generate(prompt, **options, num_beams=3, use_cache=cached) for cached in (True, False)]
        assert torch.equal(beams[0].sequences, beams[1].sequences)
    whole = model(greedy.sequences, use_cache=False).logits[:, 6:-1]
    torch.testing.assert_close(torch.stack(greedy.logits, 1), whole.float(), **CLOSE)
    # a prompt in parts, one of them shorter than what the convolution looks back, and a cache that is cut
    sequence = greedy.sequences
    first = model(sequence[:, :11], use_cache=True)
    cache = copy.deepcopy(first.past_key_values)
    second = model(sequence[:, 11:13], past_key_values=first.past_key_values).logits
    expected = model(sequence, use_cache=False).logits
    torch.testing.assert_close(second, expected[:, 11:13], **CLOSE)
    if not changes.get("sliding_window"):
        cache.crop(-4)
        torch.testing.assert_close(model(sequence[:, 7:], past_key_values=cache).logits, expected[:, 7:], **CLOSE)


@torch.no_grad()
def test_compiled_steps_leave_no_layer_out() -> None:
    """In float32, blocks without an n-gram layer take compiled steps where this machine has a compiler."""
    model, sequence = model_of(**BESIDE).float(), tokens(1, 12)
    expected = model(sequence, use_cache=False).logits
    for layer in (model.model.layers[0].hashing, model.model.layers[2].memory):
        assert layer is not None
    cache, found = None, []
    for place in range(12):
        step = model(sequence[:, place : place + 1], past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        found.append(step.logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("side", "changes"), [("left", {}), ("right", {}), ("left", BESIDE)])
def test_padding_changes_nothing(side: str, changes: dict[str, Any]) -> None:
    model, lengths = model_of(**changes), (3, 12, 6)
    rows = [tokens(1, length, seed=length) for length in lengths]
    batch, mask = torch.zeros(3, 12, dtype=torch.int64), torch.zeros(3, 12, dtype=torch.int64)
    for row, one in enumerate(rows):
        place = slice(12 - one.shape[1], 12) if side == "left" else slice(0, one.shape[1])
        batch[row, place], mask[row, place] = one[0], 1
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(batch, attention_mask=mask, position_ids=position_ids).logits
    for row, one in enumerate(rows):
        torch.testing.assert_close(logits[row, mask[row].bool()], model(one).logits[0], **CLOSE)
    if side == "left":
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        together = model.generate(batch, attention_mask=mask, **options)
        for row, one in enumerate(rows):
            assert torch.equal(together[row, 12:], model.generate(one, **options)[0, one.shape[1] :])


def test_documents_in_one_row_are_apart() -> None:
    model, first, second = model_of(), tokens(1, 9, seed=3), tokens(1, 13, seed=4)
    positions = torch.cat([torch.arange(9), torch.arange(13)])[None]
    joined = model(torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits
    for part, alone in ((joined[:, :9], first), (joined[:, 9:], second)):
        torch.testing.assert_close(part, model(alone).logits, **CLOSE)


def test_only_the_tokens_that_the_layer_reads_change_a_logit() -> None:
    """In a model without attention to speak of: an n-gram layer in block 0 alone, and tokens that it cannot reach."""
    model = model_of(memory_layer_freq="[1,0,0,0]")
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    sequence = tokens(1, 20)
    base = model(sequence).logits[0, -1]
    seen = []
    for back in range(1, 20):
        other = sequence.clone()
        other[0, -1 - back] = (other[0, -1 - back] + 48) % 96
        seen.append(not torch.equal(model(other).logits[0, -1], base))
    reached = {back for tap in (0, 3, 6, 9) for back in range(tap, tap + 3)} - {0}
    assert {back for back, changed in enumerate(seen, 1) if changed} == reached


@pytest.mark.parametrize("changes", [{}, BESIDE], ids=["alone", "beside"])
@pytest.mark.parametrize("place", ["device", "cpu", "mmap", "cpu-int8"])
def test_saved_and_loaded_with_tables_anywhere(place: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = model_of(memory_table_chunk_rows=700, **changes).float()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, memory_tables=place)
    memory = loaded.model.layers[1].hashing
    assert torch.equal(memory.multipliers, model.model.layers[1].hashing.multipliers)
    assert torch.equal(memory.canonical, torch.arange(96) // 2)
    prompt = tokens(2, 9)
    with torch.no_grad():
        found, expected = loaded(prompt).logits, model(prompt).logits
        if "int8" in place:  # where rounded rows may change the picks of later blocks
            assert 0 < (found - expected).abs().mean() < 0.05 * expected.std()
        else:
            torch.testing.assert_close(found, expected, **CLOSE)
        assert loaded.generate(prompt, max_new_tokens=3, do_sample=False).shape == (2, 12)


@pytest.mark.parametrize("changes", [{}, BESIDE], ids=["alone", "beside"])
def test_gradients_reach_every_parameter(changes: dict[str, Any]) -> None:
    model, batch = model_of(**changes).train(), tokens(2, 15)
    model.gradient_checkpointing_enable()
    model(batch, labels=batch).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_what_does_not_say_which_tokens_come_before_is_refused() -> None:
    model, batch = model_of(), tokens(1, 5)
    with pytest.raises(ValueError, match="inputs_embeds is given; expected input_ids"):
        model(inputs_embeds=model.model.embed_tokens(batch))
    with pytest.raises(ValueError, match="attention_mask is no matrix"):
        model(batch, attention_mask=torch.ones(1, 1, 5, 5))
    with pytest.raises(ValueError, match="the cache is a StaticCache; expected a DynamicCache"):
        model(batch, past_key_values=StaticCache(config=model.config, max_cache_len=9))
    for changes, told in (
        ({"memory_topk": 2}, "memory_topk is 2; expected 1 where memory_scoring is ngram"),
        ({"memory_num_heads": 3}, "memory_num_heads is 3; expected a multiple of 2"),
        ({"memory_ngram_size": 1}, "memory_ngram_size is 1; expected 2 or more"),
    ):
        with pytest.raises(ValueError, match=told):
            tiny_config(**{**ENGRAM, **changes})
    for changes, told in (
        ({"memory_scoring": "ngram"}, "engram_layer_freq is '.*'; expected None but beside memory layers"),
        ({"ffn_variant": "dense"}, "engram_layer_freq is '.*'; expected None but beside memory layers"),
        ({"engram_layer_freq": "[1,0]"}, r"engram_layer_freq is '\[1,0\]'; expected a positive integer or a list of 4"),
        ({"engram_layer_freq": "[0]*4"}, "expected an n-gram layer"),
        ({"engram_num_heads": 3}, "engram_num_heads is 3; expected a multiple of 2 with engram_ngram_size 3"),
        ({"engram_value_dim": 0}, "engram_value_dim is 0; expected 1 or more"),
        ({"engram_more": 1}, "engram_more is 1, a setting that this version of the model does not know"),
    ):
        with pytest.raises(ValueError, match=told):
            tiny_config(**{**BESIDE, **changes})
