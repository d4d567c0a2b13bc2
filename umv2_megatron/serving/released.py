"""The text of one choice as it may be sent: whole characters, up to a stop string and never beyond its beginning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from umv2_megatron.evaluation.generation import TextStream


@dataclass(frozen=True)
class TokenLogprob:
    """A token of a text with its natural log-probability.

    Attributes:
        text: the token; where it is a part of a character, as its tokenizer's vocabulary writes it.
        whole: whether ``text`` is what the token stands for, not a part of a character.
        logprob: None for the first token of a prompt, which has nothing before it.
        top: the likeliest tokens with theirs, (text, whole, logprob), likeliest first.
        offset: characters of the text before it.
    """

    text: str
    whole: bool
    logprob: float | None
    top: tuple[tuple[str, bool, float], ...]
    offset: int


class ReleasedText:
    """Takes tokens one by one and releases their text as soon as it is certain not to belong to a stop string.

    Args:
        detokenize: text of token ids.
        prompt: ids that come before; their text is not given.
        stops: strings that end the text; they are not part of it.
        offset: characters of the text before the first token.
    """

    def __init__(
        self, detokenize: Callable[[Iterable[int]], str], prompt: list[int], stops: Sequence[str], offset: int
    ) -> None:
        self._stream = TextStream(detokenize, prompt)
        self._stops = stops
        self._pending = ""
        self._released = offset
        self._waiting: list[TokenLogprob] = []
        self.stopped = False

    @property
    def offset(self) -> int:
        """Characters before the next token."""
        return self._released + len(self._pending)

    def add(self, token: int, logprob: TokenLogprob | None) -> tuple[str, list[TokenLogprob]]:
        """The text that is released with ``token``, and the tokens that begin in it. Sets ``stopped``."""
        if logprob is not None:
            self._waiting.append(logprob)
        self._pending += self._stream.add(token)
        return self._release(last=False)

    def end(self) -> tuple[str, list[TokenLogprob]]:
        """All that has waited, after the last token. May set ``stopped``, too."""
        self._pending += self._stream.end()
        return self._release(last=True)

    def _release(self, last: bool) -> tuple[str, list[TokenLogprob]]:
        cuts = [cut for cut in (self._pending.find(stop) for stop in self._stops) if cut >= 0]
        if cuts:
            self.stopped = True
            text = self._pending[: min(cuts)]
        elif last:
            text = self._pending
        else:
            text = self._pending[: len(self._pending) - self._beginning_of_a_stop()]
        self._pending = self._pending[len(text) :]
        self._released += len(text)
        ready = [token for token in self._waiting if token.offset < self._released or (last and not cuts)]
        self._waiting = self._waiting[len(ready) :]
        return text, ready

    def _beginning_of_a_stop(self) -> int:
        """Characters at the end of what is pending with which a stop string begins."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._pending)), longest, -1):
                if self._pending.endswith(stop[:length]):
                    longest = length
                    break
        return longest
