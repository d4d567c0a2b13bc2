"""Blocks captured by mcore's local CUDA graphs (--cuda-graph-impl local), on a recorder in the place of a GPU: the same
losses, gradients and weights as without graphs, step after step."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import graph_recorder
import pytest
import torch
from harness import run_ranks
from reshard import BATCH, Samples, layout, open_layout, train

from umv2_megatron.checkpoint.save_load import weights_digest
from umv2_megatron.config.graph_checks import REPAIRED
from umv2_megatron.data.batches import batch_iterator
from umv2_megatron.model import one_pass
from umv2_megatron.ops import cpu_attention
from umv2_megatron.parallel import groups
from umv2_megatron.training.step import evaluate

STEPS = 4
GRAPHS = {"cuda_graph_impl": "local"}
BASE = {"memory_backend": "scatter", "memory_layer_freq": [1, 1, 0, 1]}
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (1, layout(**BASE)),
    "bf16 and both losses": (
        1,
        layout(bf16=True, dist=True, memory_balance_loss_coeff=0.1, memory_tucker_penalty_coeff=0.1, **BASE),
    ),
    "overlapped reduction": (2, layout(dist=True, overlap_grad_reduce=True, bucket_size=3000, **BASE)),
    "product keys": (
        1,
        layout(ffn_variant="memory-plus", memory_sharing="none", memory_sharing_size=1, **BASE),
    ),
    "offloaded tables": (1, layout(bf16=True, memory_value_optimizer_offload=True, **BASE)),
}


def steps(changes: dict[str, Any]) -> tuple[Any, ...]:
    """Losses and norms of the steps, auxiliary losses, losses of an evaluation before and after, digest, replays."""
    from megatron.core.transformer import cuda_graphs

    with pytest.MonkeyPatch.context() as patch:
        graph_recorder.install(patch)
        # The recorder sees PyTorch's operations alone; a device has no compiled steps of CPUs.
        patch.setattr(one_pass, "_compiled", lambda *_: False)
        patch.setattr(cpu_attention, "can", lambda *_: False)
        run, state = open_layout(changes, seed=1)

        def evaluation() -> float:
            data = batch_iterator(Samples(), 60, run.training.micro_batch_size, 0, run.virtual_pipeline_size)
            total, tokens = evaluate(run, state.chunks, data, 1)
            return total / tokens

        before = evaluation()
        numbers = train(run, state, range(STEPS))
        mains = [float(p.main_grad.double().sum()) for chunk in state.chunks for p in chunk.parameters()]
        after = evaluation()
        digest = weights_digest(state.chunks)
        assert not cuda_graphs.is_graph_warmup()
        groups.destroy_groups()
        return numbers, before, after, mains, digest, graph_recorder.RecordedGraph.replays


def test_the_recorder_computes_in_replays_only() -> None:
    x, total = torch.ones(3), torch.zeros(3)
    graph = graph_recorder.RecordedGraph()
    with graph_recorder.capturing(graph):
        doubled = x * 2
        total[1:].add_(doubled[1:])
    assert bool(doubled.isnan().all()) and total.tolist() == [0, 0, 0]
    graph.replay()
    x.fill_(5)
    graph.replay()
    assert doubled.tolist() == [10, 10, 10] and total.tolist() == [0, 12, 12]


@pytest.mark.parametrize("wait", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero()])
def test_the_recorder_finds_waits(wait: Any) -> None:
    with pytest.raises(AssertionError, match="makes the host wait"), graph_recorder.capturing(
        graph_recorder.RecordedGraph()
    ):
        wait(torch.ones(3))


QUICK = ("bf16 and both losses", "overlapped reduction")


@pytest.mark.skipif(
    not importlib.metadata.version("megatron-core").startswith(REPAIRED), reason="this megatron-core's are refused"
)
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in RUNS])
def test_replayed_steps_are_those_without_graphs(name: str) -> None:
    world, changes = RUNS[name]
    plain = run_ranks(world, steps, changes)
    graphed = run_ranks(world, steps, {**changes, **GRAPHS})
    for without, within in zip(plain, graphed, strict=True):
        assert within[:-1] == without[:-1]
        # the first step makes the graphs; every micro-batch after it replays a forward and a backward of each block
        batches = BATCH // world
        assert without[-1] == 0 and within[-1] == 4 * batches * (2 * (STEPS - 1) + 1)
