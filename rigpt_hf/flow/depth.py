"""
Depth as time: the vector field of a RiGPT's layers, its flow, and how fast solvers converge to it.

    x(t) [B, S, d]              stream; t from 0 to the number of layers L
    f(t, x) [B, S, d]           layer(t)(x) - x

The model itself follows this flow where its config names a `depth_solver`; formulas and sources are in
`rigpt_hf/flow_rigpt.py`. Here any RiGPT lends its layers, whether or not it was made for that.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..configuration_rigpt import DEPTH_INTERPOLATIONS, FIXED_STEP_SOLVERS
from ..flow_rigpt import LayerBetween, increment, solve


# The solver of the flow that solvers with fixed steps are compared with, in float64.
REFERENCE: dict[str, Any] = {"solver": "dopri8", "rtol": 1e-11, "atol": 1e-13}


class LayerField:
    """
    `f(t, x) = layer(t)(x) - x`, for any solver; [`layer_field`] makes it.

    With constant weights `t` belongs to layer `floor(t)` and `f` jumps at whole `t`; with linear ones `f` is
    continuous and has kinks there. A solver of high order must not step across them: integrate from one whole `t`
    to the next, with [`inside`] the layer. Outside of `[0, L]` the nearest weights hold.

    Args:
        layers: The model's, `L` of them.
        arguments: The other arguments of each layer: mask, positions, tokens.
        interpolation: `"constant"` or `"linear"`.
    """

    def __init__(self, layers: Sequence[nn.Module], arguments: Sequence[dict[str, Any]], interpolation: str):
        self.layers, self.arguments, self.interpolation = list(layers), arguments, interpolation
        pairs = pairwise(self.layers) if interpolation == "linear" else ()
        self.between = [LayerBetween(layer, following) for layer, following in pairs]

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        """`f` `[B, S, d]` at `t` `[]`, differentiable in both."""
        return self._at(max(0, min(math.floor(float(t.detach())), len(self.layers) - 1)), t, x)

    def inside(self, layer: int) -> Callable[[Tensor, Tensor], Tensor]:
        """The smooth field of one layer, `layer <= t <= layer + 1`, both ends included."""
        return lambda t, x: self._at(layer, t, x)

    def _at(self, layer: int, t: Tensor, x: Tensor) -> Tensor:
        if layer < len(self.between):
            return self.between[layer].increment((t - layer).clamp(0, 1), x, **self.arguments[layer])
        return increment(self.layers[layer], x, **self.arguments[layer])


def layer_field(
    model: nn.Module, input_ids: Tensor | None = None, *, interpolation: str | None = None, **inputs: Any
) -> tuple[LayerField, Tensor]:
    """
    The field of a model's layers on these inputs, and where the stream starts.

    Costs one forward pass, in which the model prepares mask and positions. Both have gradients by the model's
    parameters, as usual.

    Args:
        model: A RiGPT with or without a head, without dropout or in evaluation mode.
        input_ids (`Tensor` of shape `[B, S]`), inputs: As the model takes them: `attention_mask`, `position_ids`, ...
        interpolation: `"constant"` or `"linear"`; the config's `depth_interpolation` by default.

    Returns:
        The field, and `x(0)` `[B, S, d]`.

    Raises:
        ValueError: if dropout would make the field random, layers have frames of their own, or neighbours cannot be
            interpolated.
    """
    config = model.config
    interpolation = config.depth_interpolation if interpolation is None else interpolation
    if interpolation not in DEPTH_INTERPOLATIONS:
        raise ValueError(f"`interpolation` must be one of {', '.join(DEPTH_INTERPOLATIONS)}, got {interpolation!r}.")
    if config.local_frames:
        raise ValueError(
            "`model` must have one frame for all layers, as a field has, got `local_frames=True`. Pass "
            "`rigpt_hf.symmetry.to_global_frame(model)`."
        )
    if interpolation == "linear" and config.value_embedding_period is not None:
        raise ValueError(
            "`interpolation` must be 'constant' for layers with different parameters, got 'linear' with "
            f"`value_embedding_period={config.value_embedding_period}`."
        )
    if inputs.get("past_key_values") is not None:
        raise ValueError("`past_key_values` must be left out, as a field is of whole sequences, got a cache.")
    if model.training and (config.attention_dropout or config.residual_dropout or config.embedding_dropout):
        raise ValueError("`model` must not drop anything, or the field is random, got dropout. Call `model.eval()`.")
    base = getattr(model, model.base_model_prefix, model)
    seen: list[tuple[Tensor, dict[str, Any]]] = []
    handles = [
        layer.register_forward_pre_hook(lambda module, args, kwargs: seen.append((args[0], kwargs)), with_kwargs=True)
        for layer in base.layers
    ]
    try:
        base(input_ids, use_cache=False, **inputs)
    finally:
        for handle in handles:
            handle.remove()
    unwanted = ("past_key_values", "use_cache", "following")
    arguments = [{name: value for name, value in each.items() if name not in unwanted} for _, each in seen]
    return LayerField(base.layers, arguments, interpolation), seen[0][0]


def trajectory(
    model: nn.Module,
    input_ids: Tensor | None = None,
    times: Sequence[float] | None = None,
    *,
    solver: str = "dopri5",
    steps: int = 1,
    rtol: float = 1e-8,
    atol: float = 1e-10,
    interpolation: str | None = None,
    **inputs: Any,
) -> Tensor:
    """
    The stream `[times, B, S, d]` along the flow, before the last norm.

    Integrated layer by layer, and from each of the times to the next, so that nothing is interpolated.

    Args:
        model, input_ids, interpolation, inputs: As in [`layer_field`].
        times: Increasing, from 0 to L; the beginning, every layer and the end by default. Euler's method with one step
            gives the ordinary network's hidden states there.
        solver: One of torchdiffeq's.
        steps: Per layer, of a solver with fixed steps; at least one between two times.
        rtol, atol: Tolerances of the others.

    Raises:
        ValueError: if `times` are not increasing or leave `[0, L]`, or as in [`layer_field`].
    """
    field, x = layer_field(model, input_ids, interpolation=interpolation, **inputs)
    depth = len(field.layers)
    times = list(range(depth + 1)) if times is None else [float(time) for time in times]
    if not times or any(b <= a for a, b in pairwise(times)) or not 0 <= times[0] <= times[-1] <= depth:
        raise ValueError(
            f"`times` must increase from 0 or later to at most {depth}, the layers there are, got {times}."
        )
    states = {0.0: x}
    for start, end in pairwise(sorted({0.0, *map(float, times), *map(float, range(math.ceil(times[-1])))})):
        count = max(1, round(steps * (end - start)))
        piece = field.inside(min(math.floor(start), depth - 1))
        states[end] = x = solve(piece, x, solver, start, end, steps=count, rtol=rtol, atol=atol)
    return torch.stack([states[float(time)] for time in times])


class Refinement(NamedTuple):
    """
    The error of a solver at one step size.

    Args:
        step (`float`): Size of a step; a layer is one unit of time.
        error (`float`): `max |x(L) - flow| / max |flow|`.
    """

    step: float
    error: float


@torch.no_grad()
def flow_end(model: nn.Module, input_ids: Tensor, *, interpolation: str | None = None) -> Tensor:
    """`x(L)` `[B, S, d]` of the flow, as exactly as float64 allows; arguments as in [`layer_field`]."""
    return _layer_by_layer(*layer_field(model, input_ids, interpolation=interpolation), **REFERENCE)


@torch.no_grad()
def refinement(
    model: nn.Module,
    input_ids: Tensor,
    solver: str,
    steps: Sequence[int],
    *,
    interpolation: str | None = None,
    across_layers: bool = False,
    reference: Tensor | None = None,
) -> list[Refinement]:
    """
    How a solver with fixed steps comes to the flow as its steps are refined: the error falls as `step ** order`.

    The order is the solver's (1 Euler, 2 midpoint and Heun, 4 Runge-Kutta) if the field is as smooth as that: not with
    `relu` (and little better with `relu2`), nor where a step goes across the jumps and kinks between layers. Wants a
    model in float64.

    Args:
        model, input_ids, interpolation: As in [`layer_field`].
        solver: One with fixed steps.
        steps: Per layer, several numbers.
        across_layers: Make all steps of one size that takes no notice of where layers begin, for comparison.
        reference: `x(L)` of the flow, from [`flow_end`], which else is computed again for every solver.

    Raises:
        ValueError: if `solver` chooses its steps itself, or as in [`layer_field`].
    """
    if solver not in FIXED_STEP_SOLVERS:
        raise ValueError(f"`solver` must be one of {', '.join(FIXED_STEP_SOLVERS)}, got {solver!r}.")
    field, start = layer_field(model, input_ids, interpolation=interpolation)
    depth = len(field.layers)
    exact = flow_end(model, input_ids, interpolation=interpolation) if reference is None else reference
    records = []
    for count in steps:
        if across_layers:
            total = count * depth + 1  # no whole number of steps makes a layer
            end, size = solve(field, start, solver, 0.0, float(depth), steps=total), depth / total
        else:
            end, size = _layer_by_layer(field, start, solver=solver, steps=count), 1 / count
        records.append(Refinement(size, float((end - exact).abs().max() / exact.abs().max())))
    return records


def fitted_order(records: Sequence[Refinement]) -> float:
    """The slope of `log error` over `log step`, by least squares."""
    step, error = (torch.tensor(values, dtype=torch.float64).log() for values in zip(*records, strict=True))
    centred = step - step.mean()
    return float((centred * error).sum() / centred.square().sum())


def _layer_by_layer(field: LayerField, x: Tensor, solver: str, **settings: Any) -> Tensor:
    for layer in range(len(field.layers)):
        x = solve(field.inside(layer), x, solver, float(layer), float(layer + 1), **settings)
    return x
