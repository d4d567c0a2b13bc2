"""Drawn combinations of flags for the training program and the tools, and drawn --config files.

The texts of single flags are drawn in tests/unit/config/test_drawn_texts.py; here the values are mostly good ones, so
that flags meet each other.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from damage import ODD_VALUES
from hypothesis import example, given
from hypothesis import strategies as st
from rule import cases, drawing, run_tool_with, run_training_with

from umv2_megatron.commands import make_tasks, match, plan, pretrain, train_tokenizer
from umv2_megatron.config.option import Option
from umv2_megatron.config.option_table import option_table
from umv2_megatron.config.presets import PRESETS

TINY = ["--model-preset", "umv2-tiny", "--train-iters", "10", "--mock-data", "--tokenizer-type", "NullTokenizer",
        "--vocab-size", "64", "--lr", "1e-3", "--seq-length", "16"]  # fmt: skip
NUMBERS = ("0", "1", "2", "3", "4", "8", "16", "64", "100", "-1", "0.5", "1.0", "1e-3", "1.5", "[1,0]", "2,4")


def values_of(option: Option) -> st.SearchStrategy[str]:
    """Texts that the option could take, most of them legal."""
    if option.choices:
        return st.sampled_from([str(choice) for choice in option.choices])
    return st.sampled_from(NUMBERS)


@st.composite
def flags_of_training(draw: st.DrawFn) -> list[str]:
    """One to six flags of the training program, with values."""
    argv = []
    for key in draw(st.lists(st.sampled_from(sorted(option_table())), min_size=1, max_size=6, unique=True)):
        option = option_table()[key]
        if option.switches:
            argv.append("--" + draw(st.sampled_from(sorted(option.switches))))
        else:
            argv.append(f"--{option.flag}={draw(values_of(option))}")
    return argv


@drawing(80)
@given(flags_of_training(), st.sampled_from(sorted(PRESETS)), st.sampled_from((1, 2, 4, 8)))
def test_combinations_of_training_flags(argv: list[str], preset: str, world: int) -> None:
    given_flags = [*TINY, "--model-preset", preset, *argv]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(world))
        patch.setenv("RANK", "0")
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("MASTER_PORT", "1")
        run_training_with(pretrain.main, [*given_flags, "--dry-run"])


@st.composite
def flags_of_a_tool(draw: st.DrawFn, parser: argparse.ArgumentParser, needed: list[str], folder: str) -> list[str]:
    """``needed`` and up to five flags of a tool."""
    argv = list(needed)
    actions = [action for action in parser._actions if action.option_strings and action.dest != "help"]
    for action in draw(st.lists(st.sampled_from(actions), max_size=5)):
        flag = draw(st.sampled_from(action.option_strings))
        if action.nargs == 0:
            argv.append(flag)
        elif action.choices:
            argv.append(f"{flag}={draw(st.sampled_from([str(choice) for choice in action.choices]))}")
        else:
            texts = (*NUMBERS, "", "x", "umv2-tiny", f"{folder}/none", folder, "umv2,dense", "1e400")
            argv.append(f"{flag}={draw(st.sampled_from(texts))}")
    return argv


TOOLS: dict[str, tuple[Any, Any, list[str]]] = {
    "make_tasks": (make_tasks.parser, make_tasks.main, []),
    "train_tokenizer": (train_tokenizer.build_parser, train_tokenizer.main, []),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_combinations_of_tool_flags(tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, main, needed = TOOLS[tool]
    monkeypatch.chdir(tmp_path)

    @drawing(30)
    @given(flags_of_a_tool(make(), needed, str(tmp_path)))
    def check(argv: list[str]) -> None:
        run_tool_with(make(), main, argv)

    check()


@drawing(25)
@given(flags_of_a_tool(plan.build_parser(searching=True), ["--model-preset=umv2-tiny"], "."), flags_of_training())
def test_combinations_of_planner_flags(own: list[str], others: list[str]) -> None:
    run_training_with(plan.main, [*own, *others[:2]])


@drawing(25)
@given(flags_of_a_tool(match.build_parser(), ["--model-preset=umv2-3m", "--to=dense"], "."), flags_of_training())
def test_combinations_of_match_flags(own: list[str], others: list[str]) -> None:
    run_training_with(match.main, [*own, *others[:2]])


KEYS = st.one_of(st.sampled_from(sorted(option_table())), st.sampled_from(("", "x", "memory", "--lr", "model-preset")))
MAPPINGS = st.dictionaries(KEYS, ODD_VALUES, max_size=4)
TEXTS = st.one_of(
    MAPPINGS.map(lambda mapping: yaml.safe_dump(mapping).encode()),
    MAPPINGS.map(lambda mapping: json.dumps(mapping).encode()),
    st.binary(max_size=20),
    st.text("abc:-[]{}#&*!|>%@`'\"\n\t 01.~", max_size=24).map(str.encode),
)


@drawing(50)
@given(data=TEXTS)
@example(data=b"&a [*a]")
@example(data=b"lr: &a [*a]")
@example(data=b"!!python/object/apply:os.system [exit]")
@example(data=b"{" * 3000)
@example(data=b"lr: " + b"[" * 3000)
@example(data=b"? [a]\n: b")
@example(data=b"lr: 1\nlr: 2")
@example(data=b"\0")
def test_drawn_config_files(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(data)
    run_training_with(pretrain.main, [*TINY, "--config", str(path), "--dry-run"])


@pytest.mark.parametrize("words", cases("commands"), ids=lambda words: " ".join(words))
def test_command_lines_that_once_failed(words: list[str]) -> None:
    program, argv = words[0], words[1:]
    main = {"plan": plan.main, "match": match.main, "pretrain": pretrain.main}[program]
    outcome = run_training_with(main, [*TINY, *argv, "--dry-run"] if program == "pretrain" else argv)
    assert outcome.code == 2 and argv[-1] in outcome.err, outcome
