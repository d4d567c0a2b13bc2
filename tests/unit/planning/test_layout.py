"""Layouts: legal exactly where the run's own checks accept them, and cut into stages as megatron-core cuts them."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from umv2_megatron.config.flags import UsageError, read_mapping
from umv2_megatron.config.presets import PRESETS
from umv2_megatron.config.resolve import from_layers, resolve
from umv2_megatron.planning.device import Device
from umv2_megatron.planning.layout import Layout
from umv2_megatron.planning.model_shape import ModelShape
from umv2_megatron.planning.rank_parameters import chunk_parameters
from umv2_megatron.planning.search import Model, candidates

ROOT = Path(__file__).resolve().parents[3]
CHOICES: dict[str, tuple[Any, ...]] = {
    "tensor_model_parallel_size": (1, 2, 3, 4), "pipeline_model_parallel_size": (1, 2, 3),
    "context_parallel_size": (1, 2), "sequence_parallel": (True, False), "memory_parallel_size": (1, 2, 3, 4),
    "memory_parallel_mode": ("dim", "row"), "num_layers": (4, 6), "seq_length": (16, 18), "memory_value_dim": (24, 18),
    "memory_pre_value_dim": (8, 0), "ffn_hidden_size": (48, 64), "memory_sharing": ("none", "block", "ring"),
}


def run_of(changes: dict[str, Any], world: int) -> Any:
    """The checked configuration of umv2-tiny with changed flags."""
    layers = [("preset", read_mapping(PRESETS["umv2-tiny"].flags(), "preset")), ("flag", read_mapping(changes, "flag"))]
    return from_layers(layers, world, for_training=False)


def test_legal_where_the_checks_of_a_run_accept() -> None:
    """Random command lines: the planner refuses one exactly when the program does."""
    draw = random.Random(5)
    legal = 0
    for _ in range(250):
        changes = {key: draw.choice(values) for key, values in CHOICES.items()}
        changes["memory_sharing_size"] = 1 if changes["memory_sharing"] == "none" else 2
        if changes["memory_parallel_size"] == 1:
            changes["memory_parallel_mode"] = "dim"
        world = draw.choice((4, 8, 12))
        try:
            run_of(changes, world)
            accepted, why = True, ""
        except UsageError as error:
            accepted, why = False, str(error)
        memory = dataclasses.replace(PRESETS["umv2-tiny"].memory_config(), **{
            key.removeprefix("memory_"): value for key, value in changes.items() if key.startswith("memory_")})
        shape = ModelShape.from_fields({**PRESETS["umv2-tiny"].model, **changes})
        layout = Layout(
            world=world, tp=changes["tensor_model_parallel_size"], pp=changes["pipeline_model_parallel_size"],
            cp=changes["context_parallel_size"], memory_size=changes["memory_parallel_size"],
            memory_mode=changes["memory_parallel_mode"],
            sequence_parallel=changes["sequence_parallel"] and changes["tensor_model_parallel_size"] > 1,
        )
        complaint = layout.complaint(shape, memory)
        assert (complaint is None) == accepted, f"{changes} on {world}: planner {complaint!r}, program {why!r}"
        legal += accepted
    assert 20 < legal < 230


@pytest.mark.parametrize("legal, world, changes", [
    # 20 tokens split over TP 4 and over CP 2 (two parts for each rank), but not over both
    (True, 8, {"tensor_model_parallel_size": 4, "context_parallel_size": 2, "seq_length": 20}),
    (False, 8, {"tensor_model_parallel_size": 4, "context_parallel_size": 2, "seq_length": 20,
                "sequence_parallel": True}),
    (True, 8, {"tensor_model_parallel_size": 4, "context_parallel_size": 2, "seq_length": 24,
               "sequence_parallel": True}),
    (False, 2, {"context_parallel_size": 2, "seq_length": 18}),
    (True, 1, {"seq_length": 17}),
    # uneven stages
    (False, 2, {"num_layers": 5, "pipeline_model_parallel_size": 2}),
    (True, 2, {"num_layers": 5, "pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 2}),
    (True, 2, {"num_layers": 5, "pipeline_model_parallel_size": 2, "num_layers_in_last_pipeline_stage": 2}),
    # heads, query groups and FFN over TP
    (False, 3, {"tensor_model_parallel_size": 3, "ffn_hidden_size": 48, "group_query_attention": True,
                "num_query_groups": 1}),
    (False, 4, {"tensor_model_parallel_size": 4, "ffn_hidden_size": 50}),
    (False, 3, {"tensor_model_parallel_size": 3, "num_attention_heads": 6, "group_query_attention": True,
                "num_query_groups": 2, "ffn_hidden_size": 48}),
    (True, 4, {"tensor_model_parallel_size": 4, "group_query_attention": True, "num_query_groups": 2}),
    (True, 2, {"tensor_model_parallel_size": 2, "group_query_attention": True, "num_query_groups": 4}),
    # M and its rows
    (False, 4, {"pipeline_model_parallel_size": 2, "memory_parallel_size": 4}),
    (True, 4, {"memory_parallel_size": 4, "memory_parallel_mode": "row", "memory_num_keys": 2, "memory_topk": 2}),
    (False, 5, {"memory_parallel_size": 5, "memory_parallel_mode": "row", "memory_num_keys": 2, "memory_topk": 2}),
    # the tokens before a chunk of a context are on other ranks
    (False, 2, {"context_parallel_size": 2, "engram_layer_freq": "2"}),
    (True, 2, {"memory_parallel_size": 2, "engram_layer_freq": "2"}),
], ids=str)  # fmt: skip
def test_limits_of_legal_layouts(legal: bool, world: int, changes: dict[str, Any]) -> None:
    """Cases at the limits, which random ones seldom meet; planner and program agree on each."""
    if "sequence_parallel" not in changes:
        changes = {**changes, "sequence_parallel": False}
    if legal:
        run_of(changes, world)
    else:
        with pytest.raises(UsageError):
            run_of(changes, world)
    values = {**run_of({}, 1).values, **changes, "global_batch_size": None}
    memory = dataclasses.replace(PRESETS["umv2-tiny"].memory_config(), **{
        key.removeprefix("memory_"): value for key, value in changes.items() if key.startswith("memory_")})
    complaint = Layout.from_values(values, world).complaint(ModelShape.from_fields(values), memory)
    assert (complaint is None) == legal, complaint


def test_virtual_stages_must_divide_the_blocks() -> None:
    shape = ModelShape.from_fields({**PRESETS["umv2-tiny"].model, "num_layers": 6})
    assert Layout(world=2, pp=2, chunks=3).complaint(shape, None) is None
    assert Layout(world=2, pp=2, chunks=2).complaint(shape, None) == "6 blocks do not split over 4 stages"


@pytest.mark.parametrize("recompute", [(), ("full", "uniform"), ("full", "block"), ("selective", "mlp")], ids=str)
def test_waiting_outputs_are_legal_where_the_checks_of_a_run_accept(recompute: tuple[str, ...]) -> None:
    """UltraMem v1, whose outputs wait for a later block, under stages, uneven stages and recomputation."""
    draw = random.Random(7)
    flags = ["--model-preset", "umv2-tiny", "--ffn-variant", "ultramem", "--num-layers", "8"]
    flags += ["--transformer-impl", "local"]
    legal = 0
    for _ in range(25):
        pp, delay, freq = draw.choice((1, 2)), draw.randrange(4), draw.choice(("4", "2", "[1,0,0,0,0,0,0,0]"))
        more = ["--memory-read-delay", str(delay), "--memory-layer-freq", freq]
        more += ["--pipeline-model-parallel-size", str(pp)]
        if pp == 2 and draw.random() < 0.3:
            more += ["--num-layers-in-first-pipeline-stage", "5"]
        if recompute:
            more += ["--recompute-granularity", recompute[0]]
        if recompute[:1] == ("full",):
            more += ["--recompute-method", recompute[1], "--recompute-num-layers", str(draw.choice((1, 2, 4)))]
        elif recompute:
            more += ["--recompute-modules", recompute[1]]
        plain = resolve([*flags, "--memory-read-delay", "0", "--memory-layer-freq", freq], 1, for_training=False)
        memory = dataclasses.replace(plain.memory, read_delay=delay)
        try:
            accepted, why = resolve([*flags, *more], pp, for_training=False) is not None, ""
        except UsageError as error:
            accepted, why = False, str(error)
            if "memory-read-delay" not in why:
                continue
        values = resolve([*flags, *more[2:], "--memory-read-delay", "0"], pp, for_training=False).values
        complaint = Layout.from_values(values, pp).complaint(ModelShape.from_fields(values), memory)
        assert (complaint is None) == accepted, f"{more}: planner {complaint!r}, program {why!r}"
        legal += accepted
    assert 0 < legal < 25


def test_flags_of_a_layout_are_accepted_and_give_it_back() -> None:
    preset = PRESETS["umv2-2.5b-120b-top256"]
    model = Model(preset.model, preset.memory_config())
    start = Layout(world=256, bf16=True, distributed_optimizer=True, overlap_grad_reduce=True, engine=False)
    found = list(candidates(model, start, 512, Device().gpus_per_node, {}))
    assert len(found) > 500 and all(each.complaint(model.shape(each.tp), model.memory) is None for each in found)
    for layout in random.Random(3).sample(found, 12):
        flags = layout.flags(preset.model["num_layers"]).split()
        run = resolve(["--model-preset", preset.name, "--transformer-impl", "local", *flags],
                      layout.world, for_training=False)
        assert Layout.from_values(run.values, layout.world) == layout


def test_fixed_sizes_stay_in_a_search() -> None:
    preset = PRESETS["umv2-1b-7b"]
    fixed = {"memory_mode": "row", "tp": 2, "recompute": "full", "memory_size": 8}
    found = list(candidates(Model(preset.model, preset.memory_config()), Layout(world=32), 64, 8, fixed))
    assert found
    assert {(each.memory_mode, each.tp, each.recompute, each.memory_size) for each in found} == {("row", 2, "full", 8)}
    assert {each.micro_batch * each.micro_batches * each.dp for each in found} == {64}


def test_stages() -> None:
    even = Layout(world=4, pp=4, chunks=2)
    assert [list(even.stage_blocks(16, 1, chunk)) for chunk in (0, 1)] == [[2, 3], [10, 11]]
    assert sorted(block for stage in range(4) for chunk in (0, 1) for block in even.stage_blocks(16, stage, chunk)) == [
        *range(16)]
    uneven = Layout(world=3, pp=3, first_stage=1, last_stage=2)
    assert [list(uneven.stage_blocks(7, stage)) for stage in range(3)] == [[0], [1, 2, 3, 4], [5, 6]]
    only_last = Layout(world=3, pp=3, last_stage=1)
    assert [len(only_last.stage_blocks(7, stage)) for stage in range(3)] == [3, 3, 1]


@pytest.mark.parametrize("size, mode", [(1, "dim"), (4, "dim"), (7, "row"), (16, "row")])
def test_parts_of_tables_add_up_to_the_whole(size: int, mode: str) -> None:
    preset = PRESETS["umv2-tiny"]
    shape, memory = ModelShape.from_fields(preset.model), preset.memory_config()
    layout = Layout(world=size, memory_size=size, memory_mode=mode)
    held = [sum(each.elements for each in chunk_parameters(shape, memory, layout, 0, 0, rank) if each.is_table)
            for rank in range(size)]
    assert sum(held) == 4 * memory.rows_per_layer * (memory.value_dim + memory.pre_value_dim)
    assert max(held) == held[-1], "the last rank is taken for the largest"


def test_mistakes_name_the_flag() -> None:
    values = run_of({}, 4).values
    with pytest.raises(ValueError, match="--global-batch-size is 6; expected a multiple of --micro-batch-size"):
        Layout.from_values({**values, "global_batch_size": 6}, 4)
    with pytest.raises(ValueError, match="--pipeline-model-parallel-layout is given"):
        Layout.from_values({**values, "pipeline_model_parallel_layout": "Et|tL"}, 4)


def test_planning_needs_neither_torch_nor_megatron() -> None:
    code = ("import sys, umv2_megatron.planning.search, umv2_megatron.planning.tables\n"
            "assert not {'torch', 'megatron'} & sys.modules.keys()")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
