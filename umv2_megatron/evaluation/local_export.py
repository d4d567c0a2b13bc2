"""A model directory in Hugging Face form, opened to generate text: the model, its tokenizer, and the ids it may draw.

Nothing is downloaded and no code of the directory is run. Models other than ours work if transformers knows them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# As the model has them (hf/tables_umv2.PLACES), which cannot be read without importing torch.
MEMORY_TABLES = ("device", "cpu", "mmap", "device-int8", "cpu-int8")


@dataclass(frozen=True)
class LocalExport:
    """A causal language model with its tokenizer.

    Attributes:
        model: of transformers, in evaluation mode, on its device.
        kind: its ``model_type``.
        context: tokens that it takes, ``max_position_embeddings``; 1,024 where its configuration names none.
        vocab_size: ids from here on are padding and never drawn.
        ends: ids that end a text, of the tokenizer and of both configurations.
    """

    model: Any
    tokenizer: Any
    kind: str
    context: int
    vocab_size: int
    ends: frozenset[int]


def open_export(
    directory: str, flag: str, *, memory_tables: str | None = None, dtype: Any = "auto", device: Any = "cpu"
) -> LocalExport:
    """Open ``directory``, which ``flag`` names in errors; ``memory_tables`` is where the value tables of ours stay.

    Raises ``ValueError``, one sentence, where it holds no model or no tokenizer, or a part of a model.
    """
    from transformers import AutoConfig, AutoTokenizer

    import umv2_megatron.hf  # noqa: F401  (registers our classes)
    from umv2_megatron.evaluation.huggingface_scoring import load_whole_model

    where: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    check_export(directory, flag, memory_tables)
    config = AutoConfig.from_pretrained(directory, **where)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, **where)
    except Exception as error:  # the libraries of tokenizers raise plain Exception for faults in their files
        first = str(error).partition("\n")[0]
        raise ValueError(
            f"{flag} is {directory!r}; it holds no tokenizer that transformers can read: {first}"
        ) from error
    tables = {} if memory_tables is None else {"memory_tables": memory_tables}
    model = load_whole_model(directory, flag, dtype=dtype, **tables, **where).eval()
    return LocalExport(
        model.to(device),  # without the tables that have another place
        tokenizer,
        config.model_type,
        getattr(config, "max_position_embeddings", None) or 1024,
        min(config.vocab_size, max(tokenizer.get_vocab().values()) + 1),
        frozenset(_ends(tokenizer, config, getattr(model, "generation_config", None))),
    )


def check_export(directory: str, flag: str, memory_tables: str | None) -> None:
    """Refuse what is no export, from its files' names and its ``config.json`` alone: nothing heavy is imported.

    Raises ``ValueError`` as ``open_export`` does.
    """
    try:
        kind = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):  # the config.json of a checkpoint, iter_*, has no model_type
        raise ValueError(
            f"{flag} is {directory!r}, no export: expected a directory with a config.json that names a model_type "
            "(convert_checkpoint.py to-hf)"
        ) from None
    if memory_tables is not None and kind != "umv2":
        raise ValueError(f"--memory-tables is {memory_tables}; leave it out: {directory} is of model_type {kind}")
    if not holds_tokenizer(directory):
        raise ValueError(
            f"{flag} is {directory!r}; it holds no tokenizer: export it without --no-tokenizer, or bring the "
            "tokenizer.json"
        )


def holds_tokenizer(directory: str | Path) -> bool:
    """Whether there is a file to read a tokenizer from; without one transformers may make up an empty tokenizer."""
    return any(any(Path(directory).glob(name)) for name in ("tokenizer*", "vocab*", "*.model"))


def _ends(*holders: Any) -> Iterator[int]:
    """The end ids that a tokenizer and configurations name, each one id, several or none."""
    for holder in holders:
        ids = getattr(holder, "eos_token_id", None)
        yield from ids if isinstance(ids, list) else [] if ids is None else [ids]
