"""Flags of the program that evaluates models, and the checks that need no model.

Here, below `commands/`, because plans of ablations hold these flags and are checked before the first trial.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from umv2_megatron.config.data_config import PLAIN_TOKENIZER_TYPES
from umv2_megatron.evaluation.local_export import MEMORY_TABLES
from umv2_megatron.evaluation.tasks import fact_recall, mixture
from umv2_megatron.evaluation.tasks.base import FORMS, SYMBOLS
from umv2_megatron.evaluation.tasks.context_tasks import COUNTED

DATA_FORMS = ("stream", "documents")
ITEM_FLAGS = {"key-value": "--num-pairs", "multi-round": "--num-rounds", "icl": "--num-shots"}
"""Of tasks whose number of items may be given; the names are those of ``COUNTED``."""
DTYPES = ("bfloat16", "float32")
LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "memory_parallel_size",
)
# Flags that one of the two kinds of models reads; beside the other one they are refused, not ignored.
LOAD_ONLY = ("ckpt_step", *LAYOUT, "memory_parallel_mode", "sequence_parallel")
HF_MODEL_ONLY = ("trust_remote_code", "dtype", "memory_tables", "tokenizer_type", "vocab_size")


def parser(description: str) -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    group = made.add_argument_group("model")
    group.add_argument("--load", metavar="DIR", help="directory of checkpoints, or one iter_* in it")
    group.add_argument("--ckpt-step", type=int, help="iteration to load (default: the newest valid one)")
    group.add_argument("--hf-model", metavar="DIR", help="directory of a Hugging Face model")
    group.add_argument("--trust-remote-code", action="store_true", help="run Python code that --hf-model brings")
    group.add_argument("--dtype", choices=DTYPES, help="of --hf-model (default: float32)")
    group.add_argument(
        "--memory-tables",
        choices=MEMORY_TABLES,
        help="of an export of ours: where value tables stay; mmap reads picked rows from the files (default: device)",
    )
    group.add_argument("--tokenizer-type", choices=PLAIN_TOKENIZER_TYPES, help="for --hf-model without tokenizer files")
    group.add_argument("--tokenizer-model", metavar="FILE", help="its file; for --load: where that has moved")
    group.add_argument("--vocab-size", type=int, help="as in training, for --tokenizer-type")
    group.add_argument("--micro-batch-size", type=int, default=8, help="rows per rank and forward pass (default: 8)")
    group = made.add_argument_group("layout of --load on the ranks of torchrun")
    for name in LAYOUT:
        group.add_argument("--" + name.replace("_", "-"), type=int, metavar="N", help="as in training (default: 1)")
    group.add_argument("--memory-parallel-mode", choices=("dim", "row"), help="as in training")
    group.add_argument("--sequence-parallel", action="store_true", help="as in training")
    group = made.add_argument_group("texts")
    group.add_argument("--data", nargs="+", metavar="PATH", help="corpora (without extension), JSONL or text files")
    group.add_argument("--data-form", choices=DATA_FORMS, default="stream", help="join documents or not")
    group.add_argument("--data-context-length", type=int, help="tokens a window reads (default: as trained)")
    group.add_argument("--stride", type=int, help="tokens by which windows move on (default: the context length)")
    group.add_argument("--max-tokens", type=int, help="read so many tokens at most of each text")
    group.add_argument("--no-append-eod", action="store_true", help="score no end-of-document tokens after texts")
    group = made.add_argument_group("tasks")
    group.add_argument("--tasks", metavar="A,B", help=f"'all' or some of {', '.join(mixture.TASKS)}")
    group.add_argument(
        "--forms",
        choices=(*FORMS, "both", SYMBOLS),
        default="both",
        help="of the questions; symbols: those of make_tasks.py --preset learnable (default: both)",
    )
    group.add_argument("--context-lengths", metavar="N,N", help="tokens of context (default: as trained)")
    group.add_argument("--difficulty", default="1", metavar="N,N", help="what it counts depends on the task")
    for name, counted in COUNTED.items():
        group.add_argument(
            ITEM_FLAGS[name],
            metavar="N,N",
            help=f"{counted} in a context of {name}, told again to fill it (default: as many as fit)",
        )
    group.add_argument("--num-examples", type=int, default=100, help="of each task and length (default: 100)")
    group.add_argument("--no-choices", action="store_true", help="score the right answers alone: a quarter of the work")
    group.add_argument("--seed", type=int, default=1234, help="of the questions (default: 1234)")
    group = made.add_argument_group("facts: the same as given to tools/make_tasks.py")
    group.add_argument("--fact-seed", type=int, default=1, help="(default: 1)")
    group.add_argument(
        "--facts-per-frequency", type=int, default=64, metavar="N", help="a multiple of 64 (default: 64)"
    )
    group.add_argument("--max-fact-frequency", type=int, default=64, metavar="N", help="(default: 64)")
    group = made.add_argument_group("report")
    group.add_argument("--output", type=Path, metavar="FILE", help="JSON to write; plots get its name")
    group.add_argument("--label", help="name of the model in the plots (default: the directory's)")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return made


def check_flags(arguments: argparse.Namespace) -> None:
    """Raises ``ValueError`` naming a flag that cannot work with any model; looks at no file."""
    if (arguments.load is None) == (arguments.hf_model is None):
        raise ValueError("give one of --load, a directory of checkpoints, and --hf-model, a Hugging Face directory")
    if not arguments.data and not arguments.tasks:
        raise ValueError("nothing to evaluate: give --data, --tasks, or both")
    for name in ("num_examples", "micro_batch_size", "max_tokens", "data_context_length", "stride", *LAYOUT):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; expected 1 or more")
    if arguments.stride is not None and arguments.stride > (arguments.data_context_length or arguments.stride):
        limit = arguments.data_context_length
        raise ValueError(f"--stride is {arguments.stride}; expected at most --data-context-length ({limit})")
    foreign, owner = (HF_MODEL_ONLY, "--hf-model") if arguments.load is not None else (LOAD_ONLY, "--load")
    for name in foreign:
        value = getattr(arguments, name)
        if value is not None and value is not False:
            told = "given" if value is True else value
            raise ValueError(f"--{name.replace('_', '-')} is {told}; it belongs to {owner}: leave it out")
    if arguments.hf_model is not None:
        from umv2_megatron.parallel.launch import discover  # loads torch

        if discover().world_size > 1:
            raise ValueError("--hf-model runs on one rank; leave torchrun out")
        for name in ("tokenizer_model", "vocab_size"):
            value = getattr(arguments, name)
            if value is not None and arguments.tokenizer_type is None:
                raise ValueError(
                    f"--{name.replace('_', '-')} is {value}; it needs --tokenizer-type: give both, or leave it out "
                    "for the tokenizer in --hf-model"
                )
    if arguments.tasks:
        names = mixture.in_form("--tasks", mixture.task_names("--tasks", arguments.tasks), arguments.forms)
        mixture.integers("--difficulty", arguments.difficulty)
        mixture.integers("--context-lengths", arguments.context_lengths or "1")
        for name in COUNTED:
            if item_counts(arguments, name) != [None] and name not in names:
                raise ValueError(
                    f"{ITEM_FLAGS[name]} is {getattr(arguments, 'num_' + COUNTED[name])}; it belongs "
                    f"to {name}, which --tasks does not hold: leave it out"
                )
        if fact_recall.NAME in names:
            fact_set(arguments)


def check_files(arguments: argparse.Namespace) -> None:
    """Raises ``ValueError`` naming the flag of a file or directory that is not there, or not of its kind."""
    if arguments.output is not None and arguments.output.is_dir():
        raise ValueError(f"--output is {str(arguments.output)!r}, a directory; expected the name of a file to write")
    if arguments.output is not None and not arguments.output.resolve().parent.is_dir():
        raise ValueError(f"--output is {str(arguments.output)!r}; create its directory first")
    for source in arguments.data or []:
        if not Path(source).is_file() and not Path(source + ".idx").is_file():
            raise ValueError(f"--data names {source}; expected a text file, or a corpus's path without extension")


def item_counts(arguments: argparse.Namespace, name: str) -> Sequence[int | None]:
    """The numbers of pairs, rounds or shots that a task is asked with; None: as many as fit.

    Raises ``ValueError`` naming the flag.
    """
    counted = COUNTED.get(name)
    given = getattr(arguments, f"num_{counted}") if counted else None
    return mixture.integers(ITEM_FLAGS[name], given) if given is not None else [None]


def fact_set(arguments: argparse.Namespace) -> fact_recall.FactSet:
    return fact_recall.FactSet(arguments.fact_seed, arguments.facts_per_frequency, arguments.max_fact_frequency)
