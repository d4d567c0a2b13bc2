"""Ranking of rows by tf-idf, and the files of counts and selections."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from umv2_megatron.memory.row_counts import ROWS_FORMAT, RowCounts, RowSelection, highest, tf_idf


def counts(picks: list[int], batches: list[int], number: int) -> RowCounts:
    return RowCounts({1: torch.tensor(picks)}, {1: torch.tensor(batches)}, number, {"checkpoint": "runs/x"})


def slow_score(row: int, picks: list[int], in_batches: list[int], number: int) -> float:
    """The equation of the paper, word for word."""
    return picks[row] / sum(picks) * math.log((number + 1) / (in_batches[row] + 1))


def test_scores_are_those_of_the_equation() -> None:
    picks, in_batches = [5, 0, 3, 1, 1], [10, 0, 2, 0, 3]
    new, background = counts(picks, [1, 0, 1, 1, 1], 1), counts([40, 0, 2, 0, 3], in_batches, 10)
    scores = tf_idf(new, background)[1]
    assert scores.dtype == torch.float64
    assert scores.tolist() == pytest.approx([slow_score(row, picks, in_batches, 10) for row in range(5)], rel=1e-12)
    assert scores[0] == 0  # in every batch of the background
    assert highest({1: scores}, 2)[1].tolist() == [2, 3]
    assert highest({1: scores}, 9)[1].tolist() == [2, 3, 4], "rows without a score are not chosen"


def test_of_equal_scores_the_first_rows_are_chosen() -> None:
    assert highest({0: torch.tensor([1.0, 2.0, 1.0, 1.0])}, 3)[0].tolist() == [0, 1, 2]


def test_files_hold_what_was_written(tmp_path: Path) -> None:
    held = counts([5, 0, 3], [1, 0, 1], 4)
    held.write(tmp_path / "counts")
    again = RowCounts.read("--new", str(tmp_path / "counts"))
    assert again.num_batches == 4 and again.origin == {"checkpoint": "runs/x", "batches": 4}
    assert torch.equal(again.picks[1], held.picks[1]) and torch.equal(again.batches[1], held.batches[1])
    chosen = RowSelection({0: torch.tensor([2, 7]), 3: torch.zeros(0, dtype=torch.int64)}, {"top_rows": 2})
    chosen.write(tmp_path / "rows")
    read = RowSelection.read("--trainable-rows", str(tmp_path / "rows"))
    assert read.rows[0].tolist() == [2, 7] and read.rows[3].tolist() == [] and read.origin == {"top_rows": 2}
    assert len(read.sha256) == 64
    read.check("--trainable-rows", "rows", {0: 8, 3: 8})


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for written, words in (
        (b"no safetensors", "expected a file that 'select_rows.py select' wrote"),
        ({"layer_000.rows": torch.tensor([3, 1])}, "ascending row numbers"),
        ({"layer_000.rows": torch.tensor([1.0])}, "expected a file that"),
        ({"something": torch.tensor([1])}, "expected a file that"),
    ):
        if isinstance(written, bytes):
            path.write_bytes(written)
        else:
            save_file(written, path, {"format": ROWS_FORMAT})
        with pytest.raises(ValueError, match=words) as error:
            RowSelection.read("--trainable-rows", str(path))
        assert str(error.value).startswith(f"--trainable-rows is {path}")
    counts([1, 2], [1, 1], 3).write(path)
    with pytest.raises(ValueError, match="umv2 row counts 1; expected a file that 'select_rows.py select' wrote"):
        RowSelection.read("--trainable-rows", str(path))
    chosen = RowSelection({0: torch.tensor([9])})
    with pytest.raises(ValueError, match="with row 9 of the table of memory layer 0; expected rows below 9"):
        chosen.check("--trainable-rows", "rows", {0: 9})
    with pytest.raises(ValueError, match="memory layers 0; expected those of 0, 1"):
        chosen.check("--trainable-rows", "rows", {0: 25, 1: 25})
    with pytest.raises(ValueError, match="count both with one checkpoint"):
        tf_idf(counts([1, 2], [1, 1], 3), counts([1, 2, 3], [1, 1, 1], 3))
    assert dataclasses.is_dataclass(chosen)
