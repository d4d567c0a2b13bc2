"""Conversions out of every layout of the layout matrix, and of every kind of memory layer; minutes long, so slow.

Settings of the model take turns over the layouts, so that tied and untied embeddings, grouped queries, biases, both
dtypes and an odd vocabulary meet every kind of sharding.
"""

from __future__ import annotations

import pytest
from conversions import RICH, forked, saved, there_and_back
from layout_matrix import Layout, all_layouts

pytestmark = pytest.mark.slow
LAYOUTS = all_layouts()
RICH_WITHOUT_SHARING = {key: value for key, value in RICH.items() if not key.startswith("memory_")}
GROUPED = {"group_query_attention": True, "num_query_groups": 2, "untie_embeddings_and_output_weights": True}
MODELS = [{}, RICH_WITHOUT_SHARING, GROUPED, {**RICH_WITHOUT_SHARING, "bf16": True}, {**GROUPED, "bf16": True}]


def _check(found: dict) -> None:
    assert found["other"] == []
    assert all(good for _, _, good in found["differences"]), found["differences"]


@pytest.mark.parametrize(
    ("layout", "model"),
    [(layout, MODELS[number % len(MODELS)]) for number, layout in enumerate(LAYOUTS)],
    ids=[f"{layout.world}-{layout.name}".replace(" ", "-") for layout in LAYOUTS],
)
def test_every_layout_there_and_back(layout: Layout, model, tmp_path):
    settings = {**layout.settings(), **model, "make_vocab_size_divisible_by": 1, "num_layers": 4, "vocab_size": 499}
    settings["vocab_size"] = 499 if layout.tp == 1 else 500  # 500 and 501 tokens; two ranks pad the latter
    _check(forked(there_and_back, saved(tmp_path, layout.world, **settings), tmp_path))


@pytest.mark.parametrize("variant", ["ultramem", "memory-plus", "pkm", "peer"])
@pytest.mark.parametrize("bf16", [False, True])
def test_every_variant_there_and_back(variant, bf16, tmp_path):
    settings = {"ffn_variant": variant, "num_layers": 8, "bf16": bf16}
    _check(forked(there_and_back, saved(tmp_path, **settings), tmp_path))


@pytest.mark.parametrize("sharing", ["block", "ring", "noring"])
@pytest.mark.parametrize("expansion", ["single", "per-block"])
def test_every_sharing_there_and_back(sharing, expansion, tmp_path):
    settings = {
        "memory_sharing": sharing,
        "memory_sharing_size": 2,
        "memory_key_expansion": 2,
        "memory_value_expansion": expansion,
        "memory_num_heads": 2,
        "memory_layer_freq": "[1,1,0,1,1]",
        "num_layers": 5,
    }
    _check(forked(there_and_back, saved(tmp_path, **settings), tmp_path))
