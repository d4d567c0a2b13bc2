"""--allow-new-blend in whole runs: the blend changes in mid-run, and a run that is killed around it is the same run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from program_runs import ROOT, Finished, losses, tiny_run, train

from umv2_megatron.observation.events import read_events
from umv2_megatron.observation.page import page
from umv2_megatron.observation.run_files import read_run
from umv2_megatron.training.metrics import read_metrics

sys.path.insert(0, str(ROOT / "tests" / "unit" / "data"))
from data_helpers import write_corpus  # noqa: E402

pytestmark = pytest.mark.thorough

BATCH, BEFORE, LAST = 8, 5, 12
Corpora = dict[str, str]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Corpora:
    """Three corpora of bytes, each of its own letters; a has two epochs and more for the runs here, b and c less."""
    folder = tmp_path_factory.mktemp("corpora")
    numbers = np.random.default_rng(1)
    found = {}
    for name, first, documents in (("a", 60, 40), ("b", 90, 60), ("c", 120, 30)):
        parts = [[*numbers.integers(first, first + 25, numbers.integers(20, 60)), 256] for _ in range(documents)]
        found[name] = write_corpus(folder / name, parts)
    return found


def run_on(blend: list[str], save: Path, **changes: Any) -> list[str]:
    return tiny_run(
        **{
            "mock_data": None, "tokenizer_type": "ByteLevelTokenizer", "data_path": blend, "split": "80,20,0",
            "train_iters": LAST, "save": save, "hidden_dropout": 0.1, "eval_interval": 8, "eval_iters": 1, **changes,
        }
    )  # fmt: skip


def first_blend(corpora: Corpora) -> list[str]:
    return [corpora["a"], corpora["b"]]  # in proportion to their tokens


def second_blend(corpora: Corpora) -> list[str]:
    return ["0.3", corpora["b"], "0.2", corpora["c"], "0.5", corpora["a"]]


@pytest.fixture(scope="module")
def begun(corpora: Corpora, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks, stopped with the first blend; to be copied."""
    folder = tmp_path_factory.mktemp("begun")
    train(2, run_on(first_blend(corpora), folder / "run", exit_interval=BEFORE), folder / "o")
    return folder / "run"


def record(save: Path) -> list[dict[str, Any]]:
    """What a run recorded per iteration, without the times."""
    clocks = {"iteration-time", "throughput"}
    return [{key: value for key, value in line.items() if key not in clocks} for line in read_metrics(save)]


def blends_of(save: Path) -> list[dict[str, Any]]:
    newest = int((save / "latest_checkpointed_iteration.txt").read_text())
    return json.loads((save / f"iter_{newest:07d}" / "config.json").read_text())["data"]["training_blends"]


def die_at(iteration: int) -> None:
    """Kill this rank when so many steps are done, before the next one."""
    from umv2_megatron.training.loop import Trainer

    step = Trainer._step

    def dying(trainer: Trainer, profiler: Any) -> Any:
        if trainer.state.progress.iteration == iteration:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(trainer, profiler)

    Trainer._step = dying  # type: ignore[method-assign]


@pytest.mark.slow
def test_killed_before_and_after_the_first_save_with_a_new_blend(corpora: Corpora, begun: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    shutil.copytree(begun, whole)
    shutil.copytree(begun, killed)
    changes = {"allow_new_blend": True, "save_interval": 3}
    through = train(2, run_on(second_blend(corpora), whole, **changes), tmp_path / "o")
    command = run_on(second_blend(corpora), killed, **changes)
    for iteration in (BEFORE, 7):  # checkpoints are of 5, 6 and 9
        train(2, command, tmp_path / "o", die_at, (iteration,), codes=-signal.SIGKILL)
    finished = train(2, command, tmp_path / "o")
    assert finished.weights == through.weights and record(killed) == record(whole)
    assert [iteration for iteration, _ in losses(whole)] == list(range(1, LAST + 1))

    first, second = blends_of(whole)
    assert blends_of(killed) == [first, second]
    assert [Path(each["prefix"]).name for each in first["corpora"]] == ["a", "b"]
    assert (first["from_sample"], first["samples"], first["consumed"]) == (0, BATCH * LAST, {})
    assert second["from_sample"] == BATCH * BEFORE == sum(second["consumed"].values())
    assert [each["weight"] for each in second["corpora"]] == [0.3, 0.2, 0.5]

    assert f" new blend from sample {BATCH * BEFORE} on:" in through.text
    assert f" blend 2 of this run, since sample {BATCH * BEFORE}" in finished.text
    events = [event for event in read_events(whole) if event["event"] == "blend"]
    assert [(event["iteration"], event["from_sample"]) for event in events] == [(BEFORE, BATCH * BEFORE)]
    told = {Path(each["prefix"]).name: each for each in events[0]["corpora"]}
    assert sum(each["samples"] for each in told.values()) == BATCH * BEFORE
    assert told["c"]["samples"] == 0 and told["c"]["share"] == [0, 0.2] and told["b"]["share"][1] == 0.3
    assert f"{corpora['c']}: 0 samples used (0.00 epochs), share none -> 20.00%" in through.text
    assert sum(event["event"] == "blend" for event in read_events(killed)) == 2, "the first start saved nothing"
    html = page(read_run(killed), "t")
    assert html.count(f"<td>{corpora['c']}</td>") == 1 and "Blend of the training set" in html


@pytest.mark.slow
def test_the_length_may_change_with_the_blend_and_after_it(corpora: Corpora, begun: Path, tmp_path: Path) -> None:
    """Samples are numbered in their corpora: nothing depends on how many there will be."""
    shutil.copytree(begun, tmp_path / "short")
    shutil.copytree(begun, tmp_path / "long")
    blend, eight = second_blend(corpora), {"lr_decay_iters": LAST, "eval_interval": None, "eval_iters": 0}
    train(2, run_on(blend, tmp_path / "short", allow_new_blend=True, **eight, train_iters=9), tmp_path / "o")
    train(2, run_on(blend, tmp_path / "long", allow_new_blend=True, **eight, train_iters=20), tmp_path / "o")
    train(2, run_on(blend, tmp_path / "short", **eight, train_iters=20), tmp_path / "o")
    assert losses(tmp_path / "short") == losses(tmp_path / "long") and len(losses(tmp_path / "long")) == 20


def forget_the_blends() -> None:
    """Write checkpoints as earlier versions did, without the history of the blend."""
    from umv2_megatron.training import pretrain

    saved_config = pretrain._saved_config

    def without(*arguments: Any) -> dict[str, Any]:
        config = saved_config(*arguments)
        return {**config, "data": {key: each for key, each in config["data"].items() if key != "training_blends"}}

    pretrain._saved_config = without


def test_a_checkpoint_of_an_earlier_version(corpora: Corpora, begun: Path, tmp_path: Path) -> None:
    train(2, run_on(first_blend(corpora), tmp_path / "old", exit_interval=BEFORE), tmp_path / "o", forget_the_blends)
    config = json.loads((tmp_path / "old" / f"iter_{BEFORE:07d}" / "config.json").read_text())
    assert "training_blends" not in config["data"]
    shutil.copytree(begun, tmp_path / "new")
    ended = {}
    for name in ("old", "new"):
        ended[name] = train(2, run_on(second_blend(corpora), tmp_path / name, allow_new_blend=True), tmp_path / "o")
    assert ended["old"].weights == ended["new"].weights and blends_of(tmp_path / "old") == blends_of(tmp_path / "new")


def refused(argv: list[str], folder: Path) -> str:
    ended: Finished = train(2, argv, folder, codes=2)
    lines = [line for line in ended.text.splitlines() if line.startswith("pretrain_umv2.py: error: ")]
    assert len(lines) == 1 and "Traceback" not in ended.text, ended.text[-4000:]
    return lines[0]


@pytest.mark.parametrize(
    ("blend", "changes", "told"),
    [
        ("b", {}, ["--data-path is ", "was trained with --data-path ", "--allow-new-blend", "--allow-config-change"]),
        ("b", {"seed": 5}, ["--allow-new-blend goes on", "--seed has to be as it was", "is 5", "1234"]),
        ("b", {"seed": 5, "allow_config_change": True}, ["--seed has to be as it was"]),
        ("a", {"split": "70,30,0"}, ["--split has to be as it was", "70,30,0", "80,20,0"]),
        ("b", {"seq_length": 16}, ["--seq-length has to be as it was", "is 16", "is 32"]),
        ("bab", {}, ["the new blend names twice"]),
        ("files", {}, ["needs the new blend in the flag that the old one had", "--train-data-path", "--data-path"]),
    ],
)
def test_refusals(
    blend: str, changes: dict[str, Any], told: list[str], corpora: Corpora, begun: Path, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file() and path.name != ".lock"}
    paths = [corpora[name] for name in blend] if blend != "files" else []
    flag = {"allow_new_blend": True} if told[0] != "--data-path is " else {}
    if blend == "files":
        changes = {"data_path": None, "split": None, "train_data_path": [corpora["a"]],
                   "valid_data_path": [corpora["b"]]}  # fmt: skip
    text = refused(run_on(paths, begun, **flag, **changes), tmp_path / "o")
    for part in told:
        assert part in text, text
    assert {path: path.read_bytes() for path in before} == before


def test_nothing_to_blend(tmp_path: Path) -> None:
    text = refused(tiny_run(train_iters=1, allow_new_blend=True), tmp_path / "o")
    assert "--allow-new-blend is on; expected --data-path or --train-data-path" in text


@pytest.mark.slow
def test_back_to_a_checkpoint_of_before_the_change(corpora: Corpora, begun: Path, tmp_path: Path) -> None:
    """The only one with the new blend is damaged: the older one is not taken for one of it."""
    save = tmp_path / "run"
    shutil.copytree(begun, save)
    command = run_on(second_blend(corpora), save)
    through = train(2, [*command, "--allow-new-blend"], tmp_path / "o")
    shard = next(iter(sorted((save / f"iter_{LAST:07d}").glob("*.distcp"))))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    text = refused(command, tmp_path / "o")
    assert f"the checkpoint of iteration {BEFORE}" in text and "give --allow-new-blend again" in text
    again = train(2, [*command, "--allow-new-blend"], tmp_path / "o")
    assert f"loaded checkpoint of iteration {BEFORE} " in again.text and again.weights == through.weights


def test_allow_config_change_means_what_it_did(corpora: Corpora, begun: Path, tmp_path: Path) -> None:
    """The new data are read from the run's place in their own order, and the history begins anew."""
    save = tmp_path / "run"
    shutil.copytree(begun, save)
    train(2, run_on([corpora["c"]], save, allow_config_change=True), tmp_path / "o")
    assert [each["from_sample"] for each in blends_of(save)] == [0] and blends_of(save)[0]["consumed"] == {}
    assert not [event for event in read_events(save) if event["event"] == "blend"]
