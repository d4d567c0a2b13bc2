"""tools/plan.py as a user runs it: without installing, with overrides, as JSON, and with mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from umv2_megatron.config.presets import PRESETS
from umv2_megatron.planning import count_parameters, flops_per_token

ROOT = Path(__file__).resolve().parents[3]


def plan(*arguments):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run([sys.executable, "tools/plan.py", *arguments], cwd=ROOT, env=environment, text=True,
                          capture_output=True, timeout=60)


def figures(*arguments):
    done = plan(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_tables_of_the_published_model():
    done = plan("--model-preset", "umv2-227m-1.2b")
    assert done.returncode == 0 and not done.stderr
    for words in ("224,347,040", "1,180,795,808", "memory share of the blocks", "MoE of this size",
                  "deviation -0.3%", "deviation +0.1%"):
        assert words in done.stdout


def test_json_holds_the_same_figures():
    preset = PRESETS["umv2-1b-7b"]
    shown = figures("--model-preset", "umv2-1b-7b")
    count = count_parameters(preset.model, preset.memory_config())
    assert shown["parameters"]["total"] == count.total
    assert shown["flops_per_token"]["training"] == flops_per_token(preset.model, preset.memory_config()).training
    assert shown["stated"]["activated"]["ours"] == count.activated_without_embeddings
    assert shown["stated"]["total"]["deviation"] == pytest.approx(count.total / 6.7e9 - 1)
    assert [item["batch"] for item in shown["bytes_touched_per_token"]] == [1, 16, 256]


def test_flags_override_the_preset():
    shown = figures("--model-preset", "umv2-8m", "--memory-num-keys", "64", "--hidden-size", "128", "--no-qk-layernorm")
    assert shown["memory"]["num_keys"] == 64 and shown["model"]["hidden_size"] == 128
    assert shown["parameters"]["tables"] == 6 * 64 * 64 * 128
    assert shown["parameters"]["attention"] == 6 * 4 * 128 * 128  # the head dim follows the hidden size


def test_dense_variant_has_no_memory():
    shown = figures("--model-preset", "umv2-8m", "--ffn-variant", "dense")
    assert shown["memory"] is None and shown["parameters"]["tables"] == 0


def test_configuration_file_lies_between_preset_and_flags(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("num-layers: 2\nmemory_topk: 8\nmemory_num_keys: 32\nlr: 0.1\nadd_bias_linear: false\n"
                    "memory_value_lr_decay_iters: null\n")
    shown = figures("--model-preset", "umv2-8m", "--config", str(file), "--memory-num-keys", "48")
    assert shown["model"]["num_layers"] == 2
    assert (shown["memory"]["topk"], shown["memory"]["num_keys"]) == (8, 48)
    assert "lr" not in shown["model"]


def test_list_shows_every_preset():
    done = plan("--list")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(PRESETS)


@pytest.mark.parametrize("arguments, words", [
    ([], "--model-preset is missing"),
    (["--model-preset", "umv2"], "--model-preset is 'umv2'; expected one of umv2-tiny"),
    (["--model-preset", "umv2-8m", "--memory-topk", "many"], "--memory-topk is 'many'; expected an integer"),
    (["--model-preset", "umv2-8m", "--memory-topk", "97"], "--memory-topk is 97; expected at most the 96 keys"),
    (["--model-preset", "umv2-8m", "--memory-sharing", "all"], "--memory-sharing is 'all'; expected one of none"),
    (["--model-preset", "umv2-8m", "--hidden", "3"], "did you mean --hidden-size?"),
    (["--model-preset", "umv2-8m", "--ffn-variant", "moe"], "--ffn-variant is 'moe'; expected one of umv2, dense"),
    (["--num-layers", "4"], "--hidden-size is missing"),
    (["--config", "missing.yaml"], "--config is 'missing.yaml'; expected a readable YAML file"),
])
def test_mistakes_are_one_line_and_exit_code_2(arguments, words):
    done = plan(*arguments)
    assert done.returncode == 2 and not done.stdout
    assert words in done.stderr and done.stderr.count("\n") == 1


def test_neither_torch_nor_megatron_is_loaded():
    code = ("import sys, runpy; sys.argv = ['plan.py', '--model-preset', 'umv2-2.5b-120b-top256']\n"
            "try: runpy.run_path('tools/plan.py', run_name='__main__')\n"
            "except SystemExit as stop: assert stop.code == 0\n"
            "assert not {'torch', 'megatron'} & sys.modules.keys()")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60, capture_output=True)
