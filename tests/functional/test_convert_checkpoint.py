"""Checkpoints become Hugging Face exports and come back: same numbers in any layout, also after a kill.

What is refused is in test_convert_refusals.py.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import (
    RICH,
    differences,
    edit_json,
    flip_bit,
    forked,
    from_hf,
    saved,
    shard_of,
    there_and_back,
    to_hf,
    tool,
    with_export,
)
from program_runs import command_line, losses, tiny_run, train

from umv2_megatron.checkpoint.contents import locate

INTERLEAVED = {"pipeline_model_parallel_size": 2, "num_layers": 4, "num_layers_per_virtual_pipeline_stage": 1}
SHARDED = {"tensor_model_parallel_size": 2, "memory_parallel_size": 2, "memory_parallel_mode": "row"}
EXPERTS = {
    "ffn_variant": "moe",
    "num_experts": 8,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 48,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_num_groups": 4,
    "moe_router_group_topk": 2,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_dtype": "fp32",
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_aux_loss_coeff": 0.01,
    "moe_shared_expert_intermediate_size": 32,
    "moe_shared_expert_gate": True,
}
COLUMNS = {"context_parallel_size": 2, "memory_parallel_size": 2, "memory_parallel_mode": "dim"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint of one rank, and its export in several files."""
    return with_export(tmp_path_factory.mktemp("plain"))


@pytest.mark.slow
def test_rows_beyond_the_tokenizer_s_ids_are_kept(tmp_path):
    """By the command that from-hf prints; the vocabulary is the model's, not that of its tokenizer."""
    text = {"tokenizer_type": "ByteLevelTokenizer", "vocab_size": 512}
    save = saved(tmp_path / "first", iters=1, **text)
    export = forked(to_hf, save, tmp_path / "export")
    back = forked(from_hf, export, tmp_path / "back")
    shared = {"mock_data": True, "num_workers": 0, "micro_batch_size": 2, "global_batch_size": 8, "eval_iters": 0,
              "train_iters": 1, "finetune": True, "use_checkpoint_args": True, "log_interval": 1}  # fmt: skip
    tokenizer = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": back / "tokenizer"}
    again, direct = tmp_path / "again", tmp_path / "direct"
    train(1, command_line({**shared, **tokenizer, "load": back, "save": again}), tmp_path / "log")
    train(1, command_line({**shared, "tokenizer_type": "ByteLevelTokenizer", "load": save, "save": direct}), tmp_path)
    assert losses(again) == losses(direct)
    config = json.loads((forked(to_hf, again, tmp_path / "export2") / "config.json").read_text())
    assert config["vocab_size"] == 512
    done = train(1, command_line({**shared, **tokenizer, "load": back, "vocab_size": 300}), tmp_path / "log", codes=2)
    assert "has a vocabulary of 512 tokens, this run's tokenizer one of 300" in done.text


@pytest.mark.parametrize(
    ("ranks", "settings", "limit"),
    [
        (2, {**SHARDED, **RICH, "bf16": True, "vocab_size": 500, "use_distributed_optimizer": True}, 1e-9),
        pytest.param(
            2, {**INTERLEAVED, "no_swiglu": True, "position_embedding_type": "learned_absolute"}, 1e-9,
            marks=pytest.mark.slow,
        ),
        (2, {**COLUMNS, "memory_layer_freq": "[0,1]", "rotary_percent": 0.5, "kv_channels": 32}, 1e-9),
        (1, {"ffn_variant": "dense", "num_layers": 1, "use_rope_scaling": True, "rope_scaling_factor": 32}, 1e-9),
        (2, {**EXPERTS, "expert_model_parallel_size": 2, "bf16": True}, 1e-9),
        pytest.param(
            1, {"model_preset": None, "ffn_variant": "dense", "hidden_size": 32, "num_attention_heads": 2}, 1e-9,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["tp2-m2row-rich-bf16", "pp2-vpp-gelu", "cp2-m2dim", "dense", "ep2-experts-bf16", "derived-sizes"],
)
def test_there_and_back(ranks, settings, limit, tmp_path):
    found = forked(there_and_back, saved(tmp_path, ranks, **settings), tmp_path)
    assert found["other"] == []
    assert {"config.json", "generation_config.json", "modeling_umv2.py", "model.safetensors"} <= set(found["files"])
    dtype, difference, good = found["differences"][0]
    assert dtype == "torch.float64" and difference < limit and good
    if settings.get("bf16"):
        dtype, difference, good = found["differences"][1]
        assert dtype == "torch.bfloat16" and difference > 1e-6 and good


def test_training_goes_on_alike_from_either_checkpoint_in_another_layout(plain, tmp_path):
    save, export = plain
    back = from_hf(export, tmp_path / "back", max_shard_bytes=100_000)
    outputs = []
    for name, load in (("own", save), ("converted", back)):
        flags = {"load": load, "finetune": True, "train_iters": 2, "save": tmp_path / name, "seed": 3}
        layout = {"memory_parallel_size": 2, "memory_parallel_mode": "row", "vocab_size": 511}
        outputs.append(train(2, tiny_run(**flags, **layout), tmp_path / "log" / name).weights)
    assert outputs[0] == outputs[1]


def test_numbers_of_the_export_are_those_of_the_checkpoint(plain):
    """Against mcore's own reader and the safetensors package, with the layouts written out here."""
    from safetensors.torch import load_file
    from torch.distributed import checkpoint as dcp

    save, export = plain
    path = locate(save)[0].path(2)
    sizes = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    wanted = ("self_attention.linear_qkv.weight", "mlp.ffn.linear_fc1.weight", "mlp.memory.table.values")
    held = {name: torch.empty(sizes[f"decoder.layers.1.{name}"].size) for name in wanted}
    dcp.load(
        {f"decoder.layers.1.{name}": tensor for name, tensor in held.items()},
        storage_reader=dcp.FileSystemReader(path),
        no_dist=True,
    )
    exported: dict[str, torch.Tensor] = {}
    for file in export.glob("*.safetensors"):
        exported.update(load_file(file))
    layer = {name.removeprefix("model.layers.1."): tensor for name, tensor in exported.items()}
    # four groups, each a query, a key and a value head of 16 rows
    query, key, value = held[wanted[0]].view(4, 3, 16, 64).unbind(1)
    for name, expected in (("q", query), ("k", key), ("v", value)):
        assert torch.equal(layer[f"self_attn.{name}_proj.weight"], expected.reshape(64, 64))
    gate, up = held[wanted[1]].chunk(2)
    assert torch.equal(layer["mlp.gate_proj.weight"], gate) and torch.equal(layer["mlp.up_proj.weight"], up)
    assert torch.equal(layer["memory.table.values.0"], held[wanted[2]])
    assert "lm_head.weight" not in exported and exported["model.embed_tokens.weight"].shape == (512, 64)


def test_tables_are_cut_into_chunks_and_files_stay_small(tmp_path):
    save = saved(tmp_path)
    export = to_hf(save, tmp_path / "export", max_shard_bytes=10_000)
    config = json.loads((export / "config.json").read_text())
    rows = config["memory_table_chunk_rows"]
    assert rows == 10_000 // (24 * 4)
    index = json.loads((export / "model.safetensors.index.json").read_text())["weight_map"]
    chunks = [name for name in index if name.startswith("model.layers.0.memory.table.values.")]
    assert len(chunks) == -(-256 // rows)
    large = [path for path in export.glob("*.safetensors") if path.stat().st_size > 12_000]
    whole = [name for path in large for name in index if index[name] == path.name]
    assert not any("table" in name for name in whole) and len(whole) == len(large)
    assert config["vocab_size"] == 501
    assert forked(differences, save, export)[0][2]
    files = {file: [name for name in index if index[name] == file] for file in index.values()}
    assert all(len({".table." in name for name in names}) == 1 for names in files.values())


def test_other_dtypes(plain, tmp_path):
    save, _ = plain
    export = to_hf(save, tmp_path / "half", dtype=torch.bfloat16)
    found = forked(differences, save, export)
    assert [dtype for dtype, _, _ in found] == ["torch.float64", "torch.bfloat16"] and all(good for _, _, good in found)
    (export / "export_manifest.json").unlink()
    edit_json(export / "config.json", lambda config: config.pop("dtype"))
    assert forked(differences, save, export) == found
    back = from_hf(export, tmp_path / "back", dtype=torch.float32)
    again = to_hf(back, tmp_path / "again", dtype=torch.bfloat16)
    assert (again / "model.safetensors").read_bytes() == (export / "model.safetensors").read_bytes()


def _saved_by_transformers(export: Path, folder: Path) -> None:
    from umv2_megatron.hf import UMv2ForCausalLM

    model = UMv2ForCausalLM.from_pretrained(export)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(2)
    model.save_pretrained(folder / "tuned", max_shard_size="200KB")
    from_hf(folder / "tuned", folder / "back")
    to_hf(folder / "back", folder / "again")


def test_what_transformers_saves_becomes_a_checkpoint(plain, tmp_path):
    from safetensors.torch import load_file

    forked(_saved_by_transformers, plain[1], tmp_path)
    tuned = {k: v for path in (tmp_path / "tuned").glob("*.safetensors") for k, v in load_file(path).items()}
    again, name = load_file(tmp_path / "again" / "model.safetensors"), "model.layers.1.mlp.down_proj.weight"
    assert again.keys() == tuned.keys() and all(torch.equal(again[key], tuned[key]) for key in tuned)
    assert torch.equal(load_file(shard_of(plain[1], name))[name] * 2, again[name])


def test_the_end_of_documents_and_a_chat_template_go_along(tmp_path):
    save = saved(tmp_path, tokenizer_type="ByteLevelTokenizer", vocab_size=257)
    export, bare = to_hf(save, tmp_path / "export"), to_hf(save, tmp_path / "bare", with_tokenizer=False)
    for folder in (export, bare):
        for name in ("config.json", "generation_config.json"):
            config = json.loads((folder / name).read_text())
            assert config["eos_token_id"] == config["bos_token_id"] == 256, (folder, name)
    assert not (bare / "tokenizer.json").exists()
    (export / "chat_template.jinja").write_text("{{ messages }}")
    again = to_hf(from_hf(export, tmp_path / "back"), tmp_path / "again")
    assert (again / "chat_template.jinja").read_text() == "{{ messages }}"


# -- killed --------------------------------------------------------------------------------------------------------


class KillAt:
    """Receives the lines of a conversion and dies at the first that contains ``word``."""

    def __init__(self, word: str) -> None:
        self.word = word

    def __call__(self, line: str) -> None:
        if self.word in line:
            os.kill(os.getpid(), signal.SIGKILL)


def _to_hf(save: Path, export: Path, say: Any) -> list[str]:
    lines: list[str] = []
    to_hf(save, export, say or lines.append, max_shard_bytes=100_000)
    return lines


def _from_hf(export: Path, save: Path, say: Any) -> list[str]:
    lines: list[str] = []
    from_hf(export, save, say or lines.append, max_shard_bytes=100_000)
    return lines


def test_an_export_that_was_killed_goes_on(plain, tmp_path):
    export = tmp_path / "export"
    assert forked(_to_hf, plain[0], export, KillAt("model-00003-of")) == -signal.SIGKILL
    assert not export.exists()
    unfinished = tmp_path / ".export.incomplete"
    times = {path.name: path.stat().st_mtime_ns for path in unfinished.glob("*.safetensors")}
    assert len(times) == 3
    # one of the finished files is damaged meanwhile, one was being written
    flip_bit(unfinished / "model-00002-of-00007.safetensors", 900)
    (unfinished / "model-00004-of-00007.safetensors.incomplete").write_bytes(b"half")
    lines = _to_hf(plain[0], export, None)
    there = [line for line in lines if "is there already" in line]
    assert [line.split()[0][6:11] for line in there] == ["00001", "00003"], lines
    for name, time in times.items():
        assert (export / name).stat().st_mtime_ns == time or "00002" in name
    assert not unfinished.exists()
    for path in plain[1].iterdir():
        assert (export / path.name).read_bytes() == path.read_bytes(), path.name
    assert sorted(path.name for path in export.iterdir()) == sorted(path.name for path in plain[1].iterdir())


def test_another_job_does_not_use_what_was_left(plain, tmp_path):
    assert forked(_to_hf, plain[0], tmp_path / "export", KillAt("model-00003-of")) == -signal.SIGKILL
    to_hf(plain[0], tmp_path / "export", dtype=torch.bfloat16, max_shard_bytes=100_000)
    reference = to_hf(plain[0], tmp_path / "reference", dtype=torch.bfloat16, max_shard_bytes=100_000)
    names = sorted(path.name for path in reference.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "export").iterdir())
    assert all((reference / name).read_bytes() == (tmp_path / "export" / name).read_bytes() for name in names)


def test_an_import_that_was_killed_goes_on(plain, tmp_path):
    back = tmp_path / "back"
    assert forked(_from_hf, plain[1], back, KillAt("__0_2.distcp")) == -signal.SIGKILL
    assert not list(back.glob("iter_*"))
    lines = _from_hf(plain[1], back, None)
    assert sum("is there already" in line for line in lines) == 3, lines
    assert sorted(path.name for path in back.iterdir()) == [
        ".lock",
        "iter_0000000",
        "latest_checkpointed_iteration.txt",
    ]
    again = to_hf(back, tmp_path / "again", max_shard_bytes=100_000)
    for path in plain[1].glob("*.safetensors"):
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name


# -- command line --------------------------------------------------------------------------------------------------


def _session(save: Path, folder: Path) -> list[tuple[int, str, str]]:
    """The commands of docs/hugging-face.md, one after the other, and a comparison that must fail."""
    export, back = str(folder / "export"), str(folder / "back")
    done = [tool("to-hf", "--load", str(save), "--save", export)]
    done.append(tool("from-hf", "--load", export, "--save", back))
    done.append(tool("verify", "--load", back, "--hf", export, "--tokens", "20", "--tolerance", "1e-30"))
    done.append(tool("verify", "--load", str(save), "--hf", export, "--weights-only"))
    return done


def test_the_commands(plain, tmp_path):
    there, back, different, weights = forked(_session, plain[0], tmp_path)
    assert there[0] == 0 and f"exported iteration 2 of {plain[0]}" in there[1]
    assert back[0] == 0 and f"wrote {tmp_path / 'back' / 'iter_0000000'}" in back[1]
    assert different[0] == 1 and "of 20 tokens: TOO FAR APART" in different[1]
    assert weights[0] == 0 and "the same bit for bit: good" in weights[1] == weights[1].splitlines()[0] + "\n"
    assert different[2].strip().splitlines()[-1].startswith("convert_checkpoint.py: error: the export does not compute")
