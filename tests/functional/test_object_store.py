"""Runs whose --save is in an object store: killed, resumed, converted. A real S3 server (moto) and real signals."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("s3fs", reason="requirements-storage.txt is not installed")
pytest.importorskip("moto", reason="requirements-storage.txt is not installed")

from conversions import ROOT, forked, to_hf  # noqa: E402
from object_store import Server, files, known_here, use  # noqa: E402
from program_runs import Job, losses, tiny_run, train  # noqa: E402

from umv2_megatron.checkpoint.store import CheckpointStore  # noqa: E402
from umv2_megatron.observation.events import read_events  # noqa: E402
from umv2_megatron.user_paths import user_path  # noqa: E402

SETTINGS: dict[str, Any] = {"num_layers": 1, "use_distributed_optimizer": True, "save_interval": 2}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with known_here(tmp_path_factory.mktemp("s3")) as made:
        yield made


@pytest.fixture(autouse=True)
def no_failures(server):
    yield
    server.fail(None)


def die_at(environment: dict[str, str], stage: str, iteration: int, rank: int) -> None:
    """Kill ``rank`` in the save of ``iteration``: at a stage of the store, or "shard", before it sends its file."""
    import torch

    from umv2_megatron.checkpoint import places

    use(environment)
    make, begin, write, now = CheckpointStore.__init__, CheckpointStore.begin, places.write_shard, [0]

    def reached(name: str) -> None:
        if name == stage and now[0] == iteration and torch.distributed.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGKILL)

    def begun(self, number, bytes_needed=None):
        now[0] = number
        return begin(self, number, bytes_needed)

    def written(directory, *arguments):
        now[0] = int(directory.name.removeprefix("iter_"))
        result = write(directory, *arguments)
        reached("shard")
        return result

    CheckpointStore.__init__ = lambda self, root, **named: make(self, root, **{**named, "stages": reached})
    CheckpointStore.begin, places.write_shard = begun, written


def run_to_end(server: Server, argv: list[str], folder: Path, ranks: int = 2):
    return train(ranks, argv, folder, use, (server.environment,))


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> tuple[Path, Any]:
    """The run with --save on a disk: its directory and its end."""
    folder = tmp_path_factory.mktemp("local")
    return folder / "run", train(2, tiny_run(**SETTINGS, train_iters=6, save=folder / "run"), folder / "o")


@pytest.mark.slow
def test_a_killed_save_then_the_same_command(server, local, tmp_path):
    """Rank 1 in its shard, then rank 0 before the last file; the third start ends as the run on a disk does."""
    save, (reference, whole) = "s3://bucket/killed/run", local
    argv = tiny_run(**SETTINGS, train_iters=6, save=save)
    for stage, iteration, rank, resumed in (("shard", 4, 1, None), ("manifest-written", 6, 0, 2)):
        job = Job(2, argv, tmp_path / "o", die_at, (server.environment, stage, iteration, rank))
        try:
            ended = job.wait()
        finally:
            job.kill()
        assert ended.codes[rank] == -signal.SIGKILL, ended.text[-4000:]
        assert resumed is None or f"loaded checkpoint of iteration {resumed} from {save}/iter_" in ended.text
        assert CheckpointStore(save).iterations() == ([2] if resumed is None else [2, 4])
    finished = run_to_end(server, argv, tmp_path / "o")
    assert f"loaded checkpoint of iteration 4 from {save}/iter_0000004" in finished.text
    assert finished.weights == whole.weights and losses(save) == losses(reference)
    assert CheckpointStore(save).resolve() == 6

    held = files(save)
    own = {"config.json", "manifest.json", "manifest.sha256"}
    for name in (reference / "iter_0000006").iterdir():
        assert name.name in own or held[f"iter_0000006/{name.name}"] == name.read_bytes(), name
    assert not [name for name in held if name.startswith((".lock", ".unfinished"))]
    assert {"config.yaml", "events.jsonl", "metrics.jsonl"} < held.keys()
    events = [(event["event"], event.get("reason", "")) for event in read_events(user_path(save))]
    assert [kind for kind, _ in events].count("start") == 3 and events[-1] == ("end", "")


@pytest.mark.slow
def test_damage_verification_and_requests(server, local, tmp_path):
    """A flipped byte is named and fallen back from; a rank reads its pieces with few requests."""
    save = "s3://bucket/damaged/run"
    argv = tiny_run(**SETTINGS, train_iters=6, save=save)
    run_to_end(server, argv, tmp_path / "o")
    server.forget()
    again = run_to_end(server, [*argv, "--verify-checkpoint", "full"], tmp_path / "o")
    assert "loaded checkpoint of iteration 6 " in again.text
    reads = server.requests(r"^GET .*iter_0000006/__\d_0.distcp.*bytes=")
    assert len(reads) <= 2 * (2 + 1), reads  # each rank: its file and what it needs of the other, and a file to hash

    server.fail(r"^GET .*iter_0000006/__1_0.distcp.*bytes=")
    refused = train(2, argv, tmp_path / "o", use, (server.environment,), codes=1)
    assert "iter_0000006/__1_0.distcp cannot be read: refused by the test" in refused.text, refused.text[-3000:]
    assert "falling back" not in refused.text and "Traceback" not in refused.text
    server.fail(None)

    store = CheckpointStore(save)
    shard = store.path(6) / "__1_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    back = run_to_end(server, argv, tmp_path / "o")
    assert re.search(rf"WARNING: checkpoint 6 cannot be used: {re.escape(str(shard))}", back.text)
    assert "loaded checkpoint of iteration 4 " in back.text and back.weights == local[1].weights
    assert store.resolve() == 6  # written anew


@pytest.mark.slow
def test_saves_in_the_background(server, local, tmp_path):
    save = "s3://bucket/async/run"
    argv = tiny_run(**SETTINGS, train_iters=6, save=save, async_save=True)
    finished = run_to_end(server, argv, tmp_path / "o")
    assert finished.weights == local[1].weights
    told = [event for event in read_events(user_path(save)) if event["event"] == "checkpoint"]
    assert [event["iteration"] for event in told] == [2, 4, 6] and "blocked_seconds" in told[1]
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata"):
        assert (user_path(save) / "iter_0000004" / name).read_bytes() == (local[0] / "iter_0000004" / name).read_bytes()


def test_what_goes_wrong_is_one_sentence(server, tmp_path):
    argv, once = {**SETTINGS, "train_iters": 4}, {"save_interval": None}
    cases: list[tuple[str | None, dict[str, Any], int, str]] = [
        (None, {"save": "s3://missing/run"}, 1, r"--save s3://missing/run cannot be locked .*bucket does not exist"),
        (None, {"load": "s3://missing/run", **once}, 1, r"--load is s3://missing/run, which cannot .*does not exist"),
        (None, {"load": "s3://bucket/none", **once}, 2, r"--load is 's3://bucket/none'; no checkpoint is there"),
        (None, {"save": "nowhere://x"}, 2, r"--save is nowhere://x; expected a directory, or a URL that .*nowhere"),
        (r"^PUT .*no/.lock", {"save": "s3://bucket/no"}, 1, r"--save s3://bucket/no cannot be locked \(refused by"),
    ]
    for pattern, given, code, expected in cases:
        server.fail(pattern)
        done = train(1, tiny_run(**argv | given), tmp_path / "o", use, (server.environment,), codes=None)
        assert done.codes == [code] and re.search(rf"error: .*{expected}", done.text), done.text[-2000:]
        assert "Traceback" not in done.text

    save = "s3://bucket/failing/run"
    server.fail(r"^PUT .*iter_0000004/__1_0.distcp", 507)
    done = train(2, tiny_run(**argv, save=save), tmp_path / "o", use, (server.environment,), codes=1)
    assert re.search(rf"could not write {save}/iter_0000004: .*refused by the test.*in {save} are untouched", done.text)
    assert "Traceback" not in done.text
    server.fail(None)
    assert CheckpointStore(save).iterations() == [2] == [CheckpointStore(save).resolve()]
    told = [event for event in read_events(user_path(save)) if event["event"] == "fault"]
    assert told and all("refused by the test" in event["text"] for event in told)


# ---------------------------------------------------------------------- tools


def exported(environment: dict[str, str], load: str, target: Path) -> None:
    use(environment)
    to_hf(load, target)


def imported(environment: dict[str, str], export: Path, save: str) -> None:
    use(environment)
    from umv2_megatron.conversion.from_hf import import_export

    import_export(export, user_path(save), max_shard_bytes=100_000)


def ran(environment: dict[str, str], name: str, *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a tool."""
    use(environment)
    sys.argv = [name, *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
    return code, out.getvalue(), err.getvalue()


@pytest.mark.slow
def test_conversions_both_ways_and_the_tools(server, tmp_path):
    """From a URL to an export, back to a URL, and compared: weights bit for bit, and logits."""
    save, back = "s3://bucket/converted/run", "s3://bucket/converted/back"
    argv = tiny_run(**SETTINGS, train_iters=2, save=save, vocab_size=500)
    run_to_end(server, argv, tmp_path / "o")
    export, environment = tmp_path / "export", server.environment
    forked(exported, environment, save, export)
    forked(imported, environment, export, back)
    assert CheckpointStore(back).resolve() == 0
    assert len([name for name in files(back) if name.endswith(".distcp")]) > 1
    for load in (save, back):
        code, out, error = forked(ran, environment, "convert_checkpoint.py", "verify", "--load", load, "--hf", export)
        assert code == 0 and "the same bit for bit: good" in out and "good" in out.splitlines()[-1], out + error
    code, out, error = forked(ran, environment, "inspect_checkpoint.py", save, "--verify")
    assert code == 0 and out.startswith(f"{save}/iter_0000002: iteration 2") and "verified: " in out, error
    code, out, error = forked(ran, environment, "report.py", save, "--output", tmp_path / "page.html")
    assert code == 0 and "finished, iteration 2" in out, error
    code, _, error = forked(ran, environment, "report.py", save)
    assert code == 2 and "expected --output" in error
    code, _, error = forked(ran, environment, "convert_checkpoint.py", "to-hf", "--load", save, "--save", back)
    assert code == 2 and f"--save is {back}; expected a local directory" in error
    args = ("generate.py", "--load", save, "--prompt", "3 4", "--max-new-tokens", "2")
    code, out, error = forked(ran, environment, *args)
    assert code == 0 and f"iteration 2 of {save}" in error, error
    (tmp_path / "text.txt").write_text("3 4 5 6 7 8 9\n")
    code, out, error = forked(ran, environment, "evaluate.py", "--load", save, "--data", tmp_path / "text.txt")
    assert code == 0 and out.startswith(f"{save}, iteration 2"), error
