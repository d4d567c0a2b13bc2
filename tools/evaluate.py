"""Evaluate a model: loss and bits per byte on texts, and synthetic tasks of memory with exact scoring.

    python tools/evaluate.py --load runs/demo/checkpoints --data data/valid_text_document --output demo.json
    python tools/evaluate.py --load runs/demo/checkpoints --tasks key-value,needle --context-lengths 256,512
    python tools/evaluate.py --hf-model exported --memory-tables mmap --tasks all --output exported.json
    torchrun --nproc-per-node 4 tools/evaluate.py --load runs/big --tensor-model-parallel-size 2 --tasks all

Prints tables, writes the JSON of --output, and draws plots beside it. The numbers do not depend on the number of ranks
or on how the model is split over them. docs/evaluation.md describes the tasks and defines every number.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from umv2_megatron.parallel import cpu_platform

cpu_platform.install()  # before megatron.core is imported

import numpy as np  # noqa: E402
import torch  # noqa: E402

from umv2_megatron.config.data_config import TOKENIZER_TYPES  # noqa: E402
from umv2_megatron.config.flags import UsageError  # noqa: E402
from umv2_megatron.evaluation import report  # noqa: E402
from umv2_megatron.evaluation.huggingface_scoring import DTYPES, load_hugging_face  # noqa: E402
from umv2_megatron.evaluation.scoring_model import ScoringModel  # noqa: E402
from umv2_megatron.evaluation.tasks import fact_recall, mixture  # noqa: E402
from umv2_megatron.evaluation.tasks.base import FORMS, Example, longest_tokens  # noqa: E402
from umv2_megatron.evaluation.tasks.scoring import score, summarize  # noqa: E402
from umv2_megatron.evaluation.text_loss import DATA_FORMS, documents_of, limited, text_loss  # noqa: E402
from umv2_megatron.parallel.launch import discover  # noqa: E402
from umv2_megatron.training.program import run_program  # noqa: E402

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


def main(argv: list[str]) -> int:
    """Load, evaluate, report; returns the exit code. Every rank does the same, the first one tells it."""
    arguments = parser().parse_args(argv)
    try:
        check_flags(arguments)
        check_files(arguments)
        model, described = _load(arguments)
        rows = arguments.micro_batch_size * discover().world_size
        # everything is read, made and measured before anything is scored: a mistake must not cost hours of scoring
        held = [(source, _documents(arguments, model, source)) for source in arguments.data or []]
        asked = _questions(arguments, model)
        texts = [_text(arguments, model, source, documents, rows) for source, documents in held]
        tasks = [{**what, **dataclasses.asdict(summarize(made, score(model, made, rows)))} for what, made in asked]
    except ValueError as error:
        raise UsageError(str(error)) from error
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        _tell(arguments, described, texts, tasks)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return 0


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
        names = mixture.task_names("--tasks", arguments.tasks)
        mixture.integers("--difficulty", arguments.difficulty)
        mixture.integers("--context-lengths", arguments.context_lengths or "1")
        if fact_recall.NAME in names:
            _fact_set(arguments)


def check_files(arguments: argparse.Namespace) -> None:
    """Raises ``ValueError`` naming the flag of a file or directory that is not there, or not of its kind."""
    if arguments.output is not None and arguments.output.is_dir():
        raise ValueError(f"--output is {str(arguments.output)!r}, a directory; expected the name of a file to write")
    if arguments.output is not None and not arguments.output.resolve().parent.is_dir():
        raise ValueError(f"--output is {str(arguments.output)!r}; create its directory first")
    for source in arguments.data or []:
        if not Path(source).is_file() and not Path(source + ".idx").is_file():
            raise ValueError(f"--data names {source}; expected a text file, or a corpus's path without extension")


def _load(arguments: argparse.Namespace) -> tuple[ScoringModel, dict[str, Any]]:
    """The model, and what the report says of it."""
    if arguments.hf_model is not None:
        dtype = arguments.dtype or "float32"
        hugging = load_hugging_face(
            arguments.hf_model,
            tokenizer_type=arguments.tokenizer_type,
            tokenizer_model=arguments.tokenizer_model,
            vocab_size=arguments.vocab_size,
            trust_remote_code=arguments.trust_remote_code,
            dtype=dtype,
            micro_batch_size=arguments.micro_batch_size,
            memory_tables=arguments.memory_tables,
        )
        return hugging, {"kind": "hugging face", "path": arguments.hf_model, "dtype": dtype}
    # not before: a Hugging Face model needs none of it
    from umv2_megatron.evaluation.megatron_scoring import MegatronScoringModel
    from umv2_megatron.training.restore import restore_model

    layout = {name: getattr(arguments, name) for name in LAYOUT if getattr(arguments, name) is not None}
    layout["sequence_parallel"] = arguments.sequence_parallel
    if arguments.memory_parallel_mode is not None:
        layout["memory_parallel_mode"] = arguments.memory_parallel_mode
    restored = restore_model(arguments.load, arguments.ckpt_step, arguments.tokenizer_model, layout)
    described = {
        "kind": "megatron",
        "path": arguments.load,
        "iteration": restored.iteration,
        "ranks": restored.run.world_size,
        **{name: restored.run.values[name] for name in LAYOUT},
    }
    return MegatronScoringModel(restored, arguments.micro_batch_size), described


def _documents(arguments: argparse.Namespace, model: ScoringModel, source: str) -> list[np.ndarray]:
    """All of ``source`` that is scored, as token ids; those of a corpus stay in its file."""
    documents = documents_of(source, model.tokenizer, append_eod=not arguments.no_append_eod)
    held = list(limited(documents, arguments.max_tokens, model.tokenizer))
    if not held:
        raise ValueError(f"--data names {source}, which holds no text; give a file with some")
    return held


def _text(
    arguments: argparse.Namespace, model: ScoringModel, source: str, documents: list[np.ndarray], rows: int
) -> dict[str, Any]:
    found = text_loss(
        model,
        documents,
        form=arguments.data_form,
        context=arguments.data_context_length,
        stride=arguments.stride,
        batch=rows,
    )
    return {"source": source, **dataclasses.asdict(found)}


def _questions(arguments: argparse.Namespace, model: ScoringModel) -> list[tuple[dict[str, Any], list[Example]]]:
    """The questions of each task, form, difficulty and context length, or number of times that facts were seen.

    Raises ``ValueError`` naming the flag where a context is too short for a task or too long for ``model``.
    """
    if not arguments.tasks:
        return []
    lengths = mixture.integers("--context-lengths", arguments.context_lengths or str(model.context))
    difficulties = mixture.integers("--difficulty", arguments.difficulty)
    forms = FORMS if arguments.forms == "both" else (arguments.forms,)
    asked: list[tuple[dict[str, Any], list[Example]]] = []
    for form in forms:
        for name in mixture.task_names("--tasks", arguments.tasks):
            if name == fact_recall.NAME:
                asked += _fact_questions(arguments, form)
            else:
                for difficulty in difficulties:
                    for length in lengths:
                        what = {"task": name, "form": form, "context_length": length, "difficulty": difficulty}
                        count, seed = arguments.num_examples, arguments.seed
                        made = mixture.questions(name, form, count, seed, difficulty, model.tokenizer, length)
                        asked.append(({**what, "times_seen": None}, made))
    if arguments.no_choices:
        asked = [(what, [dataclasses.replace(example, choices=()) for example in made]) for what, made in asked]
    for what, made in asked:
        _check_length(model, what, made)
    return asked


def _check_length(model: ScoringModel, what: dict[str, Any], made: list[Example]) -> None:
    limit = model.longest_context
    if limit is None:
        return
    longest = max(longest_tokens(example, lambda text: len(model.tokenizer.tokenize(text))) for example in made)
    if longest > limit:
        takes = f"takes {longest} tokens in its {what['form']} form, and the model's positions end at {limit}"
        if what["context_length"] is None:
            raise ValueError(f"--tasks holds {what['task']}, which {takes}: leave it out")
        raise ValueError(
            f"--context-lengths holds {what['context_length']}; {what['task']} {takes}: give {limit} or less"
        )


def _fact_set(arguments: argparse.Namespace) -> fact_recall.FactSet:
    return fact_recall.FactSet(arguments.fact_seed, arguments.facts_per_frequency, arguments.max_fact_frequency)


def _fact_questions(arguments: argparse.Namespace, form: str) -> list[tuple[dict[str, Any], list[Example]]]:
    facts = _fact_set(arguments)
    made = facts.questions(form, arguments.num_examples, arguments.seed)
    what = {"task": fact_recall.NAME, "form": form, "context_length": None, "difficulty": None}
    return [
        ({**what, "times_seen": times}, [example for example in made if example.details["times_seen"] == times])
        for times in facts.frequencies
    ]


def _tell(
    arguments: argparse.Namespace, described: dict[str, Any], texts: list[dict[str, Any]], tasks: list[dict[str, Any]]
) -> None:
    where = f", iteration {described['iteration']}" if "iteration" in described else ""
    print(f"{described['path']}{where}")
    if texts:
        print("\n" + report.text_table(texts))
    if tasks:
        print("\n" + report.task_table(tasks))
    if arguments.output is None:
        return
    told = ("seed", "num_examples", "fact_seed", "facts_per_frequency", "max_fact_frequency")
    settings = {name: getattr(arguments, name) for name in told}
    report.write_json(arguments.output, {"model": described, "settings": settings, "texts": texts, "tasks": tasks})
    label = arguments.label or Path(described["path"]).name
    drawn = report.draw({label: tasks}, arguments.output.with_suffix("")) if tasks else []
    print("\nwrote " + ", ".join(str(path) for path in [arguments.output, *drawn]))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    group = made.add_argument_group("model")
    group.add_argument("--load", metavar="DIR", help="directory of checkpoints, or one iter_* in it")
    group.add_argument("--ckpt-step", type=int, help="iteration to load (default: the newest valid one)")
    group.add_argument("--hf-model", metavar="DIR", help="directory of a Hugging Face model")
    group.add_argument("--trust-remote-code", action="store_true", help="run Python code that --hf-model brings")
    group.add_argument("--dtype", choices=sorted(DTYPES), help="of --hf-model (default: float32)")
    group.add_argument(
        "--memory-tables",
        choices=("device", "cpu", "mmap"),
        help="of an export of ours: where value tables stay; mmap reads picked rows from the files (default: device)",
    )
    group.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, help="for --hf-model without tokenizer files")
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
    group.add_argument("--forms", choices=(*FORMS, "both"), default="both", help="of the questions (default: both)")
    group.add_argument("--context-lengths", metavar="N,N", help="tokens of context (default: as trained)")
    group.add_argument("--difficulty", default="1", metavar="N,N", help="what it counts depends on the task")
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


if __name__ == "__main__":
    run_program(main, sys.argv[1:], "evaluate.py")
