"""--ffn-variant: the switches of each member of the family, who wins over whom, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest

from umv2_megatron.parallel import cpu_platform

cpu_platform.install()

from umv2_megatron.config.flags import UsageError, option_table  # noqa: E402
from umv2_megatron.config.memory_config import MemoryConfig  # noqa: E402
from umv2_megatron.config.resolve import from_layers, resolve  # noqa: E402
from umv2_megatron.config.run_config import RunConfig  # noqa: E402
from umv2_megatron.config.variants import NO_EXPERTS  # noqa: E402

TINY = ["--model-preset", "umv2-tiny", "--train-iters", "10", "--mock-data", "--tokenizer-type", "NullTokenizer"]
PUBLISHED = ["--model-preset", "umv2-227m-1.2b", "--train-iters", "10", "--mock-data"]


def run(*argv: str, base: list[str] = TINY, world_size: int = 1) -> RunConfig:
    return resolve([*base, *argv], world_size)


def blocks(memory: MemoryConfig, num_layers: int) -> list[int]:
    return [block for block, here in enumerate(memory.memory_layers(num_layers)) if here]


def test_switches_of_the_variants():
    v1 = run("--ffn-variant", "ultramem", base=PUBLISHED).memory
    assert (v1.query_mode, v1.key_expansion, v1.num_blocks, v1.pre_value_dim, v1.num_heads) == ("shared", 2, 4, 0, 2)
    assert blocks(v1, 20) == [2, 6, 10, 14] and v1.read_delay == 3 and v1.sharing == "none"
    plus = run("--ffn-variant", "memory-plus", base=PUBLISHED).memory
    assert (plus.scoring, plus.score_normalization, plus.query_mode, plus.gate) == (
        "additive", "softmax", "per_head", "silu",
    )  # fmt: skip
    assert blocks(plus, 20) == [4, 8, 12, 16] and (plus.sharing, plus.sharing_size) == ("block", 4)
    assert plus.value_lr == 1e-3 and plus.num_heads == 2 and not plus.has_pre_values
    pkm = run("--ffn-variant", "pkm", base=PUBLISHED).memory
    assert pkm == dataclasses.replace(plus, gate="none")
    peer = run("--ffn-variant", "peer", base=PUBLISHED).memory
    assert peer.pre_value_dim == peer.value_dim == 768 and peer.pre_value_activation == "gelu" and peer.num_heads == 8
    assert not peer.has_pre_projection and peer.value_expansion == "none" and peer.gate == "none"
    assert peer.sharing == "none" and peer.value_lr is None


def test_engram_and_back():
    engram = run("--ffn-variant", "engram", base=PUBLISHED).memory
    assert (engram.scoring, engram.num_heads, engram.topk, engram.value_dim) == ("ngram", 16, 1, 48)
    assert blocks(engram, 20) == [0, 9] and engram.num_blocks == 16 and engram.num_keys == 360
    assert (engram.value_lr_mult, engram.value_lr_decay_iters, engram.value_weight_decay) == (5.0, 0, 0.0)
    assert run("--ffn-variant", "engram", "--memory-num-heads", "8", base=PUBLISHED).memory.value_dim == 96
    constant = run("--ffn-variant", "engram", "--memory-value-lr", "1e-3", base=PUBLISHED).memory
    assert (constant.value_lr, constant.value_lr_mult, constant.value_lr_decay_iters) == (1e-3, 4.0, None)
    small = ["--model-preset", "engram-3m", "--train-iters", "10", "--mock-data", "--tokenizer-type", "NullTokenizer"]
    assert blocks(run(base=small).memory, 8) == [0, 3]
    back = run("--ffn-variant", "memory-plus", base=small).memory
    assert back.scoring == "additive" and back.value_weight_decay is None and back.value_lr == 1e-3


def test_settings_of_ngrams_are_refused_elsewhere_and_layouts_without_neighbours_too():
    for argv, told in (
        (["--memory-ngram-size", "2"], "--memory-ngram-size is 2; expected no value without --memory-scoring ngram"),
        (
            ["--ffn-variant", "engram", "--memory-num-keys", "30", "--context-parallel-size", "2"],
            "--context-parallel-size is 2; expected 1 with --memory-scoring ngram",
        ),
        (
            ["--ffn-variant", "engram", "--memory-sharing", "block"],
            "--memory-sharing is block; expected none when --memory-scoring is ngram",
        ),
    ):
        with pytest.raises(UsageError) as caught:
            run(*argv, world_size=2)
        assert told in str(caught.value)


def test_ngram_layers_beside_others_are_a_family_of_their_own():
    alone = run("--memory-seed", "9")
    assert alone.families == [alone.memory] and alone.ngrams is None and alone.hashing is None
    both = run("--memory-seed", "9", "--engram-layer-freq", "2", "--memory-parallel-size", "2", world_size=2)
    assert both.families == [both.memory, both.ngrams] and both.hashing is both.ngrams
    ngrams = both.ngrams
    assert ngrams.scoring == "ngram" and ngrams.seed != 9 and ngrams.parallel_size == 2 and blocks(ngrams, 4) == [0, 2]
    assert (ngrams.num_keys, ngrams.num_heads, ngrams.value_dim, ngrams.topk) == (128, 16, 4, 1)
    assert (ngrams.value_lr_mult, ngrams.value_lr_decay_iters, ngrams.value_weight_decay) == (5.0, 0, 0.0)
    assert both.memory == dataclasses.replace(alone.memory, parallel_size=2)
    given = {"engram_layer_freq": "2", "engram_num_keys": 40}
    layers = [("checkpoint", {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, **given})]
    for variant in ("dense", "moe", "engram"):
        made = from_layers([*layers, ("flag", {"ffn_variant": variant})], 1, for_training=False)
        assert made.ngrams is None and made.values["engram_num_keys"] == 128
        off = {"ffn_variant": variant, "engram_layer_freq": None}
        assert from_layers([*layers, ("file", off)], 1, for_training=False).values["engram_num_keys"] == 128
    assert from_layers([*layers, ("file", {"engram_layer_freq": None})], 1, for_training=False).ngrams is None


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--engram-num-keys", "50"], "--engram-num-keys is 50; expected no value without --engram-layer-freq"),
        (["--engram-layer-freq", "[1,0]"], "--engram-layer-freq is '[1,0]'; expected a positive integer or a list of"),
        (["--engram-layer-freq", "[0]*4"], "--engram-layer-freq is [0]*4; expected a pattern with at least one"),
        (["--engram-layer-freq", "2", "--engram-num-heads", "5"], "--engram-num-heads is 5; expected a multiple of 2"),
        (["--engram-layer-freq", "2", "--engram-num-keys", "3"], "--engram-num-keys is 3; expected so many that N*N"),
        (["--engram-layer-freq", "2", "--engram-num-keys", "0"], "--engram-num-keys is 0; expected an integer of at"),
        (["--engram-layer-freq", "2", "--ffn-variant", "dense"], "--engram-layer-freq is 2; expected no value with "),
        (["--engram-layer-freq", "2", "--ffn-variant", "engram"], "whose memory layers are n-gram layers"),
        (["--engram-layer-freq", "2", "--context-parallel-size", "2"], "expected 1 with --engram-layer-freq: the"),
        (["--engram-layer-freq", "2", "--cuda-graph-impl", "local"], "--engram-layer-freq is 2; expected no value, "),
        (["--engram-layer-freq", "2", "--engram-value-dim", "3", "--memory-parallel-size", "2"],
         "--engram-value-dim is 3; expected a multiple of --memory-parallel-size (2)"),
        (["--engram-layer-freq", "2", "--trainable", "rows", "--trainable-rows", "x"], "--trainable is rows; expected"),
        (["--engram-layer-freq", "2", "--reset-attention-mask", "--create-attention-mask-in-dataloader"],
         "off with --reset-attention-mask and --engram-layer-freq"),
    ],
)  # fmt: skip
def test_ngram_layers_beside_others_that_cannot_be_are_refused(argv, told):
    with pytest.raises(UsageError) as caught:
        run(*argv, world_size=2)
    assert told in str(caught.value)


def test_sizes_stay_those_of_the_preset():
    memory = run("--ffn-variant", "memory-plus", base=PUBLISHED).memory
    assert (memory.num_keys, memory.key_dim, memory.topk, memory.value_dim) == (360, 192, 32, 192)


def test_flags_and_files_win_over_the_variant_and_it_over_another_variants_preset(tmp_path):
    assert run("--ffn-variant", "memory-plus", "--memory-num-heads", "3").memory.num_heads == 3
    file = tmp_path / "run.yaml"
    file.write_text("memory-num-heads: 5\n")
    found = run("--ffn-variant", "memory-plus", "--config", str(file))
    assert found.memory.num_heads == 5 and found.sources["memory_gate"] == "variant memory-plus"
    back = run("--ffn-variant", "umv2", base=["--model-preset", "memory-plus-3m", *TINY[2:]])
    assert back.memory.scoring == "tucker" and back.memory.gate == "none" and back.memory.has_pre_values
    assert back.memory.layer_freq == "1" and back.memory.value_lr is None and back.memory.num_keys == 173
    named = run("--ffn-variant", "memory-plus", base=["--model-preset", "memory-plus-3m", *TINY[2:]])
    assert named.memory == run(base=["--model-preset", "memory-plus-3m", *TINY[2:]]).memory


def test_what_follows_from_what_the_user_gave():
    few = run("--ffn-variant", "memory-plus", "--memory-layer-freq", "[0,1,1,1]").memory
    assert few.sharing_size == 3
    late = run("--ffn-variant", "ultramem", "--memory-layer-freq", "[0,0,1,0]").memory
    assert late.read_delay == 1
    assert run("--ffn-variant", "ultramem", "--memory-read-delay", "0").memory.read_delay == 0
    assert run("--ffn-variant", "pkm", "--memory-value-lr-mult", "2").memory.value_lr is None
    moe = run("--ffn-variant", "moe")
    assert (moe.num_moe_experts, moe.moe_router_topk, moe.moe_ffn_hidden_size) == (64, 8, 16)
    assert moe.moe_aux_loss_coeff == 0.01 and moe.moe_router_dtype == "fp32"
    own = run("--ffn-variant", "moe", "--num-experts", "4")
    assert (own.moe_router_topk, own.moe_ffn_hidden_size, own.moe_aux_loss_coeff) == (2, None, 0.0)
    assert own.moe_router_dtype == "fp32"
    assert run("--ffn-variant", "moe", "--moe-router-dtype", "fp64").moe_router_dtype == "fp64"


def test_a_preset_s_experts_go_with_another_variant():
    base = ["--model-preset", "moe-3m", *TINY[2:]]
    for variant in ("dense", "umv2"):
        found = run("--ffn-variant", variant, base=base)
        assert not found.has_experts and found.sources["num_moe_experts"] == f"variant {variant}"
    with pytest.raises(UsageError, match="--num-experts is 4;"):
        run("--ffn-variant", "dense", "--num-experts", "4", base=base)
    assert all(option_table()[key].default == value for key, value in NO_EXPERTS.items())


@pytest.mark.parametrize(
    ("argv", "world_size", "told"),
    [
        (["--ffn-variant", "pkm", "--memory-tucker-rank", "2"], 1, ["--memory-tucker-rank is 2", "additive"]),
        (["--memory-scoring", "additive"], 1, ["--memory-tucker-rank is 2", "additive"]),
        (["--memory-score-normalization", "softmax"], 1, ["--memory-score-normalization is softmax", "tucker"]),
        (["--memory-qk-norm", "none"], 1, ["--memory-qk-norm is none", "tucker"]),
        (["--memory-query-mode", "per_head"], 1, ["--memory-query-mode is per_head", "tucker"]),
        (["--ffn-variant", "pkm", "--memory-query-mode", "per_rank"], 1, ["--memory-query-mode is per_rank"]),
        (["--ffn-variant", "pkm", "--memory-tucker-penalty-coeff", "1"], 1, ["--memory-tucker-penalty-coeff is 1.0"]),
        (["--ffn-variant", "peer", "--memory-pre-value-dim", "8"], 1, ["--memory-pre-value-dim is 8", "64"]),
        (["--memory-value-lr", "0"], 1, ["--memory-value-lr is 0"]),
        (["--memory-value-weight-decay", "-1"], 1, ["--memory-value-weight-decay is -1"]),
        (["--memory-value-lr", "1e-3", "--memory-value-lr-mult", "2"], 1, ["--memory-value-lr-mult is 2"]),
        (["--memory-read-delay", "1"], 1, ["--memory-read-delay is 1", "at most 0"]),
        (["--memory-read-delay", "-1"], 1, ["--memory-read-delay is -1"]),
        (["--ffn-variant", "ultramem", "--pipeline-model-parallel-size", "2"], 2,
         ["--memory-read-delay is 3", "block 0", "--pipeline-model-parallel-size"]),
        (["--ffn-variant", "ultramem", "--recompute-granularity", "full", "--recompute-method", "uniform",
          "--recompute-num-layers", "2"], 1, ["--memory-read-delay is 3", "--recompute-num-layers"]),
        (["--ffn-variant", "ultramem", "--recompute-granularity", "full", "--recompute-method", "block",
          "--recompute-num-layers", "1"], 1, ["--memory-read-delay is 3", "--recompute-num-layers"]),
        (["--ffn-variant", "ultramem", "--recompute-granularity", "selective", "--recompute-modules", "mlp"], 1,
         ["--memory-read-delay is 3", "mlp"]),
    ],
)  # fmt: skip
def test_refused_in_one_line(argv, world_size, told):
    with pytest.raises(UsageError) as caught:
        run(*argv, world_size=world_size)
    text = str(caught.value)
    assert "\n" not in text and all(part in text for part in told), text


def test_recomputed_together_is_allowed():
    full = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "4"]
    assert run("--ffn-variant", "ultramem", *full).memory.read_delay == 3


def test_settings_of_an_older_checkpoint_describe_the_same_model():
    values = dict(run().values)
    new = ("scoring", "score_normalization", "qk_norm", "gate", "pre_projection", "read_delay", "value_lr")
    new += ("value_weight_decay", "value_second_moment", "value_optimizer_offload")
    older = {key: value for key, value in values.items() if key.removeprefix("memory_") not in new}
    assert from_layers([("checkpoint", older)], 1).memory == run().memory
