"""Every parallel layout against one rank: 20 steps from one saved state, losses, gradient norms and table gradients.

    make layouts                                  the whole matrix, as a table (about 15 minutes on 2 cores)
    python tests/functional/layout_matrix.py --only tp2 m4-row

A layout saves after its first step, where the first moments of the value tables are (1 - beta1) times their gradients,
clipped; and it is resumed from there by the same command. So gradients are compared wherever mcore keeps their shards,
with the clipping undone (the norm, which differs in its last bits, is compared by itself).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from program_runs import tiny_run, train  # noqa: E402

STEPS = 20
VOCABULARY = 1024
"""Padded vocabulary of all layouts: its multiple depends on the tensor-parallel size otherwise."""
LIMITS = {"loss": 1e-5, "grad norm": 1e-5, "table gradient": 1e-6}
TENSOR_LIMITS = {**LIMITS, "table gradient": 2e-6}
"""With tensor parallelism mcore's products are summed in another order in every block, and the fp32 rounding errors of
both sides differ; 1.0e-6 to 1.2e-6 is what comes out with whole tables, too."""
NGRAM_LIMITS = {**TENSOR_LIMITS, "grad norm": 1e-3}
"""The gate of n-gram layers has the slope of a square root at 0, up to 500: where a score is nearly 0, its rounding
error moves the gradient. tests/distributed/test_split_tokens.py compares all gradients of one layer in float64."""
SEEDS = (7, 8, 9)
"""Of the starts. Where the best K keys or cells tie but for the last bits, a layout may pick another row than one rank
does, and losses part by 1e-5 or more from one step to the next: fp32 cannot tell which pick is right. A layout that
parts is therefore tried from the next start; an error in it would show from each."""
IN_PARTS = (("memory_exchange_parts", 3),)
"""Of layouts by row with the distributed optimizer; those without it send everything at once."""
LEARNING_RATE = 1e-4
"""Small, because Adam turns rounding errors of gradients near 0 into steps of this size."""


@dataclass(frozen=True)
class Layout:
    """One layout; ``tp`` 2 comes with and without sequence parallelism."""

    world: int = 1
    tp: int = 1
    sp: bool = False
    pp: int = 1
    cp: int = 1
    m: int = 1
    mode: str = "dim"
    distributed_optimizer: bool = False
    sharing: str = "none"
    """Which layers share tables; or "engram": layers of n-grams; or "both": such layers beside those of umv2."""
    extra: tuple[tuple[str, Any], ...] = ()
    """Further settings, such as recomputation."""

    @property
    def is_legal(self) -> bool:
        """Whether the sizes fit each other."""
        return self.world % (self.tp * self.pp * self.cp) == 0 and self.world // self.pp % self.m == 0

    @property
    def limits(self) -> dict[str, float]:
        """Largest differences allowed."""
        if self.tp == 1:
            return LIMITS
        return NGRAM_LIMITS if self.sharing in ("engram", "both") else TENSOR_LIMITS

    @property
    def name(self) -> str:
        """Words that ``--only`` looks for."""
        dp = self.world // (self.tp * self.pp * self.cp)
        words = [f"tp{self.tp}{'+sp' if self.sp else ''}", f"pp{self.pp}", f"cp{self.cp}", f"dp{dp}"]
        words += ["m1" if self.m == 1 else f"m{self.m}-{self.mode}"]
        words += ["distopt" if self.distributed_optimizer else "opt", self.sharing]
        return " ".join(words + [f"{key}={value}" for key, value in self.extra])

    def settings(self) -> dict[str, Any]:
        """Flags of this layout."""
        return {
            "tensor_model_parallel_size": self.tp,
            "sequence_parallel": self.sp,
            "pipeline_model_parallel_size": self.pp,
            "context_parallel_size": self.cp,
            "memory_parallel_size": self.m,
            "memory_parallel_mode": self.mode if self.m > 1 else None,
            "use_distributed_optimizer": self.distributed_optimizer,
            "overlap_grad_reduce": self.distributed_optimizer,
            "overlap_param_gather": self.distributed_optimizer,
            "make_vocab_size_divisible_by": VOCABULARY // self.tp,
            **sharing_settings(self.sharing),
            **dict(self.extra),
        }


ENGRAM = {
    "ffn_variant": "engram", "memory_num_heads": 4, "memory_num_keys": 24, "memory_value_dim": 16,
    "memory_layer_freq": "[1,1,1,0]",
}  # fmt: skip


BOTH = {
    "engram_num_heads": 4, "engram_num_keys": 24, "engram_value_dim": 16, "engram_layer_freq": "[1,0,1,0]",
    "memory_layer_freq": "[1,1,0,1]",
}  # fmt: skip


def sharing_settings(sharing: str) -> dict[str, Any]:
    """Flags of a sharing pattern; blocks of two layers, so that one fits into a pipeline stage. Of n-grams, three
    layers on two stages; of both kinds, a block with both, and blocks with one."""
    if sharing in ("engram", "both"):
        return ENGRAM if sharing == "engram" else BOTH
    return {} if sharing == "none" else {"memory_sharing": sharing, "memory_sharing_size": 2}


def all_layouts() -> list[Layout]:
    """Every legal combination, on 4 ranks; those that need 8 with the distributed optimizer only."""
    found = []
    shards = [(1, "dim"), *itertools.product((2, 4), ("dim", "row"))]
    tensor = [(1, False), (2, False), (2, True)]
    for (tp, sp), pp, cp, (m, mode), distributed, sharing in itertools.product(
        tensor, (1, 2), (1, 2), shards, (False, True), ("none", "block", "engram")
    ):
        if sharing == "engram" and cp > 1:
            continue
        extra = IN_PARTS if mode == "row" and distributed else ()
        fitting = [
            layout
            for world in (1, 2, 4)
            if (layout := Layout(world, tp, sp, pp, cp, m, mode, distributed, sharing, extra)).is_legal
        ]
        if not fitting and distributed:
            layout = Layout(8, tp, sp, pp, cp, m, mode, True, sharing, extra)
            fitting = [layout] if layout.is_legal else []
        found += fitting[-1:]
    return [layout for layout in found if layout.world > 1]


class Matrix:
    """Runs layouts from a saved state below ``folder`` and compares them with one rank that started there, too.

    Unless ``resumed``, a run saves after every step instead of going on in another process after the first one.
    """

    def __init__(self, folder: Path, steps: int = STEPS, resumed: bool = True) -> None:
        self.folder, self.steps, self.resumed, self.seed = folder, steps, resumed, SEEDS[0]
        self._references: dict[tuple[int, str], dict[str, Any]] = {}

    def agreement(self, layout: Layout) -> tuple[dict[str, float], int, list[str]]:
        """(differences, starts tried, limits that are missed from every start)."""
        for self.seed in SEEDS:
            figures = self.compare(layout)
            missed = [name for name, limit in layout.limits.items() if not figures[name] <= limit]
            if not missed:
                break
        return figures, SEEDS.index(self.seed) + 1, missed

    def compare(self, layout: Layout) -> dict[str, float]:
        """Largest relative differences of losses and gradient norms, and that of the gradient of all tables (L2)."""
        expected, found = self._reference(layout.sharing), self._run(layout)
        tables = expected["tables"]
        assert tables.keys() == found["tables"].keys() and tables
        return {
            "loss": _largest(expected["losses"], found["losses"]),
            "grad norm": _largest(expected["norms"], found["norms"]),
            "table gradient": (_square(tables, found["tables"]) / _square(tables)) ** 0.5,
        }

    def _reference(self, sharing: str) -> dict[str, Any]:
        if (self.seed, sharing) not in self._references:
            start = self._start(sharing)
            settings = {**sharing_settings(sharing), "save": start, "train_iters": 1}
            train(1, self._argv(settings), start.parent)
            self._references[self.seed, sharing] = self._run(Layout(sharing=sharing))
        return self._references[self.seed, sharing]

    def _start(self, sharing: str) -> Path:
        return self.folder / str(self.seed) / f"start-{sharing}"

    def _argv(self, settings: dict[str, Any]) -> list[str]:
        common = {
            "num_layers": 4,
            "seed": self.seed,
            "memory_seed": self.seed,
            # few tokens, few ties
            "seq_length": 16,
            "max_position_embeddings": 16,
            "micro_batch_size": 1,
            "global_batch_size": 4,
            "lr": LEARNING_RATE,
            "min_lr": LEARNING_RATE,
            "make_vocab_size_divisible_by": VOCABULARY,
        }
        return tiny_run(**{**common, **settings})

    def _run(self, layout: Layout) -> dict[str, Any]:
        from umv2_megatron.training.metrics import read_metrics

        save = self.folder / str(self.seed) / f"{layout.world}-{layout.name}".replace(" ", "_")
        settings = {
            "save": save,
            "load": self._start(layout.sharing),
            "finetune": True,
            "train_iters": self.steps,
            **layout.settings(),
        }
        log = self.folder / "logs" / save.name
        train(layout.world, self._argv({**settings, ("exit_interval" if self.resumed else "save_interval"): 1}), log)
        tables = table_moments(save / "iter_0000001")
        if self.resumed:
            train(layout.world, self._argv(settings), log)
        steps = [line for line in read_metrics(save) if "lm loss" in line]
        assert [line["iteration"] for line in steps] == list(range(1, self.steps + 1)), steps
        norms = [line["grad-norm"] for line in steps]
        assert norms[0] > 1, "the first step was not clipped"
        return {
            "losses": [line["lm loss"] for line in steps],
            "norms": norms,
            "tables": {key: moment * norms[0] for key, moment in tables.items()},
        }


def table_moments(checkpoint: Path) -> dict[str, Any]:
    """First moments of all value tables in a checkpoint, whole, by key."""
    import torch
    from torch.distributed import checkpoint as dcp

    from umv2_megatron.checkpoint.torch_dist_io import read_metadata_safely

    sizes = read_metadata_safely(checkpoint).state_dict_metadata
    wanted = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in sizes.items()
        if ".exp_avg." in key and (key.endswith("table.values") or key.endswith("table.pre_values"))
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group here
        dcp.load(wanted, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)
    return wanted


def _square(tables: dict[str, Any], others: dict[str, Any] | None = None) -> float:
    """Sum of squares of all tables, or of their differences from ``others``."""
    return sum(
        float((table - others[key] if others else table).double().square().sum()) for key, table in tables.items()
    )


def _largest(expected: list[float], found: list[float]) -> float:
    return max(abs(a - b) / abs(a) for a, b in zip(expected, found, strict=True))


def main(argv: list[str]) -> int:
    """Run the matrix and print it; 1 when a layout misses a limit or fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], help="words that a layout's name must contain")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args(argv)
    chosen = [each for each in all_layouts() if set(options.only) <= set(each.name.split())]
    print(f"{len(chosen)} layouts, {options.steps} steps of umv2-tiny (4 blocks, fp32, gloo), against one rank")
    head = f"{'ranks':>5}  {'layout':<44} {'loss':>9} {'grad norm':>10} {'table grad':>11} {'starts':>6} {'s':>5}"
    print(head, flush=True)
    failed, rows = 0, []
    with tempfile.TemporaryDirectory() as folder:
        matrix = Matrix(Path(folder), options.steps)
        for layout in chosen:
            begin = time.monotonic()
            try:
                figures, starts, missed = matrix.agreement(layout)
            except AssertionError as error:
                failed += 1
                print(f"{layout.world:>5}  {layout.name:<44} FAILED {str(error)[-600:]}", flush=True)
                continue
            failed += bool(missed)
            numbers = " ".join(f"{figures[name]:>{width}.1e}" for name, width in zip(LIMITS, (9, 10, 11)))
            seconds = time.monotonic() - begin
            verdict = f"  over the limit: {', '.join(missed)}" if missed else ""
            print(f"{layout.world:>5}  {layout.name:<44} {numbers} {starts:>6} {seconds:>5.1f}{verdict}", flush=True)
            rows.append({**dataclasses.asdict(layout), **figures, "starts": starts})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    worst = {name: max((row[name] for row in rows), default=0.0) for name in LIMITS}
    print("worst: " + ", ".join(f"{name} {value:.1e}" for name, value in worst.items()))
    again = sum(row["starts"] > 1 for row in rows)
    print(f"{len(chosen) - failed} of {len(chosen)} layouts agree with one rank, {again} not from the first start")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
