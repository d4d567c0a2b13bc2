"""Prints, as JSON, which modules of a tiny model run in FP8, with Transformer Engine's stand-in.

python fp8_recorder.py '{"a name": ["--a-flag", ...], ...}'        flags of the training program, by name
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[3])]

import engine_stand_in  # noqa: E402

engine_stand_in.install()

from umv2_megatron.parallel import cpu_platform  # noqa: E402

cpu_platform.install()

import torch  # noqa: E402

from umv2_megatron.config.resolve import resolve  # noqa: E402
from umv2_megatron.model.builder import build_model  # noqa: E402
from umv2_megatron.model.ffn_with_memory import memory_layers  # noqa: E402
from umv2_megatron.training import initialize  # noqa: E402

LENGTH = 32
TINY = [
    "--model-preset", "umv2-tiny", "--seq-length", str(LENGTH), "--transformer-impl", "transformer_engine", "--bf16",
    "--use-cpu-initialization", "--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "255",
    "--train-iters", "2", "--micro-batch-size", "1", "--use-distributed-optimizer",
]  # fmt: skip


def record(flags: list[str]) -> dict[str, object]:
    """What ran in FP8 in a forward and backward pass, what of the engine did not, and what holds FP8 weights."""
    state = engine_stand_in.State
    run = resolve([*TINY, *flags])
    if not torch.distributed.is_initialized():
        initialize.start_processes(run)
    model = build_model(run, 256).bfloat16()
    names = {module: name for name, module in model.named_modules()}
    for _, layer in memory_layers(model):
        layer.refresh_singular_vectors()
    state.ran, state.reductions = [], 0
    tokens = torch.arange(LENGTH).unsqueeze(0)
    model(tokens, tokens, None, labels=tokens).sum().backward()
    engine = [module for module in names if isinstance(module, engine_stand_in.Module)]
    return {
        "fp8": sorted({names[module] for module, fp8, _ in state.ran if fp8}),
        "not": sorted({names[module] for module, fp8, _ in state.ran if not fp8}),
        "recipes": sorted({recipe for _, fp8, recipe in state.ran if fp8}),
        "fp8_weights": sorted(
            names[module] for module in engine if module.fp8_weights and isinstance(module, engine_stand_in.Linear)
        ),
        "in_memory": [names[module] for module in engine if ".memory." in names[module]],
        "norms": sorted(names[module] for module in engine if isinstance(module, engine_stand_in.RMSNorm)),
        "norms_in_linear_layers": sorted(
            names[module] for module in engine if isinstance(module, engine_stand_in.LayerNormLinear)
        ),
        "reductions": state.reductions,
        "keeps_input": sorted(names[module] for module in engine if module.save_original_input),
        "dtypes": sorted({str(value.dtype) for name, value in model.named_parameters() if ".memory." in name}),
    }


if __name__ == "__main__":
    print("RECORD" + json.dumps({name: record(flags) for name, flags in json.loads(sys.argv[1]).items()}))
