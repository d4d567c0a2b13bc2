"""An export is fine-tuned in transformers, becomes a checkpoint, and is exported again: the same numbers all the way.

By a loop of our own, and by transformers' Trainer where accelerate is installed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import RICH, differences, different_weights, forked, from_hf, saved, to_hf

from umv2_megatron.hf import UMv2ForCausalLM

pytestmark = pytest.mark.slow
MODELS: dict[str, dict[str, Any]] = {
    "umv2": {},
    "rich": RICH,
    "ultramem": {"ffn_variant": "ultramem", "num_layers": 8},
    "memory-plus": {"ffn_variant": "memory-plus", "num_layers": 8},
    "moe": {"ffn_variant": "moe", "num_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 48},
    "dense": {"ffn_variant": "dense"},
}


def by_hand(model: UMv2ForCausalLM, rows: torch.Tensor, folder: Path) -> None:
    """Fused AdamW, steps large enough to turn singular vectors."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2, fused=True)
    for batch in rows.split(4):
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def by_trainer(model: UMv2ForCausalLM, rows: torch.Tensor, folder: Path) -> None:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(folder.parent / "trainer"), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    trainer.train()
    trainer.save_model(str(folder))


def logits(folder: Path, batch: torch.Tensor) -> torch.Tensor:
    """In float64, where no tie of scores is decided by rounding."""
    with torch.no_grad():
        return UMv2ForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()(batch).logits


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tune", [by_hand, by_trainer])
def test_fine_tuned_exports_become_checkpoints(name: str, tune: Any, tmp_path: Path) -> None:
    if tune is by_trainer and importlib.util.find_spec("accelerate") is None:
        pytest.skip("accelerate is not installed (requirements-hf-tools.txt): transformers' Trainer needs it")
    save = saved(tmp_path, make_vocab_size_divisible_by=1, **MODELS[name])
    first = forked(to_hf, save, tmp_path / "first")
    model = UMv2ForCausalLM.from_pretrained(first)
    rows = torch.randint(model.config.vocab_size, (16, 32), generator=torch.Generator().manual_seed(5))
    before = logits(first, rows[:2])
    tune(model, rows, tmp_path / "tuned")
    with torch.no_grad():
        expected = model.eval()(rows[:2], labels=rows[:2]).loss.item()
        again = UMv2ForCausalLM.from_pretrained(tmp_path / "tuned").eval()
        assert again(rows[:2], labels=rows[:2]).loss.item() == expected
    tuned = logits(tmp_path / "tuned", rows[:2])
    assert (tuned - before).abs().max() > 0.1
    back = forked(from_hf, tmp_path / "tuned", tmp_path / "back")
    found = forked(differences, back, tmp_path / "tuned")
    assert found and all(good for _, _, good in found), found
    assert forked(different_weights, back, tmp_path / "tuned") == ()
    last = forked(to_hf, back, tmp_path / "last")
    torch.testing.assert_close(logits(last, rows[:2]), tuned, rtol=0, atol=1e-9)
