"""What requests become, with a tokenizer of one token per byte and no model."""

from __future__ import annotations

from typing import Any

import pytest

from umv2_megatron.evaluation.local_export import LocalExport
from umv2_megatron.serving.answers import Answer
from umv2_megatron.serving.choices import Piece
from umv2_megatron.serving.errors import ApiError
from umv2_megatron.serving.names import ModelNames
from umv2_megatron.serving.released import TokenLogprob
from umv2_megatron.serving.requests import chat_completion, completion


class Bytes:
    """The part of a tokenizer that requests need."""

    chat_template = "yes"

    def encode(self, text: str, add_special_tokens: bool, verbose: bool) -> list[int]:
        return ([200] if add_special_tokens else []) + list(text.encode())

    def decode(self, ids: list[int], **options: Any) -> str:
        return bytes(ids).decode()

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        return "|".join(f"{message['role']}:{message['content']}" for message in messages)


def export(kind: str = "umv2") -> LocalExport:
    return LocalExport(None, Bytes(), kind, 40, 256, frozenset())


def test_defaults_are_openais() -> None:
    ask = completion({"prompt": "abc"}, export())
    (choice,) = ask.choices
    assert (choice.prompt, choice.max_tokens, choice.echo, choice.logprobs) == (list(b"abc"), 16, None, None)
    assert (choice.sampling.temperature, choice.sampling.top_p, choice.sampling.top_k) == (1, 1, 0)
    assert (ask.prompt_tokens, ask.stream, ask.include_usage, ask.chat) == (3, False, False, False)
    ask = chat_completion({"messages": [{"role": "user", "content": "hi"}]}, export())
    assert ask.chat and ask.choices[0].max_tokens == 40 - len("user:hi")


def test_choices_are_numbered_by_prompt_and_have_seeds_of_their_own() -> None:
    ask = completion({"prompt": ["a", "bc"], "n": 2, "seed": -1, "echo": True, "max_tokens": 3}, export())
    assert [(choice.index, choice.prompt, choice.echo) for choice in ask.choices] == [
        (0, [97], "a"), (1, [97], "a"), (2, [98, 99], "bc"), (3, [98, 99], "bc")]  # fmt: skip
    assert [choice.seed for choice in ask.choices] == [2**63 - 1, 0, 1, 2] and ask.prompt_tokens == 3
    drawn = {completion({"prompt": "a"}, export()).choices[0].seed for _ in range(5)}
    assert len(drawn) == 5


def test_other_models_begin_a_text_as_their_tokenizer_says() -> None:
    assert completion({"prompt": "a"}, export("llama")).choices[0].prompt == [200, 97]
    assert completion({"prompt": [97]}, export("llama")).choices[0].prompt == [97]


@pytest.mark.parametrize("prompt, tokens, fits", [(24, 16, True), (25, 16, False), (39, None, True), (40, None, False)])
def test_prompt_and_completion_share_the_context(prompt: int, tokens: int | None, fits: bool) -> None:
    body = {"prompt": "x" * prompt, "max_tokens": tokens}
    if fits:
        assert completion(body, export()).choices[0].max_tokens == (tokens or 1)
        return
    with pytest.raises(ApiError) as refused:
        completion(body, export())
    assert refused.value.code == "context_length_exceeded" and refused.value.status == 400
    assert f"{prompt + (tokens or 1)} tokens" in refused.value.message


def test_long_values_are_shortened_in_messages() -> None:
    with pytest.raises(ApiError) as refused:
        completion({"prompt": "a", "stop": ["x" * 5000]}, export())
    assert len(refused.value.message) < 200 and refused.value.param == "stop"
    with pytest.raises(ApiError) as refused:
        completion({"prompt": "a", "\udcff" * 5000: 1}, export())
    assert refused.value.message.isascii() and len(refused.value.message) < 200


def test_every_name_of_a_model(tmp_path, monkeypatch) -> None:
    (tmp_path / "exports" / "demo").mkdir(parents=True)
    (tmp_path / "latest").symlink_to(tmp_path / "exports" / "demo")
    monkeypatch.chdir(tmp_path)
    place = f"{tmp_path}/exports/demo"
    for given in ("exports/demo", "./exports/demo/", place, "latest"):
        names = ModelNames(given)
        for name in ("exports/demo", "exports/demo/", "./exports/demo", place, f"{place}/", "demo", "demo/", given):
            assert name in names, (given, name)
        for name in ("", "/", ".", "exports", "exports/demo2", "emo", "\x00"):
            assert name not in names, (given, name)
        assert names.id == given.rstrip("/")
    names = ModelNames("exports/demo", ["a", "b/c"])
    assert names.id == "a" and all(name in names for name in ("a", "b/c", "demo", place))


def test_log_probabilities_name_the_likelier_of_two_tokens_with_one_text() -> None:
    ask = completion({"prompt": "a", "logprobs": 3}, export())
    token = TokenLogprob("c", True, -3.0, (("a", True, -1.0), ("b", True, -2.0), ("a", True, -2.5)), 0)
    body = Answer(ask, "m").whole([Piece(0, "c", (token,), 1, "length")])
    found = body["choices"][0]["logprobs"]
    assert list(found["top_logprobs"][0].items()) == [("a", -1.0), ("b", -2.0), ("c", -3.0)]
    assert body["usage"] == {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
