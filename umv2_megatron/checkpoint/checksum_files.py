"""Checksums of the stored parts of tensors, taken before they left memory (`tensor_checks.py`), beside each shard:

    __3_0.distcp  __3_0.checksums.json      {"checksum": "words64", "parts": {position in the shard: checksum}}

and small files of a checkpoint, hashed as they are read.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from umv2_megatron.checkpoint.manifest import Manifest
from umv2_megatron.checkpoint.tensor_checks import CHECKSUM
from umv2_megatron.durable_files import CheckpointError, DamageError, unreadable

SHARD = ".distcp"
CHECKSUMS = ".checksums.json"


def checksums_name(shard: str) -> str:
    """The file with the checksums of a shard file's parts."""
    return shard.removesuffix(SHARD) + CHECKSUMS


def checksums_text(checksums: dict[int, str]) -> bytes:
    """Content of the file with the checksums of parts by position in the shard."""
    parts = {str(position): checksum for position, checksum in checksums.items()}
    return (json.dumps({"checksum": CHECKSUM, "parts": parts}, indent=0) + "\n").encode()


def check_hash(path: Path, actual: str, expected: str) -> None:
    """Raise DamageError naming the file where its SHA-256 is not the manifest's."""
    if actual != expected:
        raise DamageError(f"{path} has SHA-256 {actual}: the manifest says {expected}")


def read_verified(directory: Path, name: str, manifest: Manifest) -> bytes:
    """A small file of a checkpoint, hashed as it was read. Raises DamageError naming it."""
    path = directory / name
    if name not in manifest.files:
        raise DamageError(f"{path} is not in the manifest")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    check_hash(path, hashlib.sha256(data).hexdigest(), manifest.files[name][1])
    return data


class Checksums:
    """The checksums of the stored parts of one checkpoint; reads a shard's file when it is first asked for."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._directory = directory
        self._manifest = manifest
        self._of_shard: dict[str, dict[str, str] | None] = {}
        self.bytes_read = 0

    def of(self, shard: str, position: int) -> str | None:
        """Of the part that begins at ``position`` of a shard file; None where the shard has none, but was hashed.

        Raises DamageError naming the file where it lacks this part.
        """
        if shard not in self._of_shard:
            self._of_shard[shard] = self._read(shard)
        held = self._of_shard[shard]
        if held is None:
            return None
        if str(position) not in held:
            raise DamageError(f"{self._directory / checksums_name(shard)} has no checksum of the part at {position}")
        return held[str(position)]

    def _read(self, shard: str) -> dict[str, str] | None:
        name = checksums_name(shard)
        if name not in self._manifest.files:
            return None
        data = read_verified(self._directory, name, self._manifest)
        self.bytes_read += len(data)
        try:
            held: Any = json.loads(data)
            kind, parts = held["checksum"], held["parts"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{self._directory / name} holds no checksums: {error!r}") from error
        if kind != CHECKSUM or not isinstance(parts, dict):
            raise CheckpointError(f"{self._directory / name} has checksums of kind {kind!r}; expected {CHECKSUM!r}")
        return parts
