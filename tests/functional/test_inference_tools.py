"""Text and lm-eval from the same model: tools/generate.py from checkpoint and export, and lm-eval's score against our
own evaluator's, which is skipped where lm-eval is not installed. The server's tests are in test_serve.py."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "functional"))

from conversions import edit_json, forked, saved, to_hf  # noqa: E402


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return saved(folder, tokenizer_type="ByteLevelTokenizer", vocab_size=257, seq_length=64,
                 max_position_embeddings=128)  # fmt: skip


@pytest.fixture(scope="module")
def export(run, tmp_path_factory) -> Path:
    return forked(to_hf, run, tmp_path_factory.mktemp("export") / "model")


def generated(argv: list[str], stdin: str = "") -> str:
    """What the program prints; errors come as the ``ValueError`` that its caller turns into a line."""
    from umv2_megatron.commands import generate

    sys.stdin = io.StringIO(stdin)
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()):
        generate.main(generate.parser().parse_args(argv))
    return printed.getvalue()


LONG = "def é" * 10  # 60 tokens, so that the context of 64 overflows
TALK = ["--prompt", LONG, "--max-new-tokens", "20"]
DRAWS = (["--temperature", "0"], ["--seed", "7", "--top-k", "40"])


def from_export(export: str, folder: str) -> tuple[list[str], list[str], list[str]]:
    """Texts with tables in memory, with tables in files, and of one prompt given in every way."""
    prompt = Path(folder, "prompt.txt")
    prompt.write_text("def é\n", encoding="utf-8")
    load, short = ["--load", export], ["--load", export, "--seed", "7", "--max-new-tokens", "9"]
    return (
        [generated([*load, *TALK, *draw]) for draw in DRAWS],
        [generated([*load, *TALK, *draw, "--memory-tables", "mmap"]) for draw in DRAWS],
        [
            generated([*short, "--prompt", "def é"]),
            generated([*short, "--prompt-file", str(prompt)]),
            generated([*short, "--prompt-file", "-"], "def é\n"),
            generated(short, "def é\n"),
        ],
    )


def test_checkpoint_and_export_give_the_same_text_however_it_is_asked_for(run, export, tmp_path):
    loads = (run, run / "iter_0000002")
    checkpoint = [forked(generated, ["--load", str(load), *TALK, *draw]) for load, draw in zip(loads, DRAWS)]
    greedy, sampled = checkpoint
    assert greedy.startswith(LONG) and len(greedy) > len(LONG) + 5 and sampled != greedy
    in_memory, in_files, asked = forked(from_export, str(export), str(tmp_path))
    assert in_memory == checkpoint and in_files == checkpoint
    assert len(set(asked)) == 1 and asked[0].startswith("def é")


MISSING = "model.layers.1.mlp.down_proj.weight"


def refusals(run: str, export: str, folder: str) -> list[str]:
    """The messages of calls that must be refused."""
    from safetensors.torch import load_file, save_file

    found = []
    names = ("lacking", "cut", "other", "mute", "garbled")
    copies = [shutil.copytree(export, Path(folder, name)) for name in names]
    lacking, cut = (copy / "model.safetensors" for copy in copies[:2])
    edit_json(copies[2] / "config.json", lambda config: config.update(vocab_size=250))
    for path in copies[3].glob("tokenizer*"):
        path.unlink()
    (copies[4] / "tokenizer.json").write_text("{}")
    bad = Path(folder, "bad.txt")
    bad.write_bytes(b"\xff\xfe")
    save_file({key: value for key, value in load_file(lacking).items() if key != MISSING}, lacking, {"format": "pt"})
    cut.write_bytes(cut.read_bytes()[:-8])
    for argv in (
        ["--load", run, "--memory-tables", "mmap", "--prompt", "x"],
        ["--load", export, "--ckpt-step", "2", "--prompt", "x"],
        ["--load", export, "--temperature", "-1", "--prompt", "x"],
        ["--load", export, "--max-new-tokens", "0", "--prompt", "x"],
        ["--load", str(lacking.parent), "--prompt", "x"],
        ["--load", str(cut.parent), "--prompt", "x"],
        ["--load", str(copies[2]), "--prompt", "x"],
        ["--load", str(copies[3]), "--prompt", "x"],
        ["--load", str(copies[4]), "--prompt", "x"],
        ["--load", str(Path(folder, "nosuch")), "--prompt", "x"],
        ["--load", export, "--seed", "99999999999999999999", "--prompt", "x"],
        ["--load", export, "--prompt-file", str(bad)],
        ["--load", export, "--prompt", "\udcff"],
        ["--load", export],
    ):
        try:
            found.append(generated(argv, "\udcff"))
        except ValueError as error:
            found.append(str(error))
    return found


def test_wrong_flags_and_damaged_exports_are_named(run, export, tmp_path):
    messages = forked(refusals, str(run), str(export), str(tmp_path))
    words = ("--memory-tables is mmap", "--ckpt-step is 2", "--temperature is -1", "--max-new-tokens is 0", MISSING,
             "cut", "its weights have other shapes than its config.json says", "it holds no tokenizer",
             "garbled'; it holds no tokenizer", "nosuch'; expected a directory of checkpoints, or an export",
             "--seed is 99999999999999999999",
             f"--prompt-file is {tmp_path / 'bad.txt'}; expected a readable", "--prompt is '\\udcff'",
             "stdin is not UTF-8")  # fmt: skip
    for message, word in zip(messages, words, strict=True):
        assert word in message and "\n" not in message


def of_another_class(folder: str) -> str:
    """What an export of a model without max_position_embeddings writes."""
    from tokenizers import Tokenizer, models
    from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

    vocabulary = {chr(97 + i): i for i in range(26)}
    model = BloomForCausalLM(BloomConfig(vocab_size=26, hidden_size=16, n_layer=1, n_head=2))
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=[]))).save_pretrained(folder)
    return generated(["--load", folder, "--prompt", "abc", "--max-new-tokens", "5"])


def test_a_model_that_names_no_longest_context_generates(tmp_path):
    assert forked(of_another_class, str(tmp_path)).startswith("abc")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_lm_eval_and_our_evaluator_give_the_same_score(run, export, tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1",
                   "HF_HOME": str(tmp_path / "cache")}  # fmt: skip
    program = "import umv2_megatron.hf; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    theirs = [sys.executable, "-c", program, "--model", "hf", "--model_args", f"pretrained={export},dtype=float32",
              "--device", "cpu", "--batch_size", "4", "--tasks", "umv2_documents", "--include_path",
              "examples/lm_eval", "--output_path", str(tmp_path / "lm_eval")]  # fmt: skip
    ours = [sys.executable, "tools/evaluate.py", "--load", str(run), "--data", "examples/lm_eval/documents.jsonl",
            "--data-form", "documents", "--no-append-eod", "--output", str(tmp_path / "ours.json")]  # fmt: skip
    for command in (theirs, ours):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=280)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (report,) = (tmp_path / "lm_eval").rglob("results_*.json")
    their_bits = json.loads(report.read_text())["results"]["umv2_documents"]["bits_per_byte,none"]
    (our_text,) = json.loads((tmp_path / "ours.json").read_text())["texts"]
    assert our_text["bits_per_byte"] == pytest.approx(their_bits, rel=1e-4)
