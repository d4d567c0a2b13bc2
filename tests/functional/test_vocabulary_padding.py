"""Rows that pad the vocabulary take no part: a run goes on alike with any padding, and no row of a token is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from program_runs import tiny_run, train

from umv2_megatron.checkpoint.contents import locate
from umv2_megatron.conversion.checkpoint_tensors import CheckpointTensors
from umv2_megatron.training.metrics import read_metrics

pytestmark = pytest.mark.thorough

TOKENS = 261  # NullTokenizer adds the end of document
COMMON: dict[str, Any] = {"vocab_size": TOKENS - 1, "train_iters": 3, "weight_decay": 0.5, "lr": 1e-2}


def numbers(ranks: int, folder: Path, **changes: Any) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step."""
    train(ranks, tiny_run(**{**COMMON, "save": folder / "save", **changes}), folder / "output")
    return [(line["lm loss"], line["grad-norm"]) for line in read_metrics(folder / "save") if "lm loss" in line]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model whose vocabulary is not padded."""
    save = tmp_path_factory.mktemp("start") / "run"
    settings = {**COMMON, "save": save, "train_iters": 1, "make_vocab_size_divisible_by": 1}
    train(1, tiny_run(**settings), save.parent / "output")
    return save


@pytest.fixture(scope="module")
def unpadded(start: Path) -> list[tuple[float, float]]:
    return numbers(1, start.parent / "one", load=start, finetune=True, make_vocab_size_divisible_by=1)


TENSOR: dict[str, Any] = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PADDED: dict[str, tuple[int, dict[str, Any]]] = {
    "default": (1, {"make_vocab_size_divisible_by": 128}),
    "one-row": (2, {**TENSOR, "make_vocab_size_divisible_by": 1}),
    "a-rank-of-padding": (2, {**TENSOR, "make_vocab_size_divisible_by": 512}),
    "stages": (2, {"pipeline_model_parallel_size": 2, "make_vocab_size_divisible_by": 100}),
    "shared-state": (2, {"use_distributed_optimizer": True, "make_vocab_size_divisible_by": 100}),
}
QUICK = ("a-rank-of-padding", "shared-state")


@pytest.mark.parametrize(
    "ranks, changes",
    [case if name in QUICK else pytest.param(*case, marks=pytest.mark.slow) for name, case in PADDED.items()],
    ids=PADDED,
)
def test_losses_and_gradients_do_not_depend_on_padding(
    ranks: int, changes: dict[str, Any], start: Path, unpadded: list[tuple[float, float]], tmp_path: Path
) -> None:
    found = numbers(ranks, tmp_path, load=start, finetune=True, **changes)
    assert len(found) == len(unpadded) == 3
    for ours, theirs in zip(found, unpadded):
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_the_fused_loss_does_not_depend_on_padding(start: Path, tmp_path: Path) -> None:
    settings = {"load": start, "finetune": True, "cross_entropy_loss_fusion": True}
    one, other = (
        numbers(1, tmp_path / str(divisor), make_vocab_size_divisible_by=divisor, **settings) for divisor in (1, 128)
    )
    for ours, theirs in zip(one, other):
        assert ours == pytest.approx(theirs, rel=1e-5)  # the fused loss sums in another order for another length


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_padded_rows_stay_zero(untied: bool, bf16: bool, tmp_path: Path) -> None:
    settings = {"save": tmp_path / "save", "bf16": bf16, "untie_embeddings_and_output_weights": untied}
    train(1, tiny_run(**{**COMMON, **settings}), tmp_path / "output")
    store, iteration = locate(str(tmp_path / "save"), None)
    tensors = CheckpointTensors(store.path(iteration))
    names = [name for name in tensors.tensors if "word_embeddings" in name or "output_layer.weight" in name]
    assert len([name for name in names if not name.startswith("optimizer")]) == 1 + untied
    for name in names:
        rows = tensors.rows(name, 0, 384)
        assert len(rows) == 384 and rows[:TOKENS].any() and not rows[TOKENS:].any(), name
    tensors.close()


@pytest.mark.parametrize("tokens", [TOKENS - 1, TOKENS + 50])
def test_another_vocabulary_is_refused(tokens: int, start: Path, tmp_path: Path) -> None:
    """It fits the padded rows; tokens' own rows would be lost, or be there untrained."""
    settings = {**COMMON, "load": start, "vocab_size": tokens - 1, "make_vocab_size_divisible_by": 512}
    for how in ({"finetune": True}, {"allow_config_change": True, "no_load_optim": True}):
        done = train(1, tiny_run(**settings, **how), tmp_path / "output", codes=2)
        assert f"vocabulary of {TOKENS} tokens, this run's tokenizer one of {tokens}; give" in done.text
