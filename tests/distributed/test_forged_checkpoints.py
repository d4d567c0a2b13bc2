"""Checkpoints whose files were replaced, under correct hashes, by ones that would run code when they are unpickled."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
from harness import run_ranks
from test_checkpointing import make
from tiny_gpt import Layout

from umv2_megatron.checkpoint import manifest, pieces
from umv2_megatron.checkpoint.save_load import load_checkpoint, save_checkpoint
from umv2_megatron.checkpoint.store import CheckpointStore
from umv2_megatron.durable_files import CheckpointError


class Canary:
    """Unpickling it runs code: it makes the file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (os.mkdir, (self.path,))


def seal_again(store: CheckpointStore, iteration: int) -> None:
    """What a forger would do: publish the changed files under correct hashes."""
    directory = store.path(iteration)
    for name in (manifest.MANIFEST, manifest.MANIFEST_HASH):
        (directory / name).unlink()
    os.rename(directory, store.temporary_path(iteration))
    store.publish(iteration, num_keys=0, tensor_bytes=0)


def forge(root: str, kinds: list[str]) -> list[str]:
    run = make(Layout())
    return [forge_one(run, os.path.join(root, what), what) for what in kinds]


def forge_one(run: tuple, folder: str, what: str) -> str:
    store = CheckpointStore(folder)
    canary = Canary(os.path.join(folder, "ran"))
    if what == "object in a shard":
        serialized = pieces._serialized
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pieces, "_serialized", lambda data: serialized([canary]))
            save_checkpoint(store, 3, *run)
    else:
        save_checkpoint(store, 3, *run)
    directory = store.path(3)
    if what == "metadata":
        (directory / ".metadata").write_bytes(pickle.dumps(canary))
    elif what == "metadata with a bad path":
        with open(directory / ".metadata", "rb") as stream:
            metadata = pickle.load(stream)
        for info in metadata.storage_data.values():
            info.relative_path = "../" + info.relative_path
        (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    elif what == "common.pt":
        torch.save({"iteration": 3, "payload": canary}, directory / "common.pt")
    if what != "object in a shard":
        seal_again(store, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        try:
            load_checkpoint(store, *run)
        except CheckpointError as error:
            return str(error)
    return "loaded"


def test_no_payload_runs(tmp_path):
    expected = {
        "metadata": "posix.mkdir does not belong there",
        "metadata with a bad path": "must stay inside",
        "common.pt": "posix.mkdir",
        "object in a shard": "posix.mkdir",
    }
    messages = run_ranks(1, forge, str(tmp_path), list(expected))[0]
    for (what, told), message in zip(expected.items(), messages, strict=True):
        assert (tmp_path / what).is_dir() and not (tmp_path / what / "ran").exists()
        assert told in message, what


def test_the_canary_would_run(tmp_path):
    pickle.loads(pickle.dumps(Canary(str(tmp_path / "ran"))))
    assert (tmp_path / "ran").exists()
