"""Times a whole memory layer against the dense FFN beside it, and both together against mcore's MoE layer.

    python benchmarks/layer.py                       about 2 minutes on 2 cores, needs 3 GiB
    python benchmarks/layer.py --preset umv2-8m --tokens 4096 --json layer.json
    python benchmarks/layer.py --docs docs/performance.md        writes the tables between the file's markers

Compared are modules of one block, built as for training, inside mcore's DDP, so that all gradients end in ``main_grad``
(those of the value tables directly, all others by DDP's hooks). Buffers are cleared between timed calls, untimed.
"forward" runs without gradients; "forward + backward" computes the gradients of the input, too. Where there is a CUDA
device, they run on it.

- "memory layer": retrieval, lookup and value projection; "dense FFN": mcore's MLP of the same preset. The quotient
  (memory time / FFN time) / (memory FLOPs / FFN FLOPs) says how much more time the memory layer takes per FLOP than the
  FFN; FLOPs are counted by umv2_megatron/planning/flops.py.
- "FFN + memory" is what a block holds; "experts" is mcore's MoE layer in its place, of equal FLOPs per token and
  parameters, with 64 experts, 8 active. Its fastest implementation here is used: mcore's grouped GEMM needs CUDA, so
  the experts are computed one after another (SequentialMLP). Of both token dispatchers the faster one counts.
- "peak" is the most that torch's allocator handed out during one forward + backward, beyond what was there before:
  activations and temporary gradients. "state" is parameters and main_grad.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from umv2_megatron.parallel import cpu_platform  # noqa: E402

cpu_platform.install()

from megatron.core.distributed import DistributedDataParallel  # noqa: E402
from megatron.core.transformer.spec_utils import build_module  # noqa: E402

from benchmarks import variants  # noqa: E402
from benchmarks.measure import (  # noqa: E402
    Table,
    add_options,
    at_least_one,
    describe_machine,
    peak_bytes,
    prepare,
    publish,
    take_turns,
)
from benchmarks.spread import Spread, ratio  # noqa: E402
from umv2_megatron.config.presets import PRESETS  # noqa: E402
from umv2_megatron.config.run_config import RunConfig  # noqa: E402
from umv2_megatron.model.layer_specs import umv2_layer_spec  # noqa: E402
from umv2_megatron.ops import BACKENDS  # noqa: E402
from umv2_megatron.training.initialize import start_processes  # noqa: E402

MEMORY, FFN, BOTH = "memory layer", "dense FFN", "FFN + memory"
EXPERTS = {kind: f"experts, {kind}" for kind in ("alltoall", "allgather")}
"""By mcore's token dispatcher; with one rank both only sort tokens."""
PASSES = ("forward", "forward + backward")
TARGET = 1.2


@dataclass
class Contender:
    """Part of a block: what it computes, the block it lies in, and its operations per token (forward)."""

    compute: Callable[[Tensor], Tensor]
    block: DistributedDataParallel
    module: nn.Module
    flops: float

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters())


class Bench:
    """The contenders of one preset and the inputs they share, [tokens, 1, hidden] with unit mean square.

    Each round has another input: a layer must not find the last round's rows in the cache.
    """

    def __init__(
        self, preset: str, tokens: int, inputs: int, dtype: torch.dtype = torch.float32, backend: str = "auto"
    ) -> None:
        fields, memory = variants.preset_fields(
            preset, seq_length=tokens, max_position_embeddings=tokens, memory_backend=backend
        )
        expert_fields = variants.expert_fields(fields, memory)
        precision = {"bf16": dtype == torch.bfloat16}
        ours = variants.configured(fields, memory, **precision)
        start_processes(ours)
        self.device, self.dtype = cpu_platform.device(), dtype
        self.preset, self.tokens, self.memory, self.expert_fields = preset, tokens, memory, expert_fields
        self.sizes = {"memory": variants.Size.of(fields, memory), "experts": variants.Size.of(expert_fields, None)}
        layers = fields["num_layers"]
        ffn_flops = self.sizes["memory"].flops.ffn / layers
        memory_flops = self.sizes["memory"].flops.memory / sum(memory.memory_layers(layers))
        block = wrapped(ours, slot(ours))
        pair = block.module
        self.contenders = {
            FFN: Contender(partial(first_output, pair.ffn), block, pair.ffn, ffn_flops),
            MEMORY: Contender(pair.memory, block, pair.memory, memory_flops),
            BOTH: Contender(partial(first_output, block), block, pair, ffn_flops + memory_flops),
        }
        for kind, name in EXPERTS.items():
            theirs = variants.configured(expert_fields, None, moe_token_dispatcher_type=kind, **precision)
            experts = wrapped(theirs, slot(theirs))
            flops = self.sizes["experts"].flops.ffn / layers
            self.contenders[name] = Contender(partial(first_output, experts), experts, experts.module, flops)
        generator = torch.Generator().manual_seed(5)
        self.inputs = []
        for _ in range(inputs):
            x = torch.randn(tokens, 1, fields["hidden_size"], generator=generator)
            self.inputs.append((x * x.square().mean(-1, keepdim=True).rsqrt()).to(self.device, dtype))
        self.upstream = torch.randn(tokens, 1, fields["hidden_size"], generator=generator).to(self.device, dtype)

    def forward(self, name: str, number: int) -> Tensor:
        """One forward pass without gradients, on the input of round ``number``."""
        with torch.no_grad():
            return self.contenders[name].compute(self.inputs[number % len(self.inputs)])

    def step(self, name: str, number: int) -> Tensor:
        """Forward and backward; returns the gradient of the input."""
        x = self.inputs[number % len(self.inputs)].detach().requires_grad_()
        self.contenders[name].compute(x).backward(self.upstream)
        assert x.grad is not None
        return x.grad

    def clear(self) -> None:
        """Gradients back to zero."""
        for contender in self.contenders.values():
            contender.block.zero_grad_buffer()


def first_output(module: nn.Module, x: Tensor) -> Tensor:
    """Output of ``module``, whose second output would be a bias."""
    return module(x)[0]


def slot(run: RunConfig) -> nn.Module:
    """What stands in the ``mlp`` slot of a block in the middle of the model."""
    config = run.transformer_config()
    module = build_module(umv2_layer_spec(config, run.memory, with_memory=run.has_memory).submodules.mlp, config=config)
    module.set_layer_number(config.num_layers // 2 + 1)
    if run.has_memory:
        module.memory.refresh_singular_vectors()
    return module


def wrapped(run: RunConfig, module: nn.Module) -> DistributedDataParallel:
    """``module`` with gradient buffers, as in training."""
    return DistributedDataParallel(run.transformer_config(), run.ddp_config(), module.to(cpu_platform.device()))


def measure(bench: Bench, rounds: int, clock: str) -> dict[str, Any]:
    """Times of both passes and peaks; everything that the tables and the JSON show."""
    names = list(bench.contenders)
    times = {
        kind: take_turns({name: partial(work, name) for name in names}, rounds, clock, bench.clear, bench.device.type)
        for kind, work in zip(PASSES, (bench.forward, bench.step))
    }
    peaks = {}
    for name in names:
        peaks[name] = peak_bytes(partial(bench.step, name, 0), bench.device.type)
        bench.clear()
    both = times[PASSES[1]]
    experts = min(EXPERTS.values(), key=lambda name: Spread.of(both[name]).median)
    flops = {name: contender.flops for name, contender in bench.contenders.items()}
    share = flops[MEMORY] / flops[FFN]
    return {
        "contenders": {
            name: {
                "ms": {kind: spread_ms(times[kind][name]) for kind in PASSES},
                "peak_bytes": peaks[name],
                "parameters": contender.parameters,
                "state_bytes": contender.parameters * (bench.dtype.itemsize + 4),
                "flops_per_token": contender.flops,
            }
            for name, contender in bench.contenders.items()
        },
        "faster_experts": experts,
        "memory_flops_per_ffn_flops": share,
        "memory_time_per_ffn_time": {k: vars(ratio(t[MEMORY], t[FFN])) for k, t in times.items()},
        "quotient": {k: vars(ratio(t[MEMORY], t[FFN], 1 / share)) for k, t in times.items()},
        "experts_time_per_pair_time": {k: vars(ratio(t[experts], t[BOTH])) for k, t in times.items()},
        "expert_sizes": {
            "moe_ffn_hidden_size": bench.expert_fields["moe_ffn_hidden_size"],
            "moe_shared_expert_intermediate_size": bench.expert_fields["moe_shared_expert_intermediate_size"],
            "flops_per_ours": bench.sizes["experts"].flops.blocks / bench.sizes["memory"].flops.blocks,
            "parameters_per_ours": bench.sizes["experts"].parameters / bench.sizes["memory"].parameters,
        },
    }


def spread_ms(seconds: list[float]) -> dict[str, float]:
    """Median, lowest and highest in milliseconds."""
    return vars(Spread.of([1e3 * each for each in seconds]))


def describe(bench: Bench, result: dict[str, Any]) -> list[Table | str]:
    """The tables, and what to read from them."""
    rows = []
    for name, row in result["contenders"].items():
        forward, both = (Spread(**row["ms"][kind]) for kind in PASSES)
        rows.append((
            name, forward.text(), both.text(), f"{row['flops_per_token'] / 1e6:.2f}", f"{row['parameters'] / 1e6:.1f}",
            f"{row['peak_bytes'] / 2**20:.0f}", f"{row['state_bytes'] / 2**20:.0f}",
        ))  # fmt: skip
    columns = ("", *(f"{kind}, ms" for kind in PASSES), "MFLOP/token", "M parameters", "peak, MiB", "state, MiB")
    title = (
        f"One block of {bench.preset}, {bench.tokens:,} tokens, {str(bench.dtype).removeprefix('torch.')}; medians "
        "(lowest-highest). The MoE layer: 64 experts of "
        f"inner size {result['expert_sizes']['moe_ffn_hidden_size']}, 8 active"
    )
    shared = result["expert_sizes"]["moe_shared_expert_intermediate_size"]
    title += f", and a shared one of {shared}" if shared else ""
    title += (
        f"; FLOPs and parameters of whole blocks are {result['expert_sizes']['flops_per_ours']:.3f} and "
        f"{result['expert_sizes']['parameters_per_ours']:.3f} times those of FFN + memory."
    )
    compared = [
        ("memory time / FFN time", *(Spread(**result["memory_time_per_ffn_time"][k]).text(2) for k in PASSES)),
        ("memory FLOPs / FFN FLOPs", *[f"{result['memory_flops_per_ffn_flops']:.3f}"] * 2),
        (f"quotient (target: at most {TARGET})", *(Spread(**result["quotient"][k]).text(2) for k in PASSES)),
        (f"{result['faster_experts']}: time / time of {BOTH}",
         *(Spread(**result["experts_time_per_pair_time"][k]).text(2) for k in PASSES)),
    ]  # fmt: skip
    return [Table(title, columns, rows), Table("Ratios, taken within each round.", ("", *PASSES), compared)]


def main(argv: list[str]) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--preset", choices=tuple(PRESETS), default="umv2-227m-1.2b")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of parameters and tokens")
    parser.add_argument("--memory-backend", choices=("auto", *BACKENDS), default="auto", help="as for a training run")
    add_options(parser, rounds=15)
    options = parser.parse_args(argv)
    if options.quick:
        options.preset, options.tokens, options.rounds = "umv2-tiny", 32, 1
    at_least_one(parser, options, "tokens")
    prepare(parser, options, "layer.py")
    machine = describe_machine(cpu_platform.device().type, options.quick)
    dtype = getattr(torch, options.dtype)
    bench = Bench(options.preset, options.tokens, options.rounds + 1, dtype, options.memory_backend)
    result = measure(bench, options.rounds, options.clock)
    milliseconds = {f"{name}, {kind}": row["ms"][kind] for name, row in result["contenders"].items() for kind in PASSES}
    times = {name: Spread(*(each / 1e3 for each in found.values())) for name, found in milliseconds.items()}
    publish("layer.py", options, machine, describe(bench, result), result, times)
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
