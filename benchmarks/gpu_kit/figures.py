"""Figures of single operations: copies and matrix products, the table lookup and its backward, the two-stage top-K.

All of them run on a CPU, too, with ``dry``: tiny sizes, and Triton's kernels in its interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_kit.report import Record, peak_tflops
from benchmarks.text_table import Table

LOOKUPS = {  # tokens, picks, rows, Dp, Dv
    "umv2-227m": (8192, 32, 130_000, 192, 192),
    "umv2-1b": (8192, 128, 279_000, 384, 768),
}
SEARCHES = {"umv2-227m": (8192, 360, 32), "umv2-1b": (8192, 528, 128)}  # tokens, keys per side, K
CONTENDERS = (("triton", "ordered"), ("triton", "atomic"), ("scatter", "ordered"))
"""--memory-backend and --memory-backward."""


def place() -> str:
    """Where the figures are taken."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def milliseconds(work: Callable[[], Any], rounds: int, device: str = "cuda") -> list[float]:
    """Times of ``rounds`` calls, after three that warm up; the L2 cache of a GPU is cleared before each."""
    if device == "cpu":
        return [_on_cpu(work) for _ in range(rounds + 1)][1:]
    flush = torch.empty(256 << 20, dtype=torch.int8, device=device)
    times = []
    for number in range(rounds + 3):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if number >= 3:
            times.append(start.elapsed_time(end))
    return times


def _on_cpu(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def copy_bandwidth(device: str = "cuda", size: int = 1 << 30) -> float:
    """Bytes per second, read and written, of a copy of ``size`` bytes."""
    source = torch.zeros(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / (statistics.median(milliseconds(lambda: target.copy_(source), 20, device)) / 1e3)


def roofline(record: Record, dry: bool) -> None:
    """Copy bandwidth, and the rate of square matrix products in bfloat16, in float32 and in FP8 where there is one."""
    device, rounds = place(), 3 if dry else 20
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    figures: dict[str, Any] = {"device": name, "copy_gb_per_s": copy_bandwidth(device, 1 << (20 if dry else 30)) / 1e9}
    peak = peak_tflops(name)
    rows: list[tuple[str, ...]] = []
    for kind in ("bfloat16", "float32", "float8_e4m3fn"):
        if kind.startswith("float8") and (device == "cpu" or torch.cuda.get_device_capability() < (8, 9)):
            continue
        for side in (64, 128) if dry else (4096, 8192):
            ms = statistics.median(milliseconds(_product(kind, side, device), rounds, device))
            rate = 2 * side**3 / ms / 1e9
            figures[f"gemm_{kind}_{side}_tflops"] = rate
            share = f"{rate / peak:.0%}" if peak and kind == "bfloat16" else ""
            rows.append((f"{kind}, {side} x {side}", f"{ms:.3f}", f"{rate:.1f}", share))
        best = max(value for key, value in figures.items() if key.startswith("gemm_bfloat16"))
        columns = ("matrix product", "ms", "TFLOP/s", "of stated peak")
        title = f"Copy of {'1 MiB' if dry else '1 GiB'}: {figures['copy_gb_per_s']:.0f} GB/s read and written."
        key = f"copy {figures['copy_gb_per_s']:.0f} GB/s, bf16 {best:.1f} TFLOP/s"
        record.keep(key, figures, [Table(title, columns, rows)])


def _product(kind: str, side: int, device: str) -> Callable[[], Tensor]:
    left, right = (torch.randn(side, side, device=device).to(getattr(torch, kind)) for _ in range(2))
    if not kind.startswith("float8"):
        return lambda: left @ right
    one = torch.ones((), device=device)
    columns = right.t()  # column-major, as the product in FP8 wants its second factor
    return lambda: torch._scaled_mm(left, columns, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def lookup(record: Record, dry: bool) -> None:
    """Forward and backward of the lookup in bfloat16, into ``main_grad``, as shares of the copy bandwidth.

    Bytes are those of docs/kernels.md: the forward reads every picked row; the backward reads them again, and reads and
    writes a float32 row of the gradient for each distinct one.
    """
    device = place()
    bandwidth = copy_bandwidth(device, 1 << (20 if dry else 30))
    figures: dict[str, Any] = {"copy_gb_per_s": bandwidth / 1e9}
    rows: list[tuple[str, ...]] = []
    columns = ("lookup", "forward, ms", "of copy", "backward, ms", "of copy")
    title = "Table lookup in bfloat16, 8,192 tokens; share of the copy bandwidth by the bytes of rows that must move."
    for size, numbers in LOOKUPS.items():
        numbers = (3, 4, 50, 8, 8) if dry else numbers
        for backend, backward in CONTENDERS:
            found = lookup_times(backend, backward, numbers, bandwidth, device, 1 if dry else 20)
            name = f"{size}, {backend}" + (f", {backward}" if backend == "triton" else "")
            figures[name] = found
            rows.append((name, f"{found['forward_ms']:.3f}", f"{found['forward_share']:.0%}",
                         f"{found['backward_ms']:.3f}", f"{found['backward_share']:.0%}"))  # fmt: skip
            first = figures[f"{next(iter(LOOKUPS))}, triton, ordered"]
            key = f"triton: forward {first['forward_share']:.0%}, backward {first['backward_share']:.0%} of copy"
            record.keep(key, figures, [Table(title, columns, rows)])


def lookup_times(
    backend: str, backward: str, sizes: tuple[int, ...], bandwidth: float, device: str, rounds: int
) -> dict[str, float]:
    """Medians in milliseconds, and shares of ``bandwidth`` (bytes per second), of one lookup.

    Args:
        backend, backward: --memory-backend and --memory-backward.
        sizes: tokens, picks of a token, rows, Dp, Dv.
    """
    from umv2_megatron.ops import get_backend

    tokens, picks, num_rows, pre_columns, value_columns = sizes
    chosen = get_backend(backend, device, backward).lookup
    g = torch.Generator(device).manual_seed(1)
    rows = torch.randint(0, num_rows, (tokens, picks), generator=g, device=device)
    tables = [
        torch.nn.Parameter(torch.randn(num_rows, width, device=device).bfloat16())
        for width in (pre_columns, value_columns)
    ]
    for table in tables:
        table.main_grad = torch.zeros(table.shape, device=device)  # type: ignore[attr-defined]
    scores = torch.randn(tokens, picks, 2, generator=g, device=device).requires_grad_()
    projected = torch.randn(tokens, pre_columns, generator=g, device=device).bfloat16().requires_grad_()

    def forward() -> Tensor:
        return chosen(rows, None, scores, projected, *tables, 1, "none")

    with torch.no_grad():
        forward_ms = statistics.median(milliseconds(forward, rounds, device))
    out = forward()
    upstream = torch.ones_like(out)
    backward_ms = statistics.median(milliseconds(lambda: out.backward(upstream, retain_graph=True), rounds, device))
    row = 2 * (pre_columns + value_columns)  # bytes of a picked row of both tables in bfloat16
    read = tokens * picks * row
    added = 4 * rows.unique().numel() * row  # float32, read and written
    return {
        "forward_ms": forward_ms, "backward_ms": backward_ms,
        "forward_share": read / bandwidth / forward_ms * 1e3,
        "backward_share": (read + added) / bandwidth / backward_ms * 1e3,
    }  # fmt: skip


def topk(record: Record, dry: bool) -> None:
    """The two-stage search of one layer, by Triton's kernels and by PyTorch; bytes are those of the key scores."""
    from umv2_megatron.ops import search, triton_search

    device = place()
    bandwidth = copy_bandwidth(device, 1 << (20 if dry else 30))
    figures: dict[str, Any] = {}
    rows: list[tuple[str, ...]] = []
    for size, (tokens, keys, kept) in SEARCHES.items():
        tokens, keys, kept = (2, 9, 3) if dry else (tokens, keys, kept)
        g = torch.Generator(device).manual_seed(1)
        key_scores = torch.randn(2, 2, tokens, 1, keys, generator=g, device=device)
        u, t = torch.randn(2, 1, 2, generator=g, device=device)
        cores = torch.randn(1, 2, 2, generator=g, device=device)
        for name, chosen in (("triton", triton_search), ("PyTorch", search)):

            def work(chosen: Any = chosen, arguments: tuple = (key_scores, u, t, cores, kept)) -> Any:
                scores, left, right, sums, count = arguments
                return chosen.best_cells(scores, chosen.best_keys(scores, left, right, count), sums, count)

            ms = statistics.median(milliseconds(work, 1 if dry else 20, device))
            share = key_scores.numel() * 4 / bandwidth / ms * 1e3
            figures[f"{size}, {name}"] = {"ms": ms, "share_of_copy": share}
            rows.append((f"{size}, {name}", f"{ms:.3f}", f"{share:.0%}"))
    title = "Two-stage top-K of one layer, 8,192 tokens, float32; share of copy bandwidth by the bytes of key scores."
    first, other = (figures[f"{next(iter(SEARCHES))}, {name}"]["ms"] for name in ("triton", "PyTorch"))
    key = f"triton {first:.3f} ms, PyTorch {other:.3f} ms"
    record.keep(key, figures, [Table(title, ("search", "ms", "of copy"), rows)])
