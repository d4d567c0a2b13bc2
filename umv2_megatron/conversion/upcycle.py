"""Upcycling: a dense decoder of transformers becomes a checkpoint of an UltraMemV2 model, with new memory layers.

Attention, FFN, norms and embeddings are the source's, bit for bit; the memory layers are new (``new_memory``). Silent
ones leave the logits as they are. Every tensor is read, made and written by rows, so that memory does not grow with the
model; a conversion that was killed goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from umv2_megatron.config.flags import read_mapping
from umv2_megatron.config.presets import find_preset
from umv2_megatron.config.resolve import from_layers
from umv2_megatron.config.upcycle_options import OPTIONS
from umv2_megatron.config.variants import has_memory
from umv2_megatron.conversion.checkpoint_files import (
    NewCheckpoint,
    empty_store,
    tokenizer_settings,
    write_checkpoint,
)
from umv2_megatron.conversion.dense_models import DenseModel, DenseTensors, read_dense_model
from umv2_megatron.conversion.from_hf import TRAINED
from umv2_megatron.conversion.new_memory import NewMemory
from umv2_megatron.conversion.plan import check_source, copies_to_megatron, part_shape
from umv2_megatron.conversion.safetensors_files import ConversionError, TensorInfo
from umv2_megatron.conversion.settings import memory_config, sizes_of
from umv2_megatron.data.tokenizers import build_tokenizer
from umv2_megatron.hf.name_table import Pairing, pairings
from umv2_megatron.memory.layer import index_dtype

_MEMORY = ".memory."
# What a preset must share with the source: its memory was made for a decoder of these sizes.
_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")


@dataclass(frozen=True)
class UpcycleOptions:
    """What the user chooses: a preset's name, settings by key over it (of ``upcycle_options``), how memory layers
    start, the dtype of the weights (None keeps the source's), the largest file, and whether the tokenizer is taken
    along."""

    preset: str | None
    settings: dict[str, Any]
    start: str = "silent"
    dtype: torch.dtype | None = None
    max_shard_bytes: int = 4 * 10**9
    with_tokenizer: bool = True


def upcycle(source: Path, save: Path, options: UpcycleOptions, say: Callable[[str], None] = print) -> Path:
    """Write a checkpoint of the model in ``source`` with memory layers into ``save``; returns its iter_* directory.

    Raises ``ConversionError`` naming the file, setting or tensor at fault, ``UsageError`` naming a flag,
    ``CheckpointError`` where ``save`` holds checkpoints already or cannot be written; nothing is then published.
    """
    empty_store(save)
    model = read_dense_model(source)
    values = upcycled_values(model, options.preset, options.settings)
    _check_tokenizer(model, options.with_tokenizer)
    tensors = DenseTensors(model)
    try:
        if tensors.unread:
            say(f"not read, as they are pickles and no weights: {', '.join(tensors.unread)}")
        stored = tensors.dtype
        wanted = options.dtype or (stored if stored in TRAINED else torch.float32)
        pairs = list(pairings(sizes_of(values, values["vocab_size"], None)))
        check_source(tensors.tensors, dense_parts(model, pairs), stored, str(source))
        if model.zero_biases:
            say("biases that the source has not are zeros: training has them in all linear layers or in none")
        made = _Upcycled(tensors, pairs, values, wanted, options.start == "silent")
        job = {"values": values, "start": options.start}
        new = NewCheckpoint(
            values, wanted, copies_to_megatron(pairs, made.tensors, wanted), options.max_shard_bytes,
            options.with_tokenizer, job,
        )  # fmt: skip
        return write_checkpoint(made, new, save, say)
    finally:
        tensors.close()


def dense_parts(model: DenseModel, pairs: Iterable[Pairing]) -> dict[str, tuple[tuple[int, ...], str, bool]]:
    """Of the tensors that ``pairs`` name on the export's side, those that the source must have: name -> shape, kind of
    dtype, whether it may be padded (as ``check_source`` takes them)."""
    return {
        part.name: (part_shape(pair, part), pair.dtype, False)
        for pair in pairs
        for part in pair.parts
        if _MEMORY not in part.name and (not part.name.endswith("_proj.bias") or model.biases.has(part.name))
    }


def upcycled_values(model: DenseModel, preset: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by key of the upcycled model: the source's decoder, the memory layers of ``preset`` and ``settings``.

    Raises ``ConversionError`` where the preset is for other sizes, ``UsageError`` naming a flag that cannot be.
    """
    layers: list[tuple[str, dict[str, Any]]] = [(f"model in {model.directory}", model.values)]
    if preset is not None:
        given = read_mapping(find_preset(preset).flags(), f"preset {preset}")
        for key in _SIZES:
            theirs, ours = given.get(key, model.values[key]), model.values[key]
            if theirs != ours:
                raise ConversionError(
                    f"--model-preset is {preset}, whose {key} is {theirs}; expected {ours}, that of "
                    f"{model.directory}: choose another preset, or give --memory-* flags"
                )
        del given["seq_length"]  # the source's own is longer than most
        layers.append((f"preset {preset}", {key: given[key] for key in OPTIONS if key in given}))
    if settings.get("seq_length", 0) > model.values["seq_length"]:
        raise ConversionError(
            f"--seq-length is {settings['seq_length']}; expected at most {model.values['seq_length']}, the "
            f"max_position_embeddings of {model.directory}"
        )
    layers.append(("flag", settings))
    run = from_layers(layers, 1, for_training=False)
    if not has_memory(run.model.ffn_variant):
        raise ConversionError(
            f"--ffn-variant is {run.model.ffn_variant}, which has no memory layers to add; expected umv2, or another "
            "variant that has them"
        )
    if run.memory.hashes:
        raise ConversionError(
            f"--ffn-variant is {run.model.ffn_variant}, whose rows are addressed by n-grams; expected a variant with "
            "queries and keys: upcycling does not make n-gram layers"
        )
    return {**model.values, **{key: run.values[key] for key in OPTIONS}}


def _check_tokenizer(model: DenseModel, with_tokenizer: bool) -> None:
    """Raise ``ConversionError`` where training could not use the source's tokenizer."""
    found = tokenizer_settings(model.directory, model.values["vocab_size"], with_tokenizer)
    try:
        build_tokenizer(found["tokenizer_type"], found.get("tokenizer_model"), found["vocab_size"])
    except ValueError as error:
        raise ConversionError(
            f"the tokenizer of {model.directory} cannot be taken along: {error}; or give --no-tokenizer"
        ) from error


class _Upcycled:
    """All tensors of the upcycled model under an export's names: the source's, new memory layers, biases of zeros."""

    def __init__(
        self, source: DenseTensors, pairs: list[Pairing], values: dict[str, Any], dtype: torch.dtype, silent: bool
    ) -> None:
        self.directory = source.directory
        self._source = source
        memory = memory_config(values)
        assert memory is not None
        self._memory = NewMemory(memory, values, dtype, silent)
        self.tensors: dict[str, TensorInfo] = {}
        for pair in pairs:
            kinds = {"weights": dtype, "float32": torch.float32, "index": index_dtype(pair.shape[0])}
            for part in pair.parts:
                new = TensorInfo(kinds[pair.dtype], part_shape(pair, part))
                self.tensors[part.name] = source.tensors.get(part.name, new)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor."""
        if name in self._source.tensors:
            return self._source.rows(name, start, stop)
        info = self.tensors[name]
        if _MEMORY not in name:
            return torch.zeros((stop - start, *info.shape[1:]), dtype=info.dtype)
        # model.layers.<block>.memory.<name>, with the number of its only chunk behind a table's
        block, _, own = name.removeprefix("model.layers.").partition(_MEMORY)
        return self._memory.rows(int(block), own.removesuffix(".0"), start, stop)
