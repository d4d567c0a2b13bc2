"""What --deterministic-mode changes on a CPU: the order in which the word embedding's gradient is added up, only.

Both modes give the same bits in every run there. They differ from each other, because mcore's VocabParallelEmbedding
looks words up by indexing in this mode and by F.embedding otherwise: the backward adds up the occurrences of a word in
another order, and that rounding grows from step to step. With one kind of look-up in both modes all bits are equal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from program_runs import tiny_run, train

pytestmark = pytest.mark.thorough

KINDS: dict[str, dict[str, Any]] = {
    "umv2": {},
    "umv2 in PyTorch": {"memory_backend": "scatter"},
    "ultramem": {"ffn_variant": "ultramem", "memory_balance_loss_coeff": 0.01},
}


def look_words_up_as_in_plain_mode() -> None:
    from megatron.core.tensor_parallel.layers import VocabParallelEmbedding

    made = VocabParallelEmbedding.__init__

    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        assert self.deterministic_mode, "mcore no longer asks for this mode here: correct docs/training.md"
        self.deterministic_mode = False

    VocabParallelEmbedding.__init__ = make


@pytest.mark.parametrize(
    "kind", [kind if kind == "umv2" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_only_the_embedding_gradient_differs_on_a_cpu(kind: str, tmp_path: Path) -> None:
    # few words, so that each occurs often, and a large step
    run: dict[str, Any] = {"train_iters": 30, "vocab_size": 64, "lr": 1e-2, **KINDS[kind]}
    plain = train(1, tiny_run(**run), tmp_path / "plain")
    same = train(1, tiny_run(**run, deterministic_mode=True), tmp_path / "same", look_words_up_as_in_plain_mode)
    assert same.weights == plain.weights
