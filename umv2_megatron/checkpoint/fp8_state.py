"""The state of FP8 scaling in checkpoints: as tensors and plain values, never as Transformer Engine's pickle.

A layer of Transformer Engine (2.9 to 2.11) gives its extra state as bytes, which it unpickles when it gets them back;
a pickle can run any code. So a checkpoint holds what is in those bytes: scales and histories of largest numbers of
delayed scaling, and the layer's plain variables. The recipe is that of the run that loads. When loading, bytes for the
layer are made anew in this process. Bytes that a checkpoint itself holds are refused.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from umv2_megatron.durable_files import CheckpointError

_FORMAT = "umv2_fp8_scaling"
_TENSORS = ("scale_fwd", "amax_history_fwd", "scale_bwd", "amax_history_bwd")
_VARIABLES = "extra_fp8_variables"


def to_plain(key: str, state: Any) -> Any:
    """What a checkpoint holds of ``state``, the extra state that a layer of this process has just given.

    None and empty tensors, of layers that do not compute in FP8, stay as they are. Raises ``CheckpointError`` naming
    ``key`` where it is not Transformer Engine's.
    """
    if _is_empty(state):
        return state
    try:
        held = pickle.loads(state.numpy().tobytes())  # made by the layer itself, a moment ago
        variables = held[_VARIABLES]
        tensors = {name: held[name] for name in _TENSORS if name in held}
    except Exception as error:
        raise CheckpointError(
            f"{key} is no extra state of Transformer Engine 2.9 to 2.11 ({type(error).__name__}); only such layers "
            "can be saved with one"
        ) from error
    plain = {name: value for name, value in variables.items() if type(value) in (bool, int, float, str)}
    return {"format": _FORMAT, "tensors": tensors, "variables": plain}


def from_plain(key: str, held: Any, recipe: Callable[[], Any]) -> Any:
    """The extra state for the layer, of what a checkpoint ``held`` under ``key``.

    ``recipe()``: Transformer Engine's recipe of this run, None where it does not compute in FP8; what is held is left
    alone then. Raises ``CheckpointError`` naming ``key`` for anything but ``to_plain``'s.
    """
    if _is_empty(held):
        return held
    if not _is_plain(held):
        raise CheckpointError(
            f"{key} holds extra state that Transformer Engine would unpickle, which can run any code; expected an FP8 "
            "state that this program has written: save the checkpoint without FP8, whose scales are found anew within "
            "some steps"
        )
    chosen = recipe()
    if chosen is None or bool(held["tensors"]) != chosen.delayed():  # scales of another recipe mean nothing to this one
        return torch.empty(0, dtype=torch.uint8)
    state = {"recipe": chosen, **held["tensors"], _VARIABLES: held["variables"]}
    return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)


def _is_plain(held: Any) -> bool:
    return (
        isinstance(held, dict)
        and held.get("format") == _FORMAT
        and held["tensors"].keys() <= set(_TENSORS)
        and all(isinstance(tensor, Tensor) for tensor in held["tensors"].values())
        and all(type(value) in (bool, int, float, str) for value in held["variables"].values())
    )


def _is_empty(state: Any) -> bool:
    if isinstance(state, io.BytesIO):
        return not state.getbuffer().nbytes
    return state is None or (isinstance(state, Tensor) and not state.numel())
