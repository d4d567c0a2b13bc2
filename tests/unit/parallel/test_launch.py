"""Every launcher's variables lead to the right rank; wrong ones to one sentence; real launchers to a working group."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from umv2_megatron.parallel import cpu_platform
from umv2_megatron.parallel.launch import (
    Launch,
    _free_port,
    discover,
    initialize_process_group,
    rank_and_size,
    start_of_slurm,
)

SLOW = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[3]
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "6",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_TASKS_PER_NODE": "2(x3)",
    "SLURM_JOB_ID": "4711",
    "SLURM_NODELIST": "localhost,other[1-2]",
}


def test_torchrun() -> None:
    assert discover(TORCHRUN) == Launch(3, 4, 1, 2, "10.0.0.1", 29500)


def test_without_local_variables_a_rank_is_alone_on_its_host() -> None:
    environ = {name: value for name, value in TORCHRUN.items() if not name.startswith("LOCAL_")}
    assert discover(environ) == Launch(3, 4, 0, 1, "10.0.0.1", 29500)


def test_torchrun_wins_over_slurm() -> None:
    assert discover(SLURM | TORCHRUN) == discover(TORCHRUN)


def test_slurm() -> None:
    launch = discover(SLURM)
    assert launch[:5] == (5, 6, 1, 2, "localhost")
    assert launch.master_port == discover(SLURM | {"SLURM_PROCID": "0"}).master_port
    assert launch.master_port != discover(SLURM | {"SLURM_JOB_ID": "4712"}).master_port
    assert discover(SLURM | {"MASTER_ADDR": "h", "MASTER_PORT": "7"})[4:] == ("h", 7)


def test_slurm_first_host_of_a_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.getaddrinfo", lambda host, port: [host])
    for nodes, first in {"gpu[003-007,9],x": "gpu003", "n1,n2": "n1", "a[1,3]-ib": "a1-ib", "solo": "solo"}.items():
        assert discover(SLURM | {"SLURM_NODELIST": nodes}).master_addr == first


def test_slurm_host_without_a_name() -> None:
    environ = SLURM | {"SLURM_NODELIST": "no-such-host.invalid", "SLURM_LAUNCH_NODE_IPADDR": "10.1.2.3"}
    assert discover(environ).master_addr == "10.1.2.3"


def test_srun_with_pmi2_needs_no_mpi() -> None:
    assert discover(SLURM | {"PMI_RANK": "5", "PMI_SIZE": "6"}) == discover(SLURM)


@pytest.mark.parametrize("step", [None, "", "batch", "interactive", "4294967291", "4294967290", "-5"])
def test_the_shell_of_a_batch_script_is_one_process(step: str | None) -> None:
    """sbatch gives its script SLURM_PROCID=0 and the tasks of the allocation, of which srun starts none there."""
    shell = {key: value for key, value in SLURM.items() if key != "SLURM_STEP_ID"} | {"SLURM_PROCID": "0"}
    shell |= {} if step is None else {"SLURM_STEP_ID": step}
    assert discover(shell)[:5] == (0, 1, 0, 1, "127.0.0.1")


def test_a_step_smaller_than_its_allocation() -> None:
    step = SLURM | {"SLURM_NTASKS": "64", "SLURM_STEP_NUM_TASKS": "6"}
    assert discover(step) == discover(SLURM)
    assert discover({key: value for key, value in SLURM.items() if key != "SLURM_STEP_ID"} | {"SLURM_STEPID": "0"})
    with pytest.raises(ValueError, match="SLURM_PROCID is 5 and SLURM_STEP_NUM_TASKS is 4"):
        discover(step | {"SLURM_STEP_NUM_TASKS": "4"})


def test_mpirun_in_a_batch_script_asks_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank must, also one whose number is SLURM's, too: asking is a collective call."""
    monkeypatch.setattr("umv2_megatron.parallel.launch._from_mpi", lambda environ, rank, size: (rank, size))
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}
    for rank in ("0", "1"):
        assert discover(batch | {"PMI_RANK": rank, "PMI_SIZE": "2"}) == (int(rank), 2)
        proxy = batch | {"SLURM_STEP_ID": "0", "MPI_LOCALNRANKS": "2"}
        assert discover(proxy | {"PMI_RANK": rank, "PMI_SIZE": "2"}) == (int(rank), 2)


def test_single_process() -> None:
    launch = discover({})
    assert launch[:5] == (0, 1, 0, 1, "127.0.0.1")
    assert 1024 <= launch.master_port < 65536


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        (TORCHRUN | {"RANK": "x"}, "RANK is 'x'"),
        (TORCHRUN | {"RANK": "4"}, "RANK is 4 and WORLD_SIZE is 4"),
        ({k: v for k, v in TORCHRUN.items() if k != "MASTER_ADDR"}, "MASTER_ADDR"),
        ({k: v for k, v in TORCHRUN.items() if k != "WORLD_SIZE"}, "WORLD_SIZE is not set"),
        (TORCHRUN | {"MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
        (SLURM | {"SLURM_NTASKS": "5"}, "SLURM_PROCID is 5"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
    ],
)
def test_one_sentence_for_a_wrong_environment(environ: dict[str, str], names: str) -> None:
    with pytest.raises(ValueError, match=re.escape(names)) as error:
        discover(environ)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("visible", "local_rank", "may_be_bound", "chosen"),
    [(1, 3, True, 0), (1, 0, False, 0), (4, 3, True, 3), (4, 3, False, 3), (1, 3, False, None), (2, 3, True, None)],
)
def test_the_device_of_a_rank(
    visible: int, local_rank: int, may_be_bound: bool, chosen: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM and MPI may show each rank its own device alone; torchrun shows all, and too few are an error."""
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    if chosen is None:
        with pytest.raises(ValueError, match=f"local rank {local_rank} has no CUDA device: this host has {visible}"):
            cpu_platform.set_device(local_rank, may_be_bound)
    else:
        cpu_platform.set_device(local_rank, may_be_bound)
    assert taken == ([] if chosen is None else [chosen])


@pytest.mark.parametrize(("environ", "bound"), [(SLURM, True), (TORCHRUN, False), (SLURM | TORCHRUN, False)])
def test_only_torchrun_shows_all_devices(environ: dict[str, str], bound: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, bool]] = []
    monkeypatch.setattr(os, "environ", environ)
    monkeypatch.setattr(cpu_platform, "install", lambda: None)
    monkeypatch.setattr(cpu_platform, "set_device", lambda rank, may_be_bound: asked.append((rank, may_be_bound)))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **kwargs: None)
    initialize_process_group()
    assert asked == [(1, bound)]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (0, 1)),
        ({"PMI_RANK": "1", "PMI_SIZE": "3", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (1, 3)),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4"}, (2, 4)),
        ({"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "8"}, (1, 2)),
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967291", "SLURM_NTASKS": "8"}, (0, 1)),  # a batch script's shell
        ({"RANK": "5", "WORLD_SIZE": "6", "PMI_RANK": "0", "PMI_SIZE": "1"}, (5, 6)),
    ],
)
def test_rank_and_size_from_the_environment_alone(environ: dict[str, str], expected: tuple[int, int]) -> None:
    assert rank_and_size(environ) == expected
    with pytest.raises(ValueError, match="expected a rank from 0 to 1"):
        rank_and_size({"PMI_RANK": "2", "PMI_SIZE": "2"})


def test_ranks_of_one_start_of_a_slurm_step_know_it() -> None:
    step = {**SLURM, "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1"}
    ours = start_of_slurm(step)
    assert ours and start_of_slurm({**step, "SLURM_PROCID": "0"}) == ours
    for name, value in (("SLURM_JOB_ID", "8"), ("SLURM_STEP_ID", "2"), ("SLURM_RESTART_COUNT", "1")):
        assert start_of_slurm({**step, name: value}) not in ("", ours)
    batch_shell = {**step, "SLURM_STEP_ID": str(0xFFFFFFFB)}
    assert start_of_slurm(batch_shell) == start_of_slurm({}) == start_of_slurm(TORCHRUN) == ""


PROGRAM = textwrap.dedent(
    """
    import torch
    from umv2_megatron.parallel.launch import initialize_process_group

    launch = initialize_process_group(timeout_minutes=1)
    total = torch.tensor([launch.rank + 1])
    torch.distributed.all_reduce(total)
    print(f"[{' '.join(map(str, launch[:4]))} {total.item()}]", flush=True)
    torch.distributed.destroy_process_group()
    """
)


@pytest.mark.parametrize("launcher", ["mpirun", "torchrun", *(pytest.param(x, marks=SLOW) for x in ("srun", "none"))])
def test_real_processes_meet(launcher: str, tmp_path: Path) -> None:
    """Two processes (one without a launcher) find each other and sum over their ranks."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    clean = {k: v for k, v in os.environ.items() if not re.match(r"SLURM_|PMI_|OMPI_|RANK$|WORLD_SIZE$|MASTER_", k)}
    clean |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    scripts = Path(sys.executable).parent
    commands = {
        "mpirun": [[str(scripts / "mpirun"), "-n", "2", sys.executable, "-m", "mpi4py", str(program)]],
        "torchrun": [[str(scripts / "torchrun"), "--standalone", "--nproc-per-node", "2", str(program)]],
        "srun": [[sys.executable, str(program)]] * 2,
        "none": [[sys.executable, str(program)]],
    }[launcher]
    if not Path(commands[0][0]).exists():
        pytest.skip(f"{commands[0][0]} is not installed")
    processes = []
    for index, command in enumerate(commands):
        environ = dict(clean)
        if launcher == "srun":  # its variables, without SLURM
            slurm = {"PROCID": index, "LOCALID": index, "NTASKS": 2, "JOB_ID": os.getpid(), "NODELIST": "localhost"}
            environ |= {f"SLURM_{name}": str(value) for name, value in slurm.items()} | {"SLURM_STEP_ID": "0"}
        processes.append(
            subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    told = ""
    try:
        for process in processes:
            told += process.communicate(timeout=150)[0]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), told
    expected = ["0 1 0 1 1"] if launcher == "none" else ["0 2 0 2 3", "1 2 1 2 3"]
    assert sorted(re.findall(r"\[(\d+ \d+ \d+ \d+ \d+)\]", told)) == expected, told


TINY = (
    "--model-preset umv2-tiny --mock-data --tokenizer-type NullTokenizer --lr 1e-3 --seq-length 32 "
    "--max-position-embeddings 32 --train-iters 1 --global-batch-size 8 --eval-iters 0"
)
WAITING = {
    "pretrain_umv2.py": TINY.split(),
    "tools/generate.py": ["--load", "{checkpoint}", "--prompt", "1 2"],
    "tools/evaluate.py": ["--load", "{checkpoint}", "--data", "{text}"],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny model."""
    folder = tmp_path_factory.mktemp("run")
    command = [sys.executable, str(ROOT / "pretrain_umv2.py"), *WAITING["pretrain_umv2.py"], "--save", str(folder)]
    done = subprocess.run(command, env=_clean_environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize(
    ("number", "program"),
    [
        *(pytest.param(signal.SIGTERM, program, marks=pytest.mark.slow if program.startswith("tools") else ())
          for program in WAITING),
        pytest.param(signal.SIGINT, "tools/generate.py", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_rank_that_waits_ends_at_a_signal(number: int, program: str, checkpoint: Path, tmp_path: Path) -> None:
    """The first of two ranks, whose second never comes, is asked to end while it waits."""
    (tmp_path / "text.txt").write_text("1 2 3 4 5 6")
    places = {"{checkpoint}": str(checkpoint), "{text}": str(tmp_path / "text.txt")}
    argv = [places.get(word, word) for word in WAITING[program]]
    port = _free_port()
    environ = _clean_environment() | {"RANK": "0", "WORLD_SIZE": "2"}
    environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with open(tmp_path / "out", "w+") as out:
        # a shell's background jobs ignore SIGINT, and hand that on
        process = subprocess.Popen(
            [sys.executable, str(ROOT / program), *argv],
            env=environ,
            stdout=out,
            stderr=out,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            deadline = time.monotonic() + 60
            while not _listens(port) and process.poll() is None:
                assert time.monotonic() < deadline, "the rank does not wait for others"
                time.sleep(0.1)
            time.sleep(1)
            asked = time.monotonic()
            process.send_signal(number)
            code = process.wait(timeout=30)
        finally:
            process.kill()
        out.seek(0)
        told = out.read()
    assert time.monotonic() - asked < 10
    # without a handler in Python the signal itself ends the process
    assert code in (-number, 128 + number), told[-3000:]
    assert "Traceback" not in told


BLOCKED = textwrap.dedent(
    """
    import signal, sys
    import torch
    from umv2_megatron.parallel.launch import ends_at_signals

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(5))
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    with ends_at_signals("this rank waits"):
        pass
    with ends_at_signals("this rank waits for a key"):
        print("ready", flush=True)
        store.get("never")
    """
)


def test_what_a_rank_waited_for_is_said() -> None:
    """In a library that does not return to Python, so that no handler can run."""
    environ = _clean_environment() | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", BLOCKED], env=environ, **pipes) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(1)
        process.terminate()
        told = process.communicate(timeout=20)[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert told.endswith("this rank waits for a key: ended by SIGTERM\n")


def _clean_environment() -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not re.match(r"SLURM_|PMI_|OMPI_|RANK$|WORLD_SIZE$|MASTER_", k)}
    return clean | {"OMP_NUM_THREADS": "1"}


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
