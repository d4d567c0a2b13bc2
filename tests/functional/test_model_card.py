"""The model card of an export says what the checkpoint and its run say, and its example runs."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conversions import forked, from_hf, saved, to_hf, tool

VARIANTS: list[dict[str, Any]] = [
    {"memory_sharing": "block", "memory_sharing_size": 2, "make_vocab_size_divisible_by": 128},
    {"ffn_variant": "moe", "num_experts": 8, "moe_router_topk": 2, "untie_embeddings_and_output_weights": True},
]


def _rows(text: str) -> dict[str, str]:
    """The rows of the card's tables."""
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE))


def _number(text: str) -> int:
    return int(text.split()[0].replace(",", ""))


def _example(export: Path) -> tuple[int, str]:
    """Parameters of the model that the card's example loads, and what the example prints."""
    text = (export / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code.replace("<this folder>", str(export)), names)
    return sum(parameter.numel() for parameter in names["model"].parameters()), printed.getvalue()


@pytest.mark.parametrize(
    "settings", [VARIANTS[0], pytest.param(VARIANTS[1], marks=pytest.mark.slow)], ids=["umv2", "moe"]
)
def test_the_card_of_a_run(settings, tmp_path):
    from huggingface_hub import ModelCard

    save = saved(tmp_path, iters=3, eval_interval=2, eval_iters=1, log_interval=1, vocab_size=260,
                 tokenizer_type="ByteLevelTokenizer", **settings)  # fmt: skip
    export = forked(to_hf, save, tmp_path / "export")
    card = ModelCard.load(export / "README.md")
    assert card.data.license == "unknown" and card.data.library_name == "transformers"
    assert "Nobody has stated a licence" in card.text
    rows = _rows(card.text)
    parameters, printed = forked(_example, export)
    assert _number(rows["parameters"]) == parameters
    assert 0 < _number(rows["of them used for a token"]) < parameters
    assert printed.startswith("Once upon a time")

    records = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    loss = [record["lm loss"] for record in records if record.get("lm loss") is not None][-1]
    validation = [record["lm loss validation"] for record in records if "lm loss validation" in record][-1]
    assert rows["training loss"] == f"{loss:.4f} nats per token, at iteration 3"
    assert rows["validation loss"].startswith(f"{validation:.4f} nats")
    config = json.loads((export / "config.json").read_text())
    samples = [record["consumed-samples"] for record in records if "consumed-samples" in record][-1]
    assert _number(rows["tokens seen"]) == samples * config["max_position_embeddings"]
    for path in export.glob("*.py"):
        assert f"`{path.name}`" in card.text


def test_a_card_may_be_edited(tmp_path):
    save = saved(tmp_path, iters=1)
    license = ["--license", "cc-by-4.0"]
    code, _, err = forked(tool, "to-hf", "--load", str(save), "--save", str(tmp_path / "export"), *license)
    assert code == 0, err
    path = tmp_path / "export" / "README.md"
    assert 'license: "cc-by-4.0"' in path.read_text() and "Nobody has stated" not in path.read_text()
    path.write_text(path.read_text() + "\nMore words.\n")
    forked(from_hf, tmp_path / "export", tmp_path / "back")

    code, _, err = forked(tool, "to-hf", "--load", str(save), "--save", str(tmp_path / "no"), "--license", "my own")
    assert code == 2 and "--license is 'my own'; expected an identifier such as apache-2.0" in err
    assert not (tmp_path / "no").exists()
