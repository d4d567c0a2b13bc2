"""What every setting must satisfy by what its option says: its limits, and what it needs to take effect."""

from __future__ import annotations

from typing import Any

from umv2_megatron.config.option_table import option_table
from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.config.usage import refuse
from umv2_megatron.config.variants import SWITCHES


def check_limits(run: RunConfig) -> None:
    """Every number inside the limits of its option; flags and files are told so when they are read."""
    for key, made in option_table().items():
        value = run.values[key]
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, (int, float)) and not made.within(number):
                refuse(made.flag, number, made.range())


def check_partners(run: RunConfig) -> None:
    """No setting that would be without effect: what its option needs is so, or it has its default."""
    for key, made in option_table().items():
        bundled = key.removeprefix("memory_") in SWITCHES and run.sources.get(key) != "flag"
        off = made.switches and made.default is None and not run.values[key]  # needs nothing, as it does nothing
        if run.values[key] == made.default or bundled or off:
            continue  # a variant sets all its switches, whichever of them another setting leaves without effect
        shown = ("on" if run.values[key] else "off") if made.switches else run.values[key]
        of_memory = key.startswith("memory_") and key != "memory_parallel_size"  # whose own check says more
        if of_memory and not run.has_memory and run.sources.get(key) == "flag":
            refuse(made.flag, shown, f"no value with --ffn-variant {run.model.ffn_variant}, which has no memory layers")
        for needed in made.needs:
            if not holds(run.values, needed):
                refuse(made.flag, shown, f"no value {in_words(needed)}")


def holds(values: dict[str, Any], needed: str) -> bool:
    """Whether ``needed``, as in ``option``, is so."""
    for sign in ("!=", "=", ">"):
        key, found, wanted = needed.partition(sign)
        if found:
            value = values[key]
            return value > int(wanted) if sign == ">" else (str(value) == wanted) is (sign == "=")
    return values[needed] not in (None, False)


def in_words(needed: str) -> str:
    """What it is where ``needed`` is not so: ``without --fp8-recipe delayed``, ``with --softmax-type vanilla``."""
    if needed == "transformer_impl=transformer_engine":
        return "without Transformer Engine (requirements-gpu.txt, --transformer-impl transformer_engine)"
    for sign, word in (("!=", "with"), ("=", "without"), (">", "without")):
        key, found, wanted = needed.partition(sign)
        if found:
            flag = option_table()[key].flag
            return f"{word} --{flag} {'above ' if sign == '>' else ''}{wanted}"
    return f"without --{option_table()[needed].flag}"
