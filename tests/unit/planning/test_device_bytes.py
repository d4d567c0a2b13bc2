"""The planner's bytes of key scores and loss against the tensors that PyTorch's operations read and write."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.config.presets import PRESETS
from umv2_megatron.memory.retrieval import Retrieval
from umv2_megatron.planning import device_bytes
from umv2_megatron.planning.layout import Layout
from umv2_megatron.planning.search import Model

VIEWS = ("view", "t.default", "transpose", "permute", "expand", "slice.", "select.", "detach", "alias", "unsqueeze",
         "squeeze", "as_strided", "unbind", "_unsafe_view", "empty", "new_empty", "_reshape_alias")  # fmt: skip
SPARSE = ("scatter", "gather", "index")
"""Operations that touch a few elements of their largest tensor."""


class LargeTensors(TorchDispatchMode):
    """Adds up the bytes of tensors of at least ``elements`` that operations read, and of those that they return."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.bytes = elements, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func).removeprefix("aten.")
        if not name.startswith(VIEWS) and not any(word in name for word in SPARSE):
            read = [] if name.startswith(("new_zeros", "zeros")) else tree_leaves(args)
            large = [x for x in (*read, *tree_leaves(result)) if torch.is_tensor(x) and x.numel() >= self.elements]
            self.bytes += sum(x.numel() * x.itemsize for x in large)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_key_scores(dtype: torch.dtype) -> None:
    tokens, keys = 64, 200
    memory = MemoryConfig(num_keys=keys, topk=8, key_dim=4, backend="scatter")
    layer = Retrieval(memory, 32, keys, params_dtype=dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    layer.refresh_singular_vectors()
    x = torch.randn(tokens, 32, dtype=dtype)
    one_side = tokens * keys  # the smallest: sums over ranks
    assert one_side > layer.keys.numel()
    with LargeTensors(one_side) as forward:
        scores = layer(x).scores
    with LargeTensors(one_side) as backward:
        scores.sum().backward()
    planned = device_bytes.key_scores(memory, Layout(bf16=dtype == torch.bfloat16, backend="scatter"), tokens)
    assert (forward.bytes, backward.bytes) == (planned.forward, planned.backward)
    compiled = device_bytes.key_scores(memory, Layout(bf16=dtype == torch.bfloat16, backend="cpu"), tokens)
    if dtype == torch.float32:  # in one piece, without them
        assert (compiled.forward, compiled.backward) == (0, 0)
    else:
        assert compiled.backward == planned.backward and compiled.forward < planned.forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.tensor_parallel import cross_entropy

    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    for name, answer in (("group", None), ("rank", 0), ("world_size", 1)):
        # mcore 0.19 asks for the group alone, and reads the rest from it: without a process group, 0 and 1
        monkeypatch.setattr(cross_entropy, f"get_tensor_model_parallel_{name}", lambda answer=answer: answer, False)
    model = Model(PRESETS["umv2-tiny"].model, None)
    shape, layout = model.shape(1), Layout(bf16=dtype == torch.bfloat16, micro_batch=2)
    tokens, vocabulary = layout.tokens(shape.seq_length), shape.vocab_size
    logits = torch.randn(tokens, 1, vocabulary).to(dtype).requires_grad_()
    target = torch.randint(0, vocabulary, (tokens, 1))
    with LargeTensors(logits.numel()) as forward:
        loss = cross_entropy.vocab_parallel_cross_entropy(logits, target)
    with LargeTensors(logits.numel()) as backward:
        torch.autograd.grad(loss.sum(), logits)  # backward() would copy what it adds up in a leaf
    planned = device_bytes.loss(shape, layout, shape.seq_length)
    assert forward.bytes == pytest.approx(planned.forward, rel=0.01)
    assert backward.bytes == pytest.approx(planned.backward, rel=0.01)


def test_distinct_rows_by_drawing() -> None:
    g = torch.Generator().manual_seed(1)
    for rows, picks in ((100, 50), (100, 1000), (7, 3)):
        drawn = [torch.randint(0, rows, (picks,), generator=g).unique().numel() for _ in range(2000)]
        assert device_bytes.distinct_rows(rows, picks) == pytest.approx(sum(drawn) / 2000, rel=0.02)
    assert device_bytes.distinct_rows(1, 5) == 1


def test_rows_of_a_sharded_table() -> None:
    """By row and by column a rank reads as much; by row each of its few rows is picked often, and added to once."""
    memory = PRESETS["umv2-1b-7b"].memory_config()
    alone = device_bytes.lookup(memory, Layout(bf16=True, backend="triton"), 4096, cache=0.0)

    def by(mode: str, cache: float) -> device_bytes.Moved:
        layout = Layout(world=8, bf16=True, backend="triton", memory_size=8, memory_mode=mode)
        return device_bytes.lookup(memory, layout, 4096, cache)

    row, dim = by("row", 0.0), by("dim", 0.0)
    assert row.rows_forward == dim.rows_forward == alone.rows_forward
    picks, held = 4096 * 128, memory.window_rows / 8
    distinct = device_bytes.distinct_rows(held, picks)
    added = 2 * 4 * (384 + 768) * distinct
    # Pre-values for each pick, values for each row, and the tokens' vectors for each pick.
    assert row.rows_backward == pytest.approx(picks * (384 + 1152) * 2 + distinct * 768 * 2 + added)
    assert row.rows_backward < alone.rows_backward
    # A cache of 13 MB keeps a part of the vectors of 8 * 4,096 tokens, 25 and 50 MB, and columns of all rows.
    half = by("row", 8 * 4096 * 384.0)
    assert half.rows_forward == pytest.approx(distinct * 1152 * 2) and half.cached_forward == row.rows_forward
    missed = picks * (384 * 0.5 + 768 * 0.75) * 2
    assert half.rows_backward == pytest.approx(distinct * 1152 * 2 + added + missed)
    torch_made = device_bytes.lookup(memory, Layout(bf16=True, backend="scatter"), 4096)
    assert torch_made.backward > 1.5 * alone.backward


def test_parts_of_a_lookup_add_to_their_own_rows() -> None:
    """Each reads the gradient of its distinct rows, and writes it."""
    memory = PRESETS["umv2-1b-7b"].memory_config()
    layout = Layout(world=8, bf16=True, backend="triton", memory_size=8, memory_mode="row")
    one, four = (device_bytes.lookup(memory, dataclasses.replace(layout, exchange_parts=parts), 4096, cache=0.0)
                 for parts in (1, 4))  # fmt: skip
    assert one.rows_forward == four.rows_forward and one.forward == pytest.approx(four.forward)
    picks, held = 4096 * 128, memory.window_rows / 8
    more = 4 * device_bytes.distinct_rows(held, picks / 4) - device_bytes.distinct_rows(held, picks)
    assert four.rows_backward - one.rows_backward == pytest.approx(more * (2 * 4 * 1152 + 2 * 768))


def test_stretches_as_the_launches_choose_them() -> None:
    """umv2-2.5b-120b-top256 over 64 ranks; tests/unit/ops/test_triton_lookup.py has the same numbers."""
    assert device_bytes._stretches(73_984, 2, 768, 2, 2**20, 25e6) == 384 / 64
    assert device_bytes._stretches(73_984, 1, 256, 2, 2**20, 25e6) == 256 / 128
    assert device_bytes._stretches(73_984, 2, 768, 2, 100_000, 25e6) == 0
    assert device_bytes._stretches(8_000, 2, 768, 2, 2**20, 25e6) == 1
    assert device_bytes._stretches(600_000, 2, 768, 4, 2**22, 25e6) == 0
