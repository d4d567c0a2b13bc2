"""transformers' Trainer: a run that is resumed, accumulated steps, and that what it saves is what it trained."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parent))
from tiny_model import CONTRACT, QUICK, slow_but, tiny_model, tokens  # noqa: E402

from umv2_megatron.hf import UMv2ForCausalLM  # noqa: E402

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(
        importlib.util.find_spec("accelerate") is None,
        reason="accelerate is not installed (requirements-hf-tools.txt): transformers' Trainer needs it",
    ),
]
every_variant = pytest.mark.parametrize("variant", slow_but(QUICK, CONTRACT))
some_variants = pytest.mark.parametrize("variant", slow_but(("plain", "delayed", "moe"), CONTRACT))


def texts(count: int = 16, length: int = 20) -> list[dict[str, torch.Tensor]]:
    """Examples of one row each; in every third most tokens are not predicted."""
    rows = []
    for number, row in enumerate(tokens(count, length)):
        labels = row.clone()
        if number % 3 == 0:
            labels[: length - 4] = -100
        rows.append({"input_ids": row, "labels": labels})
    return rows


def trained(folder: Path, model: UMv2ForCausalLM, resume: Path | None = None, **options: Any) -> UMv2ForCausalLM:
    """``model`` after a run of 6 steps, saved every 2, and at the end in ``folder``/last."""
    callbacks = options.pop("callbacks", [])
    defaults: dict[str, Any] = {
        "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_steps": 2, "logging_steps": 1,
        "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 3,
    }  # fmt: skip
    arguments = TrainingArguments(str(folder), **{**defaults, **options})
    trainer = Trainer(model=model, args=arguments, train_dataset=texts(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    trainer.save_model(str(folder / "last"))
    return model


def evaluated(model: UMv2ForCausalLM) -> float:
    with torch.no_grad():
        return model.eval()(tokens(3, 20), labels=tokens(3, 20)).loss.item()


class StopAfter(TrainerCallback):
    """Ends a run as if it had been killed after a step."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.steps


@every_variant
def test_a_resumed_run_ends_where_one_without_interruption_does(variant: str, tmp_path: Path) -> None:
    """To the bit, with dropout. And the files hold the model that was in memory."""

    def begin() -> UMv2ForCausalLM:
        return tiny_model(**CONTRACT[variant], hidden_dropout=0.1)

    whole = trained(tmp_path / "whole", begin())
    stopped = trained(tmp_path / "parts", begin(), callbacks=[StopAfter(4)])
    assert not torch.equal(stopped.model.norm.weight, whole.model.norm.weight)
    resumed = trained(tmp_path / "parts", begin(), resume=tmp_path / "parts" / "checkpoint-4")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    loss = evaluated(resumed)
    for folder in ("whole/checkpoint-6", "parts/last"):
        assert evaluated(UMv2ForCausalLM.from_pretrained(tmp_path / folder)) == loss
    assert evaluated(UMv2ForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-2")) != loss


def check_same_parameters(models: list[UMv2ForCausalLM], variant: str) -> None:
    """Two trained models have the same parameters, to 1e-5 of how far training has moved each."""
    start = tiny_model(**CONTRACT[variant]).double()
    for name, parameter in models[0].named_parameters():
        moved = (parameter - start.get_parameter(name)).abs().max().item()
        assert moved > 0, name
        torch.testing.assert_close(models[1].get_parameter(name), parameter, rtol=0, atol=1e-5 * moved + 1e-9, msg=name)


@some_variants
def test_accumulated_steps_weigh_every_label_alike(variant: str, tmp_path: Path) -> None:
    """Four batches of one row, with different numbers of labels, are one batch of four."""
    models = []
    for rows in (4, 1):
        split = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 4 // rows}
        options = {**split, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "max_steps": 2}
        models.append(trained(tmp_path, tiny_model(**CONTRACT[variant]).double(), **options))
    check_same_parameters(models, variant)


@some_variants
def test_checkpointing_of_activations(variant: str, tmp_path: Path) -> None:
    models = []
    for checkpointing in (False, True):
        options = {"gradient_checkpointing": checkpointing, "max_steps": 2, "optim": "sgd"}
        models.append(trained(tmp_path, tiny_model(**CONTRACT[variant]).double(), **options))
        assert models[-1].is_gradient_checkpointing == checkpointing
    check_same_parameters(models, variant)


@pytest.mark.slow
@every_variant
def test_compiled_by_the_trainer(variant: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    models = []
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        options = {"torch_compile": compiled, "torch_compile_backend": "aot_eager" if compiled else None,
                   "max_steps": 2, "optim": "sgd"}  # fmt: skip
        models.append(trained(folder, tiny_model(**CONTRACT[variant]).double(), **options))
        again = UMv2ForCausalLM.from_pretrained(folder / "last", dtype=torch.float64)
        assert evaluated(again) == evaluated(models[-1])
    check_same_parameters(models, variant)
