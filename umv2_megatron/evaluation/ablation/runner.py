"""Runs the trials of a plan, each to its end; started again, goes on where it was stopped.

A trial is the training program itself in a process of its own. It is finished when ``result.json`` is there, which is
written last; an unfinished one is started again by the same command, and resumes from its newest checkpoint.
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from umv2_megatron.checkpoint.store import CheckpointStore
from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.evaluation.ablation.evaluation_flags import check_evaluation_files
from umv2_megatron.evaluation.ablation.plan import Plan, Trial, preset_flag
from umv2_megatron.evaluation.ablation.programs import Programs, TrialFailed, program_file
from umv2_megatron.evaluation.entropy import bytes_per_token
from umv2_megatron.evaluation.report import write_json
from umv2_megatron.observation.events import read_events
from umv2_megatron.planning import count_parameters, flops_per_token
from umv2_megatron.training.metrics import read_metrics
from umv2_megatron.user_paths import user_path

RESULT = "result.json"
LOG = "log.txt"
EVALUATION = "evaluation.json"


def run_trials(plan: Plan, trials: Iterable[Trial], jobs: int = 1) -> Iterator[tuple[Trial, str]]:
    """Run what is not finished yet, ``jobs`` trials at a time.

    Yields every trial with "done", "was done", "stopped at ..." or "failed: ...", as they end. The traceback of an
    exception that no trial is expected to raise goes to stderr.

    Raises ``ValueError``, before the first one, when the settings of a trial that has begun differ from the plan's,
    when a file to evaluate on is not there, when any finished trial of the plan was evaluated otherwise, or when
    there are too few devices. Whoever interrupts or terminates this process terminates the trials, and waits for them.
    """
    trials = list(trials)
    for trial in plan.trials if plan.smoke else ():
        if _begun(trial) and _other_settings(trial):
            raise ValueError(
                f"--smoke is given, but {trial.directory} is of a whole trial; expected an --output of its own"
            )
    for trial in plan.trials:
        if (trial.directory / RESULT).exists():
            _read_result(plan, trial)
    for trial in trials:
        check_settings(trial)
    finished = [trial for trial in trials if (trial.directory / RESULT).exists()]
    left = [trial for trial in trials if not (trial.directory / RESULT).exists()]
    if left:
        check_evaluation_files(plan.evaluate, plan.path)
    yield from ((trial, "was done") for trial in finished)
    if not left:
        return
    jobs = min(jobs, len(left))
    programs = Programs(jobs, plan.ranks)
    with ThreadPoolExecutor(jobs) as pool:
        try:
            running = {pool.submit(_state, plan, trial, programs): trial for trial in left}
            for ended in as_completed(running):
                yield running[ended], ended.result()
        except BaseException:  # a signal, or nobody asks for more
            programs.end()
            pool.shutdown(cancel_futures=True)
            raise


def _state(plan: Plan, trial: Trial, programs: Programs) -> str:
    try:
        with programs.place() as environment:
            call = partial(programs.call, environment=environment, log=trial.directory / LOG)
            return _run(plan, trial, call, programs.jobs)
    except (TrialFailed, OSError, ValueError) as problem:  # of this trial; the others go on
        return f"failed: {problem}"
    except Exception as problem:  # unforeseen: the traceback says where, and the others still go on
        traceback.print_exc()
        return f"failed: {type(problem).__name__}: {problem}"


def check_settings(trial: Trial) -> None:
    """Raises ``ValueError`` when a trial that has begun had other settings than it has now.

    A program that stopped before it trained, say at a setting that cannot be, leaves nothing that a mended plan could
    be mixed up with.
    """
    if _begun(trial) and _other_settings(trial):
        raise ValueError(
            f"{trial.settings_file} has other settings than the plan gives {trial.name} now; expected the same, "
            "because results of different settings cannot be told apart; use another --output, or remove that directory"
        )


def _other_settings(trial: Trial) -> bool:
    file = trial.settings_file
    return file.exists() and _compared(file.read_text(encoding="utf-8")) != _compared(trial.settings_text())


def _begun(trial: Trial) -> bool:
    """Whether the trial has a result, a checkpoint, or numbers of a step."""
    try:
        return (
            (trial.directory / RESULT).exists()
            or _checkpoint_iteration(trial) is not None
            or bool(read_metrics(trial.settings["save"]))
        )
    except FileNotFoundError:
        return False


def _checkpoint_iteration(trial: Trial) -> int | None:
    """The iteration of the newest checkpoint, which is the last one trained: every orderly end of training saves."""
    return CheckpointStore(trial.settings["save"]).read_tracker()


def _compared(text: str) -> tuple[str, Any]:
    """Preset and settings without ``save``, which is another one once an output directory has been moved."""
    preset, _, rest = text.partition("\n")
    try:
        settings = yaml.safe_load(rest)
    except yaml.YAMLError:
        settings = None
    if not isinstance(settings, dict):
        return text, None  # half-written
    return preset, {key: value for key, value in settings.items() if key != "save"}


def _run(plan: Plan, trial: Trial, call: Callable[[list[str]], None], jobs: int) -> str:
    """Train, evaluate and write the result, with how many trials ran side by side; returns the state to show.

    Training ends with exit code 0, too, when --exit-interval, --exit-duration-in-mins or a signal stops it early.
    """
    trial.directory.mkdir(parents=True, exist_ok=True)
    trial.settings_file.write_text(trial.settings_text(), encoding="utf-8")
    program = [*(plan.launcher or [sys.executable]), str(program_file("pretrain_umv2.py", "umv2-pretrain"))]
    begin = time.monotonic()
    call([*program, *preset_flag(trial.preset), "--config", str(trial.settings_file)])
    seconds = time.monotonic() - begin
    iteration = _checkpoint_iteration(trial)
    if iteration is None:
        raise TrialFailed(f"it left no checkpoint in {trial.settings['save']} (see {trial.directory / LOG})")
    if iteration < trial.run.train_iters:
        return f"stopped at {iteration} of {trial.run.train_iters} iterations; the same command goes on"
    if plan.evaluate:
        output = ["--output", str(trial.directory / EVALUATION), "--label", trial.label]
        tool = [*(plan.launcher or [sys.executable]), str(program_file("tools/evaluate.py", "umv2-evaluate"))]
        call([*tool, "--load", str(trial.settings["save"]), *output, *plan.evaluate])
    write_json(trial.directory / RESULT, {**summary(trial, seconds), "jobs": jobs, "evaluate": plan.evaluate})
    return "done"


def summary(trial: Trial, seconds: float) -> dict[str, Any]:
    """What a finished trial says, from its metrics.jsonl and by arithmetic.

    ``curve``: [iteration, validation loss] pairs, in nats per token, None where it was not finite; ``parameters``,
    ``activated``: counts; ``flops``: of the blocks, per token and forward; ``tokens``: trained on;
    ``tokens_per_second``: of the median iteration; ``seconds``: this start's, so a resumed trial counts its last part
    alone; ``devices``: on which it was started, in order, each once; ``torch``: version; ``bytes_per_token``: of the
    validation text, None where that is not one corpus of ordinary text.
    """
    try:
        run, records = trial.run, read_metrics(trial.settings["save"])
    except OSError as error:
        raise TrialFailed(f"it left no metrics ({error})") from error
    memory = run.memory if run.has_memory else None
    count = count_parameters(run.values, memory)
    curve = [[r["iteration"], r["lm loss validation"]] for r in records if "lm loss validation" in r]
    times = [record["iteration-time"] for record in records if "iteration-time" in record]
    tokens = run.global_batch_size * run.model.seq_length
    starts = [event for event in read_events(user_path(trial.settings["save"])) if event["event"] == "start"]
    return {
        "run": trial.label,
        "seed": trial.seed,
        "curve": curve,
        "training_curve": [[r["iteration"], r["lm loss"]] for r in records if r.get("lm loss") is not None],
        "parameters": count.total,
        "activated": count.activated,
        "flops": flops_per_token(run.values, memory).blocks,
        "tokens": run.train_iters * tokens,
        "tokens_per_iteration": tokens,
        "tokens_per_second": tokens / statistics.median(times) if times else None,
        "seconds": seconds,
        "devices": list(dict.fromkeys(str(event["device"]) for event in starts if "device" in event)),
        "torch": torch.__version__,
        "bytes_per_token": _bytes_per_token(run),
    }


def _bytes_per_token(run: RunConfig) -> float | None:
    """Of the one corpus that a run is validated on; None for several, random tokens, or tokens whose loss does not
    count."""
    if run.data.loss_mask_key or run.data.loss_start_token:
        return None
    blend = run.data.split_blends()[1] or run.data.blend()
    return bytes_per_token(blend[0][0]) if blend is not None and len(blend[0]) == 1 else None


def read_results(plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """Results of the finished trials by run, with what tools/evaluate.py said under ``evaluation``.

    Raises ``ValueError`` when a trial had other settings, or was evaluated otherwise, than the plan says now.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for trial in plan.trials:
        file = trial.directory / RESULT
        if not file.exists():
            continue
        if not trial.settings_file.exists():
            raise ValueError(
                f"{trial.settings_file} is not there; expected it beside {file.name}, because without it nothing says "
                "that the result is of this plan; copy it too"
            )
        check_settings(trial)
        result = _read_result(plan, trial)
        # A run that diverged is worse than any other, and must not be judged by its last good loss.
        result["curve"] = [[step, math.inf if loss is None else loss] for step, loss in result["curve"]]
        evaluation = trial.directory / EVALUATION
        if evaluation.exists():
            result["evaluation"] = _read_json(evaluation)
        elif result.get("evaluate"):
            raise ValueError(
                f"{evaluation} is not there, though {trial.name} was evaluated; copy it too, or remove {file} to "
                "evaluate that trial again"
            )
        found.setdefault(trial.label, []).append(result)
    return found


def _read_result(plan: Plan, trial: Trial) -> dict[str, Any]:
    """result.json of a finished trial.

    Raises ``ValueError`` when it cannot be read, is of another trial, or was evaluated with other flags than the
    plan's.
    """
    file = trial.directory / RESULT
    result = _read_json(file)
    told = [result.get("run", trial.label), result.get("seed", trial.seed)]
    if told != [trial.label, trial.seed]:
        raise ValueError(f"{file} is of {told[0]} seed {told[1]}; expected the result of {trial.name}; copy it anew")
    flags = result.get("evaluate", plan.evaluate)  # earlier versions did not write them
    if _by_flag(flags) != _by_flag(plan.evaluate):
        raise ValueError(
            f"{plan.path}: evaluate is {' '.join(plan.evaluate) or 'left out'}; expected "
            f"{' '.join(flags) or 'it left out'} as for {trial.name}, which is finished, because scores of different "
            f"evaluations cannot be averaged; use another --output, or remove {file} to evaluate that trial again"
        )
    return result


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: expected a readable JSON file ({error}); copy it anew, or remove it") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: expected a JSON object, as tools/ablate.py writes it; copy it anew, or remove it")
    return found


def _by_flag(words: list[str]) -> list[str]:
    """Each flag with its values, sorted: the order of a plan's keys means nothing."""
    return sorted(" ".join(["", *words]).split(" --"))


def array_script(plan: Plan) -> str:
    """A SLURM array job: one trial per task, each to be requeued or submitted again until it is done. It runs in the
    directory of the caller, to which relative paths of a plan belong."""
    options = {"job-name": f"ablate-{plan.path.stem}", **plan.slurm}
    lines = [f"#SBATCH --{key}={value}" if value is not True else f"#SBATCH --{key}" for key, value in options.items()]
    tool = program_file("tools/ablate.py", "umv2-ablate")
    command = shlex.join([sys.executable, str(tool), str(plan.path.resolve()), "--output", str(plan.output)])
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            f"#SBATCH --array=0-{len(plan.trials) - 1}",
            "# Every task runs one trial of the plan. Submit again: finished trials are left alone, others resume.",
            f"cd {shlex.quote(str(Path.cwd()))}",
            f'exec {command} --trial "$SLURM_ARRAY_TASK_ID"',
            "",
        ]
    )
