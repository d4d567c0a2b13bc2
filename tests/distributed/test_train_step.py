"""One training step and one evaluation of training/step.py on real ranks: what is updated, what is left alone, and the
loss, against the losses of every token."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import run_ranks

SMALL: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 80, "num_attention_heads": 4, "kv_channels": 8,
    "seq_length": 16, "max_position_embeddings": 16, "vocab_size": 250, "memory_num_keys": 9, "memory_key_dim": 6,
    "memory_value_dim": 16, "memory_pre_value_dim": 8, "memory_topk": 5, "micro_batch_size": 1, "lr": 1e-2,
    "global_batch_size": 4, "train_iters": 10, "lr_warmup_iters": 5,
}  # fmt: skip


def build(**changes: Any) -> tuple[Any, Any]:
    """Run and training state of a small model on this world."""
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator

    from umv2_megatron.config.flags import read_mapping
    from umv2_megatron.config.presets import PRESETS
    from umv2_megatron.config.resolve import from_layers
    from umv2_megatron.training import step
    from umv2_megatron.training.initialize import build_training_state, make_groups, seed_everything

    flags = read_mapping({**SMALL, **changes}, "flag")
    layers = [("preset", read_mapping(PRESETS["umv2-tiny"].flags(), "preset")), ("flag", flags)]
    run = from_layers(layers, torch.distributed.get_world_size(), for_training=False)
    make_groups(run)
    init_num_microbatches_calculator(
        torch.distributed.get_rank(), None, run.global_batch_size, run.training.micro_batch_size, run.data_parallel_size
    )
    seed_everything(run.training.seed)
    state = build_training_state(run, run.values["vocab_size"])
    step.connect(run, state.chunks, state.optimizer)
    return run, state


def batches(run: Any, seed: int = 7) -> Any:
    """Micro-batches of this data-parallel rank, in some of which many tokens bear no loss."""
    from megatron.core import parallel_state

    generator = torch.Generator().manual_seed(seed + 100 * parallel_state.get_data_parallel_rank())
    size, length = run.training.micro_batch_size, run.model.seq_length
    for number in range(10**6):
        tokens = torch.randint(0, run.values["vocab_size"], (size, length + 1), generator=generator)
        mask = (torch.rand(size, length, generator=generator) < (0.9, 0.3)[number % 2]).float()
        positions = torch.arange(length).expand(size, length).contiguous()
        yield {
            "tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": mask, "position_ids": positions,
        }  # fmt: skip


def vectors(state: Any) -> list[torch.Tensor]:
    """Copies of u and t of every memory layer."""
    from umv2_megatron.model.builder import unwrap
    from umv2_megatron.model.ffn_with_memory import memory_layers

    layers = [layer for chunk in state.chunks for _, layer in memory_layers(unwrap(chunk))]
    assert layers
    return [each.clone() for layer in layers for each in (layer.retrieval.u, layer.retrieval.t)]


def spoil_cores(state: Any) -> None:
    """Other cores, and u, t that belong to none."""
    from umv2_megatron.model.builder import unwrap

    with torch.no_grad():
        for name, each in (*unwrap(state.chunks[0]).named_parameters(), *unwrap(state.chunks[0]).named_buffers()):
            if name.endswith(("retrieval.cores", "retrieval.u", "retrieval.t")):
                each.copy_(torch.randn(each.shape, generator=torch.Generator().manual_seed(len(name))))


def rates_and_weights(poisoned: int) -> list[tuple[bool, float, int, bool]]:
    """(updated, learning rate, samples of the schedule, weights changed) of steps 1 to 3, of which one has a NaN."""
    from umv2_megatron.training import step

    run, state = build()
    guarded, found = step.guarded_step, []
    for number in range(1, 4):

        def poison(optimizer: Any, *arguments: Any, number: int = number) -> Any:
            if number == poisoned:
                optimizer.param_groups[0]["params"][0].main_grad.view(-1)[0] = float("nan")
            return guarded(optimizer, *arguments)

        step.guarded_step = poison
        before = [each.detach().clone() for each in state.chunks[0].parameters()]
        told = step.train_step(run, state.chunks, state.optimizer, state.scheduler, batches(run, number))
        changed = any(not torch.equal(a, b) for a, b in zip(before, state.chunks[0].parameters()))
        found.append((told.updated, state.scheduler.dense_lr, state.scheduler.num_steps, changed))
    return found


def test_a_skipped_step_moves_neither_weights_nor_schedule():
    """--nan-policy skip: the step after a skipped one has the learning rate that the skipped one had."""
    ((first, second, third),) = run_ranks(1, rates_and_weights, 2)
    assert [first[0], second[0], third[0]] == [True, False, True]
    assert first[1] == pytest.approx(1e-2 / 5) and first[2] == 4
    assert second[1:3] == first[1:3] and not second[3]
    assert third[1] == pytest.approx(2e-2 / 5) and third[2] == 8 and third[3]


def refreshed_by(what: str) -> tuple[bool, bool]:
    """Whether u, t were those of the present cores after ``what``, and whether they had been others before."""
    from umv2_megatron.training import step

    run, state = build()
    spoil_cores(state)
    before = vectors(state)
    if what == "evaluate":
        step.evaluate(run, state.chunks, batches(run), 1)
        after = vectors(state)
    else:
        step.guarded_step = lambda *_: step.StepResult(False, 0.0, 0.0, None, False)
        step.train_step(run, state.chunks, state.optimizer, state.scheduler, batches(run))
        after = vectors(state)
    step.refresh_singular_vectors(state.chunks)
    right = vectors(state)
    return (
        all(torch.equal(a, b) for a, b in zip(after, right)),
        any(torch.equal(a, b) for a, b in zip(before, right)),
    )


@pytest.mark.parametrize("what", ["evaluate", "train"])
def test_singular_vectors_are_those_of_the_present_cores(what):
    assert run_ranks(1, refreshed_by, what) == [(True, False)]


def refreshed_when() -> list[tuple[bool, list[bool]]]:
    """Whether u, t changed, and which layers wait for their next forward, after both kinds of refresh."""
    from umv2_megatron.model.builder import unwrap
    from umv2_megatron.model.ffn_with_memory import memory_layers
    from umv2_megatron.training import step

    run, state = build()
    spoil_cores(state)
    found = []
    for waits in (True, False):
        before = vectors(state)
        step.refresh_singular_vectors(state.chunks, at_next_forward=waits)
        changed = not any(torch.equal(a, b) for a, b in zip(before, vectors(state)))
        due = [layer.retrieval.refresh_due for _, layer in memory_layers(unwrap(state.chunks[0]))]
        found.append((changed, due))
    return found


def test_a_training_step_refreshes_at_the_next_forward():
    """Before, with --overlap-param-gather, the new cores may not have arrived."""
    ((waiting, at_once),) = run_ranks(1, refreshed_when)
    assert waiting == (False, [True, True]) and at_once[0]


def clipped(clip_grad: float) -> tuple[float, float, float]:
    """Norm of the gradients before an optimizer step, as the step tells it, and after its clipping."""
    from umv2_megatron.training import step

    run, state = build(clip_grad=clip_grad)
    gradients = [each.main_grad for each in state.chunks[0].parameters()]

    def norm() -> float:
        return torch.cat([each.flatten() for each in gradients]).double().norm().item()

    step._run_schedule(run, state.chunks, batches(run), forward_only=False)
    before = norm()
    result = step.guarded_step(state.optimizer, torch.zeros(()))
    assert result.updated
    return before, result.grad_norm, norm()


def test_gradients_are_clipped_to_the_limit_and_left_alone_without_one():
    for limit in (0.0, 1e-2, 1e3):
        ((before, told, after),) = run_ranks(1, clipped, limit)
        assert told == pytest.approx(before, rel=1e-5) and 1e-2 < before < 1e3
        assert after == pytest.approx(1e-2 if limit == 1e-2 else before, rel=1e-3)


def losses(changes: dict[str, Any]) -> dict[str, Any]:
    """The loss that a training step and an evaluation tell, and both computed token by token."""
    from umv2_megatron.training import step

    run, state = build(**changes)
    per_step = run.num_microbatches
    training = [next(feed) for feed in [batches(run)] for _ in range(per_step)]
    evaluation = [next(feed) for feed in [batches(run, 50)] for _ in range(2 * per_step)]
    sums = []
    for chosen in (training, evaluation):
        step.refresh_singular_vectors(state.chunks)
        total = torch.zeros(2, dtype=torch.float64)
        for batch in chosen:
            with torch.no_grad():
                each = state.chunks[0](batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
            total += torch.stack([(each * batch["loss_mask"]).sum(), batch["loss_mask"].sum()]).double()
        sums.append(total)
    total, tokens = step.evaluate(run, state.chunks, iter(evaluation), 2)
    told = [
        total / tokens,
        step.train_step(run, state.chunks, state.optimizer, state.scheduler, iter(training)).loss,
    ]
    return {"told": told, "sums": [each.tolist() for each in reversed(sums)], "training": state.chunks[0].training}


@pytest.mark.parametrize("world", [1, 2])
def test_losses_are_means_over_all_tokens(world):
    results = run_ranks(world, losses, {})
    for place in (0, 1):
        total, count = (sum(result["sums"][place][part] for result in results) for part in (0, 1))
        for result in results:
            assert result["told"][place] == pytest.approx(total / count, rel=1e-5)
    assert all(result["training"] for result in results), "an evaluation must not end the training mode"


def found_non_finite() -> tuple[list[str], list[str]]:
    """Names told before and after one gradient and one value are made NaN."""
    from umv2_megatron.training import step

    run, state = build()
    before = step.non_finite_parameters(state.chunks)
    names = dict(state.chunks[0].module.named_parameters())
    names["decoder.final_layernorm.weight"].main_grad[0] = float("inf")
    with torch.no_grad():
        names["embedding.word_embeddings.weight"][0, 0] = float("nan")
    return before, step.non_finite_parameters(state.chunks)


def test_non_finite_numbers_are_named():
    ((before, after),) = run_ranks(1, found_non_finite)
    assert before == []
    assert after == ["value of embedding.word_embeddings.weight", "gradient of decoder.final_layernorm.weight"]


def scaled_losses(parts: int, per_token: bool) -> tuple[float, int, list[float]]:
    """``loss_of_microbatch`` of this rank's part of a sequence, whose tokens have losses 1, 2, ... and a mask."""
    from megatron.core import parallel_state

    from umv2_megatron.parallel import groups
    from umv2_megatron.training.step import LOSS, loss_of_microbatch

    groups.initialize_groups(cp=parts)
    rank = parallel_state.get_context_parallel_rank()
    each = torch.arange(1.0, 9.0).chunk(parts)[rank][None]
    mask = torch.tensor([1.0, 1, 1, 0, 0, 1, 0, 0]).chunk(parts)[rank][None]
    total, tokens, report = loss_of_microbatch(mask, per_token, each)
    assert tokens.dtype == torch.int
    return total.item(), int(tokens), report[LOSS].tolist()


def test_a_part_of_a_sequence_counts_the_tokens_of_the_whole():
    assert run_ranks(1, scaled_losses, 1, False) == [(12.0, 4, [12.0, 4.0])]
    assert run_ranks(2, scaled_losses, 2, False) == [(12.0, 4, [6.0, 3.0]), (12.0, 4, [6.0, 1.0])]
    assert run_ranks(2, scaled_losses, 2, True) == [(6.0, 3, [6.0, 3.0]), (6.0, 1, [6.0, 1.0])]


def connected(chunks: int, **changes: Any) -> dict[str, Any]:
    """What ``connect`` sets, with stand-ins that tell their own names."""
    from umv2_megatron.training import step

    class Chunk:
        def __init__(self, number: int) -> None:
            self.config = SimpleNamespace()
            for name in ("no_sync", "start_grad_sync", "start_param_sync"):
                setattr(self, name, f"{name} {number}")

    run = SimpleNamespace(overlap_grad_reduce=False, overlap_param_gather=False, align_param_gather=False)
    run.memory = SimpleNamespace(stream=False)
    made = [Chunk(number) for number in range(chunks)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "get_model_config", lambda chunk: chunk.config)
        step.connect(SimpleNamespace(**{**vars(run), **changes}), made, SimpleNamespace(scale_loss="scale"))  # type: ignore
    found = dict(vars(made[0].config))
    assert found.pop("grad_scale_func") == "scale" and found.pop("finalize_model_grads_func") is not None
    return found


def test_what_the_schedules_call():
    assert connected(2) == {}
    one = {"no_sync_func": "no_sync 0", "grad_sync_func": "start_grad_sync 0"}
    assert connected(1, overlap_grad_reduce=True) == one
    two = {"no_sync_func": ["no_sync 0", "no_sync 1"], "grad_sync_func": ["start_grad_sync 0", "start_grad_sync 1"]}
    assert connected(2, overlap_grad_reduce=True, overlap_param_gather=True) == two
    assert connected(1, overlap_param_gather=True, align_param_gather=True) == {"param_sync_func": "start_param_sync 0"}
    gather = connected(2, overlap_param_gather=True, align_param_gather=True)
    assert gather == {"param_sync_func": ["start_param_sync 0", "start_param_sync 1"]}
    assert connected(2, align_param_gather=True) == {}
