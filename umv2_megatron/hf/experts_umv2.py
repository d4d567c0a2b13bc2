"""What stands in a block's FFN slot: the FFN, or with ``ffn_variant`` "moe" a sparse layer of experts.

A router sends each token to k of E experts, FFNs of their own, and the output is their sum, weighted by the router's
probabilities (OLMoE: arXiv 2409.02060). Selection and weights are those of megatron-core, setting by setting:

    scores      softmax over the k best logits; over all E before the choice (``moe_router_pre_softmax``), which leaves
                weights that do not sum to 1; or sigmoid, divided by the sum of the chosen where k > 1
    choice      the k best, with ``expert_bias`` added for the choice alone, from the best groups of experts only
    weight      times ``moe_router_topk_scaling_factor``; multiplied with an expert's activations, before ``down_proj``

Auxiliary losses are training's own and are not computed here. No token is dropped: an expert takes all that come.

Letters: T tokens, H hidden, E experts, k of them for a token, F an expert's width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .configuration_umv2 import UMv2Config
from .linear_umv2 import in_parts, project
from .retrieval_umv2 import without_autocast


class UMv2MLP(nn.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))); ``size`` wide, by default as the configuration says."""

    def __init__(self, config: UMv2Config, size: int | None = None) -> None:
        super().__init__()
        size = size or config.intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, size, bias=config.mlp_bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(config.hidden_size, size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        parts = in_parts(x)
        return self._compute(x) if len(parts) == 1 else torch.cat([self._compute(part) for part in parts]).view(x.shape)

    def _compute(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return project(self.down_proj, self.act_fn(project(self.up_proj, x)))
        return project(self.down_proj, self.act_fn(project(self.gate_proj, x)) * project(self.up_proj, x))


class UMv2Router(nn.Module):
    """Which experts a token goes to. ``weight`` [E, H], ``bias`` [E] or None; buffer ``expert_bias`` [E], float32, or
    None.

    No ``nn.Linear``: it gives experts and weights, so that nothing that replaces linear layers may replace it.
    """

    expert_bias: Tensor | None

    def __init__(self, config: UMv2Config) -> None:
        assert config.num_experts is not None and config.num_experts_per_tok is not None
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.num_experts)) if config.mlp_bias else None
        self.config = config
        self.picks: int = config.num_experts_per_tok
        self.dtype = {None: None, "fp32": torch.float32, "fp64": torch.float64}[config.moe_router_dtype]
        has_bias = config.moe_router_enable_expert_bias
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if has_bias else None
        self.register_buffer("expert_bias", bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` [T, H] to the experts of each token [T, k] and their weights [T, k], in the router's dtype."""
        if self.dtype is None:
            logits = functional.linear(x, self.weight, self.bias)
        else:
            with without_autocast(x.device):
                bias = None if self.bias is None else self.bias.to(self.dtype)
                logits = functional.linear(x.to(self.dtype), self.weight.to(self.dtype), bias)
        with without_autocast(x.device):
            experts, weights = self._choose(logits)
        factor = self.config.moe_router_topk_scaling_factor
        return experts, weights * factor if factor else weights

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> UMv2Router:
        # The bias of the choice stays float32 when a model is turned into a half dtype, as in megatron-core.
        exact = self.expert_bias
        super()._apply(fn, recurse)
        converted = self.expert_bias
        if exact is not None and converted is not None and converted.dtype in (torch.bfloat16, torch.float16):
            self.expert_bias = exact.to(converted.device)
        return self

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.moe_router_score_function == "softmax":
            if self.config.moe_router_pre_softmax:
                scores = logits.softmax(-1, dtype=torch.float32).to(logits.dtype)
                experts = self._best(scores)
                return experts, scores.gather(1, experts)
            experts = self._best(logits)
            return experts, logits.gather(1, experts).softmax(-1, dtype=torch.float32).to(logits.dtype)
        scores = logits.float().sigmoid().to(logits.dtype)
        experts = self._best(scores if self.expert_bias is None else scores + self.expert_bias)
        weights = scores.gather(1, experts)
        return experts, weights / (weights.sum(-1, keepdim=True) + 1e-20) if self.picks > 1 else weights

    def _best(self, scores: Tensor) -> Tensor:
        """The k best of ``scores`` [T, E], as [T, k]. With groups: among the experts of the best groups, a group being
        as good as the sum of its best k / groups chosen."""
        groups, chosen = self.config.moe_router_num_groups, self.config.moe_router_group_topk
        if chosen:
            assert groups is not None
            grouped = scores.detach().unflatten(1, (groups, -1))
            best = grouped.topk(self.picks // chosen, dim=-1).values.sum(-1).topk(chosen, dim=-1).indices
            outside = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(1, best, False)
            scores = grouped.masked_fill(outside.unsqueeze(-1), float("-inf")).flatten(1)
        return scores.topk(self.picks, dim=-1).indices


class UMv2Experts(nn.Module):
    """All experts of a block, stacked: ``gate_up_proj`` [E, 2 F, H] (gate first; ``up_proj`` [E, F, H] without a gate),
    ``down_proj`` [E, H, F], and with biases ``gate_up_proj_bias`` [E, 2 F] (``up_proj_bias``), ``down_proj_bias``
    [E, H]."""

    def __init__(self, config: UMv2Config) -> None:
        super().__init__()
        experts, hidden, size = config.num_experts, config.hidden_size, config.moe_intermediate_size
        assert experts is not None and size is not None
        self.num_experts = experts
        self.first = "gate_up_proj" if config.gated_mlp else "up_proj"
        shapes: dict[str, tuple[int, ...]] = {
            self.first: (experts, 2 * size if config.gated_mlp else size, hidden),
            "down_proj": (experts, hidden, size),
        }
        if config.mlp_bias:
            shapes |= {f"{name}_bias": shape[:2] for name, shape in shapes.items()}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.act_fn = ACT2FN[config.hidden_act]
        self.config = config
        # what transformers' implementations of experts ask for
        self.has_gate, self.has_bias = config.gated_mlp, config.mlp_bias
        self.is_transposed, self.is_concatenated = False, True
        self.has_post_expert_norm = self._is_expert_parallel = False

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum [T, H] over each token's experts ``top_k_index`` [T, k], with ``top_k_weights`` [T, k].

        Computed as ``experts_implementation`` says ("grouped_mm" is transformers' choice where none is given), by
        transformers' own functions; "eager" is the loop below, which float64 uses, too: torch has no grouped product
        for it.
        """
        chosen = self.config._experts_implementation
        if self.down_proj.dtype == torch.float64 and not torch.compiler.is_compiling():
            chosen = "eager"
        if chosen in (None, "eager"):
            return self._loop(hidden_states, top_k_index, top_k_weights)
        compute = ALL_EXPERTS_FUNCTIONS.get_interface(chosen, type(self)._loop)
        return compute(self, hidden_states, top_k_index, top_k_weights)

    def _loop(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """One expert after another. Experts that no token goes to are not touched."""
        into, out = getattr(self, self.first), self.down_proj
        if torch.is_grad_enabled():  # the gradient of an index would be as large as all experts, for each of them
            into, out = into.unbind(), out.unbind()
        into_bias, out_bias = getattr(self, f"{self.first}_bias", None), getattr(self, "down_proj_bias", None)
        total = torch.zeros_like(x)
        for expert in experts.unique():
            if expert >= self.num_experts:  # expert parallelism: it lies on another rank
                continue
            own, place = (experts == expert).nonzero(as_tuple=True)
            share = weights[own, place].unsqueeze(1)
            inner = functional.linear(x[own], into[expert], None if into_bias is None else into_bias[expert])
            inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
            output = functional.linear((inner * share).to(inner.dtype), out[expert])
            if out_bias is not None:
                output = output + out_bias[expert] * share
            total.index_add_(0, own, output.to(total.dtype))
        return total

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up


class UMv2Gate(nn.Module):
    """The number [..., 1] that a shared expert's output is multiplied with, before the sigmoid. ``weight`` [1, H].

    No ``nn.Linear``, as the router is none: there is nothing to gain in one row, and bitsandbytes' 4-bit product on a
    CPU takes 32 rows at a time and no fewer.
    """

    def __init__(self, config: UMv2Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


class UMv2SparseMLP(nn.Module):
    """Router and experts; a shared expert, if any, takes every token, behind a sigmoid gate where there is one."""

    def __init__(self, config: UMv2Config) -> None:
        super().__init__()
        self.router = UMv2Router(config)
        self.experts = UMv2Experts(config)
        shared = config.moe_shared_expert_intermediate_size
        self.shared_expert = UMv2MLP(config, shared) if shared else None
        gate = shared and config.moe_shared_expert_gate
        self.shared_expert_gate = UMv2Gate(config) if gate else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[b, s, H] to [b, s, H]."""
        x = hidden_states.flatten(0, -2)
        output = self.experts(x, *self.router(x)).view_as(hidden_states)
        if self.shared_expert is None:
            return output
        shared = self.shared_expert(hidden_states)
        if self.shared_expert_gate is not None:
            shared = shared * self.shared_expert_gate(hidden_states).sigmoid()
        return output + shared


@torch.no_grad()
def init_experts(module: nn.Module, std: float) -> None:
    """Random weights for what of ``module`` is no layer of torch's own."""
    if isinstance(module, UMv2Experts):
        for parameter in module.parameters(recurse=False):
            init.normal_(parameter, std=std)
    elif isinstance(module, UMv2Gate):
        init.normal_(module.weight, std=std)
    elif isinstance(module, UMv2Router):
        init.normal_(module.weight, std=std)
        for bias in (module.bias, module.expert_bias):
            if bias is not None:
                init.zeros_(bias)


__all__ = ["UMv2Experts", "UMv2Gate", "UMv2MLP", "UMv2Router", "UMv2SparseMLP", "init_experts"]
