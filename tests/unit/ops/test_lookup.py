"""The lookups against loops: values, gradients by autograd and in main_grad, blocks, duplicates, bfloat16."""

from __future__ import annotations

from typing import Optional

import pytest
import torch
from torch import Tensor

from umv2_megatron.ops import cpu_build, get_backend, reference, registry, scatter

# Triton's kernels have tests of their own.
BACKENDS = ["reference", "scatter", "cpu"]
DIRECT = ["scatter", "cpu"]

T, P, A, C, DP, DV = 37, 6, 11, 2, 5, 8


def make(blocks: int, pre_values: bool, dtype: torch.dtype = torch.float64) -> dict:
    """Arguments of a lookup; 37 * 6 picks of 11 rows, so every row is picked several times."""
    g = torch.Generator().manual_seed(blocks + 10 * pre_values)
    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    return {
        "rows": torch.randint(0, A, (T, P), generator=g),
        "blocks": torch.randint(0, blocks, (T, P), generator=g) if blocks > 1 else None,
        "scores": rand(T, P, C).to(torch.float32 if dtype == torch.bfloat16 else dtype).requires_grad_(),
        "projected": rand(T, DP).requires_grad_() if pre_values else None,
        "pre_values": torch.nn.Parameter(rand(A, DP)) if pre_values else None,
        "values": torch.nn.Parameter(rand(A, DV)),
        "num_blocks": blocks,
    }


def loops(rows: Tensor, blocks: Optional[Tensor], scores: Tensor, projected: Optional[Tensor],
          pre_values: Optional[Tensor], values: Tensor, num_blocks: int, activation: str) -> Tensor:
    """The definition, written out."""
    out = []
    for t in range(T):
        sums = [torch.zeros(DV, dtype=values.dtype) for _ in range(num_blocks)]
        for p in range(P):
            row = int(rows[t, p])
            block = int(blocks[t, p]) if blocks is not None else 0
            rho = torch.ones((), dtype=values.dtype)
            if pre_values is not None and projected is not None:
                rho = pre_values[row] @ projected[t]
                rho = torch.nn.functional.gelu(rho) if activation == "gelu" else rho
            parts = [scores[t, p, c] * rho * values[row, c * DV // C : (c + 1) * DV // C] for c in range(C)]
            sums[block] = sums[block] + torch.cat(parts)
        out.append(torch.cat(sums))
    return torch.stack(out)


def gradients(arguments: dict) -> dict[str, Tensor]:
    return {name: value.grad for name, value in arguments.items()
            if isinstance(value, Tensor) and value.requires_grad}


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("pre_values", [True, False])
@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lookup_equals_loops(backend: str, blocks: int, pre_values: bool, activation: str,
                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scatter.CHUNK_ELEMENTS, "cpu", 10 * P * DV)  # several chunks, the last one short
    upstream = torch.randn(T, blocks * DV, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for function in (get_backend(backend, "cpu").lookup, loops):
        arguments = make(blocks, pre_values)
        out = function(**arguments, activation=activation)
        out.backward(upstream)
        results.append((out, gradients(arguments)))
    (out, grads), (expected, expected_grads) = results
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert grads.keys() == expected_grads.keys() and len(grads) == (4 if pre_values else 2)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("tokens", "picks", "cores", "width"), [(6, 4, 2, 1), (1, 1, 3, 1), (5, 1, 1, 1), (1, 7, 2, 3)]
)
@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("backend", DIRECT)
def test_smallest_sizes(backend: str, blocks: int, tokens: int, picks: int, cores: int, width: int) -> None:
    """One column for each core, one pick, one token; scores as a retrieval makes them, not contiguous."""
    g = torch.Generator().manual_seed(3)
    results = []
    rows, places = (torch.randint(0, largest, (tokens, picks), generator=g) for largest in (A, blocks))
    scores, table = torch.randn(cores, picks, tokens, generator=g), torch.randn(A, cores * width, generator=g)
    upstream = torch.randn(tokens, blocks * cores * width, generator=g)
    for name in (backend, "reference"):
        values, leaf = torch.nn.Parameter(table.clone()), scores.clone().requires_grad_()
        out = get_backend(name, "cpu").lookup(
            rows, places if blocks > 1 else None, leaf.permute(2, 1, 0), None, None, values, blocks, "none"
        )
        out.backward(upstream)
        results.append((out, leaf.grad, values.grad))
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("backend", DIRECT)
def test_main_grad_gets_what_autograd_would(backend: str, blocks: int, dtype: torch.dtype) -> None:
    """Two uses of the tables in one graph and two micro-batches: main_grad holds the sum, autograd sees no tensor."""
    lookup = get_backend(backend, "cpu").lookup
    plain, direct = make(blocks, True, dtype), make(blocks, True, dtype)
    tables = [direct["pre_values"], direct["values"]]
    for table in tables:
        table.main_grad = torch.full(table.shape, 0.25)  # what is there must be kept
    before = [table.main_grad for table in tables]
    upstream = torch.randn(T, blocks * DV, generator=torch.Generator().manual_seed(2)).to(dtype)
    calls: list[bool] = []
    for table in tables:
        watch(table, calls)
    for _ in range(2):
        for arguments in (plain, direct):
            first = lookup(**arguments, activation="gelu")
            second = lookup(**{**arguments, "rows": arguments["rows"].flip(0)}, activation="none")
            (first + second).backward(upstream)
    assert calls == [True] * 4, "the accumulator's hook must run once per backward and table, with param.grad set"
    for name, table, buffer in zip(("pre_values", "values"), tables, before):
        assert table.main_grad is buffer and table.grad_added_to_main_grad and table.grad is None
        expected = plain[name].grad.float()
        scale = expected.abs().max().item()
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert (table.main_grad - 0.25 - expected).abs().max() <= tolerance * scale, name
    torch.testing.assert_close(direct["scores"].grad, plain["scores"].grad, rtol=0, atol=0)


def watch(table: torch.nn.Parameter, calls: list[bool]) -> None:
    """Stand in for mcore's DDP hook: note whether param.grad was set (without a dense tensor), and drop it."""
    accumulator = table.expand_as(table).grad_fn.next_functions[0][0]  # type: ignore[union-attr]

    def hook(*unused: object) -> None:
        calls.append(table.grad is not None and table.grad.untyped_storage().nbytes() <= 8)
        table.grad = None

    accumulator.register_hook(hook)
    table.accumulator = accumulator  # type: ignore[attr-defined]


@pytest.mark.parametrize("pre_values", [True, False])
@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_agrees_with_float64(backend: str, blocks: int, pre_values: bool) -> None:
    """Output and every gradient; the tables' are summed in bfloat16 here, because they have no main_grad."""
    upstream = torch.randn(T, blocks * DV, generator=torch.Generator().manual_seed(5)).bfloat16()
    arguments = make(blocks, pre_values, torch.bfloat16)
    exact = {name: value.detach().double().requires_grad_()
             if isinstance(value, Tensor) and value.is_floating_point() else value
             for name, value in arguments.items()}
    expected = reference.lookup(**exact, activation="none")
    expected.backward(upstream.double())
    out = get_backend(backend, "cpu").lookup(**arguments, activation="none")
    out.backward(upstream)
    assert out.dtype == torch.bfloat16
    wanted = gradients(exact)
    for name, found in {"out": out, **gradients(arguments)}.items():
        target = expected if name == "out" else wanted[name]
        assert (found.double() - target).abs().max() <= 3e-2 * target.abs().max(), name


@pytest.mark.parametrize("backend", DIRECT)
def test_gradients_are_repeatable_bit_by_bit(backend: str) -> None:
    results = []
    for _ in range(2):
        arguments = make(1, True, torch.float32)
        get_backend(backend, "cpu").lookup(**arguments, activation="none").square().sum().backward()
        results.append(gradients(arguments))
    for name, grad in results[0].items():
        assert torch.equal(grad, results[1][name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_tables_get_no_gradient(backend: str) -> None:
    for frozen, other in (("values", "pre_values"), ("pre_values", "values")):
        arguments = make(1, True)
        arguments[frozen].requires_grad_(False)
        get_backend(backend, "cpu").lookup(**arguments, activation="none").sum().backward()
        assert arguments[frozen].grad is None and arguments[other].grad is not None


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend: str, blocks: int) -> None:
    arguments = make(blocks, True, torch.float32)
    for name in ("rows", "blocks", "scores", "projected"):
        if arguments[name] is not None:
            arguments[name] = arguments[name][:0].detach().requires_grad_(arguments[name].requires_grad)
    out = get_backend(backend, "cpu").lookup(**arguments, activation="gelu")
    assert out.shape == (0, blocks * DV)
    out.sum().backward()
    assert all(int(grad.count_nonzero()) == 0 for grad in gradients(arguments).values())


def test_backend_names() -> None:
    assert [get_backend(name, "cpu").name for name in (*BACKENDS, "auto")] == [*BACKENDS, "cpu"]
    assert get_backend("auto", "meta").name == "scatter"
    with pytest.raises(ValueError, match="--memory-backend is fast"):
        get_backend("fast", "cpu")
    with pytest.raises(ValueError, match="--memory-backend is cpu and the model is on cuda"):
        get_backend("cpu", "cuda")


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """auto says so once and takes scatter; the name is refused."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("LOCAL_RANK", "0")
    cpu_build._loaded.cache_clear()
    registry._get_backend.cache_clear()
    registry.choice.cache_clear()
    try:
        assert [get_backend("auto", "cpu").name for _ in range(3)] == ["scatter"] * 3
        assert len(caplog.messages) == 1
        assert "scatter" in caplog.messages[0] and "there is no C++ compiler: $CXX is no-such" in caplog.messages[0]
        with pytest.raises(ValueError, match="--memory-backend is cpu, which cannot run here .*no-such-compiler"):
            get_backend("cpu", "cpu")
    finally:
        cpu_build._loaded.cache_clear()
        registry._get_backend.cache_clear()
        registry.choice.cache_clear()
