"""A SentencePiece ``.model`` file as a tokenizers.Tokenizer: the same pieces, scores and normalisation.

The two libraries divide the work differently, and some of what SentencePiece does has no counterpart:

- **Normalisation** is the model's own table, then white space. tokenizers applies it to each stretch of text between
  two added tokens; a space put before the text would then be put before each stretch.
- **User-defined symbols.** BPE cuts them out before it merges: added tokens, found in normalised text (or in the text
  as it is, where normalising would change the symbol itself). In unigram models they are pieces with a score of their
  own, which tokenizers can be given. A symbol with a space in it is never found by SentencePiece, which looks for it in
  a text whose spaces have become U+2581; written with U+2581 it is.
- **Pieces of bytes** are spelled ``<0x41>``, and unigram models of tokenizers would read the text "<0x41>" as one; a
  pre-tokenizer cuts such a text in two.
- **Words.** Unigram models take the text as a whole in both libraries. Cutting it before each word saves time, and
  changes nothing unless pieces span words.

What remains different is found by ``tokenizer_texts.py``, and refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from umv2_megatron.conversion.safetensors_files import ConversionError
from umv2_megatron.conversion.tokenizer_texts import Words

_SPACE = "\u2581"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_UNIGRAM, _BPE = 1, 2
# Where the text of a byte piece may be cut, if no piece holds both sides of the cut.
_CUTS = (
    ("<0", "(?<=<)(?=0x[0-9A-F]{2}>)"),
    ("0x", "(?<=<0)(?=x[0-9A-F]{2}>)"),
    ("x[0-9A-F]", "(?<=<0x)(?=[0-9A-F]{2}>)"),
    ("[0-9A-F]{2}", "(?<=<0x[0-9A-F])(?=[0-9A-F]>)"),
    ("[0-9A-F]>", "(?<=<0x[0-9A-F]{2})(?=>)"),
)


class _Piece(NamedTuple):
    text: str
    score: float
    kind: int


def read_model(path: Path) -> Any:
    """The protobuf of a ``.model`` file."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    return proto


def _pieces(proto: Any) -> list[_Piece]:
    return [_Piece(piece.piece, piece.score, piece.type) for piece in proto.pieces]


def words_of(proto: Any) -> Words:
    """What texts that try this model should hold: its pieces, with spaces, and its user-defined symbols."""
    pieces = [piece.piece.replace(_SPACE, " ") for piece in proto.pieces if piece.type in (_NORMAL, _UNUSED)]
    symbols = [piece.piece.replace(_SPACE, " ") for piece in proto.pieces if piece.type == _USER_DEFINED]
    return Words(pieces, symbols)


def ties_of(proto: Any) -> Callable[[list[int], list[int]], bool] | None:
    """Whether two lists of ids for one text have the same score, but for rounding; None for BPE, which has no ties.

    SentencePiece adds scores in float32 from the start of the text, tokenizers in float64: which of two pieces of equal
    score wins, in "aaa" for one, depends on everything before it.
    """
    if proto.trainer_spec.model_type != _UNIGRAM:
        return None
    pieces = _pieces(proto)
    scores = [_score(piece) for piece in pieces]
    spelled = [piece.text for piece in pieces]

    def tie(own: list[int], other: list[int]) -> bool:
        if "".join(spelled[i] for i in own) != "".join(spelled[i] for i in other):
            return False
        sums = [sum(scores[i] for i in ids) for ids in (own, other)]
        return abs(sums[0] - sums[1]) <= 2e-6 * max(map(abs, sums))

    return tie


def tokenizer_of(proto: Any, path: Path) -> Any:
    """A tokenizers.Tokenizer of a model. Raises ``ConversionError`` for what tokenizers cannot express."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers

    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    pieces = _pieces(proto)
    symbols = [piece.text for piece in pieces if piece.kind == _USER_DEFINED]
    if rules.escape_whitespaces:
        symbols = [text for text in symbols if " " not in text]  # never found
    if trainer.model_type == _UNIGRAM:
        made = Tokenizer(_unigram(pieces, trainer))
        if cuts := _cuts(pieces, trainer, path):
            made.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    elif trainer.model_type == _BPE:
        if symbols and rules.add_dummy_prefix:
            raise ConversionError(
                f"{path} is a BPE model with user-defined symbols ({symbols[0]!r} is the first) that puts a space "
                "before each text (add_dummy_prefix): tokenizers would put one behind each symbol, too; "
                "give --no-tokenizer"
            )
        made = Tokenizer(_byte_pairs(pieces, trainer))
    else:
        raise ConversionError(f"{path} is a SentencePiece model of words or characters; expected BPE or unigram")
    steps = _normalization(rules, trainer)
    if steps is not None:
        made.normalizer = steps
    parts: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        side = "right" if trainer.treat_whitespace_as_suffix else "left"
        parts.append(decoders.Strip(content=" ", **{"left": 0, "right": 0, side: 1}))
    made.decoder = decoders.Sequence(parts)
    # Each call for itself would build the automaton that finds them anew: 26,000 tokens took minutes.
    special = [piece.text for piece in pieces if piece.kind in (_CONTROL, _UNKNOWN)]
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    if trainer.model_type == _BPE:
        kept = [steps is None or steps.normalize_str(text) == text for text in symbols]
        made.add_tokens([AddedToken(text, special=False, normalized=each) for text, each in zip(symbols, kept)])
    for i, piece in enumerate(pieces):
        assert made.token_to_id(piece.text) == i, f"{piece.text!r} lost its id {i}"
    return made


def _unigram(pieces: list[_Piece], trainer: Any) -> Any:
    from tokenizers import models

    unknown = next((i for i, piece in enumerate(pieces) if piece.kind == _UNKNOWN), None)
    scored = [(piece.text, _score(piece)) for piece in pieces]
    return models.Unigram(scored, unk_id=unknown, byte_fallback=trainer.byte_fallback)


def _score(piece: _Piece) -> float:
    """The score by which a unigram model chooses. User-defined symbols have none in the file: the library scores them
    by their bytes (measured with sentencepiece 0.2.3), so that they win against the negative scores of other pieces."""
    return 0.1 * (len(piece.text.encode()) - 1) if piece.kind == _USER_DEFINED else piece.score


def _byte_pairs(pieces: list[_Piece], trainer: Any) -> Any:
    from tokenizers import models

    unknown = next((piece.text for piece in pieces if piece.kind == _UNKNOWN), None)
    return models.BPE(
        vocab={piece.text: i for i, piece in enumerate(pieces)},
        merges=_merges(pieces),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
    )


def _normalization(rules: Any, trainer: Any) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        # SentencePiece knows no white space but the space; Strip would take line feeds
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix and trainer.treat_whitespace_as_suffix:
        steps.append(normalizers.Replace(Regex(r"(?<=[\s\S])\z"), " "))
    elif rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    if rules.escape_whitespaces:
        steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps) if steps else None


def _cuts(pieces: list[_Piece], trainer: Any, path: Path) -> list[Any]:
    """Where a text is cut before a unigram model sees it."""
    from tokenizers import Regex, pre_tokenizers

    cuts: list[Any] = []
    texts = [piece.text for piece in pieces if piece.kind in (_NORMAL, _USER_DEFINED)]
    if any(piece.kind == _BYTE for piece in pieces):
        cut = next((cut for both, cut in _CUTS if not any(re.search(both, text) for text in texts)), None)
        if cut is None:
            raise ConversionError(
                f"{path} has pieces of bytes, and pieces that hold all parts of their names: tokenizers would take the "
                "text '<0x41>' for a byte; give --no-tokenizer"
            )
        cuts.append(pre_tokenizers.Split(Regex(cut), "isolated"))
    space = _SPACE
    if not any(re.search(f"[^{space}]{space}", text) for text in texts):
        cuts.append(pre_tokenizers.Split(Regex(f"(?<=[^{space}])(?={space})"), "isolated"))
    elif not any(re.search(f"{space}[^{space}]", text) for text in texts):
        cuts.append(pre_tokenizers.Split(Regex(f"(?<={space})(?=[^{space}])"), "isolated"))
    return cuts


def _merges(pieces: list[_Piece]) -> list[tuple[str, str]]:
    """The merges of a BPE model, best first: SentencePiece stores the pieces, not how they came about.

    It merges the neighbours whose union has the best score; so every split of a piece into two pieces is a merge of
    that piece's rank. Among splits of one piece the order does not matter: which is met depends on the text.
    """
    mergeable = {piece.text for piece in pieces if piece.kind in (_NORMAL, _USER_DEFINED)}
    ranked = sorted((-piece.score, i, piece.text) for i, piece in enumerate(pieces) if piece.kind == _NORMAL)
    return [
        (text[:cut], text[cut:])
        for _, _, text in ranked
        for cut in range(1, len(text))
        if text[:cut] in mergeable and text[cut:] in mergeable
    ]
