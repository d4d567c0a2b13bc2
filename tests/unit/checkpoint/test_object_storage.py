"""Checkpoints in an object store: kills, takeovers, refusals, damage. A real S3 server (moto), real SIGKILL."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

pytest.importorskip("s3fs", reason="requirements-storage.txt is not installed")
pytest.importorskip("moto", reason="requirements-storage.txt is not installed")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "functional"))

from object_store import files, known_here  # noqa: E402

from umv2_megatron import remote_path  # noqa: E402
from umv2_megatron.checkpoint import lease, manifest, object_storage, store  # noqa: E402
from umv2_megatron.checkpoint.manifest import MANIFEST, MANIFEST_HASH  # noqa: E402
from umv2_megatron.checkpoint.shard_writing import HashedFile  # noqa: E402
from umv2_megatron.checkpoint.store import TRACKER, CheckpointError, CheckpointStore  # noqa: E402
from umv2_megatron.durable_files import FileWindow, UnreachableError, open_to_read, sha256_of  # noqa: E402
from umv2_megatron.remote_path import RemotePath  # noqa: E402
from umv2_megatron.user_paths import UserPathError, is_remote, local_folder, same_directory, user_path  # noqa: E402

SIZES = {"a.distcp": 70_000, "b.distcp": 3_000}
STAGES = [
    "manifest-removed", "begun", "files-synced", "manifest-written", "manifest-synced", "published", "unmarked",
    "tracker-written", "prune-marked", "pruned", "done",
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with known_here(tmp_path_factory.mktemp("s3")) as made:
        yield made


@pytest.fixture
def url(server, request):
    server.fail(None)
    yield f"s3://bucket/{request.node.originalname}-{uuid.uuid4().hex[:8]}/run"
    server.fail(None)


def content(iteration: int, name: str, version: int = 0) -> bytes:
    return random.Random(f"{iteration} {name} {version}").randbytes(SIZES[name])


def save(made: CheckpointStore, iteration: int, version: int = 0) -> None:
    directory, sealed = made.begin(iteration, 1000), {}
    for name in SIZES:
        with HashedFile(directory / name) as file:
            file.write(content(iteration, name, version))
            sealed[name] = file.sync()
    made.publish(iteration, num_keys=2, tensor_bytes=sum(SIZES.values()), sealed=sealed)


def test_paths_keep_their_url(url):
    root = user_path(url, "--save")
    assert is_remote(root) and not is_remote(user_path("/tmp/x")) and not is_remote(user_path(Path("x")))
    assert str(root / "iter_0000001" / "a") == f"{url}/iter_0000001/a" and str(root.parent) == url.rpartition("/")[0]
    assert same_directory(url, url + "/") and not same_directory(url, url[:-1]) and local_folder(url) == Path(".")
    with pytest.raises(TypeError):
        os.path.realpath(root)  # what cannot take a URL must not make a local directory of it
    with pytest.raises(UserPathError, match=r"--save is nowhere://x; .*nowhere"):
        user_path("nowhere://x", "--save")


def test_local_paths_import_no_fsspec():
    code = (
        "import sys; from umv2_megatron.checkpoint.store import CheckpointStore;"
        "CheckpointStore('x').iterations(); print(sorted({'fsspec', 'upath', 's3fs'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


def test_a_missing_package_is_one_sentence(tmp_path):
    (tmp_path / "upath.py").write_text("raise ImportError('No module named upath')")
    code = "from umv2_megatron.user_paths import user_path; user_path('s3://bucket/run', '--save')"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    last = done.stderr.splitlines()[-1]
    assert "UserPathError: --save is s3://bucket/run, but a package for s3:// is not installed" in last
    assert "requirements-storage.txt" in last


def test_published_hashed_pruned(server, url):
    warnings: list[str] = []
    made = CheckpointStore(url, retain_interval=4, warn=warnings.append)
    with made.lock():
        for iteration in (3, 4, 5, 6):
            save(made, iteration)
    assert made.iterations() == [4, 5, 6] and made.read_tracker() == 6 and made.resolve() == 6 and not warnings
    held = files(url)
    assert {name.split("/")[0] for name in held} == {"iter_0000004", "iter_0000005", "iter_0000006", TRACKER}
    told = json.loads(held[f"iter_0000006/{MANIFEST}"])["files"]
    for name in SIZES:
        data = held[f"iter_0000006/{name}"]
        assert told[name] == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@pytest.fixture
def small_parts(monkeypatch) -> tuple[int, int]:
    """Bytes of a part, no fewer than S3 takes, and of a block."""
    sizes = 5 << 20, 1 << 20
    for name, size in zip(("PART_BYTES", "BLOCK_BYTES"), sizes, strict=True):
        monkeypatch.setattr(remote_path, name, size)
    return sizes


def test_large_files_go_in_parts_and_come_in_blocks(server, url, small_parts):
    """Nothing whole in memory: an upload has parts; reading costs a request for each block, whatever the pieces."""
    part, block = small_parts
    data = random.Random(1).randbytes(part + block + 7)
    path = user_path(url) / "large"
    server.forget()
    with HashedFile(path) as file:
        file.write(data)
        assert not server.requests("uploadId.*POST|POST .*uploadId") and not path.exists()
        assert file.sync() == (len(data), hashlib.sha256(data).hexdigest())
    assert len(server.requests(r"^PUT .*partNumber=")) == 2
    server.forget()
    with open_to_read(path) as opened:
        found = bytearray(len(data))
        for start in range(0, len(data), 100_000):
            wanted = memoryview(found)[start : start + 100_000]
            assert len(wanted) == read_in_full(opened, wanted, start)
    assert found == data and len(server.requests("^GET .*bytes=")) == -(-len(data) // block)
    assert sha256_of(path) == hashlib.sha256(data).hexdigest()


def read_in_full(opened, view: memoryview, start: int) -> int:
    return FileWindow(opened, start, len(view)).readinto(view)


def test_an_upload_that_fails_leaves_nothing(server, url, small_parts):
    path = user_path(url) / "large"
    server.fail("PUT .*partNumber=2")
    with pytest.raises(PermissionError, match="refused by the test.*s3://bucket/"), HashedFile(path) as file:
        file.write(bytes(sum(small_parts)))
        file.sync()
    server.fail(None)
    assert not path.exists() and server.requests("^DELETE .*uploadId")


@pytest.mark.parametrize(
    ("replace", "stages"),
    [
        pytest.param(False, ["begun", "manifest-written", "manifest-synced"], id="quick"),
        pytest.param(False, STAGES, id="new", marks=pytest.mark.slow),
        pytest.param(True, STAGES, id="replaced", marks=pytest.mark.slow),
    ],
)
def test_killed_at_every_stage(server, url, replace, stages):
    """The old or the new checkpoint is there, whole; the next owner clears the rest; one that is replaced may be gone.

    Each stage in a directory of its own, in processes beside each other.
    """
    context = multiprocessing.get_context("fork")

    def killed(stage: str, place: str) -> None:
        def reached(name: str) -> None:
            if name == stage:
                os.kill(os.getpid(), signal.SIGKILL)

        made = CheckpointStore(place, warn=lambda text: None)
        with made.lock():
            for iteration in (1, 2, *([3] if replace else [])):
                save(made, iteration)
            made._storage._stage = made._stage = reached
            save(made, 3, version=1)
            reached("done")

    places = {stage: f"{url}/{stage}" for stage in stages}
    children = {stage: context.Process(target=killed, args=(stage, where)) for stage, where in places.items()}
    for child in children.values():
        child.start()
    for stage, child in children.items():
        child.join(60)
        assert child.exitcode == -signal.SIGKILL, stage
    whole = STAGES[STAGES.index("manifest-synced") :]
    tracked = [*STAGES[STAGES.index("tracker-written") :], *(whole if replace else [])]  # the tracker names 3 already
    for stage, where in places.items():
        warnings: list[str] = []
        made = CheckpointStore(where, warn=warnings.append)
        found = made.resolve()
        assert found == (3 if stage in tracked else 2), stage
        assert (3 in made.iterations()) == (stage in whole), stage
        for name in SIZES:
            version = 1 if found == 3 else 0
            assert (made.path(found) / name).read_bytes() == content(found, name, version), stage
        with made.lock():
            assert made.resolve() == found and "takes it over" in " ".join(warnings)
            left = {name.split("/")[0] for name in files(where)}
            assert left <= {f"iter_000000{each}" for each in made.iterations()} | {TRACKER, ".lock"}, stage
            save(made, 4)
        assert made.resolve() == 4


def test_the_stages_of_this_test_are_all_there_are():
    sources = "".join(Path(module.__file__).read_text() for module in (object_storage, manifest, store))
    assert set(re.findall(r'stage\("([a-z-]+)"\)', sources)) == set(STAGES) - {"done"}


def test_files_that_somebody_copies_there_are_not_removed(url):
    made = CheckpointStore(url)
    with made.lock():
        save(made, 1)
    (made.path(7) / "a.distcp").write_bytes(b"being copied")
    with made.lock():
        assert made.iterations() == [1] and (made.path(7) / "a.distcp").read_bytes() == b"being copied"


def test_an_object_with_the_name_of_a_directory_is_no_file(url):
    made = CheckpointStore(url)
    save(made, 1)
    for directory in (made.root, made.path(1)):
        made.root.fs.call_s3("put_object", Bucket="bucket", Key=f"{directory.path.removeprefix('bucket/')}/", Body=b"")
    assert made.iterations() == [1] == [made.resolve()]


# ---------------------------------------------------------------------- the lease


def test_a_second_job_is_refused_while_the_first_lives(url, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.3)
    monkeypatch.setattr(lease, "_LOOK_S", 0.1)
    made = CheckpointStore(url)
    with made.lock():
        begun = time.monotonic()
        with pytest.raises(CheckpointError, match=rf"--save {url} is in use by process {os.getpid()} on .*, started 2"):
            CheckpointStore(url).lock()
        assert time.monotonic() - begun < 5
    with CheckpointStore(url).lock():
        pass
    assert files(url) == {}


def test_a_lease_that_lapses_is_taken_over_and_its_owner_publishes_no_more(url, monkeypatch):
    """As by a job on another machine: nobody here can tell whether its process lives."""
    monkeypatch.setattr(lease, "LEASE_S", 2.0)
    monkeypatch.setattr(lease, "_LOOK_S", 0.2)
    monkeypatch.setattr(lease, "_is_gone", lambda owner: False)
    first, second = CheckpointStore(url), CheckpointStore(url, warn=lambda text: None)
    held = first.lock()  # its next renewal is far away
    save(first, 1)
    begun = time.monotonic()
    with second.lock():
        assert 1 < time.monotonic() - begun < 20
        with pytest.raises(CheckpointError, match="was taken over by process .*nothing was published"):
            save(first, 2)
        assert second.iterations() == [1]
        save(second, 2)
    held.release()
    assert CheckpointStore(url).iterations() == [1, 2]


# ---------------------------------------------------------------------- what goes wrong


def test_damage_is_named_and_fallen_back_from(url):
    warnings: list[str] = []
    made = CheckpointStore(url, warn=warnings.append)
    for iteration in (1, 2):
        save(made, iteration)
    damaged = made.path(2) / "a.distcp"
    data = bytearray(damaged.read_bytes())
    data[1000] ^= 1
    damaged.write_bytes(bytes(data))
    assert made.resolve() == 1
    assert f"{damaged} has SHA-256" in warnings[0] and "falling back to checkpoint 1" in warnings[1]


@pytest.mark.parametrize("name", ["../a.distcp", "/a.distcp", "x/../../a.distcp"])
def test_forged_names_are_refused(url, name):
    made = CheckpointStore(url)
    save(made, 1)
    told = json.loads((made.path(1) / MANIFEST).read_bytes())
    told["files"][name] = told["files"].pop("a.distcp")
    data = json.dumps(told).encode()
    (made.path(1) / MANIFEST).write_bytes(data)
    (made.path(1) / MANIFEST_HASH).write_bytes(manifest._manifest_hash_line(data))
    with pytest.raises(CheckpointError, match="paths must stay inside"):
        made.verify(1)


@pytest.mark.parametrize("pattern", ["^PUT .*/b.distcp", "^PUT .*/manifest.json", "^PUT .*/manifest.sha256"])
def test_a_store_that_refuses_leaves_the_old_checkpoint(server, url, pattern):
    made = CheckpointStore(url)
    save(made, 1)
    server.fail(pattern, 507)
    with pytest.raises((CheckpointError, OSError), match="refused by the test"):
        save(made, 2)
    server.fail(None)
    made.discard(2)
    assert made.iterations() == [1] == [made.resolve()] and not any("iter_0000002/" in name for name in files(url))
    (made.path(2) / "a.distcp").write_bytes(b"of a rank that was slower")
    with made.lock():
        assert not any("iter_0000002" in name for name in files(url))


def test_a_store_that_cannot_be_asked_is_no_damage(server, url):
    """Else a run would go on from an older checkpoint, or from scratch, because of a moment without network."""
    made = CheckpointStore(url)
    for iteration in (1, 2):
        save(made, iteration)
    server.fail("GET .*iter_0000002/a.distcp", 403)
    with pytest.raises(UnreachableError, match=f"{url}/iter_0000002/a.distcp cannot be read: refused by the test"):
        made.resolve()
    server.fail("GET .*list-type", 403)
    with pytest.raises(PermissionError, match="refused by the test"):
        made.iterations()


def test_no_bucket_no_store(server, url):
    with pytest.raises(CheckpointError, match=r"--save s3://missing/run cannot be locked \(The specified bucket"):
        CheckpointStore("s3://missing/run").lock()
    with pytest.raises(FileNotFoundError, match="bucket does not exist"):
        CheckpointStore("s3://missing/run").iterations()


def test_other_stores_of_fsspec(tmp_path):
    """What is not S3: no exclusive creation is asked of these here, the rest is the same."""
    for where in (f"file://{tmp_path}/run", "memory://run"):
        made = CheckpointStore(where)
        assert isinstance(made.root, RemotePath) and made.iterations() == []
        with made.lock():
            for iteration in (1, 2, 3):
                save(made, iteration)
        assert made.iterations() == [2, 3] and made.resolve() == 3
