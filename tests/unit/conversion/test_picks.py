"""Following picks: right models pass where scores tie, and no wrong pick or small error hides behind a tie."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / folder) for folder in ("unit/hf", "distributed")]
import megatron_pair  # noqa: E402
from harness import run_ranks  # noqa: E402
from tiny_model import tiny_model  # noqa: E402

from umv2_megatron.commands.convert_checkpoint import _line  # noqa: E402
from umv2_megatron.conversion.pick_recording import RecordedPicks, RetrievalPicks, Seen, recorded_picks  # noqa: E402
from umv2_megatron.conversion.picks import PickReport, _FollowCells, _inside, followed_picks  # noqa: E402
from umv2_megatron.conversion.safetensors_files import ConversionError  # noqa: E402
from umv2_megatron.conversion.verify import LIMITS, Comparison, _export_logits, trained_logits  # noqa: E402
from umv2_megatron.hf.attention_umv2 import UMv2Norm, UMv2RotaryEmbedding  # noqa: E402
from umv2_megatron.hf.modeling_umv2 import UMv2ForCausalLM  # noqa: E402
from umv2_megatron.hf.retrieval_umv2 import UMv2Retrieval  # noqa: E402

pytestmark = pytest.mark.thorough

BIASES = {"normalization": "LayerNorm", "disable_bias_linear": False, "position_embedding_type": "learned_absolute",
          "swiglu": False, "num_layers": 2}  # fmt: skip
GROUPS = {"untie_embeddings_and_output_weights": True, "group_query_attention": True, "num_query_groups": 2,
          "add_qkv_bias": True, "num_layers": 2, "memory_num_heads": 2}  # fmt: skip
SUMS = {"memory_scoring": "additive", "memory_tucker_rank": 1, "memory_num_cores": 1, "memory_num_heads": 2,
        "memory_query_mode": "per_head", "memory_score_normalization": "softmax", "memory_gate": "silu",
        "num_layers": 2}  # fmt: skip
EXPERTS = {"ffn_variant": "moe", "num_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 40, "num_layers": 2}
LIMITED = {**EXPERTS, "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
           "moe_router_num_groups": 4, "moe_router_group_topk": 2, "moe_shared_expert_intermediate_size": 24,
           "moe_shared_expert_gate": True}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "cells": {**GROUPS, "memory_read_delay": 1, "memory_layer_freq": "[1,0]"},
    "virtual cells": {"num_layers": 2, "memory_key_expansion": 2, "memory_value_expansion": "per-block"},
    "few keys": {"num_layers": 2, "memory_key_topk_cap": 3},
    "sums": SUMS,
    "few sums": {**SUMS, "memory_query_mode": "shared", "memory_qk_norm": "none", "memory_key_topk_cap": 3},
    "experts": EXPERTS,
    "experts of float32 scores": {**EXPERTS, "moe_router_pre_softmax": True},
    "experts of groups": LIMITED,
}


class Pair:
    """mcore's model and the Hugging Face one with the same weights, and what the former computes for ``ids``."""

    def __init__(self, changes: dict[str, Any], dtype: torch.dtype) -> None:
        self.trained, self.model = (each.to(dtype) for each in megatron_pair.pair(changes, {}))
        biases = [m for m in self.model.modules() if getattr(m, "expert_bias", None) is not None]
        theirs = [m for m in self.trained.modules() if getattr(m, "expert_bias", None) is not None]
        for ours, other in zip(biases, theirs, strict=True):
            ours.expert_bias.copy_(torch.linspace(-0.1, 0.1, len(ours.expert_bias)))
            other.expert_bias.copy_(ours.expert_bias)
        self.dtype, vocabulary = dtype, self.model.config.vocab_size
        self.ids = torch.randint(vocabulary, (4, 48), generator=torch.Generator().manual_seed(1))

    def record(self) -> RecordedPicks:
        """Run mcore's model."""
        with recorded_picks(self.trained, len(self.ids)) as self.recorded:
            self.expected = trained_logits(self.trained, self.ids, self.model.config.vocab_size)
        return self.recorded

    def follow(self, model: UMv2ForCausalLM | None = None) -> tuple[float, PickReport]:
        """Largest difference of the logits as a share of the largest, and how the picks compare."""
        model = model or self.model
        for module in model.modules():
            if isinstance(module, UMv2Retrieval):
                module._cores_seen = None  # as just loaded: u and t are taken as they are
        with followed_picks(model, self.recorded) as picks:
            found = _export_logits(model, self.ids)
        return self.difference(found), picks

    def difference(self, found: torch.Tensor) -> float:
        return float((found - self.expected).abs().max() / self.expected.abs().max())

    def found(self) -> bool:
        """Whether ``verify`` would fail."""
        difference, picks = self.follow()
        return not difference <= LIMITS[self.dtype] or picks.wrong > 0


def selections(model: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    """Keys [h, 2, N, Dk, R] and weights of routers [E, H] of either model."""
    for name, parameter in model.named_parameters():
        if name.endswith(("retrieval.keys", "router.weight")):
            yield parameter


@torch.no_grad()
def plant_ties(pair: Pair) -> None:
    """Equal keys and experts in groups of four, but for a few of the last bits, which the two models turn round; for
    experts those of float32, in which routers compute."""
    for model, turn in ((pair.trained, 1), (pair.model, -1)):
        for parameter in selections(model):
            dim = 2 if parameter.dim() == 5 else 0
            rows = parameter.unflatten(dim, (-1, 4))
            rows.copy_(rows.narrow(dim + 1, 0, 1).expand_as(rows).clone())
            unit = 2 * turn * torch.finfo(torch.float32 if dim == 0 else parameter.dtype).eps
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)).to(parameter)
            parameter.mul_(1 + unit * noise)
    for module in (*pair.trained.modules(), *pair.model.modules()):
        bias = getattr(module, "expert_bias", None)
        if bias is not None:
            bias.zero_()


# -- right models -----------------------------------------------------------------------------------------------------


def with_ties(dtype: torch.dtype) -> dict[str, tuple[float, float, PickReport]]:
    """For each case the difference of logits without and with following, and the report."""
    megatron_pair.start()
    results = {}
    for name, changes in CASES.items():
        pair = Pair(changes, dtype)
        plant_ties(pair)
        pair.record()
        difference, picks = pair.follow()
        results[name] = pair.difference(_export_logits(pair.model, pair.ids)), difference, picks
        assert not any("forward" in m.__dict__ for m in (*pair.model.modules(), *pair.trained.modules()))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_right_models_pass_where_scores_tie(dtype: torch.dtype) -> None:
    for name, (alone, difference, picks) in run_ranks(1, with_ties, dtype)[0].items():
        assert picks.wrong == 0 and picks.first == "", (name, picks)
        assert picks.ties > 10 and picks.compared > picks.ties and 0 < picks.widest < 512, (name, picks)
        assert difference <= LIMITS[dtype] < 1e-2 < alone, (name, difference, alone)


def test_singular_vectors_of_another_machine_move_ties_only() -> None:
    """They are float32 in a float64 model, and may differ in the last bits; by more they are another model's."""
    retrieval = tiny_model(memory_num_keys=48, memory_topk=8).double().model.layers[0].memory.retrieval
    x = torch.randn(40_000, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), Seen() as seen:
        cells = retrieval(x)[0].view(len(x), 1, -1)
        picks = RetrievalPicks(seen.indices[0], cells, torch.stack([retrieval.u, retrieval.t]))
        reports = {}
        for off in (0.0, 8e-6, 1e-3):
            retrieval.u.copy_(picks.vectors[0] + off * torch.tensor([1.0, 1.0]))
            reports[off] = report = PickReport()
            with _inside(retrieval, partial(_FollowCells, retrieval, "retrieval", picks, report)):
                found = retrieval(x)[0].view(len(x), 1, -1)
            assert report.wrong > 0 or torch.equal(found.sort(-1).values, cells.sort(-1).values)
    assert reports[0.0].ties == 0 and reports[8e-6].ties > 0 and reports[0.0].wrong == reports[8e-6].wrong == 0
    assert reports[1e-3].wrong > 100 and reports[1e-3].first.startswith("retrieval, keys of token ")


# -- wrong picks ------------------------------------------------------------------------------------------------------


def changed_records() -> dict[str, PickReport]:
    """One recorded pick of each kind replaced by one that is far behind."""
    megatron_pair.start()
    results = {}
    for name, kinds in (("cells", "keys cells"), ("sums", "keys cells"), ("experts of groups", "groups experts")):
        pair = Pair(CASES[name], torch.float32)
        recorded = pair.record()
        for kind in kinds.split():
            pair.recorded = copy.deepcopy(recorded)
            picks = pair.recorded.memory[0] if recorded.memory else pair.recorded.routers[1]
            changed = getattr(picks, kind)
            if kind == "keys":
                assert changed.shape[:2] == (2, 192)
                changed = changed[1]
            changed = changed[17].view(-1)
            own = set(changed.tolist())
            changed[-1] = next(pick for pick in range(300) if pick not in own) if kind != "groups" else 3 - changed[0]
            results[f"{name}: {kind}"] = pair.follow()[1]
    return results


def test_a_wrong_pick_is_found_and_named() -> None:
    for name, picks in run_ranks(1, changed_records)[0].items():
        kind = name.split(": ")[1]
        where = "layers.0.memory.retrieval" if kind in ("keys", "cells") else "layers.1.mlp.router"
        assert picks.wrong > 0 and picks.ties == 0, (name, picks)
        assert picks.first.startswith(f"model.{where}, {kind} of token 17: those of the checkpoint"), (name, picks)


def wrong_models() -> dict[str, tuple[float, PickReport]]:
    """Models that search wrongly, with the right weights."""
    megatron_pair.start()
    cells, experts = Pair(CASES["cells"], torch.float64), Pair(CASES["experts"], torch.float64)
    results = {}
    cells.record()
    retrieval = cells.model.model.layers[0].memory.retrieval
    plain = type(retrieval)._best_cells

    def second_best(kept_scores: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        retrieval.topk += 1
        try:
            return plain(retrieval, kept_scores, total)[..., 1:]
        finally:
            retrieval.topk -= 1

    retrieval.__dict__["_best_cells"] = second_best
    results["the best cell left out"] = cells.follow()
    del retrieval.__dict__["_best_cells"]
    u, t = retrieval.u.clone(), retrieval.t.clone()
    retrieval.u.copy_(t)
    retrieval.t.copy_(u)
    results["u and t in each other's place"] = cells.follow()
    retrieval.u.copy_(u)
    retrieval.t.copy_(t)
    retrieval.kept -= 1
    results["another number of keys"] = cells.follow()
    experts.record()
    router = experts.model.model.layers[1].mlp.router
    router.__dict__["_best"] = lambda scores: scores.topk(3, dim=-1).indices[:, 1:]
    results["the best expert left out"] = experts.follow()
    router.__dict__["_best"] = lambda scores: scores.sort(dim=-1, descending=True).indices[:, :2]
    results["picks that are not seen"] = experts.follow()
    with pytest.raises(ConversionError, match=r"the export has memory layers in blocks \[0\], the .* \[\]"):
        cells.recorded = experts.recorded
        cells.follow()
    return results


def test_models_that_search_wrongly_are_found() -> None:
    results = run_ranks(1, wrong_models)[0]
    # a topk inside that is followed would make the picks left out come back
    for name, (difference, picks) in results.items():
        assert picks.wrong > 0 and picks.first, (name, difference, picks)
    assert results["picks that are not seen"][1].first == "768 picks of the checkpoint's model, 384 of the export's"
    assert results["another number of keys"][1].first.endswith("keys a token instead of 4")


# -- planted errors ---------------------------------------------------------------------------------------------------

PLANTED = {"biases": BIASES, "groups": GROUPS, "sums": SUMS, "experts": LIMITED}
WITHOUT_EFFECT = ("self_attn.k_norm.bias",)
"""Without rotary angles it adds the same to all scores of a query, which a softmax does not show."""
ONLY_PICKS = (".retrieval.u", ".retrieval.t", ".router.expert_bias")
"""They decide picks and nothing else; an error shows as soon as it turns one pick round."""


def planted_errors(dtype: torch.dtype, size: float) -> list[str]:
    """Tensors in which a relative error of ``size``, drawn for each number, is not found."""
    megatron_pair.start()
    missed = []
    for case, changes in PLANTED.items():
        pair = Pair(changes, dtype)
        pair.record()
        assert not pair.found(), case
        generator = torch.Generator().manual_seed(5)
        for name, tensor in pair.model.state_dict().items():
            if not tensor.is_floating_point() or name.endswith(WITHOUT_EFFECT):
                continue
            kept = tensor.clone()
            error = 0.3 if name.endswith(ONLY_PICKS) else size
            tensor.mul_(1 + error * torch.randn(tensor.shape, generator=generator).to(tensor))
            if not pair.found():
                missed.append(f"{case}: {name}")
            tensor.copy_(kept)
        assert not pair.found(), case
    return missed


@pytest.mark.parametrize(("dtype", "size"), [(torch.float64, 1e-4), (torch.float32, 2e-3)])
def test_a_small_error_in_any_tensor_is_found(dtype: torch.dtype, size: float) -> None:
    assert run_ranks(1, planted_errors, dtype, size, timeout=240)[0] == []


def planted_faults(dtype: torch.dtype) -> list[str]:
    """Faults that are not found, of those that are no small error of a number."""
    megatron_pair.start()
    missed = []
    for case, changes in PLANTED.items():
        pair = Pair(changes, dtype)
        recorded = pair.record()
        for what, plant in faults(pair, recorded):
            kept = copy.deepcopy(pair.model)
            with torch.no_grad():
                plant(pair.model)
            if not pair.found():
                missed.append(f"{case}: {what}")
            pair.model = kept
    return missed


def faults(pair: Pair, recorded: RecordedPicks) -> Iterator[tuple[str, Callable[[UMv2ForCausalLM], object]]]:
    """Names of faults, and what plants them."""
    state = pair.model.state_dict()
    rows = {"model.embed_tokens.weight": pair.ids.flatten()[:2].tolist()}
    if recorded.memory:
        memory = pair.model.model.layers[1].memory
        cells = recorded.memory[1].cells.flatten().unique()[:2]
        prefix = "model.layers.1.memory."
        rows[f"{prefix}table.values.0"] = rows[f"{prefix}table.pre_values.0"] = memory.perm[cells].tolist()
        rows[f"{prefix}retrieval.query.weight"] = [0, 1]
        # of the row keys those of one head
        key = recorded.memory[1].keys[0, :, 0].flatten().unique()[:2].tolist()
        yield "swapped keys", lambda model: swap(model.model.layers[1].memory.retrieval.keys[0, 0], key)
    else:
        first = recorded.routers[1].experts.flatten().unique()[:2].tolist()
        for name in ("router.weight", "experts.gate_up_proj", "experts.down_proj"):
            rows[f"model.layers.1.mlp.{name}"] = first
    if "lm_head.weight" in state:
        rows["lm_head.weight"] = [3, 4]
    for kind in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"):
        if f"model.layers.1.{kind}.weight" in state:
            rows[f"model.layers.1.{kind}.weight"] = [0, 1]
    for name, pair_of_rows in rows.items():
        yield f"swapped rows of {name}", lambda model, n=name, r=pair_of_rows: swap(model.state_dict()[n], r)
    if pair.model.model.rotary_emb is not None:
        yield "rotary base 1% off", lambda model: turn(model, 1.01)
    norms = [name for name, module in pair.model.named_modules() if isinstance(module, UMv2Norm)]
    for name in norms:
        yield f"ten times the epsilon in {name}", lambda model, n=name: more_epsilon(model.get_submodule(n))
    if recorded.memory:
        yield "ten times the epsilon of queries and keys", lambda model: more_epsilon(
            model.model.layers[1].memory.retrieval
        )


def swap(tensor: torch.Tensor, rows: list[int]) -> None:
    assert rows[0] != rows[1] and not torch.equal(tensor[rows[0]], tensor[rows[1]])
    tensor[rows] = tensor[rows[::-1]]


def turn(model: UMv2ForCausalLM, factor: float) -> None:
    config = copy.deepcopy(model.config)
    config.rope_parameters["rope_theta"] *= factor
    model.model.rotary_emb = UMv2RotaryEmbedding(config)


def more_epsilon(module: Any) -> None:
    module.epsilon *= 10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_bases_and_epsilons_are_found(dtype: torch.dtype) -> None:
    assert run_ranks(1, planted_faults, dtype, timeout=240)[0] == []


# -- what is said -----------------------------------------------------------------------------------------------------


def test_the_line_says_ties_and_wrong_picks() -> None:
    comparison = Comparison(torch.float64, "largest difference of logits", 1e-15, 1e-6, 1.0, 256)
    assert comparison.good and "picks" not in _line(comparison) and _line(comparison).endswith("256 tokens: good")
    tied = Comparison(torch.float64, "difference", 1e-15, 1e-6, 1.0, 256, PickReport(18432, 2))
    assert tied.good and "; of 18,432 picks 2 differ by a tie, 0 otherwise; " in _line(tied)
    wrong = Comparison(torch.float64, "difference", 1e-15, 1e-6, 1.0, 256, PickReport(18432, 0, 3, "layer, token 4"))
    assert not wrong.good and _line(wrong).endswith("tokens: WRONG PICKS\n    the first wrong pick: layer, token 4")
    far = Comparison(torch.float64, "difference", float("nan"), 1e-6, 1.0, 256, PickReport(18432, 0, 3, "layer"))
    assert not far.good and ": TOO FAR APART and WRONG PICKS\n" in _line(far)


@pytest.mark.slow
def test_right_models_of_real_sizes_pass() -> None:
    """umv2-8m with 4,096 tokens, and the blocks of umv2-227m; benchmarks/verify_picks.py takes more seeds."""
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "benchmarks/verify_picks.py", "--seeds", "2"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0 and done.stdout.endswith("4 of 4 models pass\n"), done.stdout + done.stderr[-2000:]
