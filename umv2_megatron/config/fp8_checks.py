"""What --fp8-format asks of sizes, recipes and the GPU, told before a run starts.

Transformer Engine would say the same in the middle of the first step. A dense FFN is two products, of the tokens
[T, H] with [2F, H] and of [T, F] with [H, F], and their gradients (F: --ffn-hidden-size of one tensor-parallel rank).
FP8 products need inner sizes that are multiples of 16, and T is the inner size of the gradients of weights; blocks of
the recipe mxfp8 have 32 numbers, those of blockwise 128.
"""

from __future__ import annotations

from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.config.usage import refuse

_LEAVE_OUT = "or leave --fp8-format out"


def check_fp8(run: RunConfig, *, for_training: bool = True) -> None:
    """Raise ``UsageError`` naming the flag where FP8 cannot compute what ``run`` asks for."""
    if not run.fp8:
        return
    if run.has_experts:
        refuse("fp8-format", run.fp8, "no value with --ffn-variant moe: only dense FFNs compute in FP8")
    if run.first_last_layers_bf16 and run.fp8_recipe == "delayed":
        refuse(
            "first-last-layers-bf16",
            "on",
            "off with --fp8-recipe delayed, whose scales belong to all blocks; give --fp8-recipe tensorwise",
        )
    if run.fp8_param_gather and run.fp8_recipe == "mxfp8":
        refuse(
            "fp8-param-gather",
            "on",
            "off with --fp8-recipe mxfp8, whose weights mcore keeps in the buffer of their gradients; leave it out",
        )
    _check_sizes(run)
    if for_training:
        _check_tokens(run)
        _check_device(run)


def _check_sizes(run: RunConfig) -> None:
    tp, multiple = run.tensor_model_parallel_size, 32 if run.fp8_recipe == "mxfp8" else 16
    width = run.ffn_hidden_size or 4 * run.hidden_size
    gathered = run.fp8_recipe == "blockwise" and run.sequence_parallel and tp > 1
    of_hidden = 128 if gathered else multiple
    if run.hidden_size % of_hidden:
        also = " and --sequence-parallel" if gathered else ""
        refuse(
            "hidden-size",
            run.hidden_size,
            f"a multiple of {of_hidden} with --fp8-recipe {run.fp8_recipe}{also}; change it, {_LEAVE_OUT}",
        )
    if width % (multiple * tp):
        split = f"{multiple} x --tensor-model-parallel-size ({tp}) = {multiple * tp}" if tp > 1 else f"{multiple}"
        fewer = ", lower --tensor-model-parallel-size" if tp > 1 else ""
        refuse(
            "ffn-hidden-size",
            width,
            f"a multiple of {split} with --fp8-recipe {run.fp8_recipe}; change it{fewer}, {_LEAVE_OUT}",
        )


def _check_tokens(run: RunConfig) -> None:
    """Tokens of a micro-batch that a rank's FFN computes on, and those that it holds with sequence parallelism."""
    mxfp8, tp = run.fp8_recipe == "mxfp8", run.tensor_model_parallel_size
    tokens = run.training.micro_batch_size * run.model.seq_length // run.context_parallel_size
    multiple = 32 if mxfp8 else 16 if run.fp8_wgrad else 8
    split = run.sequence_parallel and tp > 1
    held, of_held = tokens // tp, 32 if mxfp8 else 128 if run.fp8_recipe == "blockwise" else 8
    if tokens % multiple or (split and held % of_held):
        if tokens % multiple == 0:
            tokens, multiple = held, of_held
        refuse(
            "micro-batch-size",
            run.training.micro_batch_size,
            f"one with which a rank's {tokens} tokens of a micro-batch (of --seq-length {run.model.seq_length}) are a "
            f"multiple of {multiple} with --fp8-recipe {run.fp8_recipe}; change either, {_LEAVE_OUT}",
        )


def _check_device(run: RunConfig) -> None:
    import torch  # takes seconds, which other mistakes are spared

    if not torch.cuda.is_available():
        return
    capability = torch.cuda.get_device_capability()
    wanted = wanted_device(run.fp8_recipe, capability, torch.version.cuda or "0")
    if wanted is not None:
        flag, value = ("fp8-recipe", run.fp8_recipe) if capability >= (8, 9) else ("fp8-format", run.fp8)
        refuse(flag, value, f"{wanted}; this one has compute capability {capability[0]}.{capability[1]}")


def wanted_device(recipe: str, capability: tuple[int, int], cuda: str) -> str | None:
    """What is expected instead of ``recipe`` on a GPU of this compute capability, with torch's CUDA version ("12.9").

    None: the recipe runs there. The limits are those of Transformer Engine 2.11 (pytorch/quantization.py).
    """
    if capability < (8, 9):
        return "no value: FP8 needs a GPU of compute capability 8.9 or more (Ada, Hopper, Blackwell)"
    if recipe == "mxfp8" and not (10, 0) <= capability < (12, 0):
        return "delayed, tensorwise or blockwise: mxfp8 needs a GPU of compute capability 10.x (Blackwell)"
    if recipe == "blockwise" and (capability < (9, 0) or tuple(map(int, cuda.split(".")[:2])) < (12, 9)):
        return f"delayed or tensorwise: blockwise needs compute capability 9.0 or more and CUDA 12.9 (torch has {cuda})"
    return None
