"""--reset-attention-mask in whole runs: the same losses in every layout, other ones than without it, words for what it
can not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from program_runs import ROOT, losses, tiny_run, train

sys.path.insert(0, str(ROOT / "tests" / "unit" / "data"))
from data_helpers import run_tool, write_jsonl  # noqa: E402

pytestmark = pytest.mark.thorough

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "two stages": (2, {"pipeline_model_parallel_size": 2}),
    "virtual stages": (
        2,
        {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1, "global_batch_size": 16},
    ),
    "tensor parallel": (2, {"tensor_model_parallel_size": 2, "make_vocab_size_divisible_by": 128}),
    "sharded tables": (2, {"memory_parallel_size": 2, "memory_parallel_mode": "row"}),
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("corpus")
    text = write_jsonl(folder / "text.jsonl", [f"{number} " * (1 + number % 9) for number in range(300)])
    done = run_tool("preprocess_data.py", "--input", text, "--output-prefix", folder / "p",
                    "--tokenizer-type", "ByteLevelTokenizer", "--append-eod")  # fmt: skip
    assert done.returncode == 0, done.stderr
    start = folder / "start"  # weights that are drawn differ from layout to layout
    settings = {
        "mock_data": None, "tokenizer_type": "ByteLevelTokenizer", "data_path": folder / "p_text_document",
        "split": "90,10,0", "train_iters": 3, "eval_iters": 1, "num_layers": 4, "num_workers": 1, "lr": 1e-4,
        "make_vocab_size_divisible_by": 256,
    }  # fmt: skip
    train(1, tiny_run(**{**settings, "train_iters": 1}, save=start), folder / "log")
    return {**settings, "load": start, "finetune": True}


def run(ranks: int, folder: Path, settings: dict[str, Any]) -> list[float]:
    train(ranks, tiny_run(**settings, save=folder / "save"), folder / "log")
    return [loss for _, loss in losses(folder / "save")]


@pytest.fixture(scope="module")
def alone(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[float]]:
    """Losses of one rank, by the global batch."""
    found = {}
    for batch in (8, 16):
        folder = tmp_path_factory.mktemp("alone")
        found[batch] = run(1, folder, {**settings, "reset_attention_mask": True, "global_batch_size": batch})
    return found


@pytest.mark.parametrize(
    "name", [name if name == "sharded tables" else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_every_layout(name: str, settings: dict[str, Any], alone: dict[int, list[float]], tmp_path: Path) -> None:
    ranks, changes = LAYOUTS[name]
    found = run(ranks, tmp_path, {**settings, "reset_attention_mask": True, **changes})
    assert found == pytest.approx(alone[changes.get("global_batch_size", 8)], rel=1e-5)


def test_other_losses_than_across_documents(
    settings: dict[str, Any], alone: dict[int, list[float]], tmp_path: Path
) -> None:
    across = run(1, tmp_path, settings)
    assert all(abs(a - b) > 1e-4 for a, b in zip(across, alone[8], strict=True))


def test_masks_of_the_loader_say_the_same(
    settings: dict[str, Any], alone: dict[int, list[float]], tmp_path: Path
) -> None:
    """Megatron-LM's way: a mask [s, s] for every sample; rotary positions do not restart, which changes no product."""
    masked = {**settings, "reset_attention_mask": True, "create_attention_mask_in_dataloader": True}
    assert run(1, tmp_path, masked) == pytest.approx(alone[8], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "ranks", "named"),
    [
        ({"reset_attention_mask": True, "context_parallel_size": 2}, 2, "--context-parallel-size is 2"),
        ({"reset_position_ids": True}, 1, "--reset-position-ids is on"),
        ({"reset_position_ids": True, "reset_attention_mask": True, "create_attention_mask_in_dataloader": True}, 1,
         "--reset-position-ids is on"),
    ],
)  # fmt: skip
def test_refused(changes: dict[str, Any], ranks: int, named: str, settings: dict[str, Any], tmp_path: Path) -> None:
    assert named in train(ranks, tiny_run(**{**settings, **changes}), tmp_path, codes=2).text
