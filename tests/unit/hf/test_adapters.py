"""Adapters of peft on the Hugging Face model: they learn, are saved, merged and loaded, on every kind of layer.

A layer that is looked up past its adapter, or a copy to be trained that is not the one in use, shows as an adapter
without a gradient or as other logits after loading and merging.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from tiny_model import VARIANTS, tiny_model, tokens  # noqa: E402

from umv2_megatron.hf import UMv2ForCausalLM  # noqa: E402

peft = pytest.importorskip("peft", reason="peft is not installed: pip install --no-deps -r requirements-hf-tools.txt")

BATCH = tokens(3, 20)
MEMORY = r".*\.memory\.(retrieval\.query|pre_proj|gate_proj|value_proj)"
CASES: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "memory": {"target_modules": MEMORY},
    "all-linear": {"target_modules": "all-linear"},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "embeddings": {"target_modules": "all-linear", "modules_to_save": ["embed_tokens", "lm_head"]},
    "retrieval": {"target_modules": ["q_proj"], "modules_to_save": ["retrieval"]},
    "table": {"target_modules": ["q_proj"], "modules_to_save": ["table"]},
    "rows": {"target_modules": ["q_proj"], "modules_to_save": ["values"]},
    "memory layers": {"target_modules": ["q_proj"], "modules_to_save": ["memory"]},
    "lora of rows": {"target_modules": ["q_proj"], "target_parameters": ["values.0"]},
    "experts": {"target_modules": ["q_proj"],
                "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
}  # fmt: skip
NAMES = ("plain", "ring", "v1", "memory-plus", "delayed", "dense", "moe")
WITHOUT_MEMORY = {(case, name) for case in ("memory", "retrieval", "table", "rows", "memory layers", "lora of rows")
                  for name in ("dense", "moe")}  # fmt: skip
PAIRS = [
    (case, name) for case in CASES for name in NAMES
    if (case, name) not in WITHOUT_MEMORY and (case != "experts" or name == "moe")
]  # fmt: skip
QUICK = {("attention", "plain"), ("memory", "ring"), ("memory", "delayed"), ("all-linear", "moe"), ("dora", "v1"),
         ("embeddings", "memory-plus"), ("retrieval", "plain"), ("table", "ring"), ("rows", "ring"),
         ("memory layers", "plain"), ("memory layers", "ring"), ("memory layers", "delayed"), ("lora of rows", "ring"),
         ("experts", "moe")}  # fmt: skip


def loss(model: torch.nn.Module) -> Tensor:
    return model(BATCH, labels=BATCH).loss


def adapted(model: UMv2ForCausalLM, **options: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options))


def trained(model: Any, steps: int = 3) -> list[str]:
    """Train what is to be trained; the names of what got no gradient in the last step."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert parameters
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        without = [name for name, it in parameters.items() if it.grad is None or not it.grad.any()]
        optimizer.step()
    model.eval()
    return without


@torch.no_grad()
def check(name: str, folder: Path, **options: Any) -> None:
    model = tiny_model(**VARIANTS[name])
    before = loss(model).item()
    model = adapted(model, **options)
    assert loss(model).item() == pytest.approx(before, rel=1e-5)  # it begins as the model without it
    with torch.enable_grad():
        without = trained(model)
    # Rows of a chunk that no token of the batch picks have none.
    assert all(".table." in parameter for parameter in without), without
    assert loss(model).item() < before - 1e-3
    model.save_pretrained(folder / "adapter")
    again = peft.PeftModel.from_pretrained(tiny_model(**VARIANTS[name]), folder / "adapter").eval()
    logits = model(BATCH).logits
    assert torch.equal(again(BATCH).logits, logits)
    text = model.generate(BATCH[:, :5], max_new_tokens=3, do_sample=False)
    assert torch.equal(text[:, 5], model(BATCH[:, :5]).logits[:, -1].argmax(-1))
    again = again.double()  # in float32 rounding may turn a near pick round
    exact = again(BATCH).logits
    merged = again.merge_and_unload()
    assert not any("lora" in parameter or "modules_to_save" in parameter for parameter in merged.state_dict())
    torch.testing.assert_close(merged(BATCH).logits, exact, rtol=0, atol=1e-6)
    merged.save_pretrained(folder / "merged")
    loaded = UMv2ForCausalLM.from_pretrained(folder / "merged", dtype=torch.float64).eval()
    written = merged.state_dict()
    assert all(torch.equal(tensor, written[name]) for name, tensor in loaded.state_dict().items())
    torch.testing.assert_close(loaded(BATCH).logits, exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("case", "name"), [pair for pair in PAIRS if pair in QUICK])
def test_adapter_learns_and_is_merged_and_loaded(case: str, name: str, tmp_path: Path) -> None:
    check(name, tmp_path, **CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize(("case", "name"), [pair for pair in PAIRS if pair not in QUICK])
def test_adapter_learns_and_is_merged_and_loaded_everywhere(case: str, name: str, tmp_path: Path) -> None:
    check(name, tmp_path, **CASES[case])


def test_all_linear_is_every_projection_and_no_more() -> None:
    for name in NAMES:
        model = tiny_model(**VARIANTS[name])
        wanted = {place for place, module in model.named_modules() if type(module) is torch.nn.Linear} - {"lm_head"}
        found = adapted(model, target_modules="all-linear").base_model.targeted_module_names
        assert set(found) == wanted and len(wanted) > 20, name


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["ring", "delayed", "moe"])
def test_checkpointed_activations_give_adapters_the_same_gradients(reentrant: bool, name: str) -> None:
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        model = tiny_model(**VARIANTS[name]).double().train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model = adapted(model, target_modules="all-linear", init_lora_weights=False).double()
        if checkpointed:
            model.enable_input_require_grads()
        loss(model).backward()
        grads.append({place: it.grad for place, it in model.named_parameters() if it.requires_grad})
    assert all(grad is not None and grad.any() for grad in grads[0].values())
    for place, grad in grads[0].items():
        torch.testing.assert_close(grads[1][place], grad, rtol=1e-9, atol=1e-12, msg=place)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_learn(kind: str) -> None:
    """Given as embeddings of the first tokens, and as keys and values in the cache."""
    configs = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}
    for name in ("plain", "delayed", "moe"):
        model = peft.get_peft_model(
            tiny_model(**VARIANTS[name]), configs[kind](num_virtual_tokens=4, task_type="CAUSAL_LM")
        )
        with torch.no_grad():
            before = loss(model.eval()).item()
        assert not trained(model, steps=6)
        with torch.no_grad():
            assert loss(model).item() < before - 1e-3
            assert model.generate(input_ids=BATCH[:, :5], max_new_tokens=3).shape == (3, 8)


def test_adapters_learn_beside_tables_in_int8(tmp_path: Path) -> None:
    tiny_model(**VARIANTS["ring"]).save_pretrained(tmp_path / "base")
    for place in ("device-int8", "cpu-int8"):
        model = adapted(UMv2ForCausalLM.from_pretrained(tmp_path / "base", memory_tables=place), target_modules=MEMORY)
        assert not trained(model)
        model.save_pretrained(tmp_path / place)
        base = UMv2ForCausalLM.from_pretrained(tmp_path / "base", memory_tables=place)
        again = peft.PeftModel.from_pretrained(base, tmp_path / place).eval()
        with torch.no_grad():
            assert torch.equal(again(BATCH).logits, model(BATCH).logits)
