"""Saving and loading a training run: model, optimizer, schedule, random states and the run's own counters.

All ranks write their shards into one temporary directory; when every rank has succeeded, rank 0 publishes it as
`store.py` describes, else nobody does and every rank gets the same error. On load each rank reads what it owns and
verifies what it reads, refusing any key or shape that differs from the model.

What a resumed run needs to continue bitwise: parameters and persistent buffers, the optimizer's moments, fp32 main
parameters and step count, the scheduler, the random states of every rank, and the caller's counters (`extra_state`).

Everything but the random states can be loaded in another layout: weights and optimizer state are stored as parts of
global tensors (`optimizer_state.py`), and no rank ever holds more than its own parts.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import merge
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, StateDict, apply_factory_merges
from megatron.core.dist_checkpointing.serialization import load_content_metadata
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base, force_all_tensors_to_non_fp8
from megatron.core.utils import get_model_config
from torch.distributed.checkpoint.metadata import Metadata

from umv2_megatron.checkpoint.agreement import attempt, gather, tell_all
from umv2_megatron.checkpoint.background import BackgroundSaves
from umv2_megatron.checkpoint.checksum_files import Checksums, read_verified
from umv2_megatron.checkpoint.optimizer_state import (
    OptimizerState,
    check_kind,
    check_second_moments,
    check_selected_rows,
    groups_of_mcore,
    is_main_param,
    local_groups,
    main_param_name,
    merge_groups,
)
from umv2_megatron.checkpoint.pieces import check_written, held_keys, plan_pieces
from umv2_megatron.checkpoint.places import Place, SharedPlace, write_and_publish
from umv2_megatron.checkpoint.rng_state import RNG_KEY, set_rng_state, sharded_rng_state
from umv2_megatron.checkpoint.shard_reading import ShardReader, compare, drop_unknown_extra_states
from umv2_megatron.checkpoint.shard_writing import Piece
from umv2_megatron.checkpoint.store import METADATA_FILE, CheckpointStore
from umv2_megatron.checkpoint.torch_dist_io import (
    COMMON_FILE,
    is_extra_state,
    is_optimizer_state,
    load_common,
    read_metadata_safely,
)
from umv2_megatron.durable_files import CheckpointError, DamageError
from umv2_megatron.model.builder import unwrap


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What `load_checkpoint` restored: the caller's counters, whether the random states are those of the save, the
    bytes that each rank has read and checked, and the kind of place it was in."""

    iteration: int
    extra_state: dict[str, Any]
    rng_restored: bool
    path: Path
    bytes_read: tuple[int, ...]
    kind: str


# ---------------------------------------------------------------------- save


def save_checkpoint(
    store: CheckpointStore | Place,
    iteration: int,
    model_chunks: Sequence[torch.nn.Module],
    optimizer: Any = None,
    scheduler: Any = None,
    extra_state: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    background: BackgroundSaves | None = None,
) -> Path:
    """Save and publish one checkpoint. Collective over all ranks; on return it is published and verified by counts.

    store: where to; a store is one that all ranks share.
    model_chunks: this rank's pipeline chunks, wrapped in mcore's DDP or not. optimizer: an mcore MegatronOptimizer
    (also chained) or None. extra_state: JSON-able, equal on all ranks, returned by `load_checkpoint`. config: the
    resolved configuration, written as config.json beside the shards. background: begin to save only; its ``finish``
    publishes. Raises CheckpointError on every rank when any rank fails; the earlier checkpoints are then untouched.
    Raises NotSavedError where it could not be written and is one that the run can do without.
    """
    place = SharedPlace(store) if isinstance(store, CheckpointStore) else store
    common_extra = {
        "iteration": iteration,
        "checkpoint_version": 3.0,
        "layout": layout(),
        "extra_state": json.loads(json.dumps(extra_state or {})),  # nothing may come back as another type
    }
    if scheduler is not None:
        common_extra["opt_param_scheduler"] = scheduler.state_dict()

    held: set[str] = set()

    def plan() -> tuple[list[Piece], dict[str, Any]]:
        metadata = _content_metadata()
        state = _model_state(model_chunks, metadata)
        if optimizer is not None:
            state["optimizer_state"] = OptimizerState(optimizer, state).sharded()
        metadata = {name: value for name, value in metadata.items() if name != "dp_cp_group"}
        state |= common_extra | {RNG_KEY: sharded_rng_state(), "content_metadata": metadata}
        # mcore would send every rank's description to every rank; rank 0 checks what was written instead
        sharded, common = save_preprocess(state, validate_access_integrity=False)
        held.update(held_keys(sharded))
        return plan_pieces(sharded, place.alone), common

    with gathered_parameters(model_chunks):
        try:
            if optimizer is not None:
                common_extra["optimizer_groups"] = _optimizer_groups(optimizer)
            pieces, common = attempt("collecting the state to save", plan)
            if not place.alone:
                check_written(held, pieces)
            if background is None:
                write_and_publish(place, iteration, pieces, common, config or {})
            else:
                background.start(iteration, pieces, common, config or {}, place)
        except BaseException:
            place.discard(iteration)
            raise
    return place.store.path(iteration)


@contextlib.contextmanager
def gathered_parameters(model_chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """With --overlap-param-gather the parameters of the last step arrive during the next forward: fetch them now."""
    waiting = [chunk for chunk in model_chunks if getattr(chunk, "remove_forward_pre_hook_handles", None)]
    for chunk in waiting:
        chunk.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for chunk in waiting:
            chunk.enable_forward_pre_hook()


# ---------------------------------------------------------------------- load


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that may be loaded: the iteration, and where it is."""

    place: Place
    iteration: int


def load_checkpoint(
    store: CheckpointStore,
    model_chunks: Sequence[torch.nn.Module],
    optimizer: Any = None,
    scheduler: Any = None,
    *,
    ckpt_step: int | None = None,
    load_optim: bool = True,
    load_rng: bool = True,
    verify_all: bool = False,
) -> LoadedCheckpoint:
    """Load the newest valid checkpoint (or `ckpt_step`) into the given objects. Collective over all ranks.

    load_optim=False (`--no-load-optim`) leaves optimizer and scheduler fresh, load_rng=False (`--no-load-rng`) the
    random states. Random states are per rank: in another layout they stay fresh and `rng_restored` is False.
    verify_all (`--verify-checkpoint full`): every file is verified before, not only what is read. Where any rank finds
    damage, all ranks go on to the next older checkpoint. Raises CheckpointError (NoCheckpointError when nothing was
    ever saved there), the same on every rank.
    """
    is_main = torch.distributed.get_rank() == 0

    def find() -> list[int]:
        return store.candidates() if is_main and ckpt_step is None else []

    iterations = [ckpt_step] if ckpt_step is not None else tell_all(attempt("finding a checkpoint", find))
    place = SharedPlace(store)
    return load_first(
        [Candidate(place, iteration) for iteration in iterations],
        model_chunks,
        optimizer,
        scheduler,
        only=ckpt_step is not None,
        load_optim=load_optim,
        load_rng=load_rng,
        verify_all=verify_all,
    )


def load_first(
    candidates: Sequence[Candidate],
    model_chunks: Sequence[torch.nn.Module],
    optimizer: Any = None,
    scheduler: Any = None,
    *,
    only: bool = False,
    load_optim: bool = True,
    load_rng: bool = True,
    verify_all: bool = False,
) -> LoadedCheckpoint:
    """Load the first of ``candidates`` that is not damaged. Collective over all ranks, which have the same candidates.

    only: where the first one is damaged, that is an error. For the rest see `load_checkpoint`. A non-persistent one is
    passed over for any other reason, too, as long as there are others.
    """
    assert candidates, "no candidates"
    is_main = torch.distributed.get_rank() == 0
    load = _Load(model_chunks, optimizer, scheduler, load_optim, load_rng, verify_all)
    problems: list[str] = []
    for number, candidate in enumerate(candidates):
        place, iteration = candidate.place, candidate.iteration
        named = f"{'' if place.kind == 'persistent' else f'{place.kind} '}checkpoint {iteration}"
        try:
            loaded = load.run(candidate)
        except CheckpointError as error:
            optional = place.kind != "persistent" and number + 1 < len(candidates)
            if only or not (isinstance(error, DamageError) or optional):
                raise
            problems.append(str(error))
            if is_main:
                place.store.warn(f"{named} cannot be used: {error}")
            continue
        if problems and is_main:
            place.store.warn(f"falling back to {named}")
        return loaded
    raise candidates[0].place.store.nothing_valid(problems)


@dataclass(frozen=True)
class _Load:
    """One call of `load_first`, as tried with one checkpoint after the other."""

    chunks: Sequence[torch.nn.Module]
    optimizer: Any
    scheduler: Any
    load_optim: bool
    load_rng: bool
    verify_all: bool

    def run(self, candidate: Candidate) -> LoadedCheckpoint:
        """Load one checkpoint. Raises DamageError when it is not what was saved; tensors may then be half loaded."""
        place, iteration = candidate.place, candidate.iteration
        path = place.store.path(iteration)
        manifest, bytes_read = place.verify(iteration, full=self.verify_all)
        sizes = {name: size for name, (size, _) in manifest.files.items()}

        def describe() -> tuple[dict[str, Any], Metadata]:
            common = load_common(path, read_verified(path, COMMON_FILE, manifest))
            metadata = read_verified(path, METADATA_FILE, manifest)
            return common, read_metadata_safely(path, metadata, sizes)

        common, metadata = attempt("reading the checkpoint's metadata", describe)
        load_rng = self.load_rng and common.get("layout") == layout()
        wants_optimizer = self.load_optim and self.optimizer is not None
        saved_optimizer = _SavedOptimizer(path, common, metadata) if wants_optimizer else None

        def collect() -> tuple[ShardedStateDict, StateDict, ShardedStateDict]:
            content = _content_metadata()
            state = _model_state(self.chunks, content)
            if saved_optimizer is not None:
                state |= saved_optimizer.collect(self.optimizer, state)
            state |= {RNG_KEY: sharded_rng_state()} if load_rng else {}
            force_all_tensors_to_non_fp8(state)
            state, kept, factories = load_preprocess(state)
            return extract_sharded_base(state)[0], kept, factories

        def may_remain(key: str) -> bool:
            if is_optimizer_state(key):
                return saved_optimizer is None or (is_main_param(key) and not _has_main_params(self.optimizer))
            return not load_rng and key.startswith(f"{RNG_KEY}/")

        sharded, kept, factories = attempt("collecting the state to load", collect)
        drop_unknown_extra_states(sharded, keep=metadata.state_dict_metadata.keys())
        if place.alone:
            attempt("comparing model and checkpoint", lambda: compare(sharded, metadata, path, may_remain, alone=True))
        else:
            compare(sharded, metadata, path, may_remain)
        checksums = Checksums(path, manifest)
        reader = ShardReader(path, metadata, checksums)
        filled = attempt("reading the shards", lambda: reader.fill(sharded, lambda: _fp8_recipe(self.chunks)))
        scheduler = self.scheduler if self.load_optim else None

        def restore() -> None:
            loaded = apply_factory_merges(merge(merge(dict(common), kept), filled), factories)
            _restore(loaded, self.chunks, self.optimizer, scheduler, saved_optimizer, load_rng)

        attempt("restoring the state", restore)
        bytes_read += sizes[COMMON_FILE] + sizes[METADATA_FILE] + checksums.bytes_read + reader.bytes_read
        by_rank = tuple(tell_all(gather(bytes_read)))
        return LoadedCheckpoint(iteration, dict(common.get("extra_state", {})), load_rng, path, by_rank, place.kind)


def _fp8_recipe(model_chunks: Sequence[torch.nn.Module]) -> Any:
    """Transformer Engine's recipe of these models; None where they do not compute in FP8."""
    config = get_model_config(model_chunks[0])
    if not config.fp8:
        return None
    from megatron.core.fp8_utils import get_fp8_recipe  # needs Transformer Engine

    return get_fp8_recipe(config)


def _restore(
    loaded: dict[str, Any],
    model_chunks: Sequence[torch.nn.Module],
    optimizer: Any,
    scheduler: Any,
    saved_optimizer: "_SavedOptimizer | None",
    load_rng: bool,
) -> None:
    for name, chunk in zip(_chunk_names(model_chunks), model_chunks):
        _load_model(unwrap(chunk), loaded[name])
    if saved_optimizer is not None:
        saved_optimizer.restore()
    elif optimizer is not None:
        optimizer.reload_model_params()  # fp32 main parameters follow the loaded weights
    if scheduler is not None:
        if "opt_param_scheduler" not in loaded:
            raise CheckpointError("the checkpoint holds no learning rate schedule: give --no-load-optim")
        scheduler.num_steps = 0  # mcore adds the saved steps to those already counted
        scheduler.load_state_dict(loaded["opt_param_scheduler"])
    if load_rng:
        set_rng_state(loaded[RNG_KEY])


class _SavedOptimizer:
    """The optimizer's state in the checkpoint at ``path``, of whichever type; ``common`` is its common state."""

    def __init__(self, path: Path, common: dict[str, Any], metadata: Metadata) -> None:
        self._path = path
        self._common = common
        self._stored = list(metadata.state_dict_metadata)
        content = load_content_metadata(preloaded_state_dict=common) or {}
        self._mcore_type = content.get("distrib_optim_sharding_type")
        self._state: OptimizerState | None = None

    def collect(self, optimizer: Any, model_state: ShardedStateDict) -> ShardedStateDict:
        """What to ask for, to be added to the model's state."""
        if self._mcore_type == "dp_reshardable":
            raise CheckpointError(
                f"{self._path} holds optimizer state of mcore's type {self._mcore_type!r}, whose tensors are gradient "
                "buffers: give --no-load-optim, or save it again with --dist-ckpt-optim-fully-reshardable"
            )
        check_kind(self._stored, optimizer, self._path)
        check_second_moments(self._stored, optimizer, self._path)
        check_selected_rows(self._common.get("optimizer_groups", []), optimizer, self._path)
        self._state = OptimizerState(optimizer, model_state)
        return {"optimizer_state": self._state.sharded(main_param_name(self._stored))}

    def restore(self) -> None:
        """Finish after the tensors were read and the model has its weights."""
        assert self._state is not None, "collect comes first"
        if "optimizer_groups" in self._common:
            self._state.restore(self._common["optimizer_groups"])
        elif "optimizer" in self._common:
            self._state.restore(groups_of_mcore(self._common["optimizer"]))
        else:
            raise CheckpointError(f"{self._path} holds no optimizer state: give --no-load-optim")


# ---------------------------------------------------------------------- states


def _content_metadata() -> dict[str, Any]:
    """Metadata that steers `sharded_state_dict` of mcore's modules; stored in the checkpoint."""
    return {
        # Every layer has its own keys: layers with and without memory differ.
        "non_homogeneous_layers": True,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _model_state(model_chunks: Sequence[torch.nn.Module], metadata: dict[str, Any]) -> ShardedStateDict:
    return {
        name: unwrap(chunk).sharded_state_dict(metadata=metadata)
        for name, chunk in zip(_chunk_names(model_chunks), model_chunks)
    }


def _optimizer_groups(optimizer: Any) -> list[dict[str, Any]]:
    """Settings and step counts of the parameter groups of all ranks. Collective."""
    mine = attempt("collecting the optimizer's settings", lambda: local_groups(optimizer))
    everyone: list[list[dict[str, Any]]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    return attempt("comparing the optimizers' settings", lambda: merge_groups(everyone))


def _has_main_params(optimizer: Any) -> bool:
    """Whether the run trains in 16 bits."""
    return optimizer.config.bf16 or optimizer.config.fp16


def layout() -> dict[str, int]:
    """What decides which rank holds what."""
    return {
        "world": torch.distributed.get_world_size(),
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual pipeline": parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        "context": parallel_state.get_context_parallel_world_size(),
        "memory": parallel_state.get_expert_model_parallel_world_size(),
    }


def _chunk_names(model_chunks: Sequence[torch.nn.Module]) -> list[str]:
    """Megatron-LM's names: "model", or "model0", "model1" ... with virtual pipeline stages."""
    return ["model"] if len(model_chunks) == 1 else [f"model{i}" for i in range(len(model_chunks))]


def _load_model(model: torch.nn.Module, state: dict[str, Any]) -> None:
    """Strict but for Transformer Engine's extra states: one that the checkpoint lacks stays the module's own."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [key for key in missing if not is_extra_state(key)]
    if missing or unexpected:
        raise CheckpointError(f"the loaded state lacks {missing} and holds unexpected {unexpected}")


def weights_digest(model_chunks: Sequence[torch.nn.Module]) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes of this rank's parameters and persistent buffers, by name."""
    digest = hashlib.sha256()
    with gathered_parameters(model_chunks):
        for index, chunk in enumerate(model_chunks):
            for name, tensor in sorted(unwrap(chunk).state_dict().items()):
                if isinstance(tensor, torch.Tensor):
                    digest.update(f"{index} {name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
