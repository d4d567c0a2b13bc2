"""What `inspect_checkpoint` says of a checkpoint: the kind of each tensor, and which checkpoint a directory means."""

from __future__ import annotations

from pathlib import Path

import pytest

from umv2_megatron.checkpoint.contents import Contents, Entry, _kind, locate
from umv2_megatron.checkpoint.store import TRACKER, CheckpointError, CheckpointStore, NoCheckpointError
from umv2_megatron.checkpoint.torch_dist_io import METADATA_FILE

LAYER = "decoder.layers.3.mlp.memory"
BESIDE = "decoder.layers.3.mlp.engram"


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        (f"{LAYER}.table.values", "tables"),
        (f"{LAYER}.query.weight", "weights"),
        ("embedding.word_embeddings.weight", "weights"),
        (f"{LAYER}.perm", "buffers"),
        (f"{LAYER}.retrieval.u", "buffers"),
        (f"{LAYER}.retrieval.t", "buffers"),
        (f"{LAYER}.retrieval.cores", "weights"),
        (f"{BESIDE}.table.values", "tables"),
        (f"{BESIDE}.multipliers", "buffers"),
        (f"{BESIDE}.canonical", "buffers"),
        (f"{BESIDE}.conv", "weights"),
        (f"optimizer.state.fp32_param.{LAYER}.table.values", "main parameters"),
        (f"optimizer.state.param.{LAYER}.table.values", "main parameters"),
        (f"optimizer.state.exp_avg.{LAYER}.table.values", "moments"),
        ("optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_0.bucket_idx_0.exp_avg_sq", "moments"),
        ("chained_1.optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_0.bucket_idx_0.exp_avg", "moments"),
        ("chained_1.optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_0.bucket_idx_0.param", "main parameters"),
        ("optimizer.param_groups", "other"),
    ],
)
def test_kinds(key, kind):
    assert _kind(key) == kind


def test_totals_by_kind():
    entries = [Entry("a", "weights", "float32", (2,), 8, 1), Entry("b", "weights", "float32", (3,), 12, 2)]
    contents = Contents(Path("x"), 1, {}, [*entries, Entry("c", "other", "object", (), 5, 1)])
    totals = contents.totals()
    assert totals["weights"] == (2, 20) and totals["other"] == (1, 5) and totals["tables"] == (0, 0)
    assert contents.matching("[ab]") == entries


def publish(directory: Path, *iterations: int) -> None:
    store = CheckpointStore(directory, keep=9)
    for iteration in iterations:
        (store.begin(iteration) / METADATA_FILE).write_bytes(b"x")
        store.publish(iteration, num_keys=1, tensor_bytes=1)


def test_which_checkpoint_a_directory_means(tmp_path):
    publish(tmp_path / "run", 1, 2, 3)
    run = tmp_path / "run"
    assert locate(run)[1] == 3 and locate(run, 2)[1] == 2
    store, iteration = locate(run / "iter_0000002")
    assert (store.root, iteration) == (run, 2) and locate(run / "iter_0000002", 2)[1] == 2
    with pytest.raises(CheckpointError, match="iteration 3 is asked for, but .*iter_0000002 is 2"):
        locate(run / "iter_0000002", 3)
    with pytest.raises(CheckpointError, match="iteration 7 is asked for, but .* holds 1, 2, 3"):
        locate(run, 7)
    (run / TRACKER).write_text("2")
    assert locate(run)[1] == 2
    for text in ("9", "nonsense"):  # a tracker that names nothing: the newest
        (run / TRACKER).write_text(text)
        assert locate(run)[1] == 3
    with pytest.raises(NoCheckpointError, match="holds no checkpoint"):
        locate(tmp_path)
