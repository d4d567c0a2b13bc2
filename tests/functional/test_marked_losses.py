"""--loss-mask-key in whole runs: the same losses in every layout, and steps in which no token bears a loss."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
from program_runs import ROOT, losses, tiny_run, train

sys.path.insert(0, str(ROOT / "tests" / "unit" / "data"))
from data_helpers import run_tool  # noqa: E402

STEPS, TOKENS_OF_A_STEP = 4, 8 * 32


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of 15 bytes and an end; none of those of the first two steps is marked, of later ones the half."""
    folder = tmp_path_factory.mktemp("corpus")
    numbers = random.Random(1)
    lines = []
    for number in range(2 * STEPS * TOKENS_OF_A_STEP // 16):
        marked = number * 16 >= 2 * TOKENS_OF_A_STEP + 16
        marks = " ".join(str(int(marked and numbers.random() < 0.5)) for _ in range(15))
        lines.append(json.dumps({"text": f"{numbers.randrange(10**15):015}", "loss": marks}))
    (folder / "lines.jsonl").write_text("\n".join(lines) + "\n")
    for key, *tokenizer in (
        ("text", "ByteLevelTokenizer"),
        ("loss", "NullTokenizer", "--vocab-size", "2"),
    ):
        done = run_tool("preprocess_data.py", "--input", folder / "lines.jsonl", "--output-prefix", folder / "p",
                        "--json-keys", key, "--append-eod", "--tokenizer-type", *tokenizer)  # fmt: skip
        assert done.returncode == 0, done.stderr
    return folder / "p_text_document"


def test_steps_without_a_marked_token_and_layouts(corpus: Path, tmp_path: Path) -> None:
    settings = {
        "mock_data": None, "tokenizer_type": "ByteLevelTokenizer", "train_data_path": corpus, "loss_mask_key": "loss",
        "data_order": "sequential", "train_iters": STEPS, "eval_iters": 0, "num_workers": 0, "seq_length": 32,
        "global_batch_size": 8, "micro_batch_size": 1, "weight_decay": 0.0,
    }  # fmt: skip
    start = tmp_path / "start"
    train(1, tiny_run(**{**settings, "train_iters": 1}, save=start), tmp_path / "log")
    found = {}
    for ranks, changes in ((1, {}), (2, {"use_distributed_optimizer": True})):
        save = tmp_path / f"save{ranks}"
        train(ranks, tiny_run(**settings, **changes, load=start, finetune=True, save=save), tmp_path / "log")
        found[ranks] = [loss for _, loss in losses(save)]
    assert found[1][:2] == found[2][:2] == [0.0, 0.0]
    assert all(2.0 < loss < 8.0 for loss in found[1][2:]), found
    assert found[1] == pytest.approx(found[2], rel=1e-5)
