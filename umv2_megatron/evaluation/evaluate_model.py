"""A model evaluated as flags say: restored or loaded, texts and tasks scored, the report written."""

import argparse
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch

from umv2_megatron.config.usage import UsageError
from umv2_megatron.evaluation import report
from umv2_megatron.evaluation.evaluate_flags import LAYOUT, fact_set, item_counts
from umv2_megatron.evaluation.huggingface_scoring import load_hugging_face
from umv2_megatron.evaluation.scoring_model import ScoringModel
from umv2_megatron.evaluation.tasks import fact_recall, mixture
from umv2_megatron.evaluation.tasks.base import FORMS, Example, longest_tokens
from umv2_megatron.evaluation.tasks.scoring import score, summarize
from umv2_megatron.evaluation.text_loss import documents_of, limited, text_loss
from umv2_megatron.parallel.launch import discover


def evaluate(arguments: argparse.Namespace) -> None:
    """Load, evaluate, report. Every rank does the same, the first one tells it.

    Raises ``UsageError`` where flags do not fit the model or the texts.
    """
    try:
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
    """The questions of each task, form, difficulty, context length and number of items, or of each number of times that
    facts were seen.

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
                sizes = itertools.product(difficulties, lengths, item_counts(arguments, name))
                for difficulty, length, items in sizes:
                    what = {"task": name, "form": form, "context_length": length, "difficulty": difficulty}
                    count, seed = arguments.num_examples, arguments.seed
                    made = mixture.questions(name, form, count, seed, difficulty, model.tokenizer, length, items)
                    asked.append(({**what, "items": items, "times_seen": None}, made))
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


def _fact_questions(arguments: argparse.Namespace, form: str) -> list[tuple[dict[str, Any], list[Example]]]:
    facts = fact_set(arguments)
    made = facts.questions(form, arguments.num_examples, arguments.seed)
    what = {"task": fact_recall.NAME, "form": form, "context_length": None, "difficulty": None, "items": None}
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
