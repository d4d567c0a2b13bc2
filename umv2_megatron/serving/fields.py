"""Single fields of a request, checked. A wrong one is an ``ApiError`` that names it, its value and what is right.

A field that is null is one that is not given, as in OpenAI's API.
"""

from __future__ import annotations

import math
from typing import Any

from umv2_megatron.serving.errors import ApiError

Body = dict[str, Any]


def wrong(name: str, value: object, expected: str, code: str | None = None) -> ApiError:
    """``value`` of the field ``name`` is not ``expected``."""
    shown = ascii(value)  # a lone surrogate could not be sent back
    return ApiError(
        f"{name} is {shown if len(shown) <= 80 else shown[:77] + '...'}; expected {expected}", name, code=code
    )


def integer(
    body: Body, name: str, low: int, high: int, default: int | None = None, too_high: str | None = None
) -> int | None:
    """An integer from ``low`` to ``high``; ``too_high`` is OpenAI's code for one above."""
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not int or not low <= value <= high:  # True is an int, too
        raise wrong(name, value, f"an integer from {low} to {high}", too_high if _above(value, high) else None)
    return value


def _above(value: Any, high: int) -> bool:
    return type(value) is int and value > high


def number(body: Body, name: str, low: float, high: float, default: float) -> float:
    """A number from ``low`` to ``high``."""
    value = body.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or not low <= value <= high or not math.isfinite(value):
        raise wrong(name, value, f"a number from {low:g} to {high:g}")
    return float(value)


def switch(body: Body, name: str) -> bool:
    """True or false; false where it is not given."""
    value = body.get(name)
    if value is not None and type(value) is not bool:
        raise wrong(name, value, "true or false")
    return bool(value)


def text(name: str, value: object) -> str:
    """A string that can be written as UTF-8."""
    if not isinstance(value, str):
        raise wrong(name, value, "a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise wrong(name, value, "text without lone surrogates") from None
    return value


def stops(body: Body, most: int = 4, longest: int = 1000) -> tuple[str, ...]:
    """Strings that end a text: one, or up to ``most``, of at most ``longest`` characters each."""
    value = body.get("stop")
    if value is None:
        return ()
    found = value if isinstance(value, list) else [value]
    if len(found) > most:
        raise wrong("stop", value, f"at most {most} strings")
    for one in found:
        if not 0 < len(text("stop", one)) <= longest:
            raise wrong("stop", one, f"a string of 1 to {longest} characters")
    return tuple(found)


def biases(body: Body, vocab_size: int) -> dict[int, float]:
    """``logit_bias``: numbers from -100 to 100 by token id."""
    value = body.get("logit_bias")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise wrong("logit_bias", value, "an object of numbers by token id")
    found = {}
    for key in value:
        if not (key.isascii() and key.isdigit() and len(key) < 20 and int(key) < vocab_size):
            raise wrong("logit_bias", key, f"token ids below {vocab_size} as keys")
        if value[key] is None:
            raise wrong("logit_bias", None, "a number from -100 to 100")
        try:
            found[int(key)] = number(value, key, -100, 100, 0.0)
        except ApiError:
            raise wrong("logit_bias", value[key], "numbers from -100 to 100") from None
    return found


def only(body: Body, known: set[str], neutral: dict[str, tuple]) -> None:
    """Refuse fields that are not ``known``, unless they have a value of ``neutral`` that asks for nothing."""
    for name, value in body.items():
        if name in known or value is None:
            continue
        if name not in neutral:
            raise ApiError(
                f"{ascii(name)[:80]} is not supported; leave it out", name[:80].encode("ascii", "replace").decode()
            )
        if not any(type(value) is type(one) and value == one for one in neutral[name]):
            raise wrong(name, value, "it to be left out: the server does not support it", "unsupported_parameter")
