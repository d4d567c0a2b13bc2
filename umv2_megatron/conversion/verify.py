"""Whether an export computes what its checkpoint computes: the logits of both models on one text.

Both compute in float32, with the weights of the export (so those of the checkpoint are rounded to the export's dtype),
where every difference but the last bits is an error of conversion. For an export in 16 bits both compute once more in
that dtype, as it will be used. There a rounding may turn two near picks of a memory layer around, in either model: so
what is limited is how far the export is from the logits in float32, on the average, by how far the checkpoint is.
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
HALF_FACTOR = 2.0
"""How many times as far from the logits in float32 an export in 16 bits may be as the checkpoint's model in 16 bits."""
_HALF_AT_LEAST = 0.1
"""A distance from the logits in float32, as a share of the largest logit, that is always allowed in 16 bits: one turned
pick of an early token moves all later ones, and models of a few steps were seen to be off by 0.06. Errors of conversion
show in float32."""


@dataclass(frozen=True)
class Comparison:
    """``difference`` of the logits of ``tokens`` tokens computed in ``dtype``, as a share of the largest logit.

    ``what`` says between which; ``same_choice``: for what share of the tokens the likeliest next one is the same.
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
    verify_manifest(export, say)
    config = read_hf_config(export)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else getattr(torch, config.dtype or "float32")
    restored = restore_model(load, ckpt_step, tokenizer_model, {"bf16": False})
    trained, vocabulary = unwrap(restored.chunks[0]).eval(), restored.tokenizer.vocab_size
    if vocabulary != config.vocab_size:
        raise ConversionError(f"{export} has {config.vocab_size} tokens, the checkpoint's tokenizer {vocabulary}")
    ids = _token_ids(restored.tokenizer, text or PARAGRAPH, min(tokens, config.max_position_embeddings))
    _round_weights(trained, dtype)
    exact, found = _logits(trained, export, ids, torch.float32, config.vocab_size)
    largest = exact.abs().max()
    yield Comparison(
        torch.float32,
        "largest difference of logits",
        float((exact - found).abs().max() / largest),
        FLOAT32_LIMIT if limit is None else limit,
        _same_choice(exact, found),
        ids.shape[1],
    )
    if dtype != torch.float32:
        expected, found = _logits(trained, export, ids, dtype, config.vocab_size)
        own = float((exact - expected).abs().mean() / largest)
        yield Comparison(
            dtype,
            f"mean difference from the logits in float32 (the checkpoint's: {own:.1e})",
            float((exact - found).abs().mean() / largest),
            max(HALF_FACTOR * own, _HALF_AT_LEAST),
            _same_choice(expected, found),
            ids.shape[1],
        )


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
def _logits(
    trained: torch.nn.Module, export: Path, ids: torch.Tensor, dtype: torch.dtype, vocabulary: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [1, s, vocabulary] of the checkpoint's model and of the export, computed in ``dtype``, as float32."""
    from umv2_megatron.hf import UMv2ForCausalLM

    positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    expected = trained.to(dtype)(ids, positions, None)[..., :vocabulary].float()
    model = UMv2ForCausalLM.from_pretrained(export, dtype=dtype, use_safetensors=True, local_files_only=True)
    found = model.eval().to(cpu_platform.device())(ids, use_cache=False).logits.float()
    return expected, found


def _same_choice(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.argmax(-1) == other.argmax(-1)).float().mean())
