"""Any rank of a run of thousands, built on one machine: what it would hold, and whether the flags fit together.

    pretrain_umv2.py <flags of the run> --dry-run --dry-run-world-size 1024 [--dry-run-rank 0,512]

Nothing is planned here. torch's fake process group stands for the other ranks, mcore makes all its groups in it, and
on the meta device the program's own builders make this rank's layers, gradient buffers and optimizer with their real
shapes and without memory. The report reads sizes off them; network, devices and data are not touched.

Transformer Engine need not be there: megatron-core's own layers stand for its, which hold the same parameters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from torch.testing._internal.distributed.fake_pg import FakeStore

from umv2_megatron.config.checks import check_data
from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.config.text_numbers import whole_numbers
from umv2_megatron.config.usage import UsageError
from umv2_megatron.model.builder import build_model_chunks, unwrap
from umv2_megatron.model.ffn_with_memory import memory_layers
from umv2_megatron.parallel import cpu_platform, groups
from umv2_megatron.training.initialize import make_groups
from umv2_megatron.training.optimizer import build_optimizer

# Kinds of parameters in the report, by a part of mcore's names; the first that fits.
_KINDS = (
    (".table.", "value tables"),
    (".memory.", "memory layers"),
    (".engram.", "n-gram layers"),
    (".experts.", "experts"),
    (".router.", "experts"),
    ("self_attention.", "attention"),
    ("layernorm", "norms"),
    (".mlp.", "FFN"),
    ("embedding", "embedding"),
    ("output_layer", "output layer"),
)


@dataclass(frozen=True)
class TablePart:
    """This rank's part of one parameter of a value table; rows and columns are (first, one past the last)."""

    block: int
    """Block that owns the table, from 1."""
    name: str
    """"values" or "pre_values"; "engram values" of an n-gram layer beside another memory layer."""
    whole: tuple[int, int]
    """Rows and columns of the whole table."""
    rows: tuple[int, int]
    columns: tuple[int, int]
    num_bytes: int


@dataclass(frozen=True)
class RankReport:
    """What one rank of a run holds."""

    rank: int
    places: dict[str, tuple[int, int]]
    """Rank and size in each kind of group: "tensor", "context", "data", "pipeline", "memory" ("expert" for experts)."""
    dense_replica: tuple[int, int]
    """Which of how many ranks that hold the same dense parameters; they divide its optimizer state."""
    table_replica: tuple[int, int]
    """The same for its parts of the value tables (or its experts)."""
    layers: list[int]
    """Blocks of this rank, from 1."""
    ends: list[str]
    """Which of "embedding" and "output layer" are here."""
    tables: list[TablePart]
    parameters: dict[str, int]
    """Number of parameters by kind."""
    num_bytes: dict[str, int]
    """Bytes of "weights", "main gradients", "optimizer state" and "buffers", as allocated (padding included)."""

    @property
    def total_bytes(self) -> int:
        """What stays in memory from step to step."""
        return sum(self.num_bytes.values())


def dry_run(run: RunConfig) -> int:
    """Print the configuration, build the chosen ranks one after the other, print a report of each and a verdict.

    Returns exit code 0.

    Raises:
        UsageError: the flags do not fit together on this number of ranks, or cannot be tried without devices or data.
    """
    if run.training.dry_run_world_size != run.world_size:
        raise UsageError(
            f"--dry-run-world-size is {run.training.dry_run_world_size} in a file; expected on the command line"
        )
    ranks = chosen_ranks(run)
    if run.data.vocab_size is None:
        raise UsageError("--vocab-size is None; expected the tokenizer's number of entries, which a dry run cannot ask")
    if run.fp8:
        raise UsageError(f"--fp8-format is {run.fp8}; expected no value in a dry run, whose layers have no FP8 weights")
    print(run.describe())
    for note in _notes(run):
        print(f"note: {note}")
    reports = []
    for rank in ranks:
        reports.append(build_rank(run, rank))
        print(describe(run, reports[-1]), flush=True)
    largest = max(reports, key=lambda report: report.total_bytes)
    print(
        f"dry run passed: {len(reports)} of {run.world_size:,} ranks built; the largest, rank {largest.rank}, keeps "
        f"{_gib(largest.total_bytes)} from step to step; activations and exchange buffers come on top"
    )
    return 0


def chosen_ranks(run: RunConfig) -> list[int]:
    """The ranks that --dry-run-rank names, or the first rank of every pipeline stage.

    Raises:
        UsageError: not ranks of this world.
    """
    text, world = run.training.dry_run_rank, run.world_size
    if text is None:
        stages = run.pipeline_model_parallel_size
        return [stage * world // stages for stage in range(stages)]
    ranks = whole_numbers(text)
    if ranks is None or max(ranks) >= world:
        raise UsageError(f"--dry-run-rank is {text!r}; expected ranks from 0 to {world - 1}, separated by commas")
    return ranks


def build_rank(run: RunConfig, rank: int) -> RankReport:
    """Build ``rank`` of ``run.world_size`` ranks on the meta device and read off what it holds.

    No process group may exist yet, and none is left behind.

    Raises:
        UsageError: the flags do not fit together.
    """
    assert run.data.vocab_size is not None
    shapes = RunConfig(dict(run.values), run.sources, run.world_size)
    shapes._replace(transformer_impl="local", perform_initialization=False)
    with _virtual_world(run, rank), cpu_platform.shapes_only():
        try:
            chunks = build_model_chunks(shapes, run.data.vocab_size)
            optimizer = build_optimizer(shapes, chunks, use_gloo_groups=False)
        except UsageError:
            raise
        except (ValueError, AssertionError) as error:
            raise UsageError(f"megatron-core refuses the layout: {' '.join(str(error).split())}") from error
        return _report(run, rank, chunks, optimizer)


@contextlib.contextmanager
def _virtual_world(run: RunConfig, rank: int) -> Iterator[None]:
    """All process groups of ``rank``, as in a run but for the gloo twins, which would look for their peers."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=run.world_size)
    try:
        try:
            make_groups(run, gloo_twins=False)
        except (ValueError, AssertionError) as error:
            raise UsageError(" ".join(str(error).split())) from error
        yield
    finally:
        groups.destroy_groups()
        torch.distributed.destroy_process_group()


# -- what the built rank holds ---------------------------------------------------------------------------------------


def _report(run: RunConfig, rank: int, chunks: list[torch.nn.Module], optimizer: MegatronOptimizer) -> RankReport:
    models = [unwrap(chunk) for chunk in chunks]
    parameters: dict[str, int] = {}
    for model in models:
        for name, parameter in model.named_parameters():
            kind = _kind(name)
            parameters[kind] = parameters.get(kind, 0) + parameter.numel()
    return RankReport(
        rank=rank,
        places={
            "tensor": _place(parallel_state.get_tensor_model_parallel_group()),
            "context": _place(parallel_state.get_context_parallel_group()),
            "data": _place(parallel_state.get_data_parallel_group()),
            "pipeline": _place(parallel_state.get_pipeline_model_parallel_group()),
            "memory" if run.has_memory else "expert": _place(groups.get_memory_parallel_group()),
        },
        dense_replica=_place(parallel_state.get_data_parallel_group(with_context_parallel=True)),
        table_replica=_place(groups.get_memory_data_parallel_group()),
        layers=[layer.layer_number for model in models for layer in model.decoder.layers],
        ends=[kind for kind in ("embedding", "output layer") if kind in parameters],
        tables=[part for model in models for part in _table_parts(model)],
        parameters=parameters,
        num_bytes=_bytes(chunks, optimizer),
    )


def _place(group: torch.distributed.ProcessGroup) -> tuple[int, int]:
    return group.rank(), group.size()


def _kind(name: str) -> str:
    return next(kind for part, kind in _KINDS if part in name)


def _table_parts(model: torch.nn.Module) -> Iterator[TablePart]:
    for block, layer in memory_layers(model):
        if not layer.owns_table:
            continue
        table = layer.table
        for name, parameter in table.named_parameters():
            width = table.config.value_dim if name == "values" else table.config.pre_value_dim
            rows, columns = table.shard.rows(table.rows), table.shard.columns(width)
            assert tuple(parameter.shape) == (rows[1] - rows[0], columns[1] - columns[0]), (block, name)
            told = name if table.config.family == MemoryConfig.family else f"{table.config.family} {name}"
            yield TablePart(block + 1, told, (table.rows, width), rows, columns, parameter.nbytes)


def _bytes(chunks: list[torch.nn.Module], optimizer: MegatronOptimizer) -> dict[str, int]:
    """Bytes by kind, each storage once: with the distributed optimizer weights are views of mcore's buffers, and fp32
    weights are their own main parameters."""
    weights = _storages(parameter for chunk in chunks for parameter in chunk.parameters())
    state: list[torch.Tensor] = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(part, "is_stub_optimizer", False):
            continue
        part.init_state_fn(part.optimizer, part.config)  # Adam makes its moments at the first step only
        state += [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
        state += getattr(part.optimizer, "compact", [])
        for moments in part.optimizer.state.values():
            state += [value for value in moments.values() if torch.is_tensor(value)]
    kept = _storages(state)
    buffers = [buffer for chunk in chunks for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]]
    return {
        "weights": sum(weights.values()),
        "main gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer state": sum(size for storage, size in kept.items() if storage not in weights),
        "buffers": sum(_storages(buffer for chunk in chunks for buffer in chunk.module.buffers()).values()),
    }


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes of the storages behind ``tensors``, by the storage's identity."""
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}


# -- text ------------------------------------------------------------------------------------------------------------


def _notes(run: RunConfig) -> Iterator[str]:
    try:
        check_data(run)
    except UsageError as error:
        yield f"a run would stop here: {error}"
    yield f"--vocab-size {run.data.vocab_size:,} is taken for the tokenizer's number of entries"
    if run.transformer_impl == "transformer_engine":
        yield "megatron-core's own layers stand for Transformer Engine's, which hold the same parameters"


def describe(run: RunConfig, report: RankReport) -> str:
    """The report of one rank as text, one fact a line; sizes in bytes and GiB."""
    places = ", ".join(f"{name} {rank} of {size}" for name, (rank, size) in report.places.items())
    tokens = run.training.micro_batch_size * run.model.seq_length // run.context_parallel_size
    lines = [
        f"rank {report.rank:,} of {run.world_size:,}: {places}",
        f"  blocks {_ranges(report.layers)} of {run.num_layers}" + "".join(f", {end}" for end in report.ends),
        f"  {run.num_microbatches} micro-batches of {tokens:,} tokens a step",
    ]
    if report.tables:
        lines.append(f"  parts of value tables, on {report.table_replica[1]} ranks alike")
    for part in report.tables:
        (first_row, last_row), (first_column, last_column) = part.rows, part.columns
        lines.append(
            f"    block {part.block:>3} {part.name:<10} {part.whole[0]:,} x {part.whole[1]}: rows {first_row:,}-"
            f"{last_row - 1:,}, columns {first_column}-{last_column - 1}, {part.num_bytes:,} bytes"
        )
    lines.append("  parameters")
    lines += [f"    {kind:<15} {count:>16,}" for kind, count in report.parameters.items()]
    lines.append("  bytes")
    figures = {**report.num_bytes, "together": report.total_bytes}
    lines += [f"    {kind:<15} {size:>16,} {_gib(size):>12}" for kind, size in figures.items()]
    return "\n".join(lines)


def _ranges(numbers: list[int]) -> str:
    """[1, 2, 3, 7, 8] as "1-3, 7-8"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{first}-{last}" if first != last else str(first) for first, last in parts) or "none"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
