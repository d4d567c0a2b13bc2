"""The run's tokenizer in Hugging Face form: tokenizer.json and tokenizer_config.json, with the same ids for every text.

Whatever the kind, the result is one ``tokenizer.json`` that AutoTokenizer loads without code of ours:

- HuggingFaceTokenizer: the run's own file, without what would add tokens to a text or cut it;
- SentencePieceTokenizer: BPE or unigram pieces, scores and normalisation read from the model's protobuf;
- TikTokenizer: a byte-level BPE with a merge for each way to join two tokens to one;
- ByteLevelTokenizer: 256 bytes and the end of documents, as a byte-level BPE without merges;
- NullTokenizer: numbers in, numbers out; there is no tokenizer to export.

Before anything is written both tokenizers encode generated texts (``tokenizer_texts.py``); one id that differs refuses
the export.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from umv2_megatron.conversion import sentencepiece_files, tiktoken_export
from umv2_megatron.conversion.settings import context_of
from umv2_megatron.conversion.tokenizer_texts import Words, check_same_ids
from umv2_megatron.data.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer, TikTokenizer, tokenizer_of

CHAT_TEMPLATE = "chat_template.jinja"
# Settings of a tokenizer_config.json that name code, or inputs that the model has not, or that change the ids, which
# tokenizer.json alone says.
_NOT_KEPT = ("auto_map", "backend", "model_input_names", "add_bos_token", "add_eos_token", "added_tokens_decoder",
             "fix_mistral_regex")  # fmt: skip
_LISTS_OF_TOKENS = ("additional_special_tokens", "extra_special_tokens")


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
    tokenizer = tokenizer_of(values, model)
    settings: dict[str, Any] = {}
    words, tie = Words(), None
    if isinstance(tokenizer, HuggingFaceTokenizer):
        given = Path(model) / "tokenizer.json" if Path(model).is_dir() else Path(model)
        text = _only_text(given.read_text(encoding="utf-8"))
        words = _words_of(text)
        settings = _given_settings(given.parent, text)
        if (given.parent / CHAT_TEMPLATE).is_file():
            shutil.copyfile(given.parent / CHAT_TEMPLATE, directory / CHAT_TEMPLATE)
    elif isinstance(tokenizer, SentencePieceTokenizer):
        proto = sentencepiece_files.read_model(Path(model))
        text = sentencepiece_files.tokenizer_of(proto, Path(model)).to_str()
        words, tie = sentencepiece_files.words_of(proto), sentencepiece_files.ties_of(proto)
    elif isinstance(tokenizer, TikTokenizer):
        text = tiktoken_export.tokenizer_of(tokenizer.vocabulary).to_str()
        words = _words_of(text)
    else:
        text = _byte_level().to_str()
    count, ties = check_same_ids(tokenizer, text, words, tie)
    split = f", {ties} of them but for pieces of equal score" if ties else ""
    say(f"the exported tokenizer gives the same ids for {count} generated texts{split}")
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
        return tokenizer_of(values, tokenizer_model).eod
    except ValueError as error:
        say(f"the export names no end-of-document token, so that generating does not end by itself: {error}")
        return None


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


def _words_of(text: str) -> Words:
    """What texts that try a tokenizer.json should hold. Special tokens are left out: the text of one is ordinary text
    in training, and the token itself in transformers."""
    content = json.loads(text)
    added = content.get("added_tokens") or []
    special = {token["content"] for token in added if token.get("special")}
    vocabulary = content["model"].get("vocab") or []
    pieces = [piece if isinstance(piece, str) else piece[0] for piece in vocabulary]
    symbols = [token["content"] for token in added if not token.get("special")]
    return Words([piece for piece in pieces if piece not in special], symbols)


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

    letters = tiktoken_export.letters_of_bytes()
    made = Tokenizer(models.BPE(vocab={letters[byte]: byte for byte in range(256)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    return made
