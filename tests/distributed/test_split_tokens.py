"""The memory layers of tensor-parallel ranks: outputs and gradients are those of one rank, auxiliary losses included.
N-gram layers, too, whose convolution looks at tokens of other ranks.

Without sequence parallelism the ranks share the tokens, padded where they do not divide; with it each has its own part.
The Tucker penalty does not depend on tokens, so its gradient must be the same in all of them. The balance loss is a
product of means over a rank's tokens; with equal tokens on all ranks it is the same, too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import run_ranks
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.memory.ngrams import contexts
from umv2_megatron.memory.value_table import TABLE_ATTRIBUTE
from umv2_megatron.model.ffn_with_memory import FFNWithMemory
from umv2_megatron.model.layer_specs import umv2_layer_spec
from umv2_megatron.parallel import cpu_platform, groups

HIDDEN = 16
TUCKER = {"tucker_penalty_coeff": 0.7, "tucker_penalty_margin": 0.0}
BALANCE = {"balance_loss_coeff": 5.0}
NGRAMS = {
    "scoring": "ngram", "query_mode": "shared", "tucker_rank": 1, "num_cores": 1, "num_heads": 4, "topk": 1,
    "pre_value_dim": 0,
}  # fmt: skip
VOCABULARY = 20


def block(tp: int, sequence_parallel: bool, tokens: int, losses: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Output, and gradients of the memory layer summed as a training step sums them, of ``tokens`` tokens."""
    cpu_platform.install()
    groups.initialize_groups(tp=tp)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=2, ffn_hidden_size=24, normalization="RMSNorm",
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False,
        bias_activation_fusion=False, transformer_impl="local", tensor_model_parallel_size=tp,
        sequence_parallel=sequence_parallel, params_dtype=torch.float64,
    )  # fmt: skip
    sizes = {"num_keys": 8, "key_dim": 6, "value_dim": 8, "pre_value_dim": 4, "topk": 4}
    memory = MemoryConfig(**{**sizes, **losses})
    spec = umv2_layer_spec(config, memory, vocabulary=VOCABULARY).submodules.mlp
    slot = FFNWithMemory(config, spec.submodules, **spec.params)
    slot.set_layer_number(1)
    slot.memory.double()
    generator = torch.Generator().manual_seed(2)
    x, upstream = torch.randn(2, tokens, 1, HIDDEN, generator=generator, dtype=torch.float64)
    if losses == BALANCE:  # every rank must see the same tokens, and see them as often
        x = x[: tokens // 2].repeat(2, 1, 1)
    packed = None
    if memory.hashes:
        torch.nn.init.normal_(slot.memory.conv, generator=torch.Generator().manual_seed(3))
        ids = torch.randint(VOCABULARY, (1, tokens), generator=generator)
        packed = slot._own_contexts(contexts(ids, memory, VOCABULARY), x[: tokens // tp] if sequence_parallel else x)
    if sequence_parallel:
        part = slice(parallel_state.get_tensor_model_parallel_rank() * (tokens // tp), None)
        x, upstream = x[part][: tokens // tp], upstream[part][: tokens // tp]
    if losses in (TUCKER, BALANCE):
        upstream = upstream * 0  # the losses alone
    started = slot._start(slot.memory, x, packed)
    output = slot._finish(slot.memory, started, x, packed)
    output.backward(upstream)
    found = {"output": output.detach()}
    if sequence_parallel:
        found["output"] = tensor_parallel.gather_from_sequence_parallel_region(found["output"])
    for name, parameter in slot.memory.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if tp > 1 and (sequence_parallel or getattr(parameter, TABLE_ATTRIBUTE, False)):
            torch.distributed.all_reduce(grad, group=parallel_state.get_tensor_model_parallel_group())
        found[name] = grad
    return found


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(
    ("losses", "tokens"),
    [({}, 6), ({}, 5), (TUCKER, 6), (BALANCE, 8), (NGRAMS, 24), (NGRAMS, 15)],
    ids=["none", "padded", "tucker", "balance", "ngrams", "ngrams-padded"],
)
def test_two_ranks_compute_what_one_does(losses: dict[str, Any], tokens: int, sequence_parallel: bool) -> None:
    if sequence_parallel and tokens % 2:
        pytest.skip("mcore's own parts must be equal")
    one = run_ranks(1, block, 1, False, tokens, losses)[0]
    for rank in run_ranks(2, block, 2, sequence_parallel, tokens, losses):
        for name, expected in one.items():
            torch.testing.assert_close(
                rank[name], expected, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
            )
    moved = {name for name, value in one.items() if name != "output" and value.any()}
    if losses == TUCKER:
        assert moved == {"retrieval.cores"}
    elif losses == NGRAMS:
        assert moved == one.keys() - {"output"} and "conv" in moved
    elif losses == BALANCE:
        assert {"retrieval.keys", "retrieval.query.weight"} <= moved
