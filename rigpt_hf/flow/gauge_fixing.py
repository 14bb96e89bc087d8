"""
Gauge fixing by regularisation: weight decay picks one point of an orbit, the balanced one.

Write `Q_X(θ) = <Xθ, θ>` for the charge of a stretch `X = Xᵀ` (`symmetry/conservation.py`).

*On one orbit.* Half the squared norm changes by `Q_X` when the point moves along X, so where it is least every charge
is zero; for groups of matrices the converse holds, and two such points differ by rotations only (Kempf and Ness 1979;
for real groups Richardson and Slodowy 1990). Weight decay restricted to the orbit is `dθ/dt = -λ P θ` with P the
projection on the tangent space of the orbit. As `θ - Pθ` pairs to zero with every `Xθ`, the charge obeys
`dQ_X/dt = 2 <Xθ, -λPθ> = -2λ Q_X`. That descents of the norm along an orbit converge: Bürgisser et al. 2019, arXiv
1910.12375.

*In training.* `dθ/dt = -∇L - λθ` gives the same law, `dQ_X/dt = -2 <Xθ, ∇L> - 2λ Q_X = -2λ Q_X`, as the pairing of the
gradient with a symmetry is zero for every loss that sees the logits only. So `Q_X(t) = exp(-2λt) Q_X(0)` whatever the
loss is (Kunin et al. 2021, Neural Mechanics, arXiv 2012.04728; Noether charges broken by the decay alone: Tanaka and
Kunin 2021, arXiv 2105.02716), up to `O(η)` of the step size. Adam rescales the gradient by entries, after which it
pairs with nothing.

*What is comparable.* [`canonicalize`] is the point of least norm of all that stretches reach once translations are set
to zero. Three things keep that from being the least norm of the whole orbit:

- Translations (biases that may move from v to o, tokens to positions) are no group of matrices, and the norm is least
  at other values than zero: the least squares solution, where weight decay ends too; `translations="least"` goes
  there.
- What only one of two factors fills has no least norm: it shrinks for ever, and the canonical form gives it length 1.
- Rotations, reflections, exchanges: these keep the norm. The canonical form fixes them, weight decay does not, so
  distances here are taken after the compact part of the relation between the two points ([`compact_part`]).
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from ..configuration_rigpt import RiGPTConfig
from ..frames import FrameKey, table_of
from ..modeling_rigpt import freeze_transports
from ..symmetry.action import GaugeTransformation
from ..symmetry.balance import balance
from ..symmetry.canonical import canonical_gauge
from ..symmetry.conservation import charges
from ..symmetry.contraction import View, Weights, views, weights_of


TranslationsAt = Literal["zero", "least"]
Loss = Callable[[nn.Module, torch.Tensor], torch.Tensor]
# Charges of a balanced form above this share of the squared norm come from what only one factor fills.
UNPAIRED = 1e-9


@dataclass
class MinimumNorm:
    """
    A descent of the norm along an orbit, and the point it reached.

    Args:
        transformation: From the model to the point reached.
        times: `step · n`, the time of the flow with λ = 1.
        charges: `|Q(t)| / |Q(0)|`, all stretches together; `exp(-2t)` for the flow on stretches.
        norms: `|θ(t)|`.
        norm: The last of them.
        canonical_norm: The norm of the form that [`canonicalize`] gives the model.
        distance: The distance from the point reached to that form up to rotations and exchanges, relative to its norm.
    """

    transformation: GaugeTransformation
    times: list[float] = field(default_factory=list)
    charges: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    norm: float = math.nan
    canonical_norm: float = math.nan
    distance: float = math.nan


@dataclass
class DecayRecord:
    """
    A training with weight decay, seen every few steps; lists run along `times`, dictionaries by kind of frame.

    Args:
        learning_rate: η.
        weight_decay: λ.
        times: `η · steps`.
        losses: The next batch's loss, in nats per token.
        charges: `|Q(t)| / |Q(0)|`; NaN where a charge is zero from the start.
        deviations: `|Q(t) - p(t) Q(0)| / |Q(0)|` for the prediction p.
        predicted: `p(t)`: `exp(-2λt)`, and `exp(-λt)` for charges that are linear in the weights.
        norms: `|θ|`.
        balanced_norms: Norms of the balanced form of the same model.
        distances: [`balance_distance`] of the model.
    """

    learning_rate: float
    weight_decay: float
    times: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    charges: dict[str, list[float]] = field(default_factory=dict)
    deviations: dict[str, list[float]] = field(default_factory=dict)
    predicted: dict[str, list[float]] = field(default_factory=dict)
    norms: list[float] = field(default_factory=list)
    balanced_norms: list[float] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)


@torch.no_grad()
def minimum_norm(
    model: nn.Module,
    *,
    translations: TranslationsAt = "zero",
    step: float = 0.25,
    tolerance: float = 1e-14,
    max_steps: int = 10_000,
) -> tuple[nn.Module, MinimumNorm]:
    """
    The point of least norm on a model's orbit, by weight decay restricted to the orbit: the function stays all along.

    Each step is `θ ← exp(step · X) θ` with `Xθ` the projection of `-θ` on the directions of stretches, in float64.

    Args:
        model: A RiGPT; it stays as it is.
        translations: `"zero"`: they go to zero first, as in [`canonicalize`], and the point reached is its form up to
            rotations and exchanges. `"least"`: they go to the least norm too, a point that is shorter than the
            canonical form wherever the table has translations that move two parameters. The theorem of Kempf and Ness
            covers the first only.
        step: Length of a step, in units of 1/λ; below 1.
        tolerance: Stop when the charge is this small beside the squared norm.
        max_steps: At most so many.

    Returns:
        A new model of the same dtype, and the report.

    Raises:
        ValueError: if a setting is out of range, the orbit has no point of least norm, or the steps do not suffice.
    """
    if translations not in ("zero", "least"):
        raise ValueError(f'`translations` must be "zero" or "least", got {translations!r}. See its docstring.')
    if not 0 < step < 1:
        raise ValueError(f"`step` must be between 0 and 1, got {step}. Steps of 0.25 take about 50 to rounding.")
    config, given = model.config, weights_of(model)
    _check_closed(config, given)
    start = balance(config, given, passes=0)[0] if translations == "zero" else GaugeTransformation.identity(config)
    report, weights, frames = MinimumNorm(start), start.state_dict(given), table_of(config).frames
    for index in range(max_steps + 1):
        if translations == "least":
            shift = least_translations(config, weights)
            report.transformation, weights = shift @ report.transformation, shift.state_dict(weights)
        direction, charge = decay_direction(config, weights)
        report.times.append(index * step)
        report.norms.append(_norm(weights))
        report.charges.append(charge)
        if charge <= tolerance * report.norms[-1] ** 2:
            break
        if index == max_steps:
            raise ValueError(
                f"`max_steps` must be enough to bring the charge below {tolerance:g} of the squared norm, got "
                f"{max_steps}, after which it is {charge / report.norms[-1] ** 2:.1e}. Raise it, or `tolerance`."
            )
        move = GaugeTransformation(config, {key: frames[key].group.exp(step * x) for key, x in direction.items()})
        report.transformation, weights = move @ report.transformation, move.state_dict(weights)
    report.charges = [charge / max(report.charges[0], 1e-300) for charge in report.charges]
    canonical = canonical_gauge(model).transformation
    target = canonical.state_dict(given)
    report.norm, report.canonical_norm = report.norms[-1], _norm(target)
    report.distance = _apart(weights, target, canonical @ report.transformation.inverse())
    return report.transformation(model), report


def decay_direction(config: RiGPTConfig, weights: Weights) -> tuple[dict[FrameKey, torch.Tensor], float]:
    """
    The stretches X, by frame, for which `Xθ` is the projection of `-θ` on all their directions, and the norm of all
    charges. No parameter carries two frames that stretch, so each frame is solved on its own.
    """
    elements, square = {}, 0.0
    for view in _stretching(config, weights):
        square += float(view.group.generator(view.grams).square().sum())
        elements[view.key] = view.group.decay(view.grams)
    return elements, math.sqrt(square)


def _stretching(config: RiGPTConfig, weights: Weights) -> Iterator[View]:
    """The frames whose groups change lengths."""
    table = table_of(config)
    return views(table, weights, weights, [key for key, frame in table.frames.items() if frame.group.stretches])


def least_translations(config: RiGPTConfig, weights: Weights) -> GaugeTransformation:
    """The translations after which the norm is least while everything else rests: a problem of least squares."""
    table, elements = table_of(config), {}
    # Those of one layer may move the same bias.
    for layer in dict.fromkeys(key.layer for key in table.shifts):
        shifts = {key: shift for key, shift in table.shifts.items() if key.layer == layer}
        names = list(dict.fromkeys(name for shift in shifts.values() for name in shift.moves))
        columns, lengths = [], []
        for key, shift in shifts.items():
            frame = table.frames[key]
            shape = frame.group.shape(frame.copies)
            lengths.append(math.prod(shape))
            for unit in torch.eye(lengths[-1], dtype=torch.float64):
                vector = frame.group.project(unit.reshape(shape)).flatten()
                changes = {name: move(vector, weights.__getitem__) for name, move in shift.moves.items()}
                columns.append(torch.cat([_expanded(changes.get(name), weights[name]) for name in names]))
        now = torch.cat([weights[name].flatten() for name in names])
        # The smallest of all solutions: zero where nothing may move.
        solution = torch.linalg.lstsq(torch.stack(columns, dim=1), -now[:, None], driver="gelsd").solution
        for key, part in zip(shifts, solution.split(lengths), strict=True):
            elements[key] = part.reshape(table.frames[key].group.shape(table.frames[key].copies))
    return GaugeTransformation(config, elements)


def _expanded(change: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
    """A change of a weight, as one vector with an entry for each of its numbers."""
    return torch.zeros_like(weight).flatten() if change is None else change.expand_as(weight).flatten()


def _check_closed(config: RiGPTConfig, weights: Weights) -> None:
    """Only a closed orbit has a point of least norm; the charges of its balanced form are zero."""
    for view in _stretching(config, balance(config, weights)[1]):
        size = sum(float(value.norm()) for value in view.grams.values())
        left = float(view.group.generator(view.grams).norm())
        if left > UNPAIRED * size:
            raise ValueError(
                f"`model` must have an orbit with a point of least norm, got directions in {str(view.key)!r} that "
                "only one of two factors fills: their norm falls for ever. Use `canonicalize`, which gives them "
                "length 1."
            )


def compact_part(g: GaugeTransformation) -> GaugeTransformation:
    """
    The nearest transformation that keeps all lengths: the orthogonal polar factor of every matrix, exchanges and signs
    as they are, no translation. Equal to `g` if that keeps lengths itself.
    """
    linear = [(key, frame.group, element) for key, frame, element in g.items() if frame.shift is None]
    return GaugeTransformation(g.config, {key: group.compact(element) for key, group, element in linear})


@torch.no_grad()
def balance_distance(model: nn.Module, *, translations: TranslationsAt = "zero") -> float:
    """
    How far a model is from its own balanced form: `|k θ - θ*| / |θ*|`, with θ* the canonical form (or, for
    `translations="least"`, the point of least norm) and k the compact part of the transformation between the two.

    An upper bound of the distance over all rotations and exchanges, zero exactly for models that are balanced.
    """
    return _balanced_norm_and_distance(model, translations)[1]


def _balanced_norm_and_distance(model: nn.Module, translations: TranslationsAt) -> tuple[float, float]:
    least = translations == "least"
    to = (
        minimum_norm(model, translations="least")[1].transformation if least else canonical_gauge(model).transformation
    )
    weights = weights_of(model)
    target = to.state_dict(weights)
    return _norm(target), _apart(weights, target, to)


def follow_decay(
    model: nn.Module,
    batches: Iterable[torch.Tensor],
    learning_rate: float,
    weight_decay: float,
    steps: int,
    every: int,
    *,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    loss: Loss | None = None,
    translations: TranslationsAt = "zero",
) -> tuple[nn.Module, DecayRecord]:
    """
    Train a copy of a model in float64 and follow its charges, its norm and its distance to its balanced form.

    With `torch.optim.SGD` the charges obey `Q' = (1 - ηλ)² Q + η² Q[∇L]` per step, exactly, hence `exp(-2λt)` up to
    O(η). Where the gradient does not come to rest, the last term leaves a floor of about `η Q[∇L] / 2λ`; it does not
    where `n(x)` hides lengths: nothing but decay acts on the length of what writes into the stream, which shrinks, and
    its gradient grows, until steps are coarse. The model becomes balanced relative to its size as far as the loss
    holds that. With another optimizer the charges need not obey anything.

    Args:
        model: A RiGPT with a language-modelling head; it stays as it is.
        batches: Tokens `[B, S]`, taken in turn and again from the first.
        learning_rate: η.
        weight_decay: λ.
        steps: Number of steps.
        every: Look at the model every so many steps, and at the end.
        optimizer: Made from the parameters, `lr` and `weight_decay`.
        loss: A function of a model and a batch; next tokens by default. It has to depend on the logits only.
        translations: The balanced form to compare with, see [`minimum_norm`].

    Returns:
        The trained copy, and the record.

    Raises:
        ValueError: if a setting is out of range, there is no batch, or the loss diverges.
    """
    for name, value in {"learning_rate": learning_rate, "steps": steps, "every": every}.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"`{name}` must be positive and finite, got {value}. Raise it.")
    if not (weight_decay >= 0 and math.isfinite(weight_decay)):
        raise ValueError(f"`weight_decay` must not be negative, and finite, got {weight_decay}. 0 switches it off.")
    supply = list(batches)
    if not supply:
        raise ValueError("`batches` must have at least one batch, got none. Give tokens of shape [B, S].")
    measure = loss or next_token_loss
    trained = copy.deepcopy(model).to(torch.float64).eval().requires_grad_(True)
    freeze_transports(trained)
    trained.config.token_symmetry = None  # which these steps do not keep
    moving = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    stepper = optimizer(moving, lr=learning_rate, weight_decay=weight_decay)
    start, record = charges(trained), DecayRecord(learning_rate, weight_decay)
    for step, batch in zip(range(steps + 1), itertools.cycle(supply), strict=False):
        value = measure(trained, batch)
        if not math.isfinite(value.item()):
            raise ValueError(
                f"`learning_rate` must be small enough to descend, got {learning_rate}: after {step} steps the loss "
                f"is {value.item()}. Lower it."
            )
        if step % every == 0 or step == steps:
            record.times.append(step * learning_rate)
            record.losses.append(value.item())
            _look(record, trained, start, translations)
        if step < steps:
            stepper.zero_grad()
            value.backward()
            stepper.step()
    return trained, record


def next_token_loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the next token, in nats, on tokens `[B, S]`."""
    return model(batch, labels=batch, use_cache=False).loss


def _look(record: DecayRecord, model: nn.Module, start: dict[str, torch.Tensor], at: TranslationsAt) -> None:
    now, table = charges(model), table_of(model.config)
    for kind in dict.fromkeys(FrameKey.parse(key).kind for key in start):
        keys = [key for key in start if FrameKey.parse(key).kind == kind]
        before, after = (torch.cat([charge[key].flatten() for key in keys]) for charge in (start, now))
        power = 2 if table.kinds[kind].shift is None else 1
        share = math.exp(-power * record.weight_decay * record.times[-1])
        size = float(before.norm()) or math.nan
        record.predicted.setdefault(kind, []).append(share)
        record.charges.setdefault(kind, []).append(float(after.norm()) / size)
        record.deviations.setdefault(kind, []).append(float((after - share * before).norm()) / size)
    record.norms.append(_norm(weights_of(model)))
    balanced, distance = _balanced_norm_and_distance(model, at)
    record.balanced_norms.append(balanced)
    record.distances.append(distance)


def _norm(weights: Weights) -> float:
    return math.sqrt(sum(float(weight.square().sum()) for weight in weights.values()))


def _apart(weights: Weights, target: Weights, relation: GaugeTransformation) -> float:
    """The distance that is left of a relation `target = relation(weights)` when only its compact part acts."""
    turned = compact_part(relation).state_dict(dict(weights))
    return _norm({name: turned[name] - target[name] for name in target}) / _norm(target)
