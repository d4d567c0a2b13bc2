"""mcore's optimizer and learning-rate schedule, with the value tables as a parameter group of their own.

The tables learn at a multiple of the dense learning rate. At step t the multiple is

    factor(t) = 1 + (mult - 1) * max(0, 1 - t / decay_steps)            (ultramemv2, "Training")

and it scales the peak and the floor *before* warm-up and decay are applied; decay_steps = 0 means a constant multiple.
With --memory-value-lr they learn at that rate instead, without warm-up and decay (Memory+, arXiv 2412.09764).
--memory-value-weight-decay gives them a weight decay of their own; like Adam's always, a step multiplies it by the
learning rate, theirs: rows shrink by a factor exp(-sum of rate * decay) over a run, however rarely they are picked.
The tables of n-gram layers beside other memory layers are a group with all of that of their own (--engram-value-*).
Steps are counted in samples, as mcore's scheduler does.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from umv2_megatron.checkpoint.optimizer_state import optimizer_parts
from umv2_megatron.config.engram_config import NgramLayers
from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.memory.value_table import TABLE_FAMILY, VALUE_GROUP
from umv2_megatron.training.matrix_optimizer import build_with_muon
from umv2_megatron.training.table_optimizer import (
    MainWeightsOnHost,
    leave_gradients_of_selected_rows,
    replace_table_optimizers,
    start_table_updates,
)


@dataclass(frozen=True)
class ValueFactor:
    """The value tables' multiple of the learning rate: from ``mult`` to 1 over ``decay_steps`` samples."""

    mult: float
    decay_steps: int

    def __call__(self, step: int) -> float:
        """The multiple at ``step`` (samples)."""
        if self.decay_steps == 0:
            return self.mult
        return 1.0 + (self.mult - 1.0) * max(0.0, 1.0 - step / self.decay_steps)


@dataclass
class TableRates:
    """How the value tables of one family learn: ``factor`` times the learning rate, or at ``value_lr`` where that is
    one; with their own ``weight_decay``, or (None) that of everything else.

    The factor's horizon is part of the state: a resumed run keeps it, whatever --train-iters says now. With
    --override-opt-param-scheduler a horizon that the user gave (``keep_saved_horizon`` off) takes its place.
    """

    factor: ValueFactor
    keep_saved_horizon: bool = True
    value_lr: float | None = None
    weight_decay: float | None = None

    @classmethod
    def of(cls, family: MemoryConfig, run: RunConfig) -> TableRates:
        """Those that the settings of ``family`` say; steps in samples."""
        iters = family.value_lr_decay_iters
        steps = run.schedule.decay if iters is None else iters * run.global_batch_size
        factor = ValueFactor(family.value_lr_mult, steps)
        return cls(factor, iters is None, family.value_lr, family.value_weight_decay)

    def state_dict(self) -> dict[str, Any]:
        """All but where the horizon comes from."""
        return {
            "value_lr_mult": self.factor.mult,
            "value_lr_decay_steps": self.factor.decay_steps,
            "value_lr": self.value_lr,
            "value_weight_decay": self.weight_decay,
        }

    def load_state_dict(self, state: dict[str, Any], override: bool) -> None:
        """Restore; with ``override`` the saved horizon alone, and that only where it is to be kept."""
        if "value_lr_mult" not in state:
            return
        mult, steps = state["value_lr_mult"], state["value_lr_decay_steps"]
        if override:
            mult = self.factor.mult
            steps = steps if self.keep_saved_horizon else self.factor.decay_steps
        else:
            self.value_lr = state.get("value_lr")
            self.weight_decay = state.get("value_weight_decay")
        self.factor = ValueFactor(mult, steps)


class ParamScheduler(OptimizerParamScheduler):
    """mcore's schedule of learning rate and weight decay, plus what the value tables have of their own.

    ``tables``: by family (``MemoryConfig.family``). ``warmup_init_fraction`` starts the warm-up at that fraction of the
    (scaled) peak instead of at ``init_lr``.
    """

    init_lr: float
    max_lr: float
    min_lr: float

    def __init__(
        self,
        *args: Any,
        tables: dict[str, TableRates],
        warmup_init_fraction: float | None = None,
        **kwargs: Any,
    ):
        self.tables = tables
        self.warmup_init_fraction = warmup_init_fraction
        super().__init__(*args, **kwargs)

    def get_lr(self, param_group: dict) -> float:
        """Learning rate of ``param_group`` at the current step."""
        rates = self._rates(param_group)
        if rates is not None and rates.value_lr is not None:
            return rates.value_lr
        factor = 1.0 if rates is None else rates.factor(self.num_steps)
        peak: float = param_group.get("max_lr", self.max_lr) * factor
        scaled = {**param_group, "max_lr": peak, "min_lr": param_group.get("min_lr", self.min_lr) * factor}
        dense_init = self.init_lr
        if self.warmup_init_fraction is not None:
            self.init_lr = self.warmup_init_fraction * peak
        try:
            return super().get_lr(scaled)
        finally:
            self.init_lr = dense_init

    def get_wd(self, param_group: dict | None = None) -> float:
        """Weight decay of ``param_group`` at the current step."""
        rates = None if param_group is None else self._rates(param_group)
        if rates is not None and rates.weight_decay is not None:
            return rates.weight_decay
        decay: float = super().get_wd(param_group)
        return decay

    def _rates(self, param_group: dict) -> TableRates | None:
        """What the tables of a group have of their own; None for a group of other parameters."""
        return self.tables[_family(param_group)] if VALUE_GROUP in param_group else None

    def state_dict(self) -> dict:
        """mcore's state, and what the tables have of their own, of n-gram layers beside others with their prefix."""
        state: dict[str, Any] = super().state_dict()
        for name, rates in self.tables.items():
            state.update({_PREFIX[name] + key: value for key, value in rates.state_dict().items()})
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore; ``override_opt_param_scheduler`` keeps this object's own values, but for a horizon
        (``TableRates``)."""
        for name, rates in self.tables.items():
            prefix = _PREFIX[name]
            own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
            rates.load_state_dict(own, self.override_opt_param_scheduler)
        self.num_steps = 0  # mcore adds the saved number of steps to the present one
        super().load_state_dict(state_dict)
        self.step(0)  # mcore sets the rates before it has read the saved weight decay

    @property
    def value_lr(self) -> float | None:
        """Current learning rate of the value tables, None where no group holds any."""
        return self.value_lr_of(MemoryConfig.family)

    def value_lr_of(self, family: str) -> float | None:
        """The same of the tables of one family."""
        tables = [group for group in self.optimizer.param_groups if VALUE_GROUP in group]
        return next((group["lr"] for group in tables if _family(group) == family), None)

    @property
    def dense_lr(self) -> float:
        """Current learning rate of everything else; what it would be where tables alone are trained."""
        others = (group["lr"] for group in self.optimizer.param_groups if VALUE_GROUP not in group)
        rate: float = next(others, None) or self.get_lr({})
        return rate


_PREFIX = {MemoryConfig.family: "", NgramLayers.family: f"{NgramLayers.family}_"}
"""Of keys of the schedule's state, by family."""


def _family(group: dict) -> str:
    """Whose tables a parameter group holds."""
    return group.get(TABLE_FAMILY, MemoryConfig.family)


def build_optimizer(run: RunConfig, chunks: list[torch.nn.Module], use_gloo_groups: bool = True) -> MegatronOptimizer:
    """mcore's optimizer over ``chunks`` (wrapped by DDP): dense groups, and the value tables with weight decay on; with
    Muon the matrices in optimizers of their own.

    ``use_gloo_groups``: let checkpointing use the gloo twins of the data-parallel groups, which must exist then.
    """
    config = run.optimizer_config()
    overrides = dict(get_standard_config_overrides(config))
    for family in run.families:
        own: Any = {VALUE_GROUP: family.value_lr_mult}
        if family is not run.memory:
            own[TABLE_FAMILY] = family.family
        is_own = ParamPredicate(f"{family.family} tables", functools.partial(_is_table_of, family.family))
        overrides[ParamKey(predicate=is_own)] = own
    offload = run.has_memory and run.memory.value_optimizer_offload

    def build() -> MegatronOptimizer:
        return get_megatron_optimizer(
            config, chunks, config_overrides=overrides, use_gloo_process_groups=use_gloo_groups
        )

    with MainWeightsOnHost(chunks) if offload else contextlib.nullcontext():
        optimizer = build() if run.optimizer == "adam" else build_with_muon(chunks, run, build)
    if config.use_precision_aware_optimizer:
        for part in optimizer_parts(optimizer):
            part.init_state_fn = initialize_precise_state
    if run.has_memory:
        replace_table_optimizers(optimizer, run, chunks)
    fuse_updates(optimizer)
    return optimizer


def _is_table_of(family: str, parameter: torch.nn.Parameter) -> bool:
    return getattr(parameter, TABLE_FAMILY, None) == family


def initialize_precise_state(fused_adam: Any, config: Any = None) -> None:
    """Let Transformer Engine's FusedAdam make the state of before its first step, for saving and loading.

    mcore's own function leaves out an argument that FusedAdam asks for since version 2.1.
    """
    told = {"store_param_remainders": False}
    wanted = inspect.signature(fused_adam.initialize_state).parameters
    for group in fused_adam.param_groups:
        for parameter in group["params"]:
            if not fused_adam.state[parameter]:
                fused_adam.initialize_state(parameter, **{key: told[key] for key in told if key in wanted})


def fuse_updates(optimizer: MegatronOptimizer) -> None:
    """Let torch's Adam, where mcore took it for want of TE and Apex, update in one pass over its tensors.

    Its other kernels make two temporary tensors as large as the parameter, and a table is a single large parameter:
    with 100M parameters on 2 cores an update takes 46 ms instead of 340. On CPUs the kernel goes through parameter and
    gradient in the order of memory, so it is for contiguous ones only.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        if not isinstance(inner, torch.optim.Adam):
            continue
        for group in inner.param_groups:
            if all(not each.is_meta and each.is_contiguous() for each in group["params"]):
                group["fused"] = True


def build_scheduler(run: RunConfig, optimizer: MegatronOptimizer) -> ParamScheduler:
    """The schedule of ``run`` in samples."""
    training, schedule = run.training, run.schedule
    constant = training.weight_decay_incr_style == "constant"
    return ParamScheduler(
        optimizer,
        init_lr=training.lr_warmup_init,
        max_lr=run.lr,
        min_lr=run.min_lr,
        lr_warmup_steps=schedule.warmup,
        lr_decay_steps=schedule.decay,
        lr_decay_style=training.lr_decay_style,
        start_wd=run.weight_decay if constant else training.start_weight_decay,
        end_wd=run.weight_decay if constant else training.end_weight_decay,
        wd_incr_steps=schedule.decay if constant else schedule.whole,
        wd_incr_style=training.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=not training.override_opt_param_scheduler,
        override_opt_param_scheduler=training.override_opt_param_scheduler,
        wsd_decay_steps=schedule.last_part or None,
        lr_wsd_decay_style=training.lr_wsd_decay_style,
        tables={family.family: TableRates.of(family, run) for family in (run.memory, *run.families)},
        warmup_init_fraction=training.lr_warmup_init_fraction,
    )


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did.

    ``loss``: what it was told, on the host; ``grad_norm``: of all gradients, before clipping; ``stopping``: whether any
    rank wants the run to stop; ``finite``: whether loss and gradients of all ranks are.
    """

    updated: bool
    loss: float
    grad_norm: float
    num_zeros: int | None
    stopping: bool
    finite: bool = True


@torch.no_grad()
def guarded_step(
    optimizer: MegatronOptimizer,
    loss: torch.Tensor,
    wants_to_stop: Callable[[], bool] = lambda: False,
    accepts: Callable[[float, float], bool] = lambda loss, grad_norm: True,
) -> StepResult:
    """One optimizer step that looks before it leaps: nothing is updated when a loss or gradient is not finite, or when
    ``accepts`` says so.

    Does what mcore's ``ChainedOptimizer.step`` does (unscale, global norm, clip, update), with the check between the
    norm and the update. All ranks come to the same decision. The host waits for the device once, in ``tolist``.

    Args:
        loss: scalar on the device, the same on all ranks.
        wants_to_stop: says whether this rank asks the run to stop; the ranks agree on it by the same exchange.
        accepts: of a finite loss and gradient norm, whether the update may be made. All ranks ask with the same two
            numbers, the largest that any rank has, so that they decide alike.
    """
    overflow = optimizer.prepare_grads()
    leave_gradients_of_selected_rows(optimizer)
    norms = _squared_norms(optimizer)
    finite = torch.isfinite(torch.stack([loss.to(norms), norms.sum()])).all() & (not overflow)
    flags = torch.stack([finite, torch.full_like(finite, not wants_to_stop())]).to(norms)  # as numbers, for nccl
    # the largest loss and norm of all ranks as smallest negative ones
    agreed = torch.cat([flags, -loss.to(norms).view(1), -norms.sum().view(1)])
    torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MIN)
    found = torch.cat([loss.to(norms).view(1), agreed, norms]).tolist()
    loss_here, all_finite, goes_on, largest_loss, largest_square, *squares = found
    grad_norm = math.sqrt(sum(squares))
    if not all_finite:
        return StepResult(False, loss_here, grad_norm, None, not goes_on, finite=False)
    if not accepts(abs(largest_loss), math.sqrt(abs(largest_square))):
        return StepResult(False, loss_here, grad_norm, None, not goes_on)
    for part in optimizer.chained_optimizers:
        parameters = [] if getattr(part, "is_stub_optimizer", False) else part.get_parameters()
        if parameters and part.config.clip_grad > 0.0:
            clip_grad_by_total_norm_fp32(
                parameters,
                max_norm=part.config.clip_grad,
                total_norm=grad_norm,
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    num_zeros = int(optimizer.count_zeros()) if optimizer.config.log_num_zeros_in_grad else None
    start_table_updates(optimizer)
    return StepResult(optimizer.step_with_ready_grads(), loss_here, grad_norm, num_zeros, not goes_on)


def _gradients_of(part: MegatronOptimizer) -> list[torch.Tensor]:
    """The gradients that count in the norm, by the name that mcore 0.16 or a newer one has for the method."""
    of_older = getattr(part, "get_main_grads_for_grad_norm", None)
    return of_older() if of_older is not None else part.get_grads_for_grad_norm()


def _squared_norms(optimizer: MegatronOptimizer) -> torch.Tensor:
    """Squared L2 norms of the gradients of all ranks, on the device, to be added up: [1], or one for each of mcore's
    optimizers where experts or tables are spread over other ranks than the rest.

    mcore's own (``get_grad_norm``) makes the host wait for each of them, and without Transformer Engine and Apex for
    every gradient.
    """
    parts = optimizer.chained_optimizers
    if len(parts) > 1 and optimizer.grads_states_parallel_group_is_shared():
        groups = [([grad for part in parts for grad in _gradients_of(part)], parts[0])]
    else:
        groups = [(_gradients_of(part), part) for part in parts]
    found = []
    for gradients, part in groups:
        square = optimizer.get_loss_scale().new_zeros(1, dtype=torch.float32)
        if gradients:
            norms = torch._foreach_norm(gradients, dtype=torch.float32)
            square += torch.linalg.vector_norm(torch.stack(norms)).square()
        torch.distributed.all_reduce(square, group=part.get_grad_stats_parallel_group())
        found.append(square)
    return torch.cat(found)
