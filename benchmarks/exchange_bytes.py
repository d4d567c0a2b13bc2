"""Bytes that memory-parallel ranks send per token, forward and backward, counted in real exchanges between processes.

    python benchmarks/exchange_bytes.py            all K, M, modes and row sizes below, about half a minute on 2 cores
    python benchmarks/exchange_bytes.py --json exchange.json --dtype float32

One memory layer runs forward and backward over gloo for every case; its exchanges count what they send to other ranks
(umv2_megatron/parallel/exchange.py). The prediction beside it is that of umv2_megatron/planning/exchange.py, for even
picks. Bytes do not depend on the machine. docs/memory-parallel.md explains the table.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from umv2_megatron.parallel import cpu_platform  # noqa: E402

cpu_platform.install()

from umv2_megatron.config.memory_config import MemoryConfig  # noqa: E402

TOPK = (32, 128, 256, 768)
SIZES = (2, 4)
MODES = ("dim", "row")
# Dp and Dv of the paper's 500M/6B, 227M/1.2B and 1B/7B models
ROWS = ((72, 216), (192, 192), (384, 768))
NUM_KEYS, HIDDEN, TOKENS = 160, 64, 32


def memory_config(topk: int, size: int, mode: str, pre_value_dim: int, value_dim: int) -> MemoryConfig:
    """A memory layer whose exchanges are those of a large model: only T, K, C, Dp, Dv, M and E matter for them."""
    return MemoryConfig(
        num_keys=NUM_KEYS, key_dim=16, topk=topk, pre_value_dim=pre_value_dim, value_dim=value_dim,
        parallel_size=size, parallel_mode=mode,
    )  # fmt: skip


def measure(rank: int, size: int, port: int, dtype: torch.dtype, results: Any) -> None:
    """One rank: bytes sent per token by step, for every case of ``size`` ranks."""
    from umv2_megatron.config.table_shard import TableShard
    from umv2_megatron.memory.layer import MemoryLayer
    from umv2_megatron.parallel import groups

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    groups.initialize_groups(memory_parallel_size=size)
    for pre_value_dim, value_dim in ROWS:
        for topk in TOPK:
            for mode in MODES:
                config = memory_config(topk, size, mode, pre_value_dim, value_dim)
                shard = TableShard(mode, size, rank)
                layer = MemoryLayer(config, HIDDEN, 0, 1, HIDDEN, 1, params_dtype=dtype, shard=shard)
                generator = torch.Generator().manual_seed(rank)
                x = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
                layer(x).float().square().sum().backward()
                sent = {step: count / TOKENS for step, count in layer.table.exchange.sent.items()}
                results.put((rank, pre_value_dim, value_dim, topk, size, mode, sent))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run(dtype: torch.dtype) -> list[dict[str, Any]]:
    """All cases: bytes per token, mean over ranks, measured and predicted."""
    from umv2_megatron.planning.exchange import exchange_bytes

    context = multiprocessing.get_context("spawn")
    sums: dict[tuple, float] = {}
    for size in SIZES:
        results = context.Queue()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ranks = [context.Process(target=measure, args=(rank, size, port, dtype, results)) for rank in range(size)]
        for each in ranks:
            each.start()
        for _ in range(size * len(ROWS) * len(TOPK) * len(MODES)):
            _, *case, sent = results.get(timeout=300)
            sums[tuple(case)] = sums.get(tuple(case), 0.0) + sum(sent.values()) / size
        for each in ranks:
            each.join()
    cases = []
    for (pre_value_dim, value_dim, topk, size, mode), measured in sorted(sums.items()):
        config = memory_config(topk, size, mode, pre_value_dim, value_dim)
        predicted = exchange_bytes(config, mode, size, TOKENS, config.rows_per_layer, dtype.itemsize)
        cases.append(
            {"pre_value_dim": pre_value_dim, "value_dim": value_dim, "topk": topk, "memory_parallel_size": size,
             "mode": mode, "measured": measured, "predicted": sum(predicted.values()) / TOKENS}
        )  # fmt: skip
    return cases


def table(cases: list[dict[str, Any]]) -> str:
    """Dim and row mode side by side."""
    found = {(c["pre_value_dim"], c["value_dim"], c["memory_parallel_size"], c["topk"], c["mode"]): c for c in cases}
    lines = ["  Dp + Dv   M    K   dim (predicted)    row (predicted)    row/dim"]
    for key in sorted({each[:-1] for each in found}):
        dim, row = found[(*key, "dim")], found[(*key, "row")]
        pre, value, size, topk = key
        lines.append(
            f"{pre:>4} +{value:>4}  {size:>2} {topk:>4}  {dim['measured']:>7.0f} ({dim['predicted']:>7.0f})"
            f"  {row['measured']:>7.0f} ({row['predicted']:>7.0f})   {row['measured'] / dim['measured']:>7.2f}"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of tables and inputs")
    parser.add_argument("--json", type=Path, help="write the cases there, too")
    options = parser.parse_args(argv)
    cases = run(getattr(torch, options.dtype))
    print(f"bytes sent per rank, token and memory layer, forward + backward, {options.dtype}, C = 2, one head")
    print(table(cases))
    if options.json:
        options.json.write_text(json.dumps(cases, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
