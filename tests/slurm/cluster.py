"""A SLURM of two nodes on this machine: munged, slurmctld and two slurmd on loopback, with all state in one folder.

    with Cluster(folder) as cluster:
        job = cluster.submit("examples/slurm/pretrain_227m.sh", "--nodes=2", environment={"RUN": ...})
        cluster.wait(job, "COMPLETED", 100)

Needs root and Debian's packages slurm-wlm and munge. The services run in the foreground as children of this process and
are ended by their process numbers. Nodes differ in name, port and spool folder only: they share processors, memory and
files. GPUs are empty files that nodes claim as devices, so that the scripts' requests are met; no task sees one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NODES = ("node1", "node2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "scancel", "sinfo")
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL"}

# Debian has no cgroups for SLURM without systemd, so processes are found by their parents. Credentials and with them a
# requeued job wait for cred_expire seconds (120 by default). Preempted jobs get the signal of --signal, then GraceTime.
CONFIGURATION = """
ClusterName=umv2test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskProlog={folder}/prolog.sh
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
MinJobAge=3600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=4000 Gres=gpu:8 State=UNKNOWN
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=4000 Gres=gpu:8 State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=off
"""


def reason_to_skip() -> str | None:
    """Why no cluster can be started here, or None."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not found: install slurm-wlm and munge"
    if os.geteuid() != 0:
        return "not root: slurmd starts jobs as their users and needs root"
    return None


class Cluster:
    """The services, as a context; methods call SLURM's own commands and raise ``AssertionError`` where they fail."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.services: list[subprocess.Popen[bytes]] = []
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        self.environment |= {"SLURM_CONF": str(folder / "slurm.conf")}
        self.environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        # what one job of a user should not inherit from the shell in which the tests were started
        for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LAUNCH", "RUN"):
            self.environment.pop(name, None)

    def __enter__(self) -> Cluster:
        for name in ("munge", "state", "spool/node1", "spool/node2"):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        host = socket.gethostname().split(".")[0]
        text = CONFIGURATION.format(host=host, ports=_free_ports(3), folder=self.folder)
        (self.folder / "slurm.conf").write_text(text)
        gpus = f"NodeName=node[1-2] Name=gpu File={self.folder}/gpu[0-7]"
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\n{gpus}\n")
        for gpu in range(8):
            (self.folder / f"gpu{gpu}").touch()
        prolog = self.folder / "prolog.sh"
        prolog.write_text("#!/bin/sh\necho export CUDA_VISIBLE_DEVICES=\n")
        prolog.chmod(0o755)
        try:
            munge = self.folder / "munge"
            self._start(
                "munged",
                *("--foreground", "--force", f"--key-file={key}", f"--socket={munge}/socket"),
                *(f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed"),
            )
            until(lambda: (munge / "socket").exists(), 20, "munged makes no socket")
            self._start("slurmctld", "-D", "-c")
            for node in NODES:
                self._start("slurmd", "-D", "-N", node)
            states = ("sinfo", "-h", "-N", "-p", "batch", "-o", "%t")
            until(lambda: self.run(*states).split() == ["idle"] * 2, 60, "the nodes are not idle")
        except BaseException:
            print(self.logs())
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End jobs, then services: the nodes before the controller before munged."""
        try:
            self.end_jobs()
        finally:
            for service in reversed(self.services[1:]):
                service.terminate()
            for service in reversed(self.services[1:]):
                _ended(service)
            for service in self.services[:1]:
                service.terminate()
                _ended(service)
            # Steps outlive slurmd by design. Where jobs did not end in time, nobody else would end them.
            for process in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)

    def _start(self, program: str, *arguments: str) -> None:
        path = shutil.which(program) or program
        with open(self.folder / f"{program}.{len(self.services)}.log", "wb") as log:
            service = subprocess.Popen([path, *arguments], env=self.environment, stdout=log, stderr=log)
        self.services.append(service)

    def run(self, *command: str, check: bool = True, **environment: str) -> str:
        """Standard output of a command of SLURM's."""
        done = subprocess.run(
            command, env={**self.environment, **environment}, cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
        return done.stdout

    @contextlib.contextmanager
    def running(self, *command: str) -> Iterator[None]:
        """While a command runs that need not end by itself.

        scancel (22.05) repeats a signal to a task of an array until the task has ended, for one and a half minutes.
        """
        process = subprocess.Popen(command, env=self.environment, cwd=ROOT)
        try:
            yield
        finally:
            process.terminate()
            process.wait(10)

    def submit(self, script: str, options: list[str], arguments: list[str], environment: dict[str, str]) -> str:
        """Number of the submitted job."""
        return self.run("sbatch", "--parsable", *options, script, *arguments, **environment).strip()

    def job(self, number: str) -> dict[str, str]:
        """What SLURM says of a job (or of one task of an array: "7_0"): JobState, Restarts, ExitCode and so on."""
        words = self.run("scontrol", "show", "job", "-o", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, seconds: float) -> dict[str, str]:
        """The job when it has ended for good."""

        def ended() -> bool:
            if self.job(number)["JobState"] not in FINAL:
                return False
            return not self.run("squeue", "-h", "-j", number, check=False).strip()  # no process of it is left

        until(ended, seconds, f"job {number} does not end")
        return self.job(number)

    def processes(self) -> list[int]:
        """Processes that belong to jobs of this cluster, by their environment."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"SLURM_CONF={self.folder}/slurm.conf".encode() in words and int(folder.name) != os.getpid():
                found.append(int(folder.name))
        return found

    def end_jobs(self) -> None:
        """Cancel all jobs and wait until they have ended."""
        self.run("scancel", "-u", "root", check=False)
        until(lambda: not self.run("squeue", "-h", check=False).strip(), 90, "jobs do not end")

    def logs(self) -> str:
        """The last lines of the services."""
        texts = [f"--- {path.name}\n{_tail(path)}" for path in sorted(self.folder.glob("*.log"))]
        return "\n".join(texts)


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-15:])


def _ended(service: subprocess.Popen[bytes]) -> None:
    try:
        service.wait(20)
    except subprocess.TimeoutExpired:
        service.kill()
        service.wait()


def until(condition: Callable[[], bool], seconds: float, problem: str) -> None:
    """Wait until ``condition`` holds; ``AssertionError`` with ``problem`` when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{problem} within {seconds:.0f} s")
        time.sleep(0.3)


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
