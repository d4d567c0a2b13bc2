"""Saving and loading a training run: model, optimizer, schedule, random states and the run's own counters.

All ranks write their shards into one temporary directory; when every rank has succeeded, rank 0 publishes it as
`store.py` describes, else nobody does and every rank gets the same error. On load rank 0 verifies every
byte, then all ranks load what they own, refusing any key or shape that differs from the model.

What a resumed run needs to continue bitwise: parameters and persistent buffers, the optimizer's moments, fp32 main
parameters and step count, the scheduler, the random states of every rank, and the caller's counters (`extra_state`).

Everything but the random states can be loaded in another layout: weights and optimizer state are stored as parts of
global tensors (`optimizer_state.py`), and no rank ever holds more than its own parts.
"""

import contextlib
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict
from megatron.core.dist_checkpointing.serialization import load_content_metadata
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.tensor_parallel.random import convert_cuda_rng_state, is_graph_safe_cuda_rng_tracker
from megatron.core.utils import get_model_config

from umv2_megatron.checkpoint.optimizer_state import (
    OptimizerState,
    check_second_moments,
    groups_of_mcore,
    is_main_param,
    local_groups,
    main_param_name,
    merge_groups,
)
from umv2_megatron.checkpoint.saved_config import CONFIG_FILE
from umv2_megatron.checkpoint.store import CheckpointStore
from umv2_megatron.checkpoint.torch_dist_io import (
    InProcessSave,
    SafeCommonLoad,
    SafeLoad,
    attempt,
    count_model,
    count_written,
    is_extra_state,
    is_optimizer_state,
    read_metadata_safely,
)
from umv2_megatron.durable_files import CheckpointError
from umv2_megatron.model.builder import unwrap
from umv2_megatron.parallel import cpu_platform

_RNG_KEY = "rng_state"


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What `load_checkpoint` restored: the caller's counters, and whether the random states are those of the save."""

    iteration: int
    extra_state: dict[str, Any]
    rng_restored: bool
    path: Path


# ---------------------------------------------------------------------- save


def save_checkpoint(
    store: CheckpointStore,
    iteration: int,
    model_chunks: Sequence[torch.nn.Module],
    optimizer: Any = None,
    scheduler: Any = None,
    extra_state: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
) -> Path:
    """Save and publish one checkpoint. Collective over all ranks; on return it is published and verified by counts.

    model_chunks: this rank's pipeline chunks, wrapped in mcore's DDP or not. optimizer: an mcore MegatronOptimizer
    (also chained) or None. extra_state: JSON-able, equal on all ranks, returned by `load_checkpoint`. config: the
    resolved configuration, written as config.json beside the shards. Raises CheckpointError on every rank when any
    rank fails; the earlier checkpoints are then untouched.
    """
    is_main = torch.distributed.get_rank() == 0
    directory = store.temporary_path(iteration)
    common_extra = {
        "iteration": iteration,
        "checkpoint_version": 3.0,
        "layout": _layout(),
        "extra_state": json.loads(json.dumps(extra_state or {})),  # nothing may come back as another type
    }
    if scheduler is not None:
        common_extra["opt_param_scheduler"] = scheduler.state_dict()

    def collect() -> ShardedStateDict:
        metadata = _content_metadata()
        state = _model_state(model_chunks, metadata)
        if optimizer is not None:
            state["optimizer_state"] = OptimizerState(optimizer, state).sharded()
        return state | common_extra | {_RNG_KEY: _sharded_rng_state(), "content_metadata": metadata}

    def write_common() -> None:
        if is_main:
            store.begin(iteration, tensor_bytes)
            _write_common(store, directory, common, config or {}, tensor_bytes)

    def publish() -> None:
        if is_main:
            store.publish(iteration, num_keys=num_keys, tensor_bytes=tensor_bytes, count=count_written)

    with gathered_parameters(model_chunks):
        try:
            if optimizer is not None:
                common_extra["optimizer_groups"] = _optimizer_groups(optimizer)
            state = attempt("collecting the state to save", collect)
            sharded, common = attempt("checking the shards to save", lambda: save_preprocess(state))
            num_keys, tensor_bytes = count_model(sharded)
            attempt("writing the common state", write_common)
            attempt("writing the shards", lambda: _write_shards(store, sharded, directory, tensor_bytes))
            attempt("publishing the checkpoint", publish)
        except BaseException:
            if is_main:
                store.discard(iteration)
            raise
    return store.path(iteration)


def _write_common(store: CheckpointStore, directory: Path, common: dict, config: dict, tensor_bytes: int) -> None:
    try:
        torch.save(common, directory / COMMON_STATE_FNAME)
        save_config(CheckpointingConfig("torch_dist", 1), str(directory))
        (directory / CONFIG_FILE).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise _explained(store, error, directory, tensor_bytes) from error


def _write_shards(store: CheckpointStore, sharded: ShardedStateDict, directory: Path, tensor_bytes: int) -> None:
    try:
        InProcessSave().save(sharded, directory)
    except torch.distributed.checkpoint.CheckpointException as error:
        # Every rank gets this one, with the failures of all; the file system's own words are in the first of them.
        first = next((failure for failure, _ in error.failures.values()), error)
        raise _explained(store, first, directory, tensor_bytes) from error


def _explained(store: CheckpointStore, error: BaseException, directory: Path, tensor_bytes: int) -> CheckpointError:
    if not isinstance(error, OSError):
        error = OSError(None, f"{type(error).__name__}: {str(error).splitlines()[0]}")
    return store.explain(error, f"could not write {directory}", tensor_bytes)


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


def load_checkpoint(
    store: CheckpointStore,
    model_chunks: Sequence[torch.nn.Module],
    optimizer: Any = None,
    scheduler: Any = None,
    *,
    ckpt_step: int | None = None,
    load_optim: bool = True,
    load_rng: bool = True,
) -> LoadedCheckpoint:
    """Load the newest valid checkpoint (or `ckpt_step`) into the given objects. Collective over all ranks.

    load_optim=False (`--no-load-optim`) leaves optimizer and scheduler fresh, load_rng=False (`--no-load-rng`) the
    random states. Random states are per rank: in another layout they stay fresh and `rng_restored` is False.
    Raises CheckpointError (NoCheckpointError when nothing was ever saved there), the same on every rank.
    """
    is_main = torch.distributed.get_rank() == 0
    found = attempt("finding a checkpoint", lambda: store.resolve(ckpt_step) if is_main else None)
    shared = [found]
    torch.distributed.broadcast_object_list(shared, src=0)
    iteration = shared[0]
    assert isinstance(iteration, int)
    path = store.path(iteration)
    common = attempt("reading the common state", lambda: SafeCommonLoad().load_common(path))
    load_rng = load_rng and common.get("layout") == _layout()
    saved_optimizer = _SavedOptimizer(path, common) if load_optim and optimizer is not None else None

    def collect() -> ShardedStateDict:
        metadata = _content_metadata()
        state = _model_state(model_chunks, metadata)
        if saved_optimizer is not None:
            state |= saved_optimizer.collect(optimizer, state)
        return state | ({_RNG_KEY: _sharded_rng_state()} if load_rng else {})

    def may_remain(key: str) -> bool:
        if is_optimizer_state(key):
            return saved_optimizer is None or (is_main_param(key) and not _has_main_params(optimizer))
        return not load_rng and key.startswith(f"{_RNG_KEY}/")

    wanted = attempt("collecting the state to load", collect)
    # The shards are compared, key by key, by SafeLoad: more exactly and on all ranks at once than `strict` would.
    loaded = dist_checkpointing.load(
        wanted,
        str(path),
        sharded_strategy=SafeLoad(may_remain, lambda: _fp8_recipe(model_chunks)),
        common_strategy=SafeCommonLoad(),
    )
    attempt(
        "restoring the state",
        lambda: _restore(loaded, model_chunks, optimizer, scheduler if load_optim else None, saved_optimizer, load_rng),
    )
    return LoadedCheckpoint(iteration, dict(common.get("extra_state", {})), load_rng, path)


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
        _set_rng_state(loaded[_RNG_KEY])


class _SavedOptimizer:
    """The optimizer's state in the checkpoint at ``path``, of whichever type; ``common`` is its common state."""

    def __init__(self, path: Path, common: dict[str, Any]) -> None:
        self._path = path
        self._common = common
        metadata = load_content_metadata(preloaded_state_dict=common) or {}
        self._mcore_type = metadata.get("distrib_optim_sharding_type")
        self._state: OptimizerState | None = None

    def collect(self, optimizer: Any, model_state: ShardedStateDict) -> ShardedStateDict:
        """What to ask for, to be added to the model's state."""
        if self._mcore_type == "dp_reshardable":
            raise CheckpointError(
                f"{self._path} holds optimizer state of mcore's type {self._mcore_type!r}, whose tensors are gradient "
                "buffers: give --no-load-optim, or save it again with --dist-ckpt-optim-fully-reshardable"
            )
        stored = list(read_metadata_safely(self._path).state_dict_metadata)
        check_second_moments(stored, optimizer, self._path)
        self._state = OptimizerState(optimizer, model_state)
        return {"optimizer_state": self._state.sharded(main_param_name(stored))}

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


def _layout() -> dict[str, int]:
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


def _sharded_rng_state() -> ShardedObject:
    """Random states of this rank. Only tensors and plain numbers, so that `weights_only=True` can read them."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    assert name == "MT19937"
    tracker = tensor_parallel.get_cuda_rng_tracker()  # with --cuda-graph-impl it has generators instead of states
    state = {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "device": cpu_platform.get_device_rng_state(),
        "tracker": {name: convert_cuda_rng_state(kept) for name, kept in tracker.get_states().items()},
    }
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    return ShardedObject(_RNG_KEY, state, (world,), (rank,), replica_id=0)


def _set_rng_state(state: dict[str, Any]) -> None:
    version, words, gauss_next = state["python"]
    random.setstate((version, tuple(words), gauss_next))
    keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    tracker = tensor_parallel.get_cuda_rng_tracker()
    in_graphs = is_graph_safe_cuda_rng_tracker(tracker)
    tracker.set_states({name: convert_cuda_rng_state(kept, in_graphs) for name, kept in state["tracker"].items()})
    cpu_platform.set_device_rng_state(state["device"])
    torch.set_rng_state(state["torch"])


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
