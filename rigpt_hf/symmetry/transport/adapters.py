"""
Adapters in the layouts of PEFT, carried from one frame to another.

    LoRA   W + s B A            A reads the map's input, B writes its output; of an embedding, `W + s (B A)ᵀ`
    IA3    diag(l) W, W diag(l)   exact where the frames of that axis only exchange and scale coordinates: neurons

Where a translation adds a constant `c` to what a map reads, its LoRA gets a bias: `B A` must not see `c`.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from ...checkpoints.weights import name_some
from ...frames import is_token_table
from ..action import GaugeTransformation
from .axes import Axes, conjugated


PREFIX = "base_model.model."
# The module, the factor, the name of the adapter where it is that of a model in memory, and what it is of the factor.
FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<factor>lora_A|lora_B|lora_embedding_A|lora_embedding_B|ia3_l)"
    r"(?P<adapter>\.(?!weight$|bias$)\w+)?(?:\.(?P<part>weight|bias))?"
)
DORA = "lora_magnitude_vector"
# Fields of `adapter_config.json` that say nothing of what the tensors mean, or what is kept in every frame. Another
# one must be empty: a method that nobody has worked out is refused, not carried wrongly.
PLAIN = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform"),
    *("layers_pattern", "rank_pattern", "alpha_pattern", "r", "lora_alpha", "lora_dropout", "use_rslora"),
    *("bias", "lora_bias", "init_lora_weights", "megatron_core", "qalora_group_size", "runtime_config"),
    *("feedforward_modules", "init_ia3_weights"),
}
# Ways to begin that leave the base model as it is.
BEGINNINGS = (None, True, False, "gaussian", "orthogonal", "eva")


def is_adapter(names: Any) -> bool:
    """Whether tensors of these names are those of an adapter."""
    return any(name.startswith(PREFIX) or FACTOR.fullmatch(name) or DORA in name for name in names)


def transport_adapter(
    state: Mapping[str, torch.Tensor], g: GaugeTransformation, settings: Mapping[str, Any] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """
    An adapter of A, for `B = g·A`.

    Args:
        state (`Mapping[str, torch.Tensor]`): as PEFT saves it, or has it in memory.
        g (`GaugeTransformation`): brings A to B.
        settings (`Mapping`, *optional*): what its `adapter_config.json` says.

    Returns:
        The tensors, each in its dtype, and the settings. Both have a `lora_bias` more where a translation asks for it.

    Raises:
        ValueError: for DoRA and other methods without an exact form in another frame, or unknown parameters.
    """
    settings = dict(settings or {})
    check_settings(settings, state)
    axes = Axes(g)
    whole, factors = _sorted(state)
    _check_moved_by(axes, set(whole.values()))
    result: dict[str, torch.Tensor] = {}
    for key, name in whole.items():
        shape = axes.shapes.get(name, state[key].shape)
        # A table may have been given other tokens.
        if state[key].shape[1:] != shape[1:] or not (is_token_table(name) or state[key].shape[:1] == shape[:1]):
            raise _misfit(key, name, tuple(shape), state[key])
        result[key] = g.transform(name, state[key], lambda other: _other(state, whole, other))
    biases: dict[str, torch.Tensor] = {}
    for key, match in factors.items():
        name, factor, of_bias = f"{match['module']}.weight", match["factor"], match["part"] == "bias"
        tensor = state[key]
        _check_size(axes, key, name, factor, tensor, of_bias)
        match factor:
            case "ia3_l":
                moved = _scaled(axes, name, tensor)
            case "lora_A":
                moved = axes.reading(name, tensor, at=1)
            case "lora_embedding_A":
                moved = axes.like(name, 0, tensor, at=1)
            case "lora_embedding_B":
                moved = axes.like(name, 1, tensor, at=0)
            case _:
                moved = axes.like(name, 0, tensor, at=0)
        (biases if of_bias else result)[key] = moved.to(tensor.dtype)
    seen = _unseen_shifts(axes, state, factors)
    if seen:
        if any(match["factor"].startswith("lora_embedding") for match in factors.values()):
            raise ValueError(
                f"`state` must leave embeddings alone where a translation shifts what {name_some(seen)} reads: that "
                "takes a `lora_bias`, which PEFT has not beside a LoRA of embeddings. Remove the shift from one of "
                "the models first, with `rigpt rotate` or `rigpt canonicalize`."
            )
        for key, match in factors.items():
            if match["factor"] == "lora_B" and match["part"] == "weight":
                place, factor = key.removesuffix("weight") + "bias", result[key].to(torch.float64)
                bias = biases.get(place, factor.new_zeros(len(factor))).to(torch.float64)
                if (low := seen.get(match["module"])) is not None:
                    bias = bias - factor @ low
                biases[place] = bias.to(state[key].dtype)
        settings["lora_bias"] = True
    return result | biases, settings


def check_settings(settings: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """A `ValueError` if an adapter is of a method without an exact form in another frame."""
    if settings.get("use_dora") or any(DORA in name for name in state):
        raise ValueError(
            "`state` must be an adapter with an exact form in another frame, got DoRA: it divides each coordinate of "
            "an output by the norm of a row of the weights, which a rotation mixes with others. Merge it into A with "
            "`merge_and_unload` of PEFT, and turn that with `rigpt rotate`."
        )
    if (kind := settings.get("peft_type", "LORA")) not in ("LORA", "IA3"):
        raise ValueError(
            f"`state` must be an adapter of LoRA or IA3, got one of the method {kind!r}, for which no exact form in "
            "another frame is known here. Merge it into A with `merge_and_unload` of PEFT, and turn that."
        )
    if odd := [name for name, value in settings.items() if value and name not in PLAIN]:
        raise ValueError(
            f"`state` must be a plain adapter of LoRA or IA3, got `{odd[0]}={settings[odd[0]]!r}`, of which it is not "
            "known what it becomes in another frame. Merge the adapter into A, and turn that."
        )
    if (start := settings.get("init_lora_weights")) not in BEGINNINGS:
        raise ValueError(
            f"`state` must be an adapter of A as it is, got `init_lora_weights={start!r}`, which changes A's own "
            "weights when the adapter is made. Have PEFT save it as an ordinary LoRA, by its "
            "`path_initial_model_for_weight_conversion`."
        )


def _sorted(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, str], dict[str, re.Match[str]]]:
    """Keys of whole parameters with their names in the model, and those of factors with what they are."""
    whole, factors = {}, {}
    for key in state:
        inner = key.removeprefix(PREFIX)
        if match := FACTOR.fullmatch(inner):
            factors[key] = match
        elif "lora_" in inner or inner == key:
            raise ValueError(
                f"`state` must hold the parameters of LoRA or IA3, or whole ones of the model, got {key!r}. Merge "
                "this adapter into A with `merge_and_unload` of PEFT, and turn that with `rigpt rotate`."
            )
        else:
            whole[key] = inner.replace(".base_layer.", ".")
    return whole, factors


def _other(state: Mapping[str, torch.Tensor], whole: Mapping[str, str], name: str) -> torch.Tensor:
    """Another whole parameter of the adapter, on which a translation depends."""
    for key, inner in whole.items():
        if inner == name:
            return state[key]
    raise ValueError(
        f"`state` must hold `{name}` beside the biases that it has, as a translation of this transformation depends "
        "on it. Merge the adapter into A, and turn that."
    )


def _check_moved_by(axes: Axes, whole: set[str]) -> None:
    """A `ValueError` if a translation moves a parameter of the model by one that the adapter replaces."""
    for key, shift in axes.table.shifts.items():
        for target, move in shift.moves.items():
            replaced = whole.intersection(move.reads)
            if replaced and target not in whole and axes.is_translated(target) and str(key) in axes.g.elements:
                raise ValueError(
                    f"`state` must hold `{target}` beside {name_some(replaced)}, as a translation in {str(key)!r} "
                    "moves the one by the other. Merge the adapter into A, and turn that."
                )


def _check_size(axes: Axes, key: str, name: str, factor: str, tensor: torch.Tensor, of_bias: bool) -> None:
    """A `ValueError` if a factor is not one of this parameter of the model."""
    axes.table.row(name)  # says so itself if there is none
    shape = axes.shapes.get(name)
    if shape is None and name.startswith("model."):
        raise ValueError(
            f"`state` must be an adapter of this model, which has no `{name}`, got {key!r}. Name the models that it "
            "belongs to."
        )
    if shape is None:  # a head of another task, whose size no configuration says
        return
    rows, columns = shape
    allowed: dict[str, list[tuple[int, ...]]] = {
        "lora_A": [(*tensor.shape[:1], columns)],
        "lora_B": [(rows,) if of_bias else (rows, *tensor.shape[-1:])],
        "lora_embedding_A": [(*tensor.shape[:1], rows)],
        "lora_embedding_B": [(columns, *tensor.shape[-1:])],
        "ia3_l": [(1, columns), (rows, 1)],
    }
    if tuple(tensor.shape) not in allowed[factor]:
        raise _misfit(key, name, shape, tensor)


def _misfit(key: str, name: str, shape: tuple[int, ...], tensor: torch.Tensor) -> ValueError:
    return ValueError(
        f"`state` must fit the model, whose `{name}` has the shape {shape}, got {tuple(tensor.shape)} for {key!r}. "
        "Name the models that the adapter belongs to."
    )


def _scaled(axes: Axes, name: str, scale: torch.Tensor) -> torch.Tensor:
    """Scales of IA3 `[1, in]` or `[out, 1]` of a map."""
    dim = 1 if len(scale) == 1 else 0
    bias = name.removesuffix("weight") + "bias"
    shifted = axes.input_shift(name) is not None if dim else axes.is_translated(bias)
    turn, back = (
        lambda x, side=side: side.turn_axis(name, dim, x, dim) for side in (axes.linear, axes.back)
    )  # fmt: skip
    moved = None if shifted else conjugated(turn, back, scale)
    if moved is None:
        frames = "a translation shifts" if shifted else f"{axes.frames_of(name, dim)} mixes"
        raise ValueError(
            f"`state` must have an exact form in the other frame, got scales of IA3 for coordinates of `{name}` that "
            f"{frames}: there they are no scales. Use LoRA, or IA3 on neurons alone (`down_proj`)."
        )
    return moved


def _unseen_shifts(
    axes: Axes, state: Mapping[str, torch.Tensor], factors: Mapping[str, re.Match[str]]
) -> dict[str, torch.Tensor]:
    """For every map with a LoRA whose input is shifted, what its first factor makes of the shift, `[r]`."""
    seen = {}
    for key, match in factors.items():
        if match["factor"] == "lora_A" and (shift := axes.input_shift(f"{match['module']}.weight")) is not None:
            seen[match["module"]] = state[key].to(torch.float64) @ shift
    return seen
