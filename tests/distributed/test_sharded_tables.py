"""Sharded lookups against a whole table: the same sums, scores' and inputs' gradients, and table gradients."""

from __future__ import annotations

import pytest
import torch
from harness import run_ranks

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.config.table_shard import TableShard

TOKENS = 6
FIELDS = {
    "plain": {},
    "three-cores": {"num_cores": 3, "value_dim": 24},
    "one-core": {"num_cores": 1},
    "no-pre-values": {"pre_value_dim": 0},
    "gelu": {"pre_value_activation": "gelu"},
    "two-heads": {"num_heads": 2},
    "virtual-blocks": {"key_expansion": 2, "value_expansion": "per-block"},
}
PARTS = (2, 4, 9)
"""--memory-exchange-parts: spans of 3, of 2, and of 1 of the TOKENS."""
BACKENDS = ("cpu", "scatter")
PICKS = ("random", "one-row", "first-rank", "last-rank")


def config_of(fields: dict) -> MemoryConfig:
    return MemoryConfig(**{"num_keys": 7, "value_dim": 16, "pre_value_dim": 8, "topk": 5, "num_cores": 2, **fields})


def inputs_of(config: MemoryConfig, size: int, picks: str, dtype: torch.dtype):
    """What all ranks look up: tables, and [size, T, ...] rows, blocks, scores, projected inputs, output gradient."""
    generator = torch.Generator().manual_seed(3)
    rows, width = config.rows_per_layer, config.num_heads * config.topk

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    values, pre_values = normal(rows, config.value_dim), normal(rows, config.pre_value_dim)
    low, high = {"random": (0, rows), "one-row": (rows // 2, rows // 2 + 1), "first-rank": (0, 3),
                 "last-rank": (rows - 3, rows)}[picks]
    return {
        "values": values,
        "pre_values": pre_values if config.has_pre_values else None,
        "rows": torch.randint(low, high, (size, TOKENS, width), generator=generator),
        "blocks": torch.randint(0, config.num_blocks, (size, TOKENS, width), generator=generator),
        "scores": normal(size, TOKENS, width, config.num_cores),
        "projected": normal(size, TOKENS, config.pre_value_dim) if config.has_pre_values else None,
        "grad": normal(size, TOKENS, config.num_blocks * config.value_dim),
    }


def look_up(table, inputs: dict, rank: int, main_grad: bool):
    """Output and gradients (scores, projected, values, pre_values) of one rank's tokens."""
    table.zero_grad()
    for parameter in table.parameters():
        if main_grad:
            parameter.main_grad = torch.zeros_like(parameter)
    scores = inputs["scores"][rank].clone().requires_grad_()
    projected = None if inputs["projected"] is None else inputs["projected"][rank].clone().requires_grad_()
    gathered = table.gather(scores, projected)
    output = table(table.start(inputs["rows"][rank], inputs["blocks"][rank], scores, gathered))
    output.backward(inputs["grad"][rank])
    grads = [parameter.main_grad if main_grad else parameter.grad for parameter in table.tables()]
    return [output.detach(), scores.grad, None if projected is None else projected.grad, *grads]


def filled_table(config: MemoryConfig, inputs: dict, shard: TableShard, dtype: torch.dtype):
    from umv2_megatron.memory.value_table import ValueTable

    table = ValueTable(config, config.rows_per_layer, dtype, shard=shard)
    for name, parameter in table.named_parameters():
        whole = inputs[name]
        parameter.data.copy_(whole[slice(*shard.rows(whole.shape[0])), slice(*shard.columns(whole.shape[1]))])
    return table


def compare_on_ranks(size: int, mode: str, cases: list, dtype: torch.dtype) -> list[dict]:
    """Largest error of each case on this rank, against a whole table that serves all ranks' tokens."""
    from umv2_megatron.parallel import groups

    groups.initialize_groups(memory_parallel_size=size)
    rank = groups.get_memory_parallel_rank()
    shard = TableShard(mode, size, rank)
    errors = []
    for fields, picks, main_grad in cases:
        config = config_of(fields)
        inputs = inputs_of(config, size, picks, dtype)
        exact = {name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
                 for name, value in inputs.items()}
        whole = filled_table(config, exact, TableShard(), torch.float64)
        expected = [look_up(whole, exact, other, False) for other in range(size)]
        table = filled_table(config, inputs, shard, dtype)
        found = look_up(table, inputs, rank, main_grad)
        wanted = list(expected[rank][:3])
        for place in range(3, len(found)):
            total = sum(each[place] for each in expected)
            wanted.append(total[slice(*shard.rows(total.shape[0])), slice(*shard.columns(total.shape[1]))])
        scale = max(float(each.abs().max()) for each in wanted if each is not None)
        pairs = [(a.double(), b) for a, b in zip(found, wanted) if b is not None]
        errors.append(
            {
                "case": (fields, picks, main_grad),
                "error": max(float((a - b).abs().max()) / scale for a, b in pairs),
                "shapes": [tuple(a.shape) == tuple(b.shape) for a, b in pairs],
                "sent": dict(table.exchange.sent),
            }
        )
    return errors


@pytest.mark.parametrize("size, mode", [(2, "dim"), (4, "dim"), (2, "row"), (3, "row"), (4, "row")])
def test_sharded_lookup_equals_the_whole_table(size, mode):
    cases = [({**fields, "backend": backend}, "random", True) for fields in FIELDS.values() for backend in BACKENDS]
    cases += [({}, picks, False) for picks in PICKS]
    if mode == "row":
        cases += [({**FIELDS["virtual-blocks"], "exchange_parts": parts, "backend": backend}, picks, True)
                  for parts in PARTS for backend in BACKENDS for picks in ("random", "last-rank")]  # fmt: skip
    ranks = run_ranks(size, compare_on_ranks, size, mode, cases, torch.float64)
    for errors in ranks:
        for each in errors:
            assert all(each["shapes"]), each
            assert each["error"] < 1e-13, each
    if mode == "row":
        assert len({str(sorted(each["sent"].items())) for each in ranks[0][-6 * len(BACKENDS) :: 2]}) == 1


@pytest.mark.parametrize("mode", ["dim", "row"])
def test_bfloat16_tables_stay_close(mode):
    cases = [({"backend": backend}, "random", True) for backend in BACKENDS]
    for errors in run_ranks(2, compare_on_ranks, 2, mode, cases, torch.bfloat16):
        assert all(each["error"] < 0.02 for each in errors), errors


def late_and_early(size: int) -> list[bool]:
    """Whether results are the same to the bit when picks are sent after what is computed beside, as on a GPU."""
    from umv2_megatron.memory import row_sharded
    from umv2_megatron.parallel import groups

    groups.initialize_groups(memory_parallel_size=size)
    rank = groups.get_memory_parallel_rank()
    same = []
    for fields in ({**each, "exchange_parts": parts} for each in FIELDS.values() for parts in (1, 2)):
        config = config_of(fields)
        inputs = inputs_of(config, size, "random", torch.float32)
        found = []
        for late in (False, True):
            row_sharded.sends_late = lambda device, late=late: late  # this process is ours
            table = filled_table(config, inputs, TableShard("row", size, rank), torch.float32)
            found.append(look_up(table, inputs, rank, True))
        same.append(all(a is b is None or torch.equal(a, b) for a, b in zip(*found)))
    return same


def test_picks_that_are_sent_late_give_the_same_bits():
    assert run_ranks(3, late_and_early, 3) == [[True] * 2 * len(FIELDS)] * 3


def calls_alive_after_backward(mode: str) -> int:
    """Uses of a sharded table that are still in memory after three forwards and backwards."""
    import gc

    from umv2_megatron.memory import dim_sharded, row_sharded
    from umv2_megatron.parallel import groups

    groups.initialize_groups(memory_parallel_size=2)
    rank = groups.get_memory_parallel_rank()
    config = config_of({"exchange_parts": 2 if mode == "row" else 1})
    inputs = inputs_of(config, 2, "random", torch.float32)
    table = filled_table(config, inputs, TableShard(mode, 2, rank), torch.float32)
    for _ in range(3):
        look_up(table, inputs, rank, True)
    gc.collect()
    kinds = (dim_sharded._Call, row_sharded._Call)
    return sum(isinstance(each, kinds) for each in gc.get_objects())


@pytest.mark.parametrize("mode", ["dim", "row"])
def test_nothing_of_a_lookup_outlives_its_backward(mode):
    assert run_ranks(2, calls_alive_after_backward, mode) == [0, 0]


def test_scores_of_all_keys_are_not_kept_for_the_backward():
    from umv2_megatron.ops.search import gather_keys

    kept: list[int] = []
    scores = torch.randn(2, 5, 1, 40, dtype=torch.float64, requires_grad=True)
    index = torch.randint(0, 40, (5, 1, 6))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        picked = gather_keys(scores, index)
    assert max(kept) <= index.numel()
    weights = torch.randn_like(picked)
    (found,) = torch.autograd.grad((picked * weights).sum(), scores)
    plain = scores.gather(-1, index.expand(2, -1, -1, -1))
    (expected,) = torch.autograd.grad((plain * weights).sum(), scores)
    assert torch.equal(picked, plain) and torch.allclose(found, expected)
