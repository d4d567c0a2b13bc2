"""What a model costs before it is built: parameters, FLOPs per token, bytes read per decoded token.

    python tools/plan.py --model-preset umv2-227m-1.2b
    python tools/plan.py --model-preset umv2-8m --memory-num-keys 128 --json
    python tools/plan.py --list

Flags are those of pretrain_umv2.py that set sizes; they override the preset. Arithmetic only: it needs neither torch
nor memory for the model. Exit code 2, with one line, for a usage error.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from umv2_megatron.config.memory_config import MemoryConfig  # noqa: E402
from umv2_megatron.config.presets import PRESETS, Preset, find_preset  # noqa: E402
from umv2_megatron.planning import (  # noqa: E402
    FlopsPerToken,
    ParameterCount,
    bytes_touched_per_token,
    count_parameters,
    flops_per_token,
)

# Sizes that a preset does not give but that change the counts.
EXTRA_MODEL_FLAGS: dict[str, Any] = {"ffn_variant": "umv2", "add_qkv_bias": False, "tensor_model_parallel_size": 1}
DECODE_BATCHES = (1, 16, 256)


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        print(f"plan.py: {message}", file=sys.stderr)
        raise SystemExit(2)


@dataclasses.dataclass
class Request:
    """What the command line asks for."""

    preset: Preset | None
    model: dict[str, Any]
    memory: MemoryConfig | None
    as_json: bool


def read_command_line(argv: list[str]) -> Request:
    """Preset, then flags over it. Raises ``ValueError`` for an unknown preset, exits with code 2 for a bad flag."""
    parser = OneLineParser(prog="plan.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                           argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("--model-preset", metavar="NAME", help=f"sizes of a known model: {', '.join(PRESETS)}")
    parser.add_argument("--list", action="store_true", help="list the presets and stop")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    model_group = parser.add_argument_group("model")
    for name, example in {**PRESETS["umv2-tiny"].model, **EXTRA_MODEL_FLAGS}.items():
        _add_flag(model_group, name, name, type(example), None, "Megatron-LM's flag of this name")
    memory_group = parser.add_argument_group("memory layers")
    hints = get_type_hints(MemoryConfig)
    for field in dataclasses.fields(MemoryConfig):
        kind = hints[field.name] if hints[field.name] in (int, float, str, bool) else int
        _add_flag(memory_group, f"memory_{field.name}", f"memory.{field.name}", kind, field.metadata["choices"],
                  field.metadata["help"].replace("%", "%%"))
    readers = {action.dest: action.reader for action in parser._actions if hasattr(action, "reader")}
    given = {key: readers[key](value) if key in readers else value for key, value in vars(parser.parse_args(argv)).items()}
    if given.pop("list", False):
        print("\n".join(f"{preset.name:<22} {preset.description} ({preset.source})" for preset in PRESETS.values()))
        raise SystemExit(0)
    as_json, name = given.pop("json", False), given.pop("model_preset", None)
    preset = find_preset(name) if name is not None else None
    memory = dict(preset.memory) if preset else {}
    memory.update({key[7:]: value for key, value in given.items() if key.startswith("memory.")})
    overrides = {key: value for key, value in given.items() if not key.startswith("memory.")}
    if preset is None and not overrides:
        raise ValueError(f"--model-preset is missing; expected one of {', '.join(PRESETS)}, or sizes by flags")
    model = {**(preset.model if preset else {}), **overrides}
    _drop_derived(model, overrides)
    return Request(preset, model, None if model.get("ffn_variant") == "dense" else MemoryConfig(**memory), as_json)


def _add_flag(group: Any, name: str, dest: str, kind: type, choices: tuple | None, text: str) -> None:
    flag = "--" + name.replace("_", "-")
    if kind is bool:
        group.add_argument(flag, dest=dest, action=argparse.BooleanOptionalAction, help=text)
        return
    expected = f"one of {', '.join(choices)}" if choices else {int: "an integer", float: "a number"}.get(kind, "a text")

    def read(value: str) -> Any:
        try:
            result = kind(value)
        except ValueError:
            result = None
        if result is None or (choices and result not in choices):
            raise ValueError(f"{flag} is {value!r}; expected {expected}")
        return result

    # read after parsing: argparse would replace the sentence by its own
    group.add_argument(flag, dest=dest, metavar=name.split("_")[-1].upper(), help=text).reader = read


def _drop_derived(model: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Forget preset values that followed from a size the flags changed, so that they are derived anew."""
    if {"hidden_size", "num_attention_heads"} & overrides.keys() and "kv_channels" not in overrides:
        model.pop("kv_channels", None)
    if "seq_length" in overrides and "max_position_embeddings" not in overrides:
        model.pop("max_position_embeddings", None)


def report(request: Request) -> dict[str, Any]:
    """All figures as one JSON-ready dictionary: parameters, operations and bytes are plain numbers."""
    count = count_parameters(request.model, request.memory)
    flops = flops_per_token(request.model, request.memory)
    touched = [bytes_touched_per_token(request.model, request.memory, batch) for batch in DECODE_BATCHES]
    return {
        "model_preset": request.preset.name if request.preset else None,
        "source": request.preset.source if request.preset else None,
        "model": request.model,
        "memory": dataclasses.asdict(request.memory) if request.memory else None,
        "parameters": _parameters(count),
        "flops_per_token": _flops(flops),
        "bytes_touched_per_token": [{**dataclasses.asdict(item), "all": item.all} for item in touched],
        "stated": _stated(request.preset, count),
    }


def _parameters(count: ParameterCount) -> dict[str, int]:
    names = ("embedding", "positions", "output", "attention", "ffn", "norms", "memory", "tables", "picked", "activated",
             "activated_without_embeddings", "total", "stored")
    return {name: getattr(count, name) for name in names}


def _flops(flops: FlopsPerToken) -> dict[str, float]:
    derived = ("memory", "blocks", "memory_share", "forward", "training")
    return {**dataclasses.asdict(flops), **{name: getattr(flops, name) for name in derived}}


def _stated(preset: Preset | None, count: ParameterCount) -> dict[str, Any] | None:
    """Figures somebody states for the preset, beside ours under the same convention; deviations are fractions."""
    if preset is None or preset.expected is None:
        return None
    expected = preset.expected
    ours = count.activated if expected.embeddings_in_activated else count.activated_without_embeddings
    result: dict[str, Any] = {"by": expected.stated_by, "activated": {
        "stated": expected.activated, "ours": ours, "deviation": ours / expected.activated - 1,
        "embeddings_counted": expected.embeddings_in_activated}}
    if expected.total is not None:
        result["total"] = {"stated": expected.total, "ours": count.total, "deviation": count.total / expected.total - 1}
    return result


# -- tables ----------------------------------------------------------------------------------------------------------

LABELS = {
    "embedding": "embedding (vocabulary x H)", "positions": "position embedding",
    "output": "output matrix (0: tied to the embedding)", "attention": "attention", "ffn": "FFN", "norms": "norms",
    "memory": "memory layers without tables", "tables": "value tables", "picked": "  of these read per token",
    "activated": "activated (vocabulary matrix once)", "activated_without_embeddings": "activated without embeddings",
    "total": "total without embeddings", "stored": "stored (everything)",
    "attention_projections": "attention projections", "attention_scores": "attention scores (causal)",
    "memory_projections": "memory projections", "memory_scoring": "memory key scores",
    "memory_grid": "memory K x K grid", "memory_lookup": "memory row lookup", "logits": "logits", "forward": "forward",
    "training": "training (3x)",
}


def tables(figures: dict[str, Any], preset: Preset | None) -> str:
    """The figures as text."""
    lines = [f"{preset.name}: {preset.description} ({preset.source})"] if preset else ["model from flags"]
    lines += ["", "parameters"]
    lines += [_line(name, _short(value)) + f"  {value:>18,}" for name, value in figures["parameters"].items()
              if value or name == "output"]
    flops = figures["flops_per_token"]
    lines += ["", f"FLOPs per token (sequences of {figures['model']['seq_length']})"]
    lines += [_line(name, _short(value)) for name, value in flops.items() if name in LABELS and value
              and name not in ("memory", "blocks")]
    if flops["memory"]:
        lines += [f"  {'memory share of the blocks':<42} {100 * flops['memory_share']:>8.1f}%"]
    lines += ["", "weight bytes read per decoded token (bf16)",
              f"  {'tokens decoded together':<26} {'dense':>10} {'rows':>10} {'sum':>10}  MoE of this size"]
    for item in figures["bytes_touched_per_token"]:
        moe = "" if item["moe"] is None else f"{_short(item['moe']):>10} ({item['moe'] / item['all']:.1f}x)"
        lines += [f"  {item['batch']:<26} {_short(item['dense']):>10} {_short(item['rows']):>10} "
                  f"{_short(item['all']):>10} {moe}"]
    stated = figures["stated"]
    if stated:
        lines += ["", f"stated by {stated['by']}"]
        for name in ("activated", "total"):
            if name in stated:
                item = stated[name]
                without = name == "total" or not item["embeddings_counted"]
                label = f"{name}, embeddings {'left out' if without else 'once'}"
                lines += [f"  {label:<32} {_short(item['stated']):>9}  here {_short(item['ours']):>9}  "
                          f"deviation {100 * item['deviation']:+.1f}%"]
    return "\n".join(lines)


def _line(name: str, text: str) -> str:
    return f"  {LABELS.get(name, name):<42} {text:>9}"


def _short(value: float) -> str:
    """A count with a letter for its power of 1000, about four digits."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    try:
        request = read_command_line(sys.argv[1:] if argv is None else argv)
        figures = report(request)
    except ValueError as error:
        print(f"plan.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps(figures, indent=2) if request.as_json else tables(figures, request.preset))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
