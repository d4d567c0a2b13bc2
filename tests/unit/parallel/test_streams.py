"""The second stream, with a recorder in the place of CUDA: who waits for whom and when, in forward, backward and
recompute, and that the gradients of tables are complete before anybody is told that they are.

Operations are recorded with the stream they were given to, backward ones with the stream of their forward, as autograd
does it on a GPU. ``Recorder.ordered`` then says whether one thing surely happens before another on a device that knows
nothing but the order within a stream and the waits. tests/gpu/test_streams_on_a_gpu.py has the same on a GPU.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

from umv2_megatron.parallel import cpu_platform, streams

cpu_platform.install()

from umv2_megatron.config.resolve import resolve  # noqa: E402
from umv2_megatron.model.ffn_with_memory import FFNWithMemory  # noqa: E402
from umv2_megatron.model.layer_specs import umv2_layer_spec  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "distributed"))
from harness import run_ranks  # noqa: E402


class Recorder:
    """``streams.Streams`` on a CPU. Events are (stream, name); waits are events, too."""

    def __init__(self) -> None:
        self.now = "main"
        self.events: list[tuple[str, str]] = []
        self.waits: list[tuple[int, str]] = []
        self.kept: list[tuple[int, str]] = []

    def create(self) -> str:
        return "side"

    def current(self) -> str:
        return self.now

    @contextlib.contextmanager
    def use(self, stream: str) -> Iterator[None]:
        before, self.now = self.now, stream
        yield
        self.now = before

    def wait(self, waiting: str, awaited: str) -> None:
        self.waits.append((len(self.events), awaited))
        self.events.append((waiting, f"wait for {awaited}"))

    def keep(self, tensor: Tensor, stream: str) -> None:
        self.kept.append((tensor.data_ptr(), stream))

    def note(self, name: str, stream: str | None = None) -> None:
        self.events.append((stream or self.now, name))

    def names(self) -> list[str]:
        return [name for _, name in self.events]

    def ordered(self, first: int, second: int) -> bool:
        """Whether event ``first`` is done on the device before event ``second`` begins."""
        awaited = dict(self.waits)
        # what is known to be done when an event begins: of each stream the events up to a position
        known: list[dict[str, int]] = []
        last: dict[str, int] = {}
        for index, (stream, _) in enumerate(self.events):
            done = dict(known[last[stream]]) if stream in last else {}
            if stream in last:
                done[stream] = last[stream]
            other = awaited.get(index)
            if other is not None and other in last:
                for name, position in {**known[last[other]], other: last[other]}.items():
                    done[name] = max(done.get(name, -1), position)
            known.append(done)
            last[stream] = index
        return known[second].get(self.events[first][0], -1) >= first


class _Work(torch.autograd.Function):
    """An operation on the stream of its forward. ``table`` stands for one whose gradient goes to main_grad."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor | None, name: str, recorder: Recorder) -> Tensor:
        ctx.name, ctx.recorder, ctx.stream, ctx.table = name, recorder, recorder.now, table
        recorder.note(name)
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        if ctx.name == "lookup":  # its gradient comes from the other stream: the engine makes this one wait
            ctx.recorder.wait("side", "main")
        ctx.recorder.note(f"{ctx.name} backward", ctx.stream)
        return grads[0] * 2, None, None, None


def hang_hook(table: Tensor, recorder: Recorder) -> Any:
    """As mcore's DDP does; the hook runs on the main stream, where the accumulator was made."""
    accumulator = table.expand_as(table).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    accumulator.register_hook(lambda *_: recorder.note("table is complete", "main"))
    return accumulator


def block(branch: streams.Branch, recorder: Recorder, x: Tensor, table: Tensor) -> Tensor:
    """The forward of FFNWithMemory with recorded parts."""
    seen = branch.fork(x, [table])
    with branch.beside():
        started = _Work.apply(seen, None, "start", recorder)
    output = _Work.apply(x, None, "ffn", recorder)
    with branch.beside():
        memory = _Work.apply(started, table, "lookup", recorder)
    return _Work.apply(output + branch.join(memory), None, "next block", recorder)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Also records the fork's backward, for which autograd makes the main stream wait for x's gradient."""
    recorder = Recorder()
    backward = streams._Fork.backward

    def recorded(ctx: Any, *grads: Tensor) -> tuple:
        recorder.wait("main", "side")
        recorder.note("fork backward", "main")
        return backward(ctx, *grads)

    monkeypatch.setattr(streams._Fork, "backward", staticmethod(recorded))
    return recorder


def test_order_of_forward_and_backward(recorder: Recorder) -> None:
    x, table = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    accumulator = hang_hook(table, recorder)
    recorder.note("x is written")
    block(streams.SideStream(recorder), recorder, x, table).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 12.0))  # 2 * (2 + 2 * 2)
    at = {name: index for index, name in enumerate(recorder.names())}
    assert [recorder.events[at[name]][0] for name in ("start", "ffn", "lookup", "next block")] == [
        "side", "main", "side", "main",
    ]  # fmt: skip
    assert recorder.ordered(at["x is written"], at["start"])
    assert recorder.ordered(at["lookup"], at["next block"])
    for first, second in (("start", "ffn"), ("ffn", "start"), ("ffn", "lookup"), ("lookup", "ffn")):
        assert not recorder.ordered(at[first], at[second]), f"{second} waits for {first}"
    backward = ["next block", "lookup", "ffn", "start", "fork"]
    order = [at[f"{name} backward"] for name in backward]
    assert order == sorted(order)
    assert recorder.ordered(at["next block backward"], at["lookup backward"])
    for first, second in (("lookup", "ffn"), ("ffn", "lookup"), ("ffn", "start")):
        assert not recorder.ordered(at[f"{first} backward"], at[f"{second} backward"]), f"{second} waits for {first}"
    assert recorder.ordered(at["lookup backward"], at["table is complete"])
    assert at["fork backward"] < at["table is complete"]
    del accumulator


def test_without_the_fork_the_table_would_be_announced_too_early(recorder: Recorder, monkeypatch) -> None:
    """Were x handed over as it is, the hook would run at once: that the test above can fail."""
    monkeypatch.setattr(streams._Fork, "apply", lambda x, *tables: x.view_as(x))
    x, table = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    accumulator = hang_hook(table, recorder)
    block(streams.SideStream(recorder), recorder, x, table).sum().backward()
    at = {name: index for index, name in enumerate(recorder.names())}
    assert at["table is complete"] < at["ffn backward"]
    assert not recorder.ordered(at["lookup backward"], at["table is complete"])
    del accumulator


def test_a_shared_table_waits_for_every_layer(recorder: Recorder) -> None:
    x, table = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    accumulator = hang_hook(table, recorder)
    branch = streams.SideStream(recorder)
    block(branch, recorder, block(branch, recorder, x, table), table).sum().backward()
    names = recorder.names()
    assert names.count("table is complete") == 1 and names.count("fork backward") == 2
    complete = names.index("table is complete")
    lookups = [index for index, name in enumerate(names) if name == "lookup backward"]
    assert len(lookups) == 2 and all(recorder.ordered(index, complete) for index in lookups)
    del accumulator


def test_recompute(recorder: Recorder) -> None:
    x, table = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    accumulator = hang_hook(table, recorder)
    branch = streams.SideStream(recorder)
    again = torch.utils.checkpoint.checkpoint(block, branch, recorder, x, table, use_reentrant=True)
    forwards = len(recorder.events)
    again.sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 12.0))
    names = recorder.names()
    assert names.count("lookup") == 2 and names[:forwards].count("wait for side") == 1
    assert recorder.ordered(names.index("lookup", forwards), names.index("next block", forwards))
    assert recorder.ordered(names.index("lookup backward"), names.index("table is complete"))
    del accumulator


def test_memory_of_what_crosses_is_kept(recorder: Recorder) -> None:
    branch = streams.SideStream(recorder)
    x = torch.ones(3)
    seen = branch.fork(x, [])
    output = torch.zeros(3)
    assert branch.join(output) is output
    assert recorder.kept == [(x.data_ptr(), "side"), (output.data_ptr(), "main")] and seen.data_ptr() == x.data_ptr()


def test_inline_is_nothing() -> None:
    branch = streams.branch_for(torch.device("cpu"), wanted=True)
    assert branch is streams.INLINE is streams.branch_for(torch.device("cuda", 0), wanted=False)
    x = torch.ones(3, requires_grad=True)
    assert branch.fork(x, [x]) is x and branch.join(x) is x
    with branch.beside():
        pass


def real_slot(*beside: str) -> dict[str, Any]:
    """FFNWithMemory with and without the second stream: results, gradients, and what was recorded. ``beside``: flags of
    an n-gram layer beside the memory layer."""
    from megatron.core import parallel_state, tensor_parallel

    from umv2_megatron.memory.ngrams import contexts

    parallel_state.initialize_model_parallel()
    found: dict[str, Any] = {}
    for stream in (False, True):
        tensor_parallel.model_parallel_cuda_manual_seed(3)
        torch.manual_seed(3)
        flags = ["--model-preset", "umv2-tiny", "--transformer-impl", "local", *(["--memory-stream"] * stream)]
        run = resolve([*flags, *beside], for_training=False)
        config = run.transformer_config()
        spec = umv2_layer_spec(config, run.memory, ngrams=run.ngrams, vocabulary=50).submodules.mlp
        slot = FFNWithMemory(config, spec.submodules, **spec.params)
        slot.set_layer_number(1)
        assert slot.memory is not None and (slot.engram is not None) is bool(beside)
        recorder = Recorder()
        side = streams.SideStream(recorder)
        streams.branch_for = lambda _, wanted, side=side: side if wanted else streams.INLINE  # this process is ours
        accumulators = []
        tables = list(slot.memory.table.named_parameters())
        told = {}
        if slot.engram is not None:
            torch.nn.init.normal_(slot.engram.conv)
            tables.append(("values beside", slot.engram.table.values))
            ids = torch.randint(50, (1, 32), generator=torch.Generator().manual_seed(6))
            told["padding_mask"] = contexts(ids, run.ngrams, 50)
        for name, table in tables:
            table.main_grad = torch.zeros_like(table)
            accumulators.append(table.expand_as(table).grad_fn.next_functions[0][0])
            accumulators[-1].register_hook(lambda *_, name=name, r=recorder: r.note(f"{name} is complete", "main"))
        for part in ("retrieval", "table", "value_proj"):
            getattr(slot.memory, part).register_forward_hook(lambda *_, p=part, r=recorder: r.note(p))
        slot.ffn.register_forward_hook(lambda *_, r=recorder: r.note("ffn"))
        x = torch.randn(32, 1, 64, generator=torch.Generator().manual_seed(5)).requires_grad_()
        output, _ = slot(x, **told)
        output.square().sum().backward()
        gradients = {n: getattr(p, "main_grad", p.grad).clone() for n, p in slot.named_parameters()}
        found[str(stream)] = {"output": output.detach(), "x": x.grad, **gradients}
        found[f"{stream} events"] = recorder.events
    return found


def sorting_slot() -> list[tuple[str, str]]:
    """Where a slot sorts its picks: events of a forward and backward, of an evaluation, and of a recomputed block."""
    from types import SimpleNamespace

    from megatron.core import parallel_state, tensor_parallel

    from umv2_megatron.memory import value_table
    from umv2_megatron.ops import get_backend, scatter, whole_table

    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(3)
    recorder, events = Recorder(), []
    orders: list[Any] = []

    def lookup(*arguments: Any, order: Any) -> Tensor:
        orders.append(order)
        recorder.note("lookup")
        return whole_table.lookup(scatter, *arguments)

    def sort_ahead(rows: Tensor, num_rows: int, order: Any) -> None:
        assert order is orders[-1] and rows.max() < num_rows
        recorder.note("sort")

    # As Triton's, which cannot run here: what it does with a sorted order is tested by its interpreter.
    sorting = SimpleNamespace(lookup=lookup, sort_ahead=sort_ahead)
    value_table.get_backend = lambda *_: sorting
    side = streams.SideStream(recorder)
    for stream in (True, False):
        streams.branch_for = lambda _, wanted: side if wanted else streams.INLINE
        flags = ["--model-preset", "umv2-tiny", "--transformer-impl", "local", *(["--memory-stream"] * stream)]
        run = resolve(flags, for_training=False)
        config = run.transformer_config()
        slot = FFNWithMemory(config, umv2_layer_spec(config, run.memory).submodules.mlp.submodules, run.memory)
        slot.set_layer_number(1)
        recorder.events.clear()
        x = torch.randn(32, 1, 64).requires_grad_()
        slot(x)[0].sum().backward()
        slot(x)
        with torch.no_grad():
            slot(x)
        slot.eval()
        slot(x)
        events.append([event for event in recorder.events if event[1] != "wait for main"])
    assert get_backend("scatter", "cpu").sort_ahead is None
    return events


def test_picks_are_sorted_behind_the_join() -> None:
    """On the side stream, after what the main stream waits for, in training only; without the stream not at all, so
    that the backward does it."""
    beside, inline = run_ranks(1, sorting_slot)[0]
    training = [("side", "lookup"), ("main", "wait for side"), ("side", "sort")]
    assert beside == [*training, *training, *training[:2], *training[:2]]
    assert inline == [("main", "lookup")] * 4


def test_the_real_slot_gives_the_same_bits() -> None:
    found = run_ranks(1, real_slot)[0]
    assert found["True"].keys() == found["False"].keys() and len(found["True"]) > 10
    for name, tensor in found["True"].items():
        assert torch.equal(tensor, found["False"][name]), name
        assert tensor.abs().sum() > 0, name
    assert [event for event in found["True events"] if "complete" not in event[1]] == [
        ("side", "wait for main"),
        ("side", "retrieval"),
        ("main", "ffn"),
        ("side", "table"),
        ("side", "value_proj"),
        ("main", "wait for side"),
    ]
    assert {name for _, name in found["True events"] if "complete" in name} == {
        "values is complete", "pre_values is complete",
    }  # fmt: skip
    assert {stream for stream, _ in found["False events"]} == {"main"}


def test_with_an_ngram_layer_beside_it_too() -> None:
    flags = ("--engram-layer-freq", "1", "--engram-num-heads", "4", "--engram-num-keys", "24")
    found = run_ranks(1, real_slot, *flags)[0]
    assert any(name.startswith("engram.") for name in found["True"])
    for name, tensor in found["True"].items():
        if name == "x":  # the sum of three gradients, those of both layers first where they share a fork
            torch.testing.assert_close(tensor, found["False"][name], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(tensor, found["False"][name]) and tensor.abs().sum() > 0, name
    events = found["True events"]
    assert [name for _, name in events if "complete" in name].count("values beside is complete") == 1
    assert events[0] == ("side", "wait for main") and [name for _, name in events].count("wait for side") == 2


def row_slot() -> dict[str, Any]:
    """A slot whose table is shared out by row over two ranks, without a second stream, with one for the exchanges of
    picks, and with one for the whole branch: results, gradients, and what was recorded."""
    from megatron.core import tensor_parallel

    from umv2_megatron.memory import row_sharded
    from umv2_megatron.parallel import groups
    from umv2_megatron.parallel.exchange import Exchange

    groups.initialize_groups(memory_parallel_size=2)
    found: dict[str, Any] = {}
    count = Exchange._count
    for kind in ("plain", "exchanges", "branch"):
        tensor_parallel.model_parallel_cuda_manual_seed(3)
        torch.manual_seed(3)
        flags = ["--model-preset", "umv2-tiny", "--transformer-impl", "local", "--memory-parallel-size", "2"]
        flags += ["--memory-parallel-mode", "row", *(["--memory-stream"] * (kind == "branch"))]
        run = resolve(flags, world_size=2, for_training=False)
        config = run.transformer_config()
        slot = FFNWithMemory(config, umv2_layer_spec(config, run.memory).submodules.mlp.submodules, run.memory)
        slot.set_layer_number(1)
        assert slot.memory is not None
        recorder = Recorder()
        side = streams.SideStream(recorder) if kind != "plain" else streams.INLINE
        # this process is ours
        streams.branch_for = lambda _, wanted, side=side: side if wanted else streams.INLINE
        row_sharded.sends_late = lambda _, late=kind != "plain": late
        Exchange._count = lambda e, step, n, r=recorder: r.note(step) or count(e, step, n)
        slot.ffn.register_forward_hook(lambda *_, r=recorder: r.note("ffn"))
        for table in slot.memory.table.parameters():
            table.main_grad = torch.zeros_like(table)
        x = torch.randn(32, 1, 64, generator=torch.Generator().manual_seed(5)).requires_grad_()
        output, _ = slot(x)
        forward = list(recorder.events)
        output.square().sum().backward()
        gradients = {n: getattr(p, "main_grad", p.grad).clone() for n, p in slot.named_parameters()}
        found[kind] = {"output": output.detach(), "x": x.grad, **gradients}
        found[f"{kind} events"] = forward
        found[f"{kind} kept"] = [stream for _, stream in recorder.kept]
    return found


def test_picks_of_a_table_shared_out_by_row_do_not_wait_for_the_ffn() -> None:
    """Counts, rows and scores are exchanged on the side stream, the last two started once the FFN has been launched."""
    for found in run_ranks(2, row_slot):
        for kind in ("exchanges", "branch"):
            for name, tensor in found["plain"].items():
                assert torch.equal(tensor, found[kind][name]), (kind, name)
        assert [name for _, name in found["plain events"]] == [
            "projected", "pick_counts", "rows", "scores", "ffn", "output",
        ]  # fmt: skip
        assert found["exchanges events"] == [
            ("main", "projected"),
            ("side", "wait for main"),
            ("side", "pick_counts"),
            ("side", "wait for main"),
            ("main", "ffn"),
            ("side", "rows"),
            ("side", "scores"),
            ("main", "output"),
        ]
        # of the caller: sizes and counts, picks and scores; of the side stream: counts, picks and scores as received
        assert found["exchanges kept"] == ["side", "side", "main", "side", "side", "main", "main"]
        on_branch = [event for event in found["branch events"] if "wait" not in event[1]]
        assert on_branch == [
            ("side", "projected"), ("side", "pick_counts"), ("main", "ffn"), ("side", "rows"), ("side", "scores"),
            ("side", "output"),
        ]  # fmt: skip
