"""The random states of a rank as an object of a checkpoint."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel.random import convert_cuda_rng_state, is_graph_safe_cuda_rng_tracker

from umv2_megatron.parallel import cpu_platform

RNG_KEY = "rng_state"


def sharded_rng_state() -> ShardedObject:
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
    return ShardedObject(RNG_KEY, state, (world,), (rank,), replica_id=0)


def set_rng_state(state: dict[str, Any]) -> None:
    """Go on with what ``sharded_rng_state`` of a rank holds."""
    version, words, gauss_next = state["python"]
    random.setstate((version, tuple(words), gauss_next))
    keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    tracker = tensor_parallel.get_cuda_rng_tracker()
    in_graphs = is_graph_safe_cuda_rng_tracker(tracker)
    tracker.set_states({name: convert_cuda_rng_state(kept, in_graphs) for name, kept in state["tracker"].items()})
    cpu_platform.set_device_rng_state(state["device"])
    torch.set_rng_state(state["torch"])
