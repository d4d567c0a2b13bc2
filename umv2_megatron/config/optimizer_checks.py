"""What the settings of the optimizer's state must satisfy; called by ``checks.py``."""

from __future__ import annotations

import importlib.util

from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.config.usage import refuse


def check_optimizer(run: RunConfig, *, for_training: bool) -> None:
    """State elsewhere than on the device, or in other dtypes than float32: where it can be, and with what."""
    _check_muon(run)
    _check_offload(run)
    if run.use_precision_aware_optimizer:
        _check_precise(run, for_training=for_training)


def _check_muon(run: RunConfig) -> None:
    """Muon updates whole matrices, and takes the parts of a fused projection apart."""
    if run.optimizer == "adam":
        return
    if run.use_distributed_optimizer:
        refuse(
            "use-distributed-optimizer",
            "on",
            f"off with --optimizer {run.optimizer}, as it cuts matrices, which Muon needs whole; --optimizer dist_muon "
            "shares the optimizer's state",
        )
    if run.has_memory and run.training.trainable == "rows":
        refuse("optimizer", run.optimizer, "adam with --trainable rows, where no matrix learns")
    groups = run.num_query_groups if run.model.group_query_attention else run.num_attention_heads
    if run.muon_split_qkv and groups % run.tensor_model_parallel_size:
        refuse(
            "muon-split-qkv",
            "on",
            f"off with --tensor-model-parallel-size {run.tensor_model_parallel_size}, which does not divide the "
            f"{groups} heads of keys: give --muon-no-split-qkv",
        )


def _check_offload(run: RunConfig) -> None:
    """State of the value tables in host memory."""
    if not run.has_memory or not run.memory.value_optimizer_offload:
        return
    if run.use_precision_aware_optimizer:
        refuse(
            "memory-value-optimizer-offload",
            "on",
            "off with --use-precision-aware-optimizer, whose state is inside Transformer Engine's FusedAdam on the GPU",
        )
    if run.memory.value_second_moment == "row" and not run.decoupled_weight_decay:
        refuse(
            "memory-value-optimizer-offload",
            "on",
            "off with --memory-value-second-moment row and --no-decoupled-weight-decay: the squares that are added up "
            "on the GPU would need the main weights there",
        )


def _check_precise(run: RunConfig, *, for_training: bool) -> None:
    """mcore's precision-aware optimizer: where it can run, and with what."""
    if run.has_memory and run.memory.value_second_moment == "row":
        refuse(
            "memory-value-second-moment",
            "row",
            "full with --use-precision-aware-optimizer, whose optimizer has a second moment for each element",
        )
    if run.fp8 and run.fp8_recipe != "delayed":
        refuse(
            "fp8-recipe",
            run.fp8_recipe,
            "delayed with --use-precision-aware-optimizer: checkpoints cannot hold the state that megatron-core makes "
            "with others",
        )
    if run.grad_reduce_in_fp32 is (run.main_grads_dtype == "bf16"):
        expected = "fp32 with" if run.grad_reduce_in_fp32 else "bf16 with --use-precision-aware-optimizer and --no-"
        flag = " --" if run.grad_reduce_in_fp32 else ""
        refuse("main-grads-dtype", run.main_grads_dtype, f"{expected}{flag}accumulate-allreduce-grads-in-fp32")
    if for_training and importlib.util.find_spec("transformer_engine") is None:
        refuse(
            "use-precision-aware-optimizer",
            "on",
            "off, or a machine with Transformer Engine (requirements-gpu.txt), whose FusedAdam it is",
        )
