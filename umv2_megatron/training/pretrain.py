"""A pretraining run from a resolved configuration to its last checkpoint.

    processes -> lock on --save -> tokenizer -> model, optimizer -> resume -> datasets -> Trainer -> exit code

Exit codes: 0 done, or saved and stopped on request; 1 training or a checkpoint failed; 2 usage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
import yaml

from umv2_megatron import __version__
from umv2_megatron.checkpoint import save_load, saved_config
from umv2_megatron.checkpoint.agreement import attempt
from umv2_megatron.checkpoint.background import BackgroundSaves
from umv2_megatron.checkpoint.save_load import Candidate
from umv2_megatron.checkpoint.store import CheckpointStore
from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.config.usage import TrainingStopped, UsageError
from umv2_megatron.data.batches import batch_iterator
from umv2_megatron.data.canonical_ids import canonical_ids
from umv2_megatron.data.datasets import build_datasets, data_identity
from umv2_megatron.data.tokenizers import tokenizer_of
from umv2_megatron.durable_files import replace_synced
from umv2_megatron.memory.row_counts import RowSelection
from umv2_megatron.model.builder import unwrap
from umv2_megatron.model.token_contexts import set_canonical_ids
from umv2_megatron.observation.device import device_name
from umv2_megatron.observation.events import EventLog
from umv2_megatron.observation.exporter import Exporter
from umv2_megatron.observation.memory_history import record_memory_history
from umv2_megatron.parallel import roll_call
from umv2_megatron.planning.parameters import count_parameters
from umv2_megatron.training.blends import BlendHistory, blend_history
from umv2_megatron.training.evaluation_sets import builds_itself, evaluation_sets
from umv2_megatron.training.first_rank import on_rank_0
from umv2_megatron.training.initialize import (
    Progress,
    TrainingState,
    build_training_state,
    is_last_rank,
    print_rank_0,
    start_processes,
    told_backend,
)
from umv2_megatron.training.load_state import load_state, persistent_candidates
from umv2_megatron.training.loop import Trainer
from umv2_megatron.training.non_persistent import NonPersistent, forget_history, open_non_persistent
from umv2_megatron.training.reporting import Reporter
from umv2_megatron.training.resume import Source, check_same_run, check_vocabulary, find_source
from umv2_megatron.training.saving import Saver
from umv2_megatron.training.step import connect
from umv2_megatron.training.task_evaluation import TaskEvaluation
from umv2_megatron.user_paths import local_folder, same_directory


def pretrain(run: RunConfig, load_tasks: Callable[[RunConfig], TaskEvaluation] | None = None) -> int:
    """Train as ``run`` says and return the exit code. Raises ``ValueError`` for what the user can mend.

    ``load_tasks`` makes the tasks of --eval-tasks ready; collective.
    """
    started_at = time.monotonic()  # before the ranks wait for each other: a job's time limit knows no preparations
    start_processes(run)
    assert run.data.tokenizer_type is not None, "check_data was not called"
    print_rank_0(f"umv2_megatron {__version__}: {run.world_size} ranks, configuration:\n{run.describe()}")
    with contextlib.ExitStack() as stack:
        exporter = _exporter(run, stack)
        if run.observation.record_memory_history:
            folder = local_folder(run.training.save) / "memory-snapshot"
            record_memory_history(folder, torch.distributed.get_rank())
        store = _own_save_directory(run, stack)
        tasks = load_tasks(run) if load_tasks is not None and run.training.eval_tasks else None
        background = _background_saves(run, store, stack)
        non_persistent = None
        if store is not None and run.training.non_persistent_save_interval and not run.training.skip_train:
            non_persistent = open_non_persistent(run, store, stack)
        tokenizer = tokenizer_of(vars(run.data))
        state = build_training_state(run, tokenizer.vocab_size)
        if run.hashing is not None and run.hashing.ngram_tokens == "folded":
            set_canonical_ids(state.chunks, canonical_ids(tokenizer))
        print_rank_0(told_backend(run))
        connect(run, state.chunks, state.optimizer)
        _describe_model(run, tokenizer.vocab_size, state)
        identity = data_identity(run.data, tokenizer, run.model.seq_length, run.training.seed)
        if not run.training.skip_train:
            # mcore shuffles as many epochs as it needs, so another number of samples is another order
            identity["training_samples"] = run.samples
        blends = _resume(run, state, identity, tokenizer.vocab_size, store, non_persistent)
        identity["training_blends"] = blends.as_json()
        events = stack.enter_context(_history(run, store, state))
        if store is not None and torch.distributed.get_rank() == 0 and not run.training.skip_train:
            replace_synced(store.root / "config.yaml", run.to_yaml().encode())
        blends.tell(events)
        sizes = _samples(run, state.progress)
        train_set, valid_set, test_set = build_datasets(
            run.data, tokenizer, run.model.seq_length, run.training.seed, sizes, blends.phases
        )

        reporter = Reporter(run, is_last_rank(), state.progress.iteration, exporter)
        stack.callback(reporter.close)
        config = _saved_config(run, tokenizer, identity)
        saver = None
        if store is not None:
            saver = Saver(store, state, config, reporter, events, background, non_persistent)
        trainer = Trainer(
            run,
            state,
            _iterator(run, train_set, state.progress.consumed_samples, tokenizer.eod),
            evaluation_sets(run, tokenizer, "validation", valid_set),
            reporter,
            events,
            saver,
            tokenizer.vocab_size,
            started_at,
            tasks,
            tokenizer,
        )
        if run.training.skip_train:
            trainer.evaluate("validation", trainer.validation_sets)
            found = trainer.evaluate_tasks()
            if found is not None and found.failure is not None:
                raise TrainingStopped(f"--eval-tasks failed: {found.failure}")
        elif trainer.train():
            trainer.evaluate("test", evaluation_sets(run, tokenizer, "test", test_set))
        finished = state.progress.iteration >= trainer.last_iteration
        if saver is not None and finished:
            saver.end()
        trainer.refresh()
        print_rank_0(f"weights of rank 0: sha256 {save_load.weights_digest(state.chunks)}")
        events.end(finished=finished)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return 0


# -- data ------------------------------------------------------------------------------------------------------------


def _samples(run: RunConfig, progress: Progress) -> tuple[int, int, int]:
    """Samples needed of the training, validation and test sets, as far as ``build_datasets`` makes them. With corpora
    per set, a test set is optional.

    Of the training set: those used so far and those to come. mcore's order depends on their number; a resume does not
    change it where the batch stays the same, nor do later ones where the batch was changed once.
    """
    to_come = max(0, run.last_iteration(progress.iteration, progress.consumed_samples) - progress.iteration)
    trained = 0 if run.training.skip_train else run.rampup.samples_after(to_come, progress.consumed_samples)
    size = run.training.eval_iters * run.global_batch_size
    evaluated = 0 if builds_itself(run, "validation") else size
    no_test = builds_itself(run, "test") or (run.data.has_split_paths and run.data.test_data_path is None)
    return trained, evaluated, 0 if no_test else size


def _iterator(run: RunConfig, dataset: Any, consumed: int, eod: int) -> Any:
    return batch_iterator(
        dataset,
        consumed,
        run.training.micro_batch_size,
        run.data.num_workers,
        run.virtual_pipeline_size,
        apart_at=eod if run.data.packs_documents else None,
    )


# -- checkpoints -----------------------------------------------------------------------------------------------------


def _own_save_directory(run: RunConfig, stack: contextlib.ExitStack) -> CheckpointStore | None:
    """Lock --save for this job (rank 0)."""
    if not run.training.save:
        return None
    store = CheckpointStore(run.training.save, retain_interval=run.training.save_retain_interval)

    def take() -> None:
        if torch.distributed.get_rank() == 0:
            stack.enter_context(store.lock())

    attempt("owning the save directory", take)
    return store


def _background_saves(
    run: RunConfig, store: CheckpointStore | None, stack: contextlib.ExitStack
) -> BackgroundSaves | None:
    """The writer process of --async-save. It starts while the model is built."""
    if store is None or not run.training.async_save or run.training.skip_train:
        return None
    made = attempt("starting the writer of --async-save", lambda: BackgroundSaves(store))
    stack.callback(made.close)
    return made


def _saved_config(run: RunConfig, tokenizer: Any, identity: dict[str, Any]) -> dict[str, Any]:
    """The config.json of every checkpoint of this run."""
    return {
        "format": 1,
        "version": __version__,
        "values": yaml.safe_load(run.to_yaml()),
        "data": identity,
        "world_size": run.world_size,
        "tokenizer_vocab_size": tokenizer.vocab_size,
        "padded_vocab_size": run.padded_vocab_size(tokenizer.vocab_size),
    }


def _resume(
    run: RunConfig,
    state: TrainingState,
    identity: dict[str, Any],
    vocab_size: int,
    store: CheckpointStore | None,
    non_persistent: NonPersistent | None,
) -> BlendHistory:
    """Load the newest checkpoint of this run, or the one that --load names, if any, into ``state``; the history of
    the training blend, which goes on from it."""
    loaded = None
    found = _source_and_candidates(run, non_persistent)
    if found is not None:
        source, candidates = found
        loaded = _load(run, state, identity, vocab_size, source, candidates)
    samples = _samples(run, state.progress)[0]
    goes_on = loaded if found is not None and not _begins_anew(run, found[0]) else None
    blends = BlendHistory([])
    if not run.training.skip_train:
        blends = blend_history(run, identity, goes_on, state.progress, samples)
    if non_persistent is not None:
        non_persistent.go_on(state.progress.iteration, loaded=loaded is not None and loaded.place.kind != "persistent")
    elif store is not None and not run.training.skip_train:
        forget_history(store)
    return blends


def _source_and_candidates(
    run: RunConfig, non_persistent: NonPersistent | None
) -> tuple[Source, list[Candidate]] | None:
    """Where the run starts from, and the checkpoints there, best first; None for a fresh start."""
    source = find_source(run, others=non_persistent is not None and bool(non_persistent.found.usable))
    if non_persistent is not None and source is not None and _is_own(run, source):
        candidates = non_persistent.candidates(CheckpointStore(source.directory), source.ckpt_step)
        if candidates:
            return source, candidates
        source = find_source(run)  # they are damaged, and there is no persistent one yet
    elif non_persistent is not None:
        non_persistent.tell_unused(-1)
    if source is None:
        return None
    return source, persistent_candidates(CheckpointStore(source.directory), source.ckpt_step)


def _is_own(run: RunConfig, source: Source) -> bool:
    """Whether the run goes on from checkpoints of its own; with --load of them and --finetune it begins anew."""
    same = same_directory(source.directory, run.training.save or "")
    return same and (source.continues or not run.training.finetune)


def _begins_anew(run: RunConfig, source: Source) -> bool:
    """Whether only the weights of ``source`` are taken."""
    return run.training.finetune and not source.continues


def _load(
    run: RunConfig,
    state: TrainingState,
    identity: dict[str, Any],
    vocab_size: int,
    source: Source,
    candidates: list[Candidate],
) -> Candidate:
    """Load the first of ``candidates`` that can be, if it is of this run. Which one it is."""
    training = run.training
    finetune = _begins_anew(run, source)
    _refuse_another_run(run, source, candidates[0], None if finetune else identity, vocab_size)
    load_optim = not training.skip_train and (source.continues or not (training.no_load_optim or finetune))
    loaded = load_state(
        run,
        state,
        candidates,
        only=source.ckpt_step is not None,
        load_optim=load_optim,
        load_rng=source.continues or not (training.no_load_rng or finetune),
    )
    if not finetune:
        known = {field.name for field in dataclasses.fields(Progress)}
        state.progress = Progress(**{key: value for key, value in loaded.extra_state.items() if key in known})
        if not load_optim:
            state.scheduler.step(state.progress.consumed_samples)  # a fresh optimizer, but the run's own schedule
    told_kind = "" if loaded.kind == "persistent" else f"{loaded.kind} "
    print_rank_0(
        f" loaded {told_kind}checkpoint of iteration {loaded.iteration} from {loaded.path}; "
        f"continuing at iteration {state.progress.iteration}"
        + ("" if loaded.rng_restored else "; random states were not restored")
        + f"; read {min(loaded.bytes_read):,} to {max(loaded.bytes_read):,} bytes per rank, "
        f"{sum(loaded.bytes_read):,} in all"
    )
    which = (loaded.kind, loaded.iteration)
    return next(each for each in candidates if (each.place.kind, each.iteration) == which)


def _refuse_another_run(
    run: RunConfig, source: Source, candidate: Candidate, identity: dict[str, Any] | None, vocab_size: int
) -> None:
    """The checks of resume.py on the first rank, which reads the files; every rank raises its ``UsageError``.

    ``identity`` is None where the run begins anew with the checkpoint's weights, which need only fit.
    """

    def compare() -> None:
        config = None
        if candidate.place.kind != "persistent":
            config = saved_config.read_config(candidate.place.store, candidate.iteration)
        check_vocabulary(source, vocab_size, config)
        if identity is not None:
            check_same_run(run, source, identity, config)

    on_rank_0("comparing the run with its checkpoint", compare)


def _history(run: RunConfig, store: CheckpointStore | None, state: TrainingState) -> EventLog:
    """The run's events, of which this start is one; an evaluation (--skip-train) is none."""
    kept = store is not None and not run.training.skip_train
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    events = EventLog(store.root if store and kept else None, rank, ranks, lambda: state.progress.iteration)
    last = run.last_iteration(state.progress.iteration, state.progress.consumed_samples)
    events.start(yaml.safe_load(run.to_yaml()), __version__, device_name(), last)
    roll_call.at_sudden_end(lambda text: events.fault(text, 1, own=False))
    return events


def _exporter(run: RunConfig, stack: contextlib.ExitStack) -> Exporter | None:
    """Serve --metrics-port on rank 0, before anything that takes long. Every rank raises its ``UsageError``."""
    host, port = run.observation.metrics_host, run.observation.metrics_port
    if port is None:
        return None
    made: Exporter | None = None
    refusal: list[str | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            made = Exporter(host, port, __version__, run.world_size)
            stack.callback(made.close)
        except OSError as error:
            refusal = [
                f"--metrics-port is {port}; expected a free port on {host} (--metrics-host): "
                f"{error.strerror or error}; choose another"
            ]
    torch.distributed.broadcast_object_list(refusal, src=0)
    if refusal[0] is not None:
        raise UsageError(refusal[0])
    if made is not None:
        print_rank_0(f"figures for Prometheus: http://{host}:{port}/metrics")
    return made


# -- description -----------------------------------------------------------------------------------------------------


def _describe_model(run: RunConfig, vocab_size: int, state: TrainingState) -> None:
    """Print the parameter counts: of the whole model, and on each rank."""
    counts = count_parameters({**run.values, "vocab_size": vocab_size}, run.memory)
    here = sum(parameter.numel() for chunk in state.chunks for parameter in unwrap(chunk).parameters())
    print_rank_0(
        f" parameters: {counts.activated:,} activated, {counts.total:,} in all without embeddings; {here:,} on rank 0"
    )
    if run.training.trainable_rows is not None:
        chosen = RowSelection.read("--trainable-rows", run.training.trainable_rows)
        rows = sum(len(each) for each in chosen.rows.values())
        source = f"{chosen.origin.get('checkpoint')}, iteration {chosen.origin.get('iteration')}"
        print_rank_0(f" trained: {rows:,} rows of {len(chosen.rows)} value tables, chosen by what {source}, picks")
