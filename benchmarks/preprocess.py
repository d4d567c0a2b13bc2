"""Times tools/preprocess_data.py on generated text: every kind of tokenizer, by one worker, two, and two ranks.

    python benchmarks/preprocess.py                  about a minute on 2 cores
    python benchmarks/preprocess.py --tokenizers SentencePieceTokenizer --megabytes 58.6
    python benchmarks/preprocess.py --megabytes 64 --json preprocess.json
    python benchmarks/preprocess.py --docs docs/performance.md   writes the table between the file's markers

The text is made here from a seed: JSONL, documents of about 2 KB, words of letters in Zipf's proportions. Tokenizers of
8,192 tokens are trained on some of it: SentencePiece BPE by tools/train_tokenizer.py, byte-level BPE by the tokenizers
package. NullTokenizer reads numbers instead of words. No network is used.

The program runs in a separate process, as a user would run it. "elapsed" is the time of that process from start to end;
"as reported" is the rate that it prints. They differ by the start of Python; a program that stopped its clock early
would be caught here. "processor time" is that of all its processes together: what more processes add to it is the cost
of dividing the work, also on a machine that has other work. Bytes of text and tokens that it reports are compared with
the generated text and with the index file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import (  # noqa: E402
    Table,
    add_options,
    describe_machine,
    prepare,
    publish,
)
from benchmarks.spread import Spread, ratio  # noqa: E402
from umv2_megatron.data.indexing import read_index  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
ARRANGEMENTS = {"1 worker": (1, 1), "2 workers": (1, 2), "2 ranks": (2, 1)}
"""Ranks of mpirun, and workers of each."""
KINDS = ("SentencePieceTokenizer", "HuggingFaceTokenizer", "ByteLevelTokenizer", "NullTokenizer")
VOCABULARY = 8192
PRINTED = re.compile(r"(\d+) documents, (\d+) tokens, .* ([\d.]+) s \([\d.]+ documents/s, ([\d.]+) MB/s\)")


def write_corpus(path: Path, size: int, numbers: bool = False) -> int:
    """JSONL of about ``size`` bytes of text, words or ``numbers`` below the vocabulary; returns the exact bytes."""
    generator = random.Random(7)
    if numbers:
        words = [str(i) for i in range(VOCABULARY)]
    else:
        letters = "etaoinshrdlucmfwypvbgkjqxz"
        words = ["".join(generator.choices(letters, k=generator.randint(1, 11))) for _ in range(20_000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    ends = [" ", " ", " ", " ", " ", " ", " ", ", ", ". ", ".\n"]
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < size:
            picked = generator.choices(words, weights, k=generator.randint(100, 700))
            between = [" "] * len(picked) if numbers else generator.choices(ends, k=len(picked))
            text = "".join(word + end for word, end in zip(picked, between))
            written += len(text)
            file.write(json.dumps({"text": text}) + "\n")
    return written


def mpirun() -> list[str]:
    """The launcher that mpich installs beside Python, if there is one."""
    path = Path(sys.executable).parent / "mpirun"
    return [str(path)] if path.exists() else []


def run_tool(name: str, *arguments: str, ranks: int = 1) -> str:
    """Output of one of our tools; ``RuntimeError`` with what it said when it fails."""
    launcher = [*mpirun(), "-n", str(ranks)] if ranks > 1 else []
    done = subprocess.run(
        [*launcher, sys.executable, str(ROOT / "tools" / name), *arguments], capture_output=True, text=True, timeout=900
    )
    if done.returncode:
        raise RuntimeError(f"tools/{name} ended with code {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def make_tokenizers(folder: Path, text: Path, options: argparse.Namespace) -> dict[str, list[str]]:
    """Flags of each kind of tokenizer that is asked for; the files that they need are made in ``folder``."""
    megabytes, vocabulary = options.megabytes, options.vocab_size
    sample = folder / "sample.jsonl"
    write_corpus(sample, int(1e6 * min(1.0, megabytes)))
    run_tool("train_tokenizer.py", "--input", str(sample), "--vocab-size", str(vocabulary), "--output-prefix",
             str(folder / "sp"))  # fmt: skip
    import tokenizers

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator((json.loads(line)["text"] for line in sample.open(encoding="utf-8")), trainer)
    bpe.save(str(folder / "tokenizer.json"))
    words, numbers = ["--input", str(text)], ["--input", str(text.with_name("numbers.jsonl"))]
    flags = {
        "SentencePieceTokenizer": [*words, "--tokenizer-model", str(folder / "sp.model")],
        "HuggingFaceTokenizer": [*words, "--tokenizer-model", str(folder / "tokenizer.json")],
        "ByteLevelTokenizer": words,
        "NullTokenizer": [*numbers, "--vocab-size", str(VOCABULARY)],
    }
    return {kind: flags[kind] for kind in options.tokenizers}


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One entry for each tokenizer and arrangement."""
    text = folder / "text.jsonl"
    sizes = {False: write_corpus(text, int(options.megabytes * 1e6)),
             True: write_corpus(folder / "numbers.jsonl", int(options.megabytes * 1e6), numbers=True)}  # fmt: skip
    kinds = make_tokenizers(folder, text, options)
    cases = [(kind, name) for kind in kinds for name in options.arrangements]
    wall: dict[Any, list[float]] = {case: [] for case in cases}
    own: dict[Any, list[float]] = {case: [] for case in cases}
    processor: dict[Any, list[float]] = {case: [] for case in cases}
    tokens: dict[Any, int] = {}
    for number in range(options.rounds):
        for case in cases:
            kind, (ranks, workers) = case[0], ARRANGEMENTS[case[1]]
            prefix = folder / f"{kind}_{number}"
            arguments = [*kinds[kind], "--tokenizer-type", kind, "--workers", str(workers), "--append-eod",
                         "--output-prefix", str(prefix)]  # fmt: skip
            start, before = time.perf_counter(), _children_s()
            output = run_tool("preprocess_data.py", *arguments, ranks=ranks)
            wall[case].append(time.perf_counter() - start)
            processor[case].append(_children_s() - before)
            found = PRINTED.search(output)
            assert found is not None, output
            own[case].append(float(found[3]))
            tokens[case] = int(found[2])
            written = int(read_index(f"{prefix}_text_document").lengths.sum())
            reported = json.loads(Path(f"{prefix}_text_document.meta.json").read_text())["text_bytes"]
            assert written == tokens[case] and reported == sizes[kind == "NullTokenizer"], (written, found[2], reported)
            for suffix in (".bin", ".idx", ".meta.json"):
                os.unlink(f"{prefix}_text_document{suffix}")
    return [
        {
            "tokenizer": kind,
            "by": name,
            "text_bytes": sizes[kind == "NullTokenizer"],
            "tokens": tokens[kind, name],
            "wall_s": vars(Spread.of(wall[kind, name])),
            "own_s": vars(Spread.of(own[kind, name])),
            "processor_s": vars(Spread.of(processor[kind, name])),
            "times_faster_than_one_worker": vars(ratio(wall[kind, "1 worker"], wall[kind, name])),
        }
        for kind, name in cases
    ]


def _children_s() -> float:
    """Processor time of all processes that were started here and have ended (seconds)."""
    times = os.times()
    return times.children_user + times.children_system


def describe(options: argparse.Namespace, results: list[dict[str, Any]]) -> list[Table | str]:
    """The table."""
    rows = []
    for row in results:
        megabytes, wall = row["text_bytes"] / 1e6, row["wall_s"]
        rate = Spread(megabytes / wall["median"], megabytes / wall["highest"], megabytes / wall["lowest"])
        rows.append((
            row["tokenizer"], row["by"], rate.text(2),
            f"{megabytes / max(row['own_s']['median'], 1e-3):.2f}", f"{row['tokens'] / wall['median']:,.0f}",
            f"{row['text_bytes'] / row['tokens']:.2f}", f"{row['processor_s']['median']:.2f}",
            Spread(**row["times_faster_than_one_worker"]).text(2),
        ))  # fmt: skip
    title = (
        f"{options.megabytes:g} MB of generated text, tokenizers of {options.vocab_size:,} tokens; elapsed time, "
        f"medians (lowest-highest) of {options.rounds}. The reported counts were checked against the text and the "
        "index."
    )
    rates = ("MB/s, elapsed", "MB/s, as reported", "tokens/s, elapsed")
    columns = ("tokenizer", "by", *rates, "bytes/token", "processor time, s", "speed-up")
    return [Table(title, columns, rows)]


def main(argv: list[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--megabytes", type=float, default=5.0, help="text of one run (default: 5)")
    parser.add_argument("--tokenizers", nargs="+", choices=KINDS, default=KINDS, help="which (default: all)")
    add_options(parser, rounds=3)
    options = parser.parse_args(argv)
    options.vocab_size = VOCABULARY
    options.arrangements = [name for name, (ranks, _) in ARRANGEMENTS.items() if ranks == 1 or mpirun()]
    if options.quick:
        options.megabytes, options.rounds, options.vocab_size = 0.02, 1, 400
        options.tokenizers, options.arrangements = KINDS[::2], ["1 worker", options.arrangements[-1]]
    if options.clock != "wall":
        parser.error(f"--clock is {options.clock}; expected wall, because the work is done in other processes")
    if not options.megabytes > 0:
        parser.error(f"--megabytes is {options.megabytes}; expected a number above 0")
    prepare(parser, options, "preprocess.py")
    machine = describe_machine(quick=options.quick)
    with tempfile.TemporaryDirectory(prefix="preprocess_") as folder:
        results = measure(options, Path(folder))
    times = {f"{row['tokenizer']} by {row['by']}": Spread(**row["wall_s"]) for row in results}
    publish("preprocess.py", options, machine, describe(options, results), results, times)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
