"""Exported tokenizers, loaded by AutoTokenizer, give the ids and texts of the run's own."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from umv2_megatron.conversion import tokenizer_files
from umv2_megatron.conversion.safetensors_files import ConversionError
from umv2_megatron.conversion.tokenizer_files import end_of_documents, export_tokenizer
from umv2_megatron.conversion.tokenizer_texts import PARAGRAPH, Words, check_same_ids
from umv2_megatron.data.tokenizers import build_tokenizer


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


def test_bytes(tmp_path):
    loaded = _check_export(_values("ByteLevelTokenizer", None), tmp_path / "export")
    assert loaded("é")["input_ids"] == list("é".encode()) and len(loaded) == 257


def _byte_pairs(folder: Path, specials: list[str], post_processor: Any = None) -> Any:
    """A byte-level BPE with ``specials`` as its first tokens, saved in ``folder``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        _lines(), trainers.BpeTrainer(vocab_size=500, special_tokens=specials, initial_alphabet=alphabet)
    )
    if post_processor is not None:
        made.post_processor = post_processor
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    return made


def _adding_processors() -> dict[str, Any]:
    """The post-processors that add <s> (id 1) before a text and </s> (id 2) after it."""
    from tokenizers import processors

    template = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return {
        "template": template,
        "sequence": processors.Sequence([processors.ByteLevel(trim_offsets=False), template]),
        "bert": processors.BertProcessing(("</s>", 2), ("<s>", 1)),
        "roberta": processors.RobertaProcessing(("</s>", 2), ("<s>", 1)),
    }


@pytest.mark.parametrize("kind", ["template", "sequence", "bert", "roberta"])
def test_an_exported_hugging_face_file_adds_and_cuts_nothing(kind, tmp_path):
    made = _byte_pairs(tmp_path / "own", ["<unk>", "<s>", "</s>"], _adding_processors()[kind])
    made.enable_truncation(5)
    made.enable_padding(pad_id=2, pad_token="</s>", length=9)
    made.save(str(tmp_path / "own" / "tokenizer.json"))
    loaded = _check_export(_values("HuggingFaceTokenizer", tmp_path / "own"), tmp_path / "export")
    assert loaded("def", "def")["input_ids"] == loaded("def")["input_ids"] * 2
    written = json.loads((tmp_path / "export" / "tokenizer.json").read_text(encoding="utf-8"))
    assert written["truncation"] is written["padding"] is None
    left = written["post_processor"]
    if kind == "sequence":
        assert [(part["type"], part["trim_offsets"]) for part in left["processors"]] == [("ByteLevel", False)]
    else:
        assert left is None
    # what is exported from a checkpoint made of the export has the same hash, which corpora are compared by
    again = tmp_path / "again"
    again.mkdir()
    export_tokenizer(_values("HuggingFaceTokenizer", tmp_path / "export"), again, None, lambda line: None)
    assert (again / "tokenizer.json").read_bytes() == (tmp_path / "export" / "tokenizer.json").read_bytes()


def test_tokens_that_a_file_would_add_are_refused(tmp_path):
    made = _byte_pairs(tmp_path / "own", ["<unk>", "<s>", "</s>"], _adding_processors()["template"])
    with pytest.raises(ConversionError, match="cannot be exported with the same ids"):
        check_same_ids(build_tokenizer("HuggingFaceTokenizer", str(tmp_path / "own")), made.to_str(), Words())


def test_names_of_tokens_and_chat_template_are_kept(tmp_path):
    own, export = tmp_path / "own", tmp_path / "export"
    _byte_pairs(own, ["<unk>", "<s>", "</s>", "<|user|>"])
    settings = {
        "auto_map": {"AutoTokenizer": ["evil.py", None]},
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": True,
        "added_tokens_decoder": {"999": {"content": "<new>"}},
        "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False},
        "mask_token": "<mask>",
        "eos_token": "</s>",
        "additional_special_tokens": ["<|user|>", "<|nobody|>"],
        "padding_side": "left",
        "model_input_names": ["input_ids", "token_type_ids"],
        "model_max_length": 10**30,
    }
    (own / "tokenizer_config.json").write_text(json.dumps(settings))
    (own / "special_tokens_map.json").write_text(json.dumps({"unk_token": {"content": "<unk>", "lstrip": False}}))
    template = "{{ bos_token }}{% for each in messages %}<|user|>{{ each.content }}{% endfor %}"
    (own / "chat_template.jinja").write_text(template)
    loaded = _check_export(_values("HuggingFaceTokenizer", own), export)
    assert (loaded.bos_token_id, loaded.unk_token_id, loaded.pad_token_id) == (1, 0, 2)
    assert loaded.mask_token is None and loaded.model_max_length == 64 and loaded.padding_side == "left"
    assert len(loaded) == 500 and list(loaded.extra_special_tokens) == ["<|user|>"]
    assert loaded.apply_chat_template([{"role": "user", "content": "def"}], tokenize=False) == "<s><|user|>def"
    written = json.loads((export / "tokenizer_config.json").read_text())
    assert not {"auto_map", "add_bos_token", "add_eos_token", "added_tokens_decoder", "mask_token"} & written.keys()
    assert set(loaded("def")) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("name", ["own", "own/tokenizer.json"])
def test_a_hugging_face_file_that_adds_nothing_is_kept_as_it_is(name, tmp_path):
    _byte_pairs(tmp_path / "own", ["<eos>"])
    (tmp_path / "own" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    export = tmp_path / "export"
    export.mkdir()
    eod = export_tokenizer(_values("HuggingFaceTokenizer", tmp_path / name), export, None, lambda line: None)
    assert (export / "tokenizer.json").read_bytes() == (tmp_path / "own" / "tokenizer.json").read_bytes()
    own, back = (build_tokenizer("HuggingFaceTokenizer", str(path)) for path in (tmp_path / "own", export))
    assert back.eod == own.eod == eod
    assert [back.tokenize(line) for line in _lines()] == [own.tokenize(line) for line in _lines()]


def test_numbers_have_no_tokenizer_to_export(tmp_path):
    said: list[str] = []
    assert export_tokenizer(_values("NullTokenizer", None, 9), tmp_path, None, said.append) is None
    assert "NullTokenizer" in said[0] and not list(tmp_path.iterdir())


def test_the_end_of_documents_is_known_without_an_exported_tokenizer(tmp_path):
    said: list[str] = []
    _byte_pairs(tmp_path / "own", ["<unk>", "</s>"])
    assert end_of_documents(_values("HuggingFaceTokenizer", tmp_path / "own"), None, said.append) == 1
    assert end_of_documents(_values("HuggingFaceTokenizer", tmp_path / "gone"), str(tmp_path / "own"), said.append) == 1
    assert end_of_documents(_values("ByteLevelTokenizer", None), None, said.append) == 256
    assert end_of_documents(_values("NullTokenizer", None, 9), None, said.append) is None and not said
    assert end_of_documents(_values("HuggingFaceTokenizer", tmp_path / "gone"), None, said.append) is None
    assert len(said) == 1 and f"--tokenizer-model {tmp_path / 'gone'} cannot be read" in said[0]


def test_other_ids_are_refused(tmp_path):
    text = tokenizer_files._byte_level().to_str()
    content = json.loads(text)
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    with pytest.raises(ConversionError, match="cannot be exported with the same ids"):
        check_same_ids(build_tokenizer("ByteLevelTokenizer"), json.dumps(content), Words())
