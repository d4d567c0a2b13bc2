"""One setting: how a dataclass field says what its flag means, may be, and takes effect with. Loads no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


def option(
    default: Any,
    help: str,
    *,
    choices: tuple | None = None,
    letter: str | None = None,
    flags: tuple[str, ...] = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    needs: tuple[str, ...] = (),
    read_by: str = "",
) -> Any:
    """A dataclass field that also carries what a command-line flag needs.

    Args:
        default, help, choices: of the flag.
        letter: of a size in formulas.
        flags: further names, without dashes; one that begins with ``no-`` or ``disable-`` turns a switch off.
        at_least, above, at_most, below: limits of a number, or of each number of a list.
        needs: what must be so for the setting to take effect, each ``key`` (is on, or has a value), ``key=value`` or
            ``key>number`` (of another setting). Where it is not so, another value than the default is refused.
        read_by: for a setting that changes no number of a run on one CPU rank: the module (of mcore, if no other is
            named) that reads it, and for what.
    """
    metadata = {
        "help": help, "choices": choices, "letter": letter, "flags": flags, "needs": needs, "read_by": read_by,
        "limits": {"at least": at_least, "above": above, "at most": at_most, "below": below},
    }  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Option:
    """One setting. ``parse`` turns text into a value; ``switches`` maps flags without an argument to the value set;
    ``nullable`` says that None (null in a file) is a value; for the rest see ``option``."""

    key: str
    section: str
    help: str
    default: Any
    parse: Callable[[str], Any] | None
    expected: str
    choices: tuple | None
    flags: tuple[str, ...]
    switches: dict[str, bool]
    repeated: bool = False
    nullable: bool = False
    limits: dict[str, float] = dataclasses.field(default_factory=dict)
    needs: tuple[str, ...] = ()
    read_by: str = ""

    @property
    def flag(self) -> str:
        """Its flag, without dashes: Megatron-LM's name where mcore's field has another; of a switch, the one for on."""
        return self.flags[-1] if self.flags else next(iter(self.switches))

    def within(self, value: float) -> bool:
        """Whether a number is inside the limits."""
        limits = self.limits
        return (
            value >= limits.get("at least", value)
            and value <= limits.get("at most", value)
            and ("above" not in limits or value > limits["above"])
            and ("below" not in limits or value < limits["below"])
        )

    def range(self) -> str:
        """The limits in words: ``an integer of at least 1``, ``a number above 0 and at most 1``."""
        words = [f"{word} {limit:g}" for word, limit in self.limits.items()]
        joined = " and ".join(words)
        return f"{self.expected} of {joined}" if joined.startswith("at") else f"{self.expected} {joined}"
