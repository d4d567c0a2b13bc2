"""YAML text as Python values, in which a mapping has every key once."""

from __future__ import annotations

from typing import Any


def parse_yaml(text: str, fast: bool = False) -> Any:
    """The value of a YAML (or JSON) text.

    With ``fast`` libyaml's parser is taken where it is installed; it must not read a text of unknown depth, because it
    does not count how deeply it has gone down.

    Raises ``ValueError``, in one line, where the text is not YAML or a mapping has a key twice, of which YAML itself
    would take the last without a word.
    """
    import yaml  # not for --help

    kind = getattr(yaml, "CSafeLoader", yaml.SafeLoader) if fast else yaml.SafeLoader
    try:
        loader = kind(text)  # reads the first characters, and refuses those that YAML does not have
        try:
            tree = loader.get_single_node()
            if tree is None:
                return None
            _refuse_repeated_keys(tree, "", set())
            return loader.construct_document(tree)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a character, a date or a nesting that cannot be
        raise ValueError(" ".join(str(error).split())) from error


def _refuse_repeated_keys(node: Any, where: str, seen: set[int]) -> None:
    if id(node) in seen:  # an alias, of which there may be many, or itself
        return
    seen.add(id(node))
    if node.id == "sequence":
        for item in node.value:
            _refuse_repeated_keys(item, where, seen)
    elif node.id == "mapping":
        names = set()
        for key, value in node.value:
            name = key.value if key.id == "scalar" else None
            if name in names:
                line = key.start_mark.line + 1
                raise ValueError(f"{where}{name} is there twice, again in line {line}; expected every key once")
            if name is not None:
                names.add(name)
            _refuse_repeated_keys(value, f"{where}{name}: ", seen)
