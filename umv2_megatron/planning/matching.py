"""The model of another variant with the same activated FLOPs per token and the same total parameters.

The protocol of arXiv 2508.18756 (section 4.1): attention, depth and hidden size stay; what differs is how FLOPs and
parameters are spent. Sizes of the other variant's memory follow from those of the source by rules that give back the
published UltraMem and Memory+ baselines from the published UltraMemV2-227M/1.2B:

    rows read per token   L * h * K stays the same                          (20 x 32 = 4 x 2 x 80)
    numbers per key       R * Dk stays the same                             (2 x 192 = 2 x 192 = 1 x 384)
    width of a row        Dp + Dv stays; H where values are shared or a row is an expert (192 + 192 = 384; 768)

An n-gram layer has the heads of its variant, and H/h for the width of a row, as published: the h rows of a token are
joined to one vector of H numbers.

Then two numbers are solved for: the FFN's width (or that of an expert) for the FLOPs, and N (or the number of experts)
for the parameters, by turns, because each has some influence on both. Where the source has no memory of UltraMemV2, the
paper's sizing rules stand for it: Dk = H/4, Dp + Dv = H/2 with Dp:Dv = 1:3, K = 32 in every block.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from umv2_megatron.config.memory_config import MemoryConfig, hash_sizes
from umv2_megatron.config.option_table import SECTIONS, option_table
from umv2_megatron.config.resolve import from_layers
from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.config.variants import FFN_VARIANTS, OLMOE_LOSSES, SWITCHES, has_memory
from umv2_megatron.planning.flops import FlopsPerToken, flops_per_token
from umv2_megatron.planning.parameters import ParameterCount, count_parameters

# Settings that a variant brings or that are solved for, and so are not taken over from the source.
OWN_SETTINGS = ("ffn_variant", "num_moe_experts", "expert_model_parallel_size")
# Settings that say what a memory layer is, N apart, which is always among the flags found. How its tables are started
# and trained is not among them: that stays as the source's command line says.
SHAPE = tuple(
    f"memory_{name}"
    for name in ("key_dim", "value_dim", "pre_value_dim", "topk", "key_topk_cap", *SWITCHES)
    if name not in ("value_lr", "norm_gain_exponent")
)
UNREAD = ("memory_key_dim", "memory_key_topk_cap")
"""Those of ``SHAPE`` that n-gram layers have no use for."""
ROUNDS = 60


@dataclass(frozen=True)
class Model:
    """A model of one variant, as settings by key, with its counts."""

    values: dict[str, Any]
    memory: MemoryConfig | None

    @classmethod
    def of(cls, run: RunConfig) -> Model:
        """The model of a resolved configuration."""
        return cls(run.values, run.memory if run.has_memory else None)

    @property
    def variant(self) -> str:
        """What --ffn-variant says."""
        return self.values["ffn_variant"]

    @property
    def parameters(self) -> ParameterCount:
        """All parameters by kind."""
        return count_parameters(self.values, self.memory)

    @property
    def flops(self) -> FlopsPerToken:
        """Operations per token by part."""
        return flops_per_token(self.values, self.memory)

    def sized(self, width: int, count: int) -> Model:
        """The same model with an FFN (or experts) of ``width`` and ``count`` keys per side (or experts)."""
        if self.variant == "moe":
            return Model({**self.values, "moe_ffn_hidden_size": width, "num_moe_experts": count}, None)
        memory = dataclasses.replace(self.memory, num_keys=count) if self.memory is not None else None
        return Model({**self.values, "ffn_hidden_size": width}, memory)


@dataclass(frozen=True)
class Match:
    """``source`` and the model found, and how far the latter's figures deviate (0.01 is 1%)."""

    source: Model
    found: Model
    flops_deviation: float
    total_deviation: float
    flags: dict[str, Any]

    @property
    def error(self) -> float:
        """The larger deviation; a dense model is held to the FLOPs only."""
        return max(abs(self.flops_deviation), 0.0 if self.found.variant == "dense" else abs(self.total_deviation))


def match(
    source: Model, variant: str, kept: dict[str, Any] | None = None, total: int | None = None, tolerance: float = 0.01
) -> Match:
    """The model of ``variant`` that costs as much as ``source``.

    Args:
        source: what is to be met.
        variant: of the model wanted.
        kept: settings by key that it shall have; N, the number of experts and the widths are solved for all the same.
        total: parameters to have instead of the source's (a dense source has too few to be met); not for a dense model.
        tolerance: largest deviation of either figure; a dense model is held to the FLOPs only.

    Raises:
        ValueError: one sentence: an unknown variant, settings that cannot work, or no sizes within the tolerance.
    """
    if variant not in FFN_VARIANTS:
        raise ValueError(f"--to is {variant!r}; expected one of {', '.join(FFN_VARIANTS)}")
    if variant == "dense" and total is not None:
        raise ValueError(
            f"--total is {total}; expected no value with --to dense: a dense model is matched in FLOPs only"
        )
    solved = ("num_moe_experts", "moe_ffn_hidden_size") if variant == "moe" else ("ffn_hidden_size", "memory_num_keys")
    kept = {key: value for key, value in (kept or {}).items() if key not in solved}
    start, sizes = _start(source, variant, kept)
    wanted_flops, wanted_total = source.flops.forward, total or source.parameters.total
    nearest: Match | None = None
    for active in (1, 2, 4):  # more and narrower experts meet both figures better
        again = start
        if variant == "moe" and "moe_router_topk" not in kept:
            again = Model({**start.values, "moe_router_topk": active * start.values["moe_router_topk"]}, None)
        model = _solve(again, wanted_flops, wanted_total)
        flops = model.flops.forward / wanted_flops - 1
        parameters = model.parameters.total / wanted_total - 1
        found = Match(source, model, flops, parameters, _flags(source, model, sizes, kept))
        if nearest is None or found.error < nearest.error:
            nearest = found
        if nearest.error <= tolerance:
            return nearest
        if again is start:
            break
    assert nearest is not None
    missed = f"{_deviation(nearest.flops_deviation)} FLOPs than the {wanted_flops / 1e6:.2f} million wanted per token"
    if variant != "dense":
        missed += f" and {_deviation(nearest.total_deviation)} parameters than the {wanted_total:,} wanted"
    raise ValueError(
        f"--to {variant}: no sizes come within {100 * tolerance:g}%; the nearest model has {missed}; give other sizes "
        "with --keep, other parameters with --total, or a larger --tolerance"
    )


def completed(found: Match, combine: Callable[[dict[str, Any]], RunConfig]) -> Match:
    """``found`` with all flags that its model takes where the source's command line has flags of its own.

    Args:
        found: a match, whose flags leave to the variant's defaults what they can.
        combine: what the source's command line resolves to with settings by key added to it; raises ``ValueError``
            where they do not go together.

    Raises:
        ValueError: one sentence: nothing added to that command line makes the model.
    """
    flags, wanted = dict(found.flags), found.found
    for _ in range(2):  # a switch that had to be added can keep a default of the variant from following
        try:
            made = combine(flags).values
        except ValueError:  # the source's own switches do not go with the variant's
            made = found.source.values
        if wanted.memory is not None:
            told = [key for key in SHAPE if not (wanted.memory.hashes and key in UNREAD)]
            flags.update({key: wanted.values[key] for key in told if made[key] != wanted.values[key]})
    try:
        model = Model.of(combine(flags))
    except ValueError as error:
        raise ValueError(f"--to {wanted.variant}: its flags do not go with the first model's: {error}") from error
    if (model.parameters, model.flops) != (wanted.parameters, wanted.flops):
        raise ValueError(
            f"--to {wanted.variant}: with the first model's flags, those found make a model of "
            f"{model.parameters.total:,} parameters instead of {wanted.parameters.total:,}; leave flags of its "
            "FFN, memory or experts out of the first command"
        )
    return dataclasses.replace(found, flags=flags)


def _deviation(share: float) -> str:
    return f"{abs(share):.2%} {'more' if share > 0 else 'fewer'}"


def _start(source: Model, variant: str, kept: dict[str, Any]) -> tuple[Model, dict[str, Any]]:
    """The model wanted with a first guess of what is solved for, and the settings that the rules gave it."""
    own = {
        key
        for key, made in option_table().items()
        if made.section == SECTIONS[MemoryConfig]
        or key in OWN_SETTINGS
        or (key.startswith("moe_") and variant != "moe")
    }
    around = {key: value for key, value in source.values.items() if key not in own}
    chosen = {"ffn_variant": variant}
    # Without sizes first: how many memory layers and heads there are is the variant's matter.
    few = {"memory_topk": 1, "memory_pre_value_dim": 0} if variant in ("ultramem", "memory-plus", "pkm") else {}
    plain = from_layers(
        [("source", around), ("variant", chosen), ("guess", few), ("keep", kept)], 1, for_training=False
    )
    sizes = _memory_sizes(source, plain.memory, plain.num_layers, plain.hidden_size) if has_memory(variant) else {}
    guess = {"memory_num_keys": max(16, math.isqrt(sizes.get("memory_topk", 0)) + 1, sizes.get("memory_topk", 0))}
    if variant == "engram":
        guess = {"memory_num_keys": _least_keys(plain.memory)}
    layers = [("source", around), ("variant", chosen), ("rules", {**sizes, **(guess if sizes else {})}), ("keep", kept)]
    run = from_layers(layers, 1, for_training=False)
    return Model.of(run), sizes


def _memory_sizes(source: Model, target: MemoryConfig, num_layers: int, hidden: int) -> dict[str, Any]:
    """Dk, Dp, Dv and K by the rules at the top."""
    if target.hashes:
        return {"memory_value_dim": max(1, hidden // target.num_heads)}
    memory = source.memory
    pattern = MemoryConfig(key_dim=hidden // 4, pre_value_dim=hidden // 8, value_dim=hidden // 2 - hidden // 8, topk=32)
    pattern_layers = num_layers
    if memory is not None and source.variant == "umv2":
        pattern, pattern_layers = memory, sum(memory.memory_layers(num_layers))
    read = pattern_layers * pattern.num_heads * pattern.topk
    if memory is not None and not memory.hashes:
        read = sum(memory.memory_layers(num_layers)) * memory.num_heads * memory.topk
    row = pattern.pre_value_dim + pattern.value_dim
    wide = target.scoring == "additive"
    sizes = {
        "key_dim": max(1, pattern.tucker_rank * pattern.key_dim // target.tucker_rank),
        "topk": max(1, round(read / (sum(target.memory_layers(num_layers)) * target.num_heads))),
    }
    if target.has_pre_values:
        sizes["pre_value_dim"] = hidden if wide else pattern.pre_value_dim
        sizes["value_dim"] = hidden if wide else pattern.value_dim
    else:
        sizes["value_dim"] = hidden if wide else row - row % target.num_cores
    return {f"memory_{name}": value for name, value in sizes.items()}


def _solve(start: Model, flops: int, total: int) -> Model:
    """``start`` with the width and the number of keys or experts that come nearest to both figures."""
    experts = start.variant == "moe"
    least = start.values["moe_router_topk"] if experts else _least_keys(start.memory)
    count = start.values["num_moe_experts"] if experts else least
    width = 1
    for _ in range(ROUNDS):
        before = (width, count)
        width = _largest(lambda value, count=count: start.sized(value, count).flops.forward <= flops, 1)
        if start.variant != "dense":
            count = _largest(lambda value, width=width: start.sized(width, value).parameters.total <= total, least)
        if (width, count) == before:
            break

    def error(model: Model) -> float:
        parameters = 0.0 if start.variant == "dense" else abs(model.parameters.total / total - 1)
        return max(abs(model.flops.forward / flops - 1), parameters)

    def at_width(each: int) -> list[Model]:
        if start.variant == "dense":
            return [start.sized(each, count)]
        keys = _largest(lambda value: start.sized(each, value).parameters.total <= total, least)
        return [start.sized(each, keys), start.sized(each, keys + 1)]

    # Round widths where they are as good as any: within 0.5%, else the nearest.
    for multiple, enough in ((64, 0.005), (16, 0.005), (8, 0.005), (1, math.inf)):
        base = width // multiple * multiple
        widths = [each for each in range(base - multiple, base + 3 * multiple, multiple) if each >= 1]
        best = min((model for each in widths for model in at_width(each)), key=error)
        if error(best) <= enough:
            return best
    raise AssertionError("multiples of 1 are always near enough")


def _least_keys(memory: MemoryConfig | None) -> int:
    """The smallest N with which a layer scores as many keys as it keeps, or every hash has a table."""
    if memory is None:
        return 1
    if memory.hashes:
        heads = memory.num_heads
        return next(n for n in range(1, 1 << 16) if len(hash_sizes(n * n, heads)) == heads)
    enough = (n for n in range(1, 1 << 16) if dataclasses.replace(memory, num_keys=n).scored_keys >= memory.key_topk)
    return next(enough)


def _largest(holds: Any, least: int) -> int:
    """The largest integer from ``least`` for which ``holds``; ``least`` where it holds for none."""
    high = max(least, 1)
    if not holds(high):
        return least
    while holds(high * 2):
        high *= 2
    low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _flags(source: Model, found: Model, sizes: dict[str, Any], kept: dict[str, Any]) -> dict[str, Any]:
    """Settings that make the model out of the source's command line."""
    flags: dict[str, Any] = {"ffn_variant": found.variant}
    if found.variant == "moe":
        for key in ("num_moe_experts", "moe_router_topk", "moe_ffn_hidden_size"):
            flags[key] = found.values[key]
        if source.variant != "moe":  # where the number of experts is given, their losses have to be as well
            flags.update({key: found.values[key] for key in OLMOE_LOSSES})
        return {**flags, **kept}
    flags["ffn_hidden_size"] = found.values["ffn_hidden_size"]
    if found.memory is not None:
        flags.update(memory_num_keys=found.memory.num_keys, **{key: found.values[key] for key in sizes})
    return {**flags, **kept}
