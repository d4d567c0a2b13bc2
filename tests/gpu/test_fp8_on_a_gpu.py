"""FFNs in FP8 through Transformer Engine: the losses of twenty steps stay beside those in bfloat16.

Run by `make test-gpu`; skipped where there is no CUDA device with FP8, or no Transformer Engine.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_kit.runs import flags_of, lines_of, run_program

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
        reason="there is no CUDA device with FP8",
    ),
]
STEPS = 20
# FP8 products want sizes that are multiples of 16.
MODEL = {"model_preset": "umv2-8m", "lr": 1e-3, "transformer_impl": "transformer_engine"}


def losses(**changes: object) -> list[float]:
    """Of every step."""
    found = lines_of(run_program(["pretrain_umv2.py", *flags_of(False, STEPS, **MODEL, **changes)]))
    assert len(found) == STEPS
    return [line["loss"] for line in found]


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_losses_are_beside_those_in_bfloat16(recipe: str) -> None:
    pytest.importorskip("transformer_engine", reason="Transformer Engine is not installed")
    plain, low = losses(), losses(fp8_format="hybrid", fp8_recipe=recipe)
    assert low != plain, "FP8 changed nothing"
    assert low[-1] < low[0]
    for wanted, found in zip(plain, low):
        assert abs(found - wanted) < 0.03 * wanted
