"""The settings of megatron-core that are flags here, each with what it does, its range and what it takes effect with.

The fields have the names of mcore's ``TransformerConfig``, ``OptimizerConfig`` and ``DistributedDataParallelConfig``
(0.16.1), from which ``run_config.py`` makes those objects. A field of mcore becomes a flag when somebody has seen what
reads it; ``tests/functional/test_every_flag.py`` holds each to that. Flags of Megatron-LM that are none here stand in
``refused_flags.yaml`` with the reason. Written down rather than read from mcore, so that ``--help`` and usage errors
need not load it; a test compares names, types and defaults with mcore's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional, Union

from umv2_megatron.config.option import option

_ENGINE = "transformer_impl=transformer_engine"
_MOE = "ffn_variant=moe"
_STAGES = "pipeline_model_parallel_size>1"
_INTERLEAVED = "num_layers_per_virtual_pipeline_stage"
_DELAYED = ("fp8", "fp8_recipe=delayed")
_PRECISE = ("use_precision_aware_optimizer",)


@dataclass
class TransformerSettings:
    """Fields of mcore's TransformerConfig: shape of the decoder, split over ranks, recomputation, FP8, experts."""

    num_layers: Optional[int] = option(None, "transformer blocks", at_least=1, at_most=100_000)
    hidden_size: Optional[int] = option(None, "H: width of the residual stream", at_least=1)
    num_attention_heads: Optional[int] = option(None, "attention heads", at_least=1)
    num_query_groups: Optional[int] = option(
        None, "heads of keys and values, which query heads share with --group-query-attention", at_least=1
    )
    kv_channels: Optional[int] = option(
        None, "width of an attention head (default: hidden size / attention heads)", at_least=1
    )
    ffn_hidden_size: Optional[int] = option(None, "inner width of the FFN (default: 4 x hidden size)", at_least=1)
    normalization: str = option("RMSNorm", "kind of the norms outside memory layers", choices=("LayerNorm", "RMSNorm"))
    layernorm_epsilon: float = option(1e-5, "epsilon of these norms", above=0, flags=("norm-epsilon",))
    layernorm_zero_centered_gamma: bool = option(
        False,
        "norms multiply by 1 + weight, which starts at 0",
        flags=("apply-layernorm-1p",),
        needs=(_ENGINE,),
    )
    add_bias_linear: bool = option(False, "biases in all linear layers", flags=("disable-bias-linear",))
    add_qkv_bias: bool = option(False, "biases in the projections to queries, keys and values")
    qk_layernorm: bool = option(False, "norm on queries and keys of attention")
    qk_l2_norm: bool = option(False, "queries and keys of attention divided by their root mean square")
    attention_output_gate: bool = option(False, "attention's output is multiplied by a sigmoid gate of its input")
    softmax_scale: Optional[float] = option(
        None, "factor of attention scores (default: 1 / root of the head's width)", above=0
    )
    softmax_type: str = option(
        "vanilla",
        "attention's softmax: as usual, with 1 added to the sum (off-by-one), or a learned number for each head",
        choices=("vanilla", "off-by-one", "learnable"),
    )
    window_size: Optional[tuple[int, int]] = option(
        None, "tokens before and after a token that it attends to, such as '[127, 0]' (default: all before it)"
    )
    window_attn_skip_freq: Optional[Union[int, list[int]]] = option(
        None,
        "blocks without the window: every n-th, or a list of 1 (window) and 0 (none) for each block",
        at_least=0,
        needs=("window_size",),
    )
    rotary_interleaved: bool = option(
        False,
        "rotate pairs of neighbouring dimensions, not the two halves",
        needs=("position_embedding_type=rope",),
    )
    no_rope_freq: Optional[Union[int, list[int]]] = option(
        None,
        "blocks without rotary embedding: every n-th, or a list of 1 (without) and 0 (with) for each block",
        at_least=0,
        needs=("position_embedding_type=rope",),
    )
    glu_linear_offset: float = option(0.0, "added to the linear half of the gated FFN", needs=("swiglu",))
    activation_func_clamp_value: Optional[float] = option(
        None, "limit of the magnitude of the gated FFN's inner numbers", above=0, needs=("swiglu",)
    )
    hidden_dropout: float = option(0.0, "dropout of what a block adds to the residual stream", at_least=0, below=1)
    attention_dropout: float = option(0.0, "dropout of attention's weights", at_least=0, below=1)
    init_method_std: Optional[float] = option(
        None,
        "standard deviation of linear layers at the start (default: root of 2 / (5 x hidden size), or 0.02 with "
        "--memory-init released)",
        above=0,
    )
    embedding_init_method_std: Optional[float] = option(
        None, "standard deviation of the embedding at the start (default: --init-method-std)", above=0
    )
    perform_initialization: bool = option(
        True, "set weights at the start; off where all are loaded", flags=("no-initialization",), needs=()
    )
    use_cpu_initialization: bool = option(
        False,
        "make weights on the CPU, whole, before they are split: the same for every tensor-parallel size",
        read_by="tensor_parallel/layers.py: where weights are made, and from which random numbers under TP",
    )
    calculate_per_token_loss: bool = option(
        False, "divide by the tokens of the global batch, not by those of each micro-batch"
    )
    apply_query_key_layer_scaling: bool = option(
        False, "attention scores are divided by the block's number, and multiplied again in the softmax"
    )
    attention_softmax_in_fp32: bool = option(
        True, "attention's softmax in float32 where scores are held in memory", needs=("bf16",)
    )
    attention_backend: str = option(
        "auto",
        "how attention computes; local layers: auto never holds the scores, unfused and local do",
        choices=("flash", "fused", "unfused", "local", "auto"),
        read_by="model/fused_attention.py: whether scores are held",
    )
    transformer_impl: str = option(
        "auto",
        "modules of the blocks: megatron-core's own (local), Transformer Engine's, or those where they can run",
        choices=("auto", "local", "transformer_engine"),
    )
    cuda_graph_impl: str = option(
        "none",
        "capture each block as CUDA graphs, one for its forward and one for its backward, and replay them (local)",
        choices=("none", "local"),
    )
    cuda_graph_warmup_steps: int = option(
        3, "passes of a block before its capture", at_least=0, needs=("cuda_graph_impl!=none",)
    )
    bf16: bool = option(False, "weights, activations and gradients in bfloat16, with float32 copies of weights")
    disable_bf16_reduced_precision_matmul: bool = option(
        False,
        "sum bfloat16 products in float32 in cuBLAS",
        needs=("bf16",),
        read_by="transformer/transformer_config.py: sets torch.backends.cuda.matmul",
    )
    deterministic_mode: bool = option(
        False,
        "only kernels whose results are the same each time",
        read_by="training/initialize.py: torch.use_deterministic_algorithms",
    )

    tensor_model_parallel_size: int = option(1, "TP: ranks that share every matrix", at_least=1)
    pipeline_model_parallel_size: int = option(1, "PP: pipeline stages", at_least=1)
    context_parallel_size: int = option(1, "CP: ranks that share every sequence", at_least=1)
    expert_model_parallel_size: int = option(1, "EP: ranks that share the experts", at_least=1, needs=(_MOE,))
    sequence_parallel: bool = option(
        False,
        "TP ranks split the sequence outside the matrices; turned off with one TP rank",
        read_by="tensor_parallel/layers.py: what ranks exchange",
    )
    cp_comm_type: Optional[Union[str, list[str]]] = option(
        None,
        "exchange of context parallelism: p2p, all_gather, a2a or a2a+p2p, or a list with one for each block; local "
        "layers: all_gather",
        needs=("context_parallel_size>1",),
        read_by="transformer/attention.py: what ranks exchange",
    )
    num_layers_in_first_pipeline_stage: Optional[int] = option(
        None,
        "blocks of the first stage (default: as many as the others)",
        at_least=1,
        flags=("decoder-first-pipeline-num-layers",),
        needs=(_STAGES,),
    )
    num_layers_in_last_pipeline_stage: Optional[int] = option(
        None,
        "blocks of the last stage (default: as many as the others)",
        at_least=1,
        flags=("decoder-last-pipeline-num-layers",),
        needs=(_STAGES,),
    )
    microbatch_group_size_per_vp_stage: Optional[int] = option(
        None,
        "micro-batches in a row through one virtual stage (default: the pipeline's size)",
        at_least=1,
        flags=("microbatch-group-size-per-virtual-pipeline-stage",),
        needs=(_INTERLEAVED,),
        read_by="pipeline_parallel/schedules.py: the order of forward and backward passes",
    )
    overlap_p2p_comm_warmup_flush: bool = option(
        False,
        "overlap messages between stages in warm-up and flush too",
        flags=("overlap-p2p-communication-warmup-flush",),
        needs=(_INTERLEAVED,),
        read_by="pipeline_parallel/schedules.py: when messages are waited for",
    )

    recompute_granularity: Optional[str] = option(
        None,
        "what backward computes again instead of keeping it: whole blocks (full), or --recompute-modules (selective)",
        choices=("full", "selective"),
        read_by="transformer/transformer_block.py: memory of activations",
    )
    recompute_method: Optional[str] = option(
        None,
        "full: chunks of --recompute-num-layers blocks (uniform), or the first ones of a stage (block)",
        choices=("uniform", "block"),
        needs=("recompute_granularity=full",),
        read_by="transformer/transformer_block.py: memory of activations",
    )
    recompute_num_layers: Optional[int] = option(
        None,
        "blocks in a chunk (uniform), or that are recomputed (block)",
        at_least=1,
        needs=("recompute_granularity=full",),
        read_by="transformer/transformer_block.py: memory of activations",
    )
    recompute_modules: Optional[list[str]] = option(
        None,
        "selective: core_attn, mlp, layernorm, and with experts moe, moe_act, shared_experts (default: core_attn)",
        choices=("core_attn", "mlp", "layernorm", "moe", "moe_act", "shared_experts"),
        needs=("recompute_granularity=selective",),
        read_by="transformer/transformer_layer.py: memory of activations",
    )
    distribute_saved_activations: Optional[bool] = option(
        False,
        "full: tensor-parallel ranks share the saved inputs of blocks",
        needs=("recompute_granularity=full", "tensor_model_parallel_size>1"),
        read_by="tensor_parallel/random.py: memory of activations",
    )

    fp8: Optional[str] = option(
        None,
        "dense FFNs compute in FP8: e4m3 everywhere, or e5m2 for gradients (hybrid)",
        choices=("e4m3", "hybrid"),
        flags=("fp8-format",),
        needs=(_ENGINE,),
    )
    fp8_recipe: Optional[str] = option(
        "delayed",
        "how FP8 is scaled",
        choices=("tensorwise", "delayed", "mxfp8", "blockwise"),
        needs=("fp8",),
    )
    fp8_margin: int = option(0, "powers of two kept free above the largest number", needs=_DELAYED)
    fp8_amax_history_len: int = option(1, "steps whose largest numbers decide the scale", at_least=1, needs=_DELAYED)
    fp8_amax_compute_algo: str = option(
        "most_recent", "which of them decides", choices=("most_recent", "max"), needs=_DELAYED
    )
    fp8_wgrad: bool = option(True, "gradients of weights in FP8, too", flags=("disable-fp8-wgrad",), needs=_DELAYED)
    tp_only_amax_red: bool = option(
        False, "largest numbers are reduced over tensor-parallel ranks only", needs=_DELAYED
    )
    first_last_layers_bf16: bool = option(False, "first and last blocks stay in bfloat16", needs=("fp8",))
    num_layers_at_start_in_bf16: int = option(
        1, "first blocks that stay in bfloat16", at_least=0, needs=("fp8", "first_last_layers_bf16")
    )
    num_layers_at_end_in_bf16: int = option(
        1, "last blocks that stay in bfloat16", at_least=0, needs=("fp8", "first_last_layers_bf16")
    )
    disable_parameter_transpose_cache: bool = option(
        False, "do not keep transposed FP8 weights between micro-batches", needs=("fp8",)
    )

    num_moe_experts: Optional[int] = option(
        None, "experts of a block", at_least=1, flags=("num-experts",), needs=(_MOE,)
    )
    moe_ffn_hidden_size: Optional[int] = option(
        None, "inner width of an expert (default: --ffn-hidden-size)", at_least=1, needs=(_MOE,)
    )
    moe_router_topk: int = option(2, "experts that a token goes to", at_least=1, needs=(_MOE,))
    moe_router_load_balancing_type: Union[str, list[str]] = option(
        "aux_loss",
        "how tokens are spread: aux_loss, seq_aux_loss, global_aux_loss, sinkhorn, none, or a list of losses",
        needs=(_MOE,),
    )
    moe_aux_loss_coeff: Union[float, list[float]] = option(
        0.0, "coefficient of the balance loss, or one for each of a list", at_least=0, needs=(_MOE,)
    )
    moe_z_loss_coeff: Optional[float] = option(None, "coefficient of the router's z-loss", at_least=0, needs=(_MOE,))
    moe_input_jitter_eps: Optional[float] = option(
        None, "relative noise on the router's input while training", at_least=0, below=1, needs=(_MOE,)
    )
    moe_router_score_function: str = option(
        "softmax", "scores of experts", choices=("softmax", "sigmoid"), needs=(_MOE,)
    )
    moe_router_pre_softmax: bool = option(False, "softmax over all experts, before the choice", needs=(_MOE,))
    moe_router_topk_scaling_factor: Optional[float] = option(
        None, "factor of the chosen experts' scores", above=0, needs=(_MOE,)
    )
    moe_router_num_groups: Optional[int] = option(
        None, "groups of experts, of which a token chooses --moe-router-group-topk first", at_least=1, needs=(_MOE,)
    )
    moe_router_group_topk: Optional[int] = option(
        None, "groups that a token chooses", at_least=1, needs=(_MOE, "moe_router_num_groups")
    )
    moe_router_dtype: Optional[str] = option(
        None, "dtype of the router's scores", choices=("fp32", "fp64"), needs=(_MOE,)
    )
    moe_router_enable_expert_bias: bool = option(
        False, "a bias on each expert's score in the choice, which balances the load", needs=(_MOE,)
    )
    moe_router_bias_update_rate: float = option(
        1e-3, "change of these biases in a step", at_least=0, needs=(_MOE, "moe_router_enable_expert_bias")
    )
    moe_shared_expert_intermediate_size: Optional[int] = option(
        None, "inner width of an expert that all tokens go to", at_least=1, needs=(_MOE,)
    )
    moe_shared_expert_gate: bool = option(
        False, "a sigmoid gate on the shared expert", needs=(_MOE, "moe_shared_expert_intermediate_size")
    )
    moe_grouped_gemm: bool = option(False, "experts' products in one kernel", needs=(_MOE, _ENGINE))
    moe_token_dispatcher_type: str = option(
        "alltoall",
        "how tokens travel to experts",
        choices=("alltoall", "allgather"),
        needs=(_MOE,),
        read_by="transformer/moe/moe_layer.py: which dispatcher is built",
    )
    moe_expert_capacity_factor: Optional[float] = option(
        None, "tokens that an expert takes, in multiples of an even share; others are dropped", above=0, needs=(_MOE,)
    )
    moe_pad_expert_input_to_capacity: bool = option(
        False,
        "every expert computes on as many tokens as it may take",
        needs=(_MOE, "moe_expert_capacity_factor"),
        read_by="transformer/moe/router.py: shapes of the experts' inputs",
    )
    moe_token_drop_policy: str = option(
        "probs",
        "drop those of low probability, or the last ones",
        choices=("probs", "position"),
        needs=(_MOE, "moe_expert_capacity_factor"),
    )
    moe_permute_fusion: bool = option(False, "fused reordering of tokens", needs=(_MOE, _ENGINE))
    moe_router_fusion: bool = option(False, "fused routing and balance loss", needs=(_MOE, _ENGINE))


@dataclass
class OptimizerSettings:
    """Fields of mcore's OptimizerConfig."""

    optimizer: str = option(
        "adam",
        "optimizer: Adam for everything, or Muon for matrices (docs/training.md says which); dist_muon: replicas share "
        "the optimizer's state, each the whole of some parameters",
        choices=("adam", "muon", "dist_muon"),
    )
    lr: Optional[float] = option(4e-4, "peak learning rate", above=0)
    min_lr: Optional[float] = option(None, "learning rate at the end of the decay (default: --lr / 10)", at_least=0)
    decoupled_lr: Optional[float] = option(None, "peak rate of embedding and output layer", above=0)
    decoupled_min_lr: Optional[float] = option(
        None, "lowest rate of embedding and output layer", at_least=0, needs=("decoupled_lr",)
    )
    weight_decay: float = option(0.1, "decay of matrices; norms and biases have none", at_least=0)
    apply_wd_to_qk_layernorm: bool = option(
        False, "decay of the norms on queries and keys, too", needs=("qk_layernorm",)
    )
    decoupled_weight_decay: bool = option(True, "AdamW; off: decay as part of the gradient")
    adam_beta1: float = option(0.9, "decay of the mean of gradients", at_least=0, below=1)
    adam_beta2: float = option(0.95, "decay of the mean of squared gradients", at_least=0, below=1)
    adam_eps: float = option(1e-8, "added to the root of the mean of squares", at_least=0)
    clip_grad: float = option(1.0, "largest norm of the gradient; 0 turns clipping off", at_least=0)
    log_num_zeros_in_grad: bool = option(
        False, "count and log zeros in gradients", read_by="training/optimizer.py: the log line"
    )
    use_distributed_optimizer: bool = option(
        False,
        "replicas share the optimizer's state",
        read_by="optimizer/__init__.py: which optimizer is built",
    )
    use_precision_aware_optimizer: bool = option(
        False,
        "keep gradients, main parameters and moments in the four dtypes below (Transformer Engine's FusedAdam)",
        needs=("use_distributed_optimizer", "bf16"),
    )
    main_grads_dtype: str = option(
        "fp32",
        "dtype in which gradients are added up, reduced and read by the optimizer; bf16 turns "
        "--accumulate-allreduce-grads-in-fp32 off",
        choices=("fp32", "bf16"),
        needs=_PRECISE,
    )
    main_params_dtype: str = option("fp32", "dtype of main parameters", choices=("fp32", "fp16"), needs=_PRECISE)
    exp_avg_dtype: str = option(
        "fp32", "dtype of first moments", choices=("fp32", "fp16", "bf16", "fp8"), needs=_PRECISE
    )
    exp_avg_sq_dtype: str = option(
        "fp32", "dtype of second moments", choices=("fp32", "fp16", "bf16", "fp8"), needs=_PRECISE
    )
    overlap_param_gather: bool = option(
        False,
        "gather parameters while the forward pass computes",
        needs=("use_distributed_optimizer", "overlap_grad_reduce"),
        read_by="distributed/distributed_data_parallel.py: when parameters are gathered",
    )


@dataclass
class DataParallelSettings:
    """Fields of mcore's DistributedDataParallelConfig: how replicas reduce gradients."""

    grad_reduce_in_fp32: bool = option(
        True,
        "keep and reduce gradients in float32",
        flags=("accumulate-allreduce-grads-in-fp32",),
        needs=("bf16",),
    )
    overlap_grad_reduce: bool = option(
        False,
        "reduce gradients while the backward pass computes",
        read_by="distributed/distributed_data_parallel.py: when buckets are reduced",
    )
    bucket_size: Optional[int] = option(
        None,
        "parameters that are reduced in one call (default: the larger of 40M and 1M x replicas)",
        at_least=1,
        flags=("ddp-bucket-size",),
        needs=("overlap_grad_reduce",),
        read_by="distributed/param_and_grad_buffer.py: sizes of buckets",
    )
    align_param_gather: bool = option(
        False,
        "all stages gather parameters at the same time",
        needs=("overlap_param_gather", _INTERLEAVED),
        read_by="distributed/distributed_data_parallel.py: when parameters are gathered",
    )
    num_distributed_optimizer_instances: int = option(
        1,
        "groups of replicas, each of which holds the optimizer's state once",
        at_least=1,
        needs=("use_distributed_optimizer",),
    )
    pad_buckets_for_high_nccl_busbw: bool = option(
        False,
        "pad buckets to multiples of 65,536 parameters per rank",
        flags=("ddp-pad-buckets-for-high-nccl-busbw",),
        needs=("use_distributed_optimizer",),
        read_by="distributed/param_and_grad_buffer.py: sizes of buckets",
    )
    reduce_scatter_with_fp32_accumulation: bool = option(
        False,
        "send bfloat16 gradients, sum them in float32",
        flags=("ddp-reduce-scatter-with-fp32-accumulation",),
        needs=("use_distributed_optimizer", "bf16"),
        read_by="distributed/param_and_grad_buffer.py: how gradients are summed",
    )
    average_in_collective: bool = option(
        False,
        "the collective takes the mean (NCCL); else gradients are scaled before it",
        flags=("ddp-average-in-collective",),
        read_by="distributed/param_and_grad_buffer.py: who divides by the replicas",
    )
    fp8_param_gather: bool = option(
        False, "keep and gather the weights of FP8 layers in FP8", needs=("fp8", "use_distributed_optimizer")
    )
