"""Choose the rows of value tables that new documents pick more than other documents do, to train them alone.

    python tools/select_rows.py count --load runs/base --data-path data/new_text_document --output new.safetensors
    python tools/select_rows.py count --load runs/base --data-path data/corpus_text_document --batches 1000 \\
        --output background.safetensors
    python tools/select_rows.py select --new new.safetensors --background background.safetensors --top-rows 500 \\
        --output rows.safetensors
    torchrun pretrain_umv2.py --load runs/base --finetune --trainable rows --trainable-rows rows.safetensors ...

`count` runs the model over batches of a corpus, on one rank or under torchrun; `select` ranks rows by tf-idf
(arXiv 2510.15103) and needs no model. docs/sparse-finetuning.md explains both.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

from umv2_megatron.config.usage import UsageError
from umv2_megatron.evaluation.evaluate_flags import LAYOUT
from umv2_megatron.training.program import run_program
from umv2_megatron.training.tool_entry import program_name


def main(argv: list[str]) -> int:
    """Parse, check, count or select; returns the exit code."""
    arguments = parser().parse_args(argv)
    for name in ("batches", "batch_size", "micro_batch_size", "top_rows", *LAYOUT):
        value = getattr(arguments, name, None)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {value}; expected 1 or more")
    if arguments.output.is_dir() or not arguments.output.resolve().parent.is_dir():
        raise UsageError(f"--output is {str(arguments.output)!r}; expected a file's name in a directory that is there")
    arguments.work(arguments)
    return 0


def count(arguments: argparse.Namespace) -> None:
    """Run the model over batches of a corpus and write how often it picked each row."""
    from umv2_megatron.parallel import cpu_platform

    cpu_platform.install()  # before megatron.core is imported
    import dataclasses

    import torch

    from umv2_megatron.config.memory_checks import check_split_tokens
    from umv2_megatron.data.datasets import build_datasets, check_corpora
    from umv2_megatron.data.indexing import fingerprint
    from umv2_megatron.evaluation.row_usage import count_rows
    from umv2_megatron.training.restore import restore_model

    layout = {name: getattr(arguments, name) for name in LAYOUT if getattr(arguments, name) is not None}
    layout |= {
        "sequence_parallel": arguments.sequence_parallel,
        "global_batch_size": arguments.batch_size,
        "micro_batch_size": arguments.micro_batch_size,
    }
    if arguments.memory_parallel_mode is not None:
        layout["memory_parallel_mode"] = arguments.memory_parallel_mode
    restored = restore_model(arguments.load, arguments.ckpt_step, arguments.tokenizer_model, layout)
    run = restored.run
    if not run.has_memory:
        raise UsageError(f"--load is {arguments.load}, a model without memory layers; expected one with value tables")
    check_split_tokens(run)
    data = dataclasses.replace(
        run.data,
        data_path=None,
        train_data_path=arguments.data_path,
        valid_data_path=None,
        test_data_path=None,
        data_cache_path=arguments.data_cache_path,
        num_workers=0,
    )
    try:
        data.validate()
        (blend, _, _) = data.split_blends()
        assert blend is not None
        indices = check_corpora(data, restored.tokenizer)
    except ValueError as error:
        raise UsageError(str(error).replace("--train-data-path", "--data-path")) from error
    batches = arguments.batches
    if batches is None:
        if len(indices) > 1:
            raise UsageError("--batches is missing; expected a number of batches with more than one corpus")
        tokens = sum(int(index.lengths.sum()) for index in indices.values())
        batches = max(1, (tokens - 1) // run.model.seq_length // arguments.batch_size)
    samples = batches * arguments.batch_size
    dataset = build_datasets(data, restored.tokenizer, run.model.seq_length, arguments.seed, (samples, 0, 0))[0]
    usage = count_rows(restored, dataset, batches)
    if torch.distributed.get_rank() == 0:
        origin = {
            **_checkpoint(arguments.load, restored.iteration),
            "corpora": [{"path": prefix, "fingerprint": fingerprint(prefix)} for prefix in blend[0]],
            "weights": blend[1],
            "batch_size": arguments.batch_size,
            "sequence_length": run.model.seq_length,
            "seed": arguments.seed,
        }
        dataclasses.replace(usage.counts, origin=origin).write(arguments.output)
        print(
            f"wrote {arguments.output}: picks of {len(usage.counts.picks)} tables in {batches} batches of "
            f"{arguments.batch_size} x {run.model.seq_length} tokens; loss {usage.loss:.4f}; a batch picks "
            f"{usage.share:.1%} of the rows"
        )
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _checkpoint(directory: str, iteration: int) -> dict[str, Any]:
    from umv2_megatron.checkpoint.contents import locate
    from umv2_megatron.checkpoint.manifest import MANIFEST
    from umv2_megatron.durable_files import sha256_of

    store, iteration = locate(directory, iteration)
    return {
        "checkpoint": directory,
        "iteration": iteration,
        "manifest_sha256": sha256_of(store.path(iteration) / MANIFEST),
    }


def select(arguments: argparse.Namespace) -> None:
    """Rank the rows of each table by tf-idf and write the best."""
    from umv2_megatron.durable_files import sha256_of
    from umv2_megatron.memory.row_counts import RowCounts, RowSelection, highest, tf_idf

    try:
        new, background = (RowCounts.read(f"--{name}", getattr(arguments, name)) for name in ("new", "background"))
        known = [each.origin.get("manifest_sha256") for each in (new, background)]
        if known[0] != known[1]:
            raise ValueError(
                f"--new is {arguments.new}, counted with {new.origin.get('checkpoint')}, and --background is "
                f"{arguments.background}, counted with {background.origin.get('checkpoint')}; expected one checkpoint"
            )
        scores = tf_idf(new, background)
    except ValueError as error:
        raise UsageError(str(error)) from error
    rows = highest(scores, arguments.top_rows)
    origin: dict[str, Any] = {
        "rank": "tf-idf",
        "top_rows": arguments.top_rows,
        **{key: new.origin[key] for key in ("checkpoint", "iteration", "manifest_sha256") if key in new.origin},
        "new": {**new.origin, "sha256": sha256_of(Path(arguments.new))},
        "background": {**background.origin, "sha256": sha256_of(Path(arguments.background))},
    }
    RowSelection(rows, origin).write(arguments.output)
    print("memory layer      rows  selected  of new picks  of background picks")
    for layer, chosen in rows.items():
        shares = [float(each.picks[layer][chosen].sum() / each.picks[layer].sum().clamp(min=1))
                  for each in (new, background)]  # fmt: skip
        print(f"{layer:>12}  {len(scores[layer]):>8,}  {len(chosen):>8,}  {shares[0]:>12.1%}  {shares[1]:>19.1%}")
    print(f"wrote {arguments.output}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parts = made.add_subparsers(required=True, metavar="count|select")
    counting = parts.add_parser("count", help="count picks by row over a corpus", allow_abbrev=False)
    counting.set_defaults(work=count)
    counting.add_argument("--load", required=True, metavar="DIR", help="directory of checkpoints, or one iter_* in it")
    counting.add_argument("--ckpt-step", type=int, help="iteration to load (default: the newest valid one)")
    counting.add_argument("--tokenizer-model", metavar="FILE", help="where the tokenizer's file has moved")
    counting.add_argument(
        "--data-path", nargs="+", required=True, metavar="PATH", help="corpora, with weights or without, as in training"
    )
    counting.add_argument("--data-cache-path", metavar="DIR", help="as in training")
    counting.add_argument("--batches", type=int, help="to read, shuffled (default: one pass over one corpus)")
    counting.add_argument("--batch-size", type=int, default=8, help="sequences of a batch of all ranks (default: 8)")
    counting.add_argument("--micro-batch-size", type=int, default=1, help="of one rank's forward pass (default: 1)")
    counting.add_argument("--seed", type=int, default=1234, help="of the order (default: 1234)")
    counting.add_argument("--output", type=Path, required=True, metavar="FILE", help="file of counts to write")
    group = counting.add_argument_group("layout on the ranks of torchrun")
    for name in LAYOUT:
        group.add_argument("--" + name.replace("_", "-"), type=int, metavar="N", help="as in training (default: 1)")
    group.add_argument("--memory-parallel-mode", choices=("dim", "row"), help="as in training")
    group.add_argument("--sequence-parallel", action="store_true", help="as in training")
    selecting = parts.add_parser("select", help="choose rows from counts", allow_abbrev=False)
    selecting.set_defaults(work=select)
    selecting.add_argument("--new", required=True, metavar="FILE", help="counts of the documents to learn")
    selecting.add_argument("--background", required=True, metavar="FILE", help="counts of documents known already")
    selecting.add_argument(
        "--top-rows", type=int, required=True, metavar="N", help="rows of each table, those with the highest tf-idf"
    )
    selecting.add_argument("--output", type=Path, required=True, metavar="FILE", help="file of rows to write")
    for each in (counting, selecting):
        each.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return made


def run() -> NoReturn:
    """The program."""
    run_program(main, sys.argv[1:], program_name())
