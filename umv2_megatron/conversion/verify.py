"""Whether an export is its checkpoint: the same weights, and the logits of both models on one text.

Weights are compared bit by bit, each tensor of the export with what the checkpoint's rows become in the export's dtype.
That finds every changed number, but reads the table of names as the conversion does. Logits do not: both models compute
in float64 (float32 where memory does not hold both), with the weights of the export (so those of the checkpoint are
rounded to its dtype) and with the same picks of rows and experts: where scores tie within rounding, the export's model
follows the checkpoint's (``picks.py``). So every difference but the last bits means that something of the model is in
another place or computed in another way, and so does a pick that differs without a tie.

For an export in 16 bits both compute once more in that dtype, as it will be used. There a rounding turns two near picks
of a memory layer or of a router around, in either model, which moves the logits of a few tokens far. So each token's
distance from those logits is taken, and the medians over the tokens are compared.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from umv2_megatron.checkpoint.contents import locate
from umv2_megatron.conversion.checkpoint_files import RowSource
from umv2_megatron.conversion.export_files import ExportTensors, verify_manifest
from umv2_megatron.conversion.from_hf import dtype_of
from umv2_megatron.conversion.pick_recording import recorded_picks
from umv2_megatron.conversion.picks import SAME_VECTOR, PickReport, followed_picks
from umv2_megatron.conversion.plan import check_source, copies_to_hf, part_shape
from umv2_megatron.conversion.progress import Progress
from umv2_megatron.conversion.safetensors_files import ConversionError
from umv2_megatron.conversion.settings import read_hf_config
from umv2_megatron.conversion.to_hf import Source, open_source, parts
from umv2_megatron.conversion.tokenizer_texts import PARAGRAPH
from umv2_megatron.data.tokenizers import NullTokenizer, Tokenizer
from umv2_megatron.hf import UMv2ForCausalLM
from umv2_megatron.memory.retrieval import at_least_float32
from umv2_megatron.model.builder import unwrap
from umv2_megatron.parallel import cpu_platform
from umv2_megatron.training.restore import restore_model
from umv2_megatron.training.step import refresh_singular_vectors

LIMITS = {torch.float64: 1e-6, torch.float32: 1e-5}
"""Largest difference of two logits, as a share of the largest logit. In float64 2e-15 is what is seen; the singular
vectors of an export, which are float32, may come from another machine and differ in their last bits."""
HALF_FACTOR = 3.0
"""How many times as far from its logits in float32 the median token of an export in 16 bits may be as the checkpoint's
model in 16 bits has it. Seen on 256 tokens each of ten models of a few steps: 0.6 to 1.6 times, without memory layers
1.000 to 1.001."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Weights:
    """How ``tensors`` tensors of ``numbers`` numbers compare; ``different`` has a sentence for each that is not the
    same."""

    tensors: int
    numbers: int
    different: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """``difference`` of the logits of ``tokens`` tokens computed in ``dtype``, as a share of the largest logit.

    ``what`` says between which; ``same_choice``: for what share of the tokens the likeliest next one is the same;
    ``picks``: how the picks of both models compare, None where they were not imposed.
    """

    dtype: torch.dtype
    what: str
    difference: float
    limit: float
    same_choice: float
    tokens: int
    picks: PickReport | None = None

    @property
    def good(self) -> bool:
        """Whether the difference is within its limit and no pick is wrong; infinity and not a number never are."""
        right = self.picks is None or self.picks.wrong == 0
        return right and math.isfinite(self.difference) and self.difference <= self.limit


def compare_weights(load: str, ckpt_step: int | None, export: Path, say: Callable[[str], None] = print) -> Weights:
    """Compare every number of an export with the checkpoint's, bit by bit; memory does not grow with the model.

    Raises ``CheckpointError`` or ``ConversionError`` naming what is damaged, missing, extra, or of another shape.
    """
    store, iteration = locate(load, ckpt_step)
    exported = ExportTensors(export)
    try:
        verify_manifest(export, say)
        config = read_hf_config(export)
        source = open_source(store, iteration, dtype_of(export, config, exported), config.memory_table_chunk_rows)
        try:
            return compare_tensors(source, exported)
        finally:
            source.tensors.close()
    finally:
        exported.close()


def compare_tensors(source: Source, exported: RowSource) -> Weights:
    """Compare the tensors of ``source`` with those of the same names on the other side."""
    expected = {part.name: (part_shape(p, part), p.dtype, False) for p in source.pairings for part in p.parts}
    check_source(exported.tensors, expected, source.dtype, str(exported.directory))
    copies = copies_to_hf(source.pairings, source.tensors.tensors, source.dtype)
    different = []
    with Progress("weights", sum(copy.info.num_bytes for copy in copies)) as progress:
        for copy in copies:
            at, wrong, first = 0, 0, 0
            for part in parts(source, copy):
                found = exported.rows(copy.name, at, at + len(part))
                if copy.name.endswith((".retrieval.u", ".retrieval.t")):
                    differ = ~((part - found).abs() <= SAME_VECTOR)  # not a number differs, too
                else:
                    size = part.dtype.itemsize
                    differ = part.view(-1).view(_BITS[size]) != found.view(-1).view(_BITS[size])
                if differ.any() and not wrong:
                    first = at + int(differ.view(len(part), -1).any(1).nonzero()[0])
                wrong, at = wrong + int(differ.sum()), at + len(part)
                progress.add(part.nbytes)
            if wrong:
                count = math.prod(copy.info.shape)
                different.append(f"{copy.name} differs in {wrong} of {count} numbers, first in row {first}")
    return Weights(len(copies), sum(math.prod(copy.info.shape) for copy in copies), tuple(different))


def compare(
    load: str,
    ckpt_step: int | None,
    export: Path,
    text: str | None,
    tokens: int,
    limit: float | None = None,
    tokenizer_model: str | None = None,
) -> Iterator[Comparison]:
    """Compare a checkpoint with an export on ``tokens`` tokens of ``text`` (None: a paragraph of our own).

    Yields one comparison in float32 and, for an export in 16 bits, one in its dtype. ``limit`` replaces the former's.
    Raises ``CheckpointError`` or ``ConversionError`` naming what cannot be read or does not belong together.
    """
    config = read_hf_config(export)
    with contextlib.closing(ExportTensors(export)) as exported:
        dtype = dtype_of(export, config, exported)
    restored = restore_model(load, ckpt_step, tokenizer_model, {"bf16": False})
    trained, vocabulary = unwrap(restored.chunks[0]).eval(), restored.tokenizer.vocab_size
    if vocabulary != config.vocab_size:
        raise ConversionError(f"{export} has {config.vocab_size} tokens, the checkpoint's tokenizer {vocabulary}")
    ids = token_ids(restored.tokenizer, PARAGRAPH if text is None else text, tokens, config.max_position_embeddings)
    _round_weights(trained, dtype)
    precise = precise_dtype(trained)
    exact, found, picks = followed_logits(
        trained.to(precise), lambda: _load(export, precise), ids, config.vocab_size
    )
    largest = exact.abs().max()
    yield Comparison(
        precise,
        "largest difference of logits",
        float((exact - found).abs().max() / largest),
        LIMITS[precise] if limit is None else limit,
        same_choice(exact, found),
        ids.numel(),
        picks,
    )
    if dtype != torch.float32:
        expected = trained_logits(trained.to(dtype), ids, config.vocab_size)
        found = _export_logits(_load(export, dtype), ids)
        own = float((exact - expected).abs().mean(-1).median() / largest)
        yield Comparison(
            dtype,
            f"median token's difference from the logits in {name_of(precise)} (the checkpoint's: {own:.1e})",
            float((exact - found).abs().mean(-1).median() / largest),
            HALF_FACTOR * own,
            same_choice(expected, found),
            ids.numel(),
        )


def name_of(dtype: torch.dtype) -> str:
    """``float64`` for ``torch.float64``."""
    return str(dtype).removeprefix("torch.")


def precise_dtype(model: torch.nn.Module) -> torch.dtype:
    """float64 where memory holds both models in it, else float32, in which ties are more and smaller faults hidden."""
    needed = 2 * 8 * sum(parameter.numel() for parameter in model.parameters())
    if torch.cuda.is_available():
        available = torch.cuda.mem_get_info()[0]
    else:
        available = psutil.virtual_memory().available
    return torch.float64 if needed < 0.8 * available else torch.float32


def token_ids(tokenizer: Tokenizer, text: str, count: int, context: int) -> torch.Tensor:
    """At most ``count`` tokens [windows, s] int64 on the device, s at most ``context``; numbers drawn with a fixed seed
    where there is no tokenizer."""
    if isinstance(tokenizer, NullTokenizer):
        ids = torch.randint(tokenizer.vocab_size, (count,), generator=torch.Generator().manual_seed(1)).tolist()
    else:
        ids = tokenizer.tokenize(text)[:count]
    if not ids:
        raise ConversionError("the text to compare on is empty; expected at least one token")
    length = min(len(ids), context)
    whole = len(ids) // length * length
    return torch.tensor(ids[:whole], device=cpu_platform.device()).view(-1, length)


@torch.no_grad()
def _round_weights(model: torch.nn.Module, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    refresh_singular_vectors([model])


def followed_logits(
    trained: torch.nn.Module, load: Callable[[], UMv2ForCausalLM], ids: torch.Tensor, vocabulary: int
) -> tuple[torch.Tensor, torch.Tensor, PickReport]:
    """Logits [windows, s, vocabulary] of both models for ``ids`` [windows, s], the latter with the picks of the former.

    ``trained`` is mcore's model, in evaluation mode and of the dtype to compute in; ``load`` makes the other one.
    """
    with recorded_picks(trained, ids.shape[0]) as recorded:
        expected = trained_logits(trained, ids, vocabulary)
    model = load()
    with followed_picks(model, recorded) as picks:
        return expected, _export_logits(model, ids), picks


@torch.no_grad()
def trained_logits(trained: torch.nn.Module, ids: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Logits [windows, s, vocabulary], float32 or better."""
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return at_least_float32(trained(ids, positions, None)[..., :vocabulary])


@torch.no_grad()
def _export_logits(model: UMv2ForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """The same of an export's model."""
    return at_least_float32(model(ids, use_cache=False).logits)


def _load(export: Path, dtype: torch.dtype) -> UMv2ForCausalLM:
    model = UMv2ForCausalLM.from_pretrained(export, dtype=dtype, use_safetensors=True, local_files_only=True)
    return model.eval().to(cpu_platform.device())


def same_choice(one: torch.Tensor, other: torch.Tensor) -> float:
    """Share of the positions at which both logits [windows, s, vocabulary] are largest for the same token."""
    return float((one.argmax(-1) == other.argmax(-1)).float().mean())
