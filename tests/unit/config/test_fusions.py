"""Fusions are on where their parts are there, off elsewhere, and as the flags say where these say anything."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import pytest
import yaml

from umv2_megatron.config import fusions
from umv2_megatron.config.fusion_settings import AUTOMATIC
from umv2_megatron.config.fusions import Parts, automatic, installed_parts
from umv2_megatron.config.option_table import option_table
from umv2_megatron.config.resolve import resolve
from umv2_megatron.config.usage import UsageError

TINY = ["--model-preset", "umv2-tiny", "--mock-data", "--tokenizer-type", "NullTokenizer", "--train-iters", "2"]
ALL = Parts(cuda=True, compiler=True, engine=True, softmax=True, gradients=True)
SWIGLU, DROPOUT, ROPE, SOFTMAX, GRADIENTS, FREED = AUTOMATIC
ENGINE = {"transformer_impl": "transformer_engine"}
SCORES = {"bf16": True, "holds_scores": True}


def on(parts: Parts, holds_scores: bool = False, **changes: Any) -> set[str]:
    """The fusions that are on by themselves, of a SwiGLU model of local layers with rotary embeddings."""
    values = {key: made.default for key, made in option_table().items()}
    values |= {"swiglu": True, "position_embedding_type": "rope", "transformer_impl": "local", **changes}
    found = automatic(values, parts, holds_scores=holds_scores)
    assert tuple(found) == AUTOMATIC and all(type(value) is bool for value in found.values())
    return {key for key, value in found.items() if value}


def test_nothing_is_fused_without_a_gpu() -> None:
    assert on(dataclasses.replace(ALL, cuda=False), **SCORES) == set()
    assert on(dataclasses.replace(ALL, cuda=False), **ENGINE) == set()


def test_every_part_brings_its_own() -> None:
    assert on(Parts(cuda=True)) == on(Parts(cuda=True), **ENGINE) == set()
    assert on(Parts(cuda=True, compiler=True)) == {SWIGLU, DROPOUT}
    assert on(Parts(cuda=True, engine=True), **ENGINE) == {ROPE}
    assert on(Parts(cuda=True, gradients=True)) == on(Parts(cuda=True, gradients=True), **ENGINE) == {GRADIENTS}
    assert on(Parts(cuda=True, softmax=True), **SCORES) == {SOFTMAX}
    assert on(ALL, **ENGINE) == {SWIGLU, DROPOUT, ROPE, GRADIENTS}
    assert on(ALL, **SCORES) == {SWIGLU, DROPOUT, SOFTMAX, GRADIENTS}


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"swiglu": False}, SWIGLU),
        ({"activation_func_clamp_value": 7.0}, SWIGLU),
        ({"glu_linear_offset": 1.0}, SWIGLU),
        ({"ffn_variant": "moe", "add_bias_linear": True}, SWIGLU),
        ({"position_embedding_type": "learned_absolute", **ENGINE}, ROPE),
        ({"transformer_impl": "local"}, ROPE),
        ({**SCORES, "bf16": False}, SOFTMAX),
        ({**SCORES, "holds_scores": False}, SOFTMAX),
        ({**SCORES, **ENGINE}, SOFTMAX),
        ({**SCORES, "window_size": [5, 0]}, SOFTMAX),
        ({**SCORES, "reset_attention_mask": True}, SOFTMAX),
    ],
)
def test_a_fusion_that_would_compute_something_else_is_off(changes: dict[str, Any], lost: str) -> None:
    assert lost not in on(ALL, **changes)
    kept = {SWIGLU, DROPOUT, GRADIENTS} - {lost}
    assert kept <= on(ALL, **changes)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """All parts but Transformer Engine, whose layers could not be built."""
    monkeypatch.setattr(fusions, "installed_parts", lambda: dataclasses.replace(ALL, engine=False))


def chosen(*argv: str, **others: Any) -> dict[str, Any]:
    """What is resolved, printed, saved and given to mcore: the same."""
    run = resolve([*TINY, *argv], 1, **others)
    config, text, saved = run.transformer_config(), run.describe(), yaml.safe_load(run.to_yaml())
    for key in AUTOMATIC:
        line = next(line for line in text.splitlines() if line.startswith(f"  {key} ."))
        assert line.split()[2] == str(run.values[key])
        assert getattr(config, key) is saved[key] is run.values[key]
    return {key: run.values[key] for key in AUTOMATIC}


def test_on_a_cpu_nothing_changes() -> None:
    assert installed_parts() == Parts()
    assert chosen() == dict.fromkeys(AUTOMATIC, False)


def test_with_all_parts(gpu: None) -> None:
    expected = dict.fromkeys(AUTOMATIC, False)
    assert chosen() == {**expected, SWIGLU: True, DROPOUT: True, GRADIENTS: True}
    assert chosen("--bf16", "--attention-backend", "unfused")[SOFTMAX]
    assert chosen(for_training=False) == dict.fromkeys(AUTOMATIC, False)
    assert chosen("--dry-run", "--dry-run-world-size", "1") == dict.fromkeys(AUTOMATIC, False)


def test_flags_of_megatron_lm_turn_them_off(gpu: None) -> None:
    flags = ("bias-swiglu", "bias-dropout", "rope", "masked-softmax", "gradient-accumulation")
    off = [f"--no-{flag}-fusion" for flag in flags]
    assert chosen(*off, "--bf16", "--attention-backend", "unfused") == dict.fromkeys(AUTOMATIC, False)


def test_scripts_of_megatron_lm_that_turn_them_off_run_on_a_cpu() -> None:
    flags = ("bias-swiglu", "bias-dropout", "rope", "masked-softmax", "gradient-accumulation")
    assert chosen(*(f"--no-{flag}-fusion" for flag in flags)) == dict.fromkeys(AUTOMATIC, False)


def test_flags_turn_them_on_where_they_can_run() -> None:
    assert chosen("--bias-activation-fusion", "--bias-dropout-fusion")[SWIGLU]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--gradient-accumulation-fusion"], ["-accumulation-fusion is on", "fused_weight_gradient_mlp_cuda"]),
        (["--masked-softmax-fusion"], ["--masked-softmax-fusion is on", "scaled_masked_softmax_cuda"]),
        (["--apply-rope-fusion"], ["-rope-fusion is on", "without Transformer Engine"]),
    ],
)
def test_a_fusion_without_its_part_is_refused(argv: list[str], told: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        resolve([*TINY, *argv], 1)
    assert all(part in str(error.value) for part in told), error.value


def test_a_softmax_that_would_disregard_a_mask_is_refused(gpu: None) -> None:
    with pytest.raises(UsageError, match=r"^--masked-softmax-fusion is on; expected off with --window-size"):
        resolve([*TINY, "--masked-softmax-fusion", "--window-size", "[5, 0]"], 1)


def test_parts_are_looked_for_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = {"triton", "fused_weight_gradient_mlp_cuda", "scaled_masked_softmax_cuda"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: object() if name in found else None)
    monkeypatch.setattr(fusions.shutil, "which", lambda name: "/bin/cc" if name == "cc" else None)
    assert installed_parts() == Parts(cuda=True, compiler=True, gradients=True)
    found.update({"scaled_upper_triang_masked_softmax_cuda", "transformer_engine"})
    monkeypatch.setattr(fusions.shutil, "which", lambda name: None)
    assert installed_parts() == Parts(cuda=True, engine=True, softmax=True, gradients=True)


STAGES = ["--pipeline-model-parallel-size", "2"]
INTERLEAVED = [*STAGES, "--num-layers-per-virtual-pipeline-stage", "1", "--global-batch-size", "2"]


def test_stages_free_what_they_have_sent() -> None:
    """Not where they are interleaved: mcore frees outputs that are still being sent."""
    for argv, freed in ((STAGES, True), (INTERLEAVED, False), ([*STAGES, "--no-deallocate-pipeline-outputs"], False)):
        assert resolve([*TINY, *argv], 2).transformer_config().deallocate_pipeline_outputs is freed
    with pytest.raises(UsageError, match=r"^--deallocate-pipeline-outputs is on; .* 4047\); leave it out$"):
        resolve([*TINY, *INTERLEAVED, "--deallocate-pipeline-outputs"], 2)
