"""CUDA_DEVICE_MAX_CONNECTIONS: set where tensor or context parallelism wants it, refused where it has another value."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from umv2_megatron.config.usage import UsageError
from umv2_megatron.parallel import cpu_platform, launch
from umv2_megatron.training import initialize

NAME = "CUDA_DEVICE_MAX_CONNECTIONS"
EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


class Joined(Exception):
    """The process group would be joined now."""


def started(monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
    """``start_processes`` of a run of these sizes until it joins a process group."""

    def join(minutes: Any) -> None:
        raise Joined

    monkeypatch.setattr(launch, "initialize_process_group", join)
    run: Any = SimpleNamespace(
        tensor_model_parallel_size=1, context_parallel_size=1, deterministic_mode=False,
        training=SimpleNamespace(distributed_timeout_minutes=1),
    )  # fmt: skip
    vars(run).update(sizes)
    with pytest.raises(Joined):
        initialize.start_processes(run)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Hopper that no process has used; its capability may be changed."""
    monkeypatch.setenv(NAME, "")  # so that it is put back, whatever the code sets
    monkeypatch.delenv(NAME)
    made = SimpleNamespace(is_available=lambda: True, capability=(9, 0))
    made.get_device_capability = lambda: made.capability
    monkeypatch.setattr(cpu_platform.torch, "cuda", made)
    return made


@pytest.mark.parametrize("sizes", [{"tensor_model_parallel_size": 2}, {"context_parallel_size": 2}])
def test_it_is_set_and_another_value_is_refused(
    sizes: dict[str, int], gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(monkeypatch, **sizes)
    assert cpu_platform.os.environ[NAME] == "1"
    started(monkeypatch, **sizes)
    monkeypatch.setenv(NAME, "32")
    with pytest.raises(UsageError, match=f"^{NAME} is '32'; expected 1 with .*; unset the variable$"):
        started(monkeypatch, **sizes)
    gpu.capability = (10, 0)
    started(monkeypatch, **sizes)
    assert cpu_platform.os.environ[NAME] == "32"


def test_it_is_left_alone_without_such_ranks_and_without_a_gpu(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    started(monkeypatch)
    gpu.is_available = lambda: False
    started(monkeypatch, tensor_model_parallel_size=2)
    assert NAME not in cpu_platform.os.environ
    assert not torch.distributed.is_initialized()


def test_examples_with_such_ranks_set_it() -> None:
    for script in EXAMPLES.glob("*.sh"):
        text = script.read_text(encoding="utf-8")
        splits = re.search(r"--(tensor-model|context)-parallel-size (?!1\b)", text.split("ARGS=(")[1])
        assert bool(splits) == (f"export {NAME}=" in text), script.name
