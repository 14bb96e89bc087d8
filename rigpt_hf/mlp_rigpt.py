"""The MLP of a layer: one for all tokens, or experts of which a router picks some for each token.

Shapes: N tokens, d stream size, E experts, k experts per token, F neurons of each.

    p      = softmax(R n + r)                      R: mlp.gate [E, d]; r: its bias, where maps have some
    mlp(n) = sum over the k largest p_e of w_e (D_e (act(G_e n) * U_e n) + b_e)     w_e = p_e, or p_e / sum of the k
           + sigmoid(s n) D (act(G n) * U n)       with a shared expert; s: mlp.shared_expert_gate [1, d]

All experts of a layer lie in one matrix, block after block: `gate_proj` and `up_proj` `[E·F, d]`, `down_proj`
`[d, E·F]`. So they are the MLP of all E·F neurons, of which most are silent for a token: frames of neurons are blocks
of an axis as those of heads are, and maps stay an `nn.Linear`, which adapters and quantizers know how to replace. The
biases `b_e`, where maps have some, are `down_bias` `[d, E]`, which reads the weights of the experts.

Weights that are divided by their sum are the softmax over the logits of the chosen alone, as gpt-oss writes it.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from .kernels_rigpt import is_recorded, linear
from .layers_rigpt import is_sparse
from .neurons_rigpt import bounds_of, neurons_of


class RiGPTMLP(nn.Module):
    """`down(act(up(x)))`, or `down(act(gate(x)) * up(x))`."""

    def __init__(self, config: Any, neurons: int, down_bias: bool = True):
        super().__init__()
        self.bounds = bounds_of(config)
        sizes = config.hidden_size, neurons
        self.gate_proj = nn.Linear(*sizes, bias=config.mlp_bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(*sizes, bias=config.mlp_bias)
        self.down_proj = nn.Linear(*reversed(sizes), bias=config.mlp_bias and down_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def neurons(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The neurons `[..., F]` that `down_proj` reads."""
        gate = None if self.gate_proj is None else linear(self.gate_proj, hidden_states)
        return neurons_of(self.bounds, self.act_fn, linear(self.up_proj, hidden_states), gate)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return linear(self.down_proj, self.neurons(hidden_states))


class RiGPTRouter(nn.Module):
    """
    Which experts a token goes to, and with which weights.

    No `nn.Linear`: a rounded or adapted router sends tokens elsewhere, so adapters and quantizers must not find it.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.normalised = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.num_experts)) if config.mlp_bias else None

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The logits `[N, E]` of tokens `[N, d]`, then the weights and the indices `[N, k]` of the experts of each."""
        logits = nn.functional.linear(hidden_states, self.weight, self.bias)
        accurate = torch.promote_types(logits.dtype, torch.float32)
        weights, indices = logits.softmax(dim=-1, dtype=accurate).topk(self.top_k, dim=-1)
        if self.normalised:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return logits, weights.to(hidden_states.dtype), indices

    def extra_repr(self) -> str:
        return f"experts={len(self.weight)}, top_k={self.top_k}, normalised={self.normalised}"


class RiGPTExperts(RiGPTMLP):
    """The experts of a layer: an MLP of all their neurons, each token through those of its own experts alone."""

    def __init__(self, config: Any):
        super().__init__(config, config.num_experts * config.moe_intermediate_size, down_bias=False)
        self.num_experts = config.num_experts
        # No map of its own: what rounds and adapts maps leaves biases alone.
        self.down_bias = nn.Parameter(torch.empty(config.hidden_size, self.num_experts)) if config.mlp_bias else None

    def reset_own_parameters(self):
        """Biases of 0."""
        if self.down_bias is not None:
            init.zeros_(self.down_bias)

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `[N, d]`).
            weights, indices (`torch.Tensor` of shape `[N, k]`): of the experts of each token.
        """
        if not self._is_plain():
            return self._all(hidden_states, weights, indices)
        size = self.up_proj.out_features // self.num_experts
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            tokens, places = torch.where(indices == expert)
            if len(tokens):
                rows = slice(expert * size, (expert + 1) * size)
                chosen = hidden_states[tokens]
                read = [
                    None if module is None else nn.functional.linear(chosen, module.weight[rows], _part(module, rows))
                    for module in (self.up_proj, self.gate_proj)
                ]
                neurons = neurons_of(self.bounds, self.act_fn, *read)
                bias = None if self.down_bias is None else self.down_bias[:, expert]
                written = nn.functional.linear(neurons, self.down_proj.weight[:, rows], bias)
                written = written * weights[tokens, places, None]
                output = output.index_add(0, tokens, written.to(output.dtype))
        return output

    def _all(self, hidden_states: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """The same by way of all experts: more products, of whole maps, in shapes that do not depend on routes."""
        shares = weights.new_zeros(len(hidden_states), self.num_experts).scatter(1, indices, weights)
        neurons = self.neurons(hidden_states).unflatten(-1, (self.num_experts, -1))
        written = linear(self.down_proj, (neurons * shares[..., None].to(neurons.dtype)).flatten(-2))
        return written if self.down_bias is None else written + nn.functional.linear(shares, self.down_bias)

    def _is_plain(self) -> bool:
        """Whether maps are nothing but their weights, and the shapes of what they read may depend on routes."""
        if is_recorded():
            return False
        maps = [self.up_proj, self.down_proj, *([] if self.gate_proj is None else [self.gate_proj])]
        return all(
            type(module) is nn.Linear
            and type(module._parameters.get("weight")) is nn.Parameter
            and "forward" not in module.__dict__
            and not (module._forward_hooks or module._forward_pre_hooks)
            for module in maps
        )


def _part(module: nn.Linear, rows: slice) -> torch.Tensor | None:
    """The bias of some rows of a map."""
    return None if module.bias is None else module.bias[rows]


class RiGPTSparseMLP(nn.Module):
    """A router and its experts, and one that all tokens share, if the configuration has it."""

    def __init__(self, config: Any):
        super().__init__()
        self.gate = RiGPTRouter(config)
        self.experts = RiGPTExperts(config)
        self.shared_expert: RiGPTMLP | None = None
        self.shared_expert_gate: nn.Linear | None = None
        if config.shared_expert_intermediate_size is not None:
            self.shared_expert = RiGPTMLP(config, config.shared_expert_intermediate_size)
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=config.mlp_bias)
            # At first all tokens have the same share, a half, and no direction of the stream has a say.
            self.shared_expert_gate.starts_at_zero = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, indices = self.gate(tokens)
        output = self.experts(tokens, weights, indices).view_as(hidden_states)
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            share = torch.sigmoid(linear(self.shared_expert_gate, hidden_states))
            output = output + share * self.shared_expert(hidden_states)
        return output


def load_balancing_loss(
    config: Any, router_logits: tuple[torch.Tensor, ...], attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """
    How unequally tokens are spread over experts, least if they are equally; as every MoE of the library has it, after
    Switch Transformer (arXiv 2101.03961, equations 4 to 6).

    Args:
        config: Says how many experts there are, and how many each token goes to.
        router_logits (`tuple[torch.Tensor, ...]`): `[B·S, E]` of every layer that has experts.
        attention_mask (`torch.Tensor` of shape `[B, S]`, *optional*): 0 for tokens that do not count.
    """
    # Here, as few ask for it, and a whole other model comes along.
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    mask = attention_mask if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2 else None
    return load_balancing_loss_func(router_logits, config.num_experts, config.num_experts_per_tok, mask)


def mlp_of(config: Any, layer: int) -> RiGPTMLP | RiGPTSparseMLP:
    """The MLP of a layer."""
    return RiGPTSparseMLP(config) if is_sparse(config, layer) else RiGPTMLP(config, config.intermediate_size)
