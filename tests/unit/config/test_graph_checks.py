"""What --cuda-graph-impl local refuses, in one sentence each."""

from __future__ import annotations

import importlib.metadata

import pytest

from umv2_megatron.config import graph_checks
from umv2_megatron.config.resolve import resolve
from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.config.usage import UsageError


def run(*flags: str, world: int = 1) -> RunConfig:
    argv = ["--model-preset", "umv2-tiny", "--mock-data", "--train-iters", "1", "--micro-batch-size", "1"]
    return resolve([*argv, "--transformer-impl", "local", "--cuda-graph-impl", "local", *flags], world)


MENDED = importlib.metadata.version("megatron-core").startswith(graph_checks.REPAIRED)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_checks, "on_cuda", lambda: True)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_checks, "on_cuda", lambda: False)
    with pytest.raises(UsageError, match="--cuda-graph-impl is local; expected none on a machine without a CUDA"):
        run()


@pytest.mark.skipif(not MENDED, reason="the graphs of this megatron-core are refused")
def test_the_values_reach_mcore(gpu: None) -> None:
    config = run("--cuda-graph-warmup-steps", "5").transformer_config()
    assert (config.cuda_graph_impl, config.cuda_graph_warmup_steps, config.cuda_graph_scope) == ("local", 5, [])


REFUSED = [
    (["--tensor-model-parallel-size", "2"], "--tensor-model-parallel-size is 2; expected 1"),
    (["--pipeline-model-parallel-size", "2"], "--pipeline-model-parallel-size is 2; expected 1"),
    (["--context-parallel-size", "2"], "--context-parallel-size is 2; expected 1"),
    (["--memory-parallel-size", "2"], "--memory-parallel-size is 2; expected 1"),
    (["--ffn-variant", "moe", "--num-experts", "4"], "--ffn-variant is moe; expected a variant without experts"),
    (
        ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"],
        "--recompute-granularity is full; expected none",
    ),
    (["--hidden-dropout", "0.1"], "--hidden-dropout is 0.1; expected 0"),
    (["--attention-dropout", "0.1"], "--attention-dropout is 0.1; expected 0"),
    (
        ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"],
        "--overlap-param-gather is on; expected off, because u and t",
    ),
    (["--memory-sharing", "block", "--memory-sharing-size", "2"], "--memory-sharing is block; expected none"),
    (["--memory-read-delay", "1", "--memory-layer-freq", "[1,0,0,0]"], "--memory-read-delay is 1; expected 0"),
    (["--memory-stream"], "--memory-stream is on; expected off"),
    (["--memory-backend", "reference"], "--memory-backend is reference; expected auto, scatter or triton"),
    (
        ["--memory-tucker-rank", "3", "--memory-tucker-penalty-coeff", "0.1"],
        "--memory-tucker-penalty-coeff is 0.1; expected 0",
    ),
    (["--norm-placement", "post"], "--norm-placement is post; expected pre"),
    (["--qk-norm-span", "projection"], "--qk-norm-span is projection; expected head"),
    (["--trainable", "memory"], "--trainable is memory; expected all"),
    (["--trainable", "rows", "--trainable-rows", "x"], "--trainable is rows; expected all"),
    (["--memory-log-interval", "5"], "--memory-log-interval is 5; expected no value"),
]


@pytest.mark.parametrize("flags, words", REFUSED, ids=lambda each: each[0] if isinstance(each, list) else None)
def test_refusals(gpu: None, flags: list[str], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        run(*flags, world=2 if flags[-1] == "2" and "sharing" not in flags[0] else 1)
    text = str(caught.value)
    assert text.startswith(words) and text.endswith("with --cuda-graph-impl local") and "\n" not in text, text


def test_graphs_of_another_megatron_core(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.19.2")
    with pytest.raises(UsageError, match="--cuda-graph-impl is local; expected none with megatron-core 0.19.2: "):
        run()


def test_the_warmup_has_no_effect_alone() -> None:
    argv = ["--model-preset", "umv2-tiny", "--mock-data", "--train-iters", "1", "--micro-batch-size", "1"]
    with pytest.raises(UsageError, match="--cuda-graph-warmup-steps is 5"):
        resolve([*argv, "--cuda-graph-warmup-steps", "5"], 1)
