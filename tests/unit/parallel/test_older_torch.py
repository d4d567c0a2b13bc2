"""The package runs with the oldest torch that pyproject.toml allows (2.11), although its tests have a newer one."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "distributed"))

from harness import run_ranks  # noqa: E402

import umv2_megatron  # noqa: E402

# Public names of torch 2.13 that occur nowhere in torch 2.11, of the modules that the package uses.
NEWER = {
    "all_gather_single", "all_gather_single_coalesced", "reduce_scatter_single", "reduce_scatter_single_coalesced",
    "record_comm", "use_pg_for_symm_mem_rendezvous", "LinearCrossEntropyLoss", "LinearCrossEntropyOptions",
    "linear_cross_entropy", "enforce_grad_layout_policy", "region_activation_memory_budget",
    "set_override_stale_capture_stream", "caching_allocator_disabled", "current_solver_handle", "get_default_backend",
    "set_default_backend", "swap_in_optimizer_params_and_state", "blas_workspace_size", "cublas_workspace_size",
    "cublaslt_workspace_size", "is_ck_sdpa_available", "redispatch_function", "const_data_ptr",
}  # fmt: skip


def test_no_name_of_a_newer_torch_is_taken_for_granted() -> None:
    used = []
    for path in sorted(Path(umv2_megatron.__path__[0]).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.attr] if isinstance(node, ast.Attribute) else []
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
                names = [alias.name for alias in node.names]
            used += [f"{path.name}:{node.lineno} {name}" for name in names if name in NEWER]
    assert not used, f"older than torch 2.13 has none of these; take them by getattr, with another: {used}"


def exchanged(old: bool) -> tuple[list[float], list[float]]:
    import torch

    from umv2_megatron.parallel import exchange

    if old:
        for name in ("all_gather_single", "reduce_scatter_single"):
            vars(torch.distributed).pop(name, None)
        importlib.reload(exchange)
    one = exchange.Exchange(torch.distributed.group.WORLD, "a layer")
    mine = torch.arange(2.0) + 10 * one.rank
    gathered = one.all_gather("gather", mine).wait()
    return gathered.tolist(), one.reduce_scatter("sum", gathered).wait().tolist()


def test_exchanges_with_the_names_of_either_torch() -> None:
    for old in (False, True):
        gathered = [0.0, 1.0, 10.0, 11.0]
        assert run_ranks(2, exchanged, old) == [(gathered, [0.0, 2.0]), (gathered, [20.0, 22.0])]
