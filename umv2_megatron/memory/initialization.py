"""Initial values of a memory layer, the same numbers whatever the parallel layout.

"paper" (arXiv 2508.18756, section 3.3): linear maps get the standard deviation sqrt(2 / (5 H)); the gains of the query
and key norms are set so that the picked cells' scores, summed over the cores, average 1; the table's standard
deviation is set so that memory and FFN start with the same output variance. The paper has closed forms for
that; we measure instead. Scores come from running the layer's own retrieval, with its own weights, on random
normalised inputs, and the FFN's inner variance from quadrature of its real nonlinearity. (It is the mean size of the
scores that becomes 1, see ``_measure``.)

Why measuring is exact here: table rows are independent of everything else and have mean zero, so the output variance
given the picks is a sum of squares,

    Var(y) = sigma^2 * E[rho^2] / H * sum_c |Wv slice c|^2 * E[ sum over picks p, p' of the same row of s_pc s_p'c ],

with E[rho^2] = sigma^2 * E|Wp x|^2 for linear pre-values. A gate multiplies column d of a slice by SiLU(Wg x)_d, whose
square then weighs |Wv column d|^2, token by token. Tucker scores grow with the fourth power of a common gain, additive
ones with the second.

A softmax leaves no choice of the scores' size: they sum to 1 in every head. The gains then set how even they are: the
scores of all cells start with standard deviation 1.

"fixed": what the released code does (see ``_initialize_fixed``).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Optional, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.memory.product_keys import ProductKeys
from umv2_megatron.memory.retrieval import Retrieval
from umv2_megatron.memory.sharing import TableWindow
from umv2_megatron.memory.value_table import ValueTable

SIMULATED_TOKENS = 512
# A block of a table is drawn from a generator of its own, so that a rank draws its own rows and columns only.
BLOCK_ROWS = 4096
BLOCK_COLUMNS = 64


class InitializedEngram(Protocol):
    """The same of an n-gram layer (`engram.EngramLayer`)."""

    config: MemoryConfig
    hidden_size: int
    layer_index: int
    owns_table: bool
    table: ValueTable
    key_proj: nn.Linear
    value_proj: nn.Linear
    query_norm: nn.Parameter
    key_norm: nn.Parameter
    conv_norm: Optional[nn.Parameter]
    conv: Optional[nn.Parameter]


class Initialized(Protocol):
    """What the initialisation reads and fills of a memory layer (`layer.MemoryLayer`, which calls it)."""

    config: MemoryConfig
    hidden_size: int
    layer_index: int
    owns_table: bool
    table: ValueTable
    window: TableWindow
    perm: Tensor
    retrieval: Retrieval | ProductKeys
    pre_proj: Optional[nn.Linear]
    value_proj: Optional[nn.Linear]
    gate_proj: Optional[nn.Linear]


def linear_std(hidden_size: int) -> float:
    """Standard deviation of linear maps under the "paper" initialisation: sqrt(2 / (5 H))."""
    return math.sqrt(2 / (5 * hidden_size))


def ffn_output_variance(
    hidden_size: int,
    ffn_hidden_size: int,
    num_layers: int,
    gated: bool = True,
    activation: str | Callable[[Tensor], Tensor] = "silu",
) -> float:
    """Output variance, per element, of an FFN at initialisation on inputs of root mean square 1.

    Weights have std sqrt(2 / (5 H)), those of the last map further divided by sqrt(2 * num_layers). ``gated``:
    activation(gate) * up; otherwise activation(x W1). ``activation`` is a function, or its name in
    torch.nn.functional.
    """
    preactivation = hidden_size * linear_std(hidden_size) ** 2
    function = getattr(functional, activation) if isinstance(activation, str) else activation
    inner = _gaussian_mean_square(function, math.sqrt(preactivation))
    if gated:
        inner *= preactivation
    return ffn_hidden_size * inner * linear_std(hidden_size) ** 2 / (2 * num_layers)


def _gaussian_mean_square(function: Callable[[Tensor], Tensor], std: float) -> float:
    """E[function(z)^2] for z ~ N(0, std^2), by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(96)
    squares = function(torch.from_numpy(nodes) * std).square().numpy()
    return float((weights * squares).sum() / weights.sum())


def initialize_layer(
    layer: Initialized,
    ffn_hidden_size: int,
    num_layers: int,
    ffn_gated: bool = True,
    ffn_activation: str | Callable[[Tensor], Tensor] = "silu",
) -> None:
    """Fill every parameter of ``layer``, its table if it owns one, and its singular vectors. The FFN beside it is as
    ``ffn_output_variance`` wants it described."""
    if layer.config.init == "fixed":
        _initialize_fixed(layer)
    else:
        target = ffn_output_variance(layer.hidden_size, ffn_hidden_size, num_layers, ffn_gated, ffn_activation)
        _initialize_paper(layer, target)


@torch.no_grad()
def _initialize_fixed(layer: Initialized) -> None:
    """The released code's values: norm gains Dk^-x, Wq and keys 1/sqrt(Dk), Wv and Wp 1/sqrt(fan-in), tables 0.02.

    Its Memory+ layer: Wq as Xavier, keys 1/sqrt(6 Dk), gains 1, Wv and the gate 1/sqrt(fan-in), table 1/sqrt(Dv). Where
    keys are normalised, which it leaves out, their gain stands for their size.
    """
    config, dim = layer.config, layer.config.key_dim
    if config.scoring == "tucker":
        _draw_projections(layer, query=dim**-0.5, linear=None)
        _fill_gains(layer, dim**-config.norm_gain_exponent)
        table_std = 0.02
    else:
        _draw_projections(layer, query=math.sqrt(2 / (layer.hidden_size + config.query_rows)), linear=None)
        key_size = (6 * dim) ** -0.5
        _fill_gains(layer, 1.0)
        if layer.retrieval.key_norm is not None:
            layer.retrieval.key_norm.fill_(key_size)
        else:
            layer.retrieval.keys.mul_(key_size * math.sqrt(dim))
        table_std = config.value_dim**-0.5
    if layer.owns_table:
        _draw_table(layer, table_std)


@torch.no_grad()
def initialize_engram(
    layer: InitializedEngram,
    ffn_hidden_size: int,
    num_layers: int,
    ffn_gated: bool = True,
    ffn_activation: str | Callable[[Tensor], Tensor] = "silu",
) -> None:
    """Fill an n-gram layer: projections as all linear maps, gains 1, the convolution 0, and a table with which the
    output variance is the FFN's.

    Keys and queries are independent of each other and of root mean square 1, so that z of ``engram.py`` is N(0, 1), and
    Var(y) = sigma^2 * E[alpha^2] * E * Dv * std(Wv)^2. "fixed": the authors' demo, which has PyTorch's sizes:
    projections 1/sqrt(3 fan-in), table 1.
    """
    config, std = layer.config, linear_std(layer.hidden_size)
    fixed = config.init == "fixed"
    if fixed:
        std = (3 * config.summed_dim) ** -0.5
    for name in ("key_proj", "value_proj"):
        normal_(getattr(layer, name).weight, std, config.seed, name, layer.layer_index)
    for gain in (layer.query_norm, layer.key_norm, layer.conv_norm):
        if gain is not None:
            gain.fill_(1.0)
    if layer.conv is not None:
        layer.conv.zero_()
    target = ffn_output_variance(layer.hidden_size, ffn_hidden_size, num_layers, ffn_gated, ffn_activation)
    gate = _gaussian_mean_square(lambda z: torch.sigmoid(z.sign() * z.abs().sqrt()), 1.0)
    if layer.owns_table:
        _draw_table(layer, 1.0 if fixed else _rounded(math.sqrt(target / (gate * config.summed_dim * std**2))))


def _fill_gains(layer: Initialized, value: float) -> None:
    """Set all gains of the norms of queries and keys that the layer has."""
    for gain in (layer.retrieval.query_norm, layer.retrieval.key_norm):
        if gain is not None:
            gain.fill_(value)


def _scale_scores(layer: Initialized, factor: float) -> None:
    """Multiply the scores by ``factor``, by gains that are 1 so far; by the keys where there is no gain."""
    config = layer.config
    if config.scoring == "tucker":
        _fill_gains(layer, _rounded(factor**0.25))
    elif config.qk_norm == "none":
        layer.retrieval.keys.mul_(_rounded(factor))
    else:
        _fill_gains(layer, _rounded(factor**0.5 if config.qk_norm == "both" else factor))


@torch.no_grad()
def _initialize_paper(layer: Initialized, target_variance: float) -> None:
    """Gains for a mean summed score of 1 and a table for the FFN's output variance (see the top).

    A layer that uses the table of another takes its rows as they are and reaches the variance by its gains; its
    mean score is then only about 1. With softmax the table's owner sets the std for all that share it.
    """
    softmax = layer.config.score_normalization == "softmax"
    _draw_projections(layer, query=linear_std(layer.hidden_size), linear=linear_std(layer.hidden_size))
    _fill_gains(layer, 1.0)
    if softmax:
        half = layer.retrieval.key_scores(_simulated_inputs(layer)).double().std()
        _scale_scores(layer, 1 / (math.sqrt(2) * float(half)))
    mean_score, output_power, projected_square = _measure(layer)
    if layer.owns_table:
        score_scale = 1.0 if softmax else 1 / mean_score
        power = output_power * score_scale**2
        _draw_table(layer, _rounded(_table_std(layer, target_variance, power, projected_square)))
    elif softmax:
        return
    else:
        std = layer.table.initial_std
        assert std is not None, "the layer that owns the table must be initialised before those that share it"
        variance = output_power * std**2 * _rho_square(layer, std, projected_square)
        score_scale = math.sqrt(target_variance / variance)
    if not softmax:
        _scale_scores(layer, score_scale)


def _table_std(layer: Initialized, target: float, power: float, projected_square: Optional[float]) -> float:
    """sigma that solves sigma^2 * E[rho^2](sigma) * power = target; both factors grow with sigma, so by bisection."""
    low, high = 1e-9, 1e6
    for _ in range(200):
        middle = math.sqrt(low * high)
        variance = middle**2 * _rho_square(layer, middle, projected_square) * power
        low, high = (middle, high) if variance < target else (low, middle)
    return math.sqrt(low * high)


def _rho_square(layer: Initialized, std: float, projected_square: Optional[float]) -> float:
    """E[rho^2], 1 without pre-values, where rho before its activation is N(0, std^2 * |Wp x|^2)."""
    if projected_square is None:
        return 1.0
    variance = std**2 * projected_square
    if layer.config.pre_value_activation == "gelu":
        return _gaussian_mean_square(functional.gelu, math.sqrt(variance))
    return variance


def _simulated_inputs(layer: Initialized) -> Tensor:
    """Random inputs [SIMULATED_TOKENS, H] of root mean square 1, always the same for a layer."""
    generator = seeded_generator(layer.config.seed, "simulation", layer.layer_index)
    x = torch.randn(SIMULATED_TOKENS, layer.hidden_size, generator=generator)
    return (x * x.square().mean(-1, keepdim=True).rsqrt()).to(layer.retrieval.query.weight)


def _measure(layer: Initialized) -> tuple[float, float, Optional[float]]:
    """Run the layer's retrieval on random normalised inputs.

    Returns the mean over picks of the size of the score summed over cores; the output variance for rho = 1 and a table
    of unit variance; and E|Wp x|^2, None without pre-values.

    The size, because where most cells are picked many scores are negative, and their mean is near 0 or below it: no
    gain brings it to 1. Where few are picked all scores are positive, and their mean size is their mean.
    """
    x = _simulated_inputs(layer)
    gate = _gate_power(layer, x)
    picks = layer.retrieval(x)
    virtual = layer.perm[picks.grid].long()
    rows, block = layer.window.locate(virtual)
    # Picks of one row and one projection add up before they are squared.
    place = rows * layer.config.num_blocks + (block if layer.config.num_blocks > 1 and block is not None else 0)
    power = torch.zeros(layer.config.num_cores, dtype=torch.float64)
    for token in range(0, SIMULATED_TOKENS, 64):
        part = slice(token, token + 64)
        same = (place[part].unsqueeze(2) == place[part].unsqueeze(1)).float()
        scores = picks.scores[part].float()
        weights = scores if gate is None else scores * gate[part].unsqueeze(1)
        power += (torch.bmm(same, scores) * weights).sum((0, 1)).double().cpu()
    power /= SIMULATED_TOKENS
    projected_square = None
    if layer.config.has_pre_values:
        projected = x if layer.pre_proj is None else layer.pre_proj(x)
        projected_square = float(projected.float().square().sum(-1).mean())
    output_power = float((power * _projection_power(layer)).sum()) / layer.hidden_size
    return float(picks.scores.float().sum(-1).abs().mean()), output_power, projected_square


def _gate_power(layer: Initialized, x: Tensor) -> Optional[Tensor]:
    """By what the gate multiplies the output variance, [T, C]: the mean of SiLU(Wg x)^2 over the columns of a core,
    weighted with |Wv column|^2; None without a gate."""
    if layer.gate_proj is None:
        return None
    config = layer.config
    square = functional.silu(layer.gate_proj(x)).float().square()
    weight = torch.ones(config.summed_dim, device=x.device)
    if layer.value_proj is not None:
        weight = layer.value_proj.weight.float().square().sum(0)
    shape = (-1, config.num_blocks, config.num_cores, config.value_dim // config.num_cores)
    return (square * weight).view(shape).sum((1, 3)) / weight.view(shape).sum((1, 3))


def _projection_power(layer: Initialized) -> Tensor:
    """Squared Frobenius norm of the value projection's columns for each core, [C], averaged over virtual blocks."""
    cores, blocks = layer.config.num_cores, layer.config.num_blocks
    if layer.value_proj is None:
        return torch.full((cores,), layer.config.value_dim / cores, dtype=torch.float64)
    weight = layer.value_proj.weight.double().view(layer.hidden_size, blocks, cores, -1)
    return weight.square().sum((0, 3)).mean(0).cpu()


def _draw_projections(layer: Initialized, query: float, linear: Optional[float]) -> None:
    """Draw queries, keys, cores (of Tucker scores) and projections; ``linear`` is the projections' std, None for
    1/sqrt(fan-in)."""
    seed, index = layer.config.seed, layer.layer_index
    normal_(layer.retrieval.query.weight, query, seed, "query", index)
    normal_(layer.retrieval.keys, layer.config.key_dim**-0.5, seed, "keys", index)
    if isinstance(layer.retrieval, Retrieval):
        cores = torch.rand(layer.retrieval.cores.shape, generator=seeded_generator(seed, "cores", index))
        layer.retrieval.cores.copy_(cores)
    for name in ("pre_proj", "gate_proj", "value_proj"):
        projection = getattr(layer, name)
        if projection is not None:
            normal_(projection.weight, linear or projection.weight.shape[1] ** -0.5, seed, name, index)
    layer.retrieval.refresh_singular_vectors()


def _draw_table(layer: Initialized | InitializedEngram, std: float) -> None:
    """Draw this rank's part of the tables that ``layer`` owns; of a table that holds shapes only, keep ``std``."""
    shard, config = layer.table.shard, layer.config
    layer.table.initial_std = std
    for name, table in layer.table.named_parameters():
        if table.is_meta:
            continue
        columns = _table_columns(config, name)
        top, left = shard.rows(layer.table.rows)[0], shard.columns(columns)[0]
        init_table_(table, top, left, columns, std, derived_seed(config.seed, name, layer.layer_index))


def _table_columns(config: MemoryConfig, name: str) -> int:
    return config.value_dim if name == "values" else config.pre_value_dim


def draw_table_rows(
    tensor: Tensor, config: MemoryConfig, layer_index: int, name: str, first_row: int, std: float
) -> None:
    """Fill ``tensor`` [rows, Dv or Dp] with the rows from ``first_row`` on of memory layer ``layer_index``'s own table
    ``name`` (values or pre_values), as the layer itself draws them with ``std``."""
    seed = derived_seed(config.seed, name, layer_index)
    init_table_(tensor, first_row, 0, _table_columns(config, name), std, seed)


@torch.no_grad()
def init_table_(tensor: Tensor, row_start: int, col_start: int, full_cols: int, std: float, seed: int) -> None:
    """Fill ``tensor`` [rows, columns] with its part of a large table of N(0, std^2) numbers.

    ``tensor`` holds rows from ``row_start`` and columns from ``col_start`` of a table ``full_cols`` wide. The numbers
    depend on their place in the whole table and on ``seed`` only, not on how it is cut.
    """
    rows, columns = tensor.shape
    assert col_start + columns <= full_cols
    for row in range(row_start - row_start % BLOCK_ROWS, row_start + rows, BLOCK_ROWS):
        for column in range(col_start - col_start % BLOCK_COLUMNS, col_start + columns, BLOCK_COLUMNS):
            block = torch.empty(BLOCK_ROWS, min(BLOCK_COLUMNS, full_cols - column))
            block.normal_(0.0, std, generator=seeded_generator(seed, row, column))
            top, left = max(row, row_start), max(column, col_start)
            bottom = min(row + BLOCK_ROWS, row_start + rows)
            right = min(column + block.shape[1], col_start + columns)
            tensor[top - row_start : bottom - row_start, left - col_start : right - col_start] = block[
                top - row : bottom - row, left - column : right - column
            ].to(tensor)


@torch.no_grad()
def normal_(tensor: Tensor, std: float, seed: int, *names: str | int) -> None:
    """Fill ``tensor`` with N(0, std^2) numbers of the generator that belongs to ``seed`` and ``names``."""
    tensor.copy_(torch.randn(tensor.shape, generator=seeded_generator(seed, *names)) * std)


def seeded_generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator of its own for each combination of ``seed`` and ``names``."""
    return torch.Generator().manual_seed(derived_seed(seed, *names))


def derived_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed that depends on all arguments; stable over machines and versions, unlike hash()."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _rounded(value: float) -> float:
    """Four significant digits: ranks whose products round differently still get the same number."""
    return float(f"{value:.4g}")
