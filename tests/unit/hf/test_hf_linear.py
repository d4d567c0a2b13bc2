"""Projections of the Hugging Face model: oneDNN where a step of decoding is computed, torch's own product elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from umv2_megatron.hf.linear_umv2 import project


class Operations(TorchDispatchMode):
    """Names of the operations that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        self.names.append(operation.name())
        return operation(*arguments, **(options or {}))


def made(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(96, 40, bias=bias, dtype=dtype)


def used(layer: nn.Linear, x: Tensor) -> bool:
    """Whether oneDNN computes ``project(layer, x)``, which is to be what ``nn.Linear`` gives."""
    with Operations() as called:
        found = project(layer, x)
    torch.testing.assert_close(found, functional.linear(x, layer.weight, layer.bias))
    return "mkldnn::_linear_pointwise" in called.names


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN")
def test_onednn_computes_only_plain_products_without_autograd() -> None:
    layer, x = made(), torch.randn(3, 5, 96)
    with torch.no_grad():
        assert used(layer, x) and used(made(bias=False), x) and used(layer, x.transpose(0, 1)) and used(layer, x[:0])
        assert not used(made(dtype=torch.float64), x.double())
        with torch.autocast("cpu", torch.bfloat16):
            assert not used(layer, x)
    with torch.inference_mode():
        assert used(layer, x)
    assert not used(layer, x) and project(layer, x).requires_grad


def test_what_stands_on_a_layer_is_called() -> None:
    """Hooks, as accelerate puts them there, another forward, and layers of other kinds."""
    x = torch.randn(3, 96)

    class Other(nn.Linear):
        pass

    hooked, patched, called = made(), made(), []
    hooked.register_forward_pre_hook(lambda layer, given: called.append(layer))
    patched.forward = lambda x: called.append(patched) or x
    with torch.no_grad():
        assert not used(hooked, x) and not used(Other(96, 40), x)
        assert project(patched, x) is x
    assert called == [hooked, patched]
