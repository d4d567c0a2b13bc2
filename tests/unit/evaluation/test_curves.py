"""Loss curves: a PNG of every run, a second panel with differences, a baseline that is not there."""

import pytest

from umv2_megatron.evaluation.curves import plot_losses

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


def test_unknown_baseline(tmp_path):
    with pytest.raises(ValueError, match="--baseline is 'x'; expected one of on"):
        plot_losses({"on": RECORDS}, tmp_path / "x.png", title="t", baseline="x")
    assert not (tmp_path / "x.png").exists()
