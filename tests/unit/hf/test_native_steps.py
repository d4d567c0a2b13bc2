"""Steps of decoding by the compiled kernels against the modules' own forward: every variant of a block, on every kind
of x86-64 CPU that this one can play; and that whatever has a say in a module is asked."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import pickle
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import QUICK, VARIANTS, slow_but, tiny_model, tokens
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, StaticCache

from umv2_megatron.hf import UMv2ForCausalLM, build_umv2, linear_umv2, lookup_umv2, native_umv2, step_umv2, tables_umv2

ATTENTION, FEEDFORWARD = "umv2_attention", "umv2_feedforward"
SHAPES = ((1, 1), (5, 9), (64, 24), (100, 37), (333, 3), (100, 70), (333, 131), (96, 128), (17, 65), (66, 19))
# Blocks of these variants whose FFN and memory layer no kernel computes.
BY_MODULES = ("memory-plus", "delayed", "ultramem", "moe")
ARCHITECTURES = ["native", "x86-64-v3", "x86-64"] if platform.machine() == "x86_64" else ["native"]
CPU_FLAGS = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split()) if sys.platform == "linux" else set()
if "avx512vl" in CPU_FLAGS:  # without products of bfloat16 numbers
    ARCHITECTURES.append("x86-64-v4")
if {"avx512_bf16", "amx_tile"} <= CPU_FLAGS:  # with those of pairs, without matrix tiles
    ARCHITECTURES.append("cooperlake")

pytestmark = pytest.mark.skipif(native_umv2.library() is None, reason="there is no C++ compiler")


@contextlib.contextmanager
def modules_alone() -> Iterator[None]:
    """No kernels."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (step_umv2, linear_umv2, lookup_umv2):
            patch.setattr(module, "usable", lambda x: False)
        yield


@pytest.fixture()
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the calls of blocks that are made."""
    made: list[str] = []
    run = step_umv2._run
    monkeypatch.setattr(step_umv2, "_run", lambda *arguments: made.append(arguments[0]) or run(*arguments))
    return made


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Kernels built for this kind of CPU."""
    flags = tuple(f"-march={request.param}" if flag.startswith("-march") else flag for flag in build_umv2.FLAGS)
    monkeypatch.setattr(build_umv2, "FLAGS", flags)
    native_umv2.library.cache_clear()
    yield request.param
    native_umv2.library.cache_clear()


def decode(model: UMv2ForCausalLM, ids: Tensor, cache: Any = None, **given: Any) -> Tensor:
    """Logits of each token after the first three, decoded one by one."""
    mask = given.pop("attention_mask", None)
    logits = []
    with torch.no_grad():
        for start, end in [(0, 3), *((place, place + 1) for place in range(3, ids.shape[1]))]:
            seen = {} if mask is None else {"attention_mask": mask[:, :end]}
            out = model(ids[:, start:end], past_key_values=cache, use_cache=True, **seen, **given)
            cache = out.past_key_values
            logits.append(out.logits[:, -1])
    return torch.stack(logits[1:], dim=1)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


# -- what is computed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", slow_but(QUICK, VARIANTS))
def test_every_variant(name: str, architecture: str, calls: list[str]) -> None:
    model = tiny_model(**VARIANTS[name])
    for batch in (1, 6, 37):
        ids = tokens(batch, 5)
        with modules_alone():
            expected = decode(model, ids)
        assert not calls
        assert_close(decode(model, ids), expected)
        assert calls.count(ATTENTION) == 2 * 4
        assert calls.count(FEEDFORWARD) == (0 if name in BY_MODULES else 2 * 4)
        calls.clear()


@pytest.mark.parametrize("name", slow_but(QUICK, VARIANTS))
def test_prompts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Search and lookup of many tokens, whole and in parts."""
    model, ids = tiny_model(**VARIANTS[name]), tokens(3, 30)
    made: list[str] = []
    run = lookup_umv2._run
    monkeypatch.setattr(lookup_umv2, "_run", lambda *given, **named: made.append(given[0]) or run(*given, **named))
    with torch.no_grad():
        with modules_alone():
            expected = model(ids).logits
        assert not made
        assert_close(model(ids).logits, expected)
        searches = name not in ("memory-plus", "moe", "dense")
        assert ("umv2_search" in made) == searches and ("umv2_sum_rows" in made) == (name not in ("moe", "dense"))
        monkeypatch.setattr(linear_umv2, "_TOKENS", 7)
        assert_close(model(ids).logits, expected)
        with modules_alone():
            assert_close(model(ids).logits, expected)


SETTINGS: dict[str, dict[str, Any]] = {
    "interleaved": {"rope_interleaved": True, "qk_norm": False},
    "part rotated": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.6}},
    "learned positions": {"position_embedding_type": "learned_absolute"},
    "biases": {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
    "zero-centered": {"norm_zero_centered": True},
    "rank 4": {"memory_tucker_rank": 4, "memory_num_heads": 2},
    "rank 1, no pre-values": {"memory_tucker_rank": 1, "memory_pre_value_dim": 0},
    "gate, values as they are": {"memory_gate": "silu", "memory_value_expansion": "none", "memory_value_dim": 64},
    "no pre-projection": {"memory_pre_projection": "none", "memory_pre_value_dim": 64},
}
# To the kernels, and which halves of a block it concerns.
UNKNOWN: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "layer norm": ({"normalization": "LayerNorm"}, (ATTENTION, FEEDFORWARD)),
    "norms behind": ({"norm_placement": "post"}, (ATTENTION, FEEDFORWARD)),
    "norms of projections": ({"qk_norm_span": "projection"}, (ATTENTION,)),
    "windows": ({"sliding_window": 4}, (ATTENTION,)),
    "gelu": ({"hidden_act": "gelu"}, (FEEDFORWARD,)),
    "no gate": ({"gated_mlp": False}, (FEEDFORWARD,)),
    "rank 3": ({"memory_tucker_rank": 3}, (FEEDFORWARD,)),
}


@pytest.mark.parametrize("name", [*SETTINGS, *UNKNOWN])
def test_settings(name: str, calls: list[str]) -> None:
    changes, missing = UNKNOWN.get(name) or (SETTINGS[name], ())
    model = tiny_model(**changes)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_()
    ids = tokens(3, 7)
    found = decode(model, ids)
    for half in (ATTENTION, FEEDFORWARD):
        assert calls.count(half) == (0 if half in missing else 16)
    with modules_alone():
        assert_close(found, decode(model, ids))


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 49, 64])
def test_products(batch: int, architecture: str) -> None:
    """Also of rows and columns that fill no tile; weights and inputs of many sizes, whose sums have no small error by
    chance."""
    for columns, rows in SHAPES:
        torch.manual_seed(columns)
        layer, x = nn.Linear(columns, rows), torch.randn(batch, columns) * 10.0 ** torch.randint(-3, 3, (batch, 1))
        with torch.no_grad():
            layer.weight.mul_(10.0 ** torch.randint(-3, 3, (rows, 1)))
            layer.bias.zero_()
            expected = layer.double()(x.double())
            found = native_umv2.linear(layer.float(), x)
            least = x.double().abs() @ layer.weight.double().abs().t()
        assert ((found - expected).abs() <= 1e-6 * least).all()
        with torch.no_grad():
            layer.bias.normal_()
            assert torch.equal(native_umv2.linear(layer, x), found + layer.bias)


@pytest.mark.parametrize("batch", [1, 3, 5, 8, 16, 17, 40, 64])
def test_products_in_bfloat16(batch: int, architecture: str) -> None:
    for columns, rows in SHAPES:
        torch.manual_seed(columns)
        layer, x = nn.Linear(columns, rows).bfloat16(), torch.randn(batch, columns).bfloat16()
        with torch.no_grad():
            found = native_umv2.linear(layer, x)
            expected = layer.double()(x.double())
        assert found.dtype is torch.bfloat16
        torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 7, 17])
def test_products_of_bfloat16_numbers_where_the_cpu_has_them(batch: int, architecture: str) -> None:
    """Numbers below 1e-38 show who computes: to matrix tiles and to products of pairs they are 0, to float32 not.
    Otherwise only time would tell. Tiles need 64 rows of weights, pairs an even number of columns."""
    for columns, rows in (64, 64), (63, 64), (64, 8), (63, 8):
        layer, x = nn.Linear(columns, rows, bias=False).bfloat16(), torch.full((batch, columns), 2.0**20).bfloat16()
        with torch.no_grad():
            layer.weight.fill_(2.0**-130)
            found = native_umv2.linear(layer, x)
            layer.weight.fill_(2.0**-110)
            normal = native_umv2.linear(layer, x)
        in_bfloat16 = (rows == 64 and has_tiles()) or (columns == 64 and "__AVX512BF16__" in macros())
        assert (found == (0 if in_bfloat16 else torch.tensor(columns * 2.0**-110).bfloat16())).all()
        assert (normal == torch.tensor(columns * 2.0**-90).bfloat16()).all()


def macros() -> set[str]:
    """What the compiler defines for the CPU that it builds for."""
    command = [build_umv2.find_compiler(), *build_umv2.FLAGS, "-dM", "-E", "-x", "c++", "/dev/null"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split())


def has_tiles() -> bool:
    """Whether the compiler knows matrix tiles for the CPU that it builds for, and Linux gives them to this process."""
    ask, tile_data = (ctypes.c_long(number) for number in (0x1023, 18))  # ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    known = {"__AMX_TILE__", "__AMX_BF16__", "__AVX512BW__"} <= macros()
    return known and ctypes.CDLL(None).syscall(158, ask, tile_data) == 0


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_in_bfloat16(name: str, architecture: str, calls: list[str]) -> None:
    """Not farther from what float64 gives for the same weights than PyTorch's own operations, but for chance."""
    model = tiny_model(**VARIANTS[name]).bfloat16()
    exact = copy.deepcopy(model).double()
    errors = torch.zeros(2, dtype=torch.float64)
    for batch in (1, 6, 37):
        ids = tokens(batch, 5)
        expected = decode(exact, ids)
        with modules_alone():
            errors[0] += (decode(model, ids).double() - expected).square().sum()
        assert not calls
        errors[1] += (decode(model, ids).double() - expected).square().sum()
        assert calls.count(ATTENTION) == 2 * 4
        assert calls.count(FEEDFORWARD) == (0 if name in BY_MODULES else 2 * 4)
        calls.clear()
    # Rounding decides about some picks, here and there about others.
    assert errors[1] <= 4 * errors[0]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_padded_prompts_and_static_caches(implementation: str, calls: list[str]) -> None:
    model = tiny_model()
    model.set_attn_implementation(implementation)
    ids, mask = tokens(3, 8), torch.ones(3, 8, dtype=torch.long)
    mask[1, :2] = 0
    for cache in (lambda: None, lambda: StaticCache(config=model.config, max_cache_len=11)):
        calls.clear()
        found = decode(model, ids, cache(), attention_mask=mask)
        assert calls.count(ATTENTION) == 20
        with modules_alone():
            assert_close(found, decode(model, ids, cache(), attention_mask=mask))


def test_a_step_without_a_cache(calls: list[str]) -> None:
    model, ids = tiny_model(), tokens(2, 1)
    with torch.no_grad():
        found = model(ids, use_cache=False).logits
        assert len(calls) == 8
        with modules_alone():
            assert_close(found, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("name", slow_but(QUICK, VARIANTS))
@pytest.mark.parametrize("way", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generated_tokens(name: str, way: dict[str, Any]) -> None:
    model, prompt = tiny_model(**VARIANTS[name]), tokens(2, 6)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **way}
    found = model.generate(prompt, **options)
    with modules_alone():
        assert torch.equal(found, model.generate(prompt, **options))


def test_any_number_of_threads_gives_the_same_bits() -> None:
    model, ids = tiny_model(), tokens(5, 7)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(decode(model, ids))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", ["plain", "chunks", "ring"])
def test_places_of_tables(name: str, tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the rows of files are asked for ahead, in their order: the same bits."""
    model, ids = tiny_model(**VARIANTS[name]), tokens(6, 7)
    model.save_pretrained(tmp_path)
    expected = decode(model, ids)
    monkeypatch.setattr(tables_umv2.UMv2Table, "waits_for_disk", lambda table: True)
    for place in ("cpu", "mmap"):
        calls.clear()
        placed = UMv2ForCausalLM.from_pretrained(tmp_path, memory_tables=place).eval()
        assert torch.equal(decode(placed, ids), expected) and calls.count(FEEDFORWARD) == 16
    calls.clear()
    decode(UMv2ForCausalLM.from_pretrained(tmp_path, memory_tables="cpu-int8").eval(), ids)
    assert calls.count(FEEDFORWARD) == 0 and calls.count(ATTENTION) == 16


@pytest.mark.parametrize("expansion", ["single", "none"])
def test_cells_of_several_windows_with_one_projection(expansion: str, calls: list[str]) -> None:
    """Four cells share a row (``memory_key_expansion``) and have one sum, not a block each."""
    changes = {"memory_value_dim": 64} if expansion == "none" else {}
    model = tiny_model(memory_key_expansion=2, memory_value_expansion=expansion, **changes)
    ids = tokens(3, 7)
    found = decode(model, ids)
    assert calls.count(FEEDFORWARD) == 4 * 4
    with modules_alone(), torch.no_grad():
        assert_close(found, decode(model, ids))
        expected = model(ids).logits
    with torch.no_grad():
        assert_close(model(ids).logits, expected)


@pytest.mark.parametrize("name", ["plain", "v1"])
def test_rows_that_a_table_does_not_have(name: str, calls: list[str]) -> None:
    """A damaged perm is an error, in a step and for a prompt; nothing beyond the table is read."""
    model = tiny_model(**VARIANTS[name])
    memory = model.model.layers[2].memory
    kept = memory.perm.clone()
    for wrong in (-1, memory.perm.numel(), 2**31 - 1):
        memory.perm.fill_(wrong)
        for length in (1, 7):
            with pytest.raises(IndexError, match="its perm, and so the file, is damaged"), torch.no_grad():
                model(tokens(2, length))
    assert calls.count(FEEDFORWARD)
    memory.perm.copy_(kept)
    with torch.no_grad():
        assert model(tokens(2, 1)).logits.isfinite().all()


# -- who is asked ---------------------------------------------------------------------------------------------------


def test_what_stands_on_a_module_is_called(calls: list[str]) -> None:
    """A hook, another forward, another module: of one block, whose other half and neighbours are not concerned."""
    model, ids = tiny_model(), tokens(2, 1)
    block, seen = model.model.layers[1], []

    class Other(nn.Linear):
        pass

    def run(*missing: str) -> None:
        calls.clear()
        with torch.no_grad():
            model(ids)
        for name in (ATTENTION, FEEDFORWARD):
            assert calls.count(name) == 4 - missing.count(name)

    run()
    for part, half in (
        (block.self_attn, ATTENTION), (block.self_attn.q_norm, ATTENTION), (block.input_layernorm, ATTENTION),
        (block.mlp.up_proj, FEEDFORWARD), (block.memory, FEEDFORWARD), (block.memory.retrieval.query, FEEDFORWARD),
        (block.memory.table.values, FEEDFORWARD),
    ):  # fmt: skip
        hook = part.register_forward_hook(lambda module, *_: seen.append(module))
        run(half)
        assert seen.pop() is part
        hook.remove()
        forward = part.forward
        part.forward = lambda *given, part=part, forward=forward, **named: seen.append(part) or forward(*given, **named)
        run(half)
        assert seen.pop() is part
        del part.forward
    block.self_attn.o_proj.__class__ = Other
    block.mlp.down_proj = nn.Sequential(block.mlp.down_proj)
    run(ATTENTION, FEEDFORWARD)
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: None)
    run(*[ATTENTION] * 4, *[FEEDFORWARD] * 4)
    hook.remove()


def test_modes_of_pytorch_and_other_numbers(calls: list[str]) -> None:
    model, ids = tiny_model(), tokens(2, 1)
    assert model(ids).logits.requires_grad
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            model(ids)
        with FlopCounterMode(display=False) as counter:
            model(ids)
        assert counter.get_total_flops()
        torch.compile(model, backend="eager")(ids)
        copy.deepcopy(model).double()(ids)
        copy.deepcopy(model).half()(ids)
        copy.deepcopy(model)(tokens(65, 1))
    assert not calls
    with torch.inference_mode():
        model(ids)
    assert len(calls) == 8


def test_new_contents_of_parameters_are_read() -> None:
    """Loaded, written in place, put there as other tensors; and copies of a model have their own."""
    model, ids = tiny_model(), tokens(2, 6)
    first = decode(model, ids)
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    other = tiny_model(seed=5)
    model.load_state_dict(other.state_dict())
    assert torch.equal(decode(model, ids), decode(other, ids))
    for parameter, source in zip(model.parameters(), tiny_model().parameters()):
        parameter.data = source.data.clone()
    model.model.layers[2].mlp.up_proj = copy.deepcopy(model.model.layers[2].mlp.up_proj)
    found = decode(model, ids)
    assert not torch.equal(found, decode(other, ids))
    with modules_alone():
        assert_close(found, decode(model, ids))
    for each in (copied, pickled):
        assert torch.equal(decode(each, ids), first)
    with torch.no_grad():
        copied.model.layers[0].memory.retrieval.cores.mul_(torch.randn(2, 1, 2, 2))
        found = decode(copied, ids)
        with modules_alone():
            assert_close(found, decode(copied, ids))


def test_the_switch_and_a_machine_without_a_compiler(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    model, ids = tiny_model(), tokens(2, 5)
    expected = decode(model, ids)
    calls.clear()
    for name, value in (("UMV2_CPU_KERNELS", "0"), ("CXX", "no-such-compiler")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            native_umv2.library.cache_clear()
            assert_close(decode(model, ids), expected)
            assert not calls
    native_umv2.library.cache_clear()


def test_caches_that_do_something_else(calls: list[str]) -> None:
    """A subclass, and layers that were filled before: by the cache's own update."""

    class Counting(DynamicCache):
        def update(self, *arguments: Any, **named: Any) -> Any:
            calls.append("update")
            return super().update(*arguments, **named)

    model, ids = tiny_model(), tokens(2, 6)
    expected = decode(model, ids)
    calls.clear()
    assert_close(decode(model, ids, Counting(config=model.config)), expected)
    assert calls.count("update") == 16 and ATTENTION not in calls
    with torch.no_grad():
        filled = model(ids[:, :3], use_cache=True).past_key_values
        again = DynamicCache([(layer.keys, layer.values) for layer in filled.layers])
        last = model(ids[:, 3:4], past_key_values=again, use_cache=True).logits[:, -1]
    assert_close(last, expected[:, 0])
