"""tools/match.py: equal activated FLOPs and total parameters, the published baselines, and flags that can be pasted."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from umv2_megatron.parallel import cpu_platform

cpu_platform.install()

from umv2_megatron.commands import match as match_tool  # noqa: E402
from umv2_megatron.config.resolve import resolve  # noqa: E402
from umv2_megatron.config.variants import FFN_VARIANTS  # noqa: E402
from umv2_megatron.planning.matching import Model, completed, match  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]


def model(*argv: str) -> Model:
    return Model.of(resolve([*argv, "--transformer-impl", "local"], 1, for_training=False))


@pytest.mark.parametrize("variant", FFN_VARIANTS)
@pytest.mark.parametrize("preset", ["umv2-8m", "umv2-227m-1.2b", "moe-3m", "peer-3m"])
def test_within_one_percent(preset, variant):
    source = model("--model-preset", preset)
    found = match(source, variant).found
    assert found.variant == variant
    assert found.flops.forward == pytest.approx(source.flops.forward, rel=0.01)
    if variant != "dense":
        assert found.parameters.total == pytest.approx(source.parameters.total, rel=0.01)


def test_published_baselines_come_out():
    """Table 10 of arXiv 2508.18756, from its UltraMemV2 models: N and K of UltraMem and Memory+, OLMoE's experts."""
    source = model("--model-preset", "umv2-227m-1.2b")
    v1, plus = (match(source, variant).found.memory for variant in ("ultramem", "memory-plus"))
    assert v1.num_keys == pytest.approx(808, rel=0.005) and plus.scored_keys == pytest.approx(1138, rel=0.005)
    assert (v1.num_heads, v1.topk, v1.key_dim, v1.value_dim) == (2, 80, 192, 384)
    assert (plus.num_heads, plus.topk, plus.key_dim, plus.value_dim) == (2, 80, 384, 768)
    experts = match(model("--model-preset", "umv2-1b-7b"), "moe").found.values
    assert (experts["num_moe_experts"], experts["moe_router_topk"], experts["moe_ffn_hidden_size"]) == (64, 8, 1024)


def test_a_model_matches_itself():
    source = model("--model-preset", "umv2-8m")
    assert match(source, "umv2").found.memory == source.memory
    assert match(source, "umv2").flops_deviation == match(source, "umv2").total_deviation == 0


@pytest.mark.parametrize("variant", ["memory-plus", "peer", "moe"])
def test_printed_flags_make_the_model(variant, capsys):
    argv = ["--model-preset", "umv2-3m", "--memory-topk", "24"]
    keep = [] if variant == "moe" else ["--keep", "--memory-num-heads 3 --memory-stream"]
    shown, made = pasted(argv, ["--to", variant, *keep], capsys)
    assert made.flops.forward == shown["found"]["flops_per_token"]
    assert made.parameters.total == shown["found"]["total"]
    assert abs(shown["flops_deviation"]) <= 0.01 and abs(shown["total_deviation"]) <= 0.01
    assert shown["left_out"] == (["--memory-topk"] if variant == "moe" else [])
    if made.memory is not None:
        assert made.memory.num_heads == 3 and made.memory.stream


def pasted(argv: list[str], to: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], Model]:
    """What match.py shows, and the model of the first command with the flags shown added to it."""
    assert match_tool.main([*argv, *to, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    command = list(argv)
    for flag in shown["left_out"]:
        place = command.index(flag)
        del command[place : place + 2]
    return shown, model(*command, *shlex.split(shown["flags"]))


OWN_EXPERTS = ["--num-experts", "45", "--moe-router-topk", "8", "--moe-ffn-hidden-size", "68"]


@pytest.mark.parametrize(
    ("source", "to"),
    [
        ("umv2-3m --memory-num-heads 4", "ultramem"),
        ("umv2-3m --memory-pre-value-dim 32", "memory-plus"),
        ("umv2-3m --memory-layer-freq 2", "ultramem"),
        ("umv2-3m --memory-layer-freq 2 --memory-read-delay 1", "peer"),
        ("umv2-3m --memory-sharing ring", "pkm"),  # a size of 1 that does not follow the variant's once it is named
        ("umv2-3m --memory-tucker-rank 4 --memory-key-topk-cap 24", "memory-plus"),  # refused beside product keys
        ("umv2-3m --ffn-variant pkm --memory-num-heads 3", "umv2"),
        ("pkm-3m --memory-gate silu", "dense"),
        ("umv2-3m --memory-num-heads 4", "moe"),
        ("moe-3m --moe-shared-expert-intermediate-size 64", "moe"),
        ("moe-3m", "umv2"),
        ("moe-3m --window-size [127,0]", "dense"),  # a list that is one value
        ("umv2-3m --ffn-variant moe " + " ".join(OWN_EXPERTS), "ultramem"),
    ],
)
def test_flags_make_the_model_beside_those_of_the_source(source, to, capsys):
    shown, made = pasted(["--model-preset", *source.split()], ["--to", to], capsys)
    assert made.flops.forward == shown["found"]["flops_per_token"]
    assert made.parameters.total == shown["found"]["total"]
    figures = match_tool._figures(made)
    assert {key: figures[key] for key in shown["found"]} == shown["found"]
    assert ("--num-experts" in shown["left_out"]) == ("--num-experts" in source)


def test_experts_come_with_their_losses(capsys):
    shown, made = pasted(["--model-preset", "umv2-3m"], ["--to", "moe"], capsys)
    losses = ("moe_aux_loss_coeff", "moe_z_loss_coeff")
    preset = model("--model-preset", "moe-3m").values
    assert {key: made.values[key] for key in losses} == {key: preset[key] for key in losses}
    _, own = pasted(["--model-preset", "umv2-3m"], ["--to", "moe", "--keep", "--moe-aux-loss-coeff 0.02"], capsys)
    assert own.values["moe_aux_loss_coeff"] == 0.02
    _, own = pasted(["--model-preset", "moe-3m", "--moe-aux-loss-coeff", "0.02"], ["--to", "moe"], capsys)
    assert own.values["moe_aux_loss_coeff"] == 0.02


@pytest.mark.parametrize(("to", "keep"), [("moe", "--num-experts 32"), ("pkm", "--memory-num-keys 64")])
def test_what_is_solved_for_cannot_be_kept(to, keep, capsys):
    shown, made = pasted(["--model-preset", "umv2-3m"], ["--to", to, "--keep", keep], capsys)
    assert made.parameters.total == shown["found"]["total"]
    assert shown["flags"] == pasted(["--model-preset", "umv2-3m"], ["--to", to], capsys)[0]["flags"]


def test_how_tables_are_trained_stays_with_the_source(capsys):
    _, made = pasted(["--model-preset", "umv2-3m", "--memory-value-lr-mult", "8"], ["--to", "memory-plus"], capsys)
    assert made.values["memory_value_lr_mult"] == 8 and made.values["memory_value_lr"] is None


def test_flags_that_cannot_make_the_model_are_not_returned():
    found = match(model("--model-preset", "umv2-3m"), "pkm")
    stays = resolve(["--model-preset", "umv2-3m", "--transformer-impl", "local"], 1, for_training=False)
    with pytest.raises(ValueError, match="--to pkm: with the first model's flags, those found make a model of 12,586,"):
        completed(found, lambda added: stays)


def test_table_names_flags_to_leave_out(capsys):
    assert match_tool.main(["--model-preset", "umv2-3m", "--ffn-variant", "moe", *OWN_EXPERTS, "--to", "dense"]) == 0
    assert "without its --num-experts, --moe-router-topk, --moe-ffn-hidden-size:" in capsys.readouterr().out


def test_ngram_layers_beside_others_are_kept_and_told(capsys):
    kept = "--engram-layer-freq [1,0,0,1,0,0,0,0] --engram-num-keys 492"
    assert match_tool.main(["--model-preset", "umv2-3m", "--to", "umv2", "--keep", kept, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["found"]["ngram_layers"], told["found"]["ngram_num_keys"]) == (2, 492)
    assert "ngram_layers" not in told["source"]
    rows = 8 * told["found"]["memory_num_keys"] ** 2
    assert told["found"]["tables"] == rows * (24 + 72) + 2 * 492**2 * (160 // 16)


def test_table(capsys):
    assert match_tool.main(["--model-preset", "umv2-227m-1.2b", "--to", "ultramem"]) == 0
    out = capsys.readouterr().out
    assert "574,671,104" in out and "--ffn-variant ultramem --ffn-hidden-size 2624 --memory-num-keys 806" in out


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--model-preset", "umv2-8m"], "--to"),
        (["--model-preset", "umv2-8m", "--to", "rnn"], "--to is 'rnn'"),
        (["--model-preset", "dense-3m", "--to", "umv2"], "--total"),
        (["--model-preset", "umv2-8m", "--to", "pkm", "--tolerance", "x"], "--tolerance is 'x'"),
        (["--model-preset", "umv2-8m", "--to", "pkm", "--keep", "--ffn-variant pkm"], "--keep"),
        (["--model-preset", "umv2-8m", "--to", "pkm", "--keep", "--memory-init 'paper"], "--keep is"),
        (["--model-preset", "umv2-8m", "--to", "pkm", "--keep", "--memory-tucker-rank 2"], "--memory-tucker-rank is 2"),
        (["--model-preset", "umv2-8m", "--to", "moe", "--tolerance", "1e-6"], "no sizes come within 0.0001%; the near"),
        (["--model-preset", "umv2-3m", "--to", "dense", "--total", "1e7"], "--total is 10000000; expected no value"),
        (
            ["--model-preset", "umv2-3m", "--memory-tucker-penalty-coeff", "1", "--to", "pkm"],
            "--to pkm: its flags do not go with the first model's: --memory-tucker-penalty-coeff is 1.0",
        ),
        # of 8, 16 and 32 active experts the last are not the nearest
        (["--model-preset", "umv2-3m", "--to", "moe", "--tolerance", "1e-6"], "0.29% fewer FLOPs than the 6.73 mill"),
    ],
)
def test_mistakes_take_one_line(argv, told, capsys):
    assert match_tool.main(argv) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1


def test_a_dense_source_can_be_given_a_total():
    source = model("--model-preset", "dense-3m")
    found = match(source, "umv2", total=12_586_976)
    assert found.found.parameters.total == pytest.approx(12_586_976, rel=0.01)
