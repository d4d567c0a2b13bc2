"""What an evaluation leaves: aligned tables with dashes for what is unknown, whole JSON, and the two plots."""

from __future__ import annotations

import json

import pytest

from umv2_megatron.evaluation.report import draw, over_seeds, task_table, text_table, write_json


def result(**changes) -> dict:
    known = {
        "task": "icl", "form": "trained", "context_length": 64, "difficulty": 1, "times_seen": None, "examples": 1,
        "exact_match": 1.0, "exact_match_se": None, "exact_match_chance": 0.5, "choice_accuracy": None,
        "choice_accuracy_se": None, "choice_accuracy_chance": None, "answer_nats": 1.25, "answer_nats_se": 0.5,
        "answer_nats_per_token": 0.1,
    }  # fmt: skip
    return {**known, **changes}


CHOSEN = {"choice_accuracy": 0.75, "choice_accuracy_se": 0.05, "choice_accuracy_chance": 0.25}


def test_tables():
    lines = task_table([result(), result(context_length=None, difficulty=None, times_seen=4, **CHOSEN)]).splitlines()
    assert " ".join(lines[1].split()) == "icl trained 64 1 1 100.0 - 50.0 - - - 1.25 0.50"
    assert " ".join(lines[2].split()) == "icl trained seen 4x - 1 100.0 - 50.0 75.0 5.0 25.0 1.25 0.50"
    assert len({len(line) for line in lines}) == 1
    text = {"source": "x", "form": "stream", "context": 8, "tokens": 9, "loss": 0.5, "loss_se": None,
            "perplexity": 1.6487, "bits_per_byte": None}  # fmt: skip
    assert " ".join(text_table([text]).splitlines()[1].split()) == "x stream 8 9 0.5000 - 1.649 -"


def test_json_is_whole(tmp_path):
    write_json(tmp_path / "r.json", {"tasks": [result()]})
    assert json.loads((tmp_path / "r.json").read_text()) == {"format": 1, "tasks": [result()]}
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_plots_are_drawn_where_there_is_something_to_compare(tmp_path):
    lengths = [result(context_length=length, **CHOSEN) for length in (64, 128)]
    facts = [
        result(task="fact-recall", context_length=None, difficulty=None, times_seen=times, **CHOSEN)
        for times in (0, 1, 2)
    ]
    assert draw({"a": lengths[:1]}, tmp_path / "x") == []
    drawn = draw({"a": lengths + facts, "b": lengths}, tmp_path / "x")
    assert [path.name for path in drawn] == ["x_context.png", "x_facts.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_numbers_of_items_are_told_and_drawn_over_seeds(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    seeds = [
        [result(items=items, exact_match=exact, choice_accuracy=None) for items in (2, 4)] + [result()]
        for exact in (0.25, 0.75)
    ]
    assert " 64, 2 shots " in task_table(seeds[0])
    merged = over_seeds([*seeds, [*seeds[0], result(items=8)]])
    assert [each.get("items") for each in merged] == [2, 4, None]
    assert merged[0]["exact_match"] == pytest.approx((0.25 + 0.75 + 0.25) / 3)
    assert merged[0]["exact_match_range"] == (0.25, 0.75) and over_seeds(seeds[:1]) == seeds[0]
    bars = []
    monkeypatch.setattr(Axes, "errorbar", lambda self, x, y, yerr, **_: bars.append((x, y, yerr)))
    drawn = draw({"a": over_seeds(seeds)}, tmp_path / "x")
    assert [path.name for path in drawn] == ["x_items.png"] and bars == [([2, 4], [50, 50], [[25, 25], [25, 25]])]


def test_no_model_is_left_out_for_want_of_a_colour(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.extend(len(a.containers) for a in self.axes))
    lengths = [result(context_length=length) for length in (64, 128)]
    draw({str(model): lengths for model in range(11)}, tmp_path / "x")
    assert drawn == [11]
