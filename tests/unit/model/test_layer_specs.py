"""The ready-made specs of a stock Megatron-LM, built and trained as its gpt_builders.py does, without our trainer."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.parallel import cpu_platform

cpu_platform.install()

from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.transformer.identity_op import IdentityOp  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec, import_module  # noqa: E402
from megatron.core.transformer.transformer_block import BaseTransformerLayer  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from umv2_megatron.model import layer_specs  # noqa: E402
from umv2_megatron.model.ffn_with_memory import FFNWithMemory, SharedTables, memory_layers  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "distributed"))
from harness import run_ranks  # noqa: E402

VARIABLE = layer_specs.MEMORY_CONFIG_VARIABLE
MEMORY = {"num_keys": 12, "key_dim": 8, "value_dim": 12, "pre_value_dim": 4, "topk": 4}
VOCABULARY, SEQUENCE = 64, 10


# -- reading the configuration ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["umv2_local", "umv2_te"])
def test_spec_is_an_object_that_mcore_accepts(name: str) -> None:
    spec = import_module(("umv2_megatron.model.layer_specs", name))
    assert isinstance(spec, ModuleSpec) and issubclass(spec.module, BaseTransformerLayer)


def test_memory_config_from_files_text_and_flag_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = MemoryConfig(num_keys=24, value_lr_mult=2.0, layer_freq="[1,0]*2", sharing="block", sharing_size=2)
    mapping = {"num_keys": 24, "value_lr_mult": 2, "layer_freq": "[1,0]*2", "sharing": "block", "sharing_size": 2}
    (tmp_path / "memory.json").write_text(json.dumps(mapping))
    (tmp_path / "memory.yaml").write_text(
        "memory-num-keys: 24\nmemory_value_lr_mult: 2\nlayer-freq: '[1,0]*2'\nsharing: block\nsharing-size: 2\nseed:\n"
    )
    texts = [str(tmp_path / "memory.json"), str(tmp_path / "memory.yaml"), json.dumps(mapping)]
    for text in texts:
        assert layer_specs.read_memory_config(text) == expected
        monkeypatch.setenv(VARIABLE, text)
        assert layer_specs.read_memory_config() == expected
    assert layer_specs.read_memory_config("{}") == MemoryConfig()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["not set"]),
        ("/nowhere/memory.yaml", ["/nowhere/memory.yaml", "No such file"]),
        ("{num_kees: 3}", ["unknown key 'num_kees'", "num_keys"]),
        ("{log_interval: 3}", ["unknown key 'log_interval'"]),
        ("{num_keys: many}", ["num_keys", "'many'", "an integer"]),
        ("{num_keys: [1]}", ["num_keys", "[1]", "an integer"]),
        ("{sharing: rings}", ["sharing", "'rings'", "none, block, ring, noring"]),
        ("{num_keys: 3", ["expected YAML or JSON"]),
        ("LIST", ["mapping", "[1, 2]"]),
        ("BINARY", ["readable YAML or JSON file"]),
    ],
)
def test_mistakes_in_the_configuration_are_one_sentence(text: str, expected: list[str], tmp_path: Path) -> None:
    if text == "LIST":
        text = str(tmp_path / "list.yaml")
        Path(text).write_text("[1, 2]")
    elif text == "BINARY":
        text = str(tmp_path / "binary")
        Path(text).write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(ValueError) as caught:
        layer_specs.read_memory_config(text)
    message = str(caught.value)
    assert VARIABLE in message and "\n" not in message
    for part in expected:
        assert part in message, message


# -- building, on one rank -------------------------------------------------------------------------------------------


def start() -> None:
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(3)


def model_config(**changes: Any) -> TransformerConfig:
    options: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "ffn_hidden_size": 24,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "bias_activation_fusion": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return TransformerConfig(**{**options, **changes})


def stock_model(memory: dict[str, Any], name: str = "umv2_local", **changes: Any) -> GPTModel:
    """What gpt_builders.py of Megatron-LM does with --spec."""
    os.environ[VARIABLE] = json.dumps({**MEMORY, **memory})
    return GPTModel(
        config=model_config(**changes),
        transformer_layer_spec=import_module(("umv2_megatron.model.layer_specs", name)),
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
    )


def loss_of(model: GPTModel, seed: int = 0) -> torch.Tensor:
    tokens = torch.randint(VOCABULARY, (2, SEQUENCE), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(SEQUENCE, SEQUENCE).triu(1).bool()[None, None]
    return model(tokens, torch.arange(SEQUENCE).expand(2, -1), mask, labels=tokens.roll(-1, 1)).mean()


def parameters_get_gradients_and_learn() -> list[float]:
    start()
    model = stock_model({})
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        losses.append(loss.item())
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        optimizer.step()
    assert [block for block, _ in memory_layers(model)] == [0, 1, 2, 3]
    return losses


def test_a_stock_model_learns() -> None:
    losses = run_ranks(1, parameters_get_gradients_and_learn)[0]
    assert losses[-1] < losses[0] - 0.3, losses


def vectors_follow_the_cores() -> None:
    start()
    for changes in ({}, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}):
        model = stock_model({}, **changes)
        for training in (True, False, True):
            model.train(training)
            with torch.no_grad():
                for _, layer in memory_layers(model):
                    layer.retrieval.cores.add_(torch.randn(layer.retrieval.cores.shape) * 0.3)
            seen = [[] for _ in memory_layers(model)]
            hooks = [
                layer.retrieval.register_forward_hook(lambda module, *_, kept=kept: kept.append(module.u.clone()))
                for kept, (_, layer) in zip(seen, memory_layers(model))
            ]
            with torch.set_grad_enabled(training):
                loss = loss_of(model)
            if training:
                loss.backward()
            for (_, layer), kept in zip(memory_layers(model), seen):
                left, _, right = torch.linalg.svd(layer.retrieval.cores.detach().sum(0))
                pair = layer.retrieval.u[0], layer.retrieval.t[0]
                sign = torch.sign(pair[0] @ left[0, :, 0])
                torch.testing.assert_close(pair[0], left[0, :, 0] * sign)
                torch.testing.assert_close(pair[1], right[0, 0] * sign)
                # With recompute there are two forwards, which must pick alike, or gradients are wrong.
                assert len(kept) == (2 if changes and training else 1)
                assert all(torch.equal(u, layer.retrieval.u) for u in kept)
            for hook in hooks:
                hook.remove()


def test_singular_vectors_follow_the_cores_without_our_trainer() -> None:
    run_ranks(1, vectors_follow_the_cores)


def same_as_our_own_spec() -> None:
    start()
    memory = {"sharing": "block", "sharing_size": 2}
    stock = stock_model(memory, qk_layernorm=True)
    config = model_config(qk_layernorm=True, hetereogenous_dist_checkpoint=True, transformer_impl="local")
    ours = GPTModel(
        config=config,
        transformer_layer_spec=layer_specs.umv2_layer_spec(config, MemoryConfig(**{**MEMORY, **memory})),
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
    )
    ours.load_state_dict(stock.state_dict())
    assert torch.equal(loss_of(ours), loss_of(stock))
    assert stock.sharded_state_dict().keys() == ours.sharded_state_dict().keys()


def test_same_numbers_and_names_as_our_own_program() -> None:
    run_ranks(1, same_as_our_own_spec)


def float16_gradients() -> None:
    """Gradients of the cores from the Tucker penalty alone, with and without a loss scale."""
    start()
    found = []
    for changes in ({}, {"fp16": True, "grad_scale_func": lambda loss: loss * 1024}):
        torch.manual_seed(0)
        model = stock_model({"tucker_penalty_coeff": 1.0, "tucker_penalty_margin": 0.0}, **changes)
        (loss_of(model) * 0).backward()
        found.append(memory_layers(model)[0][1].retrieval.cores.grad)
    assert found[0].abs().max() > 0 and torch.equal(found[1], found[0] * 1024)


def test_auxiliary_losses_follow_the_loss_scale_of_float16() -> None:
    run_ranks(1, float16_gradients)


def shared_tables_once() -> None:
    start()
    model = stock_model({"sharing": "block", "sharing_size": 2})
    layers = [layer for _, layer in memory_layers(model)]
    assert [layer.owns_table for layer in layers] == [True, False, True, False]
    assert layers[0].table is layers[1].table and layers[2].table is layers[3].table
    owners = {
        f"decoder.layers.{block}.mlp.memory.table.{name}" for block in (0, 2) for name in ("values", "pre_values")
    }
    for names in (dict(model.named_parameters()), model.state_dict()):
        assert {name for name in names if ".table." in name} == owners
    sharded = model.sharded_state_dict()
    assert {sharded[name].key for name in sharded if ".table." in name} == owners
    # Each block under its own key: mcore otherwise stacks all blocks to one tensor, which would have holes.
    assert sharded["decoder.layers.1.mlp.memory.retrieval.keys"].key == "decoder.layers.1.mlp.memory.retrieval.keys"


def test_shared_tables_appear_once() -> None:
    run_ranks(1, shared_tables_once)


def two_models() -> None:
    start()
    first, second = (stock_model({"sharing": "block", "sharing_size": 2}) for _ in range(2))
    tables = [[layer.table for _, layer in memory_layers(model)] for model in (first, second)]
    assert not {id(table) for table in tables[0]} & {id(table) for table in tables[1]}
    assert tables[1][0] is tables[1][1]
    before = tables[0][0].values.detach().clone()
    loss_of(second).backward()
    with torch.no_grad():
        tables[1][0].values.sub_(tables[1][0].values.grad)
    assert torch.equal(before, tables[0][0].values) and tables[0][0].values.grad is None


def test_two_models_from_one_spec_do_not_share_tables() -> None:
    run_ranks(1, two_models)


def chosen_by_configuration() -> None:
    start()
    model = stock_model({"layer_freq": "[1,0]*2"})
    assert [block for block, _ in memory_layers(model)] == [0, 2]
    slots = [layer.mlp for layer in model.decoder.layers]
    assert all(type(slot) is FFNWithMemory for slot in slots) and slots[1].memory is None
    norm = model.decoder.layers[0].self_attention.q_layernorm
    assert norm is None or isinstance(norm, IdentityOp)  # None since mcore 0.17
    other = stock_model({}, qk_layernorm=True, normalization="LayerNorm", add_bias_linear=True)
    block = other.decoder.layers[0]
    assert "LayerNorm" in type(block.pre_mlp_layernorm).__name__ and block.pre_mlp_layernorm.bias is not None
    assert block.self_attention.q_layernorm.weight.shape == (8,) and block.mlp.ffn.linear_fc1.bias is not None
    loss_of(other).backward()
    loss_of(model).backward()


def test_layer_frequency_and_norms_follow_the_configuration() -> None:
    run_ranks(1, chosen_by_configuration)


def refusals() -> list[str]:
    start()
    told = []
    for memory, changes in (
        ({"topk": 13, "key_topk_cap": 13}, {}),
        ({"parallel_size": 2}, {}),
        ({}, {"num_moe_experts": 2}),
        ({}, {"tensor_model_parallel_size": 2}),
        ({"balance_loss_coeff": 0.1}, {"calculate_per_token_loss": True}),
    ):
        with pytest.raises(ValueError) as caught:
            stock_model(memory, **changes)
        told.append(str(caught.value))
    return told


def test_what_cannot_work_is_refused() -> None:
    sizes, sharded, experts, drifting, per_token = run_ranks(1, refusals)[0]
    assert VARIABLE in sizes and "topk is 13" in sizes
    assert VARIABLE in sharded and "parallel_size is 2" in sharded
    assert "--num-experts is 2" in experts
    assert "--expert-tensor-parallel-size is 2" in drifting
    assert "balance_loss_coeff is 0.1" in per_token and "--calculate-per-token-loss" in per_token
    with pytest.raises(ValueError, match="another pipeline stage.*--memory-sharing-size"):
        SharedTables().get(0)


def engine_model() -> list[float]:
    start()
    model = stock_model({}, name="umv2_te", qk_layernorm=True)
    loss = loss_of(model)
    loss.backward()
    return [loss.item(), float(memory_layers(model)[0][1].table.values.grad.abs().sum())]


@pytest.mark.skipif(
    not (layer_specs.HAVE_TE and torch.cuda.is_available()), reason="Transformer Engine or its CUDA device is missing"
)
def test_transformer_engine_spec_builds_and_learns() -> None:
    loss, gradient = run_ranks(1, engine_model)[0]
    assert 0 < loss < 10 and gradient > 0


def engine_missing() -> str:
    start()
    with pytest.raises(ValueError) as caught:
        stock_model({}, name="umv2_te")
    return str(caught.value)


@pytest.mark.skipif(layer_specs.HAVE_TE, reason="Transformer Engine is installed")
def test_transformer_engine_spec_says_what_is_missing() -> None:
    assert "Transformer Engine is not installed" in run_ranks(1, engine_missing)[0]
