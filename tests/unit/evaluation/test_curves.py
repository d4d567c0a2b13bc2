"""Loss curves: a PNG of every run, a second panel with differences, a baseline that is not there, labels."""

import json
import sys

import pytest

from umv2_megatron.commands import plot_losses as losses_tool
from umv2_megatron.commands import plot_scores as scores_tool
from umv2_megatron.evaluation.curves import plot_losses
from umv2_megatron.training.tool_entry import run_tool

RECORDS = [{"iteration": step, "lm loss": 5 - step / 10, "lm loss validation": 5 - step / 9} for step in (10, 20)]


def width(path) -> int:
    """Width in pixels, from the PNG's header."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return int.from_bytes(data[16:20], "big")


def test_one_panel_and_two(tmp_path):
    runs = {"on": RECORDS, "off": RECORDS[:1]}
    plot_losses(runs, tmp_path / "one.png", title="t", levels={"entropy": 6.0}, marks=[10])
    plot_losses(runs, tmp_path / "two.png", title="t", baseline="off")
    assert width(tmp_path / "two.png") > width(tmp_path / "one.png") > 500


def test_no_run_is_left_out_for_want_of_a_colour(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.extend(len(axes.lines) for axes in self.axes))
    plot_losses({str(run): RECORDS for run in range(11)}, tmp_path / "x.png", title="t", baseline="0")
    assert drawn == [2 * 11, 10 + 1]  # training and validation; differences, and the line at zero


def test_a_loss_that_was_not_finite_is_a_gap(tmp_path):
    lost = [{"iteration": 10, "lm loss": None, "lm loss validation": None}, RECORDS[1]]
    for runs in ({"on": lost, "off": RECORDS}, {"on": RECORDS, "off": lost}):
        plot_losses(runs, tmp_path / "x.png", title="t", baseline="off")
        assert width(tmp_path / "x.png") > 500


def told(tool, monkeypatch, capsys, *arguments) -> tuple[int, str]:
    """Exit code and stderr of a tool."""
    monkeypatch.setattr(sys, "argv", ["tool.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        run_tool(tool.parser(), tool.main)
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("tool", "flag", "name", "label"),
    [(losses_tool, "--run", "checkpoints", "checkpoints"), (scores_tool, "--report", "evaluation.json", "evaluation")],
)
def test_runs_of_the_same_label_are_refused(tmp_path, monkeypatch, capsys, tool, flag, name, label):
    """Without labels, on what tools/ablate.py leaves; and with equal ones."""
    paths = [tmp_path / run / "seed1" / name for run in "ab"]
    output = tmp_path / "x.png"
    for words in (paths, [f"same={path}" for path in paths]):
        code, error = told(tool, monkeypatch, capsys, flag, words[0], flag, words[1], "--output", output)
        shared = label if words is paths else "same"
        assert code == 2 and error.count("\n") == 1 and not output.exists()
        assert f"{flag} gives the label '{shared}' to {paths[0]} and to {paths[1]}; expected" in error
        assert error.endswith("give them as LABEL=PATH\n")


def test_runs_that_are_not_there(tmp_path, monkeypatch, capsys):
    output = ("--output", tmp_path / "x.png")
    code, error = told(losses_tool, monkeypatch, capsys, "--run", f"a={tmp_path / 'no'}", *output)
    assert code == 2 and f"error: --run names {tmp_path / 'no'}; expected the --save directory of a run" in error
    code, error = told(scores_tool, monkeypatch, capsys, "--report", tmp_path / "no", *output)
    assert code == 2 and f"error: --report names {tmp_path / 'no'}; expected JSON that tools/evaluate.py" in error
    for run in "ab":
        (tmp_path / run).mkdir()
        (tmp_path / run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    given = ("--run", tmp_path / "a", "--run", f"two={tmp_path / 'b'}")
    assert told(losses_tool, monkeypatch, capsys, *given, *output) == (0, "")


def test_unknown_baseline(tmp_path):
    with pytest.raises(ValueError, match="--baseline is 'x'; expected one of on"):
        plot_losses({"on": RECORDS}, tmp_path / "x.png", title="t", baseline="x")
    assert not (tmp_path / "x.png").exists()
