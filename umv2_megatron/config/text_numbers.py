"""Whole numbers in the texts of flags and environment variables. Loads no torch."""

from __future__ import annotations

LARGEST = 2**63 - 1
"""What fits 64 bits: a larger number is no size, count or seed of anything here."""


def whole_number(text: str) -> int | None:
    """The number of 0 or more that ``text`` is, in the digits 0 to 9; None for anything else, and above ``LARGEST``.

    ``str.isdigit`` is no such check: it accepts signs such as a superscript 2, which ``int`` refuses, and ``int``
    refuses a text of many thousand digits.
    """
    digits = text.strip()
    if not (digits.isascii() and digits.isdigit()) or len(digits.lstrip("0")) > len(str(LARGEST)):
        return None
    number = int(digits.lstrip("0") or "0")
    return number if number <= LARGEST else None


def whole_numbers(text: str) -> list[int] | None:
    """The numbers of a list such as ``0,1``, separated by commas; None if one of them is none."""
    found = [whole_number(word) for word in text.split(",")]
    numbers = [number for number in found if number is not None]
    return numbers if len(numbers) == len(found) else None
