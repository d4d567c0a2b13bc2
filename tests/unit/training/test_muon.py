"""Muon against its definition by singular values in float64, against torch's own, and against emerging-optimizers: the
weights of tests/golden/muon.json, and the package where it is installed."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from umv2_megatron.training.muon import COEFFICIENTS, Matrix, Muon, MuonRule, orthogonalized, scale_factor

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "muon.json").read_text())["rows"]
RULE = MuonRule(
    momentum=0.9, nesterov=False, steps=5, scale_mode="spectral", extra_scale_factor=1.0, precision="highest",
    distributed=False, decoupled=True,
)  # fmt: skip


def drawn(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def by_singular_values(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """The polynomials applied to the singular values one by one, in float64."""
    u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.square().sum().sqrt()
    for step in range(steps):
        a, b, c = COEFFICIENTS[step % len(COEFFICIENTS)]
        values = a * values + b * values**3 + c * values**5
    return u @ torch.diag(values) @ v


@pytest.mark.parametrize("shape", [(12, 12), (7, 20), (20, 7), (1, 9)])
@pytest.mark.parametrize("steps", [1, 3, 5, 7])
def test_the_iteration_is_its_polynomials_of_the_singular_values(shape: tuple[int, int], steps: int) -> None:
    matrix = drawn(*shape)
    found = orthogonalized(matrix, steps)
    torch.testing.assert_close(found.double(), by_singular_values(matrix, steps), rtol=1e-3, atol=1e-5)
    if steps == 5:
        assert torch.linalg.svdvals(found).sub(1).abs().max() < 0.3


def test_products_in_bfloat16_differ_by_its_rounding() -> None:
    exact, rounded = (orthogonalized(drawn(16, 24), 5, precision) for precision in ("highest", "medium"))
    assert rounded.dtype == torch.float32 and not torch.equal(exact, rounded)
    assert (exact - rounded).norm() < 0.05 * exact.norm()
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_matrix_of_zeros_stays() -> None:
    assert torch.equal(orthogonalized(torch.zeros(4, 6), 5), torch.zeros(4, 6))


def test_factors_of_shapes() -> None:
    wanted = {"spectral": (4.0, 4.0), "unit_rms_norm": (2.0, 0.5), "shape_scaling": (2.0, 1.0)}
    for mode, (tall, wide) in wanted.items():
        assert (scale_factor(16, 4, mode), scale_factor(4, 16, mode)) == (tall, wide)


def made(weights: torch.Tensor, rule: MuonRule, matrix: Matrix | None = None, **group: float) -> Muon:
    settings = {"params": [weights], "lr": 0.1, "weight_decay": 0.0, **group}
    return Muon([settings], {weights: matrix or Matrix()}, rule)


def trained(optimizer: torch.optim.Optimizer, weights: torch.Tensor, steps: int = 4) -> torch.Tensor:
    for step in range(steps):
        weights.grad = drawn(*weights.shape, seed=10 + step)
        optimizer.step()
    return weights


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_updates_are_those_of_torch_optim_muon(
    nesterov: bool, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's has the same polynomial in each step, products in bfloat16, and shape_scaling ("original")."""
    triple = (3.4445, -4.7750, 2.0315)
    monkeypatch.setattr("umv2_megatron.training.muon.COEFFICIENTS", (triple,))
    rule = replace(RULE, nesterov=nesterov, scale_mode="shape_scaling", precision="medium")
    ours, theirs = (torch.nn.Parameter(drawn(*shape)) for _ in range(2))
    trained(made(ours, rule, weight_decay=0.5), ours)
    reference = torch.optim.Muon(
        [theirs], lr=0.1, weight_decay=0.5, momentum=0.9, nesterov=nesterov, ns_coefficients=triple, ns_steps=5,
        adjust_lr_fn="original",
    )  # fmt: skip
    trained(reference, theirs)
    assert (theirs - drawn(*shape)).norm() > 0.5
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


def wave(rows: int, columns: int, shift: int) -> torch.Tensor:
    """Numbers of the golden file: sin(1 + 7 i + 3 j + 5 shift)."""
    places = 7.0 * torch.arange(rows, dtype=torch.float64)[:, None] + 3.0 * torch.arange(columns, dtype=torch.float64)
    return (1 + places + 5 * shift).sin().float()


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: f"{row['shape']}-{row['scale_mode']}-{row['nesterov']}")
def test_weights_are_those_that_emerging_optimizers_computed(row: dict) -> None:
    weights = torch.nn.Parameter(wave(*row["shape"], 0))
    rule = replace(RULE, nesterov=row["nesterov"], scale_mode=row["scale_mode"])
    optimizer = made(weights, rule, weight_decay=0.5)
    for step in (1, 2, 3):
        weights.grad = wave(*row["shape"], step)
        optimizer.step()
    torch.testing.assert_close(weights.detach(), torch.tensor(row["weights"]), rtol=0, atol=2e-4)


@pytest.mark.skipif(importlib.util.find_spec("emerging_optimizers") is None, reason="not installed (Python 3.12)")
@pytest.mark.parametrize("mode", ["spectral", "unit_rms_norm", "shape_scaling"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_updates_are_those_of_emerging_optimizers(mode: str, nesterov: bool) -> None:
    from emerging_optimizers.orthogonalized_optimizers import Muon as Theirs

    for shape in ((6, 10), (10, 6)):
        ours, theirs = (torch.nn.Parameter(drawn(*shape)) for _ in range(2))
        trained(made(ours, replace(RULE, scale_mode=mode, nesterov=nesterov), weight_decay=0.5), ours)
        reference = Theirs(
            [theirs], lr=0.1, momentum=0.9, weight_decay=0.5, nesterov=nesterov, scale_mode=mode,
            fp32_matmul_prec="highest",
        )  # fmt: skip
        torch.testing.assert_close(trained(reference, theirs), ours, rtol=1e-5, atol=1e-6)


def test_a_step_by_its_equations() -> None:
    """Momentum, Nesterov's rule, both kinds of weight decay and the factors, one step after another."""
    for nesterov in (False, True):
        for decoupled in (False, True):
            rule = replace(RULE, nesterov=nesterov, decoupled=decoupled, extra_scale_factor=0.2)
            weights = torch.nn.Parameter(drawn(5, 8))
            expected, mean = drawn(5, 8), torch.zeros(5, 8)
            optimizer = made(weights, rule, weight_decay=0.3)
            for step in range(3):
                gradient = drawn(5, 8, seed=10 + step)
                if not decoupled:
                    gradient = gradient + 0.3 * expected
                mean = 0.9 * mean + 0.1 * gradient
                direction = 0.1 * gradient + 0.9 * mean if nesterov else mean
                kept = expected * (1 - 0.1 * 0.3) if decoupled else expected
                expected = kept - 0.1 * 0.2 * math.sqrt(8) * by_singular_values(direction, 5).float()
                weights.grad = drawn(5, 8, seed=10 + step)
                optimizer.step()
                torch.testing.assert_close(weights.detach(), expected, rtol=1e-3, atol=1e-4)
            assert optimizer.param_groups[0]["step"] == 3


def test_parts_of_a_fused_projection_are_updated_apart() -> None:
    """Two blocks of 4 rows of queries, 2 of keys and 2 of values are three matrices of 8, 4 and 4 rows."""
    start, gradient = drawn(16, 6), drawn(16, 6, seed=3)
    fused = torch.nn.Parameter(start.clone())
    fused.grad = gradient.clone()
    made(fused, RULE, Matrix(heads=(4, 2, 2))).step()
    for rows in ([0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]):
        alone = torch.nn.Parameter(start[rows].clone())
        alone.grad = gradient[rows].clone()
        made(alone, RULE).step()
        torch.testing.assert_close(fused[rows], alone, rtol=1e-5, atol=1e-6)
    whole = torch.nn.Parameter(start.clone())
    whole.grad = gradient.clone()
    made(whole, RULE).step()
    assert (whole - fused).abs().max() > 0.01


def test_a_matrix_without_a_gradient_stays() -> None:
    weights = torch.nn.Parameter(drawn(3, 4))
    made(weights, RULE, weight_decay=0.5).step()
    assert torch.equal(weights, drawn(3, 4))
