"""FFN and memory in one slot: the sum, the initialisation and its criterion, tables once in a checkpoint.

python tests/unit/model/test_ffn_with_memory.py      prints the figures of docs/initialization.md
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from umv2_megatron.parallel import cpu_platform

cpu_platform.install()

from umv2_megatron.config.flags import read_mapping  # noqa: E402
from umv2_megatron.config.presets import PRESETS  # noqa: E402
from umv2_megatron.config.resolve import from_layers  # noqa: E402
from umv2_megatron.config.run_config import RunConfig  # noqa: E402
from umv2_megatron.model.builder import build_model  # noqa: E402
from umv2_megatron.model.delayed_outputs import DelayedOutputs  # noqa: E402
from umv2_megatron.model.ffn_with_memory import FFNWithMemory, SharedTables, memory_layers  # noqa: E402
from umv2_megatron.model.layer_specs import umv2_layer_spec  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "distributed"))
from harness import run_ranks  # noqa: E402

VOCABULARY = 100


def start() -> None:
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(3)


def configured(preset: str, **changes: Any) -> RunConfig:
    layers = [
        ("preset", read_mapping(PRESETS[preset].flags(), "preset")),
        ("flag", read_mapping({"transformer_impl": "local", **changes}, "flag")),
    ]
    return from_layers(layers, 1, for_training=False)


def slots_of(run: RunConfig) -> list[FFNWithMemory]:
    """The slot of every block, one after another, without the rest of the model."""
    config = run.transformer_config()
    slot = umv2_layer_spec(config, run.memory).submodules.mlp
    tables, delayed = SharedTables(), DelayedOutputs()
    ngrams = {} if run.ngrams is None else {"ngrams": run.ngrams, "vocabulary": VOCABULARY}
    slots = []
    for number in range(1, config.num_layers + 1):
        slots.append(FFNWithMemory(config, slot.submodules, run.memory, tables, delayed=delayed, **ngrams))
        slots[-1].set_layer_number(number)
    return slots


def normalised(tokens: int, hidden: int) -> torch.Tensor:
    x = torch.randn(tokens, 1, hidden, generator=torch.Generator().manual_seed(5))
    return x * x.square().mean(-1, keepdim=True).rsqrt()


def sum_of_both() -> None:
    start()
    for changes in ({}, {"memory_layer_freq": "[1,0]*2"}, {"disable_bias_linear": False}):
        slots = slots_of(configured("umv2-tiny", **changes))
        x = normalised(32, 64).requires_grad_()
        for slot in slots:
            output, bias = slot(x)
            ffn, ffn_bias = slot.ffn(x)
            if slot.memory is None:
                assert torch.equal(output, ffn)
            else:
                assert slot.memory(x).abs().max() > 0
                torch.testing.assert_close(output, ffn + slot.memory(x), rtol=0, atol=0)
            assert (bias is None) == (ffn_bias is None) == ("disable_bias_linear" not in changes)
        assert [slot.memory is not None for slot in slots] == (
            [True, False] * 2 if "memory_layer_freq" in changes else [True] * 4
        )
        slots[0](x)[0].square().sum().backward()
        assert all(p.grad is not None for p in slots[0].memory.parameters()) and x.grad.abs().sum() > 0


def test_output_is_ffn_plus_memory_of_the_same_input() -> None:
    run_ranks(1, sum_of_both)


def sum_of_all_three() -> None:
    start()
    from umv2_megatron.memory.ngrams import contexts

    freqs = {"memory_layer_freq": "[1,1,0,0]", "engram_layer_freq": "[1,0,1,0]"}
    for changes in ({}, {"ffn_variant": "ultramem", "memory_read_delay": 2}):
        run = configured("umv2-tiny", **freqs, engram_num_heads=4, engram_num_keys=24, **changes)
        slots = slots_of(run)
        assert [slot.memory is not None for slot in slots] == [True, True, False, False]
        assert [slot.engram is not None for slot in slots] == [True, False, True, False]
        for slot in (slots[0], slots[2]):
            torch.nn.init.normal_(slot.engram.conv)  # which starts at zero
        tokens = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(4))
        packed = contexts(tokens, run.ngrams, VOCABULARY)
        inputs = [normalised(32, 64).view(16, 2, 64).roll(block, 0).requires_grad_() for block in range(4)]
        outputs = [slot(x, padding_mask=packed)[0] for slot, x in zip(slots, inputs)]
        delay = run.memory.read_delay
        for block, (slot, x, output) in enumerate(zip(slots, inputs, outputs)):
            expected = slot.ffn(x)[0]
            if slot.engram is not None:
                expected = expected + slot.engram(x, packed.t())
                assert slot.engram(x, packed.t()).abs().max() > 0
            if block in (delay, delay + 1):
                expected = expected + slots[block - delay].memory(inputs[block - delay])
            torch.testing.assert_close(output, expected)
        outputs[2].square().sum().backward()
        used = [slots[2].engram] + ([slots[0].memory] if delay else [])
        assert all(parameter.grad.abs().sum() > 0 for layer in used for parameter in layer.parameters())


def test_an_ngram_layer_is_added_beside_a_memory_layer() -> None:
    run_ranks(1, sum_of_all_three)


def delayed_sums() -> None:
    start()
    # Block 1 has no memory layer and still adds that of block 0; block 2 adds that of block 1's place: none.
    for freq, delay, sources in (("[1,0,1,0]", 1, {1: 0, 3: 2}), ("[1,1,0,0]", 2, {2: 0, 3: 1})):
        slots = slots_of(configured("umv2-tiny", memory_layer_freq=freq, memory_read_delay=delay))
        inputs = [normalised(8, 64).roll(block, 0).requires_grad_() for block in range(4)]
        outputs = [slot(x)[0] for slot, x in zip(slots, inputs)]
        for block, (slot, x, output) in enumerate(zip(slots, inputs, outputs)):
            expected = slot.ffn(x)[0]
            if block in sources:
                source = sources[block]
                expected = expected + slots[source].memory(inputs[source])
            torch.testing.assert_close(output, expected, rtol=0, atol=0)
        last, source = max(sources.items())
        outputs[last].square().sum().backward()
        memory = slots[source].memory
        assert inputs[source].grad.abs().sum() > 0 and memory.value_proj.weight.grad.abs().sum() > 0
        assert not slots[0].delayed._waiting


def test_delayed_output_is_added_to_a_later_block() -> None:
    run_ranks(1, delayed_sums)


def recomputed_grads() -> None:
    """Activation recompute of both blocks together gives the gradients of none."""
    start()
    found: list[dict[str, torch.Tensor]] = []
    weights: dict[str, Any] = {}
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 4}
    for changes in ({}, recompute):
        run = configured("umv2-tiny", ffn_variant="ultramem", **changes)
        assert run.memory.read_delay == 3
        model = build_model(run, run.values["vocab_size"])
        weights = weights or model.state_dict()
        model.load_state_dict(weights)
        tokens = torch.arange(32).view(1, 32)
        mask = torch.ones(1, 1, 32, 32).triu(1).bool()
        model(tokens, tokens, mask, labels=tokens).mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, again = found
    assert plain.keys() == again.keys() and any(".memory.value_proj" in name for name in plain)
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, rtol=1e-6, atol=1e-9)


def test_delayed_output_under_recompute() -> None:
    run_ranks(1, recomputed_grads)


def initial_stds() -> list[dict[str, float]]:
    start()
    stds = []
    for init in ("paper", "fixed"):
        run = configured("umv2-8m", memory_init=init, memory_num_keys=24)
        model = build_model(run, run.values["vocab_size"])
        assert [block for block, _ in memory_layers(model)] == list(range(6))
        block = model.decoder.layers[2]
        stds.append(
            {
                "qkv": block.self_attention.linear_qkv.weight.std().item(),
                "fc1": block.mlp.ffn.linear_fc1.weight.std().item(),
                "fc2": block.mlp.ffn.linear_fc2.weight.std().item(),
                "value_proj": block.mlp.memory.value_proj.weight.std().item(),
            }
        )
    return stds


def test_initial_standard_deviations() -> None:
    paper, fixed = run_ranks(1, initial_stds)[0]
    base = math.sqrt(2 / (5 * 256))
    expected = {"qkv": base, "fc1": base, "fc2": base / math.sqrt(2 * 6), "value_proj": base}
    assert paper == {name: pytest.approx(std, rel=0.03) for name, std in expected.items()}
    expected = {"qkv": 0.02, "fc1": 0.02, "fc2": 0.02 / math.sqrt(2 * 6), "value_proj": 96**-0.5}
    assert fixed == {name: pytest.approx(std, rel=0.03) for name, std in expected.items()}


def variances(preset: str, changes: dict[str, Any]) -> list[tuple[float, float]]:
    """(FFN, memory) output variance on random normalised inputs for each block."""
    torch.set_grad_enabled(False)  # the rank is a process of its own
    start()
    run = configured(preset, **changes)
    config = run.transformer_config()
    slot_spec = umv2_layer_spec(config, run.memory).submodules.mlp
    x = normalised(1024, config.hidden_size)
    found = []
    for number in range(1, config.num_layers + 1):  # one at a time: a block of 227M is large
        slot = FFNWithMemory(config, slot_spec.submodules, run.memory)
        slot.set_layer_number(number)
        found.append((slot.ffn(x)[0].var().item(), slot.memory(x).var().item()))
    return found


CASES = [("umv2-8m", {}), ("umv2-227m-1.2b", {"memory_num_keys": 90})]


@pytest.mark.parametrize(("preset", "changes"), CASES)
def test_memory_starts_with_the_variance_of_its_ffn_in_every_block(preset: str, changes: dict[str, Any]) -> None:
    found = run_ranks(1, variances, preset, changes, timeout=240)[0]
    ratios = [memory / ffn for ffn, memory in found]
    print(preset, changes, "memory/FFN:", " ".join(f"{ratio:.3f}" for ratio in ratios))
    assert len(found) == PRESETS[preset].model["num_layers"]
    assert all(0.8 < ratio < 1.2 for ratio in ratios), ratios
    half = len(found) // 2
    early, late = (statistics.mean(memory for _, memory in part) for part in (found[:half], found[half:]))
    assert late / early == pytest.approx(1, abs=0.1), "the variance changes with depth"


def variances_inside(preset: str, changes: dict[str, Any]) -> list[tuple[float, float]]:
    """(FFN, memory) output variance for each block of a whole model on random tokens: real normalised inputs."""
    torch.set_grad_enabled(False)  # the rank is a process of its own
    start()
    run = configured(preset, **changes)
    model = build_model(run, run.values["vocab_size"])
    found: list[tuple[float, float]] = []
    for layer in model.decoder.layers:
        layer.mlp.register_forward_hook(
            lambda slot, inputs, _: found.append(
                (slot.ffn(inputs[0])[0].var().item(), slot.memory(inputs[0]).var().item())
            )
        )
    tokens = torch.randint(run.values["vocab_size"], (4, 256), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(256, 256).triu(1).bool()[None, None]
    model(tokens, torch.arange(256).expand(4, -1), mask)
    return found


def test_variance_inside_a_whole_model() -> None:
    found = run_ranks(1, variances_inside, "umv2-8m", {}, timeout=240)[0]
    ratios = [memory / ffn for ffn, memory in found]
    print("umv2-8m, random tokens, memory/FFN:", " ".join(f"{ratio:.3f}" for ratio in ratios))
    assert len(found) == 6 and all(0.8 < ratio < 1.2 for ratio in ratios), ratios


def checkpoint_names() -> None:
    start()
    for sharing, size, owners in (("none", 1, [0, 1, 2, 3]), ("block", 2, [0, 2]), ("ring", 2, [0])):
        run = configured("umv2-tiny", memory_sharing=sharing, memory_sharing_size=size)
        model = build_model(run, run.values["vocab_size"])
        expected = sorted(
            f"decoder.layers.{owner}.mlp.memory.table.{name}" for owner in owners for name in ("pre_values", "values")
        )
        sharded = model.sharded_state_dict()
        assert sorted(tensor.key for tensor in sharded.values() if ".table." in tensor.key) == expected
        assert sorted(name for name, _ in model.named_parameters() if ".table." in name) == expected
        for name in ("perm", "retrieval.u", "retrieval.t"):
            assert f"decoder.layers.3.mlp.memory.{name}" in sharded


def test_checkpoint_holds_each_table_once() -> None:
    run_ranks(1, checkpoint_names)


def build_shapes_only() -> int:
    start()
    run = configured(
        "umv2-227m-1.2b",
        perform_initialization=False,
        use_cpu_initialization=True,
        memory_sharing="block",
        memory_sharing_size=2,
    )
    with torch.device("meta"):
        model = build_model(run, run.values["vocab_size"])
    assert all(p.is_meta for p in model.parameters()) and all(layer.perm.is_meta for _, layer in memory_layers(model))
    return sum(p.numel() for name, p in model.named_parameters() if ".table." in name)


def test_whole_model_builds_on_the_meta_device() -> None:
    assert run_ranks(1, build_shapes_only)[0] == 20 * 360**2 * (192 + 192)

def order_and_tokens(world_size: int) -> list:
    """What the slot does in one forward: its steps in order, and the tokens that the memory layer starts on."""
    from megatron.core import tensor_parallel

    from umv2_megatron.parallel import groups

    groups.initialize_groups(tp=world_size)
    tensor_parallel.model_parallel_cuda_manual_seed(3)
    layers = [
        ("preset", read_mapping(PRESETS["umv2-tiny"].flags(), "preset")),
        ("flag", {"transformer_impl": "local", "tensor_model_parallel_size": world_size}),
    ]
    slot = slots_of(from_layers(layers, world_size, for_training=False))[0]
    memory, done = slot.memory, []
    begin, end = memory.start, memory.finish
    memory.start = lambda x: (done.append(("start", x.numel() // 64)), begin(x))[1]
    memory.finish = lambda started: (done.append("finish"), end(started))[1]
    slot.ffn.register_forward_hook(lambda *_: done.append("ffn"))
    output, _ = slot(normalised(33, 64))
    assert output.shape == (33, 1, 64)
    return done


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_ffn_runs_between_start_and_finish_and_no_token_is_looked_up_twice(world_size) -> None:
    # tensor-parallel ranks that have all tokens take a part each; 33 tokens are padded to 34
    tokens = {1: 33, 2: 17}[world_size]
    for done in run_ranks(world_size, order_and_tokens, world_size):
        assert done == [("start", tokens), "ffn", "finish"]


if __name__ == "__main__":
    for case in CASES:
        for name, function in (("random inputs", variances), ("whole model", variances_inside)):
            measured = run_ranks(1, function, *case, timeout=600)[0]
            print(case[0], json.dumps(case[1]), name)
            print("  FFN variance  ", " ".join(f"{ffn:.4f}" for ffn, _ in measured))
            print("  memory / FFN  ", " ".join(f"{memory / ffn:.2f}" for ffn, memory in measured), flush=True)
