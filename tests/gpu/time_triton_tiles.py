"""Times the Triton lookup on a GPU with other tile sizes than the arithmetic gives, against the copy bandwidth.

    python tests/gpu/time_triton_tiles.py                     umv2-227m: 8,192 tokens, 130,000 rows of 192, K 32
    python tests/gpu/time_triton_tiles.py --size 1b           384 and 768 columns, K 128
    python tests/gpu/time_triton_tiles.py --json tiles.json

Not a test: run it once per kind of GPU, and change the constants at the top of ops/triton_launch.py where another
candidate is clearly faster. Candidates and what they trade: docs/kernels.md. Share of bandwidth: bytes of rows that
must move, over the time, over the bandwidth of a copy of 1 GiB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu_kit.figures import copy_bandwidth, milliseconds  # noqa: E402

SIZES = {  # tokens, picks, rows, Dp, Dv
    "227m": (8192, 32, 130_000, 192, 192),
    "1b": (8192, 128, 279_000, 384, 768),
}
CANDIDATES: list[dict[str, int]] = [
    {},
    *({"TILE_ELEMENTS": elements} for elements in (1024, 2048, 8192)),
    *({"ELEMENTS_PER_WARP": elements} for elements in (512, 2048)),
    {"TILE_ELEMENTS": 2048, "ELEMENTS_PER_WARP": 512},
    {"TILE_ELEMENTS": 8192, "ELEMENTS_PER_WARP": 2048},
    *({"SEGMENTS": rows} for rows in (2, 4, 16)),
    {"SEGMENTS": 16, "ELEMENTS_PER_WARP": 2048},
    *({"PIECE": picks} for picks in (32, 512)),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="227m")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("time_triton_tiles.py needs a CUDA device", file=sys.stderr)
        return 2
    from umv2_megatron.ops import triton_launch, triton_lookup

    tokens, picks, num_rows, pre_columns, columns = SIZES[options.size]
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copies {bandwidth / 1e9:.0f} GB/s; {options.size}, {tokens} tokens")
    g = torch.Generator(device="cuda").manual_seed(1)
    rows = torch.randint(0, num_rows, (tokens, picks), generator=g, device="cuda")
    distinct = rows.unique().numel()
    tables = [
        torch.nn.Parameter(torch.randn(num_rows, each, device="cuda").bfloat16()) for each in (pre_columns, columns)
    ]
    for table in tables:
        table.main_grad = torch.zeros(table.shape, device="cuda")  # type: ignore[attr-defined]
    scores = torch.randn(tokens, picks, 2, generator=g, device="cuda").requires_grad_()
    projected = torch.randn(tokens, pre_columns, generator=g, device="cuda").bfloat16().requires_grad_()
    row = 2 * (pre_columns + columns)  # bytes of a picked row of both tables in bfloat16; 4 times that in a gradient
    results = []
    for candidate in CANDIDATES:
        before = {name: getattr(triton_launch, name) for name in candidate}
        for name, value in candidate.items():
            setattr(triton_launch, name, value)
        for deterministic in (True, False):
            def forward(deterministic: bool = deterministic) -> torch.Tensor:
                return triton_lookup.lookup(rows, None, scores, projected, *tables, 1, "none", deterministic)

            with torch.no_grad():
                forward_ms = statistics.median(milliseconds(forward, options.rounds))
            out = forward()
            upstream = torch.ones_like(out)
            backward = milliseconds(lambda out=out, up=upstream: out.backward(up, retain_graph=True), options.rounds)
            backward_ms = statistics.median(backward)
            least = distinct * row  # each distinct row once; with a cache too small for reuse, every pick
            result = {
                **candidate, "deterministic": deterministic, "forward_ms": forward_ms, "backward_ms": backward_ms,
                "forward_share_of_copy": tokens * picks * row / bandwidth / forward_ms * 1e3,
                "backward_share_of_copy": (tokens * picks * row + 4 * least) / bandwidth / backward_ms * 1e3,
            }  # fmt: skip
            results.append(result)
            print(
                f"{str(candidate or 'as in triton_launch.py'):52s} {'sorted' if deterministic else 'atomic'}  "
                f"forward {forward_ms:7.3f} ms ({result['forward_share_of_copy']:4.0%} of copy)  "
                f"backward {backward_ms:7.3f} ms ({result['backward_share_of_copy']:4.0%})"
            )
        for name, value in before.items():
            setattr(triton_launch, name, value)
    if options.json:
        options.json.write_text(json.dumps({"bandwidth": bandwidth, "results": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
