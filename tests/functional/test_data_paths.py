"""Runs whose training, validation and test sets are corpora of their own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from program_runs import ROOT, tiny_run, train

sys.path.insert(0, str(ROOT / "tests" / "unit" / "data"))
from data_helpers import run_tool, write_jsonl  # noqa: E402


def test_a_test_set_is_optional(tmp_path: Path) -> None:
    for name in ("train", "valid"):
        text = write_jsonl(tmp_path / f"{name}.jsonl", [f"{name} " * 400])
        done = run_tool("preprocess_data.py", "--input", text, "--output-prefix", tmp_path / name,
                        "--tokenizer-type", "ByteLevelTokenizer", "--append-eod")  # fmt: skip
        assert done.returncode == 0, done.stderr
    settings: dict[str, Any] = {
        "mock_data": None, "tokenizer_type": "ByteLevelTokenizer", "train_iters": 2, "eval_iters": 1,
        "train_data_path": tmp_path / "train_text_document",
    }  # fmt: skip
    finished = train(1, tiny_run(**settings, valid_data_path=tmp_path / "valid_text_document"), tmp_path / "run")
    assert finished.codes == [0], finished.text
    assert "validation loss at iteration 2" in finished.text and "test loss" not in finished.text
    refused = train(1, tiny_run(**settings), tmp_path / "refused", codes=2)
    assert "--valid-data-path is missing" in refused.text, refused.text
