"""Loss, perplexity and bits per byte: against closed forms, a slow reference for the windows, and transformers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import tokenizers
import torch
from task_oracle import UniformModel

from umv2_megatron.data.indexing import IndexWriter
from umv2_megatron.data.tokenizers import ByteLevelTokenizer, NullTokenizer, build_tokenizer
from umv2_megatron.evaluation import scoring_model
from umv2_megatron.evaluation.huggingface_scoring import (
    HuggingFaceScoringModel,
    load_hugging_face,
    longest_context,
)
from umv2_megatron.evaluation.scoring_model import TokenScores
from umv2_megatron.evaluation.text_loss import documents_of, limited, text_bytes, text_loss

BYTES = ByteLevelTokenizer()
TEXTS = ["one text\n", "zwei Bücher, 漢字 and 😀 " * 4, "x"]


class ContextModel(UniformModel):
    """Pays as many nats for a token as tokens stand before it in its row."""

    def logprobs(self, tokens: torch.Tensor) -> TokenScores:
        shape = (len(tokens), tokens.shape[1] - 1)
        return TokenScores(-torch.arange(1.0, shape[1] + 1).expand(shape), torch.zeros(shape).long())


def ids_of(texts, eod=True, tokenizer=BYTES):
    return [np.array(tokenizer.tokenize(text) + [tokenizer.eod] * eod) for text in texts]


@pytest.mark.parametrize("form", ["stream", "documents"])
def test_a_uniform_model_pays_log_v(form):
    found = text_loss(UniformModel(BYTES), ids_of(TEXTS), form=form, context=10, stride=3, batch=4)
    size = sum(len(text.encode()) for text in TEXTS)
    assert (found.documents, found.tokens, found.bytes, found.end_of_document_tokens) == (3, size + 3, size, 3)
    assert found.loss == pytest.approx(math.log(257), rel=1e-6) and found.perplexity == pytest.approx(257, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(math.log2(257) * (size + 3) / size, rel=1e-6)
    assert found.loss_se == pytest.approx(0.0, abs=1e-6)


def context_of(target: int, length: int, context: int, stride: int) -> int:
    """Tokens before ``target`` (from 1) in the window that scores it, among ``length`` tokens; by the definition."""
    if target <= context:
        return target
    moves = math.ceil((target - context) / stride)
    return target - (min(length - 1, context + moves * stride) - context)


@pytest.mark.parametrize(("context", "stride"), [(8, 8), (8, 3), (8, 1), (200, 50)])
def test_windows_score_every_token_once_with_the_context_due(context, stride):
    documents = ids_of(TEXTS)
    for form, pieces in (("stream", [np.concatenate(documents)]), ("documents", documents)):
        found = text_loss(ContextModel(BYTES), documents, form=form, context=context, stride=stride, batch=3)
        expected = [
            context_of(target, len(piece) + 1, context, stride)
            for piece in pieces
            for target in range(1, len(piece) + 1)
        ]
        assert found.tokens == len(expected)
        assert found.loss * found.tokens == pytest.approx(sum(expected))
        if stride == 1:
            assert min(expected[context:] if form == "stream" else [context]) == context


def test_standard_error_over_documents():
    found = text_loss(ContextModel(BYTES), ids_of(["a", "bb", "cccc"], eod=False), form="documents", context=9)
    # sums 1, 3, 10 over 1, 2, 4 tokens: the mean is 2, and their residuals -1, -1, 2
    assert found.loss == pytest.approx(2.0)
    assert found.loss_se == pytest.approx(math.sqrt(6 * 3 / 2) / 7)
    assert text_loss(ContextModel(BYTES), ids_of(["a"]), form="documents").loss_se is None


def test_an_indexed_data_set_equals_its_text(tmp_path):
    jsonl, plain = tmp_path / "t.jsonl", tmp_path / "t.txt"
    jsonl.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    plain.write_text(TEXTS[1])
    writer = IndexWriter(str(tmp_path / "p"), np.uint16)
    documents = ids_of(TEXTS)
    tokens = np.concatenate(documents).astype(np.uint16).tobytes()
    writer.add(tokens, np.array([len(ids) for ids in documents], dtype=np.int32))
    writer.publish({"tokenizer": {"sha256": BYTES.sha256, "type": "ByteLevelTokenizer"}, "max_token_id": 256})
    read = [list(documents_of(str(source), BYTES)) for source in (jsonl, tmp_path / "p")]
    for ours, theirs, expected in zip(*read, documents, strict=True):
        assert ours.tolist() == theirs.tolist() == expected.tolist()
    assert [ids.tolist() for ids in documents_of(str(plain), BYTES, append_eod=False)] == [documents[1][:-1].tolist()]
    with pytest.raises(ValueError, match="nothing.idx"):
        list(documents_of(str(tmp_path / "nothing"), BYTES))
    jsonl.write_text('{"text": 1}\n')
    with pytest.raises(ValueError, match=r"t\.jsonl:1"):
        list(documents_of(str(jsonl), BYTES))


def test_bytes_are_those_of_the_text(tmp_path):
    import sentencepiece

    (tmp_path / "corpus").write_text("the words of a corpus, not many\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus"), model_prefix=str(tmp_path / "m"), vocab_size=300, byte_fallback=True,
        model_type="bpe", minloglevel=2, add_dummy_prefix=False, normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )  # fmt: skip
    pieces = build_tokenizer("SentencePieceTokenizer", str(tmp_path / "m.model"))
    for tokenizer in (BYTES, pieces):
        for text in TEXTS:
            (ids,) = ids_of([text], tokenizer=tokenizer)
            assert text_bytes(tokenizer, ids) == len(text.encode())
        # a limit inside the second text, at each of the bytes of its characters
        for limit in range(18, 40):
            kept = list(limited(ids_of(TEXTS, tokenizer=tokenizer), limit, tokenizer))
            text = "".join(tokenizer.detokenize(ids.tolist()) for ids in kept)
            assert "".join(TEXTS).startswith(text) and limit - 3 <= sum(map(len, kept)) <= limit
            assert sum(text_bytes(tokenizer, ids) for ids in kept) == len(text.encode())
    assert text_bytes(NullTokenizer(10), np.array([1, 2])) is None
    numbers = text_loss(UniformModel(NullTokenizer(10)), [np.array([1, 2, 10])])
    assert numbers.bits_per_byte is None and numbers.loss == pytest.approx(math.log(11), rel=1e-6)


def test_impossible_windows_are_refused():
    model = UniformModel(BYTES)
    model.longest_context = 16
    for arguments, words in (
        ({"context": 17}, "at most 16"),
        ({"stride": 0}, "--stride"),
        ({"stride": 17}, "--stride"),
    ):
        with pytest.raises(ValueError, match=words):
            text_loss(model, ids_of(TEXTS), **arguments)
    with pytest.raises(ValueError, match="no text"):
        text_loss(model, [])


def test_scores_of_logits_against_log_softmax(monkeypatch):
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 5, 40) * 4, torch.randint(30, (3, 5))
    expected = logits[..., :30].log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    monkeypatch.setattr(scoring_model, "_ENTRIES_AT_ONCE", 100)
    found = scoring_model.scores_of_logits(logits, targets, 30)
    torch.testing.assert_close(found.log_likelihood, expected)
    assert torch.equal(found.argmax, logits[..., :30].argmax(-1))
    # in two parts and an empty one, as tensor-parallel ranks hold them
    cuts = [(0, 16), (16, 30), (32, 32)]
    parts = [scoring_model.parts_of_logits(logits[..., a:b], targets - a) for a, b in cuts]
    targets_, sums, peaks, _ = (torch.stack(each) for each in zip(*parts))
    torch.testing.assert_close(targets_.sum(0) - sums.logsumexp(0), expected)
    assert torch.equal(peaks.max(0).values, logits[..., :30].max(-1).values)


@pytest.fixture(scope="module")
def llama():
    """A stock model of transformers with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=2, max_position_embeddings=24, initializer_range=0.3)  # fmt: skip
    return LlamaForCausalLM(config)


def test_a_hugging_face_model_scores_as_transformers_says(llama, monkeypatch):
    model = HuggingFaceScoringModel(llama, BYTES, micro_batch_size=2)
    documents = ids_of(["a text of some length", "another one", "third"])
    tokens = torch.from_numpy(np.concatenate([[256], documents[0]]))[None]
    with torch.no_grad():
        out = llama(input_ids=tokens, labels=tokens)
    found = text_loss(model, documents[:1], context=24)
    assert found.loss == pytest.approx(out.loss.item(), rel=1e-5)
    scores = model.logprobs(tokens.expand(3, -1))
    assert scores.argmax[2].tolist() == out.logits[0, :-1].argmax(-1).tolist()
    # batches and padding change nothing
    monkeypatch.setattr(scoring_model, "LOGITS_AT_ONCE", 257 * 30)
    torch.testing.assert_close(model.logprobs(tokens.expand(3, -1)), scores)
    alone = sum(text_loss(model, [ids]).loss * len(ids) for ids in documents)
    together = text_loss(model, documents, form="documents", batch=2)
    assert together.loss * together.tokens == pytest.approx(alone, rel=1e-5)


def test_where_the_positions_of_a_model_end(llama):
    from transformers import BloomConfig, GPT2Config, GPTJConfig, OPTConfig

    from umv2_megatron.hf import UMv2Config

    assert HuggingFaceScoringModel(llama, BYTES).longest_context is None
    assert longest_context(BloomConfig()) is None
    for kind in (GPT2Config, GPTJConfig):  # a table of weights and one of sines
        assert longest_context(kind(n_positions=48)) == 48
    assert longest_context(OPTConfig(max_position_embeddings=48)) == 48
    for kind, end in (("rope", None), ("none", None), ("learned_absolute", 48)):
        assert longest_context(UMv2Config(position_embedding_type=kind, max_position_embeddings=48)) == end


def test_a_directory_is_loaded_or_refused(llama, tmp_path):
    llama.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="--tokenizer-type"):
        load_hugging_face(str(tmp_path / "m"))
    model = load_hugging_face(str(tmp_path / "m"), tokenizer_type="ByteLevelTokenizer")
    assert model.context == 24
    ours = HuggingFaceScoringModel(llama, BYTES)
    assert text_loss(model, ids_of(TEXTS)).loss == pytest.approx(text_loss(ours, ids_of(TEXTS)).loss, rel=1e-6)
    with pytest.raises(ValueError, match="fewer than"):
        load_hugging_face(str(tmp_path / "m"), tokenizer_type="NullTokenizer", vocab_size=300)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "x.Y"}}))
    with pytest.raises(ValueError, match="--trust-remote-code"):
        load_hugging_face(str(tmp_path / "m"), tokenizer_type="ByteLevelTokenizer")
    for wrong in (None, "[]"):
        if wrong is not None:
            (tmp_path / "config.json").write_text(wrong)
        with pytest.raises(ValueError, match="config.json"):
            load_hugging_face(str(tmp_path))


def test_documents_of_a_foreign_model_begin_with_its_own_token(llama, tmp_path):
    """Its tokenizer's beginning, not the end of documents, where the two differ."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    llama.config.bos_token_id, before = 0, llama.config.bos_token_id
    try:
        llama.save_pretrained(tmp_path)
    finally:
        llama.config.bos_token_id = before
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    model = load_hugging_face(str(tmp_path))
    assert (model.first_token, model.tokenizer.eod) == (0, 1)
    ids = torch.tensor([[0, 2, 3, 2, 1]])
    with torch.no_grad():
        logits = llama(ids).logits[0, :-1, :4]  # over the tokenizer's own ids
    loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()
    assert text_loss(model, [ids[0, 1:].numpy()], form="documents").loss == pytest.approx(loss, rel=1e-5)
    assert text_loss(model, [ids[0, 1:].numpy()]).loss == pytest.approx(loss, rel=1e-5)
    other = load_hugging_face(str(tmp_path), tokenizer_type="ByteLevelTokenizer")
    assert other.first_token == other.tokenizer.eod == 256
