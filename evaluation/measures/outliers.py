"""
Outliers: how unequally the coordinates of what a model computes are filled, layer by layer.

Quantised numbers share a scale, so one large coordinate costs all others their precision. Three measures of that, for
the stream after every layer and for the input of every linear map:

- excess kurtosis, `E[(x - μ)⁴] / E[(x - μ)²]² - 3`: 0 for a Gaussian; per token over its coordinates (the mean over
  tokens), and pooled over all tokens and coordinates;
- largest over median absolute value;
- crest factor, largest absolute value over root mean square.

All are dimensionless, and given with and without the first position, where models keep what they attend to when there
is nothing to attend to ("massive activations", Sun et al., arXiv 2402.17762). Where a tokenizer begins texts with a
token of its own, so do the windows here. Vectors without spread have no kurtosis and those that are mostly zeros no
median; they are left out of these means.
"""

import re
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rigpt_hf.decoder_rigpt import RiGPTTransport
from rigpt_hf.training.diagnostics import excess_kurtosis

from ..drawing import WIDTH, number, readable
from ..likelihood import Progress, no_progress
from ..measure import Inputs, Measure, Quantity, refuse_codes, rows_of_task
from ..models import EvaluatedModel, Texts, evaluated
from ..numbers import number as shown
from ..rounding import all_matrices, in_short, matrices_of, other_matrices


# Bins of the histogram that the pooled median is read from: from 2⁻⁶⁴ to 2⁶⁴, 1/128 of an octave each (0.5 %).
OCTAVES, PER_OCTAVE = 64, 128
STATISTICS = ("excess_kurtosis", "max_over_median", "crest_factor")
# Spread relative to size below which it is rounding.
FLAT = 1e-9
# A part of a layer in the names of modules: `layers.3.mlp.up_proj`, `h.3.attn.c_attn`; OPT's `layers.3.fc1` has none.
PART = re.compile(r"\.(\d+)\.(?:(\w+)\.)?")


class ActivationStats:
    """Statistics of the vectors at one place; holds sums, not values, so it stays small."""

    def __init__(self) -> None:
        self.values, self.largest = 0, 0.0
        # Sums of the three statistics over tokens, and of how many tokens they are.
        self.sums, self.tokens = torch.zeros(2, 3, dtype=torch.float64)
        self.powers = torch.zeros(4, dtype=torch.float64)
        self.histogram = torch.zeros(2 * OCTAVES * PER_OCTAVE, dtype=torch.float64)

    def add(self, states: torch.Tensor) -> None:
        """See the vectors `[tokens, d]`."""
        x = states.detach().double().cpu()
        sizes = x.abs()
        ordered, middle = sizes.sort(-1).values, x.shape[-1] // 2
        median = (ordered[:, middle] + ordered[:, -middle - 1]) / 2
        largest, rms = ordered[:, -1], x.square().mean(-1).sqrt()
        # Vectors without spread, or mostly zeros, have no such number, and do not count.
        statistics = torch.stack([excess_kurtosis(x), largest / median, largest / rms])
        known = torch.stack([x.std(-1) > FLAT * rms, median > 0, rms > 0])
        self.sums += statistics.masked_fill(~known, 0).sum(-1)
        self.tokens += known.sum(-1)
        self.powers += torch.stack([x.pow(power).sum() for power in (1, 2, 3, 4)])
        self.largest = max(self.largest, float(sizes.max()))
        places = sizes.clamp_min(2.0**-OCTAVES).log2().clamp_max(OCTAVES - 1e-9) + OCTAVES
        self.histogram += torch.bincount((places * PER_OCTAVE).long().flatten(), minlength=len(self.histogram))
        self.values += x.numel()

    def result(self) -> dict[str, Any]:
        """All measures, as JSON can hold them; `None` where there is none."""
        if self.values == 0:
            return {}
        means = [float(total / count) if count else None for total, count in zip(self.sums, self.tokens, strict=True)]
        mean, second, third, fourth = (self.powers / self.values).tolist()
        variance = second - mean**2
        central = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
        half = (self.histogram.cumsum(0) >= self.values / 2).nonzero()[0].item()
        # The lowest bin holds zeros too.
        median = 2.0 ** ((half + 0.5) / PER_OCTAVE - OCTAVES) if half else 0.0
        pooled = (
            central / variance**2 - 3 if variance > (FLAT**2) * second else None,
            self.largest / median if median else None,
            self.largest / second**0.5 if second else None,
        )
        return {
            "per_token": dict(zip(STATISTICS, means, strict=True)),
            "pooled": dict(zip(STATISTICS, pooled, strict=True)),
        }


class PlaceStats:
    """One place in the network, with and without the first position of every row."""

    def __init__(self) -> None:
        self.all, self.later = ActivationStats(), ActivationStats()

    def add(self, states: torch.Tensor) -> None:
        """See the states `[batch, seq, d]`, the first of each row first."""
        self.all.add(states.flatten(0, -2))
        if states.shape[1] > 1:
            self.later.add(states[:, 1:].flatten(0, -2))

    def result(self) -> dict[str, Any]:
        """`all`, and `without_first`."""
        return {"all": self.all.result(), "without_first": self.later.result()}


@torch.no_grad()
def outliers(
    model: Any,
    texts: Texts,
    tokenizer: Any = None,
    *,
    context: int | None = None,
    windows: int = 32,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """
    Outliers of the stream and of every linear map's input.

    Args:
        model, tokenizer: As for [`evaluated`].
        texts: Texts or rows of token ids, cut into windows.
        context (`int`, *optional*): Tokens of a window; all the model takes, at most 1,024, if not given.
        windows (`int`, defaults to 32): How many are read at most.
        progress: Called with the number of windows that were read.

    Returns:
        `dict`: `stream`: a list, the first of the embeddings, then one per layer, before a final norm outside of the
        layers, whose gain would be another thing to measure; `final_norm`: of what it gives, where there is one that
        is seen; `linear_inputs`: by the names of modules. Each holds `all` and `without_first`, and these `per_token`
        and `pooled`, with `excess_kurtosis`, `max_over_median` and `crest_factor`. `summary`: of the stream per token
        the largest excess kurtosis of all layers, negative where all have lighter tails than a Gaussian, and the
        largest crest factor; and `outlier_safe_pretraining`: the excess kurtosis over the coordinates of each vector
        that enters an attention or feedforward block (after its norm), averaged over tokens and blocks; our reading of
        Park et al., arXiv 2506.19697, who report 0.04 for their model and 1818.56 for one trained with Adam; `None`
        where not every block is seen. `protocol`, with the matrices that are `not covered`: those whose input is not
        one vector for each token, such as experts among which tokens are shared out.

    Raises:
        ValueError: if an argument is impossible, no text has two tokens, or no linear map inside the model is seen.
    """
    measured = evaluated(model, tokenizer)
    context = measured.context(context)
    if windows < 1:
        raise ValueError(f"`windows` must be at least 1, got {windows}.")
    start = [measured.beginning()] if measured.begins_texts and context > 1 else []
    pieces = [[*start, *piece] for piece in pieces_of(measured.encode(texts), context - len(start), windows)]
    if not pieces:
        raise ValueError("`predictions` must hold a text of at least two tokens, got none.")
    stream: list[PlaceStats] = []
    after_norm = PlaceStats()
    inputs: dict[str, PlaceStats] = {}
    strange: set[str] = set()
    length = 0

    def look(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple) -> None:
            # Only where there is a vector for each token, in their order, is it known which is the first one's.
            if arguments and arguments[0].shape[:-1] in ((1, length), (length,)):
                inputs.setdefault(name, PlaceStats()).add(arguments[0].reshape(1, length, -1))
            else:
                strange.add(name)

        return hook

    handles = [module.register_forward_pre_hook(look(name)) for name, module in all_matrices(measured.model).items()]
    norms = LastNorms(measured.model)
    handles += norms.handles
    try:
        for piece in pieces:
            ids, length = torch.tensor([piece], device=measured.device), len(piece)
            states = list(measured.model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states)
            if (before := norms.input_of(states[-1])) is not None:
                after_norm.add(states[-1])
                states[-1] = before
            stream = stream or [PlaceStats() for _ in states]
            for place, state in zip(stream, states, strict=True):
                place.add(state)
            progress(1)
    finally:
        for handle in handles:
            handle.remove()
    inputs = {name: place for name, place in inputs.items() if name not in strange}
    inside = matrices_of(measured.model)
    if not inputs.keys() & inside.keys():
        raise ValueError(
            "`model` must have linear maps (`nn.Linear` or `Conv1D`) that read one vector for each token, got "
            f"{type(measured.model).__name__} with none. Leave `outliers` out for it."
        )
    others = other_matrices(measured.model, inputs)
    seen, unseen = blocks_of(inputs), blocks_of(without_transports(measured.model, others))
    blocks = known(inputs[name].all.result()["per_token"]["excess_kurtosis"] for name in seen.values())
    # A mean over some of them would be another number.
    whole = blocks and not unseen.keys() - seen.keys()
    places = [place.result() for place in stream]
    per_token = [entry["all"]["per_token"] for entry in places]
    return {
        "stream": places,
        **({"final_norm": after_norm.result()} if after_norm.all.values else {}),
        "linear_inputs": {name: place.result() for name, place in inputs.items()},
        "summary": {
            "excess_kurtosis": max(known(entry["excess_kurtosis"] for entry in per_token), default=None),
            "crest_factor": max(known(entry["crest_factor"] for entry in per_token), default=None),
            "outlier_safe_pretraining": sum(blocks) / len(blocks) if whole else None,
        },
        "protocol": {
            "context": context,
            "windows": len(pieces),
            "tokens": sum(map(len, pieces)),
            "not covered": in_short(measured.model, others),
            "stream": "before the final norm" if after_norm.all.values else "as the model gives it",
        },
    }


class LastNorms:
    """
    Inputs of the last modules that give as many numbers as they read, the final norm among them.

    The library gives the state after the final norm as that of the last layer, so this is where the stream before it
    is found, whatever a family calls its norm.
    """

    def __init__(self, model: nn.Module):
        self.calls: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=4)
        # A norm at the end of a block is part of it, and what it gives is the stream.
        blocks = {part for each in model.modules() if isinstance(each, nn.ModuleList) for part in each.modules()}
        leaves = [each for each in model.modules() if next(each.children(), None) is None and each not in blocks]
        self.handles = [module.register_forward_hook(self._keep) for module in leaves]

    def _keep(self, module: nn.Module, arguments: tuple, output: Any) -> None:
        # Neither a map nor a dropout is a norm, though either may leave the shape as it is.
        if isinstance(module, nn.Linear | Conv1D | nn.Dropout | nn.Identity) or not arguments:
            return
        if isinstance(output, torch.Tensor) and output.shape == getattr(arguments[0], "shape", None):
            self.calls.append((arguments[0], output))

    def input_of(self, state: torch.Tensor) -> torch.Tensor | None:
        """The input of the module that gave `state`, or a view of it; `None` if none did."""
        for given, output in reversed(self.calls):
            if output.data_ptr() == state.data_ptr() and output.numel() == state.numel():
                return given.reshape(state.shape)
        return None


def known(values: Iterable[float | None]) -> list[float]:
    """Those that are numbers."""
    return [value for value in values if value is not None]


def pieces_of(rows: list[list[int]], context: int, most: int) -> Iterable[list[int]]:
    """At most `most` pieces of at most `context` and at least two tokens, in the order of the rows."""
    count = 0
    for row in rows:
        for begin in range(0, len(row), context):
            piece = row[begin : begin + context]
            if len(piece) > 1 and count < most:
                count += 1
                yield piece


def blocks_of(names: Iterable[str]) -> dict[tuple[str, str], str]:
    """The first linear map in every part of every layer, from names in the order in which maps are called."""
    firsts: dict[tuple[str, str], str] = {}
    for name in names:
        match = PART.search(name)
        if match:
            # Maps that lie in the layer itself are one part: OPT's feedforward block.
            firsts.setdefault((match[1], match[2] or ""), name)
    return firsts


def without_transports(model: nn.Module, parameters: Iterable[str]) -> list[str]:
    """Names of maps, from those of their weights, but of those that only carry a RiGPT's stream to another frame."""
    return [
        name.removesuffix(".weight")
        for name in parameters
        if not isinstance(model.get_submodule(name.rpartition(".")[0]), RiGPTTransport)
    ]


def quantities(result: dict[str, Any]) -> list[Quantity]:
    """The summary."""
    summary = result["summary"]
    listed = [
        Quantity("excess kurtosis of the stream", "largest of all layers", summary["excess_kurtosis"]),
        Quantity("crest factor of the stream", "largest of all layers", summary["crest_factor"]),
    ]
    if summary["outlier_safe_pretraining"] is not None:
        name = "excess kurtosis, Outlier-Safe Pre-Training"
        listed.append(Quantity(name, "mean of all blocks", summary["outlier_safe_pretraining"]))
    return listed


def draw(picture: Any, task: dict[str, Any], names: dict[str, str]) -> str:
    """Kurtosis of the stream, layer by layer."""
    picture.set_size_inches(WIDTH, 2.3)
    axes = picture.subplots()
    drawn, said = [0.0], []
    for index, (name, colour) in enumerate(names.items()):
        stream = task["models"][name]["stream"]
        # Where models do not differ, the later line lies upon the earlier one and must leave some of it to see; and so
        # must lines and dots of the rings around them, as the first position often makes no difference.
        width, size = (1.0, 3) if index == len(names) - 1 else (2.6, 4.5)
        styles: dict[str, tuple[str, dict[str, Any]]] = {
            "all": (name, {"linewidth": width, "markersize": size}),
            "without_first": (
                f"{name}, without the first position",
                {"linestyle": ":", "linewidth": width, "markersize": size + 3, "fillstyle": "none"},
            ),
        }
        for key, (label, style) in styles.items():
            values = [number(each[key].get("per_token", {}).get("excess_kurtosis")) for each in stream]
            axes.plot(range(len(values)), values, marker="o", color=colour, label=label, **style)
            drawn += values
            said.append(f"{label}: {', '.join(map(shown, values))}.")
    axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    readable(axes.yaxis, drawn, 1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="layer (0: embeddings)", ylabel="excess kurtosis per token")
    return " ".join(said)


def needs(model: EvaluatedModel, texts: Any, task: Any) -> Inputs:
    """A model with linear maps, whose inputs are looked at."""
    refuse_codes(model)
    return rows_of_task(model, texts, task)


MEASURE = Measure(
    "outliers",
    "How unequally are the coordinates of the stream filled? The excess kurtosis of a Gaussian is 0; outliers make it "
    "large and rounding expensive.",
    outliers,
    quantities,
    "excess kurtosis of the stream, layer by layer",
    draw,
    needs=needs,
    card_words="outliers",
)
