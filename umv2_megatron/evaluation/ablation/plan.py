"""A comparison of runs, as a YAML file: what is common, what each run changes, and which seeds.

    common:   {train-iters: 600, lr: 2e-3, ...}        # flags of pretrain_umv2.py without their dashes
    seeds:    [1, 2]
    baseline: dense                                     # optional: the run that the others are compared with
    runs:
      dense:  {model-preset: dense-3m}
      umv2:   {model-preset: umv2-3m, memory-value-lr-mult: 16}
    launcher: torchrun --standalone --nproc-per-node 2  # optional: what stands before pretrain_umv2.py
    ranks:    2                                         # optional: how many ranks that makes
    evaluate: {tasks: fact-recall, num-examples: 64}    # optional: flags of tools/evaluate.py, run after training
    trend:    [200, 600]                                # optional: iterations over which the report fits differences
    slurm:    {partition: gpu, time: "04:00:00"}        # optional: #SBATCH lines of --slurm-array

Every run with every seed is a trial, in a directory of its own: <output>/<run>/seed<seed>.
"""

from __future__ import annotations

import contextlib
import difflib
import re
import shlex
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from umv2_megatron.config.resolve import resolve
from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.config.usage import UsageError
from umv2_megatron.config.yaml_text import parse_yaml
from umv2_megatron.evaluation.ablation.evaluation_flags import evaluation_words

KEYS = ("common", "seeds", "baseline", "runs", "launcher", "ranks", "evaluate", "trend", "slurm")
OURS = ("save", "seed", "config")
SMOKE = {
    "train-iters": 2, "lr-decay-iters": 2, "lr-warmup-iters": 0, "eval-interval": 2, "eval-iters": 1,
    "save-interval": 2, "log-interval": 1, "global-batch-size": None, "micro-batch-size": 1, "seq-length": 32,
    "max-position-embeddings": 32, "mock-data": True, "data-path": None, "train-data-path": None,
    "valid-data-path": None, "test-data-path": None, "data-order": None, "loss-mask-key": None,
    "loss-start-token": None, "loss-stop-token": None, "num-workers": 0,
}  # fmt: skip
"""What --smoke puts in the place of a plan's own settings; None leaves the setting out."""


@dataclass(frozen=True)
class Trial:
    """One run with one seed."""

    label: str
    seed: int
    directory: Path
    settings: dict[str, Any]
    """By flag name with underscores; ``save`` and ``seed`` included, ``model_preset`` not."""
    preset: str | None
    run: RunConfig
    """The settings resolved, presets and defaults included."""

    @property
    def name(self) -> str:
        """As it is shown."""
        return f"{self.label} seed {self.seed}"

    @property
    def settings_file(self) -> Path:
        """The settings as a file for --config."""
        return self.directory / "settings.yaml"

    def settings_text(self) -> str:
        """Contents of ``settings_file``; the preset, which is no setting, in a comment."""
        return f"# --model-preset {self.preset}\n" + yaml.safe_dump(self.settings, sort_keys=True)


@dataclass(frozen=True)
class Plan:
    """All trials, in the order in which they run: every run with the first seed comes first."""

    path: Path
    output: Path
    trials: list[Trial]
    baseline: str | None
    launcher: list[str]
    ranks: int
    """Processes that ``launcher`` starts."""
    evaluate: list[str] = field(default_factory=list)
    """Flags of tools/evaluate.py; empty where trials are not evaluated."""
    trend: tuple[int, int] | None = None
    """First and last iteration over which the report fits the differences from the baseline."""
    other_baseline: bool = False
    """Whether ``baseline`` was given in the place of the plan's."""
    slurm: dict[str, Any] = field(default_factory=dict)
    smoke: bool = False
    """Whether the trials are two steps on random tokens."""

    @property
    def labels(self) -> list[str]:
        """The runs, in the order of the file."""
        return list(dict.fromkeys(trial.label for trial in self.trials))


def read_plan(path: Path, output: Path, smoke: bool = False, baseline: str | None = None) -> Plan:
    """Read and check a plan, every setting of every run and of the evaluation included.

    With ``smoke`` all runs last two steps on random tokens. A ``baseline`` takes the place of the plan's. Raises
    ``ValueError`` naming the file and the key that cannot work; writes nothing.
    """
    output = output.resolve()  # an array job and the command line may name the same directory differently
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output is {output}, which is a file; expected a directory, or a new name")
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a readable YAML file; {' '.join(str(error).split())}") from error
    for key in content if isinstance(content, dict) else ():
        if key not in KEYS:
            raise ValueError(f"{path}: unknown key {key!r}; expected one of {', '.join(KEYS)}")
    if not isinstance(content, dict) or not isinstance(content.get("runs"), dict) or not content["runs"]:
        raise ValueError(f"{path}: expected a mapping with the key runs, itself a mapping of names to settings")
    seeds = content.get("seeds", [1234])
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise ValueError(f"{path}: seeds is {seeds!r}; expected a list of integers such as [1, 2]")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{path}: seeds is {seeds!r}; expected each seed once")
    labels = [str(label) for label in content["runs"]]
    if baseline is not None and baseline not in labels:
        raise ValueError(f"--baseline is {baseline}; expected one of {', '.join(labels)}, the runs of {path}")
    other_baseline = baseline is not None and baseline != str(content.get("baseline"))
    if baseline is None and content.get("baseline") is not None:
        baseline = str(content["baseline"])
        if baseline not in labels:
            raise ValueError(f"{path}: baseline is {content['baseline']!r}; expected one of {', '.join(labels)}")
    common = _mapping(content, "common", path)
    launcher = [] if smoke else _launcher(content.get("launcher"), path)
    ranks = 1 if smoke else content.get("ranks", 1)
    if type(ranks) is not int or ranks < 1:
        raise ValueError(f"{path}: ranks is {ranks!r}; expected the number of ranks that launcher starts")
    if ranks > 1 and not launcher:
        raise ValueError(
            f"{path}: ranks is {ranks} without a launcher; expected launcher too, such as "
            f"torchrun --standalone --nproc-per-node {ranks}"
        )
    trials = [
        _trial(path, output, label, {**common, **_mapping(content["runs"], label, path)}, seed, ranks, smoke)
        for seed in seeds
        for label in content["runs"]
    ]
    evaluate = evaluation_words(_mapping(content, "evaluate", path), path)
    slurm = {} if smoke else _mapping(content, "slurm", path)
    trend = None if smoke else _trend(content.get("trend"), trials, baseline, path)
    if smoke:
        evaluate = []
    return Plan(path, output, trials, baseline, launcher, ranks, evaluate, trend, other_baseline, slurm, smoke)


def _trend(given: Any, trials: list[Trial], baseline: str | None, path: Path) -> tuple[int, int] | None:
    match given:
        case None:
            return None
        case [first, last] if type(first) is type(last) is int and 0 < first < last:
            if baseline is None:
                raise ValueError(f"{path}: trend is {given!r} without a baseline; expected baseline too")
            for trial in trials:
                end, every = trial.run.train_iters, trial.run.training.eval_interval
                if last > end or not every or last // every - (first - 1) // every < 3:
                    often = f"every {every}" if every else "never"
                    raise ValueError(
                        f"{path}: trend is {given!r}, but run {trial.label!r} of {end} iterations is validated {often};"
                        " expected iterations among which each run is validated three times or more"
                    )
            return first, last
    raise ValueError(f"{path}: trend is {given!r}; expected the fit's first and last iteration, such as [1000, 4000]")


def _launcher(given: Any, path: Path) -> list[str]:
    if given is None or isinstance(given, str):
        with contextlib.suppress(ValueError):
            return shlex.split(given or "")
    raise ValueError(f"{path}: launcher is {given!r}; expected the words of a command, in one string")


def _mapping(content: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    found = content.get(key) or {}
    if not isinstance(found, dict):
        raise ValueError(f"{path}: {key} is {found!r}; expected a mapping of flag names to values")
    return {str(name): value for name, value in found.items()}


def _trial(path: Path, output: Path, label: str, given: dict[str, Any], seed: int, ranks: int, smoke: bool) -> Trial:
    where = f"{path}, run {label!r}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", str(label)):
        raise ValueError(f"{where}: expected a name of letters, digits and . _ + -, for it names a directory")
    if smoke:
        given = {key: value for key, value in given.items() if key.replace("_", "-") not in SMOKE}
        given.update({key: value for key, value in SMOKE.items() if value is not None})
    named = {key.replace("-", "_"): value for key, value in given.items()}
    for key in difflib.get_close_matches("model_preset", named.keys() - {"model_preset"}, cutoff=0.85):
        raise ValueError(f"{where}: unknown key {key!r}; did you mean model-preset?")  # no key of --config files
    preset = named.pop("model_preset", None)
    if smoke:
        for key in ("load", "finetune"):
            named.pop(key, None)
        if "lr_wsd_decay_iters" in named:
            named["lr_wsd_decay_iters"] = 1
    if named.get("load") is not None and not named.get("finetune"):
        raise ValueError(
            f"{where}: load is set; expected finetune: true too, with which every trial begins with those weights"
        )
    for key in OURS:
        if key in named:
            raise ValueError(f"{where}: {key} is set; expected it left out, because every trial gets its own")
    directory = output / str(label) / f"seed{seed}"
    named.update(save=str(directory / "checkpoints"), seed=seed)
    # Through the door that the program itself uses, so that nothing can pass here that fails there.
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(yaml.safe_dump(named))
        file.flush()
        try:
            run = resolve([*preset_flag(preset), "--config", file.name], ranks)
        except UsageError as error:
            raise ValueError(f"{where}: {str(error).replace(file.name, 'settings')}") from error
    return Trial(str(label), seed, directory, named, preset, run)


def preset_flag(preset: str | None) -> list[str]:
    """The command line for a preset."""
    return [] if preset is None else ["--model-preset", str(preset)]
