"""A stand-in for Transformer Engine on a CPU, which notes which of its modules run inside its FP8 context.

``install()`` comes before megatron-core is imported. Contexts nest, and delayed scaling reduces its largest numbers, by
the rules of Transformer Engine 2.11 (quantization.py): a context's settings hold until it ends, and an enabled context
that ends as the outermost one reduces. The modules compute in plain torch. Every other name is an empty class.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F


class State:
    """What holds at this moment, and what was noted."""

    enabled = False
    recipe: Any = None
    fp8_weights = False
    depth = 0
    reductions = 0
    ran: list[tuple[torch.nn.Module, bool, str]] = []  # (module, whether in FP8, recipe)


@contextlib.contextmanager
def fp8_autocast(enabled: bool = True, fp8_recipe: Any = None, fp8_group: Any = None) -> Iterator[None]:
    before = State.enabled, State.recipe
    State.enabled, State.recipe = enabled, fp8_recipe
    State.depth += 1
    try:
        yield
    finally:
        State.enabled, State.recipe = before
        State.depth -= 1
        State.reductions += enabled and State.depth == 0 and torch.is_grad_enabled()


@contextlib.contextmanager
def fp8_model_init(enabled: bool = True, recipe: Any = None) -> Iterator[None]:
    before, State.fp8_weights = State.fp8_weights, enabled
    try:
        yield
    finally:
        State.fp8_weights = before


class StateManager:
    """FP8GlobalStateManager."""

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return State.enabled

    @classmethod
    def get_fp8_recipe(cls) -> Any:
        return State.recipe


class Module(torch.nn.Module):
    """The base of its modules. Bytes of extra state only where a delayed recipe ran, as there."""

    def __init__(self) -> None:
        super().__init__()
        self.fp8_weights, self.save_original_input = State.fp8_weights, False

    def note(self) -> None:
        State.ran.append((self, State.enabled, type(State.recipe).__name__ if State.enabled else ""))

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        pass


class Linear(Module):
    def __init__(self, in_features: int, out_features: int, init_method: Any, params_dtype: torch.dtype, **others: Any):
        super().__init__()
        self.fuse_wgrad_accumulation = others["fuse_wgrad_accumulation"]
        self.parallel_mode, self.use_bias, self.tp_size = others["parallel_mode"], others["bias"], others["tp_size"]
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype))
        init_method(self.weight)

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        self.note()
        return F.linear(x, self.weight)


class LayerNormLinear(Linear):
    def __init__(self, in_features: int, out_features: int, **others: Any):
        super().__init__(in_features, out_features, **others)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(in_features, dtype=others["params_dtype"]))

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        return super().forward(F.rms_norm(x, x.shape[-1:], self.layer_norm_weight))


class RMSNorm(Module):
    def __init__(
        self,
        normalized_shape: int | None = None,
        *,
        params_dtype: torch.dtype,
        hidden_size: int | None = None,  # the older name, which mcore 0.16 gives
        **others: Any,
    ):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(normalized_shape or hidden_size, dtype=params_dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight)


class DotProductAttention(Module):
    def __init__(self, *others: Any, **named: Any):
        super().__init__()

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: Any, **named: Any) -> Any:
        self.note()
        shared = query.shape[2] // key.shape[2]  # [S, B, heads, channels]
        parts = [query, key.repeat_interleave(shared, 2), value.repeat_interleave(shared, 2)]
        mixed = F.scaled_dot_product_attention(*(part.permute(1, 2, 0, 3) for part in parts), is_causal=True)
        return mixed.permute(2, 0, 1, 3).flatten(2)


class _SplitAlongDim:
    @staticmethod
    def apply(tensor: torch.Tensor, dim: int, sizes: list[int]) -> Any:
        return torch.split(tensor, sizes, dim)


def _recipe(name: str, delayed: bool) -> type:
    def __init__(self: Any, **settings: Any) -> None:
        self.settings = settings

    return type(name, (), {"__init__": __init__, "delayed": lambda self: delayed})


_NAMES: dict[str, dict[str, Any]] = {
    "transformer_engine": {"__version__": "2.11.0"},
    "transformer_engine.common.recipe": {
        "Format": type("Format", (), {"E4M3": "e4m3", "HYBRID": "hybrid"}),
        "DelayedScaling": _recipe("DelayedScaling", delayed=True),
        **{
            name: _recipe(name, delayed=False)
            for name in ("Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling")
        },
    },
    "transformer_engine.pytorch": {
        "Linear": Linear, "LayerNormLinear": LayerNormLinear, "RMSNorm": RMSNorm, "LayerNorm": RMSNorm,
        "DotProductAttention": DotProductAttention, "fp8_autocast": fp8_autocast, "fp8_model_init": fp8_model_init,
        "autocast": None, "quantized_model_init": None,
    },
    "transformer_engine.pytorch.fp8": {"FP8GlobalStateManager": StateManager, "fp8_autocast": fp8_autocast},
    "transformer_engine.pytorch.attention": {"_SplitAlongDim": _SplitAlongDim},
    "transformer_engine.pytorch.cpu_offload": {
        "get_cpu_offload_context": lambda *_, **__: (contextlib.nullcontext(), lambda output: output)
    },
    "transformer_engine.pytorch.module.base": {"TransformerEngineBaseModule": Module},
}  # fmt: skip


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name.startswith("_torch"):
            raise AttributeError(name)
        made = type(name, (), {"apply": None})
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if fullname.split(".")[0] in ("transformer_engine", "transformer_engine_torch"):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(_NAMES.get(module.__name__, {}))


def install() -> None:
    """Let ``import transformer_engine`` find the stand-in, in this process."""
    sys.meta_path.insert(0, _Finder())
    for name in ("common.recipe", "pytorch.distributed", "pytorch.ops"):  # which mcore reaches as attributes
        importlib.import_module(f"transformer_engine.{name}")
