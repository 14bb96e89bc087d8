"""What a model loses when weights and activations are rounded to few bits, from several frames."""

import copy
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from rigpt_hf import RiGPTConfig
from rigpt_hf.conversion import convert_model

from .frames import FRAMES, in_frame
from .invariance import first_rows
from .likelihood import Tick, no_tick
from .perplexity import beginning, perplexity, plain
from .rounding import in_short, matrices_of, other_matrices, rounded, rows_of
from .subjects import Subject, Texts, subject


SCHEMES = ("W8A8", "W4A16", "W4A8", "W4A4")
SCHEME = re.compile(r"W(\d+)A(\d+)")
# Numbers of so many bits are left as they are.
WHOLE = 16
# Gives what is kept under a name, or makes it and keeps it.
Once = Callable[[str, Callable[[], dict[str, Any]]], dict[str, Any]]


def every_time(part: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is called where nothing is kept."""
    return make()


@torch.no_grad()
def quantization_robustness(
    model: Any,
    texts: Texts,
    tokenizer: Any = None,
    *,
    schemes: Sequence[str] = SCHEMES,
    frames: Sequence[str] | None = None,
    group_size: int = 0,
    leave: Sequence[str] = (),
    context: int | None = None,
    bos: bool = False,
    detokenizer: str = "none",
    batch_size: int = 8,
    seed: int = 0,
    tick: Tick = no_tick,
    once: Once = every_time,
) -> dict[str, Any]:
    """
    Loss and perplexity under simulated rounding to nearest, per scheme and frame.

    What rounding costs is counted from the loss in the same frame and precision. Weights of all linear maps but the
    head are rounded once, their inputs token by token, on symmetric grids: a weight shares its scale with its row,
    or with `group_size` neighbours in it; an activation with its token. Nothing is calibrated but principal axes,
    which are those of the first of the texts that are scored. Frames other than the model's own are exact changes of
    basis of a RiGPT; a stock model is converted first, exactly too, which the result says.

    Args:
        model, tokenizer: As for [`subject`]; left as it is.
        texts: Texts or rows of token ids.
        schemes (`list[str]`): Such as `"W4A8"`: bits of weights and of activations; 16 leaves them as they are.
        frames (`list[str]`, *optional*): Among `"identity"`, `"haar"`, `"hadamard"` and `"pca"`, see [`in_frame`]; all
            of them for a RiGPT and `"identity"` for others if not given.
        group_size (`int`, defaults to 0): Neighbours in a row of a weight that share a scale; 0 for all of them.
        leave (`list[str]`): Modules that stay in full precision, by the ends of their names.
        context, bos, detokenizer, batch_size, tick: As for [`perplexity`].
        seed (`int`, defaults to 0): Of random frames.
        once: Called with the name of each part and what measures it, so that a caller can keep parts of what takes
            long: their names say nothing of the model, the texts and the other arguments.

    Returns:
        `dict`: `loss` and `perplexity` of the model as it is; `rounded`: per frame, per scheme `loss`, `perplexity`,
        `increase` (of the loss, nats) and `samples`; `protocol`, with all matrices that are `left alone` (embeddings
        aside), and as `calibration` on how many windows of how many tokens principal axes were found.

    Raises:
        ValueError: if an argument is impossible, `group_size` does not divide the rows of a weight, another frame
            is asked for of a family that cannot be converted, or no linear map inside the model can be rounded.
    """
    measured = subject(model, tokenizer)
    is_rigpt = isinstance(getattr(measured.model, "config", None), RiGPTConfig)
    if frames is None:
        frames = FRAMES if is_rigpt else ("identity",)
    bits = {scheme: bits_of(scheme) for scheme in schemes}
    if group_size < 0:
        raise ValueError(f"`group_size` must be 0, for whole rows, or the size of a group, got {group_size}.")
    if unknown := [frame for frame in frames if frame not in FRAMES]:
        raise ValueError(f"`frames` must be among {', '.join(FRAMES)}, got {unknown[0]!r}.")
    check_matrices(measured.model)
    base = measured
    if not is_rigpt and any(frame != "identity" for frame in frames):
        base = Subject(convert_model(measured.model).eval(), measured.tokenizer, measured.name)
    # A suite may name the modules of two families, and a conversion has names of its own.
    ends = {name.rpartition(".")[2] for each in (measured, base) for name in matrices_of(each.model)}
    left = [name for name in leave if name in ends]
    if leave and not left:
        raise ValueError(f"`leave` must name some of {', '.join(sorted(ends))}, got {', '.join(leave)}.")
    options: dict[str, Any] = {
        "context": context,
        "bos": bos,
        "detokenizer": detokenizer,
        "batch_size": batch_size,
        "tick": tick,
    }

    def losses(of: Subject) -> dict[str, Any]:
        return perplexity(of, texts, **options)

    whole = once("whole", partial(losses, measured))
    start = [beginning(measured)] if bos else []
    read = [[*start, *row] for row in measured.encode(plain(texts, detokenizer))]
    ids = first_rows(read, measured.context(context))
    others: dict[str, None] = {}
    found: dict[str, dict[str, Any]] = {}
    for frame in frames:
        turned = measured if frame == "identity" else _turned(base, frame, ids, seed)
        others |= dict.fromkeys(left_alone(turned.model))
        # In half precision a change of basis rounds too, and that is not what is asked about.
        is_rough = next(measured.model.parameters()).element_size() < 4
        own = whole
        if is_rough and frame != "identity":
            own = once(frame, partial(losses, turned))
        found[frame] = {}
        for scheme, each in bits.items():

            def of_rounded(turned: Subject = turned, each: tuple[int, int] = each) -> dict[str, Any]:
                model = quantized(turned.model, *each, group_size, tuple(leave))
                return losses(Subject(model, measured.tokenizer, measured.name))

            result = once(f"{frame} {scheme}", of_rounded)
            found[frame][scheme] = {key: result[key] for key in ("loss", "perplexity", "samples")}
            found[frame][scheme]["increase"] = result["loss"] - own["loss"]
            found[frame][scheme]["samples"]["before"] = own["samples"]["nats"]
    return {
        "loss": whole["loss"],
        "perplexity": whole["perplexity"],
        "samples": whole["samples"],
        "rounded": found,
        "protocol": whole["protocol"]
        | {
            "grid": "symmetric, to nearest",
            "weights": f"scale per {f'{group_size} of a row' if group_size else 'row'}",
            "activations": "scale per token",
            "left alone": ["output embeddings", *left, *others],
            "converted": not is_rigpt and any(frame != "identity" for frame in frames),
            "seed": seed,
        }
        | ({"calibration": calibration(ids)} if "pca" in frames else {}),
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
    """What principal axes are found on, `[windows, tokens]`."""
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


def _turned(base: Subject, frame: str, ids: torch.Tensor, seed: int) -> Subject:
    """A RiGPT in another frame."""
    generator = torch.Generator().manual_seed(seed)
    model = in_frame(base.model, frame, generator=generator, input_ids=ids.to(base.device))
    return Subject(model, base.tokenizer, base.name)
