"""A training step on a device that is not there, to find where the host would wait for it.

    python tests/unit/training/fake_device.py '{"bf16": true, "num_layers": 3}' '{"memory_tucker_rank": 3}'

Tensors are torch's fake ones: shapes, dtypes and a device, no numbers. The device is torch's slot for other people's
backends (PrivateUse1), called "gpu" here, because autograd of a torch without CUDA refuses fake CUDA tensors. What is
named "cuda" in mcore and in our code goes there by the bridge that a CPU run uses. Collectives do nothing.

Each argument is a run, in a process of its own: flags of the model, and "world" ranks, "planted" for a wait in every
search, "value" for what every number of a list is read as, "order" to be told the order of reads, of exchanges of
sharded tables and of FFNs beside memory layers in the last step. Prints a line of JSON for each: for each step the
waits, with the kind and the place in our code or mcore's, or under "error" why it ended:

    read     numbers are read on the host: item, tolist, float(), bool()
    sizes    an operation whose result's size depends on numbers: nonzero, a boolean index, unique
    copy     a copy to or from the device that is not asynchronous, such as that of a list
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

warnings.filterwarnings("ignore")
DEVICE = "gpu:0"
ATEN = torch.ops.aten
_SIZES = (ATEN.nonzero.default, ATEN.masked_select.default, ATEN._unique2.default, ATEN.bincount.default,
          ATEN.repeat_interleave.Tensor)  # fmt: skip
_ROOT = str(Path(__file__).resolve().parents[3])


class _Backend:
    """What torch asks of the module of a backend."""

    is_initialized = is_available = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    manual_seed_all = staticmethod(lambda seed: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])


class _Done:
    def wait(self, *_: Any) -> bool:
        return True


class Watch(TorchDispatchMode):
    """Writes down every wait; a number that is read is 1, or ``value`` in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.value = 1
        self.waits: list[tuple[str, str]] = []
        self.order: list[str] = []

    def note(self, kind: str) -> None:
        """A wait, at the innermost place in our code or mcore's."""
        frames = [f"{frame.filename.removeprefix(_ROOT + '/')}:{frame.lineno}" for frame in traceback.extract_stack()
                  if "umv2_megatron/" in frame.filename or "megatron/core" in frame.filename
                  or "torch/optim" in frame.filename]  # fmt: skip
        self.order.append(kind)
        self.waits.append((kind, frames[-1].rpartition("site-packages/")[2] if frames else "?"))

    def tolist(self, tensor: torch.Tensor) -> Any:
        """One read, however many numbers."""
        self.note("read")
        return _nested(tensor.shape, tensor.dtype == torch.bool or self.value)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is ATEN._local_scalar_dense.default:
            if args[0].device.type != "cpu":
                self.note("read")
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].dtype.is_floating_point else 1)
        by_mask = func is ATEN.index.Tensor and any(each is not None and each.dtype == torch.bool for each in args[1])
        if by_mask or (func in _SIZES and kwargs.get("output_size") is None):
            self.note("sizes")
        result = func(*args, **kwargs)
        if func in (ATEN._to_copy.default, ATEN.copy_.default):
            source = args[0] if func is ATEN._to_copy.default else args[1]
            asynchronous = kwargs.get("non_blocking") or (func is ATEN.copy_.default and len(args) > 2 and args[2])
            if result.device != source.device and not asynchronous:
                self.note("copy")
        return result


def _nested(shape: Any, value: Any) -> Any:
    return [_nested(shape[1:], value) for _ in range(shape[0])] if shape else value


def pretend(watch: Watch) -> None:
    """Make the device, and what torch cannot do with fake tensors; before mcore is imported."""
    from umv2_megatron.parallel import cpu_platform

    _setup_privateuseone_for_python_backend("gpu", _Backend)
    make, new_group = torch.tensor, torch.distributed.new_group

    def tensor(data: Any, *arguments: Any, device: Any = None, **named: Any) -> torch.Tensor:
        made = make(data, *arguments, **named)
        made.constant = None  # or torch would compute with the numbers, on a device that cannot
        return made if device is None or torch.device(device).type == "cpu" else made.to(torch.device(device))

    def apply(module: torch.nn.Module, change: Any, recurse: bool = True) -> torch.nn.Module:
        for child in module.children() if recurse else ():
            child._apply(change)
        for name, old in module._parameters.items():
            if old is not None:
                new = torch.nn.Parameter(change(old.detach()))
                vars(new).update({key: value for key, value in vars(old).items() if key not in vars(new)})
                module._parameters[name] = new
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else change(buffer)
        return module

    def all_gather_object(everything: list[Any], one: Any, group: Any = None) -> None:
        everything[:] = [one] * len(everything)

    torch.tensor = tensor
    torch.nn.Module._apply = apply
    FakeTensor.tolist = lambda tensor: watch.tolist(tensor)
    torch.distributed.all_gather_object = all_gather_object
    torch.distributed.new_group = lambda *arguments, **named: new_group(*arguments, **{**named, "backend": "fake"})
    for name in ("all_reduce", "broadcast", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single",
                 "all_gather_single", "reduce_scatter_single", "all_gather", "barrier"):  # fmt: skip
        setattr(torch.distributed, name, lambda *_, **__: _Done())
    cpu_platform._CPU = torch.device(DEVICE)
    cpu_platform._accept_types.__defaults__ = ("torch.gpu.",)
    cpu_platform.install()
    torch.Tensor.cuda = lambda tensor, *_, non_blocking=False, **__: tensor.to(DEVICE, non_blocking=non_blocking)


def build(changes: dict[str, Any], world: int) -> tuple[Any, Any]:
    """Run and training state of a tiny model."""
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator

    from umv2_megatron.config.flags import read_mapping
    from umv2_megatron.config.presets import PRESETS
    from umv2_megatron.config.resolve import from_layers
    from umv2_megatron.memory import layer
    from umv2_megatron.training import step
    from umv2_megatron.training.initialize import build_training_state, make_groups, seed_everything

    layer.initialize_layer = lambda *_, **__: None  # it computes numbers
    flags = {
        "num_layers": 2,
        "seq_length": 16,
        "max_position_embeddings": 16,
        "vocab_size": 256,
        "micro_batch_size": 1,
        "global_batch_size": 2 * world,
        "train_iters": 10,
        "lr": 1e-2,
        **changes,
    }
    layers = [("preset", PRESETS["umv2-tiny"].flags()), ("flag", flags)]
    run = from_layers([(name, read_mapping(values, name)) for name, values in layers], world, for_training=False)
    make_groups(run)
    init_num_microbatches_calculator(
        0, None, run.global_batch_size, run.training.micro_batch_size, run.data_parallel_size
    )
    seed_everything(run.training.seed)
    state = build_training_state(run, run.values["vocab_size"])
    step.connect(run, state.chunks, state.optimizer)
    return run, state


def feed(run: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches that are on the device already."""
    shape = (run.training.micro_batch_size, run.model.seq_length)
    while True:
        tokens = torch.zeros(shape, dtype=torch.long, device=DEVICE)
        mask = torch.ones(shape, device=DEVICE)
        yield {"tokens": tokens, "labels": tokens, "position_ids": tokens, "loss_mask": mask}


def run_steps(changes: dict[str, Any], watch: Watch) -> dict[str, Any]:
    """Two steps of a run with ``changes``, and what they waited for."""
    from umv2_megatron.training import health, step

    world, planted, watch.value = changes.pop("world", 1), changes.pop("planted", None), changes.pop("value", 1)
    ordered = changes.pop("order", False)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    with FakeTensorMode(allow_non_fake_inputs=True), watch:
        run, state = build(changes, world)
        if run.has_memory:
            health.start_counting(state.chunks)
        if planted is not None:
            _plant(planted)
        if ordered:
            _note_order(state.chunks, watch)
        steps, batches = [], feed(run)
        for _ in range(2):
            watch.waits.clear()
            watch.order.clear()
            step.train_step(run, state.chunks, state.optimizer, state.scheduler, batches)
            steps.append(list(watch.waits))
    devices = {str(parameter.device) for chunk in state.chunks for parameter in chunk.parameters()}
    return {
        "steps": steps,
        "order": watch.order if ordered else [],
        "devices": sorted(devices),
        "micro_batches": run.num_microbatches,
        "layers": run.values["num_layers"],
    }


def main(runs: list[str]) -> None:
    """Each run in a fork, which has the imports."""
    watch = Watch()
    pretend(watch)
    from umv2_megatron.training import health, initialize, step  # noqa: F401

    for changes in runs:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            try:
                told = run_steps(json.loads(changes), watch)
            except Exception:
                told = {"error": traceback.format_exc()}
            print(json.dumps(told), flush=True)
            os._exit(0)
        os.waitpid(child, 0)


def _note_order(chunks: list[torch.nn.Module], watch: Watch) -> None:
    """Also write down when exchanges are started and waited for, and when an FFN has been given to the device."""
    from umv2_megatron.model.ffn_with_memory import FFNWithMemory
    from umv2_megatron.parallel.exchange import Exchange, Pending

    start, wait = Exchange._count, Pending.wait

    def started(exchange: Exchange, step: str, count: int) -> None:
        watch.order.append(f"start {step}")
        start(exchange, step, count)

    def waited(pending: Pending) -> torch.Tensor:
        watch.order.append(f"wait {pending._step}")
        return wait(pending)

    Exchange._count, Pending.wait = started, waited
    for slot in (module for chunk in chunks for module in chunk.modules() if isinstance(module, FFNWithMemory)):
        slot.ffn.register_forward_hook(lambda *_: watch.order.append("ffn"))
        slot.ffn.register_full_backward_hook(lambda *_: watch.order.append("ffn backward"))


def _plant(kinds: list[str]) -> None:
    """A wait of each kind in every search, to see that it is found."""
    from umv2_megatron.memory.retrieval import Retrieval

    key_scores = Retrieval.key_scores
    waits = {
        "read": lambda scores: scores.sum().item(),
        "bool": lambda scores: bool(scores.any()),
        "tolist": lambda scores: scores.flatten()[:3].tolist(),
        "sizes": lambda scores: scores.flatten()[:3].nonzero(),
        "mask": lambda scores: scores[scores > 0],
        "host": lambda scores: scores.cpu(),
        "list": lambda scores: torch.tensor([1, 2], device=scores.device),
    }

    def with_wait(self: Any, x: torch.Tensor, **settings: Any) -> torch.Tensor:
        scores = key_scores(self, x, **settings)
        for kind in kinds:
            waits[kind](scores.detach())
        return scores

    Retrieval.key_scores = with_wait


if __name__ == "__main__":
    main(sys.argv[1:])
