"""The scripts of examples/slurm, submitted to a real SLURM of two nodes on this machine (cluster.py), with tiny models.

`make slurm-test` runs this file; it is no part of `make test`. The scripts run as they are: options of sbatch and flags
behind the script make them small, and environment variables name the data, as a user would do it. Runs that are
interrupted are compared with runs that are not: the losses of all iterations must be equal, bit for bit.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cluster import ROOT, Cluster, reason_to_skip, until  # noqa: E402

SKIPPED = reason_to_skip()
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800), pytest.mark.skipif(bool(SKIPPED), reason=SKIPPED or "")]

FOLDER = "examples/slurm"
TWO_NODES = ["--nodes=2", "--ntasks-per-node=1"]
TINY = [
    *("--model-preset", "umv2-tiny", "--num-layers", "2", "--hidden-size", "64", "--ffn-hidden-size", "128"),
    *("--num-attention-heads", "4", "--memory-num-keys", "16", "--memory-key-dim", "32", "--vocab-size", "512"),
    *("--seq-length", "32", "--max-position-embeddings", "32", "--micro-batch-size", "2", "--global-batch-size", "8"),
    *("--num-workers", "1", "--lr", "1e-3", "--lr-warmup-iters", "2", "--eval-iters", "0", "--log-interval", "1"),
    *("--save-interval", "100", "--distributed-timeout-minutes", "1"),
]
ITERATIONS = 400
LONG = 90.0
"""Seconds of training, at the machine's best speed, that a time limit interrupts at least once: its signal comes within
60 s after the start."""


class Run:
    """A training job and its files."""

    def __init__(self, cluster: Cluster, folder: Path, script: str, *options: str, flags: str = "", **environment: str):
        self.cluster, self.folder, self.checkpoints = cluster, folder, folder / "checkpoints"
        self.script, self.options, self.environment = script, options, environment
        self.flags = [*TINY, *flags.split()]
        self.number = ""

    def submit(self) -> Run:
        environment = {"RUN": str(self.folder), **self.environment}
        output = f"--output={self.folder}/job.log"
        self.folder.mkdir(exist_ok=True)
        options = [*TWO_NODES, output, *self.options]
        self.number = self.cluster.submit(f"{FOLDER}/{self.script}", options, self.flags, environment)
        return self

    def ends(self, state: str = "COMPLETED", seconds: float = 600) -> dict[str, str]:
        job = self.cluster.wait(self.number, seconds)
        assert job["JobState"] == state, f"{job}\n{self.text()}"
        return job

    def reaches(self, iteration: int, restart: int = 0) -> None:
        """Wait until a start of the job has logged an iteration."""
        log = self.log(restart)

        def there() -> bool:
            state = self.cluster.job(self.number)["JobState"]
            assert state in ("PENDING", "RUNNING", "COMPLETING"), f"{state}\n{self.text()}"
            return log.exists() and any(int(n) >= iteration for n in re.findall(r" iteration +(\d+)/", log.read_text()))

        until(there, 400, f"job {self.number}, start {restart}, does not reach iteration {iteration}")

    def log(self, restart: int) -> Path:
        return self.folder / "logs" / f"{self.number}.{restart}.log"

    def text(self) -> str:
        """The job's own log, and the end of each start's."""
        files = [self.folder / "job.log", *sorted(self.folder.glob("logs/*"))]
        return "\n".join(f"--- {file}\n{file.read_text()[-3000:]}" for file in files if file.exists())

    def stops(self) -> list[int]:
        """Iterations at which the run was asked to stop and saved, as the job's log tells."""
        return [int(n) for n in re.findall(r"stopping after iteration (\d+)", (self.folder / "job.log").read_text())]

    def records(self) -> list[dict[str, float]]:
        lines = (self.checkpoints / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if "lm loss" in record]

    def losses(self) -> dict[int, tuple[float, float]]:
        """Loss and gradient norm by iteration."""
        records = self.records()
        assert len({record["iteration"] for record in records}) == len(records), "an iteration appears twice"
        return {int(record["iteration"]): (record["lm loss"], record["grad-norm"]) for record in records}

    def saved(self) -> int:
        return int((self.checkpoints / "latest_checkpointed_iteration.txt").read_text())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slurm")


@pytest.fixture(scope="module")
def cluster(place: Path) -> Iterator[Cluster]:
    with Cluster(place / "cluster") as started:
        yield started


@pytest.fixture(autouse=True)
def nothing_is_left(cluster: Cluster) -> Iterator[None]:
    """A case that failed must not keep the next one waiting for its nodes."""
    yield
    cluster.end_jobs()


@pytest.fixture(scope="module")
def data(place: Path, cluster: Cluster) -> dict[str, str]:
    """Token files and a tokenizer, made from this repository's documentation by the project's own tools."""
    corpus = place / "docs.jsonl"
    pages = [path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))]
    corpus.write_text("".join(json.dumps({"text": page}) + "\n" for page in pages))
    for words in (
        f"tools/train_tokenizer.py --input {corpus} --vocab-size 500 --output-prefix {place}/tokenizer",
        f"tools/preprocess_data.py --input {corpus} --output-prefix {place}/docs --append-eod --workers 1 "
        f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {place}/tokenizer.model",
    ):
        _tool(cluster, *words.split())
    return {"DATA": f"{place}/docs_text_document", "TOKENIZER": f"{place}/tokenizer.model"}


@pytest.fixture(scope="module")
def train(place: Path, cluster: Cluster, data: dict[str, str]) -> Callable[..., Run]:
    def start(name: str, *options: str, script: str = "pretrain_227m.sh", flags: str = "", **environment: str) -> Run:
        flags = flags if "--train-iters" in flags else f"--train-iters {ITERATIONS} {flags}"
        return Run(cluster, place / name, script, *options, flags=flags, **data, **environment).submit()

    return start


@pytest.fixture(scope="module")
def finished(train: Callable[..., Run]) -> Run:
    """A run on two nodes that nothing interrupts."""
    run = train("finished")
    run.job = run.ends()  # type: ignore[attr-defined]
    return run


def _tool(cluster: Cluster, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{words}: {done.stderr[-2000:]}"
    return done.stdout


def test_two_nodes(finished: Run, cluster: Cluster, record_property) -> None:
    """A training job on two nodes."""
    job = finished.job  # type: ignore[attr-defined]
    assert (job["NodeList"], job["Restarts"], job["ExitCode"]) == ("node[1-2]", "0", "0:0")
    losses = finished.losses()
    assert list(losses) == list(range(1, ITERATIONS + 1)) and finished.saved() == ITERATIONS
    assert losses[ITERATIONS][0] < losses[1][0] - 1
    _tool(cluster, "tools/inspect_checkpoint.py", str(finished.checkpoints), "--verify")
    config = (finished.checkpoints / "config.yaml").read_text()
    assert "use_distributed_optimizer: true" in config, "flags of the script that the test does not set"
    first, last = losses[1][0], losses[ITERATIONS][0]
    record_property("seen", f"{ITERATIONS} iterations, loss {first:.2f} to {last:.2f}, files valid")


def test_tables_over_nodes(train: Callable[..., Run], record_property) -> None:
    """The 7B script: tensor parallelism and tables over two nodes."""
    flags = "--train-iters 40 --memory-parallel-size 2"
    run = train("sharded", script="pretrain_7b_41b.sh", flags=flags)
    run.ends()
    assert run.saved() == 40 and len(run.losses()) == 40
    config = (run.checkpoints / "config.yaml").read_text()
    assert "tensor_model_parallel_size: 2" in config and "memory_parallel_size: 2" in config
    record_property("seen", f"TP 2, M 2 by row, loss {run.losses()[1][0]:.2f} to {run.losses()[40][0]:.2f}")


def test_time_limit(train: Callable[..., Run], finished: Run, record_property) -> None:
    """USR1 before the time limit."""
    step = min(record["iteration-time"] for record in finished.records())  # an earlier job may have had company
    flags = f"--train-iters {max(ITERATIONS, int(LONG / step))}"
    whole = train("whole", flags=flags)
    whole.ends()
    run = train("limited", "--time=2", "--signal=B:USR1@60", flags=flags)
    job = run.ends(seconds=1500)
    stops = run.stops()
    assert stops and len(stops) <= int(job["Restarts"]), run.text()
    assert "asked to stop by SIGUSR1" in (run.folder / "job.log").read_text()
    assert run.losses() == whole.losses()
    places = ", ".join(map(str, stops))
    text = f"{job['Restarts']} restarts, saved at {places}; {len(run.losses())} losses bitwise equal"
    record_property("seen", text)


def test_preemption(train: Callable[..., Run], finished: Run, cluster: Cluster, record_property) -> None:
    """Preempted by an evaluation of higher priority."""
    run = train("preempted")
    run.reaches(30)
    output = run.folder / "evaluation.json"
    options = ["--partition=urgent", "--ntasks-per-node=1", f"--output={run.folder}/evaluation.log"]
    environment = {"LOAD": str(finished.checkpoints), "OUTPUT": str(output), "RUN": str(run.folder / "evaluation")}
    flags = ["--data", f"{ROOT}/README.md"]
    urgent = cluster.submit(f"{FOLDER}/evaluate.sh", options, flags, environment)
    evaluated = cluster.wait(urgent, 400)
    told = (run.folder / "evaluation.log").read_text()
    assert evaluated["JobState"] == "COMPLETED", f"{told}\n{run.text()}"
    job = run.ends()
    assert job["Restarts"] == "1" and len(run.stops()) == 1, run.text()
    assert run.stops()[0] < ITERATIONS
    assert run.losses() == finished.losses()
    loss = _numbers(json.loads(output.read_text()))
    assert loss, "the report holds no loss"
    text = f"saved at {run.stops()[0]}, requeued, losses bitwise equal; loss of the evaluation {loss[0]:.3f}"
    record_property("seen", text)


def _numbers(report: object) -> list[float]:
    """All values under the key "loss" anywhere in a report."""
    if isinstance(report, dict):
        own = [value for key, value in report.items() if key == "loss" and isinstance(value, float)]
        return own + [number for value in report.values() for number in _numbers(value)]
    if isinstance(report, list):
        return [number for value in report for number in _numbers(value)]
    return []


def test_limit_of_restarts(train: Callable[..., Run], finished: Run, cluster: Cluster, record_property) -> None:
    """USR1 by hand twice, with one restart allowed."""
    run = train("signalled", MAX_RESTARTS="1")
    for restart in range(2):
        run.reaches(30 + (run.saved() if restart else 0), restart)
        cluster.run("scancel", "--batch", "--signal=USR1", run.number)
        if not restart:
            until(lambda: cluster.job(run.number)["Restarts"] == "1", 200, "the job is not requeued")
    job = run.ends("FAILED")
    assert (job["ExitCode"], job["Restarts"]) == ("75:0", "1") and len(run.stops()) == 2, run.text()
    assert "not requeued after 1 restarts (MAX_RESTARTS)" in run.text()
    stops = run.stops()
    again = run.submit()
    again.ends()
    assert run.losses() == finished.losses()
    text = f"saved at {stops[0]}, requeued; saved at {stops[1]}, exit code 75; submitted again: losses bitwise equal"
    record_property("seen", text)


def test_cancelled(train: Callable[..., Run], cluster: Cluster, record_property) -> None:
    """A user's scancel is final (the 120B script)."""
    layout = "--tensor-model-parallel-size 1 --no-sequence-parallel --pipeline-model-parallel-size 1"
    flags = f"{layout} --memory-parallel-size 2 --train-iters 20000"
    run = train("cancelled", script="pretrain_2.5b_120b.sh", flags=flags)
    run.reaches(10)
    cluster.run("scancel", run.number)
    job = run.ends("CANCELLED")
    assert job["Restarts"] == "0", run.text()
    assert run.saved() >= 10, run.text()
    record_property("seen", f"saved at {run.saved()}, cancelled, not requeued")


def test_node_down(train: Callable[..., Run], finished: Run, cluster: Cluster, record_property) -> None:
    """A node goes down."""
    run = train("down", flags="--save-interval 50")
    run.reaches(60)
    cluster.run("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    try:
        until(lambda: cluster.job(run.number)["JobState"] == "PENDING", 200, "SLURM does not requeue the job")
    finally:
        # refused where the node has registered and is back by itself (ReturnToService)
        cluster.run("scontrol", "update", "nodename=node2", "state=resume", check=False)
    job = run.ends()
    assert job["Restarts"] == "1", run.text()
    assert run.losses() == finished.losses()
    resumed = min(int(n) for n in re.findall(r" iteration +(\d+)/", run.log(1).read_text()))
    assert resumed > 50
    record_property("seen", f"requeued by SLURM, went on from iteration {resumed - 1}; losses bitwise equal")


def test_killed_rank(train: Callable[..., Run], cluster: Cluster, record_property) -> None:
    """A rank is killed (the 1B script)."""
    run = train("killed", script="pretrain_1b_7b.sh", flags="--train-iters 20000")
    run.reaches(10)
    os.kill(_process_of(cluster, run.number, rank=1), signal.SIGKILL)
    job = run.ends("FAILED")
    assert (job["Restarts"], job["ExitCode"]) == ("0", "137:0"), run.text()
    named = re.search(r"because rank 1 \(pid \d+ on \S+\) (is gone|does not answer)", run.log(0).read_text())
    assert named, run.text()
    assert "failed with exit code 137, not requeued" in run.text()
    record_property("seen", "exit code 137, not requeued; rank 0: " + named.group())


def _process_of(cluster: Cluster, job: str, rank: int) -> int:
    """The process of a rank: the one among those with its environment that is no data loader's child."""
    found = {}
    for process in cluster.processes():
        folder = Path("/proc") / str(process)
        try:
            words = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            command = (folder / "cmdline").read_bytes()
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        if f"SLURM_JOB_ID={job}" in words and f"SLURM_PROCID={rank}" in words and b"pretrain_umv2.py" in command:
            found[process] = parent
    ranks = [process for process, parent in found.items() if parent not in found]
    assert len(ranks) == 1, found
    return ranks[0]


def test_mistake(train: Callable[..., Run], record_property) -> None:
    """A mistake in a flag."""
    run = train("mistake", flags="--memory-topk 0")
    job = run.ends("FAILED")
    assert (job["ExitCode"], job["Restarts"]) == ("2:0", "0"), run.text()
    told = [line for line in run.log(0).read_text().splitlines() if "error:" in line]
    assert len(told) == 1 and "--memory-topk" in told[0], run.text()
    assert told[0] in (run.folder / "job.log").read_text()
    record_property("seen", f"exit code 2, not requeued; {told[0]}")


def test_ablation_array(place: Path, cluster: Cluster, data: dict[str, str], record_property) -> None:
    """An ablation array of two runs with two seeds."""
    settings = dict(zip((flag[2:] for flag in TINY[::2]), TINY[1::2]))
    settings |= {"data-path": data["DATA"], "tokenizer-type": "SentencePieceTokenizer"}
    settings |= {"tokenizer-model": data["TOKENIZER"], "train-iters": "300", "split": "90,10,0"}
    settings |= {"eval-iters": "2", "eval-interval": "300"}
    plan = place / "plan.yaml"
    runs = {"few": {"memory-topk": 2}, "more": {"memory-topk": 8}}
    plan.write_text(json.dumps({"common": settings, "seeds": [1, 2], "baseline": "few", "runs": runs}))
    folder = place / "ablation"
    options = ["--array=0-3", "--ntasks-per-node=1", f"--output={place}/ablation_%a.log"]
    number = cluster.submit(f"{FOLDER}/ablation_array.sh", options, [], {"PLAN": str(plan), "RUN": str(folder)})
    first = folder / "few" / "seed1"
    until(lambda: (first / "checkpoints" / "metrics.jsonl").exists(), 400, "the first trial does not train")
    until(lambda: len((first / "checkpoints" / "metrics.jsonl").read_text().splitlines()) > 10, 400, "no steps")
    log = place / "ablation_0.log"
    with cluster.running("scancel", "--batch", "--signal=USR1", f"{number}_0"):
        until(lambda: "asked to stop by SIGUSR1" in log.read_text(), 60, "the first task gets no signal")
    jobs = [cluster.wait(f"{number}_{task}", 600) for task in range(4)]
    logs = "\n".join(path.read_text() for path in sorted(place.glob("ablation_*.log")))
    assert [job["JobState"] for job in jobs] == ["COMPLETED"] * 4, logs
    assert [job["Restarts"] for job in jobs] == ["1", "0", "0", "0"], logs
    _tool(cluster, "tools/ablate.py", str(plan), "--output", str(folder), "--report-only")
    report = (folder / "report.md").read_text()
    assert re.search(r"^\| more \|", report, re.M), report
    record_property("seen", "4 tasks completed, the first after USR1 and one restart; report written")


def test_convert(place: Path, cluster: Cluster, finished: Run, record_property) -> None:
    """Conversion to Hugging Face format, compared with the checkpoint."""
    export = place / "export"
    environment = {"LOAD": str(finished.checkpoints), "EXPORT": str(export), "RUN": str(place / "convert")}
    log = f"{place}/convert.log"
    number = cluster.submit(f"{FOLDER}/convert.sh", [f"--output={log}"], [], environment)
    job = cluster.wait(number, 400)
    told = "\n".join(path.read_text() for path in (place / "convert" / "logs").glob("*"))
    assert job["JobState"] == "COMPLETED", told + Path(log).read_text()
    assert (export / "config.json").exists() and list(export.glob("*.safetensors"))
    again = cluster.submit(f"{FOLDER}/convert.sh", [f"--output={log}"], [], environment)
    assert cluster.wait(again, 400)["JobState"] == "COMPLETED", "an export that is there is compared"
    record_property("seen", "exported, compared; " + told.strip().splitlines()[-1])


def test_preprocess(place: Path, cluster: Cluster, data: dict[str, str], record_property) -> None:
    """Preprocessing on two nodes, USR1, and a job for files that another one writes."""
    folder = place / "preprocess"
    folder.mkdir()
    corpus = folder / "corpus.jsonl"
    corpus.write_text((place / "docs.jsonl").read_text() * 40)
    _tool(
        cluster,
        *f"tools/preprocess_data.py --input {corpus} --output-prefix {folder}/serial --append-eod".split(),
        *f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {data['TOKENIZER']}".split(),
    )
    environment = {"INPUT": str(corpus), "TOKENIZER": data["TOKENIZER"], "OUTPUT": f"{folder}/p"}
    options = [*TWO_NODES, "--cpus-per-task=2"]

    def submit(name: str) -> str:
        given = [*options, f"--output={folder}/{name}.log"]
        return cluster.submit(f"{FOLDER}/preprocess.sh", given, ["--part-mb", "0.2"], environment)

    (folder / "p.parts").mkdir()
    with open(folder / "p.parts/lock", "ab") as lock:  # as rank 0 of another job has it
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = submit("second")
        refused = cluster.wait(second, 200)
    assert (refused["JobState"], refused["ExitCode"]) == ("FAILED", "2:0"), refused
    assert "error: rank 0 failed: --output-prefix" in (folder / "logs" / f"{second}.0.log").read_text()
    first = submit("first")
    until(lambda: len(list(folder.glob("p.parts/0*[0-9].json"))) > 3, 200, "no parts are made")
    cluster.run("scancel", "--batch", "--signal=USR1", first)
    job = cluster.wait(first, 400)
    told = "\n".join(path.read_text() for path in [*folder.glob("*.log"), *folder.glob("logs/*")])
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), told
    assert "parts of an earlier call: going on" in (folder / "logs" / f"{first}.1.log").read_text(), told
    for end in ("text_document.bin", "text_document.idx"):
        assert (folder / f"p_{end}").read_bytes() == (folder / f"serial_{end}").read_bytes()
    assert not (folder / "p.parts").exists()
    record_property("seen", "refused beside another job, exit code 2; USR1, requeued, the files of one process")
