"""Drawing tokens: greedy, temperature, top-k, top-p, padding never drawn, context window, end token; text as it comes;
keys and values kept."""

import pytest
import torch

from umv2_megatron.data.tokenizers import ByteLevelTokenizer, HuggingFaceTokenizer
from umv2_megatron.evaluation.generation import (
    CachedTransformersModel,
    Sampling,
    TextStream,
    draw,
    generate,
)

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]])


def shares(sampling: Sampling, draws: int = 4000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    counts = torch.zeros(4)
    for _ in range(draws):
        counts[draw(LOGITS, sampling, generator)] += 1
    return counts / draws


def test_greedy_takes_the_likeliest():
    assert draw(LOGITS, Sampling(temperature=0), torch.Generator()).tolist() == [0]


def test_temperature_draws_from_the_softmax():
    expected = (LOGITS / 0.5).softmax(-1)[0]
    assert torch.allclose(shares(Sampling(temperature=0.5, top_p=1.0)), expected, atol=0.03)


def test_a_tiny_temperature_takes_the_likeliest():
    for temperature in (1e-45, 1e-300):
        assert draw(1e4 * LOGITS, Sampling(temperature), torch.Generator()).tolist() == [0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused_and_forbidden_tokens_are_not(temperature):
    for wrong in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="logits are NaN or infinite"):
            draw(torch.tensor([[0.0, wrong, 1.0]]), Sampling(temperature), torch.Generator())
    assert draw(torch.tensor([[-torch.inf, 0.0]]), Sampling(temperature), torch.Generator()).tolist() == [1]


def test_top_k_keeps_k_and_renormalises():
    expected = LOGITS[0, :2].softmax(-1)
    found = shares(Sampling(temperature=1.0, top_k=2, top_p=1.0))
    assert found[2:].sum() == 0
    assert torch.allclose(found[:2], expected, atol=0.03)


def test_top_p_keeps_the_smallest_set_of_that_mass():
    probability = LOGITS.softmax(-1)[0]  # 0.64, 0.24, 0.09, 0.03
    found = shares(Sampling(temperature=1.0, top_p=float(probability[0]) + 0.01))
    assert found[2:].sum() == 0 and found[1] > 0
    assert shares(Sampling(temperature=1.0, top_p=0.1), 50)[0] == 1.0


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_wrong_values_are_refused_by_flag(wrong):
    with pytest.raises(ValueError, match="--" + next(iter(wrong)).replace("_", "-")):
        Sampling(**wrong)


def test_generate_stops_at_the_end_keeps_the_context_and_never_draws_padding():
    seen = []

    def logits_of(tokens: torch.Tensor) -> torch.Tensor:
        """The successor of the last token is likeliest, but for the padding ids 5 and 6, which always win."""
        seen.append(tokens.shape[1])
        logits = torch.full((1, 7), -10.0)
        logits[0, (tokens[0, -1] + 1) % 5] = 10.0
        logits[0, 5:] = 100.0
        return logits

    greedy = Sampling(temperature=0)
    found = list(generate(logits_of, [0], 10, context=3, vocab_size=5, end=4, sampling=greedy, seed=1))
    assert found == [1, 2, 3]
    assert seen == [1, 2, 3, 3]
    endless = list(generate(logits_of, [0], 7, context=3, vocab_size=5, end=None, sampling=greedy, seed=1))
    assert endless == [1, 2, 3, 4, 0, 1, 2]


def test_text_comes_as_soon_as_its_characters_are_whole():
    tokenizer = ByteLevelTokenizer()
    text = TextStream(tokenizer.detokenize, tokenizer.tokenize("long prompt: é"))
    pieces = [text.add(token) for token in tokenizer.tokenize("aé€b" + "x" * 20)]
    assert pieces[:7] == ["a", "", "é", "", "", "€", "b"]
    assert "".join(pieces) == "aé€b" + "x" * 20 and text.end() == ""


def test_text_cut_within_a_character_is_given_at_the_end():
    tokenizer = ByteLevelTokenizer()
    text = TextStream(tokenizer.detokenize, tokenizer.tokenize("x"))
    assert [text.add(token) for token in (ord("y"), 0xE2, 0x82)] == ["y", "", ""]
    assert text.end() == "\ufffd"


@pytest.mark.parametrize("ready", [0, 11])
def test_characters_in_byte_pieces_come_whole(tmp_path, ready):
    """A decoder of byte pieces gives up all of a run of them where one character in it is not whole."""
    from tokenizers import Tokenizer, decoders, models

    pieces = ["</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"x=' #done"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = HuggingFaceTokenizer(str(tmp_path))
    text = "x = '\u6771\u4eac\u90fd\u5e02\U0001f600' # d\ufffdone"
    ids = tokenizer.tokenize(text)
    stream = TextStream(tokenizer.detokenize, ids[:ready])
    found = tokenizer.detokenize(ids[:ready]) + "".join(stream.add(token) for token in ids[ready:]) + stream.end()
    assert found == text


def test_words_keep_the_spaces_that_a_tokenizer_writes_between_tokens():
    words = ["one", "two", "three"]
    text = TextStream(lambda ids: " ".join(words[i] for i in ids), [0])
    assert [text.add(1), text.add(2)] == [" two", " three"]


def test_a_transformers_model_without_keys_and_values_is_computed_anew():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=2)).eval()
    cached, tokens = CachedTransformersModel(model), torch.randint(0, 40, (1, 8))
    for end in (5, 6, 8):
        assert torch.allclose(cached(tokens[:, :end]), model(tokens[:, :end]).logits[:, -1], atol=1e-5)


def test_cached_transformers_model_gives_the_logits_of_a_whole_pass():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    fed = []

    def counting(tokens: torch.Tensor, **options):
        fed.append(tokens.shape[1])
        return model(tokens, **options)

    cached = CachedTransformersModel(counting)
    tokens = torch.randint(0, 40, (1, 12))
    for first, end in [(0, 5), (0, 6), (0, 9), (1, 10), (0, 5)]:
        expected = model(input_ids=tokens[:, first:end]).logits[:, -1]
        assert torch.allclose(cached(tokens[:, first:end]), expected, atol=1e-5)
    assert fed == [5, 1, 3, 9, 5]
    found = list(generate(cached, [1, 2, 3], 8, 64, 40, None, Sampling(temperature=0), seed=0))
    whole = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert found == whole[0, 3:].tolist()
