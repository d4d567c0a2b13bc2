"""A native model as one of lm-eval's: importing this file registers ``umv2_megatron`` there.

    lm_eval.simple_evaluate("umv2_megatron", "load=runs/demo/checkpoints,ckpt_step=60", tasks=["..."])

Texts become tokens as lm-eval's class for transformers makes them of an export: a text without a context comes after
the end-of-document token, a context too long loses its beginning, and long texts are read in windows. So the numbers
are those of the export.
"""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from typing import Any, Optional

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from umv2_megatron.config.text_numbers import whole_number
from umv2_megatron.config.usage import UsageError
from umv2_megatron.evaluation.evaluate_flags import LAYOUT
from umv2_megatron.evaluation.generation import Sampling, generate

# Settings of a task's generation_kwargs that ``generate_until`` knows; ``normalize_gen_kwargs`` makes one of all names
# of the last.
GENERATION_SETTINGS = ("until", "do_sample", "temperature", "top_k", "top_p", "max_gen_toks")
_MOST_NEW_TOKENS = 256  # lm-eval's default
_SEED = 1234

Request = tuple[Optional[tuple[str, str]], list[int], list[int]]


class NativeLM(TemplateLM):
    """lm-eval's view of a ``SharedModel``, on rank 0.

    Args:
        model: the model and its tokenizer.
        prefix_token_id: the token before a text that has no context; None: the end-of-document token, as in training.
    """

    def __init__(self, model: Any, prefix_token_id: int | None = None) -> None:
        super().__init__()
        self._model = model
        self._prefix = model.first_token if prefix_token_id is None else prefix_token_id

    @property
    def eot_token_id(self) -> int:
        """Id of the end-of-document token."""
        return int(self._model.tokenizer.eod)

    @property
    def prefix_token_id(self) -> int:
        """Id of the token before a text without a context."""
        return int(self._prefix)

    @property
    def max_length(self) -> int:
        """Tokens of the context: those of training, or with learned positions all that there are, as in an export."""
        return int(self._model.longest_context or self._model.context)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text. Training adds no special tokens, so none are added here."""
        return list(self._model.tokenizer.tokenize(string))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """See ``LM``; without a bar of progress."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: Sequence[Request], **_: Any) -> list[tuple[float, bool]]:
        """Nats of each continuation after its context, and whether it is what greedy decoding gives."""
        rows = []
        for _texts, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens; expected 1 to the model's context of "
                    f"{self.max_length}"
                )
            rows.append((context + continuation)[-(self.max_length + 1) :])
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        order = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
        for first in range(0, len(order), self._model.rows):
            places = order[first : first + self._model.rows]
            tokens = torch.full((len(places), len(rows[places[0]])), self.eot_token_id)
            for at, place in enumerate(places):
                tokens[at, : len(rows[place])] = torch.tensor(rows[place])
            likelihood, best = self._model.logprobs(tokens)
            for at, place in enumerate(places):
                texts, _context, continuation = requests[place]
                end = len(rows[place]) - 1
                scored = slice(end - len(continuation), end)
                nats = float(likelihood[at, scored].double().sum())
                answers[place] = nats, best[at, scored].tolist() == continuation
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, answers[place])
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """See ``LM``: nats of each whole text, in windows of the context."""
        windows: list[Request] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            (text,) = request.args
            made = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            for context, continuation in map(make_disjoint_window, made):
                windows.append((None, context, continuation))
                owners.append(owner)
        sums = [0.0] * len(requests)
        for owner, (nats, _greedy) in zip(owners, self._loglikelihood_tokens(windows)):
            sums[owner] += nats
        for request, nats in zip(requests, sums):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, nats)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """See ``LM``: one text after the other, each token with the keys and values of those before it."""
        texts = []
        for number, request in enumerate(requests):
            context, settings = request.args
            texts.append(self._generated(context, settings, _SEED + number))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _generated(self, context: str, settings: dict[str, Any], seed: int) -> str:
        known: dict[str, Any] = dict(normalize_gen_kwargs(settings, _MOST_NEW_TOKENS))
        wrong = sorted(known.keys() - set(GENERATION_SETTINGS))
        if wrong:
            raise ValueError(f"generation_kwargs has {wrong[0]}; expected some of {', '.join(GENERATION_SETTINGS)}")
        most = known["max_gen_toks"]
        if not 0 < most < self.max_length:
            raise ValueError(
                f"a task generates {most} tokens (max_gen_toks); expected 1 to less than the model's context of "
                f"{self.max_length}"
            )
        prompt = (self.tok_encode(context) or [self.prefix_token_id])[-(self.max_length - most) :]
        sampling = Sampling(
            float(known["temperature"]) if known["do_sample"] else 0.0,
            int(known.get("top_k") or 0),
            float(known.get("top_p") or 1.0),
        )
        tokenizer, until = self._model.tokenizer, [stop for stop in known["until"] if stop]
        ids: list[int] = []
        text = ""
        for token in generate(
            self._model.next_logits, prompt, most, self.max_length, tokenizer.num_tokens, tokenizer.eod, sampling, seed
        ):
            ids.append(token)
            text = tokenizer.detokenize(ids)
            if any(stop in text for stop in until):
                break
        return str(postprocess_generated_text(text, until, None))


class Followed(SystemExit):
    """A rank other than the first has taken part to the end: its program is over, with exit code 0."""


@register_model("umv2_megatron")
class UMv2MegatronLM(NativeLM):
    """A checkpoint of ours, on one rank or on the ranks of torchrun; the arguments are those of ``--model_args``.

    On all ranks but the first the constructor takes part in the evaluation, and then raises ``Followed``.

    Args:
        load: directory of checkpoints, or one ``iter_*`` in it.
        ckpt_step: iteration to load; default: the newest valid one.
        tokenizer_model: where the run's tokenizer is now.
        batch_size: rows per rank and forward pass; "auto": 8.
        max_batch_size, device: what lm-eval passes to every model; ranks use the devices that they use in training.
        prefix_token_id: see ``NativeLM``.
        layout: settings of the layout on the ranks, by name with underscores: ``tensor_model_parallel_size``,
            ``memory_parallel_size``, ``memory_parallel_mode``, ``sequence_parallel``, ...
    """

    def __init__(
        self,
        load: str = "",
        ckpt_step: int | None = None,
        tokenizer_model: str | None = None,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        device: str | None = None,
        prefix_token_id: int | None = None,
        **layout: Any,
    ) -> None:
        if not load:
            raise UsageError("--model_args has no load; give load=DIR, a directory of checkpoints")
        known = (*LAYOUT, "memory_parallel_mode", "sequence_parallel")
        wrong = sorted(layout.keys() - set(known))
        if wrong:
            others = ", ".join(("load", "ckpt_step", "tokenizer_model", "prefix_token_id", *known))
            raise UsageError(f"--model_args has {wrong[0]}; expected some of {others}")
        automatic = str(batch_size).startswith("auto")
        rows = 8 if automatic else whole_number(str(batch_size)) or 0
        if rows < 1:
            raise UsageError(f"--batch_size is {batch_size}; expected an integer of at least 1, or auto")
        from umv2_megatron.parallel import cpu_platform

        cpu_platform.install()  # before megatron.core is imported
        from umv2_megatron.evaluation.shared_model import SharedModel, cannot_generate
        from umv2_megatron.training.restore import restore_model

        restored = restore_model(load, ckpt_step, tokenizer_model, layout)
        model = SharedModel(restored, rows)
        if torch.distributed.get_rank() != 0:
            model.follow()
            _leave()
            raise Followed(0)
        super().__init__(model, prefix_token_id)
        self._cannot_generate = cannot_generate(restored.run)
        atexit.register(end_following)
        _models.append(model)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """See ``NativeLM``. Raises ``ValueError`` in a layout that cannot generate."""
        if self._cannot_generate is not None:
            raise ValueError(
                f"the task {requests[0].task_name} generates text, which the layout of {self._cannot_generate} cannot; "
                "leave that setting out"
            )
        return super().generate_until(requests, disable_tqdm)


_models: list[Any] = []


def end_following() -> None:
    """Let the other ranks end, on rank 0; once. Where an error has left them in the middle of a computation they cannot
    hear it, and learn that this rank is gone."""
    while _models:
        model = _models.pop()
        if not model.asking:
            model.finish()
            _leave()


def _leave() -> None:
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
