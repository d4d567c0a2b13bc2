"""Quantizers on the Hugging Face model: they replace every projection, what they make is used, and is close.

``python -m pytest tests/unit/hf/test_quantizers.py -m slow -s`` prints the table of docs/hugging-face.md.
"""

from __future__ import annotations

import copy
import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from tiny_model import VARIANTS, tiny_config, tiny_model  # noqa: E402
from trained_model import NAMES, sizes, text, trained  # noqa: E402

from umv2_megatron.hf import UMv2ForCausalLM  # noqa: E402
from umv2_megatron.hf.experts_umv2 import UMv2Experts  # noqa: E402

pytestmark = pytest.mark.thorough

HELD_OUT = text(16, 64, seed=5)
SOURCE = "pip install --no-deps -r requirements-hf-tools.txt"
INT8 = ("device-int8", "cpu-int8")


def needed(package: str) -> Any:
    return pytest.importorskip(package, reason=f"{package} is not installed: {SOURCE}")


def by_bitsandbytes(**options: Any) -> Callable[..., UMv2ForCausalLM]:
    def load(folder: Path, **more: Any) -> UMv2ForCausalLM:
        from transformers import BitsAndBytesConfig

        needed("bitsandbytes"), needed("accelerate")
        # it says in every product that it computes in float16
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return UMv2ForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**options), **more).eval()

    return load


def by_torchao(kind: str) -> Callable[..., UMv2ForCausalLM]:
    def load(folder: Path, **more: Any) -> UMv2ForCausalLM:
        from transformers import TorchAoConfig

        needed("torchao"), needed("accelerate")
        made = getattr(importlib.import_module("torchao.quantization"), kind)()
        return UMv2ForCausalLM.from_pretrained(folder, quantization_config=TorchAoConfig(made), **more).eval()

    return load


def by_quantize_dynamic(folder: Path, **more: Any) -> UMv2ForCausalLM:
    model = UMv2ForCausalLM.from_pretrained(folder, **more).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torchao is to follow it
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


# The loader, bytes of a number of a weight, and how far the loss may be off, in nats.
TOOLS: dict[str, tuple[Callable[..., UMv2ForCausalLM], float, float]] = {
    "bitsandbytes LLM.int8": (by_bitsandbytes(load_in_8bit=True), 1, 0.01),
    "bitsandbytes nf4": (by_bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"), 0.5, 0.05),
    "torchao int8, weights": (by_torchao("Int8WeightOnlyConfig"), 1, 0.01),
    "torchao int8, activations too": (by_torchao("Int8DynamicActivationInt8WeightConfig"), 1, 0.01),
    "torchao float8, weights": (by_torchao("Float8WeightOnlyConfig"), 1, 0.02),
    "quantize_dynamic": (by_quantize_dynamic, 1, 0.01),
}


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("trained")

    def export(name: str) -> Path:
        if not (folder / name).exists():
            trained(name).save_pretrained(folder / name)
        return folder / name

    return export


@torch.no_grad()
def loss(model: nn.Module) -> float:
    return model(HELD_OUT, labels=HELD_OUT).loss.item()


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """What ``tensor`` is made of: torchao's are several."""
    if type(tensor.data) is Tensor:
        yield tensor
    else:
        for name in tensor.data.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(tensor.data, name))


def bytes_of(model: nn.Module) -> int:
    """Of parameters, buffers, and the packed weights of torch's own dynamic quantization."""
    held = [tensor for whole in (*model.parameters(), *model.buffers()) for tensor in plain_tensors(whole)]
    packed = [module.weight().int_repr() for module in model.modules() if callable(getattr(module, "weight", None))]
    states = [getattr(parameter, "quant_state", None) for parameter in model.parameters()]
    held += packed + [state.absmax for state in states if state is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def projections(model: nn.Module) -> list[str]:
    """Linear layers as they were, except the output layer, which quantizers leave out where it is tied."""
    return [
        name for name, module in model.named_modules()
        if type(module) is nn.Linear and type(module.weight.data) is Tensor and name != "lm_head"
        and module.weight.dtype == torch.float32
    ]  # fmt: skip


def check(quantized: nn.Module, whole: UMv2ForCausalLM, size: float, limit: float) -> tuple[int, int, float, float]:
    """Bytes and losses of ``whole`` and ``quantized``. Raises AssertionError where nothing has been quantized, or not
    everything, where it is not used, and where the loss is further off than ``limit``."""
    names = projections(whole)
    numbers = sum(whole.get_submodule(name).weight.numel() for name in names)
    assert names and not projections(quantized)
    before, after = bytes_of(whole), bytes_of(quantized)
    saved = numbers * (4 - size)
    assert 0.9 * saved < before - after < saved + whole.lm_head.weight.numel() * 4
    losses = loss(whole), loss(quantized)
    assert losses[0] != losses[1] and abs(losses[0] - losses[1]) < limit
    return before, after, *losses


def check_tool(tool: str, name: str, folder: Path, copied: Path) -> None:
    load, size, limit = TOOLS[tool]
    quantized, whole = load(folder), UMv2ForCausalLM.from_pretrained(folder).eval()
    assert loss(whole) < 1.2  # of ln(11), 2.4: the text has been learnt
    if tool != "quantize_dynamic":
        quantized.save_pretrained(copied)
    before, after, of_whole, of_quantized = check(quantized, whole, size, limit)
    print(f"\n{tool} | {name} | {before:,} | {after:,} | {of_whole:.4f} | {of_quantized:.4f}")
    assert quantized.generate(HELD_OUT[:2, :5], max_new_tokens=4, do_sample=False).shape == (2, 9)
    if tool != "quantize_dynamic":
        assert loss(UMv2ForCausalLM.from_pretrained(copied).eval()) == of_quantized


@pytest.mark.parametrize("name", ["plain", pytest.param("moe", marks=pytest.mark.slow)])
@pytest.mark.parametrize("tool", TOOLS)
def test_projections_are_quantized_and_used(tool: str, name: str, exports: Any, tmp_path: Path) -> None:
    check_tool(tool, name, exports(name), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("plain", "moe")])
@pytest.mark.parametrize("tool", TOOLS)
def test_projections_are_quantized_and_used_everywhere(tool: str, name: str, exports: Any, tmp_path: Path) -> None:
    check_tool(tool, name, exports(name), tmp_path)


def test_the_check_finds_quantizers_that_do_nothing(exports: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = UMv2ForCausalLM.from_pretrained(exports("plain")).eval()
    with pytest.raises(AssertionError):
        check(copy.deepcopy(whole), whole, 1, 0.01)
    half = by_quantize_dynamic(exports("plain"))
    half.model.layers[1].memory.retrieval.query = whole.model.layers[1].memory.retrieval.query
    with pytest.raises(AssertionError):
        check(half, whole, 1, 0.01)
    # and a model that reads its own copies of the weights
    unused = by_quantize_dynamic(exports("plain"))
    monkeypatch.setattr(unused, "forward", whole.forward)
    with pytest.raises(AssertionError):
        check(unused, whole, 1, 0.01)


class Zero(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_every_projection_computes_by_its_own_forward(name: str) -> None:
    model = tiny_model(**VARIANTS[name])
    batch = HELD_OUT[:2, :12]
    logits = model(batch).logits
    for place in projections(model) + ["lm_head"]:
        module = model.get_submodule(place)
        module.__class__ = Zero
        assert not torch.equal(model(batch).logits, logits), place
        module.__class__ = nn.Linear
    assert torch.equal(model(batch).logits, logits)


def test_fp8_by_transformers_takes_experts_too() -> None:
    """It computes on a GPU only; what it replaces is seen without one."""
    needed("accelerate")
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import FP8Experts, FP8Linear, replace_with_fp8_linear

    for name in NAMES:
        model = tiny_model(**VARIANTS[name])
        wanted, experts = len(projections(model)), sum(isinstance(module, UMv2Experts) for module in model.modules())
        replace_with_fp8_linear(model, ["lm_head"], FineGrainedFP8Config())
        modules = list(model.modules())
        assert sum(isinstance(module, FP8Linear) for module in modules) == wanted and not projections(model)
        assert sum(isinstance(module, FP8Experts) for module in modules) == experts == (4 if name == "moe" else 0)


def test_four_bits_take_sizes_that_suit_and_the_others_are_left_out(tmp_path: Path) -> None:
    """As docs/hugging-face.md says it."""
    tiny_model(**VARIANTS["plain"]).save_pretrained(tmp_path)
    with torch.device("meta"):
        shapes = UMv2ForCausalLM(tiny_config(**VARIANTS["plain"]))
    skip = [
        name for name, module in shapes.named_modules()
        if isinstance(module, nn.Linear) and (module.out_features % 32 or module.in_features % 64)
    ]  # fmt: skip
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["lm_head", *skip]}
    model = by_bitsandbytes(**options)(tmp_path)
    assert 0 < len(skip) < len(projections(shapes)) and projections(model) == skip
    assert torch.isfinite(torch.tensor(loss(model)))


def test_four_bits_are_saved_before_the_first_forward(exports: Any, tmp_path: Path) -> None:
    model = TOOLS["bitsandbytes nf4"][0](exports("plain"))
    if not importlib.import_module("bitsandbytes.functional").has_avx512bf16():
        pytest.skip("bitsandbytes rearranges weights on CPUs with AVX512-BF16 only")
    model.save_pretrained(tmp_path)
    loss(model)
    with pytest.raises(ValueError, match="save it before its first forward"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["plain", "ring", "delayed", "memory-plus", "v1"])
def test_tables_in_int8_are_those_in_float32_rounded(name: str, exports: Any, tmp_path: Path) -> None:
    folder = exports(name) if name == "plain" else tmp_path
    if name != "plain":
        tiny_model(**sizes(name)).save_pretrained(folder)
    whole = UMv2ForCausalLM.from_pretrained(folder).eval()
    rounded = copy.deepcopy(whole)
    rows = size = 0
    for table in rounded.value_tables().values():
        for kind in table.widths:
            for chunk in getattr(table, kind):
                scale = chunk.data.abs().amax(1, keepdim=True) / 127
                chunk.data = (chunk.data / scale).round() * scale
                rows, size = rows + chunk.shape[0], size + chunk.numel()
    batch = HELD_OUT[:3]
    logits = rounded(batch).logits
    assert not torch.equal(whole(batch).logits, logits) and abs(loss(rounded) - loss(whole)) < 0.002
    for place in INT8:
        model = UMv2ForCausalLM.from_pretrained(folder, memory_tables=place).eval()
        assert torch.equal(model(batch).logits, logits)
        held = 0 if place == "cpu-int8" else size + 4 * rows
        assert bytes_of(whole) - bytes_of(model) == 4 * size - held
        half = copy.deepcopy(model).to(torch.bfloat16)
        assert abs(loss(half) - loss(whole)) < 0.1
        for table, other in zip(half.value_tables().values(), model.value_tables().values()):
            for kind in table.widths:
                assert all(torch.equal(a, b) and a.dtype == torch.int8
                           for a, b in zip(getattr(table, kind), getattr(other, kind), strict=True))  # fmt: skip
        with pytest.raises(ValueError, match="expected exact ones to save"):
            model.save_pretrained(tmp_path / place)
        print(f"\n{place} | {name} | {bytes_of(whole):,} | {bytes_of(model):,} | {loss(whole):.4f} | {loss(model):.4f}")


def test_rows_of_zeros_and_of_large_numbers_are_kept() -> None:
    from umv2_megatron.hf.int8_rows_umv2 import exact_rows, int8_rows

    chunk = torch.randn(40_000, 5, generator=torch.Generator().manual_seed(1))
    chunk[3], chunk[4], chunk[5, 2], chunk[6] = 0, 1e30, 3e38, 1e-30
    found = exact_rows(int8_rows(chunk), torch.float32)
    assert int8_rows(chunk).shape == (40_000, 9)
    assert torch.all((found - chunk).abs() <= chunk.abs().amax(1, keepdim=True) / 253)
    half = int8_rows(chunk.bfloat16())
    assert torch.equal(exact_rows(half, torch.bfloat16), exact_rows(half, torch.float32).bfloat16())


def test_tables_in_int8_beside_quantized_projections(exports: Any) -> None:
    model = by_quantize_dynamic(exports("plain"), memory_tables="device-int8")
    whole = UMv2ForCausalLM.from_pretrained(exports("plain")).eval()
    assert bytes_of(model) < bytes_of(whole) / 3 and abs(loss(model) - loss(whole)) < 0.02


@torch.no_grad()
@pytest.mark.parametrize("place", INT8)
def test_tables_in_int8_are_compiled_whole(place: str, tmp_path: Path) -> None:
    """Also in several chunks."""
    model = tiny_model(num_hidden_layers=2, memory_table_chunk_rows=100).double()
    model(HELD_OUT[:1, :1])  # computes singular vectors
    model.save_pretrained(tmp_path)
    plain, batch = UMv2ForCausalLM.from_pretrained(tmp_path, memory_tables=place).eval(), HELD_OUT[:2, :10]
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(batch, use_cache=False).logits, plain(batch).logits, rtol=0, atol=1e-3)


def test_tables_in_int8_are_refused_where_they_can_not_be() -> None:
    batch = HELD_OUT[:1, :4]
    with pytest.raises(ValueError, match="memory_tables is 'mmap-int8'; expected one of"):
        UMv2ForCausalLM.from_pretrained("nowhere", memory_tables="mmap-int8")
    for place in INT8:
        with pytest.raises(ValueError, match=f"memory_tables is '{place}', but this model was not made by from_pretr"):
            UMv2ForCausalLM(tiny_config(), memory_tables=place)(batch)


def test_tables_in_int8_beside_offloaded_layers(tmp_path: Path) -> None:
    needed("accelerate")
    tiny_model(**VARIANTS["plain"]).save_pretrained(tmp_path)
    whole = loss(UMv2ForCausalLM.from_pretrained(tmp_path, memory_tables="cpu-int8").eval())
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {f"model.layers.{block}": "disk" if block == 2 else "cpu" for block in range(4)}
    options: dict[str, Any] = {"device_map": places, "offload_folder": tmp_path / "offload"}
    options["memory_tables"] = "device-int8"
    # not to the bit: layers with hooks do not take the faster product (``linear_umv2.project``)
    assert loss(UMv2ForCausalLM.from_pretrained(tmp_path, **options).eval()) == pytest.approx(whole, rel=1e-6)
    with pytest.raises(ValueError, match="device_map offloads layers.2.memory; expected layers that stay"):
        UMv2ForCausalLM.from_pretrained(tmp_path, offload_buffers=True, **options)


@pytest.mark.parametrize("name", ["plain", "v1", "memory-plus", "delayed", "moe"])
@pytest.mark.parametrize("kind", ["AdamW8bit", "Lion8bit"])
def test_reloaded_after_an_optimizer_of_eight_bits(kind: str, name: str, tmp_path: Path) -> None:
    """Updates past autograd: what is derived from parameters has to follow."""
    optimizer_of = getattr(needed("bitsandbytes").optim, kind)
    model = tiny_model(**sizes(name))
    before = loss(model)  # derives and keeps
    optimizer = optimizer_of(model.parameters(), lr=3e-3, min_8bit_size=256)
    for _ in range(3):
        model.train()
        model(HELD_OUT, labels=HELD_OUT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    held = [tensor for state in optimizer.state.values() for tensor in state.values()]
    assert any(torch.is_tensor(tensor) and tensor.dtype == torch.uint8 for tensor in held)
    after = loss(model.eval())
    assert after < before - 1e-2
    model.save_pretrained(tmp_path)
    assert loss(UMv2ForCausalLM.from_pretrained(tmp_path).eval()) == after


@pytest.mark.slow
def test_reloaded_after_torchao_s_optimizer_of_eight_bits(tmp_path: Path) -> None:
    """It compiles its step, which takes a minute."""
    needed("torchao")
    optim = importlib.import_module("torchao.optim")
    model = tiny_model(**sizes("plain"))
    before = loss(model)
    optimizer = optim.AdamW8bit(model.parameters(), lr=3e-3)
    for _ in range(3):
        model.train()
        model(HELD_OUT, labels=HELD_OUT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = loss(model.eval())
    assert after < before - 1e-2
    model.save_pretrained(tmp_path)
    assert loss(UMv2ForCausalLM.from_pretrained(tmp_path).eval()) == after


@pytest.mark.parametrize("tool", ["bitsandbytes nf4", "bitsandbytes LLM.int8", "torchao int8, weights"])
def test_adapters_learn_on_quantized_projections(tool: str, exports: Any) -> None:
    peft = needed("peft")
    model = TOOLS[tool][0](exports("plain"), memory_tables="device-int8")
    model = peft.prepare_model_for_kbit_training(model)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    other = text(8, 32, seed=77).flip(1)
    parameters = {name: it for name, it in model.named_parameters() if it.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    losses = []
    for _ in range(4):
        value = model.train()(other, labels=other).loss
        value.backward()
        losses.append(value.item())
        missing = [name for name, it in parameters.items() if it.grad is None or not it.grad.any()]
        optimizer.step()
        optimizer.zero_grad()
    assert not missing and losses[-1] < losses[0] - 0.1
