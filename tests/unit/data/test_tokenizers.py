"""Tokenizers give texts back exactly, know their end-of-document token, and refuse what cannot work."""

import json

import pytest
from data_helpers import run_tool, sources, write_jsonl

from umv2_megatron.data.tokenizers import build_tokenizer

HARD_TEXTS = [
    "",
    " ",
    "\n",
    "  two  spaces  \n\n\ttabs\t\t\r\n",
    "</s><s><unk><0x41><|endoftext|>",
    "\u2581 and \u2581\u2581",
    "é 漢字 😀 \u200b \u00a0 e\u0301 ﬁ ½",
    "x" * 5000,
    "a\n" * 500,
]


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sentencepiece")
    corpus = write_jsonl(directory / "corpus.jsonl", sources())
    arguments = ["--input", corpus, "--vocab-size", 1000, "--input-sentence-size", 5000]
    for name in ("a", "b"):
        done = run_tool("train_tokenizer.py", *arguments, "--output-prefix", directory / name)
        assert done.returncode == 0, done.stderr
    return directory / "a.model"


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory):
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sources(5), trainer)
    tokenizer.enable_truncation(4)
    file = tmp_path_factory.mktemp("hugging_face") / "tokenizer.json"
    tokenizer.save(str(file))
    return file


def test_sentencepiece_returns_every_text(sentencepiece_model):
    tokenizer = build_tokenizer("SentencePieceTokenizer", str(sentencepiece_model))
    assert (tokenizer.vocab_size, tokenizer.eod) == (1000, 2)
    for text in HARD_TEXTS + sources(80):
        ids = tokenizer.tokenize(text)
        assert tokenizer.eod not in ids
        assert tokenizer.detokenize(ids) == text
    assert tokenizer.detokenize([*tokenizer.tokenize("a b"), tokenizer.eod]) == "a b"


def test_sentencepiece_learns_indentation(sentencepiece_model):
    tokenizer = build_tokenizer("SentencePieceTokenizer", str(sentencepiece_model))
    assert len(tokenizer.tokenize("\n        return None\n")) <= 6


def test_sentencepiece_training_is_deterministic(sentencepiece_model):
    assert sentencepiece_model.read_bytes() == sentencepiece_model.with_name("b.model").read_bytes()
    assert not list(sentencepiece_model.parent.glob("*.incomplete"))


def test_training_draws_lines_from_the_whole_corpus():
    from umv2_megatron.commands.train_tokenizer import draw

    counts = [0] * 100
    for seed in range(400):
        drawn = draw(map(str, range(100)), 10, seed)
        assert len(set(drawn)) == 10
        for line in drawn:
            counts[int(line)] += 1
    assert min(counts) > 15 and max(counts) < 75  # 40 expected, standard deviation 6
    assert draw(iter("abc"), 10, 0) == ["a", "b", "c"]
    assert draw(map(str, range(1000)), 10, 7) == draw(map(str, range(1000)), 10, 7)


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["--vocab-size", 100], "--vocab-size"),
        (["--vocab-size", 100_000], "--vocab-size"),
        (["--vocab-size", 500, "--character-coverage", 2], "--character-coverage"),
        (["--vocab-size", 500, "--input", "/nowhere/*.jsonl"], "--input"),
    ],
)
def test_training_refuses_wrong_flags(tmp_path, arguments, flag):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", sources(3))
    done = run_tool("train_tokenizer.py", "--input", corpus, "--output-prefix", tmp_path / "t", *arguments)
    assert done.returncode == 2 and flag in done.stderr and "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl"]


def test_training_names_the_bad_line(tmp_path):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", sources(3))
    corpus.write_text(corpus.read_text() + "{broken\n")
    arguments = ["--input", corpus, "--output-prefix", tmp_path / "t", "--vocab-size", 400]
    done = run_tool("train_tokenizer.py", *arguments)
    assert done.returncode == 1 and f"{corpus}:4: invalid JSON" in done.stderr
    assert not (tmp_path / "t.model").exists()
    done = run_tool("train_tokenizer.py", *arguments, "--on-bad-line", "skip")
    assert done.returncode == 0 and "1 bad lines left out" in done.stdout


def test_hugging_face_file_and_directory(tokenizer_json):
    for path in (tokenizer_json, tokenizer_json.parent):
        tokenizer = build_tokenizer("HuggingFaceTokenizer", str(path))
        assert (tokenizer.vocab_size, tokenizer.eod) == (600, 0)
        for text in HARD_TEXTS + sources(5):
            ids = tokenizer.tokenize(text)
            assert tokenizer.eod not in ids, "a special token inside a text is text"
            assert tokenizer.detokenize([*ids, tokenizer.eod]) == text, "truncation must be off"


def test_hugging_face_end_of_document(tokenizer_json, tmp_path):
    definition = json.loads(tokenizer_json.read_text())
    definition["added_tokens"][0]["content"] = "<stop>"
    definition["model"]["vocab"]["<stop>"] = definition["model"]["vocab"].pop("<|endoftext|>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(ValueError, match="no end-of-document token"):
        build_tokenizer("HuggingFaceTokenizer", str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
    assert build_tokenizer("HuggingFaceTokenizer", str(tmp_path)).eod == 0


def test_a_text_that_the_library_refuses(sentencepiece_model, tmp_path):
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<|endoftext|>": 0, "one": 1}))
    words.save(str(tmp_path / "tokenizer.json"))
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(tmp_path))
    assert tokenizer.tokenize("one") == [1]
    for text in ("two", "\ud800"):
        with pytest.raises(ValueError, match="the tokenizer cannot encode this text: "):
            tokenizer.tokenize(text)

    class Refusing:
        def encode(self, text):
            raise RuntimeError("no such piece")

    tokenizer = build_tokenizer("SentencePieceTokenizer", str(sentencepiece_model))
    tokenizer._processor = Refusing()
    for text in ("a", "a\u2581b"):
        with pytest.raises(ValueError, match="the tokenizer cannot encode this text: no such piece"):
            tokenizer.tokenize(text)


def test_byte_level_returns_every_text():
    tokenizer = build_tokenizer("ByteLevelTokenizer")
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, 256)
    for text in [*HARD_TEXTS, "".join(map(chr, range(0xD800))), "\U0010ffff"]:
        ids = tokenizer.tokenize(text)
        assert all(0 <= i < 256 for i in ids)
        assert tokenizer.detokenize([*ids, tokenizer.eod]) == text
    with pytest.raises(ValueError):
        tokenizer.tokenize("\ud800")
    assert tokenizer.detokenize([0xC3]) == "\ufffd"


def test_null_tokenizer_counts_like_megatron():
    tokenizer = build_tokenizer("NullTokenizer", vocab_size=100)
    assert (tokenizer.vocab_size, tokenizer.eod) == (101, 100)
    assert tokenizer.tokenize("3 1  4") == [3, 1, 4]
    with pytest.raises(ValueError, match="numbers"):
        tokenizer.tokenize("text")


def test_identity_follows_the_content(sentencepiece_model, tmp_path):
    moved = tmp_path / "moved.model"
    moved.write_bytes(sentencepiece_model.read_bytes())
    first, second = (build_tokenizer("SentencePieceTokenizer", str(path)) for path in (sentencepiece_model, moved))
    assert first.unique_identifiers == second.unique_identifiers
    assert first.unique_identifiers != build_tokenizer("ByteLevelTokenizer").unique_identifiers


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("GPT2", None, None), "--tokenizer-type"),
        (("SentencePieceTokenizer", None, None), "--tokenizer-model"),
        (("SentencePieceTokenizer", "/nowhere.model", None), "/nowhere.model"),
        (("HuggingFaceTokenizer", "/nowhere.json", None), "/nowhere.json"),
        (("SentencePieceTokenizer", __file__, None), "not a SentencePiece model"),
        (("HuggingFaceTokenizer", __file__, None), "not a Hugging Face"),
        (("HuggingFaceTokenizer", "/", None), "no tokenizer.json"),
        (("NullTokenizer", None, None), "--vocab-size"),
        (("ByteLevelTokenizer", None, 100), "--vocab-size"),
    ],
)
def test_refused_tokenizers(arguments, words):
    with pytest.raises(ValueError, match=words) as caught:
        build_tokenizer(*arguments)
    assert "\n" not in str(caught.value)
