"""What the tests of resharding do on the ranks, and how they read a checkpoint without the code under test.

`write_start` trains a small UltraMemV2 model for two steps and saves it; `visit` loads a checkpoint into other layouts
and looks at what came of it. `whole_tensors` puts global tensors together from the files themselves.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.num_microbatches_calculator import (
    init_num_microbatches_calculator,
    unset_num_microbatches_calculator,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.utils._python_dispatch import TorchDispatchMode

from umv2_megatron.checkpoint import optimizer_state, save_load, torch_dist_io
from umv2_megatron.checkpoint.store import CheckpointStore
from umv2_megatron.config.flags import read_mapping
from umv2_megatron.config.presets import PRESETS
from umv2_megatron.config.resolve import from_layers
from umv2_megatron.data.batches import batch_iterator
from umv2_megatron.durable_files import CheckpointError
from umv2_megatron.memory.row_adam import ROW_MOMENT
from umv2_megatron.memory.selected_rows import SelectedRowsAdam
from umv2_megatron.model.builder import unwrap
from umv2_megatron.model.ffn_with_memory import memory_layers
from umv2_megatron.parallel import groups
from umv2_megatron.training.initialize import TrainingState, build_training_state, make_groups, seed_everything
from umv2_megatron.training.step import connect, train_step

SEQUENCE, VOCABULARY, BATCH, START = 16, 101, 4, 2
SMALL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "kv_channels": 8,
    "seq_length": SEQUENCE,
    "max_position_embeddings": SEQUENCE,
    "vocab_size": VOCABULARY,
    "memory_num_keys": 5,  # tables of 25 rows: neither 2 nor 4 divides them
    "memory_key_dim": 8,
    "micro_batch_size": 1,
    "global_batch_size": BATCH,
    "train_iters": 10,
    "lr": 1e-3,
}
COLLECTIVES = [
    name
    for name in dir(torch.distributed)
    if name.startswith(("all_", "broadcast", "gather", "reduce", "scatter", "send", "recv", "isend", "irecv", "batch_"))
    and callable(getattr(torch.distributed, name))
]


def layout(
    tp: int = 1, pp: int = 1, vpp: bool = False, m: int = 1, mode: str = "dim", dist: bool = False, **others: Any
) -> dict[str, Any]:
    """Settings of a layout; the vocabulary is padded to 104 in all of them, unless ``others`` says otherwise."""
    return {
        "tensor_model_parallel_size": tp,
        "sequence_parallel": tp > 1,
        "pipeline_model_parallel_size": pp,
        "num_layers_per_virtual_pipeline_stage": 1 if vpp else None,
        "memory_parallel_size": m,
        "memory_parallel_mode": mode,
        "use_distributed_optimizer": dist,
        "make_vocab_size_divisible_by": 104 // tp,
        **others,
    }


def open_layout(changes: dict[str, Any], seed: int) -> tuple[Any, TrainingState]:
    """A fresh run of this world, drawn from ``seed``."""
    layers = [
        ("preset", read_mapping(PRESETS["umv2-tiny"].flags(), "preset")),
        ("flag", read_mapping({**SMALL, **changes, "seed": seed}, "flag")),
    ]
    run = from_layers(layers, torch.distributed.get_world_size(), for_training=False)
    make_groups(run)
    unset_num_microbatches_calculator()
    init_num_microbatches_calculator(
        torch.distributed.get_rank(), None, run.global_batch_size, run.training.micro_batch_size, run.data_parallel_size
    )
    seed_everything(seed)
    state = build_training_state(run, VOCABULARY)
    connect(run, state.chunks, state.optimizer)
    return run, state


class Samples(torch.utils.data.Dataset):
    """Random tokens, the same in every layout."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(VOCABULARY, (SEQUENCE + 1,), generator=torch.Generator().manual_seed(index))
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": torch.ones(SEQUENCE),
            "position_ids": torch.arange(SEQUENCE),
        }


def train(run: Any, state: TrainingState, steps: range) -> list[tuple[float, float]]:
    """(loss, gradient norm) of the numbered steps."""
    told = []
    for step in steps:
        data = batch_iterator(Samples(), step * BATCH, run.training.micro_batch_size, 0, run.virtual_pipeline_size)
        done = train_step(run, state.chunks, state.optimizer, state.scheduler, data)
        told.append((done.loss, done.grad_norm))
    return told


def save(directory: str | Path, state: TrainingState) -> None:
    save_load.save_checkpoint(CheckpointStore(directory), START, state.chunks, state.optimizer, state.scheduler)


def write_start(directory: str, changes: dict[str, Any], steps: int = 2) -> list[tuple[float, float]]:
    """Train two steps, save, train ``steps`` more and return their losses and gradient norms."""
    run, state = open_layout(changes, seed=1)
    train(run, state, range(START))
    save(directory, state)
    numbers = train(run, state, range(START, START + steps))
    groups.destroy_groups()
    return numbers


def go_on(directory: str, changes: dict[str, Any], resume: bool) -> tuple[list[tuple[float, float]], str]:
    """What three steps after a checkpoint give, and a digest of the weights then; ``resume`` reads what it wrote."""
    run, state = open_layout(changes, seed=5 if resume else 1)
    if resume:
        save_load.load_checkpoint(CheckpointStore(directory), state.chunks, state.optimizer, state.scheduler)
    else:
        train(run, state, range(START))
        save(directory, state)
    numbers = train(run, state, range(START, START + 3))
    return numbers, save_load.weights_digest(state.chunks)


def what_loading_says(source: str, changes: list[dict[str, Any]]) -> list[str]:
    """What loading ``source`` into each layout says."""
    messages = []
    for settings in changes:
        run, state = open_layout(settings, seed=7)
        try:
            save_load.load_checkpoint(CheckpointStore(source), state.chunks, state.optimizer, state.scheduler)
            messages.append("loaded")
        except CheckpointError as error:
            messages.append(str(error))
        groups.destroy_groups()
    return messages


def visit(
    source: str, targets: list[tuple[dict[str, Any], str]], steps: int = 2, load_optim: bool = True
) -> list[dict[str, Any]]:
    """Load ``source`` into each layout, save it to the directory beside it ("": not), and train ``steps`` steps.

    Of each: "numbers" of the steps, "wrong" (keys of tables and their moments that are not this rank's part of what the
    source's files hold), and, of a save, "largest" (elements of the largest piece or new tensor), "own" (elements of
    this rank's largest parameter) and "collectives" (calls while the state is collected).
    """
    found = []
    whole = whole_tensors(CheckpointStore(source).path(START))
    for changes, directory in targets:
        run, state = open_layout(changes, seed=7)
        loaded = save_load.load_checkpoint(
            CheckpointStore(source), state.chunks, state.optimizer, state.scheduler, load_optim=load_optim
        )
        assert loaded.iteration == START
        result: dict[str, Any] = {"wrong": wrong_tables(state, whole) if load_optim else []}
        if directory:
            with watched(state) as seen:
                save(directory, state)
            result |= seen
        result["numbers"] = train(run, state, range(START, START + steps))
        found.append(result)
        groups.destroy_groups()
    return found


def wrong_tables(state: TrainingState, whole: dict[str, torch.Tensor]) -> list[str]:
    """Keys of tables and their moments of which this rank holds something else than its rectangle of the whole."""
    wrong, parts = [], {}
    for chunk in state.chunks:
        for block, layer in memory_layers(unwrap(chunk)):
            if not layer.owns_table:
                continue
            table = layer.table
            for name, part in table.named_parameters():
                key = f"decoder.layers.{block}.mlp.memory.table.{name}"
                top, bottom = table.shard.rows(whole[key].shape[0])
                left, right = table.shard.columns(whole[key].shape[1])
                parts[id(part)] = (key, slice(top, bottom), slice(left, right))
                if not torch.equal(part, whole[key][top:bottom, left:right].to(part.dtype)):
                    wrong.append(key)
    for part in optimizer_state.optimizer_parts(state.optimizer):
        for parameter, inner, start in optimizer_state.inner_parameters(part):
            if id(parameter) not in parts:
                continue
            key, rows, columns = parts[id(parameter)]
            if isinstance(part.optimizer, SelectedRowsAdam):
                continue  # compared by tests/distributed/test_selected_rows.py
            state = part.optimizer.state[inner]
            if ROW_MOMENT in state:
                held = part.optimizer.ranges[inner]
                by_row = whole[f"optimizer.state.{ROW_MOMENT}.{key}"][rows][held.first : held.first + held.rows]
                if not torch.equal(state[ROW_MOMENT], by_row):
                    wrong.append(f"{ROW_MOMENT} of {key}")
            for name in {"exp_avg", "exp_avg_sq"} & state.keys():
                moment = whole[f"optimizer.state.{name}.{key}"][rows, columns].reshape(-1)
                if not torch.equal(state[name].view(-1), moment[start : start + inner.numel()]):
                    wrong.append(f"{name} of {key}")
    return wrong


# ---------------------------------------------------------------------- what a save does


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns; those without memory do not count."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self.elements = max(self.elements, tensor.numel())
        return result


@contextlib.contextmanager
def watched(state: TrainingState) -> Iterator[dict[str, int]]:
    """Watches one save: see `visit`."""
    kept = (each for chunk in state.chunks for each in (*unwrap(chunk).parameters(), *unwrap(chunk).buffers()))
    seen = {"own": max(each.numel() for each in kept), "largest": 0, "collectives": 0}
    make, plan = optimizer_state.OptimizerState, save_load.plan_pieces
    collect_model = save_load._model_state

    def counting(call: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            seen["collectives"] += 1
            return call(*args, **kwargs)

        return counted

    def watch(call: Any) -> Any:
        def watching(*args: Any, **kwargs: Any) -> Any:
            with pytest.MonkeyPatch.context() as patch, _Largest() as largest:
                for name in COLLECTIVES:
                    patch.setattr(torch.distributed, name, counting(getattr(torch.distributed, name)))
                result = call(*args, **kwargs)
            seen["largest"] = max(seen["largest"], largest.elements)
            return result

        return watching

    def collect(optimizer: Any, model_state: dict) -> Any:
        made = watch(make)(optimizer, model_state)
        made.sharded = watch(made.sharded)
        return made

    def planning(sharded: dict, copies: bool) -> Any:
        pieces = [item for item in nested_values(sharded) if isinstance(item, ShardedTensor)]
        seen["largest"] = max(seen["largest"], *(piece.data.numel() for piece in pieces))
        return plan(sharded, copies)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save_load, "OptimizerState", collect)
        patch.setattr(save_load, "_model_state", watch(collect_model))
        patch.setattr(save_load, "plan_pieces", planning)
        yield seen


# ---------------------------------------------------------------------- files


def whole_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All global tensors of a checkpoint, put together from its files; every element is stored exactly once."""
    metadata = torch_dist_io.read_metadata_safely(directory)
    files = {path.name: path.read_bytes() for path in directory.glob("*.distcp")}
    found, stored = {}, {}
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            found[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
            stored[key] = torch.zeros(entry.size, dtype=torch.uint8)
    for index, place in metadata.storage_data.items():
        if index.fqn in found:
            data = files[place.relative_path][place.offset : place.offset + place.length]
            part = torch.load(io.BytesIO(data), weights_only=True)
            box = tuple(slice(first, first + size) for first, size in zip(index.offset, part.shape, strict=True))
            found[index.fqn][box] = part
            stored[index.fqn][box] += 1
    for key, times in stored.items():
        assert bool((times == 1).all()), f"{key} is not stored once and whole"
    return found


def different(one: Path | str, other: Path | str) -> list[str]:
    """Keys of which two directories of checkpoints hold different tensors, bit by bit."""
    first, second = (whole_tensors(CheckpointStore(each).path(START)) for each in (one, other))
    keys = [key for key in first.keys() | second.keys() if key not in first or key not in second]
    return keys + [key for key in first.keys() & second.keys() if not torch.equal(first[key], second[key])]
