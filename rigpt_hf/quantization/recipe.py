"""How a model is rounded, and the rounding: frames, moments, codes, layer after layer."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from ..configuration_rigpt import RiGPTConfig
from ..frames import layer_of, table_of
from ..modeling_rigpt import RiGPTForCausalLM
from ..symmetry import GaugeTransformation
from ..symmetry.contraction import weights_of
from .frames import (
    Elements,
    gains_in_closed_form,
    gauges_of_layer,
    hadamard_stream,
    hadamard_values,
    turned_moments,
)
from .gptq import DAMPING, gptq
from .grid import Codes, check_grid, rounded_codes
from .maps import parts_of, token_tables
from .moments import Moments, moments_by_layer
from .simulated import online_turn, round_cache_, round_inputs_
from .tuning import LEARNING_RATE, tuned


METHODS, FRAMES = ("gptq", "round"), ("hadamard", "own")
# Fewer tokens than this many per input of the widest matrix leave moments that know too little.
LEAST_TOKENS = 1024


@dataclass(frozen=True)
class Recipe:
    """How a model is rounded."""

    bits: int = 4
    """Bits of each weight."""
    group: int | None = None
    """Neighbours in a row that share a scale; all of them if not given."""
    method: Literal["gptq", "round"] = "gptq"
    """Whether later columns make good what one loses, which needs calibration, or each number goes to the nearest."""
    frame: Literal["hadamard", "own"] = "hadamard"
    """The frame of the stream: turned by a Hadamard matrix, or the model's own."""
    gauges: bool | None = None
    """Gauges of values and neurons; where there are groups if not given."""
    gains: bool | None = None
    """Gains in closed form for what reads the stream; in the model's own frame if not given."""
    clip: bool = True
    """Search for the scales with the least error, instead of those that cut off nothing."""
    tune: int = 0
    """Steps in which scales and gains are tuned to the logits of the model, on the calibration text."""
    learning_rate: float = LEARNING_RATE
    """Learning rate of these steps."""
    activations: int | None = None
    """Bits of what matrices read, simulated."""
    cache: int | None = None
    """Bits of keys and values, simulated."""
    table_bits: int | None = 8
    """Bits of the tables of tokens, with a scale per token; whole if not given."""
    damping: float = DAMPING
    """Added to the diagonal of the moments, relative to its mean."""
    seed: int = 0
    """Seed of the signs of Hadamard matrices, and the order of windows in tuning."""

    def __post_init__(self):
        for name, known in (("method", METHODS), ("frame", FRAMES)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}.")
        check_grid(self.bits, self.group)
        for name in ("activations", "cache", "table_bits"):
            value = getattr(self, name)
            if value is not None and not 2 <= value <= 8:
                raise ValueError(f"`{name}` must be from 2 to 8 bits, or None to leave it whole, got {value}.")
        if self.tune < 0:
            raise ValueError(f"`tune` must be a number of steps, at least 0, got {self.tune}.")
        if self.gauges and self.group is None:
            raise ValueError(
                "`gauges` need `group`: where a whole row shares a scale, stretched values and neurons lose more than "
                "they gain, and no group was given. Give one such as 32, or leave gauges out."
            )

    @property
    def has_gauges(self) -> bool:
        """Whether values and neurons are stretched."""
        return self.group is not None if self.gauges is None else self.gauges

    @property
    def has_gains(self) -> bool:
        """Whether what reads the stream has gains in closed form."""
        return self.frame == "own" if self.gains is None else self.gains

    @property
    def simulates(self) -> list[str]:
        """The numbers that no kernel computes with, in words."""
        bits = {"activations": self.activations, "cache": self.cache}
        return [f"{name} of {value} bits" for name, value in bits.items() if value is not None]


@dataclass
class Quantized:
    """
    A rounded model.

    Args:
        model (`RiGPTForCausalLM`): The model in its new frame, not rounded.
        codes (`dict[str, Codes]`): By the names of modules; of tied tables once.
        recipe (`Recipe`).
        turns (`dict[str, torch.Tensor]`): Hadamard matrices `[n, n]` with which what a module reads must be turned.
        notes (`list[str]`): What was not done as the recipe says, a line each.
    """

    model: RiGPTForCausalLM
    codes: dict[str, Codes]
    recipe: Recipe
    turns: dict[str, torch.Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def config(self) -> RiGPTConfig:
        """The configuration of the model."""
        return self.model.config

    @property
    def bits_per_weight(self) -> float:
        """Bits of codes, scales and gains per number of the matrices, tables aside."""
        tables = token_tables(self.model)
        codes = [codes for name, codes in self.codes.items() if name not in tables]
        return sum(each.stored_bits for each in codes) / sum(each.codes.numel() for each in codes)

    @torch.no_grad()
    def dense_model(self) -> RiGPTForCausalLM:
        """A RiGPT with the rounded numbers as its weights; what the recipe simulates is done by hooks."""
        model = copy.deepcopy(self.model)
        modules = dict(model.named_modules())
        for name, codes in self.codes.items():
            weight = modules[name].weight
            weight.copy_(codes.dense(weight.dtype))
        recipe, gains = self.recipe, {name: codes.gain for name, codes in self.codes.items() if codes.gain is not None}
        inner = [name for name, part in parts_of(self.model).items() if part != "ends" and name in self.codes]
        if recipe.activations is not None or self.turns:
            round_inputs_(model, inner, recipe.activations, gains, self.turns)
        if recipe.cache is not None:
            round_cache_(model, recipe.cache, recipe.frame == "hadamard")
        return model


@torch.no_grad()
def quantize_model(
    model: RiGPTForCausalLM,
    recipe: Recipe | None = None,
    calibration: torch.Tensor | None = None,
    *,
    moments: Mapping[str, torch.Tensor] | None = None,
    gains: Mapping[str, torch.Tensor] | None = None,
    progress: bool = False,
) -> Quantized:
    """
    Round a model.

    Args:
        model: A RiGPT, which is left as it is.
        recipe: How; four bits per row in a Hadamard frame if not given.
        calibration (`torch.Tensor` of shape `[N, S]`, *optional*): Token ids, windows of text on which the model is
            not judged; needed by `method="gptq"` and by `tune`. With it rounding to nearest has better scales and
            gauges.
        moments (`Mapping[str, torch.Tensor]`, *optional*): What [`all_moments`] gave for this model, instead of
            measuring them on `calibration`.
        gains (`Mapping[str, torch.Tensor]`, *optional*): Factors `[n]` of the inputs by the names of modules, instead
            of those in closed form.
        progress (`bool`): Show progress bars.

    Raises:
        ValueError: for a model that is quantized already, a group that does not divide its widths, a width without a
            Hadamard matrix, weights that are not finite, or a calibration that is missing, too short or impossible.
    """
    recipe = Recipe() if recipe is None else recipe
    check_model(model, recipe)
    _check_calibration(recipe, calibration, moments)
    rounding, target = _Rounding(model, recipe, gains), copy.deepcopy(model)
    for names, measured in _parts(model, rounding.parts, calibration, moments, progress):
        for name, weight in rounding.add(names, measured).items():  # turned once, as this takes long
            target.get_submodule(name).weight.copy_(weight)
    g = GaugeTransformation(model.config, rounding.elements)
    for name, parameter in target.named_parameters():
        if name.removesuffix(".weight") not in rounding.codes:
            parameter.copy_(g.transform(name, rounding.weights[name], rounding.weights.get))
    if g.elements:
        target.config.token_symmetry = None
    quantized = Quantized(target, rounding.codes, recipe, rounding.turns, rounding.notes)
    if recipe.tune:
        assert calibration is not None
        quantized.codes |= tuned(
            quantized, calibration, recipe.tune, recipe.learning_rate, seed=recipe.seed, progress=progress
        )
    if recipe.table_bits is not None:
        for name in token_tables(quantized.model):
            table = quantized.model.get_submodule(name).weight
            quantized.codes[name] = rounded_codes(table, recipe.table_bits, clip=False)
    return quantized


class _Rounding:
    """A model that is being rounded, layer by layer: the frames so far, and the codes."""

    def __init__(self, model: RiGPTForCausalLM, recipe: Recipe, gains: Mapping[str, torch.Tensor] | None):
        self.config, self.recipe, self.gains = model.config, recipe, gains
        self.parts, self.weights = parts_of(model), weights_of(model, None)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.shared: Elements = {}
        if recipe.frame == "hadamard":
            self.shared |= hadamard_stream(self.config, self.generator)
            if recipe.simulates:
                self.shared |= hadamard_values(self.config, self.generator)
        self.elements = dict(self.shared)
        self.codes: dict[str, Codes] = {}
        self.turns: dict[str, torch.Tensor] = {}
        self.notes: list[str] = []

    def add(self, names: list[str], measured: Moments) -> dict[str, torch.Tensor]:
        """Round the matrices of one layer, or some outside of all; their weights in the new frame, not rounded."""
        layer, own = layer_of(f"{names[0]}.weight"), {}
        if self.recipe.has_gauges and layer is not None:
            weights = {name: weight for name, weight in self.weights.items() if layer_of(name) == layer}
            by_parameter = {f"{name}.weight": value for name, value in measured.items()}
            own = gauges_of_layer(self.config, layer, weights, by_parameter or None, self.generator)
            self.elements |= own
        # What no other layer's frames have a part in.
        g = GaugeTransformation(self.config, self.shared | own)
        undo = g.inverse() if measured else g
        turned = {name: g.transform(f"{name}.weight", self._accurate(name)) for name in names}
        seen = self._moments_after(undo, names, measured)
        gains = self.gains or {}
        if self.gains is None and self.recipe.has_gains and layer is not None:
            columns, squares = ({f"{name}.weight": each[name] for name in each} for each in (turned, seen))
            closed = gains_in_closed_form(self.config, columns, squares)
            gains = {name.removesuffix(".weight"): gain for name, gain in closed.items()}
        for same in _alike(names, measured, gains):
            weight = torch.cat([turned[name] for name in same])
            codes = self._rounded(same[0], weight, seen.get(same[0]), gains.get(same[0]))
            self.codes |= dict(zip(same, codes.split([len(turned[name]) for name in same]), strict=True))
        return turned

    def _moments_after(self, undo: GaugeTransformation, names: list[str], measured: Moments) -> Moments:
        """The moments in the new frame; matrices that read the same share a tensor."""
        turned: dict[int, torch.Tensor] = {}
        for name in measured:
            if name in names and id(measured[name]) not in turned:
                moments = measured[name].to(self.weights[f"{name}.weight"].device)
                turned[id(measured[name])] = turned_moments(undo, f"{name}.weight", moments)
        return {name: turned[id(measured[name])] for name in names if name in measured}

    def _accurate(self, name: str) -> torch.Tensor:
        weight = self.weights[f"{name}.weight"]
        return weight.to(torch.promote_types(weight.dtype, torch.float32))

    def _rounded(self, name: str, weight: torch.Tensor, seen: torch.Tensor | None, gain: torch.Tensor | None) -> Codes:
        recipe = self.recipe
        if recipe.activations is not None and recipe.frame == "hadamard" and self._reads_neurons(name):
            self.turns[name] = online_turn(name, weight.shape[1], recipe.seed)
            turn = self.turns[name].to(weight)
            weight, seen = weight @ turn.T, None if seen is None else turn @ seen.to(turn) @ turn.T
        if recipe.method == "round":
            importance = None if seen is None else seen.diagonal(dim1=-2, dim2=-1).flatten()
            return rounded_codes(weight, recipe.bits, recipe.group, importance, clip=recipe.clip, gain=gain)
        if seen is None:
            self.notes.append(f"{name} was rounded to nearest, as nothing was seen of what it reads.")
            return rounded_codes(weight, recipe.bits, recipe.group, clip=recipe.clip, gain=gain)
        return gptq(weight, seen, recipe.bits, recipe.group, damping=recipe.damping, gain=gain)

    def _reads_neurons(self, name: str) -> bool:
        turns = table_of(self.config).turns(f"{name}.weight")
        return self.parts[name] == "neurons" and any(turned.role == "down" for turned in turns)


def _parts(
    model: RiGPTForCausalLM,
    parts: Mapping[str, str],
    calibration: torch.Tensor | None,
    moments: Mapping[str, torch.Tensor] | None,
    progress: bool,
) -> Iterator[tuple[list[str], Moments]]:
    """The names of modules of each layer, and of what is around the layers, with the moments of what they read."""
    layers: dict[int | None, list[str]] = {}
    for name in parts:
        layers.setdefault(layer_of(f"{name}.weight"), []).append(name)
    if moments is None and calibration is not None:
        for measured in moments_by_layer(model, calibration, progress=progress):
            if measured:
                yield list(measured), measured
        return
    for names in layers.values():
        yield names, {name: moments[name] for name in names if moments is not None and name in moments}


def _alike(names: list[str], measured: Moments, gains: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """The names in the order given, together those whose moments and gains are the same tensors."""
    together: dict[object, list[str]] = {}
    for name in names:
        key = (id(measured[name]), id(gains.get(name))) if name in measured else name
        together.setdefault(key, []).append(name)
    return list(together.values())


def _check_calibration(recipe: Recipe, calibration: torch.Tensor | None, moments: object) -> None:
    if calibration is None and (recipe.tune or (recipe.method == "gptq" and moments is None)):
        what = "tune" if recipe.tune else "method='gptq'"
        raise ValueError(
            f"`calibration` must be given for `{what}`, and none is. Give text, or take `method='round'`."
        )
    if calibration is not None and calibration.numel() < LEAST_TOKENS:
        raise ValueError(
            f"`calibration` must hold at least {LEAST_TOKENS} tokens, got {calibration.numel()}; 25,000 are better. "
            "Give a longer text."
        )


def check_model(model: nn.Module, recipe: Recipe) -> None:
    """Raise a `ValueError` if a model cannot be rounded so."""
    if getattr(model.config, "quantization_config", None) is not None or getattr(model, "is_quantized", False):
        raise ValueError("`model` must not be quantized already, got one that is. Start from the model before.")
    if not isinstance(model, RiGPTForCausalLM):
        raise ValueError(f"`model` must be a RiGPTForCausalLM, got {type(model).__name__}. Convert it first.")
    if model.config.depth_solver is not None and recipe.method == "gptq":
        raise ValueError(
            f"`method` must be 'round' for `depth_solver={model.config.depth_solver!r}`, which goes through each "
            "layer many times, and calibration once, got 'gptq'. Quantize with `method='round'` and no calibration."
        )
    if recipe.frame == "hadamard":
        hadamard_stream(model.config)
    for name in parts_of(model):
        check_grid(recipe.bits, recipe.group, **{name: model.get_submodule(name).weight.shape[1]})
