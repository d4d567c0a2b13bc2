"""Documents kept apart: a packed micro-batch gives each token the loss, and the weights the gradients, that training
each document alone gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import run_ranks

SAMPLE, VOCABULARY, EOD = 24, 257, 256
CASES: dict[str, dict[str, Any]] = {  # fmt: skip
    "rotary": {},
    "interleaved": {"rotary_interleaved": True, "rotary_percent": 0.5},
    "learned": {"position_embedding_type": "learned_absolute", "reset_position_ids": True},
    "grouped": {"group_query_attention": True, "num_query_groups": 2},
    "window": {"window_size": [3, 0]},
    "unfused": {"attention_backend": "unfused"},
    "sink": {"softmax_type": "learnable"},
    "recompute": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "recompute-attention": {"recompute_granularity": "selective"},
    "engram": {"ffn_variant": "engram", "memory_num_heads": 4, "memory_num_keys": 24, "memory_layer_freq": "[1,1,0]"},
    "both": {
        "engram_num_heads": 4, "engram_num_keys": 24, "engram_layer_freq": "[1,1,0]", "memory_layer_freq": "[1,0,1]",
    },
    "experts": {
        "ffn_variant": "moe", "num_experts": 4, "moe_router_topk": 2, "memory_backend": None,
        "moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0,
    },
}


def micro_batch() -> dict[str, Any]:
    """Two samples with documents of 1 to 24 tokens; position ids as mcore's dataset restarts them."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(EOD, (2, SAMPLE), generator=generator)
    tokens[0, [0, 6, 7, 20]] = EOD
    positions = torch.arange(SAMPLE).repeat(2, 1)
    for end in (0, 6, 7, 20):
        positions[0, end + 1 :] = torch.arange(SAMPLE - end - 1)
    return {"tokens": tokens, "position_ids": positions, "labels": tokens.roll(-1, 1), "attention_mask": None}


def together_and_alone(tp: int, changes: dict[str, Any]) -> tuple[float, float, float]:
    """Largest differences of losses and of gradients, relative to the largest of each; and how far losses are from
    those with attention across documents."""
    from megatron.core import parallel_state, tensor_parallel

    from umv2_megatron.config.flags import read_mapping
    from umv2_megatron.config.presets import PRESETS
    from umv2_megatron.config.resolve import from_layers
    from umv2_megatron.data.documents import document_starts, packed
    from umv2_megatron.model.builder import build_model
    from umv2_megatron.model.ffn_with_memory import memory_layers
    from umv2_megatron.parallel import groups

    settings = {
        "transformer_impl": "local", "memory_backend": "reference", "tensor_model_parallel_size": tp,
        "sequence_parallel": tp > 1, "vocab_size": VOCABULARY, "reset_attention_mask": True, "num_layers": 3, **changes,
    }  # fmt: skip
    settings = {key: value for key, value in settings.items() if value is not None}
    preset = read_mapping(PRESETS["umv2-tiny"].flags(), "preset")
    run = from_layers([("preset", preset), ("flag", read_mapping(settings, "flag"))], tp, for_training=False)
    groups.initialize_groups(tp=tp)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    model = build_model(run, VOCABULARY).double()
    for _, layer in memory_layers(model):
        layer.refresh_singular_vectors()

    def losses_of(batch: dict[str, Any]) -> torch.Tensor:
        names = ("tokens", "position_ids", "attention_mask")
        documents = batch.get("packed_seq_params")
        return model(*(batch[name] for name in names), labels=batch["labels"], packed_seq_params=documents)

    def gradients() -> dict[str, torch.Tensor]:
        found = {}
        for name, parameter in model.named_parameters():
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                continue
            of_own_tokens = getattr(parameter, "sequence_parallel", False) or not getattr(parameter, "allreduce", True)
            if of_own_tokens:  # as mcore sums them, and those of tables
                torch.distributed.all_reduce(gradient, group=parallel_state.get_tensor_model_parallel_group())
            found[name] = gradient.clone()
        return found

    batch = micro_batch()
    starts = document_starts(batch["tokens"], EOD)
    across = losses_of(batch).detach().flatten()
    together = losses_of(packed(batch, starts)).flatten()
    together.sum().backward()
    expected_gradients, alone = gradients(), []
    flat = {name: None if tensor is None else tensor.reshape(1, -1) for name, tensor in batch.items()}
    for start, end in zip(starts.tolist(), starts.tolist()[1:]):
        padded = -(-(end - start) // tp) * tp  # sequence parallelism wants a multiple; what comes later is not seen
        own = {}
        for name, tensor in flat.items():
            if tensor is not None:
                tensor = torch.nn.functional.pad(tensor[:, start:end], (0, padded - end + start))
            own[name] = tensor
        losses = losses_of(own).flatten()[: end - start]
        losses.sum().backward()
        alone.append(losses.detach())
    found = gradients()
    assert found.keys() == expected_gradients.keys() and any("values" in name for name in found) == run.has_memory
    apart = torch.cat(alone)
    loss = ((together.detach() - apart).abs().max() / apart.abs().max()).item()
    gradient = max(
        ((found[name] - wanted).abs().max() / wanted.abs().max()).item()
        for name, wanted in expected_gradients.items()
        if wanted.abs().max() > 0
    )
    return loss, gradient, (across - apart).abs().max().item()


@pytest.mark.parametrize("name", CASES)
def test_equals_each_document_alone(name: str) -> None:
    ((loss, gradient, across),) = run_ranks(1, together_and_alone, 1, CASES[name])
    # mcore takes the gradient of its router in float32
    assert loss < 1e-10 and gradient < (1e-6 if name == "experts" else 1e-9), (loss, gradient)
    assert across > 1e-4, "the documents would not have looked at each other anyway"


def test_on_tensor_parallel_ranks() -> None:
    for loss, gradient, _ in run_ranks(2, together_and_alone, 2, {}):
        assert loss < 1e-10 and gradient < 1e-9, (loss, gradient)
