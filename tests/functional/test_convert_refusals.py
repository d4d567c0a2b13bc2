"""Conversions refuse by name what is damaged or is not what it says, find every changed number, and run no payload."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conversions import (
    differences,
    different_weights,
    edit_json,
    flip_bit,
    forked,
    from_hf,
    republish,
    rewrite,
    shard_of,
    to_hf,
    tool,
    with_export,
)

from umv2_megatron.checkpoint.contents import locate
from umv2_megatron.conversion.safetensors_files import ConversionError
from umv2_megatron.conversion.settings import refuse_unsupported
from umv2_megatron.durable_files import CheckpointError


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint of one rank, and its export in several files."""
    return with_export(tmp_path_factory.mktemp("plain"))


# -- damage --------------------------------------------------------------------------------------------------------


KEYS = "model.layers.0.memory.retrieval.keys"


def _truncate(export: Path) -> str:
    path = shard_of(export, KEYS)
    path.write_bytes(path.read_bytes()[:-8])
    return path.name


def _flip(export: Path) -> str:
    path = shard_of(export, KEYS)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    flip_bit(path, 8 + length + json.loads(data[8 : 8 + length])[KEYS]["data_offsets"][0] + 3)
    return KEYS


def _drop(export: Path) -> str:
    (export / "export_manifest.json").unlink()
    rewrite(shard_of(export, KEYS), lambda tensors: tensors.pop(KEYS))
    edit_json(export / "model.safetensors.index.json", lambda index: index["weight_map"].pop(KEYS))
    return KEYS


def _drop_from_file_only(export: Path) -> str:
    (export / "export_manifest.json").unlink()
    rewrite(shard_of(export, KEYS), lambda tensors: tensors.pop(KEYS))
    return KEYS


def _add(export: Path) -> str:
    (export / "export_manifest.json").unlink()
    path = shard_of(export, KEYS)
    rewrite(path, lambda tensors: tensors.update({"model.layers.0.odd": torch.zeros(2)}))
    add = {"model.layers.0.odd": path.name}
    edit_json(export / "model.safetensors.index.json", lambda index: index["weight_map"].update(add))
    return "model.layers.0.odd"


def _reshape(export: Path) -> str:
    (export / "export_manifest.json").unlink()
    rewrite(shard_of(export, KEYS), lambda tensors: tensors.update({KEYS: tensors[KEYS].flatten()}))
    return KEYS


def _cast(export: Path) -> str:
    (export / "export_manifest.json").unlink()
    rewrite(shard_of(export, KEYS), lambda tensors: tensors.update({KEYS: tensors[KEYS].half()}))
    return KEYS


def _remove_file(export: Path) -> str:
    path = shard_of(export, KEYS)
    path.unlink()
    return path.name


def _add_file(export: Path) -> str:
    shutil.copyfile(shard_of(export, KEYS), export / "more.safetensors")
    return "more.safetensors"


def _other_model(export: Path) -> str:
    (export / "export_manifest.json").unlink()
    edit_json(export / "config.json", lambda config: config.update(num_hidden_layers=3))
    return "model.layers.2.input_layernorm.weight"


def _word_for_a_number(export: Path) -> str:
    (export / "export_manifest.json").unlink()
    edit_json(export / "config.json", lambda config: config.update(num_hidden_layers="two"))
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
    flip_bit(store.path(iteration) / "__0_0.distcp", place + 40)
    with pytest.raises(CheckpointError, match=f"__0_0.distcp.*damaged: {key}$"):
        to_hf(save, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_the_weights_of_a_run_in_fp8_are_exported(plain, tmp_path):
    """FP8 is how training computed; the weights are what they are without it."""
    save = Path(shutil.copytree(plain[0], tmp_path / "run"))
    store, iteration = locate(save)
    fp8 = {"fp8": "hybrid", "fp8_recipe": "delayed", "tp_only_amax_red": True, "fp8_param_gather": True}
    edit_json(store.path(iteration) / "config.json", lambda config: config["values"].update(fp8))
    republish(save)
    to_hf(save, tmp_path / "export")
    assert different_weights(plain[0], tmp_path / "export") == ()


def test_a_negative_capacity_of_experts_is_none(plain):
    config = json.loads((locate(plain[0])[0].path(locate(plain[0])[1]) / "config.json").read_text())
    refuse_unsupported({"values": {**config["values"], "moe_expert_capacity_factor": -1.0}})
    with pytest.raises(ConversionError, match="--moe-expert-capacity-factor 0.5"):
        refuse_unsupported({"values": {**config["values"], "moe_expert_capacity_factor": 0.5}})


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
    edit_json(store.path(iteration) / "config.json", lambda config: config["values"].update(changes))
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

    rewrite(shard_of(export, name), change)
    ((_, difference, good),) = forked(differences, plain[0], export)
    assert not good and difference > 1e-5


def test_every_changed_number_is_named(plain, tmp_path):
    """One low bit of a table row that no text may ever pick, two blocks of rows in each other's place, not a number."""
    assert different_weights(*plain) == ()
    export = Path(shutil.copytree(plain[1], tmp_path / "export"))
    (export / "export_manifest.json").unlink()
    flipped, swapped = "model.layers.0.memory.table.values.0", "model.layers.1.memory.table.pre_values.0"
    vector = "model.layers.1.memory.retrieval.u"

    def flip(tensors):
        tensors[flipped].view(torch.int32)[200, 7] ^= 1

    def swap(tensors):
        tensors[swapped][0:32], tensors[swapped][96:128] = (
            tensors[swapped][96:128].clone(),
            tensors[swapped][0:32].clone(),
        )

    rewrite(shard_of(export, flipped), flip)
    rewrite(shard_of(export, swapped), swap)
    rewrite(shard_of(export, vector), lambda tensors: tensors[vector][0, 1:].fill_(float("nan")))
    one, unknown, other = different_weights(plain[0], export)
    width = 8
    assert unknown == f"{vector} differs in 1 of 2 numbers, first in row 0"
    assert one == f"{flipped} differs in 1 of {256 * 24} numbers, first in row 200"
    assert other == f"{swapped} differs in {64 * width} of {256 * width} numbers, first in row 0"


@pytest.mark.parametrize("difference", [float("inf"), float("nan"), 0.2])
def test_what_is_not_finite_or_above_its_limit_is_not_good(difference):
    """An overflow in 16 bits makes the limit infinite, too, where the checkpoint's own model has it."""
    from umv2_megatron.conversion.verify import Comparison

    limit = 0.1 if difference == 0.2 else float("inf")
    assert not Comparison(torch.float16, "difference", difference, limit, 1.0, 1).good
    assert Comparison(torch.float16, "difference", 0.1, limit, 1.0, 1).good


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

    from umv2_megatron.checkpoint.torch_dist_io import read_metadata_safely

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


@pytest.mark.parametrize(
    "name", ["pytorch_model-00001-of-00002.bin", "pytorch_model_fsdp.bin", "first safetensors file"]
)
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


# -- command line --------------------------------------------------------------------------------------------------


def test_the_tool_ends_a_mistake_in_one_line(plain, tmp_path):
    flags = ("to-hf", "--load", str(plain[0]), "--save", str(tmp_path / "x"), "--max-shard-size", "4 apples")
    code, _, told = forked(tool, *flags)
    assert code == 2 and "--max-shard-size is '4 apples'" in told
    assert len(told.strip().splitlines()) == 1, told
    with pytest.raises(ConversionError, match="exists already"):
        to_hf(*plain)
    with pytest.raises(ConversionError, match="holds checkpoints already"):
        from_hf(plain[1], plain[0])
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        to_hf(tmp_path, tmp_path / "export")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--tolerance", "nan"), "--tolerance is nan; expected a number of 0 or more"),
        (("--tolerance", "-1"), "--tolerance is -1.0; expected a number of 0 or more"),
        (("--tolerance", "inf"), "--tolerance is inf; expected a number of 0 or more"),
        (("--tokens", "0"), "--tokens is 0; expected 1 or more"),
        (("--text", os.devnull), f"--text is {os.devnull}; expected a file with text in it"),
        (
            ("--text", "/nowhere/text"),
            "--text is /nowhere/text; expected a readable UTF-8 text file: [Errno 2] No such file or directory: "
            "'/nowhere/text'",
        ),
        (
            ("--text", __file__),
            f"--text is {__file__}, but the checkpoint has no tokenizer to read it; leave --text away",
        ),
    ],
)
def test_a_comparison_that_would_say_nothing_is_refused(flags, sentence, plain):
    code, out, told = forked(tool, "verify", "--load", str(plain[0]), "--hf", str(plain[1]), *flags)
    assert (code, out) == (2, "") and told.strip() == f"convert_checkpoint.py: error: {sentence}"
