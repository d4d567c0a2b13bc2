"""The paper authors' layer, number by number: every golden pair through the real modules, on every backend.

Discovers all ``*.safetensors`` with a ``*.json`` in ``UMV2_GOLDEN_DIR`` (default tests/golden). ``value_lr.json`` and
``muon.json`` have no tensors and belong to the optimizer's tests.
"""

from __future__ import annotations

import pytest
import torch
from golden_support import (
    KINDS,
    OWN_DIR,
    assert_near,
    build_layers,
    config_of,
    golden_pairs,
    parameter_name,
    read_pair,
    summed_as_ours,
)

from umv2_megatron.memory.layer import MemoryLayer
from umv2_megatron.memory.retrieval import Retrieval
from umv2_megatron.ops import pre_value_scores

PRECISIONS = {"float64": (torch.float64, "64", 1e-10), "float32": (torch.float32, "", 1e-5)}


def test_there_are_golden_pairs() -> None:
    assert golden_pairs(), "no golden pair found; check UMV2_GOLDEN_DIR"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", ["reference", "scatter", "cpu"])
@pytest.mark.parametrize("stem", golden_pairs())
def test_golden_pair(stem: str, backend: str, precision: str) -> None:
    meta, tensors = read_pair(stem)
    if "hyperparameters" not in meta:
        if "step0.core" not in tensors:
            pytest.skip(f"{stem} has no hyperparameters of a layer")
        if (backend, precision) != ("scatter", "float32"):
            pytest.skip("singular vectors are float32 and have no backend")
        check_singular_vectors(meta, tensors)
        return
    hyper = meta["hyperparameters"]
    assert hyper["kind"] in KINDS, f"{stem} is of kind {hyper['kind']!r}; known are {', '.join(KINDS)}"
    dtype, suffix, tolerance = PRECISIONS[precision]
    check_layers(hyper, tensors, backend, dtype, suffix, tolerance, balance_only=False)
    if any(f".grad_balance_only{suffix}." in name for name in tensors):
        check_layers(hyper, tensors, backend, dtype, suffix, tolerance, balance_only=True)


@pytest.mark.parametrize("kind", ["w", "in", "out64", "grad64", "grad_balance_only64", "sel", "b"])
def test_golden_check_notices_a_changed_number(kind: str) -> None:
    """Spoil one tensor of each kind in turn: the check must fail, or it would prove nothing."""
    meta, tensors = read_pair("case6_balance_loss", OWN_DIR)
    names = [name for name in tensors if name.split(".")[1] == kind and not name.endswith(".perm")]
    assert names
    for name in names:
        spoiled = tensors[name].clone()
        if kind in ("w", "b", "in"):
            spoiled *= 1.01  # all of it, because not every row is picked
        else:
            spoiled.view(-1)[0] += 1 if kind == "sel" else 1e-7 * spoiled.abs().max()
        balance_only = kind == "grad_balance_only64"
        with pytest.raises(AssertionError):
            check_layers(
                meta["hyperparameters"], {**tensors, name: spoiled}, "scatter", torch.float64, "64", 1e-10, balance_only
            )


def check_layers(hyper, tensors, backend, dtype, suffix, tolerance, balance_only) -> None:
    """Forward and backward of all layers of one golden file, against every number it holds."""
    layers = build_layers(hyper, tensors, backend, dtype)
    inputs, outputs, captured = [], [], []
    for index, layer in enumerate(layers):
        seen: dict = {}
        capture(layer, seen)
        x = tensors[f"layer{index}.in.x"].to(dtype, copy=True).requires_grad_()
        inputs.append(x)
        outputs.append(layer(x))
        captured.append(seen)
    upstream = [tensors[f"layer{index}.in.g"].to(dtype) for index in range(len(layers))]
    if balance_only:
        upstream = [torch.zeros_like(g) for g in upstream]
    torch.autograd.backward(outputs, upstream)

    # Every expected tensor must be met by a number of ours, so that nothing in a file goes unchecked.
    group = f"grad_balance_only{suffix}" if balance_only else f"grad{suffix}"
    met = 0
    for name, expected in tensors.items():
        owner, kind, rest = name.split(".", 2)
        if kind == group:
            actual = gradient(layers, inputs, owner, rest)
            assert_near(actual if actual.shape == expected.shape else actual.squeeze(-1), expected, tolerance, name)
            met += 1
        elif kind == f"out{suffix}" and not balance_only:
            check_output(layers, captured, outputs, owner, rest, expected, tolerance)
            met += 1
        elif kind == "sel":
            index = int(owner.removeprefix("layer"))
            actual = selection(layers[index], captured[index])[rest]
            assert torch.equal(actual, expected), f"{name} differs"
            met += 1
    assert met > 4 * len(layers)
    windows = [layer.window for layer in layers]
    found = {
        "offset": [window.offset for window in windows],
        "window": windows[0].window,
        "table_rows": windows[0].rows,
        "n_keys": layers[0].retrieval.num_keys,
    }
    for name, value in found.items():
        assert hyper.get(name, value) == value, f"{name} is {value}, the file says {hyper[name]}"


@pytest.mark.parametrize("backend", ["reference", "scatter", "cpu"])
def test_lookup_kept_for_each_virtual_block_with_one_projection(backend: str) -> None:
    """A layer that keeps [T, E * Dv] before its one projection adds the blocks up: the same numbers as ours."""
    hyper = {
        "kind": "ultramem_v2", "hidden": 10, "knum": 4, "kdim": 6, "vdim": 8, "pre_vdim": 4, "knn": 3, "head": 2,
        "tucker_rank": 2, "tucker_cores": 2, "query_mode": "per_rank", "key_expand": 2, "value_expand": 1, "layers": 1,
    }  # fmt: skip
    tensors = made_with_blocks(hyper)
    assert tensors["layer0.out64.lookup"].shape == (5, 4 * 8)
    check_layers(hyper, tensors, backend, torch.float64, "64", 1e-10, balance_only=False)
    tensors["layer0.out64.lookup"][0, -1] += 1e-6
    with pytest.raises(AssertionError, match="lookup"):
        check_layers(hyper, tensors, backend, torch.float64, "64", 1e-10, balance_only=False)


def made_with_blocks(hyper: dict) -> dict[str, torch.Tensor]:
    """A golden file's tensors for ``hyper`` with random weights, and the look-up of each block from loops."""
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    layer = MemoryLayer(config_of(hyper, "reference"), hyper["hidden"], 0, 1, 8, 1, params_dtype=torch.float64)
    ours = {parameter_name(name): name for name in ("query", "query_norm", "keys", "key_norm", "core", "pre_proj",
                                                    "value_proj")}  # fmt: skip
    tensors = {"layer0.b.perm": torch.randperm(layer.perm.numel(), generator=generator)}
    for name, parameter in layer.named_parameters():
        place = f"layer0.w.{ours[name]}" if name in ours else f"shared.w.{name.removeprefix('table.')}"
        tensors[place] = draw(*parameter.shape)
    for name in ("u", "t"):
        tensors[f"layer0.b.{name}"] = draw(*layer.retrieval.u.shape).float()
    tensors |= {"layer0.in.x": draw(5, hyper["hidden"]), "layer0.in.g": draw(5, hyper["hidden"])}
    layer = build_layers(hyper, tensors, "reference", torch.float64)[0]
    seen: dict = {}
    capture(layer, seen)
    x = tensors["layer0.in.x"].clone().requires_grad_()
    y = layer(x)
    y.backward(tensors["layer0.in.g"])
    rows, blocks, scores = seen["started"].rows, seen["started"].blocks, seen["picks"].scores
    rho = pre_value_scores(rows, seen["started"].projected, layer.table.pre_values)
    width = hyper["vdim"] // hyper["tucker_cores"]
    lookup = torch.zeros(5, hyper["key_expand"] ** 2, hyper["vdim"], dtype=torch.float64)
    for token in range(5):
        for pick in range(rows.shape[1]):
            weights = (scores[token, pick] * rho[token, pick]).repeat_interleave(width)
            lookup[token, blocks[token, pick]] += weights * layer.table.values[rows[token, pick]]
    found = {"y": y, "lookup": lookup.flatten(1), "best_scores": scores, "pre_scores": rho}
    tensors |= {f"layer0.out64.{name}": value.detach().clone() for name, value in found.items()}
    tensors |= {f"layer0.sel.{name}": value for name, value in selection(layer, seen).items()}
    return tensors | {"layer0.grad64.x": x.grad}


def capture(layer: MemoryLayer, seen: dict) -> None:
    """Keep what passes between the parts of ``layer``."""
    layer.retrieval.register_forward_hook(lambda module, args, picks: seen.update(picks=picks))

    def keep_first(module, args, summed) -> None:
        # A table that several layers share runs the hooks of all of them; they are called in order.
        if "picks" in seen and "started" not in seen:
            seen.update(started=args[0], lookup=summed)

    layer.table.register_forward_hook(keep_first)


def selection(layer: MemoryLayer, seen: dict) -> dict[str, torch.Tensor]:
    started, grid = seen["started"], seen["picks"].grid
    block = started.blocks if started.blocks is not None else torch.zeros_like(started.rows)  # one virtual block
    return {"grid": grid, "virtual": layer.perm[grid].long(), "block": block, "phys": started.rows,
            "indices": started.rows}


def check_output(layers, captured, outputs, owner, rest, expected, tolerance) -> None:
    index = int(owner.removeprefix("layer"))
    layer, seen = layers[index], captured[index]
    if rest == "y":
        actual = outputs[index].view(expected.shape)
    elif rest == "lookup":
        actual, expected = seen["lookup"], summed_as_ours(expected, layer.config)
    elif rest == "best_scores":
        actual = seen["picks"].scores.view(expected.shape)
    elif rest == "pre_scores":
        actual = pre_value_scores(seen["started"].rows, seen["started"].projected, layer.table.pre_values)
    else:
        assert rest == "balance_loss", f"unknown output {rest}"
        actual = layer.last_losses["balance_loss"] / layer.config.balance_loss_coeff
    assert_near(actual, expected, tolerance, f"{owner}.{rest}")


def gradient(layers, inputs, owner: str, rest: str) -> torch.Tensor:
    """Our gradient of what a golden file calls ``owner``.grad.``rest``; zeros where autograd left None."""
    if owner == "shared":
        parameter = getattr(layers[0].table, rest)
    else:
        index = int(owner.removeprefix("layer"))
        own = dict(layers[index].named_parameters())
        if rest == "key_norm" and parameter_name(rest) not in own:  # the released Memory+ layer does not use its own
            return torch.zeros(layers[index].config.key_dim)
        parameter = inputs[index] if rest == "x" else own[parameter_name(rest)]
    return parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)


def check_singular_vectors(meta: dict, tensors: dict) -> None:
    """A sequence of cores: each refresh must give the stored u and t (the first up to a common sign per head)."""
    hyper = {
        "knum": 4,
        "kdim": 4,
        "vdim": 4 * meta["tucker_cores"],
        "knn": 2,
        "key_expand": 1,
        "query_mode": "shared",
        "norm_eps": 1e-5,
        **meta,
    }
    retrieval = Retrieval(config_of(hyper, "scatter"), hidden_size=8, num_keys=4)
    for step in range(meta["steps"]):
        core, u, t = (tensors[f"step{step}.{name}"] for name in ("core", "u", "t"))
        if step > 0:
            # After the first step, whose sign is the SVD library's choice, go on from the stored pair.
            retrieval.u.copy_(tensors[f"step{step}.prev_u"])
            retrieval.t.copy_(tensors[f"step{step}.prev_t"])
        with torch.no_grad():
            retrieval.cores.copy_(core)
        retrieval.refresh_singular_vectors()
        if step == 0:
            sign = torch.sign((retrieval.u * u).sum(-1, keepdim=True))
            u, t = u * sign, t * sign
        assert_near(retrieval.u, u, 1e-5, f"step{step}.u")
        assert_near(retrieval.t, t, 1e-5, f"step{step}.t")
