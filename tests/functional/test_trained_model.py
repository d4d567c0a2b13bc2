"""A run's checkpoint gives the trained model back: same validation loss, text from tools/generate.py, a plot."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    "".join(f"def function_{i}(value):\n    return value + {i}\n\n" for i in range(start, start + 50))
    for start in range(0, 3000, 50)
]
FLAGS = [
    *("--model-preset", "umv2-tiny", "--tokenizer-type", "ByteLevelTokenizer", "--train-iters", "60", "--lr", "4e-3"),
    *(
        "--micro-batch-size",
        "8",
        "--eval-iters",
        "1",
        "--log-interval",
        "20",
        "--num-workers",
        "0",
        "--split",
        "90,10,0",
    ),
]


def run(*command: str) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("trained")
    (directory / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    run(
        "tools/preprocess_data.py",
        "--input",
        str(directory / "text.jsonl"),
        "--output-prefix",
        str(directory / "t"),
        "--tokenizer-type",
        "ByteLevelTokenizer",
        "--append-eod",
    )
    prefix = next(directory.glob("t*_document.bin")).with_suffix("")
    output = run("pretrain_umv2.py", *FLAGS, "--data-path", str(prefix), "--save", str(directory / "run"))
    (directory / "output.txt").write_text(output)
    return directory


def test_generated_text_is_what_the_model_has_learned(trained):
    command = [
        "tools/generate.py",
        "--load",
        str(trained / "run"),
        "--prompt",
        "def function_",
        "--max-new-tokens",
        "40",
    ]
    text = run(*command, "--temperature", "0")
    assert text.startswith("def function_")
    assert "(value):" in text, text
    assert run(*command, "--seed", "5") == run(*command, "--seed", "5")


def test_evaluating_the_checkpoint_gives_the_loss_of_the_run(trained):
    def losses(output: str) -> list[str]:
        return [line.split("|")[1] for line in output.splitlines() if line.startswith(" validation loss")]

    prefix = next(trained.glob("t*_document.bin")).with_suffix("")
    output = run("pretrain_umv2.py", *FLAGS, "--data-path", str(prefix), "--load", str(trained / "run"), "--skip-train")
    assert losses(output) == losses((trained / "output.txt").read_text())[-1:]


def test_loss_curves_are_drawn(trained, tmp_path):
    run("tools/plot_losses.py", "--run", f"tiny={trained / 'run'}", "--output", str(tmp_path / "losses.png"))
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_missing_checkpoint_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "tools/generate.py", "--load", str(tmp_path), "--prompt", "x"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and str(tmp_path) in done.stderr


@pytest.mark.slow
def test_sizes_and_vocabulary_without_a_preset(trained):
    """Everything given by flags, the vocabulary by the tokenizer alone."""
    prefix = next(trained.glob("t*_document.bin")).with_suffix("")
    output = run(
        "pretrain_umv2.py",
        *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "2", "--ffn-hidden-size", "64"),
        *("--seq-length", "64", "--memory-num-keys", "16", "--data-path", str(prefix), "--split", "90,10,0"),
        *("--tokenizer-type", "ByteLevelTokenizer", "--train-iters", "2", "--log-interval", "1", "--eval-iters", "1"),
        *("--num-workers", "0"),
    )
    assert output.count("| lm loss: ") == 2
