"""Where values come from and which wins, what is derived, what is refused and how quickly."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from megatron.core.transformer.enums import AttnBackend

from umv2_megatron.config.flags import UsageError
from umv2_megatron.config.presets import PRESETS
from umv2_megatron.config.resolve import resolve

ROOT = Path(__file__).resolve().parents[3]
TINY = ["--model-preset", "umv2-tiny", "--train-iters", "10", "--mock-data", "--tokenizer-type", "NullTokenizer"]
MOE = ["--ffn-variant", "moe", "--num-experts", "4"]


def refusal(*argv: str, world_size: int = 1) -> str:
    with pytest.raises(UsageError) as caught:
        resolve([*TINY, *argv], world_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_default_preset_file_flag(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("num-layers: 6\nmemory_topk: 2\nlog-interval: 7\nno-swiglu: true\n")
    run = resolve([*TINY, "--config", str(file), "--num-layers", "8"])
    assert (run.num_layers, run.sources["num_layers"]) == (8, "flag")
    assert (run.memory.topk, run.sources["memory_topk"]) == (2, str(file))
    assert (run.hidden_size, run.sources["hidden_size"]) == (64, "preset umv2-tiny")
    assert run.model.swiglu is False and run.training.log_interval == 7
    assert run.training.eval_iters == 100 and "eval_iters" not in run.sources


def test_derived_values():
    run = resolve([*TINY, "--lr", "1e-3", "--micro-batch-size", "3", "--lr-warmup-fraction", "0.2"], world_size=2)
    assert run.min_lr == pytest.approx(1e-4)
    assert run.training.global_batch_size == run.global_batch_size == 6
    assert run.training.lr_warmup_iters == 2
    assert run.init_method_std == pytest.approx((2 / (5 * 64)) ** 0.5)
    assert run.transformer_impl == "local" or run.transformer_impl == "transformer_engine"
    assert resolve([*TINY, "--memory-init", "fixed"]).init_method_std == 0.02


def test_warmup_fraction_of_a_run_given_in_samples():
    argv = [*TINY[:2], *TINY[4:], "--train-samples", "80", "--global-batch-size", "8", "--lr-warmup-fraction", "0.5"]
    run = resolve(argv)
    assert run.train_iters == 10 and run.training.lr_warmup_iters == 5


def test_last_iteration_of_a_run_that_had_another_batch():
    in_samples = resolve([*TINY[:2], *TINY[4:], "--train-samples", "80", "--global-batch-size", "8"])
    assert [in_samples.last_iteration(at, at * 8) for at in (0, 3, 10)] == [10, 10, 10]
    assert in_samples.last_iteration(5, 5 * 4) == 5 + 60 // 8
    assert in_samples.last_iteration(5, 5 * 16) == in_samples.last_iteration(5, 5 * 20) == 5
    assert resolve([*TINY, "--global-batch-size", "8"]).last_iteration(5, 5 * 4) == 10


def test_megatron_configurations_follow_the_flags():
    run = resolve([*TINY, "--bf16", "--clip-grad", "0.5", "--overlap-grad-reduce", "--hidden-dropout", "0.1"])
    transformer = run.transformer_config()
    assert transformer.bf16 and transformer.params_dtype is torch.bfloat16
    assert transformer.hidden_dropout == 0.1 and transformer.gated_linear_unit and not transformer.add_bias_linear
    assert transformer.attention_backend is AttnBackend.auto
    assert resolve([*TINY, "--attention-backend", "unfused"]).transformer_config().attention_backend is (
        AttnBackend.unfused
    )
    assert run.optimizer_config().clip_grad == 0.5 and run.optimizer_config().bf16
    assert run.ddp_config().overlap_grad_reduce


@pytest.mark.parametrize("preset", PRESETS)
def test_saved_yaml_resolves_to_the_same_run(preset, tmp_path):
    argv = ["--model-preset", preset, "--train-iters", "50", "--lr", "2e-3"]
    if PRESETS[preset].variant not in ("moe", "dense"):
        argv += ["--memory-value-lr-mult", "3"]
    run = resolve([*argv, "--data-path", "0.5", "a", "0.5", "b", "--tokenizer-type", "NullTokenizer"])
    file = tmp_path / "config.yaml"
    file.write_text(run.to_yaml())
    again = resolve(["--config", str(file)])
    assert again.values == run.values
    assert yaml.safe_load(again.to_yaml()) == yaml.safe_load(run.to_yaml())
    file.write_text(re.sub(r"^\w+:", lambda key: key[0].replace("_", "-"), run.to_yaml(only_changed=True), flags=re.M))
    assert "eval-iters" not in file.read_text()
    assert resolve(["--config", str(file)]).values == run.values


def test_describe_names_every_setting_and_its_source():
    run = resolve(TINY)
    text = run.describe()
    for key in run.values:
        assert f"  {key} ." in text
    assert "(preset umv2-tiny)" in text and "(flag)" in text


def test_sizes_from_a_checkpoint_also_when_the_file_asks_for_them(tmp_path):
    asked = []

    def checkpoint_values(training):
        asked.append((training.load, training.ckpt_step, training.save))
        values = resolve([*TINY, "--num-layers", "12", "--lr", "9"]).values
        return training.load, {**values, "tensor_model_parallel_size": 4}

    file = tmp_path / "run.yaml"
    file.write_text(f"load: {tmp_path}\nuse-checkpoint-args: true\nckpt-step: 5\n")
    run = resolve([*TINY[2:], "--config", str(file), "--memory-topk", "3"], checkpoint_values=checkpoint_values)
    assert asked == [(str(tmp_path), 5, None)]
    assert (run.num_layers, run.memory.topk, run.lr, run.tensor_model_parallel_size) == (12, 3, 4e-4, 1)


def test_sizes_from_no_checkpoint():
    with pytest.raises(UsageError, match="--use-checkpoint-args is on; expected a checkpoint in --load or --save"):
        resolve([*TINY, "--use-checkpoint-args"], checkpoint_values=lambda training: None)


def test_a_files_fraction_gives_way_to_a_flag(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(resolve([*TINY, "--lr-warmup-fraction", "0.5", "--lr-warmup-init-fraction", "0.1"]).to_yaml())
    run = resolve(["--config", str(file)])
    assert (run.training.lr_warmup_iters, run.training.lr_warmup_init_fraction) == (5, 0.1)
    run = resolve(["--config", str(file), "--lr-warmup-iters", "3", "--lr-warmup-init", "1e-5"])
    assert (run.training.lr_warmup_iters, run.training.lr_warmup_init) == (3, 1e-5)
    assert run.training.lr_warmup_fraction is None and run.training.lr_warmup_init_fraction is None


def test_rates_at_the_ends_of_their_ranges():
    resolve([*TINY, "--lr", "1e-3", "--lr-warmup-init", "1e-3", "--decoupled-lr", "1e-3", "--decoupled-min-lr", "1e-3"])
    resolve([*TINY, "--lr-warmup-init-fraction", "1", "--decoupled-lr", "1e-5", "--decoupled-min-lr", "0"])
    resolve([*TINY, "--decoupled-lr", "1e-5", "--lr-decay-style", "constant"])


@pytest.mark.parametrize("flags, told", [
    (["--lr-decay-samples", "40", "--lr-decay-iters", "5"], ["--lr-decay-samples is 40", "--lr-decay-iters, not both"]),
    (["--lr-warmup-samples", "80"], ["--lr-warmup-samples is 80", "fewer than the 80 samples"]),
    (["--lr-warmup-samples", "8", "--lr-warmup-iters", "1"], ["--lr-warmup-iters, not both"]),
    (["--lr-warmup-samples", "8", "--lr-warmup-fraction", "0.1"], ["--lr-warmup-fraction, not both"]),
    (["--lr-decay-style", "WSD", "--lr-wsd-decay-samples", "81"], ["--lr-wsd-decay-samples is 81", "80 samples"]),
    (["--lr-wsd-decay-samples", "8"], ["--lr-wsd-decay-samples is 8", "only WSD's"]),
])  # fmt: skip
def test_schedules_in_samples_that_cannot_be(flags, told):
    argv = [*TINY[:2], *TINY[4:], "--train-samples", "80", "--global-batch-size", "8", *flags]
    with pytest.raises(UsageError) as error:
        resolve(argv)
    assert all(words in str(error.value) for words in told), error.value


def test_a_wsd_runs_file_serves_another_decay(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(resolve([*TINY, "--lr-decay-style", "WSD", "--lr-wsd-decay-iters", "4"]).to_yaml())
    assert resolve(["--config", str(file), "--lr-decay-style", "cosine"]).training.lr_decay_style == "cosine"


@pytest.mark.parametrize(
    "argv, world_size, told",
    [
        (["--num-layers", "0"], 1, ["--num-layers"]),
        (["--tensor-model-parallel-size", "0"], 1, ["--tensor-model-parallel-size", "0"]),
        (["--tensor-model-parallel-size", "2"], 1, ["--tensor-model-parallel-size 2", "1 ranks"]),
        (["--pipeline-model-parallel-size", "3"], 3, ["--pipeline-model-parallel-size", "--num-layers (4)"]),
        (["--num-query-groups", "3", "--group-query-attention"], 1, ["--num-query-groups is 3"]),
        (["--kv-channels", "0"], 1, ["--kv-channels is 0"]),
        (["--seq-length", "4096"], 1, ["--seq-length", "--max-position-embeddings (128)"]),
        (["--global-batch-size", "3"], 2, ["--global-batch-size is 3", "= 2"]),
        (["--global-batch-size", "0"], 1, ["--global-batch-size is 0"]),
        (["--micro-batch-size", "0"], 1, ["--micro-batch-size is 0"]),
        (["--train-samples", "5"], 1, ["--train-iters or --train-samples"]),
        (["--train-iters", "-3"], 1, ["--train-iters is -3"]),
        (["--eval-iters", "-1"], 1, ["--eval-iters is -1"]),
        (["--eval-interval", "0"], 1, ["--eval-interval is 0"]),
        (["--save-interval", "5"], 1, ["--save-interval", "--save"]),
        (["--lr-decay-samples", "50"], 1, ["--lr-decay-samples is 50", "--train-samples"]),
        (["--lr-warmup-samples", "50"], 1, ["--lr-warmup-samples is 50", "--train-samples"]),
        (["--start-weight-decay", "0.1"], 1, ["--start-weight-decay is 0.1", "--weight-decay-incr-style"]),
        (["--weight-decay-incr-style", "linear", "--start-weight-decay", "0.1"], 1,
         ["--end-weight-decay is None", "a number with --weight-decay-incr-style linear"]),
        (["--weight-decay-incr-style", "linear", "--start-weight-decay", "0.2", "--end-weight-decay", "0.1"], 1,
         ["--end-weight-decay is 0.1", "at least --start-weight-decay (0.2)"]),
        (["--weight-decay-incr-style", "linear", "--start-weight-decay", "0", "--end-weight-decay", "0.1",
          "--weight-decay", "0.1"], 1, ["--weight-decay is 0.1", "no value with --weight-decay-incr-style linear"]),
        (["--lr", "0"], 1, ["--lr is 0"]),
        (["--min-lr", "1"], 1, ["--lr", "--min-lr (1.0)"]),
        (["--lr-warmup-iters", "10"], 1, ["--lr-warmup-iters is 10", "10 iterations"]),
        (["--lr-warmup-fraction", "1.5"], 1, ["--lr-warmup-fraction is 1.5"]),
        (["--lr-warmup-init", "1e-3"], 1, ["--lr-warmup-init is 0.001", "--lr (0.0004)"]),
        (["--lr-warmup-init", "-1"], 1, ["--lr-warmup-init is -1"]),
        (["--lr-warmup-init-fraction", "-1"], 1, ["--lr-warmup-init-fraction is -1"]),
        (["--lr-warmup-init-fraction", "3"], 1, ["--lr-warmup-init-fraction is 3"]),
        (["--lr-warmup-fraction", "0.1", "--lr-warmup-iters", "5"], 1,
         ["--lr-warmup-fraction is 0.1", "--lr-warmup-iters, not both"]),
        (["--lr-warmup-init-fraction", "0.1", "--lr-warmup-init", "1e-5"], 1,
         ["--lr-warmup-init-fraction is 0.1", "--lr-warmup-init, not both"]),
        (["--decoupled-lr", "-1"], 1, ["--decoupled-lr is -1"]),
        (["--decoupled-lr", "1e-5"], 1, ["--decoupled-lr is 1e-05", "--min-lr (4", "--decoupled-min-lr"]),
        (["--decoupled-min-lr", "1e-5"], 1, ["--decoupled-min-lr is 1e-05", "without --decoupled-lr"]),
        (["--decoupled-lr", "1e-4", "--decoupled-min-lr", "2e-4"], 1,
         ["--decoupled-min-lr is 0.0002", "--decoupled-lr (0.0001)"]),
        (["--lr-wsd-decay-iters", "4"], 1, ["--lr-wsd-decay-iters is 4", "--lr-decay-style cosine"]),
        (["--lr-decay-style", "WSD"], 1, ["--lr-wsd-decay-iters"]),
        (["--memory-topk", "400"], 1, ["--memory-topk is 400"]),
        (["--memory-value-dim", "25"], 1, ["--memory-value-dim is 25", "--memory-num-cores (2)"]),
        (["--memory-layer-freq", "[1,0]"], 1, ["--memory-layer-freq"]),
        (["--memory-parallel-size", "2"], 3, ["--memory-parallel-size is 2", "3 ranks of a pipeline stage"]),
        (["--memory-parallel-size", "0"], 3, ["--memory-parallel-size is 0"]),
        (["--memory-parallel-size", "2", "--memory-backend", "reference"], 2, ["--memory-backend is reference"]),
        (["--memory-parallel-size", "5"], 5, ["--memory-value-dim is", "--memory-parallel-mode dim"]),
        (["--memory-parallel-size", "2", "--memory-pre-value-dim", "9"], 2, ["--memory-pre-value-dim is 9"]),
        (["--memory-parallel-mode", "row"], 2, ["--memory-parallel-mode is row"]),
        (["--memory-exchange-parts", "2"], 2, ["--memory-exchange-parts is 2", "--memory-parallel-mode row"]),
        (["--memory-exchange-parts", "2", "--memory-parallel-size", "2"], 2, ["--memory-exchange-parts is 2"]),
        (["--memory-exchange-parts", "0"], 1, ["--memory-exchange-parts is 0"]),
        (["--memory-parallel-size", "2", "--ffn-variant", "dense"], 2, ["--memory-parallel-size is 2", "no tables"]),
        (["--tensor-model-parallel-size", "2", "--seq-length", "127"], 2, ["--seq-length is 127", "(2)"]),
        (["--memory-parallel-mode", "row"], 1, ["--memory-parallel-mode is row"]),
        (["--memory-backward", "atomic"], 1, ["--memory-backward is atomic", "only triton"]),
        (["--memory-balance-loss-coeff", "0.1", "--calculate-per-token-loss"], 1,
         ["--memory-balance-loss-coeff is 0.1"]),
        (["--memory-norm-epsilon", "0"], 1, ["--memory-norm-epsilon is 0"]),
        (["--memory-sharing", "block", "--memory-sharing-size", "2", "--pipeline-model-parallel-size", "2",
          "--num-layers-in-first-pipeline-stage", "1"], 2, ["--memory-sharing is block"]),
        (["--adam-beta1", "1"], 1, ["--adam-beta1 is 1;", "below 1"]),
        (["--adam-beta2", "-0.1"], 1, ["--adam-beta2 is -0.1"]),
        (["--clip-grad", "-1"], 1, ["--clip-grad is -1"]),
        (["--seed", "-1"], 1, ["--seed is -1"]),
        (["--rotary-percent", "1.5"], 1, ["--rotary-percent is 1.5"]),
        (["--rotary-base", "0"], 1, ["--rotary-base is 0"]),
        (["--kv-channels", "15"], 1, ["--kv-channels is 15"]),
        (["--window-size", "5"], 1, ["--window-size is 5", "'[127, 0]'"]),
        (["--window-size", "[5, [0]]"], 1, ["--window-size is [5, [0]]"]),
        (["--window-size", "[5, 3]"], 1, ["--window-size is [5, 3]"]),  # a language model does not look ahead
        (["--window-size", "[3, 0]", "--window-attn-skip-freq", "0"], 1, ["--window-attn-skip-freq is 0"]),
        (["--window-size", "[3, 0]", "--window-attn-skip-freq", "[1]"], 1,
         ["--window-attn-skip-freq is [1]", "4 integers"]),
        (["--reset-attention-mask", "--create-attention-mask-in-dataloader", "--transformer-impl",
          "transformer_engine"], 1, ["--create-attention-mask-in-dataloader is on"]),
        (["--reset-attention-mask", "--context-parallel-size", "2"], 2, ["--context-parallel-size is 2"]),
        (["--reset-position-ids"], 1, ["--reset-position-ids is on"]),
        (MOE + ["--reset-attention-mask", "--moe-router-load-balancing-type", "seq_aux_loss"], 1,
         ["--moe-router-load-balancing-type is seq_aux_loss"]),
        (["--lr-decay-style", "WSD", "--lr-wsd-decay-iters", "11"], 1, ["--lr-wsd-decay-iters is 11"]),
        (["--num-experts", "8"], 1, ["--num-experts is 8"]),
        (["--fp8-format", "hybrid"], 1, ["--fp8-format", "Transformer Engine"]),
        (["--overlap-param-gather"], 1, ["--overlap-param-gather", "--use-distributed-optimizer"]),
        (["--num-layers-per-virtual-pipeline-stage", "1"], 1, ["--num-layers-per-virtual-pipeline-stage is 1"]),
        (["--num-layers-per-virtual-pipeline-stage", "-1"], 1, ["--num-layers-per-virtual-pipeline-stage is -1"]),
        (["--ffn-hidden-size", "129", "--tensor-model-parallel-size", "2", "--sequence-parallel"], 2,
         ["--ffn-hidden-size is 129", "--tensor-model-parallel-size (2)"]),
        (["--context-parallel-size", "2", "--seq-length", "126"], 2, ["--seq-length is 126", "= 4"]),
        (["--context-parallel-size", "2", "--tensor-model-parallel-size", "8", "--sequence-parallel", "--seq-length",
          "120"], 16, ["--seq-length is 120", "(8) x --context-parallel-size (2)"]),
        (["--context-parallel-size", "2", "--cp-comm-type", "p2p"], 2, ["--cp-comm-type is p2p", "local"]),
        (["--expert-model-parallel-size", "2"], 2, ["--expert-model-parallel-size is 2", "--ffn-variant moe"]),
        (["--moe-router-topk", "1"], 1, ["--moe-router-topk is 1", "--ffn-variant moe"]),
        (["--ffn-variant", "moe", "--num-experts", "0"], 1, ["--num-experts is 0"]),
        (MOE + ["--moe-router-topk", "5"], 1, ["--moe-router-topk is 5", "--num-experts (4)"]),
        (MOE + ["--memory-parallel-size", "2"], 2,
         ["--memory-parallel-size is 2", "--expert-model-parallel-size 2"]),
        (MOE + ["--expert-model-parallel-size", "3"], 3, ["--expert-model-parallel-size is 3", "--num-experts (4)"]),
        (MOE + ["--expert-model-parallel-size", "4", "--pipeline-model-parallel-size", "2"], 4,
         ["--expert-model-parallel-size is 4", "2 ranks of a pipeline stage"]),
        (MOE + ["--tensor-model-parallel-size", "2"], 2, ["--tensor-model-parallel-size is 2", "--sequence-parallel"]),
        (MOE + ["--moe-router-load-balancing-type", "none_such"], 1, ["--moe-router-load-balancing-type", "aux_loss"]),
        (MOE + ["--moe-aux-loss-coeff", "[0.1, 0.2]"], 1, ["--moe-aux-loss-coeff is [0.1, 0.2]", "(aux_loss)"]),
        (MOE + ["--calculate-per-token-loss", "--context-parallel-size", "2", "--moe-aux-loss-coeff", "0.1"], 2,
         ["--moe-aux-loss-coeff is 0.1", "--calculate-per-token-loss"]),
        (MOE + ["--add-bias-linear", "--transformer-impl", "local"], 1,
         ["--add-bias-linear", "--ffn-variant moe", "--transformer-impl local"]),
        (MOE + ["--moe-grouped-gemm"], 1, ["--moe-grouped-gemm is on"]),
        (MOE + ["--moe-shared-expert-intermediate-size", "9", "--tensor-model-parallel-size", "2",
                "--sequence-parallel"], 2, ["--moe-shared-expert-intermediate-size is 9"]),
        (["--recompute-granularity", "full"], 1, ["recompute"]),
        (["--async-save"], 1, ["--async-save", "--save"]),
        (["--profile", "--profile-ranks", "a"], 1, ["--profile-ranks is 'a'"]),
        (["--profile", "--profile-step-start", "12"], 1, ["--profile-step-end is 12", "--profile-step-start (12)"]),
        (["--profile", "--profile-step-start", "0"], 1, ["--profile-step-start (0)"]),
        (["--model-preset", "umv2-9t"], 1, ["'umv2-9t'", "umv2-tiny"]),
        (["--config", "/nowhere/x.yaml"], 1, ["--config", "/nowhere/x.yaml"]),
        (["--bf16", "--no-attention-softmax-in-fp32"], 1, ["--attention-softmax-in-fp32 is off", "unfused"]),
        (["--ffn-variant", "dense", "--memory-topk", "8"], 1, ["--memory-topk is 8", "--ffn-variant dense"]),
        (["--use-rope-scaling", "--rotary-seq-len-interpolation-factor", "2"], 1,
         ["--rotary-seq-len-interpolation-factor is 2", "--use-rope-scaling"]),
        (["--rope-scaling-factor", "4"], 1, ["--rope-scaling-factor is 4.0", "without --use-rope-scaling"]),
        (["--qk-norm-span", "projection", "--no-qk-layernorm"], 1, ["--qk-norm-span is projection", "--qk-layernorm"]),
        (["--qk-norm-span", "projection", "--normalization", "LayerNorm"], 1, ["--qk-norm-span is projection", "RMS"]),
        (["--qk-norm-span", "projection", "--group-query-attention", "--num-query-groups", "1",
          "--tensor-model-parallel-size", "2"], 2, ["--tensor-model-parallel-size is 2", "1 heads of keys"]),
        (["--norm-placement", "post", *MOE], 1, ["--norm-placement is post", "--ffn-variant moe"]),
        (["--trainable", "memory", "--ffn-variant", "dense"], 1, ["--trainable is memory", "no memory layers"]),
        (["--trainable", "rows", "--ffn-variant", "dense"], 1, ["--trainable is rows", "no memory layers"]),
        (["--trainable", "rows"], 1, ["--trainable is rows", "--trainable-rows too"]),
        (["--trainable-rows", "rows.safetensors"], 1, ["--trainable-rows is rows.safetensors", "--trainable"]),
        (["--trainable", "rows", "--trainable-rows", "x", "--memory-value-optimizer-offload"], 1,
         ["--memory-value-optimizer-offload is on", "off with --trainable rows"]),
        (["--trainable", "memory", "--memory-layer-freq", "[1,1,0,0]", "--pipeline-model-parallel-size", "2"], 2,
         ["--trainable is memory", "blocks 2 to 3 have none", "--memory-layer-freq"]),
        (["--optimizer-cpu-offload"], 1, ["--optimizer-cpu-offload of Megatron-LM", "--use-distributed-optimizer"]),
        pytest.param(
            ["--use-precision-aware-optimizer", "--use-distributed-optimizer", "--bf16"], 1,
            ["--use-precision-aware-optimizer is on", "Transformer Engine"],
            marks=pytest.mark.skipif(bool(importlib.util.find_spec("transformer_engine")), reason="it is installed"),
        ),
    ],
)  # fmt: skip
def test_refused_in_one_line_that_names_the_flag(argv, world_size, told):
    text = refusal(*argv, world_size=world_size)
    for part in told:
        assert part in text, text


def test_files_that_are_no_mapping(tmp_path):
    file = tmp_path / "x.yaml"
    for content in ("- a\n- b\n", "a: [1\n", "x"):
        file.write_text(content)
        assert str(file) in refusal("--config", str(file))
    file.write_bytes(b"\xff\xfe\x00")
    assert str(file) in refusal("--config", str(file))


def program(*argv: str) -> tuple[int, str, str, float]:
    """Exit code, stdout, stderr and seconds of the program, told that it is rank 0 of 2 with nobody to meet: joining a
    process group would wait for minutes."""
    environ = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(ROOT / "pretrain_umv2.py"), *argv],
        env={**environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr, time.monotonic() - start


@pytest.mark.parametrize(
    "argv, told",
    [
        ([*TINY, "--hiden-size", "3"], "did you mean --hidden-size?"),
        ([*TINY, "--pipeline-model-parallel-size", "4"], "--pipeline-model-parallel-size 4"),
        ([*TINY[:4], "--tokenizer-type", "NullTokenizer"], "--data-path"),
    ],
)
def test_the_program_stops_before_any_process_group(argv, told):
    code, out, err, seconds = program(*argv)
    assert code == 2 and told in err, err
    lines = [line for line in err.splitlines() if "error:" in line]
    assert len(lines) == 1 and lines[0].startswith("pretrain_umv2.py: error: ") and "Traceback" not in err
    # 10 s on a quiet machine; the time is nearly all torch's import, which a loaded one stretches
    assert seconds < 10 * max(1.0, os.getloadavg()[0] / 2)


@pytest.mark.slow
def test_help_and_dry_run_start_nothing():
    code, out, err, _ = program("--help")
    assert code == 0 and "--memory-num-keys" in out and "--tensor-model-parallel-size" in out, err
    code, out, err, _ = program(*TINY, "--dry-run")
    assert code == 0 and "memory_num_keys" in out, err


def test_experts_with_biases_can_be_restored_without_training():
    argv = [*TINY, *MOE, "--add-bias-linear", "--transformer-impl", "local"]
    assert resolve(argv, 1, for_training=False).add_bias_linear
