"""Attention over a sequence that ranks share equals mcore's attention over the whole sequence, gradients included."""

from __future__ import annotations

import pytest
import torch
from harness import run_ranks

SEQUENCE, BATCH, HEADS, WIDTH = 16, 3, 4, 8

CASES = {
    "plain": {},
    "grouped-queries": {"num_query_groups": 2},
    "scaled": {"softmax_scale": 0.05},
    "layer-scaled": {"apply_query_key_layer_scaling": True},
    "window": {"window_size": (5, 0)},
    "sink": {"softmax_type": "learnable"},
    "masked": {"masked": True},
}


def part_of(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor [s, b, ...] of the whole sequence, as the data path cuts it."""
    from umv2_megatron.data.batches import part_of_context_rank

    return part_of_context_rank({"x": tensor.transpose(0, 1).contiguous()})["x"].transpose(0, 1)


def documents_mask() -> torch.Tensor:
    """Two documents in one sample, as --reset-attention-mask makes them: bool [b, 1, s, s], True where not to look."""
    mask = torch.ones(BATCH, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    mask[:, :, 7:, :7] = True
    return mask


def run(module: torch.nn.Module, inputs: list[torch.Tensor], mask, weight: torch.Tensor) -> list[torch.Tensor]:
    """Output, and gradients of query, key and value, of a sum weighted by ``weight``."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = module(*inputs, mask)
    (output * weight).sum().backward()
    return [output.detach(), *(tensor.grad for tensor in inputs)]


def differences(tp: int) -> dict[str, float]:
    """Per case, the largest difference of this rank's output and gradients from those of the whole sequence."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from umv2_megatron.data.batches import part_of_context_rank
    from umv2_megatron.model.context_parallel_attention import ContextParallelAttention
    from umv2_megatron.parallel import groups

    cp = torch.distributed.get_world_size() // tp
    groups.initialize_groups(tp=tp, cp=cp)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    found = {}
    for name, changes in CASES.items():
        settings = {"num_query_groups": HEADS, "attention_dropout": 0.0, "tensor_model_parallel_size": tp, **changes}
        scale, masked = settings.pop("softmax_scale", None), settings.pop("masked", False)
        modules = []
        for cls, size in ((DotProductAttention, 1), (ContextParallelAttention, cp)):
            config = TransformerConfig(num_layers=2, hidden_size=HEADS * WIDTH, num_attention_heads=HEADS,
                                       context_parallel_size=size, **settings)  # fmt: skip
            modules.append(cls(config, 2, AttnMaskType.causal, "self", softmax_scale=scale))
            for parameter in modules[-1].parameters():
                torch.nn.init.constant_(parameter, 0.3)
        whole, split = modules
        generator = torch.Generator().manual_seed(3)
        heads = [number // tp for number in (HEADS, settings["num_query_groups"], settings["num_query_groups"], HEADS)]
        *inputs, weight = (torch.randn(SEQUENCE, BATCH, number, WIDTH, generator=generator) for number in heads)
        weight = weight.flatten(2)
        mask = documents_mask() if masked else None
        own_mask = part_of_context_rank({"attention_mask": documents_mask()})["attention_mask"] if masked else None
        wanted = run(whole, inputs, mask, weight)
        ours = run(split, [part_of(tensor) for tensor in inputs], own_mask, part_of(weight))
        pairs = [(a, part_of(b)) for a, b in zip(ours, wanted)]
        for mine, theirs in zip(split.parameters(), whole.parameters()):
            torch.distributed.all_reduce(mine.grad, group=parallel_state.get_context_parallel_group())
            pairs.append((mine.grad, theirs.grad))
        found[name] = max((a - b).abs().max().item() for a, b in pairs)
    return found


@pytest.mark.parametrize("world_size, tp", [(2, 1), (4, 2), (4, 1)], ids=["cp2", "cp2-tp2", "cp4"])
def test_equals_attention_of_the_whole_sequence(world_size, tp):
    for found in run_ranks(world_size, differences, tp):
        assert found.keys() == CASES.keys()
        for name, difference in found.items():
            assert difference < 3e-6, (name, difference)


def recompute_with_dropout() -> list[bool]:
    """Whether output and gradients are the same with the attention computed once and computed again in the backward,
    and whether dropout did anything."""
    from megatron.core import tensor_parallel
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from umv2_megatron.model.context_parallel_attention import ContextParallelAttention
    from umv2_megatron.parallel import groups

    groups.initialize_groups(cp=2)
    config = TransformerConfig(num_layers=2, hidden_size=HEADS * WIDTH, num_attention_heads=HEADS,
                               attention_dropout=0.3, context_parallel_size=2, bf16=True,
                               params_dtype=torch.bfloat16)  # fmt: skip
    module = ContextParallelAttention(config, 1, AttnMaskType.causal, "self")
    inputs = [torch.randn(SEQUENCE // 2, BATCH, HEADS, WIDTH, dtype=torch.bfloat16) for _ in range(3)]

    def run(again: bool) -> list[torch.Tensor]:
        tensor_parallel.model_parallel_cuda_manual_seed(7)
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        output = tensor_parallel.checkpoint(module, False, *leaves, None) if again else module(*leaves, None)
        output.float().square().sum().backward()
        return [output.detach(), *(leaf.grad for leaf in leaves)]

    once, again = run(False), run(True)
    module.eval()
    return [torch.equal(a, b) for a, b in zip(once, again)] + [not torch.equal(once[0], run(False)[0])]


def test_recomputation_repeats_dropout():
    assert run_ranks(2, recompute_with_dropout) == [[True] * 5] * 2


def uneven_mask() -> tuple[float, float]:
    """Gradient of one logit scale through the training's loss: of the parts of a sequence, and of the whole."""
    from megatron.core import parallel_state

    from umv2_megatron.data.batches import part_of_context_rank
    from umv2_megatron.parallel import groups
    from umv2_megatron.training.step import loss_of_microbatch

    groups.initialize_groups(cp=2)
    losses = torch.arange(2.0 * SEQUENCE).view(2, SEQUENCE)
    mask = torch.ones(2, SEQUENCE)
    mask[0, 4:11] = 0  # more of rank 1's tokens than of rank 0's
    scale = torch.ones((), requires_grad=True)
    part = part_of_context_rank({"losses": losses.clone(), "mask": mask.clone()})
    total, tokens, _ = loss_of_microbatch(part["mask"], False, part["losses"] * scale)
    (total / tokens).backward()  # what mcore's schedule does; its DDP then averages over the ranks
    torch.distributed.all_reduce(scale.grad, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return scale.grad.item() / 2, ((losses * mask).sum() / mask.sum()).item()


def test_every_token_of_a_sequence_counts_alike():
    for ours, wanted in run_ranks(2, uneven_mask):
        assert ours == pytest.approx(wanted, rel=1e-6)
