"""Which checkpoint a run continues from, and whether it is the same run.

A resume from other data, another seed or another schedule gives a normal-looking loss and wrong results. So what
decides a run's numbers is compared with the checkpoint's own configuration, and a difference is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from umv2_megatron.checkpoint import saved_config
from umv2_megatron.checkpoint.manifest import Manifest
from umv2_megatron.checkpoint.store import TRACKER, CheckpointStore
from umv2_megatron.config.data_config import DATA_ORDERS
from umv2_megatron.config.option_table import option_table
from umv2_megatron.config.resolve import model_values
from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.config.training_config import TrainingConfig
from umv2_megatron.config.usage import UsageError
from umv2_megatron.data.phases import TRAINING_BLENDS
from umv2_megatron.durable_files import CheckpointError, sha256_of, unreadable
from umv2_megatron.user_paths import same_directory

# What a step computes from its samples; --allow-config-change lets it differ.
SAME_RUN = ("global_batch_size", "rampup_batch_size", "clip_grad", "eod_mask_loss", "reset_position_ids",
            "reset_attention_mask", "loss_start_token", "loss_stop_token", "loss_mask_key", "trainable")  # fmt: skip
# The schedule; --override-opt-param-scheduler takes the new values.
SAME_SCHEDULE = (
    "lr",
    "min_lr",
    "lr_decay_style",
    "lr_warmup_iters",
    "lr_warmup_samples",
    "lr_warmup_init",
    "lr_warmup_init_fraction",
    "lr_wsd_decay_style",
    "lr_wsd_decay_iters",
    "lr_wsd_decay_samples",
    "weight_decay",
    "weight_decay_incr_style",
    "start_weight_decay",
    "end_weight_decay",
    "decoupled_lr",
    "decoupled_min_lr",
    "adam_beta1",
    "adam_beta2",
    "adam_eps",
    "muon_momentum",
    "muon_use_nesterov",
    "muon_split_qkv",
    "muon_num_ns_steps",
    "muon_scale_mode",
    "muon_extra_scale_factor",
    "memory_value_lr_mult",
    "memory_value_lr_decay_iters",
    "memory_value_lr",
    "memory_value_weight_decay",
    "engram_value_lr_mult",
    "engram_value_lr_decay_iters",
    "engram_value_weight_decay",
)
# Of the data's identity, what decides the order of a corpus's samples: --allow-new-blend goes on in that order.
STREAMS = {
    "mock_data": "--mock-data",
    "split": "--split",
    "tokenizer": "the tokenizer",
    "seq_length": "--seq-length",
    "seed": "--seed",
    "data_order": "--data-order",
}


@dataclass(frozen=True)
class Source:
    """Where a run starts from: a checkpoint directory, the step asked for (None: the newest), and whether the run goes
    on from its own --save, so that --finetune, --no-load-optim and --no-load-rng have had their effect already."""

    directory: str
    ckpt_step: int | None
    continues: bool


def find_source(run: RunConfig, others: bool = False) -> Source | None:
    """What to load: --save once it holds a checkpoint, so that the same command always continues; else --load; None for
    a fresh start. An evaluation (--skip-train) takes --load first. others: the run has non-persistent checkpoints,
    which are as good as some in --save.

    Raises ``UsageError`` when --load holds no checkpoint and --allow-fresh is not given, when --finetune or --ckpt-step
    have nothing to load, and when a directory has lost its checkpoints.
    """
    return _find_source(run.training, others)


def _find_source(training: TrainingConfig, others: bool = False) -> Source | None:
    own = training.save if training.save and (_holds_checkpoints("save", training.save) or others) else None
    same = training.load is not None and own is not None and same_directory(training.load, own)
    if own and not (training.load and (training.skip_train or same)):
        return Source(own, None if training.load else training.ckpt_step, continues=True)
    if training.load is None:
        if training.finetune:
            raise UsageError("--finetune needs --load, the directory of the checkpoint to start from")
        if training.ckpt_step is not None:
            raise UsageError(
                f"--ckpt-step is {training.ckpt_step}, but there is no checkpoint to load; give --load, or a --save "
                "that holds checkpoints"
            )
        return None
    if _holds_checkpoints("load", training.load) or (same and others and not training.finetune):
        return Source(training.load, training.ckpt_step, continues=False)
    if not training.allow_fresh:
        raise UsageError(
            f"--load is {training.load!r}; no checkpoint is there. Correct the path, or give --allow-fresh "
            "to start from scratch"
        )
    return None


def _holds_checkpoints(flag: str, directory: str) -> bool:
    """Whether ``directory`` holds checkpoints. Raises ``UsageError`` when it did, and they are gone."""
    store = CheckpointStore(directory)
    try:
        if store.iterations():
            return True
        tracked = (store.root / TRACKER).exists()
    except OSError as error:
        raise CheckpointError(f"--{flag} is {directory}, which cannot be looked at: {error.strerror}") from error
    if tracked:
        raise UsageError(
            f"--{flag} is {directory!r}; its {TRACKER} names a checkpoint, but none is there; bring the iter_* "
            "directories back, or remove that file to start afresh"
        )
    return False


class ConfigStore(CheckpointStore):
    """A store of which only config.json is to be read: its hash is checked, the other files' names and sizes."""

    def verify(self, iteration: int, *, hashes: bool = True) -> Manifest:
        manifest = super().verify(iteration, hashes=False)
        path = self.path(iteration) / saved_config.CONFIG_FILE
        if hashes and saved_config.CONFIG_FILE in manifest.files:
            try:
                actual, expected = sha256_of(path), manifest.files[saved_config.CONFIG_FILE][1]
            except OSError as error:
                raise unreadable(path, error) from error
            if actual != expected:
                raise CheckpointError(f"{path} has SHA-256 {actual}: the manifest says {expected}")
        return manifest


def checkpoint_values(training: TrainingConfig) -> tuple[str, dict[str, Any]] | None:
    """Directory and settings by key of the checkpoint that ``training`` loads; None where it starts afresh.

    Every rank asks before there is a process group, so nothing but config.json is hashed: the rest is verified by the
    load. Raises ``UsageError`` as ``find_source`` does, ``CheckpointError`` for a damaged checkpoint.
    """
    source = _find_source(training)
    if source is None:
        return None
    return source.directory, saved_settings(source)["values"]


def saved_settings(source: Source) -> dict[str, Any]:
    """config.json of the checkpoint that is loaded from ``source``; its hash was compared."""
    store = ConfigStore(source.directory)
    return saved_config.read_config(store, store.resolve(source.ckpt_step))


def check_vocabulary(source: Source, vocab_size: int, config: dict[str, Any] | None = None) -> None:
    """Raise ``UsageError`` where the checkpoint's vocabulary is not one of ``vocab_size`` tokens, as this run's is.

    config: its config.json, where it is not that of ``saved_settings``.
    Rows that only pad a vocabulary may differ; the tokens' own would be lost, or be new and untrained.
    """
    old = (config or saved_settings(source)).get("tokenizer_vocab_size", vocab_size)
    if old != vocab_size:
        raise UsageError(
            f"the checkpoint in {source.directory} has a vocabulary of {old} tokens, this run's tokenizer one of "
            f"{vocab_size}; give the tokenizer that it was trained with, or --vocab-size {old} ({old - 1} with "
            "--tokenizer-type NullTokenizer)"
        )


def check_same_run(
    run: RunConfig, source: Source, data_identity: dict[str, Any], config: dict[str, Any] | None = None
) -> None:
    """Raise ``UsageError`` naming what differs, old and new, where ``run`` is not the checkpoint's run.

    ``data_identity`` is that of the data that ``run`` would read (``datasets.data_identity``). config: the checkpoint's
    config.json, where it is not that of ``saved_settings``.
    """
    config = config or saved_settings(source)
    saved, data = config["values"], config.get("data", {})
    new_blend = is_new_blend(data, data_identity)
    if run.training.allow_new_blend:
        _check_streams(recorded(data), data_identity)
    _check_schedule(run, saved, source)
    if not run.training.allow_config_change:
        _compare(run, saved, (*SAME_RUN, *_model_keys(run, saved)), "--allow-config-change to go on regardless")
        if new_blend and not run.training.allow_new_blend:
            raise UsageError(_told_new_blend(run, saved, data, data_identity))
        _check_marks(run, data.get("marks") or {}, data_identity.get("marks") or {})
        for name, old in recorded(data).items():
            new = data_identity.get(name)
            if name == "marks":
                continue
            if name == "training_samples":
                # once the blend has changed, samples are numbered in their corpora: nothing depends on how many follow
                if not (new_blend or len(data.get("training_blends", ())) > 1):
                    _check_samples(old, new)
            elif name in data_identity and _but_for_training(name, old) != _but_for_training(name, new):
                raise UsageError(
                    f"{STREAMS.get(name, name)} is {_short(new)}, but the checkpoint was trained with {_short(old)}; "
                    f"give the old {'data' if name == 'corpora' else 'value'}, or --allow-config-change to go on "
                    "regardless"
                )


def recorded(data: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's data identity, with the values of its run for entries that its version did not write yet."""
    if not data:
        return {}
    return {**data, "data_order": data.get("data_order") or DATA_ORDERS[0], "infilling": data.get("infilling")}


def is_new_blend(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether two data identities, the first from a checkpoint, have another training blend: other corpora, another
    order of them, or other weights as given."""
    return "corpora" in old and _training_corpora(old) != _training_corpora(new)


def _training_corpora(data: dict[str, Any]) -> dict[str, Any]:
    """Weights as given and fingerprints, by the flag's key; nothing for --mock-data."""
    corpora = data.get("corpora", {})
    return {key: corpora[key] for key in TRAINING_BLENDS if key in corpora}


def _but_for_training(name: str, value: Any) -> Any:
    """An entry of a data identity without the training set, which is compared by itself."""
    return {key: each for key, each in value.items() if key not in TRAINING_BLENDS} if name == "corpora" else value


def _check_streams(old: dict[str, Any], new: dict[str, Any]) -> None:
    before, now = (next(iter(_training_corpora(each)), None) for each in (old, new))
    if before != now:
        raise UsageError(
            f"--allow-new-blend needs the new blend in the flag that the old one had: it is in {_flag(now)}, the "
            f"checkpoint's was in {_flag(before)}"
        )
    for name, flag in STREAMS.items():
        if name in old and old[name] != new[name]:
            raise UsageError(
                f"--allow-new-blend goes on in each corpus where it stood, so {flag} has to be as it was; it is "
                f"{_short(new[name])}, the checkpoint's is {_short(old[name])}"
            )


def _told_new_blend(run: RunConfig, saved: dict[str, Any], old: dict[str, Any], new: dict[str, Any]) -> str:
    before, now = (next(iter(_training_corpora(each)), "mock_data") for each in (old, new))
    told = " ".join(map(str, run.values[now])) if now != "mock_data" else "on"
    was = " ".join(map(str, saved.get(before) or ())) if before != "mock_data" else "on"
    differ = "" if (now, told) != (before, was) else ", whose files have changed since"
    stream = "" if "mock_data" in (before, now) else "--allow-new-blend to go on in each corpus where it stood, "
    return (
        f"{_flag(now)} is {_short(told)}, but the checkpoint was trained with {_flag(before)} {_short(was)}{differ}; "
        f"give the old data, {stream}or --allow-config-change to read the new data from the run's place in its order"
    )


def _check_marks(run: RunConfig, old: dict[str, str], new: dict[str, str]) -> None:
    """Compare the marks of corpora that both have: those of a new blend come with their marks."""
    if any(old[corpus] != new[corpus] for corpus in old.keys() & new.keys()):
        raise UsageError(
            f"--loss-mask-key is {run.data.loss_mask_key}, but the marks of that key have changed since the "
            "checkpoint; give the old ones, or --allow-config-change to go on with these"
        )


def _check_samples(old: int, new: int | None) -> None:
    if new is not None and old != new:
        raise UsageError(
            f"the run has {new} samples (--train-samples, or --train-iters x --global-batch-size), but the "
            f"checkpoint's has {old}, in another order; give the old length, or --allow-config-change to go on "
            "regardless"
        )


def _check_schedule(run: RunConfig, saved: dict[str, Any], source: Source) -> None:
    training = run.training
    fresh_optimizer = training.no_load_optim and not source.continues
    old, new = saved.get("optimizer", "adam"), run.optimizer
    if (old == "adam") is not (new == "adam") and not (fresh_optimizer or training.skip_train):
        raise UsageError(
            f"--optimizer is {new}, but the checkpoint was trained with {old}; give the old value, or --load it with "
            "--no-load-optim and another --save to go on from its weights"
        )
    if not (training.override_opt_param_scheduler or fresh_optimizer or training.skip_train):
        one_has_none = run.ngrams is None or saved.get("engram_layer_freq") is None  # which is compared with the model
        keys = [key for key in SAME_SCHEDULE if not (one_has_none and key.startswith("engram_"))]
        _compare(run, saved, keys, "--override-opt-param-scheduler to take the new value")
        old, new = _horizon(saved), _horizon(run.values)
        if old != new:
            raise UsageError(
                f"the checkpoint's schedule decays over {old[0]} {old[1]}, the flags say {new[0]} {new[1]} "
                f"(--lr-decay-{_FLAG[new[1]]}, or --train-{_FLAG[new[1]]} without it); give --lr-decay-{_FLAG[old[1]]} "
                f"{old[0]} to keep it, or --override-opt-param-scheduler to take the new one"
            )
        old, new = _length(saved), _length(run.values)
        if saved.get("weight_decay_incr_style", "constant") != "constant" and old != new:
            raise UsageError(
                f"the checkpoint's weight decay grows over {old[0]} {old[1]}, the flags say {new[0]} {new[1]} "
                f"(--train-{_FLAG[new[1]]}); give --train-{_FLAG[old[1]]} {old[0]} to keep it, or "
                "--override-opt-param-scheduler to take the new one"
            )


def _model_keys(run: RunConfig, saved: dict[str, Any]) -> tuple[str, ...]:
    """Settings of the model itself: many (top-k, the base of the rotary embedding) show in no tensor's shape."""
    differ_by_right = {
        "make_vocab_size_divisible_by", "init_method_std", "memory_init", "memory_norm_gain_exponent",
        "vocab_size",  # check_vocabulary compares what the tokenizers make of it
    }  # fmt: skip
    both = model_values({**run.values, **saved})
    return tuple(key for key in both if key not in differ_by_right and key not in SAME_SCHEDULE)


def _compare(run: RunConfig, saved: dict[str, Any], keys: Sequence[str], remedy: str) -> None:
    table = option_table()
    for key in keys:
        if key not in saved and key not in run.sources:
            continue  # nobody gave it
        # a version that had no such setting trained as its default says
        old, new = saved.get(key, table[key].default), run.values[key]
        if old != new:
            raise UsageError(
                f"--{key.replace('_', '-')} is {new}, but the checkpoint was trained with {old}; give the "
                f"old value, or {remedy}"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 300 else text[:297] + "..."


def _flag(key: str | None) -> str:
    return f"--{str(key or 'mock_data').replace('_', '-')}"


_FLAG = {"iterations": "iters", "samples": "samples"}


def _horizon(values: dict[str, Any]) -> tuple[Any, str]:
    """How long the learning rate decays, and in what."""
    if values.get("lr_decay_samples"):
        return values["lr_decay_samples"], "samples"
    iterations = values["lr_decay_iters"] or values["train_iters"]
    return (iterations, "iterations") if iterations else (values["train_samples"], "samples")


def _length(values: dict[str, Any]) -> tuple[Any, str]:
    """How long the run is, and in what."""
    return (values["train_iters"], "iterations") if values["train_iters"] else (values["train_samples"], "samples")
