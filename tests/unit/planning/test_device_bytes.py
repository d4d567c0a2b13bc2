"""The planner's bytes of key scores and loss against the tensors that PyTorch's operations read and write."""

from __future__ import annotations

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
    assert compiled.backward == planned.backward and compiled.forward < planned.forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.tensor_parallel import cross_entropy

    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    for name, answer in (("group", None), ("rank", 0), ("world_size", 1)):
        monkeypatch.setattr(cross_entropy, f"get_tensor_model_parallel_{name}", lambda answer=answer: answer)
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
    alone = device_bytes.lookup(memory, Layout(bf16=True, backend="triton"), 4096)
    row, dim = (
        device_bytes.lookup(memory, Layout(world=8, bf16=True, backend="triton", memory_size=8, memory_mode=mode), 4096)
        for mode in ("row", "dim")
    )
    assert row.rows_forward == dim.rows_forward == alone.rows_forward
    picks, held = 4096 * 128, memory.window_rows / 8
    gradients = 2 * 4 * (384 + 768) * device_bytes.distinct_rows(held, picks)
    assert row.rows_backward == pytest.approx(row.rows_forward + gradients) and row.rows_backward < alone.rows_backward
    # The vectors of 8 * 4,096 tokens, 50 and 25 MB, are read for every pick; a cache keeps a part of them.
    layout = Layout(world=8, bf16=True, backend="triton", memory_size=8, memory_mode="row")
    every = device_bytes.lookup(memory, layout, 4096, cache=0.0)
    half = device_bytes.lookup(memory, layout, 4096, cache=8 * 4096 * 384.0)
    assert every.rows_backward - row.rows_backward == picks * (384 + 768) * 2
    assert half.rows_backward - row.rows_backward == pytest.approx(picks * (384 * 0.5 + 768 * 0.75) * 2)
    torch_made = device_bytes.lookup(memory, Layout(bf16=True, backend="scatter"), 4096)
    assert torch_made.backward > 2 * alone.backward
