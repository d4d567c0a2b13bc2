"""Planning arithmetic against sums done by hand, published figures, real modules and a slow count of operations."""

import dataclasses

import pytest
import torch

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.config.presets import PRESETS
from umv2_megatron.planning import (
    bytes_touched_per_token,
    count_parameters,
    flops_per_token,
    padded_vocab_size,
    training_flops,
)

SMALL = {
    "num_layers": 3, "hidden_size": 8, "ffn_hidden_size": 20, "num_attention_heads": 4, "num_query_groups": 2,
    "group_query_attention": True, "kv_channels": 2, "seq_length": 16, "vocab_size": 100, "swiglu": True,
    "normalization": "RMSNorm", "disable_bias_linear": True, "qk_layernorm": True,
}
SMALL_MEMORY = MemoryConfig(num_keys=6, key_dim=5, value_dim=4, pre_value_dim=3, topk=2, num_heads=2, tucker_rank=2,
                            num_cores=2, layer_freq="[1,0,1]")


def preset_count(name):
    preset = PRESETS[name]
    return count_parameters(preset.model, preset.memory_config())


def test_small_model_by_hand():
    count = count_parameters(SMALL, SMALL_MEMORY)
    assert count.embedding == 128 * 8 and count.output == 0
    assert count.attention == 3 * (8 * (8 + 2 * 4) + 8 * 8 + 2 * 2)
    assert count.ffn == 3 * 3 * 8 * 20
    assert count.norms == 3 * 2 * 8 + 8
    # Wq 2*R*Dk x H, keys h*2*N*Dk*R, gains 2*Dk, cores C*h*R*R, Wp Dp x H, Wv H x Dv
    assert count.memory == 2 * (20 * 8 + 2 * 2 * 6 * 5 * 2 + 10 + 2 * 2 * 4 + 3 * 8 + 8 * 4)
    assert count.tables == 2 * 36 * 7
    assert count.picked == 2 * (2 * 2) * 7
    assert [block.memory is not None for block in count.blocks] == [True, False, True]
    assert count.total == count.attention + count.ffn + count.norms + count.memory + count.tables
    assert count.activated == count.total - count.tables + count.picked + count.embedding


def test_227m_by_hand():
    count = preset_count("umv2-227m-1.2b")
    assert count.embedding == 50304 * 768
    assert count.ffn == 20 * 3 * 768 * 2496
    assert count.attention == 20 * (4 * 768 * 768 + 2 * 64)
    assert count.memory == 20 * (768 * 768 + 2 * 360 * 192 * 2 + 2 * 192 + 8 + 2 * 192 * 768)
    assert count.tables == 20 * 360 * 360 * 384
    assert count.activated == pytest.approx(225e6, rel=0.03)
    assert count.total == pytest.approx(1.18e9, rel=0.03)


def test_ultramem_v1_layer_by_hand():
    """Table 10's UltraMem-227M: 4 layers of N 808 (e = 2), Dv 384, 2 heads; shared queries, four projections."""
    memory = MemoryConfig(num_keys=808, key_dim=192, value_dim=384, pre_value_dim=0, topk=80, num_heads=2,
                          query_mode="shared", key_expansion=2, value_expansion="per-block", layer_freq="5")
    count = count_parameters(PRESETS["umv2-227m-1.2b"].model, memory)
    layer = count.memory_layers[0]
    assert len(count.memory_layers) == 4
    assert layer.query_projection == 2 * 192 * 768
    assert layer.keys == 2 * 2 * 1616 * 192 * 2
    assert layer.value_projection == 768 * 384 * 4 and layer.pre_value_projection == 0
    assert count.tables == 4 * 808 * 808 * 384  # 1.003B, what the published total leaves for tables


@pytest.mark.parametrize("sharing, size, side", [("none", 1, 6), ("block", 2, 8), ("ring", 2, 8), ("noring", 3, 10)])
def test_sharing_changes_keys_but_not_tables(sharing, size, side):
    memory = dataclasses.replace(SMALL_MEMORY, layer_freq="1", sharing=sharing, sharing_size=size)
    if sharing == "block":
        memory = dataclasses.replace(memory, layer_freq="[1,0,1]")
    count = count_parameters(SMALL, memory)
    layers = len(count.memory_layers)
    assert {layer.keys for layer in count.memory_layers} == {2 * 2 * side * 5 * 2}
    assert count.tables == layers * 36 * 7


@pytest.mark.parametrize("changes", [
    {}, {"pre_value_dim": 0}, {"value_expansion": "none", "value_dim": 8}, {"query_mode": "shared"},
    {"key_expansion": 2, "value_expansion": "per-block"}, {"sharing": "ring", "sharing_size": 2},
    {"sharing": "noring", "sharing_size": 2}, {"sharing": "block", "sharing_size": 2},
])
def test_memory_layers_hold_what_is_counted(changes):
    """Real memory layers on the meta device, tables counted where they are owned."""
    from umv2_megatron.memory.layer import MemoryLayer
    from umv2_megatron.memory.sharing import table_windows

    memory = dataclasses.replace(SMALL_MEMORY, layer_freq="[1,0,1]", **changes)
    built: list[MemoryLayer] = []
    for index, window in enumerate(table_windows(memory, 2)):
        table = None if window.owner == index else built[window.owner].table
        built.append(MemoryLayer(memory, 8, index, 2, 20, 3, window, table, device="meta"))
    count = count_parameters(SMALL, memory)
    held = sum(parameter.numel() for layer in built for parameter in layer.parameters())
    assert held == count.memory + count.tables
    assert sum(table.numel() for layer in built if layer.owns_table for table in layer.table.tables()) == count.tables


def test_biases_layer_norms_positions_and_untied_output():
    fields = {**SMALL, "disable_bias_linear": False, "normalization": "LayerNorm", "swiglu": False,
              "position_embedding_type": "learned_absolute", "max_position_embeddings": 32,
              "untie_embeddings_and_output_weights": True}
    count = count_parameters(fields, None)
    assert count.attention == 3 * (8 * 16 + 16 + 8 * 8 + 8 + 2 * 2 * 2)
    assert count.ffn == 3 * (2 * 8 * 20 + 20 + 8)
    assert count.norms == 3 * 2 * 16 + 16
    assert count.positions == 32 * 8 and count.output == 128 * 8
    assert count.stored == count.total + 2 * 128 * 8 + 32 * 8
    assert count.memory == count.tables == 0


def test_dense_variant_ignores_memory():
    assert count_parameters({**SMALL, "ffn_variant": "dense"}, SMALL_MEMORY) == count_parameters(SMALL, None)
    assert flops_per_token({**SMALL, "ffn_variant": "dense"}, SMALL_MEMORY).memory_share == 0


def test_experts():
    """A token uses the router, 3 of 7 experts, and the shared expert with its gate."""
    fields = {**SMALL, "ffn_variant": "moe", "num_experts": 7, "moe_router_topk": 3, "moe_ffn_hidden_size": 5,
              "moe_shared_expert_intermediate_size": 4, "moe_shared_expert_gate": True}
    count, dense = count_parameters(fields, None), count_parameters(SMALL, None)
    layers, hidden = SMALL["num_layers"], SMALL["hidden_size"]
    expert = 3 * hidden * 5
    assert count.ffn == layers * (7 * hidden + 7 * expert + 3 * hidden * 4 + hidden)
    assert count.total - dense.total == count.ffn - dense.ffn
    assert count.total - count.activated_without_embeddings == layers * 4 * expert
    operations = flops_per_token(fields, SMALL_MEMORY)
    assert operations.ffn == layers * 2 * (3 * expert + 3 * hidden * 4 + 8 * hidden)
    assert operations.memory == 0


def test_megatron_core_names_and_defaults():
    by_core = {**{key: value for key, value in SMALL.items() if key not in ("disable_bias_linear", "swiglu")},
               "add_bias_linear": False, "gated_linear_unit": True}
    assert count_parameters(by_core, SMALL_MEMORY) == count_parameters(SMALL, SMALL_MEMORY)
    default = count_parameters({"num_layers": 1, "hidden_size": 768, "num_attention_heads": 12, "seq_length": 8,
                                "vocab_size": 1, "swiglu": True, "disable_bias_linear": True}, None)
    assert default.ffn == 3 * 768 * 2048


def test_vocabulary_padding():
    assert padded_vocab_size(50280, 128) == 50304
    assert padded_vocab_size(50304, 128) == 50304
    assert padded_vocab_size(50280, 128, 8) == 51200


def test_flops_by_slow_count():
    """Every product of one token written out as matrix shapes, 2 operations per multiply-add."""
    preset = PRESETS["umv2-8m"]
    flops = flops_per_token(preset.model, preset.memory_config())
    layers, hidden, inner, seq = 6, 256, 896, 256
    n, rank, cores, kept, dk, dp, dv = 96, 2, 2, 16, 128, 32, 96

    def product(rows, shared, columns):
        return 2 * rows * shared * columns

    assert flops.attention_projections == layers * 4 * product(1, hidden, hidden)
    past = (seq + 0) / 2  # a causal token sees half the sequence on average
    assert flops.attention_scores == layers * 4 * 2 * product(1, 64, past)
    assert flops.ffn == layers * 3 * product(1, hidden, inner)
    assert flops.memory_projections == layers * (product(1, hidden, 2 * rank * dk) + product(1, hidden, dp)
                                                 + product(1, dv, hidden))
    assert flops.memory_scoring == layers * 2 * (rank * product(1, dk, n) + product(n, rank, 1))
    assert flops.memory_grid == layers * cores * (product(kept, rank, rank) + product(kept, rank, kept))
    assert flops.memory_lookup == layers * kept * (product(1, dp, 1) + product(1, 1, dv))
    assert flops.logits == product(1, hidden, 4096)
    assert flops.training == 3 * flops.forward
    assert training_flops(preset.model, preset.memory_config(), 1000) == 1000 * flops.training
    assert flops.blocks == flops.forward - flops.logits


def test_top_k_cap_bounds_the_grid():
    preset = PRESETS["umv2-2.5b-60b-top768"]
    flops = flops_per_token(preset.model, preset.memory_config())
    assert flops.memory_grid == 24 * 2 * (2 * 128 * 4 + 2 * 128 * 128 * 2)
    assert flops.memory_lookup == 24 * 768 * 2 * 1024


def test_bytes_touched_by_one_token():
    preset = PRESETS["umv2-227m-1.2b"]
    count = preset_count("umv2-227m-1.2b")
    touched = bytes_touched_per_token(preset.model, preset.memory_config())
    assert touched.rows == pytest.approx(2 * count.picked)
    assert touched.dense == 2 * (count.activated - count.picked + 768)
    assert touched.moe == pytest.approx(2 * (count.activated + 768))  # the MoE activates the same number


def test_bytes_touched_by_a_batch_match_a_simulation():
    """Expected distinct rows against drawing rows at random."""
    memory = dataclasses.replace(SMALL_MEMORY, num_heads=1, topk=4)
    fields, batch = SMALL, 10
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(2000, batch, 36, generator=generator).topk(4).indices.flatten(1)
    distinct = sum(len(set(draw)) for draw in draws.tolist()) / 2000
    touched = bytes_touched_per_token(fields, memory, batch)
    assert touched.rows == pytest.approx(2 * distinct * 2 * 7 / batch, rel=0.01)
    assert bytes_touched_per_token(fields, None, batch).moe is None


def test_memory_reads_much_less_than_experts_in_a_batch():
    preset = PRESETS["umv2-1b-7b"]
    touched = bytes_touched_per_token(preset.model, preset.memory_config(), batch=64)
    assert touched.moe > 3 * touched.all


@pytest.mark.parametrize("changes, words", [
    ({"hidden_size": None}, "--hidden-size is missing; expected a positive integer"),
    ({"num_layers": -1}, "--num-layers is -1; expected a positive integer"),
    ({"num_query_groups": 3}, "--num-query-groups is 3; expected a divisor of --num-attention-heads"),
    ({"ffn_variant": "moe"}, "--num-experts is missing; expected a positive integer"),
    ({"ffn_variant": "none"}, "--ffn-variant is 'none'"),
    ({"kv_channels": None, "num_attention_heads": 6, "num_query_groups": 6}, "--hidden-size is 8; expected a multiple"),
])
def test_mistakes_name_the_flag(changes, words):
    with pytest.raises(ValueError) as caught:
        count_parameters({**SMALL, **changes}, SMALL_MEMORY)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_memory_sizes_are_checked():
    with pytest.raises(ValueError, match="--memory-value-dim is 5; expected a multiple"):
        count_parameters(SMALL, dataclasses.replace(SMALL_MEMORY, value_dim=5))
