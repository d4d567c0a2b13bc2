"""Counts what the Triton lookup moves and launches, without a GPU: Triton's interpreter, its loads and stores watched.

    python benchmarks/kernel_bytes.py                   bytes of a lookup at all sizes below, ops of a block (a minute)
    python benchmarks/kernel_bytes.py --size 227m --json bytes.json
    python benchmarks/kernel_bytes.py --only ops        non-view operations and kernels of one block

Bytes: forward and backward of one lookup with main_grad, bfloat16. For every kernel the programs, and the bytes of

    rows        picked rows of both tables, loaded
    sums        main_grad, loaded and stored
    tokens      rows of the tokens' own tensors (projected input, gradient of the output), loaded again for every pick;
                they are few, so that a GPU finds them in its cache
    others      everything else: row ids, scores, weights, lists of the sort

Lanes that are masked off do not count, and neither does a second lane of the same load with the same address. "idle"
is the share of lanes masked off in loads of rows and sums. The least: every pick's rows once in the forward and once in
the backward, and the sums of every distinct row read and written once. torch's sort is not a kernel of ours: its passes
are not counted. Bytes are facts of the program; time is not measured.

Ops: non-view ATen operations and kernels of one block, forward and backward: the difference between a model of three
blocks and one of one block. On a GPU such an operation is one launch as a rule, a sort is several. Norms count as one
operation in either direction, as torch has them there.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
warnings.filterwarnings("ignore")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from triton.runtime.interpreter import interpreter_builder as builder  # noqa: E402

from umv2_megatron.ops import triton_launch, triton_lookup, triton_ragged  # noqa: E402
from umv2_megatron.ops.interface import ListedPicks  # noqa: E402

SIZES = {  # tokens, picks, rows, Dp, Dv, cores; rows per pick as with 8,192 tokens of the model
    "small": (6, 8, 40, 24, 48, 2),
    "227m": (32, 32, 506, 192, 192, 2),
    "1b": (8, 128, 272, 384, 768, 2),
    "shard": (32, 32, 506, 24, 24, 2),
    "few": (33, 8, 506, 192, 192, 2),
}
LISTS = {  # of a shard by row: tokens of all ranks, picks of each on average, rows of this rank, Dp, Dv, cores
    "row": (64, 4, 18, 256, 768, 2),
}
"""As one of 64 ranks with 4,096 tokens each of umv2-2.5b-120b-top256: a row is picked 14 times."""
KINDS = {
    **dict.fromkeys(("table", "values", "pre_values"), "rows"),
    "table_sum": "sums",
    **dict.fromkeys(("upstream", "projected"), "tokens"),
}
PRECISIONS = {"fp32": (), "bf16": ("--bf16",)}
VIEWS = (
    *("view", "t.default", "transpose", "permute", "expand", "slice.", "select.", "detach", "alias", "unsqueeze"),
    *("squeeze", "as_strided", "unbind", "split", "_unsafe_view", "empty", "new_empty", "is_", "sym_", "lift_fresh"),
    *("_reshape_alias", "chunk", "unfold.", "diagonal.", "promote_types"),
)
"""Beginnings of names of operations that launch nothing."""


@dataclass
class Counted:
    """What the launches of one kernel moved, in bytes by kind of tensor."""

    launches: int = 0
    programs: int = 0
    loaded: collections.Counter = None  # type: ignore[assignment]
    stored: collections.Counter = None  # type: ignore[assignment]
    lanes: int = 0
    idle: int = 0

    def __post_init__(self) -> None:
        self.loaded, self.stored = collections.Counter(), collections.Counter()

    def result(self) -> dict[str, Any]:
        return {
            **{"launches": self.launches, "programs": self.programs},
            **{"loaded": dict(self.loaded), "stored": dict(self.stored)},
            "idle": self.idle / max(1, self.lanes),
        }


class Watch:
    """Counts launches, and the loads, stores and atomic additions of every program."""

    def __init__(self) -> None:
        self.kernels: dict[str, Counted] = collections.defaultdict(Counted)
        self.ranges: list[tuple[int, int, str]] = []
        self.now: Optional[Counted] = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        launch, names = triton_launch.launch, ("create_masked_load", "create_masked_store", "create_atomic_rmw")
        load, store, add = (getattr(builder, name) for name in names)

        def counted_launch(kernel: Any, grid: tuple, tensors: dict, constants: dict, warps: int) -> None:
            self.now = self.kernels[kernel.fn.__name__]
            self.now.launches += 1
            self.now.programs += int(np.prod(grid))
            self.ranges = [
                (each.data_ptr(), each.data_ptr() + each.numel() * each.element_size(), name)
                for name, each in tensors.items() if isinstance(each, torch.Tensor) and each.numel() > 0
            ]  # fmt: skip
            launch(kernel, grid, tensors, constants, warps)

        def counted_load(ptrs: Any, mask: Any, *rest: Any) -> Any:
            self.note(ptrs, mask, self.now.loaded)
            return load(ptrs, mask, *rest)

        def counted_store(ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self.note(ptrs, mask, self.now.stored)
            return store(ptrs, value, mask, *rest)

        def counted_add(operation: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self.note(ptrs, mask, self.now.stored)
            return add(operation, ptrs, value, mask, *rest)

        triton_launch.launch = counted_launch
        for name, each in zip(names, (counted_load, counted_store, counted_add)):
            setattr(builder, name, each)
        try:
            yield
        finally:
            triton_launch.launch = launch
            for name in names:
                delattr(builder, name)

    def note(self, ptrs: Any, mask: Any, moved: collections.Counter) -> None:
        active = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)]
        kind = "others"
        if active.size:
            first = int(active.flat[0])
            name = next(name for begin, end, name in self.ranges if begin <= first < end)
            kind = KINDS.get(name.removesuffix("_2"), "others")
            moved[kind] += len(np.unique(active)) * ptrs.get_element_ty().primitive_bitwidth // 8
        if kind in ("rows", "sums"):
            self.now.lanes += ptrs.data.size
            self.now.idle += ptrs.data.size - active.size


def make(size: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Arguments of a lookup, with main_grad."""
    tokens, picks, rows, pre_columns, columns, cores = SIZES[size]
    g = torch.Generator().manual_seed(1)
    tables = [torch.nn.Parameter(torch.randn(rows, each, generator=g).to(dtype)) for each in (pre_columns, columns)]
    for table in tables:
        table.main_grad = torch.zeros(table.shape)  # type: ignore[attr-defined]
    return {
        "rows": torch.randint(0, rows, (tokens, picks), generator=g),
        "blocks": None,
        "scores": torch.randn(tokens, picks, cores, generator=g).requires_grad_(),
        "projected": torch.randn(tokens, pre_columns, generator=g).to(dtype).requires_grad_(),
        "pre_values": tables[0], "values": tables[1], "num_blocks": 1, "activation": "none",
    }  # fmt: skip


def bytes_of(size: str, deterministic: bool = True) -> dict[str, Any]:
    """Kernels by name, split into those of the forward and of the backward, and the least."""
    arguments = make(size)
    tokens, picks, _, pre_columns, columns, _ = SIZES[size]
    distinct = arguments["rows"].unique().numel()
    rows = tokens * picks * (pre_columns + columns) * 2
    sums = distinct * (pre_columns + columns) * 4
    result: dict[str, Any] = {"size": size, "tokens": tokens, "picks": tokens * picks, "distinct": distinct}
    watch = Watch()
    with watch.watching():
        out = triton_lookup.lookup(**arguments, deterministic=deterministic)
        result["forward"] = {name: each.result() for name, each in watch.kernels.items()}
        watch.kernels.clear()
        out.backward(torch.ones_like(out))
        result["backward"] = {name: each.result() for name, each in watch.kernels.items()}
    result["least"] = {"forward": {"rows": rows}, "backward": {"rows": rows, "sums": 2 * sums}}
    return result


def bytes_of_list(size: str) -> dict[str, Any]:
    """As ``bytes_of``, of the parts that a table sharded by row calls (``memory/row_sharded.py``), for picks in a list;
    the operations of PyTorch between them are not counted."""
    tokens, picks, rows, pre_columns, columns, cores = LISTS[size]
    g = torch.Generator().manual_seed(1)
    counts = torch.bincount(torch.randint(0, tokens, (tokens * picks,), generator=g), minlength=tokens)
    owners = torch.arange(tokens).repeat_interleave(counts)
    picked = ListedPicks(torch.randint(0, rows, (tokens * picks,), generator=g), owners, counts, None, 1)
    tables = [torch.randn(rows, each, generator=g).bfloat16() for each in (pre_columns, columns)]
    sums = [torch.zeros(table.shape) for table in tables]
    projected = torch.randn(tokens, pre_columns, generator=g).bfloat16()
    grad = torch.randn(tokens, 1, columns, generator=g).bfloat16()
    weights = torch.randn(tokens * picks, cores, generator=g)
    result: dict[str, Any] = {"size": size, "tokens": tokens, "picks": tokens * picks,
                              "distinct": picked.rows.unique().numel()}  # fmt: skip
    watch = Watch()
    with watch.watching():
        rho = triton_ragged.pre_scores(picked, projected, tables[0], torch.float32)
        triton_ragged.weighted_sum(picked, weights, tables[1])
        result["forward"] = {name: each.result() for name, each in watch.kernels.items()}
        watch.kernels.clear()
        triton_ragged.weighted_sum_backward(picked, weights, grad, tables[1], sums[1])
        triton_ragged.pre_scores_backward(picked, rho, projected, tables[0], sums[0])
        result["backward"] = {name: each.result() for name, each in watch.kernels.items()}
    read = tokens * picks * (pre_columns + columns) * 2
    again = (tokens * picks * pre_columns + result["distinct"] * columns) * 2
    added = result["distinct"] * (pre_columns + columns) * 4
    result["least"] = {"forward": {"rows": read}, "backward": {"rows": again, "sums": 2 * added}}
    return result


def total(kernels: dict[str, Any], kind: Optional[str] = None) -> int:
    """Bytes that ``kernels`` move, of one kind or of all."""
    return sum(
        count
        for each in kernels.values()
        for moved in (each["loaded"], each["stored"])
        for name, count in moved.items()
        if kind in (None, name)
    )


def print_bytes(result: dict[str, Any]) -> None:
    """A table of one size."""
    picks = result["picks"]
    print(f"\n{result['size']}: {picks} picks of {result['distinct']} distinct rows; bytes per pick")
    print("| kernel | programs | rows | sums | tokens | others | idle lanes |\n|---|---|---|---|---|---|---|")
    for part in ("forward", "backward"):
        for name, each in result[part].items():
            cells = [f"{total({name: each}, kind) / picks:.1f}" for kind in ("rows", "sums", "tokens", "others")]
            print(f"| `{name}` ({each['launches']}) | {each['programs']} | {' | '.join(cells)} | {each['idle']:.0%} |")
        least = sum(result["least"][part].values())
        memory = total(result[part]) - total(result[part], "tokens")
        print(f"{part}: least {least / picks:.1f}, rows + sums + others {memory / picks:.1f} ({memory / least:.2f}), "
              f"with tokens {total(result[part]) / picks:.1f}")  # fmt: skip


class CountOps(TorchDispatchMode):
    """Non-view ATen operations, and kernels by name; ``forward``: how many of them were before a backward."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter = collections.Counter()
        self.forward = 0

    def note(self, name: str) -> None:
        self.counts[name] += 1
        self.forward += torch._C._current_graph_task_id() < 0

    @contextmanager
    def with_kernels(self) -> Iterator[None]:
        """Count our kernels as one each, without running them: the interpreter takes minutes for a search."""
        launch = triton_launch.launch

        def counted(kernel: Any, grid: tuple, tensors: dict, constants: dict, warps: int) -> None:
            name = kernel.fn.__name__
            self.note(f"kernel {name}")
            for found in {"best_keys_kernel": ("keys",), "best_cells_kernel": ("rows", "columns")}.get(name, ()):
                np.asarray(tensors[found])[...] = 0  # valid places; numpy, which is not counted

        triton_launch.launch = counted
        try:
            with self:
                yield
        finally:
            triton_launch.launch = launch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        if not name.startswith(VIEWS):
            self.note(name)
        return func(*args, **(kwargs or {}))


def _one_norm(x: torch.Tensor, shape: Any, weight: Any = None, eps: Optional[float] = None) -> torch.Tensor:
    """A norm of one operation in either direction, as torch has on a GPU; on a CPU its RMS norm is made of eight."""
    return torch.nn.functional.layer_norm(x, list(shape), weight, None, eps or 1e-5)


def model_of(
    backend: str, layers: int, seq_length: int = 8, switches: tuple[str, ...] = ("--bf16",)
) -> tuple[Any, Any, Iterator[dict[str, torch.Tensor]]]:
    """Run, training state and batches of a narrow model with ``layers`` blocks; "dense" is a backend without memory
    layers."""
    from umv2_megatron.config.resolve import resolve
    from umv2_megatron.memory import layer
    from umv2_megatron.training import initialize, step

    layer.initialize_layer = lambda *_, **__: None  # it searches and looks up
    flags = {
        **{"model-preset": "umv2-227m-1.2b", "num-layers": layers, "tokenizer-type": "NullTokenizer"},
        **{"vocab-size": 1000, "train-iters": 2, "micro-batch-size": 1, "global-batch-size": 1},
        **{"seq-length": seq_length, "max-position-embeddings": seq_length, "transformer-impl": "local"},
        **{"num-attention-heads": 4, "num-query-groups": 4, "kv-channels": 24, "hidden-size": 96},
        **({"ffn-variant": "dense"} if backend == "dense" else {"memory-backend": backend, "memory-num-keys": 40}),
    }
    argv = [*switches, "--mock-data", "--use-distributed-optimizer"]
    argv += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    run = resolve(argv, 1, description="", checkpoint_values=None)
    if not torch.distributed.is_initialized():
        initialize.start_processes(run)
    state = initialize.build_training_state(run, 1000)
    step.connect(run, state.chunks, state.optimizer)
    batch = {name: torch.zeros(1, seq_length, dtype=torch.long) for name in ("tokens", "labels")}
    batch |= {"position_ids": torch.arange(seq_length).unsqueeze(0), "loss_mask": torch.ones(1, seq_length)}
    return run, state, (dict(batch) for _ in itertools.repeat(None))


def ops_of(backend: str, layers: int) -> dict[str, CountOps]:
    """Operations of a micro-batch of a model with ``layers`` blocks.

    "refresh" are those of u and t, once per optimizer step.
    """
    from umv2_megatron.model import one_pass
    from umv2_megatron.ops import cpu_attention, scatter
    from umv2_megatron.training import step

    torch.nn.functional.rms_norm = _one_norm  # numbers do not matter here
    one_pass._compiled = lambda *_: False  # as on a GPU
    cpu_attention.can = lambda *_: False
    scatter.CHUNK_ELEMENTS["cpu"] = scatter.CHUNK_ELEMENTS["cuda"]  # as on a GPU
    run, state, batches = model_of(backend, layers)
    counted = {"unused": CountOps(), "block": CountOps(), "refresh": CountOps()}
    with counted["unused"].with_kernels():  # what is made once
        step._run_schedule(run, state.chunks, batches, forward_only=False)
    with counted["block"].with_kernels():
        step._run_schedule(run, state.chunks, batches, forward_only=False)
    with counted["refresh"].with_kernels():
        step.refresh_singular_vectors(state.chunks)
    return {name: each for name, each in counted.items() if name != "unused"}


def ops_per_block(backend: str) -> dict[str, Any]:
    """The counts of one block, "block", and of one refresh, "refresh"; the share of a block's that are "forward", and
    how many are "around" the blocks."""
    few, many = ops_of(backend, 1), ops_of(backend, 3)
    found: dict[str, Any] = {
        part: {name: (many[part].counts[name] - few[part].counts[name]) / 2 for name in many[part].counts
               if many[part].counts[name] != few[part].counts[name]}
        for part in many
    }  # fmt: skip
    each = sum(found["block"].values())
    found["forward"] = (many["block"].forward - few["block"].forward) / 2 / each
    found["around"] = sum(few["block"].counts.values()) - each
    return found


class CountBytes(TorchDispatchMode):
    """Bytes that operations other than products of matrices and attention read and write, forward and backward."""

    PRODUCTS = ("mm.", "bmm.", "addmm", "baddbmm", "_scaled_dot_product")
    WRITE_ONLY = ("copy_", "fill_", "zero_", "zeros", "ones", "full", "new_zeros", "scalar_tensor", "arange")

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func).removeprefix("aten.")
        if not name.startswith((*VIEWS, *self.PRODUCTS)):
            read = list(args[1:] if name.startswith(self.WRITE_ONLY) else args)
            moved = [each for each in (*tree_leaves(read), *tree_leaves(result)) if isinstance(each, torch.Tensor)]
            count = sum(min(each.numel() * each.itemsize, each.untyped_storage().nbytes()) for each in moved)
            if torch._C._current_graph_task_id() >= 0:
                self.backward += count
            else:
                self.forward += count
        return result


def bytes_of_block(switches: tuple[str, ...]) -> dict[str, float]:
    """What a block without a memory layer moves beside its products, as PyTorch runs megatron-core's own modules on a
    CPU: bytes for each token, "forward" and "backward", and bytes for each parameter, "parameters"."""
    from umv2_megatron.training import step

    found: dict[tuple[int, int], CountBytes] = {}
    elements: dict[int, int] = {}
    for layers, length in itertools.product((1, 3), (32, 64)):
        run, state, batches = model_of("dense", layers, length, switches)
        elements[layers] = sum(each.numel() for chunk in state.chunks for each in chunk.parameters())
        step._run_schedule(run, state.chunks, batches, forward_only=False)
        with CountBytes() as found[layers, length]:
            step._run_schedule(run, state.chunks, batches, forward_only=False)

    def of_block(way: str, length: int) -> float:
        return (getattr(found[3, length], way) - getattr(found[1, length], way)) / 2

    per_token = {way: (of_block(way, 64) - of_block(way, 32)) / 32 for way in ("forward", "backward")}
    fixed = of_block("backward", 32) - 32 * per_token["backward"]
    return {**per_token, "parameters": fixed / ((elements[3] - elements[1]) / 2)}


def main(argv: Optional[list[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=[*SIZES, *LISTS], action="append",
                        help="sizes of the lookup; all without it")  # fmt: skip
    parser.add_argument("--only", choices=("bytes", "ops"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    if options.only != "ops":
        chosen = options.size or [*SIZES, *LISTS]
        results["bytes"] = [bytes_of_list(size) if size in LISTS else bytes_of(size) for size in chosen]
        for each in results["bytes"]:
            print_bytes(each)
    if options.only != "bytes":
        from umv2_megatron.parallel import cpu_platform

        cpu_platform.install()
        results["ops"] = {}
        results["block"] = {name: bytes_of_block(switches) for name, switches in PRECISIONS.items()}
        for name, each in results["block"].items():
            print(f"\na dense block in {name}, beside products: {each['forward']:,.0f} bytes per token forward, "
                  f"{each['backward']:,.0f} backward, {each['parameters']:.1f} per parameter backward")  # fmt: skip
        print("\n| block with | operations and kernels, forward + backward | added to the refresh of u and t |")
        print("|---|---|---|")
        for backend in ("dense", "scatter", "triton"):
            found = ops_per_block(backend)
            results["ops"][backend] = found
            print(f"| {backend} | {sum(found['block'].values()):.0f} | {sum(found['refresh'].values()):.0f} |")
    if options.json:
        options.json.write_text(json.dumps({"results": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
