"""A Hugging Face export to a checkpoint that ``pretrain_umv2.py --load DIR --finetune`` takes in any layout.

Tensors are written as rectangles of some rows each, which any layout reads. As in the other direction finished files
are noted with their hashes, beside the unfinished checkpoint, so that a conversion that was killed goes on. The store
then publishes the checkpoint as it publishes those of a training run.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from umv2_megatron import __version__
from umv2_megatron.checkpoint import saved_config
from umv2_megatron.checkpoint.save_lock import SaveLock
from umv2_megatron.checkpoint.store import CheckpointStore
from umv2_megatron.checkpoint.torch_dist_io import COMMON_FILE, FORMAT_FILE, count_written, format_text
from umv2_megatron.config.resolve import from_layers
from umv2_megatron.conversion.checkpoint_tensors import ShardWriter, write_metadata
from umv2_megatron.conversion.export_files import ExportTensors, verify_manifest
from umv2_megatron.conversion.journal import Journal, check_space, write_json
from umv2_megatron.conversion.plan import (
    BLOCK_BYTES,
    Copy,
    Piece,
    assemble,
    check_source,
    copies_to_megatron,
    part_shape,
)
from umv2_megatron.conversion.progress import Progress
from umv2_megatron.conversion.safetensors_files import DTYPES, ConversionError
from umv2_megatron.conversion.settings import megatron_values, read_hf_config, sizes_of
from umv2_megatron.conversion.tokenizer_files import CHAT_TEMPLATE
from umv2_megatron.durable_files import fsync_path, remove_path, sha256_of, write_synced
from umv2_megatron.hf.name_table import pairings
from umv2_megatron.user_paths import is_remote

ITERATION = 0
"""A run that starts from the checkpoint counts its own iterations from here."""
_TRAINED = (torch.float32, torch.bfloat16)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", CHAT_TEMPLATE)


def import_export(
    export: Path,
    save: Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 4 * 10**9,
    say: Callable[[str], None] = print,
) -> Path:
    """Write a checkpoint of the export's weights into the checkpoint directory ``save``; returns its iter_* directory.

    ``dtype`` float32 or bfloat16 replaces the export's. Raises ``ConversionError`` naming the file or tensor at fault,
    ``CheckpointError`` where ``save`` holds checkpoints already or cannot be written; nothing is then published.
    """
    store = CheckpointStore(save)
    if store.iterations():
        raise ConversionError(f"{save} holds checkpoints already; give a directory that has none")
    tensors = ExportTensors(export)
    try:
        if tensors.unread:
            say(f"not read, as they are pickles and no weights: {', '.join(tensors.unread)}")
        verify_manifest(export, say)
        config = read_hf_config(export)
        stored = dtype_of(export, config, tensors)
        wanted = dtype or (stored if stored in _TRAINED else torch.float32)
        values = megatron_values(config)
        pairs = list(pairings(sizes_of(values, config.vocab_size, config.memory_table_chunk_rows)))
        expected = {part.name: (part_shape(p, part), p.dtype, False) for p in pairs for part in p.parts}
        check_source(tensors.tensors, expected, stored, str(export))
        copies = copies_to_megatron(pairs, tensors.tensors, wanted)
        if is_remote(save):
            with store.lock():
                return _send(tensors, copies, values, wanted, store, max_shard_bytes, say)
        save.mkdir(parents=True, exist_ok=True)
        with SaveLock(save / ".lock", 5.0):
            return _write(tensors, copies, values, wanted, store, max_shard_bytes, say)
    finally:
        tensors.close()


def dtype_of(export: Path, config: Any, tensors: ExportTensors) -> torch.dtype:
    """The dtype that the configuration states for the weights; without one, that of the embedding."""
    dtype = config.dtype
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    if dtype is None and "model.embed_tokens.weight" in tensors.tensors:
        dtype = tensors.tensors["model.embed_tokens.weight"].dtype
    if dtype not in (*_TRAINED, torch.float16):
        known = ", ".join(str(each).removeprefix("torch.") for each in DTYPES.values() if each.is_floating_point)
        raise ConversionError(f"{export}/config.json gives the dtype {config.dtype}; expected one of {known}")
    return dtype


def _write(
    tensors: ExportTensors,
    copies: list[Copy],
    values: dict[str, Any],
    dtype: torch.dtype,
    store: CheckpointStore,
    max_shard_bytes: int,
    say: Callable[[str], None],
) -> Path:
    work = store.root / f".converting_{store.path(ITERATION).name}"
    unpublished = store.temporary_path(ITERATION)
    notes = store.root / f"{work.name}.json"
    if unpublished.exists() and notes.exists() and not work.exists():
        os.rename(unpublished, work)  # killed while it was being published
    work.mkdir(exist_ok=True)
    files = list(_files_of(copies, max_shard_bytes))
    source = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in tensors.directory.iterdir()}
    journal = Journal(notes, {"source": source, "dtype": str(dtype), "files": [str(file) for file in files]})
    names = [f"__0_{number}.distcp" for number in range(len(files))]
    for path in work.iterdir():
        if path.name not in names:
            remove_path(path)
    total = sum(copy.info.num_bytes for copy in copies)
    check_space(work, total - sum(path.stat().st_size for path in work.iterdir()))
    with Progress("tensors", total) as progress:
        for name, file in zip(names, files):
            if journal.has(work / name):
                say(f"{name} is there already: {len(file)} parts")
                progress.add(sum(rows * copy.info.row_bytes for copy, _, rows in file))
                continue
            _write_file(tensors, file, work / name, journal, progress)
            say(f"{name}: {len(file)} parts, {(work / name).stat().st_size:,} bytes")
    described = {copy.name: copy.info for copy in copies}
    write_metadata(work, described, [(name, journal.files[name]["stored"]) for name in names])
    _write_common(work, values, dtype, tensors.directory, store)
    remove_path(unpublished)
    os.rename(work, unpublished)
    fsync_path(store.root)
    final = store.publish(ITERATION, num_keys=len(described), tensor_bytes=total, count=count_written)
    remove_path(notes)
    return final


def _send(
    tensors: ExportTensors,
    copies: list[Copy],
    values: dict[str, Any],
    dtype: torch.dtype,
    store: CheckpointStore,
    max_shard_bytes: int,
    say: Callable[[str], None],
) -> Path:
    """``_write`` behind a URL: the files are sent as they are made, without notes, so one that was killed begins anew.

    Raises ``CheckpointError`` where the store fails.
    """
    total = sum(copy.info.num_bytes for copy in copies)
    described = {copy.name: copy.info for copy in copies}
    work = store.begin(ITERATION, total)
    sealed, shards = {}, []
    try:
        with Progress("tensors", total) as progress:
            for number, file in enumerate(_files_of(copies, max_shard_bytes)):
                name = f"__0_{number}.distcp"
                writer = _write_rows(tensors, file, work / name, progress)
                assert writer.seal is not None
                sealed[name] = writer.seal
                shards.append((name, writer.stored))
                say(f"{name}: {len(file)} parts, {writer.seal[0]:,} bytes")
        write_metadata(work, described, shards)
        _write_common(work, values, dtype, tensors.directory, store)
    except BaseException as error:
        store.discard(ITERATION)
        if isinstance(error, OSError):
            raise store.explain(error, f"could not write {work}") from error
        raise
    say(f"the tokenizer stays in {tensors.directory.absolute()}; where it moves, give --tokenizer-model")
    return store.publish(
        ITERATION, num_keys=len(described), tensor_bytes=total, count=count_written, sealed=sealed
    )


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
    tensors: ExportTensors, file: list[tuple[Copy, int, int]], path: Path, journal: Journal, progress: Progress
) -> None:
    remove_path(path)
    stored = _write_rows(tensors, file, path, progress).stored
    journal.add(path.name, path.stat().st_size, sha256_of(path), stored=stored)


def _write_rows(
    tensors: ExportTensors, file: list[tuple[Copy, int, int]], path: Path, progress: Progress
) -> ShardWriter:
    """Write one shard file; returns what its writer knows of it."""
    writer = ShardWriter(path)
    try:
        for copy, first, rows in file:
            block: tuple[Piece, ...]
            (block,) = copy.blocks(first, first + rows, rows)
            part = assemble(tensors.rows, block, copy.info.dtype)
            writer.write(copy.name, first, part)
            progress.add(part.nbytes)
    except BaseException:
        writer.abandon()
        raise
    writer.close()
    return writer


def _write_common(work: Path, values: dict[str, Any], dtype: torch.dtype, export: Path, store: CheckpointStore) -> None:
    """The files that say what the checkpoint is, and the tokenizer beside it."""
    tokenizer: dict[str, Any] = {"tokenizer_type": "NullTokenizer", "vocab_size": values["vocab_size"] - 1}
    if (export / _TOKENIZER_FILES[0]).is_file():
        folder = export.absolute()
        if not is_remote(store.root):  # tokenizers are read from local disks alone
            folder = store.root.absolute() / "tokenizer"
            folder.mkdir(exist_ok=True)
            for name in _TOKENIZER_FILES:
                if (export / name).is_file():
                    shutil.copyfile(export / name, folder / name)
        # Many models have more rows than their tokenizer has ids.
        tokenizer = {
            "tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(folder),
            "vocab_size": values["vocab_size"],
        }  # fmt: skip
    made = {**values, **tokenizer, "bf16": dtype == torch.bfloat16, "make_vocab_size_divisible_by": 1}
    run = from_layers([(f"export in {export}", made)], world_size=1, for_training=False)
    config = {
        "format": 1,
        "version": __version__,
        "values": yaml.safe_load(run.to_yaml()),
        "data": {},
        "world_size": 1,
        "tokenizer_vocab_size": values["vocab_size"],
        "padded_vocab_size": values["vocab_size"],
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
