"""What transformers promises of a model's files, configuration, initialisation and copies.

``test_hf_model.py`` and ``test_hf_tables.py`` hold what is special here: remote code, places of tables, u and t.
"""

from __future__ import annotations

import copy
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, initialization

sys.path.insert(0, str(Path(__file__).resolve().parent))
from tiny_model import CONTRACT, QUICK, VOCABULARY, slow_but, tiny_config, tiny_model, tokens  # noqa: E402

from umv2_megatron.hf import UMv2Config, UMv2ForCausalLM, UMv2Model  # noqa: E402

every_variant = pytest.mark.parametrize("variant", slow_but(QUICK, CONTRACT))
WITH_TABLES = [name for name, changes in CONTRACT.items() if "ffn_variant" not in changes]


def same_states(first: nn.Module, second: nn.Module) -> bool:
    """Whether both have the same names, dtypes and bits."""
    one, other = first.state_dict(), second.state_dict()
    assert one.keys() == other.keys()
    return all(tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items())


def loaded(folder: Path, kind: Any = UMv2ForCausalLM, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The model, and what of the report on its keys is not empty."""
    model, report = kind.from_pretrained(folder, output_loading_info=True, **options)
    return model.eval(), {name: found for name, found in report.items() if found}


@every_variant
@pytest.mark.parametrize("shard", ["1GB", "60KB"])
def test_a_saved_model_comes_back_with_the_same_bits(variant: str, shard: str, tmp_path: Path) -> None:
    model = tiny_model(**CONTRACT[variant])
    model.save_pretrained(tmp_path, max_shard_size=shard)
    again, report = loaded(tmp_path)
    assert report == {} and same_states(model, again) and not again.training
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (tmp_path / "model.safetensors.index.json").exists() == (shard == "60KB")
    names: list[str] = []
    for path in files:
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            names += file.keys()
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert sorted(names) == sorted(model.state_dict().keys() - tied)
    for name, parameter in again.named_parameters():
        assert parameter.is_contiguous() and parameter.requires_grad and not parameter.is_meta, name
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == bool(tied)
    again.save_pretrained(tmp_path / "second", max_shard_size=shard)
    if len(files) == 1:  # a model that was loaded is cut into files in another order
        assert (tmp_path / "second" / files[0].name).read_bytes() == files[0].read_bytes()
    assert same_states(loaded(tmp_path / "second")[0], model)


@every_variant
def test_decoder_and_whole_model_read_each_other_s_files(variant: str, tmp_path: Path) -> None:
    model = tiny_model(**CONTRACT[variant])
    model.save_pretrained(tmp_path / "whole")
    decoder, report = loaded(tmp_path / "whole", UMv2Model)
    assert report.keys() <= {"unexpected_keys"} and set(report.get("unexpected_keys", ())) <= {"lm_head.weight"}
    assert same_states(decoder, model.model)
    decoder.save_pretrained(tmp_path / "decoder")
    again, report = loaded(tmp_path / "decoder")
    missing = set() if model.config.tie_word_embeddings else {"lm_head.weight"}
    assert set(report.get("missing_keys", ())) == missing and report.keys() <= {"missing_keys"}
    assert same_states(again.model, model.model) and again.lm_head.weight.isfinite().all()


@every_variant
def test_what_is_missing_is_told_and_initialised(variant: str, tmp_path: Path) -> None:
    model = tiny_model(**CONTRACT[variant])
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    dropped = [name for name in state if name.startswith("model.layers.1.")] + ["model.norm.weight"]
    given = {name: tensor for name, tensor in state.items() if name not in dropped}
    given["model.layers.0.something.weight"] = torch.zeros(3)
    if not model.config.tie_word_embeddings:
        given["lm_head.weight"] = model.lm_head.weight
    again, report = UMv2ForCausalLM.from_pretrained(
        None, config=model.config, state_dict=given, output_loading_info=True
    )
    assert set(report["missing_keys"]) == set(dropped)
    assert set(report["unexpected_keys"]) == {"model.layers.0.something.weight"}
    for name, tensor in again.state_dict().items():
        assert not tensor.is_meta and (tensor.dtype.is_floating_point is False or tensor.isfinite().all()), name
        if name in given:
            assert torch.equal(tensor, given[name]), name
    assert torch.equal(again.model.norm.weight, torch.ones(64))
    assert 0.15 < again.model.layers[1].self_attn.q_proj.weight.std() < 0.25  # initializer_range
    assert again.eval()(tokens(2, 9)).logits.isfinite().all()
    # other sizes are an error, unless they are to be drawn anew
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        UMv2ForCausalLM.from_pretrained(tmp_path, vocab_size=50)
    other = UMv2ForCausalLM.from_pretrained(tmp_path, vocab_size=50, ignore_mismatched_sizes=True).eval()
    assert other(tokens(2, 9) % 50).logits.shape == (2, 9, 50)
    assert torch.equal(other.model.norm.weight, model.model.norm.weight)


@every_variant
def test_configuration_round_trips(variant: str, tmp_path: Path) -> None:
    config = tiny_config(**CONTRACT[variant], rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    config.my_own_field = {"kept": [1, 2]}
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "umv2"
    not_said = {"_name_or_path": "", "architectures": None}
    for again in (
        UMv2Config.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
        UMv2Config.from_dict(config.to_dict()),
        UMv2Config.from_json_file(str(tmp_path / "config.json")),
        UMv2Config(**config.to_diff_dict()),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
    ):
        assert type(again) is UMv2Config
        assert {**again.to_dict(), **not_said} == {**config.to_dict(), **not_said}
        assert again.memory_layers == config.memory_layers and again.my_own_field == {"kept": [1, 2]}
    assert UMv2Config.from_pretrained(tmp_path, hidden_dropout=0.5).hidden_dropout == 0.5
    default = UMv2Config()
    assert default.to_dict() == UMv2Config(**default.to_dict()).to_dict()
    assert (
        default.num_key_value_heads == default.num_attention_heads == AutoConfig.for_model("umv2").num_attention_heads
    )


def seeded_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have transformers draw weights that depend on shapes alone, not on the order of the calls."""

    def draw(tensor: Tensor, mean: float = 0.0, std: float = 1.0, generator: Any = None) -> Tensor:
        if not getattr(tensor, "_is_hf_initialized", False):
            numbers = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel()))
            tensor.copy_(numbers * std + mean)
        return tensor

    monkeypatch.setattr(initialization, "normal_", draw)


@every_variant
def test_initialisation_does_not_depend_on_the_device_it_begins_on(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device and filled afterwards, from no weights at all, and directly."""
    seeded_by_name(monkeypatch)
    direct = tiny_model(**CONTRACT[variant])
    with torch.device("meta"):
        late = UMv2ForCausalLM(tiny_config(**CONTRACT[variant]))
    assert {tensor.device.type for tensor in (*late.parameters(), *late.buffers())} == {"meta"}
    late.to_empty(device="cpu")
    for tensor in (*late.parameters(), *late.buffers()):
        tensor.data.fill_(7)  # what memory that is not initialised may hold
    late.init_weights()
    bare = UMv2ForCausalLM.from_pretrained(None, config=tiny_config(**CONTRACT[variant]), state_dict={})
    for other in (late, bare):
        assert same_states(direct, other)
        assert all(torch.equal(one, two) for one, two in zip(direct.buffers(), other.buffers(), strict=True))
    for other in (late, bare):
        assert torch.equal(other.eval()(tokens(2, 9)).logits, direct(tokens(2, 9)).logits)


@every_variant
def test_no_tensor_is_hidden(variant: str) -> None:
    """All that a model computes with is a parameter or a buffer, before its first forward."""
    model = tiny_model(**CONTRACT[variant])
    for name, module in model.named_modules():
        held = [key for key, value in vars(module).items() if isinstance(value, Tensor)]
        assert held == [], (name, held)
    sizes = {name: tensor.untyped_storage().data_ptr() for name, tensor in model.named_parameters()}
    assert len(set(sizes.values())) == len(sizes)
    assert model.num_parameters() == sum(parameter.numel() for parameter in model.parameters())


@every_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(**CONTRACT[variant])
    model.save_pretrained(tmp_path / "float32")
    cast = UMv2ForCausalLM.from_pretrained(tmp_path / "float32", dtype=dtype).eval()
    assert cast.dtype == cast.config.dtype == dtype and {p.dtype for p in cast.parameters()} == {dtype}
    for name, parameter in cast.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).to(dtype)), name
    with torch.no_grad():
        assert cast(tokens(2, 9)).logits.dtype == dtype
    cast.save_pretrained(tmp_path / "cast")
    for options in ({}, {"dtype": "auto"}, {"dtype": str(dtype).removeprefix("torch.")}):
        again, report = loaded(tmp_path / "cast", **options)
        assert report == {} and again.dtype == dtype and same_states(again, cast)
    assert UMv2ForCausalLM.from_pretrained(tmp_path / "cast", dtype=torch.float32).dtype == torch.float32


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("place", ["device", "cpu", "mmap"])
@pytest.mark.parametrize("variant", slow_but(("plain", "ring", "ultramem"), WITH_TABLES))
@pytest.mark.parametrize("how", COPIES)
def test_copies_compute_the_same_and_are_their_own(how: str, variant: str, place: str, tmp_path: Path) -> None:
    tiny_model(**{**CONTRACT[variant], "memory_table_chunk_rows": 200}).save_pretrained(tmp_path)
    model, batch = UMv2ForCausalLM.from_pretrained(tmp_path, memory_tables=place).eval(), tokens(2, 9)
    with torch.no_grad():
        expected = model(batch).logits
        other = COPIES[how](model)
        assert torch.equal(other(batch).logits, expected)
        assert other.config.to_dict() == model.config.to_dict()
        for parameter in other.parameters():
            parameter.neg_()
        assert not torch.equal(other(batch).logits, expected) and torch.equal(model(batch).logits, expected)
        tables, originals = other.value_tables(), model.value_tables()
        assert tables.keys() == originals.keys()
        readers = [layer.memory.find_table() for layer in other.model.layers if layer.memory is not None]
        assert {id(table) for table in readers} == {id(table) for table in tables.values()}
        assert not {id(table) for table in readers} & {id(table) for table in originals.values()}
    if place == "mmap":  # what is pickled is where the rows are, not the rows
        for table in originals.values():
            rows = sum(chunk.nbytes for kind in table.widths for chunk in getattr(table, kind))
            assert len(pickle.dumps(table)) < rows / 2
    assert other.generate(batch, max_new_tokens=2, do_sample=False).shape == (2, 11)


def test_copies_of_models_without_tables() -> None:
    for variant in ("moe", "dense"):
        model = tiny_model(**CONTRACT[variant])
        for make in COPIES.values():
            assert same_states(make(model), model)


def test_a_state_goes_through_torch_save(tmp_path: Path) -> None:
    model, other = tiny_model(), tiny_model(seed=3)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    assert not same_states(model, other)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), assign=True)
    other.tie_weights()
    assert same_states(model, other) and other.lm_head.weight is other.model.embed_tokens.weight
    assert torch.equal(other(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


def test_generation_settings_are_saved_with_the_model(tmp_path: Path) -> None:
    model = tiny_model(eos_token_id=5, bos_token_id=4, pad_token_id=0)
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    settings = again.generation_config
    assert (settings.eos_token_id, settings.bos_token_id, settings.max_new_tokens) == (5, 4, 3)
    assert again.generate(tokens(1, 4), do_sample=False, eos_token_id=VOCABULARY).shape == (1, 7)
