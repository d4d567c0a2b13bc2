"""A checkpoint into the training state: at the start of a run, and when it goes back to an earlier one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from umv2_megatron.checkpoint import save_load
from umv2_megatron.checkpoint.agreement import attempt, tell_all
from umv2_megatron.checkpoint.places import Place, SharedPlace
from umv2_megatron.checkpoint.save_load import Candidate
from umv2_megatron.checkpoint.store import CheckpointStore
from umv2_megatron.config.run_config import RunConfig
from umv2_megatron.durable_files import DamageError
from umv2_megatron.training.initialize import TrainingState
from umv2_megatron.training.step import refresh_singular_vectors


def load_state(
    run: RunConfig,
    state: TrainingState,
    candidates: Sequence[Candidate],
    *,
    only: bool = False,
    load_optim: bool = True,
    load_rng: bool = True,
) -> save_load.LoadedCheckpoint:
    """Weights, optimizer, schedule and random states of a checkpoint; the progress is the caller's. A collective.

    See ``save_load.load_first`` for the arguments and errors. With --override-opt-param-scheduler the groups keep
    what the flags say of them.
    """
    # what the flags say of each group: a decoupled learning rate is that of its own group
    taken = ("max_lr", "min_lr", "betas", "eps")
    given = [{key: group[key] for key in taken if key in group} for group in state.optimizer.param_groups]
    with save_load.gathered_parameters(state.chunks):
        loaded = save_load.load_first(
            candidates,
            state.chunks,
            state.optimizer,
            state.scheduler,
            only=only,
            load_optim=load_optim,
            load_rng=load_rng,
            verify_all=run.training.verify_checkpoint == "full",
        )
        refresh_singular_vectors(state.chunks)
    if run.training.override_opt_param_scheduler:
        for group, own in zip(state.optimizer.param_groups, given):
            group.update(own)
        state.scheduler.step(0)
    return loaded


def persistent_candidates(store: CheckpointStore, ckpt_step: int | None) -> list[Candidate]:
    """The checkpoints of ``store`` that may be loaded, best first; with ``ckpt_step`` that one. A collective."""
    if ckpt_step is not None:
        return [Candidate(SharedPlace(store), ckpt_step)]
    is_main = torch.distributed.get_rank() == 0
    iterations = tell_all(attempt("finding a checkpoint", lambda: store.candidates() if is_main else []))
    return [Candidate(SharedPlace(store), iteration) for iteration in iterations]


def checkpoint_before(
    store: CheckpointStore, iteration: int, intervals: Sequence[int], others: Place | None = None
) -> Candidate | None:
    """The newest valid checkpoint of at most ``iteration``, the same on all ranks; None where there is none.

    One of an iteration at which a run saves that nobody interrupts: a multiple of one of ``intervals``
    (--save-interval, --non-persistent-save-interval), in ``store`` or among the non-persistent ``others``. Only where
    there is none, one that a stop or an exit saved in between: those depend on how often a run was interrupted, and an
    interrupted run is to do the same as another. A collective; each rank hashes a share of the files.
    """
    is_main = torch.distributed.get_rank() == 0

    def look() -> list[int]:
        return [each for each in store.iterations() if each <= iteration] if is_main else []

    persistent = tell_all(attempt("looking for a checkpoint to go back to", look))
    usable = others.find().usable if others is not None else []
    found: list[tuple[bool, int, Place]] = [
        *((any(each % interval == 0 for interval in intervals), each, SharedPlace(store)) for each in persistent),
        *((True, each, others) for each in usable if others),
    ]
    for _, each, place in sorted(found, key=lambda one: one[:2], reverse=True):
        try:
            place.verify(each, full=True)
        except DamageError as error:
            if is_main:
                store.warn(f"{f'{place.kind} ' * place.alone}checkpoint {each} cannot be used: {error}")
            continue
        return Candidate(place, each)
    return None
