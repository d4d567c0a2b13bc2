"""Everything that is worth knowing about a GPU in one call of some minutes; started by tools/gpu_check.sh.

    python benchmarks/gpu_check.py                       500 s on a machine with one GPU; writes docs/gpu-results.md
    python benchmarks/gpu_check.py --steps roofline,lookup
    python benchmarks/gpu_check.py --dry                 the same steps at tiny sizes on a CPU

The steps run one after another, the most valuable first, each in a process of its own with a limit of its own, so that
a step that fails or hangs costs no other. A step writes its figures as it finds them, and one that is cut keeps those.
After every step the page and the JSON are written anew: a call that is cut off still leaves what it measured. A table
ends the output.

In --out: steps/<step>.json and steps/<step>.log, results.json with everything, machine.json for
tools/plan.py, log.txt. Exit code 0 when every step was
done or skipped, 1 when one failed or was cut, 2 for a usage error.

--wheels is for machines without network: wheels, which are installed into a temporary folder, and archives *.tar.xz of
packages that have no wheel, such as a Transformer Engine that was compiled elsewhere. What archives hold is seen only
by the steps that need Transformer Engine: one that does not load cannot fail the others.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_kit.report import (  # noqa: E402
    CUT,
    DONE,
    FAILED,
    NOT_RUN,
    ROOT,
    SKIPPED,
    Machine,
    Outcome,
    last_lines,
    machine_rates,
    overview,
    page,
    results,
    write_whole,
)
from umv2_megatron.planning.machine_file import write_machine  # noqa: E402

LEAST = 3.0
"""Seconds below which no further step is begun."""
GRACE = 5.0
"""Seconds from SIGINT, at which pytest still reports, to SIGKILL for a step that is over its limit."""
DRY_LIMIT = 240.0
"""Seconds for a step with --dry: a machine that runs tests may be slow."""
PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "transformers", "numpy")


@dataclass(frozen=True)
class Step:
    """One process: its name, its limit in seconds, and what it needs.

    ``dry`` says whether it has a form for a CPU. ``command`` is for tests: the arguments of Python, else one_step.py.
    """

    name: str
    limit: float
    dry: bool = True
    engine: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    """Set with --dry."""
    command: tuple[str, ...] = ()


INTERPRETED = {"TRITON_INTERPRET": "1"}
STEPS = (
    Step("roofline", 30),
    Step("kernels", 150, environment=INTERPRETED),
    Step("lookup", 45, environment=INTERPRETED),
    Step("train-local-triton", 60, dry=False),  # the interpreter needs minutes for a step of training
    Step("train-local-scatter", 60),
    Step("layer", 60),
    Step("waits", 40),
    Step("topk", 30, environment=INTERPRETED),
    Step("train-te-triton", 60, dry=False, engine=True),
    Step("fp8", 90, dry=False, engine=True),
    Step("checkpoint", 60),
    Step("train-local-triton-stream", 45, dry=False),
    Step("train-te-triton-stream", 45, dry=False, engine=True),
    Step("train-te-scatter", 45, dry=False, engine=True),
    Step("train-local-scatter-stream", 45, dry=False),
    Step("train-te-scatter-stream", 45, dry=False, engine=True),
    Step("other-tests", 150),
)


class Check:
    """Runs steps within a budget and keeps what they leave.

    Args:
        out: folder of their files.
        seconds: for all steps together.
        dry: on a CPU, at tiny sizes.
        site, engine_site: folders with packages, for all steps and for those that need Transformer Engine.
        device: its name, to look up its peak.
    """

    def __init__(
        self,
        out: Path,
        seconds: float,
        dry: bool,
        site: Path | None = None,
        engine_site: Path | None = None,
        device: str = "",
    ) -> None:
        self.out, self.dry, self.device = out, dry, device
        self.site, self.engine_site = site, engine_site
        self.end = time.monotonic() + seconds
        self.outcomes: list[Outcome] = []
        (out / "steps").mkdir(parents=True, exist_ok=True)

    @property
    def has_engine(self) -> bool:
        """Whether Transformer Engine is there; whether it works, the steps show."""
        return self.engine_site is not None or find_spec("transformer_engine") is not None

    def run(self, step: Step) -> Outcome:
        """Run, skip or leave out one step; its outcome is also the last of ``outcomes``."""
        left = self.end - time.monotonic()
        if self.dry and not step.dry:
            outcome = Outcome(step.name, SKIPPED, reason=f"needs CUDA{' and Transformer Engine' * step.engine}")
        elif self.dry and step.environment == INTERPRETED and find_spec("triton") is None:
            outcome = Outcome(step.name, SKIPPED, reason="needs Triton")
        elif step.engine and not self.has_engine:
            outcome = Outcome(step.name, SKIPPED, reason="needs Transformer Engine")
        elif left < LEAST:
            outcome = Outcome(step.name, NOT_RUN, reason="the time of --seconds was over")
        else:
            outcome = self._run(step, min(left, DRY_LIMIT if self.dry and not step.command else step.limit))
        self.outcomes.append(outcome)
        return outcome

    def _run(self, step: Step, limit: float) -> Outcome:
        figures, log = (self.out / "steps" / f"{step.name}.{kind}" for kind in ("json", "log"))
        figures.unlink(missing_ok=True)  # of an earlier call
        arguments = step.command or ("-m", "benchmarks.gpu_kit.one_step", step.name, str(figures.resolve()),
                                     *(["--dry"] if self.dry else ["--device", self.device]))  # fmt: skip
        begin = time.monotonic()
        with open(log, "wb") as output:
            code = self._wait_for(arguments, step, limit, output)
        outcome = Outcome(step.name, DONE, time.monotonic() - begin, limit)
        if code is None:
            outcome.result, outcome.reason = CUT, f"after {limit:.0f} s"
        elif code != 0:
            outcome.result, outcome.reason = FAILED, f"exit code {code}"
        try:
            outcome.read(figures)
        except (ValueError, KeyError, TypeError) as problem:
            outcome.result, outcome.reason = FAILED, f"its file of figures cannot be read ({problem})"
        if outcome.result == DONE and not figures.exists() and not step.command:
            outcome.result, outcome.reason = FAILED, "it left no figures"
        if outcome.result != DONE:
            outcome.log = last_lines(log.read_text(encoding="utf-8", errors="replace"))
        return outcome

    def _wait_for(self, arguments: Sequence[str], step: Step, limit: float, output: IO[bytes]) -> int | None:
        """Exit code, None after ``limit`` seconds; nothing that the step started is left."""
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=self._environment(step), stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        code: int | None = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(limit)
            if code is None:
                _signal_group(process.pid, signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
        finally:
            _signal_group(process.pid, signal.SIGKILL)
            process.wait()
        return code

    def _environment(self, step: Step) -> dict[str, str]:
        sites = [self.engine_site if step.engine else None, self.site]
        path = [str(ROOT), *(str(site) for site in sites if site is not None), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONUNBUFFERED": "1"}
        if self.dry:
            environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **step.environment}
        return environment

    def write(self, machine: Machine, docs: Path | None, json_path: Path | None) -> None:
        """The page, the JSON and the log of all steps so far."""
        whole = results(machine, self.outcomes, self.dry)
        for path in filter(None, (self.out / "results.json", json_path)):
            write_whole(path, whole)
        rates = machine_rates(machine.device, self.outcomes)
        if rates:
            write_machine(self.out / "machine.json", machine.device, rates, f"tools/gpu_check.sh, {machine.date}")
        if docs is not None:
            write_whole(docs, page(machine, self.outcomes, self.dry))
        with open(self.out / "log.txt", "w", encoding="utf-8") as log:
            for outcome in self.outcomes:
                path = self.out / "steps" / f"{outcome.name}.log"
                if outcome.result not in (SKIPPED, NOT_RUN) and path.exists():
                    log.write(f"== {outcome.name}\n{path.read_text(encoding='utf-8', errors='replace')}\n")


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


# -- the machine ----------------------------------------------------------------------------------------------------


def describe_machine(sites: Iterable[Path]) -> Machine:
    """Device and driver by nvidia-smi, "" where there is none; versions of what is installed and in ``sites``.

    Torch is not imported: what keeps it from loading must not keep the other steps from being told of.
    """
    name = driver = ""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        told = subprocess.run(asked, capture_output=True, text=True, timeout=30)
        if told.returncode == 0 and "," in told.stdout:
            name, driver = (part.strip() for part in told.stdout.splitlines()[0].split(",")[:2])
    search = [*map(str, sites), *sys.path]
    versions = {"Python": platform.python_version()}
    for package in PACKAGES:
        found = next(iter(importlib.metadata.distributions(name=package, path=search)), None)
        versions[package] = found.version if found is not None else "-"
    return Machine(name, driver, versions, f"{datetime.date.today():%Y-%m-%d}", _commit())


def _commit() -> str:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    return "unknown"


def install(wheels: Path, site: Path, engine_site: Path) -> Path | None:
    """Put wheels into ``site`` and archives into ``engine_site``, which is returned where there is one.

    Raises ``ValueError`` where that fails.
    """
    files = sorted(map(str, wheels.glob("*.whl")))
    quiet = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--disable-pip-version-check"]
    commands = [[sys.executable, "-m", "pip", "install", *quiet, "--target", str(site), *files]] if files else []
    archives = sorted(wheels.glob("*.tar.xz"))
    engine_site.mkdir()
    commands += [["tar", "-xJf", str(archive), "-C", str(engine_site)] for archive in archives]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            why = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"--wheels is {wheels}; expected wheels for this Python and archives that unpack ({why})")
    return engine_site if archives else None


# -- the program ----------------------------------------------------------------------------------------------------


def read_options(argv: list[str]) -> argparse.Namespace:
    """The checked flags; exits with code 2 and one sentence for a usage error."""
    names = ", ".join(step.name for step in STEPS)
    parser = argparse.ArgumentParser(prog="gpu_check.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU: do the steps still run?")
    parser.add_argument("--seconds", type=float, default=500.0, help="for all steps together (default: 500)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu_check", help="folder (default: runs/gpu_check)")
    parser.add_argument("--docs", type=Path, help="page (default: docs/gpu-results.md; with --dry none)")
    parser.add_argument("--json", type=Path, help="write results.json there, too")
    parser.add_argument("--wheels", type=Path, help="folder with packages to install (default: .whl, if it exists)")
    parser.add_argument("--steps", help=f"only these, separated by commas: {names}")
    options = parser.parse_args(argv)
    if not options.seconds >= LEAST:
        parser.error(f"--seconds is {options.seconds:g}; expected at least {LEAST:g}")
    if options.wheels is not None and not options.wheels.is_dir():
        parser.error(f"--wheels is {options.wheels}; expected a folder that exists")
    for flag in ("docs", "json"):
        path = getattr(options, flag)
        if path is not None and not path.resolve().parent.is_dir():
            parser.error(f"--{flag} is {path}; expected a file in a folder that exists")
    wanted = options.steps.split(",") if options.steps else [step.name for step in STEPS]
    for name in wanted:
        if name not in {step.name for step in STEPS}:
            parser.error(f"--steps names {name!r}; expected some of {names}")
    options.steps = [step for step in STEPS if step.name in wanted]
    if options.wheels is None and (ROOT / ".whl").is_dir() and not options.dry:
        options.wheels = ROOT / ".whl"
    if options.docs is None and not options.dry:
        options.docs = ROOT / "docs" / "gpu-results.md"
    return options


def main(argv: list[str]) -> int:
    """Run the steps; returns the exit code."""
    options = read_options(argv)
    begin = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="gpu_check_"))
    try:
        site, engine_site = folder / "site", None
        if options.wheels is not None:
            engine_site = install(options.wheels, site, folder / "engine")
        machine = describe_machine([each for each in (site, engine_site) if each is not None])
        if options.dry:
            machine.device, machine.driver = "none", "none"
        elif not machine.device:
            raise ValueError("nvidia-smi names no GPU; expected one. Use --dry to rehearse on a CPU")
        left = options.seconds - (time.monotonic() - begin)
        check = Check(options.out, left, options.dry, site, engine_site, machine.device)
        for step in options.steps:
            outcome = check.run(step)
            print(f"{step.name}: {outcome.text} ({outcome.seconds:.0f} s) {outcome.key}", flush=True)
            check.write(machine, options.docs, options.json)
    except ValueError as error:
        print(f"gpu_check.py: error: {error}", file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{machine.device}, driver {machine.driver}\n\n{overview(check.outcomes).text()}")
    return 1 if any(outcome.result in (FAILED, CUT) for outcome in check.outcomes) else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the step that runs is ended, too
    raise SystemExit(main(sys.argv[1:]))
