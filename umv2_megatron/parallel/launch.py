"""Which rank of how many this process is, whoever started it.

Four ways to start a run are told apart by the environment, in this order:

- torchrun: ``RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT``;
- ``mpirun -n N python -m mpi4py pretrain_umv2.py``: a rank variable of an MPI launcher; MPI itself (mpi4py) then says
  who we are, and rank 0 tells the others where to meet;
- ``srun``: ``SLURM_STEP_ID SLURM_PROCID SLURM_STEP_NUM_TASKS SLURM_LOCALID``; ranks meet on the first host of the node
  list. Under ``srun --mpi=pmi2`` both sets are there and agree, and MPI is not needed;
- none of these: a world of one process. So it is in the shell of a batch script, which has ``SLURM_PROCID=0`` and the
  allocation's ``SLURM_NTASKS`` but is no step of srun's.

``MASTER_ADDR`` and ``MASTER_PORT``, where set, decide the meeting place for MPI and SLURM too.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import NamedTuple

# Rank and size as MPICH (and Intel MPI), Open MPI and MVAPICH tell them to each process they start.
_MPI_VARIABLES = (
    ("PMI_RANK", "PMI_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
)

# SLURM numbers steps from 0; from here on (slurm.h) are those that it makes itself: batch scripts, shells of salloc.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
# How long a process that waits for others may take to end by itself after a signal (seconds).
_GRACE = 2.0

# By which launchers and job systems ask a run to save and stop.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Launch(NamedTuple):
    """This process among all of the run: ranks count from 0, ``local`` means on this host."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int


def discover(environ: Mapping[str, str] | None = None) -> Launch:
    """Rank, world and meeting place of this process, from ``environ`` (default: the process environment).

    Under an MPI launcher this is a collective call: all ranks must make it.

    Raises:
        ValueError: a variable of the launcher is missing, not a number, or contradicts another one.
    """
    environ = os.environ if environ is None else environ
    if _by_torchrun(environ):
        return _from_torchrun(environ)
    mpi = next((names for names in _MPI_VARIABLES if names[0] in environ), None)
    slurm = _by_srun(environ)
    if mpi is not None:
        rank, world_size = (_integer(environ, name) for name in mpi)
        # mpirun may start its own processes by srun, as MPICH's does, which alone sets MPI_LOCALNRANKS
        if not slurm or "MPI_LOCALNRANKS" in environ or (rank, world_size) != _slurm_rank(environ):
            return _from_mpi(environ, rank, world_size)
    if slurm:
        return _from_slurm(environ)
    return Launch(0, 1, 0, 1, "127.0.0.1", _port(environ, _free_port()))


def rank_and_size(environ: Mapping[str, str] | None = None) -> tuple[int, int]:
    """Rank and number of the processes that a launcher started together, from ``environ`` alone; (0, 1) without one.

    For programs whose ranks meet at files: neither MPI nor a network is needed, and it is no collective call.

    Raises:
        ValueError: a variable of the launcher is missing, not a number, or contradicts another one.
    """
    environ = os.environ if environ is None else environ
    names = ("RANK", "WORLD_SIZE") if _by_torchrun(environ) else None
    names = names or next((pair for pair in _MPI_VARIABLES if pair[0] in environ), None)
    if names is None and _by_srun(environ):
        names = "SLURM_PROCID", _slurm_tasks_name(environ)
    if names is None:
        return 0, 1
    rank, size = (_integer(environ, name) for name in names)
    return _checked(Launch(rank, size, 0, 1, "", 0), *names)[:2]


def start_of_slurm(environ: Mapping[str, str] | None = None) -> str:
    """A name that all tasks of one start of a SLURM step have in common, and no other start has; "" without SLURM."""
    environ = os.environ if environ is None else environ
    if not _by_srun(environ) or "SLURM_JOB_ID" not in environ:
        return ""
    step = environ.get("SLURM_STEP_ID") or environ.get("SLURM_STEPID")
    cluster, restart = environ.get("SLURM_CLUSTER_NAME", ""), environ.get("SLURM_RESTART_COUNT", "0")
    return f"{cluster}.{environ['SLURM_JOB_ID']}.{step}.{restart}"


def initialize_process_group(timeout_minutes: float = 10.0) -> Launch:
    """Install the platform, choose this rank's device and join the process group of the whole run.

    Args:
        timeout_minutes: how long a collective, or the meeting of the ranks, may take (minutes).

    Raises:
        ValueError: see ``discover``; or fewer CUDA devices than ranks on this host.
    """
    import torch  # here, so that who this process is can be asked without waiting for it

    from umv2_megatron.parallel import cpu_platform, roll_call

    if timeout_minutes <= 0:
        raise ValueError(f"--distributed-timeout-minutes is {timeout_minutes}, expected more than 0; try 10.")
    cpu_platform.install()
    with ends_at_signals("waits for its MPI launcher"):
        launch = discover()
    # torchrun shows every rank all devices of its host; SLURM and MPI may show each rank its own alone.
    cpu_platform.set_device(launch.local_rank, may_be_bound=not _by_torchrun(os.environ))
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if "RANK" in os.environ:
        # torchrun's agent may hold the store already, which only env:// knows.
        where = {"init_method": "env://"}
    elif launch.world_size == 1:
        where = {"store": torch.distributed.HashStore()}
    else:
        where = {"init_method": f"tcp://{launch.master_addr}:{launch.master_port}"}
    place = f"{launch.master_addr}:{launch.master_port}"
    with ends_at_signals(f"rank {launch.rank} waits at {place} for all {launch.world_size} ranks"):
        torch.distributed.init_process_group(
            cpu_platform.backend(), rank=launch.rank, world_size=launch.world_size, timeout=timeout, **where
        )
        roll_call.join(launch)
    return launch


@contextlib.contextmanager
def ends_at_signals(what: str) -> Iterator[None]:
    """Within the block, SIGTERM and SIGINT end this process also while it waits for other ranks.

    Python runs signal handlers between its own instructions, and none is run while a library waits: a handler that
    tidies up would keep the process until the ranks meet or their time is over. A thread sees the signal, leaves the
    handler ``_GRACE`` seconds, says ``what`` the process did, and ends it with 128 plus the signal's number. Signals
    without a handler in Python are not touched. Outside of the main thread, which has the handlers, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    left = threading.Event()

    def watch() -> None:
        while number := os.read(told, 1):
            if number[0] not in (signal.SIGTERM, signal.SIGINT) or left.wait(_GRACE):
                continue
            print(f"{what}: ended by {signal.Signals(number[0]).name}", file=sys.stderr, flush=True)
            os._exit(128 + number[0])
        os.close(told)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    previous = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        left.set()
        os.close(tell)


def _by_torchrun(environ: Mapping[str, str]) -> bool:
    return "RANK" in environ or "WORLD_SIZE" in environ


def _from_torchrun(environ: Mapping[str, str]) -> Launch:
    rank, world_size = _integer(environ, "RANK"), _integer(environ, "WORLD_SIZE")
    if "MASTER_ADDR" not in environ:
        raise ValueError("RANK is set but MASTER_ADDR is not: start the run with torchrun, or unset RANK.")
    return _checked(
        Launch(
            rank,
            world_size,
            _integer(environ, "LOCAL_RANK", 0),
            _integer(environ, "LOCAL_WORLD_SIZE", 1),
            environ["MASTER_ADDR"],
            _integer(environ, "MASTER_PORT"),
        ),
        "RANK",
        "WORLD_SIZE",
    )


def _by_srun(environ: Mapping[str, str]) -> bool:
    """Whether this is a task of a step that srun started, not the one shell of a batch script or of salloc."""
    step = environ.get("SLURM_STEP_ID") or environ.get("SLURM_STEPID") or ""
    return "SLURM_PROCID" in environ and step.isdigit() and int(step) < _FIRST_SPECIAL_STEP


def _slurm_tasks_name(environ: Mapping[str, str]) -> str:
    """The variable with the number of the step's tasks."""
    return "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"


def _slurm_rank(environ: Mapping[str, str]) -> tuple[int, int]:
    return _integer(environ, "SLURM_PROCID"), _integer(environ, _slurm_tasks_name(environ), 1)


def _from_slurm(environ: Mapping[str, str]) -> Launch:
    rank, world_size = _slurm_rank(environ)
    # "2(x3),1": tasks per node, run-length coded; this task's node is SLURM_NODEID.
    per_node = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or str(world_size)
    node = _integer(environ, "SLURM_NODEID", 0)
    on_this_node, before = 1, 0
    for count, repeats in re.findall(r"([0-9]{1,18})(?:\(x([0-9]{1,18})\))?", per_node):
        if before <= node < before + int(repeats or 1):
            on_this_node = int(count)
        before += int(repeats or 1)
    # Ranks of one job agree on a port without talking: it follows from the number of the job and step.
    ticket = 31 * _integer(environ, "SLURM_JOB_ID", 0) + _integer(environ, "SLURM_STEP_ID", 0)
    launch = Launch(
        rank,
        world_size,
        _integer(environ, "SLURM_LOCALID", 0),
        on_this_node,
        environ.get("MASTER_ADDR") or _slurm_first_host(environ),
        _port(environ, 15000 + ticket % 15000),
    )
    return _checked(launch, "SLURM_PROCID", _slurm_tasks_name(environ))


def _slurm_first_host(environ: Mapping[str, str]) -> str:
    """First host of "gpu[003-007,9],login1"; the launching host's address where that name cannot be resolved."""
    hosts = next((environ[name] for name in ("SLURM_STEP_NODELIST", "SLURM_NODELIST") if environ.get(name)), "")
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", hosts)
    if match is not None:
        first = "".join(part or "" for part in match.groups())
        try:
            socket.getaddrinfo(first, None)
            return first
        except OSError:
            pass
    return environ.get("SLURM_LAUNCH_NODE_IPADDR") or "127.0.0.1"


def _from_mpi(environ: Mapping[str, str], rank: int, world_size: int) -> Launch:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"this process was started by an MPI launcher but mpi4py does not work here ({error}); "
            "pip install mpi4py mpich, or start the run with torchrun."
        ) from error
    world = MPI.COMM_WORLD
    if (world.rank, world.size) != (rank, world_size):
        raise ValueError(
            f"the MPI launcher says rank {rank} of {world_size}, mpi4py says rank {world.rank} of {world.size}: "
            "they belong to different MPI installations; use the mpirun that was installed together with mpi4py."
        )
    host = world.Split_type(MPI.COMM_TYPE_SHARED)
    one_host = world.allreduce(int(host.size == world.size), op=MPI.MIN) == 1
    address = environ.get("MASTER_ADDR") or ("127.0.0.1" if one_host else socket.gethostbyname(socket.gethostname()))
    address, port = world.bcast((address, _port(environ, _free_port())))
    return Launch(world.rank, world.size, host.rank, host.size, address, port)


def _checked(launch: Launch, rank_name: str, size_name: str) -> Launch:
    if not 0 <= launch.rank < launch.world_size:
        raise ValueError(
            f"{rank_name} is {launch.rank} and {size_name} is {launch.world_size}, expected a rank from 0 to "
            f"{launch.world_size - 1}; start the run with torchrun, srun or mpirun."
        )
    return launch


def _integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None:
        if default is None:
            raise ValueError(f"{name} is not set in the environment: start the run with torchrun, srun or mpirun.")
        return default
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r} in the environment, expected an integer; unset or correct it.") from None


def _port(environ: Mapping[str, str], default: int) -> int:
    port = _integer(environ, "MASTER_PORT", default)
    if not 0 < port < 65536:
        raise ValueError(f"MASTER_PORT is {port} in the environment, expected 1 to 65535; unset or correct it.")
    return port


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
