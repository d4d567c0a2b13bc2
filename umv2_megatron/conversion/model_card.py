"""The model card of an export: ``README.md``, which the Hub shows and people read before they load a model.

Everything in it is taken from the checkpoint and from the run's ``metrics.jsonl``; what they do not say is left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umv2_megatron import __version__
from umv2_megatron.conversion.settings import context_of, memory_config
from umv2_megatron.planning import count_parameters
from umv2_megatron.training.metrics import read_metrics

CARD = "README.md"
PAPER = "arXiv:2508.18756"
_NUMBERS = {
    "consumed-samples": "samples",
    "lm loss": "training loss",
    "lm loss validation": "validation loss",
}
"""What the card takes from the metrics, and what it calls it."""
_KINDS = {
    "umv2": f"UltraMemV2 ({PAPER}): blocks that add a memory layer to the FFN",
    "ultramem": "UltraMem (arXiv:2411.12364): memory layers that several blocks share",
    "memory-plus": "Memory+ (arXiv:2412.09764): memory layers with product keys",
    "pkm": "product-key memory (arXiv:1907.05242)",
    "peer": "PEER (arXiv:2407.04153): memory layers of single-neuron experts",
    "engram": "Engram (arXiv:2601.07372): memory layers addressed by hashed n-grams",
    "moe": "sparse mixture of experts, as in OLMoE (arXiv:2409.02060)",
    "dense": "dense decoder",
}


@dataclass(frozen=True)
class Training:
    """How a checkpoint came about.

    ``numbers``: by their names in ``metrics.jsonl``, the latest up to the checkpoint, each with its iteration.
    """

    iteration: int
    numbers: dict[str, tuple[int, float]]


def training_of(directory: Path, iteration: int) -> Training:
    """What the metrics of the run that saved the checkpoint ``directory`` say, if they are still beside it."""
    numbers: dict[str, tuple[int, float]] = {}
    try:
        for record in read_metrics(directory.parent):
            if record["iteration"] <= iteration:
                told = {name: record[name] for name in _NUMBERS if record.get(name) is not None}
                numbers |= {name: (record["iteration"], value) for name, value in told.items()}
    except (OSError, KeyError, TypeError):  # none, or of another program
        numbers = {}
    return Training(iteration, numbers)


def write_card(directory: Path, config: dict[str, Any], training: Training, licence: str | None, dtype: str) -> None:
    """Write ``README.md`` of the export in ``directory``, whose other files are there.

    Args:
        config: the checkpoint's configuration, as ``saved_config.read_config`` gives it.
        licence: identifier of the Hub, such as "apache-2.0"; None says that none has been chosen.
        dtype: of the weights.
    """
    code = sorted(path.name for path in directory.glob("*.py"))
    (directory / CARD).write_text(card(config, training, licence, dtype, code, directory), encoding="utf-8")


def card(
    config: dict[str, Any], training: Training, licence: str | None, dtype: str, code: Sequence[str], directory: Path
) -> str:
    """The text; arguments as of ``write_card``, ``code`` the names of the export's Python files."""
    values = config["values"]
    sections = [
        _head(values["ffn_variant"], licence, beside=bool(values.get("engram_layer_freq"))),
        _sizes(config, dtype),
        _data(values, training),
        _loading(directory, values, code),
        _limits(licence),
    ]
    return "\n\n".join(sections) + "\n"


def _head(variant: str, licence: str | None, beside: bool = False) -> str:
    tags = ["umv2", variant, "memory-layers"] if variant not in ("moe", "dense") else ["umv2", variant]
    if beside:
        tags.append("engram")
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    lines += [f"license: {json.dumps(licence or 'unknown')}", "tags:", *(f"- {tag}" for tag in dict.fromkeys(tags))]
    kind = _KINDS.get(variant, variant)
    if beside:
        kind += f"; beside them {_KINDS['engram']}"
    return "\n".join(lines) + (
        f"\n---\n\n# A language model of the kind {variant}\n\n{kind}. A base model: it continues text. Trained with "
        f"umv2_megatron {__version__}, in the way of Megatron-LM."
    )


def _sizes(config: dict[str, Any], dtype: str) -> str:
    values, memory = config["values"], memory_config(config["values"])
    exported = {**values, "vocab_size": config["tokenizer_vocab_size"], "make_vocab_size_divisible_by": 1}
    count = count_parameters({**exported, "tensor_model_parallel_size": 1}, memory)
    rows = [
        ("parameters", f"{count.stored:,}"),
        ("of them used for a token", f"{count.activated:,}"),
        ("blocks, hidden size, heads",
         f"{values['num_layers']}, {values['hidden_size']}, {values['num_attention_heads']}"),
        ("vocabulary", f"{config['tokenizer_vocab_size']:,}"),
        ("context", f"{context_of(values):,} tokens"),
        ("weights", dtype),
    ]  # fmt: skip
    if memory is not None:
        tables = f"{count.tables:,} parameters, of which a token reads {count.picked:,}"
        rows.insert(2, ("memory tables", tables))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"## Sizes\n\n| | |\n|---|---|\n{table}"


def _data(values: dict[str, Any], training: Training) -> str:
    rows = [("corpus", _corpus(values)), ("tokenizer", str(values["tokenizer_type"]))]
    rows.append(("iterations", f"{training.iteration:,}"))
    numbers = dict(training.numbers)
    if "consumed-samples" in numbers:
        at, samples = numbers.pop("consumed-samples")
        seen = f"{samples * values['seq_length']:,} ({samples:,} sequences of {values['seq_length']:,})"
        rows.append(("tokens seen", seen + (f", at iteration {at:,}" if at != training.iteration else "")))
    for name, (at, loss) in numbers.items():
        rows.append((_NUMBERS[name], f"{loss:.4f} nats per token, at iteration {at:,}"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"## Training\n\n| | |\n|---|---|\n{table}"


def _corpus(values: dict[str, Any]) -> str:
    """Names of the token files with their weights, without their folders."""
    if values.get("mock_data"):
        return "made-up tokens (--mock-data)"
    given = values.get("data_path") or values.get("train_data_path") or []
    names = [f"`{Path(word).name}`" if not _is_number(word) else f"{word} x" for word in map(str, given)]
    return " ".join(names) or "not stated"


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _loading(directory: Path, values: dict[str, Any], code: Sequence[str]) -> str:
    has_tokenizer = (directory / "tokenizer.json").exists()
    has_memory = memory_config(values) is not None
    lines = ["from transformers import AutoModelForCausalLM" + (", AutoTokenizer" if has_tokenizer else ""), ""]
    lines += ['model = AutoModelForCausalLM.from_pretrained("<this folder>", trust_remote_code=True)']
    if has_tokenizer:
        lines += ['tokenizer = AutoTokenizer.from_pretrained("<this folder>")']
        lines += ['inputs = tokenizer("Once upon a time", return_tensors="pt")']
        lines += ["print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))"]
    text = "## Loading\n\n```python\n" + "\n".join(lines) + "\n```\n"
    if has_memory:
        text += (
            '\n`memory_tables="cpu"` keeps the memory tables in host memory, `memory_tables="mmap"` leaves them in the '
            "files: a token then reads only the rows it picks.\n"
        )
    files = ", ".join(f"`{name}`" for name in code)
    return text + (
        f"\n**What `trust_remote_code=True` runs:** the Python files of this folder, {files}. They define the "
        "configuration and the model. They import torch and transformers and read this model's safetensors files, "
        "nothing else; no file of this folder is a pickle. For steps of decoding on a CPU they have the machine's C++ "
        "compiler build kernels whose source they contain (`UMV2_CPU_KERNELS=0` prevents it). `export_manifest.json` "
        "holds the SHA-256 of each. With the package umv2_megatron installed, `import umv2_megatron.hf` registers the "
        "same classes, and no code of this "
        "folder is run."
    )


def _limits(licence: str | None) -> str:
    text = (
        "## Limits\n\nThe model was trained to predict the next token of its corpus. It has not been tuned to follow "
        "instructions or to avoid harmful text, and what it writes may be false."
    )
    if licence is None:
        text += (
            " Nobody has stated a licence for the weights yet: put one into the first lines of this file before you "
            "publish them (`convert_checkpoint.py to-hf --license`)."
        )
    return text
