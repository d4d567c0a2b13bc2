"""Which of megatron-core's fused kernels a run uses where no flag says so; the flags are in ``fusion_settings.py``.

Megatron-LM has most of them on. Here they are on where their parts are there ("auto"): a fusion that lacks a part would
stop the run, or, on a CPU, be slower than what it replaces. The decision is made once, in ``automatic``, and is what a
run prints and saves. A flag for a fusion, or against it, is over it.

bias-SwiGLU and bias-dropout are functions of mcore that torch.compile fuses. On a CPU they are not compiled: there
bias-SwiGLU takes up to twice the time of the plain functions and rounds gradients otherwise
(docs/notes/performance.md), and bias-dropout is the same function. So both are off there.

Freeing outputs of pipeline stages is no fusion, but Megatron-LM has it on as well, and it is decided here.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.config.usage import refuse

_GRADIENTS = "fused_weight_gradient_mlp_cuda"
_SOFTMAX = ("scaled_upper_triang_masked_softmax_cuda", "scaled_masked_softmax_cuda")


@dataclass(frozen=True)
class Parts:
    """What fusions are made of, as far as this machine has it.

    ``cuda``: a GPU; ``compiler``: Triton and the C compiler that it calls, for torch.compile; ``engine``: Transformer
    Engine; ``softmax``, ``gradients``: Apex's kernels for masked softmax and for sums of gradients.
    """

    cuda: bool = False
    compiler: bool = False
    engine: bool = False
    softmax: bool = False
    gradients: bool = False


def installed_parts() -> Parts:
    """The parts on this machine; none without a GPU. Loads torch."""
    import torch  # takes seconds, which usage errors are spared

    if not torch.cuda.is_available():
        return Parts()
    compilers = (os.environ.get("CC"), "cc", "gcc", "clang")
    return Parts(
        cuda=True,
        compiler=_installed("triton") and any(name and shutil.which(name) for name in compilers),
        engine=_installed("transformer_engine"),
        softmax=all(map(_installed, _SOFTMAX)),
        gradients=_installed(_GRADIENTS),
    )


def automatic(values: Mapping[str, Any], parts: Parts, *, holds_scores: bool) -> dict[str, bool]:
    """Of settings by key, for each of ``AUTOMATIC``: whether it is on where no flag says so.

    ``holds_scores``: whether attention holds the scores of all pairs of tokens (``RunConfig.holds_scores``).
    """
    compiled = parts.cuda and parts.compiler
    swiglu = values["swiglu"] and values["activation_func_clamp_value"] is None and not values["glu_linear_offset"]
    # mcore has no fusion for experts with biases; with GELU its fusion is an approximation of another function
    experts_with_biases = values["ffn_variant"] == "moe" and values["add_bias_linear"]
    engine = values["transformer_impl"] == "transformer_engine"
    return {
        "bias_activation_fusion": bool(compiled and swiglu and not experts_with_biases),
        "bias_dropout_fusion": compiled,
        "apply_rope_fusion": parts.cuda and parts.engine and engine and values["position_embedding_type"] == "rope",
        "masked_softmax_fusion": parts.cuda
        and parts.softmax
        and not engine
        and bool(values["bf16"])
        and holds_scores
        and _causal_alone(values),
        "gradient_accumulation_fusion": parts.cuda and parts.gradients,
        "deallocate_pipeline_outputs": values["pipeline_model_parallel_size"] > 1 and not _interleaved(values),
    }


def resolve_fusions(run: RunConfig, *, for_training: bool = True) -> None:
    """Put ``automatic``'s decisions where ``run`` has None, and refuse fusions that were asked for and lack a part.

    Without training they are off: compiled functions are compiled anew for every length of a text, and the fused
    softmax cannot continue one. So they are in a dry run for another machine, whose parts nobody knows here.

    Raises:
        UsageError: names the flag and the part, or the flag that the fusion would disregard.
    """
    training = for_training and run.training.dry_run_world_size is None
    parts = installed_parts() if training else Parts()
    found = automatic(run.values, parts, holds_scores=run.holds_scores)
    run._replace(**{key: on for key, on in found.items() if run.values[key] is None})
    if run.deallocate_pipeline_outputs and _interleaved(run.values):
        refuse(
            "deallocate-pipeline-outputs",
            "on",
            "off with --num-layers-per-virtual-pipeline-stage: megatron-core 0.16.1 does not wait until an output is "
            "sent before it frees it (Megatron-LM pull request 4047); leave it out",
        )
    if not training:
        return
    if run.gradient_accumulation_fusion and not (parts.cuda and parts.gradients):
        _lacks("gradient-accumulation-fusion", f"Apex's extension {_GRADIENTS}")
    if run.masked_softmax_fusion:
        if not (parts.cuda and parts.softmax):
            _lacks("masked-softmax-fusion", f"Apex's kernels ({', '.join(_SOFTMAX)})")
        if not _causal_alone(run.values):
            refuse(
                "masked-softmax-fusion",
                "on",
                "off with --window-size or --reset-attention-mask: the fused softmax lets a token see all before it",
            )


def _causal_alone(values: Mapping[str, Any]) -> bool:
    """Whether the only mask is "all tokens before this one", the one that Apex's softmax has built in."""
    return not values["window_size"] and not values["reset_attention_mask"]


def _interleaved(values: Mapping[str, Any]) -> bool:
    """Whether stages send while they compute, which the schedule for them does without the wait that freeing needs."""
    return bool(values["num_layers_per_virtual_pipeline_stage"])


def _lacks(flag: str, part: str) -> None:
    refuse(flag, "on", f"off without a GPU and {part} (docs/gpu.md); leave it out")


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
