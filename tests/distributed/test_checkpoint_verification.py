"""Each rank verifies what it reads; damage that any of them finds sends all of them to the older checkpoint; and a save
refuses values that are lost."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from megatron.core.dist_checkpointing.dict_utils import nested_values
from test_checkpointing import make, train
from tiny_gpt import Layout

from umv2_megatron.checkpoint import manifest, save_load, shard_writing
from umv2_megatron.checkpoint.checksum_files import CHECKSUMS
from umv2_megatron.checkpoint.save_load import load_checkpoint, save_checkpoint, weights_digest
from umv2_megatron.checkpoint.store import TRACKER, CheckpointStore
from umv2_megatron.checkpoint.torch_dist_io import is_optimizer_state, read_metadata_safely, unique_key
from umv2_megatron.checkpoint.verification import share_out
from umv2_megatron.durable_files import CheckpointError
from umv2_megatron.parallel import groups

SPLIT = Layout(table=True, distributed_optimizer=True)


def save_two(root: str, spoil: str = "") -> tuple[str, list[str]]:
    """Save 3 and 4; digest of the weights of 3, and the files that were read and hashed by this rank while saving 4.

    spoil: key of which rank 1 writes zeros into its file, after the checksum was taken.
    """
    run = make(SPLIT)
    store = CheckpointStore(root)
    train(SPLIT, run, range(2))
    save_checkpoint(store, 3, *run)
    digest = weights_digest(run[0])
    train(SPLIT, run, range(2, 4))
    write, hashed = shard_writing._write_piece, []

    def spoiling(file: Any, piece: Any) -> Any:
        if spoil and piece.key.startswith(spoil) and torch.distributed.get_rank() == 1:
            piece = shard_writing.replace(piece, data=torch.zeros_like(piece.data))
        return write(file, piece)

    sha256_of = manifest.sha256_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writing, "_write_piece", spoiling)
        patch.setattr(manifest, "sha256_of", lambda path: (hashed.append(path.name), sha256_of(path))[1])
        save_checkpoint(store, 4, *run)
    return digest, sorted(hashed)


def load(root: str, layout: Layout = SPLIT, **kwargs: Any) -> tuple[Any, str, list[str]]:
    """The iteration that was loaded (or the error), the weights then, and the warnings of this rank."""
    run = make(layout)
    warnings: list[str] = []
    try:
        loaded = load_checkpoint(CheckpointStore(root, warn=warnings.append), *run, **kwargs)
        found: Any = loaded.iteration
    except CheckpointError as error:
        found = str(error)
    return found, weights_digest(run[0]), warnings


def test_a_save_reads_nothing_back(tmp_path):
    (_, hashed), (_, nothing) = run_ranks(2, save_two, str(tmp_path))
    assert hashed == [] == nothing


def test_garbage_that_was_written_and_hashed_is_found(tmp_path):
    """As in Megatron-LM issue 1570: what reached the file was not what the run held."""
    key = "optimizer.state.exp_avg."
    (digest, _), _ = run_ranks(2, save_two, str(tmp_path), key)
    CheckpointStore(tmp_path).verify(4)  # every file has its SHA-256
    first, second = run_ranks(2, load, str(tmp_path), verify_all=True)
    assert (first[0], second[0]) == (3, 3) and first[1] == digest
    assert key in first[2][0] and "it had " in first[2][0] and "falling back to checkpoint 3" in first[2][1]
    assert not second[2]
    # another layout reads the same parts
    ((told, _, _),) = run_ranks(1, load, str(tmp_path), Layout(table=True), ckpt_step=4)
    assert f"__1_0.distcp: {key}" in told
    # and a rank that does not need them does not mind
    ((found, _, _),) = run_ranks(1, load, str(tmp_path), Layout(table=True), load_optim=False, load_rng=False)
    assert found == 4


def bytes_read(root: str, full: bool) -> tuple[int, ...]:
    run = make(SPLIT)
    return load_checkpoint(CheckpointStore(root), *run, verify_all=full).bytes_read


def test_each_rank_reads_what_it_needs(tmp_path):
    run_ranks(2, save_two, str(tmp_path))
    store = CheckpointStore(tmp_path)
    directory, files = store.path(4), store.verify(4).files
    metadata = read_metadata_safely(directory)
    expected = []
    for rank in range(2):
        needed = {
            index: place.length
            for index, place in metadata.storage_data.items()
            if (is_optimizer_state(index.fqn) and place.relative_path == f"__{rank}_0.distcp")
            or (not is_optimizer_state(index.fqn) and index.fqn != f"rng_state/shard_{1 - rank}_2")
        }
        assert 0 < len(needed) < len(metadata.storage_data)
        shards = {metadata.storage_data[index].relative_path for index in needed}
        beside = sum(files[name.removesuffix(".distcp") + CHECKSUMS][0] for name in shards)
        small = ("common.pt", ".metadata", "config.json", "metadata.json")
        share = share_out({name: files[name][0] for name in small}, 2)[rank]
        hashed = sum(files[name][0] for name in share)
        expected.append(sum(needed.values()) + beside + hashed + files["common.pt"][0] + files[".metadata"][0])
    everything = sum(size for size, _ in files.values())
    assert run_ranks(2, bytes_read, str(tmp_path), False) == [tuple(expected)] * 2
    assert max(expected) < everything
    whole = run_ranks(2, bytes_read, str(tmp_path), True)[0]
    hashed = sum(files[name][0] for name in ("common.pt", ".metadata", "config.json", "metadata.json"))
    assert sum(whole) == sum(expected) - hashed + everything


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_full_verification_finds_damage_that_no_rank_reads(tmp_path):
    run_ranks(2, save_two, str(tmp_path))
    flip(CheckpointStore(tmp_path).path(4) / "__1_0.distcp")
    weights_only = {"load_optim": False, "load_rng": False}
    assert [told[0] for told in run_ranks(2, load, str(tmp_path), **weights_only)] == [4, 4]
    (found, _, warnings), (other, _, _) = run_ranks(2, load, str(tmp_path), verify_all=True, **weights_only)
    assert found == other == 3 and "__1_0.distcp has SHA-256" in warnings[0]


FILES = ["__1_0.distcp", "__1_0.checksums.json", "common.pt", ".metadata", "config.json"]
QUICK = FILES[:2]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FILES]
)
def test_any_damaged_file_sends_all_ranks_to_the_older_checkpoint(tmp_path, name):
    run_ranks(2, save_two, str(tmp_path))
    path = CheckpointStore(tmp_path).path(4) / name
    flip(path)
    (found, _, warnings), (other, _, _) = run_ranks(2, load, str(tmp_path))
    assert found == other == 3 and name in warnings[0], warnings


# ---------------------------------------------------------------------- tensors that nobody writes


def save_orphans(root: str, prefixes: list[str]) -> list[tuple[str, list[str]]]:
    """Of a save in which every rank leaves what begins with each prefix to another: what it says, and what is there."""
    run = make(SPLIT)
    train(SPLIT, run, range(1))
    store, plan, told = CheckpointStore(root), save_load.plan_pieces, []
    for prefix in prefixes:

        def orphaned(sharded: dict, copies: bool) -> Any:
            for item in nested_values(sharded):
                if unique_key(item).startswith(prefix):  # noqa: B023
                    item.replica_id = 1
            return plan(sharded, copies)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(save_load, "plan_pieces", orphaned)
            try:
                save_checkpoint(store, 3, *run)
                message = "saved"
            except CheckpointError as error:
                message = str(error)
        torch.distributed.barrier()
        told.append((message, sorted(path.name for path in store.root.iterdir()) if store.root.exists() else []))
        torch.distributed.barrier()
    return told


def test_a_save_misses_what_no_rank_writes(tmp_path):
    moments, rng = "optimizer.state.exp_avg.", "rng_state/shard_1_2"  # held by both ranks, and by rank 1 only
    first, second = run_ranks(2, save_orphans, str(tmp_path / "save"), [moments, rng, "nothing begins with this"])
    assert first == second
    (moment, nothing), (random, none), (saved, there) = first
    assert moment.startswith(moments) and "leaves it to another to write; nothing was saved" in moment
    assert re.search(r" and \d+ more would be missing", moment)
    assert random.startswith(f"{rng} would be missing") and saved == "saved"
    assert nothing == none == [] and there == ["iter_0000003", TRACKER]


# ---------------------------------------------------------------------- values that are lost


def save_with(root: str, places: list[str], value: float) -> list[tuple[str, bool]]:
    """Of a save with ``value`` in each place, on rank 1 only: what it says, and whether the checkpoints stayed."""
    told = []
    for place in places:
        run = make(SPLIT)
        train(SPLIT, run, range(1))
        store = CheckpointStore(f"{root}/{place}")
        save_checkpoint(store, 3, *run)
        model, optimizer = run[0][0].module, run[1]
        # only the rank that writes a tensor looks at it: the weights are written by rank 0
        if place == "weight" and torch.distributed.get_rank() == 0:
            model.decoder.layers[1].self_attention.linear_qkv.weight.data[5, 7] = value
        elif place == "table row" and torch.distributed.get_rank() == 0:
            table = next(parameter for name, parameter in model.named_parameters() if name.endswith("table"))
            table.data[3, 1] = value
        elif place == "moment" and torch.distributed.get_rank() == 1:
            part = optimizer.chained_optimizers[0]
            state = next(iter(part.optimizer.state.values()))
            state["exp_avg_sq"].view(-1)[2] = value
        try:
            save_checkpoint(store, 4, *run)
            message = "saved"
        except CheckpointError as error:
            message = str(error)
        torch.distributed.barrier()
        names = sorted(path.name for path in store.root.iterdir())
        told.append((message, names == ["iter_0000003", TRACKER] and store.read_tracker() == 3))
        groups.destroy_groups()
    return told


@pytest.mark.parametrize("value", [math.nan, pytest.param(math.inf, marks=pytest.mark.slow)])
def test_a_save_refuses_what_is_not_finite(tmp_path, value):
    first, second = run_ranks(2, save_with, str(tmp_path), ["weight", "table row", "moment"], value)
    assert first == second
    (weight, table, moment), stayed = zip(*first, strict=True)
    attention = "decoder.layers.1.self_attention.linear_qkv.weight"
    assert f"{attention} holds {value} at [5, 7] on rank 0: nothing was saved" in weight
    assert "optimizer.state.exp_avg_sq." in moment and f" holds {value} at [" in moment and "on rank 1" in moment
    assert f".table holds {value} at [3, 1] on rank 0: nothing was saved" in table
    assert all(stayed) and "\n" not in weight + table + moment
