"""The page of a run: what it shows, whatever state the run's files are in, and how large it gets."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from run_directory import event, start, steps, write_run

from umv2_megatron.observation.charts import Line, chart, number
from umv2_megatron.observation.heat_maps import heat_map
from umv2_megatron.observation.page import duration, page
from umv2_megatron.observation.run_files import read_run
from umv2_megatron.observation.series import POINTS, Series

ROOT = Path(__file__).resolve().parents[3]


class Text(HTMLParser):
    """The text of a page without styles and scripts, and its elements; fails where tags do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        assert not self.open, self.open

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))
        if name not in ("meta", "img"):
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data + " "


def shown(directory: Path) -> Text:
    return Text(page(read_run(directory), "a run"))


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    found = shown(write_run(tmp_path, steps(1, 40, layers=3), [start(0)]))
    for text in ("running", "40 of 100", "30 s, until", "loss", "learning rates", "512", "rows used", "layer 2"):
        assert text in found.text, text
    charts = [given.get("aria-label") for name, given in found.elements if name == "svg"]
    assert charts == [
        "loss, nats per token", "loss, second half, nats per token", "learning rates, per step",
        "gradient norm, before clipping", "throughput, tokens per second, all ranks", "model FLOPs, TFLOP/s per rank",
    ]  # fmt: skip
    assert sum(name == "img" for name, _ in found.elements) == 2, "two heat maps"


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    html = page(read_run(write_run(tmp_path, steps(1, 40, layers=3), [start(0)])), "a run")
    addresses = [given[key] for _, given in Text(html).elements for key in ("src", "href") if given.get(key)]
    assert addresses and all(str(each).startswith("data:image/png;base64,") for each in addresses)
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttp", html)


def test_every_text_of_the_run_is_escaped(tmp_path: Path) -> None:
    evil = "\" onerror=alert(3) x='</script><script>alert(1)</script><img src=x onerror=alert(2)>&"
    told = [start(0, reason=evil, changes={evil: [evil, evil]}), event("fault", 3, text=evil, rank=evil, code=evil),
            event("skipped", 4, text=evil), event("stop", 4, reason=evil), event(evil, 5),
            event("blend", 5, from_sample=evil, corpora=[{"prefix": evil, "samples": evil, "share": [evil, evil]}]),
            {**start(5, reason=evil), "device": evil, "host": evil, "ranks": evil}]  # fmt: skip
    records = [*steps(1, 9), {"iteration": 9, evil: 1.0, f"memory/{evil}/layer_000": 1.0}]
    run = read_run(write_run(tmp_path / "run", records, told, **{evil: evil}))
    found = Text(page(run, evil))
    scripts = [given for name, given in found.elements if name == "script"]
    assert len(scripts) == sum(given.get("class") == "chart" for _, given in found.elements) + 1
    assert all(given["src"].startswith("data:") for name, given in found.elements if name == "img")  # type: ignore
    assert not any(key.startswith("on") for _, given in found.elements for key in given)
    assert found.text.count("alert(1)") >= 12


def test_a_label_cannot_end_the_script(tmp_path: Path) -> None:
    series = Series([1, 2], [1.0, 2.0])
    made = chart("t", "u", [Line("</script><b>&", series, 1), Line("other", series, 2)])
    assert made is not None and made.count("</script>") == 1 and "<b>&" not in made


def test_restarts_with_their_reasons_and_changes(tmp_path: Path) -> None:
    told = [start(0), event("checkpoint", 20, seconds=1.5), event("fault", 33, text="rank 1 is gone", rank=0, code=1),
            start(20, reason="rank 1 is gone", changes={"weight_decay": [0.1, 0.05], "bf16": [False, True]}),
            event("stop", 50, reason="SIGTERM"), event("end", 50, finished=False)]  # fmt: skip
    (tmp_path / "iter_0000020").mkdir()
    (tmp_path / "iter_0000020" / "shard").write_bytes(b"x" * 2_500_000)
    found = shown(write_run(tmp_path, steps(1, 50), told))
    for text in ("stopped", "asked by SIGTERM", "rank 1 is gone (told by rank 0, exit code 1)",
                 "after the fault told below", "2 changed settings", "weight_decay", "0.05", "2.5 MB",
                 "1.5 s"):  # fmt: skip
        assert text in found.text, text
    assert found.text.count("rank 1 is gone") == 1, "once is enough"
    marks = [given["class"] for name, given in found.elements if name == "line" and "mark" in str(given.get("class"))]
    assert set(marks) == {"mark restart", "mark fault"}


def test_scores_of_tasks_and_losses_of_sets(tmp_path: Path) -> None:
    records = steps(1, 3)
    for step in (1, 3):
        records.append({"iteration": step, "lm-eval/own/acc": 0.25 * step, "lm-eval/own/acc_stderr": 0.03125,
                        "lm-eval/own/exact_match.strict": 0.0})  # fmt: skip
        records.append({"iteration": step, **{f"lm loss validation/set{place}": 2.0 + place for place in range(5)},
                        "lm loss validation/set0 ppl": 7.4, "lm loss validation": 4.0})  # fmt: skip
    events = [start(0), event("tasks", 3, seconds=1.0, scores={}), event("tasks-failed", 3, text="no such answer")]
    text = page(read_run(write_run(tmp_path, records, events)), "a run")
    for row in (("own", "acc", "0.75", "0.03125", "3"), ("own", "exact_match.strict", "0", "", "3")):
        assert "".join(f"<td>{cell}</td>" for cell in row) in text
    assert text.count("<b>own</b>") == 2 and text.count("<b>validation loss by set</b>") == 2
    assert "set4" in text and "set0 ppl" not in text
    assert "evaluation on tasks failed" in text and "no such answer" in text and ">tasks<" not in text


def test_statistics_of_ngram_layers_stand_behind_those_of_the_others(tmp_path: Path) -> None:
    names = ("engram/dead_rows", "memory/dead_rows", "memory/other", "engram/value_coverage")
    records = [{"iteration": step, **{f"{name}/layer_000": 0.5 * step for name in names}} for step in (1, 2, 3)]
    found = shown(write_run(tmp_path, [*steps(1, 3), *records], [start(0)])).text
    places = [found.index(text) for text in ("dead rows", "rows used, n-grams", "dead rows, n-grams", "other")]
    assert places == sorted(places) and found.count("rows not picked since the last record") == 2


def test_changes_of_the_blend(tmp_path: Path) -> None:
    """One that was made again by the start after one that saved nothing is shown once; records that are none, not."""
    corpora = [{"prefix": "data/web", "samples": 60, "epochs": 0.25, "share": [0.7, 0.4]},
               {"prefix": "data/new", "samples": 0, "epochs": None, "share": [0.0, 0.6]}]  # fmt: skip
    told = [start(0), start(10), event("blend", 10, from_sample=80, corpora=corpora), start(10),
            event("blend", 10, from_sample=80, corpora=corpora), event("blend", 12, from_sample=96, corpora=[3]),
            event("blend", 13, corpora="no")]  # fmt: skip
    found = shown(write_run(tmp_path, steps(1, 20), told))
    table = re.sub(r" +", " ", found.text.split("Blend of the training set")[1].replace("\n", " "))
    assert "80 10 data/web 60 0.25 0.7 0.4 80 10 data/new 0 none 0.0 0.6" in table
    assert found.text.count("data/web") == 1 and "from sample 80 on, see below" in found.text
    assert "mark blend" in {given.get("class") for _, given in found.elements}


def test_checkpoints_that_are_not_persistent(tmp_path: Path) -> None:
    """They are counted apart; one that could not be written is told among the faults."""
    told = [start(0), event("checkpoint", 2, kind="local", seconds=0.5), event("checkpoint", 4, seconds=1.5),
            event("checkpoint", 6, kind="local", seconds=0.7),
            event("unsaved", 8, text="rank 1 on node7: full")]  # fmt: skip
    page = shown(write_run(tmp_path, steps(1, 8), told))
    assert "Written besides, and not listed: 2 non-persistent (local), the last of iteration 6 in 0.7 s." in page.text
    assert "1 more were written" in page.text
    assert "checkpoint not saved" in page.text and "rank 1 on node7: full" in page.text


@pytest.mark.parametrize(
    "told, word",
    [
        ([start(0), event("end", 100, finished=True)], "finished"),
        ([start(0), event("fault", 9, text="no", rank=0, code=1)], "failed"),
        ([start(0), event("fault", 9, text="no", rank=0, code=1), start(5, reason="no")], "running"),
        ([start(0), event("end", 9, finished=False)], "stopped"),
        ([start(0)], "running"),
        (None, "running"),
    ],
)
def test_the_state(tmp_path: Path, told: list | None, word: str) -> None:
    run = read_run(write_run(tmp_path, steps(1, 9), told))
    assert run.state()[0] == word
    assert f"state {word}" in page(run, "t")


def test_a_run_of_which_nothing_was_heard_for_long(tmp_path: Path) -> None:
    write_run(tmp_path, steps(1, 9), [{**start(0), "time": 1e9}], log_interval=10)
    long_ago = read_run(tmp_path).read - 100
    os.utime(tmp_path / "metrics.jsonl", (long_ago, long_ago))
    assert read_run(tmp_path).state()[0] == "running", "less than two minutes"
    os.utime(tmp_path / "metrics.jsonl", (long_ago - 100,) * 2)
    assert read_run(tmp_path).state()[0] == "silent"
    write_run(tmp_path, steps(1, 9), [{**start(0), "time": 1e9}], log_interval=100)
    os.utime(tmp_path / "metrics.jsonl", (long_ago - 100,) * 2)
    assert read_run(tmp_path).state()[0] == "running", "a line takes 50 s: 200 s are not long"


def test_repeated_steps_are_shown_once(tmp_path: Path) -> None:
    """A file that no restart has cut: steps 6 to 9 twice, and a last line that a kill has cut."""
    validation = [{"iteration": 8, "lm loss validation": 5.0}]
    write_run(tmp_path, steps(1, 9, loss=1.0) + validation + steps(6, 7, loss=2.0), [start(0), start(5, reason="x")])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 8, "lm lo')
    run = read_run(tmp_path)
    assert run.series["lm loss"].iterations == [1, 2, 3, 4, 5, 6, 7]
    assert run.series["lm loss"].values[5] == pytest.approx(2 + 1 / 6)
    assert run.series["lm loss validation"].values == [], "of a step that has not been reached again"
    assert (run.iteration, run.unreadable) == (7, 1)
    assert "1 lines of metrics.jsonl cannot be read" in shown(tmp_path).text


def test_the_page_does_not_grow_with_the_run(tmp_path: Path) -> None:
    told = [start(0), *(event("skipped", step, text="x" * 5000) for step in range(3000)), start(3, reason="r")]
    sizes = [len(page(read_run(write_run(tmp_path / str(count), steps(1, count, layers=4), told[: count // 2])), "t"))
             for count in (2000, 6000)]  # fmt: skip
    assert sizes[1] < 1.1 * sizes[0] < 1.2e6, sizes


def test_a_spike_stays_visible() -> None:
    series = Series()
    for step in range(1, 10001):
        series.add(step, 50.0 if step == 7777 else 1.0)
    points = series.thinned()
    assert len(points) == POINTS and points[-1].iteration == 10000
    assert max(point.high or 0 for point in points) == 50.0 and min(point.low or 9 for point in points) == 1.0
    spiky = next(point for point in points if point.high == 50.0)
    assert spiky.mean == pytest.approx(1 + 49 / 25) and spiky.low == 1.0
    few = Series([5, 9], [1.0, None]).thinned()
    assert [(point.iteration, point.mean, point.high) for point in few] == [(5, 1.0, 1.0), (9, None, None)]


def test_numbers_that_are_not_finite_leave_gaps(tmp_path: Path) -> None:
    records = steps(1, 9)
    records[4]["lm loss"] = None
    write_run(tmp_path, records)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 10, "lm loss": NaN, "grad-norm": 1e999, "batch-size": "8", "x": true}\n')
        file.write(f'{{"iteration": 11, "grad-norm": {10**400}}}\n')
    run = read_run(tmp_path)
    assert run.series["lm loss"].values[4] is None and run.series["lm loss"].values[-1] is None
    assert run.series["grad-norm"].values[-2:] == [None, None]
    figure = page(run, "t").split("</figure>")[0]
    assert len(re.findall(r'class="line c1"', figure)) == 2, "two stretches, and no nan in a path"
    assert "nan" not in figure.lower().split("<svg")[1].split("</svg>")[0]


@pytest.mark.parametrize(
    "values", [[0.0], [0.0, 0.0], [-1.0, 2.0], [1e-9, 1e9], [1e-300, 1e300], [3.0, None], [7e8, 7e8]]
)
def test_charts_of_odd_numbers(values: list[float | None]) -> None:
    made = chart("t", "u", [Line("l", Series(list(range(1, len(values) + 1)), values), 1)])
    assert made is not None and "nan" not in made and "inf" not in made.replace("info", "")
    assert 2 <= made.count('class="y"') <= 12


def test_a_heat_map_needs_numbers() -> None:
    assert heat_map("t", "m", {0: Series([1], [None])}) is None
    for values in ([1.0, 1.0], [1.0, None], [-3.0, 4.0]):
        assert heat_map("t", "m", {0: Series([1, 2], values), 3: Series([2], [0.5])}) is not None


def test_words() -> None:
    assert [duration(seconds) for seconds in (0, 59.6, 3600, 11530, 90000)] == [
        "0 s", "1 min", "1 h", "3 h 12 min", "1 d 1 h"
    ]  # fmt: skip
    assert [number(value) for value in (0, 1.23456, 12345.6, 1.5e7, 2e-5, -0.25)] == [
        "0", "1.235", "12,346", "1.5e7", "2e-5", "-0.25"
    ]  # fmt: skip


# -- the program -------------------------------------------------------------------------------------------------------


def report(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "report.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_program(tmp_path: Path) -> None:
    run = write_run(tmp_path / "my run", steps(1, 9), [start(0)])
    done = report(run)
    assert done.returncode == 0 and done.stdout.startswith(f"wrote {run}/report.html (") and not done.stderr
    assert "<title>my run</title>" in (run / "report.html").read_text()
    written = ["config.yaml", "events.jsonl", "metrics.jsonl", "report.html"]
    assert sorted(path.name for path in run.iterdir()) == written


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing", Path(__file__)):
        done = report(path)
        assert done.returncode == 2 and not done.stdout
        assert done.stderr.strip() == (
            f"report.py: error: RUN is {path}; expected the --save directory of a run, with its metrics.jsonl, "
            "events.jsonl or config.yaml"
        )
    run = write_run(tmp_path / "run", steps(1, 9))
    done = report(run, "--output", tmp_path / "no" / "page.html")
    assert done.returncode == 2 and "--output is" in done.stderr and "Traceback" not in done.stderr
