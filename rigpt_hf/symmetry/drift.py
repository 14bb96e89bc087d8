"""
How well gradient descent keeps what gradient flow conserves, and how fast weight decay forgets it.

With step size η and rate μ of weight decay one step is `θ' = (1 - ημ)θ - η∇L`. The pairing of the gradient with the
generators is zero, so a quadratic charge becomes exactly `Q' = (1 - ημ)² Q + η² Q[∇L]`, where `Q[∇L]` is the same form
evaluated on the gradient. Over a fixed time there are `time / η` steps: what the gradient does adds up to O(η), and
the factors of weight decay multiply to `exp(-2μt)` up to O(η). Linear charges see no gradient and decay as
`exp(-μt)`. See `conservation.py` for where the charges come from.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

from ..frames import FrameKey, table_of
from ..modeling_rigpt import freeze_transports
from .conservation import charges
from .contraction import weights_of


# A charge is looked at so many times along a descent: it costs about as much as a step.
POINTS = 16
# Below this share of the weights a charge or its drift is rounding.
ROUNDING = 1e-13
# A whole number of steps has to reach `time` up to this share of a step.
WHOLE = 1e-6
# More steps of all descents together are days.
MOST_STEPS = 1_000_000


@dataclass(frozen=True)
class Descent:
    """
    The charges along one gradient descent. Dictionaries are by kind of frame (`head_qk`), all layers together; lists
    run along `times`.

    Args:
        learning_rate: The step size η.
        times: `steps · η`, from 0 to the whole time.
        losses: In nats per token.
        drift: `|Q(t) - (1 - ημ)^2n Q(0)| / Σ|W|²` after n steps, over the parameters that carry the frame; for linear
            charges the power is n and `|Q(0)|` divides. The gradient's part in the change of the charges.
        kept: `<Q(t), Q(0)> / |Q(0)|²`, which under gradient flow is 1 without weight decay and an exponential with it;
            NaN where a charge is zero from the start.
    """

    learning_rate: float
    times: list[float]
    losses: list[float]
    drift: dict[str, list[float]]
    kept: dict[str, list[float]]


@dataclass(frozen=True)
class DriftReport:
    """
    The measurements of `charge_drift`.

    Args:
        time: Length of every descent, in units of `steps · learning rate`.
        weight_decay: The rate μ.
        descents: One per learning rate, from the largest to the smallest.
        orders: By kind of frame the exponent p of `drift ~ η^p` at the end, fitted over all learning rates; NaN where
            nothing drifts. Predicted: 1.
        predicted_rates: Rates of decay per unit of time: 2μ for quadratic charges, μ for linear ones.
        measured_rates: `-log(kept) / time` at the smallest learning rate; NaN where a charge is zero from the start.
    """

    time: float
    weight_decay: float
    descents: list[Descent]
    orders: dict[str, float]
    predicted_rates: dict[str, float]
    measured_rates: dict[str, float]


def charge_drift(
    model: nn.Module,
    input_ids: torch.Tensor,
    *,
    learning_rates: Sequence[float] = (0.02, 0.01, 0.005),
    time: float = 0.4,
    weight_decay: float = 0.0,
    progress: bool = True,
) -> DriftReport:
    """
    Descend the loss on `input_ids`, all of them in every step, from the same weights with every learning rate over the
    same time, and measure what becomes of the charges.

    The descents run on one copy of the model in float64, without dropout; the model itself stays as it is. The
    defaults take 140 steps. The order is 1 once steps are small enough for descent to follow the flow: where it is
    not, lower the learning rates.

    Args:
        model: A RiGPT with a language-modelling head.
        input_ids (`torch.Tensor` of shape `[B, S]`): Tokens, also the labels.
        learning_rates: Step sizes η, at least one.
        time: Length of the descent; a whole number of steps of every learning rate.
        weight_decay: Decoupled, as a rate μ: a step takes `η μ` of the weights away.
        progress: Show a progress bar.

    Raises:
        ValueError: if a learning rate or the time is not positive, the time is no whole number of steps, the decay is
            negative, or a descent diverges.
    """
    rates = sorted({float(rate) for rate in learning_rates}, reverse=True)
    counts = step_counts(rates, time, weight_decay)
    trial = copy.deepcopy(model).to(torch.float64).eval().requires_grad_(True)
    freeze_transports(trial)
    powers = {
        kind: 2 if table_of(model.config).kinds[kind].shift is None else 1
        for kind in dict.fromkeys(FrameKey.parse(key).kind for key in charges(trial))
    }
    descents = []
    with tqdm(total=sum(counts), desc="Descending", unit="step", disable=not progress) as bar:
        for rate, steps in zip(rates, counts, strict=True):
            with torch.no_grad():
                for parameter, start in zip(trial.parameters(), model.parameters(), strict=True):
                    parameter.copy_(start)
            descents.append(_descend(trial, input_ids, rate, steps, weight_decay, powers, bar))
    return DriftReport(
        time=time,
        weight_decay=weight_decay,
        descents=descents,
        orders={kind: _order(rates, [descent.drift[kind][-1] for descent in descents]) for kind in powers},
        predicted_rates={kind: power * weight_decay for kind, power in powers.items()},
        measured_rates={kind: _rate(descents[-1].kept[kind][-1], time) for kind in powers},
    )


def step_counts(rates: list[float], time: float, weight_decay: float) -> list[int]:
    """Numbers of steps that make up `time` at each learning rate; a `ValueError` as `charge_drift` says."""
    # Comparisons with NaN are false, so each says what must hold.
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise ValueError(f"`learning_rates` must be one or more positive step sizes, got {rates}.")
    if not 0 < time < math.inf:
        raise ValueError(f"`time` must be positive and finite, got {time}.")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"`weight_decay` must not be negative, and finite, got {weight_decay}.")
    if sum(time / rate for rate in rates) > MOST_STEPS:
        raise ValueError(
            f"`time` must take at most {MOST_STEPS:,} steps with all learning rates together, got {time:g} with "
            f"{rates}. Shorten it, or raise the learning rates."
        )
    counts = [round(time / rate) for rate in rates]
    for rate, count in zip(rates, counts, strict=True):
        if count < 1 or abs(time / rate - count) > WHOLE:
            raise ValueError(
                f"`time` must be a whole number of steps of every learning rate, got {time} with a learning rate of "
                f"{rate}. Choose learning rates that divide it."
            )
    return counts


def _descend(
    trial: nn.Module,
    input_ids: torch.Tensor,
    rate: float,
    steps: int,
    weight_decay: float,
    powers: dict[str, int],
    bar: tqdm,
) -> Descent:
    """Descend in place, and look at the charges now and then."""
    parameters = [parameter for parameter in trial.parameters() if parameter.requires_grad]
    device = parameters[0].device
    input_ids = input_ids.to(device)
    start, scales = charges(trial), _scales(trial)
    # As many looks as there are, no step twice.
    looks = sorted({round(steps * look / POINTS) for look in range(POINTS + 1)})
    descent = Descent(rate, [], [], {kind: [] for kind in powers}, {kind: [] for kind in powers})
    for step in range(steps + 1):
        loss = trial(input_ids, labels=input_ids, use_cache=False).loss
        if not math.isfinite(loss.item()):
            raise ValueError(
                f"`learning_rates` must be small enough to descend, got {rate}: after {step} steps the loss is "
                f"{loss.item()}. Lower it."
            )
        if step in looks:
            descent.times.append(step * rate)
            descent.losses.append(loss.item())
            shares = {kind: (1 - rate * weight_decay) ** (power * step) for kind, power in powers.items()}
            _look(descent, start, charges(trial), scales, shares)
        if step == steps:
            return descent
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.mul_(1 - rate * weight_decay).sub_(gradient, alpha=rate)
        bar.update()
    raise AssertionError("the last step returns")


def _scales(model: nn.Module) -> dict[str, float]:
    """By kind of frame `Σ|W|²` of the parameters that carry it; of linear charges, which none carries, nothing."""
    table = table_of(model.config)
    squares = {name: float(weight.square().sum()) for name, weight in weights_of(model).items()}
    scales = dict.fromkeys(table.kinds, 0.0)
    for key in table.frames:
        scales[key.kind] += sum(squares[name] for name in dict.fromkeys(dict(table.walk(key))) if name in squares)
    return scales


def _look(
    descent: Descent,
    start: dict[str, torch.Tensor],
    now: dict[str, torch.Tensor],
    scales: dict[str, float],
    shares: dict[str, float],
) -> None:
    """Compare the charges with those at the start, of which weight decay leaves the given shares."""
    for kind, left in shares.items():
        keys = [key for key in start if FrameKey.parse(key).kind == kind]
        before, after = (torch.cat([charge[key].flatten() for key in keys]) for charge in (start, now))
        square = float(before @ before)
        scale = scales[kind] or math.sqrt(square)
        known = math.sqrt(square) > ROUNDING * scale
        descent.drift[kind].append(float((after - left * before).norm()) / scale if scale else 0.0)
        descent.kept[kind].append(float(after @ before) / square if known else math.nan)


def _order(rates: list[float], drifts: list[float]) -> float:
    """The slope of log drift against log step size."""
    if len(rates) < 2 or min(drifts) < ROUNDING:
        return math.nan
    x, y = torch.tensor(rates).double().log(), torch.tensor(drifts).double().log()
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / (x @ x))


def _rate(kept: float, time: float) -> float:
    """The rate of an exponential decay to `kept`; NaN where the charge turned round."""
    return -math.log(kept) / time if kept > 0 else math.nan
