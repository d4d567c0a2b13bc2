"""Several validation sets with names, and --full-validation: each token once, and in every layout the same losses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from program_runs import ROOT, tiny_run, train

sys.path.insert(0, str(ROOT / "tests" / "unit" / "data"))
from data_helpers import run_tool, write_jsonl  # noqa: E402

pytestmark = pytest.mark.thorough

TEXTS = {
    "train": ["def one(value):\n    return value + 1\n" * 4] * 5,
    "web": ["a document, longer than one window of the model " * number for number in (1, 3, 2)],
    "code": ["x = 1\n" * 7],
    "other": ["é and ü", "short"],
}
MODEL = {
    "mock_data": None, "tokenizer_type": "ByteLevelTokenizer", "make_vocab_size_divisible_by": 514, "num_layers": 4,
    "train_iters": 2, "lr": 1e-2, "vocab_size": 257,
}  # fmt: skip


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of the corpora by name."""
    folder = tmp_path_factory.mktemp("corpora")
    for name, texts in TEXTS.items():
        text = write_jsonl(folder / f"{name}.jsonl", texts)
        done = run_tool("preprocess_data.py", "--input", text, "--output-prefix", folder / name,
                        "--tokenizer-type", "ByteLevelTokenizer", "--append-eod")  # fmt: skip
        assert done.returncode == 0, done.stderr
    return {name: f"{folder / name}_text_document" for name in TEXTS}


@pytest.fixture(scope="module")
def checkpoint(corpora: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("checkpoint")
    train(1, tiny_run(**MODEL, train_data_path=corpora["train"], save=made / "run"), made / "log")
    return made / "run"


def sets(corpora: dict[str, str], **changes: Any) -> dict[str, Any]:
    """Two named validation sets and two named test sets."""
    return {
        **MODEL, "eval_iters": 2, "train_data_path": corpora["train"],
        "valid_data_path": [f"web={corpora['web']}", corpora["other"], f"code={corpora['code']}"],
        "test_data_path": [f"code={corpora['code']}", f"other={corpora['other']}"], **changes,
    }  # fmt: skip


def losses(output: str) -> dict[str, float]:
    """What the lines of evaluations tell, by set and name."""
    found = re.findall(r" (validation|test) loss at iteration \d+(?: on (\S+))? \| lm loss value: (\S+) ", output)
    return {f"{what}/{name}" if name else what: float(value) for what, name, value in found}


def evaluated(ranks: int, checkpoint: Path, settings: dict[str, Any], folder: Path) -> dict[str, float]:
    """Losses of a checkpoint on the validation sets."""
    argv = tiny_run(**settings, load=checkpoint, skip_train=True, allow_config_change=True)
    finished = train(ranks, argv, folder)
    assert finished.codes == [0] * ranks, finished.text[-4000:]
    return losses(finished.outputs[-1])


@pytest.fixture(scope="module")
def alone(corpora, checkpoint, tmp_path_factory) -> dict[str, float]:
    return evaluated(1, checkpoint, sets(corpora, full_validation=True), tmp_path_factory.mktemp("alone"))


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "three-ranks": (3, {"global_batch_size": 6, "micro_batch_size": 1}),
    "data-and-memory": (2, {"memory_parallel_size": 2}),
    "tensor": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "virtual-stages": (2, {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}),
    "context": (2, {"context_parallel_size": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_full_losses_are_those_of_one_rank(name, corpora, checkpoint, alone, tmp_path):
    ranks, layout = LAYOUTS[name]
    found = evaluated(ranks, checkpoint, sets(corpora, full_validation=True, **layout), tmp_path)
    assert list(alone) == ["validation/web", "validation/code", "validation"]
    assert found == pytest.approx(alone, rel=1e-6)


@pytest.mark.slow
def test_full_losses_are_those_of_the_evaluator_and_add_up(corpora, checkpoint, alone, tmp_path):
    tokens = {name: sum(len(text.encode()) + 1 for text in texts) for name, texts in TEXTS.items()}
    report = tmp_path / "report.json"
    command = [sys.executable, "tools/evaluate.py", "--load", checkpoint, "--data", corpora["code"], corpora["web"],
               corpora["other"], "--output", report]  # fmt: skip
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    code, web, other = (text["loss"] for text in json.loads(report.read_text())["texts"])
    assert alone["validation/code"] == pytest.approx(code, rel=1e-5)
    both = (web * tokens["web"] + other * tokens["other"]) / (tokens["web"] + tokens["other"])
    assert alone["validation/web"] == pytest.approx(both, rel=1e-5)
    every = (both * (tokens["web"] + tokens["other"]) + code * tokens["code"]) / sum(
        tokens[name] for name in ("web", "other", "code")
    )
    assert alone["validation"] == pytest.approx(every, rel=1e-5)


def test_a_run_tells_every_set_and_resumes_bit_by_bit(corpora, tmp_path):
    settings = sets(corpora, eval_interval=1, micro_batch_size=2)
    plain = train(1, tiny_run(**{**settings, "eval_iters": 0}, save=tmp_path / "plain"), tmp_path / "plain_log")
    for start in range(2):
        finished = train(1, tiny_run(**settings, save=tmp_path / "run", exit_interval=1), tmp_path / f"log{start}")
        assert finished.codes == [0], finished.text[-4000:]
    assert finished.weights == plain.weights
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (first,) = [each for each in records if each["iteration"] == 1 and "lm loss validation" in each]
    assert first["lm loss validation"] == pytest.approx(
        (first["lm loss validation/web"] + first["lm loss validation/code"]) / 2, rel=1e-6
    )
    (tested,) = [each for each in records if "lm loss test" in each]
    assert {"lm loss test/code", "lm loss test/other", "lm loss test/other ppl"} < set(tested)


def test_the_part_of_split_is_read_whole(corpora, checkpoint, tmp_path):
    settings = {**MODEL, "eval_iters": 1, "data_path": corpora["web"], "split": "1,1,1", "full_validation": True}
    assert list(evaluated(1, checkpoint, settings, tmp_path)) == ["validation"]


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"full_validation": True, "valid_data_path": ["0.5", "a", "0.5", "b"]}, "--valid-data-path has weights"),
        ({"full_validation": True, "eval_iters": 0}, "expected --eval-iters above 0"),
        ({"full_validation": True, "mock_data": True, "train_data_path": None, "valid_data_path": None,
          "test_data_path": None}, "--full-validation is on; expected corpora"),
        ({"valid_data_path": ["web=a", "web=b"]}, "--valid-data-path has two sets named web"),
        ({"valid_data_path": ["web=nosuch"]}, "--valid-data-path names nosuch, but there is no file nosuch.idx"),
    ],
)  # fmt: skip
def test_mistakes_are_refused(changes, sentence, corpora, tmp_path):
    finished = train(1, tiny_run(**{**sets(corpora), **changes}), tmp_path / "log", codes=2)
    assert sentence in finished.text and "Traceback" not in finished.text, finished.text[-3000:]
