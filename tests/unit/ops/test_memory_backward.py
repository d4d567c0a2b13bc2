"""--memory-backward: which kernels the Triton backend launches for the gradients of tables, through a value table and
through the parts that sharded tables use. What the kernels compute is tested in triton_interpreted.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install -r requirements-triton.txt")

from umv2_megatron.config.memory_config import MemoryConfig  # noqa: E402
from umv2_megatron.memory.value_table import ValueTable  # noqa: E402
from umv2_megatron.ops import get_backend, registry, triton_launch, triton_lookup  # noqa: E402
from umv2_megatron.ops.interface import ListedPicks  # noqa: E402

KERNELS = {"ordered": {"add_to_rows"}, "atomic": {"atomic_add_to_rows"}}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels that would have been launched; outputs stay uninitialised."""
    names: list[str] = []
    monkeypatch.setattr(triton_launch, "launch", lambda kernel, *_: names.append(kernel.__name__))
    monkeypatch.setattr(triton_lookup, "require_device", lambda: None)
    caches = (registry._get_backend, registry._triton_atomic)
    for each in caches:
        each.cache_clear()
    yield names
    for each in caches:
        each.cache_clear()


def additions(names: list[str]) -> set[str]:
    found = {name for name in names if name in KERNELS["ordered"] | KERNELS["atomic"]}
    names.clear()
    return found


@pytest.mark.parametrize("backward", ["ordered", "atomic"])
@pytest.mark.parametrize("deterministic_mode", [False, True])
def test_the_flag_chooses_the_kernels(backward: str, deterministic_mode: bool, launched: list[str]) -> None:
    expected = KERNELS["ordered" if deterministic_mode else backward]
    rows = torch.zeros(3, 4, dtype=torch.int64)
    torch.use_deterministic_algorithms(deterministic_mode)
    try:
        config = MemoryConfig(value_dim=8, pre_value_dim=8, backend="triton", backward=backward)
        table = ValueTable(config, 9)
        scores, projected = torch.zeros(3, 4, 2).requires_grad_(), torch.zeros(3, 8).requires_grad_()
        table(table.start(rows, torch.zeros_like(rows), scores, table.gather(scores, projected))).sum().backward()
        assert additions(launched) == expected

        backend = get_backend("triton", "cpu", backward)
        assert backend.grid is not None and backend.ragged is not None
        values = table.values.detach()
        total = torch.zeros_like(values)
        grad_out, rho_grad = torch.zeros(3, 1, 8), torch.zeros(3, 4)
        backend.grid.weighted_sum_backward(rows, None, scores.detach(), grad_out, values, total)
        assert additions(launched) == expected
        backend.grid.pre_scores_backward(rows, rho_grad, projected.detach(), values, total)
        assert additions(launched) == expected
        picks = ListedPicks(rows.flatten(), torch.arange(3).repeat_interleave(4), torch.full((3,), 4))
        backend.ragged.weighted_sum_backward(picks, torch.zeros(12, 2), grad_out, values, total)
        assert additions(launched) == expected
        backend.ragged.pre_scores_backward(picks, rho_grad.flatten(), projected.detach(), values, total)
        assert additions(launched) == expected
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", ["auto", "reference", "scatter", "cpu"])
def test_other_backends_refuse_atomic_additions(backend: str) -> None:
    config = MemoryConfig(backend=backend, backward="atomic")
    with pytest.raises(
        ValueError, match=f"--memory-backward is atomic; expected ordered with --memory-backend {backend}"
    ):
        config.validate(64, 4)
    MemoryConfig(backend="triton", backward="atomic").validate(64, 4)
    with pytest.raises(ValueError, match="--memory-backward is fast; expected one of ordered, atomic"):
        MemoryConfig(backend="triton", backward="fast").validate(64, 4)
