"""A checkpoint of any parallel layout to a Hugging Face export.

The export is written in a hidden directory beside its place, file by file, each noted with its hash as soon as it is
safe; when all are there the directory gets its name. Killed anywhere, the conversion goes on from the files that were
noted. A manifest keeps the hashes for whoever reads the export later.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from umv2_megatron import __version__
from umv2_megatron.checkpoint import saved_config
from umv2_megatron.checkpoint.contents import TABLES
from umv2_megatron.checkpoint.manifest import Manifest
from umv2_megatron.checkpoint.store import CheckpointError, CheckpointStore
from umv2_megatron.checkpoint.torch_dist_io import is_extra_state, is_optimizer_state
from umv2_megatron.conversion.checkpoint_tensors import CheckpointTensors, damaged_tensors
from umv2_megatron.conversion.export_files import INDEX, copy_model_code, shard_names, write_config, write_manifest
from umv2_megatron.conversion.journal import Journal, check_space, digest_of, sole_user, write_json
from umv2_megatron.conversion.model_card import CARD, training_of, write_card
from umv2_megatron.conversion.plan import Copy, assemble, check_source, copies_to_hf, group_by_size
from umv2_megatron.conversion.progress import Progress
from umv2_megatron.conversion.safetensors_files import ConversionError, SafetensorsWriter
from umv2_megatron.conversion.settings import chunk_rows_below, hf_config, refuse_unsupported, sizes_of
from umv2_megatron.conversion.tokenizer_files import end_of_documents, export_tokenizer
from umv2_megatron.durable_files import fsync_path, remove_path
from umv2_megatron.hf.name_table import Pairing, pairings
from umv2_megatron.memory.singular_pair import leading_pair

_JOURNAL = "journal.json"
_SAME_VECTOR = 1e-6
"""Vectors nearer to each other than this are the same singular vector, computed twice."""


@dataclass(frozen=True)
class ExportOptions:
    """What the user may choose.

    dtype: of the weights, None keeps the checkpoint's; max_shard_bytes: largest file of tensors; tokenizer_model: the
    tokenizer's file where it is no longer where training found it; with_tokenizer: False leaves the tokenizer out, but
    its end-of-document token is still looked up; licence: what the model card states, None that there is none yet.
    """

    dtype: torch.dtype | None = None
    max_shard_bytes: int = 4 * 10**9
    tokenizer_model: str | None = None
    with_tokenizer: bool = True
    licence: str | None = None


@dataclass(frozen=True)
class Source:
    """An open checkpoint: its configuration, its tensors, how they pair with an export's, and the export's dtype."""

    config: dict[str, Any]
    tensors: CheckpointTensors
    pairings: list[Pairing]
    chunk_rows: int
    dtype: torch.dtype


def export_checkpoint(
    store: CheckpointStore, iteration: int, target: Path, options: ExportOptions, say: Callable[[str], None] = print
) -> None:
    """Write the export ``target`` of a published checkpoint; ``say`` gets a line for each file.

    Every byte of the checkpoint is verified first. Raises ``CheckpointError`` or ``ConversionError`` naming the file or
    tensor at fault, ``ValueError`` for a model or tokenizer that cannot be exported; ``target`` is then not there.
    """
    if target.exists():
        raise ConversionError(f"{target} exists already; give a directory that is not there yet")
    manifest = verified(store, iteration)
    work = target.absolute().parent / f".{target.name}.incomplete"
    source = open_source(store, iteration, options.dtype, None, options.max_shard_bytes)
    try:
        work.mkdir(parents=True, exist_ok=True)
        with sole_user(work):
            identity = {"iteration": iteration, "files_sha256": digest_of(manifest.files)}
            eod, hashed = _write_files(source, identity, work, options, say)
            write_config(work, hf_config(source.config, source.dtype, source.chunk_rows, eod))
            copy_model_code(work)
            write_manifest(work, hashed, {"checkpoint": identity, "umv2_megatron": __version__})
            # after the manifest: people edit it
            dtype = str(source.dtype).removeprefix("torch.")
            training = training_of(store.path(iteration), iteration)
            write_card(work, source.config, training, options.licence, dtype)
            fsync_path(work / CARD)
            os.rename(work, target)
    finally:
        source.tensors.close()
    fsync_path(target.absolute().parent)


def verified(store: CheckpointStore, iteration: int) -> Manifest:
    """Compare every file of a checkpoint with its hash. Raises ``CheckpointError`` naming the file, and the tensors."""
    try:
        return store.verify(iteration)
    except CheckpointError as error:
        names = damaged_tensors(store.path(iteration))
        if not names:
            raise
        raise CheckpointError(f"{error}; damaged: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}") from error


def open_source(
    store: CheckpointStore, iteration: int, dtype: torch.dtype | None, chunk_rows: int | None, max_bytes: int = 0
) -> Source:
    """Open a checkpoint and compare its tensors with what its configuration says; to be closed by the caller.

    ``dtype`` is the export's, None that of the checkpoint. ``chunk_rows`` are the rows of a chunk of a table; None
    gives those that fit into ``max_bytes``, or with 0 whole tables. Raises as ``export_checkpoint`` does.
    """
    config = saved_config.read_config(store, iteration)
    refuse_unsupported(config)
    values, directory = config["values"], store.path(iteration)
    stored = torch.bfloat16 if values["bf16"] else torch.float32
    dtype = dtype or stored
    if chunk_rows is None:
        chunk_rows = chunk_rows_below(values, max_bytes or 1 << 62, dtype.itemsize)
    pairs = list(pairings(sizes_of(values, config["tokenizer_vocab_size"], chunk_rows)))
    tensors = CheckpointTensors(directory)
    held = {key: info for key, info in tensors.tensors.items() if not (is_optimizer_state(key) or is_extra_state(key))}
    expected = {pair.key: (pair.shape, pair.dtype, pair.padded) for pair in pairs}
    check_source(held, expected, stored, str(directory))
    for key in held:
        tensors.check_covered(key)
    return Source(config, tensors, pairs, chunk_rows, dtype)


def _files_of(copies: list[Copy], largest: int) -> list[list[Copy]]:
    """The tensors of each file. Where there are several, value tables share none with other tensors: transformers keeps
    files mapped whose tensors it loaded, which would be a second mapping of tables that are read from their files."""
    if sum(copy.info.num_bytes for copy in copies) <= largest:
        return [copies]
    tables = [copy for copy in copies if TABLES.search(copy.name)]
    others = [copy for copy in copies if not TABLES.search(copy.name)]
    return group_by_size(others, largest) + group_by_size(tables, largest)


def _remove_leftovers(work: Path, kept: set[str]) -> None:
    """Files of another job, or of one that was killed while it wrote them."""
    for path in work.iterdir():
        if path.name not in kept:
            remove_path(path)


def _write_files(
    source: Source, identity: dict[str, Any], work: Path, options: ExportOptions, say: Callable[[str], None]
) -> tuple[int | None, dict[str, dict[str, Any]]]:
    """Write tensors and tokenizer; returns the end-of-document token and the manifest's entries of the former."""
    copies = copies_to_hf(source.pairings, source.tensors.tensors, source.dtype)
    groups = _files_of(copies, options.max_shard_bytes)
    layout = [[(copy.name, str(copy.info)) for copy in group] for group in groups]
    journal = Journal(work / _JOURNAL, {"checkpoint": identity, "tensors": layout})
    _remove_leftovers(work, {*shard_names(len(groups)), _JOURNAL})
    there = sum(path.stat().st_size for path in work.iterdir())
    check_space(work, sum(copy.info.num_bytes for copy in copies) - there)
    _write_tensors(source, groups, work, journal, say)
    if options.with_tokenizer:
        eod = export_tokenizer(source.config, work, options.tokenizer_model, say)
    else:
        eod = end_of_documents(source.config, options.tokenizer_model, say)
    remove_path(work / _JOURNAL)
    return eod, journal.files


def _write_tensors(
    source: Source, groups: list[list[Copy]], work: Path, journal: Journal, say: Callable[[str], None]
) -> None:
    names = shard_names(len(groups))
    total = sum(copy.info.num_bytes for group in groups for copy in group)
    with Progress("tensors", total) as progress:
        for name, group in zip(names, groups):
            if journal.has(work / name):
                say(f"{name} is there already: {len(group)} tensors")
                progress.add(sum(copy.info.num_bytes for copy in group))
                continue
            remove_path(work / name)
            with SafetensorsWriter(work / name, [(copy.name, copy.info) for copy in group]) as writer:
                for copy in group:
                    for part in parts(source, copy):
                        writer.write(copy.name, part)
                        progress.add(part.nbytes)
            journal.add(name, writer.size, writer.sha256, crc32=writer.crc32)
            say(f"{name}: {len(group)} tensors, {writer.size:,} bytes")
    if len(groups) > 1:
        weight_map = {copy.name: name for name, group in zip(names, groups) for copy in group}
        write_json(work / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def parts(source: Source, copy: Copy) -> Iterator[torch.Tensor]:
    """The rows of one tensor of the export, block by block."""
    key = copy.pieces[0].name
    if key.endswith((".retrieval.u", ".retrieval.t")):
        yield singular_vector(source.tensors, key, source.dtype)
        return
    for block in copy.blocks():
        yield assemble(source.tensors.rows, block, copy.info.dtype)


def singular_vector(tensors: CheckpointTensors, key: str, dtype: torch.dtype) -> torch.Tensor:
    """u or t of a memory layer, whichever ``key`` names, as of its cores in ``dtype``; float32 [h, R].

    A checkpoint holds those of the cores before its last step: whoever trains or loads it refreshes them before using
    them, and of an export nobody does. The common sign of the pair is that of the stored one. Raises
    ``ConversionError`` naming cores that are not finite.
    """
    prefix, which = key.rsplit(".", 1)
    cores, u, t = (
        tensors.rows(f"{prefix}.{name}", 0, tensors.tensors[f"{prefix}.{name}"].rows) for name in ("cores", "u", "t")
    )
    total = cores.to(dtype).sum(0, dtype=torch.float32)
    if not total.isfinite().all():
        raise ConversionError(
            f"{prefix}.cores holds numbers that are not finite in {str(dtype).removeprefix('torch.')}; choose another "
            "--dtype or an earlier --ckpt-step"
        )
    fresh, stored = torch.stack(leading_pair(total)), torch.stack([u, t])
    flipped = (fresh + stored).abs().sum((0, -1)) < (fresh - stored).abs().sum((0, -1))
    fresh = torch.where(flipped[None, :, None], -fresh, fresh)
    if (fresh - stored).abs().max() < _SAME_VECTOR:
        fresh = stored  # so that a round trip keeps every bit on any machine
    return fresh[("u", "t").index(which)].contiguous()
