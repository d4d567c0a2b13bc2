"""The checkpoint directory survives kills, bit rot and full disks. Real files, real SIGKILL, no torch."""

import errno
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from umv2_megatron import durable_files
from umv2_megatron.checkpoint import manifest as manifest_module
from umv2_megatron.checkpoint import posix_storage
from umv2_megatron.checkpoint import store as store_module
from umv2_megatron.checkpoint.store import TRACKER, CheckpointError, CheckpointStore, NoCheckpointError
from umv2_megatron.durable_files import check_relative_path

SIZES = {"a_0.distcp": 70_000, "b_0.distcp": 70_000, "deep/c.pt": 3_000, "common.pt": 100}
STAGES = [
    "begun",
    "shards-written",
    "files-synced",
    "manifest-written",
    "manifest-synced",
    "old-set-aside",
    "renamed",
    "rename-synced",
    "old-removed",
    "tracker-written",
    "tracker-replaced",
    "tracker-synced",
    "prune-renamed",
    "pruned",
    "done",
]


def content(iteration: int, name: str, version: int = 0) -> bytes:
    return random.Random(f"{iteration} {name} {version}").randbytes(SIZES[name])


def write_shards(directory: Path, iteration: int, version: int = 0) -> None:
    for name in SIZES:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content(iteration, name, version))


def save(store: CheckpointStore, iteration: int, version: int = 0) -> Path:
    write_shards(store.begin(iteration, 1000), iteration, version)
    return store.publish(iteration, num_keys=4, tensor_bytes=sum(SIZES.values()))


def version_of(store: CheckpointStore, iteration: int) -> int:
    """Which version of a checkpoint is there; fails when its files are of different versions."""
    directory = store.path(iteration)
    found = [v for v in (0, 1) if all((directory / n).read_bytes() == content(iteration, n, v) for n in SIZES)]
    assert len(found) == 1, f"{directory} mixes versions"
    return found[0]


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def store(tmp_path, warnings):
    return CheckpointStore(tmp_path / "save", warn=warnings.append)


# ---------------------------------------------------------------------- publishing


def test_a_published_checkpoint_is_complete_and_hashed(store, warnings):
    path = save(store, 1000)
    assert path == store.root / "iter_0001000"
    assert (store.root / TRACKER).read_text() == "1000"
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["num_keys"] == 4 and manifest["tensor_bytes"] == sum(SIZES.values())
    assert {name: entry["size"] for name, entry in manifest["files"].items()} == SIZES
    assert store.resolve() == 1000 and not warnings
    # The same hashes by another program.
    lines = "".join(f"{entry['sha256']}  {name}\n" for name, entry in manifest["files"].items())
    subprocess.run(["sha256sum", "--check", "--quiet"], cwd=path, input=lines, text=True, check=True)
    subprocess.run(["sha256sum", "--check", "--quiet", "manifest.sha256"], cwd=path, check=True)


def test_two_newest_are_kept_and_the_retained(tmp_path):
    store = CheckpointStore(tmp_path, retain_interval=4)
    for iteration in range(1, 11):
        save(store, iteration)
    assert store.iterations() == [4, 8, 9, 10]
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("iter_")) == [TRACKER]


def test_pruning_counts_only_valid_checkpoints(store, warnings):
    for iteration in (1, 2):
        save(store, iteration)
    (store.path(2) / "a_0.distcp").unlink()
    save(store, 3)
    assert store.iterations() == [1, 2, 3]
    assert any("iter_0000002/a_0.distcp is missing" in line for line in warnings)


def test_a_save_begins_without_what_a_former_one_left(store):
    left = store.begin(1)
    (left / "a_0.distcp").write_bytes(b"half")
    assert store.begin(1) == left and not any(left.iterdir())
    save(store, 1)
    assert store.resolve() == 1


def test_pruning_reads_no_bytes_of_older_checkpoints(store, warnings):
    """Re-reading terabytes at every save would cost more than it protects: the bytes are verified at the load."""
    for iteration in (1, 2):
        save(store, iteration)
    damaged = store.path(2) / "a_0.distcp"
    damaged.write_bytes(bytes(SIZES["a_0.distcp"]))
    save(store, 3)
    assert store.iterations() == [2, 3] and not warnings
    with pytest.raises(CheckpointError, match="a_0.distcp"):
        store.resolve(2)


def test_saving_after_a_rewind_keeps_what_was_just_saved(store, warnings):
    for iteration in (10, 20, 30):
        save(store, iteration)
    save(store, 25, 1)
    assert store.iterations() == [20, 25, 30]
    assert store.resolve() == 25
    assert any("newer" in line and "30" in line for line in warnings)


def test_the_same_iteration_is_replaced(store):
    save(store, 1, 0)
    save(store, 1, 1)
    assert version_of(store, store.resolve()) == 1


@pytest.mark.parametrize("found", [(3, sum(SIZES.values())), (4, 1)])
def test_wrong_counts_are_not_published(store, found):
    save(store, 1)
    write_shards(store.begin(2), 2)
    with pytest.raises(CheckpointError, match="the model has 4 keys"):
        store.publish(2, num_keys=4, tensor_bytes=sum(SIZES.values()), count=lambda path: found)
    assert store.iterations() == [1] and store.resolve() == 1
    assert not store.temporary_path(2).exists()


def test_fewer_bytes_than_the_model_has_are_not_published(store):
    write_shards(store.begin(2), 2)
    (store.temporary_path(2) / "b_0.distcp").write_bytes(b"")
    with pytest.raises(CheckpointError, match="hold only 73100 bytes"):
        store.publish(2, num_keys=4, tensor_bytes=sum(SIZES.values()))


def test_a_symlink_is_not_published(store, tmp_path):
    directory = store.begin(2)
    write_shards(directory, 2)
    (directory / "link").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match="link is a symlink"):
        store.publish(2, num_keys=4, tensor_bytes=1)


# ---------------------------------------------------------------------- killed at every stage


def save_and_die(root: str, stage: str, iteration: int, version: int) -> None:
    def die(name: str) -> None:
        if name == stage:
            os.kill(os.getpid(), signal.SIGKILL)

    store = CheckpointStore(root, stages=die)
    with store.lock():
        directory = store.begin(iteration)
        write_shards(directory, iteration, version)
        die("shards-written")
        store.publish(iteration, num_keys=4, tensor_bytes=1)
    die("done")


@pytest.mark.parametrize("replace", [False, True], ids=["next", "same-iteration"])
@pytest.mark.parametrize("before", [0, 1, 2])
def test_killed_at_every_stage(tmp_path, before, replace):
    """After a kill the owner's next start finds the old or the new checkpoint, intact; and can save again."""
    context = multiprocessing.get_context("fork")
    died = []
    for stage in STAGES:
        root = tmp_path / stage
        for iteration in range(1, before + 1):
            save(CheckpointStore(root), iteration)
        new = before if replace and before else before + 1
        child = context.Process(target=save_and_die, args=(str(root), stage, new, 1))
        child.start()
        child.join(30)
        assert child.exitcode in (0, -signal.SIGKILL)
        if child.exitcode:
            died.append(stage)
        store = CheckpointStore(root)
        with store.lock():
            assert not [p.name for p in root.iterdir() if p.name.startswith((".tmp_", ".old_"))]
            try:
                found = store.resolve()
            except NoCheckpointError:
                assert before == 0 and STAGES.index(stage) < STAGES.index("renamed")
            else:
                version = version_of(store, found)
                assert (found, version) in [(before, 0), (new, 1)], stage
                if STAGES.index(stage) >= STAGES.index("tracker-replaced"):
                    assert (found, version) == (new, 1), stage
            save(store, new, 1)
            assert store.resolve() == new and version_of(store, new) == 1
    expected = set(STAGES)
    if not (replace and before):
        expected -= {"old-set-aside", "old-removed"}
    if before < 2 or replace:
        expected -= {"prune-renamed", "pruned"}
    assert set(died) == expected


def test_the_stages_of_this_test_are_all_there_are():
    source = "".join(Path(module.__file__).read_text() for module in (posix_storage, manifest_module, store_module))
    named = set(re.findall(r'stage\("([a-z-]+)"\)', source))
    assert named == set(STAGES) - {"shards-written", "done"}


# ---------------------------------------------------------------------- damage


def flip_bit(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(1, path.stat().st_size))


def empty(path: Path, rng: random.Random) -> None:
    os.truncate(path, 0)


def delete(path: Path, rng: random.Random) -> None:
    path.unlink()


def extra(path: Path, rng: random.Random) -> None:
    path.with_name(path.name + ".extra").write_bytes(b"x")


def link(path: Path, rng: random.Random) -> None:
    target = path.parents[2] / f"elsewhere{rng.random()}"
    shutil.move(path, target)
    path.symlink_to(target)


@pytest.mark.parametrize("damage", [flip_bit, truncate, empty, delete, extra, link])
def test_damage_is_named_and_the_older_checkpoint_taken(store, warnings, damage):
    save(store, 1)
    pristine = save(store, 2)
    backup = store.root.parent / "backup"
    shutil.copytree(pristine, backup)
    rng = random.Random(damage.__name__)
    names = [*SIZES, "manifest.json", "manifest.sha256"]
    for trial in range(20):
        name = names[trial % len(names)]
        damage(pristine / name, rng)
        with pytest.raises(CheckpointError) as caught:
            store.verify(2)
        told_name = name if damage is not delete or name in SIZES else "manifest.json"
        # A damaged manifest.sha256 is told as a mismatch of the pair.
        assert told_name in str(caught.value) or name == "manifest.sha256", (name, str(caught.value))
        assert "\n" not in str(caught.value)
        warnings.clear()
        assert store.resolve() == 1
        assert "iter_0000002" in warnings[0] and "falling back to checkpoint 1" in warnings[-1]
        shutil.rmtree(pristine)
        shutil.copytree(backup, pristine)
        assert store.resolve() == 2


def test_a_hash_mismatch_tells_both_hashes(store):
    save(store, 1)
    path = store.path(1) / "a_0.distcp"
    expected = json.loads((store.path(1) / "manifest.json").read_text())["files"]["a_0.distcp"]["sha256"]
    flip_bit(path, random.Random(0))
    actual = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]
    with pytest.raises(CheckpointError) as caught:
        store.verify(1)
    assert str(path) in str(caught.value) and expected in str(caught.value) and actual in str(caught.value)
    assert store.verify(1, hashes=False).iteration == 1


def test_a_checkpoint_at_rest_is_hashed_once(store, monkeypatch):
    """And again as soon as a file was touched, even where its size and time of modification stayed."""
    save(store, 1)
    files = len(store.verify(1).files)
    hashed = []
    monkeypatch.setattr(
        manifest_module, "sha256_of", lambda path: (hashed.append(path), durable_files.sha256_of(path))[1]
    )
    store.verify(1)
    assert len(hashed) == files, "just written: a change might not show in the times"
    monkeypatch.setattr(durable_files, "_SETTLED_NS", -1)
    store.verify(1)
    CheckpointStore(store.root).resolve()
    assert len(hashed) == 2 * files
    shard = store.path(1) / "a_0.distcp"
    times = (shard.stat().st_atime_ns, shard.stat().st_mtime_ns)
    time.sleep(0.02)
    flip_bit(shard, random.Random(1))
    os.utime(shard, ns=times)
    with pytest.raises(CheckpointError, match="a_0.distcp has SHA-256"):
        store.verify(1)


def test_swapped_shards_are_found(store):
    directory = save(store, 1)
    os.rename(directory / "a_0.distcp", directory / "x")
    os.rename(directory / "b_0.distcp", directory / "a_0.distcp")
    os.rename(directory / "x", directory / "b_0.distcp")
    with pytest.raises(CheckpointError, match=r"a_0.distcp has SHA-256 .*1 more files differ: b_0.distcp"):
        store.verify(1)


def test_a_checkpoint_under_another_name_is_found(store):
    save(store, 1)
    os.rename(store.path(1), store.path(2))
    with pytest.raises(CheckpointError, match="of iteration 1: expected format 1 of iteration 2"):
        store.verify(2)


@pytest.mark.parametrize("text", ["", "garbage", "1e3", "-1", "²", "9" * 70, "release", "\0"])
def test_a_bad_tracker_is_named(store, warnings, text):
    for iteration in (1, 2):
        save(store, iteration)
    (store.root / TRACKER).write_text(text)
    assert store.resolve() == 2
    assert TRACKER in warnings[0] and "not a plain iteration number" in warnings[0]


def test_a_missing_tracker_or_directory(store, warnings):
    with pytest.raises(NoCheckpointError, match="holds no checkpoint: check --load$"):
        store.resolve()
    for iteration in (1, 2):
        save(store, iteration)
    (store.root / TRACKER).unlink()
    assert store.resolve() == 2 and "is missing" in warnings[0]
    (store.root / TRACKER).write_text("7")
    assert store.resolve() == 2 and any("iter_0000007 does not exist" in line for line in warnings)
    (store.root / TRACKER).write_text("1")
    flip_bit(store.path(1) / "common.pt", random.Random(0))
    assert store.resolve() == 2
    flip_bit(store.path(2) / "common.pt", random.Random(0))
    with pytest.raises(CheckpointError, match="no valid checkpoint to load") as caught:
        store.resolve()
    assert not isinstance(caught.value, NoCheckpointError)


def test_a_chosen_step_never_falls_back(store):
    for iteration in (1, 2):
        save(store, iteration)
    assert store.resolve(ckpt_step=1) == 1
    flip_bit(store.path(2) / "common.pt", random.Random(0))
    with pytest.raises(CheckpointError, match="common.pt has SHA-256"):
        store.resolve(ckpt_step=2)


@pytest.mark.parametrize("name", ["../iter_0000001/a_0.distcp", "/etc/passwd", "", ".", "a/../b", "./a", "a\\b", "a\0"])
def test_paths_that_leave_the_directory_are_refused(store, name):
    save(store, 1)
    path = store.path(1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"size": 1, "sha256": "0"}
    data = json.dumps(manifest).encode()
    (path / "manifest.json").write_bytes(data)
    (path / "manifest.sha256").write_bytes(manifest_module._manifest_hash_line(data))
    with pytest.raises(CheckpointError, match="must stay inside"):
        store.verify(1)
    with pytest.raises(CheckpointError, match="must stay inside"):
        check_relative_path(name, path)


def test_a_linked_checkpoint_directory_is_refused(store):
    save(store, 1)
    os.rename(store.path(1), store.root / "real")
    store.path(1).symlink_to(store.root / "real")
    with pytest.raises(CheckpointError, match="symlink"):
        store.verify(1)


# ---------------------------------------------------------------------- failing disks


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("victim", ["write_synced", "fsync_path", "sha256_of"])
def test_a_failing_disk_leaves_the_old_checkpoint(store, monkeypatch, code, victim):
    save(store, 1)
    write_shards(store.begin(2), 2)

    def fail(path, *args):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(manifest_module, victim, fail)
    with pytest.raises(CheckpointError) as caught:
        store.publish(2, num_keys=4, tensor_bytes=12345)
    message = str(caught.value)
    assert os.strerror(code) in message and "bytes needed: 12345" in message and "bytes free: " in message
    assert "\n" not in message
    monkeypatch.undo()
    assert store.iterations() == [1] and store.resolve() == 1
    assert not store.temporary_path(2).exists()


def test_too_little_space_fails_before_writing(store):
    save(store, 1)
    with pytest.raises(CheckpointError, match=r"No space left on device.*bytes needed: 1000000000000000000, .*free"):
        store.begin(2, bytes_needed=10**18)
    assert not store.temporary_path(2).exists() and store.resolve() == 1


def test_a_failure_while_pruning_does_not_fail_the_save(store, warnings, monkeypatch):
    for iteration in (1, 2):
        save(store, iteration)
    write_shards(store.begin(3), 3)
    real = posix_storage.remove_path

    def fail(path):
        if "prune" in path.name:
            raise OSError(errno.EIO, "Input/output error", str(path))
        real(path)

    monkeypatch.setattr(posix_storage, "remove_path", fail)
    store.publish(3, num_keys=4, tensor_bytes=1)
    assert store.resolve() == 3 and any("could not be removed" in line for line in warnings)


def test_the_owner_removes_what_a_killed_job_left(store):
    save(store, 1)
    write_shards(store.begin(2), 2)
    with store.lock():
        assert not store.temporary_path(2).exists()
        assert store.resolve() == 1
