"""
States of the equivariant optimizer, carried from one frame to another.

Momenta are sums of gradients and turn as these do; second moments are shared along the axes of frames and change
places with what they belong to. Both hold where frames keep lengths: a gradient turns as its parameter only then, and
no norm survives a stretch.
"""

from collections.abc import Mapping
from typing import Any

from ..action import GaugeTransformation
from .axes import Axes, conjugated, is_orthogonal


MOMENTA = ("momentum_buffer", "exp_avg")
SQUARES = "exp_avg_sq"


def transport_optimizer(state: Mapping[str, Any], g: GaugeTransformation) -> dict[str, Any]:
    """
    The state of an [`EquivariantOptimizer`] of A, for `B = g·A`: its next step from B is the turned one from A.

    Args:
        state (`Mapping`): what its `state_dict()` gave.
        g (`GaugeTransformation`): brings A to B.

    Raises:
        ValueError: for another optimizer's state, and for stretches and translations, which leave no exact form.
    """
    if not all("update_rule" in group and "names" in group for group in state["param_groups"]):
        raise ValueError(
            "`state` must be that of an `EquivariantOptimizer`, got another one: AdamW's second moments are squares "
            "of single coordinates, of which a rotation makes no squares. Go on in B without the state, or train with "
            "`EquivariantOptimizer`."
        )
    axes = Axes(g)
    _check_translations(axes)
    moved = dict(state["state"])
    for group in state["param_groups"]:
        for number, name in zip(group["params"], group["names"], strict=True):
            if number in moved:
                moved[number] = _moments(axes, name, group, moved[number])
    return dict(state) | {"state": moved}


def _check_translations(axes: Axes) -> None:
    for key, shift in axes.table.shifts.items():
        element = axes.g.elements.get(str(key))
        if element is not None and element.any() and not shift.constant:
            raise ValueError(
                f"`g` must not move a parameter by others, got a translation in {str(key)!r}: there the gradients of "
                "weights depend on those of biases, which no momentum holds. Leave it out, or go on without the state."
            )


def _moments(axes: Axes, name: str, group: Mapping[str, Any], moments: Mapping[str, Any]) -> dict[str, Any]:
    result, kinds = dict(moments), [kind for kind in MOMENTA if kind in moments]
    if not kinds:
        return result
    shape = moments[kinds[0]].shape
    turn, back = (lambda x, g=g: g.transform(name, x) for g in (axes.linear, axes.back))
    if not is_orthogonal(turn, back, shape):
        raise ValueError(
            f"`g` must keep lengths in the frames of `{name}`, got a stretch in one of {axes.frames_of(name)}: the "
            "update of a stretched parameter is not the stretched update. Balance both models first (`rigpt "
            "canonicalize`), or go on without the state."
        )
    result |= {kind: axes.linear.transform(name, moments[kind]) for kind in kinds}
    if SQUARES in moments:
        squares = moments[SQUARES]
        shared = squares.reshape(group["blocks"] if group["update_rule"] == "vectors" else len(squares), -1)
        whole = shared.expand(len(shared), shape.numel() // len(shared)).reshape(shape)
        moved = conjugated(turn, back, whole)
        assert moved is not None, "what is shared along the axis of a frame commutes with its turns"
        result[SQUARES] = moved.reshape(len(shared), -1)[:, : shared.shape[-1]].reshape(squares.shape).to(squares)
    return result
