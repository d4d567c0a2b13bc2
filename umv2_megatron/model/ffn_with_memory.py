"""The module in a transformer layer's ``mlp`` slot: a dense FFN with a memory layer beside it, or two.

    y = FFN(x) + Memory(x),              x = norm(s),   s' = s + y       (ultramemv2, step "Forward")
    y = FFN(x) + Memory(x) + Ngrams(x)                                   (--engram-layer-freq)

mcore builds the slot first and tells it its layer number afterwards (``set_layer_number``), so the memory layers are
made at that moment: only then is it known whether this block has one, which rows it sees and which table it shares.
"""

from __future__ import annotations

import copy
import functools
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional, Union

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import init_method_normal
from torch.nn.functional import rms_norm

from umv2_megatron.config.memory_config import MemoryConfig
from umv2_megatron.config.table_shard import TableShard
from umv2_megatron.memory.engram import EngramLayer
from umv2_megatron.memory.engram import Started as StartedNgrams
from umv2_megatron.memory.layer import MemoryLayer, Started
from umv2_megatron.memory.losses import microbatch_scale
from umv2_megatron.memory.sharing import table_windows
from umv2_megatron.memory.value_table import TABLE_ATTRIBUTE, ValueTable
from umv2_megatron.model.delayed_outputs import DelayedOutputs
from umv2_megatron.model.post_norm import build_post_norm
from umv2_megatron.parallel import cpu_platform, groups, streams


@dataclass
class FFNWithMemorySubmodules:
    """The dense FFN's spec, and the class of the memory layer (None leaves the FFN alone in the slot)."""

    ffn: Union[ModuleSpec, type]
    memory: Optional[type] = MemoryLayer


class SharedTables:
    """The value tables that layers of one pipeline stage share, by owner; holds them weakly.

    One object travels in the layer spec's params. Layers are built in order, so an owner always comes before the
    layers that refer to it, and a second model built from the same spec replaces the entries as it goes.
    """

    def __init__(self) -> None:
        self._tables: weakref.WeakValueDictionary[int, ValueTable] = weakref.WeakValueDictionary()

    def put(self, owner: int, table: ValueTable) -> None:
        """Remember the table of memory layer ``owner`` (0-based among memory layers)."""
        self._tables[owner] = table

    def get(self, owner: int) -> ValueTable:
        """The table that memory layer ``owner`` owns; it must have been built on this pipeline stage.

        Raises:
            ValueError: it was not, because sharing layers lie on several stages.
        """
        table = self._tables.get(owner)
        if table is None:
            raise ValueError(
                f"--memory-sharing lets a layer use the table of memory layer {owner}, which is on another pipeline "
                "stage; expected all layers that share a table on one stage; use block with a --memory-sharing-size "
                "that fits into a stage, or none, or --pipeline-model-parallel-size 1"
            )
        return table

    def __deepcopy__(self, memo: dict) -> SharedTables:
        return SharedTables()


class FFNWithMemory(MegatronModule):
    """``ffn(x) + memory(x)`` for ``x`` of shape [s, b, H]; the blocks without a memory layer give ``ffn(x)``.

    With a read delay of k, ``ffn(x)`` plus the output of the memory layer of the block k before, if that has one. An
    n-gram layer beside it (``engram``) is added in its own block.

    Args:
        config: the TransformerConfig of the model.
        submodules: specs of the two parts.
        memory_config: sizes and switches of the memory layer.
        tables: where layers of this stage find tables that they share; needed when ``memory_config.sharing`` is not
            "none".
        standalone: True when no training program of ours is there to refresh u, t; every forward then does it
            (used by stock Megatron-LM, see docs/megatron-lm.md).
        post_norm: spec of a norm of this module's output; the memory layer then reads its input divided by its root
            mean square (``post_norm.py``). None: the input is normalised, the output is not.
        vocabulary: number of token ids; needed where rows are addressed by n-grams of them.
        ngrams: sizes and switches of n-gram layers beside the memory layers; None for none.
        delayed: where outputs wait for a later block; needed when ``memory_config.read_delay`` is not 0.
        pg_collection, is_mtp_layer, name: what layers of mcore 0.17 and later say to every module in this slot; the
            groups are those of the process, of which mcore's own collection consists.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: FFNWithMemorySubmodules,
        memory_config: MemoryConfig,
        tables: SharedTables | None = None,
        standalone: bool = False,
        delayed: DelayedOutputs | None = None,
        post_norm: Any = None,
        vocabulary: int | None = None,
        ngrams: MemoryConfig | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
    ):
        super().__init__(config=config)
        self.memory_config = memory_config
        self.ngrams = ngrams
        self.tables = tables if tables is not None else SharedTables()
        self.standalone = standalone
        self.delayed = delayed if delayed is not None else DelayedOutputs()
        self._adds_delayed = False
        self._memory_class = submodules.memory
        # Without sequence parallelism all tensor-parallel ranks have all tokens: each one takes its share of the work.
        self._splits_tokens = config.tensor_model_parallel_size > 1 and not config.sequence_parallel
        self.ffn = build_module(
            submodules.ffn,
            config=_ffn_config(config, memory_config),
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
        )
        self.post_layernorm = None if post_norm is None else build_post_norm(post_norm, config)
        self.vocabulary = vocabulary
        self.memory: MemoryLayer | EngramLayer | None = None
        self.engram: EngramLayer | None = None
        self.layer_number: int | None = None
        self.before_fork: Callable[[], None] | None = None
        """Called before a second stream begins to use parameters (``gather_before_forks``)."""

    def set_layer_number(self, layer_number: int) -> None:
        """Build the memory layers of block ``layer_number`` (1-based over the whole model), if it has any."""
        self.layer_number = layer_number
        if self._memory_class is None:
            return
        blocks = self.memory_config.memory_layers(self.config.num_layers)
        source = layer_number - 1 - self.memory_config.read_delay
        self._adds_delayed = 0 <= source < layer_number - 1 and blocks[source]
        self.memory = self._built(self._memory_class, self.memory_config, layer_number)
        if self.ngrams is not None:
            self.engram = self._built(EngramLayer, self.ngrams, layer_number)

    def _built(self, kind: type, memory_config: MemoryConfig, layer_number: int) -> Any:
        """The layer of one family in block ``layer_number``, None where it has none."""
        blocks = memory_config.memory_layers(self.config.num_layers)
        if not blocks[layer_number - 1]:
            return None
        index = sum(blocks[: layer_number - 1])
        window = table_windows(memory_config, sum(blocks))[index]
        owns = window.owner == index
        layer = kind(
            memory_config,
            hidden_size=self.config.hidden_size,
            layer_index=index,
            num_memory_layers=sum(blocks),
            ffn_hidden_size=self.config.ffn_hidden_size,
            num_layers=self.config.num_layers,
            window=window,
            table=None if owns else self.tables.get(window.owner),
            params_dtype=self.config.params_dtype,
            device=None if self.config.use_cpu_initialization else cpu_platform.device(),
            sequence_parallel=self.config.sequence_parallel,
            perform_initialization=self.config.perform_initialization,
            ffn_gated=self.config.gated_linear_unit,
            ffn_activation=self.config.activation_func,
            shard=_table_shard(memory_config),
            **({"vocabulary": self.vocabulary} if memory_config.hashes else {}),
        )
        if owns and memory_config.sharing != "none":
            self.tables.put(index, layer.table)
        layer.loss_scale = self._loss_scale
        if self._splits_tokens:
            # what convolves comes behind the gathering of all tokens and has seen all of them
            whole = ("conv", "conv_norm") if memory_config.hashes else ()
            for name, parameter in layer.named_parameters():
                if not getattr(parameter, TABLE_ATTRIBUTE, False) and name not in whole:
                    parameter.register_hook(_sum_over_tensor_parallel_ranks)
        return layer

    @property
    def layers(self) -> list[MemoryLayer | EngramLayer]:
        """The memory layers of this block."""
        return [layer for layer in (self.memory, self.engram) if layer is not None]

    def _loss_scale(self) -> float:
        """What the gradient of an auxiliary loss is multiplied by."""
        scale = microbatch_scale(self._splits_tokens or self.config.sequence_parallel)
        if self.config.fp16 and self.config.grad_scale_func is not None:
            # A stock Megatron-LM in float16: the training loss is multiplied by its loss scale.
            scale *= float(self.config.grad_scale_func(torch.ones(())))
        return scale

    def forward(self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None = None, **_: Any):
        """Normalised FFN input [s, b, H] -> (output [s, b, H], bias [H] or None).

        ``padding_mask`` is what mcore passes to experts, through all stages' layers and their recomputation. Where rows
        are addressed by n-grams, contexts [b, s] of the tokens are in it (``model/token_contexts.py``); other memory
        layers treat every token alike.
        """
        contexts = self._own_contexts(padding_mask, hidden_states) if any(map(_hashes, self.layers)) else None
        if self.post_layernorm is None:
            return self._added_up(hidden_states, hidden_states, contexts)
        size = self.config.hidden_size
        normed = rms_norm(hidden_states, [size], eps=self.config.layernorm_epsilon)
        output, bias = self._added_up(hidden_states, normed, contexts)
        return self.post_layernorm(output if bias is None else output + bias), None

    def _added_up(
        self, hidden_states: torch.Tensor, memory_input: torch.Tensor, contexts: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """FFN and memory of their inputs [s, b, H]: (output [s, b, H], bias [H] or None)."""
        layers = self.layers
        if not layers:
            output, bias = self.ffn(hidden_states)
            return self._with_delayed(output), bias
        if self.standalone and self.memory is not None and self.memory.retrieval is not None:
            # Cores stay as they are between two optimizer steps, so refreshing in every forward (also in those of
            # activation recompute and of evaluation) gives what refreshing once per step would.
            self.memory.retrieval.refresh_due = True
        branch = streams.branch_for(hidden_states.device, self.memory_config.stream)
        if self.before_fork is not None:
            self.before_fork()
        seen = branch.fork(memory_input, [table for layer in layers for table in layer.table.tables()])
        with branch.beside():
            # The exchanges of sharded tables run while the FFN computes.
            started = [self._start(layer, seen, contexts) for layer in layers]
        output, bias = self.ffn(hidden_states)
        with branch.beside():
            finished = [
                self._finish(layer, each, hidden_states, contexts) for layer, each in zip(layers, started, strict=True)
            ]
        finished = [branch.join(each) for each in finished]
        if branch.apart:
            # Behind the join: the caller's stream goes on, the next fork comes after the next attention.
            with branch.beside():
                for layer, each in zip(layers, started, strict=True):
                    layer.sort_ahead(each)
        for layer, memory in zip(layers, finished, strict=True):
            delay = layer.config.read_delay
            if delay == 0:
                output = output + memory
            else:
                assert self.layer_number is not None
                self.delayed.put(self.layer_number + delay, memory)
        return self._with_delayed(output), bias

    def _with_delayed(self, output: torch.Tensor) -> torch.Tensor:
        """``output``, and the output of an earlier block's memory layer if one is due here."""
        if not self._adds_delayed:
            return output
        assert self.layer_number is not None
        return output + self.delayed.take(self.layer_number)

    def _own_contexts(self, contexts: torch.Tensor | None, hidden_states: torch.Tensor) -> torch.Tensor:
        """Contexts [b, s] of the tokens of ``hidden_states`` [s', b, H] as [s', b]."""
        assert contexts is not None, "n-grams without token ids: see model/token_contexts.py"
        contexts = contexts.transpose(0, 1)
        if contexts.shape[0] != hidden_states.shape[0]:  # sequence parallelism, and mcore cuts on the first stage alone
            rank = parallel_state.get_tensor_model_parallel_rank()
            contexts = contexts.chunk(self.config.tensor_model_parallel_size)[rank]
        return contexts

    def _start(
        self, memory: MemoryLayer | EngramLayer, hidden_states: torch.Tensor, contexts: torch.Tensor | None
    ) -> Started | StartedNgrams:
        """Start a memory layer on the tokens that are this rank's to look up."""
        if self._splits_tokens:
            hidden_states = self._own_tokens(hidden_states)
        if isinstance(memory, EngramLayer):
            assert contexts is not None
            return memory.start(hidden_states, self._own_places(contexts) if self._splits_tokens else contexts)
        return memory.start(hidden_states)

    def _own_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """This tensor-parallel rank's share of the tokens, [T, H], padded where they do not divide."""
        tokens = hidden_states.reshape(-1, self.config.hidden_size)
        padding = -tokens.shape[0] % self.config.tensor_model_parallel_size
        if padding:
            tokens = torch.cat([tokens, tokens.new_zeros(padding, tokens.shape[1])])
        return tensor_parallel.scatter_to_sequence_parallel_region(tokens)

    def _own_places(self, contexts: torch.Tensor) -> torch.Tensor:
        """The contexts [T] of ``_own_tokens``; zeros are those of padding."""
        size, packed = self.config.tensor_model_parallel_size, contexts.reshape(-1)
        packed = torch.cat([packed, packed.new_zeros(-packed.shape[0] % size)])
        return packed.chunk(size)[parallel_state.get_tensor_model_parallel_rank()]

    def _finish(
        self,
        memory: MemoryLayer | EngramLayer,
        started: Any,
        hidden_states: torch.Tensor,
        contexts: torch.Tensor | None,
    ) -> torch.Tensor:
        """The output of a memory layer that was started for all of ``hidden_states``."""
        output = memory.finish(started)
        if self._splits_tokens:
            every = tensor_parallel.gather_from_sequence_parallel_region(output, tensor_parallel_output_grad=False)
            output = every[: hidden_states.numel() // self.config.hidden_size].view_as(hidden_states)
        if not isinstance(memory, EngramLayer) or not memory.config.conv_kernel:
            return output
        assert contexts is not None
        before = 0
        if self.config.sequence_parallel:
            # The tokens before this rank's first are those of other ranks.
            own, rank = output.shape[0], parallel_state.get_tensor_model_parallel_rank()
            before = min(memory.config.conv_reach, own * rank)
            every = tensor_parallel.gather_from_sequence_parallel_region(output)
            output = every[own * rank - before : own * (rank + 1)]
        return memory.convolve(output, contexts, before)

    @property
    def linear_fc1(self) -> torch.nn.Module:
        """The FFN's first linear layer, where mcore looks for it."""
        return self.ffn.linear_fc1

    def backward_dw(self) -> None:
        """Weight gradients that the FFN's linear layers put off (mcore's delayed weight gradients)."""
        self.ffn.backward_dw()


def _hashes(layer: MemoryLayer | EngramLayer) -> bool:
    return layer.config.hashes


def _table_shard(memory_config: MemoryConfig) -> TableShard:
    """This rank's part of every value table."""
    size = memory_config.parallel_size
    if size == 1:
        return TableShard()
    assert groups.get_memory_parallel_world_size() == size, (groups.get_memory_parallel_world_size(), size)
    return TableShard(memory_config.parallel_mode, size, groups.get_memory_parallel_rank())


def _sum_over_tensor_parallel_ranks(grad: torch.Tensor) -> torch.Tensor:
    """The gradient of a replicated parameter of which each tensor-parallel rank has seen its share of the tokens."""
    # in float32 or better, as mcore sums the gradients of replicated parameters under sequence parallelism
    total = grad.to(torch.promote_types(grad.dtype, torch.float32), memory_format=torch.contiguous_format, copy=True)
    torch.distributed.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
    return total.to(grad.dtype)


def _ffn_config(config: TransformerConfig, memory_config: MemoryConfig) -> TransformerConfig:
    """The FFN's own view of the configuration: with "paper" initialisation its last linear layer starts with standard
    deviation sqrt(2/(5H)) / sqrt(2L), whatever the attention's output projection starts with."""
    if memory_config.init != "paper":
        return config
    ffn_config = copy.copy(config)
    base = math.sqrt(2.0 / (5.0 * config.hidden_size))
    ffn_config.init_method = init_method_normal(base)
    ffn_config.output_layer_init_method = init_method_normal(base / math.sqrt(2.0 * config.num_layers))
    return ffn_config


def gather_before_forks(chunk: DistributedDataParallel, align_param_gather: bool) -> None:
    """Have blocks with a memory layer wait for all their parameters before they fork (--memory-stream).

    With --overlap-param-gather mcore waits for a gathered bucket once, on the stream of the first module that asks. If
    that is the memory layer's stream, the FFN's would read weights that have not arrived, or the other way round.
    """

    def gather(parameters: list[torch.nn.Parameter]) -> None:
        if not chunk.remove_forward_pre_hook_handles:  # an evaluation has gathered all of them
            return
        for group in dict.fromkeys(chunk.param_to_bucket_group[parameter] for parameter in parameters):
            group.finish_param_sync(skip_next_bucket_dispatch=align_param_gather)

    for module in chunk.modules():
        if isinstance(module, FFNWithMemory) and module.layers:
            tables = [table for layer in module.layers for table in layer.table.tables()]
            used = [*module.parameters(), *tables]  # a shared table belongs to another block
            held = [each for each in used if each in chunk.param_to_bucket_group]
            module.before_fork = functools.partial(gather, held)


def memory_layers(model: torch.nn.Module) -> list[tuple[int, MemoryLayer | EngramLayer]]:
    """``(block number from 0, memory layer)`` of every memory layer below ``model``, in order; n-gram layers beside
    others come behind those of their block."""
    found = [
        (module.layer_number - 1, layer)
        for module in model.modules()
        if isinstance(module, FFNWithMemory) and module.layer_number is not None
        for layer in module.layers
    ]
    return sorted(found, key=lambda pair: pair[0])
