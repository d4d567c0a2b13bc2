"""What tools do with a model: compilation, export, offload, tensor parallelism. The results are those of the model.

Quick tests take a few variants that differ in what a tool has to follow, slow ones all. ``benchmarks/hf_tools.py``
prints a table of the same tools.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import Dim
from transformers import CompileConfig, StaticCache

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT / "tests" / "distributed")]
from harness import run_ranks  # noqa: E402
from tiny_model import CONTRACT, QUICK, slow_but, tiny_model, tokens  # noqa: E402

from umv2_megatron.hf import UMv2ForCausalLM  # noqa: E402
from umv2_megatron.hf.retrieval_umv2 import UMv2Retrieval  # noqa: E402

needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None,
    reason="accelerate is not installed (requirements-hf-tools.txt): transformers needs it for this",
)
WITH_TABLES = [name for name, changes in CONTRACT.items() if "ffn_variant" not in changes]


def variants(*quick: str) -> pytest.MarkDecorator:
    """All variants; those that are not named are for ``make test-slow``."""
    return pytest.mark.parametrize("variant", slow_but(quick, CONTRACT))


def exact(variant: str, **changes: Any) -> UMv2ForCausalLM:
    return tiny_model(**{**CONTRACT[variant], **changes}).double()


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend of torch.compile that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.count += 1
        return graph.forward


@variants("moe")
def test_a_forward_is_compiled_whole_and_for_any_shape(variant: str) -> None:
    """Also as the first forward of a model with random weights."""
    model, backend = exact(variant), Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    shapes = ((3, 9), (5, 20), (4, 7))  # a batch of 2 would be taken for the rank of the cores
    with torch.no_grad():
        found = [compiled(tokens(*shape)).logits for shape in shapes]
        for logits, shape in zip(found, shapes, strict=True):
            torch.testing.assert_close(logits, model(tokens(*shape)).logits, rtol=0, atol=1e-6)
    assert backend.count == 1


@variants("memory-plus")
def test_decoding_is_compiled_whole(variant: str) -> None:
    """One graph for all steps, with keys and values in a cache of a fixed size."""
    model, batch, backend = exact(variant), tokens(2, 8), Graphs()
    cache = StaticCache(config=model.config, max_cache_len=16)
    compiled = torch.compile(model.forward, fullgraph=True, backend=backend)
    with torch.no_grad():
        model(batch[:, :4], past_key_values=cache)
        steps = []
        for place in range(4, 8):
            position = torch.tensor([[place]])
            output = compiled(batch[:, place : place + 1], past_key_values=cache, position_ids=position)
            steps.append(output.logits)
        torch.testing.assert_close(torch.cat(steps, 1), model(batch).logits[:, 4:], rtol=0, atol=1e-6)
    assert backend.count <= 2  # torch tries it with a fixed number of seen tokens first


def train(model: UMv2ForCausalLM, forward: Any, steps: int = 3) -> list[float]:
    """Losses of ``steps`` steps with a fused optimizer, each on its own batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    losses = []
    for step in range(steps):
        batch = tokens(2, 9, seed=step + 1)
        loss = forward(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def check_compiled_training(variant: str, backend: str, folder: Path) -> None:
    """Against training without a compiler; and what is saved is what is in memory. Inductor rounds the rotary angles,
    which are float32, otherwise, and Adam makes steps of any gradient, however small."""
    exactly = backend != "inductor"
    close = 1e-6 if exactly else 1e-3
    plain, model, batch = exact(variant).train(), exact(variant).train(), tokens(3, 9)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    expected = train(plain, plain)
    assert train(model, compiled) == pytest.approx(expected, abs=close) and expected[0] != expected[-1]
    for name, parameter in plain.named_parameters() if exactly else ():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=0, atol=close, msg=name)
    model.save_pretrained(folder)
    for module in model.modules():
        if isinstance(module, UMv2Retrieval):  # read before the next forward could have renewed them
            left, _, right = torch.linalg.svd(module.cores.detach().sum(0))
            for found, right_one in ((module.u, left[:, :, 0]), (module.t, right[:, 0])):
                torch.testing.assert_close(found.double().abs(), right_one.abs(), rtol=0, atol=2e-5)
    with torch.no_grad():
        again = UMv2ForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        in_memory = model.eval()(batch).logits
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
        # bits of a product may depend on where in memory the matrix is
        torch.testing.assert_close(again(batch).logits, in_memory, rtol=0, atol=1e-12)
        torch.testing.assert_close(compiled(batch).logits, in_memory, rtol=0, atol=close)


@variants()
def test_compiled_training_is_training(variant: str, tmp_path: Path) -> None:
    check_compiled_training(variant, "aot_eager", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["plain", "delayed", "memory-plus", "moe"])
def test_inductor(variant: str, tmp_path: Path) -> None:
    check_compiled_training(variant, "inductor", tmp_path)
    model, batch = exact(variant), tokens(2, 9)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(batch).logits, model(batch).logits, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", CONTRACT)
def test_compiled_generation(variant: str) -> None:
    """``generate`` compiles the step of a static cache by itself on devices; on a CPU it is told to."""
    inductor = variant in ("plain", "moe")  # which takes long
    model, prompt = exact(variant), tokens(2, 5)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    config = CompileConfig(
        fullgraph=True, backend="inductor" if inductor else "aot_eager", mode="default" if inductor else None
    )
    config._compile_all_devices = True
    expected = model.generate(prompt, **options)
    counted = torch._dynamo.utils.counters["stats"]
    counted.clear()
    found = model.generate(prompt, **options, cache_implementation="static", compile_config=config)
    assert torch.equal(found, expected) and counted["unique_graphs"] > 0


@variants("delayed")
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_exported_program_is_the_model_at_any_shape(variant: str, strict: bool, tmp_path: Path) -> None:
    """Also one that was saved, and of a model that has not computed anything yet."""
    model, batch = exact(variant), tokens(2, 9)
    sizes = {0: Dim("batch", max=64), 1: Dim("length", max=100)}
    shapes = {"input_ids": sizes, "attention_mask": sizes, "use_cache": None}
    inputs = {"input_ids": batch, "attention_mask": torch.ones_like(batch), "use_cache": False}
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=strict)
        torch.export.save(program, tmp_path / "program.pt2")
        run = torch.export.load(tmp_path / "program.pt2").module()
        for given in (tokens(2, 9, seed=7), tokens(1, 40), tokens(5, 3)):
            mask = torch.ones_like(given)
            mask[0, :2] = 0
            expected = model(given, attention_mask=mask).logits
            found = run(input_ids=given, attention_mask=mask, use_cache=False).logits
            torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-6)


def devices(model: UMv2ForCausalLM, odd: str) -> dict[str, str]:
    """A device map: every other block on ``odd``, all else in host memory."""
    blocks = {f"model.layers.{n}": odd if n % 2 else "cpu" for n in range(model.config.num_hidden_layers)}
    others = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    return {**blocks, **dict.fromkeys(others, "cpu")}


@needs_accelerate
@variants(*QUICK)
def test_offloaded_models_compute_the_same(variant: str, tmp_path: Path) -> None:
    from accelerate import cpu_offload, disk_offload

    model, batch, cpu = exact(variant), tokens(2, 9), torch.device("cpu")
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    model.save_pretrained(tmp_path / "model")

    def load(**given: Any) -> UMv2ForCausalLM:
        return UMv2ForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64, **given).eval()

    with torch.no_grad():
        expected, text = model(batch).logits, model.generate(batch, **options)
        for name, other in {
            "host memory": cpu_offload(load(), execution_device=cpu),
            "host memory, buffers too": cpu_offload(load(), execution_device=cpu, offload_buffers=True),
            "disk": disk_offload(load(), str(tmp_path / "a"), execution_device=cpu),
            "automatic": load(device_map="auto"),
            "some blocks": load(device_map=devices(model, "disk"), offload_folder=str(tmp_path / "b")),
            "everything": load(device_map={"": "disk"}, offload_folder=str(tmp_path / "c")),
        }.items():
            if name not in ("automatic", "some blocks"):
                assert all(parameter.is_meta for parameter in other.parameters()), name
            torch.testing.assert_close(other(batch).logits, expected, rtol=0, atol=1e-6, msg=name)
            assert torch.equal(other.generate(batch, **options), text), name


@needs_accelerate
@pytest.mark.parametrize("place", ["cpu", "mmap"])
@pytest.mark.parametrize("variant", slow_but(QUICK, WITH_TABLES))
def test_offload_beside_tables_off_the_device(variant: str, place: str, tmp_path: Path) -> None:
    model, batch = exact(variant), tokens(2, 9)
    model.save_pretrained(tmp_path / "model")
    given = {"dtype": torch.float64, "memory_tables": place, "offload_folder": str(tmp_path / "b")}
    for where in ({"": "disk"}, devices(model, "disk")):
        other = UMv2ForCausalLM.from_pretrained(tmp_path / "model", device_map=where, **given).eval()
        with torch.no_grad():
            torch.testing.assert_close(other(batch).logits, model(batch).logits, rtol=0, atol=1e-6)


def sharded(folder: str, variant: str) -> dict[str, Any]:
    """On each rank: how far logits and gradients of the model sharded by its plan are from those of the whole model."""
    from transformers.distributed import DistributedConfig

    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    whole, batch = exact(variant), tokens(2, 9)
    if rank == 0:
        whole.save_pretrained(folder)
    torch.distributed.barrier()
    config = DistributedConfig(tp_plan="auto")
    model = UMv2ForCausalLM.from_pretrained(folder, distributed_config=config, dtype=torch.float64).eval()
    text = model.generate(batch, max_new_tokens=3, do_sample=False)
    outputs = [each(batch, labels=batch) for each in (model, whole)]
    found: dict[str, Any] = {
        "logits": (outputs[0].logits - outputs[1].logits).abs().max().item(),
        "text": torch.equal(text, whole.generate(batch, max_new_tokens=3, do_sample=False)),
        "sharded": sorted(name for name, each in model.named_parameters() if hasattr(each, "to_local")),
        "gradients": {},
    }
    for output in outputs:
        output.loss.backward()
    for name, parameter in model.named_parameters():
        grad, expected = parameter.grad, whole.get_parameter(name).grad
        assert grad is not None and expected is not None, name
        full = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        found["gradients"][name] = ((full - expected).abs().max() / expected.abs().max()).item()
    return found


@needs_accelerate
@variants(*QUICK)
def test_tensor_parallelism_by_the_plan(variant: str, tmp_path: Path) -> None:
    model = exact(variant)
    for found in run_ranks(2, sharded, str(tmp_path), variant):
        assert found["logits"] < 1e-6 and found["text"]
        assert {name: size for name, size in found["gradients"].items() if not size < 1e-5} == {}
        for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.3.self_attn.o_proj.weight"):
            assert name in found["sharded"]
        assert any(".mlp." in name for name in found["sharded"])
    for pattern in model.tp_plan:  # a rule that fits nothing is a mistake in it
        names = [name for name, _ in (*model.named_parameters(), *model.named_modules())]
        parts = pattern.split(".")
        assert any(
            len(name.split(".")) >= len(parts) and all(p in ("*", n) for p, n in zip(parts, name.split(".")))
            for name in names
        ), pattern
