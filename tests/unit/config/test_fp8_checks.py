"""What FP8 cannot compute is refused before a run starts, in one sentence that names the flag."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest

from umv2_megatron.config.fp8_checks import check_fp8, wanted_device
from umv2_megatron.config.option_table import option_table
from umv2_megatron.config.presets import PRESETS
from umv2_megatron.config.resolve import model_values, resolve
from umv2_megatron.config.usage import UsageError

TINY = ["--model-preset", "umv2-tiny", "--mock-data", "--tokenizer-type", "NullTokenizer", "--train-iters", "2",
        "--transformer-impl", "transformer_engine", "--bf16", "--fp8-format", "hybrid"]  # fmt: skip
MXFP8 = ["--fp8-recipe", "mxfp8"]
SPLIT = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]


class Enough(Exception):
    """The checks are passed; megatron-core would be asked next."""


def checked(argv: list[str], ranks: int, **others: Any) -> str:
    """The refusal of ``argv``, or an empty text."""

    def stop(run: Any) -> None:
        raise Enough

    try:
        resolve(argv, ranks, before_mcore=stop, **others)
    except UsageError as error:
        assert "\n" not in str(error)
        return str(error)
    except Enough:
        pass
    return ""


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with Transformer Engine."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: find("json" if name == "transformer_engine" else name, *rest)
    )


@pytest.mark.parametrize(
    ("argv", "ranks", "told"),
    [
        (["--ffn-hidden-size", "136"], 1, ["--ffn-hidden-size is 136", "a multiple of 16 with", "--fp8-format out"]),
        (["--ffn-hidden-size", "144", *SPLIT], 2, ["is 144", "16 x --tensor-model-parallel-size (2) = 32", "lower"]),
        (["--ffn-hidden-size", "144", *MXFP8], 1, ["--ffn-hidden-size is 144", "a multiple of 32", "mxfp8"]),
        (["--hidden-size", "72"], 1, ["--hidden-size is 72", "a multiple of 16"]),
        (["--fp8-recipe", "blockwise", *SPLIT], 2, ["--hidden-size is 64", "a multiple of 128", "--sequence-parallel"]),
        (["--seq-length", "36", "--micro-batch-size", "2"], 1, ["--micro-batch-size is 2", "72 tokens", "of 16"]),
        (["--seq-length", "36", "--disable-fp8-wgrad"], 1, ["--micro-batch-size is 1", "36 tokens", "of 8"]),
        (["--seq-length", "48", *MXFP8], 1, ["48 tokens", "a multiple of 32"]),
        (["--seq-length", "8", "--micro-batch-size", "6", "--tensor-model-parallel-size", "4", "--sequence-parallel"],
         4, ["--micro-batch-size is 6", "12 tokens", "a multiple of 8"]),
        (["--context-parallel-size", "2", "--seq-length", "48"], 2, ["24 tokens", "a multiple of 16"]),
        (["--fp8-param-gather"], 1, ["--fp8-param-gather is on", "without --use-distributed-optimizer"]),
        (["--fp8-param-gather", "--use-distributed-optimizer", *MXFP8], 1, ["--fp8-param-gather is on", "mxfp8"]),
        (["--first-last-layers-bf16"], 1, ["--first-last-layers-bf16 is on", "delayed", "tensorwise"]),
        (["--fp8-recipe", "tensorwise", "--disable-fp8-wgrad"], 1, ["--fp8-wgrad is off", "--fp8-recipe delayed"]),
        (["--ffn-variant", "moe", "--num-experts", "4"], 1, ["--fp8-format is hybrid", "--ffn-variant moe"]),
    ],
)  # fmt: skip
def test_misuse_is_refused(argv: list[str], ranks: int, told: list[str]) -> None:
    text = checked([*TINY, *argv], ranks)
    for part in told:
        assert part in text, text


@pytest.mark.parametrize(
    ("argv", "ranks"),
    [([], 1), (["--seq-length", "40", "--disable-fp8-wgrad"], 1), ([*MXFP8], 1), ([*SPLIT], 2),
     (["--fp8-param-gather", "--use-distributed-optimizer"], 1),
     (["--fp8-recipe", "tensorwise", "--first-last-layers-bf16"], 1)],
)  # fmt: skip
def test_what_fits_is_not_refused(argv: list[str], ranks: int) -> None:
    assert checked([*TINY, *argv], ranks) == ""


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_whose_ffn_does_not_fit_are_refused(preset: str) -> None:
    """The 227M preset with 8 tensor-parallel ranks, and several of 3M with one."""
    values = resolve(["--model-preset", preset], for_training=False).values
    for ranks in (1, 2, 4, 8):
        argv = ["--model-preset", preset, *TINY[2:], "--tensor-model-parallel-size", str(ranks)]
        text = checked(argv, ranks, for_training=False)
        if values["ffn_variant"] != "moe" and values["ffn_hidden_size"] % (16 * ranks):
            assert "--ffn-hidden-size" in text, (ranks, text)
        else:
            assert "--ffn-hidden-size" not in text, (ranks, text)


def test_recipes_that_a_gpu_lacks() -> None:
    hopper, ampere, ada, blackwell = (9, 0), (8, 0), (8, 9), (10, 0)
    assert "10.x (Blackwell)" in (wanted_device("mxfp8", hopper, "13.0") or "")
    assert "8.9 or more" in (wanted_device("delayed", ampere, "13.0") or "")
    assert "CUDA 12.9 (torch has 12.8)" in (wanted_device("blockwise", hopper, "12.8") or "")
    assert "compute capability 9.0" in (wanted_device("blockwise", ada, "13.0") or "")
    for recipe, gpu in (("delayed", ada), ("tensorwise", hopper), ("blockwise", hopper), ("mxfp8", blackwell)):
        assert wanted_device(recipe, gpu, "12.9") is None


def test_a_gpu_without_the_recipe_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    run = resolve(TINY[:7], 1)
    run._replace(fp8="hybrid", fp8_recipe="mxfp8")
    gpu = SimpleNamespace(is_available=lambda: True, get_device_capability=lambda: (9, 0))
    monkeypatch.setattr(torch, "cuda", gpu)
    with pytest.raises(UsageError, match=r"^--fp8-recipe is mxfp8; expected .*capability 9\.0$"):
        check_fp8(run)


def test_no_setting_of_fp8_belongs_to_the_model() -> None:
    """Evaluation, generation and a resume without FP8 take the model's settings from a checkpoint."""
    table = option_table()
    of_fp8 = {key for key, made in table.items() if key == "fp8" or "fp8" in made.needs}
    assert {"fp8", "fp8_recipe", "tp_only_amax_red", "disable_parameter_transpose_cache"} <= of_fp8
    assert not of_fp8 & model_values({key: made.default for key, made in table.items()}).keys()
