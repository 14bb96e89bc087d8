"""Verbs that use the freedom of a RiGPT: other weights, the same function."""

from contextlib import nullcontext
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .common import DTYPES, new_file, report, rigpt_config, to_dtype


DEFAULT_FRAMES = "stream,head"


def rotate(
    source: Annotated[str, typer.Argument(help="RiGPT folder or Hub id.")],
    output: Annotated[Path, typer.Argument(help="Folder to make.")],
    frames: Annotated[
        str | None,
        typer.Option(
            help="What to turn at random, separated by commas: frames that `rigpt info` lists, head (both of a head), "
            "shifts (all translations), or all.",
            show_default=DEFAULT_FRAMES,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the transformation, and of the inputs of the certificate.")] = 0,
    t: Annotated[
        float,
        typer.Option(
            help="How far to go along the geodesic: 0 stays, 1 is the whole way. Other than 1, what is drawn has no "
            "exchanges and reflections, as nothing leads to them step by step."
        ),
    ] = 1.0,
    transformation: Annotated[
        Path | None,
        typer.Option(help="File with a transformation to use instead of a random one.", show_default="none"),
    ] = None,
    inverse: Annotated[
        bool, typer.Option("--inverse", help="Undo the transformation in the file.", show_default="no")
    ] = False,
    save_transformation: Annotated[
        Path | None, typer.Option(help="File to write the applied transformation to.", show_default="none")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit on the Hub.", show_default="main")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"Of the result: {', '.join(DTYPES)}.", show_default="as the source")
    ] = None,
    max_shard_size: Annotated[str | None, typer.Option(help="Largest file.", show_default="5GB")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace earlier files and an earlier model in OUTPUT.", show_default="no")
    ] = False,
):
    """
    Turn the free frames of a RiGPT: other weights, the same function, with a certificate that it is.

    By default the stream and the spaces of all heads turn at random. What was saved can be repeated, and undone:

        rigpt rotate my-rigpt turned --frames all --save-transformation turn.safetensors
        rigpt rotate turned as-before --transformation turn.safetensors --inverse
    """
    from ..symmetry.checkpoint import transform_checkpoint

    if transformation is None and inverse:
        raise ValueError(
            "`inverse` undoes a transformation in a file, got none. Name it with `--transformation FILE`; "
            "`--save-transformation FILE` writes it when a model is rotated."
        )
    if transformation is not None and frames is not None:
        raise ValueError(
            f"`frames` says what to turn at random, got {frames!r} beside a `transformation`. Leave one of them out."
        )
    if not isfinite(t):
        raise ValueError(f"`t` must be a finite number, got {t}. 1 is the whole way.")
    if save_transformation is not None and output.resolve() in save_transformation.resolve().parents:
        raise ValueError(
            f"`save_transformation` must lie outside of the model's folder, got {str(save_transformation)!r} in "
            f"{str(output)!r}. Name another place."
        )
    config = rigpt_config(source, revision)
    if transformation is None:
        g = random_transformation(config, frames or DEFAULT_FRAMES, seed, t)
    else:
        g = load_transformation(transformation, config, t)
    g = g.inverse() if inverse else g
    keeping = (
        nullcontext() if save_transformation is None else new_file(save_transformation, "save_transformation", force)
    )
    with keeping as place:
        if place is not None:
            g.save(place)
        certificate = transform_checkpoint(
            source,
            output,
            g,
            revision=revision,
            dtype=to_dtype(dtype),
            force=force,
            max_shard_size=max_shard_size,
            seed=seed,
        )
    report(certificate, output)
    if save_transformation is not None:
        Console().print(f"To undo it: --transformation {save_transformation} --inverse")


def random_transformation(config: Any, frames: str, seed: int, t: float) -> Any:
    """A random element of the frames named in a list with commas, or the point at `t` on the way to one."""
    import torch

    from ..symmetry import GaugeTransformation

    names = [name.strip() for name in frames.split(",") if name.strip()]
    generator = torch.Generator().manual_seed(seed)
    g = GaugeTransformation.random(config, generator, names, special=t != 1)
    if not g.elements:
        raise ValueError(
            f"`frames` must name frames that this configuration has, got {frames!r}. `rigpt info` lists them."
        )
    return g if t == 1 else g.at(t)


def load_transformation(path: Path, config: Any, t: float) -> Any:
    """The transformation in a file that `--save-transformation` wrote, or the point at `t` on the way to it."""
    from safetensors import SafetensorError

    from ..symmetry import GaugeTransformation

    if not path.is_file():
        raise ValueError(
            f"`transformation` must be a file, got {str(path)!r}. `rigpt rotate --save-transformation` writes one."
        )
    try:
        g = GaugeTransformation.load(path, config)
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"`transformation` must be a file that `rigpt rotate --save-transformation` wrote for a model of this "
            f"configuration, got {str(path)!r}: {error}"
        ) from error
    try:
        return g if t == 1 else g.at(t)
    except ValueError as error:
        raise ValueError(f"`t` must be 1 for the `transformation` in {str(path)!r}: {error}") from error
