"""What a configuration must satisfy, each refusal one sentence that names the flag, its value and what was expected."""

from __future__ import annotations

import importlib.util
import os

from umv2_megatron.config.data_config import marks_prefix
from umv2_megatron.config.document_checks import check_documents
from umv2_megatron.config.evaluation_checks import check_evaluation
from umv2_megatron.config.fp8_checks import check_fp8
from umv2_megatron.config.graph_checks import check_graphs
from umv2_megatron.config.memory_checks import (
    check_engram,
    check_memory_layout,
    check_split_tokens,
    check_trainable,
)
from umv2_megatron.config.optimizer_checks import check_optimizer
from umv2_megatron.config.option_checks import check_limits, check_partners
from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.config.schedule_checks import check_schedule
from umv2_megatron.config.usage import UsageError, refuse
from umv2_megatron.user_paths import user_path

_BALANCING = ("aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "none")


def check(run: RunConfig, *, for_training: bool = True) -> None:
    """Raise ``UsageError`` naming the flag when the settings cannot work together on ``run.world_size`` ranks."""
    for key in ("num_layers", "hidden_size", "num_attention_heads"):
        if not run.values[key]:
            raise UsageError(f"--{key.replace('_', '-')} is missing; give it or choose a --model-preset")
    check_limits(run)
    check_partners(run)
    _check_shapes(run)
    _check_windows(run)
    if for_training:
        check_documents(run)
    _check_layout(run)
    _check_experts(run)
    check_fp8(run, for_training=for_training)
    check_optimizer(run, for_training=for_training)
    check_graphs(run, for_training=for_training)
    check_engram(run)
    if run.has_memory:
        try:
            for family in run.families:
                family.validate(run.hidden_size, run.num_layers)
        except ValueError as error:
            raise UsageError(str(error)) from error
        check_memory_layout(run)
        if for_training:
            check_split_tokens(run)
            check_trainable(run)
    elif for_training and run.training.trainable != "all":
        expected = f"all with --ffn-variant {run.model.ffn_variant}, which has no memory layers"
        refuse("trainable", run.training.trainable, expected)
    elif run.memory.parallel_size != 1 and not run.has_experts:
        refuse("memory-parallel-size", run.memory.parallel_size, "1 without memory layers: no tables to shard")
    if for_training:
        if not (run.perform_initialization or run.training.load or run.training.dry_run):
            refuse("no-initialization", "on", "--load too, whose weights take the place of those that are not set")
        check_schedule(run)
        check_evaluation(run)
        _check_expert_biases(run)


def _check_shapes(run: RunConfig) -> None:
    if run.kv_channels is None and run.hidden_size % run.num_attention_heads:
        refuse("hidden-size", run.hidden_size, f"a multiple of --num-attention-heads ({run.num_attention_heads})")
    if run.model.group_query_attention:
        groups = run.num_query_groups
        if not groups or run.num_attention_heads % groups:
            refuse(
                "num-query-groups",
                groups,
                f"a divisor of --num-attention-heads ({run.num_attention_heads}) with --group-query-attention",
            )
    elif run.num_query_groups not in (None, run.num_attention_heads):
        refuse("num-query-groups", run.num_query_groups, "no value without --group-query-attention")
    if run.model.seq_length > run.max_position_embeddings:
        refuse("seq-length", run.model.seq_length, f"at most --max-position-embeddings ({run.max_position_embeddings})")
    if run.model.use_rope_scaling and run.model.rotary_seq_len_interpolation_factor is not None:
        refuse(
            "rotary-seq-len-interpolation-factor",
            run.model.rotary_seq_len_interpolation_factor,
            "no value with --use-rope-scaling: either stretches the rotary embedding",
        )
    _check_norms(run)
    if run.kv_channels and run.kv_channels % 2:
        refuse("kv-channels", run.kv_channels, "an even number: the rotary embedding turns pairs")


def _check_norms(run: RunConfig) -> None:
    """Norms of other places or spans than mcore's: what they were not made for."""
    post, wide = run.model.norm_placement == "post", run.model.qk_norm_span == "projection"
    placed = (("norm-placement", "post", "pre"),) if post else ()
    for flag, value, usual in (*placed, *((("qk-norm-span", "projection", "head"),) if wide else ())):
        if run.has_experts:
            refuse(flag, value, f"{usual} with --ffn-variant moe")
        if run.fp8:
            refuse(flag, value, f"{usual} with --fp8-format")
    if wide and (run.normalization != "RMSNorm" or run.layernorm_zero_centered_gamma):
        refuse("qk-norm-span", "projection", "head, or --normalization RMSNorm without --apply-layernorm-1p")
    groups = run.num_query_groups if run.model.group_query_attention else run.num_attention_heads
    if wide and groups % run.tensor_model_parallel_size:
        refuse(
            "tensor-model-parallel-size",
            run.tensor_model_parallel_size,
            f"a divisor of the {groups} heads of keys with --qk-norm-span projection",
        )


def _check_windows(run: RunConfig) -> None:
    window, skipped = run.window_size, run.window_attn_skip_freq
    if window is not None:
        pair = isinstance(window, list) and len(window) == 2 and all(isinstance(each, int) for each in window)
        if not pair or (run.transformer_impl == "local" and (window[0] < 0 or window[1] != 0)):
            refuse(
                "window-size",
                window,
                "two integers, the tokens before and after a token that it looks at, such as '[127, 0]', with "
                "--transformer-impl local 0 or more and 0",
            )
    if isinstance(skipped, list):
        if len(skipped) != run.num_layers:
            refuse("window-attn-skip-freq", skipped, f"{run.num_layers} integers, one for each layer")
    elif skipped is not None and skipped < 1:
        refuse("window-attn-skip-freq", skipped, "an integer of at least 1, or a list")
    plain = run.no_rope_freq
    if isinstance(plain, list):
        if len(plain) != run.num_layers:
            refuse("no-rope-freq", plain, f"{run.num_layers} integers, one for each layer")
    elif plain and run.num_layers % plain:
        refuse("no-rope-freq", plain, f"a divisor of --num-layers ({run.num_layers}), or a list")


def _check_layout(run: RunConfig) -> None:
    tp, pp, cp = run.tensor_model_parallel_size, run.pipeline_model_parallel_size, run.context_parallel_size
    if run.world_size % (tp * pp * cp):
        raise UsageError(
            f"--tensor-model-parallel-size {tp} x --pipeline-model-parallel-size {pp} x --context-parallel-size {cp} = "
            f"{tp * pp * cp} does not divide the {run.world_size} ranks; start a multiple of {tp * pp * cp} ranks"
        )
    if run.num_layers % pp and not (run.num_layers_in_first_pipeline_stage or run.num_layers_in_last_pipeline_stage):
        refuse("pipeline-model-parallel-size", pp, f"a divisor of --num-layers ({run.num_layers})")
    per_stage = run.model.num_layers_per_virtual_pipeline_stage
    if per_stage and (pp == 1 or run.num_layers // pp % per_stage):
        refuse(
            "num-layers-per-virtual-pipeline-stage",
            per_stage,
            f"a divisor of the {run.num_layers // pp} layers of a pipeline stage, with at least 2 stages",
        )
    if run.sequence_parallel and tp == 1:
        run._replace(sequence_parallel=False)  # nothing to split over one rank
    if cp > 1 and run.model.seq_length % (2 * cp):
        refuse("seq-length", run.model.seq_length, f"a multiple of 2 x --context-parallel-size = {2 * cp}")
    if run.sequence_parallel and run.model.seq_length % (tp * cp):
        times = f"--tensor-model-parallel-size ({tp})" + (f" x --context-parallel-size ({cp})" if cp > 1 else "")
        refuse("seq-length", run.model.seq_length, f"a multiple of {times}")
    if run.ffn_hidden_size and run.ffn_hidden_size % tp:
        refuse("ffn-hidden-size", run.ffn_hidden_size, f"a multiple of --tensor-model-parallel-size ({tp})")
    if run.transformer_impl == "local" and run.cp_comm_type not in (None, "all_gather"):
        refuse("cp-comm-type", run.cp_comm_type, "no value or all_gather with --transformer-impl local")
    if run.transformer_impl == "local" and not run.attention_softmax_in_fp32 and not run.holds_scores:
        refuse(
            "attention-softmax-in-fp32",
            "off",
            "on with local layers, or --attention-backend unfused, which holds the scores",
        )
    if run.transformer_impl == "local":
        here = {"attention_backend": ("auto", "unfused", "local"), "cross_entropy_fusion_impl": ("native",)}
        for key, choices in here.items():
            if run.values[key] not in choices:
                expected = f"one of {', '.join(choices)} without Transformer Engine"
                refuse(key.replace("_", "-"), run.values[key], expected)
    if (
        run.transformer_impl == "transformer_engine"
        and run.training.dry_run_world_size is None  # builds shapes, for which local layers will do
        and importlib.util.find_spec("transformer_engine") is None
    ):
        refuse(
            "transformer-impl",
            "transformer_engine",
            "local, or a machine with Transformer Engine (requirements-gpu.txt)",
        )
    instances, replicas = run.num_distributed_optimizer_instances, run.data_parallel_size * cp
    table_replicas = run.world_size // pp // max(run.memory.parallel_size, run.expert_model_parallel_size, 1)
    if instances < 1 or replicas % instances or table_replicas % instances:
        refuse(
            "num-distributed-optimizer-instances",
            instances,
            f"a divisor of the {replicas} replicas of the dense parameters and of the {table_replicas} of the shards "
            "of tables or experts",
        )
    if instances > 1 and importlib.util.find_spec("einops") is None:
        refuse("num-distributed-optimizer-instances", instances, "1, or the package einops, which megatron-core needs")
    if run.overlap_param_gather and not (run.use_distributed_optimizer and run.overlap_grad_reduce):
        raise UsageError(
            "--overlap-param-gather is on; expected --use-distributed-optimizer and --overlap-grad-reduce too"
        )


def _check_experts(run: RunConfig) -> None:
    """Experts: their settings only with --ffn-variant moe, and then sizes that fit each other and the ranks."""
    size = run.expert_model_parallel_size
    if not run.has_experts:
        return
    experts, topk, tp = run.num_moe_experts, run.moe_router_topk, run.tensor_model_parallel_size
    if not experts or experts < 1:
        refuse("num-experts", experts, "the number of experts of a block with --ffn-variant moe")
    if not 1 <= topk <= experts:
        refuse("moe-router-topk", topk, f"an integer from 1 to --num-experts ({experts})")
    if run.moe_ffn_hidden_size is not None and run.moe_ffn_hidden_size < 1:
        refuse("moe-ffn-hidden-size", run.moe_ffn_hidden_size, "an integer of at least 1")
    if run.memory.parallel_size != 1:
        refuse(
            "memory-parallel-size",
            run.memory.parallel_size,
            "1 with --ffn-variant moe, which has no value tables; split the experts over a group of that size with "
            f"--expert-model-parallel-size {run.memory.parallel_size}",
        )
    if size < 1 or experts % size:
        refuse("expert-model-parallel-size", size, f"a divisor of --num-experts ({experts})")
    per_stage = run.world_size // run.pipeline_model_parallel_size
    if per_stage % size:
        refuse("expert-model-parallel-size", size, f"a divisor of the {per_stage} ranks of a pipeline stage")
    if tp > 1 and not run.sequence_parallel:
        refuse("tensor-model-parallel-size", tp, "1, or --sequence-parallel too, with --ffn-variant moe")
    kinds = run.moe_router_load_balancing_type
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind not in _BALANCING:
            refuse("moe-router-load-balancing-type", kind, "one or several of " + ", ".join(_BALANCING))
    if isinstance(run.moe_aux_loss_coeff, list) and not isinstance(kinds, list):
        refuse(
            "moe-aux-loss-coeff",
            run.moe_aux_loss_coeff,
            f"one number with the one --moe-router-load-balancing-type ({kinds})",
        )
    for key in ("moe_aux_loss_coeff", "moe_z_loss_coeff"):
        coefficients = run.values[key] if isinstance(run.values[key], list) else [run.values[key]]
        if run.calculate_per_token_loss and tp * run.context_parallel_size > 1 and any(coefficients):
            refuse(
                key.replace("_", "-"),
                run.values[key],
                "no value, or 0, with --calculate-per-token-loss where tensor- or context-parallel ranks share a "
                "sequence: megatron-core would divide it by their number",
            )
    shared = run.moe_shared_expert_intermediate_size
    if shared is not None and (shared < 1 or shared % tp or run.add_bias_linear):
        expected = "no value with --add-bias-linear" if run.add_bias_linear else f"a positive multiple of {tp} (TP)"
        refuse("moe-shared-expert-intermediate-size", shared, expected)
    if run.moe_grouped_gemm and run.transformer_impl == "local":
        refuse("moe-grouped-gemm", "on", "off with --transformer-impl local, or Transformer Engine")


def _check_expert_biases(run: RunConfig) -> None:
    # mcore's MLP adds an expert's bias in place to a view, for which autograd has no backward; evaluation can
    if run.has_experts and run.add_bias_linear and run.transformer_impl == "local":
        raise UsageError(
            "--add-bias-linear is on; expected it left out (or --disable-bias-linear) with --ffn-variant moe and "
            "--transformer-impl local: megatron-core's local experts with biases cannot be trained"
        )


def _check_marks_are_there(prefix: str, key: str) -> None:
    try:
        marks = marks_prefix(prefix, key)
    except ValueError as error:
        raise UsageError(str(error)) from error
    for suffix in (".idx", ".bin"):
        if not os.path.isfile(marks + suffix):
            raise UsageError(
                f"--loss-mask-key {key}: there is no file {marks}{suffix} with the marks of {prefix}; make it by "
                f"tools/preprocess_data.py --json-keys {key}"
            )


def check_data(run: RunConfig) -> None:
    """Raise ``UsageError`` when the data flags contradict each other or name files that are not there; reads none."""
    try:
        run.data.validate()
        blends = {"--data-path": run.data.blend()}
        blends.update(zip(("--train-data-path", "--valid-data-path", "--test-data-path"), run.data.split_blends()))
    except ValueError as error:
        raise UsageError(str(error)) from error
    if run.training.allow_new_blend and run.data.mock_data:
        refuse("allow-new-blend", "on", "--data-path or --train-data-path: generated tokens have no blend")
    for flag, blend in blends.items():
        for prefix in blend[0] if blend is not None else []:
            for suffix in (".idx", ".bin"):
                if not os.path.isfile(prefix + suffix):
                    raise UsageError(
                        f"{flag} names {prefix}, but there is no file {prefix}{suffix}; give the path without "
                        "extension, as tools/preprocess_data.py printed it"
                    )
            if run.data.loss_mask_key is not None:
                _check_marks_are_there(prefix, run.data.loss_mask_key)
    for flag, where in (("--save", run.training.save), ("--load", run.training.load)):
        user_path(where or "", flag)
    if run.data.tokenizer_model is not None and not os.path.exists(run.data.tokenizer_model):
        raise UsageError(f"--tokenizer-model is {run.data.tokenizer_model!r}; there is no such file")
