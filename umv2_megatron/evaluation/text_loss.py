"""Loss, perplexity and bits per byte of a model on texts: an indexed data set, JSONL or plain text.

Definitions. Every token is scored once, given what stands before it in its window; the first one of all is scored given
the token that documents began with in training (``ScoringModel.first_token``).
With L the sum of -ln p over all scored tokens:

    loss            L / tokens                    nats per token; end-of-document tokens count like any other
    perplexity      exp(loss)
    bits per byte   L / ln 2 / bytes              bytes: UTF-8 length of the text that the scored tokens decode to

An end-of-document token has no bytes but its cost is counted, so bits per byte is what it takes to send the documents
together with where they end. Bytes are counted on whole documents; a document cut short by a limit on tokens is cut
where a character ends.

Windows. A window reads ``context`` tokens and moves on by ``stride``. The first window scores all of its targets, each
later one its last ``stride``: with stride = context windows do not overlap, as in training, and with a smaller one
every token after the first window has at least context - stride tokens before it. The *stream* form joins all
documents, as training does; the *documents* form starts anew at each of them.
"""

from __future__ import annotations

import codecs
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from umv2_megatron.data.corpus import CorpusError, CorpusOptions, texts_of
from umv2_megatron.data.indexing import check_corpus, read_tokens
from umv2_megatron.data.readers import read_chunks
from umv2_megatron.data.tokenizers import ByteLevelTokenizer, NullTokenizer, Tokenizer
from umv2_megatron.evaluation.evaluate_flags import DATA_FORMS
from umv2_megatron.evaluation.scoring_model import ScoringModel

# Bytes of one document of a text file.
_LONGEST_DOCUMENT = 1 << 30
# Batches whose windows are sorted by length together, so that little is padded.
_SORTED_TOGETHER = 16


@dataclass(frozen=True)
class TextLoss:
    """What was measured; see the top of the file. ``bits_per_byte`` and ``bytes`` are None where tokens are no text.

    loss_se: standard error of ``loss``, from its spread over documents (form documents) or windows (form stream); None
    for a single one.
    """

    form: str
    context: int
    stride: int
    documents: int
    tokens: int
    end_of_document_tokens: int
    bytes: int | None
    loss: float
    loss_se: float | None
    perplexity: float
    bits_per_byte: float | None


@dataclass(frozen=True)
class Window:
    """Token ids [s + 1] of which the last ``scored`` are targets that count; ``unit`` numbers what they belong to."""

    tokens: np.ndarray
    scored: int
    unit: int


def documents_of(source: str, tokenizer: Tokenizer, append_eod: bool = True) -> Iterator[np.ndarray]:
    """Documents of ``source`` as token ids: an indexed data set (its path without extension), or a text file.

    .jsonl, .ndjson and .json files hold a document a line under the key "text"; any other file is one document. Either
    may be compressed. ``append_eod``: texts end with the end-of-document token, as tools/preprocess_data.py
    --append-eod writes them; an indexed data set is taken as it is. Raises ``ValueError`` naming the file.
    """
    if not os.path.isfile(source):
        index = check_corpus(source, tokenizer.vocab_size, tokenizer.sha256)
        tokens = read_tokens(source, index)
        width = index.dtype.itemsize
        for first, after in zip(index.documents[:-1], index.documents[1:]):
            if after > first:
                start = int(index.offsets[first]) // width
                yield tokens[start : start + int(index.lengths[first:after].sum())]
        return
    eod = [tokenizer.eod] if append_eod else []
    for chunk in read_chunks([source], CorpusOptions(max_line_bytes=_LONGEST_DOCUMENT)):
        for record in chunk.records:
            try:
                texts = texts_of(record, chunk.is_json, ["text"])
                ids = tokenizer.tokenize(texts[0])
            except (ValueError, CorpusError) as error:
                raise ValueError(f"{source}:{record.line}: {error}") from None
            if ids:
                yield np.array(ids + eod, dtype=np.int64)


def limited(documents: Iterable[np.ndarray], max_tokens: int | None, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The documents up to ``max_tokens`` tokens in all, the last one cut where a character ends."""
    left = max_tokens
    for document in documents:
        if left is not None and len(document) > left:
            if kept := _whole_characters(document[:left], tokenizer):
                yield document[:kept]
            return
        yield document
        if left is not None:
            left -= len(document)


def _whole_characters(ids: np.ndarray, tokenizer: Tokenizer) -> int:
    """Length of the longest beginning of ``ids`` that does not end inside a character (of at most four bytes)."""
    if isinstance(tokenizer, ByteLevelTokenizer):
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(bytes(int(i) for i in ids[-8:] if i < 256))
        return len(ids) - len(decoder.getstate()[0])  # what waits for the rest of its character
    for cut in range(min(4, len(ids))):
        tail = tokenizer.detokenize(ids[max(0, len(ids) - cut - 16) : len(ids) - cut].tolist())
        if not tail.endswith("\ufffd"):
            return len(ids) - cut
    return len(ids)


def text_bytes(tokenizer: Tokenizer, ids: np.ndarray) -> int | None:
    """UTF-8 bytes of the text of a document's ``ids``; None for a tokenizer whose tokens are no text."""
    if isinstance(tokenizer, NullTokenizer):
        return None
    if isinstance(tokenizer, ByteLevelTokenizer):
        return int((ids < 256).sum())
    return len(tokenizer.detokenize(ids[ids != tokenizer.eod].tolist()).encode("utf-8"))


def windows(tokens: np.ndarray, context: int, stride: int, unit: int | None = None) -> Iterator[Window]:
    """Windows over ``tokens`` [n], of which all but the first are scored once, in order.

    Windows count as units of their own unless ``unit`` is given.
    """
    done, number = 1, 0
    while done < len(tokens):
        end = min(len(tokens), context + 1 if done == 1 else done + stride)
        yield Window(tokens[max(0, end - context - 1) : end], end - done, number if unit is None else unit)
        done, number = end, number + 1


def text_loss(
    model: ScoringModel,
    documents: Iterable[np.ndarray],
    *,
    form: str = "stream",
    context: int | None = None,
    stride: int | None = None,
    batch: int = 64,
) -> TextLoss:
    """Score all ``documents`` (token ids each); ``context`` defaults to the model's, ``stride`` to ``context``.

    Raises ``ValueError`` naming --stride, --data-context-length or --data.
    """
    assert form in DATA_FORMS
    tokenizer = model.tokenizer
    context = model.context if context is None else context
    stride = context if stride is None else stride
    if context < 1 or model.longest_context is not None and context > model.longest_context:
        limit = "" if model.longest_context is None else f" and at most {model.longest_context}"
        raise ValueError(f"--data-context-length is {context}; expected at least 1{limit}")
    if not 1 <= stride <= context:
        raise ValueError(f"--stride is {stride}; expected 1 to the context length, {context}")
    held = list(documents)
    if not held:
        raise ValueError("--data holds no text; give a file with some")
    first = np.array([model.first_token])
    if form == "stream":
        made = windows(np.concatenate([first, *held]), context, stride)
    else:
        made = (
            window
            for number, ids in enumerate(held)
            for window in windows(np.concatenate([first, ids]), context, stride, number)
        )
    sums: dict[int, list[float]] = {}
    for window, nats in _score(model, made, batch):
        unit = sums.setdefault(window.unit, [0.0, 0])
        unit[0] += nats
        unit[1] += window.scored
    sizes = [text_bytes(tokenizer, ids) for ids in held]
    size = None if any(each is None for each in sizes) else sum(each or 0 for each in sizes)
    ends = sum(int((ids == tokenizer.eod).sum()) for ids in held)
    return _result(form, context, stride, len(held), ends, size, [sums[unit] for unit in sorted(sums)])


def _score(model: ScoringModel, made: Iterator[Window], batch: int) -> Iterator[tuple[Window, float]]:
    """Each window with the nats of its scored targets; some batches at a time, ordered by length."""
    while group := list(islice(made, batch * _SORTED_TOGETHER)):
        group.sort(key=lambda window: len(window.tokens))
        for first in range(0, len(group), batch):
            rows = group[first : first + batch]
            tokens = torch.full((len(rows), max(len(row.tokens) for row in rows)), model.tokenizer.eod)
            for at, row in enumerate(rows):
                tokens[at, : len(row.tokens)] = torch.from_numpy(row.tokens.astype(np.int64))
            likelihood = model.logprobs(tokens).log_likelihood.double()
            for at, row in enumerate(rows):
                end = len(row.tokens) - 1
                yield row, -likelihood[at, end - row.scored : end].sum().item()


def _result(
    form: str,
    context: int,
    stride: int,
    documents: int,
    ends: int,
    size: int | None,
    units: Sequence[Sequence[float]],
) -> TextLoss:
    nats, tokens = math.fsum(unit[0] for unit in units), int(sum(unit[1] for unit in units))
    loss = nats / tokens
    spread = math.fsum((own - loss * count) ** 2 for own, count in units)
    number = len(units)
    return TextLoss(
        form=form,
        context=context,
        stride=stride,
        documents=documents,
        tokens=tokens,
        end_of_document_tokens=ends,
        bytes=size,
        loss=loss,
        # of a ratio of means: units have different numbers of tokens
        loss_se=math.sqrt(spread * number / (number - 1)) / tokens if number > 1 else None,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=nats / math.log(2) / size if size else None,
    )
