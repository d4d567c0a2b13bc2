"""Saving and loading a training run: model, optimizer, schedule, random states and the run's own counters.

All ranks write their shards into one temporary directory; when every rank has succeeded, rank 0 publishes it as
`checkpoint_store.py` describes, else nobody does and every rank gets the same error. On load rank 0 verifies every
byte, then all ranks load what they own, refusing any key or shape that differs from the model.

What a resumed run needs to continue bitwise: parameters and persistent buffers, the optimizer's moments, fp32 main
parameters and step count, the scheduler, the random states of every rank, and the caller's counters (`extra_state`).

The optimizer's shards come in two types (mcore's `distrib_optim_sharding_type`), used only with the distributed
optimizer:

- "dp_reshardable" (default): each rank writes its part of the gradient-buffer layout. No communication, no copies;
  the data-parallel size may change on load, the tensor-, pipeline- and memory-parallel sizes may not.
- "fully_reshardable": tensors have the parameters' names and shapes, so any layout can load them, but saving gathers
  every buffer, in fp32, on every data-parallel rank.

Without the distributed optimizer the moments always have the parameters' names and shapes.
"""

import contextlib
import hashlib
import json
import random
import re
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
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from umv2_megatron.model.builder import unwrap
from umv2_megatron.parallel import cpu_platform
from umv2_megatron.training.checkpoint_store import CheckpointStore
from umv2_megatron.training.durable_files import CheckpointError
from umv2_megatron.training.torch_dist_io import (
    InProcessSave,
    SafeCommonLoad,
    SafeLoad,
    attempt,
    count_model,
    count_written,
    is_extra_state,
)

CONFIG_FILE = "config.json"
OPTIMIZER_SHARDINGS = ("dp_reshardable", "fully_reshardable")
_OPTIMIZER_KEY = re.compile(r"(chained_\d+\.)?optimizer\.")
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
    *,
    optim_sharding: str = "dp_reshardable",
) -> Path:
    """Save and publish one checkpoint. Collective over all ranks; on return it is published and verified by counts.

    model_chunks: this rank's pipeline chunks, wrapped in mcore's DDP or not. optimizer: an mcore MegatronOptimizer
    (also chained) or None. extra_state: JSON-able, equal on all ranks, returned by `load_checkpoint`. config: the
    resolved configuration, written as config.json beside the shards. Raises CheckpointError on every rank when any
    rank fails; the earlier checkpoints are then untouched.
    """
    assert optim_sharding in OPTIMIZER_SHARDINGS, optim_sharding
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
        metadata = _content_metadata(optimizer, optim_sharding)
        state = _sharded_state(model_chunks, optimizer, metadata, is_loading=False)
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
    stored_metadata = load_content_metadata(preloaded_state_dict=common) or {}
    load_rng = load_rng and common.get("layout") == _layout()
    with_optimizer = optimizer if load_optim else None

    def collect() -> ShardedStateDict:
        metadata = _content_metadata(with_optimizer, stored_metadata.get("distrib_optim_sharding_type"))
        if metadata.get("distrib_optim_sharding_type") == "dp_reshardable":
            _check_layout(common.get("layout", {}), path)
        state = _sharded_state(model_chunks, with_optimizer, metadata, is_loading=True)
        return state | ({_RNG_KEY: _sharded_rng_state()} if load_rng else {})

    def may_remain(key: str) -> bool:
        return (with_optimizer is None and _OPTIMIZER_KEY.match(key) is not None) or (
            not load_rng and key.startswith(f"{_RNG_KEY}/")
        )

    wanted = attempt("collecting the state to load", collect)
    # The shards are compared, key by key, by SafeLoad: more exactly and on all ranks at once than `strict` would.
    loaded = dist_checkpointing.load(
        wanted, str(path), sharded_strategy=SafeLoad(may_remain), common_strategy=SafeCommonLoad()
    )
    attempt(
        "restoring the state",
        lambda: _restore(loaded, model_chunks, optimizer, scheduler, load_optim=load_optim, load_rng=load_rng),
    )
    return LoadedCheckpoint(iteration, dict(common.get("extra_state", {})), load_rng, path)


def _restore(
    loaded: dict[str, Any],
    model_chunks: Sequence[torch.nn.Module],
    optimizer: Any,
    scheduler: Any,
    *,
    load_optim: bool,
    load_rng: bool,
) -> None:
    for name, chunk in zip(_chunk_names(model_chunks), model_chunks):
        _load_model(unwrap(chunk), loaded[name])
    if optimizer is not None and load_optim:
        _load_optimizer(optimizer, loaded["optimizer"])
    elif optimizer is not None:
        optimizer.reload_model_params()  # fp32 main parameters follow the loaded weights
    if scheduler is not None and load_optim:
        if "opt_param_scheduler" not in loaded:
            raise CheckpointError("the checkpoint holds no learning rate schedule: give --no-load-optim")
        scheduler.num_steps = 0  # mcore adds the saved steps to those already counted
        scheduler.load_state_dict(loaded["opt_param_scheduler"])
    if load_rng:
        _set_rng_state(loaded[_RNG_KEY])


def read_config(store: CheckpointStore, iteration: int) -> dict[str, Any]:
    """config.json of a published checkpoint. Needs no process group. Raises CheckpointError when there is none."""
    path = store.path(iteration) / CONFIG_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable configuration: {error}") from error


# ---------------------------------------------------------------------- states


def _content_metadata(optimizer: Any, optim_sharding: str | None) -> dict[str, Any]:
    """Metadata that steers `sharded_state_dict` of mcore's modules and optimizers; stored in the checkpoint."""
    metadata: dict[str, Any] = {
        # Every layer has its own keys: layers with and without memory differ.
        "non_homogeneous_layers": True,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    if any(isinstance(part, DistributedOptimizer) for part in _optimizer_parts(optimizer)):
        if optim_sharding is None:
            raise CheckpointError(
                "the checkpoint was saved without --use-distributed-optimizer: load it without, or give --no-load-optim"
            )
        metadata["distrib_optim_sharding_type"] = optim_sharding
    return metadata


def _sharded_state(
    model_chunks: Sequence[torch.nn.Module], optimizer: Any, metadata: dict[str, Any], *, is_loading: bool
) -> ShardedStateDict:
    state: ShardedStateDict = {}
    for name, chunk in zip(_chunk_names(model_chunks), model_chunks):
        state[name] = unwrap(chunk).sharded_state_dict(metadata=metadata)
    if optimizer is not None:
        for part in _optimizer_parts(optimizer):
            _allocate_moments(part)
        state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    return state


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


def _check_layout(saved: dict[str, int], path: Path) -> None:
    """Gradient buffers of another layout may have equal sizes by chance; their moments must not be mixed up."""
    for name, size in _layout().items():
        if name not in ("world", "context") and saved.get(name) != size:
            raise CheckpointError(
                f"{path} was saved with {name} parallel size {saved.get(name)} and dp_reshardable optimizer shards, "
                f"but this run has {size}: resume with the size it was saved with, save as fully_reshardable, or give "
                "--no-load-optim"
            )


def _chunk_names(model_chunks: Sequence[torch.nn.Module]) -> list[str]:
    """Megatron-LM's names: "model", or "model0", "model1" ... with virtual pipeline stages."""
    return ["model"] if len(model_chunks) == 1 else [f"model{i}" for i in range(len(model_chunks))]


def _load_model(model: torch.nn.Module, state: dict[str, Any]) -> None:
    """Strict but for Transformer Engine's extra states: one that the checkpoint lacks stays the module's own."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [key for key in missing if not is_extra_state(key)]
    if missing or unexpected:
        raise CheckpointError(f"the loaded state lacks {missing} and holds unexpected {unexpected}")


def _optimizer_parts(optimizer: Any) -> list[Any]:
    if optimizer is None:
        return []
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _has_step_tensors(part: Any) -> bool:
    """torch's own Adam keeps a step count per parameter; the fused ones of TE and Apex keep it in the group."""
    return isinstance(part.optimizer, (torch.optim.Adam, torch.optim.AdamW))


def _allocate_moments(part: Any) -> None:
    """Give torch's Adam the state it has before its first step, so that saving and loading then work as later.

    mcore's distributed optimizer (distrib_optimizer.py `state_dict`) asserts that a step count exists; its own remedy,
    a step with zero gradients, would decay the weights.
    """
    if not _has_step_tensors(part):
        return
    for group in part.optimizer.param_groups:
        for param in group["params"]:
            if not part.optimizer.state[param]:
                part.optimizer.state[param] = {
                    "step": torch.tensor(0.0, dtype=torch.float32),
                    "exp_avg": torch.zeros_like(param),
                    "exp_avg_sq": torch.zeros_like(param),
                }


@torch.no_grad()  # fp32 main parameters are views of the model's parameters
def _load_optimizer(optimizer: Any, state: Any) -> None:
    parts = _optimizer_parts(optimizer)
    states = [state] if len(parts) == 1 else [state[index] for index in range(len(parts))]
    for part, part_state in zip(parts, states):
        if _has_step_tensors(part):
            if isinstance(part, DistributedOptimizer):
                _load_distributed_adam(part, part_state)
                continue
            # mcore leaves out a step count of 0, and torch's Adam wants one.
            part_state.get("optimizer", part_state)["state"].setdefault("common_step", torch.tensor(0.0))
        part.load_state_dict(part_state)


def _load_distributed_adam(part: Any, state: dict[str, Any]) -> None:
    """Load in two halves, and keep the step counts out of the second.

    mcore 0.16.1 with torch's Adam makes all parameters share one step tensor (which then counts every parameter's
    update), and with the moments it puts back the step from before the load (dp_reshardable) or misses it
    (fully_reshardable).
    """
    kind, moments = state.pop("param_state_sharding_type"), state.pop("param_state")
    part.load_state_dict(state)
    steps = {param: entry.pop("step") for param, entry in part.optimizer.state.items()}
    if kind == "fully_reshardable":
        part.load_parameter_state_from_fully_reshardable(moments)
    else:
        part.load_parameter_state_from_dp_reshardable(moments)
    for param, step in steps.items():
        part.optimizer.state[param]["step"] = step.clone()


def _sharded_rng_state() -> ShardedObject:
    """Random states of this rank. Only tensors and plain numbers, so that `weights_only=True` can read them."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    assert name == "MT19937"
    state = {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "device": cpu_platform.get_device_rng_state(),
        "tracker": dict(tensor_parallel.get_cuda_rng_tracker().get_states()),
    }
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    return ShardedObject(_RNG_KEY, state, (world,), (rank,), replica_id=0)


def _set_rng_state(state: dict[str, Any]) -> None:
    version, words, gauss_next = state["python"]
    random.setstate((version, tuple(words), gauss_next))
    keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
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
