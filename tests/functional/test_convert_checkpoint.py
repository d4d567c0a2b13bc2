"""Checkpoints become Hugging Face exports and come back: same numbers, nothing half-written, damage refused by name."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import runpy
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import (
    RICH,
    ROOT,
    differences,
    different_weights,
    forked,
    from_hf,
    republish,
    saved,
    there_and_back,
    to_hf,
)
from program_runs import tiny_run, train

from umv2_megatron.conversion.safetensors_files import ConversionError
from umv2_megatron.training.checkpoint_contents import locate
from umv2_megatron.training.durable_files import CheckpointError

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
    """A checkpoint of one rank with 512 tokens, so without padding, and its export in several files."""
    folder = tmp_path_factory.mktemp("plain")
    save = saved(folder, vocab_size=511)
    return save, to_hf(save, folder / "export", max_shard_bytes=100_000)


@pytest.mark.parametrize(
    ("ranks", "settings", "limit"),
    [
        (2, {**SHARDED, **RICH, "bf16": True, "vocab_size": 500, "use_distributed_optimizer": True}, 1e-5),
        (2, {**INTERLEAVED, "no_swiglu": True, "position_embedding_type": "learned_absolute"}, 1e-5),
        (2, {**COLUMNS, "memory_layer_freq": "[0,1]", "rotary_percent": 0.5, "kv_channels": 32}, 1e-5),
        (1, {"ffn_variant": "dense", "num_layers": 1}, 1e-5),
        (2, {**EXPERTS, "expert_model_parallel_size": 2, "bf16": True}, 1e-5),
    ],
    ids=["tp2-m2row-rich-bf16", "pp2-vpp-gelu", "cp2-m2dim", "dense", "ep2-experts-bf16"],
)
def test_there_and_back(ranks, settings, limit, tmp_path):
    found = forked(there_and_back, saved(tmp_path, ranks, **settings), tmp_path)
    assert found["other"] == []
    assert {"config.json", "generation_config.json", "modeling_umv2.py", "model.safetensors"} <= set(found["files"])
    dtype, difference, good = found["differences"][0]
    assert dtype == "torch.float32" and difference < limit and good
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
    assert [dtype for dtype, _, _ in found] == ["torch.float32", "torch.bfloat16"] and all(good for _, _, good in found)
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
    assert torch.equal(load_file(_shard_of(plain[1], name))[name] * 2, again[name])


# -- damage --------------------------------------------------------------------------------------------------------


def _edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _flip_bit(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)


def _shard_of(export: Path, name: str) -> Path:
    return export / json.loads((export / "model.safetensors.index.json").read_text())["weight_map"][name]


def _rewrite(path: Path, change) -> None:
    """Change the tensors of a safetensors file."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


KEYS = "model.layers.0.memory.retrieval.keys"


def _truncate(export: Path) -> str:
    path = _shard_of(export, KEYS)
    path.write_bytes(path.read_bytes()[:-8])
    return path.name


def _flip(export: Path) -> str:
    path = _shard_of(export, KEYS)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    _flip_bit(path, 8 + length + json.loads(data[8 : 8 + length])[KEYS]["data_offsets"][0] + 3)
    return KEYS


def _drop(export: Path) -> str:
    (export / "export_manifest.json").unlink()
    _rewrite(_shard_of(export, KEYS), lambda tensors: tensors.pop(KEYS))
    _edit_json(export / "model.safetensors.index.json", lambda index: index["weight_map"].pop(KEYS))
    return KEYS


def _drop_from_file_only(export: Path) -> str:
    (export / "export_manifest.json").unlink()
    _rewrite(_shard_of(export, KEYS), lambda tensors: tensors.pop(KEYS))
    return KEYS


def _add(export: Path) -> str:
    (export / "export_manifest.json").unlink()
    path = _shard_of(export, KEYS)
    _rewrite(path, lambda tensors: tensors.update({"model.layers.0.odd": torch.zeros(2)}))
    add = {"model.layers.0.odd": path.name}
    _edit_json(export / "model.safetensors.index.json", lambda index: index["weight_map"].update(add))
    return "model.layers.0.odd"


def _reshape(export: Path) -> str:
    (export / "export_manifest.json").unlink()
    _rewrite(_shard_of(export, KEYS), lambda tensors: tensors.update({KEYS: tensors[KEYS].flatten()}))
    return KEYS


def _cast(export: Path) -> str:
    (export / "export_manifest.json").unlink()
    _rewrite(_shard_of(export, KEYS), lambda tensors: tensors.update({KEYS: tensors[KEYS].half()}))
    return KEYS


def _remove_file(export: Path) -> str:
    path = _shard_of(export, KEYS)
    path.unlink()
    return path.name


def _add_file(export: Path) -> str:
    shutil.copyfile(_shard_of(export, KEYS), export / "more.safetensors")
    return "more.safetensors"


def _other_model(export: Path) -> str:
    (export / "export_manifest.json").unlink()
    _edit_json(export / "config.json", lambda config: config.update(num_hidden_layers=3))
    return "model.layers.2.input_layernorm.weight"


def _word_for_a_number(export: Path) -> str:
    (export / "export_manifest.json").unlink()
    _edit_json(export / "config.json", lambda config: config.update(num_hidden_layers="two"))
    return "config.json"


@pytest.mark.parametrize(
    "damage",
    [_truncate, _flip, _drop, _drop_from_file_only, _add, _reshape, _cast, _remove_file, _add_file, _other_model,
     _word_for_a_number],
)  # fmt: skip
def test_a_damaged_export_is_refused_by_name(damage, plain, tmp_path):
    export = Path(shutil.copytree(plain[1], tmp_path / "export"))
    name = damage(export)
    with pytest.raises(ConversionError) as error:
        from_hf(export, tmp_path / "back")
    assert name in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "back").exists() or not list((tmp_path / "back").glob("*iter*"))


def test_a_flipped_bit_in_a_checkpoint_is_named_with_its_tensor(plain, tmp_path):
    from umv2_megatron.conversion.checkpoint_tensors import CheckpointTensors

    save = Path(shutil.copytree(plain[0], tmp_path / "run"))
    store, iteration = locate(save)
    key = "decoder.layers.1.mlp.memory.table.values"
    tensors = CheckpointTensors(store.path(iteration))
    tensors.rows(key, 0, 1)
    place = next(place for part, place in tensors._places.items())
    _flip_bit(store.path(iteration) / "__0_0.distcp", place + 40)
    with pytest.raises(CheckpointError, match=f"__0_0.distcp.*damaged: {key}$"):
        to_hf(save, tmp_path / "export")
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_layers": 3}, "decoder.layers.2.self_attention.linear_qkv.layer_norm_weight is missing"),
        ({"num_layers": 1}, r"decoder.layers.1.\S+ is extra"),
        ({"memory_num_keys": 17}, r"decoder.layers.0.mlp.memory.retrieval.keys has shape \(1, 2, 16, 32, 2\)"),
        ({"bf16": True}, "has dtype float32; expected bfloat16"),
        ({"ffn_variant": "moe", "num_moe_experts": 4}, "decoder.layers.0.mlp.router.weight is missing"),
        (
            {"ffn_variant": "moe", "moe_router_load_balancing_type": "sinkhorn"},
            "--moe-router-load-balancing-type sinkhorn",
        ),
        ({"ffn_variant": "moe", "moe_expert_capacity_factor": 1.5}, "--moe-expert-capacity-factor 1.5"),
        ({"qk_l2_norm": True}, "--qk-l2-norm True"),
    ],
)
def test_a_checkpoint_that_is_not_what_it_says_is_refused_by_name(changes, named, plain, tmp_path):
    save = Path(shutil.copytree(plain[0], tmp_path / "run"))
    store, iteration = locate(save)
    _edit_json(store.path(iteration) / "config.json", lambda config: config["values"].update(changes))
    republish(save)
    with pytest.raises(ConversionError, match=named):
        to_hf(save, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_a_changed_weight_fails_the_comparison(plain, tmp_path):
    export = Path(shutil.copytree(plain[1], tmp_path / "export"))
    (export / "export_manifest.json").unlink()
    name = "model.layers.1.mlp.down_proj.weight"

    def change(tensors):
        tensors[name][3, 5] += 0.05

    _rewrite(_shard_of(export, name), change)
    ((_, difference, good),) = forked(differences, plain[0], export)
    assert not good and difference > 1e-5


def test_every_changed_number_is_named(plain, tmp_path):
    """One low bit of a table row that no text may ever pick, two blocks of rows in each other's place."""
    assert different_weights(*plain) == ()
    export = Path(shutil.copytree(plain[1], tmp_path / "export"))
    (export / "export_manifest.json").unlink()
    flipped, swapped = "model.layers.0.memory.table.values.0", "model.layers.1.memory.table.pre_values.0"

    def flip(tensors):
        tensors[flipped].view(torch.int32)[200, 7] ^= 1

    def swap(tensors):
        tensors[swapped][0:32], tensors[swapped][96:128] = (
            tensors[swapped][96:128].clone(),
            tensors[swapped][0:32].clone(),
        )

    _rewrite(_shard_of(export, flipped), flip)
    _rewrite(_shard_of(export, swapped), swap)
    one, other = different_weights(plain[0], export)
    width = 8
    assert one == f"{flipped} differs in 1 of {256 * 24} numbers, first in row 200"
    assert other == f"{swapped} differs in {64 * width} of {256 * width} numbers, first in row 0"


# -- pickles -------------------------------------------------------------------------------------------------------


class Canary:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


def _plant_in_shard(path: Path, canary: Canary) -> None:
    """Put a payload into the archive of one stored tensor, in the place of its description, at the same length."""
    import zipfile

    from umv2_megatron.training.torch_dist_io import read_metadata_safely

    metadata = read_metadata_safely(path)
    index, place = next(
        (index, place) for index, place in metadata.storage_data.items() if index.fqn.endswith("retrieval.keys")
    )
    shard = path / place.relative_path
    whole = shard.read_bytes()
    folder = path.parent / "forged"
    folder.mkdir()
    archive = folder / "archive"
    archive.write_bytes(whole[place.offset : place.offset + place.length])
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(folder / "new", "w") as new:
        for entry in old.infolist():
            data = pickle.dumps(canary) if entry.filename.endswith("data.pkl") else old.read(entry)
            new.writestr(entry.filename, data)
    forged = (folder / "new").read_bytes()
    metadata.storage_data[index] = type(place)(place.relative_path, len(whole), len(forged))
    shard.write_bytes(whole + forged)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    shutil.rmtree(folder)


@pytest.mark.parametrize("where", ["metadata", "shard", "common"])
def test_a_payload_in_a_checkpoint_never_runs(where, plain, tmp_path):
    save, canary = Path(shutil.copytree(plain[0], tmp_path / "run")), Canary(tmp_path / "ran")
    store, iteration = locate(save)
    path = store.path(iteration)
    if where == "shard":
        _plant_in_shard(path, canary)
    else:
        (path / {"metadata": ".metadata", "common": "common.pt"}[where]).write_bytes(pickle.dumps(canary))
    republish(save)
    if where == "common":
        to_hf(save, tmp_path / "export")  # it is not even read
    else:
        with pytest.raises(ValueError, match="does not belong there"):
            to_hf(save, tmp_path / "export")
    assert not canary.path.exists()
    pickle.loads(pickle.dumps(canary))
    assert canary.path.exists(), "the payload would not have shown"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "first safetensors file"])
def test_pickled_weights_in_an_export_are_refused_and_never_run(name, plain, tmp_path):
    export, canary = Path(shutil.copytree(plain[1], tmp_path / "export")), Canary(tmp_path / "ran")
    first = sorted(path.name for path in export.glob("*.safetensors"))[0]
    target = export / (name if name.endswith(".bin") else first)
    target.write_bytes(pickle.dumps(canary))
    with pytest.raises(ConversionError, match=target.name):
        from_hf(export, tmp_path / "back")
    assert not canary.path.exists()


def test_what_a_trainer_leaves_beside_the_weights_is_not_read(plain, tmp_path):
    export, canary = Path(shutil.copytree(plain[1], tmp_path / "export")), Canary(tmp_path / "ran")
    (export / "export_manifest.json").unlink()
    pickles = ["optimizer.pt", "rng_state_0.pth", "scaler.pt", "scheduler.pt", "training_args.bin"]
    for name in pickles:
        (export / name).write_bytes(pickle.dumps(canary))
    (export / "trainer_state.json").write_text("{}")
    (export / "checkpoint-500").mkdir()
    shutil.copyfile(sorted(export.glob("*.safetensors"))[0], export / "checkpoint-500" / "model.safetensors")
    said: list[str] = []
    from_hf(export, tmp_path / "back", said.append)
    assert any(line.endswith("no weights: " + ", ".join(pickles)) for line in said), said
    assert not canary.path.exists()


def _differences_and_class(save: Path, export: Path) -> tuple[bool, str]:
    from transformers import AutoModelForCausalLM

    import umv2_megatron.hf  # noqa: F401

    return differences(save, export)[0][2], type(AutoModelForCausalLM.from_pretrained(export)).__module__


def test_code_in_an_export_runs_only_on_request(plain, tmp_path):
    """Neither comparing nor loading by the registered classes runs the modeling files of an export."""
    export, ran = Path(shutil.copytree(plain[1], tmp_path / "export")), tmp_path / "ran"
    (export / "export_manifest.json").unlink()
    with open(export / "modeling_umv2.py", "a", encoding="utf-8") as file:
        file.write(f"\nopen({str(ran)!r}, 'w').close()\n")
    assert forked(_differences_and_class, plain[0], export) == (True, "umv2_megatron.hf.modeling_umv2")
    assert not ran.exists()


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
    _flip_bit(unfinished / "model-00002-of-00007.safetensors", 900)
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


def _tool(*arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the tool, in a process that has its imports already."""
    sys.argv = ["convert_checkpoint.py", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(str(ROOT / "tools" / "convert_checkpoint.py"), run_name="__main__")
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
    return code, out.getvalue(), err.getvalue()


def _session(save: Path, folder: Path) -> list[tuple[int, str, str]]:
    """The commands of docs/hugging-face.md, one after the other, and a comparison that must fail."""
    export, back = str(folder / "export"), str(folder / "back")
    done = [_tool("to-hf", "--load", str(save), "--save", export)]
    done.append(_tool("from-hf", "--load", export, "--save", back))
    done.append(_tool("verify", "--load", back, "--hf", export, "--tokens", "20", "--tolerance", "1e-30"))
    done.append(_tool("verify", "--load", str(save), "--hf", export, "--weights-only"))
    return done


def test_the_commands(plain, tmp_path):
    there, back, different, weights = forked(_session, plain[0], tmp_path)
    assert there[0] == 0 and f"exported iteration 2 of {plain[0]}" in there[1]
    assert back[0] == 0 and f"wrote {tmp_path / 'back' / 'iter_0000000'}" in back[1]
    assert different[0] == 1 and "of 20 tokens: TOO FAR APART" in different[1]
    assert weights[0] == 0 and "the same bit for bit: good" in weights[1] == weights[1].splitlines()[0] + "\n"
    assert different[2].strip().splitlines()[-1].startswith("convert_checkpoint.py: error: the export does not compute")


def test_the_tool_ends_a_mistake_in_one_line(plain, tmp_path):
    flags = ("to-hf", "--load", str(plain[0]), "--save", str(tmp_path / "x"), "--max-shard-size", "4 apples")
    code, _, told = forked(_tool, *flags)
    assert code == 2 and "--max-shard-size is '4 apples'" in told
    assert len(told.strip().splitlines()) == 1, told
    with pytest.raises(ConversionError, match="exists already"):
        to_hf(*plain)
    with pytest.raises(ConversionError, match="holds checkpoints already"):
        from_hf(plain[1], plain[0])
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        to_hf(tmp_path, tmp_path / "export")
