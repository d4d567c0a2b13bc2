"""Muon for the matrices of a model and Adam for the rest, each inside mcore's optimizers (--optimizer muon, dist_muon).

mcore makes its optimizers twice: over the matrices, where ``Muon`` then takes the place of its Adam, and over all else.
mcore's part around them stays: float32 copies of 16-bit weights, gradients, norms, clipping. mcore's own Muon is not
used: that of 0.16.1 needs a version of emerging-optimizers that is on no package index, and in 16-bit runs it neither
splits queries, keys and values nor knows experts, because the marks on parameters do not reach their copies.

With dist_muon each parameter is updated by one of the ranks that hold it alike, which alone has its state and its
float32 copy, and sends the new weights to the others. The parameters that a rank does not update are frozen while mcore
makes its optimizers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import nn

from umv2_megatron.checkpoint.optimizer_state import MATRIX_GROUP, inner_parameters
from umv2_megatron.config.dealing import deal_out
from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.memory.value_table import TABLE_ATTRIBUTE
from umv2_megatron.training.muon import Matrix, Muon, MuonRule

_ENDS = {"embedding", "output_layer", "conv"}
_KEPT = ("lr", "weight_decay")  # of the settings that Adam adds to parameter groups


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon updates the parameter called ``name``: a matrix that all tokens are multiplied by.

    Not so are embeddings, the output layer and value tables, of whose rows a token reads a few; keys and cores of
    memory layers, which are stacks of vectors and of small matrices with losses of their own; convolutions of n-gram
    layers, a filter for each channel; and gains and biases.
    """
    return parameter.dim() == 2 and not hasattr(parameter, TABLE_ATTRIBUTE) and not _ENDS & set(name.split("."))


class DealtOptimizer(ChainedOptimizer):
    """mcore's chain of optimizers of which each rank has those of a part of the parameters; after a step the weights of
    the others come from the ranks that updated them.

    Args:
        parts: mcore's optimizers.
        sources: of every parameter with several holders, the rank that updates it and the group of its holders; in the
            same order on all ranks of a group.
    """

    def __init__(
        self,
        parts: list[MegatronOptimizer],
        sources: Sequence[tuple[nn.Parameter, int, torch.distributed.ProcessGroup]],
    ) -> None:
        super().__init__(parts)
        self._sources = sources

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """Update this rank's parameters, and fetch the others'."""
        updated: bool = super().step_with_ready_grads()
        waits = [
            torch.distributed.broadcast(parameter.data, source, group=group, async_op=True)
            for parameter, source, group in self._sources
        ]
        for wait in waits:
            wait.wait()
        return updated


def build_with_muon(
    chunks: list[nn.Module], run: RunConfig, build: Callable[[], MegatronOptimizer]
) -> ChainedOptimizer:
    """mcore's optimizers over ``chunks`` (wrapped by DDP). ``build`` makes mcore's optimizers with Adam over the
    parameters that require gradients."""
    named = {
        f"{index}.{name}": parameter
        for index, chunk in enumerate(chunks)
        for name, parameter in chunk.named_parameters()
        if parameter.requires_grad
    }
    matrices = {id(parameter): name for name, parameter in named.items() if is_matrix(name, parameter)}
    owned, sources = _dealt(list(named.values())) if run.optimizer == "dist_muon" else (None, [])

    def parts_over(with_matrices: bool) -> list[Any]:
        def is_wanted(parameter: nn.Parameter) -> bool:
            return (id(parameter) in matrices) is with_matrices and (owned is None or id(parameter) in owned)

        with _frozen([each for each in named.values() if not is_wanted(each)]):
            made = build()
        return list(getattr(made, "chained_optimizers", [made]))

    of_matrices, of_rest = parts_over(True), parts_over(False)
    config: Any = chunks[0].config
    for part in of_matrices:
        if not getattr(part, "is_stub_optimizer", False):
            _put_muon_into(part, run, lambda parameter: _matrix(matrices[id(parameter)], parameter, run, config))
    if owned is None:
        return ChainedOptimizer([*of_matrices, *of_rest])
    for part in (*of_matrices, *of_rest):
        part.grad_stats_parallel_group = torch.distributed.group.WORLD  # every gradient counts on one rank
        part.is_dealt = True
    return DealtOptimizer([*of_matrices, *of_rest], sources)


def _put_muon_into(part: Any, run: RunConfig, matrix_of: Callable[[nn.Parameter], Matrix]) -> None:
    """Let ``Muon`` take the place of the Adam in mcore's optimizer ``part``, which has made no step."""
    adam = part.optimizer
    assert not adam.state, "the optimizer has made steps"
    dropped = set(adam.defaults) - set(_KEPT)
    groups = [
        {key: value for key, value in group.items() if key not in dropped} | {MATRIX_GROUP: True}
        for group in adam.param_groups
    ]
    rule = MuonRule(
        momentum=run.muon_momentum,
        nesterov=run.muon_use_nesterov,
        steps=run.muon_num_ns_steps,
        scale_mode=run.muon_scale_mode,
        extra_scale_factor=run.muon_extra_scale_factor,
        precision=run.muon_fp32_matmul_prec,
        distributed=run.muon_tp_mode == "distributed",
        decoupled=run.decoupled_weight_decay,
    )
    matrices = {held: matrix_of(parameter) for parameter, held, _ in inner_parameters(part)}
    part.optimizer = Muon(groups, matrices, rule)
    part.init_state_fn = lambda inner, config=None: inner.allocate()


def _matrix(name: str, parameter: nn.Parameter, run: RunConfig, config: Any) -> Matrix:
    """What Muon has to know of the parameter called ``name``; ``config`` is the model's TransformerConfig."""
    is_expert = "experts" in name.split(".")
    group = (
        parallel_state.get_expert_tensor_parallel_group()
        if is_expert
        else parallel_state.get_tensor_model_parallel_group()
    )
    split = getattr(parameter, "partition_dim", -1)
    if split == -1 or group.size() == 1 or run.muon_tp_mode == "blockwise":
        split = None
    heads = None
    if run.muon_split_qkv and name.endswith("linear_qkv.weight"):
        width = config.kv_channels
        queries = config.num_attention_heads // config.num_query_groups * width
        gates = (queries,) if getattr(config, "attention_output_gate", False) else ()
        heads = (queries, *gates, width, width)
        assert parameter.shape[0] % sum(heads) == 0, f"{name} of {parameter.shape[0]} rows is not made of {heads}"
    return Matrix(split, None if split is None else group, heads)


def _dealt(
    parameters: list[nn.Parameter],
) -> tuple[set[int], list[tuple[nn.Parameter, int, torch.distributed.ProcessGroup]]]:
    """The ids of the parameters that this rank updates, and what ``DealtOptimizer`` wants to know."""
    owned: set[int] = set()
    sources = []
    for is_shared, group in (
        (True, parallel_state.get_data_parallel_group(with_context_parallel=True)),
        (False, parallel_state.get_expert_data_parallel_group()),
    ):
        here = [each for each in parameters if getattr(each, "allreduce", True) is is_shared]
        for parameter, owner in zip(here, deal_out([each.numel() for each in here], group.size()), strict=True):
            if owner == group.rank():
                owned.add(id(parameter))
            if group.size() > 1:
                sources.append((parameter, torch.distributed.get_global_rank(group, owner), group))
    return owned, sources


@contextlib.contextmanager
def _frozen(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Inside, ``parameters``, which learn otherwise, require no gradients: mcore's optimizers leave them out."""
    for parameter in parameters:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad = True
