"""Whether an export computes what its checkpoint computes: the logits of both models on one text.

Both compute in float32, with the weights of the export (so those of the checkpoint are rounded to the export's dtype),
where every difference but the last bits is an error of conversion. An export in 16 bits is compared a second time with
both computing in that dtype, as it will be used: there a rounding may turn two near picks of a memory layer around, so
what is limited is the mean difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from umv2_megatron.conversion.export_files import verify_manifest
from umv2_megatron.conversion.safetensors_files import ConversionError
from umv2_megatron.conversion.settings import read_hf_config
from umv2_megatron.conversion.tokenizer_files import PARAGRAPH
from umv2_megatron.model.builder import unwrap
from umv2_megatron.parallel import cpu_platform
from umv2_megatron.training.restore import restore_model
from umv2_megatron.training.step import refresh_singular_vectors
from umv2_megatron.training.tokenizers import NullTokenizer, Tokenizer

FLOAT32_LIMIT = 1e-5
"""Largest difference of two logits computed in float32, as a share of the largest logit."""
HALF_LIMIT = 2e-2
"""Mean difference of logits computed in 16 bits, as a share of the largest logit."""


@dataclass(frozen=True)
class Comparison:
    """``difference`` of the logits of ``tokens`` tokens computed in ``dtype``, as a share of the largest logit.

    ``what`` says which difference, ``same_choice`` for how many tokens (a share) the likeliest next one is the same.
    """

    dtype: torch.dtype
    what: str
    difference: float
    limit: float
    same_choice: float
    tokens: int

    @property
    def good(self) -> bool:
        """Whether the difference is within its limit; not a number is not."""
        return self.difference <= self.limit


def compare(
    load: str,
    ckpt_step: int | None,
    export: Path,
    text: str | None,
    tokens: int,
    limit: float | None = None,
    tokenizer_model: str | None = None,
    say: Callable[[str], None] = print,
) -> Iterator[Comparison]:
    """Compare a checkpoint with an export on ``tokens`` tokens of ``text`` (None: a paragraph of our own).

    Yields one comparison in float32 and, for an export in 16 bits, one in its dtype. ``limit`` replaces the former's.
    Raises ``CheckpointError`` or ``ConversionError`` naming what cannot be read or does not belong together.
    """
    from umv2_megatron.hf import UMv2ForCausalLM

    verify_manifest(export, say)
    config = read_hf_config(export)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else getattr(torch, config.dtype or "float32")
    restored = restore_model(load, ckpt_step, tokenizer_model, {"bf16": False})
    trained, vocabulary = unwrap(restored.chunks[0]).eval(), restored.tokenizer.vocab_size
    if vocabulary != config.vocab_size:
        raise ConversionError(f"{export} has {config.vocab_size} tokens, the checkpoint's tokenizer {vocabulary}")
    ids = _token_ids(restored.tokenizer, text or PARAGRAPH, min(tokens, config.max_position_embeddings))
    _round_weights(trained, dtype)
    computed = [torch.float32] + ([dtype] if dtype != torch.float32 else [])
    for used in computed:
        model = UMv2ForCausalLM.from_pretrained(export, dtype=used, use_safetensors=True, local_files_only=True)
        trained.to(used)
        yield _compare_logits(trained, model.eval().to(cpu_platform.device()), ids, used, limit)
        del model


def _token_ids(tokenizer: Tokenizer, text: str, count: int) -> torch.Tensor:
    """[1, s] int64 on the device, s at most ``count``; numbers drawn with a fixed seed where there is no tokenizer."""
    if isinstance(tokenizer, NullTokenizer):
        ids = torch.randint(tokenizer.vocab_size, (count,), generator=torch.Generator().manual_seed(1)).tolist()
    else:
        ids = tokenizer.tokenize(text)[:count]
    if not ids:
        raise ConversionError("the text to compare on is empty; expected at least one token")
    return torch.tensor([ids], device=cpu_platform.device())


@torch.no_grad()
def _round_weights(model: torch.nn.Module, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    refresh_singular_vectors([model])


@torch.no_grad()
def _compare_logits(
    trained: torch.nn.Module, model: torch.nn.Module, ids: torch.Tensor, dtype: torch.dtype, limit: float | None
) -> Comparison:
    positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    found = model(ids, use_cache=False).logits.float()
    expected = trained(ids, positions, None)[..., : found.shape[-1]].float()
    distance = (expected - found).abs()
    exact = dtype == torch.float32
    difference = (distance.max() if exact else distance.mean()) / expected.abs().max()
    return Comparison(
        dtype,
        "largest" if exact else "mean",
        float(difference),
        (limit if limit is not None else FLOAT32_LIMIT) if exact else HALF_LIMIT,
        float((expected.argmax(-1) == found.argmax(-1)).float().mean()),
        ids.shape[1],
    )
