"""One rank is killed, stopped, slow, raises or leaves: every other rank ends non-zero in time and names that rank.

The victim harms itself in its third step, at a place that the test names, or is sent a signal from outside. Before, all
ranks cut the time limit of their collectives to ``LIMIT``, so that the start of a run, when ranks wait for each other
longer on a busy machine, has the whole minute of ``TINY``.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from datetime import timedelta
from pathlib import Path

import pytest
from program_runs import ROOT, Finished, Job, tiny_run

pytestmark = pytest.mark.thorough

LIMIT = 1.5
"""Seconds that a collective may take."""
TOOK = [0.0]
"""Seconds from the second step of the last run to the end of its ranks."""


def harm(kind: str) -> None:
    """What befalls the victim."""
    if kind == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "SIGSTOP":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "error":
        raise KeyError("the victim's own error")
    elif kind == "os._exit(0)":
        os._exit(0)
    elif kind == "sys.exit(0)":
        sys.exit(0)
    elif kind == "sleep":
        time.sleep(300)


def prepare(victim: int, kind: str, exchange: str = "", wait: float = 0, hosts: bool = False) -> None:
    """Have ``kind`` befall rank ``victim`` in its third step: at its start, or when the result of ``exchange`` is due.

    ``wait``: seconds that ranks have to answer and to end, instead of some. ``hosts``: every rank believes that it is
    alone on its host.
    """
    import torch
    from torch.distributed import distributed_c10d

    from umv2_megatron.parallel import members, roll_call
    from umv2_megatron.parallel.exchange import Pending
    from umv2_megatron.training import loop

    if wait:
        roll_call.GRACE = roll_call.PATIENCE = wait
    if hosts:
        members._place = lambda: f"host {os.environ['RANK']}"
    train_step, take = loop.train_step, Pending.wait
    steps = 0

    def counted_step(*arguments, **named):
        nonlocal steps
        steps += 1
        if steps == 2:
            for group in distributed_c10d._world.pg_map:
                distributed_c10d._set_pg_timeout(timedelta(seconds=LIMIT), group)
        if steps == 3 and not exchange and torch.distributed.get_rank() == victim:
            harm(kind)
        return train_step(*arguments, **named)

    def counted_wait(pending):
        if steps == 3 and pending._step == exchange and torch.distributed.get_rank() == victim:
            harm(kind)
        return take(pending)

    loop.train_step, Pending.wait = counted_step, counted_wait


def run_with(victim: int, kind: str, folder: Path, ranks: int = 2, how: tuple = (), **changes) -> Finished:
    """Run until all ranks but a stopped victim have ended by themselves, LIMIT + 35 s after the harm at the latest.

    ``how``: what ``prepare`` takes after ``victim`` and ``kind``. Leaves the seconds that it took in ``TOOK``.
    """
    argv = tiny_run(train_iters=100000, distributed_timeout_minutes=0.9, **changes)
    job = Job(ranks, argv, folder, prepare, (victim, kind, *how))
    try:
        job.wait_for(r"iteration +2/", 100)
        if kind == "SIGKILL from outside":
            time.sleep(random.uniform(0, 0.3))
            job.send(signal.SIGKILL, victim)
        began = time.monotonic()
        deadline = began + LIMIT + 35
        while any(code is None for rank, code in enumerate(job.codes) if rank != victim or kind != "SIGSTOP"):
            assert time.monotonic() < deadline, job.output()[-6000:]
            time.sleep(0.01)
        TOOK[0] = time.monotonic() - began
    finally:
        job.kill()
    return job.wait()


def assert_named(finished: Finished, victim: int, what: str, witnesses: dict[int, str]) -> None:
    """Every rank has failed; each of ``witnesses`` names the victim, as ``what``, and the group it found it in."""
    assert 0 not in [code for rank, code in enumerate(finished.codes) if rank != victim], finished.text[-6000:]
    for rank, group in witnesses.items():
        errors = [line for line in finished.outputs[rank].splitlines() if "error: " in line]
        pattern = rf"{group}.* because rank {victim} \(pid \d+ on \S+\)(, which hosts the store of the run,)? {what}"
        assert len(errors) == 1 and re.search(pattern, errors[0]), f"{pattern}\n{finished.outputs[rank][-4000:]}"
        others = set(re.findall(r"rank (\d) \(pid", errors[0])) - {str(victim)}
        assert not others, errors[0]


@pytest.fixture(autouse=True)
def told(request, figure):
    """A row of the table for every test that measured its time."""
    TOOK[0] = 0.0
    yield
    if TOOK[0]:
        case = request.node.name.removeprefix("test_")
        figure("7  a lost, slow or raising rank", f"{case}: named, non-zero, {TOOK[0]:.1f} s (limit {LIMIT + 35} s)")


def drawn(choices: range) -> int:
    seed = int(os.environ.get("UMV2_TEST_SEED", time.time_ns() % 10**6))
    print(f"UMV2_TEST_SEED={seed}")  # pytest shows it with a failure
    return random.Random(seed).choice(choices)


@pytest.mark.parametrize(
    ("mode", "exchange"), [("dim", "pre_scores"), ("row", "pick_counts")], ids=["dim-pre_scores", "row-pick_counts"]
)
def test_killed_in_the_middle_of_an_exchange(mode, exchange, tmp_path):
    """Two memory-parallel groups of two: the victim's partner names its group and the memory layer."""
    victim = drawn(range(4))
    changes = {"memory_parallel_size": 2, "memory_parallel_mode": mode}
    finished = run_with(victim, "SIGKILL", tmp_path, 4, (exchange,), **changes)
    group = [victim // 2 * 2, victim // 2 * 2 + 1]
    partner = group[1 - victim % 2]
    assert finished.codes[victim] == -signal.SIGKILL
    witnesses = {rank: "" for rank in range(4) if rank not in group}
    witnesses[partner] = rf"memory-parallel group \{group}: \w+ of memory layer \d"
    assert_named(finished, victim, "is gone", witnesses)


def test_killed_at_any_moment(tmp_path):
    """Where its neighbours wait, or compute, is left to chance: they name the victim all the same."""
    victim = drawn(range(3))
    changes = {"global_batch_size": 12, "use_distributed_optimizer": True, "overlap_grad_reduce": True}
    finished = run_with(victim, "SIGKILL from outside", tmp_path, 3, **changes)
    assert_named(finished, victim, "is gone", {rank: "" for rank in range(3) if rank != victim})


@pytest.mark.parametrize(
    "hosts", [pytest.param(False, id="same-host"), pytest.param(True, id="other-hosts", marks=pytest.mark.slow)]
)
def test_stopped(hosts, tmp_path):
    """gloo's own message names no rank here. From another host a stopped process is one that does not answer."""
    victim = drawn(range(2))
    finished = run_with(victim, "SIGSTOP", tmp_path, how=("", 1.0, hosts))
    what = "does not answer" if hosts else "is stopped"
    assert_named(finished, victim, what, {1 - victim: r"group DATA_PARALLEL_GROUP\w* \[0, 1\]"})


def test_slow(tmp_path):
    """The victim does not come to the collective, and is ended too."""
    finished = run_with(1, "sleep", tmp_path, how=("", 1.0), memory_parallel_size=2)
    place = r"answers but does not come: it is at \S*test_lost_ranks.py:\d+ in harm"
    assert_named(finished, 1, place, {0: r"memory-parallel group \[0, 1\]: \w+ of memory layer 0", 1: ""})
    assert finished.codes == [1, 1]


@pytest.mark.parametrize(
    ("kind", "what", "code"),
    [
        ("error", 'failed: KeyError: "the victim\'s own error"', 1),
        ("sys.exit(0)", "failed: SystemExit: 0", 1),
        ("os._exit(0)", "is gone", 0),
    ],
)
def test_one_rank_fails_or_leaves(kind, what, code, tmp_path):
    """On a pipeline of two stages; the victim itself tells its own error only."""
    finished = run_with(1, kind, tmp_path, pipeline_model_parallel_size=2, global_batch_size=4)
    assert finished.codes == [1, code]
    assert_named(finished, 1, re.escape(what), {0: r"group \w+ \[0, 1\]|all ranks \[0, 1\]"})
    assert "because" not in finished.outputs[1]


@pytest.mark.slow
def test_killed_under_torchrun(tmp_path):
    """The store is the agent's; its SIGTERM does not keep the others from telling."""
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(f"""
            import sys
            sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests" / "functional")!r}, {str(Path(__file__).parent)!r}]
            from umv2_megatron.commands import pretrain
            from test_lost_ranks import prepare
            from umv2_megatron.training.program import run_program
            prepare(1, "SIGKILL")
            run_program(pretrain.main, sys.argv[1:], "pretrain_umv2.py")
        """)
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    ended = subprocess.run(
        command + tiny_run(train_iters=100000), capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, cwd=tmp_path,
    )  # fmt: skip
    assert ended.returncode != 0
    named = r"group DATA_PARALLEL_GROUP\w* \[0, 1\]: .* failed on rank 0 because rank 1 \(pid \d+ on \S+\) is gone"
    assert re.search(named, ended.stderr), ended.stderr[-6000:]
