"""Answers as OpenAI documents them: whole bodies, and the events of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from typing import Any

from umv2_megatron.serving.choices import Piece
from umv2_megatron.serving.released import TokenLogprob
from umv2_megatron.serving.requests import Ask


class Answer:
    """Bodies of one answer: all have the same id, time and model.

    Args:
        model: the name that the server gives the model.
    """

    def __init__(self, ask: Ask, model: str) -> None:
        self._ask = ask
        self._kind = (
            "chat.completion" if ask.chat else "text_completion",
            "chat.completion.chunk" if ask.chat else "text_completion",
        )
        self._head = {
            "id": f"{'chatcmpl' if ask.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._generated = 0
        self._begun: set[int] = set()

    def whole(self, pieces: Iterable[Piece]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        texts: dict[int, list[str]] = {choice.index: [] for choice in self._ask.choices}
        tokens: dict[int, list[TokenLogprob]] = {choice.index: [] for choice in self._ask.choices}
        finish: dict[int, str | None] = {}
        for piece in pieces:
            texts[piece.index].append(piece.text)
            tokens[piece.index] += piece.tokens
            finish[piece.index] = piece.finish
            self._generated += piece.generated
        choices = []
        for index, parts in texts.items():
            text = "".join(parts)
            said: dict[str, Any] = {"text": text}
            if self._ask.chat:
                said = {"message": {"role": "assistant", "content": text, "refusal": None}}
            logprobs = self._logprobs(index, tokens[index])
            choices.append({"index": index, **said, "logprobs": logprobs, "finish_reason": finish[index]})
        return {**self._head, "object": self._kind[0], "choices": choices, "usage": self._usage()}

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """The events that ``piece`` makes; none where it brings neither text nor an end."""
        self._generated += piece.generated
        found = []
        logprobs = self._logprobs(piece.index, piece.tokens) if piece.tokens else None
        if not self._ask.chat:
            if piece.text or piece.tokens or piece.finish:
                found.append(self._chunk(piece.index, {"text": piece.text}, logprobs, piece.finish))
            return found
        if piece.index not in self._begun:
            self._begun.add(piece.index)
            found.append(self._chunk(piece.index, {"delta": {"role": "assistant", "content": ""}}, None, None))
        if piece.text or piece.tokens:
            found.append(self._chunk(piece.index, {"delta": {"content": piece.text}}, logprobs, None))
        if piece.finish:
            found.append(self._chunk(piece.index, {"delta": {}}, None, piece.finish))
        return found

    def last_chunks(self) -> list[dict[str, Any]]:
        """What comes after all choices: the numbers of tokens, if they are asked for."""
        if not self._ask.include_usage:
            return []
        return [{**self._head, "object": self._kind[1], "choices": [], "usage": self._usage()}]

    def _chunk(self, index: int, said: dict[str, Any], logprobs: Any, finish: str | None) -> dict[str, Any]:
        usage = {"usage": None} if self._ask.include_usage else {}
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head, "object": self._kind[1], "choices": [choice], **usage}

    def _usage(self) -> dict[str, int]:
        prompt = self._ask.prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._generated,
            "total_tokens": prompt + self._generated,
        }

    def _logprobs(self, index: int, tokens: Iterable[TokenLogprob]) -> dict[str, Any] | None:
        choice = self._ask.choices[index]
        if choice.logprobs is None:
            return None
        return _chat_logprobs(tokens) if self._ask.chat else _completion_logprobs(tokens, choice.logprobs)


def _completion_logprobs(tokens: Iterable[TokenLogprob], count: int) -> dict[str, Any]:
    tokens = list(tokens)
    tops: list[dict[str, float] | None] = []
    for token in tokens:
        if token.logprob is None:
            tops.append(None)
            continue
        top: dict[str, float] = {}
        for text, _, logprob in token.top:
            top.setdefault(text, logprob)  # of two with one text, the likelier
        tops.append({**top, token.text: token.logprob})  # documented: the token itself is always in it
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": tops if count else None,
        "text_offset": [token.offset for token in tokens],
    }


def _chat_logprobs(tokens: Iterable[TokenLogprob]) -> dict[str, Any]:
    def entry(text: str, whole: bool, logprob: float | None) -> dict[str, Any]:
        # documented: null where a token has no bytes of its own
        return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8")) if whole else None}

    content = [
        {**entry(token.text, token.whole, token.logprob), "top_logprobs": [entry(*one) for one in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}
