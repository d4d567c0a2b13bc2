"""Flags come from the dataclasses: none is missing, each is described, wrong ones are told in one line."""

from __future__ import annotations

import pytest

from umv2_megatron.config import flags
from umv2_megatron.config.flags import parse_flags
from umv2_megatron.config.option_table import SECTIONS, names, option_table
from umv2_megatron.config.usage import UsageError

# What users of Megatron-LM type (docs/conventions), and ours.
NAMES_TEXT = """
--num-layers --hidden-size --ffn-hidden-size --num-attention-heads --group-query-attention --num-query-groups
--kv-channels --seq-length --max-position-embeddings --position-embedding-type --rotary-base --normalization
--norm-epsilon --swiglu --disable-bias-linear --untie-embeddings-and-output-weights --init-method-std --qk-layernorm
--transformer-impl --make-vocab-size-divisible-by
--micro-batch-size --global-batch-size --train-iters --train-samples --seed --lr --min-lr --lr-decay-style
--lr-decay-iters --lr-warmup-iters --lr-warmup-fraction --weight-decay --clip-grad --adam-beta1 --adam-beta2 --adam-eps
--exit-interval --exit-duration-in-mins --exit-signal-handler --deterministic-mode
--bf16 --fp8-format --fp8-recipe --fp8-param-gather --first-last-layers-bf16 --recompute-granularity
--recompute-method --recompute-num-layers --recompute-modules
--tensor-model-parallel-size --pipeline-model-parallel-size --num-layers-per-virtual-pipeline-stage
--context-parallel-size --expert-model-parallel-size --sequence-parallel --use-distributed-optimizer
--overlap-grad-reduce --overlap-param-gather --distributed-timeout-minutes
--data-path --train-data-path --valid-data-path --test-data-path --split --data-cache-path --mock-data --num-workers
--tokenizer-type --tokenizer-model --vocab-size --eod-mask-loss
--save --load --save-interval --save-retain-interval --ckpt-format --finetune --ckpt-step
--use-checkpoint-args --no-load-optim --no-load-rng --override-opt-param-scheduler --eval-interval --eval-iters
--skip-train
--log-interval --tensorboard-dir --log-throughput --log-params-norm --log-num-zeros-in-grad
--log-memory-to-tensorboard --wandb-project --wandb-exp-name --wandb-save-dir --profile --profile-step-start
--profile-step-end --profile-ranks --use-pytorch-profiler
--memory-num-keys --memory-key-dim --memory-value-dim --memory-pre-value-dim --memory-topk --memory-num-heads
--memory-tucker-rank --memory-num-cores --memory-value-expansion --memory-key-expansion --memory-layer-freq
--memory-sharing --memory-sharing-size --memory-value-lr-mult --memory-value-lr-decay-iters
--memory-balance-loss-coeff --memory-tucker-penalty-coeff --memory-init --memory-parallel-size --memory-parallel-mode
--memory-log-interval --model-preset --ffn-variant --config
"""

def known_names() -> set[str]:
    return {"--" + name for name in [*names(), "model-preset", "config"]}


@pytest.mark.parametrize("name", NAMES_TEXT.split())
def test_names_that_users_know(name):
    assert name in known_names()


def test_no_name_belongs_to_two_options():
    all_names = [name for made in option_table().values() for name in (*made.flags, *made.switches)]
    assert len(all_names) == len(set(all_names))


def test_every_option_is_described():
    assert [made.key for made in option_table().values() if not made.help] == []


def test_help_lists_every_option_under_its_group():
    text = flags.build_parser("program", "").format_help()
    for made in option_table().values():
        name = next(iter(made.flags or made.switches))
        assert f"--{name}" in text, name
    for section in SECTIONS.values():
        assert f"\n{section}:\n" in text
    for made in option_table().values():
        body = text.split(f"\n{made.section}:\n")[1]
        following = [text.split(f"\n{made.section}:\n")[1].find(f"\n{s}:\n") for s in SECTIONS.values()]
        end = min((position for position in following if position >= 0), default=len(body))
        assert f"--{next(iter(made.flags or made.switches))}" in body[:end]


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--num-layers", "7"], {"num_layers": 7}),
        (["--lr=3e-4"], {"lr": 3e-4}),
        (["--bf16"], {"bf16": True}),
        (["--no-swiglu"], {"swiglu": False}),
        (["--disable-bias-linear"], {"add_bias_linear": False}),
        (["--swiglu", "--no-swiglu"], {"swiglu": False}),
        (["--norm-epsilon", "1e-6"], {"layernorm_epsilon": 1e-6}),
        (["--fp8-format", "hybrid"], {"fp8": "hybrid"}),
        (["--data-path", "0.3", "a", "0.7", "b"], {"data_path": ["0.3", "a", "0.7", "b"]}),
        (["--memory-layer-freq", "[1,0]*2"], {"memory_layer_freq": "[1,0]*2"}),
        (["--recompute-modules", "core_attn", "mlp"], {"recompute_modules": ["core_attn", "mlp"]}),
        (["--no-load-optim"], {"no_load_optim": True}),
        (["--accumulate-allreduce-grads-in-fp32"], {"grad_reduce_in_fp32": True}),
        (["--attention-backend", "unfused"], {"attention_backend": "unfused"}),
    ],
)
def test_values(argv, expected):
    assert parse_flags(argv, "program", "")[0] == expected


@pytest.mark.parametrize(
    "argv, told",
    [
        (["--num-layer", "3"], ["--num-layer", "did you mean --num-layers?"]),
        (["--hiden-size=3"], ["--hiden-size", "did you mean --hidden-size?"]),
        (["--xyzzyxyzzy"], ["--xyzzyxyzzy", "--help"]),
        (["--num-layers", "two"], ["--num-layers", "'two'", "an integer"]),
        (["--num-layers", "2.5"], ["--num-layers", "'2.5'", "an integer"]),
        (["--lr", "nan"], ["--lr", "'nan'", "a number"]),
        (["--lr", "inf"], ["--lr", "'inf'", "a number"]),
        (["--lr"], ["--lr", "expected one argument"]),
        (["--moe-aux-loss-coeff", "nan"], ["--moe-aux-loss-coeff", "'nan'", "a list"]),
        (["--moe-aux-loss-coeff", "[0.1, .inf]"], ["--moe-aux-loss-coeff", "[0.1, .inf]"]),
        (["--moe-aux-loss-coeff", "{a: 1}"], ["--moe-aux-loss-coeff", "a list"]),
        (["--window-size", "[2.5, 0]"], ["--window-size", "[2.5, 0]"]),
        (["--no-rope-freq", "true"], ["--no-rope-freq", "'true'"]),
        (["--cp-comm-type", "1"], ["--cp-comm-type", "'1'"]),
        (["--bf16", "true"], ["'true'"]),
        (["--memory-sharing", "rings"], ["--memory-sharing", "'rings'", "ring, noring"]),
        (["--position-embedding-type", "alibi"], ["--position-embedding-type", "'alibi'", "rope"]),
        (["--moe-layer-freq", "2"], ["--moe-layer-freq of Megatron-LM is not supported"]),
        (["--tp-comm-overlap"], ["--tp-comm-overlap of Megatron-LM", "--sequence-parallel"]),
        (["--cuda-graph-scope", "attn"], ["--cuda-graph-scope of Megatron-LM", "--cuda-graph-impl local"]),
        (["--decrease-batch-size-if-needed"], ["--decrease-batch-size-if-needed of", "--global-batch-size"]),
        (["--rampup-batch-size", "32", "x"], ["--rampup-batch-size is 'x'", "an integer"]),
        (["--fp16"], ["--fp16 of Megatron-LM is not supported", "--bf16"]),
        (["--hidden-dropout", "1.5"], ["--hidden-dropout is 1.5; expected a number of at least 0 and below 1"]),
        (["--init-method-std", "-1"], ["--init-method-std is -1; expected a number above 0"]),
        (["--seed", "99999999999999999999"], ["--seed", "at most"]),
        (["--moe-aux-loss-coeff", "[0.1, -1]"], ["--moe-aux-loss-coeff is [0.1, -1]", "at least 0"]),
        (["--optimizer", "sgd"], ["--optimizer", "'sgd'"]),
        (["stray"], ["'stray'"]),
    ],
)
def test_one_line_errors(argv, told):
    with pytest.raises(UsageError) as caught:
        parse_flags(argv, "program", "")
    assert "\n" not in str(caught.value)
    for part in told:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "mapping, expected",
    [
        ({"num-layers": 3, "hidden_size": 8}, {"num_layers": 3, "hidden_size": 8}),
        ({"train-iters": 1e3}, {"train_iters": 1000}),  # YAML reads 1.0e+3 as a float
        ({"disable_bias_linear": True}, {"add_bias_linear": False}),
        ({"no-swiglu": True, "bf16": False}, {"swiglu": False, "bf16": False}),
        ({"data_path": ["a", "b"]}, {"data_path": ["a", "b"]}),
        ({"data_path": "a"}, {"data_path": ["a"]}),
        ({"eval-interval": None}, {"eval_interval": None}),
        ({"lr": 1}, {"lr": 1.0}),
        ({"moe-aux-loss-coeff": "1e-3"}, {"moe_aux_loss_coeff": 1e-3}),  # a text to YAML, which wants a dot
        ({"moe-aux-loss-coeff": [1e-5, 0]}, {"moe_aux_loss_coeff": [1e-5, 0.0]}),
        ({"window-size": [4, -1], "cp-comm-type": ["p2p", "a2a"]},
         {"window_size": [4, -1], "cp_comm_type": ["p2p", "a2a"]}),
    ],
)
def test_mappings(mapping, expected):
    assert flags.read_mapping(mapping, "file") == expected


@pytest.mark.parametrize(
    "mapping, told",
    [
        ({"num-layer": 3}, ["x.yaml", "num-layer", "--num-layers"]),
        ({"bf16": "yes please"}, ["x.yaml: bf16", "true or false"]),
        ({"micro-batch-size": None}, ["x.yaml: micro-batch-size", "an integer"]),
        ({"num-layers": True}, ["x.yaml: num-layers", "an integer"]),
        ({"num-layers": [1, 2]}, ["x.yaml: num-layers", "an integer"]),
        ({"lr": [1e-3]}, ["x.yaml: lr", "a number"]),
        ({"lr": float("nan")}, ["x.yaml: lr", "a number"]),
        ({"train-iters": 2.5}, ["x.yaml: train-iters", "an integer"]),
    ],
)
def test_errors_in_files_name_the_file(mapping, told):
    with pytest.raises(UsageError) as caught:
        flags.read_mapping(mapping, "x.yaml")
    for part in told:
        assert part in str(caught.value)
