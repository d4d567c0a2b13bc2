"""Megatron-Core on a machine without a CUDA device.

mcore 0.16.1 is written for CUDA: it names the device in literals (``device="cuda"``), passes
``torch.cuda.current_device()`` as a device, compares ``Tensor.type()`` with ``"torch.cuda.FloatTensor"``, and so on.
``install()`` bridges that when there is no CUDA device; where there is one it makes only the repairs that every machine
needs (`mcore_repairs.py`).

How: the modules of mcore, and only they, see another ``torch``. ``install()`` gives every ``megatron.core.*`` module
(those loaded already, and by an import hook those loaded later) a view of torch in which device "cuda" means "cpu" and
``torch.cuda`` answers for the CPU. The real ``torch`` stays as it is: ``torch.cuda.is_available()`` says False to
everybody. What a view cannot reach is patched one by one below, each with the line of mcore 0.16.1 that needs it. The
one global change is ``torch.Tensor.cuda``, which returns the tensor instead of raising.

The functions after ``install`` (``device``, ``backend``, ``synchronize``, ``memory_allocated`` ...) are what the rest
of the package calls, so that nothing else branches on CPU or GPU.

Inside ``shapes_only()`` the stand-in for CUDA is torch's meta device: models, gradient buffers and optimizers are built
with their shapes but without memory, by mcore's own code. A dry run uses it, with or without a CUDA device.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import psutil
import torch

from umv2_megatron.config.usage import UsageError
from umv2_megatron.parallel import mcore_repairs
from umv2_megatron.parallel.huge_pages import use_huge_pages

_CPU = torch.device("cpu")
_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"


# ---------------------------------------------------------------------------------------------------------------------
# What the rest of the package calls
# ---------------------------------------------------------------------------------------------------------------------


def install(ignore_cuda: bool = False) -> None:
    """Repair mcore 0.16.1 (`mcore_repairs.py`), and where there is no CUDA device bridge it. Safe to call again.

    Call it before the first process group or model is made; before or after ``import megatron.core``. Before is
    quicker (about 1.5 s), because mcore then does not load torch's compiler.

    Args:
        ignore_cuda: bridge also where there is a CUDA device, for a process that will only build shapes.
    """
    mcore_repairs.install()
    if (torch.cuda.is_available() and not ignore_cuda) or _installed():
        return
    # Without CUDA there is neither Apex nor Transformer Engine; saying so once per module and rank helps nobody.
    for message in ("Apex is not installed", "Transformer Engine and Apex are not installed"):
        warnings.filterwarnings("ignore", message=message)
    use_huge_pages()
    # tensor_parallel/data.py:84, language_module.py:244, exchange_utils.py:336: `tensor.cuda()`.
    torch.Tensor.cuda = _stay_here  # type: ignore[assignment, method-assign]
    mcore_repairs.change_modules(_bridge)


def _installed() -> bool:
    return mcore_repairs.is_changed_by(_bridge)


def device() -> torch.device:
    """The device of this rank: its current CUDA device, or the CPU; the meta device inside ``shapes_only``."""
    if builds_shapes_only():
        return torch.device("meta")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return _CPU


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Inside, what this process builds has shapes and no memory; ``install`` must have bridged mcore."""
    assert _installed(), "install(ignore_cuda=True) comes first"
    functions = _functions_that_check_types()
    codes = [function.__code__ for function in functions]
    for function in functions:
        _accept_types(function, "torch.meta.")
    try:
        with torch.device("meta"):
            yield
    finally:
        for function, code in zip(functions, codes):
            function.__code__ = code


def builds_shapes_only() -> bool:
    """Whether tensors are made on the meta device now, so that there are no values to start, to send or to read."""
    return torch.get_default_device().type == "meta"


def backend() -> str:
    """The torch.distributed backend of this platform: "nccl" or "gloo"."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def set_device(local_rank: int, may_be_bound: bool = False) -> None:
    """Choose this process's CUDA device by its rank on the host; nothing to do on CPU.

    Args:
        may_be_bound: the launcher may show each rank only its own device (``srun --gpus-per-task=1``): where one
            device is visible, take it whatever the rank.

    Raises:
        ValueError: more ranks on this host than CUDA devices.
    """
    if not torch.cuda.is_available():
        return
    count = torch.cuda.device_count()
    if may_be_bound and count == 1:
        local_rank = 0
    if local_rank >= count:
        raise ValueError(
            f"local rank {local_rank} has no CUDA device: this host has {count}; start at most {count} ranks per host."
        )
    torch.cuda.set_device(local_rank)


def start_kernels_in_order() -> None:
    """Have the device start kernels in the order in which they are given to it; nothing to do on CPU.

    mcore overlaps exchanges of tensor and context parallelism with products by the order in which it launches them,
    which holds with one connection between host and device. Blackwell (compute capability 10) does without. The CUDA
    driver reads the variable when this process first uses the device, so call it before.

    Raises:
        UsageError: CUDA_DEVICE_MAX_CONNECTIONS has another value.
    """
    if not torch.cuda.is_available():
        return
    connections = os.environ.setdefault(_CONNECTIONS, "1")
    if connections != "1" and torch.cuda.get_device_capability() < (10, 0):
        raise UsageError(
            f"{_CONNECTIONS} is {connections!r}; expected 1 with --tensor-model-parallel-size or "
            "--context-parallel-size above 1 on this GPU; unset the variable"
        )


def synchronize() -> None:
    """Wait until the device has done all the work given to it (the CPU always has)."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def mark() -> Any:
    """A point in the work given to the device (its current stream), or in time on a CPU; see ``milliseconds``."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(begin: Any, end: Any) -> float:
    """From one ``mark`` to a later one; ``synchronize`` must have been called after both."""
    return (end - begin) * 1000 if isinstance(begin, float) else begin.elapsed_time(end)


def memory_allocated() -> int:
    """Bytes in use now: allocated on the CUDA device, or resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss


def max_memory_allocated() -> int:
    """Largest number of bytes in use so far: on the CUDA device, or resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def empty_cache() -> None:
    """Give cached device memory back; nothing to do on CPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def get_device_rng_state() -> torch.Tensor:
    """State (uint8) of the generator that dropout on ``device()`` draws from; on CPU torch's default generator."""
    return torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.get_rng_state()


def set_device_rng_state(state: torch.Tensor) -> None:
    """Set the generator that dropout on ``device()`` draws from to ``state`` (from ``get_device_rng_state``)."""
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state.cpu())
    else:
        torch.set_rng_state(state.cpu())


# ---------------------------------------------------------------------------------------------------------------------
# The torch that mcore sees
# ---------------------------------------------------------------------------------------------------------------------

# Functions that mcore calls with device="cuda", e.g. schedules.py:596, optimizer.py:473, clip_grads.py:103,
# transformer/utils.py:35, exchange_utils.py:104.
_FACTORIES = (
    *("tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "linspace", "eye"),
    *("rand", "randn", "randint", "randperm"),
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"),
)


def _stand_in() -> torch.device:
    """Where mcore's CUDA tensors go."""
    return torch.device("meta") if builds_shapes_only() else _CPU


def _on_stand_in(factory: Callable[..., Any]) -> Callable[..., Any]:
    """``factory`` with a CUDA ``device`` read as the one that stands for it, and no pinned memory."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = _stand_in()
        kwargs.pop("pin_memory", None)  # utils.py:2117: pinning needs CUDA
        return factory(*args, **kwargs)

    return make


def _stay_here(tensor: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
    """``Tensor.cuda()`` without CUDA: the tensor is already where the work is done."""
    return tensor


class _Stream:
    """Stands for ``torch.cuda.Stream`` and ``torch.cuda.Event``: CPU work is done when the call returns."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_exc: Any) -> None:
        pass

    def record_event(self, _event: Any = None) -> _Stream:
        return self

    def query(self) -> bool:
        return True

    def _nothing(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    wait = wait_stream = wait_event = synchronize = record = _nothing


def _view_of(module: ModuleType, **changes: Any) -> ModuleType:
    """A module with all names of ``module`` (also those it gains later), except for ``changes``."""
    view = ModuleType(module.__name__, module.__doc__)
    view.__dict__.update(vars(module))
    view.__dict__.update(changes, __getattr__=functools.partial(getattr, module))
    return view


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """For calls that mean nothing on CPU."""


def _autocast(device_type: str, *args: Any, **kwargs: Any) -> torch.autocast:
    """schedules.py:418: ``torch.autocast("cuda", ...)``."""
    return torch.autocast("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


@functools.cache
def _torch_for_mcore() -> ModuleType:
    """The view of torch that mcore modules get under the name ``torch``."""
    cuda = _view_of(
        torch.cuda,
        # p2p_communication.py:313, param_and_grad_buffer.py:783, layers.py:261, mappings.py:91: used as `device=`.
        current_device=_stand_in,
        # async_utils.py:488: `rank % torch.cuda.device_count()`.
        device_count=lambda: 1,
        set_device=_nothing,
        # timers.py:152, p2p_communication.py:242, fully_parallel.py:272, filesystem_async.py:230.
        synchronize=_nothing,
        # optimizer.py:362, transformer/mlp.py:346.
        empty_cache=_nothing,
        # tensor_parallel/random.py:235 and 422, rerun_state_machine.py:957: dropout on CPU draws from the CPU state.
        get_rng_state=lambda *_args, **_kwargs: torch.get_rng_state(),
        set_rng_state=lambda state, *_args, **_kwargs: torch.set_rng_state(state),
        manual_seed=torch.manual_seed,
        # distributed_data_parallel.py:230, param_and_grad_buffer.py:417, shared_experts.py:123.
        Stream=_Stream,
        Event=_Stream,
        current_stream=_Stream,
        default_stream=_Stream,
        set_stream=_nothing,
        stream=lambda _stream: contextlib.nullcontext(),
        # utils.py:2186, pipeline_parallel/utils.py:212.
        nvtx=_view_of(torch.cuda.nvtx, range_push=_nothing, range_pop=_nothing),
    )
    factories = {name: _on_stand_in(getattr(torch, name)) for name in _FACTORIES}
    return _view_of(torch, cuda=cuda, autocast=_autocast, **factories)


# ---------------------------------------------------------------------------------------------------------------------
# Patches of single mcore modules: what a view of torch cannot reach
# ---------------------------------------------------------------------------------------------------------------------


def _bridge_jit(module: ModuleType) -> None:
    """jit.py:21: torch.compile of small fusions costs more (a C++ compiler, seconds per process) than it gives."""
    module.disable_jit_fuser()


def _bridge_random(module: ModuleType) -> None:
    """tensor_parallel/random.py:55 and 74: the CUDA generator's state is read and set below the level of torch.cuda."""
    module._get_cuda_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()  # type: ignore[attr-defined]
    module._set_cuda_rng_state = lambda state, *_args, **_kwargs: torch.set_rng_state(state)  # type: ignore[attr-defined]
    # random.py:277 warns that the CPU state changed inside fork(); here that is the state fork() is about.
    logging.getLogger(module.__name__).addFilter(lambda record: "CPU RNG state changed" not in str(record.msg))


def _bridge_dispatcher(module: ModuleType) -> None:
    """token_dispatcher.py:879: split sizes become numpy arrays only if they are on CUDA; gloo takes no tensors."""
    move = module.maybe_move_tensor_to_cpu

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        moved = move(tensor, as_numpy, record_stream)
        return moved.numpy() if as_numpy and torch.is_tensor(moved) else moved

    module.maybe_move_tensor_to_cpu = to_host  # type: ignore[attr-defined]


def _bridge_optimizer(module: ModuleType) -> None:
    """optimizer.py:671 and 690."""
    _accept_types(module.Float16OptimizerWithFloat16Params.__init__)


def _bridge_distributed_optimizer(module: ModuleType) -> None:
    """distrib_optimizer.py:361, 420 and 582. What loading into torch's AdamW needs is in checkpoint/save_load.py."""
    _accept_types(module.DistributedOptimizer.__init__)
    _accept_types(module.DistributedOptimizer._build_model_and_main_param_groups.__func__)


def _bridge_clip(module: ModuleType) -> None:
    """clip_grads.py:167; and utils.py:1215, which makes a copy of every gradient, a value table's too, to scale it."""
    _accept_types(module.clip_grad_by_total_norm_fp32)

    def scale(_chunk: int, _flag: torch.Tensor, tensors: list[list[torch.Tensor]], factor: Any) -> None:
        for source, target in zip(*tensors):
            torch.mul(source, factor, out=target)

    if module.multi_tensor_scale_impl.__name__ == "local_multi_tensor_scale":
        module.multi_tensor_scale_impl = scale  # type: ignore[attr-defined]


def _functions_that_check_types() -> list[FunctionType]:
    """Those that building an optimizer runs through."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

    return [
        Float16OptimizerWithFloat16Params.__init__,
        DistributedOptimizer.__init__,
        DistributedOptimizer._build_model_and_main_param_groups.__func__,
    ]


def _accept_types(function: FunctionType, prefix: str = "torch.") -> None:
    """Let ``function`` compare ``Tensor.type()`` with ``prefix`` + "FloatTensor" where it says "torch.cuda.FloatTensor"
    (or already "torch.FloatTensor"); likewise for the other types."""

    def translate(constant: Any) -> Any:
        if isinstance(constant, str):
            return re.sub(r"torch\.(cuda\.)?(?=[A-Z]\w*Tensor\b)", prefix, constant)
        if isinstance(constant, tuple):
            return tuple(translate(item) for item in constant)
        if isinstance(constant, CodeType):
            return constant.replace(co_consts=translate(constant.co_consts))
        return constant

    function.__code__ = translate(function.__code__)


_PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "megatron.core.jit": _bridge_jit,
    "megatron.core.tensor_parallel.random": _bridge_random,
    "megatron.core.transformer.moe.token_dispatcher": _bridge_dispatcher,
    "megatron.core.optimizer.optimizer": _bridge_optimizer,
    "megatron.core.optimizer.distrib_optimizer": _bridge_distributed_optimizer,
    "megatron.core.optimizer.clip_grads": _bridge_clip,
}


def _bridge(module: ModuleType) -> None:
    """Give one loaded mcore module its view of torch and its patches."""
    names = vars(module)
    if names.get("torch") is torch:
        names["torch"] = _torch_for_mcore()
    for holder in [module, *(item for item in names.values() if isinstance(item, type))]:
        if getattr(holder, "__module__", module.__name__) != module.__name__:
            continue
        for name, item in list(vars(holder).items()):
            # Only where mcore was loaded before install(): take torch.compile off again, see _bridge_jit.
            if hasattr(item, "_torchdynamo_orig_callable"):
                setattr(holder, name, item._torchdynamo_orig_callable)
    if module.__name__ in _PATCHES:
        _PATCHES[module.__name__](module)
