"""FP8 states go through a checkpoint as tensors and plain values; bytes that would be unpickled are refused."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from umv2_megatron.checkpoint.fp8_state import from_plain, to_plain
from umv2_megatron.durable_files import CheckpointError


class Recipe:
    """Stands for Transformer Engine's."""

    def __init__(self, is_delayed: bool = True) -> None:
        self.is_delayed = is_delayed

    def delayed(self) -> bool:
        return self.is_delayed


def state(recipe: Recipe) -> torch.Tensor:
    """What a layer gives: a pickle in a tensor of bytes."""
    held: dict[str, Any] = {
        "recipe": recipe,
        "extra_fp8_variables": {"num_gemms": 1, "fp8_checkpoint": True, "name": "fc1", "shapes": [(1, 2)]},
    }
    if recipe.delayed():
        held |= {"scale_fwd": torch.tensor([2.0, 4.0]), "amax_history_fwd": torch.rand(3, 2)}
        held |= {"scale_bwd": torch.tensor([8.0]), "amax_history_bwd": torch.rand(3, 1)}
    return torch.frombuffer(bytearray(pickle.dumps(held)), dtype=torch.uint8)


@pytest.mark.parametrize("delayed", [True, False])
def test_there_and_back(delayed: bool) -> None:
    original = state(Recipe(delayed))
    file = io.BytesIO()
    torch.save(to_plain("k", original), file)
    file.seek(0)
    plain = torch.load(file, weights_only=True)
    chosen = Recipe(delayed)
    before = pickle.loads(original.numpy().tobytes())
    after = pickle.loads(from_plain("k", plain, lambda: chosen).numpy().tobytes())
    assert after.keys() == before.keys()
    assert after["extra_fp8_variables"] == {"num_gemms": 1, "fp8_checkpoint": True, "name": "fc1"}
    for name in before.keys() - {"recipe", "extra_fp8_variables"}:
        assert torch.equal(before[name], after[name])
    assert after["recipe"].delayed() is delayed


def test_another_recipe_or_none_leaves_the_layer_as_it_is() -> None:
    plain = to_plain("k", state(Recipe()))
    for recipe in (None, Recipe(False)):
        assert from_plain("k", plain, lambda recipe=recipe: recipe).numel() == 0


@pytest.mark.parametrize("nothing", [None, torch.empty(0, dtype=torch.uint8), io.BytesIO()])
def test_no_state_stays_none(nothing: Any) -> None:
    assert to_plain("k", nothing) is nothing and from_plain("k", nothing, Recipe) is nothing


class Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def test_a_planted_payload_is_refused_and_does_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "ran"
    data = pickle.dumps(Payload(canary))
    planted: list[Any] = [
        torch.frombuffer(bytearray(data), dtype=torch.uint8),
        io.BytesIO(data),
        {"format": "umv2_fp8_scaling", "tensors": {"scale_fwd": data}, "variables": {}},
        {"format": "umv2_fp8_scaling", "tensors": {}, "variables": {"recipe": data}},
        {"format": "umv2_fp8_scaling", "tensors": {"recipe": torch.tensor(1)}, "variables": {}},
    ]
    for held in planted:
        with pytest.raises(CheckpointError, match="decoder.layers.0._extra_state holds extra state that"):
            from_plain("decoder.layers.0._extra_state", held, Recipe)
    assert not canary.exists()


def test_what_is_not_transformer_engine_s_cannot_be_saved() -> None:
    with pytest.raises(CheckpointError, match="layer._extra_state is no extra state of Transformer Engine"):
        to_plain("layer._extra_state", torch.tensor(1.0))
