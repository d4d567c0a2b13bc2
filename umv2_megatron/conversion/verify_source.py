"""Whether an upcycled checkpoint is its source: the same weights, and the same logits while memory layers are silent.

Weights are compared bit by bit, through the table of names that the conversion reads. Logits do not depend on it: they
are those of transformers' own class for the source, in float64. That class computes its norms in float32 whatever the
model's dtype is, so they are computed again in the dtype of their input here.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from umv2_megatron.checkpoint import saved_config
from umv2_megatron.checkpoint.contents import locate
from umv2_megatron.conversion.dense_models import DenseTensors, read_dense_model
from umv2_megatron.conversion.safetensors_files import ConversionError, TensorInfo
from umv2_megatron.conversion.settings import sizes_of
from umv2_megatron.conversion.to_hf import Source, open_source
from umv2_megatron.conversion.tokenizer_texts import PARAGRAPH
from umv2_megatron.conversion.upcycle import dense_parts
from umv2_megatron.conversion.verify import (
    LIMITS,
    Comparison,
    Weights,
    compare_tensors,
    precise_dtype,
    same_choice,
    token_ids,
    trained_logits,
)
from umv2_megatron.hf.name_table import pairings
from umv2_megatron.memory.retrieval import at_least_float32
from umv2_megatron.model.builder import unwrap
from umv2_megatron.parallel import cpu_platform
from umv2_megatron.training.restore import restore_model


def compare_source_weights(load: str, ckpt_step: int | None, source: Path) -> Weights:
    """Compare every number of a dense model with the checkpoint's, bit by bit; memory does not grow with the model.

    Raises ``CheckpointError`` or ``ConversionError`` naming what is damaged, missing, extra, or of another shape.
    """
    store, iteration = locate(load, ckpt_step)
    model = read_dense_model(source)
    with contextlib.closing(DenseTensors(model)) as held:
        upcycled = open_source(store, iteration, None, None)
        try:
            pairs = list(pairings(sizes_of(upcycled.config["values"], model.values["vocab_size"], None)))
            wanted = dense_parts(model, pairs)
            dense = [pair for pair in pairs if all(part.name in wanted for part in pair.parts)]
            found = Source(upcycled.config, upcycled.tensors, dense, 1, upcycled.dtype)
            return compare_tensors(found, _Rounded(held, upcycled.dtype))
        finally:
            upcycled.tensors.close()


class _Rounded:
    """Tensors in the dtype of the checkpoint."""

    def __init__(self, held: DenseTensors, dtype: torch.dtype) -> None:
        self.directory = held.directory
        self._held = held
        self.tensors = {name: TensorInfo(dtype, info.shape) for name, info in held.tensors.items()}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor."""
        return self._held.rows(name, start, stop).to(self.tensors[name].dtype)


def compare_source(
    load: str,
    ckpt_step: int | None,
    source: Path,
    text: str | None,
    tokens: int,
    limit: float | None = None,
    tokenizer_model: str | None = None,
) -> Comparison:
    """Compare the logits of a checkpoint and of a dense model on ``tokens`` tokens of ``text`` (None: a paragraph of
    our own), in float64 (float32 where memory does not hold both models).

    Raises ``CheckpointError`` or ``ConversionError`` naming what cannot be read or does not belong together.
    """
    model = read_dense_model(source)
    restored = restore_model(load, ckpt_step, tokenizer_model, {"bf16": False})
    trained, vocabulary = unwrap(restored.chunks[0]).eval(), restored.tokenizer.vocab_size
    if vocabulary != model.values["vocab_size"]:
        raise ConversionError(
            f"{source} has {model.values['vocab_size']} tokens, the checkpoint's tokenizer {vocabulary}"
        )
    text = PARAGRAPH if text is None else text
    ids = token_ids(restored.tokenizer, text, tokens, model.values["max_position_embeddings"])
    dtype = precise_dtype(trained)
    found = trained_logits(trained.to(dtype), ids, vocabulary)
    stored = saved_config.read_config(*locate(load, ckpt_step))["values"]
    expected = source_logits(model.directory, torch.bfloat16 if stored["bf16"] else torch.float32, dtype, ids)
    return Comparison(
        dtype,
        "largest difference of logits from the source's",
        float((expected - found).abs().max() / expected.abs().max()),
        LIMITS[dtype] if limit is None else limit,
        same_choice(expected, found),
        ids.numel(),
    )


@torch.no_grad()
def source_logits(source: Path, weights: torch.dtype, dtype: torch.dtype, ids: Tensor) -> Tensor:
    """Logits [windows, s, vocabulary] of transformers' class for the model in ``source``, whose weights are rounded to
    ``weights``, all in ``dtype`` but the angles of the rotary embedding, which are float32 everywhere."""
    from transformers import AutoModelForCausalLM

    import umv2_megatron.hf  # noqa: F401  registers our own dense model

    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, use_safetensors=True, local_files_only=True, attn_implementation="sdpa"
    )
    for parameter in model.parameters():
        parameter.copy_(parameter.to(weights))
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(_exact_norm, module)
    logits: Tensor = model.eval().to(cpu_platform.device())(ids, use_cache=False).logits
    return at_least_float32(logits)


def _exact_norm(module: Any, x: Tensor) -> Tensor:
    return functional.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)
