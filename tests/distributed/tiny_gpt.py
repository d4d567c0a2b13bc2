"""A small GPTModel trained with mcore alone, the same in every layout: what the layout tests compare.

Shows which calls of mcore make a training step on CPU. A "layout" is how the model is spread over ranks and which
optimizer runs; parameters, data and hyperparameters are the same in all of them, so losses and gradient norms must be
too. Parameters are filled by name from a fixed seed: rank, stage and shard of a parameter follow from its name.

Letters: S sequence, B micro-batch, H hidden, V vocabulary.
"""

from __future__ import annotations

import functools
import re
import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from umv2_megatron.checkpoint.optimizer_state import allocate_moments, optimizer_parts
from umv2_megatron.parallel import cpu_platform, groups
from umv2_megatron.training.optimizer import fuse_updates

SEQUENCE, VOCABULARY, HIDDEN, LAYERS = 16, 96, 32, 4


@dataclass
class Layout:
    """How one run is spread and optimised."""

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    ep: int = 1
    distributed_optimizer: bool = False
    overlap: bool = False
    bf16: bool = False
    table: bool = False
    untied: bool = False
    global_batch: int = 4
    micro_batch: int = 2
    steps: int = 5
    clip: float = 0.5
    model: dict[str, Any] = field(default_factory=dict)


class FFNWithTable(MegatronModule):
    """Dense FFN plus a looked-up table row per token: stands for the memory layer in the mlp slot.

    The table is whole on every rank (M = 1) and marked as a value table is: ``allreduce = False`` and tensor-parallel.
    """

    def __init__(self, config: TransformerConfig, submodules: MLPSubmodules, rows: int = 48, **others: Any) -> None:
        super().__init__(config)
        self.ffn = MLP(config, submodules)  # mcore 0.17 and later say more to the slot (others)
        self.query = torch.nn.Linear(config.hidden_size, rows, bias=False, dtype=config.params_dtype)
        self.query.weight.sequence_parallel = config.sequence_parallel
        self.table = torch.nn.Parameter(torch.empty(rows, config.hidden_size, dtype=config.params_dtype))
        tensor_parallel.set_tensor_model_parallel_attributes(self.table, is_parallel=True, dim=1, stride=1)
        self.table.allreduce = False
        if config.tensor_model_parallel_size > 1 and not config.sequence_parallel:
            # Every TP rank sees all tokens, but mcore sums this gradient over TP x DP ranks as if each saw its own.
            self.table.register_hook(lambda gradient: gradient / config.tensor_model_parallel_size)

    def forward(self, x: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, bias = self.ffn(x, **kwargs)
        scores, indices = torch.topk(self.query(x), 4, dim=-1)
        return out + (scores.softmax(-1)[..., None] * self.table[indices]).sum(-2), bias


def run(layout: Layout) -> dict[str, list[float]]:
    """Train ``layout.steps`` steps; returns losses (mean over the global batch) and gradient norms, all ranks alike."""
    model, optimizer = build(layout)
    return train(layout, model, optimizer, range(layout.steps))


def train(layout: Layout, model: list, optimizer: Any, steps: range) -> dict[str, list[float]]:
    """Train the numbered steps; returns losses and gradient norms."""
    pairs = [train_step(layout, model, optimizer, step) for step in steps]
    return {"losses": [loss for loss, _ in pairs], "norms": [norm for _, norm in pairs]}


def build(layout: Layout) -> tuple[list, Any]:
    """Groups, model chunks in DDP, and optimizer: all that a step needs."""
    groups.initialize_groups(tp=layout.tp, pp=layout.pp, vpp=layout.vpp, expert_model_parallel_size=layout.ep)
    tensor_parallel.model_parallel_cuda_manual_seed(123)
    config = make_config(layout)
    chunks = [build_chunk(config, layout, chunk) for chunk in range(layout.vpp or 1)]
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=layout.overlap,
        overlap_param_gather=layout.overlap and layout.distributed_optimizer,
        use_distributed_optimizer=layout.distributed_optimizer,
        bucket_size=4096 if layout.overlap else None,
        average_in_collective=False,  # gloo has no ReduceOp.AVG
    )
    model = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-3,
            weight_decay=0.1,
            clip_grad=layout.clip,
            bf16=layout.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=layout.distributed_optimizer,
            overlap_param_gather=ddp_config.overlap_param_gather,
        ),
        model,
    )
    fuse_updates(optimizer)
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    if layout.overlap:
        config.no_sync_func = [chunk.no_sync for chunk in model] if len(model) > 1 else model[0].no_sync
        if len(model) > 1:
            config.grad_sync_func = [chunk.start_grad_sync for chunk in model]
    return model, optimizer


def make_config(layout: Layout) -> TransformerConfig:
    """RMSNorm, SwiGLU, grouped-query attention, RoPE, no biases: the family's block, small."""
    kwargs: dict[str, Any] = {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "qk_layernorm": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp,
        "expert_model_parallel_size": layout.ep,
        "sequence_parallel": layout.tp > 1,
        # Interleaved chunks on two stages: next and previous stage are the same rank, and only unbatched p2p keeps the
        # two conversations apart (batched, activations and gradients get swapped without an error).
        "overlap_p2p_comm": layout.vpp is not None,
        "batch_p2p_comm": layout.vpp is None,
        "pipeline_dtype": torch.bfloat16 if layout.bf16 else torch.float32,
        "params_dtype": torch.bfloat16 if layout.bf16 else torch.float32,
        "bf16": layout.bf16,
        "use_cpu_initialization": False,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "apply_rope_fusion": False,
    }
    return TransformerConfig(**(kwargs | layout.model))


def submodules_of(slot: Any) -> Any:
    """The submodules of mcore's own module for a layer's mlp slot: a partial function since mcore 0.17."""
    return slot.keywords["submodules"] if isinstance(slot, functools.partial) else slot.submodules


def build_chunk(config: TransformerConfig, layout: Layout, chunk: int) -> torch.nn.Module:
    """The layers that this rank holds as model chunk ``chunk``, filled by name."""
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    if layout.table:
        spec.submodules.mlp = ModuleSpec(module=FFNWithTable, submodules=submodules_of(spec.submodules.mlp))
    stage = {"ignore_virtual": False, "vp_stage": chunk if layout.vpp else None}
    model = GPTModel(
        config,
        spec,
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        pre_process=parallel_state.is_pipeline_first_stage(**stage),
        post_process=parallel_state.is_pipeline_last_stage(**stage),
        share_embeddings_and_output_weights=not layout.untied,
        position_embedding_type="rope",
        vp_stage=stage["vp_stage"],
    )
    model.model_type = ModelType.encoder_or_decoder
    fill(model, layout.tp)
    model.to(cpu_platform.device())
    if layout.bf16:
        from megatron.core.transformer.module import Float16Module

        return Float16Module(config, model)
    return model


@torch.no_grad()
def fill(model: GPTModel, tp: int) -> None:
    """Give every parameter the values that belong to its name, its layer's number and, under TP, its shard."""
    numbers = {f"decoder.layers.{index}.": layer.layer_number for index, layer in enumerate(model.decoder.layers)}
    rank = parallel_state.get_tensor_model_parallel_rank()
    experts_here = (model.config.num_moe_experts or 0) // model.config.expert_model_parallel_size
    first_expert = parallel_state.get_expert_model_parallel_rank() * experts_here
    for name, parameter in model.named_parameters():
        for prefix, number in numbers.items():
            if name.startswith(prefix):
                name = f"layer {number} {name.removeprefix(prefix)}"
                break
        # Experts are numbered per rank too; their names count over all ranks.
        name = re.sub(r"(?<=local_experts\.)\d+", lambda local: str(int(local.group()) + first_expert), name)
        if model.share_embeddings_and_output_weights and name == "output_layer.weight":
            name = "embedding.word_embeddings.weight"
        shape = list(parameter.shape)
        split = tp > 1 and getattr(parameter, "tensor_model_parallel", False) and not name.endswith("table")
        if split:
            shape[parameter.partition_dim] *= tp
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        whole = whole * 0.1 + (1.0 if "norm" in name else 0.0)
        if split:
            # A gated fc1 holds gate and up one above the other, and each of the two is split.
            halves = whole.chunk(2) if "linear_fc1" in name else (whole,)
            whole = torch.cat([half.chunk(tp, parameter.partition_dim)[rank] for half in halves])
        parameter.copy_(whole)


def batches(layout: Layout, step: int) -> list[torch.Tensor]:
    """This rank's micro-batches of one step: token ids [B, S + 1], the same global batch in every layout."""
    tokens = torch.randint(VOCABULARY, (layout.global_batch, SEQUENCE + 1), generator=_generator(step))
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    return list(tokens.chunk(ranks)[rank].split(layout.micro_batch))


def _generator(step: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + step)


def forward_step(iterator: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """One micro-batch through one model chunk, as mcore's schedules call it."""
    tokens = next(iterator).to(cpu_platform.device())
    positions = torch.arange(SEQUENCE).expand(tokens.size(0), -1)
    # attention_mask None: the local attention's softmax makes the causal mask itself.
    losses = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:])

    def loss_function(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = losses.float().mean()
        return loss, {"lm loss": loss.detach().clone()}

    return losses, loss_function


def train_step(layout: Layout, model: list, optimizer: Any, step: int) -> tuple[float, float]:
    """One global batch: forward, backward, reduction, clipping, update. Returns loss and gradient norm."""
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    data = batches(layout, step)
    told = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(data) for _ in model] if len(model) > 1 else iter(data),
        model=model if len(model) > 1 else model[0],
        num_microbatches=len(data),
        seq_length=SEQUENCE,
        micro_batch_size=layout.micro_batch,
        forward_only=False,
    )
    updated, norm, _zeros = optimizer.step()
    assert updated
    # Only the last stage has losses; sum them over data-parallel ranks and stages.
    total = torch.tensor([sum(item["lm loss"].item() for item in told) / len(data)], dtype=torch.float64)
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())
    total /= parallel_state.get_data_parallel_world_size()
    torch.distributed.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
    return total.item(), float(norm)


def as_mcore_stores(optimizer: Any, model_state: dict, metadata: dict[str, Any]) -> dict:
    """The optimizer's state as mcore's own ``sharded_state_dict`` makes it; ``metadata`` names mcore's type."""
    for part in optimizer_parts(optimizer):
        # mcore asserts that a step count exists; its own remedy, a step with zero gradients, would decay the weights
        allocate_moments(part)
    return optimizer.sharded_state_dict(model_state, is_loading=False, metadata=metadata)
