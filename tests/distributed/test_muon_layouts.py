"""Muon (--optimizer muon, dist_muon): the same training in every layout, the same state after a change of layout, and
bitwise resumption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from reshard import (
    START,
    different,
    go_on,
    layout,
    open_layout,
    train,
    visit,
    what_loading_says,
    whole_tensors,
    write_start,
)

from umv2_megatron.checkpoint import optimizer_state
from umv2_megatron.checkpoint.store import CheckpointStore
from umv2_megatron.memory.row_adam import ROW_MOMENT
from umv2_megatron.parallel import groups
from umv2_megatron.training.muon import Muon, orthogonalized

pytestmark = pytest.mark.thorough

# Two heads share keys and values, and four blocks of two ranks; memory layers in all blocks but the last.
MODEL = {"group_query_attention": True, "num_query_groups": 2, "memory_layer_freq": [1, 1, 1, 0]}
MUON = {
    "optimizer": "muon", "muon_tp_mode": "duplicated", "muon_fp32_matmul_prec": "highest", "muon_use_nesterov": True,
    "muon_extra_scale_factor": 0.2, **MODEL,
}  # fmt: skip
DEALT = {**MUON, "optimizer": "dist_muon"}
ROW = {"memory_value_second_moment": "row"}
QUICK: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2-m2-row": (2, layout(tp=2, m=2, mode="row", **MUON)),
    "dp2-dealt": (2, layout(**DEALT)),
}
SLOW: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, layout(**MUON)),
    "tp2-distributed": (2, layout(tp=2, **{**MUON, "muon_tp_mode": "distributed"})),
    "tp2-whole-tokens": (2, layout(tp=2, **{**MUON, "sequence_parallel": False})),
    "pp2-vpp": (2, layout(pp=2, vpp=True, **MUON)),
    "cp2-m2-dim-overlap": (2, layout(m=2, context_parallel_size=2, overlap_grad_reduce=True, **MUON)),
    "tp2-dp2-m2-dealt": (4, layout(tp=2, m=2, **DEALT)),
    "pp2-dp2-m2-row-dealt": (4, layout(pp=2, m=2, mode="row", **DEALT)),
    "dp4-dealt-overlap": (4, layout(overlap_grad_reduce=True, **DEALT)),
}
LAYOUTS = {**QUICK, **SLOW}


def slow_but(quick: Any) -> list[Any]:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[tuple[float, float]]]:
    """A checkpoint of one rank, and the losses and gradient norms that follow."""
    directory = str(tmp_path_factory.mktemp("start"))
    return directory, run_ranks(1, write_start, directory, layout(**MUON), 3)[0]


@pytest.mark.parametrize("name", slow_but(QUICK))
def test_one_state_goes_on_alike_in_every_layout(start: Any, tmp_path: Path, name: str) -> None:
    source, numbers = start
    world, settings = LAYOUTS[name]
    for rank in run_ranks(world, visit, source, [(settings, str(tmp_path / name))], 3):
        assert rank[0]["wrong"] == [] and rank[0]["collectives"] == 0 and rank[0]["largest"] <= rank[0]["own"]
        for ours, theirs in zip(rank[0]["numbers"], numbers, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
    assert different(source, tmp_path / name) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "m, mode, freq", [(1, "dim", [1, 1, 1, 0]), (2, "row", [1, 1, 1, 0]), (1, "dim", [1, 0, 0, 0])]
)
def test_row_moments_and_state_on_the_host_are_dealt_out_too(
    tmp_path: Path, m: int, mode: str, freq: list[int]
) -> None:
    """In the last layout two tables are dealt out to four ranks."""
    host = {"memory_value_optimizer_offload": True}
    for number, extra in enumerate(({}, ROW, host, {**host, **ROW})):
        source, target = tmp_path / f"source{number}", tmp_path / f"target{number}"
        extra = {**extra, "memory_layer_freq": freq}
        numbers = run_ranks(1, write_start, str(source), layout(**{**MUON, **extra}), 3)[0]
        settings = layout(m=m, mode=mode, **{**DEALT, **extra})
        for rank in run_ranks(4, visit, str(source), [(settings, str(target))], 3):
            assert rank[0]["wrong"] == []
            for ours, theirs in zip(rank[0]["numbers"], numbers, strict=True):
                assert ours == pytest.approx(theirs, rel=1e-5)
        assert different(source, target) == []
        stored = whole_tensors(CheckpointStore(target).path(START))
        assert any(ROW_MOMENT in key for key in stored) is ("row" in extra.values())


def owned(changes: dict[str, Any]) -> dict[str, tuple[str, int]]:
    """By name of parameter, what updates it on this rank ("Muon", "AdamW"), and the elements of its moments."""
    from umv2_megatron.model.builder import unwrap

    run, state = open_layout(changes, seed=1)
    train(run, state, range(1))
    names = {id(each): name for chunk in state.chunks for name, each in unwrap(chunk).named_parameters()}
    found = {}
    for part in optimizer_state.optimizer_parts(state.optimizer):
        for parameter, inner, _ in optimizer_state.inner_parameters(part):
            moments = [each for each in part.optimizer.state[inner].values() if each.dim() > 0]
            found[names[id(parameter)]] = (type(part.optimizer).__name__, sum(each.numel() for each in moments))
    groups.destroy_groups()
    return found


def test_matrices_are_muons_and_each_parameter_is_updated_once() -> None:
    alone = run_ranks(1, owned, layout(**MUON))[0]
    by_muon = {name.split(".", 3)[-1] for name, (kind, _) in alone.items() if kind == "Muon"}
    assert by_muon == {
        "self_attention.linear_proj.weight", "self_attention.linear_qkv.weight", "mlp.ffn.linear_fc1.weight",
        "mlp.ffn.linear_fc2.weight", "mlp.memory.retrieval.query.weight", "mlp.memory.pre_proj.weight",
        "mlp.memory.value_proj.weight",
    }  # fmt: skip
    by_adam = {name.rsplit(".", 2)[-2:][0] for name, (kind, _) in alone.items() if kind != "Muon"}
    assert {"word_embeddings", "table", "retrieval", "final_layernorm"} <= by_adam
    dealt = run_ranks(2, owned, layout(**DEALT))
    assert not dealt[0].keys() & dealt[1].keys() and {**dealt[0], **dealt[1]} == alone
    sizes = [sum(size for _, size in rank.values()) for rank in dealt]
    assert max(sizes) < 1.2 * min(sizes)


RESUMED = {
    "dp2-dealt-bf16": (2, layout(bf16=True, **{**DEALT, "muon_fp32_matmul_prec": "medium"})),
    "tp2-m2-row-bf16": (2, layout(tp=2, m=2, mode="row", bf16=True, **MUON)),
    "tp2-blockwise": (2, layout(tp=2, **{**MUON, "muon_tp_mode": "blockwise"})),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "tp2-m2-row-bf16" else pytest.mark.slow) for name in RESUMED]
)
def test_resumption_is_bitwise(tmp_path: Path, name: str) -> None:
    world, changes = RESUMED[name]
    before = run_ranks(world, go_on, str(tmp_path), changes, False)
    assert run_ranks(world, go_on, str(tmp_path), changes, True) == before


@pytest.mark.slow
def test_queries_keys_and_values_of_16_bit_weights_are_split_too() -> None:
    """mcore 0.16.1's own Muon loses the marks of parameters on their float32 copies."""
    assert run_ranks(1, heads_of_copies, layout(bf16=True, **MUON)) == [[(16, 8, 8)] * 4]


def heads_of_copies(changes: dict[str, Any]) -> list[tuple[int, ...]]:
    """The heads of the fused projections, where what Muon updates is a float32 copy."""
    _run, state = open_layout(changes, seed=1)
    found = [
        part.optimizer.matrices[inner].heads
        for part in optimizer_state.optimizer_parts(state.optimizer)
        if isinstance(part.optimizer, Muon)
        for parameter, inner, _ in optimizer_state.inner_parameters(part)
        if inner.dtype == torch.float32 and parameter.dtype == torch.bfloat16 and part.optimizer.matrices[inner].heads
    ]
    groups.destroy_groups()
    return found


def test_a_checkpoint_of_the_other_optimizer_is_refused(start: Any, tmp_path: Path) -> None:
    run_ranks(1, write_start, str(tmp_path), layout(**MODEL), 0)
    for source, changes, words in (
        (start[0], layout(**MODEL), ["--optimizer is adam; expected muon or dist_muon", "--no-load-optim"]),
        (str(tmp_path), layout(**MUON), ["--optimizer is muon or dist_muon; expected adam", "--no-load-optim"]),
    ):
        message = run_ranks(1, what_loading_says, source, [changes])[0][0]
        assert all(word in message for word in words) and "\n" not in message, message


def parts_of_a_matrix(rows: int, columns: int, split: int) -> torch.Tensor:
    """This rank's part of the orthogonalised matrix, computed by all ranks together."""
    whole = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    part = whole.chunk(2, dim=split)[torch.distributed.get_rank()]
    return orthogonalized(part, 5, split=split, group=torch.distributed.group.WORLD)


@pytest.mark.parametrize("split", [0, 1])
def test_ranks_orthogonalise_a_matrix_together(split: int) -> None:
    for rows, columns in ((6, 10), (10, 6)):
        found = torch.cat(run_ranks(2, parts_of_a_matrix, rows, columns, split), dim=split)
        whole = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(found, orthogonalized(whole, 5), rtol=1e-4, atol=1e-5)
