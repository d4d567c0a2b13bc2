"""What a model costs before it is built: parameters, FLOPs per token, bytes read per decoded token.

    python tools/plan.py --model-preset umv2-227m-1.2b
    python tools/plan.py --model-preset umv2-8m --memory-num-keys 128 --json
    python tools/plan.py --config runs/mine/config.yaml
    python tools/plan.py --list

Flags are those of pretrain_umv2.py that set sizes; they override the file, which overrides the preset. Arithmetic
only: it needs neither torch nor memory for the model. Exit code 2, with one line, for a usage error.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import sys
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from umv2_megatron.config.memory_config import MemoryConfig  # noqa: E402
from umv2_megatron.config.presets import PRESETS, Preset, find_preset  # noqa: E402
from umv2_megatron.planning import (  # noqa: E402
    FFN_VARIANTS,
    FlopsPerToken,
    ParameterCount,
    bytes_touched_per_token,
    count_parameters,
    flops_per_token,
)

DECODE_BATCHES = (1, 16, 256)


@dataclasses.dataclass(frozen=True)
class Size:
    """One flag that sets a size or switch of the model: its type, allowed values and help."""

    name: str
    kind: type
    choices: tuple | None = None
    help: str = "Megatron-LM's flag of this name"

    @property
    def flag(self) -> str:
        """The flag as typed."""
        return "--" + self.name.replace("_", "-")

    def read(self, value: Any) -> Any:
        """``value``, a text or a YAML value, in this size's type. Raises ``ValueError`` naming the flag."""
        if self.kind is bool:
            result = value if isinstance(value, bool) else None
        else:
            try:
                result = self.kind(str(value))
            except ValueError:
                result = None
        if result is None or (self.choices and result not in self.choices):
            kinds = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}
            expected = f"one of {', '.join(self.choices)}" if self.choices else kinds[self.kind]
            raise ValueError(f"{self.flag} is {value!r}; expected {expected}")
        return result


def _memory_sizes() -> dict[str, Size]:
    hints, sizes = get_type_hints(MemoryConfig), {}
    for field in dataclasses.fields(MemoryConfig):
        kind = hints[field.name] if hints[field.name] in (int, float, str, bool) else int
        name = f"memory_{field.name}"
        sizes[name] = Size(name, kind, field.metadata["choices"], field.metadata["help"])
    return sizes


# The flags that presets give, and others that change the counts.
MODEL_SIZES = {name: Size(name, type(value)) for name, value in PRESETS["umv2-tiny"].model.items()}
MODEL_SIZES.update(
    ffn_variant=Size("ffn_variant", str, FFN_VARIANTS),
    add_qkv_bias=Size("add_qkv_bias", bool),
    tensor_model_parallel_size=Size("tensor_model_parallel_size", int),
)
SIZES = {**MODEL_SIZES, **_memory_sizes()}


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


@dataclasses.dataclass
class Request:
    """What the command line asks for: a list of presets, or the figures of one model."""

    preset: Preset | None
    model: dict[str, Any]
    memory: MemoryConfig | None
    as_json: bool
    list_presets: bool = False


def build_parser() -> OneLineParser:
    """A parser in whose result only the flags that were given appear, as text or true/false."""
    parser = OneLineParser(prog="plan.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                           argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("--model-preset", metavar="NAME", help=f"sizes of a known model: {', '.join(PRESETS)}")
    parser.add_argument("--config", metavar="FILE", help="YAML file with flag names as keys; only sizes are read")
    parser.add_argument("--list", action="store_true", help="list the presets and stop")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    groups = [parser.add_argument_group("model"), parser.add_argument_group("memory layers")]
    for size in SIZES.values():
        group, text = groups[size.name.startswith("memory_")], size.help.replace("%", "%%")
        if size.kind is bool:
            group.add_argument(size.flag, dest=size.name, action=argparse.BooleanOptionalAction, help=text)
        else:
            group.add_argument(size.flag, dest=size.name, metavar=size.name.split("_")[-1].upper(), help=text)
    return parser


def read_command_line(argv: list[str]) -> Request:
    """Flags over file over preset. Raises ``ValueError`` with one sentence for a flag or value that cannot be."""
    parsed, unknown = build_parser().parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        close = difflib.get_close_matches(flag, [size.flag for size in SIZES.values()], n=1)
        raise ValueError(f"{flag} is no flag of plan.py; " + (f"did you mean {close[0]}?" if close else "see --help"))
    given = vars(parsed)
    if "list" in given:
        return Request(None, {}, None, False, list_presets=True)
    preset = find_preset(given["model_preset"]) if "model_preset" in given else None
    sizes = _read_file(given["config"]) if "config" in given else {}
    sizes.update({name: SIZES[name].read(value) for name, value in given.items() if name in SIZES})
    if preset is None and not sizes:
        raise ValueError(f"--model-preset is missing; expected one of {', '.join(PRESETS)}, or sizes by flags")
    changed = {name: value for name, value in sizes.items() if name in MODEL_SIZES}
    memory = {name.removeprefix("memory_"): value for name, value in sizes.items() if name not in MODEL_SIZES}
    model = {**(preset.model if preset else {}), **changed}
    _drop_derived(model, changed)
    config = MemoryConfig(**{**(preset.memory if preset else {}), **memory})
    return Request(preset, model, None if model.get("ffn_variant") == "dense" else config, "json" in given)


def _read_file(path: str) -> dict[str, Any]:
    """The sizes in a YAML file; a run's config.yaml holds much else, which is passed over."""
    import yaml  # only here, so that the rest needs nothing but Python

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config is {path!r}; expected a readable YAML file ({error.strerror})") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config is {path!r}; not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config is {path!r}; expected a mapping of flag names to values")
    values = {str(key).replace("-", "_"): value for key, value in content.items() if value is not None}
    if "add_bias_linear" in values:  # megatron-core's name for the opposite
        values["disable_bias_linear"] = not values["add_bias_linear"]
    return {name: SIZES[name].read(value) for name, value in values.items() if name in SIZES}


def _drop_derived(model: dict[str, Any], changed: dict[str, Any]) -> None:
    """Forget preset values that followed from a size that was changed, so that they are derived anew."""
    if {"hidden_size", "num_attention_heads"} & changed.keys() and "kv_channels" not in changed:
        model.pop("kv_channels", None)
    if "seq_length" in changed and "max_position_embeddings" not in changed:
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
        if request.list_presets:
            print("\n".join(f"{each.name:<22} {each.description} ({each.source})" for each in PRESETS.values()))
            return 0
        figures = report(request)
    except ValueError as error:
        print(f"plan.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps(figures, indent=2) if request.as_json else tables(figures, request.preset))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
