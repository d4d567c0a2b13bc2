"""Golden files and the real modules: reading a pair, building layers of its hyperparameters, comparing tensors."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.memory.layer import MemoryLayer
from umv2_megatron.memory.sharing import TableWindow, from_share_ratio

OWN_DIR = Path(__file__).resolve().parent.parent / "golden"
GOLDEN_DIR = Path(os.environ.get("UMV2_GOLDEN_DIR") or OWN_DIR)

# Names of the golden files' tensors and of our parameters.
PARAMETERS = {
    "query": "retrieval.query.weight",
    "query_norm": "retrieval.query_norm",
    "keys": "retrieval.keys",
    "key_norm": "retrieval.key_norm",
    "core": "retrieval.cores",
    "pre_proj": "pre_proj.weight",
    "value_proj": "value_proj.weight",
}
KINDS = ("ultramem_v2", "ultramem_v1", "memory_plus")


def parameter_name(name: str) -> str:
    """Ours for a weight of a golden file; what the table lacks is the gate of Memory+, which has several names."""
    return PARAMETERS.get(name, "gate_proj.weight")


def golden_pairs() -> list[str]:
    """Stems of all safetensors files in the folder that have a JSON file beside them."""
    return sorted(path.stem for path in GOLDEN_DIR.glob("*.safetensors") if path.with_suffix(".json").exists())


def read_pair(stem: str, folder: Path = GOLDEN_DIR) -> tuple[dict, dict[str, Tensor]]:
    """The JSON's contents and the tensors."""
    return json.loads((folder / f"{stem}.json").read_text()), load_file(folder / f"{stem}.safetensors")


def config_of(hyper: dict, backend: str, tensors: dict[str, Tensor] | None = None) -> MemoryConfig:
    """The ``MemoryConfig`` that describes a golden file's hyperparameters.

    ``tensors``: of a Memory+ file, whose key norm may be there without an effect, as in the released layer.
    """
    if hyper.get("kind") == "memory_plus":
        return memory_plus_config(hyper, backend, tensors or {})
    expansion, blocks = hyper.get("value_expand", 1), hyper.get("key_expand", 1) ** 2
    assert expansion in (1, blocks), f"value_expand {expansion} is neither 1 nor key_expand^2"
    return MemoryConfig(
        num_keys=hyper["knum"],
        key_dim=hyper["kdim"],
        value_dim=hyper["vdim"],
        pre_value_dim=hyper.get("pre_vdim") or 0,
        topk=hyper["knn"],
        num_heads=hyper.get("head", 1),
        tucker_rank=hyper["tucker_rank"],
        num_cores=hyper["tucker_cores"],
        query_mode=hyper.get("query_mode", "shared"),
        key_expansion=hyper.get("key_expand", 1),
        value_expansion="single" if expansion == 1 else "per-block",
        pre_value_activation="gelu" if hyper.get("glu_act") else "none",
        norm_epsilon=hyper.get("norm_eps", 1e-5),
        balance_loss_coeff=hyper.get("balance_coef") or 0.0,
        backend=backend,
    )


def memory_plus_config(hyper: dict, backend: str, tensors: dict[str, Tensor]) -> MemoryConfig:
    """Memory+: product keys, softmax, gate; keys are normalised if the file's key norm has a gradient."""
    gradient = tensors.get("layer0.grad64.key_norm", tensors.get("layer0.grad.key_norm"))
    return MemoryConfig(
        num_keys=hyper["knum"],
        key_dim=hyper["kdim"],
        value_dim=hyper["vdim"],
        pre_value_dim=0,
        topk=hyper["knn"],
        num_heads=hyper.get("head", 1),
        tucker_rank=1,
        num_cores=1,
        scoring="additive",
        score_normalization="softmax",
        query_mode="per_head",
        qk_norm="both" if gradient is not None and bool(gradient.any()) else "query",
        gate="silu",
        norm_epsilon=hyper.get("norm_eps", 1e-5),
        backend=backend,
    )


def fitted(tensor: Tensor, parameter: Tensor) -> Tensor:
    """``tensor`` in the shape of ``parameter``: product keys have no rank dimension, which is 1 in ours."""
    return tensor.unsqueeze(-1) if tensor.shape == parameter.shape[:-1] and parameter.shape[-1] == 1 else tensor


def build_layers(hyper: dict, tensors: dict[str, Tensor], backend: str, dtype: torch.dtype) -> list[MemoryLayer]:
    """The layers of a golden file with its weights; the first owns the table that all of them use."""
    config = config_of(hyper, backend, tensors)
    count = hyper.get("layers", 1)
    if config.scoring == "additive":  # values of all layers in one table of knum^2 rows
        windows = [TableWindow(0, hyper["knum"] ** 2, 0, hyper["knum"] ** 2)] * count
    else:
        windows = from_share_ratio(hyper["knum"], count, hyper.get("share_ratio", 1.0))
    layers: list[MemoryLayer] = []
    for index, window in enumerate(windows):
        layer = MemoryLayer(
            config,
            hyper["hidden"],
            layer_index=index,
            num_memory_layers=len(windows),
            ffn_hidden_size=4 * hyper["hidden"],
            num_layers=len(windows),
            window=window,
            table=layers[0].table if layers else None,
            params_dtype=dtype,
            perform_initialization=False,
        )
        own = dict(layer.named_parameters())
        weights = {parameter_name(name.split(".w.")[1]): tensor for name, tensor in tensors.items()
                   if name.startswith(f"layer{index}.w.")}
        if config.qk_norm == "query":
            weights.pop("retrieval.key_norm", None)
        state = {name: fitted(tensor, own[name]) for name, tensor in weights.items()}
        for name in ("values", "pre_values"):
            if index == 0 and f"shared.w.{name}" in tensors:
                state[f"table.{name}"] = tensors[f"shared.w.{name}"]
        state["perm"] = tensors.get(f"layer{index}.b.perm", torch.arange(layer.perm.numel()))
        for name in ("u", "t"):
            if config.scoring == "tucker":
                state[f"retrieval.{name}"] = tensors[f"layer{index}.b.{name}"]
        layer.load_state_dict(state, strict=True)
        layers.append(layer.to(dtype))
    return layers


def summed_as_ours(lookup: Tensor, config: MemoryConfig) -> Tensor:
    """A golden file's look-up as our layers have it, [T, E * Dv], with E blocks that have projections of their own.

    With one projection (E = 1) a file may hold the sums of all virtual blocks, [T, e^2 * Dv], one after the other.
    """
    if config.num_blocks > 1 or lookup.shape[-1] == config.value_dim:
        return lookup
    blocks = config.key_expansion**2
    assert lookup.shape[-1] == blocks * config.value_dim, f"lookup: {tuple(lookup.shape)} with {blocks} blocks"
    return lookup.unflatten(-1, (blocks, config.value_dim)).sum(-2)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    """Assert |actual - expected| <= tolerance * max |expected|, with equal shapes."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    scale = expected.abs().max().item() if expected.numel() else 0.0
    error = (actual.detach().to(torch.float64) - expected.to(torch.float64)).abs().max().item()
    assert error <= tolerance * max(scale, 1e-30), f"{name}: error {error:.3e} against a maximum of {scale:.3e}"
