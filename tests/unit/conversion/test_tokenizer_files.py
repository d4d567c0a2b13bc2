"""Exported tokenizers, loaded by AutoTokenizer, give the ids and texts of the run's own."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from umv2_megatron.conversion import tokenizer_files
from umv2_megatron.conversion.safetensors_files import ConversionError
from umv2_megatron.conversion.tokenizer_files import PARAGRAPH, check_same_ids, export_tokenizer
from umv2_megatron.training.tokenizers import build_tokenizer


def _lines() -> list[str]:
    """Lines of many kinds: words, numbers, code, other scripts, any characters."""
    draw = random.Random(7)
    words = PARAGRAPH.split() + ["zażółć", "δοκιμή", "naïve", "x_1", "==", "12", "日本", "\t", "\u00a0"]
    lines = ["".join(draw.choice([" ", "  ", ""]) + draw.choice(words) for _ in range(12)) for _ in range(400)]
    # surrogates are no characters; U+2581 is SentencePiece's own mark of a space
    codes = [code for code in range(32, 0x3000) if code != 0x2581]
    return lines + ["".join(chr(draw.choice(codes)) for _ in range(20)) for _ in range(50)]


def _values(kind: str, model: Path | None, vocab_size: int | None = None) -> dict[str, Any]:
    values = {"tokenizer_type": kind, "tokenizer_model": None if model is None else str(model)}
    return {"values": {**values, "vocab_size": vocab_size, "seq_length": 64, "position_embedding_type": "rope"}}


def _check_export(config: dict[str, Any], folder: Path) -> Any:
    from transformers import AutoTokenizer

    folder.mkdir()
    eod = export_tokenizer(config, folder, None, lambda line: None)
    values = config["values"]
    own = build_tokenizer(values["tokenizer_type"], values["tokenizer_model"], values["vocab_size"])
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.eos_token_id == eod == own.eod
    for line in [*_lines(), PARAGRAPH, "", "  a  "]:
        ids = loaded(line)["input_ids"]
        assert ids == own.tokenize(line), line
        assert loaded.decode(ids) == own.detokenize(ids), line
    return loaded


def _sentencepiece(path: Path, **options: Any) -> Path:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_lines()[:400]), model_prefix=str(path.with_suffix("")), vocab_size=440, minloglevel=2,
        num_threads=1, **options,
    )  # fmt: skip
    return path


OURS = {
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "allow_whitespace_only_pieces": True,
    "user_defined_symbols": ["\n", "\t"],
}
"""What tools/train_tokenizer.py asks for."""


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_sentencepiece_as_our_tool_trains_it(model_type, tmp_path):
    model = _sentencepiece(tmp_path / "t.model", model_type=model_type, **OURS)
    loaded = _check_export(_values("SentencePieceTokenizer", model), tmp_path / "export")
    assert loaded.decode(loaded("a\nb\tc  d")["input_ids"]) == "a\nb\tc  d"


def test_sentencepiece_with_its_own_defaults_but_for_white_space(tmp_path):
    """As Llama's: a space put before the text, bytes for unknown characters, nothing normalised."""
    options = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    model = _sentencepiece(tmp_path / "t.model", model_type="bpe", **options)
    config = _values("SentencePieceTokenizer", model)
    (tmp_path / "export").mkdir()
    export_tokenizer(config, tmp_path / "export", None, lambda line: None)


def test_bytes(tmp_path):
    loaded = _check_export(_values("ByteLevelTokenizer", None), tmp_path / "export")
    assert loaded("é")["input_ids"] == list("é".encode()) and len(loaded) == 257


def test_a_hugging_face_file_is_kept_as_it_is(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        _lines(), trainers.BpeTrainer(vocab_size=500, special_tokens=["<eos>"], initial_alphabet=alphabet)
    )
    (tmp_path / "own").mkdir()
    made.save(str(tmp_path / "own" / "tokenizer.json"))
    (tmp_path / "own" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    export = tmp_path / "export"
    export.mkdir()
    eod = export_tokenizer(_values("HuggingFaceTokenizer", tmp_path / "own"), export, None, lambda line: None)
    assert (export / "tokenizer.json").read_bytes() == (tmp_path / "own" / "tokenizer.json").read_bytes()
    own, back = (build_tokenizer("HuggingFaceTokenizer", str(path)) for path in (tmp_path / "own", export))
    assert back.eod == own.eod == eod
    assert [back.tokenize(line) for line in _lines()] == [own.tokenize(line) for line in _lines()]


def test_numbers_have_no_tokenizer_to_export(tmp_path):
    said: list[str] = []
    assert export_tokenizer(_values("NullTokenizer", None, 9), tmp_path, None, said.append) is None
    assert "NullTokenizer" in said[0] and not list(tmp_path.iterdir())


def test_other_ids_are_refused(tmp_path):
    text = tokenizer_files._byte_level().to_str()
    content = json.loads(text)
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    with pytest.raises(ConversionError, match="cannot be exported with the same ids"):
        check_same_ids(build_tokenizer("ByteLevelTokenizer"), json.dumps(content))
