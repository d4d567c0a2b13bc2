"""Damaged checkpoints and exports: what inspection, conversion and verification say about them.

A damage that hashes would find is hidden from them: the manifest is made anew, as whoever can write there could.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from damage import as_text, damaged_bytes, damaged_json
from hypothesis import given
from rule import Outcome, cases, drawing, run_tool_with

sys.path.insert(0, str(Path(__file__).parents[1] / "functional"))
from conversions import saved  # noqa: E402

from umv2_megatron.checkpoint.saved_config import read_config  # noqa: E402
from umv2_megatron.checkpoint.store import CheckpointError, CheckpointStore  # noqa: E402
from umv2_megatron.commands import convert_checkpoint, inspect_checkpoint  # noqa: E402

ITERATION = 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A --save directory with one checkpoint."""
    return saved(tmp_path_factory.mktemp("saved"), vocab_size=64)


@pytest.fixture(scope="module")
def export(checkpoint: Path) -> Path:
    """An export of it, in two files and an index."""
    folder = checkpoint.parent / "export"
    argv = ["to-hf", "--load", str(checkpoint), "--save", str(folder), "--max-shard-size", "40KB"]
    assert run_tool_with(convert_checkpoint.parser(), convert_checkpoint.main, argv).code == 0
    assert (folder / "model.safetensors.index.json").exists()
    return folder


def put(directory: Path, name: str, data: bytes) -> None:
    """Put ``data`` in the place of a file of the checkpoint in ``directory``, in the manifest as well."""
    (directory / name).write_bytes(data)
    manifest = json.loads((directory / "manifest.json").read_bytes())
    manifest["files"][name] |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    put_manifest(directory, as_text(manifest))


def put_manifest(directory: Path, data: bytes) -> None:
    """Write the manifest and its hash."""
    (directory / "manifest.json").write_bytes(data)
    (directory / "manifest.sha256").write_text(f"{hashlib.sha256(data).hexdigest()}  manifest.json\n")


def names_a_file(outcome: Outcome, folder: Path) -> None:
    """A refusal says which file is at fault."""
    assert not outcome.code or str(folder) in outcome.err, outcome


def inspect(save: Path) -> None:
    """Inspect, with and without hashes."""
    for flags in ([], ["--verify"]):
        names_a_file(run_tool_with(inspect_checkpoint.parser(), inspect_checkpoint.main, [str(save), *flags]), save)


def convert(load: Path, command: str, place: Path, *flags: str) -> None:
    """Convert into ``place``; where that is refused, nothing may be there that looks whole."""
    shutil.rmtree(place, ignore_errors=True)
    argv = [command, "--load", str(load), "--save", str(place), *flags]
    outcome = run_tool_with(convert_checkpoint.parser(), convert_checkpoint.main, argv)
    names_a_file(outcome, load)
    if outcome.code:
        whole = [*place.glob("model.safetensors.index.json"), *place.glob("iter_*")] if place.is_dir() else []
        assert not whole, (whole, outcome)


def copied(save: Path, place: Path) -> tuple[Path, Path]:
    """A copy of a --save directory, and its checkpoint."""
    shutil.copytree(save, place)
    return place, CheckpointStore(place).path(ITERATION)


def test_odd_manifests(checkpoint: Path, tmp_path: Path) -> None:
    save, directory = copied(checkpoint, tmp_path / "copy")
    good = json.loads((directory / "manifest.json").read_bytes())

    @drawing(80)
    @given(damaged_json(good))
    def check(document: Any) -> None:
        put_manifest(directory, as_text(document))
        try:
            CheckpointStore(save, warn=lambda text: None).verify(ITERATION)
        except CheckpointError as error:
            assert str(directory) in str(error) and "\n" not in str(error), error

    check()


@pytest.mark.parametrize("changes", cases("manifests"), ids=str)
def test_manifests_that_once_failed(changes: dict[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    save, directory = copied(checkpoint, tmp_path / "copy")
    put_manifest(directory, as_text({**json.loads((directory / "manifest.json").read_bytes()), **changes}))
    with pytest.raises(CheckpointError, match=str(directory)):
        CheckpointStore(save, warn=lambda text: None).verify(ITERATION)


@pytest.mark.parametrize("changes", cases("configs"), ids=str)
def test_configurations_that_once_failed(changes: dict[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    save, directory = copied(checkpoint, tmp_path / "copy")
    put(directory, "config.json", as_text({**json.loads((directory / "config.json").read_bytes()), **changes}))
    inspect(save)
    with pytest.raises(CheckpointError, match=str(directory)):
        read_config(CheckpointStore(save), ITERATION)["values"]["hidden_size"]
    convert(save, "to-hf", tmp_path / "export")


@pytest.mark.slow
def test_a_null_in_the_place_of_each_setting(checkpoint: Path, tmp_path: Path) -> None:
    save, directory = copied(checkpoint, tmp_path / "copy")
    good = json.loads((directory / "config.json").read_bytes())
    assert len(good["values"]) > 300
    for key in good["values"]:
        put(directory, "config.json", as_text({**good, "values": {**good["values"], key: None}}))
        convert(save, "to-hf", tmp_path / "export")


def test_manifests_of_any_bytes(checkpoint: Path, tmp_path: Path) -> None:
    save, directory = copied(checkpoint, tmp_path / "copy")

    @drawing(40)
    @given(damaged_bytes((directory / "manifest.json").read_bytes()))
    def check(data: bytes) -> None:
        put_manifest(directory, data)
        inspect(save)

    check()


@pytest.mark.parametrize("name", ["config.json", "metadata.json"])
def test_odd_json_of_checkpoints(name: str, checkpoint: Path, tmp_path: Path) -> None:
    save, directory = copied(checkpoint, tmp_path / "copy")

    @drawing(12)
    @given(damaged_json(json.loads((directory / name).read_bytes())))
    def check(document: Any) -> None:
        put(directory, name, as_text(document))
        inspect(save)
        convert(save, "to-hf", tmp_path / "export")

    check()


@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp", "config.json"])
def test_damaged_files_of_checkpoints(name: str, checkpoint: Path, tmp_path: Path) -> None:
    save, directory = copied(checkpoint, tmp_path / "copy")

    @drawing(12)
    @given(damaged_bytes((directory / name).read_bytes(), head=512))
    def check(data: bytes) -> None:
        put(directory, name, data)
        inspect(save)
        convert(save, "to-hf", tmp_path / "export")

    check()


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "config.json"])
def test_odd_json_of_exports(name: str, export: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(export, tmp_path / "copy"))

    @drawing(12)
    @given(damaged_json(json.loads((copy / name).read_bytes())))
    def check(document: Any) -> None:
        (copy / name).write_bytes(as_text(document))
        convert(copy, "from-hf", tmp_path / "back")

    check()


def test_damaged_tensors_of_exports(export: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(export, tmp_path / "copy"))
    shard = sorted(copy.glob("*.safetensors"))[0]
    good = shard.read_bytes()

    @drawing(12)
    @given(damaged_bytes(good, head=1024))
    def check(data: bytes) -> None:
        shard.write_bytes(data)
        convert(copy, "from-hf", tmp_path / "back")

    check()
