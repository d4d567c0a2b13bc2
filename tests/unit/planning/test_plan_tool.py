"""tools/plan.py as a user runs it: presets, overrides, layouts, a search, JSON, and mistakes."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from umv2_megatron.commands import plan as plan_tool
from umv2_megatron.config.presets import PRESETS
from umv2_megatron.planning import count_parameters, flops_per_token
from umv2_megatron.planning.device import Device
from umv2_megatron.planning.machine_file import write_machine

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def figures(capsys):
    """What --json prints for arguments."""

    def call(*arguments):
        code = plan_tool.main([*arguments, "--json"])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return json.loads(printed.out)

    return call


def test_tables_of_the_published_model_from_the_shell():
    """As a user runs it, without the package installed."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "tools/plan.py", "--model-preset", "umv2-227m-1.2b"], cwd=ROOT,
                          env=environment, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0 and not done.stderr
    for words in ("224,347,040", "1,180,795,808", "memory share of the blocks", "MoE of this size",
                  "deviation -0.3%", "deviation +0.1%", "bytes per rank (GiB)", "MFU"):
        assert words in done.stdout


def test_json_holds_the_same_figures(figures):
    preset = PRESETS["umv2-1b-7b"]
    shown = figures("--model-preset", "umv2-1b-7b")
    count = count_parameters(preset.model, preset.memory_config())
    assert shown["parameters"]["total"] == count.total
    assert shown["flops_per_token"]["training"] == flops_per_token(preset.model, preset.memory_config()).training
    assert shown["stated"]["activated"]["ours"] == count.activated_without_embeddings
    assert shown["stated"]["total"]["deviation"] == pytest.approx(count.total / 6.7e9 - 1)
    assert [item["batch"] for item in shown["bytes_touched_per_token"]] == [1, 16, 256]
    (rank,) = shown["run"]["bytes_per_rank"]
    assert rank["parameters"] == count.stored and rank["weights"] == 4 * count.stored
    kinds = ("weights", "gradients", "optimizer", "buffers", "activations_kept", "activations_working")
    assert rank["all"] == sum(rank[kind] for kind in kinds)


def test_flags_override_the_preset(figures):
    shown = figures("--model-preset", "umv2-8m", "--memory-num-keys", "64", "--ffn-hidden-size", "128",
                    "--no-qk-layernorm")
    assert shown["memory"]["num_keys"] == 64 and shown["model"]["ffn_hidden_size"] == 128
    assert shown["parameters"]["tables"] == 6 * 64 * 64 * 128
    assert shown["parameters"]["attention"] == 6 * 4 * 256 * 256


def test_dense_variant_has_no_memory(figures):
    shown = figures("--model-preset", "umv2-8m", "--ffn-variant", "dense", "--world-size", "2")
    assert shown["memory"] is None and shown["parameters"]["tables"] == 0
    assert shown["run"]["exchange_per_step"] == {}


def test_configuration_file_lies_between_preset_and_flags(figures, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("num-layers: 2\nmemory_topk: 8\nmemory_num_keys: 32\nlr: 0.1\n"
                    "transformer_impl: transformer_engine\nmemory_value_lr_decay_iters: null\n")
    shown = figures("--model-preset", "umv2-8m", "--config", str(file), "--memory-num-keys", "48")
    assert shown["model"]["num_layers"] == 2
    assert (shown["memory"]["topk"], shown["memory"]["num_keys"]) == (8, 48)


def test_a_layout_is_planned(figures):
    arguments = ["--model-preset", "umv2-1b-7b", "--world-size", "16", "--tensor-model-parallel-size", "2",
                 "--sequence-parallel", "--pipeline-model-parallel-size", "2", "--memory-parallel-size", "4", "--bf16",
                 "--use-distributed-optimizer", "--global-batch-size", "32", "--gpu-memory-gib", "40"]
    dim, row = (figures(*arguments, "--memory-parallel-mode", mode)["run"] for mode in ("dim", "row"))
    assert dim["layout"]["dp"] == 4 and dim["layout"]["micro_batches"] == 8 and dim["fits"] is True
    assert [rank["stage"] for rank in dim["bytes_per_rank"]] == [0, 1]
    assert dim["exchange_per_step"] == row["exchange_per_step"], "both modes are shown whatever the layout's"
    assert dim["exchange_per_step"]["dim"]["all"] != dim["exchange_per_step"]["row"]["all"]
    sent = dim["exchange_per_step"]["dim"]
    assert sent["all"] == pytest.approx(sent["per_token_and_layer"] * 2048 * 8 * 8)  # tokens, layers, micro-batches
    assert figures(*arguments, "--memory-reserve-gib", "39")["run"]["fits"] is False
    slow = figures(*arguments, "--intra-node-bandwidth", "1", "--peak-tflops", "100")["run"]["step_time"]
    assert slow["step"] > dim["step_time"]["step"]


def test_a_run_of_120b_is_found(figures):
    """The fastest layout fits, and the run's own checks accept its flags."""
    from umv2_megatron.config.resolve import resolve

    shown = figures("--model-preset", "umv2-2.5b-120b-top256", "--world-size", "1024", "--gpu-memory-gib", "80",
                    "--bf16", "--search", "--context-parallel-size", "1", "--pipeline-model-parallel-size", "1",
                    "--top", "3")["search"]
    assert len(shown["best"]) == 3 and shown["fitting"] > 100
    best = shown["best"][0]
    assert best["gib"] < 76 and best["layout"]["memory_size"] > 1 and 0.05 < best["mfu"] < 0.5
    run = resolve(["--model-preset", "umv2-2.5b-120b-top256", "--transformer-impl", "local", *best["flags"].split()],
                  1024, for_training=False)
    assert run.memory.parallel_size == best["layout"]["memory_size"]


def test_rates_of_a_machine_file(figures, tmp_path):
    """Its rates take the place of the defaults; flags count before it."""
    file = tmp_path / "machine.json"
    rates = {"peak_tflops": 1.5, "memory_bandwidth": 20.0, "gpus_per_node": 4, "starts_ahead": 0}
    write_machine(file, "a device", rates, "a command")
    run = figures("--model-preset", "umv2-8m", "--machine", str(file), "--memory-bandwidth", "30")["run"]
    expected = {**dataclasses.asdict(Device()), **rates, "memory_bandwidth": 30.0}
    assert run["device"] == expected


@pytest.mark.parametrize("content, words", [
    (None, "cannot be read (No such file or directory)"), ("{}", "KeyError('format')"), ("[1]", "expected the JSON"),
    ('{"format": 2, "device": "x", "rates": {}}', "its format is 2"),
    ('{"format": 1, "device": "x", "rates": {"speed": 1}}', "has the rate 'speed'"),
    ('{"format": 1, "device": "x", "rates": {"launch_us": 0}}', "has launch_us 0; expected a number above 0"),
    ('{"format": 1, "device": "x", "rates": {"launch_us": NaN}}', "has launch_us nan"),
    ('{"format": 1, "device": "x", "rates": {"gpus_per_node": 1.5}}', "has gpus_per_node 1.5"),
])  # fmt: skip
def test_machine_files_that_are_none(content, words, tmp_path, capsys):
    file = tmp_path / "machine.json"
    if content is not None:
        file.write_text(content)
    assert plan_tool.main(["--model-preset", "umv2-8m", "--machine", str(file)]) == 2
    told = capsys.readouterr().err
    assert f"--machine is {file}" in told and words in told and told.count("\n") == 1


def test_flags_of_virtual_stages_and_gradients_are_accepted(figures):
    """Those that a search prints, by the checks of a run."""
    from umv2_megatron.config.resolve import resolve

    fixed = ["--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "2"]
    fixed += ["--no-accumulate-allreduce-grads-in-fp32", "--global-batch-size", "64"]
    sizes = ["--world-size", "16", "--gpu-memory-gib", "80"]
    shown = figures("--model-preset", "umv2-1b-7b", *sizes, "--bf16", "--search", *fixed)["search"]
    best = shown["best"][0]
    assert best["layout"]["chunks"] == 4 and best["layout"]["grads_in_fp32"] is False
    run = resolve(["--model-preset", "umv2-1b-7b", "--transformer-impl", "local", *best["flags"].split()], 16,
                  for_training=False)
    assert run.virtual_pipeline_size == 4 and run.values["grad_reduce_in_fp32"] is False


def test_search_prints_a_table(capsys):
    arguments = ["--model-preset", "umv2-8m", "--world-size", "4", "--search", "--memory-parallel-mode", "row"]
    assert plan_tool.main([*arguments, "--gpu-memory-gib", "8"]) == 0
    printed = capsys.readouterr().out
    assert "flags of the first:" in printed and "legal layouts of 4 ranks" in printed
    assert plan_tool.main([*arguments, "--gpu-memory-gib", "4.001"]) == 0
    assert "nothing fits; the least is" in capsys.readouterr().out


@pytest.mark.parametrize("preset", ["umv2-tiny", "umv2-1b-7b", "umv2-3m"])
def test_no_zero_has_a_minus(preset, figures, capsys):
    """What rounding leaves of exchanges that are not there, and small deviations from what is stated."""
    assert plan_tool.main(["--model-preset", preset]) == 0
    assert not re.search(r"-0(\.0+)?(?![\d.])", capsys.readouterr().out)
    assert figures("--model-preset", preset)["run"]["step_time"]["exchange"] >= 0


def test_list_shows_every_preset(capsys):
    assert plan_tool.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(PRESETS)


def test_help_names_the_device_flags(capsys):
    assert plan_tool.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert "--inter-node-bandwidth" in printed and "--world-size" in printed


@pytest.mark.parametrize("arguments, words", [
    ([], "--num-layers is missing; give it or choose a --model-preset"),
    (["--model-preset", "umv2"], "--model-preset is 'umv2'; expected one of umv2-tiny"),
    (["--model-preset", "umv2-8m", "--memory-topk", "many"], "--memory-topk is 'many'; expected an integer"),
    (["--model-preset", "umv2-8m", "--memory-topk", "97"], "--memory-topk is 97; expected at most the 96 keys"),
    (["--model-preset", "umv2-8m", "--memory-sharing", "all"], "--memory-sharing is 'all'; expected one of none"),
    (["--model-preset", "umv2-8m", "--hidden", "3"], "did you mean --hidden-size?"),
    (["--model-preset", "umv2-8m", "--ffn-variant", "sparse"], "--ffn-variant is 'sparse'; expected one of umv2"),
    (["--model-preset", "umv2-8m", "--ffn-variant", "moe", "--num-experts", "4"],
     "--ffn-variant is 'moe'; planning knows umv2, ultramem, memory-plus, pkm, peer, engram and dense only"),
    (["--config", "missing.yaml"], "--config is 'missing.yaml'; expected a readable YAML file"),
    (["--model-preset", "umv2-8m", "--world-size", "0"], "--world-size is '0'; expected an integer of at least 1"),
    (["--model-preset", "umv2-8m", "--peak-tflops", "nan"], "--peak-tflops is 'nan'; expected a number above 0"),
    (["--model-preset", "umv2-8m", "--world-size", "3", "--memory-parallel-size", "2"],
     "--memory-parallel-size is 2; expected a divisor of the 3 ranks"),
    (["--model-preset", "umv2-8m", "--search"], "--gpu-memory-gib is missing"),
    (["--model-preset", "umv2-8m", "--search", "--gpu-memory-gib", "8", "--memory-parallel-mode", "both"],
     "--memory-parallel-mode is 'both'; expected one of dim, row"),
    (["--model-preset", "umv2-8m", "--world-size", "2", "--global-batch-size", "3"],
     "--global-batch-size is 3; expected a multiple of --micro-batch-size"),
])
def test_mistakes_are_one_line_and_exit_code_2(capsys, arguments, words):
    assert plan_tool.main(arguments) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert words in printed.err and printed.err.count("\n") == 1
