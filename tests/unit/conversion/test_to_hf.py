"""Singular vectors that an export gets: those of its own cores, with the sign of the stored ones."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from umv2_megatron.conversion.safetensors_files import ConversionError
from umv2_megatron.conversion.to_hf import singular_vector


def held(cores: torch.Tensor, u: torch.Tensor, t: torch.Tensor) -> Any:
    """What stands for a checkpoint with these three tensors."""
    tensors = {"x.cores": cores, "x.u": u, "x.t": t}
    infos = {key: SimpleNamespace(rows=len(tensor)) for key, tensor in tensors.items()}
    return SimpleNamespace(tensors=infos, rows=lambda key, start, stop: tensors[key][start:stop])


def test_the_vectors_are_those_of_the_cores_with_the_stored_sign() -> None:
    u, t = torch.tensor([[0.6, 0.8]]), torch.tensor([[-0.8, 0.6]])
    cores = (3 * torch.einsum("hr,hs->hrs", u, t))[None]
    for sign in (1, -1):
        source = held(cores, sign * (u + 0.1), sign * (t + 0.1))
        for key, vector in (("x.u", u), ("x.t", t)):
            found = singular_vector(source, key, torch.float32)
            torch.testing.assert_close(found, sign * vector, rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_cores_that_are_not_finite_are_refused_by_name(value: float) -> None:
    """As those of a model that has diverged; or that are too large for float16."""
    source = held(torch.full((2, 1, 2, 2), value), torch.ones(1, 2), torch.ones(1, 2))
    with pytest.raises(ConversionError, match=r"x.cores holds numbers that are not finite in float16"):
        singular_vector(source, "x.t", torch.float16)
