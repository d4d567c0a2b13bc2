"""N-gram layers beside umv2's in one model (--engram-layer-freq), as whole runs: numbers of both, resumption to the bit
and in another layout, evaluation, and what is refused. test_layout_matrix.py has the layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from program_runs import command_line, losses, tiny_run, train
from test_evaluate import TEXTS, run_convert_instead, run_evaluate_instead

from umv2_megatron.training.metrics import read_metrics

BOTH = {
    "engram_layer_freq": "[1,0]", "engram_num_heads": 4, "engram_num_keys": 24, "tokenizer_type": "ByteLevelTokenizer",
    "make_vocab_size_divisible_by": 512, "lr": 1e-3, "min_lr": 1e-4, "lr_decay_iters": 8, "train_iters": 4,
    "save_interval": 2, "eval_iters": 1, "memory_log_interval": 1,
}  # fmt: skip
SHARDED = {"memory_parallel_size": 2, "memory_parallel_mode": "row", "use_distributed_optimizer": True}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, str]:
    """A run of four steps on one rank: its directory and the hash of its weights."""
    save = tmp_path_factory.mktemp("whole") / "run"
    return save, train(1, tiny_run(**BOTH, save=save), save.parent / "o").weights


def test_both_kinds_of_layers_are_measured_and_learn_at_their_own_rates(whole):
    lines = [line for line in read_metrics(whole[0]) if "lm loss" in line]
    assert len(lines) == 4
    for step, line in enumerate(lines):
        rate = line["learning-rate"]
        assert line["engram-value-learning-rate"] == pytest.approx(5 * rate)
        assert line["value-learning-rate"] == pytest.approx((4 - 3 * (step + 1) / 8) * rate)
    layers = {key for line in read_metrics(whole[0]) for key in line if "/value_coverage/" in key}
    assert layers == {f"{name}/value_coverage/layer_{block:03d}" for name, block in
                      (("memory", 0), ("memory", 1), ("engram", 0))}  # fmt: skip


def test_a_resumed_run_ends_with_the_same_bits(whole, tmp_path):
    argv = tiny_run(**BOTH, save=tmp_path / "run")
    train(1, [*argv, "--exit-interval", "2"], tmp_path / "o")
    assert train(1, argv, tmp_path / "o").weights == whole[1]


def test_a_run_goes_on_in_another_layout(whole, tmp_path):
    train(2, tiny_run(**BOTH, **SHARDED, save=tmp_path / "run", exit_interval=2), tmp_path / "o")
    train(1, tiny_run(**BOTH, save=tmp_path / "run"), tmp_path / "o")
    ours, theirs = losses(tmp_path / "run"), losses(whole[0])
    assert len(ours) == 4
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"bf16": True, "memory_value_second_moment": "row"},
        {"bf16": True, "memory_value_optimizer_offload": True},
        {"optimizer": "muon"},
        {"trainable": "memory"},
        {"ffn_variant": "memory-plus", "memory_layer_freq": "1"},
        {"ffn_variant": "ultramem", "memory_layer_freq": "[1,0]", "memory_topk": 8, "memory_num_keys": 16},
        {"norm_placement": "post"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_with_other_settings_a_resumed_run_ends_with_the_same_bits(changes, tmp_path):
    settings = {**BOTH, **changes}
    one = train(1, tiny_run(**settings, save=tmp_path / "whole"), tmp_path / "o")
    argv = tiny_run(**settings, save=tmp_path / "run")
    train(1, [*argv, "--exit-interval", "2"], tmp_path / "o")
    assert train(1, argv, tmp_path / "o").weights == one.weights
    assert len({loss for _, loss in losses(tmp_path / "run")}) == 4


@pytest.mark.slow
def test_a_run_goes_on_in_stages_of_which_one_has_no_ngram_layer(whole, tmp_path):
    layout = {"pipeline_model_parallel_size": 2, "load": whole[0], "ckpt_step": 2}
    train(2, tiny_run(**BOTH, **layout, save=tmp_path / "run"), tmp_path / "o")
    for one, other in zip(losses(tmp_path / "run"), losses(whole[0])[2:], strict=True):
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.slow
def test_tables_on_the_host_learn_alike(tmp_path):
    """The rates and weight decay of both kinds are those of the device."""
    settings = {**BOTH, "bf16": True, "lr": 1e-2, "engram_value_weight_decay": 1.0, "memory_value_weight_decay": 0.5}
    for name, offload in (("device", None), ("host", True)):
        argv = tiny_run(**settings, memory_value_optimizer_offload=offload, save=tmp_path / name)
        train(1, argv, tmp_path / "o")
    for one, other in zip(losses(tmp_path / "host"), losses(tmp_path / "device"), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def evaluated(ranks: int, load: Path | None, folder: Path, **layout) -> list[dict]:
    """What tools/evaluate.py says of texts."""
    folder.mkdir(exist_ok=True)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    settings = {"load": load, "data": folder / "texts.jsonl", "output": folder / "report.json", "stride": 16,
                "data_context_length": 24, "micro_batch_size": 2, **layout}  # fmt: skip
    train(ranks, command_line(settings), folder / "o", run_evaluate_instead)
    return json.loads((folder / "report.json").read_text())["texts"]


@pytest.mark.slow
def test_evaluation_on_one_rank_and_on_two(whole, tmp_path):
    (alone,) = evaluated(1, whole[0], tmp_path / "one")
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "memory_parallel_size": 2}
    (split,) = evaluated(2, whole[0], tmp_path / "two", **layout)
    numbers = {name: value for name, value in alone.items() if isinstance(value, float)}
    assert numbers and all(split[name] == pytest.approx(value, rel=1e-5) for name, value in numbers.items())


@pytest.mark.slow
def test_an_export_gives_the_numbers_of_its_checkpoint_and_goes_back(whole, tmp_path):
    export, back = tmp_path / "export", tmp_path / "back"
    for command in (["to-hf", "--load", whole[0], "--save", export], ["from-hf", "--load", export, "--save", back]):
        train(1, list(map(str, command)), tmp_path / "o", run_convert_instead)
    (alone,), (there,) = evaluated(1, whole[0], tmp_path / "one"), evaluated(1, None, tmp_path / "hf", hf_model=export)
    (again,) = evaluated(1, back, tmp_path / "two")
    numbers = {name: value for name, value in alone.items() if isinstance(value, float)}
    assert numbers and all(there[name] == pytest.approx(value, rel=1e-4) for name, value in numbers.items())
    assert all(again[name] == value for name, value in numbers.items())
    train(1, ["verify", "--load", str(whole[0]), "--hf", str(export)], tmp_path / "o", run_convert_instead)


def test_other_layers_on_resumption_are_refused(whole, tmp_path):
    for changes, told in (
        ({"engram_layer_freq": None, "engram_num_heads": None, "engram_num_keys": None}, "--engram-layer-freq is None"),
        ({"engram_ngram_size": 2}, "--engram-ngram-size is 2, but the checkpoint was trained with 3"),
        ({"engram_value_lr_mult": 7}, "--engram-value-lr-mult is 7.0, but the checkpoint was trained with 5.0"),
    ):
        assert told in train(1, tiny_run(**{**BOTH, **changes}, save=whole[0]), tmp_path / "o", codes=2).text
