"""SentencePiece models in Hugging Face form: the same ids, or a refusal that shows a text with other ones."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from test_tokenizer_files import _check_export, _lines, _values

from umv2_megatron.conversion import sentencepiece_files
from umv2_megatron.conversion.safetensors_files import ConversionError
from umv2_megatron.conversion.tokenizer_files import export_tokenizer

OURS = {
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "allow_whitespace_only_pieces": True,
    "user_defined_symbols": ["\n", "\t"],
}
"""What tools/train_tokenizer.py asks for."""

# U+2581 is how SentencePiece writes a space; a symbol with a plain one is in the vocabulary, but never found
SYMBOLS = ["\n", "\t", "for x", "the\u2581table", "able", "<a>", "日本", "\u2581\u2581"]


def _model(path: Path, **options: Any) -> Path:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_lines()[:400]), model_prefix=str(path.with_suffix("")), vocab_size=450, minloglevel=2,
        num_threads=1, hard_vocab_limit=False, **options,
    )  # fmt: skip
    return path


def _export(model: Path, folder: Path) -> str:
    """Export a model; returns what was said."""
    said: list[str] = []
    folder.mkdir()
    export_tokenizer(_values("SentencePieceTokenizer", model), folder, None, said.append)
    return "\n".join(said)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_as_our_tool_trains_it(model_type, tmp_path):
    model = _model(tmp_path / "t.model", model_type=model_type, **OURS)
    loaded = _check_export(_values("SentencePieceTokenizer", model), tmp_path / "export")
    assert loaded.decode(loaded("a\nb\tc  d")["input_ids"]) == "a\nb\tc  d"


KINDS = {
    "a space before each text, as Llama's": {"user_defined_symbols": [], "add_dummy_prefix": True},
    "a space behind each text": {
        "user_defined_symbols": [], "add_dummy_prefix": True, "treat_whitespace_as_suffix": True,
    },
    "runs of spaces removed": {
        "user_defined_symbols": [], "add_dummy_prefix": True, "remove_extra_whitespaces": True,
    },
    "symbols": {"user_defined_symbols": SYMBOLS},
    "pieces of several words": {"user_defined_symbols": SYMBOLS, "split_by_whitespace": False},
    "no bytes": {"byte_fallback": False},
}  # fmt: skip


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds(kind, model_type, tmp_path):
    model = _model(tmp_path / "t.model", model_type=model_type, **{**OURS, **KINDS[kind]})
    assert re.search(r"the same ids for \d{4} generated texts", _export(model, tmp_path / "export"))


def test_unigram_symbols_with_a_space_before_each_text(tmp_path):
    options = {**OURS, "add_dummy_prefix": True, "user_defined_symbols": SYMBOLS}
    model = _model(tmp_path / "t.model", model_type="unigram", **options)
    assert re.search(r"the same ids for \d{4} generated texts", _export(model, tmp_path / "export"))


def test_bpe_symbols_with_a_space_before_each_text_are_refused(tmp_path):
    options = {**OURS, "add_dummy_prefix": True, "user_defined_symbols": ["<a>"]}
    model = _model(tmp_path / "t.model", model_type="bpe", **options)
    with pytest.raises(ConversionError, match=r"user-defined symbols \('<a>' is the first\).*add_dummy_prefix"):
        _export(model, tmp_path / "export")


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_normalisation_that_differs_is_refused_with_a_text(model_type, tmp_path):
    """Of the table's rules for a letter and its marks tokenizers applies the first, SentencePiece the longest."""
    options = {**OURS, "normalization_rule_name": "nfkc"}
    model = _model(tmp_path / "t.model", model_type=model_type, **options)
    with pytest.raises(ConversionError, match=r"the text '[ -~]*\\u03[ -~]*' gives \[.*\] in training and \[.*\] in"):
        _export(model, tmp_path / "export")
    assert not list((tmp_path / "export").iterdir())


def test_the_text_of_a_byte_piece_is_text(tmp_path):
    model = _model(tmp_path / "t.model", model_type="unigram", **OURS)
    proto = sentencepiece_files.read_model(model)
    made = sentencepiece_files.tokenizer_of(proto, model)
    assert made.encode("<0x41>").ids != [made.token_to_id("<0x41>")]
    for piece in ("<0", "0x", "xA", "AA", "A>"):
        proto.pieces.add(piece=piece, score=-5.0)
    with pytest.raises(ConversionError, match="would take the text '<0x41>' for a byte"):
        sentencepiece_files.tokenizer_of(proto, model)


def test_many_control_pieces_take_seconds(tmp_path):
    """One call of the library for each took minutes for 26,000: it rebuilds its automaton in every call."""
    model = _model(tmp_path / "t.model", model_type="bpe", **OURS)
    proto = sentencepiece_files.read_model(model)
    for i in range(26_000):
        proto.pieces.add(piece=f"<extra_{i}>", type=3)
    started = time.process_time()
    made = sentencepiece_files.tokenizer_of(proto, model)
    assert time.process_time() - started < 15
    assert made.encode("a<extra_25999>").ids[-1] == len(proto.pieces) - 1
