"""Ranges around the parts of a model, forward and backward, by hooks that hang on it only while a run is profiled.

The backward of a call begins when autograd comes to the node that made its output, and ends when the gradients of all
its inputs are there; gradients of weights are computed in between. To see the end, the hooks pass the inputs through an
identity whose backward reports. Where that cannot be (embedding, norms, loss), it ends where the next range begins.
Under activation recompute the second forward of a part is listed apart, as "recompute".
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from umv2_megatron.model.builder import unwrap
from umv2_megatron.model.ffn_with_memory import memory_layers
from umv2_megatron.training.ranges import OpenRange, Ranges


class WatchedModel:
    """The parts of ``chunks`` (mcore's GPTModels, wrapped or not), reported to ``ranges`` until ``release``."""

    def __init__(self, chunks: list[nn.Module], ranges: Ranges) -> None:
        self._ranges = ranges
        self._undo: list[Callable[[], Any]] = []
        seen: set[nn.Module] = set()
        for chunk in chunks:
            for name, module in _parts(unwrap(chunk)):
                if module not in seen:  # tables that layers share, for one
                    seen.add(module)
                    # A norm uses its input several times, the residual once more: an identity in between would add up
                    # their gradients in another order, and a profiled run would not be the same run.
                    self._watch(name, module, inputs=name != "norms")
            model = unwrap(chunk)
            if getattr(model, "post_process", False):
                # mcore's cross entropy works in the logits' memory, which an identity before it would forbid; the
                # loss's backward ends where that of the output layer begins
                self._replace(
                    model, "compute_language_model_loss", functools.partial(self._timed, "loss", inputs=False)
                )
            for _, layer in memory_layers(model):
                if layer.owns_table and layer.table.exchange is not None:
                    self._replace(layer.table.exchange, "watched", self._timed_context)
                if layer.retrieval is None:  # rows of n-grams are not searched for
                    continue
                self._replace(
                    layer.retrieval, "refresh_singular_vectors", functools.partial(self._timed, "u, t refresh")
                )
                self._watch("query projection", layer.retrieval.query, inputs=True)
                # one piece with the search, and so not apart, where the backend has it
                self._replace(layer.retrieval, "key_scores", functools.partial(self._timed, "scores of keys"))

    def release(self) -> None:
        """Take everything off again."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def _watch(self, name: str, module: nn.Module, inputs: bool) -> None:
        """Time the forward and the backward of every call of ``module``; ``inputs`` as in ``_timed``."""
        calls: list[tuple[OpenRange, _Backward]] = []

        def before(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            backward = _Backward(self._ranges, name)
            calls.append((self._ranges.open(name, _section()), backward))
            return backward.pass_through(args, kwargs) if inputs else (args, kwargs)

        def after(_: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            opened, backward = calls.pop()
            self._ranges.close(opened)
            backward.expect(output)

        self._undo.append(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        self._undo.append(module.register_forward_hook(after, with_kwargs=True).remove)

    def _replace(self, owner: Any, method: str, wrap: Callable[[Any], Any]) -> None:
        """Cover ``owner.method`` by what ``wrap`` makes of it."""
        setattr(owner, method, wrap(getattr(owner, method)))
        self._undo.append(lambda: delattr(owner, method))

    def _timed(self, name: str, method: Callable, inputs: bool = True) -> Callable:
        """``method`` in a range, its backward, too, which ends with the gradients of the inputs or, without ``inputs``,
        where the next range begins."""

        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            backward = _Backward(self._ranges, name)
            with self._ranges(name, _section()):
                if inputs:
                    args, kwargs = backward.pass_through(args, kwargs)
                output = method(*args, **kwargs)
            backward.expect(output)
            return output

        return timed

    def _timed_context(self, watched: Callable) -> Callable:
        """The context managers that start an exchange, or wait for it."""

        @contextlib.contextmanager
        def timed(step: str) -> Iterator[None]:
            with self._ranges("exchanges", _section()), watched(step):
                yield

        return timed


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``(name, module)`` of what has a row in the table."""
    for name, attribute in (("embedding", "embedding"), ("output layer", "output_layer")):
        if getattr(model, attribute, None) is not None:
            yield name, getattr(model, attribute)
    decoder: Any = model.decoder
    if getattr(decoder, "final_layernorm", None) is not None:
        yield "norms", decoder.final_layernorm
    for layer in decoder.layers:
        yield "norms", layer.input_layernorm
        yield "norms", layer.pre_mlp_layernorm
        yield "attention", layer.self_attention
        yield ("FFN", layer.mlp.ffn) if hasattr(layer.mlp, "ffn") else ("experts", layer.mlp)
    for _, layer in memory_layers(model):
        family = layer.config.family
        yield f"{family}: lookup", layer.table
        for name, part in layer.named_children():
            if part is not layer.table:
                yield f"{family}: {name.replace('_', ' ')}", part


def _section() -> str:
    """Whether a forward runs as such or, inside a backward, as a recompute."""
    return "forward" if torch._C._current_graph_task_id() == -1 else "recompute"


class _Backward:
    """The backward of one call: passes the inputs on, waits for the output's gradient, and then for the inputs'."""

    def __init__(self, ranges: Ranges, name: str) -> None:
        self._ranges, self._name = ranges, name
        self._inputs = 0
        self._opened: OpenRange | None = None

    def pass_through(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of the call, with their gradients' arrival reported."""
        return tuple(map(self.through, args)), {key: self.through(value) for key, value in kwargs.items()}

    def through(self, value: Any) -> Any:
        """One argument: a tensor, a list or dataclass of such (also in one another), or something else. What holds no
        gradient stays the object that it is."""
        if isinstance(value, Tensor):
            # a parameter must stay what it is: autograd's accumulators and main_grad are found by it
            if not value.requires_grad or isinstance(value, nn.Parameter) or not torch.is_grad_enabled():
                return value
            self._inputs += 1
            return _Report.apply(value, self._arrived)
        if isinstance(value, list):
            passed = list(map(self.through, value))
            return passed if any(new is not old for new, old in zip(passed, value)) else value
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
            parts = {key: self.through(each) for key, each in fields.items() if isinstance(each, (Tensor, list))}
            changed = {key: each for key, each in parts.items() if each is not fields[key]}
            return dataclasses.replace(value, **changed) if changed else value
        return value

    def expect(self, output: Any) -> None:
        """Open the range when autograd comes to ``output``: a tensor, or a tuple, list or dataclass of such."""
        if isinstance(output, Tensor):
            if output.grad_fn is not None:
                output.grad_fn.register_prehook(self._begin)
        elif isinstance(output, (tuple, list)):
            for each in output:
                self.expect(each)
        elif dataclasses.is_dataclass(output) and not isinstance(output, type):
            self.expect([getattr(output, each.name) for each in dataclasses.fields(output)])

    def _begin(self, _: Any) -> None:
        if self._opened is None:
            self._opened = self._ranges.open(self._name, "backward", until_next=self._inputs == 0)

    def _arrived(self) -> None:
        self._inputs -= 1
        if self._inputs == 0 and self._opened is not None:
            self._ranges.close(self._opened)


class _Report(torch.autograd.Function):
    """The identity; calls ``arrived`` when its gradient is there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, arrived: Callable[[], None]) -> Tensor:
        ctx.arrived = arrived
        # not a view for autograd: what an exchange has under way is still written to
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.arrived()
        return grads[0], None
