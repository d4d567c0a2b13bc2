"""A request's JSON as choices to generate, or an ``ApiError`` that says what is wrong with it.

A parameter that the server does not support is refused by name, unless its value asks for nothing (``suffix: ""``).
``user`` and ``safety_identifier`` name the caller and never change an answer; they are accepted.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from umv2_megatron.evaluation.generation import Sampling
from umv2_megatron.evaluation.local_export import LocalExport
from umv2_megatron.serving import fields
from umv2_megatron.serving.choices import Choice, texts_of
from umv2_megatron.serving.errors import ApiError
from umv2_megatron.serving.fields import Body, wrong

MOST_CHOICES = 128
"""Choices in one answer, over all of its prompts."""

DEFAULT_COMPLETION = 16
"""Tokens of a completion that asks for no number, as OpenAI documents."""

SEEDS = 2**63
TOO_LONG = "context_length_exceeded"

_COMMON = {"model", "temperature", "top_p", "n", "seed", "stop", "stream", "stream_options", "max_tokens", "logit_bias",
           "frequency_penalty", "presence_penalty", "logprobs", "user"}  # fmt: skip
_COMPLETION = _COMMON | {"prompt", "echo"}
_CHAT = _COMMON | {"messages", "max_completion_tokens", "top_logprobs", "safety_identifier"}
_COMPLETION_NEUTRAL: dict[str, tuple] = {"best_of": (1,), "suffix": ("",)}
_CHAT_NEUTRAL: dict[str, tuple] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),  # of tools, and there are none
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_retention": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}


@dataclass(frozen=True)
class Ask:
    """What a request asks for.

    Attributes:
        chat: whether it is a chat.
        choices: at least one, numbered from 0.
        prompt_tokens: of all prompts, each counted once.
        stream: whether the answer comes piece by piece.
        include_usage: whether a stream ends with the numbers of tokens.
    """

    chat: bool
    choices: tuple[Choice, ...]
    prompt_tokens: int
    stream: bool
    include_usage: bool


def completion(body: Body, export: LocalExport) -> Ask:
    """The request of ``POST /v1/completions``. Raises ``ApiError``."""
    fields.only(body, _COMPLETION, _COMPLETION_NEUTRAL)
    echo = fields.switch(body, "echo")
    tokens = fields.integer(body, "max_tokens", 0 if echo else 1, export.context, too_high=TOO_LONG)
    logprobs = fields.integer(body, "logprobs", 0, 5)
    prompts = _prompts(body.get("prompt"), export)
    shared = _shared(body, export) | {"logprobs": logprobs}
    echoes = [text if text is not None else texts_of(export)(ids) for text, ids in prompts] if echo else None
    return _ask(body, export, [ids for _, ids in prompts], tokens, DEFAULT_COMPLETION, "prompt", False,
                shared, echoes)  # fmt: skip


def chat_completion(body: Body, export: LocalExport) -> Ask:
    """The request of ``POST /v1/chat/completions``. Raises ``ApiError``."""
    fields.only(body, _CHAT, _CHAT_NEUTRAL)
    if body.get("max_tokens") is not None and body.get("max_completion_tokens") is not None:
        raise ApiError("max_tokens and max_completion_tokens are both given; give max_completion_tokens alone",
                       "max_tokens")  # fmt: skip
    tokens = fields.integer(body, "max_tokens", 1, export.context, too_high=TOO_LONG)
    tokens = fields.integer(body, "max_completion_tokens", 1, export.context, tokens, TOO_LONG)
    top = fields.integer(body, "top_logprobs", 0, 20)
    wanted = fields.switch(body, "logprobs")
    if top is not None and not wanted:
        raise wrong("top_logprobs", top, "logprobs to be true beside it")
    shared = _shared(body, export) | {"logprobs": (top or 0) if wanted else None}
    messages = _messages(body.get("messages"))
    if not export.tokenizer.chat_template:
        raise ApiError("the model has no chat template, so it takes no messages; use /v1/completions", "messages")
    from jinja2 import TemplateError

    try:
        text = export.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ApiError(f"the model's chat template does not take these messages: {error}", "messages") from error
    ids = export.tokenizer.encode(text, add_special_tokens=False, verbose=False)
    if not ids:
        raise wrong("messages", messages, "messages that give at least one token")
    return _ask(body, export, [ids], tokens, export.context, "messages", True, shared, None)


def _ask(
    body: Body,
    export: LocalExport,
    prompts: Sequence[list[int]],
    tokens: int | None,
    default: int,
    param: str,
    chat: bool,
    shared: dict[str, Any],
    echoes: Sequence[str] | None,
) -> Ask:
    """``n`` choices for each prompt; ``tokens`` to generate, where None the ``default`` or what there is room for."""
    number = fields.integer(body, "n", 1, MOST_CHOICES, 1) or 1
    if number * len(prompts) > MOST_CHOICES:
        raise wrong("n", number, f"at most {MOST_CHOICES} choices over all {len(prompts)} prompts")
    seed = fields.integer(body, "seed", -SEEDS, SEEDS - 1)
    if seed is None:
        seed = secrets.randbelow(SEEDS)
    stream, usage = fields.switch(body, "stream"), _include_usage(body)
    choices: list[Choice] = []
    for place, ids in enumerate(prompts):
        room = _room(export.context, len(ids), tokens, default, param)
        for _ in range(number):
            index = len(choices)
            echo = None if echoes is None else echoes[place]
            choices.append(Choice(index, ids, room, seed=(seed + index) % SEEDS, echo=echo, **shared))
    return Ask(chat, tuple(choices), sum(map(len, prompts)), stream, usage)


def _room(context: int, prompt: int, tokens: int | None, default: int, param: str) -> int:
    """Tokens to generate after ``prompt`` of them; ``ApiError`` where ``context`` does not hold both."""
    room = context - prompt
    wanted = min(default, max(room, 1)) if tokens is None else tokens
    if wanted > room:
        raise ApiError(
            f"This model's maximum context length is {context} tokens. However, you requested {prompt + wanted} tokens "
            f"({prompt} in the {param}, {wanted} for the completion). Please reduce the length of the {param} or "
            "completion.",
            param,
            code=TOO_LONG,
        )
    return wanted


def _shared(body: Body, export: LocalExport) -> dict[str, Any]:
    """Fields of ``Choice`` that both requests give by the same names."""
    for name in ("user", "safety_identifier"):
        if body.get(name) is not None:
            fields.text(name, body[name])
    temperature = fields.number(body, "temperature", 0, 2, 1.0)
    mass = fields.number(body, "top_p", 0, 1, 1.0)
    return {
        "sampling": Sampling(temperature, 0, max(mass, 1e-9)),  # with 0, too, the likeliest token stays
        "stops": fields.stops(body),
        "frequency": fields.number(body, "frequency_penalty", -2, 2, 0.0),
        "presence": fields.number(body, "presence_penalty", -2, 2, 0.0),
        "bias": fields.biases(body, export.vocab_size),
    }


def _include_usage(body: Body) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise wrong("stream_options", options, "an object")
    if not fields.switch(body, "stream"):
        raise wrong("stream_options", options, "it only beside stream: true")
    fields.only(options, {"include_usage"}, {"include_obfuscation": (False,)})
    return fields.switch(options, "include_usage")


def _prompts(prompt: Any, export: LocalExport) -> list[tuple[str | None, list[int]]]:
    """The text, where it is given as text, and the ids of each prompt."""
    form = "a string, a list of strings, a list of token ids or a list of such lists, none of them empty"
    several = prompt if isinstance(prompt, list) and prompt and not _is_id(prompt[0]) else [prompt]
    if len(several) > MOST_CHOICES:
        raise wrong("prompt", prompt, f"at most {MOST_CHOICES} prompts")
    if len({type(one) for one in several}) > 1:
        raise wrong("prompt", prompt, form)
    found: list[tuple[str | None, list[int]]] = []
    for one in several:
        if isinstance(one, str) and one:
            # training puts nothing before a text; other models may have a token that begins one
            special = export.kind != "umv2"
            ids = export.tokenizer.encode(fields.text("prompt", one), add_special_tokens=special, verbose=False)
            if not ids:
                raise wrong("prompt", one, "a text of at least one token")
            found.append((one, ids))
        elif isinstance(one, list) and one and all(map(_is_id, one)):
            outside = next((token for token in one if not 0 <= token < export.vocab_size), None)
            if outside is not None:
                raise wrong("prompt", outside, f"token ids from 0 to {export.vocab_size - 1}")
            found.append((None, list(one)))
        else:
            raise wrong("prompt", prompt, form)
    return found


def _is_id(value: Any) -> bool:
    return type(value) is int  # True is an int, too


def _messages(messages: Any) -> list[dict[str, str]]:
    """Messages whose content is one string, as templates of text models take them."""
    if not isinstance(messages, list) or not messages:
        raise wrong("messages", messages, "a list of at least one message")
    found = []
    for message in messages:
        if not isinstance(message, dict):
            raise wrong("messages", message, "objects with role and content")
        fields.only(message, {"role", "content"}, {"tool_calls": ([],)})
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant"):
            raise wrong("messages", role, "the role system, user or assistant")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        for part in parts:
            if not isinstance(part, dict) or part.get("type") != "text" or set(part) != {"type", "text"}:
                raise wrong("messages", part, "content that is a string or a list of parts of the type text")
        found.append({"role": role, "content": "".join(fields.text("messages", part["text"]) for part in parts)})
    return found


READERS: dict[str, Callable[[Body, LocalExport], Ask]] = {
    "/v1/completions": completion,
    "/v1/chat/completions": chat_completion,
}
