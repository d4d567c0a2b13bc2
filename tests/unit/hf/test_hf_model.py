"""The Hugging Face model keeps what transformers promises of a model: decoding, padding, losses, files, gradients."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent))
from tiny_model import VARIANTS, VOCABULARY, tiny_config, tiny_model, tokens  # noqa: E402

from umv2_megatron import hf  # noqa: E402
from umv2_megatron.hf import UMv2Config, UMv2ForCausalLM, UMv2Model  # noqa: E402
from umv2_megatron.hf.native_umv2 import library  # noqa: E402

HF = Path(hf.__file__).parent
CLOSE = 1e-5
"""Largest difference of logits that were computed in float64, where no two scores are so close that rounding decides
between them. ``generate`` returns them in float32, and routers compute their softmax in it."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_with_a_cache_is_decoding_without(variant: str) -> None:
    model, prompt = tiny_model(**VARIANTS[variant]).double(), tokens(3, 7)
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    greedy = model.generate(prompt, **options)
    whole = model(greedy.sequences).logits[:, 6:-1]
    torch.testing.assert_close(torch.stack(greedy.logits, 1), whole.float(), rtol=0, atol=CLOSE)
    for strategy in ({}, {"num_beams": 3}) if variant == "plain" else ():
        cached = model.generate(prompt, **options, **strategy)
        again = model.generate(prompt, **options, **strategy, use_cache=False)
        assert torch.equal(cached.sequences, again.sequences)
        torch.testing.assert_close(torch.stack(cached.logits), torch.stack(again.logits), rtol=0, atol=CLOSE)


def test_sampling_and_assisted_decoding() -> None:
    model, prompt = tiny_model(), tokens(1, 7)
    torch.manual_seed(5)
    drawn = model.generate(prompt, max_new_tokens=8, do_sample=True, top_k=20, temperature=1.5, num_return_sequences=4)
    assert drawn.shape == (4, 15) and len({tuple(row.tolist()) for row in drawn}) > 1
    greedy = model.generate(prompt, max_new_tokens=6, do_sample=False)
    assisted = model.generate(prompt, max_new_tokens=6, do_sample=False, assistant_model=tiny_model(seed=1))
    assert torch.equal(greedy, assisted)


def test_text_begins_with_the_token_of_the_configuration_or_is_refused() -> None:
    model = tiny_model(bos_token_id=5, eos_token_id=5)
    begun = model.generate(max_new_tokens=3, do_sample=False)
    assert torch.equal(begun, model.generate(torch.tensor([[5]]), max_new_tokens=3, do_sample=False))
    empty = torch.empty(1, 0)  # which is what a tokenizer makes of no text
    for inputs in ({"input_ids": empty}, {"input_ids": empty.long()}, {"inputs_embeds": torch.empty(1, 0, 64)}):
        with pytest.raises(ValueError, match=r"the input has the shape \[1, 0.*bos_token_id, 5"):
            model(**inputs)
    with pytest.raises(ValueError, match="expected at least one token"):
        model.generate(empty.long(), max_new_tokens=3)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("attention", "positions"), [("sdpa", "rope"), ("eager", "rope"), ("sdpa", "learned_absolute"), ("sdpa", "none")]
)
def test_padding_changes_nothing(side: str, attention: str, positions: str) -> None:
    model = tiny_model(attn_implementation=attention, position_embedding_type=positions).double()
    assert model.config._attn_implementation == attention
    rows = [tokens(1, length, seed=length) for length in (3, 9, 6)]
    batch, mask = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.int64)
    for row, one in enumerate(rows):
        place = slice(9 - one.shape[1], 9) if side == "left" else slice(0, one.shape[1])
        batch[row, place], mask[row, place] = one[0], 1
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(batch, attention_mask=mask, position_ids=position_ids).logits
    for row, one in enumerate(rows):
        torch.testing.assert_close(logits[row, mask[row].bool()], model(one).logits[0], rtol=0, atol=CLOSE)
    if side == "left":
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        together = model.generate(batch, attention_mask=mask, **options)
        for row, one in enumerate(rows):
            assert torch.equal(together[row, 9:], model.generate(one, **options)[0, one.shape[1] :])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_of_the_model_does_not_round_the_rotary_frequencies(kind: torch.dtype) -> None:
    """Rounded to 16 bits, cosines would be off by more than 1 within 4,096 positions."""
    model = tiny_model()
    rotary = model.model.rotary_emb
    expected = rotary.inv_freq.clone()
    positions = torch.arange(4096).unsqueeze(0)
    cosines, _ = rotary(torch.zeros(1), positions)
    model.to(kind)
    assert rotary.inv_freq.dtype == rotary.original_inv_freq.dtype == torch.float32
    assert torch.equal(rotary.inv_freq, expected) and model.lm_head.weight.dtype == kind
    assert torch.equal(rotary(torch.zeros(1), positions)[0], cosines)
    assert model.to("meta").model.rotary_emb.inv_freq.is_meta


def test_loss_and_kept_logits() -> None:
    model, batch = tiny_model().double(), tokens(2, 9)
    labels = batch.clone()
    labels[0, :4] = -100
    output = model(batch, labels=labels)
    expected = functional.cross_entropy(output.logits[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1))
    torch.testing.assert_close(output.loss, expected.float())  # transformers computes it in float32
    assert output.logits.shape == (2, 9, VOCABULARY)
    torch.testing.assert_close(model(batch, logits_to_keep=2).logits, output.logits[:, -2:])
    places = torch.tensor([1, 5])
    torch.testing.assert_close(model(batch, logits_to_keep=places).logits, output.logits[:, places])
    states = model(batch, output_hidden_states=True).hidden_states
    assert len(states) == 5 and torch.equal(states[0], model.model.embed_tokens(batch))
    embedded = model(inputs_embeds=states[0]).logits
    torch.testing.assert_close(embedded, output.logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_model_is_the_model(variant: str, tmp_path: Path) -> None:
    tied = variant != "ring"
    model = tiny_model(**VARIANTS[variant], tie_word_embeddings=tied)
    batch = tokens(2, 9)
    expected = model(batch).logits
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    loaded, report = UMv2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    # A token through an expert is a product of matrix and vector, whose bits depend on where in memory the matrix is.
    torch.testing.assert_close(loaded(batch).logits, expected, rtol=0, atol=1e-5 if variant == "moe" else 0)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert {**loaded.config.to_dict(), "_name_or_path": ""} == model.config.to_dict()
    half = UMv2ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    exact = {n for n, t in half.state_dict().items() if t.dtype != torch.bfloat16}
    assert {name.rsplit(".", 1)[1] for name in exact} <= {"u", "t", "perm"}
    for name in exact:
        assert torch.equal(half.state_dict()[name], model.state_dict()[name]), name
    assert torch.isfinite(half(batch).logits).all()


def test_auto_classes_know_the_model(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), UMv2Config)
    assert isinstance(AutoModel.from_pretrained(tmp_path), UMv2Model)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), UMv2ForCausalLM)
    assert isinstance(AutoModelForCausalLM.from_config(tiny_config()), UMv2ForCausalLM)
    written = json.loads((tmp_path / "config.json").read_text())
    assert set(written["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert {path.name for path in HF.glob("*_umv2.py")} == {path.name for path in tmp_path.glob("*.py")}


REMOTE = """
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM
folder = sys.argv[1]
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise SystemExit("remote code ran without being asked for")
for place in ("device", "mmap"):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, memory_tables=place).eval()
    assert "umv2_megatron" not in sys.modules and type(model).__module__.startswith("transformers_modules.")
    print(model(torch.arange(1, 9)[None]).logits.double().sum().item())
native = sys.modules[type(model).__module__.replace("modeling_umv2", "native_umv2")]
assert (native.library() is not None) == (sys.argv[2] == "True")  # built from the export's own files
"""


def test_copied_files_are_enough(tmp_path: Path) -> None:
    model = tiny_model().double()  # which of two near scores wins must not depend on threads
    model.save_pretrained(tmp_path / "export")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", REMOTE, str(tmp_path / "export"), str(library() is not None)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = model(torch.arange(1, 9)[None]).logits.double().sum().item()
    assert [float(line) for line in done.stdout.split()] == [pytest.approx(expected, abs=1e-6)] * 2


def test_files_import_nothing_of_the_package() -> None:
    allowed = {"torch", "transformers", *sys.stdlib_module_names}
    for path in HF.glob("*_umv2.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] in allowed, f"{path.name} imports {name}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_and_checkpointing(variant: str) -> None:
    model, batch = tiny_model(**VARIANTS[variant]), tokens(2, 9)
    found = {}
    for checkpointing in (False, True):
        model.train().zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(batch, labels=batch).loss.backward()
        found[checkpointing] = {name: p.grad for name, p in model.named_parameters()}
    assert model.is_gradient_checkpointing
    for name, grad in found[False].items():
        assert grad is not None and grad.abs().sum() > 0, name
        torch.testing.assert_close(found[True][name], grad, rtol=0, atol=1e-6)


def test_gradients_are_derivatives() -> None:
    model = tiny_model(memory_table_chunk_rows=100).double()
    batch = tokens(2, 9)
    memory = model.model.layers[1].memory
    watched = [memory.retrieval.keys, memory.retrieval.cores, memory.table.values[0], memory.table.pre_values[0],
               memory.retrieval.key_norm, memory.pre_proj.weight]  # fmt: skip
    model(batch).logits.square().mean().backward()  # the loss of labels is float32
    for parameter in watched:
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        step = 1e-6
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * step)
                losses.append(model(batch).logits.square().mean().item())
                parameter.sub_(direction, alpha=sign * step)
        slope = (losses[0] - losses[1]) / (2 * step)
        assert slope == pytest.approx(float((parameter.grad * direction).sum()), rel=1e-4, abs=1e-9)


def test_autocast_leaves_the_search_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = tiny_model(**VARIANTS["v1"]).model.layers[0].memory
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        halved = memory.retrieval.key_scores(x)
        cells, scores = memory.retrieval(x)
    monkeypatch.setattr(memory.retrieval, "key_scores", lambda x: halved)
    with torch.no_grad():
        expected = memory.retrieval(x)
    assert halved.dtype == scores.dtype == torch.float32
    assert torch.equal(cells, expected[0]) and torch.equal(scores, expected[1])
    model, batch = tiny_model(), tokens(2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        model(batch, labels=batch).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_what_is_kept_between_calls_follows_the_parameters() -> None:
    model, batch = tiny_model(), tokens(2, 9)
    retrieval = model.model.layers[0].memory.retrieval
    changes = [
        lambda: retrieval.keys.mul_(-1),
        lambda: retrieval.key_norm.mul_(-1),
        lambda: retrieval.cores.copy_(retrieval.cores.flip(0).transpose(-1, -2) * 2),
        lambda: retrieval.load_state_dict({n: t.flip(-1) for n, t in retrieval.state_dict().items()}),
        lambda: setattr(retrieval, "keys", torch.nn.Parameter(torch.randn_like(retrieval.keys))),
        lambda: model.double().float(),
    ]
    with torch.no_grad():
        for change in changes:
            model(batch)
            change()
            after = model(batch).logits
            fresh = UMv2ForCausalLM(model.config).eval()
            fresh.load_state_dict(model.state_dict())
            torch.testing.assert_close(after, fresh(batch).logits, rtol=0, atol=0)
    total = retrieval.cores.sum(0)
    sigma = torch.einsum("hr,hrs,hs->h", retrieval.u, total, retrieval.t)
    torch.testing.assert_close(sigma, torch.linalg.svdvals(total)[:, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("convert", [False, True])
def test_saved_singular_vectors_are_those_of_the_saved_cores(convert: bool, tmp_path: Path) -> None:
    model, batch = tiny_model().train(), tokens(2, 9)
    cores = [layer.memory.retrieval.cores for layer in model.model.layers]
    for _ in range(2):
        model(batch, labels=batch).loss.backward()
        with torch.no_grad():  # what an optimizer does, in steps large enough to turn the vectors
            for core in cores:
                core.add_(torch.randn(core.shape, generator=torch.Generator().manual_seed(7)))
    (model.double().float() if convert else model).save_pretrained(tmp_path)
    for layer in UMv2ForCausalLM.from_pretrained(tmp_path).model.layers:
        retrieval = layer.memory.retrieval
        total = retrieval.cores.detach().sum(0)
        sigma = torch.einsum("hr,hrs,hs->h", retrieval.u, total, retrieval.t)
        torch.testing.assert_close(sigma, torch.linalg.svdvals(total)[:, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cores", [torch.empty(2, 1, 2, 2, device="meta"), torch.empty(0), torch.empty(8)])
def test_a_model_whose_cores_are_elsewhere_can_be_saved(cores: torch.Tensor) -> None:
    """As accelerate leaves them between passes when it offloads, and as ranks hold them that share all parameters."""
    model = tiny_model()
    model(tokens(2, 9))
    retrieval = model.model.layers[0].memory.retrieval
    before = retrieval.u.clone()
    retrieval.cores = torch.nn.Parameter(cores)
    assert torch.equal(model.state_dict()["model.layers.0.memory.retrieval.u"], before)
    assert torch.equal(model.to(torch.bfloat16).model.layers[0].memory.retrieval.u, before)


def test_settings_that_cannot_be_computed_are_refused() -> None:
    wrong = {
        "normalization": "L2Norm",
        "memory_sharing": "star",
        "memory_layer_freq": "[1,0]",
        "memory_topk": 300,
        "memory_num_cores": 5,
        "memory_invented": 1,
        "memory_read_delay": 1,
        "memory_query_mode": "per_head",
        "num_key_value_heads": 3,
        "memory_table_chunk_rows": 0,
        "hidden_size": "64",
        "memory_key_dim": 4.0,
        "qk_norm": 1,
        "norm_eps": "1e-5",
        "rope_parameters": [],
        "num_key_value_heads ": True,
        "num_attention_heads": 0,
    }
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name if name != "memory_read_delay" else "memory_layer_freq"):
            tiny_config(**{name.strip(): value})
