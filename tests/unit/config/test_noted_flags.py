"""Flags of Megatron-LM that are noted or translated, and the flags of three of its scripts, one by one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from umv2_megatron.config.flags import parse_flags, read_mapping, refused
from umv2_megatron.config.noted_flags import FILES, entries, translate
from umv2_megatron.config.option_table import names, option_table
from umv2_megatron.config.resolve import resolve
from umv2_megatron.config.usage import UsageError

HERE = Path(__file__).parent
# What each script has that is refused here; docs/megatron-lm.md says why.
REFUSED = {
    "train_llama3_8b_h100_fp8": set(),
    "train_mixtral_8x7b_distributed": set(),
    "train_gpt3_175b_distributed": {"fp16", "vocab-file", "merge-file"},
}


def arguments(script: str) -> list[list[str]]:
    """Flag and values of every line of a script's arguments."""
    lines = (HERE / f"megatron_lm_{script}.txt").read_text(encoding="utf-8").splitlines()
    return [line.split() for line in lines if line.startswith("--")]


@pytest.mark.parametrize("script", REFUSED)
def test_every_flag_of_a_script_of_megatron_lm(script: str) -> None:
    """Each is a setting with a value that it takes, noted, translated, or refused with a reason."""
    given = [flag.removeprefix("--") for flag, *_ in arguments(script)]
    told = {flag for flag in given if flag not in names() and refused(flag)}
    assert told == REFUSED[script]
    for flag, *values in arguments(script):
        if flag.removeprefix("--") not in told and values != ["Llama2Tokenizer"]:
            parse_flags([flag, *values], "program", "")


def test_the_script_of_llama_reaches_the_check_for_transformer_engine() -> None:
    """All other checks of a whole configuration are passed."""
    argv = [word for line in arguments("train_llama3_8b_h100_fp8") for word in line]
    with pytest.raises(UsageError) as error:
        resolve([*argv, "--ffn-variant", "dense", "--transformer-impl", "local"], 8, for_training=False)
    assert str(error.value).startswith("--layernorm-zero-centered-gamma is on; expected no value without Transformer")


def test_the_script_of_mixtral_is_accepted_but_for_its_tokenizer() -> None:
    """With --ffn-variant, which says that experts take the place of the memory layers."""
    argv = [word for line in arguments("train_mixtral_8x7b_distributed") for word in line]
    argv[argv.index("Llama2Tokenizer")] = "SentencePieceTokenizer"
    argv.remove("--moe-grouped-gemm")  # needs Transformer Engine
    run = resolve([*argv, "--ffn-variant", "moe", "--transformer-impl", "local"], 32, for_training=False)
    assert run.values["num_moe_experts"] == 8
    assert len(run.notes) == 2 and "use-mcore-models: models are always megatron-core's" in run.describe()


def test_translations() -> None:
    argv = ["--recompute-activations", "--lr", "1", "--grad-reduce-in-bf16", "--distributed-backend", "nccl",
            "--distributed-backend=nccl", "--use-rotary-position-embeddings"]  # fmt: skip
    translated, notes = translate(argv)
    assert translated == ["--recompute-granularity", "selective", "--lr", "1",
                          "--no-accumulate-allreduce-grads-in-fp32", "--position-embedding-type", "rope"]  # fmt: skip
    assert len(notes) == 5 and notes[0] == "--recompute-activations: stands for --recompute-granularity selective"


def test_files_of_paths(tmp_path: Path) -> None:
    blend, splits = tmp_path / "blend.txt", tmp_path / "splits.json"
    blend.write_text("0.3 first\n0.7 second\n")
    splits.write_text(json.dumps({"train": [1, "a"], "valid": ["b"]}))
    values = parse_flags(["--data-args-path", str(blend), "--lr", "1"], "program", "")[0]
    assert values == {"data_path": ["0.3", "first", "0.7", "second"], "lr": 1.0}
    values = parse_flags([f"--per-split-data-args-path={splits}"], "program", "")[0]
    assert values == {"train_data_path": ["1", "a"], "valid_data_path": ["b"]}


@pytest.mark.parametrize("argv, words", [
    (["--distributed-backend", "gloo"], "--distributed-backend is 'gloo'; expected nccl"),
    (["--distributed-backend"], "--distributed-backend has no value"),
    (["--use-mcore-models=1"], "--use-mcore-models is '1'; expected no value"),
    (["--data-args-path", "nowhere"], "--data-args-path is nowhere, which cannot be read"),
    (["--data-args-path", "{empty}"], "which is empty; expected a file with the values of --data-path"),
    (["--per-split-data-args-path", "{empty}"], "expected a JSON file"),
    (["--per-split-data-args-path", "{wrong}"], "expected a JSON file"),
    (["--per-split-data-args-path"], "--per-split-data-args-path has no value"),
])  # fmt: skip
def test_mistakes(argv: list[str], words: str, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "wrong").write_text('{"train": "a", "eval": []}')
    files = {name: str(tmp_path / name) for name in ("empty", "wrong")}
    with pytest.raises(UsageError) as error:
        parse_flags([word.format(**files) for word in argv], "program", "")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_noted_flag_is_no_setting_and_none_of_a_file() -> None:
    for flag in (*entries(), *FILES):
        assert flag not in names() and refused(flag) is None
        with pytest.raises(UsageError, match="is for a command line"):
            read_mapping({flag: True}, "config.yaml")
    means = [word.removeprefix("--") for each in entries().values() for word in each.get("means", [])]
    assert all(flag in names() for flag in means if flag not in ("selective", "rope")), means
    assert option_table()
