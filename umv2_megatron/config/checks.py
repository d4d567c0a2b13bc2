"""What a configuration must satisfy, each refusal one sentence that names the flag, its value and what was expected."""

from __future__ import annotations

import importlib.util

from umv2_megatron.config.flags import UsageError, option_table
from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.config.schedule_checks import check_learning_rates
from umv2_megatron.config.schedule_checks import refuse as _refuse

_EXPERT_SETTINGS = ("num_moe_experts", "expert_model_parallel_size")
_BALANCING = ("aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "none")


def check(run: RunConfig, *, for_training: bool = True) -> None:
    """Raise ``UsageError`` naming the flag when the settings cannot work together on ``run.world_size`` ranks."""
    for key in ("num_layers", "hidden_size", "num_attention_heads"):
        if not run.values[key]:
            raise UsageError(f"--{key.replace('_', '-')} is missing; give it or choose a --model-preset")
    _check_shapes(run)
    _check_windows(run)
    if for_training and run.data.reset_attention_mask and run.transformer_impl == "transformer_engine":
        raise UsageError(
            "--reset-attention-mask is on; expected it left out, or --transformer-impl local: Transformer Engine's "
            "causal attention ignores masks (Megatron-LM issue 2357)"
        )
    _check_layout(run)
    _check_experts(run)
    if run.has_memory:
        try:
            run.memory.validate(run.hidden_size, run.num_layers)
        except ValueError as error:
            raise UsageError(str(error)) from error
        _check_memory_layout(run)
        if for_training:
            _check_split_tokens(run)
    elif run.memory.parallel_size != 1 and not run.has_experts:
        _refuse("memory-parallel-size", run.memory.parallel_size, "1 without memory layers: no tables to shard")
    if for_training:
        _check_schedule(run)
        _check_expert_biases(run)
    run.transformer_config()
    run.optimizer_config()


def _check_shapes(run: RunConfig) -> None:
    for key in (
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "kv_channels",
        "ffn_hidden_size",
        "seq_length",
        "micro_batch_size",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "log_interval",
        "make_vocab_size_divisible_by",
        "global_batch_size",
        "num_layers_per_virtual_pipeline_stage",
    ):
        if run.values[key] is not None and run.values[key] < 1:
            _refuse(key.replace("_", "-"), run.values[key], "an integer of at least 1")
    if run.kv_channels is None and run.hidden_size % run.num_attention_heads:
        _refuse("hidden-size", run.hidden_size, f"a multiple of --num-attention-heads ({run.num_attention_heads})")
    if run.model.group_query_attention:
        groups = run.num_query_groups
        if not groups or groups < 1 or run.num_attention_heads % groups:
            _refuse(
                "num-query-groups",
                groups,
                f"a divisor of --num-attention-heads ({run.num_attention_heads}) with --group-query-attention",
            )
    if run.model.seq_length > run.max_position_embeddings:
        _refuse(
            "seq-length", run.model.seq_length, f"at most --max-position-embeddings ({run.max_position_embeddings})"
        )
    if run.kv_channels and run.kv_channels % 2:
        _refuse("kv-channels", run.kv_channels, "an even number: the rotary embedding turns pairs")
    if not 0 < run.model.rotary_percent <= 1:
        _refuse("rotary-percent", run.model.rotary_percent, "a number above 0 and at most 1")
    if run.model.rotary_base <= 0:
        _refuse("rotary-base", run.model.rotary_base, "a number above 0")
    if run.training.seed < 0:
        _refuse("seed", run.training.seed, "an integer of at least 0")


def _check_windows(run: RunConfig) -> None:
    window, skipped = run.window_size, run.window_attn_skip_freq
    if window is not None:
        pair = isinstance(window, list) and len(window) == 2 and all(isinstance(each, int) for each in window)
        if not pair or (run.transformer_impl == "local" and (window[0] < 0 or window[1] != 0)):
            _refuse(
                "window-size",
                window,
                "two integers, the tokens before and after a token that it looks at, such as '[127, 0]', with "
                "--transformer-impl local 0 or more and 0",
            )
    if isinstance(skipped, list):
        if len(skipped) != run.num_layers:
            _refuse("window-attn-skip-freq", skipped, f"{run.num_layers} integers, one for each layer")
    elif skipped is not None and skipped < 1:
        _refuse("window-attn-skip-freq", skipped, "an integer of at least 1, or a list")


def _check_layout(run: RunConfig) -> None:
    tp, pp, cp = run.tensor_model_parallel_size, run.pipeline_model_parallel_size, run.context_parallel_size
    if run.world_size % (tp * pp * cp):
        raise UsageError(
            f"--tensor-model-parallel-size {tp} x --pipeline-model-parallel-size {pp} x --context-parallel-size {cp} = "
            f"{tp * pp * cp} does not divide the {run.world_size} ranks; start a multiple of {tp * pp * cp} ranks"
        )
    if run.num_layers % pp and not (run.num_layers_in_first_pipeline_stage or run.num_layers_in_last_pipeline_stage):
        _refuse("pipeline-model-parallel-size", pp, f"a divisor of --num-layers ({run.num_layers})")
    per_stage = run.model.num_layers_per_virtual_pipeline_stage
    if per_stage and (pp == 1 or run.num_layers // pp % per_stage):
        _refuse(
            "num-layers-per-virtual-pipeline-stage",
            per_stage,
            f"a divisor of the {run.num_layers // pp} layers of a pipeline stage, with at least 2 stages",
        )
    if run.sequence_parallel and tp == 1:
        run._replace(sequence_parallel=False)  # nothing to split over one rank
    if cp > 1 and run.model.seq_length % (2 * cp):
        _refuse("seq-length", run.model.seq_length, f"a multiple of 2 x --context-parallel-size = {2 * cp}")
    if run.sequence_parallel and run.model.seq_length % (tp * cp):
        times = f"--tensor-model-parallel-size ({tp})" + (f" x --context-parallel-size ({cp})" if cp > 1 else "")
        _refuse("seq-length", run.model.seq_length, f"a multiple of {times}")
    if run.ffn_hidden_size and run.ffn_hidden_size % tp:
        _refuse("ffn-hidden-size", run.ffn_hidden_size, f"a multiple of --tensor-model-parallel-size ({tp})")
    if run.transformer_impl == "local" and run.cp_comm_type not in (None, "all_gather"):
        _refuse("cp-comm-type", run.cp_comm_type, "no value or all_gather with --transformer-impl local")
    if run.fp8 and run.transformer_impl != "transformer_engine":
        _refuse(
            "fp8-format", run.fp8, "no value without Transformer Engine; install requirements-gpu.txt on a GPU machine"
        )
    if (
        run.transformer_impl == "transformer_engine"
        and run.training.dry_run_world_size is None  # builds shapes, for which local layers will do
        and importlib.util.find_spec("transformer_engine") is None
    ):
        _refuse(
            "transformer-impl",
            "transformer_engine",
            "local, or a machine with Transformer Engine (requirements-gpu.txt)",
        )
    instances, replicas = run.num_distributed_optimizer_instances, run.data_parallel_size * cp
    table_replicas = run.world_size // pp // max(run.memory.parallel_size, run.expert_model_parallel_size, 1)
    if instances < 1 or replicas % instances or table_replicas % instances:
        _refuse(
            "num-distributed-optimizer-instances",
            instances,
            f"a divisor of the {replicas} replicas of the dense parameters and of the {table_replicas} of the shards "
            "of tables or experts",
        )
    if instances > 1 and importlib.util.find_spec("einops") is None:
        _refuse("num-distributed-optimizer-instances", instances, "1, or the package einops, which megatron-core needs")
    if run.overlap_param_gather and not (run.use_distributed_optimizer and run.overlap_grad_reduce):
        raise UsageError(
            "--overlap-param-gather is on; expected --use-distributed-optimizer and --overlap-grad-reduce too"
        )


def _check_experts(run: RunConfig) -> None:
    """Experts: their settings only with --ffn-variant moe, and then sizes that fit each other and the ranks."""
    size = run.expert_model_parallel_size
    if not run.has_experts:
        for key, made in option_table().items():
            if (key.startswith("moe_") or key in _EXPERT_SETTINGS) and run.values[key] != made.default:
                flag = "num-experts" if key == "num_moe_experts" else key.replace("_", "-")
                _refuse(flag, run.values[key], "no value without --ffn-variant moe")
        return
    experts, topk, tp = run.num_moe_experts, run.moe_router_topk, run.tensor_model_parallel_size
    if not experts or experts < 1:
        _refuse("num-experts", experts, "the number of experts of a block with --ffn-variant moe")
    if not 1 <= topk <= experts:
        _refuse("moe-router-topk", topk, f"an integer from 1 to --num-experts ({experts})")
    if run.moe_ffn_hidden_size is not None and run.moe_ffn_hidden_size < 1:
        _refuse("moe-ffn-hidden-size", run.moe_ffn_hidden_size, "an integer of at least 1")
    if run.memory.parallel_size != 1:
        _refuse(
            "memory-parallel-size",
            run.memory.parallel_size,
            "1 with --ffn-variant moe, which has no value tables; split the experts over a group of that size with "
            f"--expert-model-parallel-size {run.memory.parallel_size}",
        )
    if size < 1 or experts % size:
        _refuse("expert-model-parallel-size", size, f"a divisor of --num-experts ({experts})")
    per_stage = run.world_size // run.pipeline_model_parallel_size
    if per_stage % size:
        _refuse("expert-model-parallel-size", size, f"a divisor of the {per_stage} ranks of a pipeline stage")
    if tp > 1 and not run.sequence_parallel:
        _refuse("tensor-model-parallel-size", tp, "1, or --sequence-parallel too, with --ffn-variant moe")
    kinds = run.moe_router_load_balancing_type
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind not in _BALANCING:
            _refuse("moe-router-load-balancing-type", kind, "one or several of " + ", ".join(_BALANCING))
    if isinstance(run.moe_aux_loss_coeff, list) and not isinstance(kinds, list):
        _refuse(
            "moe-aux-loss-coeff",
            run.moe_aux_loss_coeff,
            f"one number with the one --moe-router-load-balancing-type ({kinds})",
        )
    for key in ("moe_aux_loss_coeff", "moe_z_loss_coeff"):
        coefficients = run.values[key] if isinstance(run.values[key], list) else [run.values[key]]
        if run.calculate_per_token_loss and tp * run.context_parallel_size > 1 and any(coefficients):
            _refuse(
                key.replace("_", "-"),
                run.values[key],
                "no value, or 0, with --calculate-per-token-loss where tensor- or context-parallel ranks share a "
                "sequence: megatron-core would divide it by their number",
            )
    shared = run.moe_shared_expert_intermediate_size
    if shared is not None and (shared < 1 or shared % tp or run.add_bias_linear):
        expected = "no value with --add-bias-linear" if run.add_bias_linear else f"a positive multiple of {tp} (TP)"
        _refuse("moe-shared-expert-intermediate-size", shared, expected)
    if run.moe_grouped_gemm and run.transformer_impl == "local":
        _refuse("moe-grouped-gemm", "on", "off with --transformer-impl local, or Transformer Engine")


def _check_expert_biases(run: RunConfig) -> None:
    # mcore's MLP adds an expert's bias in place to a view, for which autograd has no backward; evaluation can
    if run.has_experts and run.add_bias_linear and run.transformer_impl == "local":
        raise UsageError(
            "--add-bias-linear is on; expected it left out (or --disable-bias-linear) with --ffn-variant moe and "
            "--transformer-impl local: megatron-core's local experts with biases cannot be trained"
        )


def _check_memory_layout(run: RunConfig) -> None:
    memory, pp = run.memory, run.pipeline_model_parallel_size
    if memory.parallel_size == 1 and memory.parallel_mode != option_table()["memory_parallel_mode"].default:
        _refuse(
            "memory-parallel-mode", memory.parallel_mode, "no value with --memory-parallel-size 1: nothing is sharded"
        )
    for key in ("memory_balance_loss_coeff", "memory_tucker_penalty_coeff"):
        if run.calculate_per_token_loss and run.values[key] > 0:
            _refuse(
                key.replace("_", "-"),
                run.values[key],
                "0 with --calculate-per-token-loss, which would divide it by the number of tokens",
            )
    if memory.stream and run.overlap_param_gather:
        _refuse("memory-stream", "on", "off with --overlap-param-gather, which waits for parameters on one stream only")
    if memory.value_lr is not None:
        for key in ("memory_value_lr_mult", "memory_value_lr_decay_iters"):
            if run.values[key] != option_table()[key].default:
                _refuse(key.replace("_", "-"), run.values[key], f"no value with --memory-value-lr {memory.value_lr:g}")
    if memory.norm_epsilon <= 0:
        _refuse("memory-norm-epsilon", memory.norm_epsilon, "a number above 0")
    if memory.parallel_size > 1:
        _check_table_shards(run)
    if memory.read_delay:
        _check_read_delay(run)
    if memory.sharing in ("ring", "noring") and pp > 1:
        _refuse("memory-sharing", memory.sharing, "none or block with --pipeline-model-parallel-size above 1")
    if memory.sharing == "block" and pp > 1:
        if run.num_layers_in_first_pipeline_stage or run.num_layers_in_last_pipeline_stage:
            _refuse("memory-sharing", memory.sharing, "none where pipeline stages have different numbers of layers")
        stages = pp * (run.virtual_pipeline_size or 1)
        per_stage = run.num_layers // stages
        owners = memory.memory_layers(run.num_layers)
        for stage in range(stages):
            seen = sum(owners[: (stage + 1) * per_stage])
            if seen % memory.sharing_size:
                _refuse(
                    "memory-sharing-size",
                    memory.sharing_size,
                    f"a size whose blocks do not straddle the {stages} pipeline stages of {per_stage} layers",
                )


def _check_read_delay(run: RunConfig) -> None:
    """Whether an output that waits for a later block meets it on the same stage, and where it keeps its gradient."""
    delay, pp = run.memory.read_delay, run.pipeline_model_parallel_size
    if pp > 1 and (run.num_layers_in_first_pipeline_stage or run.num_layers_in_last_pipeline_stage):
        _refuse("memory-read-delay", delay, "0 where pipeline stages have different numbers of layers")
    per_stage = run.num_layers // (pp * (run.virtual_pipeline_size or 1))
    granularity, modules = run.recompute_granularity, run.recompute_modules or ()
    for name in {"mlp", "layernorm"} & set(modules) if granularity == "selective" else ():
        _refuse("memory-read-delay", delay, f"0 with --recompute-modules {name}")
    for block, here in enumerate(run.memory.memory_layers(run.num_layers)):
        if not here:
            continue
        first, last = block % per_stage, block % per_stage + delay
        if last >= per_stage:
            _refuse(
                "memory-read-delay",
                delay,
                f"a delay with which the memory layer of block {block} adds its output on its own pipeline stage of "
                f"{per_stage} layers; change --memory-layer-freq or --pipeline-model-parallel-size",
            )
        together = run.recompute_num_layers or 1
        apart = first // together != last // together if run.recompute_method == "uniform" else first < together
        if granularity == "full" and apart:
            _refuse(
                "memory-read-delay",
                delay,
                f"0, or a --recompute-num-layers with which block {block} and block {block + delay} are recomputed "
                f"together, with --recompute-granularity full",
            )


def _check_split_tokens(run: RunConfig) -> None:
    """Whether tensor-parallel ranks that all have the same tokens can share the memory layers' work evenly.

    Padded tokens would count in the statistics and the auxiliary losses.
    """
    tp, samples = run.tensor_model_parallel_size, run.training.micro_batch_size
    tokens = samples * run.model.seq_length // run.context_parallel_size
    if tp > 1 and not run.sequence_parallel and tokens % tp:
        _refuse(
            "seq-length",
            run.model.seq_length,
            f"a length of which --micro-batch-size ({samples}) samples divide over --tensor-model-parallel-size ({tp}) "
            "ranks, which share the memory layers' work",
        )


def _check_table_shards(run: RunConfig) -> None:
    """Whether every value table can be shared out over the memory-parallel group."""
    memory, size = run.memory, run.memory.parallel_size
    per_stage = run.world_size // run.pipeline_model_parallel_size
    if per_stage % size:
        _refuse("memory-parallel-size", size, f"a divisor of the {per_stage} ranks of a pipeline stage")
    if memory.backend == "reference":
        _refuse("memory-backend", memory.backend, "auto, scatter, cpu or triton with --memory-parallel-size above 1")
    if memory.parallel_mode == "row":
        rows = memory.rows_per_layer
        if rows < size:
            _refuse("memory-parallel-size", size, f"at most the {rows} rows (N*N) of a value table")
        return
    for name, columns in (("value", memory.value_dim), ("pre-value", memory.pre_value_dim)):
        if columns % size:
            _refuse(
                f"memory-{name}-dim",
                columns,
                f"a multiple of --memory-parallel-size ({size}) with --memory-parallel-mode dim; row has no such limit",
            )


def _check_schedule(run: RunConfig) -> None:
    training = run.training
    _check_counts(run)
    _check_optimizer(run)
    if not training.skip_train and bool(training.train_iters) == bool(training.train_samples):
        raise UsageError("--train-iters or --train-samples is needed, and only one of them")
    unit = training.micro_batch_size * run.data_parallel_size
    if run.global_batch_size < unit or run.global_batch_size % unit:
        _refuse(
            "global-batch-size",
            run.global_batch_size,
            f"a multiple of --micro-batch-size x data-parallel size = {training.micro_batch_size} x "
            f"{run.data_parallel_size} = {unit}",
        )
    if run.virtual_pipeline_size:
        _check_interleaving(run)
    check_learning_rates(run)
    if training.save_interval and not training.save:
        _refuse("save-interval", training.save_interval, "--save with a directory too")
    if run.data.has_split_paths and run.data.valid_data_path is None and training.eval_iters:
        raise UsageError("--valid-data-path is missing beside --train-data-path; give it, or --eval-iters 0")
    if training.async_save:
        raise UsageError("--async-save is not supported; leave it out: checkpoints are written between two steps")
    start, end = training.profile_step_start, training.profile_step_end
    if training.profile and not 1 <= start < end:
        _refuse("profile-step-end", end, f"an iteration after --profile-step-start ({start}), which is 1 or more")
    if not all(rank.strip().isdigit() for rank in training.profile_ranks.split(",")):
        _refuse("profile-ranks", repr(training.profile_ranks), "ranks separated by commas, such as 0,1")


def _check_interleaving(run: RunConfig) -> None:
    """What mcore's interleaved schedule asks of the number of micro-batches; else it ends the run in the first step."""
    stages, batches = run.pipeline_model_parallel_size, run.num_microbatches
    group = run.microbatch_group_size_per_vp_stage or stages
    if group < stages:
        _refuse("microbatch-group-size-per-vp-stage", group, f"at least --pipeline-model-parallel-size ({stages})")
    if batches < group or 0 < batches % group < stages:
        _refuse(
            "global-batch-size",
            run.global_batch_size,
            f"a multiple of {group} micro-batches on each data-parallel rank with "
            f"--num-layers-per-virtual-pipeline-stage, not {batches}",
        )


def _check_optimizer(run: RunConfig) -> None:
    for key in ("adam_beta1", "adam_beta2"):
        if not 0 <= run.values[key] < 1:
            _refuse(key.replace("_", "-"), run.values[key], "a number from 0 up to, but not, 1")
    for key in ("adam_eps", "clip_grad", "weight_decay"):
        if run.values[key] < 0:
            _refuse(key.replace("_", "-"), run.values[key], "a number of at least 0")
    if run.values["optimizer_cpu_offload"] and run.training.save:
        raise UsageError(
            "--optimizer-cpu-offload is on; expected it left out with --save, because checkpoints cannot hold the "
            "state of its optimizers yet"
        )
    if run.values["use_precision_aware_optimizer"] and importlib.util.find_spec("transformer_engine") is None:
        raise UsageError(
            "--use-precision-aware-optimizer is on; expected it left out where Transformer Engine is not installed, "
            "whose Adam it needs"
        )


def _check_counts(run: RunConfig) -> None:
    """Ranges of the single settings of the schedule, the intervals and the counts."""
    at_least = {
        0: ("eval_iters", "lr_warmup_iters", "max_skipped_iterations", "memory_value_lr_decay_iters", "ckpt_step"),
        1: (
            "train_iters",
            "train_samples",
            "lr_decay_iters",
            "lr_wsd_decay_iters",
            "save_interval",
            "eval_interval",
            "exit_interval",
            "exit_duration_in_mins",
            "memory_log_interval",
            "save_retain_interval",
        ),
    }
    for least, keys in at_least.items():
        for key in keys:
            value = run.values[key]
            if value is not None and value < least:
                _refuse(key.replace("_", "-"), value, f"an integer of at least {least}")
    if run.training.distributed_timeout_minutes <= 0:
        _refuse("distributed-timeout-minutes", run.training.distributed_timeout_minutes, "a number above 0")
    fraction = run.training.lr_warmup_fraction
    if fraction is not None and not 0 <= fraction < 1:
        _refuse("lr-warmup-fraction", fraction, "a number from 0 up to, but not, 1")
    if run.training.train_samples and run.training.train_samples < run.global_batch_size:
        _refuse("train-samples", run.training.train_samples, f"at least --global-batch-size ({run.global_batch_size})")
