"""What transformers promises of every generative model: decoding strategies, caches, padding, stopping.

Models are small and random, in float64: the likeliest token of such a model is ahead of the next one by far more than
rounding, and strategies that must agree are compared token by token.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.generation import GenerateDecoderOnlyOutput

sys.path.insert(0, str(Path(__file__).resolve().parent))
from tiny_model import CONTRACT, QUICK, VOCABULARY, slow_but, tiny_model, tokens  # noqa: E402

from umv2_megatron.hf import UMv2ForCausalLM  # noqa: E402

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-5}
"""``generate`` gives logits in float32."""

every_variant = pytest.mark.parametrize("variant", slow_but(QUICK, CONTRACT))


def exact(variant: str, **changes: Any) -> UMv2ForCausalLM:
    return tiny_model(**{**CONTRACT[variant], **changes}).double()


def by_hand(model: UMv2ForCausalLM, prompt: Tensor, count: int) -> Tensor:
    """``prompt`` [b, s] and the likeliest ``count`` tokens after it, computed without a cache and without generate."""
    with torch.no_grad():
        for _ in range(count):
            following = model(prompt, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            prompt = torch.cat([prompt, following], dim=1)
    return prompt


@every_variant
def test_greedy_decoding_with_every_cache(variant: str) -> None:
    model, prompt = exact(variant), tokens(3, 7)
    expected = by_hand(model, prompt, 6)
    assert torch.equal(model.generate(prompt, **GREEDY, use_cache=False), expected)
    for cache in ("dynamic", "static"):
        assert torch.equal(model.generate(prompt, **GREEDY, cache_implementation=cache), expected), cache
    given = [DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=20)]
    for cache in given:
        assert torch.equal(model.generate(prompt, **GREEDY, past_key_values=cache), expected)
        assert int(cache.get_seq_length()) == 12


@pytest.mark.skipif(importlib.util.find_spec("optimum") is None, reason="optimum-quanto is not installed")
def test_greedy_decoding_with_a_quantized_cache() -> None:
    """Rounded keys and values give other tokens, so only that it runs is checked."""
    model, prompt = tiny_model(), tokens(2, 7)
    found = model.generate(prompt, **GREEDY, cache_implementation="quantized", cache_config={"backend": "quanto"})
    assert found.shape == (2, 13) and torch.equal(found[:, :7], prompt)


@every_variant
def test_what_generate_returns(variant: str) -> None:
    model, prompt = exact(variant, attn_implementation="eager"), tokens(2, 5)
    asked = dict.fromkeys(
        ("return_dict_in_generate", "output_logits", "output_scores", "output_hidden_states", "output_attentions"), True
    )
    output = model.generate(prompt, **{**GREEDY, "max_new_tokens": 3}, **asked)
    assert isinstance(output, GenerateDecoderOnlyOutput)
    assert [len(part) for part in (output.logits, output.scores, output.hidden_states, output.attentions)] == [3] * 4
    with torch.no_grad():
        whole = model(output.sequences).logits[:, 4:-1]
    torch.testing.assert_close(torch.stack(output.logits, 1), whole.float(), **CLOSE)
    for step, (states, weights) in enumerate(zip(output.hidden_states, output.attentions, strict=True)):
        length = 5 if step == 0 else 1
        assert {tuple(state.shape) for state in states} == {(2, length, 64)} and len(states) == 5
        assert {tuple(each.shape) for each in weights} == {(2, 4, length, 5 + step)} and len(weights) == 4
    assert output.past_key_values.get_seq_length() == 7


@every_variant
def test_beams(variant: str) -> None:
    model, prompt = exact(variant), tokens(2, 5)
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 3, "return_dict_in_generate": True,
               "output_scores": True}  # fmt: skip
    output = model.generate(prompt, **options)
    again = model.generate(prompt, **options, use_cache=False)
    assert output.sequences.shape == (6, 11) and torch.equal(output.sequences, again.sequences)
    torch.testing.assert_close(output.sequences_scores, again.sequences_scores, **CLOSE)
    with torch.no_grad():
        chances = model(output.sequences).logits[:, 4:-1].log_softmax(-1)
    chosen = chances.gather(-1, output.sequences[:, 5:, None]).squeeze(-1).mean(-1)
    torch.testing.assert_close(output.sequences_scores, chosen.float(), **CLOSE)
    assert (chosen.view(2, 3).diff(dim=1) <= 1e-9).all() and len(set(map(tuple, output.sequences.tolist()))) == 6
    torch.manual_seed(3)
    drawn = model.generate(prompt, **{**options, "do_sample": True})
    assert drawn.sequences.shape == (6, 11) and torch.equal(drawn.sequences[::3, :5], prompt)


@every_variant
def test_sampling_follows_the_seed(variant: str) -> None:
    model, prompt = exact(variant), tokens(1, 7)

    def draw(seed: int, **options: Any) -> Tensor:
        torch.manual_seed(seed)
        options = {"max_new_tokens": 6, "do_sample": True, "num_return_sequences": 4, "pad_token_id": 0, **options}
        return model.generate(prompt, **options)

    assert torch.equal(draw(1), draw(1)) and torch.equal(draw(1), draw(1, use_cache=False))
    assert not torch.equal(draw(1, temperature=2.0), draw(2, temperature=2.0))
    assert torch.equal(draw(1, top_k=1), by_hand(model, prompt, 6).expand(4, -1))


@every_variant
def test_drafts_of_another_model_and_of_the_prompt_change_nothing(variant: str) -> None:
    """They are checked by the model, and rejected tokens are cut off its cache."""
    model, prompt = exact(variant), tokens(1, 4).repeat(1, 3)  # so that the prompt has something to look up
    expected = by_hand(model, prompt, 6)
    near, drawn = copy.deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        near.lm_head.weight.add_(0.1 * torch.randn(near.lm_head.weight.shape, generator=drawn))
    for assistant in (near, tiny_model(seed=1).double(), exact(variant)):
        assert torch.equal(model.generate(prompt, **GREEDY, assistant_model=assistant), expected)
    assert torch.equal(model.generate(prompt, **GREEDY, prompt_lookup_num_tokens=3), expected)


@every_variant
def test_generation_goes_on_from_a_cache(variant: str) -> None:
    model, prompt = exact(variant), tokens(2, 5)
    expected, short = by_hand(model, prompt, 6), {**GREEDY, "max_new_tokens": 3}
    first = model.generate(prompt, **short, return_dict_in_generate=True)
    cache, text = first.past_key_values, {"input_ids": first.sequences, "attention_mask": torch.ones(2, 8)}
    for _ in range(2):
        assert torch.equal(model.generate(**text, **short, past_key_values=cache), expected)
        cache.crop(-3)
    # a prompt in a cache serves several continuations
    with torch.no_grad():
        prefix = model(prompt[:, :4], use_cache=True).past_key_values
    for _ in range(2):
        assert torch.equal(model.generate(prompt, **GREEDY, past_key_values=copy.deepcopy(prefix)), expected)


@every_variant
def test_prompts_of_several_lengths(variant: str) -> None:
    """Padded on the left, each row goes on as it does alone."""
    model, rows = exact(variant), [tokens(1, length, seed=length) for length in (3, 8, 5)]
    batch = torch.cat([torch.nn.functional.pad(row, (8 - row.shape[1], 0)) for row in rows])
    mask = (torch.arange(8) >= torch.tensor([[5], [0], [3]])).long()
    for options in ({}, {"cache_implementation": "static"}):
        together = model.generate(batch, attention_mask=mask, **GREEDY, **options)
        for row, one in zip(together, rows, strict=True):
            assert torch.equal(row[8 - one.shape[1] :], by_hand(model, one, 6)[0])
    beams = model.generate(batch, attention_mask=mask, **GREEDY, num_beams=2)
    for row, one in zip(beams, rows, strict=True):
        assert torch.equal(row[8 - one.shape[1] :], model.generate(one, **GREEDY, num_beams=2)[0])


@every_variant
def test_embedded_prompts(variant: str) -> None:
    model, prompt = exact(variant), tokens(2, 5)
    embedded = model.get_input_embeddings()(prompt).detach()
    expected = by_hand(model, prompt, 6)
    for options in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        assert torch.equal(model.generate(inputs_embeds=embedded, **GREEDY, **options), expected[:, 5:])
    assert torch.equal(model.generate(prompt, inputs_embeds=embedded, **GREEDY), expected)
    beams = model.generate(prompt, **GREEDY, num_beams=2)
    assert torch.equal(model.generate(inputs_embeds=embedded, **GREEDY, num_beams=2), beams[:, 5:])


def test_generation_stops() -> None:
    model, prompt = exact("plain"), tokens(3, 5)
    greedy = by_hand(model, prompt, 6)[:, 5:]
    end = int(greedy[0, 2])
    stopped = model.generate(prompt, **GREEDY, eos_token_id=end)[:, 5:]
    for row, full in zip(stopped, greedy, strict=True):
        places = (full == end).nonzero()
        kept = int(places[0]) + 1 if len(places) else 6
        assert torch.equal(row[:kept], full[:kept]) and not row[kept:].any()
    assert model.generate(prompt, **GREEDY, eos_token_id=end, min_new_tokens=6).shape == (3, 11)
    assert model.generate(prompt[:1], do_sample=False, max_length=8).shape == (1, 8)

    class AfterTwo(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 7)

    criteria = StoppingCriteriaList([AfterTwo()])
    assert model.generate(prompt, **GREEDY, stopping_criteria=criteria).shape == (3, 7)


def test_only_the_last_logits_of_a_prompt_are_computed() -> None:
    """Those of all its tokens would be large."""
    model, seen = exact("plain"), []
    model.lm_head.register_forward_pre_hook(lambda layer, given: seen.append(given[0].shape[1]))
    model.generate(tokens(2, 9), **GREEDY)
    assert seen == [1] * 6


@every_variant
def test_kept_logits(variant: str) -> None:
    model, batch = exact(variant), tokens(2, 9)
    with torch.no_grad():
        whole = model(batch).logits
        assert whole.shape == (2, 9, VOCABULARY) and torch.equal(model(batch, logits_to_keep=0).logits, whole)
        for kept, places in ((1, slice(8, 9)), (3, slice(6, 9)), (torch.tensor([0, 4]), [0, 4])):
            torch.testing.assert_close(model(batch, logits_to_keep=kept).logits, whole[:, places], rtol=0, atol=1e-12)
