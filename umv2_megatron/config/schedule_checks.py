"""What the settings of schedule and optimizer must satisfy; called by ``checks.py``."""

from __future__ import annotations

from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.config.text_numbers import whole_numbers
from umv2_megatron.config.usage import UsageError, refuse
from umv2_megatron.user_paths import is_url


def check_schedule(run: RunConfig) -> None:
    training = run.training
    _check_counts(run)
    if not training.skip_train and bool(training.train_iters) == bool(training.train_samples):
        raise UsageError("--train-iters or --train-samples is needed, and only one of them")
    unit = training.micro_batch_size * run.data_parallel_size
    if run.global_batch_size < unit or run.global_batch_size % unit:
        refuse(
            "global-batch-size",
            run.global_batch_size,
            f"a multiple of --micro-batch-size x data-parallel size = {training.micro_batch_size} x "
            f"{run.data_parallel_size} = {unit}",
        )
    _check_rampup(run, unit)
    if run.virtual_pipeline_size:
        _check_interleaving(run)
    _check_learning_rates(run)
    if training.save_interval and not training.save:
        refuse("save-interval", training.save_interval, "--save with a directory too")
    _check_non_persistent(run)
    if run.data.has_split_paths and run.data.valid_data_path is None and training.eval_iters:
        raise UsageError("--valid-data-path is missing beside --train-data-path; give it, or --eval-iters 0")
    _check_policies(run)
    start, end = training.profile_step_start, training.profile_step_end
    if training.profile and not 1 <= start < end:
        refuse("profile-step-end", end, f"an iteration after --profile-step-start ({start}), which is 1 or more")
    if whole_numbers(training.profile_ranks) is None:
        refuse("profile-ranks", repr(training.profile_ranks), "ranks separated by commas, such as 0,1")


def _check_non_persistent(run: RunConfig) -> None:
    training, kind = run.training, run.non_persistent_type
    if training.non_persistent_save_interval is None:
        return
    if training.save_interval and training.non_persistent_save_interval >= training.save_interval:
        expected = f"fewer iterations than --save-interval ({training.save_interval}), as it saves in between"
        refuse("non-persistent-save-interval", training.non_persistent_save_interval, expected)
    if kind == "local" and training.non_persistent_local_ckpt_dir is None:
        expected = (
            "--non-persistent-local-ckpt-dir too, a directory on every node's own disk, or --non-persistent-ckpt-type "
            "global"
        )
        refuse("non-persistent-save-interval", training.non_persistent_save_interval, expected)
    if is_url(training.non_persistent_local_ckpt_dir or ""):
        expected = "a directory on every node's own disk; --non-persistent-ckpt-type global takes a URL"
        refuse("non-persistent-local-ckpt-dir", training.non_persistent_local_ckpt_dir, expected)
    other = "global" if kind == "local" else "local"
    if given := run.values[f"non_persistent_{other}_ckpt_dir"]:
        refuse(f"non-persistent-{other}-ckpt-dir", given, f"no value with non-persistent checkpoints of type {kind}")
    if training.non_persistent_local_ckpt_algo != "atomic":
        expected = "atomic: every rank writes all that it holds, so that none needs a file of another at a load"
        refuse("non-persistent-local-ckpt-algo", training.non_persistent_local_ckpt_algo, expected)


def _check_policies(run: RunConfig) -> None:
    """What the settings of steps that are left out need of each other."""
    training = run.training
    skips = training.nan_policy == "skip" or training.spike_policy in ("skip", "rewind")
    if training.max_skipped_iterations != 10 and not skips:
        expected = "no value without --nan-policy skip, --spike-policy skip or --spike-policy rewind"
        refuse("max-skipped-iterations", training.max_skipped_iterations, expected)
    if training.spike_policy == "rewind" and not training.save_interval:
        refuse("spike-policy", "rewind", "--save and --save-interval too, for checkpoints to go back to")
    if training.spike_policy != "off" and training.spike_loss_threshold == training.spike_grad_norm_factor == 0:
        expected = "off, or --spike-loss-threshold or --spike-grad-norm-factor above 0"
        refuse("spike-policy", training.spike_policy, expected)
    if 0 < training.spike_grad_norm_factor <= 1:
        refuse("spike-grad-norm-factor", training.spike_grad_norm_factor, "0, or a number above 1")


def _check_rampup(run: RunConfig, unit: int) -> None:
    """Three numbers that lead from the first batch to the last, each one that ``unit`` samples divide."""
    given = run.training.rampup_batch_size
    if given is None:
        return
    shown, full = " ".join(map(str, given)), run.global_batch_size
    if len(given) != 3:
        refuse("rampup-batch-size", shown, "three numbers: first batch, increment, samples")
    start, increment, _ = given
    if start >= full or (full - start) % increment:
        expected = f"a first batch below --global-batch-size ({full}), and an increment that divides their difference"
        refuse("rampup-batch-size", shown, expected)
    if start % unit or increment % unit:
        expected = f"first batch and increment to be multiples of --micro-batch-size x data-parallel size = {unit}"
        refuse("rampup-batch-size", shown, expected)


def _check_interleaving(run: RunConfig) -> None:
    """What mcore's interleaved schedule asks of the number of micro-batches; else it ends the run in the first step."""
    stages = run.pipeline_model_parallel_size
    group = run.microbatch_group_size_per_vp_stage or stages
    if group < stages:
        refuse("microbatch-group-size-per-vp-stage", group, f"at least --pipeline-model-parallel-size ({stages})")
    for size in run.rampup.sizes():
        batches = run.microbatches_of(size)
        if batches < group or 0 < batches % group < stages:
            refuse(
                "global-batch-size" if size == run.global_batch_size else "rampup-batch-size",
                size,
                f"a multiple of {group} micro-batches on each data-parallel rank with "
                f"--num-layers-per-virtual-pipeline-stage, not {batches}",
            )


def _check_counts(run: RunConfig) -> None:
    if run.training.train_samples and run.training.train_samples < run.global_batch_size:
        refuse("train-samples", run.training.train_samples, f"at least --global-batch-size ({run.global_batch_size})")


def _check_learning_rates(run: RunConfig) -> None:
    """Raise ``UsageError`` for rates out of range, a warm-up or decay longer than the run, and flags that exclude each
    other. A file may hold both of such a pair: a saved config.yaml has a fraction and the value made of it."""
    training = run.training
    if run.lr is None or run.min_lr > run.lr:
        refuse("lr", run.lr, f"a number above 0 and at least --min-lr ({run.min_lr})")
    for value, fraction in (("lr_warmup_iters", "lr_warmup_fraction"), ("lr_warmup_init", "lr_warmup_init_fraction")):
        if run.sources.get(value) == run.sources.get(fraction) == "flag" and run.values[fraction] is not None:
            other = value.replace("_", "-")
            refuse(fraction.replace("_", "-"), run.values[fraction], f"it or --{other}, not both")
    if training.lr_warmup_init > run.lr:
        refuse("lr-warmup-init", training.lr_warmup_init, f"a number from 0 to --lr ({run.lr})")
    _check_decoupled(run)
    for name in ("lr_decay", "lr_warmup", "lr_wsd_decay"):
        samples, iters = f"{name}_samples", f"{name}_iters"
        if run.values[samples] is not None and run.sources.get(iters) == "flag":
            refuse(samples.replace("_", "-"), run.values[samples], f"it or --{iters.replace('_', '-')}, not both")
    if training.lr_warmup_samples is not None and run.sources.get("lr_warmup_fraction") == "flag":
        refuse("lr-warmup-samples", training.lr_warmup_samples, "it or --lr-warmup-fraction, not both")
    _check_weight_decay(run)
    schedule, batch, unit = run.schedule, run.global_batch_size, "iters"
    horizon = schedule.decay // batch
    if not training.skip_train and schedule.warmup >= max(schedule.decay, 1):
        if training.lr_warmup_samples is not None:
            unit, batch, horizon = "samples", 1, schedule.decay
        expected = f"fewer than the {horizon} {'iterations' if unit == 'iters' else unit} of the decay"
        refuse(f"lr-warmup-{unit}", schedule.warmup // batch, expected)
    given = training.lr_wsd_decay_samples or training.lr_wsd_decay_iters
    flag = "lr-wsd-decay-samples" if training.lr_wsd_decay_samples else "lr-wsd-decay-iters"
    if training.lr_decay_style == "WSD":
        if not given:
            refuse(flag, None, "a number of iterations with --lr-decay-style WSD")
        elif schedule.last_part > schedule.decay and not training.skip_train:
            ours = f"{schedule.decay} samples" if training.lr_wsd_decay_samples else f"{horizon} iterations"
            refuse(flag, given, f"at most the {ours} of the decay")
    elif given and run.sources.get(flag.replace("-", "_")) == "flag":
        refuse(flag, given, f"no value with --lr-decay-style {training.lr_decay_style}, only WSD's")


def _check_weight_decay(run: RunConfig) -> None:
    """Both ends where weight decay changes."""
    training = run.training
    if training.weight_decay_incr_style == "constant":
        return
    start, end = training.start_weight_decay, training.end_weight_decay
    if start is None or end is None:
        missing = "start-weight-decay" if start is None else "end-weight-decay"
        refuse(missing, None, f"a number with --weight-decay-incr-style {training.weight_decay_incr_style}")
    elif end < start:
        refuse("end-weight-decay", end, f"at least --start-weight-decay ({start}): megatron-core only lets it grow")
    if run.sources.get("weight_decay") == "flag":
        style = training.weight_decay_incr_style
        refuse("weight-decay", run.weight_decay, f"no value with --weight-decay-incr-style {style}")


def _check_decoupled(run: RunConfig) -> None:
    """The rate of embedding and output layer, where it is one of its own."""
    rate, floor = run.decoupled_lr, run.decoupled_min_lr
    if rate is None:
        return
    if floor is not None and floor > rate:
        refuse("decoupled-min-lr", floor, f"a number from 0 to --decoupled-lr ({rate})")
    if floor is None and run.min_lr > rate and run.training.lr_decay_style != "constant":
        # the floor is that of the other rate, towards which this one would rise
        refuse("decoupled-lr", rate, f"at least --min-lr ({run.min_lr}), or --decoupled-min-lr too")
