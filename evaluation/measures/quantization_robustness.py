"""
The loss of a model, in nats per token, when weights and activations are rounded to few bits, from several frames.

Its own, a random one, a Hadamard one (QuaRot, arXiv 2404.00456), its principal axes (SliceGPT, arXiv 2401.15024); and
in a Hadamard one with what a weight loses made good by others (GPTQ), as `rigpt quantize` does it.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from rigpt_hf import RiGPTConfig
from rigpt_hf.conversion import convert_model
from rigpt_hf.conversion.families import architecture_of
from rigpt_hf.quantization import Recipe, quantize_model
from rigpt_hf.quantization.calibration import calibration_tokens

from ..drawing import IN_TABLE, MARKERS, WIDTH, aside, interval, number, readable
from ..frames import FRAMES, in_frame
from ..likelihood import Progress, first_rows, no_progress
from ..measure import Inputs, Measure, Names, NotApplicable, Quantity, refuse_codes
from ..models import EvaluatedModel, Texts, evaluated
from ..rounding import in_short, matrices_of, other_matrices, rounded, rows_of
from .perplexity import needs as needs_of_perplexity
from .perplexity import perplexity, plain


SCHEMES = ("W8A8", "W4A16", "W4A8", "W4A4")
SCHEME = re.compile(r"W(\d+)A(\d+)")
FRAME_WORDS = {
    "identity": "own frame",
    "haar": "random frame",
    "hadamard": "Hadamard frame",
    "pca": "principal axes",
    "gptq": "GPTQ",
}
ADDED = "added loss, "
# Numbers of so many bits are left as they are.
WHOLE = 16
# The row whose weights are not rounded to nearest, and the tokens that it is calibrated on.
GPTQ, TOKENS = "gptq", 16384
# Gives what is kept under a name, or makes it and keeps it.
Memoize = Callable[[str, Callable[[], dict[str, Any]]], dict[str, Any]]


def unkept(part: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Make a part and keep nothing."""
    return make()


@torch.no_grad()
def quantization_robustness(
    model: Any,
    texts: Texts,
    tokenizer: Any = None,
    *,
    schemes: Names = SCHEMES,
    frames: Names | None = None,
    group_size: int = 0,
    modules_to_not_convert: Names = (),
    context: int | None = None,
    bos: bool = False,
    detokenizer: str = "none",
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress = no_progress,
    memoize: Memoize = unkept,
) -> dict[str, Any]:
    """
    Loss and perplexity under simulated rounding to nearest, per scheme and frame.

    The increase is counted from the loss in the same frame and precision. Weights of all linear maps but the
    head are rounded once, their inputs token by token, on symmetric grids: a weight shares its scale with its row,
    or with `group_size` neighbours in it; an activation with its token. Principal axes are those of the first of the
    texts that are scored. `"gptq"` is the recipe of `rigpt quantize` without tuning, calibrated on documentation of
    which nothing is scored where the texts are what is held out of it; its grids are searched. Frames other than the
    model's own are exact changes of basis of a RiGPT; a stock model is converted first, exactly too, which the result
    says.

    Args:
        model, tokenizer: As for [`evaluated`]; left as it is.
        texts: Texts or rows of token ids.
        schemes (`list[str]`): Such as `"W4A8"`: bits of weights and of activations; 16 leaves them as they are.
        frames (`list[str]`, *optional*): Among `"identity"`, `"haar"`, `"hadamard"` and `"pca"`, see [`in_frame`], and
            `"gptq"`, which needs a tokenizer; all but that for a RiGPT and `"identity"` for others if not given.
        group_size (`int`, defaults to 0): Neighbours in a row of a weight that share a scale; 0 for all of them.
        modules_to_not_convert (`list[str]`): Modules that stay in full precision, by the ends of their names.
        context, bos, detokenizer, batch_size, progress: As for [`perplexity`].
        seed (`int`, defaults to 0): Of random frames.
        memoize: Called with the name of each part and what measures it, so that a caller can keep parts of what takes
            long: their names say nothing of the model, the texts and the other arguments.

    Returns:
        `dict`: `loss` and `perplexity` of the model as it is; `rounded`: per frame, per scheme `loss`, `perplexity`,
        `increase` (of the loss, nats) and `samples`; `protocol`, with all matrices that are `left alone` (embeddings
        aside), and as `calibration` on how many windows of how many tokens principal axes were found.

    Raises:
        ValueError: if an argument is impossible, `group_size` does not divide the rows of a weight, another frame
            is asked for of a family that cannot be converted, or no linear map inside the model can be rounded.
    """
    measured = evaluated(model, tokenizer)
    is_rigpt = isinstance(measured.config, RiGPTConfig)
    if frames is None:
        frames = FRAMES if is_rigpt else ("identity",)
    bits = {scheme: bits_of(scheme) for scheme in schemes}
    if group_size < 0:
        raise ValueError(f"`group_size` must be 0, for whole rows, or the size of a group, got {group_size}.")
    if unknown := [frame for frame in frames if frame not in (*FRAMES, GPTQ)]:
        raise ValueError(f"`frames` must be among {', '.join((*FRAMES, GPTQ))}, got {unknown[0]!r}.")
    if GPTQ in frames and measured.tokenizer is None:
        raise ValueError("`frames` must be without 'gptq' where there is no tokenizer to calibrate with, got None.")
    check_matrices(measured.model)
    base = measured
    if not is_rigpt and any(frame != "identity" for frame in frames):
        base = EvaluatedModel(convert_model(measured.model).eval(), measured.tokenizer, measured.name)
    # A suite may name the modules of two families, and a conversion has names of its own.
    ends = {name.rpartition(".")[2] for own in (measured, base) for name in matrices_of(own.model)}
    left = [name for name in modules_to_not_convert if name in ends]
    if modules_to_not_convert and not left:
        raise ValueError(
            f"`modules_to_not_convert` must name some of {', '.join(sorted(ends))}, got "
            f"{', '.join(modules_to_not_convert)}."
        )
    options: dict[str, Any] = {
        "context": context,
        "bos": bos,
        "detokenizer": detokenizer,
        "batch_size": batch_size,
        "progress": progress,
    }

    def losses(of: EvaluatedModel) -> dict[str, Any]:
        return perplexity(of, texts, **options)

    whole = memoize("whole", partial(losses, measured))
    start = [measured.beginning()] if bos else []
    read = [[*start, *row] for row in measured.encode(plain(texts, detokenizer))]
    ids = first_rows(read, measured.context(context))
    makers = {GPTQ: partial(calibrated, measured.tokenizer, ids.shape[1], seed)}
    others: dict[str, None] = {}
    by_frame: dict[str, dict[str, Any]] = {}
    for frame in frames:
        turned = measured if frame == "identity" else base if frame == GPTQ else _turned(base, frame, ids, seed)
        others |= dict.fromkeys(left_alone(turned.model))
        # In half precision a change of basis rounds too, and that is not what is asked about.
        is_rough = next(measured.model.parameters()).element_size() < 4
        own = whole
        if is_rough and frame != "identity":
            own = memoize(frame, partial(losses, turned))
        by_frame[frame] = {}
        make = makers.get(frame, quantized)
        for scheme, widths in bits.items():
            if frame == GPTQ and widths[0] >= WHOLE:  # there is nothing to make good
                continue

            def of_rounded(
                turned: EvaluatedModel = turned,
                widths: tuple[int, int] = widths,
                make: Any = make,
            ) -> dict[str, Any]:
                model = make(turned.model, *widths, group_size, tuple(modules_to_not_convert))
                return losses(EvaluatedModel(model, measured.tokenizer, measured.name))

            result = memoize(f"{frame} {scheme}", of_rounded)
            by_frame[frame][scheme] = {key: result[key] for key in ("loss", "perplexity", "samples")}
            by_frame[frame][scheme]["increase"] = result["loss"] - own["loss"]
            by_frame[frame][scheme]["samples"]["before"] = own["samples"]["nats"]
    return {
        "loss": whole["loss"],
        "perplexity": whole["perplexity"],
        "samples": whole["samples"],
        "rounded": by_frame,
        "protocol": whole["protocol"]
        | {
            "grid": "symmetric, to nearest",
            "weights": f"scale per {f'{group_size} of a row' if group_size else 'row'}",
            "activations": "scale per token",
            "left alone": ["output embeddings", *left, *others],
            "converted": not is_rigpt and any(frame != "identity" for frame in frames),
            "seed": seed,
        }
        | ({"calibration": calibration(ids)} if "pca" in frames else {})
        | ({GPTQ: f"calibrated on at most {TOKENS} tokens of documentation"} if GPTQ in frames else {}),
    }


def check_matrices(model: Any) -> None:
    """A `ValueError` if no linear map inside a model can be rounded."""
    if not matrices_of(model):
        raise ValueError(
            "`model` must have linear maps (`nn.Linear` or `Conv1D`) to round, got "
            f"{type(model).__name__} with none but its head. Leave `quantization_robustness` out for it."
        )


def left_alone(model: Any) -> list[str]:
    """Parameters that stay in full precision although they are matrices."""
    return in_short(model, other_matrices(model, matrices_of(model)))


def calibration(ids: torch.Tensor) -> dict[str, Any]:
    """The windows `[windows, tokens]` that principal axes are computed from."""
    return {"frame": "pca", "windows": len(ids), "tokens": ids.shape[1], "text": "the first of what is scored"}


def bits_of(scheme: str) -> tuple[int, int]:
    """
    Bits of weights and activations.

    Raises:
        ValueError: if the name does not say them, or says less than 2 or more than 16.
    """
    match = SCHEME.fullmatch(scheme)
    if match is None or not all(2 <= int(bits) <= WHOLE for bits in match.groups()):
        raise ValueError(f"`schemes` must be such as W4A8, with 2 to {WHOLE} bits each, got {scheme!r}.")
    return int(match[1]), int(match[2])


@torch.no_grad()
def quantized(
    model: nn.Module, weight_bits: int, activation_bits: int, group_size: int = 0, leave: tuple[str, ...] = ()
) -> nn.Module:
    """A copy whose linear maps work with rounded weights and inputs; arguments as for [`quantization_robustness`]."""
    rough: Any = copy.deepcopy(model)
    for name, module in matrices_of(rough, leave).items():
        weight = rows_of(module)
        if group_size and weight.shape[1] % group_size:
            raise ValueError(
                f"`group_size` must divide the {weight.shape[1]} numbers of a row of {name}, got {group_size}."
            )
        if weight_bits < WHOLE:
            weight.copy_(rounded(weight, weight_bits, group_size))
        if activation_bits < WHOLE:
            module.register_forward_pre_hook(
                lambda module, arguments: (rounded(arguments[0], activation_bits), *arguments[1:])
            )
    return rough


def calibrated(
    tokenizer: Any,
    context: int,
    seed: int,
    model: Any,
    weight_bits: int,
    activation_bits: int,
    group_size: int = 0,
    leave: tuple[str, ...] = (),
) -> nn.Module:
    """A RiGPT in a Hadamard frame, rounded by GPTQ; arguments as for [`quantized`]."""
    recipe = Recipe(
        weight_bits,
        group_size or None,
        activations=None if activation_bits >= WHOLE else activation_bits,
        table_bits=None,
        seed=seed,
    )
    made = quantize_model(model, recipe, calibration_tokens(tokenizer, tokens=TOKENS, context=context))
    made.codes = {name: codes for name, codes in made.codes.items() if name.rpartition(".")[2] not in leave}
    return made.dense_model()


def _turned(base: EvaluatedModel, frame: str, ids: torch.Tensor, seed: int) -> EvaluatedModel:
    """A RiGPT in another frame."""
    generator = torch.Generator().manual_seed(seed)
    model = in_frame(base.model, frame, generator=generator, input_ids=ids.to(base.device))
    return EvaluatedModel(model, base.tokenizer, base.name)


def needs(model: EvaluatedModel, texts: Any, task: Any) -> Inputs:
    """
    Other frames than its own are absent of a model that cannot be converted; without any left there is nothing, nor is
    there of a model of codes.
    """
    refuse_codes(model)
    inputs = needs_of_perplexity(model, texts, task)
    frames = inputs.arguments.get("frames") or ()
    others = [frame for frame in frames if frame != "identity"]
    if not others or not (reason := why_not_convertible(model)):
        return inputs
    if len(others) == len(frames):
        raise NotApplicable(reason)
    own = [frame for frame in frames if frame == "identity"]
    absent = {f"frame {frame}": reason for frame in others}
    return replace(inputs, arguments=inputs.arguments | {"frames": own}, absent=absent)


def why_not_convertible(model: EvaluatedModel) -> str:
    """Why a model is no RiGPT and cannot be made one; nothing if it is or can."""
    if isinstance(model.config, RiGPTConfig):
        return ""
    try:
        architecture_of(model.config, type(model.model).__name__)
        convert_model(model.model)  # which looks at more than the family
    except ValueError as error:
        return " ".join(str(error).split())
    return ""


def quantities(result: dict[str, Any]) -> list[Quantity]:
    """The increase of the loss, scheme by scheme in every frame."""
    listed = []
    for frame, schemes in result["rounded"].items():
        for scheme, entry in schemes.items():
            samples = entry["samples"]
            lost = [after - before for after, before in zip(samples["nats"], samples["before"], strict=True)]
            name, unit = f"loss of {scheme}, {frame}", "nats per token"
            own = {"amounts": lost, "weights": samples["tokens"], "scale": entry["loss"]}
            listed.append(Quantity(name, unit, entry["increase"], **own))
    return listed


def in_words(name: str) -> str:
    """The words that people read for the name of a quantity; one of another version stays as it is."""
    match = re.fullmatch(rf"loss of {SCHEME.pattern}, (\w+)", name)
    if match is None:
        return name
    weights, activations = (f"{bits}-bit" if int(bits) < WHOLE else "" for bits in match.groups()[:2])
    if weights == activations:
        rounded = f"{weights or 'unrounded'} weights and activations"
    else:
        rounded = ", ".join(
            [f"{weights} weights"] * bool(weights) + [f"{activations} activations"] * bool(activations)
        )
    return f"{ADDED}{rounded}, {FRAME_WORDS.get(match[3], match[3])}"


def draw(picture: Any, task: dict[str, Any], names: dict[str, str]) -> str:
    """The increase of the loss, scheme by scheme."""
    picture.set_size_inches(WIDTH, 2.5)
    axes = picture.subplots()
    tested = {each["name"]: each["models"] for each in task["quantities"]}
    results = {name: task["models"][name] for name in names}
    frames = list(dict.fromkeys(frame for each in results.values() for frame in each["rounded"]))
    schemes = list(
        dict.fromkeys(scheme for each in results.values() for by in each["rounded"].values() for scheme in by)
    )
    series = [(name, frame) for name, each in results.items() for frame in each["rounded"]]
    drawn = [0.0]
    for index, (name, frame) in enumerate(series):
        rounded, protocol = results[name]["rounded"], results[name].get("protocol", {})
        # Only a RiGPT has other frames than its own.
        is_converted = frame != "identity" and protocol.get("converted") is True
        called = f"{name}, converted" if is_converted else name
        label = called if len(rounded) == 1 else f"{called}, {FRAME_WORDS.get(frame, frame)}"
        # Side by side, as numbers of one function in the same frame are one.
        places = [schemes.index(each) + aside(index, len(series)) for each in rounded[frame]]
        values = [number(each["increase"]) for each in rounded[frame].values()]
        marker = MARKERS[frames.index(frame) % len(MARKERS)]
        axes.plot(places, values, marker, markersize=4, color=names[name], label=label)
        drawn += values
        for place, scheme in zip(places, rounded[frame], strict=True):
            bounds = interval(tested.get(f"loss of {scheme}, {frame}", {}).get(name))
            axes.plot([place, place], bounds, color=names[name], linewidth=1)
            drawn += bounds
    axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    for place in range(1, len(schemes)):
        axes.axvline(place - 0.5, color="0.9", linewidth=0.8, zorder=0)
    readable(axes.yaxis, drawn, 1e-3)
    axes.set_xticks(range(len(schemes)), schemes)
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.5, len(schemes) - 0.5)
    axes.set(xlabel="bits of weights (W) and activations (A)", ylabel="added loss (nats per token)")
    return IN_TABLE


MEASURE = Measure(
    "quantization_robustness",
    "What does rounding cost?",
    quantization_robustness,
    quantities,
    "what rounding costs, with intervals of 95 %; below zero it was a gain",
    draw,
    needs=needs,
    card_words="robustness to rounding",
    # An increase has a zero that means something, and no size to be a percentage of.
    difference_in=lambda quantity: "unit",
    words=in_words,
    note="Added loss: the loss after rounding minus the loss before. Own frame: the weights are rounded as they are; "
    "random frame, Hadamard frame, principal axes: turned so before; GPTQ: rounded as rigpt quantize does it.",
    of_conversion=lambda name: not name.endswith(", identity"),
)
