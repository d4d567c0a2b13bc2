"""--check-replicas-interval and --log-straggler: the rank whose parameters differ, or that is slow, is named."""

from __future__ import annotations

import re
import time

import pytest
from program_runs import tiny_run, train

from umv2_megatron.training.metrics import read_metrics

pytestmark = pytest.mark.thorough


def flip(victim: int, name: str, step: int) -> None:
    """Flip the lowest bit of the first number of a parameter of rank ``victim`` after its ``step``-th step."""
    import torch

    from umv2_megatron.training import loop

    train_step, steps = loop.train_step, [0]

    def flipped(run, chunks, *arguments, **named):
        result = train_step(run, chunks, *arguments, **named)
        steps[0] += 1
        if steps[0] == step and torch.distributed.get_rank() == victim:
            parameter = next(parameter for key, parameter in chunks[0].named_parameters() if name in key)
            parameter.data.view(-1)[:1].view(torch.int32).bitwise_xor_(1)
        return result

    loop.train_step = flipped


THREE = {"global_batch_size": 12}
KEYS = "decoder.layers.1.mlp.memory.retrieval.row_keys"


@pytest.mark.parametrize(
    ("ranks", "changes", "harm", "told"),
    [
        (3, THREE, (1, "final_layernorm", 2), "rank 1 .* differs from 2 equal replicas in decoder.final_layernorm"),
        pytest.param(
            3, {**THREE, "use_distributed_optimizer": True}, (2, "final_layernorm", 4),
            "rank 2 .* differs from 2 equal replicas in decoder.final_layernorm", marks=pytest.mark.slow,
        ),
        pytest.param(
            4, {"memory_parallel_size": 2, "memory_parallel_mode": "row"}, (3, "memory.table", 4),
            "ranks 1 .*, 3 .* differ in decoder.layers.*memory.table.*, and no majority tells",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["one-of-three", "distributed-optimizer", "shard-of-a-table"],
)  # fmt: skip
def test_a_flipped_bit_is_found_before_the_save(ranks, changes, harm, told, tmp_path):
    save = tmp_path / "run"
    argv = tiny_run(train_iters=6, save=save, save_interval=2, check_replicas_interval=2, **changes)
    ended = train(ranks, argv, tmp_path / "o", flip, harm, codes=1)
    at = 2 * ((harm[2] + 1) // 2)
    errors = [re.search("pretrain_umv2.py: error: (.*)", output)[1] for output in ended.outputs]
    assert len(set(errors)) == 1 and "Traceback" not in ended.text
    assert re.search(f"--check-replicas-interval: after iteration {at} {told}", errors[0]), errors[0]
    tracker = save / "latest_checkpointed_iteration.txt"
    assert (tracker.read_text() if tracker.exists() else "0") == str(at - 2)
    # the same command, without the fault, goes on from the last checkpoint
    finished = train(ranks, argv, tmp_path / "o")
    assert finished.weights == train(ranks, tiny_run(train_iters=6, **changes), tmp_path / "o").weights


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True, "bf16": True},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"pipeline_model_parallel_size": 2},
        {"context_parallel_size": 2},
        {"memory_parallel_size": 2, "memory_parallel_mode": "dim", "hidden_dropout": 0.1},
        {"ffn_variant": "moe", "num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 32,
         "expert_model_parallel_size": 2},
    ],
    ids=["distributed-optimizer", "tensor", "pipeline", "context", "tables", "experts"],
)  # fmt: skip
def test_no_difference_is_invented(changes, tmp_path):
    train(4, tiny_run(train_iters=4, check_replicas_interval=1, **changes), tmp_path / "o")


def slow(victim: int, seconds: float) -> None:
    """Have rank ``victim`` wait in every forward pass of its model."""
    import torch

    from umv2_megatron.training import step

    next_batch = step.next_batch

    def slowed(iterator):
        if torch.distributed.get_rank() == victim:
            time.sleep(seconds)
        return next_batch(iterator)

    step.next_batch = slowed


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (3, {**THREE, "use_distributed_optimizer": True, "overlap_grad_reduce": True}),
        pytest.param(2, {"memory_parallel_size": 2}, marks=pytest.mark.slow),
        pytest.param(2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, marks=pytest.mark.slow),
    ],
    ids=["replicas", "tables", "tensor"],
)
def test_the_slow_rank_is_named(ranks, changes, tmp_path):
    """All ranks take equally long for a step; in exchanges within the forward pass, too, the others only wait."""
    argv = tiny_run(train_iters=4, log_interval=2, save=tmp_path / "run", log_straggler=True, **changes)
    finished = train(ranks, argv, tmp_path / "o", slow, (1, 0.5))
    pattern = r"slowest rank (\d) on \S+ ([\d.]+) ms, ([\d.]+) x median \| fastest rank (\d) on \S+ ([\d.]+) ms"
    found = re.findall(pattern, finished.text)
    assert len(found) == 2 and all(first == "1" and last != "1" for first, _, _, last, _ in found), finished.text[
        -3000:
    ]
    # two micro-batches of 0.5 s at least in each step of the slow rank; the others' waiting is not theirs
    assert float(found[-1][1]) >= 1000 and float(found[-1][4]) < 0.6 * float(found[-1][1])
    records = [line for line in read_metrics(tmp_path / "run") if "straggler/rank" in line]
    assert [line["iteration"] for line in records] == [2, 4] and records[0]["straggler/rank"] == 1
    assert records[-1]["straggler/ratio"] > 1 and records[-1]["straggler/seconds"] >= 1
