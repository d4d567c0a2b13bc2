"""Drawn texts for every flag that takes one: the text is read, or refused in one sentence that names a flag.

Hypothesis draws the same texts in every run (``derandomize``); what once failed is written out besides.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from umv2_megatron.config.data_config import parse_blend, parse_split
from umv2_megatron.config.memory_config import parse_layer_freq
from umv2_megatron.config.option_table import option_table
from umv2_megatron.config.resolve import resolve
from umv2_megatron.config.text_numbers import LARGEST, whole_number, whole_numbers
from umv2_megatron.config.usage import UsageError
from umv2_megatron.conversion.plan import parse_size
from umv2_megatron.evaluation.tasks.mixture import integers, task_names
from umv2_megatron.hf.configuration_umv2 import parse_layer_freq as parse_layer_freq_of_exports
from umv2_megatron.model.layer_specs import read_memory_config
from umv2_megatron.parallel.launch import discover

pytestmark = pytest.mark.thorough

QUICK = settings(derandomize=True, database=None, deadline=None, max_examples=100)
TINY = [
    "--model-preset", "umv2-tiny", "--train-iters", "10", "--mock-data", "--tokenizer-type", "NullTokenizer",
    "--vocab-size", "64", "--lr", "1e-3", "--seq-length", "16",
]  # fmt: skip
AWKWARD = [
    "²", "٣", "[1]*99999999999", "[1]*²", "9" * 5000, "9" * 30, "-1", "0", "", " ", "\n", "nan", "inf", "1e400",
    "1e308", "1e308,1e308", "2024-99-99", "[" * 400, "{", "&a [*a]", "[[1]]", "1_000", "true", "null", "0,²", "1,,2",
    "9223372036854775807", "9223372036854775808", "[9223372036854775807]", "1e18", "[1,0]*2", "[1,0]+[1]*2",
]  # fmt: skip
TEXTS = st.one_of(
    st.sampled_from(AWKWARD),
    st.text(st.sampled_from("0123456789,.[]*+- eE²٣xGBnaif\n"), max_size=12),
    st.text(st.sampled_from(string.printable), max_size=8),
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(str),
    st.lists(st.integers(-2, 2), max_size=6).map(str),
)
PARSERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "layer freq": (lambda text: parse_layer_freq(text, 4), "--memory-layer-freq"),
    "layer freq of exports": (lambda text: parse_layer_freq_of_exports(text, 4), "memory_layer_freq"),
    "split": (parse_split, "--split"),
    "blend": (lambda text: parse_blend("--data-path", text.split(" ")), "--data-path"),
    "size": (parse_size, "--max-shard-size"),
    "integers": (lambda text: integers("--lengths", text), "--lengths"),
    "tasks": (lambda text: task_names("--task", text), "--task"),
    "memory of a stock Megatron-LM": (
        lambda text: read_memory_config("{layer_freq: " + text + "}"), "UMV2_MEMORY_CONFIG",
    ),
    "rank of torchrun": (
        lambda text: discover({"RANK": text, "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}), "RANK",
    ),
}  # fmt: skip


def one_sentence(error: ValueError, name: str) -> None:
    text = str(error)
    assert name in text and "\n" not in text, text


@pytest.mark.parametrize("kind", PARSERS)
def test_every_parser_reads_or_names_its_flag(kind: str) -> None:
    parse, name = PARSERS[kind]

    @QUICK
    @given(TEXTS)
    def check(text: str) -> None:
        try:
            parse(text)
        except ValueError as error:
            one_sentence(error, name)

    for text in AWKWARD:
        check.hypothesis.inner_test(text)
    check()


@pytest.mark.parametrize("key", [key for key, made in option_table().items() if not made.switches])
def test_every_flag_takes_the_awkward_texts_or_refuses_them(key: str) -> None:
    flag = option_table()[key].flag
    for text in AWKWARD:
        try:
            resolve([*TINY, f"--{flag}={text}"])
        except UsageError as error:
            one_sentence(error, "--")


@settings(QUICK, max_examples=250)
@given(st.sampled_from([key for key, made in option_table().items() if not made.switches]), TEXTS)
def test_flags_with_drawn_texts(key: str, text: str) -> None:
    try:
        resolve([*TINY, f"--{option_table()[key].flag}={text}"])
    except UsageError as error:
        one_sentence(error, "--")


@QUICK
@given(st.lists(st.tuples(st.lists(st.booleans(), min_size=1, max_size=4), st.integers(0, 3)), min_size=1, max_size=4))
@example([([True, False], 2)])
def test_layer_lists_mean_what_python_means(terms: list[tuple[list[bool], int]]) -> None:
    text = "+".join(f"[{','.join(str(int(one)) for one in part)}]*{repeats}" for part, repeats in terms)
    expected = [bool(one) for one in eval(text)]
    for parse in (parse_layer_freq, parse_layer_freq_of_exports):
        if expected:
            assert parse(text, len(expected)) == expected
        with pytest.raises(ValueError, match="memory.layer.freq"):
            parse(text, len(expected) + 1)


@QUICK
@given(st.integers(0, 2**65))
def test_whole_numbers(number: int) -> None:
    assert whole_number(f" 0{number}") == (number if number <= LARGEST else None)
    assert whole_numbers(f"{number % 7},{number % 5}") == [number % 7, number % 5]
    assert whole_numbers(f"1,-{number}") is None


def test_what_failed_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^--memory-layer-freq is '\[1\]\*99999999999'; expected a positive integer"):
        resolve([*TINY, "--memory-layer-freq", "[1]*99999999999"])  # was a MemoryError
    with pytest.raises(UsageError, match="^--memory-layer-freq is '²'"):
        resolve([*TINY, "--memory-layer-freq", "²"])  # did not name the flag
    with pytest.raises(UsageError, match="^--profile-ranks is '²'"):
        resolve([*TINY, "--profile", "--profile-ranks", "²"])  # failed in training
    with pytest.raises(UsageError, match="^--num-layers is 99999999999; expected an integer of at least 1 and at most"):
        resolve([*TINY, "--num-layers", "99999999999"])  # was a MemoryError after minutes
    with pytest.raises(UsageError, match="^--window-size is .*; expected a list"):
        resolve([*TINY, "--window-size", "[" * 1000])  # was a RecursionError
    with pytest.raises(ValueError, match="^--split is '1e308,1e308'"):
        parse_split("1e308,1e308")  # gave three times 0
    (tmp_path / "run.yaml").write_text("lr: 2024-99-99\n")
    with pytest.raises(UsageError, match="^--config is"):
        resolve([*TINY, "--config", str(tmp_path / "run.yaml")])
    with pytest.raises(ValueError, match="^UMV2_MEMORY_CONFIG"):
        read_memory_config("{layer_freq: 2024-99-99}")


def test_a_long_slurm_job_is_counted_without_listing_its_nodes() -> None:
    slurm = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "0", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"}
    launch = discover({**slurm, "SLURM_TASKS_PER_NODE": "2(x2),4,1(x99999999999)", "SLURM_NODEID": "2"})
    assert launch.local_world_size == 4  # the list of all nodes was a MemoryError
