"""What a run is, apart from the memory layers and the data: the model around them, the schedule, and where things go.

Every field is a flag: ``train_iters`` is ``--train-iters``. The names are Megatron-LM's wherever Megatron-LM has the
option; what megatron-core's own dataclasses already define is not repeated here (see ``flags.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from umv2_megatron.config.memory_config import option
from umv2_megatron.config.variants import FFN_VARIANTS


@dataclass
class ModelConfig:
    """The decoder around the memory layers, as far as megatron-core's TransformerConfig does not describe it."""

    ffn_variant: str = option(
        "umv2",
        "what stands in the FFN slot of the blocks: FFN and memory (umv2, ultramem, memory-plus, pkm, peer: each sets "
        "defaults of the memory flags), mcore's experts, or the FFN alone",
        choices=FFN_VARIANTS,
    )
    seq_length: int = option(1024, "tokens per sample")
    max_position_embeddings: Optional[int] = option(None, "longest sequence the model takes (default: --seq-length)")
    position_embedding_type: str = option(
        "rope", "kind of position embedding", choices=("rope", "learned_absolute", "none")
    )
    rotary_base: int = option(10000, "base of the rotary embedding")
    rotary_percent: float = option(1.0, "share of the head dimension that is rotated")
    swiglu: bool = option(True, "SwiGLU in the FFN (SiLU gate); without it the FFN uses GELU")
    group_query_attention: bool = option(False, "grouped-query attention with --num-query-groups groups")
    untie_embeddings_and_output_weights: bool = option(False, "separate weights for input and output embedding")
    make_vocab_size_divisible_by: int = option(128, "pad the vocabulary to a multiple of this (times TP size)")
    num_layers_per_virtual_pipeline_stage: Optional[int] = option(
        None, "layers per virtual pipeline stage; turns the interleaved schedule on"
    )


@dataclass
class TrainingConfig:
    """Batches, schedule, checkpoints, evaluation and logging of a training run. Iterations and samples are counts."""

    micro_batch_size: int = option(1, "samples per rank and forward pass")
    global_batch_size: Optional[int] = option(
        None, "samples per optimizer step over all ranks (default: micro batch x data-parallel size)"
    )
    train_iters: Optional[int] = option(None, "optimizer steps of the whole run")
    train_samples: Optional[int] = option(None, "samples of the whole run, instead of --train-iters")
    seed: int = option(1234, "seed of initialisation, dropout and data order")
    exit_interval: Optional[int] = option(None, "save and exit after an iteration divisible by this")
    exit_duration_in_mins: Optional[int] = option(None, "save and exit after this many minutes")
    exit_signal_handler: bool = option(True, "save and exit with code 0 on SIGTERM or SIGUSR1")

    lr_decay_style: str = option(
        "cosine",
        "shape of the learning rate's decay",
        choices=("constant", "linear", "cosine", "inverse-square-root", "WSD"),
    )
    lr_decay_iters: Optional[int] = option(None, "iterations until --min-lr is reached (default: --train-iters)")
    lr_warmup_iters: int = option(0, "iterations of linear warm-up")
    lr_warmup_fraction: Optional[float] = option(None, "warm-up as a fraction of the decay iterations")
    lr_warmup_init: float = option(0.0, "learning rate at the start of the warm-up")
    lr_warmup_init_fraction: Optional[float] = option(
        None, "start the warm-up at this fraction of the peak instead (the released code: 0.1)"
    )
    lr_wsd_decay_style: str = option(
        "cosine", "shape of WSD's last part", choices=("linear", "cosine", "exponential", "minus_sqrt")
    )
    lr_wsd_decay_iters: Optional[int] = option(None, "iterations of WSD's last part")
    override_opt_param_scheduler: bool = option(
        False, "take the schedule from the flags even where the checkpoint has another one"
    )

    save: Optional[str] = option(None, "directory for checkpoints, metrics.jsonl and config.yaml")
    load: Optional[str] = option(None, "directory to resume from (default: --save once it holds a checkpoint)")
    save_interval: Optional[int] = option(None, "iterations between checkpoints (always one at the end)")
    save_retain_interval: Optional[int] = option(None, "keep for good the checkpoints of multiples of this")
    ckpt_format: str = option("torch_dist", "checkpoint format", choices=("torch_dist",))
    async_save: bool = option(False, "not supported: a step begins when the checkpoint of the last one is safe")
    dist_ckpt_optim_fully_reshardable: bool = option(
        False, "accepted for scripts of Megatron-LM: any layout can load every checkpoint, with or without it"
    )
    ckpt_step: Optional[int] = option(None, "load this iteration instead of the newest")
    finetune: bool = option(False, "load weights only and start at iteration 0")
    no_load_optim: bool = option(False, "do not load the optimizer's state")
    no_load_rng: bool = option(False, "do not load the random-number states")
    use_checkpoint_args: bool = option(False, "take the model's and the memory's sizes from the checkpoint")
    allow_fresh: bool = option(False, "start from scratch when --load holds no checkpoint")
    allow_config_change: bool = option(False, "resume although data, seed, batch or sizes differ from the checkpoint's")

    eval_interval: Optional[int] = option(1000, "iterations between evaluations (always one at the end)")
    eval_iters: int = option(100, "global batches per evaluation, always the first ones")
    skip_train: bool = option(False, "only evaluate")

    log_interval: int = option(100, "iterations between log lines")
    log_throughput: bool = option(True, "put TFLOP/s per GPU into the log line")
    log_params_norm: bool = option(False, "put the norm of the parameters into the log line")
    log_memory_to_tensorboard: bool = option(False, "record the largest device memory used so far")
    tensorboard_dir: Optional[str] = option(None, "directory of TensorBoard files")
    wandb_project: Optional[str] = option(None, "Weights & Biases project; turns W&B logging on")
    wandb_exp_name: Optional[str] = option(None, "Weights & Biases run name")
    wandb_save_dir: Optional[str] = option(None, "directory of Weights & Biases files")
    memory_log_interval: Optional[int] = option(
        None, "iterations between statistics of the memory layers (coverage, dead rows, scores); off by default"
    )
    nan_policy: str = option(
        "stop", "what happens on a NaN or Inf in loss or gradient, before the update", choices=("stop", "skip")
    )
    max_skipped_iterations: int = option(10, "with --nan-policy skip: stop after this many skipped in a row")

    profile: bool = option(False, "print where the time of some iterations goes, and mark them for nsys")
    use_pytorch_profiler: bool = option(False, "with --profile: write a torch.profiler trace to <save>/profile")
    profile_step_start: int = option(10, "first profiled iteration")
    profile_step_end: int = option(12, "iteration before which profiling ends")
    profile_ranks: str = option("0", "ranks to profile, separated by commas")
    distributed_timeout_minutes: float = option(10, "time limit of a collective in minutes, 0.5 for 30 seconds")
    dry_run: bool = option(False, "check the configuration, print it and exit")
    dry_run_world_size: Optional[int] = option(
        None, "with --dry-run: build ranks of this many without devices, network or data, and report what they hold"
    )
    dry_run_rank: Optional[str] = option(
        None, "with --dry-run: ranks to build, separated by commas (default: the first of every pipeline stage)"
    )
    debug: bool = option(False, "show the traceback of an error")
