"""Reads settings that are a value or a list of values, such as ``--moe-aux-loss-coeff 0.01`` or ``'[0.01, 0.001]'``.

YAML gives the shape, the annotation of the setting the type of the values: YAML alone would read ``1e-3`` as a text.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Callable
from typing import Any

import yaml


def list_reader(hint: Any) -> Callable[[str], Any]:
    """A function from text to a value or a list of values of the types that ``hint`` mentions.

    ``hint``: an annotation made of int, float or str, alone or in lists and tuples. The function raises ``ValueError``
    (or ``yaml.YAMLError``) where the text is nothing of the kind, or holds a number that is not finite.
    """
    kinds = _mentioned(hint)

    def value_of(found: Any) -> Any:
        if isinstance(found, list):
            return [value_of(item) for item in found]
        if str in kinds and isinstance(found, str):
            return found
        if isinstance(found, (str, int, float)) and not isinstance(found, bool) and kinds & {int, float}:
            number = float(str(found))
            if math.isfinite(number) and (float in kinds or number.is_integer()):
                return number if float in kinds else int(number)
        raise ValueError

    return lambda text: value_of(yaml.safe_load(text))


def _mentioned(hint: Any) -> set[Any]:
    inner = typing.get_args(hint)
    return set().union(*map(_mentioned, inner)) if inner else {hint}
