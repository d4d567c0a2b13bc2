"""How a run goes: batches, the schedule, where things go, evaluation and what is logged.

Every field is a flag: ``train_iters`` is ``--train-iters``. The names are Megatron-LM's wherever Megatron-LM has the
option; what megatron-core's own dataclasses already define is not repeated here (see ``flags.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from umv2_megatron.config.option import option


@dataclass
class TrainingConfig:
    """Batches, schedule, checkpoints, evaluation and logging of a training run. Iterations and samples are counts."""

    micro_batch_size: int = option(
        1, "samples per rank and forward pass", at_least=1, read_by="data/batches.py: samples of a forward pass"
    )
    global_batch_size: Optional[int] = option(
        None, "samples per optimizer step over all ranks (default: micro batch x data-parallel size)", at_least=1
    )
    rampup_batch_size: Optional[list[int]] = option(
        None,
        "three numbers: batch of the first steps, its increment, and samples after which it is --global-batch-size",
        at_least=1,
    )
    train_iters: Optional[int] = option(None, "optimizer steps of the whole run", at_least=1)
    train_samples: Optional[int] = option(None, "samples of the whole run, instead of --train-iters", at_least=1)
    trainable: str = option(
        "all",
        "parameters that learn: all, those of memory layers alone (tables, and what else the layers have), or some "
        "rows of their tables alone (--trainable-rows)",
        choices=("all", "memory", "rows"),
    )
    trainable_rows: Optional[str] = option(
        None,
        "file of tools/select_rows.py with the rows that learn",
        needs=("trainable=rows",),
        read_by="training/table_optimizer.py: the rows that learn",
    )
    seed: int = option(1234, "seed of initialisation, dropout and data order", at_least=0, at_most=2**31 - 1)
    empty_unused_memory_level: int = option(
        0,
        "give back memory of the device that torch keeps unused: 1: after the backward, 2: after the update, too",
        choices=(0, 1, 2),
        read_by="training/step.py: torch.cuda.empty_cache; nothing on a CPU",
    )
    exit_interval: Optional[int] = option(None, "save and exit after an iteration divisible by this", at_least=1)
    exit_duration_in_mins: Optional[int] = option(
        None, "save and exit after this many minutes", at_least=1, read_by="training/loop.py: when the run ends"
    )
    exit_signal_handler: bool = option(
        True, "save and exit with code 0 on SIGTERM or SIGUSR1", read_by="training/loop.py: what a signal does"
    )

    lr_decay_style: str = option(
        "cosine",
        "shape of the learning rate's decay",
        choices=("constant", "linear", "cosine", "inverse-square-root", "WSD"),
    )
    lr_decay_iters: Optional[int] = option(
        None, "iterations until --min-lr is reached (default: --train-iters)", at_least=1
    )
    lr_decay_samples: Optional[int] = option(
        None, "the same in samples, with --train-samples", at_least=1, needs=("train_samples",)
    )
    lr_warmup_iters: int = option(0, "iterations of linear warm-up", at_least=0)
    lr_warmup_samples: Optional[int] = option(
        None, "samples of linear warm-up, with --train-samples", at_least=0, needs=("train_samples",)
    )
    lr_warmup_fraction: Optional[float] = option(
        None, "warm-up as a fraction of the decay iterations", at_least=0, below=1
    )
    lr_warmup_init: float = option(0.0, "learning rate at the start of the warm-up", at_least=0)
    lr_warmup_init_fraction: Optional[float] = option(
        None, "start the warm-up at this fraction of the peak instead (the released code: 0.1)", at_least=0, at_most=1
    )
    lr_wsd_decay_style: str = option(
        "cosine", "shape of WSD's last part", choices=("linear", "cosine", "exponential", "minus_sqrt")
    )
    lr_wsd_decay_iters: Optional[int] = option(None, "iterations of WSD's last part", at_least=1)
    lr_wsd_decay_samples: Optional[int] = option(
        None, "samples of WSD's last part, with --train-samples", at_least=1, needs=("train_samples",)
    )
    weight_decay_incr_style: str = option(
        "constant",
        "how weight decay goes from --start-weight-decay to --end-weight-decay over the run; constant: --weight-decay",
        choices=("constant", "linear", "cosine"),
    )
    start_weight_decay: Optional[float] = option(
        None, "weight decay of the first step", at_least=0, needs=("weight_decay_incr_style!=constant",)
    )
    end_weight_decay: Optional[float] = option(
        None, "weight decay of the last step", at_least=0, needs=("weight_decay_incr_style!=constant",)
    )
    override_opt_param_scheduler: bool = option(
        False,
        "take the schedule from the flags even where the checkpoint has another one",
        read_by="training/resume.py: whose schedule a resumed run has",
    )

    save: Optional[str] = option(
        None,
        "directory, or URL of fsspec (s3://...), for checkpoints, metrics.jsonl and config.yaml",
        read_by="training/loop.py: where checkpoints go",
    )
    load: Optional[str] = option(
        None,
        "directory or URL to resume from (default: --save once it holds a checkpoint)",
        read_by="training/resume.py: where a run begins",
    )
    save_interval: Optional[int] = option(
        None,
        "iterations between checkpoints (always one at the end)",
        at_least=1,
        read_by="training/loop.py: when checkpoints are written",
    )
    non_persistent_save_interval: Optional[int] = option(
        None,
        "iterations between non-persistent checkpoints, in between those of --save-interval; a start goes on from the "
        "newest of both",
        at_least=1,
        needs=("save", "save_interval"),
        read_by="training/loop.py: when non-persistent checkpoints are written",
    )
    non_persistent_ckpt_type: Optional[str] = option(
        None,
        "where non-persistent checkpoints go: local, each rank's own to the disk of its node, or global, to one "
        "directory (default: local, where only the global directory is given global)",
        choices=("global", "local"),
        needs=("non_persistent_save_interval",),
        read_by="config/run_config.py: where non-persistent checkpoints go",
    )
    non_persistent_local_ckpt_dir: Optional[str] = option(
        None,
        "directory on every node's own disk for local non-persistent checkpoints",
        needs=("non_persistent_save_interval",),
        read_by="training/non_persistent.py: where non-persistent checkpoints go",
    )
    non_persistent_global_ckpt_dir: Optional[str] = option(
        None,
        "directory for global non-persistent checkpoints (default: <save>/non_persistent)",
        needs=("non_persistent_save_interval",),
        read_by="training/non_persistent.py: where non-persistent checkpoints go",
    )
    non_persistent_local_ckpt_algo: str = option(
        "atomic",
        "what a rank writes of a local non-persistent checkpoint: atomic, all that it holds",
        choices=("atomic", "fully_parallel"),
        needs=("non_persistent_save_interval",),
        read_by="config/schedule_checks.py: refused but for atomic",
    )
    async_save: bool = option(
        False,
        "go on training while other processes write the checkpoint of --save-interval; needs its bytes in main memory",
        needs=("save",),
        read_by="training/pretrain.py: whether training waits for a checkpoint",
    )
    save_retain_interval: Optional[int] = option(
        None,
        "keep for good the checkpoints of multiples of this",
        at_least=1,
        needs=("save",),
        read_by="training/pretrain.py: which checkpoints stay",
    )
    ckpt_format: str = option("torch_dist", "checkpoint format", choices=("torch_dist",))
    ckpt_step: Optional[int] = option(
        None,
        "load this iteration instead of the newest",
        at_least=0,
        read_by="training/resume.py: which checkpoint is loaded",
    )
    verify_checkpoint: str = option(
        "read",
        "what is compared with its checksum at a load: what is read, or all files, shared out over the ranks",
        choices=("read", "full"),
        read_by="training/load_state.py: how a checkpoint is verified",
    )
    finetune: bool = option(
        False, "load weights only and start at iteration 0", read_by="training/resume.py: what is loaded"
    )
    no_load_optim: bool = option(
        False, "do not load the optimizer's state", read_by="training/pretrain.py: what is loaded"
    )
    no_load_rng: bool = option(
        False, "do not load the random-number states", read_by="training/pretrain.py: what is loaded"
    )
    use_checkpoint_args: bool = option(
        False,
        "take the model's and the memory's sizes from the checkpoint",
        read_by="config/resolve.py: whose sizes the model has",
    )
    allow_fresh: bool = option(
        False,
        "start from scratch when --load holds no checkpoint",
        read_by="training/resume.py: whether --load may be empty",
    )
    allow_config_change: bool = option(
        False,
        "resume although data, seed, batch or sizes differ from the checkpoint's",
        read_by="training/resume.py: what may differ from the checkpoint",
    )
    allow_new_blend: bool = option(
        False,
        "resume with another --data-path or --train-data-path than the checkpoint's: each corpus goes on where it "
        "stood",
        read_by="training/resume.py: what may differ from the checkpoint",
    )

    eval_interval: Optional[int] = option(
        1000,
        "iterations between evaluations (always one at the end)",
        at_least=1,
        read_by="training/loop.py: when the run evaluates",
    )
    eval_iters: int = option(
        100,
        "global batches per evaluation, always the first ones",
        at_least=0,
        read_by="training/evaluation_sets.py: batches of an evaluation",
    )
    full_validation: bool = option(
        False,
        "evaluate on every token of the validation and test sets, once, instead of on --eval-iters batches",
        read_by="training/evaluation_sets.py: what is evaluated on",
    )
    eval_tasks: Optional[list[str]] = option(
        None,
        "tasks, groups or tags of lm-eval to score the model on while it is trained (requirements-lm-eval.txt)",
        read_by="training/loop.py: when tasks are scored",
    )
    eval_tasks_path: Optional[list[str]] = option(
        None,
        "directories with tasks of lm-eval as YAML files, beside its own",
        needs=("eval_tasks",),
        read_by="evaluation/lm_eval_tasks.py: where tasks are",
    )
    eval_tasks_interval: Optional[int] = option(
        None,
        "iterations between evaluations on --eval-tasks (default: --eval-interval; always one at the end)",
        at_least=1,
        needs=("eval_tasks",),
        read_by="training/loop.py: when tasks are scored",
    )
    eval_tasks_limit: Optional[int] = option(
        None,
        "documents of each task, the first ones (default: all)",
        at_least=1,
        needs=("eval_tasks",),
        read_by="evaluation/lm_eval_tasks.py: how many documents are scored",
    )
    skip_train: bool = option(False, "only evaluate")

    log_interval: int = option(
        100, "iterations between log lines", at_least=1, read_by="training/loop.py: when lines are written"
    )
    log_throughput: bool = option(
        True, "put TFLOP/s per GPU into the log line", read_by="training/loop.py: the log line"
    )
    log_params_norm: bool = option(
        False, "put the norm of the parameters into the log line", read_by="training/loop.py: the log line"
    )
    log_memory_to_tensorboard: bool = option(
        False, "record the largest device memory used so far", read_by="training/loop.py: the metrics"
    )
    tensorboard_dir: Optional[str] = option(
        None, "directory of TensorBoard files", read_by="training/reporting.py: where metrics go"
    )
    wandb_project: Optional[str] = option(
        None, "Weights & Biases project; turns W&B logging on", read_by="training/reporting.py: where metrics go"
    )
    wandb_exp_name: Optional[str] = option(
        None, "Weights & Biases run name", needs=("wandb_project",), read_by="training/wandb_run.py: where metrics go"
    )
    wandb_entity: Optional[str] = option(
        None,
        "Weights & Biases user or team that owns the project; by default the variable WANDB_ENTITY, else yours",
        needs=("wandb_project",),
        read_by="training/wandb_run.py: where metrics go",
    )
    wandb_save_dir: Optional[str] = option(
        None,
        "directory of Weights & Biases files",
        needs=("wandb_project",),
        read_by="training/wandb_run.py: where metrics go",
    )
    memory_log_interval: Optional[int] = option(
        None,
        "iterations between statistics of the memory layers (coverage, dead rows, scores); off by default",
        at_least=1,
        read_by="training/loop.py: the metrics",
    )
    nan_policy: str = option(
        "stop",
        "what happens on a NaN or Inf in loss or gradient, before the update",
        choices=("stop", "skip"),
        read_by="training/step_policies.py: a loss or gradient that is not finite",
    )
    max_skipped_iterations: int = option(
        10,
        "with --nan-policy skip, or --spike-policy skip or rewind: stop after this many skipped in a row",
        at_least=0,
        read_by="training/step_policies.py: a step that is left out",
    )
    spike_policy: str = option(
        "off",
        "what happens on a spike of loss or gradient norm, before the update: a warning, the step is left out, or the "
        "run goes back to its last checkpoint and leaves out the samples since",
        choices=("off", "warn", "skip", "rewind"),
        read_by="training/step_policies.py: a loss or gradient norm that jumps",
    )
    spike_window: int = option(
        100,
        "updates whose losses and gradient norms a step is compared with; nothing is judged before there are as many",
        at_least=2,
        needs=("spike_policy!=off",),
        read_by="training/spikes.py: what is a spike",
    )
    spike_loss_threshold: float = option(
        6.0,
        "a spike is a loss above the window's median by this many standard deviations (1.4826 times the median "
        "absolute deviation); 0: losses are not looked at",
        at_least=0,
        needs=("spike_policy!=off",),
        read_by="training/spikes.py: what is a spike",
    )
    spike_grad_norm_factor: float = option(
        10.0,
        "a spike is a gradient norm above this many times the window's median; 0: norms are not looked at",
        at_least=0,
        needs=("spike_policy!=off",),
        read_by="training/spikes.py: what is a spike",
    )
    max_rewinds: int = option(
        3,
        "with --spike-policy rewind: stop when the run would go back to the same checkpoint more often than this",
        at_least=0,
        needs=("spike_policy=rewind",),
        read_by="training/step_policies.py: a loss or gradient norm that jumps",
    )
    iterations_to_skip: Optional[list[int]] = option(
        None,
        "iterations, as the log numbers them, whose samples are read and left out",
        at_least=1,
    )

    manual_gc: bool = option(
        False,
        "Python's garbage collector runs when --manual-gc-interval says so, on all ranks after the same step",
        read_by="training/loop.py: when garbage is collected",
    )
    manual_gc_interval: int = option(
        0,
        "iterations between collections; 0 is never",
        at_least=0,
        needs=("manual_gc",),
        read_by="training/loop.py: when garbage is collected",
    )
    manual_gc_eval: bool = option(
        True,
        "collect also before and after every evaluation",
        flags=("disable-manual-gc-eval",),
        needs=("manual_gc",),
        read_by="training/loop.py: when garbage is collected",
    )
    check_replicas_interval: Optional[int] = option(
        None,
        "iterations between comparisons of the parameters over the ranks that hold copies; off by default",
        at_least=1,
        flags=("check-weight-hash-across-dp-replicas-interval",),
        read_by="training/loop.py: replicas that differ",
    )
    log_straggler: bool = option(
        False,
        "with every log line, which ranks took longest for their own part of the steps",
        read_by="training/stragglers.py: the log and the metrics",
    )
    straggler_minmax_count: int = option(
        1,
        "how many of the slowest and of the fastest ranks are named",
        at_least=1,
        needs=("log_straggler",),
        read_by="training/stragglers.py: the log",
    )

    profile: bool = option(
        False,
        "print where the time of some iterations goes, and mark them for nsys",
        read_by="training/profiling.py: what is measured",
    )
    use_pytorch_profiler: bool = option(
        False,
        "with --profile: write a torch.profiler trace to <save>/profile",
        needs=("profile",),
        read_by="training/profiling.py: what is measured",
    )
    profile_step_start: int = option(
        10, "first profiled iteration", needs=("profile",), read_by="training/profiling.py: what is measured"
    )
    profile_step_end: int = option(
        12,
        "iteration before which profiling ends",
        needs=("profile",),
        read_by="training/profiling.py: what is measured",
    )
    profile_ranks: str = option(
        "0",
        "ranks to profile, separated by commas",
        needs=("profile",),
        read_by="training/profiling.py: what is measured",
    )
    distributed_timeout_minutes: float = option(
        10,
        "time limit of a collective in minutes, 0.5 for 30 seconds",
        above=0,
        read_by="training/initialize.py: how long ranks wait",
    )
    dry_run: bool = option(
        False, "check the configuration, print it and exit", read_by="commands/pretrain.py: whether a run begins"
    )
    dry_run_world_size: Optional[int] = option(
        None,
        "with --dry-run: build ranks of this many without devices, network or data, and report what they hold",
        at_least=1,
        read_by="training/dry_run.py: ranks that are built",
    )
    dry_run_rank: Optional[str] = option(
        None,
        "with --dry-run: ranks to build, separated by commas (default: the first of every pipeline stage)",
        read_by="training/dry_run.py: ranks that are built",
    )
    debug: bool = option(False, "show the traceback of an error", read_by="training/program.py: what an error prints")
