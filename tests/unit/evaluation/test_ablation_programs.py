"""Programs of trials: found where pip puts them, side by side with a share of the machine each, ended by a signal."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_plan import CONTENT, plan_of

from umv2_megatron.commands import ablate
from umv2_megatron.evaluation.ablation import programs


def test_termination_is_passed_on_and_waited_for(tmp_path: Path) -> None:
    """To both trials that run; the third is not started."""
    (tmp_path / "root").mkdir()
    (tmp_path / "root/pretrain_umv2.py").write_text(
        "import pathlib, signal, sys, time\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--config') + 1]).parent\n"
        "def end(*_): time.sleep(0.2); (folder / 'saved').touch(); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end); (folder / 'ready').touch(); time.sleep(100)\n"
    )
    plan = plan_of(tmp_path, seeds=[1, 2])
    tool = (
        "import pathlib\n"
        "from umv2_megatron.commands import ablate\n"
        "from umv2_megatron.evaluation.ablation import programs\n"
        "programs.ROOT = pathlib.Path('root')\n"
        "ablate.run()\n"
    )
    environment = {
        **os.environ, "PYTHONPATH": str(programs.ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command = [sys.executable, "-c", tool, "plan.yaml", "--output", "out", "--jobs", "2"]
    ready, saved, last = (
        [trial.directory / name for trial in trials]
        for trials, name in ((plan.trials[:2], "ready"), (plan.trials[:2], "saved"), (plan.trials[2:], "log.txt"))
    )
    with subprocess.Popen(command, cwd=tmp_path, env=environment) as process:
        wait_until = time.monotonic() + 120
        while not all(map(Path.exists, ready)) and process.poll() is None and time.monotonic() < wait_until:
            time.sleep(0.05)
        process.terminate()
        assert process.wait(timeout=30) == 143
    assert all(map(Path.exists, saved)) and not any(map(Path.exists, last))


def test_a_killed_runner_leaves_no_trial_behind(tmp_path: Path) -> None:
    """SIGKILL, on which nothing can be passed on: the training gets the SIGTERM from the kernel, and saves."""
    command = [sys.executable, "-c", "import signal, sys, time\n"
               "signal.signal(signal.SIGTERM, lambda *_: (open('saved', 'w').close(), sys.exit(0)))\n"
               "open('ready', 'w').close(); time.sleep(100)"]  # fmt: skip
    runner = (
        "import pathlib, threading\n"
        "from umv2_megatron.evaluation.ablation.programs import Programs\n"
        f"call = lambda: Programs(1, 1).call({command!r}, environment={{}}, log=pathlib.Path('log'))\n"
        "threading.Thread(target=call).start()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(programs.ROOT)}
    with subprocess.Popen([sys.executable, "-c", runner], cwd=tmp_path, env=environment) as process:
        wait_until = time.monotonic() + 120
        while not (tmp_path / "ready").exists() and process.poll() is None and time.monotonic() < wait_until:
            time.sleep(0.05)
        process.kill()
    wait_until = time.monotonic() + 30
    while not (tmp_path / "saved").exists() and time.monotonic() < wait_until:
        time.sleep(0.05)
    assert (tmp_path / "saved").exists()


def test_a_launcher_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(programs.TrialFailed, match="error: no-such-launcher cannot be started: No such file"):
        programs.Programs(1, 1).call(["no-such-launcher"], environment={}, log=tmp_path / "log")


def test_cores_are_shared_out_unless_the_user_has_done_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert programs._shares(1, 2) == [{}]
    assert programs._shares(3, 2) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert programs._shares(20, 1) == [{"OMP_NUM_THREADS": "1"}] * 20
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert programs._shares(3, 2) == [{}] * 3


def test_devices_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(programs.torch.cuda, "device_count", lambda: 5)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert programs._shares(2, 2) == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    with pytest.raises(ValueError, match="--jobs is 3; expected at most 2, because a trial has 2 ranks and this"):
        programs.Programs(3, 2)
    with pytest.raises(ValueError, match="--jobs is 2; expected 1, because a trial has 8 ranks and this machine 5 dev"):
        programs.Programs(2, 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", " 7, GPU-1a2b ,3,1,0")
    assert [each["CUDA_VISIBLE_DEVICES"] for each in programs._shares(2, 2)] == ["7,GPU-1a2b", "3,1"]
    for named in ("7,3", "0,1,2,3,9,10", "0,1,2,3,", ""):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        if len(named.split(",")) != 5:
            with pytest.raises(ValueError, match=f"CUDA_VISIBLE_DEVICES is {named}, of which 5 can be used; expected "):
                programs.Programs(2, 1)


def test_a_place_is_free_again_after_its_trial(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(programs, "_shares", lambda jobs, ranks: [{"PLACE": str(at)} for at in range(jobs)])
    running = programs.Programs(2, 1)
    log = tmp_path / "log"
    with running.place() as first, running.place() as second:
        assert {first["PLACE"], second["PLACE"]} == {"0", "1"}
        running.call([sys.executable, "-c", "import os; print(os.environ['PLACE'])"], environment=second, log=log)
    assert log.read_text().splitlines()[-1] == second["PLACE"]
    with running.place() as third:
        assert third == second  # freed first
    running.end()
    with pytest.raises(programs.TrialFailed, match="it was not started"):
        running.call([sys.executable, "-c", ""], environment={}, log=log)


def test_a_number_of_jobs_is_checked(tmp_path: Path) -> None:
    plan_of(tmp_path, common=CONTENT["common"])
    with pytest.raises(ValueError, match="--jobs is 0; expected 1 or more"):
        ablate.main(ablate.parser().parse_args([str(tmp_path / "plan.yaml"), "--output", "out", "--jobs", "0"]))
    for more in (["--trial", "0"], ["--slurm-array", "x"], ["--report-only"]):
        with pytest.raises(ValueError, match=f"--jobs is 2 with {more[0]}, which does not run several trials"):
            ablate.main(ablate.parser().parse_args(["plan.yaml", "--output", "out", "--jobs", "2", *more]))
    for more in (["--trial", "0"], ["--slurm-array", "x"]):
        with pytest.raises(ValueError, match=f"--baseline is a with {more[0]}, which writes no report; leave it out"):
            ablate.main(ablate.parser().parse_args(["plan.yaml", "--output", "out", "--baseline", "a", *more]))


@pytest.mark.parametrize("place", ["beside", "environment", "user"])
def test_installed_programs_are_found_where_pip_puts_them(tmp_path, monkeypatch, place):
    """Of the running program, of the environment, and of `pip install --user`; there is no checkout."""
    scripts = {"environment": tmp_path / "environment", "user": tmp_path / "user"}
    monkeypatch.setattr(programs, "ROOT", tmp_path / "no checkout")
    monkeypatch.setattr(programs.sys, "argv", [str(tmp_path / "beside" / "umv2-ablate")])
    monkeypatch.setattr(
        programs.sysconfig, "get_path", lambda name, scheme=None: str(scripts["user" if scheme else "environment"])
    )
    with pytest.raises(FileNotFoundError, match="the program umv2-pretrain is not in .*beside, .*environment, .*user"):
        programs.program_file("pretrain_umv2.py", "umv2-pretrain")
    (tmp_path / place).mkdir()
    (tmp_path / place / "umv2-pretrain").write_text("")
    assert programs.program_file("pretrain_umv2.py", "umv2-pretrain") == tmp_path / place / "umv2-pretrain"


def test_programs_of_a_checkout_are_its_files():
    assert programs.program_file("pretrain_umv2.py", "umv2-pretrain") == programs.ROOT / "pretrain_umv2.py"
