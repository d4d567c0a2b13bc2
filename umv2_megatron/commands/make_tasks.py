"""Write documents that teach the format of the evaluation's tasks, and the facts of fact recall, as JSONL.

    python tools/make_tasks.py --task all --documents 2000 --lengths 256,512 --output data/tasks.jsonl
    python tools/preprocess_data.py --input data/tasks.jsonl --output-prefix data/tasks \\
        --tokenizer-type ByteLevelTokenizer --append-eod
    torchrun pretrain_umv2.py --train-data-path 0.9 data/corpus_text_document 0.1 data/tasks_text_document ...

Tasks for models of a few layers (docs/evaluation.md), in symbols of one token each. The tokenizer is written beside
them, as data/symbols.tokenizer.json, and each line has marks of the tokens that are answers, under the key "loss":

    python tools/make_tasks.py --preset learnable --task key-value,multi-round --documents 200000 \\
        --output data/symbols.jsonl
    python tools/preprocess_data.py --input data/symbols.jsonl --output-prefix data/symbols --append-eod \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model data/symbols.tokenizer.json
    python tools/preprocess_data.py --input data/symbols.jsonl --output-prefix data/symbols --append-eod \\
        --json-keys loss --tokenizer-type NullTokenizer --vocab-size 2
    torchrun pretrain_umv2.py --train-data-path data/symbols_text_document --data-order sequential \\
        --loss-mask-key loss ...
    python tools/evaluate.py --tasks key-value,multi-round --forms symbols --context-lengths 64,128,256 ...

No question of tools/evaluate.py is among the documents, whatever the seeds: both draw from different random streams.
Facts are the exception that is meant: give the three flags about facts alike to both tools.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NoReturn

from umv2_megatron.config.data_config import PLAIN_TOKENIZER_TYPES
from umv2_megatron.data.tokenizers import build_tokenizer
from umv2_megatron.evaluation.tasks import mixture, symbol_tasks
from umv2_megatron.evaluation.tasks.base import FORMS, SYMBOLS
from umv2_megatron.evaluation.tasks.fact_recall import NAME as FACTS
from umv2_megatron.evaluation.tasks.fact_recall import FactSet
from umv2_megatron.training.tool_entry import run_tool

PLAIN = {
    "lengths": "512", "difficulty": "1", "queries": 4, "curriculum": 0.0, "tokenizer_type": "ByteLevelTokenizer"
}  # fmt: skip
"""Defaults of flags that --preset decides on, too."""
PRESETS: dict[str, dict[str, Any]] = {
    "learnable": {"lengths": "16,24,32,48,64,96,128", "difficulty": "1", "queries": 64, "curriculum": 0.5}
}


def settle(arguments: argparse.Namespace) -> str:
    """Fill in what the flags leave open, from --preset or ``PLAIN``; the form of the documents.

    Raises ``ValueError`` for a tokenizer beside a preset that brings its own.
    """
    for name, value in {**PLAIN, **PRESETS.get(arguments.preset, {})}.items():
        if getattr(arguments, name) is None and not (arguments.preset and name == "tokenizer_type"):
            setattr(arguments, name, value)
    for name in ("tokenizer_type", "tokenizer_model"):
        given = getattr(arguments, name)
        if arguments.preset is not None and given is not None:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} is {given}; leave it out: --preset {arguments.preset} writes its own tokenizer")
    return SYMBOLS if arguments.preset is not None else FORMS[0]


def main(arguments: argparse.Namespace) -> None:
    """Make all documents, written under a temporary name, then rename."""
    form = settle(arguments)
    names = mixture.in_form("--task", mixture.task_names("--task", arguments.task), form)
    output: Path = arguments.output
    if not output.resolve().parent.is_dir():
        raise ValueError(f"--output is {str(output)!r}; create its directory first")
    if output.suffix != ".jsonl":
        raise ValueError(f"--output is {str(output)!r}; expected a name that ends in .jsonl")
    if arguments.queries < 1:
        raise ValueError(f"--queries is {arguments.queries}; expected 1 or more")
    if arguments.documents < 0:
        raise ValueError(f"--documents is {arguments.documents}; expected 0 or more")
    if not 0 <= arguments.curriculum <= 1:
        raise ValueError(f"--curriculum is {arguments.curriculum:g}; expected a share of the documents, from 0 to 1")
    if arguments.curriculum and FACTS in names:
        raise ValueError(
            f"--task holds {FACTS!r}, whose documents have no length: make them by a command of their own, without "
            f"--curriculum {arguments.curriculum:g}"
        )
    tokenizer = None if form == SYMBOLS else build_tokenizer(arguments.tokenizer_type, arguments.tokenizer_model)
    documents = mixture.training_documents(
        names,
        arguments.documents,
        arguments.seed,
        mixture.integers("--difficulty", arguments.difficulty),
        mixture.integers("--lengths", arguments.lengths),
        tokenizer,
        arguments.queries,
        FactSet(arguments.fact_seed, arguments.facts_per_frequency, arguments.max_fact_frequency),
        arguments.curriculum,
    )
    temporary = output.with_name(output.name + ".incomplete")
    written = 0
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            for document in documents:
                marks = {"loss": symbol_tasks.loss_marks(document)} if form == SYMBOLS else {}
                file.write(json.dumps({"text": document.text, **marks}) + "\n")
                written += 1
        if not written:
            raise ValueError("--documents is 0; expected 1 or more, or fact-recall among --task")
        if form == SYMBOLS:
            symbol_tasks.write_tokenizer(output.with_suffix(".tokenizer.json"))
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"wrote {output}: {written} documents, {output.stat().st_size / 1e6:.2f} MB")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--task", required=True, metavar="A,B", help=f"'all' or some of {', '.join(mixture.TASKS)}")
    made.add_argument(
        "--documents", type=int, default=1000, help="of all tasks but fact-recall together (default: 1000)"
    )
    made.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="learnable: symbols, " + " ".join(f"--{name} {value}" for name, value in PRESETS["learnable"].items()),
    )
    made.add_argument("--lengths", metavar="N,N", help="longest documents in tokens, drawn from (default: 512)")
    made.add_argument("--difficulty", metavar="N,N", help="drawn from, for each document (default: 1)")
    made.add_argument("--queries", type=int, help="questions at the end of a document, at most (default: 4)")
    made.add_argument(
        "--curriculum",
        type=float,
        metavar="SHARE",
        help="the first documents are short: over this share of them the longest length grows from the shortest of "
        "--lengths to all; for pretrain_umv2.py --data-order sequential (default: 0: lengths mixed, shuffled)",
    )
    made.add_argument("--seed", type=int, default=1234, help="of the documents (default: 1234)")
    made.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSONL to write")
    group = made.add_argument_group("tokenizer that --lengths counts in")
    group.add_argument("--tokenizer-type", choices=PLAIN_TOKENIZER_TYPES, help="(default: ByteLevelTokenizer)")
    group.add_argument("--tokenizer-model", metavar="FILE")
    group = made.add_argument_group("facts: the same as given to tools/evaluate.py")
    group.add_argument("--fact-seed", type=int, default=1, help="(default: 1)")
    group.add_argument(
        "--facts-per-frequency", type=int, default=64, metavar="N", help="a multiple of 64 (default: 64)"
    )
    group.add_argument("--max-fact-frequency", type=int, default=64, metavar="N", help="(default: 64)")
    return made


def run() -> NoReturn:
    """The program."""
    run_tool(parser(), main)
