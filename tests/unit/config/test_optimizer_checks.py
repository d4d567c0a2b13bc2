"""State of the optimizer in other dtypes: what a machine without Transformer Engine says, and what reaches mcore."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

import pytest
import torch

from umv2_megatron.config.resolve import resolve
from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.config.usage import UsageError
from umv2_megatron.planning.layout import Layout
from umv2_megatron.training.optimizer import initialize_precise_state

PRECISE = ["--use-precision-aware-optimizer", "--use-distributed-optimizer", "--bf16"]
LOW = ["--main-grads-dtype", "bf16", "--main-params-dtype", "fp16", "--exp-avg-dtype", "fp8"]
LOW += ["--exp-avg-sq-dtype", "bf16"]


class FusedAdam:
    """Has the arguments that mcore looks for in Transformer Engine's."""

    def __init__(
        self, params: Any, *, master_weight_dtype: Any = 0, exp_avg_dtype: Any = 0, exp_avg_sq_dtype: Any = 0,
        use_decoupled_grad: bool = False,
    ) -> None:  # fmt: skip
        self.param_groups = [{"params": params}]
        self.state: dict[Any, dict[str, Any]] = {each: {} for each in params}

    def initialize_state(self, param: Any, store_param_remainders: bool) -> None:
        """The signature of Transformer Engine 2.1 and later."""
        self.state[param] = {"remainders": store_param_remainders}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a package of the name of Transformer Engine."""
    for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.FusedAdam = FusedAdam  # type: ignore[attr-defined]
        module.__version__ = "2.9.0"  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)


def run(*flags: str, for_training: bool = True) -> RunConfig:
    argv = ["--model-preset", "umv2-tiny", "--mock-data", "--train-iters", "1", "--micro-batch-size", "1"]
    return resolve([*argv, "--transformer-impl", "local", *flags], 1, for_training=for_training)


def test_the_values_reach_mcore(engine: None) -> None:
    made = run(*PRECISE, *LOW)
    config = made.optimizer_config()
    assert config.use_precision_aware_optimizer and config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
    assert (config.main_grads_dtype, config.main_params_dtype) == (torch.bfloat16, torch.float16)
    assert (config.exp_avg_dtype, config.exp_avg_sq_dtype) == (torch.uint8, torch.bfloat16)
    assert not config.store_param_remainders and not made.ddp_config().grad_reduce_in_fp32
    plain = run(*PRECISE)
    assert plain.ddp_config().grad_reduce_in_fp32 and plain.optimizer_config().exp_avg_dtype == torch.float32


def test_state_is_made_with_the_arguments_of_either_version() -> None:
    optimizer = FusedAdam(["weight"])
    initialize_precise_state(optimizer)
    assert optimizer.state == {"weight": {"remainders": False}}
    optimizer.initialize_state = lambda param: optimizer.state[param].update(old=True)  # type: ignore[method-assign, assignment]
    optimizer.state = {"weight": {}}
    initialize_precise_state(optimizer)
    assert optimizer.state == {"weight": {"old": True}}


def test_the_planner_counts_the_bytes_without_transformer_engine() -> None:
    layout = Layout.from_values(run(*PRECISE, *LOW, for_training=False).values, 1)
    assert (layout.main_param_bytes, layout.exp_avg_bytes, layout.exp_avg_sq_bytes, layout.grad_bytes) == (2, 1, 2, 2)


REFUSED = [
    (PRECISE, ["--use-precision-aware-optimizer is on; expected off", "requirements-gpu.txt"]),
    (PRECISE[:2], ["--use-precision-aware-optimizer is on", "without --bf16"]),
    ([PRECISE[0], "--bf16"], ["--use-precision-aware-optimizer is on", "without --use-distributed-optimizer"]),
    (["--exp-avg-dtype", "bf16"], ["--exp-avg-dtype is bf16", "without --use-precision-aware-optimizer"]),
    ([*PRECISE, "--exp-avg-dtype", "int8"], ["--exp-avg-dtype", "int8", "one of fp32, fp16, bf16, fp8"]),
    ([*PRECISE, "--memory-value-second-moment", "row"], ["--memory-value-second-moment is row; expected full"]),
    (
        [*PRECISE, "--main-grads-dtype", "bf16", "--accumulate-allreduce-grads-in-fp32"],
        ["--main-grads-dtype is bf16; expected fp32 with --accumulate-allreduce-grads-in-fp32"],
    ),
    (
        [*PRECISE, "--no-accumulate-allreduce-grads-in-fp32"],
        ["--main-grads-dtype is fp32; expected bf16 with", "--no-accumulate-allreduce-grads-in-fp32"],
    ),
    (
        [*PRECISE, "--memory-value-optimizer-offload"],
        ["--memory-value-optimizer-offload is on; expected off with --use-precision-aware-optimizer"],
    ),
    (
        ["--memory-value-optimizer-offload", "--memory-value-second-moment", "row", "--no-decoupled-weight-decay"],
        ["--memory-value-optimizer-offload is on; expected off", "--no-decoupled-weight-decay"],
    ),
    (
        ["--ffn-variant", "dense", "--memory-value-optimizer-offload"],
        ["--memory-value-optimizer-offload is on", "--ffn-variant dense"],
    ),
    (["--store-param-remainders"], ["--main-params-dtype fp16 halves them"]),
]


@pytest.mark.parametrize("flags, words", REFUSED, ids=lambda each: " ".join(each[-2:]))
def test_refusals(flags: list[str], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        run(*flags)
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--optimizer", "muon", "--use-distributed-optimizer"], "--use-distributed-optimizer is on; expected off"),
        (["--optimizer", "dist_muon", "--use-distributed-optimizer"], "--optimizer dist_muon shares"),
        (["--muon-momentum", "0.9"], "--muon-momentum is 0.9; expected no value with --optimizer adam"),
        (["--muon-no-split-qkv"], "--muon-split-qkv is off; expected no value with --optimizer adam"),
        (["--optimizer", "muon", "--trainable", "rows"], "--optimizer is muon; expected adam with --trainable rows"),
        (["--optimizer", "sgd"], "expected one of adam, muon, dist_muon"),
    ],
)
def test_refusals_of_muon(flags: list[str], words: str) -> None:
    with pytest.raises(UsageError) as told:
        run(*flags)
    assert words in str(told.value) and "\n" not in str(told.value)


def test_muon_splits_heads_that_tensor_parallelism_leaves_whole() -> None:
    argv = ["--model-preset", "umv2-tiny", "--mock-data", "--train-iters", "1", "--micro-batch-size", "1"]
    argv += ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--optimizer", "muon"]
    argv += ["--group-query-attention", "--num-query-groups", "1"]
    with pytest.raises(UsageError, match="--muon-split-qkv is on; expected off with --tensor-model-parallel-size 2"):
        resolve(argv, 2)
    assert resolve([*argv, "--muon-no-split-qkv"], 2).muon_split_qkv is False


def test_mcore_is_told_of_adam_and_the_rest_of_muon() -> None:
    made = run("--optimizer", "muon", "--muon-momentum", "0.8")
    assert made.optimizer == "muon" and made.optimizer_config().optimizer == "adam"
