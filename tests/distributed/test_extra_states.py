"""Extra states of layers, as Transformer Engine has them: they never stop a load, and never run code."""

from __future__ import annotations

import os
import pickle
from typing import Any

import torch
from harness import run_ranks
from test_checkpointing import make
from tiny_gpt import Layout

from umv2_megatron.checkpoint import pieces, save_load
from umv2_megatron.checkpoint.save_load import load_checkpoint, save_checkpoint
from umv2_megatron.checkpoint.store import CheckpointStore
from umv2_megatron.durable_files import CheckpointError


class Delayed:
    """Stands for Transformer Engine's recipe."""

    def delayed(self) -> bool:
        return True


class Scaling(torch.nn.Module):
    """Has an extra state as Transformer Engine's layers do: a pickle in a tensor of bytes."""

    value = 0.0

    def get_extra_state(self) -> torch.Tensor:
        held = {"scale_fwd": torch.tensor(self.value), "recipe": Delayed(), "extra_fp8_variables": {}}
        return torch.frombuffer(bytearray(pickle.dumps(held)), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        if state.numel():
            self.value = pickle.loads(state.numpy().tobytes())["scale_fwd"].item()


def exchange_extra_states(root: str) -> list[float]:
    save_load._fp8_recipe = lambda chunks: Delayed()  # as with --fp8-format and Transformer Engine
    run = make(Layout())
    layer = run[0][0].module.decoder.layers[1]
    without, having = CheckpointStore(f"{root}/without"), CheckpointStore(f"{root}/having")
    save_checkpoint(without, 3, *run)
    layer.scaling = Scaling()
    layer.scaling.value = 1.0
    save_checkpoint(having, 3, *run)
    layer.scaling.value = 2.0
    values = []
    for store in (without, having):
        load_checkpoint(store, *run)
        values.append(layer.scaling.value)
    del layer.scaling
    load_checkpoint(having, *run)
    return values


def test_extra_states_never_stop_a_load(tmp_path):
    """Transformer Engine's layers and the local ones differ in them: the model keeps its own, and ignores unknown."""
    assert run_ranks(1, exchange_extra_states, str(tmp_path))[0] == [2.0, 1.0]


class Quantized(torch.Tensor):
    """Stands for the engine's weights in FP8: what they hold is not what they mean."""

    def dequantize(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor).detach() * 2


def save_weights_in_fp8(root: str) -> tuple[bool, bool]:
    from megatron.core import fp8_utils

    fp8_utils.HAVE_TE_FP8_TENSOR_CLASS, fp8_utils.FP8_TENSOR_CLASS = True, Quantized
    fp8_utils.is_te_min_version = lambda *_: True
    run = make(Layout())
    linear = run[0][0].module.decoder.layers[1].mlp.linear_fc1
    plain = linear.weight
    linear.weight = torch.nn.Parameter(plain.detach().clone().as_subclass(Quantized))
    store, expected = CheckpointStore(root), plain.detach() * 2
    save_checkpoint(store, 3, run[0])
    kept = type(linear.weight) is Quantized
    linear.weight = plain
    load_checkpoint(store, run[0])
    return kept, torch.equal(linear.weight, expected)


def test_weights_in_fp8_are_saved_as_what_they_mean(tmp_path):
    """In FP8 they would be objects of the engine, which no load of ours unpickles, nor an export reads."""
    assert run_ranks(1, save_weights_in_fp8, str(tmp_path))[0] == (True, True)


class Payload:
    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def load_a_planted_payload(root: str) -> tuple[str, bool]:
    """A checkpoint as another program writes it, whose extra state is a pickle that would run a command."""
    run = make(Layout())
    layer = run[0][0].module.decoder.layers[1]
    layer.scaling = Scaling()
    data = pickle.dumps(Payload(f"{root}/canary"))
    to_plain, pieces.to_plain = pieces.to_plain, lambda key, state: torch.frombuffer(
        bytearray(data), dtype=torch.uint8
    )
    store = CheckpointStore(f"{root}/planted")
    save_checkpoint(store, 3, *run)
    pieces.to_plain = to_plain
    try:
        load_checkpoint(store, *run)
        told = "loaded"
    except CheckpointError as error:
        told = str(error)
    return told, os.path.exists(f"{root}/canary")


def test_an_extra_state_is_never_unpickled(tmp_path):
    told, ran = run_ranks(1, load_a_planted_payload, str(tmp_path))[0]
    assert "_extra_state" in told and "would unpickle" in told
    assert not ran
