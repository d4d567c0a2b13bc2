"""Vocabularies of tiktoken: mcore's ids, every text back, the same ids in an export, and words for what is wrong."""

import base64
import json
import sys
from collections import Counter

import pytest
from data_helpers import run_tool, sources, write_jsonl

pytest.importorskip("tiktoken", reason="requirements-inputs.txt is not installed")

from umv2_megatron.conversion.tokenizer_files import export_tokenizer  # noqa: E402
from umv2_megatron.data.indexing import read_meta, read_tokens  # noqa: E402
from umv2_megatron.data.tiktoken_files import TikTokenSettings  # noqa: E402
from umv2_megatron.data.tokenizers import build_tokenizer, tokenizer_of  # noqa: E402

TEXTS = ["", " ", "the  cat\n\n\tsat 123 \u20ac \U0001f600", "def f(x):\r\n  return x", "</s><|endoftext|>", "a" * 5000]


def ranks():
    """Some pairs of bytes joined again and again, as training would: 256 bytes and 300 more."""
    words = [*(text.encode() for text in sources(3)), b"the cat sat", "\u20ac\U0001f600".encode()]
    tokens = [bytes([i]) for i in range(256)]
    known = set(tokens)
    data = b" ".join(words)[:20_000]
    parts = [data[i : i + 1] for i in range(len(data))]
    for _ in range(300):
        (left, right), _count = Counter(zip(parts, parts[1:])).most_common(1)[0]
        joined, i = [], 0
        while i < len(parts):
            if parts[i : i + 2] == [left, right]:
                joined.append(left + right)
                i += 2
            else:
                joined.append(parts[i])
                i += 1
        parts = joined
        if left + right not in known:
            known.add(left + right)
            tokens.append(left + right)
    return tokens


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiktoken")
    tokens = ranks()
    entries = [
        {"rank": i, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode(errors="replace")}
        for i, token in enumerate(tokens)
    ]
    (folder / "vocab.json").write_text(json.dumps(entries))
    lines = [f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens)]
    (folder / "vocab.tiktoken").write_text("".join(lines))
    return folder, len(tokens)


@pytest.mark.parametrize("pattern", ["v1", "v2", None])
@pytest.mark.parametrize("cut", [0, 40])
def test_ids_of_mcore(files, pattern, cut):
    from megatron.core.tokenizers.text.libraries.tiktoken_tokenizer import TikTokenTokenizer

    folder, count = files
    path, size = str(folder / "vocab.json"), 100 + count - cut
    ours = build_tokenizer("TikTokenizer", path, size, TikTokenSettings(pattern, 100))
    theirs = TikTokenTokenizer(path, num_special_tokens=100, pattern=pattern or "v2", vocab_size=size)
    assert (ours.vocab_size, ours.eod) == (theirs.vocab_size, theirs.eod) == (size, 2)
    for text in [*TEXTS[:4], TEXTS[5], *sources(6)]:
        ids = ours.tokenize(text)
        assert ids == theirs.text_to_ids(text)
        assert ours.detokenize([*ids, ours.eod]) == text
    special = ours.tokenize("</s><|endoftext|>")
    assert ours.eod not in special and ours.detokenize(special) == "</s><|endoftext|>"
    assert (ours.id_of("<mask>"), ours.id_of("<SPECIAL_99>"), ours.id_of("e"), ours.id_of("55")) == (3, 99, 201, 55)


def test_lines_of_base64(files):
    folder, count = files
    path = str(folder / "vocab.tiktoken")
    settings = TikTokenSettings("v2", None, ("<|begin|>", f"<|endoftext|>={count + 5}", "<|pad|>"))
    tokenizer = build_tokenizer("TikTokenizer", path, None, settings)
    assert (tokenizer.id_of("<|begin|>"), tokenizer.eod, tokenizer.id_of("<|pad|>")) == (count, count + 5, count + 6)
    assert tokenizer.vocab_size == count + 7
    for text in TEXTS + sources(4):
        assert tokenizer.detokenize([*tokenizer.tokenize(text), tokenizer.eod, count + 3]) == text
    again = [settings._replace(pattern="v1"), settings._replace(special_tokens=("<|endoftext|>",))]
    hashes = {build_tokenizer("TikTokenizer", path, None, each).sha256 for each in (settings, *again)}
    assert len(hashes) == 3


@pytest.mark.parametrize("kind", ["vocab.json", "vocab.tiktoken"])
def test_an_export_gives_the_same_ids(files, tmp_path, kind):
    from transformers import AutoTokenizer

    folder, count = files
    values = {
        "tokenizer_type": "TikTokenizer", "tokenizer_model": str(folder / kind), "vocab_size": None,
        "tiktoken_pattern": "v2", "tiktoken_num_special_tokens": 20, "tokenizer_special_tokens": None,
        "seq_length": 64, "position_embedding_type": "rope", "max_position_embeddings": 64,
    }  # fmt: skip
    if kind == "vocab.tiktoken":
        values |= {"tiktoken_num_special_tokens": None, "tokenizer_special_tokens": [f"<|endoftext|>={count + 2}"]}
    said = []
    eod = export_tokenizer({"values": values}, tmp_path, None, said.append)
    assert "the same ids for" in said[0]
    exported = AutoTokenizer.from_pretrained(tmp_path)
    ours = tokenizer_of(values)
    assert exported.eos_token_id == eod == ours.eod
    for text in [*TEXTS[:4], TEXTS[5], *sources(5)]:
        assert exported(text)["input_ids"] == ours.tokenize(text)


def test_the_tool_and_its_identity(files, tmp_path):
    folder, _ = files
    corpus = write_jsonl(tmp_path / "a.jsonl", ["the cat", "</s> sat"])
    flags = ["--input", corpus, "--tokenizer-type", "TikTokenizer", "--tokenizer-model", folder / "vocab.json"]
    done = run_tool("preprocess_data.py", *flags, "--append-eod", "--output-prefix", tmp_path / "p", "--workers", 2)
    assert done.returncode == 0, done.stderr
    prefix = str(tmp_path / "p_text_document")
    tokenizer = build_tokenizer("TikTokenizer", str(folder / "vocab.json"))
    assert read_tokens(prefix).tolist() == [*tokenizer.tokenize("the cat"), 2, *tokenizer.tokenize("</s> sat"), 2]
    assert read_meta(prefix)["tokenizer"]["sha256"] == tokenizer.sha256
    flags = [*flags[:3], "ByteLevelTokenizer", "--tiktoken-pattern", "v1", "--output-prefix", tmp_path / "q"]
    done = run_tool("preprocess_data.py", *flags)
    assert done.returncode == 2 and "are for TikTokenizer" in done.stderr


WRONG = [
    ("vocab.tiktoken", TikTokenSettings(None, None, ("</s>",)), "--tiktoken-pattern is missing"),
    ("vocab.tiktoken", TikTokenSettings("v1"), "has no end-of-document token: name one by --tokenizer-special-tokens"),
    ("vocab.tiktoken", TikTokenSettings("v1", 5), "--tiktoken-num-special-tokens is for Megatron's .json"),
    ("vocab.tiktoken", TikTokenSettings("v1", None, ("</s>=3",)), "gives </s> the id 3, a rank of the file"),
    ("vocab.tiktoken", TikTokenSettings("v1", None, ("</s>", "</s>")), "names </s> twice"),
    ("vocab.tiktoken", TikTokenSettings("(", None, ("</s>",)), "--tiktoken-pattern is no regular expression"),
    ("vocab.json", TikTokenSettings(None, 3), "--tiktoken-num-special-tokens is 3: expected 7 or more"),
    ("vocab.json", TikTokenSettings(None, None, ("</s>",)), "--tokenizer-special-tokens lacks <cls>"),
    ("broken.json", TikTokenSettings(), "is no vocabulary of tiktoken (Expecting property name"),
    ("nested.json", TikTokenSettings(), "is no vocabulary of tiktoken (maximum recursion depth"),
    ("letters.json", TikTokenSettings(), "is no vocabulary of tiktoken ('é' is not base64"),
    ("few.json", TikTokenSettings(), "is no vocabulary of tiktoken (1 entries are read, which are not all bytes"),
    ("vocab.tiktoken", TikTokenSettings("v1", None, ("</s>=99999999999",)), "expected one below 2147483648"),
    ("large.tiktoken", TikTokenSettings("v1"), "is no vocabulary of tiktoken (line 1 is not base64 and rank)"),
    ("list.json", TikTokenSettings(), "is no vocabulary of tiktoken (KeyError: 'token_bytes'"),
    ("text.tiktoken", TikTokenSettings("v1"), "is no vocabulary of tiktoken (line 1 is not base64 and rank)"),
    ("few.tiktoken", TikTokenSettings("v1"), "a rank stands twice, or a byte has none"),
    ("missing.json", TikTokenSettings(), "cannot be read (No such file or directory)"),
]


@pytest.mark.parametrize(("name", "settings", "words"), WRONG)
def test_refused(files, tmp_path, name, settings, words):
    contents = {
        "broken.json": "{", "list.json": '[{"rank": 0}]', "text.tiktoken": "three words here", "few.tiktoken": "YQ== 0",
        "nested.json": "[" * 100_000, "letters.json": '[{"rank": 0, "token_bytes": "é"}]',
        "few.json": '[{"rank": 0, "token_bytes": "AA=="}]', "large.tiktoken": "YQ== 99999999999",
    }  # fmt: skip
    path = files[0] / name
    if name in contents:
        path = tmp_path / name
        path.write_text(contents[name], encoding="utf-8")
    with pytest.raises(ValueError) as raised:
        build_tokenizer("TikTokenizer", str(path), None, settings)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_without_the_package(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ValueError, match="needs the module tiktoken, which is not installed: pip install"):
        build_tokenizer("TikTokenizer", str(files[0] / "vocab.json"))


def test_a_text_that_is_too_much_for_tiktoken(files):
    tokenizer = build_tokenizer("TikTokenizer", str(files[0] / "vocab.json"), None, TikTokenSettings("v1"))
    with pytest.raises(ValueError, match="the tokenizer cannot encode this text"):
        tokenizer.tokenize(" " * 3_000_000)
