"""The run's tokenizer in Hugging Face form: tokenizer.json and tokenizer_config.json, with the same ids for every text.

Whatever the kind, the result is one ``tokenizer.json`` that AutoTokenizer loads without code of ours:

- HuggingFaceTokenizer: the run's own file, without what would add tokens to a text or cut it;
- SentencePieceTokenizer: BPE or unigram pieces, scores and normalisation read from the model's protobuf;
- ByteLevelTokenizer: 256 bytes and the end of documents, as a byte-level BPE without merges;
- NullTokenizer: numbers in, numbers out; there is no tokenizer to export.

Before anything is written both tokenizers encode texts of many kinds; one id that differs refuses the export.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from umv2_megatron.conversion.safetensors_files import ConversionError
from umv2_megatron.conversion.settings import context_of
from umv2_megatron.data.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer, build_tokenizer

CHAT_TEMPLATE = "chat_template.jinja"
_SPACE = "\u2581"
# Settings of a tokenizer_config.json that name code, or inputs that the model has not, or that change the ids, which
# tokenizer.json alone says.
_NOT_KEPT = ("auto_map", "backend", "model_input_names", "add_bos_token", "add_eos_token", "added_tokens_decoder",
             "fix_mistral_regex")  # fmt: skip
_LISTS_OF_TOKENS = ("additional_special_tokens", "extra_special_tokens")

PARAGRAPH = (
    "The memory of a model need not lie where its arithmetic is done. A token that looks up thirty-two rows of a table "
    "with a million of them reads as much from a table of ten million; so the table may grow, and what one step moves "
    "stays the same. In 2025 a baker in Łódź, who kept his recipes in a ledger of 1 200 pages, put it like this: “I "
    "never read the book – I read the page.” Whether he was right depends on the index: def find(page): return "
    "ledger[page % 1200]  # and nothing else.\n\n\tThe rest follows: cost = rows × width, as 32 × 192 = 6 144.\n"
)
"""Plain English with a few other characters, code and white space; our own."""

_TEXTS = (
    PARAGRAPH,
    "",
    " ",
    "   leading and trailing   ",
    "tabs\tand\nline feeds\r\n\r\n\n",
    "Numbers 0123456789 3.14159 1e-5 0x7F -42 (1,234,567)",
    "def f(x):\n    return {'a': [x, x**2], \"b\": None}\n",
    "Größe, naïve café, Ελληνικά, русский язык, 日本語のテキスト, 한국어, العربية, עברית, हिन्दी",
    "emoji 👩‍🔬🏳️‍🌈 and combining e\u0301 a\u030a, ligature \ufb01, wide \uff21\uff22, nbsp\u00a0here, zero\u200bwidth",
    "\u0001\u001f\u007f control characters \ufeff",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!!!!!!!!!!!!!!!!----------------",
    "x" * 300 + " " * 50 + "\n" * 20,
    "https://example.org/a/b?c=d&e=%20f#g user@example.org C:\\dir\\file.txt",
)


def export_tokenizer(
    config: dict[str, Any], directory: Path, tokenizer_model: str | None, say: Callable[[str], None]
) -> int | None:
    """Write the tokenizer of a checkpoint's ``config`` into ``directory``; returns the id of the end-of-document token.

    Returns None, and writes nothing, for a NullTokenizer. Raises ``ValueError`` naming --tokenizer-model where its file
    cannot be read, and ``ConversionError`` where the exported tokenizer gives other ids.
    """
    values = config["values"]
    if values["tokenizer_type"] == "NullTokenizer":
        say("the run's tokenizer is NullTokenizer, which has no text: no tokenizer is exported")
        return None
    model = tokenizer_model or values["tokenizer_model"]
    tokenizer = build_tokenizer(values["tokenizer_type"], model, values["vocab_size"])
    settings: dict[str, Any] = {}
    if isinstance(tokenizer, HuggingFaceTokenizer):
        given = Path(model) / "tokenizer.json" if Path(model).is_dir() else Path(model)
        text = _only_text(given.read_text(encoding="utf-8"))
        settings = _given_settings(given.parent, text)
        if (given.parent / CHAT_TEMPLATE).is_file():
            shutil.copyfile(given.parent / CHAT_TEMPLATE, directory / CHAT_TEMPLATE)
    elif isinstance(tokenizer, SentencePieceTokenizer):
        text = _from_sentencepiece(Path(model)).to_str()
    else:
        text = _byte_level().to_str()
    check_same_ids(tokenizer, text)
    end = _token_of(text, tokenizer.eod)
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    settings = {
        "pad_token": end,
        **settings,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_of(values),
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return tokenizer.eod


def end_of_documents(config: dict[str, Any], tokenizer_model: str | None, say: Callable[[str], None]) -> int | None:
    """The id of the end-of-document token of a checkpoint's ``config``.

    Returns None for a NullTokenizer, and with a line to ``say`` where the tokenizer's file cannot be read.
    """
    values = config["values"]
    if values["tokenizer_type"] == "NullTokenizer":
        return None
    try:
        model = tokenizer_model or values["tokenizer_model"]
        return build_tokenizer(values["tokenizer_type"], model, values["vocab_size"]).eod
    except ValueError as error:
        say(f"the export names no end-of-document token, so that generating does not end by itself: {error}")
        return None


def check_same_ids(tokenizer: Tokenizer, text: str) -> None:
    """Compare the ids of ``tokenizer`` with those of a tokenizer.json, which must not add any to a text by itself.
    Raises ``ConversionError`` for a difference."""
    import tokenizers

    exported = tokenizers.Tokenizer.from_str(text)
    for sample, special in itertools.product(_TEXTS, (False, True)):
        expected, found = tokenizer.tokenize(sample), exported.encode(sample, add_special_tokens=special).ids
        if expected != found:
            at = next((i for i, pair in enumerate(zip(expected, found)) if pair[0] != pair[1]), len(expected))
            raise ConversionError(
                f"the tokenizer cannot be exported with the same ids: {sample[:40]!r} gives {expected[at : at + 4]} "
                f"and {found[at : at + 4]} from token {at} on; give --no-tokenizer, and use the run's own tokenizer"
            )


def _only_text(text: str) -> str:
    """A tokenizer.json without its truncation, padding, and post-processors that add tokens: training has none of them,
    and tokenizer(prompt) in transformers would apply all. One that has none stays as it is, and so keeps its hash."""
    import tokenizers

    made = tokenizers.Tokenizer.from_str(text)
    adds = any(made.num_special_tokens_to_add(is_pair) for is_pair in (False, True))
    if made.truncation is None and made.padding is None and not adds:
        return text
    content = json.loads(text)
    content["truncation"] = content["padding"] = None
    if adds:
        content["post_processor"] = _byte_level_part(content["post_processor"])
    return json.dumps(content, ensure_ascii=False, indent=2)


def _byte_level_part(processor: dict[str, Any]) -> dict[str, Any] | None:
    """What of a post-processor adds no tokens: ByteLevel, which places words in the text."""
    if processor["type"] != "Sequence":
        return processor if processor["type"] == "ByteLevel" else None
    parts = [part for each in processor["processors"] if (part := _byte_level_part(each)) is not None]
    return {**processor, "processors": parts} if parts else None


def _given_settings(folder: Path, text: str) -> dict[str, Any]:
    """The settings beside a run's tokenizer.json (its content: ``text``) that an export keeps: names of tokens that it
    has, its chat template, and others that leave ids alone."""
    import tokenizers

    vocabulary = tokenizers.Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
    given: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            given |= json.loads((folder / name).read_text(encoding="utf-8"))
    kept: dict[str, Any] = {}
    for key, value in given.items():
        if key in _NOT_KEPT:
            continue
        if key in _LISTS_OF_TOKENS and isinstance(value, list):
            value = [token for each in value if (token := _content(each)) in vocabulary]
        elif key in _LISTS_OF_TOKENS and isinstance(value, dict):
            value = {name: token for name, each in value.items() if (token := _content(each)) in vocabulary}
        elif key.endswith("_token"):
            # transformers would give a token that the vocabulary lacks an id beyond the model's
            value = _content(value)
            if value not in vocabulary:
                continue
        kept[key] = value
    return kept


def _content(token: Any) -> str | None:
    """The text of a token, which these files write as it is or with its properties; tokenizer.json has those, too."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _token_of(text: str, number: int) -> str:
    import tokenizers

    token = tokenizers.Tokenizer.from_str(text).id_to_token(number)
    assert token is not None, f"no token has id {number}"
    return token


def _byte_level() -> Any:
    """Ids 0 to 255 are the bytes, 256 ends documents."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # The characters by which byte-level tokenizers write bytes: printable ones stand for themselves.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    made = Tokenizer(models.BPE(vocab={letters[byte]: byte for byte in range(256)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    return made


# -- SentencePiece -------------------------------------------------------------------------------------------------

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_UNIGRAM, _BPE = 1, 2


def _from_sentencepiece(path: Path) -> Any:
    """A tokenizers.Tokenizer with the pieces, scores and normalisation of a SentencePiece ``.model`` file."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    pieces = [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    unknown = next((i for i, (_, _, kind) in enumerate(pieces) if kind == _UNKNOWN), None)
    if trainer.model_type == _UNIGRAM:
        model: Any = models.Unigram(
            [(text, score) for text, score, _ in pieces], unk_id=unknown, byte_fallback=trainer.byte_fallback
        )
    elif trainer.model_type == _BPE:
        model = models.BPE(
            vocab={text: i for i, (text, _, _) in enumerate(pieces)},
            merges=_merges(pieces),
            unk_token=None if unknown is None else pieces[unknown][0],
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    else:
        raise ConversionError(f"{path} is a SentencePiece model of words or characters; expected BPE or unigram")
    made = Tokenizer(model)
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(_regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    if rules.escape_whitespaces:
        steps.append(normalizers.Replace(" ", _SPACE))
    if steps:
        made.normalizer = normalizers.Sequence(steps)
    if trainer.model_type == _UNIGRAM:
        # Only unigram pieces would otherwise be sought across the whole text at once, which takes long.
        made.pre_tokenizer = pre_tokenizers.Split(_regex(f"(?<=[^{_SPACE}])(?={_SPACE})"), "isolated")
    parts: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        parts.append(decoders.Strip(content=" ", left=1))
    made.decoder = decoders.Sequence(parts)
    for i, (text, _, kind) in enumerate(pieces):
        if kind in (_CONTROL, _UNKNOWN):
            made.add_special_tokens([AddedToken(text, special=True, normalized=False)])
        elif kind == _USER_DEFINED:
            made.add_tokens([AddedToken(text, special=False, normalized=False)])
        assert made.token_to_id(text) == i, f"{text!r} lost its id {i}"
    return made


def _regex(pattern: str) -> Any:
    from tokenizers import Regex

    return Regex(pattern)


def _merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """The merges of a BPE model, best first: SentencePiece stores the pieces, not how they came about.

    It merges the neighbours whose union has the best score; so every split of a piece into two pieces is a merge of
    that piece's rank. Among splits of one piece the order does not matter: which is met depends on the text.
    """
    mergeable = {text: score for text, score, kind in pieces if kind in (_NORMAL, _USER_DEFINED)}
    ranked = sorted((-score, i, text) for i, (text, score, kind) in enumerate(pieces) if kind == _NORMAL)
    return [
        (text[:cut], text[cut:])
        for _, _, text in ranked
        for cut in range(1, len(text))
        if text[:cut] in mergeable and text[cut:] in mergeable
    ]
