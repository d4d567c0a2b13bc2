"""examples/slurm/requeue.sh in a bash whose SLURM commands are functions, for answers that `make slurm-test` cannot get
from a real SLURM: long ones, none, and logs of an earlier job."""

from __future__ import annotations

import calendar
import os
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUNNING = "echo JobId=1 JobState=RUNNING"
FAR = 9999999999


def shell(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    """Run ``text`` as the scripts do, behind requeue.sh; ``scontrol requeue`` is told on standard output."""
    script = f"set -uo pipefail; cd {ROOT}; source examples/slurm/requeue.sh; SLURM_JOB_ID=1 RUN={folder}\n{text}\n"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")} | {"TZ": "UTC"}
    return subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60)


def scontrol(answer: str) -> str:
    return f'scontrol() {{ if [[ $1 = requeue ]]; then echo "requeued $2"; else {answer}; fi; }}\n'


@pytest.mark.parametrize(
    ("answer", "limit", "requeued"),
    [
        (RUNNING, FAR, True),
        (f"{RUNNING}; head -c 300000 /dev/zero | tr '\\0' x", FAR, True),  # of many nodes
        ("return 1", FAR, True),  # the controller does not answer: requeue waits for it, or fails
        ("echo JobState=COMPLETING", FAR, False),
        ("echo JobState=COMPLETING", 1, True),  # over its limit
    ],
)
def test_a_run_that_was_asked_to_stop(tmp_path: Path, answer: str, limit: int, requeued: bool) -> None:
    log = tmp_path / "log"
    log.write_text("stopping after iteration 7 as asked\nsaved checkpoint of iteration 7 to x\n")
    done = shell(tmp_path, scontrol(answer) + f"finish {log} 0 0 0 {limit}")
    assert ("requeued 1" in done.stdout) == requeued and done.returncode == 0, done


def test_what_an_earlier_job_left_in_the_log_does_not_count(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("stopping after iteration 7 as asked\nsaved checkpoint of iteration 7 to x\n")
    text = scontrol(RUNNING) + f"finish {log} {log.stat().st_size} 0 0 {FAR}; echo goes on"
    done = shell(tmp_path, text)
    assert "requeued" not in done.stdout and "goes on" in done.stdout, done


@pytest.mark.parametrize(
    ("answer", "end"),
    [("", FAR), ("N/A", FAR), ("NONE", FAR), ("2031-02-03T04:05:06", calendar.timegm((2031, 2, 3, 4, 5, 6)))],
)
def test_the_end_of_the_job(tmp_path: Path, answer: str, end: int) -> None:
    done = shell(tmp_path, f'squeue() {{ echo "{answer}"; }}\nend_of_job')
    assert done.stdout.strip() == str(end), done


def test_a_signal_before_the_ranks_start(tmp_path: Path) -> None:
    """It is not lost, and nothing is started that would have to be killed at the limit."""
    slow = "kill -USR1 $$; sleep 0.2"
    text = f"""
scancel() {{ :; }}
srun() {{ echo srun; }}
squeue() {{ echo N/A; }}
scontrol() {{
    case "$1 $2" in
        "requeue 1") echo "requeued 1" ;;
        "show hostnames") {slow}; echo node1 ;;
        "show node") echo NodeAddr=127.0.0.1 ;;
        *) {RUNNING} ;;
    esac
}}
SLURM_JOB_NODELIST=node1
run_ranks program"""
    began = time.monotonic()
    done = shell(tmp_path, text)
    assert "requeued 1" in done.stdout and "srun" not in done.stdout and done.returncode == 143, done
    assert "asked to stop by SIGUSR1" in done.stdout and time.monotonic() < began + 30
