"""Dry runs of virtual worlds: what the built ranks hold against what the planner says, the 120B example at 1,024 and
4,096 ranks, refusals, and time and memory of a whole dry run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from program_runs import ROOT, Job, command_line

sys.path.insert(0, str(ROOT / "tests" / "distributed"))

from harness import run_ranks  # noqa: E402

SCRIPT = "slurm/pretrain_2.5b_120b.sh"
TINY: dict[str, Any] = {
    "model_preset": "umv2-tiny",
    "mock_data": True,
    "tokenizer_type": "NullTokenizer",
    "train_iters": 10,
    "micro_batch_size": 2,
    "global_batch_size": 768,
}
SHARDED = {
    "bf16": True,
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "tensor_model_parallel_size": 2,
    "sequence_parallel": True,
    "pipeline_model_parallel_size": 2,
    "memory_parallel_size": 8,
}
STAGES = {
    "tensor_model_parallel_size": 2,
    "sequence_parallel": True,
    "pipeline_model_parallel_size": 4,
    "memory_parallel_size": 8,
    "memory_parallel_mode": "dim",
    "memory_exchange_parts": 1,
    "micro_batch_size": 1,
}
"""Another layout of the 120B example, with a part of the model on each rank."""
# name: changes of TINY, number of ranks, ranks to build
LAYOUTS: dict[str, tuple[dict[str, Any], int, list[int]]] = {
    "one rank in fp32": ({}, 1, [0]),
    "data parallel, nothing sharded": ({"bf16": True, "overlap_grad_reduce": True}, 96, [0, 95]),
    "column shards": (SHARDED, 96, [0, 7, 47, 48, 95]),
    "row shards": ({**SHARDED, "memory_parallel_mode": "row", "memory_parallel_size": 48}, 96, [0, 1, 31, 95]),
    "row shards in fp32": (
        {**SHARDED, "bf16": False, "memory_parallel_mode": "row", "memory_parallel_size": 3},
        96,
        [0, 1, 2, 95],
    ),
    "interleaved stages, tied": (
        {**SHARDED, "num_layers_per_virtual_pipeline_stage": 1, "overlap_param_gather": True},
        96,
        [5, 50],
    ),
    "untied, tables shared in blocks": (
        {**SHARDED, "untie_embeddings_and_output_weights": True, "memory_sharing": "block", "memory_sharing_size": 2},
        96,
        [0, 95],
    ),
    "context parallel": ({**SHARDED, "context_parallel_size": 2}, 96, [3, 94]),
    "memory in some blocks": ({**SHARDED, "memory_layer_freq": "[1,0,0,1]"}, 96, [0, 95]),
    "dense": ({"ffn_variant": "dense", "bf16": True, "pipeline_model_parallel_size": 4}, 96, [0, 30, 95]),
}


def reports_and_plans(argv: list[str], world: int, ranks: list[int]) -> list[tuple[Any, dict[str, Any], int]]:
    """Of every rank: its report, the plan of the same figures, and micro-batches per step. In a process of its own."""
    import torch
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from umv2_megatron.config.resolve import resolve
    from umv2_megatron.planning.layout import Layout
    from umv2_megatron.planning.model_shape import ModelShape
    from umv2_megatron.training.dry_run import build_rank

    torch.distributed.destroy_process_group()
    patched = DistributedOptimizer.__init__.__code__
    run = resolve(argv, world)
    shape, layout = ModelShape.from_fields(run.values), Layout.from_values(run.values, world)
    results = []
    for rank in ranks:
        report = build_rank(run, rank)
        results.append((report, plan(run, shape, layout, report), run.num_microbatches))
    # what run_ranks leaves through; and CPU tensors are made again
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    assert torch.zeros(1).device.type == "cpu" and DistributedOptimizer.__init__.__code__ is patched
    return results


def plan(run: Any, shape: Any, layout: Any, report: Any) -> dict[str, Any]:
    """The planner's figures for the place of ``report``."""
    from umv2_megatron.planning.activations import activation_bytes
    from umv2_megatron.planning.rank_parameters import chunk_parameters
    from umv2_megatron.planning.state_bytes import state_bytes

    memory = run.memory if run.has_memory else None
    stage, place = report.places["pipeline"][0], report.places.get("memory", (0, 1))[0]
    parameters: Counter[str] = Counter()
    for chunk in range(layout.chunks):
        for each in chunk_parameters(shape, memory, layout, stage, chunk, place):
            parameters[each.kind] += each.elements
    planned = state_bytes(shape, memory, layout, stage, place, report.dense_replica[0], report.table_replica[0])
    return {
        "parameters": +parameters,
        "layers": [
            block + 1 for chunk in range(layout.chunks) for block in layout.stage_blocks(run.num_layers, stage, chunk)
        ],
        "num_bytes": {
            "weights": planned.weights,
            "main gradients": planned.gradients,
            "optimizer state": planned.optimizer,
            "buffers": planned.buffers,
        },
        "tables": planned.table_weights,
        "activations": activation_bytes(shape, memory, layout, stage).peak,
        "replicas": (layout.dense_replicas, layout.table_replicas),
        "places": {"tensor": layout.tp, "context": layout.cp, "pipeline": layout.pp, "data": layout.dp},
    }


def assert_equal(report: Any, planned: dict[str, Any]) -> None:
    """Every figure of the report is the planned one."""
    kinds = {"value tables": "tables", "memory layers": "memory", "FFN": "ffn", "output layer": "embedding"}
    built: Counter[str] = Counter()
    for kind, count in report.parameters.items():
        built[kinds.get(kind, kind)] += count
    assert built == planned["parameters"], report.rank
    assert report.layers == planned["layers"]
    assert report.num_bytes == planned["num_bytes"], report.rank
    assert sum(part.num_bytes for part in report.tables) <= planned["tables"]
    assert (report.dense_replica[1], report.table_replica[1]) == planned["replicas"]
    assert {kind: report.places[kind][1] for kind in planned["places"]} == planned["places"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_built_ranks_hold_what_is_planned(name):
    changes, world, ranks = LAYOUTS[name]
    [results] = run_ranks(1, reports_and_plans, command_line({**TINY, **changes}), world, ranks)
    for report, planned, _ in results:
        assert_equal(report, planned)


def test_places_and_shards_of_single_ranks():
    changes, world, _ = LAYOUTS["row shards"]
    [results] = run_ranks(1, reports_and_plans, command_line({**TINY, **changes}), world, [0, 47, 95])
    first, middle, last = (report for report, _, _ in results)
    # 48 ranks of a stage: TP 2, DP 24; the 256 rows of a table over all of them
    assert (first.places["memory"], middle.places["memory"], last.places["memory"]) == ((0, 48), (47, 48), (47, 48))
    assert (middle.places["tensor"], middle.places["data"], middle.places["pipeline"]) == ((1, 2), (23, 24), (0, 2))
    assert (first.layers, last.layers) == ([1, 2], [3, 4])
    assert [(part.block, part.name, part.rows, part.columns) for part in first.tables[:2]] == [
        (1, "values", (0, 5), (0, 24)),
        (1, "pre_values", (0, 5), (0, 8)),
    ]
    assert last.tables[0].rows == (250, 256) and last.tables[0].whole == (256, 24)
    assert (first.ends, middle.ends, last.ends) == (["embedding"], ["embedding"], ["output layer"])


# -- the 120B example ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example_flags(tmp_path_factory) -> list[str]:
    """The arguments that the example gives to the program, data and tokenizer not there."""
    show = tmp_path_factory.mktemp("example") / "show.py"
    show.write_text("import sys; print(*sys.argv[1:], sep='\\n')")
    finished = subprocess.run(
        [str(ROOT / "examples" / SCRIPT)],
        env={**os.environ, "DATA": "absent", "TOKENIZER": "absent", "LAUNCH": f"{sys.executable} {show}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.returncode == 0, finished.stderr
    program, *argv = finished.stdout.splitlines()
    assert program == "pretrain_umv2.py" and not any(word.startswith("--dry-run") for word in argv)
    return argv


@pytest.mark.parametrize(
    "world, ranks, expected, changes",
    [
        (1024, [0, 63, 64, 511, 1023], 2, {}),
        (4096, [0, 4095], 2, {"global_batch_size": 16384}),
        (1024, [0, 256, 512, 768, 1023], 32, STAGES),
        (1024, [0, 1023], 4, {"memory_parallel_mode": "dim", "memory_exchange_parts": 1, "micro_batch_size": 1}),
        (1024, [1023], 2, {"memory_parallel_size": 256}),
    ],
    ids=["1024", "4096", "1024 with stages", "1024 by column", "1024 with M 256"],
)
def test_the_example_at_scale(example_flags, world, ranks, expected, changes):
    from umv2_megatron.config.resolve import resolve
    from umv2_megatron.planning.parameters import count_parameters

    argv = [*example_flags, *command_line(changes)]
    [results] = run_ranks(1, reports_and_plans, argv, world, ranks)
    for report, planned, micro_batches in results:
        assert_equal(report, planned)
        assert micro_batches == expected
        # on GPUs of 80 GB, with room for CUDA, communication and fragments
        assert report.total_bytes + planned["activations"] < 76e9
    stages = [report for report, _, _ in results if report.rank % (world // 4) == 0]
    if len(stages) == 4:
        run = resolve(argv, world)
        whole = count_parameters(run.values, run.memory)
        assert sum(report.parameters["value tables"] for report in stages) * run.memory.parallel_size == whole.tables
        assert sorted(layer for report in stages for layer in report.layers) == list(range(1, 25))


@pytest.mark.slow
def test_time_and_memory_of_a_whole_dry_run(example_flags):
    flags = [*example_flags, *command_line(STAGES)]
    command = [sys.executable, "pretrain_umv2.py", *flags, "--dry-run", "--dry-run-world-size", "4096"]
    start = time.monotonic()
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as process:
        output = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, output[-3000:]
    assert time.monotonic() - start < 120 and used.ru_maxrss * 1024 < 2**33
    assert re.search(r"num_layers \.+ 24   \(preset umv2-2.5b-120b-top256\)", output)
    assert [int(rank.replace(",", "")) for rank in re.findall(r"^rank ([\d,]+) of 4,096:", output, re.M)] == [
        0, 1024, 2048, 3072,
    ]  # fmt: skip
    assert output.splitlines()[-1].startswith("dry run passed: 4 of 4,096 ranks built; the largest, rank 3072, keeps ")
    assert "note: a run would stop here: --data-path names absent" in output


# -- what the user is told -------------------------------------------------------------------------------------------


def program(folder: Path, changes: dict[str, Any]) -> tuple[int, str]:
    """Exit code and output of the program, forked."""
    job = Job(1, command_line({**TINY, **SHARDED, "dry_run": True, **changes}), folder)
    try:
        finished = job.wait(60)
    finally:
        job.kill()
    return finished.codes[0], finished.outputs[0]


def test_the_chosen_ranks_and_nothing_written(tmp_path):
    code, output = program(
        tmp_path,
        {
            "dry_run_world_size": 96,
            "dry_run_rank": "95,2",
            "save": tmp_path / "saved",
            # not installed here: megatron-core's own layers stand for it
            "transformer_impl": "transformer_engine",
        },
    )
    assert code == 0, output
    assert re.findall(r"^rank (\d+) of 96:", output, re.M) == ["95", "2"]
    assert "note: megatron-core's own layers stand for Transformer Engine's" in output
    assert re.search(r"block +3 values +256 x 24: rows 0-255, columns 21-23, 1,536 bytes", output)
    assert output.splitlines()[-1].startswith("dry run passed: 2 of 96 ranks built")
    assert not (tmp_path / "saved").exists()


def test_main_weights_of_tables_on_the_host(tmp_path):
    """What a run moves there has no values here."""
    code, output = program(tmp_path, {"dry_run_world_size": 96, "bf16": True, "memory_value_optimizer_offload": True})
    assert code == 0 and output.splitlines()[-1].startswith("dry run passed: "), output


def test_experts(tmp_path):
    experts = {"ffn_variant": "moe", "num_experts": 8, "expert_model_parallel_size": 4, "memory_parallel_size": None}
    code, output = program(tmp_path, {**experts, "dry_run_world_size": 96, "dry_run_rank": "3"})
    assert code == 0 and "pipeline 0 of 2, expert 3 of 4\n" in output, output
    # two blocks, each with 2 of 8 experts (gate, up, down) and the router
    assert f" experts         {2 * (2 * 3 * 64 * 128 + 8 * 64):>16,}\n" in output


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"dry_run_world_size": 90}, "--tensor-model-parallel-size 2 x --pipeline-model-parallel-size 2"),
        ({"dry_run_world_size": 0}, "--dry-run-world-size is 0"),
        ({"dry_run_world_size": 96, "dry_run_rank": "96"}, "--dry-run-rank is '96'; expected ranks from 0 to 95"),
        ({"dry_run_world_size": 96, "dry_run": False}, "expected --dry-run too"),
        ({"dry_run_world_size": 96, "vocab_size": None, "model_preset": None}, "--num-layers is missing"),
        ({"dry_run_rank": "0"}, "expected --dry-run-world-size too"),
        ({"dry_run_world_size": 96, "memory_parallel_size": 16}, "--memory-value-dim is 24"),
        ({"dry_run_world_size": 96, "memory_parallel_size": 5}, "--memory-parallel-size is 5"),
        ({"dry_run_world_size": 96, "global_batch_size": 100}, "--global-batch-size is 100"),
        (
            {"dry_run_world_size": 96, "global_batch_size": 48, "num_layers_per_virtual_pipeline_stage": 1},
            "--global-batch-size is 48; expected a multiple of 2 micro-batches",
        ),
        ({"dry_run_world_size": 96, "num_distributed_optimizer_instances": 5}, "--num-distributed-optimizer-instances"),
    ],
)
def test_refusals_name_the_flag(tmp_path, changes, told):
    code, output = program(tmp_path, changes)
    assert code == 2 and told in output, output
    assert len(output.splitlines()) == 1 and output.startswith("pretrain_umv2.py: error: ")
