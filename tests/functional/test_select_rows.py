"""From two corpora to a run that trains the rows that one of them picks more: tools/select_rows.py in several layouts,
and pretrain_umv2.py --trainable rows with its file."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from program_runs import command_line, tiny_run, train

from umv2_megatron.config.flags import UsageError
from umv2_megatron.data.indexing import IndexWriter
from umv2_megatron.memory.row_counts import RowCounts, RowSelection

MODEL = {"mock_data": None, "tokenizer_type": "NullTokenizer", "vocab_size": 200, "num_layers": 2,
         "memory_num_keys": 16, "make_vocab_size_divisible_by": 4, "weight_decay": 0.1}  # fmt: skip
BATCHES, BATCH, LENGTH, TOPK, ROWS = 3, 4, 32, 4, 256


def run_select_instead() -> None:
    """On a forked rank: its program becomes tools/select_rows.py."""
    from umv2_megatron.commands import pretrain

    pretrain.main = importlib.import_module("umv2_megatron.commands.select_rows").main


def corpus(prefix: Path, low: int, high: int) -> str:
    """Random tokens from ``low`` to ``high``."""
    tokens = np.random.default_rng(low).integers(low, high, 4000).astype(np.uint16)
    tokens[99::100] = 200  # the end of documents
    writer = IndexWriter(str(prefix), np.uint16)
    writer.add(tokens.tobytes(), np.full(40, 100, dtype=np.int32))
    writer.publish({})
    Path(f"{prefix}.meta.json").unlink()  # it would have to name the tokenizer
    return str(prefix)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model of one step in ``run``, two corpora, and what one rank counts of them."""
    folder = tmp_path_factory.mktemp("rows")
    known, _ = corpus(folder / "known", 0, 100), corpus(folder / "new", 100, 200)
    paths = {"train_data_path": known, "save": folder / "run", "train_iters": 1}
    train(1, tiny_run(**{**MODEL, **paths}), folder / "train")
    for name in ("new", "known"):
        counted(1, folder, folder / name, folder / f"{name}.counts")
    return folder


def counted(ranks: int, place: Path, data: Path, output: Path, **layout: Any) -> RowCounts:
    settings = {"load": place / "run", "data_path": data, "batches": BATCHES, "batch_size": BATCH, "output": output}
    finished = train(ranks, ["count", *command_line({**settings, **layout})], output.parent / "log", run_select_instead)
    assert "a batch picks" in finished.outputs[0], finished.text
    return RowCounts.read("--new", str(output))


def select(place: Path, output: Path, count: int = 20) -> RowSelection:
    settings = {"new": place / "new.counts", "background": place / "known.counts", "top_rows": count, "output": output}
    assert importlib.import_module("umv2_megatron.commands.select_rows").main(["select", *command_line(settings)]) == 0
    return RowSelection.read("--trainable-rows", str(output))


def test_what_one_rank_counts(place: Path) -> None:
    found = RowCounts.read("--new", str(place / "new.counts"))
    assert set(found.picks) == {0, 1} and found.num_batches == BATCHES
    for layer, picks in found.picks.items():
        assert len(picks) == ROWS and int(picks.sum()) == BATCHES * BATCH * LENGTH * TOPK
        batches = found.batches[layer]
        assert torch.equal(batches > 0, picks > 0) and int(batches.max()) <= BATCHES and bool((batches <= picks).all())
    assert found.origin["corpora"][0]["path"] == str(place / "new") and len(found.origin["manifest_sha256"]) == 64


LAYOUTS = {
    "sequence-and-rows": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "memory_parallel_size": 2,
                          "memory_parallel_mode": "row"},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "tensor": {"tensor_model_parallel_size": 2},
    "data-and-memory": {"memory_parallel_size": 2, "micro_batch_size": 2},
    "context": {"context_parallel_size": 2},
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [each if each == "sequence-and-rows" else pytest.param(each, marks=pytest.mark.slow) for each in LAYOUTS]
)
def test_counts_do_not_depend_on_the_layout(name: str, place: Path, tmp_path: Path) -> None:
    alone = RowCounts.read("--new", str(place / "new.counts"))
    found = counted(2, place, place / "new", tmp_path / "counts", **LAYOUTS[name])
    for layer, picks in alone.picks.items():
        assert int(found.picks[layer].sum()) == int(picks.sum())
        # near ties are decided by rounding
        assert int((found.picks[layer] - picks).abs().sum()) <= 0.01 * int(picks.sum())
        assert int((found.batches[layer] - alone.batches[layer]).abs().sum()) <= 0.02 * int(alone.batches[layer].sum())


def test_a_run_trains_the_selected_rows(place: Path, tmp_path: Path) -> None:
    chosen = select(place, tmp_path / "rows")
    assert all(0 < len(rows) <= 20 for rows in chosen.rows.values())
    assert chosen.origin["new"]["sha256"] != chosen.origin["background"]["sha256"]
    flags = {**MODEL, "train_data_path": place / "new", "load": place / "run", "finetune": True, "trainable": "rows",
             "trainable_rows": tmp_path / "rows", "train_iters": 4}  # fmt: skip
    whole = train(1, tiny_run(**flags, save=tmp_path / "whole"), tmp_path / "log")
    assert f" trained: {sum(map(len, chosen.rows.values()))} rows of 2 value tables" in whole.text
    before, after = tensors(place / "run"), tensors(tmp_path / "whole")
    for name, tensor in before.items():
        if ".table." not in name:
            assert torch.equal(tensor, after[name]) or name.endswith((".u", ".t")), name
            continue
        rows = chosen.rows[int(name.split(".")[2])]
        same = (tensor == after[name]).all(1)
        assert not same[rows].any() and int(same.sum()) == ROWS - len(rows), name
    # interrupted and with the same command again, it ends with the same bits; another file is refused
    halves = {**flags, "save": tmp_path / "halves"}
    train(1, tiny_run(**halves, exit_interval=2), tmp_path / "log")
    select(place, tmp_path / "others", 10)
    other = train(1, tiny_run(**{**halves, "trainable_rows": tmp_path / "others"}), tmp_path / "log", codes=1)
    assert "--trainable-rows is a file with SHA-256" in other.text
    assert train(1, tiny_run(**halves), tmp_path / "log").weights == whole.weights


@pytest.mark.slow
def test_a_run_trains_the_selected_rows_of_ngram_tables(place: Path, tmp_path: Path) -> None:
    """Rows that hashes address are counted, selected and trained as others."""
    model = {**MODEL, "ffn_variant": "engram", "memory_num_heads": 2, "memory_value_dim": 8}
    for key in ("memory_topk", "memory_tucker_rank", "memory_pre_value_dim"):
        model[key] = None
    train(1, tiny_run(**model, train_data_path=place / "known", save=tmp_path / "run", train_iters=1), tmp_path / "log")
    for name in ("new", "known"):
        counts = counted(1, tmp_path, place / name, tmp_path / f"{name}.counts")
        assert all(int(picks.sum()) == BATCHES * BATCH * LENGTH * 2 for picks in counts.picks.values())
    chosen = select(tmp_path, tmp_path / "rows")
    flags = {**model, "train_data_path": place / "new", "load": tmp_path / "run", "finetune": True,
             "trainable": "rows", "trainable_rows": tmp_path / "rows", "train_iters": 3}  # fmt: skip
    train(1, tiny_run(**flags, save=tmp_path / "whole"), tmp_path / "log")
    before, after = tensors(tmp_path / "run"), tensors(tmp_path / "whole")
    for name, tensor in before.items():
        if ".table." not in name:
            assert torch.equal(tensor, after[name]), name
            continue
        rows = chosen.rows[[0, 1].index(int(name.split(".")[2]))]
        same = (tensor == after[name]).all(1)
        assert not same[rows].any() and int(same.sum()) == len(tensor) - len(rows), name


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    from reshard import whole_tensors

    from umv2_megatron.checkpoint.store import CheckpointStore

    store = CheckpointStore(directory)
    found = whole_tensors(store.path(store.resolve(None)))
    return {name: each for name, each in found.items() if not name.startswith(("optimizer.", "rng"))}


def test_mistakes_are_one_line(place: Path, tmp_path: Path) -> None:
    main = importlib.import_module("umv2_megatron.commands.select_rows").main
    here = {"new": place / "new.counts", "background": place / "known.counts", "top_rows": 5, "output": tmp_path / "x"}
    for changes, words in (
        ({"top_rows": 0}, "--top-rows is 0; expected 1 or more"),
        ({"output": tmp_path / "no" / "file"}, "--output is"),
        ({"new": tmp_path / "none"}, "--new is"),
        ({"background": place / "known.idx"}, "expected a file that 'select_rows.py count' wrote"),
    ):
        with pytest.raises(UsageError, match=words) as error:
            main(["select", *command_line({**here, **changes})])
        assert "\n" not in str(error.value)
    assert not (tmp_path / "x").exists()
    select(place, tmp_path / "rows")
    flags = {**MODEL, "memory_num_keys": 3, "memory_topk": 2, "train_data_path": place / "new", "train_iters": 1,
             "trainable": "rows", "trainable_rows": tmp_path / "rows"}  # fmt: skip
    refused = train(1, tiny_run(**flags), tmp_path / "log", codes=2)
    assert "expected rows below 9: select rows of this model" in refused.text and "Traceback" not in refused.text


def test_a_dry_run_tells_the_state_of_selected_rows(place: Path, tmp_path: Path) -> None:
    chosen = select(place, tmp_path / "rows")
    flags = {**MODEL, "mock_data": True, "trainable": "rows", "trainable_rows": tmp_path / "rows", "train_iters": 1,
             "dry_run": True, "dry_run_world_size": 2, "dry_run_rank": "1", "memory_parallel_size": 2}  # fmt: skip
    told = train(1, tiny_run(**flags), tmp_path / "log").text
    elements = sum(map(len, chosen.rows.values())) * (24 + 8) // 2
    assert f"    optimizer state {elements * 3 * 4:>16,} " in told  # two moments and the compact copy
