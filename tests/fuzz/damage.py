"""Strategies that damage a good input: bytes, or one place in a JSON document."""

from __future__ import annotations

import copy
import json
import struct
from typing import Any

from hypothesis import strategies as st

ODD_INTEGERS = (0, 1, -1, 2, 3, 255, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 10**30)
ODD_TEXTS = (
    "", " ", ".", "..", "../x", "/", "/etc/passwd", "a/../../b", "\x00", "²", "\ud800", "nan", "null", "é", "x" * 300,
    "config.json", "float32", "int4", "__0_0.distcp",
)  # fmt: skip
ODD_VALUES: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(ODD_INTEGERS),
    st.sampled_from((0.5, -1.5, 1e308, float("nan"), float("inf"))),
    st.sampled_from(ODD_TEXTS),
    st.sampled_from(([], {}, [[]], [None], {"": None}, [1, 2], ["a"], {"a": 1})),
)


@st.composite
def damaged_bytes(draw: st.DrawFn, data: bytes, head: int = 64) -> bytes:
    """``data`` with one to three changes; half of them lie in its first ``head`` bytes, where headers are."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        size = len(changed)
        place = draw(st.one_of(st.integers(0, max(0, min(head, size) - 1)), st.integers(0, max(0, size - 1))))
        kind = draw(st.sampled_from(("flip", "number", "cut", "grow", "remove", "zero")))
        if kind == "flip" and size:
            changed[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "number":
            number = draw(st.sampled_from(ODD_INTEGERS)) % 2**64
            width = draw(st.sampled_from("BHIQ"))
            packed = struct.pack(f"<{width}", number % 2 ** (8 * struct.calcsize(width)))
            changed[place : place + len(packed)] = packed
        elif kind == "cut":
            del changed[place:]
        elif kind == "grow":
            changed += draw(st.binary(min_size=1, max_size=16))
        elif kind == "remove":
            del changed[place : place + draw(st.integers(1, 16))]
        else:
            changed[place : place + 8] = bytes(len(changed[place : place + 8]))
    return bytes(changed)


@st.composite
def damaged_json(draw: st.DrawFn, document: Any) -> Any:
    """``document`` with one or two of its nodes replaced by an odd value, removed, renamed or doubled."""
    changed = {"root": copy.deepcopy(document)}
    for _ in range(draw(st.integers(1, 2))):
        holder, key = draw(st.sampled_from(_places(changed)))
        kind = draw(st.sampled_from(("replace", "replace", "remove", "rename")))
        if kind == "remove" and holder is not changed:
            del holder[key]
        elif kind == "rename" and isinstance(holder, dict) and holder is not changed:
            holder[draw(st.sampled_from(ODD_TEXTS))] = holder.pop(key)
        else:
            holder[key] = copy.deepcopy(draw(ODD_VALUES))  # the next change may be inside of it
    return changed["root"]


def as_text(document: Any) -> bytes:
    """JSON as a file may hold it; lone surrogates are written as escapes."""
    return (json.dumps(document) + "\n").encode()


def _places(document: Any) -> list[tuple[Any, Any]]:
    """Every container with each of its keys, in document order."""
    found: list[tuple[Any, Any]] = []
    waiting = [document]
    while waiting:
        holder = waiting.pop(0)
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            found.append((holder, key))
            if isinstance(holder[key], (dict, list)):
                waiting.append(holder[key])
    return found
