"""
An optimizer without a preferred basis: training from a rotated start is the rotated training.

How a parameter is treated follows from how it turns (`symmetry/frames.py`):

    polar      matrices between two frames: momentum, then the polar factor, as in Muon
    rows       tables whose rows are vectors of a frame: Adam with one second moment per row
    vectors    biases of a frame: Adam with one second moment per vector, i.e. per head or for the stream
    elements   what does not rotate (scalars, frequencies, biases of neurons): Adam

Every one of these commutes with rotations and permutations of all frames. Stretches, which no norm survives, are
not covered: of those weight decay takes care (`symmetry/conservation.py`).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from .polar import exact_polar, newton_schulz
from .symmetry.frames import axes, frame_keys, row
from .symmetry.groups import MatrixGroup


Treatment = Literal["polar", "rows", "vectors", "elements"]
TREATMENTS: tuple[Treatment, ...] = ("polar", "rows", "vectors", "elements")
POLAR_METHODS = ("newton_schulz", "svd")
# The root mean square of AdamW's updates in units of its learning rate, measured in language models (Liu et al., arXiv
# 2502.16982): with it, learning rates and weight decays of AdamW carry over.
ADAMW_RMS = 0.2


def equivariant_param_groups(
    model: nn.Module,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    *,
    multipliers: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """
    Groups of a model's trainable parameters by treatment, read from the table of frames.

    Weight decay applies to matrices and tables; vectors and single numbers have none, as is usual.

    Args:
        model: A RiGPT.
        lr: Learning rate as one would give it to AdamW.
        weight_decay: Decoupled, as a rate: a step takes `lr · weight_decay` of the weights away.
        multipliers: By treatment, what `lr` is multiplied by; 1 if not given.

    Raises:
        ValueError: if the table of frames lacks a parameter, or `multipliers` names no treatment.
    """
    multipliers = dict(multipliers or {})
    for name in multipliers:
        if name not in TREATMENTS:
            raise ValueError(f"`multipliers` must be keyed by {', '.join(TREATMENTS)}, got {name!r}.")
    groups: dict[tuple[Treatment, int], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        treatment, blocks = treatment_of(model.config, name)
        decay = weight_decay if treatment in ("polar", "rows") else 0.0
        group = groups.setdefault(
            (treatment, blocks),
            {
                "params": [],
                "names": [],
                "treatment": treatment,
                "blocks": blocks,
                "lr": lr * multipliers.get(treatment, 1.0),
                "weight_decay": decay,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def treatment_of(config: Any, name: str) -> tuple[Treatment, int]:
    """
    How the parameter `name` is updated, and into how many vectors it falls (1 unless the treatment is `vectors`).

    Raises:
        ValueError: if the table of frames has no such parameter.
    """
    entry, layer = row(name, axes(config))
    keys = frame_keys(config)
    if len(entry) == 2:
        # Neurons only change places, but a matrix from or to a frame has them on its other side.
        return ("polar", 1) if entry[0] and entry[1] else ("rows", 1)
    vectors = 0
    for turn in entry[0]:
        frame = keys.get(turn.frame) or keys[layer + turn.frame]
        if isinstance(frame.group, MatrixGroup) and turn.role in ("vector", "covector"):
            vectors = frame.copies
        elif vectors and turn.role == "query":
            vectors = config.num_attention_heads
    return ("vectors", vectors) if vectors else ("elements", 1)


class EquivariantOptimizer(torch.optim.Optimizer):
    """
    Updates that turn along with the frames of a RiGPT: polar factors for matrices, Adam with shared second moments for
    the rest. An ordinary optimizer otherwise: state dicts, closures, schedulers.

    Args:
        params: What [`equivariant_param_groups`] gives.
        lr: Learning rate of groups that have none of their own, in AdamW's usual units: updates of matrices are scaled
            to the root mean square that AdamW's have.
        momentum: Of matrices, with Nesterov's correction.
        betas: Of Adam's first and second moments.
        eps: Added to the root of second moments.
        weight_decay: Of groups that have none of their own; decoupled.
        polar: `"newton_schulz"`, or `"svd"`: exact, slow, for tests.
        steps: Iterations of Newton–Schulz.

    Raises:
        ValueError: if a group does not say its treatment, or a number is out of its range.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float | torch.Tensor = 1e-3,
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        polar: str = "newton_schulz",
        steps: int = 5,
    ):
        for name, value, valid, rule in (
            ("lr", lr, lr >= 0, "at least 0"),
            ("momentum", momentum, 0 <= momentum < 1, "in [0, 1)"),
            ("betas", betas, all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)"),
            ("eps", eps, eps > 0, "positive"),
            ("weight_decay", weight_decay, weight_decay >= 0, "at least 0"),
            ("polar", polar, polar in POLAR_METHODS, f"one of {', '.join(POLAR_METHODS)}"),
            ("steps", steps, steps >= 1, "at least 1"),
        ):
            if not valid:
                raise ValueError(f"`{name}` must be {rule}, got {value!r}.")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "polar": polar,
            "steps": steps,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As for every optimizer; the group must say its treatment."""
        if not isinstance(param_group, dict) or param_group.get("treatment") not in TREATMENTS:
            raise ValueError(
                "`params` must be groups that say how their parameters turn, got one without a `treatment`. Pass "
                "`equivariant_param_groups(model)`, not `model.parameters()`."
            )
        param_group.setdefault("blocks", 1)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """One update; `closure` recomputes the loss, with gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            if any(parameter.grad.is_sparse for parameter in parameters):
                raise ValueError(
                    "`params` must have dense gradients, got a sparse one. Use `nn.Embedding(sparse=False)`."
                )
            if group["treatment"] == "polar":
                self._step_matrices(group, parameters)
            else:
                self._step_adam(group, parameters)
        return loss

    def _step_matrices(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        gradients = [parameter.grad for parameter in parameters]
        buffers = [self._state(parameter, "momentum_buffer") for parameter in parameters]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, gradients)
        directions = torch._foreach_mul(buffers, group["momentum"])
        torch._foreach_add_(directions, gradients)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        for indices in _of_equal_shape(parameters):
            stacked = torch.stack([directions[index] for index in indices])
            factors = exact_polar(stacked) if group["polar"] == "svd" else newton_schulz(stacked, group["steps"])
            size = ADAMW_RMS * max(stacked.shape[-2:]) ** 0.5
            chosen = [parameters[index] for index in indices]
            torch._foreach_sub_(chosen, torch._foreach_mul(list(factors.to(chosen[0].dtype)), group["lr"] * size))

    def _step_adam(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        first, second = group["betas"]
        for parameter in parameters:
            gradient = parameter.grad
            state = self.state[parameter]
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(_shared_square(gradient, group))
            step = state["step"].add_(1)
            state["exp_avg"].lerp_(gradient, 1 - first)
            state["exp_avg_sq"].lerp_(_shared_square(gradient, group), 1 - second)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            mean = state["exp_avg"] / (1 - first**step)
            root = (state["exp_avg_sq"] / (1 - second**step)).sqrt() + group["eps"]
            update = (mean.reshape(*root.shape[:-1], -1) / root).reshape(parameter.shape)
            parameter.sub_(group["lr"] * update)

    def _state(self, parameter: torch.Tensor, name: str) -> torch.Tensor:
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter)
        return state[name]


def _shared_square(gradient: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """The mean square `[..., 1]` over what turns together: a row, a vector, or a single number."""
    match group["treatment"]:
        case "rows":
            vectors = gradient
        case "vectors":
            vectors = gradient.reshape(group["blocks"], -1)
        case _:
            vectors = gradient.reshape(-1, 1)
    return vectors.square().mean(-1, keepdim=True)


def _of_equal_shape(parameters: list[torch.Tensor]) -> list[list[int]]:
    """Indices of parameters that can be treated as one stack."""
    stacks: dict[tuple, list[int]] = {}
    for index, parameter in enumerate(parameters):
        stacks.setdefault((tuple(parameter.shape), parameter.dtype, parameter.device), []).append(index)
    return list(stacks.values())
