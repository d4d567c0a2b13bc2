"""What Megatron-LM's own saving and loading of optimizer state can do without Transformer Engine and Apex.

docs/megatron-lm.md tells users of this; our own program goes through ``checkpoint/`` instead. mcore then uses torch's
AdamW, whose step counts do not exist before the first step. If the refusal here ends with a new mcore, change the page.
"""

from __future__ import annotations

import tempfile
import traceback
from typing import Any

import pytest
import tiny_gpt
from harness import run_ranks
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE


def resume(distributed_optimizer: bool) -> str:
    """Train, save, build afresh, load, train on, as Megatron-LM's checkpointing.py does; the line that
    refused, or "" if the continued losses are those of an uninterrupted run."""
    tiny_gpt.allocate_moments = lambda _: None  # ours; Megatron-LM has nothing of the kind
    layout = tiny_gpt.Layout(distributed_optimizer=distributed_optimizer)
    model, optimizer = tiny_gpt.build(layout)
    tiny_gpt.train(layout, model, optimizer, range(2))
    with tempfile.TemporaryDirectory() as folder:
        dist_checkpointing.save(sharded_state(model, optimizer, is_loading=False), folder)
        expected = tiny_gpt.train(layout, model, optimizer, range(2, 4))
        parallel_state.destroy_model_parallel()
        model, optimizer = tiny_gpt.build(layout)
        try:
            loaded = dist_checkpointing.load(sharded_state(model, optimizer, is_loading=True), folder)
        except AssertionError as error:
            return traceback.extract_tb(error.__traceback__)[-1].line or "no source"
    for index, chunk in enumerate(model):
        chunk.module.load_state_dict(loaded[f"model{index}"])
    optimizer.load_state_dict(loaded["optimizer"])
    found = tiny_gpt.train(layout, model, optimizer, range(2, 4))
    return "" if found == expected else f"{found} instead of {expected}"


def sharded_state(model: list, optimizer: Any, is_loading: bool) -> dict[str, Any]:
    """What Megatron-LM hands to dist_checkpointing."""
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    chunks = {f"model{index}": chunk.module.sharded_state_dict() for index, chunk in enumerate(model)}
    return chunks | {"optimizer": optimizer.sharded_state_dict(chunks, is_loading=is_loading, metadata=metadata)}


@pytest.mark.slow
@pytest.mark.skipif(HAVE_APEX_OR_TE, reason="Transformer Engine or Apex is installed: mcore uses their Adam")
def test_only_the_plain_optimizer_can_be_loaded_without_transformer_engine_and_apex() -> None:
    assert run_ranks(1, resume, False) == [""]
    # distrib_optimizer.py: load_state_dict(self.state_dict()) asks for the step of a state that is empty.
    assert run_ranks(1, resume, True) == ["assert len(steps) == 1"]
