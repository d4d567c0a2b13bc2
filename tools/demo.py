"""`make demo`: from nothing to a trained UltraMemV2 model that writes text, with an interruption in the middle.

1. corpus      the Python standard library's sources and help texts of the running interpreter, as JSONL
2. tokenizer   SentencePiece, trained on that corpus
3. tokens      .bin/.idx for megatron-core
4. training    torchrun pretrain_umv2.py of umv2-8m-first, killed once with SIGKILL and resumed by the same command
5. results     a table and a PNG of the losses, and a few lines that the model writes

Everything goes to runs/demo. The commands are printed as they run: they are the ones you would type yourself.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402

from umv2_megatron.evaluation.curves import plot_losses  # noqa: E402
from umv2_megatron.training.metrics import read_metrics  # noqa: E402
from umv2_megatron.training.tool_entry import run_tool  # noqa: E402

PROMPTS = ("def read_config(path):\n", 'class Counter(dict):\n    """')


def announce(step: str, command: list[str] | None = None) -> None:
    """Print what comes next, and the command as a user would type it."""
    print(f"\n=== {step}", flush=True)
    if command:
        shown = [os.path.relpath(part, ROOT) if part.startswith(str(ROOT)) else part for part in command]
        print("$ " + shlex.join(shown), flush=True)


def call(step: str, *command: str) -> None:
    """Run a tool of this project; end the demo where it fails."""
    announce(step, ["python", *command])
    if subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
        raise ChildProcessError(f"step {step!r} failed; its message is above")


def training_command(directory: Path, iterations: int) -> list[str]:
    """The torchrun command of the demo's model: one rank per GPU, or two ranks on a CPU."""
    import torch

    gpus = torch.cuda.device_count()
    ranks = gpus or min(2, os.cpu_count() or 1)
    batch = 8 * (ranks if ranks > 2 else 1)
    flags = {
        "model-preset": "umv2-8m-first",
        "data-path": f"{directory}/corpus_text_document",
        "tokenizer-type": "SentencePieceTokenizer",
        "tokenizer-model": f"{directory}/tokenizer.model",
        "split": "97,3,0",
        "micro-batch-size": str(batch // ranks),
        "global-batch-size": str(batch),
        "train-iters": str(iterations),
        "lr": "2e-3",
        "lr-warmup-iters": str(max(1, iterations // 20)),
        "memory-value-lr-mult": "16",  # short runs need it: docs/memory-on-off.md
        "save": f"{directory}/checkpoints",
        "save-interval": str(max(1, iterations // 4)),
        "eval-interval": str(max(1, iterations // 5)),
        "eval-iters": "8",
        "log-interval": "4",
        "num-workers": "0" if not gpus else "2",
        "tensorboard-dir": f"{directory}/tensorboard",
        "memory-log-interval": str(max(1, iterations // 5)),
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    program = [str(Path(sys.executable).with_name("torchrun")), "--standalone", f"--nproc-per-node={ranks}"]
    return [*program, "pretrain_umv2.py", *words, *(["--bf16"] if gpus else [])]


def train(step: str, command: list[str], kill_after: Path | None = None) -> int | None:
    """Run the training command and return the iteration it resumed at, if it did.

    With ``kill_after``, every process of the run gets SIGKILL at the first sign of life after that checkpoint has
    appeared. torchrun gives each rank a session of its own, so they are found as its children.
    """
    announce(step, command)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    resumed_at = None
    for line in process.stdout:
        if line.startswith(("  ", "W1", "W0")) or "*****" in line or "FutureWarning" in line:
            continue  # the configuration is in checkpoints/config.yaml
        print(line, end="", flush=True)
        if line.startswith(" loaded checkpoint of iteration "):
            resumed_at = int(line.split()[4])
        if kill_after is not None and kill_after.exists() and line.startswith(" ["):
            victims = psutil.Process(process.pid).children(recursive=True)
            for victim in [*victims, psutil.Process(process.pid)]:
                victim.kill()
            psutil.wait_procs(victims, timeout=30)
            process.wait()
            print(f"--- killed (SIGKILL): {len(victims)} processes and torchrun", flush=True)
            return resumed_at
    if process.wait():
        raise ChildProcessError(f"step {step!r} failed; its message is above")
    if kill_after is not None:
        raise ChildProcessError(f"step {step!r} ended before it could be killed; give more --iterations")
    return resumed_at


def report(directory: Path, resumed_at: int) -> None:
    """The loss table, the picture, and the comparison with the corpus's unigram entropy."""
    announce("5. results")
    records = read_metrics(directory / "checkpoints")
    from umv2_megatron.evaluation.entropy import unigram_entropy

    entropy = unigram_entropy(f"{directory}/corpus_text_document")
    training = {record["iteration"]: record["lm loss"] for record in records if "lm loss" in record}
    print(f"{'iteration':>9}  {'training loss':>13}  {'validation loss':>15}")
    last = None
    for record in records:
        if "lm loss validation" in record:
            last = record["lm loss validation"]
            before = training.get(record["iteration"])
            shown = f"{before:13.4f}" if before is not None else " " * 13
            print(f"{record['iteration']:9d}  {shown}  {last:15.4f}")
    assert last is not None, "the run evaluated at least once"
    level = entropy.nats_per_token
    print(
        f"\nunigram entropy of the corpus: {level:.4f} nats per token; final validation loss: {last:.4f}, "
        f"{level - last:.4f} below it"
    )
    if entropy.bytes_per_token:
        print(f"that is {last / 0.6931471805599453 / entropy.bytes_per_token:.3f} bits per byte of text")
    picture = directory / "losses.png"
    plot_losses(
        {"umv2-8m-first": records},
        picture,
        title="make demo: umv2-8m-first on the Python standard library",
        levels={"unigram entropy": level},
        marks=[resumed_at],
    )
    print(f"loss curves: {os.path.relpath(picture, ROOT)}")
    if last >= level:
        raise ChildProcessError("the model did not learn more than token frequencies; something is wrong")


def main(arguments: argparse.Namespace) -> None:
    """All steps, from an empty directory."""
    start = time.monotonic()
    directory = (ROOT / arguments.directory).resolve()
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    corpus = f"{directory}/corpus.jsonl"
    call("1. corpus", "tools/demo_corpus.py", "--output", corpus)
    call(
        "2. tokenizer",
        "tools/train_tokenizer.py",
        "--input",
        corpus,
        "--vocab-size",
        "4096",
        "--output-prefix",
        f"{directory}/tokenizer",
    )
    call(
        "3. tokens",
        "tools/preprocess_data.py",
        "--input",
        corpus,
        "--output-prefix",
        f"{directory}/corpus",
        "--tokenizer-type",
        "SentencePieceTokenizer",
        "--tokenizer-model",
        f"{directory}/tokenizer.model",
        "--append-eod",
        "--workers",
        str(min(8, os.cpu_count() or 1)),
    )
    command = training_command(directory, arguments.iterations)
    first_save = max(1, arguments.iterations // 4)
    train("4a. training, to be killed", command, directory / "checkpoints" / f"iter_{2 * first_save:07d}")
    resumed_at = train("4b. the same command again: resumes", command)
    if resumed_at is None:
        raise ChildProcessError("the second start did not resume from the first one's checkpoint")
    report(directory, resumed_at)
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    call(
        "6. the model writes",
        "tools/generate.py",
        "--load",
        f"{directory}/checkpoints",
        "--max-new-tokens",
        "60",
        *prompts,
    )
    print(
        f"\ndone in {time.monotonic() - start:.0f} s; checkpoints, metrics.jsonl and TensorBoard files are in "
        f"{os.path.relpath(directory, ROOT)}"
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--directory", default="runs/demo", help="where everything goes; emptied first (default: runs/demo)"
    )
    made.add_argument("--iterations", type=int, default=160, help="training iterations (default: 160)")
    return made


if __name__ == "__main__":
    run_tool(parser(), main)
