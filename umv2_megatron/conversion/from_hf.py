"""A Hugging Face export to a checkpoint that ``pretrain_umv2.py --load DIR --finetune`` takes in any layout.

Every tensor is checked against what config.json says before a byte moves; ``checkpoint_files`` writes the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from umv2_megatron.conversion.checkpoint_files import NewCheckpoint, empty_store, write_checkpoint
from umv2_megatron.conversion.export_files import ExportTensors, verify_manifest
from umv2_megatron.conversion.plan import check_source, copies_to_megatron, part_shape
from umv2_megatron.conversion.safetensors_files import DTYPES, ConversionError
from umv2_megatron.conversion.settings import megatron_values, read_hf_config, sizes_of
from umv2_megatron.hf.name_table import pairings

TRAINED = (torch.float32, torch.bfloat16)
"""Dtypes of weights in training."""


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
    empty_store(save)
    tensors = ExportTensors(export)
    try:
        if tensors.unread:
            say(f"not read, as they are pickles and no weights: {', '.join(tensors.unread)}")
        verify_manifest(export, say)
        config = read_hf_config(export)
        stored = dtype_of(export, config, tensors)
        wanted = dtype or (stored if stored in TRAINED else torch.float32)
        values = megatron_values(config)
        pairs = list(pairings(sizes_of(values, config.vocab_size, config.memory_table_chunk_rows)))
        expected = {part.name: (part_shape(p, part), p.dtype, False) for p in pairs for part in p.parts}
        check_source(tensors.tensors, expected, stored, str(export))
        copies = copies_to_megatron(pairs, tensors.tensors, wanted)
        return write_checkpoint(tensors, NewCheckpoint(values, wanted, copies, max_shard_bytes), save, say)
    finally:
        tensors.close()


def dtype_of(export: Path, config: Any, tensors: ExportTensors) -> torch.dtype:
    """The dtype that the configuration states for the weights; without one, that of the embedding."""
    dtype = config.dtype
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    if dtype is None and "model.embed_tokens.weight" in tensors.tensors:
        dtype = tensors.tensors["model.embed_tokens.weight"].dtype
    if dtype not in (*TRAINED, torch.float16):
        known = ", ".join(str(each).removeprefix("torch.") for each in DTYPES.values() if each.is_floating_point)
        raise ConversionError(f"{export}/config.json gives the dtype {config.dtype}; expected one of {known}")
    return dtype
