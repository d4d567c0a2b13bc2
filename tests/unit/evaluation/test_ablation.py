"""Plans of ablations, and what trials are started and started again."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_plan import CONTENT, plan_of

from umv2_megatron.commands import ablate
from umv2_megatron.data.indexing import IndexWriter
from umv2_megatron.evaluation.ablation import programs, runner
from umv2_megatron.evaluation.ablation.plan import read_plan
from umv2_megatron.evaluation.ablation.report import write_report
from umv2_megatron.planning import flops_per_token

ROOT = Path(__file__).resolve().parents[3]


def test_trials_are_runs_times_seeds_with_their_settings_resolved(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert [trial.name for trial in plan.trials] == ["dense seed 1", "umv2 seed 1", "dense seed 2", "umv2 seed 2"]
    umv2 = plan.trials[3]
    assert umv2.run.memory.topk == 3 and umv2.run.training.seed == 2 and umv2.run.has_memory
    assert not plan.trials[0].run.has_memory and umv2.preset == "umv2-tiny"
    assert umv2.directory == tmp_path / "out" / "umv2" / "seed2"
    assert not (tmp_path / "out").exists()


def test_smoke_shortens_every_trial(tmp_path: Path) -> None:
    run = plan_of(tmp_path, smoke=True, launcher="torchrun", ranks=2).trials[0].run
    assert run.train_iters == 2 and run.model.seq_length == 32 and run.data.mock_data and run.world_size == 1
    corpus = {"train-data-path": ["a"], "data-order": "sequential", "loss-mask-key": "loss"}
    schedule = {"lr-decay-style": "WSD", "lr-wsd-decay-iters": 600, "train-iters": 2000, "lr-decay-iters": 2000}
    run = plan_of(tmp_path, smoke=True, common={**CONTENT["common"], **corpus, **schedule}).trials[0].run
    run.data.validate()
    assert run.data.data_order == "shuffled" and run.data.loss_mask_key is None


def test_trials_may_begin_with_the_weights_of_a_checkpoint(tmp_path: Path) -> None:
    common = {**CONTENT["common"], "load": "somewhere", "finetune": True}
    for trial in plan_of(tmp_path, common=common).trials:
        assert trial.settings["load"] == "somewhere" and trial.run.training.load == "somewhere"
        assert trial.settings["save"] == str(trial.directory / "checkpoints")
    for trial in plan_of(tmp_path, smoke=True, common=common).trials:
        assert trial.run.training.load is None and not trial.run.training.finetune


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"runs": {}}, "expected a mapping with the key runs"),
        ({"seed": [1]}, "unknown key 'seed'; expected one of common, seeds"),
        ({"seeds": 3}, "seeds is 3; expected a list of integers"),
        ({"seeds": [3, 3]}, "expected each seed once"),
        ({"baseline": "moe"}, "baseline is 'moe'; expected one of dense, umv2"),
        ({"runs": {"a/b": {}}, "baseline": None}, "run 'a/b': expected a name of letters"),
        ({"common": {"save": "x"}, "baseline": None}, "save is set; expected it left out"),
        ({"common": {**CONTENT["common"], "load": "x"}}, "load is set; expected finetune: true too"),
        ({"common": {**CONTENT["common"], "memory-topkk": 3}}, "unknown key 'memory_topkk'; did you mean"),
        ({"common": {**CONTENT["common"], "memory-num-cores": 5}}, "run 'umv2': --memory-value-dim is"),
        ({"ranks": 2}, "ranks is 2 without a launcher; expected launcher too, such as torchrun"),
        ({"ranks": 0}, "ranks is 0; expected the number of ranks that launcher starts"),
        ({"common": {**CONTENT["common"], "model-presett": "x"}}, "unknown key 'model_presett'; did you mean model-p"),
        ({"launcher": ["torchrun"]}, "launcher is ['torchrun']; expected the words of a command, in one string"),
        ({"launcher": "torchrun 'x"}, "expected the words of a command"),
        ({"baseline": ["dense"]}, "baseline is ['dense']; expected one of dense, umv2"),
        ({"trend": [5, 15]}, "trend is [5, 15], but run 'dense' of 20 iterations is validated every 1000;"),
        ({"trend": [5, 15], "baseline": None}, "trend is [5, 15] without a baseline; expected baseline too"),
        (
            {"trend": [5, 25], "common": {**CONTENT["common"], "eval-interval": 5}},
            "trend is [5, 25], but run 'dense' of 20 iterations is validated every 5; expected iterations among which",
        ),
        ({"trend": 1000}, "trend is 1000; expected the fit's first and last iteration, such as [1000, 4000]"),
        ({"trend": [1000, 500]}, "trend is [1000, 500]; expected the fit's first and last iteration"),
        ({"trend": [True, 500]}, "trend is [True, 500]; expected the fit's first and last iteration"),
        ({"evaluate": {"num-exampels": 3}}, "evaluate: unknown key 'num-exampels'; did you mean num-examples?"),
        ({"evaluate": {"forms": "any"}}, "evaluate: argument --forms: invalid choice: 'any'"),
        ({"evaluate": {"tasks": "facts"}}, "evaluate: --tasks holds 'facts'; expected 'all' or some of"),
        ({"evaluate": {"tasks": "needle", "difficulty": "hard"}}, "evaluate: --difficulty is 'hard'"),
        ({"evaluate": {"data": "x", "stride": 0}}, "evaluate: --stride is 0; expected 1 or more"),
        ({"evaluate": {"data": "x", "data-context-length": -8}}, "evaluate: --data-context-length is -8; expected 1"),
        (
            {"evaluate": {"data": "x", "data-context-length": 8, "stride": 9}},
            "evaluate: --stride is 9; expected at most --data-context-length (8)",
        ),
        (
            {"evaluate": {"data": "x", "pipeline-model-parallel-size": 0}},
            "evaluate: --pipeline-model-parallel-size is 0; expected 1 or more",
        ),
        ({"evaluate": {"num-examples": 3}}, "evaluate: nothing to evaluate"),
        ({"evaluate": {"tasks": "needle", "help": True}}, "evaluate: help is set; expected it left out"),
        ({"evaluate": {"tasks": "needle", "max_tokens": True}}, "--max-tokens: expected one argument"),
    ],
)
def test_a_plan_that_cannot_work_is_refused_before_anything_runs(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match="plan.yaml") as refused:
        plan_of(tmp_path, **changes)
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("runs: {umv2: {}, umv2: {lr: 1}}\n", "runs: umv2 is there twice, again in line 1; expected every key once"),
        ("common:\n  lr: 1\n  lr: 2\nruns: {umv2: {}}\n", "common: lr is there twice, again in line 3"),
        ("rnus: {umv2: {}}\n", "unknown key 'rnus'; expected one of common, seeds"),
    ],
)
def test_what_a_plan_says_twice_or_otherwise_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="plan.yaml") as refused:
        read_plan(path, tmp_path / "out")
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--output", "plan.yaml"], "plan.yaml, which is a file; expected a directory"),
        (["--output", "out", "--slurm-array", "a.sh", "--report-only"], "--report-only is given with --slurm-array"),
        (["--output", "out", "--slurm-array", "a.sh", "--trial", "0"], "--trial is given with --slurm-array"),
        (["--output", "out", "--slurm-array", "none/a.sh"], "--slurm-array is none/a.sh; expected the name of a file"),
        (["--output", "out", "--slurm-array", "."], "--slurm-array is .; expected the name of a file"),
    ],
)
def test_a_command_line_that_cannot_work_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], sentence: str
) -> None:
    plan_of(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        ablate.main(ablate.parser().parse_args(["plan.yaml", *words]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.yaml"]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the programs of the repository, so that starts can be counted and made to fail."""
    root = tmp_path / "root"
    (root / "tools").mkdir(parents=True)
    text = f"""#!{sys.executable}
import json, pathlib, sys, time, yaml
arguments = sys.argv[1:]
here = pathlib.Path({str(tmp_path)!r})
with open(here / "calls", "a") as calls:
    calls.write(" ".join([sys.argv[0].rsplit("/", 1)[-1], *arguments]) + "\\n")
(here / "cwd").write_text(str(pathlib.Path.cwd()))
deadline = time.monotonic() + 60
while (here / "meet").exists() and len((here / "calls").read_text().splitlines()) < 2:
    if time.monotonic() > deadline:
        sys.exit("nobody else came")
    time.sleep(0.01)
if (here / "fail").exists() and (here / "fail").read_text() in " ".join(arguments):
    print("noise")
    print("pretrain_umv2.py: error: --lr is odd")
    print("more noise")
    sys.exit(2)
if "--config" in arguments:
    settings = yaml.safe_load(open(arguments[arguments.index("--config") + 1]))
    save = pathlib.Path(settings["save"])
    save.mkdir(parents=True, exist_ok=True)
    reached = here / "reached"
    last = reached.read_text() if reached.exists() else str(settings["train_iters"])
    (save / "latest_checkpointed_iteration.txt").write_text(last)
    common = {{"lm loss": 3.0, "iteration-time": 0.5}}
    lines = [{{"iteration": i, "lm loss validation": 4 - i / 10, **common}} for i in (5, 10)]
    (save / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
else:
    pathlib.Path(arguments[arguments.index("--output") + 1]).write_text(json.dumps({{"tasks": []}}))
"""
    for file in (root / "pretrain_umv2.py", root / "tools" / "evaluate.py", root / "tools" / "ablate.py"):
        file.write_text(text)
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(programs, "ROOT", root)
    monkeypatch.setattr(programs.torch.cuda, "is_available", lambda: False)  # or --jobs would want as many devices
    return tmp_path


def calls(folder: Path) -> list[str]:
    file = folder / "calls"
    return file.read_text().splitlines() if file.exists() else []


def test_finished_trials_are_left_alone_and_failed_ones_run_again(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"tasks": ["needle", "icl"], "data": ["plan.yaml"], "no_choices": True, "stride": None}
    plan = plan_of(program, evaluate=flags)
    with pytest.raises(ValueError, match="evaluate: --data names plan.yaml; expected a text file"):
        next(runner.run_trials(plan, plan.trials))
    assert not calls(program)
    monkeypatch.chdir(program)
    (program / "fail").touch()
    states = [state for _, state in runner.run_trials(plan, plan.trials[:1])]
    assert states[0].startswith("failed: exit code 2: pretrain_umv2.py: error: --lr is odd (all of it in ")
    assert not runner.read_results(plan)
    (program / "fail").unlink()
    assert [state for _, state in runner.run_trials(plan, plan.trials[:2])] == ["done", "done"]
    before = len(calls(program))
    assert [state for _, state in runner.run_trials(plan, plan.trials)] == ["was done", "was done", "done", "done"]
    new = calls(program)[before:]
    assert len(new) == 4 and all("seed2" in call for call in new)
    assert new[0].startswith("pretrain_umv2.py --model-preset umv2-tiny --config ")
    assert new[1].startswith("evaluate.py --load ") and new[1].endswith(
        "--tasks needle,icl --data plan.yaml --no-choices"
    )
    result = runner.read_results(plan)["umv2"][0]
    assert result["curve"] == [[5, 3.5], [10, 3.0]] and result["tokens_per_second"] == pytest.approx(
        2 * result["tokens_per_iteration"]
    )


def test_trials_side_by_side(program: Path) -> None:
    """The first two wait for each other; one of them fails, and the others are done all the same."""
    plan = plan_of(program)
    (program / "meet").touch()
    (program / "fail").write_text("umv2/seed1")
    states = {trial.name: state for trial, state in runner.run_trials(plan, plan.trials, jobs=2)}
    assert states.pop("umv2 seed 1").startswith("failed: exit code 2: pretrain_umv2.py: error: --lr is odd")
    assert states == {"dense seed 1": "done", "dense seed 2": "done", "umv2 seed 2": "done"}
    assert "up to 2 trials at a time" in write_report(plan, runner.read_results(plan)).read_text()
    (program / "fail").unlink()
    (program / "meet").unlink()
    assert [state for _, state in runner.run_trials(plan, plan.trials, jobs=9)] == ["was done"] * 3 + ["done"]
    result = json.loads((plan.trials[1].directory / runner.RESULT).read_text())
    assert result["jobs"] == 1  # no more than are left


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_an_unforeseen_exception_is_of_one_trial(
    jobs: str, program: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(program)
    plan_of(program)
    summary = runner.summary

    def broken(trial: Any, seconds: float) -> dict[str, Any]:
        return {}["no such key"] if trial.name == "dense seed 1" else summary(trial, seconds)

    monkeypatch.setattr(runner, "summary", broken)
    with pytest.raises(OSError, match="1 of 4 trials failed; the same command runs them again"):
        ablate.main(ablate.parser().parse_args(["plan.yaml", "--output", "out", "--jobs", jobs]))
    printed = capsys.readouterr()
    assert "dense seed 1: failed: KeyError: 'no such key'\n" in printed.out and 'return {}["no' in printed.err
    assert all(f"] {name}: done\n" in printed.out for name in ("umv2 seed 1", "dense seed 2", "umv2 seed 2"))
    assert "report: " in printed.out


def test_an_interruption_as_trials_are_started_ends_those_that_run(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(program)
    ended = []
    submit, end = runner.ThreadPoolExecutor.submit, programs.Programs.end

    def interrupted(pool: Any, function: Any, plan: Any, trial: Any, running: Any) -> Any:
        if trial.label == "umv2":
            raise KeyboardInterrupt
        return submit(pool, function, plan, trial, running)

    monkeypatch.setattr(runner.ThreadPoolExecutor, "submit", interrupted)
    monkeypatch.setattr(programs.Programs, "end", lambda self: ended.append(self) or end(self))
    with pytest.raises(KeyboardInterrupt):
        list(runner.run_trials(plan, plan.trials, jobs=2))
    assert len(ended) == 1


def test_nothing_starts_where_one_of_the_trials_has_other_settings(program: Path) -> None:
    plan = plan_of(program)
    list(runner.run_trials(plan, plan.trials[1:2]))
    before = calls(program)
    changed = plan_of(program, common={**CONTENT["common"], "lr": 0.5})
    with pytest.raises(ValueError, match="other settings"):
        next(runner.run_trials(changed, changed.trials))
    assert calls(program) == before


def test_a_trial_that_stopped_early_is_not_finished(
    program: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The records end before the checkpoint, as they do between two multiples of --log-interval."""
    monkeypatch.chdir(program)
    plan = plan_of(program, evaluate={"tasks": "needle"}, seeds=[1])
    arguments = ablate.parser().parse_args(["plan.yaml", "--output", "out"])
    (program / "reached").write_text("15")
    with pytest.raises(SystemExit) as ended:
        ablate.main(arguments)
    assert ended.value.code == os.EX_TEMPFAIL and not (plan.output / "report.md").exists()
    printed = capsys.readouterr()
    assert "dense seed 1: stopped at 15 of 20 iterations; the same command goes on\n" in printed.out
    assert printed.err == "2 of 2 trials stopped early; the same command goes on\n"
    assert not runner.read_results(plan) and not any(call.startswith("evaluate") for call in calls(program))
    (Path(plan.trials[0].settings["save"]) / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="other settings"):  # of the checkpoint
        runner.check_settings(plan_of(program, seeds=[1], common={**CONTENT["common"], "lr": 0.5}).trials[0])
    plan_of(program, evaluate={"tasks": "needle"}, seeds=[1])
    (program / "reached").write_text("20")
    ablate.main(arguments)
    assert "dense seed 1: done\n" in capsys.readouterr().out and (plan.output / "report.md").exists()


def test_the_end_of_a_run_may_be_given_in_samples(program: Path) -> None:
    samples = 15 * plan_of(program).trials[0].run.global_batch_size
    plan = plan_of(program, common={**CONTENT["common"], "train-iters": None, "train-samples": samples})
    for reached, state in (("14", "stopped at 14 of 15 iterations; the same command goes on"), ("15", "done")):
        (program / "reached").write_text(reached)
        assert [told for _, told in runner.run_trials(plan, plan.trials[:1])] == [state]


def test_results_of_different_evaluations_never_meet(program: Path) -> None:
    plan = plan_of(program, evaluate={"tasks": "needle", "num-examples": 8})
    list(runner.run_trials(plan, plan.trials[:1]))
    same = plan_of(program, evaluate={"num_examples": 8, "tasks": ["needle"]})
    assert len(runner.read_results(same)["dense"]) == 1
    changed = plan_of(program, evaluate={"tasks": "needle", "num-examples": 64})
    sentence = (
        "plan.yaml: evaluate is --tasks needle --num-examples 64; expected --tasks needle --num-examples 8 as for "
        "dense seed 1"
    )
    before = len(calls(program))
    for refused in (lambda: runner.read_results(changed), lambda: list(runner.run_trials(changed, changed.trials[1:]))):
        with pytest.raises(ValueError, match=sentence):
            refused()
    assert len(calls(program)) == before
    file = plan.trials[0].directory / runner.RESULT
    earlier = json.loads(file.read_text())
    del earlier["evaluate"]
    file.write_text(json.dumps(earlier))
    assert len(runner.read_results(changed)["dense"]) == 1


def test_copied_results_are_those_of_their_trials(program: Path) -> None:
    plan = plan_of(program, evaluate={"tasks": "needle"})
    list(runner.run_trials(plan, plan.trials[:2]))
    first, other = plan.trials[0], plan.trials[1]
    file = first.directory / runner.RESULT
    right = file.read_text()
    for text, sentence in (
        (right[:90], "result.json: expected a readable JSON file"),
        ("[]", "result.json: expected a JSON object"),
        ((other.directory / runner.RESULT).read_text(), "result.json is of umv2 seed 1; expected the result of dense"),
    ):
        file.write_text(text)
        for read in (lambda: runner.read_results(plan), lambda: list(runner.run_trials(plan, plan.trials))):
            with pytest.raises(ValueError, match=sentence):
                read()
    file.write_text(right)
    for name, sentence in ((runner.EVALUATION, "though dense seed 1 was evaluated"), ("settings.yaml", "beside res")):
        missing = first.directory / name
        text = missing.read_text()
        missing.unlink()
        with pytest.raises(ValueError, match=sentence) as refused:
            runner.read_results(plan)
        assert str(missing) in str(refused.value)
        missing.write_text(text)
    (first.directory / runner.EVALUATION).write_text('{"tasks": [')
    with pytest.raises(ValueError, match="evaluation.json: expected a readable JSON file"):
        runner.read_results(plan)


def test_smoke_beside_whole_trials_is_refused(program: Path) -> None:
    plan = plan_of(program, evaluate={"tasks": "needle"})
    list(runner.run_trials(plan, plan.trials[:1]))
    smoke = plan_of(program, smoke=True, evaluate={"tasks": "needle"})
    with pytest.raises(ValueError, match="--smoke is given, but .*dense/seed1 is of a whole trial"):
        list(runner.run_trials(smoke, smoke.trials))


def test_a_run_that_diverged_is_not_judged_by_its_last_good_loss(program: Path) -> None:
    plan = plan_of(program)
    list(runner.run_trials(plan, plan.trials[:2]))
    metrics = Path(plan.trials[1].settings["save"]) / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"iteration": 15, "lm loss validation": null}\n')
    file = plan.trials[1].directory / runner.RESULT
    file.write_text(json.dumps(runner.summary(plan.trials[1], 1.0)))
    results = runner.read_results(plan)
    assert results["umv2"][0]["curve"] == [[5, 3.5], [10, 3.0], [15, float("inf")]]
    row = next(line for line in write_report(plan, results).read_text().splitlines() if line.startswith("| umv2"))
    assert "| inf |" in row
    metrics.unlink()
    with pytest.raises(runner.TrialFailed, match="it left no metrics"):
        runner.summary(plan.trials[1], 1.0)


def test_other_settings_for_a_trial_that_has_begun_are_refused(program: Path) -> None:
    plan = plan_of(program)
    list(runner.run_trials(plan, plan.trials[:1]))
    changed = plan_of(program, common={**CONTENT["common"], "lr": 0.5})
    with pytest.raises(ValueError, match=r"settings.yaml has other settings .* dense seed 1 now"):
        list(runner.run_trials(changed, changed.trials))
    with pytest.raises(ValueError, match="other settings"):
        runner.read_results(changed)


def test_settings_may_change_as_long_as_nothing_was_trained(program: Path) -> None:
    plan = plan_of(program, common={**CONTENT["common"], "lr": 0.5})
    trial = plan.trials[0]
    trial.directory.mkdir(parents=True)
    trial.settings_file.write_text(trial.settings_text())
    mended = plan_of(program)
    assert [state for _, state in runner.run_trials(mended, mended.trials[:1])] == ["done"]
    assert "0.5" not in trial.settings_file.read_text()


def test_one_output_by_two_names_and_after_a_move(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an array job names it in full, and a user from where he is."""
    plan = plan_of(program)
    list(runner.run_trials(plan, plan.trials))
    monkeypatch.chdir(program)
    again = read_plan(plan.path, Path("out"))
    assert [state for _, state in runner.run_trials(again, again.trials)] == ["was done"] * 4
    (program / "out").rename(program / "moved")
    assert len(runner.read_results(read_plan(plan.path, Path("moved")))["umv2"]) == 2


def test_programs_run_where_the_user_is(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (program / "here").mkdir()
    monkeypatch.chdir(program / "here")
    plan = plan_of(program)
    list(runner.run_trials(plan, plan.trials[:1]))
    assert (program / "cwd").read_text() == str(Path.cwd())
    assert f"\ncd {Path.cwd()}\n" in runner.array_script(plan)


def test_the_array_job_has_a_task_for_every_trial(program: Path) -> None:
    text = runner.array_script(plan_of(program, slurm={"partition": "gpu", "exclusive": True}))
    assert "#SBATCH --array=0-3\n" in text and "#SBATCH --partition=gpu\n#SBATCH --exclusive\n" in text
    assert text.rstrip().endswith('--trial "$SLURM_ARRAY_TASK_ID"')


@pytest.mark.parametrize("path", sorted((ROOT / "examples/ablations").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_plans_compare_models_of_equal_operations(path: Path, tmp_path: Path) -> None:
    """Of a step, in which one model may see more tokens than another."""
    plan = read_plan(path, tmp_path / "out")
    cost = {
        trial.label: flops_per_token(trial.run.values, trial.run.memory if trial.run.has_memory else None).blocks
        * trial.run.global_batch_size
        * trial.run.model.seq_length
        for trial in plan.trials
    }
    assert plan.baseline in cost
    assert all(operations == pytest.approx(cost[plan.baseline], rel=0.01) for operations in cost.values()), cost


def test_results_know_their_devices_and_text_and_are_reported_without_data(program: Path) -> None:
    """A trial that was resumed on another machine names both; a copy of the results alone makes the same report."""
    prefixes = [str(program / name) for name in ("text", "other")]
    for prefix in prefixes:
        writer = IndexWriter(prefix, np.uint16)
        writer.add(np.zeros(12, dtype=np.uint16).tobytes(), np.array([12], dtype=np.int32))
        writer.publish({"text_bytes": 30})
    common = {**CONTENT["common"], "mock-data": False, "train-data-path": prefixes, "valid-data-path": [prefixes[0]]}
    plan = plan_of(program, common=common)
    for trial, devices in zip(plan.trials[:2], (["CPU 1"], ["CPU 2", "CPU 1", "CPU 2"])):
        save = Path(trial.settings["save"])
        save.mkdir(parents=True)
        starts = [{"event": "start", "iteration": 0, "device": device} for device in devices]
        events = [{"event": "checkpoint", "iteration": 5}, *starts]
        (save / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert [state for _, state in runner.run_trials(plan, plan.trials[:2])] == ["done", "done"]
    results = runner.read_results(plan)
    assert [results[label][0]["devices"] for label in ("dense", "umv2")] == [["CPU 1"], ["CPU 2", "CPU 1"]]
    text = write_report(plan, results).read_text()
    assert f"on CPU 1 (dense); CPU 2 and then CPU 1 (umv2), torch {torch.__version__}. Mean" in text
    assert "| bits per byte |" in text and f"| {3.0 / np.log(2) / 2.5:.4f} |" in text

    kept = program / "kept"
    for trial in plan.trials[:2]:
        copy = kept / trial.directory.relative_to(plan.output)
        copy.mkdir(parents=True)
        for name in ("settings.yaml", runner.RESULT):
            (copy / name).write_bytes((trial.directory / name).read_bytes())
    for path in program.glob("*.idx"):
        path.unlink()
    ablate.main(ablate.parser().parse_args([str(plan.path), "--output", str(kept), "--report-only"]))
    assert (kept / "report.md").read_text().replace(str(kept), str(plan.output)) == text

    mixed = plan_of(program, common={**common, "valid-data-path": prefixes})
    assert runner.summary(mixed.trials[0], 1.0)["bytes_per_token"] is None
