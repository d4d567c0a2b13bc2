"""Presets: sizes that work, counts that their names promise, shapes that can be split, and flags that exist."""

import pytest

from umv2_megatron.config.presets import PRESETS, find_preset
from umv2_megatron.config.variants import FFN_VARIANTS, has_memory
from umv2_megatron.planning import count_parameters, flops_per_token

FAMILY_3M = {f"{variant}-3m" for variant in FFN_VARIANTS}
REQUIRED = {
    *FAMILY_3M,
    "ultramem-227m-1.2b",
    "memory-plus-227m-1.2b",
    "olmoe-227m-1.2b",
    "umv2-tiny",
    "umv2-8m",
    "umv2-227m-1.2b",
    "umv2-430m-5b",
    "umv2-500m-6b",
    "umv2-1b-7b",
    "umv2-2.5b-25b",
    "umv2-2.5b-60b-top768",
    "umv2-2.5b-120b-top256",
}


def test_all_required_presets_exist():
    assert set(PRESETS) >= REQUIRED
    assert all(name == preset.name for name, preset in PRESETS.items())


@pytest.mark.parametrize("name", PRESETS)
def test_sizes_are_valid(name):
    preset = PRESETS[name]
    if has_memory(preset.variant):
        preset.memory_config().validate(preset.model["hidden_size"], preset.model["num_layers"])
    assert preset.description and preset.source
    assert preset.model["kv_channels"] * preset.model["num_attention_heads"] == preset.model["hidden_size"]


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.expected])
def test_counts_are_within_three_percent_of_what_is_stated(name):
    preset = PRESETS[name]
    count, expected = count_parameters(preset.model, preset.memory_config()), preset.expected
    activated = count.activated if expected.embeddings_in_activated else count.activated_without_embeddings
    assert activated == pytest.approx(expected.activated, rel=0.03)
    if expected.total is not None:
        assert count.total == pytest.approx(expected.total, rel=0.03)


def test_the_3m_family_costs_the_same():
    """Activated FLOPs per token within 1%, and total parameters too where there is anything sparse."""
    models = {name: (PRESETS[name].model, PRESETS[name].memory_config()) for name in FAMILY_3M}
    wanted = flops_per_token(*models["umv2-3m"]).forward, count_parameters(*models["umv2-3m"]).total
    for name, (model, memory) in models.items():
        assert model["ffn_variant"] == name.removesuffix("-3m")
        assert flops_per_token(model, memory).forward == pytest.approx(wanted[0], rel=0.01), name
        if name != "dense-3m":
            assert count_parameters(model, memory).total == pytest.approx(wanted[1], rel=0.01), name


def test_published_sizes_are_kept():
    """Table 10 and text of arXiv 2508.18756; N of 1B/7B and 500M/6B is changed, as their descriptions say."""

    def sizes(name, *memory):
        preset = PRESETS[name]
        return [preset.memory[key] for key in memory]

    keys = ("num_keys", "key_dim", "topk", "value_dim", "pre_value_dim")
    assert sizes("umv2-227m-1.2b", *keys) == [360, 192, 32, 192, 192]
    assert sizes("umv2-1b-7b", *keys[1:]) == [512, 128, 768, 384]
    assert sizes("umv2-500m-6b", *keys[1:]) == [524, 94, 216, 72]
    assert sizes("umv2-430m-5b", "num_keys", "topk", "value_dim", "pre_value_dim") == [558, 24, 288, 288]
    assert sizes("ultramem-227m-1.2b", *keys[:-1]) == [808, 192, 80, 384]
    assert PRESETS["memory-plus-227m-1.2b"].memory_config().scored_keys == 1138
    assert sizes("memory-plus-227m-1.2b", "key_dim", "topk") == [384, 80]
    assert PRESETS["umv2-2.5b-60b-top768"].memory["topk"] == 768
    assert PRESETS["umv2-2.5b-120b-top256"].memory["topk"] == 256
    for name, changed in (("umv2-1b-7b", "528"), ("umv2-500m-6b", "964")):
        assert changed in PRESETS[name].description


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("umv2-2.5b")])
def test_large_models_can_be_split(name):
    preset = PRESETS[name]
    assert preset.model["num_layers"] % 8 == 0
    assert preset.model["num_attention_heads"] % 8 == 0 and preset.model["num_query_groups"] % 8 == 0
    assert preset.model["ffn_hidden_size"] % 128 == 0
    for size in (preset.memory["value_dim"], preset.memory["pre_value_dim"], preset.memory["num_keys"] ** 2):
        assert size % 64 == 0
    assert preset.memory["value_dim"] == 3 * preset.memory["pre_value_dim"]


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items()
                                  if preset.source == "our choice" and preset.variant == "umv2"])
def test_our_choices_keep_memory_near_17_percent_of_the_block(name):
    preset = PRESETS[name]
    share = flops_per_token(preset.model, preset.memory_config()).memory_share
    assert 0.15 < share < 0.21


def test_flags_merge_both_groups_and_an_unknown_name_is_refused():
    flags = find_preset("umv2-8m").flags()
    assert flags["memory_num_keys"] == 96 and flags["hidden_size"] == 256
    with pytest.raises(ValueError, match="--model-preset is 'umv2-9m'; expected one of umv2-tiny"):
        find_preset("umv2-9m")


@pytest.mark.parametrize("name", PRESETS)
def test_every_field_is_a_flag(name):
    flags = pytest.importorskip("umv2_megatron.config.flags")
    flags.read_mapping(PRESETS[name].flags(), name)
