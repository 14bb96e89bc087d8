"""Depth as time: a layer as a vector field on the stream, and the flow of that field from one layer to the next.

    x(t) [B, S, d], t from 0 to L              the stream; L layers
    dx/dt = f(t, x) = layer(t)(x) - x          layer(t) has the weights of layer floor(t), or those between it and the
                                               next, (1 - s) W_l + s W_l+1 at t = l + s (W_L-1 behind the last)
    x(l+1) = x(l) + f(l, x(l)) = layer_l(x(l)) one explicit Euler step per layer: the ordinary network

Residual networks as Euler steps of an ODE, and the adjoint equation for gradients: Chen et al. 2018, arXiv 1806.07366;
the symmetries of such ODEs: Hashimoto, Hirono, Sannai, arXiv 2402.02362. Layers are integrated one by one, so that
jumps and kinks of the weights lie between steps, where they cost no order of convergence.
"""

import copy
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache

from .configuration_rigpt import ADAPTIVE_SOLVERS, FIXED_STEP_SOLVERS, RiGPTConfig


# Solvers by name, filled by `torchdiffeq`. Left alone by `torch.compile`, which would unroll their loops for ever.
SOLVERS: dict[str, Callable] = {}


def torchdiffeq() -> None:
    """
    Fetch the library of solvers, when somebody needs it.

    Not by an import statement: for those Transformers looks in code that travels with a model, and would then refuse
    to load any RiGPT without the library.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        # The loader makes models on the meta device, where the tables of the library's solvers would have no numbers.
        with torch.device("cpu"):
            library = importlib.import_module("torchdiffeq")
    except ModuleNotFoundError as error:
        raise ImportError(
            "`depth_solver` needs torchdiffeq, which is not installed. Run `pip install rigpt-hf[flow]`, or load with "
            "depth_solver=None."
        ) from error
    if not SOLVERS:
        SOLVERS.update({name: torch.compiler.disable(getattr(library, name)) for name in ("odeint", "odeint_adjoint")})


def evaluations_per_layer(config: RiGPTConfig) -> int | None:
    """How often a layer is evaluated on its way to the next; `None` where the solver chooses."""
    if config.depth_solver is None:
        return 1
    per_step = FIXED_STEP_SOLVERS.get(config.depth_solver)
    return None if per_step is None else per_step * config.depth_steps


class LayerWithWeights(nn.Module):
    """A layer's two residual lines, to be called with other weights than its own."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.layer.block(hidden_states, **kwargs)


def increment(layer: nn.Module, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
    """`layer(x) - x` for `x` `[B, S, d]`: the field while the layer's weights hold."""
    return layer.block(hidden_states, **kwargs) - hidden_states


def present_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """A layer's parameters by name; offloading fetches those that it keeps elsewhere, as for a forward pass."""
    hooks = [(module._hf_hook, module) for module in layer.modules() if hasattr(module, "_hf_hook")]
    for hook, module in hooks:
        hook.pre_forward(module)
    parameters = dict(layer.named_parameters())
    for hook, module in hooks:
        hook.post_forward(module, None)
    return parameters


class LayerBetween:
    """
    The layers on the way from one to the next: weights `(1 - s) W + s W'`.

    Args:
        layer, following: At `s = 0` and `s = 1`.

    Raises:
        ValueError: if the two do not have the same parameters.
    """

    def __init__(self, layer: nn.Module, following: nn.Module):
        first, second = present_parameters(layer), present_parameters(following)
        for name in (*first, *second):
            if name not in first or name not in second or first[name].shape != second[name].shape:
                raise ValueError(
                    f"`depth_interpolation='linear'` needs layers with the same parameters, got {name!r} in one of "
                    "two neighbours only. Use 'constant'."
                )
            if name.count(".") > 2:
                raise ValueError(
                    "`depth_interpolation='linear'` must not meet adapters, as a product of interpolated factors is "
                    f"no interpolated product, got {name!r}. Merge them first, or use 'constant'."
                )
            if not first[name].is_floating_point():
                raise ValueError(
                    "`depth_interpolation='linear'` adds weights of neighbouring layers and must not meet quantized "
                    f"ones, got {name!r} of {first[name].dtype}. Load without quantization, or use 'constant'."
                )
        self.ends = {f"layer.{name}": (weight, second[name].to(weight.device)) for name, weight in first.items()}
        # Offloading would put the layer's own weights back.
        if any(hasattr(module, "_hf_hook") for module in layer.modules()):
            training = layer.training
            with torch.device("meta"):
                layer = type(layer)(layer.self_attn.config, layer.self_attn.layer_idx).train(training)
        self.module = LayerWithWeights(layer)

    def increment(self, s: float | torch.Tensor, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """`layer(x) - x` for `x` `[B, S, d]`; `s` may be a tensor, to take derivatives by it."""
        weights = {}
        for name, (start, end) in self.ends.items():
            weights[name] = torch.lerp(start, end, s.to(start.dtype) if isinstance(s, torch.Tensor) else s)
        return torch.func.functional_call(self.module, weights, (hidden_states,), kwargs) - hidden_states


class CacheSlots:
    """Gives every evaluation of a layer its own place in a cache, in the order in which the solver makes them."""

    def __init__(self, cache: Cache, first: int):
        self.cache, self.next = cache, first

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args, **kwargs):
        """As `Cache.update`; the place is counted, `layer_idx` is not looked at."""
        self.next += 1
        return self.cache.update(key, value, self.next - 1, *args, **kwargs)


def flow_through(
    layer: nn.Module,
    hidden_states: torch.Tensor,
    following: nn.Module | None = None,
    past_key_values: Cache | None = None,
    **kwargs,
) -> torch.Tensor:
    """
    The stream at the next layer, from the stream `[B, S, d]` at this one.

    Args:
        layer: Whose config says how to solve.
        following: The next layer, towards whose weights to go; `None` to keep this layer's.
        past_key_values: Each evaluation of the field is a layer of its own there.
        kwargs: For the layer.

    Raises:
        ValueError: if the layer drops out something, or 16 bits are too few for the solver.
    """
    config = layer.self_attn.config
    check_dropout(layer, config)
    precision = hidden_states.dtype
    if torch.is_autocast_enabled(hidden_states.device.type):
        precision = torch.get_autocast_dtype(hidden_states.device.type)
    if config.depth_solver in ADAPTIVE_SOLVERS and precision in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"`depth_solver={config.depth_solver!r}` needs at least single precision to choose its steps, got "
            f"{precision}. Use dtype='float32' without mixed precision, or a solver with fixed steps."
        )
    if past_key_values is not None:
        first = layer.self_attn.layer_idx * (evaluations_per_layer(config) or 0)
        kwargs["past_key_values"] = CacheSlots(past_key_values, first)
    parameters = [*layer.parameters()]
    between: LayerBetween | None = None
    if following is not None and config.depth_interpolation == "linear":
        parameters += following.parameters()
        between = LayerBetween(layer, following)

    def field(s: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if between is None:
            return increment(layer, x, **kwargs)
        # Steps that are chosen depend on the stream, and so does the time in them.
        return between.increment(s if s.requires_grad else float(s), x, **kwargs)

    return solve(
        field,
        hidden_states,
        config.depth_solver,
        steps=config.depth_steps,
        rtol=config.depth_rtol,
        atol=config.depth_atol,
        adjoint=parameters if config.depth_adjoint and torch.is_grad_enabled() else None,
    )


def solve(
    field: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    solver: str,
    start: float = 0.0,
    end: float = 1.0,
    *,
    steps: int = 1,
    rtol: float = 1e-5,
    atol: float = 1e-6,
    adjoint: list[nn.Parameter] | None = None,
) -> torch.Tensor:
    """
    The solution of `dx/dt = field(t, x)` at `end`, from `x` at `start`.

    Steps are chosen in a way that does not depend on the basis: by the root mean square over all of the error against
    `atol + rtol * rms(x)`, one number for all coordinates.

    Args:
        field, x: Of the equation; `x` of any shape.
        solver: One of torchdiffeq's.
        steps: Of equal size, for a solver with fixed steps.
        rtol, atol: Tolerances of the others.
        adjoint: Take gradients from the adjoint equation; the parameters that `field` depends on.
    """
    if not SOLVERS:
        torchdiffeq()
    times = torch.tensor([start, end], dtype=x.dtype, device=x.device)
    settings: dict[str, Any] = {"method": solver}
    parameters = None if adjoint is None else tuple(each for each in adjoint if each.requires_grad)
    if solver in FIXED_STEP_SOLVERS:
        # Not `step_size`, whose multiples may miss the end by rounding and add a step.
        parts = torch.arange(steps + 1, dtype=x.dtype, device=x.device) / steps
        settings["options"] = {"grid_constructor": lambda _, __, t: torch.lerp(t[0], t[-1], parts)}
        if parameters is None:
            return SOLVERS["odeint"](field, x, times, **settings)[-1]
        return SOLVERS["odeint_adjoint"](field, x, times, adjoint_params=parameters, **settings)[-1]
    size = root_mean_square(x.detach())
    share = rtol + atol / size.clamp_min(torch.finfo(size.dtype).tiny)
    # torchdiffeq's `rtol` would weigh a coordinate's error by that coordinate, which singles out a basis.
    settings |= {"rtol": 0.0, "atol": atol + rtol * size}
    # Otherwise a solver steps beyond the end, where other weights hold, and interpolates back at a lower order.
    settings["options"] = {"step_t": times}
    if parameters is None:
        return SOLVERS["odeint"](field, x, times, **settings)[-1]
    return _with_chosen_steps_back(field, x, times, parameters, settings, share)


def root_mean_square(x: torch.Tensor) -> torch.Tensor:
    """`[]`, over all elements; the same in every orthogonal frame of the last axis."""
    return x.square().mean().sqrt()


class AdjointNorm:
    """
    The size of the adjoint equation's state in units of its tolerances: of the stream and of the gradient by it, each
    as a whole, relative to where they start. Gradients of parameters are integrals along the two and have no say
    (Kidger, Chen, Lyons, arXiv 2009.09457).

    Args:
        size: Of the stream.
        share: Tolerance relative to the size.
    """

    def __init__(self, size: torch.Tensor, share: torch.Tensor):
        self.share, self.stream, self.gradient = share, size * share, size * share

    def starts_from(self, gradient: torch.Tensor) -> None:
        """Called with the loss's gradient by the end of the flow, before the way back."""
        size = root_mean_square(gradient)
        self.gradient = self.share * size.clamp_min(torch.finfo(size.dtype).tiny)

    def __call__(self, state: tuple[torch.Tensor, ...]) -> torch.Tensor:
        _, x, gradient, *_ = state
        return torch.maximum(root_mean_square(x) / self.stream, root_mean_square(gradient) / self.gradient)


@torch.compiler.disable
def _with_chosen_steps_back(
    field: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    times: torch.Tensor,
    parameters: tuple[nn.Parameter, ...],
    settings: dict[str, Any],
    share: torch.Tensor,
) -> torch.Tensor:
    norm = AdjointNorm(root_mean_square(x.detach()), share)
    # The norm has units already.
    back = {"adjoint_rtol": 0.0, "adjoint_atol": 1.0, "adjoint_options": settings["options"] | {"norm": norm}}
    found = SOLVERS["odeint_adjoint"](field, x, times, adjoint_params=parameters, **settings, **back)[-1]
    if found.requires_grad:
        found.register_hook(norm.starts_from)
    return found


def check_dropout(layer: nn.Module, config: RiGPTConfig) -> None:
    """Raises a `ValueError` where evaluations of one layer in training would each draw a dropout of their own."""
    if not layer.training or (evaluations_per_layer(config) == 1 and not config.depth_adjoint):
        return
    rates = {name: getattr(config, name) for name in ("attention_dropout", "residual_dropout")}
    # Adapters bring their own.
    rates["dropout"] = max((m.p for m in layer.modules() if isinstance(m, nn.Dropout) and m.training), default=0.0)
    for name, rate in rates.items():
        if rate > 0:
            raise ValueError(
                f"`{name}` must be 0 to train with `depth_solver={config.depth_solver!r}`, which evaluates a layer "
                f"more than once and would drop anew each time, got {rate}. Set it to 0."
            )


def prepare_cache(
    config: RiGPTConfig, past_key_values: Cache | None, use_cache: bool | None, kwargs: Mapping[str, Any]
) -> tuple[Cache | None, bool | None]:
    """
    The cache to fill in this forward pass, a new one if there is to be one, and whether keys and values are kept.

    Args:
        config: Of the model; with a solver, every evaluation of a layer needs a place of its own.
        past_key_values, use_cache, kwargs: As the model is called; `cache` is that of continuous batching.

    Raises:
        ValueError: if there is a cache that cannot be used.
    """
    if config.depth_solver is not None:
        use_cache = use_of_cache(config, past_key_values, use_cache, kwargs.get("cache") is not None)
    if use_cache and past_key_values is None:
        past_key_values = DynamicCache(config=config)
    if config.depth_solver is not None and past_key_values is not None:
        make_room(past_key_values, config)
    return past_key_values, use_cache


def neighbours(layers: Iterable[nn.Module], config: RiGPTConfig) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """
    Each layer, and as an argument for it the next one, where the flow goes towards the weights of that.

    No more than the configuration says at this moment: generation by early exit changes it for a draft.
    """
    between = config.depth_interpolation == "linear"
    for layer, following in [*pairwise([*layers, None])][: config.num_hidden_layers]:
        yield layer, {"following": following} if between else {}


def use_of_cache(config: RiGPTConfig, past_key_values: Cache | None, use_cache: bool | None, paged: bool) -> bool:
    """
    Whether keys and values are kept in this forward pass.

    Raises:
        ValueError: if there is a cache that cannot be used.
    """
    reason = None
    if config.depth_solver in ADAPTIVE_SOLVERS:
        reason = f"`depth_solver={config.depth_solver!r}`, which chooses its steps from all positions at once"
    elif config.depth_adjoint and torch.is_grad_enabled():
        reason = "`depth_adjoint=True` where gradients are wanted, as it evaluates layers again on the way back"
    if paged:
        reason = f"`depth_solver={config.depth_solver!r}` from continuous batching, which has no place for evaluations"
    if reason is None:
        return bool(use_cache)
    if paged or past_key_values is not None:
        raise ValueError(f"`past_key_values` must be left out with {reason}, got one. Pass `use_cache=False`.")
    return False


def make_room(cache: Cache, config: RiGPTConfig) -> None:
    """
    A place in a cache for every evaluation of the field, before the first one is filled.

    Raises:
        ValueError: if the cache has been filled by another model or another solver, as far as their number tells.
    """
    wanted = config.num_hidden_layers * (evaluations_per_layer(config) or 0)
    layers: Any = getattr(cache, "layers", None)
    filled = bool(layers) and any(layer.is_initialized for layer in layers)
    grows = getattr(cache, "layer_class_to_replicate", None) is not None
    if len(layers or ()) == wanted if filled else grows or len(layers or ()) >= wanted:
        return
    if not layers or filled:
        raise ValueError(
            f"`past_key_values` must be empty or have a place for each of {wanted} evaluations with "
            f"`depth_solver={config.depth_solver!r}`, got {type(cache).__name__} of {len(layers or ())}. Pass a new "
            f"DynamicCache(config=model.config), or `num_layers={wanted}` to PEFT's prefix tuning."
        )
    # A place for each evaluation of a layer, of the kind that the layer has.
    evaluations = wanted // config.num_hidden_layers
    layers[:] = [copy.deepcopy(layers[min(place // evaluations, len(layers) - 1)]) for place in range(wanted)]
