"""A stand-in for CUDA graphs on a CPU: records the operations of a capture and repeats them.

As on a GPU, a capture computes nothing: what it made holds no numbers until the first replay, and what was there before
is as it was. A replay runs the recorded operations on the recorded memory, without Python of the model. A capture stops
where the host would wait for a number or a size would depend on numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "unique", "_unique2", "masked_select", "bincount")


class Capture(TorchDispatchMode):
    """Records every operation; ``end`` takes back what they did."""

    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()
        self._graph = graph
        self._made: dict[int, torch.Tensor] = {}
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        assert name not in WAITS, f"{func} makes the host wait"
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        masks = name in ("index", "index_put_", "index_put") and any(
            isinstance(each, torch.Tensor) and each.dtype in (torch.bool, torch.uint8) for each in args[1]
        )
        assert not masks, f"{func} with a mask makes the host wait"
        if func._schema.is_mutable:
            for tensor in given:
                self._remember(tensor)
        result = func(*args, **kwargs)
        outputs = [each if isinstance(each, torch.Tensor) else None for each in tree_leaves(result)]
        known = {each.untyped_storage().data_ptr() for each in given}
        for output in outputs:
            if output is not None and output.untyped_storage().data_ptr() not in known:
                self._made[output.untyped_storage().data_ptr()] = output
        self._graph.operations.append((func, args, kwargs, outputs))
        return result

    def _remember(self, tensor: torch.Tensor) -> None:
        place = tensor.untyped_storage().data_ptr()
        if place not in self._made and place not in self._before:
            whole = tensor.data.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
            self._before[place] = whole, whole.clone()

    def end(self) -> None:
        """What was written to is as before; what is new holds no numbers."""
        with torch.no_grad():
            for whole, before in self._before.values():
                whole.copy_(before)
            for place, tensor in self._made.items():
                if place not in self._before:
                    tensor.data.fill_(torch.nan if tensor.is_floating_point() else 0)


class RecordedGraph:
    """``torch.cuda.CUDAGraph``."""

    replays = 0

    def __init__(self) -> None:
        self.operations: list[tuple[Any, Any, Any, list[Any]]] = []

    def register_generator_state(self, state: Any) -> None:
        """Nothing is drawn."""

    def replay(self) -> None:
        RecordedGraph.replays += 1
        with torch.no_grad():
            for func, args, kwargs, outputs in self.operations:
                if getattr(func, "is_view", False):
                    continue
                again = tree_leaves(func(*args, **kwargs))
                for old, new in zip(outputs, again, strict=True):
                    if old is not None and old.data_ptr() != new.data_ptr():
                        old.data.copy_(new)  # not seen by autograd, as on a GPU


@contextlib.contextmanager
def capturing(graph: RecordedGraph, **_: Any) -> Iterator[None]:
    """``torch.cuda.graph``."""
    capture = Capture(graph)
    with capture:
        yield
    capture.end()


def install(patch: Any) -> None:
    """Let mcore's local graphs use the recorder, in this process; ``patch`` is a MonkeyPatch."""
    from megatron.core.transformer import cuda_graphs

    from umv2_megatron.config import graph_checks
    from umv2_megatron.parallel.cpu_platform import _view_of

    cuda = _view_of(
        cuda_graphs.torch.cuda,
        CUDAGraph=RecordedGraph,
        graph=capturing,
        graph_pool_handle=lambda: "pool",
        get_device_capability=lambda *_: (9, 0),
        memory_stats=lambda: {"allocated_bytes.all.current": 0, "reserved_bytes.all.current": 0},
        default_generators=(SimpleNamespace(get_state=lambda: None, set_state=lambda _: None),),
    )
    patch.setattr(cuda_graphs, "torch", _view_of(cuda_graphs.torch, cuda=cuda))
    # generators of a CPU cannot be captured; nothing is drawn in a step
    patch.setattr(cuda_graphs, "get_all_rng_states", dict)
    patch.setattr(cuda_graphs, "_ensure_generator_state_is_cudagraph_safe", lambda generator: generator)
    tracker = cuda_graphs.get_cuda_rng_tracker
    patch.setattr(cuda_graphs, "get_cuda_rng_tracker", lambda: _graph_safe(tracker()))
    patch.setattr(graph_checks, "on_cuda", lambda: True)


def _graph_safe(tracker: Any) -> Any:
    """What mcore asks of a tracker is only whether it says so; its states are those of the CPU."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    made = CudaRNGStatesTracker()
    made.states_, made.use_cudagraphable_rng = tracker.states_, True
    return made
