"""TensorBoard and W&B across a kill and two restarts: one run, each step once.

W&B is a stand-in that records what it is given; docs/training.md says what was tried with the package itself.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from program_runs import tiny_run, train

from umv2_megatron.training.metrics import read_metrics
from umv2_megatron.training.wandb_run import WANDB_FILE


def record_wandb(path: str, killed_at: int | None = None, online_step: int | None = None) -> None:
    """Put a stand-in for the package wandb in place, which writes to ``path`` what it is given. ``killed_at``: the step
    at which its process is killed; ``online_step``: the last step that its server has, -1 for none."""

    def write(what: str, **values: Any) -> None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"what": what, **values}) + "\n")

    class Run:
        disabled = False
        offline = online_step is None
        resumed = bool(online_step is not None and online_step >= 0)
        starting_step = 0 if online_step is None else online_step + 1

        def log(self, numbers: dict[str, float], step: int) -> None:
            if step == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            write("log", step=step, names=sorted(numbers))

        def finish(self) -> None:
            write("finish")

    def init(config: dict[str, Any], **values: Any) -> Run:
        assert config["wandb_project"] == values["project"]
        write("init", **values)
        return Run()

    module: Any = types.ModuleType("wandb")
    module.init, module.Error = init, RuntimeError
    sys.modules["wandb"] = module


def _arguments(tmp_path: Path, **changes: Any) -> list[str]:
    settings: dict[str, Any] = {"train_iters": 6, "save_interval": 2, "eval_interval": 2, "eval_iters": 1}
    places = {"save": tmp_path / "run", "tensorboard_dir": tmp_path / "tb", "wandb_project": "p", "wandb_entity": "us"}
    return tiny_run(**{**settings, **places, "wandb_exp_name": "n", **changes})


def _said(path: Path, what: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [record for record in records if record["what"] == what]


def _sent(path: Path) -> Counter:
    """How often each name was sent for each step."""
    return Counter((record["step"], name) for record in _said(path, "log") for name in record["names"])


def test_each_step_once_after_a_kill(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = tmp_path / "wandb"
    argv = _arguments(tmp_path)
    train(1, argv, tmp_path / "o", record_wandb, (str(log), 6), codes=-signal.SIGKILL)
    assert max(step for step, _ in _sent(log)) == 5, "the kill is after the checkpoint of step 4"
    for _ in range(2):  # the second restart has nothing left to do
        train(1, argv, tmp_path / "o", record_wandb, (str(log),))

    starts = _said(log, "init")
    assert len(starts) == 3 and len({start["id"] for start in starts}) == 1 and starts[0]["id"]
    assert {(start["resume"], start["entity"], start["project"], start["name"]) for start in starts} == {
        ("allow", "us", "p", "n")
    }
    sent = _sent(log)
    assert set(sent.values()) == {1}, sent
    assert [step for step, name in sorted(sent) if name == "lm loss"] == [1, 2, 3, 4, 5, 6]
    assert [step for step, name in sorted(sent) if name == "lm loss validation"] == [2, 4, 6]
    assert sent[6, "lm loss test"] == 1 and len(_said(log, "finish")) == 2

    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    shown = Counter((event.step, tag) for tag in events.Tags()["scalars"] for event in events.Scalars(tag))
    assert shown == sent
    records = [record for record in read_metrics(tmp_path / "run") if "lm loss" in record]
    recorded = {record["iteration"]: record["lm loss"] for record in records}
    for event in events.Scalars("lm loss"):
        assert event.value == pytest.approx(recorded[event.step])


def test_the_server_says_which_steps_it_has(tmp_path):
    """Uploads are late: what a killed process had not uploaded is sent again, also what is not repeated."""
    log = tmp_path / "wandb"
    argv = _arguments(tmp_path, tensorboard_dir=None, eval_iters=0)
    train(1, argv, tmp_path / "o", record_wandb, (str(log), 6, -1), codes=-signal.SIGKILL)
    first = len(_said(log, "log"))
    train(1, argv, tmp_path / "o", record_wandb, (str(log), None, 2))
    assert [record["step"] for record in _said(log, "log")[first:]] == [3, 4, 5, 6]
    assert _said(log, "log")[2]["names"] == _said(log, "log")[first]["names"]


@pytest.mark.slow
def test_another_project_or_no_directory_is_another_run(tmp_path):
    log = tmp_path / "wandb"
    short = {"train_iters": 3, "exit_interval": 1, "eval_iters": 0, "tensorboard_dir": None}
    train(1, _arguments(tmp_path, **short), tmp_path / "o", record_wandb, (str(log),))
    other = _arguments(tmp_path, **short, wandb_project="q")
    train(1, other, tmp_path / "o", record_wandb, (str(log),))
    unsaved = _arguments(tmp_path, **short, save=None, save_interval=None)
    train(1, unsaved, tmp_path / "o", record_wandb, (str(log),))
    first, second, third = _said(log, "init")
    assert first["id"] != second["id"] and (second["resume"], third["resume"], third["id"]) == ("allow", None, None)
    assert [record["step"] for record in _said(log, "log")] == [1, 2, 1]
    assert json.loads((tmp_path / "run" / WANDB_FILE).read_text())["id"] == second["id"]
    (tmp_path / "run" / WANDB_FILE).write_text("{")
    refused = train(1, other, tmp_path / "o", record_wandb, (str(log),), codes=1)
    assert "is not what this program writes" in refused.text
