"""YAML of users: every key once, wherever it stands, and one line about what cannot be read."""

from __future__ import annotations

import pytest

from umv2_megatron.config.yaml_text import parse_yaml


@pytest.mark.parametrize("fast", [False, True])
def test_values_are_those_of_yaml(fast: bool) -> None:
    text = "a: &a {lr: 1e-3, on: true}\nb: {<<: *a, lr: 2.0}\nc: [*a, *a]\n"
    one = {"lr": "1e-3", True: True}
    assert parse_yaml(text, fast) == {"a": one, "b": {**one, "lr": 2.0}, "c": [one, one]}
    assert parse_yaml("", fast) is None and parse_yaml('{"a": [1, null]}', fast) == {"a": [1, None]}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: 1\nb: 2\na: 3\n", "a is there twice, again in line 3; expected every key once"),
        ("a:\n  b: [1, {c: 1, c: 2}]\n", "a: b: c is there twice, again in line 2"),
        ("a: &x {b: 1}\n<<: *x\n<<: *x\n", "<< is there twice"),
        ("a: [1\n", "expected ',' or ']'"),
        ("\0", "special characters are not allowed"),  # refused by the reader, before the parser
        ("a: 1\nb: \x01\n", "special characters are not allowed"),
        ("a: 2026-13-45\n", "month must be in 1..12"),
        ("a: &x [*x]\n? [1]\n: 2\n", "unhashable key"),
    ],
)
@pytest.mark.parametrize("fast", [False, True])
def test_what_cannot_be_is_said_in_one_line(fast: bool, text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match="^.+$") as refused:
        parse_yaml(text, fast)
    libyaml = ("expected", "control characters are not allowed")  # its own words
    assert sentence in str(refused.value) or fast and any(map(str(refused.value).__contains__, libyaml)), refused.value


def test_a_nesting_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match="recursion"):
        parse_yaml("[" * 100_000)
