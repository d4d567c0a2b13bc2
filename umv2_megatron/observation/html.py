"""HTML in which every text is escaped: only what ``tag`` made counts as HTML."""

from __future__ import annotations

import html


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(name: str, /, *children: str | None, **attributes: str | float | None) -> Html:
    """An element. Children that are not ``Html`` are escaped, as are the values of attributes; None is left out.

    ``class_`` stands for class; an underscore within a name stands for a dash.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = "".join(escaped(child) for child in children if child is not None)
    return Html(f"<{name}{given}>" if name in ("img", "meta") else f"<{name}{given}>{inner}</{name}>")


def joined(parts: list[Html]) -> Html:
    """One after the other."""
    return Html("".join(parts))


def escaped(text: str) -> str:
    """``text`` as HTML."""
    return str(text) if isinstance(text, Html) else html.escape(str(text))
