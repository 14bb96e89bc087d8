"""A symmetry of tokens in a stock GPT-2, which can hold it by permutations of coordinates alone."""

from collections.abc import Iterator
from typing import Any

import torch

from rigpt_hf import RiGPTConfig, RiGPTForCausalLM
from rigpt_hf.symmetry.tokens import Representation, TokenSymmetry


class StockSymmetry:
    """
    Keeps a stock GPT-2 among the weights that carry a symmetry by permutations: of coordinates of the stream, of
    dimensions of the heads, and of neurons. Gains and biases are then equal along each orbit of coordinates.

    It stands in the place of `SymmetricTraining` and, for measures, of its `Representation`. The axes are those of a
    RiGPT of the same shape.

    Args:
        model (`GPT2LMHeadModel`): The model.
        symmetry (`TokenSymmetry`): The exchanges of tokens.
        resting (`float`): As of [`Representation.choose`].
    """

    def __init__(self, model: Any, symmetry: TokenSymmetry, resting: float):
        stock = model.config
        config = RiGPTConfig(
            vocab_size=stock.vocab_size,
            hidden_size=stock.n_embd,
            num_hidden_layers=1,
            num_attention_heads=stock.n_head,
            max_position_embeddings=stock.n_positions,
            position_embedding_type="learned",
        )
        with torch.device("meta"):
            twin = {name: tuple(one.shape) for name, one in RiGPTForCausalLM(config).named_parameters()}
        representation = Representation.choose(config, symmetry, kind="permutation", resting=resting)

        def axes(name: str) -> list[Any]:
            (whole,) = (one for one in twin if one.endswith(name))
            return representation.axes(whole, twin[whole])

        tokens, stream = axes("embed_tokens.weight")
        heads, values, neurons = (axes(f"{name}_proj.weight")[0] for name in ("q", "v", "up"))
        attention = (heads, heads, values)
        self.model, self.decomposition = model, representation.decomposition
        # By the end of a name, for each part along the last axis.
        self.axes = {
            "wte.weight": [[tokens, stream]],
            "wpe.weight": [[None, stream]],
            "c_attn.weight": [[stream, one] for one in attention],
            "c_attn.bias": [[one] for one in attention],
            "attn.c_proj.weight": [[values, stream]],
            "c_fc.weight": [[stream, neurons]],
            "c_fc.bias": [[neurons]],
            "mlp.c_proj.weight": [[neurons, stream]],
            "": [[stream]],  # gains, and all other biases
        }

    def _parts(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[torch.Tensor, list[Any]]]:
        found = next(axes for end, axes in self.axes.items() if name.endswith(end))
        yield from zip(tensor.chunk(len(found), dim=-1), found, strict=True)

    def _projected(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.decomposition.project(part, axes) for part, axes in self._parts(name, tensor)], dim=-1)

    @torch.no_grad()
    def begin_(self, optimizer: Any) -> None:
        """Bring the weights to the symmetry, each parameter with the norm that it had."""
        for name, parameter in self.model.named_parameters():
            projected = self._projected(name, parameter.double())
            parameter.copy_(projected * (parameter.norm() / projected.norm().clamp_min(1e-300)))

    @torch.no_grad()
    def project_gradients_(self) -> None:
        """Replace all gradients by their parts that keep the symmetry."""
        for name, parameter in self.model.named_parameters():
            parameter.grad.copy_(self._projected(name, parameter.grad))

    def end_step_(self) -> None:
        """Nothing: AdamW keeps what coordinates do that only change places."""

    @torch.no_grad()
    def distance(self, model: Any) -> float:
        """How far weights are from having the symmetry, `|θ - Pθ| / |θ|`."""
        whole = {name: parameter.double() for name, parameter in model.named_parameters()}
        away = sum(float((one - self._projected(name, one)).square().sum()) for name, one in whole.items())
        return (away / sum(float(one.square().sum()) for one in whole.values())) ** 0.5

    def free_parameters(self, model: Any) -> int:
        """How many numbers a model with this symmetry may choose."""
        return sum(
            self.decomposition.fixed(axes, list(part.shape))
            for name, parameter in model.named_parameters()
            for part, axes in self._parts(name, parameter)
        )
