"""New facts for a trained model: what is learned and what is forgotten when all parameters, adapters, memory layers, or
selected rows of their tables are trained (docs/sparse-finetuning.md).

    python benchmarks/sparse_finetuning.py --output runs/sparse

For each seed a model of 1.1M activated parameters is trained on text with some facts; from it every method learns the
documents of new facts alone, the same samples in the same order. Measured before and after: the answers to questions
about new and old facts (tools/evaluate.py's fact-recall, trained form), and the loss of held-out text. What is there is
not made again, so that the same command goes on where it was stopped. LoRA is peft's, on the export.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ROOT = Path(__file__).resolve().parents[1]
LENGTH, BATCH, MOST = 256, 8, 16
"""Tokens of a sequence, sequences of a step, occurrences of the most frequent facts."""
HELD_OUT_DOCUMENTS, TEXT_TOKENS = 94, 32768
OLD, NEW = 1, 2
"""--fact-seed of the facts that the base model has learned, and of new ones."""
ROW_COUNTS = (100, 500, 2000)
TABLE_ROWS, ROW_WIDTH, LAYERS = 112 * 112, 72 + 24, 4
MODEL: dict[str, Any] = {
    "model_preset": "umv2-3m", "num_layers": LAYERS, "hidden_size": 128, "num_attention_heads": 4,
    "ffn_hidden_size": 352, "memory_num_keys": 112, "memory_key_dim": 32, "memory_topk": 16,
    "memory_pre_value_dim": 24, "memory_value_dim": 72, "seq_length": LENGTH, "max_position_embeddings": LENGTH,
}  # fmt: skip
DATA: dict[str, Any] = {
    "tokenizer_type": "ByteLevelTokenizer", "micro_batch_size": BATCH, "global_batch_size": BATCH, "num_workers": 0,
    "log_interval": 10, "eval_iters": 0,
}  # fmt: skip
BASE: dict[str, Any] = {
    "train_iters": 1000, "lr": 3e-3, "min_lr": 3e-4, "lr_warmup_iters": 50, "memory_value_lr_mult": 16,
    "save_interval": 250,
}  # fmt: skip
TUNE: dict[str, Any] = {"finetune": True, "lr_decay_style": "constant", "lr_warmup_iters": 5}
RATE = 1e-3
TABLE_RATES = {"full": 4, "memory": 16, "rows": 16}
"""Multiples of the rate for tables, constant."""
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
LORA_RATE = 3e-3


def main(argv: list[str]) -> int:
    """Make what is missing, then print the table and write it to ``--output``."""
    arguments = parser().parse_args(argv)
    if arguments.measure:
        measure(*arguments.measure)
        return 0
    if arguments.lora:
        lora(*map(Path, arguments.lora[:2]), *map(int, arguments.lora[2:]))
        return 0
    output: Path = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    make_data(output)
    for seed in () if arguments.report_only else arguments.seeds:
        trials(output, seed, arguments.steps, arguments.methods)
    text = report(output, arguments.seeds, arguments.steps, arguments.methods)
    (output / "report.md").write_text(text)
    print(text)
    return 0


# ---------------------------------------------------------------------- what is run


def program(name: str, *words: Any, **flags: Any) -> None:
    """Run a program of this package; its output is kept only where it fails."""
    argv = [str(ROOT / name), *map(str, words)]
    for key, value in flags.items():
        flag = "--" + key.replace("_", "-")
        if value is True:
            argv.append(flag)
        elif isinstance(value, (list, tuple)):
            argv += [flag, *map(str, value)]
        elif value is not None:
            argv += [flag, str(value)]
    told = subprocess.run([sys.executable, *argv], capture_output=True, text=True, cwd=ROOT)
    if told.returncode:
        sys.exit(f"{' '.join(argv)}\n{told.stdout[-2000:]}\n{told.stderr[-2000:]}")


def facts(output: Path, seed: int) -> Path:
    return output / f"facts{seed}_text_document"


def make_data(output: Path) -> None:
    """Text in two parts, and the documents of two sets of facts."""
    if not (output / "held-out.jsonl").exists():
        program("tools/demo_corpus.py", output=output / "corpus.jsonl")
        lines = (output / "corpus.jsonl").read_text().splitlines(keepends=True)
        (output / "text.jsonl").write_text("".join(lines[:-HELD_OUT_DOCUMENTS]))
        (output / "held-out.jsonl").write_text("".join(lines[-HELD_OUT_DOCUMENTS:]))
    for seed in (OLD, NEW):
        if not (output / f"facts{seed}.jsonl").exists():
            path = output / f"facts{seed}.jsonl"
            program("tools/make_tasks.py", task="fact-recall", fact_seed=seed, max_fact_frequency=MOST, output=path)
    for name in ("text", f"facts{OLD}", f"facts{NEW}"):
        if not (output / f"{name}_text_document.idx").exists():
            program("tools/preprocess_data.py", input=output / f"{name}.jsonl", output_prefix=output / name,
                    tokenizer_type="ByteLevelTokenizer", append_eod=True)  # fmt: skip


def mixture(output: Path) -> list[Any]:
    """What the base model is trained on, and the background of the selection."""
    return [0.65, output / "text_text_document", 0.35, facts(output, OLD)]


def trials(output: Path, seed: int, steps: list[int], methods: list[str]) -> None:
    """The base model of ``seed``, and every method from it, each measured after ``steps``."""
    folder = output / f"seed{seed}"
    base, last = folder / "base", BASE["train_iters"]
    if not (base / f"iter_{last:07d}").exists():
        program("pretrain_umv2.py", **MODEL, **DATA, **BASE, train_data_path=mixture(output), seed=seed, save=base)
    measured(output, folder / "base.json", "load", base, last)
    for method in methods:
        save = folder / method
        if method == "lora":
            export = folder / "export"
            if not export.exists():
                program("tools/convert_checkpoint.py", "to-hf", load=base, save=export)
            if not (save / f"{max(steps)}").exists():
                command = [__file__, "--lora", str(output), str(folder), str(seed), *map(str, steps)]
                subprocess.run([sys.executable, *command], check=True)
            for step in steps:
                measured(output, folder / f"{method}-{step}.json", "hf-model", save / str(step), 0)
            continue
        if not (save / f"iter_{max(steps):07d}").exists():
            name, _, multiple = method.partition("@")
            kind, _, count = name.partition("-")
            rate = {
                "lr": RATE,
                "memory_value_lr_mult": float(multiple or TABLE_RATES[kind]),
                "memory_value_lr_decay_iters": 0,
            }
            learning = {"trainable": {"full": "all"}.get(kind, kind)}
            if kind == "rows":
                learning["trainable_rows"] = selected(output, folder, int(count))
            program("pretrain_umv2.py", **MODEL, **DATA, **TUNE, **rate, **learning, train_data_path=facts(output, NEW),
                    load=base, save=save, seed=seed, train_iters=max(steps), save_interval=min(steps),
                    save_retain_interval=min(steps))  # fmt: skip
        for step in steps:
            measured(output, folder / f"{method}-{step}.json", "load", save, step)


def selected(output: Path, folder: Path, count: int) -> Path:
    """The rows that new facts pick more than the base model's own data."""
    new, background, rows = (folder / f"{name}.safetensors" for name in ("new", "background", f"rows{count}"))
    flags = {"load": folder / "base"}
    if not new.exists():
        program("tools/select_rows.py", "count", **flags, data_path=facts(output, NEW), micro_batch_size=BATCH,
                output=new)  # fmt: skip
    if not background.exists():
        program("tools/select_rows.py", "count", **flags, data_path=mixture(output), batches=400, batch_size=1,
                output=background)  # fmt: skip
    if not rows.exists():
        program("tools/select_rows.py", "select", new=new, background=background, top_rows=count, output=rows)
    return rows


def lora(output: Path, folder: Path, seed: int, *steps: int) -> None:
    """Train adapters on the samples of the other methods, and save the merged model after ``steps``."""
    from umv2_megatron.parallel import cpu_platform

    cpu_platform.install()
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn import functional

    from umv2_megatron.config.data_config import DataConfig
    from umv2_megatron.data.datasets import build_datasets
    from umv2_megatron.data.tokenizers import tokenizer_of
    from umv2_megatron.hf import UMv2ForCausalLM

    data = DataConfig(train_data_path=[str(facts(output, NEW))], tokenizer_type="ByteLevelTokenizer")
    samples = build_datasets(data, tokenizer_of(vars(data)), LENGTH, seed, (max(steps) * BATCH, 0, 0))[0]
    torch.manual_seed(seed)
    model = get_peft_model(UMv2ForCausalLM.from_pretrained(folder / "export"), LoraConfig(**LORA)).train()
    learning = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=LORA_RATE, betas=(0.9, 0.999), weight_decay=0.01)
    (folder / "lora").mkdir(exist_ok=True)
    (folder / "lora" / "parameters").write_text(str(sum(each.numel() for each in learning)))
    for step in range(1, max(steps) + 1):
        optimizer.param_groups[0]["lr"] = LORA_RATE * min(1.0, step / 5)
        batch = [samples[BATCH * (step - 1) + place] for place in range(BATCH)]
        tokens, labels = (torch.stack([torch.as_tensor(each[key]) for each in batch]) for key in ("tokens", "labels"))
        functional.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step in steps:
            target = folder / "lora" / f"{step}.incomplete"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(folder / "export", target)
            copy.deepcopy(model).merge_and_unload().save_pretrained(target)
            target.rename(folder / "lora" / str(step))


# ---------------------------------------------------------------------- what is measured


def measured(output: Path, result: Path, *model: Any) -> None:
    """Make ``result``, in a process of its own: a process group can be made once."""
    if not result.exists():
        command = [sys.executable, __file__, "--measure", str(output), str(result), *map(str, model)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def measure(output: str, result: str, kind: str, path: str, step: str) -> None:
    """Answers to questions about old and new facts by the number of times that they occur, and the loss of text."""
    from umv2_megatron.parallel import cpu_platform

    cpu_platform.install()
    from umv2_megatron.evaluation.huggingface_scoring import load_hugging_face
    from umv2_megatron.evaluation.megatron_scoring import MegatronScoringModel
    from umv2_megatron.evaluation.tasks.fact_recall import FactSet
    from umv2_megatron.evaluation.tasks.scoring import score, summarize
    from umv2_megatron.evaluation.text_loss import documents_of, limited, text_loss
    from umv2_megatron.training.restore import restore_model

    model: Any
    if kind == "load":
        model = MegatronScoringModel(restore_model(path, int(step)), 16)
    else:
        model = load_hugging_face(path, micro_batch_size=16)
    documents = documents_of(f"{output}/held-out.jsonl", model.tokenizer)
    text = text_loss(model, limited(documents, TEXT_TOKENS, model.tokenizer), batch=16)
    found: dict[str, Any] = {"text": text.loss}
    for name, seed in (("old", OLD), ("new", NEW)):
        known = FactSet(seed, max_frequency=MOST)
        questions = [dataclasses.replace(each, choices=()) for each in known.questions("trained")]
        found[name] = {
            times: dataclasses.asdict(summarize(asked, score(model, asked)))
            for times in known.frequencies
            if (asked := [each for each in questions if each.details["times_seen"] == times])
        }
    temporary = Path(result + ".incomplete")
    temporary.write_text(json.dumps(found, indent=1))
    os.replace(temporary, result)


def mean(found: dict[str, Any], name: str, what: str, least: int) -> float:
    """Of facts of one set that occur at least ``least`` times."""
    return statistics.fmean(each[what] for times, each in found[name].items() if int(times) >= least)


def parameters(output: Path, seed: int, method: str) -> str:
    """What learns, in thousands."""
    method = method.partition("@")[0]
    if method.startswith("rows"):
        return f"{int(method.split('-')[1]) * ROW_WIDTH * LAYERS / 1e3:,.0f}k"
    path = output / f"seed{seed}" / "lora" / "parameters"
    if method == "lora":
        return "" if not path.exists() else f"{int(path.read_text()) / 1e3:,.0f}k"
    return {"full": "all", "memory": f"tables {TABLE_ROWS * ROW_WIDTH * LAYERS / 1e3:,.0f}k, and more"}[method]


def report(output: Path, seeds: list[int], steps: list[int], methods: list[str]) -> str:
    """One line for the base model and for each method and step; seeds are separated by commas."""
    lines = [
        "| method | trained | steps | new facts: exact | nats | old facts: exact | nats | text, nats per byte |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for label, learned, step, names in _rows(output, seeds, steps, methods):
        files = [output / f"seed{seed}" / f"{names}.json" for seed in seeds]
        found = [json.loads(file.read_text()) for file in files if file.exists()]
        if not found:
            continue
        cells = []
        for name in ("new", "old"):
            for what, form in (("exact_match", "{:.0%}"), ("answer_nats", "{:.2f}")):
                cells.append(", ".join(form.format(mean(each, name, what, 8)) for each in found))
        cells.append(", ".join(f"{each['text']:.3f}" for each in found))
        lines.append(f"| {label} | {learned} | {step} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _rows(output: Path, seeds: list[int], steps: list[int], methods: list[str]) -> Iterator[tuple[str, str, str, str]]:
    yield "base", "", "", "base"
    for method in methods:
        for step in steps:
            yield method, parameters(output, seeds[0], method), str(step), f"{method}-{step}"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--output", type=Path, metavar="DIR", default=Path("runs/sparse"), help="(default: runs/sparse)")
    made.add_argument("--seeds", type=int, nargs="+", default=[1, 2], metavar="N", help="(default: 1 2)")
    made.add_argument("--steps", type=int, nargs="+", default=[25, 75], metavar="N", help="multiples of the smallest")
    made.add_argument(
        "--methods", nargs="+", default=["full", "lora", "memory", *(f"rows-{count}" for count in ROW_COUNTS)],
        metavar="NAME", help="full, lora, memory, rows-N: N rows of each table; @M: tables' rate is M times 1e-3",
    )  # fmt: skip
    made.add_argument("--report-only", action="store_true", help="of what is finished")
    made.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    made.add_argument("--lora", nargs="+", help=argparse.SUPPRESS)
    return made


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
