"""Find the model of another --ffn-variant that costs as much: the same activated FLOPs and total parameters within 1%.

    python tools/match.py --model-preset umv2-227m-1.2b --to memory-plus
    python tools/match.py --model-preset umv2-8m --ffn-hidden-size 1024 --to moe --json
    python tools/match.py --model-preset umv2-227m-1.2b --to ultramem --keep "--memory-topk 64 --memory-num-heads 2"

Takes the model flags of pretrain_umv2.py. Depth, hidden size, attention and vocabulary stay as they are; the rules for
the sizes of the other variant's memory are in umv2_megatron/planning/matching.py. Prints both models side by side and
the flags to add to the first one's, or to put in the place of some of them. FLOPs are those of one forward pass per
token, total parameters leave embeddings out, as in tools/plan.py.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from umv2_megatron.config.engram_config import ngram_layers
from umv2_megatron.config.usage import OneLineParser
from umv2_megatron.config.variants import FFN_VARIANTS, has_memory
from umv2_megatron.training.tool_entry import program_name, quiet_mcore

if TYPE_CHECKING:
    from umv2_megatron.config.run_config import RunConfig
    from umv2_megatron.planning.matching import Match, Model


def build_parser() -> OneLineParser:
    """The flags that are match.py's own."""
    parser = OneLineParser(
        prog=program_name(),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--to", required=True, metavar="VARIANT", help=f"one of {', '.join(FFN_VARIANTS)}")
    parser.add_argument(
        "--keep",
        default="",
        metavar="FLAGS",
        help="flags that the model found shall have, in quotes; "
        "N, the number of experts and the FFN's width are solved for all the same",
    )
    parser.add_argument("--total", metavar="N", help="total parameters to reach instead of the first model's")
    parser.add_argument("--tolerance", default="0.01", metavar="X", help="largest relative deviation (default: 0.01)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    try:
        given, rest = build_parser().parse_known_args(argv)
        found, left_out = _match(given, rest)
    except ValueError as error:
        print(f"{program_name()}: error: {error}", file=sys.stderr)
        return 2
    figures = {
        "source": _figures(found.source), "found": _figures(found.found),
        "flops_deviation": found.flops_deviation, "total_deviation": found.total_deviation,
        "flags": _text(found.flags), "settings": found.flags, "left_out": left_out,
    }  # fmt: skip
    print(json.dumps(figures, indent=2) if given.json else _table(figures))
    return 0


def _match(given: argparse.Namespace, rest: list[str]) -> tuple[Match, list[str]]:
    """The match, and those flags of the first model that have to be left out where its flags are added."""
    from umv2_megatron.config.flags import parse_flags
    from umv2_megatron.config.option_table import option_table
    from umv2_megatron.config.resolve import resolve
    from umv2_megatron.planning.matching import Model, completed, match

    source = resolve(
        [*rest, "--transformer-impl", "local"], 1, program=program_name(), for_training=False,
        before_mcore=quiet_mcore,
    )  # fmt: skip
    if source.values["vocab_size"] is None:
        raise ValueError("--vocab-size is missing; logits are part of the FLOPs")
    try:
        words = shlex.split(given.keep)
    except ValueError as error:
        raise ValueError(f"--keep is {given.keep!r}; expected flags with closed quotes") from error
    kept, preset, config = parse_flags(words, f"{program_name()} --keep", "")
    if preset or config or "ffn_variant" in kept:
        raise ValueError(f"--keep is {given.keep!r}; expected flags of sizes and switches only")
    total = None if given.total is None else int(_number("total", given.total))
    found = match(Model.of(source), given.to, kept, total, _number("tolerance", given.tolerance))
    own, preset, config = parse_flags(rest, program_name(), "")
    # A preset's experts go when another variant is chosen; experts given as flags are refused, and no flag undoes them.
    # The same goes for settings of memory layers where the other variant has none, and of n-gram layers beside them.
    left_out = [
        key
        for key in own
        if given.to != "moe"
        and (key.startswith("moe_") or key == "num_moe_experts")
        or not has_memory(given.to)
        and key.startswith("memory_")
        or (not has_memory(given.to) or given.to == "engram")
        and key.startswith("engram_")
    ]
    command = [*(["--model-preset", preset] if preset else []), *(["--config", config] if config else [])]

    def combine(added: dict[str, Any]) -> RunConfig:
        together = {key: value for key, value in {**own, **added}.items() if key not in left_out}
        argv = [*command, *shlex.split(_text(together)), "--transformer-impl", "local"]
        return resolve(argv, 1, program=program_name(), for_training=False)

    names = [option_table()[key].flag for key in left_out]
    return completed(found, combine), [f"--{name}" for name in names]


def _number(flag: str, text: str) -> float:
    try:
        value = float(text.replace("_", ""))
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"--{flag} is {text!r}; expected a number above 0")
    return value


def _figures(model: Model) -> dict[str, Any]:
    """What is printed of a model, JSON-ready."""
    count, flops, memory = model.parameters, model.flops, model.memory
    figures: dict[str, Any] = {
        "ffn_variant": model.variant,
        "ffn_hidden_size": None if model.variant == "moe" else model.values["ffn_hidden_size"],
    }
    if model.variant == "moe":
        figures["experts"] = f"{model.values['num_moe_experts']}, {model.values['moe_router_topk']} active"
        figures["expert_width"] = model.values["moe_ffn_hidden_size"]
    if memory is not None:
        figures["memory_layers"] = sum(memory.memory_layers(model.values["num_layers"]))
        figures["memory_num_keys"] = memory.num_keys
        figures["keys_scored"] = memory.scored_keys
        figures["heads_x_topk"] = f"{memory.num_heads} x {memory.topk}"
        for name in ("key_dim", "pre_value_dim", "value_dim"):
            figures[f"memory_{name}"] = getattr(memory, name)
    ngrams = ngram_layers(model.values)
    if ngrams is not None:
        figures["ngram_layers"] = sum(ngrams.memory_layers(model.values["num_layers"]))
        figures["ngram_num_keys"] = ngrams.num_keys
    return {
        **figures, "flops_per_token": flops.forward, "ffn_flops": flops.ffn, "memory_flops": flops.memory,
        "activated": count.activated, "total": count.total, "tables": count.tables,
    }  # fmt: skip


def _text(flags: dict[str, Any]) -> str:
    """Settings as a command line."""
    from umv2_megatron.config.option_table import option_table

    parts = []
    for key, value in flags.items():
        made = option_table()[key]
        if made.switches:
            parts.append("--" + next(flag for flag, on in made.switches.items() if on == value))
        else:
            words = value if made.repeated else [value]
            parts += ["--" + made.flags[0], *(shlex.quote(str(word)) for word in words)]
    return " ".join(parts)


def _table(figures: dict[str, Any]) -> str:
    source, found = figures["source"], figures["found"]
    lines = []
    for name in dict.fromkeys([*source, *found]):
        cells = [_cell(model.get(name)) for model in (source, found)]
        note = ""
        if name in ("flops_per_token", "total"):
            deviation = figures["flops_deviation" if name == "flops_per_token" else "total_deviation"]
            note = f"  {100 * deviation:+.2f}%"
        lines.append(f"  {name.replace('_', ' '):<22}{cells[0]:>20}{cells[1]:>20}{note}")
    title = "flags of the second, to be added to the first's"
    if figures["left_out"]:
        title += f" without its {', '.join(figures['left_out'])}"
    return "\n".join([*lines, "", title + ":", "  " + figures["flags"]])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else str(value)


def run() -> NoReturn:
    """The program."""
    sys.exit(main())
