"""What goes together with --cuda-graph-impl local; called by ``checks.py``."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.config.usage import refuse

REPAIRED = "0.16."
"""How the versions of megatron-core begin whose graphs ``parallel/mcore_repairs.py`` mends."""


def check_graphs(run: RunConfig, *, for_training: bool) -> None:
    """CUDA graphs of blocks: a graph repeats what the device did, and nothing that the host did meanwhile."""
    if run.cuda_graph_impl == "none":
        return
    for flag, value, expected in _hindrances(run):
        refuse(flag, value, f"{expected} with --cuda-graph-impl local")
    if for_training and not on_cuda():
        refuse("cuda-graph-impl", run.cuda_graph_impl, "none on a machine without a CUDA device")


    version = importlib.metadata.version("megatron-core")
    if for_training and not version.startswith(REPAIRED):
        refuse(
            "cuda-graph-impl",
            run.cuda_graph_impl,
            f"none with megatron-core {version}: what its graphs need mended is known of {REPAIRED}1 only",
        )


def on_cuda() -> bool:
    """Whether this process has a CUDA device."""
    import torch  # takes seconds, which a usage error is spared

    return torch.cuda.is_available()


def _hindrances(run: RunConfig) -> Iterator[tuple[str, object, str]]:
    """(flag, value, what is expected and why) of all that cannot be captured, or has not been tried."""
    memory, untried = run.memory, "has not been tried on a CPU stand-in"
    sizes = {
        "tensor-model-parallel-size": run.tensor_model_parallel_size,
        "pipeline-model-parallel-size": run.pipeline_model_parallel_size,
        "context-parallel-size": run.context_parallel_size,
    }
    if run.has_memory:
        sizes["memory-parallel-size"] = memory.parallel_size
    for flag, size in sizes.items():
        if size > 1:
            yield flag, size, f"1, because the capture of exchanges {untried},"
    if run.has_experts:
        yield "ffn-variant", run.values["ffn_variant"], "a variant without experts, whose sizes depend on the tokens,"
    if run.recompute_granularity is not None:
        yield "recompute-granularity", run.recompute_granularity, f"none, because recomputation in a graph {untried},"
    for name in ("hidden_dropout", "attention_dropout"):
        if run.values[name] > 0:
            yield name.replace("_", "-"), run.values[name], "0, because evaluation replays the graphs of training,"
    for flag, usual in (("norm-placement", "pre"), ("qk-norm-span", "head"), ("trainable", "all")):
        value = run.values[flag.replace("-", "_")]
        if value != usual:
            yield flag, value, f"{usual}, because another value in a graph {untried},"
    if run.fp8:
        yield "fp8-format", run.fp8, f"no value, because FP8 in a graph {untried},"
    if run.has_memory:
        yield from _memory_hindrances(run, untried)


def _memory_hindrances(run: RunConfig, untried: str) -> Iterator[tuple[str, object, str]]:
    memory = run.memory
    if run.overlap_param_gather:
        yield "overlap-param-gather", "on", "off, because u and t are refreshed before the gathered cores are there,"
    if memory.hashes:
        yield "memory-scoring", memory.scoring, f"tucker or additive, because contexts of tokens in a graph {untried},"
    if run.ngrams is not None:
        yield "engram-layer-freq", run.ngrams.layer_freq, f"no value, because contexts of tokens in a graph {untried},"
    if memory.sharing != "none":
        yield "memory-sharing", memory.sharing, f"none, because a table that several graphs write to {untried},"
    if memory.read_delay:
        yield "memory-read-delay", memory.read_delay, "0, because the output waits for a later block outside its graph,"
    if memory.stream:
        yield "memory-stream", "on", f"off, because a second stream in a graph {untried},"
    if memory.backend == "reference":
        yield "memory-backend", "reference", "auto, scatter or triton, whose sizes do not depend on the tokens,"
    if memory.tucker_penalty_coeff > 0 and memory.tucker_rank > 2:
        yield "memory-tucker-penalty-coeff", memory.tucker_penalty_coeff, (
            "0, because the singular values of cores of a rank above 2 make the host wait,"
        )
    if run.training.memory_log_interval is not None:
        yield "memory-log-interval", run.training.memory_log_interval, (
            "no value, because a graph does not begin or end to count,"
        )
