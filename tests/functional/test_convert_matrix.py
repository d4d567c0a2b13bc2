"""Conversions out of every layout of the layout matrix, and of every kind of memory layer; minutes long, so slow.

Settings of the model take turns over the layouts, so that tied and untied embeddings, grouped queries, biases, both
dtypes and an odd vocabulary meet every kind of sharding.
"""

from __future__ import annotations

from typing import Any

import pytest
from conversions import RICH, forked, from_hf, saved, there_and_back, to_hf
from layout_matrix import Layout, all_layouts
from program_runs import tiny_run, train

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
    settings = {**layout.settings(), **model, "make_vocab_size_divisible_by": 1, "num_layers": 4}
    settings["vocab_size"] = 500  # and the end of document: 501 tokens, which two ranks pad
    _check(forked(there_and_back, saved(tmp_path, layout.world, **settings), tmp_path))


@pytest.mark.parametrize("variant", ["ultramem", "memory-plus", "pkm", "peer", "engram", "umv2-engram"])
@pytest.mark.parametrize("bf16", [False, True])
def test_every_variant_there_and_back(variant, bf16, tmp_path):
    settings = {"ffn_variant": variant, "num_layers": 8, "bf16": bf16}
    if variant == "umv2-engram":
        beside = {"engram_layer_freq": "3", "engram_num_keys": 40}
        settings = {**settings, "ffn_variant": "umv2", "memory_layer_freq": "2", **beside}
    if variant == "engram":
        settings["memory_num_keys"] = 40  # of 16 hashes
    _check(forked(there_and_back, saved(tmp_path, **settings), tmp_path))


EXPERTS = {"ffn_variant": "moe", "num_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 48}
SHARED = {"moe_shared_expert_intermediate_size": 32, "moe_router_pre_softmax": True}
TENSOR = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
SPLIT = {"expert_model_parallel_size": 2}
EXPERT_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone-as-olmoe": (1, {"num_experts": None, "moe_router_topk": None, "moe_ffn_hidden_size": 16}),
    "alone-gelu-odd": (1, {"no_swiglu": True, **RICH_WITHOUT_SHARING, "add_bias_linear": None, "vocab_size": 498}),
    "data-distributed": (2, {"use_distributed_optimizer": True, **SHARED}),
    "split": (2, {**SPLIT, **GROUPED}),
    "split-bf16": (2, {**SPLIT, **SHARED, "moe_shared_expert_gate": True, "bf16": True}),
    "tensor": (2, {**TENSOR, **SHARED}),
    "split-tensor-data": (4, {**TENSOR, **SPLIT, **SHARED, "bf16": True}),
    "one-each": (4, {"expert_model_parallel_size": 4, "use_distributed_optimizer": True}),
    "split-pipeline": (4, {**SPLIT, "pipeline_model_parallel_size": 2, "num_layers": 4}),
    "split-context": (2, {**SPLIT, "context_parallel_size": 2, "moe_token_dispatcher_type": "allgather"}),
}


@pytest.mark.parametrize("name", EXPERT_LAYOUTS)
def test_experts_of_every_layout_there_and_back(name, tmp_path):
    ranks, settings = EXPERT_LAYOUTS[name]
    _check(forked(there_and_back, saved(tmp_path, ranks, **{**EXPERTS, **settings}), tmp_path))


def test_experts_train_on_alike_from_either_checkpoint_in_another_layout(tmp_path):
    settings = {**EXPERTS, **SHARED, "vocab_size": 511, "make_vocab_size_divisible_by": 256}
    save = saved(tmp_path, 2, **settings, **SPLIT)
    back = from_hf(to_hf(save, tmp_path / "export"), tmp_path / "back")
    outputs = []
    for name, load in (("own", save), ("converted", back)):
        flags = {"load": load, "finetune": True, "train_iters": 2, "save": tmp_path / name, "seed": 3}
        layout = {**TENSOR, "expert_model_parallel_size": 2}
        outputs.append(train(2, tiny_run(**settings, **flags, **layout), tmp_path / "log" / name).weights)
    assert outputs[0] == outputs[1]


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
