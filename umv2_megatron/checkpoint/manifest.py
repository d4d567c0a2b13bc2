"""The manifest of a checkpoint: names, sizes and SHA-256 of its files, which prove that it is whole.

    manifest.json     size and SHA-256 of every file, number of keys, tensor bytes
    manifest.sha256   SHA-256 of manifest.json itself

Written last and in this order, so that a directory with both was complete; read before any file of it is trusted.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umv2_megatron.durable_files import (
    CheckpointError,
    FilesNow,
    check_relative_path,
    fsync_path,
    sha256_of,
    sizes_below,
    unreadable,
    write_synced,
)

MANIFEST = "manifest.json"
MANIFEST_HASH = "manifest.sha256"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """What a published checkpoint consists of.

    files: relative POSIX path -> (size in bytes, SHA-256 in hex); num_keys: tensors and objects; tensor_bytes: bytes
    of tensor data, both of what was written.
    """

    iteration: int
    num_keys: int
    tensor_bytes: int
    files: dict[str, tuple[int, str]]


def write_manifest(
    directory: Path,
    iteration: int,
    num_keys: int,
    tensor_bytes: int,
    *,
    sealed: Mapping[str, tuple[int, str]],
    threads: int,
    stage: Callable[[str], None],
    confirm: Callable[[], None],
) -> None:
    """Prove the files of `directory`: sync and hash every one, with `threads` at once, then write both manifest files.

    sealed: size and SHA-256 of files that were hashed while they were written, and synced; they are not read. stage:
    called with the name of every step just after it is done. confirm: called before the last file, which makes the
    directory a checkpoint; it raises where that must not be. Raises OSError, and CheckpointError for a sealed file that
    is not there in its size.
    """
    sizes = sizes_below(directory)
    names = sorted(sizes)
    assert MANIFEST not in names and MANIFEST_HASH not in names, "temporary directory was published before"
    for name in sorted(sealed.keys() - set(names)):
        raise CheckpointError(f"{directory / name} is missing: {sealed[name][0]} bytes of it were written; save again")

    def seal(name: str) -> dict[str, Any]:
        path, size = directory / name, sizes[name]
        if name not in sealed:
            fsync_path(path)
            return {"size": size, "sha256": sha256_of(path)}
        if size != sealed[name][0]:
            raise CheckpointError(f"{path} has {size} bytes: {sealed[name][0]} were written; save again")
        return {"size": size, "sha256": sealed[name][1]}

    with ThreadPoolExecutor(threads) as pool:
        files = dict(zip(names, pool.map(seal, names)))
    for below in {(directory / name).parent for name in names} - {directory}:
        fsync_path(below)
    stage("files-synced")
    manifest = {
        "format": FORMAT,
        "iteration": iteration,
        "num_keys": num_keys,
        "tensor_bytes": tensor_bytes,
        "files": files,
    }
    data = (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()
    write_synced(directory / MANIFEST, data)
    stage("manifest-written")
    confirm()
    write_synced(directory / MANIFEST_HASH, _manifest_hash_line(data))
    fsync_path(directory)
    stage("manifest-synced")


def check_files(directory: Path, iteration: int, *, hashes: bool, threads: int) -> Manifest:
    """The manifest of the checkpoint in `directory`, once it has proved the files; see `CheckpointStore.verify`.

    threads: files that are hashed at once.
    """
    try:
        manifest = _read_manifest(directory, iteration)
        sizes = sizes_below(directory)
        present = sizes.keys() - {MANIFEST, MANIFEST_HASH}
        for name in sorted(manifest.files.keys() - present):
            raise CheckpointError(f"{directory / name} is missing: the manifest lists it")
        for name in sorted(present - manifest.files.keys()):
            raise CheckpointError(f"{directory / name} is not in the manifest")
        for name, (size, _) in sorted(manifest.files.items()):
            if sizes[name] != size:
                raise CheckpointError(f"{directory / name} has {sizes[name]} bytes: the manifest says {size}")
        if hashes:
            _verify_hashes(directory, manifest, threads)
    except OSError as error:
        raise unreadable(directory, error) from error
    return manifest


def _verify_hashes(directory: Path, manifest: Manifest, threads: int) -> None:
    names = sorted(manifest.files)
    # A resume asks several times what to load; reading terabytes once is enough.
    present = FilesNow(directory, [*names, MANIFEST])
    if present.were_good():
        return
    with ThreadPoolExecutor(threads) as pool:
        actual = dict(zip(names, pool.map(lambda name: sha256_of(directory / name), names)))
    bad = [name for name in names if actual[name] != manifest.files[name][1]]
    if bad:
        others = f" ({len(bad) - 1} more files differ: {', '.join(bad[1:4])})" if len(bad) > 1 else ""
        raise CheckpointError(
            f"{directory / bad[0]} has SHA-256 {actual[bad[0]]}: the manifest says "
            f"{manifest.files[bad[0]][1]}{others}"
        )
    present.are_good()


def _read_manifest(directory: Path, iteration: int) -> Manifest:
    path = directory / MANIFEST
    for link in (directory, path, directory / MANIFEST_HASH):
        if link.is_symlink():
            raise CheckpointError(f"{link} is a symlink: checkpoints must be plain files")
    if not directory.is_dir():
        raise CheckpointError(f"{directory} does not exist")
    if not path.is_file() or not (directory / MANIFEST_HASH).is_file():
        raise CheckpointError(f"{directory} has no {MANIFEST} and {MANIFEST_HASH}: it was never published")
    data = path.read_bytes()
    expected = (directory / MANIFEST_HASH).read_bytes()
    if expected != _manifest_hash_line(data):
        raise CheckpointError(
            f"{path} has SHA-256 {hashlib.sha256(data).hexdigest()}: {MANIFEST_HASH} says "
            f"{expected[:64].decode('ascii', 'replace') or 'nothing'}"
        )
    try:
        content = json.loads(data)
        if content["format"] != FORMAT or content["iteration"] != iteration:
            raise CheckpointError(
                f"{path} is format {content['format']} of iteration {content['iteration']}: expected format "
                f"{FORMAT} of iteration {iteration}"
            )
        files = {str(name): (int(f["size"]), str(f["sha256"])) for name, f in content["files"].items()}
        manifest = Manifest(iteration, int(content["num_keys"]), int(content["tensor_bytes"]), files)
    except CheckpointError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a checkpoint manifest: {error!r}") from error
    for name in files:
        check_relative_path(name, path)
    return manifest


def _manifest_hash_line(data: bytes) -> bytes:
    """In the format of `sha256sum`, so that `sha256sum -c manifest.sha256` checks it by hand."""
    return f"{hashlib.sha256(data).hexdigest()}  {MANIFEST}\n".encode()
