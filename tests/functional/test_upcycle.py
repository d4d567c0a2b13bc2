"""Dense models of transformers become checkpoints with memory layers, and go on being trained in any layout."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import (
    differences,
    different_weights,
    edit_json,
    forked,
    rewrite,
    shard_of,
    to_hf,
    tool,
)
from dense_sources import MEMORY, MODELS, dense_model, upcycled
from program_runs import command_line, losses, train
from test_convert_checkpoint import KillAt

from umv2_megatron.checkpoint.contents import locate
from umv2_megatron.config.usage import UsageError
from umv2_megatron.conversion.safetensors_files import ConversionError

pytestmark = pytest.mark.thorough

EXACT = 1e-9
TRAINING = {"mock_data": True, "num_workers": 0, "micro_batch_size": 2, "global_batch_size": 4, "eval_iters": 0,
            "use_checkpoint_args": True, "finetune": True, "log_interval": 1, "lr": 1e-3, "seq_length": 32,
            "distributed_timeout_minutes": 1, "tokenizer_type": "NullTokenizer", "vocab_size": 299}  # fmt: skip


# One of each family, and each thing that a family may have; the others take as long again.
QUICK = ("llama", "mistral", "qwen2-windows", "qwen3", "olmo2")


def _some_slow(names: Any, quick: tuple[str, ...]) -> list[Any]:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def _equal_to_source(
    name: str, folder: Path, settings: dict[str, Any], dtype: str = "float32"
) -> tuple[float, tuple[str, ...], list[str]]:
    """The distance of the logits from the source's, the weights that differ, and what was said."""
    from umv2_megatron.conversion.verify_source import compare_source, compare_source_weights

    lines: list[str] = []
    source = dense_model(folder / "source", name, tokenizer=True, dtype=dtype)
    save = upcycled(source, folder / "run", lines.append, **settings)
    weights = compare_source_weights(str(save), None, source)
    return compare_source(str(save), None, source, None, 64).difference, weights.different, lines


@pytest.mark.parametrize("name", _some_slow(MODELS, QUICK))
def test_at_the_start_the_logits_are_the_source_s(name: str, tmp_path: Path) -> None:
    difference, different, lines = forked(_equal_to_source, name, tmp_path, {})
    assert difference < EXACT and different == ()
    zeros = any("zeros" in line for line in lines)
    assert zeros == (name in ("llama-attention-biases", "qwen3-biases", "olmo2-biases"))


VARIANTS: dict[str, dict[str, Any]] = {
    "peer": {"ffn_variant": "peer", "memory_value_dim": 64, "memory_pre_value_dim": 64, "memory_layer_freq": "2"},
    "ultramem": {"ffn_variant": "ultramem", "memory_pre_value_dim": 0, "memory_layer_freq": "[1,0]"},
    "memory-plus": {"ffn_variant": "memory-plus", "memory_pre_value_dim": 0, "memory_layer_freq": "1"},
    "ring": {"memory_sharing": "ring", "memory_sharing_size": 2, "seq_length": 32},
}


@pytest.mark.parametrize("name", _some_slow(VARIANTS, ("peer",)))
def test_every_kind_of_memory_layer_is_silent(name: str, tmp_path: Path) -> None:
    difference, different, _ = forked(_equal_to_source, "llama", tmp_path, VARIANTS[name])
    assert difference < EXACT and different == ()


@pytest.mark.parametrize(
    ("dtype", "settings", "stored"),
    [
        ("bfloat16", {}, "bfloat16"),
        pytest.param("float16", {}, "float32", marks=pytest.mark.slow),
        pytest.param("float32", {"dtype": torch.bfloat16}, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_weights_of_16_bits(dtype: str, settings: dict[str, Any], stored: str, tmp_path: Path) -> None:
    difference, different, _ = forked(_equal_to_source, "qwen3", tmp_path, settings, dtype)
    assert difference < EXACT and different == ()
    found = _tensors(tmp_path / "run")
    for name in ("embedding.word_embeddings.weight", "decoder.layers.1.mlp.memory.table.values"):
        assert found[name].dtype == getattr(torch, stored), name


def _exported(name: str, folder: Path) -> tuple[list[tuple[str, float, bool]], tuple[str, ...]]:
    save = upcycled(dense_model(folder / "source", name, tokenizer=True), folder / "run", start="variance")
    export = to_hf(save, folder / "export")
    return differences(save, export), different_weights(save, export)


@pytest.mark.parametrize("name", _some_slow(MODELS, ("qwen2-windows",)))
def test_an_upcycled_model_is_exported(name: str, tmp_path: Path) -> None:
    (difference,), different = forked(_exported, name, tmp_path)
    assert difference[1] < EXACT and difference[2] and different == ()
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["eos_token_id"] == 256 and config["vocab_size"] == 300
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").is_file()


# -- training ------------------------------------------------------------------------------------------------------


def _tensors(save: Path) -> dict[str, torch.Tensor]:
    from umv2_megatron.conversion.checkpoint_tensors import CheckpointTensors

    store, iteration = locate(save)
    held = CheckpointTensors(store.path(iteration))
    names = [name for name in held.tensors if not name.startswith(("optimizer", "chained_"))]
    return {name: held.rows(name, 0, held.tensors[name].rows) for name in names}


def test_the_first_step_moves_the_value_projection_and_the_second_everything(tmp_path: Path) -> None:
    """The losses are the dense model's, whatever memory layers there are; gradients reach the projection first."""
    source = dense_model(tmp_path / "source", "llama")
    before = _tensors(upcycled(source, tmp_path / "run"))
    steps = []
    for count in (1, 2):
        save = tmp_path / f"after{count}"
        flags = {**TRAINING, "load": tmp_path / "run", "save": save, "train_iters": count, "weight_decay": 0.0}
        train(1, command_line(flags), tmp_path / "log")
        after = _tensors(save)
        assert after.keys() == before.keys()
        steps.append({name for name in after if not torch.equal(after[name], before[name])})
    own = {name for name in before if ".mlp.memory." in name and not name.endswith((".perm", ".u", ".t"))}
    first = {name for name in steps[0] if name in own}
    assert first == {name for name in own if name.endswith("value_proj.weight")}
    assert own <= steps[1] and {name for name in before if ".mlp.memory." not in name} <= steps[0]


TENSOR = {"tensor_model_parallel_size": 2, "memory_parallel_size": 2, "memory_parallel_mode": "row"}
LAYOUTS: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "qwen2": [(2, TENSOR), (2, {"pipeline_model_parallel_size": 2, "use_distributed_optimizer": True})],
    "olmo2": [(2, TENSOR), (2, {**TENSOR, "sequence_parallel": True, "use_distributed_optimizer": True})],
}


@pytest.mark.parametrize("name", _some_slow(LAYOUTS, ("olmo2",)))
def test_every_layout_loads_it(name: str, tmp_path: Path) -> None:
    """Row-sharded tables over tensor-parallel ranks, pipeline stages: the losses of one rank."""
    source = dense_model(tmp_path / "source", name, num_hidden_layers=4)
    upcycled(source, tmp_path / "run", start="variance", max_shard_bytes=100_000)
    found = []
    for number, (ranks, layout) in enumerate([(1, {}), *LAYOUTS[name]]):
        save = tmp_path / f"layout{number}"
        flags = {**TRAINING, "load": tmp_path / "run", "save": save, "train_iters": 3, **layout}
        train(ranks, command_line(flags), tmp_path / "log")
        found.append([loss for _, loss in losses(save)])
    assert len(found[0]) == 3 and all(other == pytest.approx(found[0], rel=1e-5) for other in found[1:])


FROZEN_LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (1, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}),
    (1, {"recompute_granularity": "selective", "recompute_modules": "mlp"}),
    (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "memory_parallel_size": 2}),
    (2, {"pipeline_model_parallel_size": 2, "use_distributed_optimizer": True, "overlap_grad_reduce": True,
         "overlap_param_gather": True, "memory_value_second_moment": "full"}),
]  # fmt: skip


def test_where_memory_alone_learns_the_rest_stays_bit_for_bit(tmp_path: Path) -> None:
    source = dense_model(tmp_path / "source", "llama")
    before = _tensors(upcycled(source, tmp_path / "run", start="variance"))
    own = {name for name in before if ".mlp.memory." in name and not name.endswith((".perm", ".u", ".t"))}
    found = []
    for number, (ranks, layout) in enumerate(FROZEN_LAYOUTS):
        save = tmp_path / f"layout{number}"
        flags = {**TRAINING, "load": tmp_path / "run", "save": save, "train_iters": 3, "trainable": "memory", **layout}
        train(ranks, command_line(flags), tmp_path / "log")
        after = _tensors(save)
        for name, tensor in before.items():
            if not name.endswith((".u", ".t")):
                assert torch.equal(tensor, after[name]) == (name not in own), name
        found.append([loss for _, loss in losses(save)])
    assert all(other == pytest.approx(found[0], rel=1e-5) for other in found[1:]) and found[0][2] != found[0][0]


@pytest.mark.slow
def test_a_run_of_memory_alone_goes_on_as_such(tmp_path: Path) -> None:
    source = dense_model(tmp_path / "source", "llama")
    upcycled(source, tmp_path / "run")
    flags = {**TRAINING, "load": tmp_path / "run", "trainable": "memory", "train_iters": 4}
    whole = train(1, command_line({**flags, "save": tmp_path / "whole"}), tmp_path / "log")
    halves = {**flags, "save": tmp_path / "halves"}
    train(1, command_line({**halves, "exit_interval": 2}), tmp_path / "log")
    other = train(1, command_line({**halves, "trainable": "all"}), tmp_path / "log", codes=2)
    assert "--trainable is all, but the checkpoint was trained with memory" in other.text
    assert train(1, command_line(halves), tmp_path / "log").weights == whole.weights


# -- killed, refused -----------------------------------------------------------------------------------------------


def _upcycle(source: Path, save: Path, say: Any) -> list[str]:
    lines: list[str] = []
    upcycled(source, save, say or lines.append, max_shard_bytes=60_000, memory_sharing="block", memory_sharing_size=2)
    return lines


def test_one_that_was_killed_goes_on(tmp_path: Path) -> None:
    source = dense_model(tmp_path / "source", "qwen3")
    assert forked(_upcycle, source, tmp_path / "run", KillAt("__0_4.distcp")) == -signal.SIGKILL
    assert not list((tmp_path / "run").glob("iter_*"))
    lines = forked(_upcycle, source, tmp_path / "run", None)
    assert sum("is there already" in line for line in lines) == 5 < len(lines)
    forked(_upcycle, source, tmp_path / "whole", None)
    names = sorted(path.name for path in (tmp_path / "whole" / "iter_0000000").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "run" / "iter_0000000").iterdir())
    for name in names:
        if name.endswith(".distcp"):
            one, other = (tmp_path / run / "iter_0000000" / name for run in ("run", "whole"))
            assert one.read_bytes() == other.read_bytes(), name


def test_other_memory_layers_do_not_use_what_was_left(tmp_path: Path) -> None:
    source = dense_model(tmp_path / "source", "qwen3")
    assert forked(_upcycle, source, tmp_path / "run", KillAt("__0_4.distcp")) == -signal.SIGKILL
    lines = forked(_other_seed, source, tmp_path / "run")
    assert not any("is there already" in line for line in lines)


def _other_seed(source: Path, save: Path) -> list[str]:
    lines: list[str] = []
    changes = {"memory_sharing": "block", "memory_sharing_size": 2, "memory_seed": 7}
    upcycled(source, save, lines.append, max_shard_bytes=60_000, **changes)
    return lines


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_model(tmp_path_factory.mktemp("refused") / "source", "qwen2", tie_word_embeddings=False)


def _drop(source: Path, name: str) -> None:
    path = shard_of(source, name)
    rewrite(path, lambda tensors: tensors.pop(name))
    edit_json(source / "model.safetensors.index.json", lambda index: index["weight_map"].pop(name))
    if path.name not in json.loads((source / "model.safetensors.index.json").read_text())["weight_map"].values():
        path.unlink()


def _set(**values: Any) -> Any:
    return lambda source: edit_json(source / "config.json", lambda config: config.update(values))


def _add(source: Path) -> None:
    path = shard_of(source, "lm_head.weight")
    rewrite(path, lambda tensors: tensors.update({"score.weight": torch.zeros(2, 64)}))
    add = {"score.weight": path.name}
    edit_json(source / "model.safetensors.index.json", lambda index: index["weight_map"].update(add))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_set(model_type="gemma"), "model_type 'gemma'; expected one of llama, mistral, qwen2, qwen3, olmo2"),
        (_set(hidden_act="gelu"), "hidden_act is 'gelu'; expected silu"),
        (_set(quantization_config={"quant_method": "fp8"}), "has a quantization_config"),
        (_set(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}), "rope_type 'yarn'"),
        (_set(intermediate_size=97), r"mlp.\w+_proj.weight has shape \(96, 64\); expected \(97, 64\)"),
        (_set(num_hidden_layers=3, layer_types=["full_attention"] * 3), "layers.2.input_layernorm.weight is missing"),
        (lambda source: _drop(source, "lm_head.weight"), "lm_head.weight is missing"),
        (lambda source: _drop(source, "model.layers.1.self_attn.k_proj.bias"), "1.self_attn.k_proj.bias is missing"),
        (_add, "score.weight is extra"),
    ],
)
def test_a_source_that_is_not_what_it_says_is_refused_by_name(
    damage: Any, named: str, source: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(source, tmp_path / "source"))
    damage(copy)
    with pytest.raises(ConversionError, match=named) as error:
        upcycled(copy, tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"preset": "umv2-8m"}, "--model-preset is umv2-8m, whose num_layers is 6; expected 2"),
        ({"ffn_variant": "dense"}, "--ffn-variant is dense, which has no memory layers"),
        ({"seq_length": 128}, "--seq-length is 128; expected at most 64"),
        ({"memory_topk": 40}, "--memory-topk is 40"),
        ({"memory_layer_freq": "[1,0,1]"}, "--memory-layer-freq is"),
    ],
)
def test_flags_that_do_not_fit_are_refused_by_name(
    changes: dict[str, Any], named: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises((ConversionError, UsageError), match=named) as error:
        upcycled(source, tmp_path / "run", **changes)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def _session(folder: Path) -> list[tuple[int, str, str]]:
    """The commands of docs/upcycling.md, and those that must fail."""
    source = str(dense_model(folder / "source", "llama", tokenizer=True))
    save, flags = str(folder / "run"), command_line(MEMORY)
    done = [tool("upcycle", "--hf", source, "--save", save, *flags, "--seq-length", "32")]
    done.append(tool("verify", "--load", save, "--hf", source, "--tolerance", "1e-9", "--tokens", "40"))
    done.append(tool("upcycle", "--hf", source, "--save", save, *flags))
    done.append(tool("upcycle", "--hf", source, "--save", str(folder / "other"), "--hidden-size", "64"))
    return done


def _loud_session(folder: Path) -> list[tuple[int, str, str]]:
    """Memory layers that are not silent: another model, of the same dense weights."""
    source, save = str(folder / "source"), str(folder / "loud")
    done = [tool("upcycle", "--hf", source, "--save", save, *command_line(MEMORY), "--start", "variance")]
    return [*done, tool("verify", "--load", save, "--hf", source, "--tokens", "40")]


def test_the_commands(tmp_path: Path) -> None:
    made, verified, again, size = forked(_session, tmp_path)
    assert made[0] == 0, made[2]
    assert f"wrote {tmp_path / 'run' / 'iter_0000000'}; train from it with" in made[1]
    assert verified[0] == 0 and "the same bit for bit: good" in verified[1], verified
    assert "float64: largest difference of logits from the source's" in verified[1]
    assert again[0] == 2 and "holds checkpoints already" in again[2]
    assert size[0] == 2 and "--hidden-size" in size[2]
    loud, different = forked(_loud_session, tmp_path)
    assert loud[0] == 0 and different[0] == 1 and "TOO FAR APART" in different[1]
    assert "the model that was upcycled does not compute" in different[2]
