"""A checkpoint directory written from rows of other tensors, block by block; what conversions to checkpoints share.

Tensors are written as rectangles of some rows each, which any layout reads. Finished files are noted with their hashes,
beside the unfinished checkpoint, so that a conversion that was killed goes on. The store then publishes the checkpoint
as it publishes those of a training run.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml

from umv2_megatron import __version__
from umv2_megatron.checkpoint import saved_config
from umv2_megatron.checkpoint.save_lock import SaveLock
from umv2_megatron.checkpoint.store import CheckpointStore
from umv2_megatron.checkpoint.torch_dist_io import COMMON_FILE, FORMAT_FILE, count_written, format_text
from umv2_megatron.config.resolve import from_layers
from umv2_megatron.conversion.checkpoint_tensors import ShardWriter, write_metadata
from umv2_megatron.conversion.journal import Journal, check_space, write_json
from umv2_megatron.conversion.plan import BLOCK_BYTES, Copy, Piece, assemble
from umv2_megatron.conversion.progress import Progress
from umv2_megatron.conversion.safetensors_files import ConversionError, TensorInfo
from umv2_megatron.conversion.tokenizer_files import CHAT_TEMPLATE
from umv2_megatron.durable_files import fsync_path, remove_path, sha256_of, write_synced
from umv2_megatron.user_paths import is_remote

ITERATION = 0
"""A run that starts from the checkpoint counts its own iterations from here."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", CHAT_TEMPLATE)
SENTENCEPIECE = "tokenizer.model"


class RowSource(Protocol):
    """Tensors that can be read by rows; ``directory`` holds their files and the tokenizer."""

    directory: Path
    tensors: dict[str, TensorInfo]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor, contiguous."""


@dataclass(frozen=True)
class NewCheckpoint:
    """What is to be written: settings by key, the dtype of the weights, the tensors' rows, and whatever else decides
    them (``job``)."""

    values: dict[str, Any]
    dtype: torch.dtype
    copies: list[Copy]
    max_shard_bytes: int
    with_tokenizer: bool = True
    job: dict[str, Any] = field(default_factory=dict)


def write_checkpoint(source: RowSource, made: NewCheckpoint, save: Path, say: Callable[[str], None] = print) -> Path:
    """Write ``made`` into the checkpoint directory ``save``; returns its iter_* directory.

    Raises ``ConversionError`` naming the file or tensor at fault, ``CheckpointError`` where ``save`` cannot be written;
    nothing is then published.
    """
    store = empty_store(save)
    if is_remote(save):
        with store.lock():
            return _send(source, made, store, say)
    save.mkdir(parents=True, exist_ok=True)
    with SaveLock(save / ".lock", 5.0):
        return _write(source, made, store, say)


def empty_store(save: Path) -> CheckpointStore:
    """The store of ``save``. Raises ``ConversionError`` where it holds checkpoints already."""
    store = CheckpointStore(save)
    if store.iterations():
        raise ConversionError(f"{save} holds checkpoints already; give a directory that has none")
    return store


def _write(source: RowSource, made: NewCheckpoint, store: CheckpointStore, say: Callable[[str], None]) -> Path:
    work = store.root / f".converting_{store.path(ITERATION).name}"
    unpublished = store.temporary_path(ITERATION)
    notes = store.root / f"{work.name}.json"
    if unpublished.exists() and notes.exists() and not work.exists():
        os.rename(unpublished, work)  # killed while it was being published
    work.mkdir(exist_ok=True)
    files = list(_files_of(made.copies, made.max_shard_bytes))
    read = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in source.directory.iterdir()}
    job = {"source": read, "dtype": str(made.dtype), "files": [str(file) for file in files], **made.job}
    journal = Journal(notes, job)
    names = [f"__0_{number}.distcp" for number in range(len(files))]
    for path in work.iterdir():
        if path.name not in names:
            remove_path(path)
    total = sum(copy.info.num_bytes for copy in made.copies)
    check_space(work, total - sum(path.stat().st_size for path in work.iterdir()))
    with Progress("tensors", total) as progress:
        for name, file in zip(names, files):
            if journal.has(work / name):
                say(f"{name} is there already: {len(file)} parts")
                progress.add(sum(rows * copy.info.row_bytes for copy, _, rows in file))
                continue
            _write_file(source, file, work / name, journal, progress)
            say(f"{name}: {len(file)} parts, {(work / name).stat().st_size:,} bytes")
    described = {copy.name: copy.info for copy in made.copies}
    write_metadata(work, described, [(name, journal.files[name]["stored"]) for name in names])
    _write_common(work, made, source.directory, store)
    remove_path(unpublished)
    os.rename(work, unpublished)
    fsync_path(store.root)
    final = store.publish(ITERATION, num_keys=len(described), tensor_bytes=total, count=count_written)
    remove_path(notes)
    return final


def _send(source: RowSource, made: NewCheckpoint, store: CheckpointStore, say: Callable[[str], None]) -> Path:
    """``_write`` behind a URL: the files are sent as they are made, without notes, so one that was killed begins anew.

    Raises ``CheckpointError`` where the store fails.
    """
    total = sum(copy.info.num_bytes for copy in made.copies)
    described = {copy.name: copy.info for copy in made.copies}
    work = store.begin(ITERATION, total)
    sealed, shards = {}, []
    try:
        with Progress("tensors", total) as progress:
            for number, file in enumerate(_files_of(made.copies, made.max_shard_bytes)):
                name = f"__0_{number}.distcp"
                writer = _write_rows(source, file, work / name, progress)
                assert writer.seal is not None
                sealed[name] = writer.seal
                shards.append((name, writer.stored))
                say(f"{name}: {len(file)} parts, {writer.seal[0]:,} bytes")
        write_metadata(work, described, shards)
        _write_common(work, made, source.directory, store)
    except BaseException as error:
        store.discard(ITERATION)
        if isinstance(error, OSError):
            raise store.explain(error, f"could not write {work}") from error
        raise
    if made.with_tokenizer:
        say(f"the tokenizer stays in {source.directory.absolute()}; where it moves, give --tokenizer-model")
    return store.publish(ITERATION, num_keys=len(described), tensor_bytes=total, count=count_written, sealed=sealed)


def _files_of(copies: list[Copy], max_shard_bytes: int) -> Iterator[list[tuple[Copy, int, int]]]:
    """Rectangles (tensor, first row, rows) of at most ``BLOCK_BYTES``, grouped into files."""
    file: list[tuple[Copy, int, int]] = []
    size = 0
    for copy in copies:
        step = max(1, BLOCK_BYTES // max(1, copy.info.row_bytes))
        for first in range(0, copy.info.rows, step):
            rows = min(step, copy.info.rows - first)
            if file and size + rows * copy.info.row_bytes > max_shard_bytes:
                yield file
                file, size = [], 0
            file.append((copy, first, rows))
            size += rows * copy.info.row_bytes
    if file:
        yield file


def _write_file(
    source: RowSource, file: list[tuple[Copy, int, int]], path: Path, journal: Journal, progress: Progress
) -> None:
    remove_path(path)
    stored = _write_rows(source, file, path, progress).stored
    journal.add(path.name, path.stat().st_size, sha256_of(path), stored=stored)


def _write_rows(source: RowSource, file: list[tuple[Copy, int, int]], path: Path, progress: Progress) -> ShardWriter:
    """Write one shard file; returns what its writer knows of it."""
    writer = ShardWriter(path)
    try:
        for copy, first, rows in file:
            block: tuple[Piece, ...]
            (block,) = copy.blocks(first, first + rows, rows)
            part = assemble(source.rows, block, copy.info.dtype)
            writer.write(copy.name, first, part)
            progress.add(part.nbytes)
    except BaseException:
        writer.abandon()
        raise
    writer.close()
    return writer


def tokenizer_settings(folder: Path, vocab_size: int, with_tokenizer: bool = True) -> dict[str, Any]:
    """Settings by key of the tokenizer whose files are in ``folder``, for a model of ``vocab_size`` tokens; those of a
    NullTokenizer where there is none."""
    # Many models have more rows than their tokenizer has ids.
    if with_tokenizer and (folder / _TOKENIZER_FILES[0]).is_file():
        kind, model = "HuggingFaceTokenizer", folder
    elif with_tokenizer and (folder / SENTENCEPIECE).is_file():
        kind, model = "SentencePieceTokenizer", folder / SENTENCEPIECE
    else:
        return {"tokenizer_type": "NullTokenizer", "vocab_size": vocab_size - 1}
    return {"tokenizer_type": kind, "tokenizer_model": str(model), "vocab_size": vocab_size}


def _write_common(work: Path, made: NewCheckpoint, source: Path, store: CheckpointStore) -> None:
    """The files that say what the checkpoint is, and the tokenizer beside it."""
    vocabulary = made.values["vocab_size"]
    folder = source.absolute()
    tokenizer = tokenizer_settings(folder, vocabulary, made.with_tokenizer)
    if tokenizer["tokenizer_type"] != "NullTokenizer" and not is_remote(store.root):
        # tokenizers are read from local disks alone
        folder = store.root.absolute() / "tokenizer"
        folder.mkdir(exist_ok=True)
        for name in (*_TOKENIZER_FILES, SENTENCEPIECE):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        tokenizer = tokenizer_settings(folder, vocabulary)
    bf16 = made.dtype == torch.bfloat16
    values = {**made.values, **tokenizer, "bf16": bf16, "make_vocab_size_divisible_by": 1}
    run = from_layers([(f"model in {source}", values)], world_size=1, for_training=False)
    config = {
        "format": 1,
        "version": __version__,
        "values": yaml.safe_load(run.to_yaml()),
        "data": {},
        "world_size": 1,
        "tokenizer_vocab_size": vocabulary,
        "padded_vocab_size": vocabulary,
    }
    write_json(work / saved_config.CONFIG_FILE, config)
    layout = {"world": 1, "tensor": 1, "pipeline": 1, "virtual pipeline": 1, "context": 1, "memory": 1}
    common = {
        "iteration": ITERATION,
        "checkpoint_version": 3.0,
        "layout": layout,
        "extra_state": {},
        "content_metadata": {"non_homogeneous_layers": True, "singleton_local_shards": False},
    }
    stream = io.BytesIO()
    torch.save(common, stream)
    write_synced(work / COMMON_FILE, stream.getvalue())
    write_synced(work / FORMAT_FILE, format_text())
