"""Presets: sizes that work, counts that their names promise, shapes that can be split, flags that exist, and files that
are read as they are meant or not at all."""

import dataclasses

import pytest
import yaml

from umv2_megatron.config.presets import DIRECTORY, FAMILIES, PRESETS, find_preset, read_presets
from umv2_megatron.config.usage import UsageError
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
    "umv2-8m-first",
    "umv2-3m-first",
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


@pytest.mark.parametrize("name", ["umv2-3m", "umv2-8m"])
def test_rows_in_the_first_block_cost_the_same(name):
    """FLOPs within 0.1%, parameters and rows within 1%, and as many picks."""
    models = [PRESETS[each] for each in (name, f"{name}-first")]
    flops, total, rows, picks = zip(*(
        (flops_per_token(each.model, memory).blocks, count_parameters(each.model, memory).total,
         sum(layers) * memory.num_keys**2, sum(layers) * memory.num_heads * memory.topk)
        for each in models
        for memory in [each.memory_config()]
        for layers in [memory.memory_layers(each.model["num_layers"])]
    ))  # fmt: skip
    assert flops[1] == pytest.approx(flops[0], rel=1e-3)
    assert total[1] == pytest.approx(total[0], rel=0.01) and rows[1] == pytest.approx(rows[0], rel=0.01)
    assert picks[1] == picks[0]


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
                                  if preset.source == "our choice" and preset.variant == "umv2"
                                  and preset.memory["layer_freq"] == "1"])
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


def test_every_file_is_a_family():
    assert {path.name for path in DIRECTORY.iterdir()} == {f"{family}.yaml" for family in FAMILIES}


@pytest.fixture()
def family(tmp_path):
    """A file with one preset, as text, and a function that reads a changed one."""
    content = yaml.safe_load((DIRECTORY / "umv2.yaml").read_text(encoding="utf-8"))
    content["presets"] = {"umv2-8m": content["presets"]["umv2-8m"]}

    def read(old, new):
        text = yaml.safe_dump(content, sort_keys=False)
        assert text.count(old) == 1, text
        path = tmp_path / "mine.yaml"
        path.write_text(text.replace(old, new), encoding="utf-8")
        return read_presets([path])

    return read


def test_a_value_of_a_preset_is_over_that_of_its_family_and_an_integer_is_a_number(family):
    assert family("norm_epsilon: 1.0e-05", "norm_epsilon: 1") == {
        "umv2-8m": dataclasses.replace(
            PRESETS["umv2-8m"], model={**PRESETS["umv2-8m"].model, "norm_epsilon": 1.0}
        )
    }
    changed = family("hidden_size: 256\n", "hidden_size: 256\n      rotary_base: 500000\n")
    assert changed["umv2-8m"].model["rotary_base"] == 500000


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("hidden_size: 256\n", "hiden_size: 256\n", "model: unknown key 'hiden_size'; expected one of"),
        ("topk: 16", "top_k: 16", "memory: unknown key 'top_k'; expected one of num_keys, "),
        ("description:", "descripton:", "unknown key 'descripton'; expected one of description, source"),
        ("common:", "shared:", "mine.yaml: unknown key 'shared'; expected one of common, presets"),
        ("    source: our choice\n", "", "source is missing"),
        ("      hidden_size: 256\n", "", "model: hidden_size is missing"),
        ("      topk: 16\n", "", "memory: topk is missing"),
        ("      total: null\n", "", "expected: total is missing"),
        ("1.0e-05", "1e-5", "model: norm_epsilon is '1e-5'; expected a number (YAML takes 1e-5 for a"),
        ("8000000.0", "8e6", "expected: activated is '8e6'; expected a number"),
        ("total: null", "total: some", "expected: total is 'some'; expected a number (YAML"),
        ("hidden_dropout: 0.0", "hidden_dropout: .inf", "model: hidden_dropout is inf; expected a number"),
        ("hidden_size: 256\n", "hidden_size: 256.0\n", "model: hidden_size is 256.0; expected an integer"),
        ("swiglu: true", "swiglu: 1", "model: swiglu is 1; expected true or false"),
        ("topk: 16", "topk: true", "memory: topk is True; expected an integer"),
        ("layer_freq: '1'", "layer_freq: 1", "memory: layer_freq is 1; expected a text"),
        ("topk: 16", "topk: 16\n      topk: 17", "presets: umv2-8m: memory: topk is there twice, again in line"),
        ("  umv2-8m:\n", "  umv2-8m: {}\n  umv2-8m:\n", "presets: umv2-8m is there twice, again in line"),
        ("  umv2-8m:\n", "  8:\n", "a preset's name is 8; expected a text"),
        ("common:", "common: [", "not valid YAML: while parsing"),
    ],
)  # fmt: skip
def test_a_file_that_says_something_else_is_refused_in_one_sentence(family, tmp_path, old, new, told):
    with pytest.raises(UsageError) as caught:
        family(old, new)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "mine.yaml")) and told in message and "\n" not in message


def test_a_name_of_another_file_and_a_file_without_presets_are_refused(tmp_path):
    family = DIRECTORY / "bytes_3m.yaml"
    with pytest.raises(UsageError, match=r"bytes_3m.yaml: preset umv2-3m is in another file too; expected every name"):
        read_presets([family, family])
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    with pytest.raises(UsageError, match=r"empty.yaml is None; expected a mapping"):
        read_presets([empty])
    empty.write_text("common: {}")
    with pytest.raises(UsageError, match=r"empty.yaml: presets is missing"):
        read_presets([empty])
