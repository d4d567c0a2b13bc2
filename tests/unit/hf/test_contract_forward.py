"""What transformers promises of every causal model's forward and backward: inputs, outputs, masks, losses, gradients.

Models compute in float64 where two ways of computing are compared: there no two scores of a pick are so close that
rounding decides between them. Rotary angles and losses are float32 in any model.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import DynamicCache

sys.path.insert(0, str(Path(__file__).resolve().parent))
from tiny_model import CONTRACT, QUICK, VOCABULARY, slow_but, tiny_model, tokens  # noqa: E402

from umv2_megatron.hf import UMv2ForCausalLM  # noqa: E402

CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-6}
"""Routers compute a softmax in float32; all else agrees to 1e-12."""

every_variant = pytest.mark.parametrize("variant", slow_but(QUICK, CONTRACT))


def exact(variant: str, **changes: Any) -> UMv2ForCausalLM:
    return tiny_model(**{**CONTRACT[variant], **changes}).double()


def count_calls(module: nn.Module) -> list[nn.Module]:
    """A list that grows with each call of ``module``."""
    calls: list[nn.Module] = []
    module.register_forward_hook(lambda module, given, output: calls.append(module))
    return calls


@every_variant
def test_outputs_are_there_when_they_are_asked_for(variant: str) -> None:
    model, batch = exact(variant, attn_implementation="eager"), tokens(2, 9)
    with torch.no_grad():
        plain = model(batch)
        output = model(batch, output_hidden_states=True, output_attentions=True, use_cache=True)
        pairs = model(batch, output_hidden_states=True, output_attentions=True, use_cache=True, return_dict=False)
    assert plain.hidden_states is None and plain.attentions is None and plain.loss is None
    assert isinstance(plain.past_key_values, DynamicCache) and plain.past_key_values.get_seq_length() == 9
    assert torch.equal(output.logits, plain.logits) and output.logits.shape == (2, 9, VOCABULARY)
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 9, 64)] * 5
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 4, 9, 9)] * 4
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 9, dtype=torch.float64))
        assert weights.triu(1).count_nonzero() == 0
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)
    assert len(set(map(id, output.hidden_states))) == 5
    logits, cache, states, attentions = pairs
    assert torch.equal(logits, output.logits) and cache.get_seq_length() == 9
    for found, expected in ((states, output.hidden_states), (attentions, output.attentions)):
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@every_variant
def test_hidden_states_are_those_of_the_blocks(variant: str) -> None:
    """Also where a block returns more than the hidden states (read delay)."""
    model, seen = exact(variant), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda layer, given, output: seen.append(output))
    with torch.no_grad():
        states = model(tokens(2, 5), output_hidden_states=True).hidden_states
    firsts = [output[0] if isinstance(output, tuple) else output for output in seen]
    assert torch.equal(states[0], model.model.embed_tokens(tokens(2, 5)))
    assert all(torch.equal(state, first) for state, first in zip(states[1:-1], firsts[:-1], strict=True))
    assert torch.equal(states[-1], model.model.norm(firsts[-1]))


@every_variant
def test_states_and_attentions_keep_gradients(variant: str) -> None:
    model = exact(variant, attn_implementation="eager")
    output = model(tokens(2, 5), output_hidden_states=True, output_attentions=True)
    kept = [output.hidden_states[0], output.hidden_states[2], output.attentions[0]]
    for tensor in kept:
        tensor.retain_grad()
    output.logits.square().mean().backward()
    assert all(tensor.grad is not None and tensor.grad.count_nonzero() for tensor in kept)


@every_variant
def test_inputs_may_be_given_in_other_forms(variant: str) -> None:
    model, batch = exact(variant), tokens(2, 9)
    causal = torch.ones(9, 9, dtype=torch.bool).tril().expand(2, 1, 9, 9)
    with torch.no_grad():
        expected = model(batch).logits
        for inputs in (
            {"inputs_embeds": model.get_input_embeddings()(batch)},
            {"input_ids": batch, "position_ids": torch.arange(9).expand(2, -1)},
            {"input_ids": batch, "position_ids": torch.arange(9).unsqueeze(0)},
            {"input_ids": batch, "attention_mask": torch.ones_like(batch)},
            {"input_ids": batch, "attention_mask": torch.ones(2, 9)},
            {"input_ids": batch, "attention_mask": causal},
            {"input_ids": batch, "attention_mask": torch.zeros(2, 1, 9, 9).masked_fill(~causal, -torch.inf).double()},
            {"input_ids": batch, "use_cache": False},
        ):
            torch.testing.assert_close(model(**inputs).logits, expected, **CLOSE)
        # later positions differ, so that a test that ignored them would fail
        assert not torch.allclose(model(batch, position_ids=2 * torch.arange(9)[None]).logits, expected, atol=1e-3)
    for wrong in ({}, {"input_ids": batch, "inputs_embeds": torch.zeros(2, 9, 64)}):
        with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
            model(**wrong)


@every_variant
def test_rows_of_a_batch_do_not_see_each_other(variant: str) -> None:
    model, batch = exact(variant), tokens(5, 9)
    with torch.no_grad():
        together = model(batch).logits
        alone = torch.cat([model(row).logits for row in batch.split(1)])
        assert torch.equal(model(batch).logits, together)  # and the same call gives the same bits
    torch.testing.assert_close(together, alone, **CLOSE)


@every_variant
def test_no_token_sees_a_later_one(variant: str) -> None:
    model, batch = exact(variant), tokens(2, 9)
    changed = batch.clone()
    changed[:, 6] = (batch[:, 6] + 1) % VOCABULARY
    with torch.no_grad():
        before, after = model(batch).logits, model(changed).logits
    torch.testing.assert_close(after[:, :6], before[:, :6], **CLOSE)
    assert (after[:, 6:] - before[:, 6:]).abs().amax((0, 2)).min() > 1e-3


@every_variant
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_is_masked_is_not_seen(variant: str, side: str) -> None:
    model, batch = exact(variant), tokens(3, 9)
    mask = torch.ones_like(batch)
    mask[1, slice(0, 4) if side == "left" else slice(5, 9)] = 0
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    with torch.no_grad():
        found = model(batch, **inputs).logits
        other = torch.where(mask.bool(), batch, (batch + 7) % VOCABULARY)
        torch.testing.assert_close(model(other, **inputs).logits[mask.bool()], found[mask.bool()], **CLOSE)
        alone = model(batch[1:2, mask[1].bool()]).logits[0]
    torch.testing.assert_close(found[1, mask[1].bool()], alone, **CLOSE)


@every_variant
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_texts_do_not_see_each_other(variant: str, attention: str) -> None:
    """Several texts in one row, told apart by positions that begin anew."""
    model = exact(variant, attn_implementation=attention)
    texts = [tokens(1, length, seed=length) for length in (3, 7, 5)]
    positions = torch.cat([torch.arange(text.shape[1]) for text in texts]).unsqueeze(0)
    with torch.no_grad():
        packed = model(torch.cat(texts, 1), position_ids=positions, use_cache=False).logits
        alone = torch.cat([model(text).logits for text in texts], dim=1)
    torch.testing.assert_close(packed, alone, **CLOSE)


@every_variant
@pytest.mark.parametrize("padded", [False, True])
def test_attention_implementations_agree(variant: str, padded: bool) -> None:
    model, batch = exact(variant, attn_implementation="eager"), tokens(3, 9)
    mask = torch.ones_like(batch)
    if padded:
        mask[0, :3] = 0
    found = {}
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
        model.zero_grad()
        logits = model(batch, attention_mask=mask).logits[mask.bool()]
        logits.square().mean().backward()
        found[name] = logits, {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.testing.assert_close(found["sdpa"][0], found["eager"][0], **CLOSE)
    for name, grad in found["eager"][1].items():
        torch.testing.assert_close(found["sdpa"][1][name], grad, rtol=1e-5, atol=1e-9, msg=name)
    with pytest.raises(ValueError, match="no_such_attention"):
        model.set_attn_implementation("no_such_attention")


@pytest.mark.slow
@every_variant
def test_flex_attention_agrees(variant: str) -> None:
    """transformers compiles it, which takes a while; it has no float64 and on a CPU no backward."""
    model, batch = tiny_model(**CONTRACT[variant], attn_implementation="eager", head_dim=16), tokens(3, 40)
    mask = torch.ones_like(batch)
    mask[0, :3] = 0
    with torch.no_grad():
        expected = model(batch, attention_mask=mask, output_hidden_states=True).hidden_states[1]
        model.set_attn_implementation("flex_attention")
        found = model(batch, attention_mask=mask, output_hidden_states=True).hidden_states[1]
    # of the first block: later ones may pick other rows where two scores tie in float32
    close = ((found - expected)[mask.bool()].abs().amax(-1) < 1e-4).float().mean()
    assert close > 0.95


@every_variant
def test_a_cache_is_filled_token_by_token_and_by_pieces(variant: str) -> None:
    model, batch = exact(variant), tokens(2, 9)
    with torch.no_grad():
        whole = model(batch).logits
        for lengths in ([1] * 9, [4, 3, 2], [8, 1]):
            cache, parts = None, []
            for piece in batch.split(lengths, dim=1):
                output = model(piece, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                parts.append(output.logits)
            torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)
            assert cache.get_seq_length() == 9
            assert {layer.keys.shape for layer in cache.layers} == {(2, model.config.num_key_value_heads, 9, 20)}
    assert model(batch, use_cache=False).past_key_values is None


@every_variant
def test_losses(variant: str) -> None:
    model, batch = exact(variant), tokens(2, 9)
    labels = batch.clone()
    labels[0, :4] = -100
    with torch.no_grad():
        output = model(batch, labels=labels)
        shifted = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], dim=1)
        each = functional.cross_entropy(
            output.logits.float().flatten(0, 1), shifted.flatten(), reduction="none", ignore_index=-100
        )
        counted = int((shifted != -100).sum())
        torch.testing.assert_close(output.loss, each.sum() / counted)
        # a trainer that accumulates gives the labels of all batches of a step
        torch.testing.assert_close(model(batch, labels=labels, num_items_in_batch=40).loss, each.sum() / 40)
        # and one that shards sequences shifts them itself
        torch.testing.assert_close(model(batch, labels=batch, shift_labels=shifted).loss, each.sum() / counted)
        assert model(batch, labels=labels, return_dict=False)[0] == output.loss


@every_variant
def test_every_parameter_learns_and_frozen_ones_do_not(variant: str) -> None:
    model, batch = tiny_model(**CONTRACT[variant]).train(), tokens(2, 20)
    model(batch, labels=batch).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.count_nonzero()]
    assert without == []
    for part in (".self_attn.", ".memory.", ".table.", ".retrieval.", "embed_tokens", "norm"):
        model.zero_grad()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part not in name)
        model(batch, labels=batch).loss.backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is None) == (part in name), (part, name)
    model.requires_grad_(False)
    assert not model(batch, labels=batch).loss.requires_grad


@every_variant
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_activations_changes_no_gradient(variant: str, reentrant: bool) -> None:
    """With dropout: the second forward draws the same masks."""
    grads, batch = [], tokens(2, 9)
    for checkpointed in (False, True):
        model = exact(variant, hidden_dropout=0.2, attention_dropout=0.2).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        counts = [count_calls(layer.input_layernorm) for layer in model.model.layers]
        torch.manual_seed(3)
        model(batch, labels=batch, use_cache=False).loss.backward()
        assert [len(calls) for calls in counts] == [2 if checkpointed else 1] * 4
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-9, atol=1e-12, msg=name)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_dropout_is_drawn_in_training_only() -> None:
    model, batch = exact("plain", hidden_dropout=0.3, attention_dropout=0.3), tokens(2, 9)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(batch).logits.detach()

    assert torch.equal(run(1), run(2))
    model.train()
    assert torch.equal(run(1), run(1)) and not torch.allclose(run(1), run(2), atol=1e-2)


@every_variant
def test_the_vocabulary_can_be_resized(variant: str) -> None:
    model, batch = exact(variant), tokens(2, 9)
    tied = model.config.tie_word_embeddings
    with torch.no_grad():
        before = model(batch).logits
        for size, pad, expected in ((VOCABULARY + 10, None, VOCABULARY + 10), (100, 64, 128), (VOCABULARY, None, 96)):
            torch.manual_seed(4)
            embeddings = model.resize_token_embeddings(size, pad_to_multiple_of=pad)
            assert embeddings is model.get_input_embeddings() and embeddings.num_embeddings == expected
            assert model.config.vocab_size == model.vocab_size == model.lm_head.out_features == expected
            assert (model.lm_head.weight is embeddings.weight) == tied
            logits = model(batch).logits
            assert logits.shape[-1] == expected
            torch.testing.assert_close(logits[..., :VOCABULARY], before, **CLOSE)
    labels = torch.full_like(batch, 95)
    model(batch, labels=labels).loss.backward()
    assert model.lm_head.weight.grad is not None


def test_embeddings_can_be_replaced() -> None:
    model, batch = exact("untied"), tokens(2, 9)
    other = nn.Embedding.from_pretrained(model.get_input_embeddings().weight.detach().flip(0))
    with torch.no_grad():
        expected = model(VOCABULARY - 1 - batch).logits
        model.set_input_embeddings(other)
        head = nn.Linear(64, VOCABULARY, bias=False, dtype=torch.float64)
        head.weight.copy_(model.get_output_embeddings().weight * 2)
        model.set_output_embeddings(head)
        torch.testing.assert_close(model(batch).logits, expected * 2, **CLOSE)
    assert model.get_input_embeddings() is other and model.get_output_embeddings() is head


@every_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(variant: str, dtype: torch.dtype) -> None:
    model, batch = tiny_model(**CONTRACT[variant]).to(dtype), tokens(2, 9)
    output = model(batch, labels=batch, output_hidden_states=True)
    assert output.logits.dtype == dtype and output.loss.dtype == torch.float32
    assert {state.dtype for state in output.hidden_states} == {dtype} and output.logits.isfinite().all()
    output.loss.backward()
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    step = model(batch[:, :1], past_key_values=output.past_key_values).logits
    assert step.dtype == dtype and step.isfinite().all()
