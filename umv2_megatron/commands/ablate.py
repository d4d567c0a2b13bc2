"""Train variants and seeds of a plan, and compare them in one report.

    python tools/ablate.py examples/ablations/variants.yaml --output runs/variants
    python tools/ablate.py examples/ablations/variants.yaml --output runs/variants --jobs 2
    python tools/ablate.py examples/ablations/variants.yaml --output runs/variants --report-only
    python tools/ablate.py examples/ablations/variants.yaml --output runs/variants --slurm-array variants.sbatch

The same command again goes on where it was stopped. Exit code 75 (EX_TEMPFAIL) says that there is more to do, because
a trial stopped early (--exit-interval, --exit-duration-in-mins, a signal), and that none failed. The output directory
holds a directory for every trial (its checkpoints, metrics.jsonl, log.txt, result.json), and report.md with its plots.
docs/ablations.md describes plans.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from umv2_megatron.training.tool_entry import run_tool

if TYPE_CHECKING:
    from umv2_megatron.evaluation.ablation.plan import Plan


def main(arguments: argparse.Namespace) -> None:
    """Run, then report."""
    if arguments.slurm_array:
        others = {
            "--smoke": arguments.smoke,
            "--report-only": arguments.report_only,
            "--trial": arguments.trial is not None,
        }
        for flag in (flag for flag, given in others.items() if given):
            raise ValueError(f"{flag} is given with --slurm-array; expected only one of them")
        file = Path(arguments.slurm_array)
        if file.is_dir() or not file.parent.is_dir():
            raise ValueError(f"--slurm-array is {file}; expected the name of a file in a directory that exists")
    if arguments.report_only and arguments.trial is not None:
        raise ValueError(f"--trial is {arguments.trial} with --report-only; expected only one of them")
    if arguments.jobs < 1:
        raise ValueError(f"--jobs is {arguments.jobs}; expected 1 or more")
    alone = "--slurm-array" if arguments.slurm_array else "--trial" if arguments.trial is not None else None
    if arguments.baseline is not None and alone:
        raise ValueError(f"--baseline is {arguments.baseline} with {alone}, which writes no report; leave it out")
    if arguments.jobs > 1 and (alone or arguments.report_only):
        raise ValueError(
            f"--jobs is {arguments.jobs} with {alone or '--report-only'}, which does not run several trials; "
            "leave it out"
        )
    from umv2_megatron.parallel import cpu_platform

    cpu_platform.install()  # before megatron.core is imported
    from umv2_megatron.evaluation.ablation.plan import read_plan
    from umv2_megatron.evaluation.ablation.runner import array_script, run_trials

    plan = read_plan(Path(arguments.plan), Path(arguments.output), arguments.smoke, arguments.baseline)
    if arguments.slurm_array:
        Path(arguments.slurm_array).write_text(array_script(plan), encoding="utf-8")
        print(f"wrote {arguments.slurm_array}: {len(plan.trials)} tasks; submit it with sbatch")
        return
    chosen = plan.trials
    if arguments.trial is not None:
        if not 0 <= arguments.trial < len(chosen):
            raise ValueError(f"--trial is {arguments.trial}; expected 0 to {len(chosen) - 1}, the plan's trials")
        chosen = [chosen[arguments.trial]]
    failed = stopped = 0
    if not arguments.report_only:
        for place, (trial, state) in enumerate(run_trials(plan, chosen, arguments.jobs), 1):
            print(f"[{place}/{len(chosen)}] {trial.name}: {state}", flush=True)
            failed += state.startswith("failed")
            stopped += state.startswith("stopped")
    if arguments.trial is None and failed + stopped < len(chosen):
        _report(plan)
    if failed:
        raise OSError(f"{failed} of {len(chosen)} trials failed; the same command runs them again")
    if stopped:
        # not 0, with which an array task counts as complete, and not 1, with which a requeue would repeat a mistake
        print(f"{stopped} of {len(chosen)} trials stopped early; the same command goes on", file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL)


def _report(plan: Plan) -> None:
    from umv2_megatron.evaluation.ablation.report import write_report
    from umv2_megatron.evaluation.ablation.runner import read_results

    results = read_results(plan)
    if not results:
        raise ValueError(f"--output is {plan.output}; expected at least one finished trial in it to report on")
    report = write_report(plan, results)
    print("\n" + "\n".join(line for line in report.read_text().splitlines() if line.startswith("|")))
    print(f"\nreport: {report}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("plan", help="YAML file of what to run")
    made.add_argument("--output", required=True, metavar="DIR", help="where trials and report go")
    made.add_argument("--report-only", action="store_true", help="run nothing, report on what is finished")
    made.add_argument("--baseline", metavar="RUN", help="what the report compares with, not the plan's baseline")
    made.add_argument("--trial", type=int, metavar="I", help="run the I-th trial alone (counted from 0), no report")
    made.add_argument("--jobs", type=int, default=1, metavar="N", help="trials at a time on this machine (default 1)")
    made.add_argument("--slurm-array", metavar="FILE", help="run nothing, write an array job that runs every trial")
    made.add_argument("--smoke", action="store_true", help="two steps of every trial on random tokens: does it run?")
    return made


def run() -> NoReturn:
    """The program."""
    run_tool(parser(), main)
