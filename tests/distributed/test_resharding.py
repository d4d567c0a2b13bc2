"""A checkpoint of any layout loads into any other: weights and optimizer state bit for bit, and training goes on alike.

The model has tables of 25 rows and a vocabulary of 101, which nothing divides. `reshard.py` has what runs on the ranks.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import tiny_gpt
from harness import run_ranks
from reshard import (
    START,
    VOCABULARY,
    different,
    layout,
    open_layout,
    visit,
    watched,
    what_loading_says,
    whole_tensors,
    write_start,
)

from umv2_megatron.checkpoint import optimizer_state, save_load
from umv2_megatron.checkpoint.store import CheckpointStore

# Name -> (ranks, settings). The quick tests go from "one" to each and back; the slow ones from each to each.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, layout()),
    "one-dist": (1, layout(dist=True)),
    "dp2": (2, layout()),
    "dp2-dist": (2, layout(dist=True)),
    "tp2": (2, layout(tp=2)),
    "tp2-dist": (2, layout(tp=2, dist=True)),
    "pp2": (2, layout(pp=2)),
    "pp2-vpp-dist": (2, layout(pp=2, vpp=True, dist=True)),
    "m2-dim": (2, layout(m=2)),
    "m2-row": (2, layout(m=2, mode="row")),
    "m2-row-dist": (2, layout(m=2, mode="row", dist=True)),
    "tp2-m2-dim-dist": (2, layout(tp=2, m=2, dist=True)),
    "cp2-m2-dim-dist": (2, layout(m=2, dist=True, context_parallel_size=2)),
    "dp4-m4-row": (4, layout(m=4, mode="row")),
    "dp4-m4-dim-dist": (4, layout(m=4, dist=True)),
    "dp4-m2-row-dist": (4, layout(m=2, mode="row", dist=True)),
    "tp2-nosp-m2-row": (2, layout(tp=2, m=2, mode="row", sequence_parallel=False)),
    "tp2-pp2-m2-row-dist": (4, layout(tp=2, pp=2, m=2, mode="row", dist=True)),
    "tp2-pp2-vpp-m2-dim": (4, layout(tp=2, pp=2, vpp=True, m=2)),
    "tp2-dp2-m4-row-dist": (4, layout(tp=2, m=4, mode="row", dist=True)),
    "tp2-dp2-m2-row-dist-overlap": (
        4,
        layout(tp=2, m=2, mode="row", dist=True, overlap_grad_reduce=True, overlap_param_gather=True),
    ),
}
QUICK = ["one-dist", "pp2-vpp-dist", "tp2-m2-dim-dist", "m2-row-dist", "tp2-pp2-m2-row-dist"]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> tuple[str, list[tuple[float, float]]]:
    """A checkpoint of one rank, and the losses and gradient norms that follow."""
    directory = str(tmp_path_factory.mktemp("start"))
    return directory, run_ranks(1, write_start, directory, LAYOUTS["one"][1])[0]


def check(results: list[list[dict[str, Any]]], numbers: list[tuple[float, float]]) -> None:
    """Of all ranks (outer) and layouts (inner): everything arrived, nothing was gathered, training goes on alike."""
    for rank in results:
        for result in rank:
            assert result["wrong"] == []
            assert result.get("collectives", 0) == 0
            assert result.get("largest", 0) <= result.get("own", 0)
            for ours, theirs in zip(result["numbers"], numbers, strict=True):
                assert ours == pytest.approx(theirs, rel=1e-6)


def by_world(names: list[str]) -> list[tuple[int, list[str]]]:
    return [(world, list(group)) for world, group in itertools.groupby(names, key=lambda name: LAYOUTS[name][0])]


@pytest.mark.parametrize("world, names", by_world(QUICK), ids=lambda value: "+".join(value) if value is list else None)
def test_one_rank_to_every_layout_and_back(start, tmp_path, world, names):
    source, numbers = start
    check(run_ranks(world, visit, source, [(LAYOUTS[name][1], str(tmp_path / name)) for name in names]), numbers)
    for name in names:
        assert different(source, tmp_path / name) == []
    check(run_ranks(1, visit, str(tmp_path / names[-1]), [(LAYOUTS["one"][1], "")]), numbers)


def test_from_one_sharded_layout_to_another(start, tmp_path):
    source, numbers = start
    for name in ["tp2-nosp-m2-row", "pp2-vpp-dist"]:
        check(run_ranks(2, visit, source, [(LAYOUTS[name][1], str(tmp_path / name))]), numbers)
        assert different(start[0], tmp_path / name) == []
        source = str(tmp_path / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_to_every_layout(start, tmp_path, name):
    origin, numbers = start
    world, settings = LAYOUTS[name]
    check(run_ranks(world, visit, origin, [(settings, str(tmp_path / "source"))]), numbers)
    for world, names in by_world(list(LAYOUTS)):
        targets = [(LAYOUTS[other][1], str(tmp_path / other)) for other in names]
        check(run_ranks(world, visit, str(tmp_path / "source"), targets), numbers)
        for other in names:
            assert different(origin, tmp_path / other) == [], other


class Gathering:
    """Stands for `OptimizerState`: mcore's own type of optimizer state that any layout can load."""

    def __init__(self, optimizer: Any, model_state: dict) -> None:
        self.given = (optimizer, model_state)

    def sharded(self) -> dict:
        metadata = save_load._content_metadata() | {"distrib_optim_sharding_type": "fully_reshardable"}
        return tiny_gpt.as_mcore_stores(*self.given, metadata)


def gather() -> dict[str, int]:
    run, state = open_layout(layout(dist=True), seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer_state, "OptimizerState", Gathering)
        with watched(state) as seen:
            model_state = save_load._model_state(state.chunks, save_load._content_metadata())
            save_load.OptimizerState(state.optimizer, model_state).sharded()
    return seen


def test_the_watch_sees_a_gathering():
    for seen in run_ranks(2, gather):
        assert seen["collectives"] > 0 and seen["largest"] > 10 * seen["own"]


BF16 = {"bf16": True}
PRECISION = {
    "bf16": (layout(tp=2, m=2, mode="row", dist=True, **BF16), layout(pp=2, **BF16)),
    "bf16 without the distributed optimizer": (layout(m=2, **BF16), layout(tp=2, dist=True, **BF16)),
}


@pytest.mark.parametrize(
    "case", ["bf16", pytest.param("bf16 without the distributed optimizer", marks=pytest.mark.slow)]
)
def test_main_parameters_arrive(tmp_path, case):
    first, second = PRECISION[case]
    run_ranks(2, write_start, str(tmp_path / "start"), first, 0)
    results = run_ranks(2, visit, str(tmp_path / "start"), [(second, str(tmp_path / "second"))], 0)
    check(results, [])
    assert different(tmp_path / "start", tmp_path / "second") == []
    stored = whole_tensors(CheckpointStore(tmp_path / "second").path(START))
    weights = [key for key in stored if not key.startswith("optimizer.") and f"optimizer.state.exp_avg.{key}" in stored]
    assert len(weights) > 20
    for key in weights:
        main = stored[f"optimizer.state.fp32_param.{key}"]
        assert main.dtype.itemsize == 4 and (main.to(stored[key].dtype) == stored[key]).all()


def test_fp32_and_bf16(tmp_path):
    """Main parameters follow the weights where the checkpoint has none; the moments are the same in both."""
    fp32, bf16 = layout(m=2, dist=True), layout(tp=2, dist=True, **BF16)
    run_ranks(2, write_start, str(tmp_path / "fp32"), fp32, 0)
    check(run_ranks(2, visit, str(tmp_path / "fp32"), [(bf16, str(tmp_path / "bf16"))], 0), [])
    check(run_ranks(2, visit, str(tmp_path / "bf16"), [(fp32, str(tmp_path / "again"))], 0), [])
    full, half, again = (
        whole_tensors(CheckpointStore(tmp_path / name).path(START)) for name in ("fp32", "bf16", "again")
    )
    for key, weight in full.items():
        if key.startswith("optimizer.state.exp_avg"):
            assert (half[key] == weight).all() and (again[key] == weight).all(), key
        elif f"optimizer.state.exp_avg.{key}" in full:
            assert half[key].dtype.itemsize == 2 and (half[key] == weight.to(half[key].dtype)).all(), key
            assert (half[f"optimizer.state.fp32_param.{key}"] == half[key]).all(), key
            assert (again[key] == half[key]).all(), key


PADDED = {
    "101": (1, layout(make_vocab_size_divisible_by=1)),
    "102": (2, layout(tp=2, dist=True, make_vocab_size_divisible_by=1)),
    "128": (2, layout(pp=2, m=1, dist=True, make_vocab_size_divisible_by=128)),
}


@pytest.mark.parametrize("untied", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["tied", "untied"])
def test_vocabularies_padded_to_other_sizes(tmp_path, untied):
    """The rows of the real vocabulary arrive with their moments; padding that nobody stored is zero."""
    run_ranks(1, write_start, str(tmp_path / "101"), _untied(PADDED["101"][1], untied), 0)
    for source, target in (("101", "102"), ("102", "128"), ("128", "101b")):
        world, settings = PADDED[target[:3]]
        goal = (_untied(settings, untied), str(tmp_path / target))
        assert all(rank[0]["wrong"] == [] for rank in run_ranks(world, visit, str(tmp_path / source), [goal], 1))
    assert different(tmp_path / "101", tmp_path / "101b") == []
    narrow, wide = (whole_tensors(CheckpointStore(tmp_path / name).path(START)) for name in ("101", "128"))
    resized = [key for key in wide if wide[key].shape != narrow[key].shape]
    assert len(resized) == (6 if untied else 3)  # weight and two moments
    for key in resized:
        assert wide[key].shape[0] == 128 and (wide[key][:VOCABULARY] == narrow[key]).all()
        assert (wide[key][VOCABULARY:] == 0).all()


def _untied(settings: dict[str, Any], untied: bool) -> dict[str, Any]:
    return settings | {"untie_embeddings_and_output_weights": untied}


def test_shared_tables(tmp_path):
    """Two layers use one table, which their stage holds once."""
    shared = {"memory_sharing": "block", "memory_sharing_size": 2}
    numbers = run_ranks(1, write_start, str(tmp_path / "one"), layout(**shared))[0]
    targets = [(layout(pp=2, m=2, mode="row", dist=True, **shared), str(tmp_path / "four"))]
    check(run_ranks(4, visit, str(tmp_path / "one"), targets), numbers)
    assert different(tmp_path / "one", tmp_path / "four") == []
    keys = whole_tensors(CheckpointStore(tmp_path / "four").path(START)).keys()
    assert sorted(key for key in keys if key.endswith("layers.0.mlp.memory.table.values"))


@pytest.mark.slow
def test_experts(tmp_path):
    """Blocks of experts, whose axis only the global tensors have, split over an expert-parallel group."""
    experts = {"ffn_variant": "moe", "num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}
    numbers = run_ranks(1, write_start, str(tmp_path / "start"), layout(**experts))[0]
    source = tmp_path / "start"
    for world, sizes in ((2, {"tp": 2, "dist": True}), (4, {"pp": 2})):
        target = tmp_path / str(world)
        changes = layout(**sizes, expert_model_parallel_size=2, **experts)
        check(run_ranks(world, visit, str(source), [(changes, str(target))]), numbers)
        assert different(source, target) == []
        source = target


ILLEGAL = {
    "larger tables": ({"memory_num_keys": 6}, ["other shape: ", "memory.table.values: (25, 24) there, (36, 24) here"]),
    "other widths": ({"memory_value_dim": 32}, ["memory.table.values: (25, 24) there, (25, 32) here"]),
    "more layers": ({"num_layers": 6}, ["only in the model: ", "decoder.layers.4."]),
    "fewer layers": ({"num_layers": 2}, ["only in the checkpoint: ", "decoder.layers.2."]),
    "no memory": ({"memory_layer_freq": [1, 0, 1, 0]}, ["only in the checkpoint: ", "layers.1.mlp.memory"]),
}


def test_another_model_is_refused_in_another_layout_too(start):
    source, _numbers = start
    changes = [layout(m=2, mode="row", dist=True, **changed) for changed, _words in ILLEGAL.values()]
    for rank in run_ranks(2, what_loading_says, source, changes):
        for message, (changed, words) in zip(rank, ILLEGAL.values(), strict=True):
            assert all(word in message for word in words), (changed, message)
            assert "\n" not in message and "does not fit this model" in message
