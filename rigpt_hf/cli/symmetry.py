"""Verbs that use the freedom of a RiGPT: other weights, the same function."""

from contextlib import nullcontext
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table

from ..command_line import READS, WRITES
from ..terminal import Console
from .arguments import (
    FRAMES,
    AnySource,
    AsSource,
    Dtype,
    ForceFiles,
    GgufFile,
    Output,
    Revision,
    Seed,
    ShardSize,
    flag,
    one_of,
    option,
)
from .common import check_file, new_file, report, say, to_dtype


DEFAULT_FRAMES = "stream,head"
# What a failed certificate says where frames are of this program's choice, and so in the gauge group.
MORE_DIGITS = "leaves the function alone up to rounding, so the result needs more digits: ask for a finer `dtype`"


def rotate(
    source: AnySource,
    output: Output,
    frames: Annotated[
        str | None,
        option(
            "What to turn at random, separated by commas: frames that `rigpt info` lists, head (both of a head), "
            "shifts (all translations), or all.",
            DEFAULT_FRAMES,
        ),
        one_of(*FRAMES, several=True),
    ] = None,
    seed: Annotated[int, option("Of the transformation, and of the inputs of the certificate.")] = 0,
    t: Annotated[
        float,
        option(
            "How far to go along the geodesic: 0 stays, 1 is the whole way. Other than 1, what is drawn has no "
            "exchanges and reflections, as nothing leads to them step by step."
        ),
    ] = 1.0,
    transformation: Annotated[
        Path | None, option("File with a transformation to use instead of a random one.", "none"), READS
    ] = None,
    inverse: Annotated[bool, flag("inverse", "Undo the transformation in the file.")] = False,
    save_transformation: Annotated[
        Path | None, option("File to write the applied transformation to.", "none"), WRITES
    ] = None,
    revision: Revision = None,
    gguf_file: GgufFile = None,
    as_source: AsSource = False,
    dtype: Dtype = None,
    max_shard_size: ShardSize = None,
    force: ForceFiles = False,
):
    """
    Turn the free frames of a model: other weights, the same function, with a certificate that it is.

    By default the stream and the spaces of all heads turn at random. What was saved can be repeated, and undone:

        rigpt rotate my-rigpt turned --frames all --save-transformation turn.safetensors

        rigpt rotate turned as-before --transformation turn.safetensors --inverse
    """
    from ..checkpoints.opened import open_model

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
    seen = check_file(save_transformation, "save_transformation", force)
    model = open_model(source, revision=revision, gguf_file=gguf_file)
    say(model.notes)
    config = model.config
    explanation = None
    if transformation is None:
        g = random_transformation(config, frames or DEFAULT_FRAMES, seed, t)
        explanation = f"Every turn of `frames` {(frames or DEFAULT_FRAMES)!r} {MORE_DIGITS}, or turn fewer frames."
    else:
        g = load_transformation(transformation, config, t)
    g = g.inverse() if inverse else g
    settings = {"revision": revision, "dtype": to_dtype(dtype), "max_shard_size": max_shard_size, "seed": seed}
    certificate = transform(
        g, model, output, save_transformation, seen, as_source, force=force, explanation=explanation, **settings
    )
    report(certificate, output, ("rigpt", "verify", source, output), ("rigpt", "diff", source, output))
    if save_transformation is not None:
        Console().print(f"To undo it: --transformation {save_transformation} --inverse", markup=False)


def transform(
    g: Any,
    source: Any,
    output: Path,
    save_to: Path | None,
    seen_file: list[int] | None,
    as_source: bool,
    *,
    force: bool = False,
    seen: Any = None,
    **options: Any,
) -> Any:
    """
    Write the turned [`OpenedModel`], and the transformation if there is a name for it, with what [`check_file`] gave
    of it; returns the certificate.
    """
    from ..checkpoints.folder import check_output
    from ..conversion.checkpoint import check_has_class, write_as_source
    from ..symmetry.checkpoint import transform_checkpoint

    seen = check_output(output, source.name, force) if seen is None else seen
    if as_source:
        check_has_class(source)
    with new_file(save_to, "save_transformation", seen_file) if save_to else nullcontext() as place:
        if place is not None:
            place.write_bytes(g.to_bytes())
        if as_source:
            turned, options = g(source.load()), {name: options[name] for name in ("dtype", "seed", "max_shard_size")}
            return write_as_source(turned, source, output, seen, frame="stream", **options)
        return transform_checkpoint(source, output, g, seen=seen, **options)


def canonicalize(
    source: AnySource,
    output: Output,
    save_transformation: Annotated[Path | None, option("File to write the transformation to.", "none"), WRITES] = None,
    revision: Revision = None,
    gguf_file: GgufFile = None,
    as_source: AsSource = False,
    dtype: Dtype = None,
    max_shard_size: ShardSize = None,
    seed: Seed = 0,
    force: ForceFiles = False,
):
    """
    Bring a model into its canonical form: the same function, in frames that the function alone determines.

    Whatever rotation, stretch or permutation lies between two models of one function, their canonical forms have the
    same weights. A table says how well each frame is determined; with weights rounded to few digits only large gaps
    mean much, and `rigpt diff` is the better judge.

        rigpt canonicalize my-rigpt canonical
    """
    from ..checkpoints.folder import check_output
    from ..checkpoints.opened import open_model
    from ..conversion.checkpoint import check_has_class
    from ..symmetry import canonical_gauge

    seen = check_output(output, source, force)
    seen_file = check_file(save_transformation, "save_transformation", force)
    model = open_model(source, revision=revision, gguf_file=gguf_file)
    if as_source:
        check_has_class(model)
    say(model.notes)
    gauge = canonical_gauge(model.load())
    settings = {"revision": revision, "dtype": to_dtype(dtype), "max_shard_size": max_shard_size, "seed": seed}
    settings |= {"seen": seen, "explanation": f"The canonical form {MORE_DIGITS}."}
    g = gauge.transformation
    certificate = transform(g, model, output, save_transformation, seen_file, as_source, **settings)
    table = Table("frame", "smallest gap", title="How well the form is determined (noise moves it by noise / gap)")
    for kind, gap in gauge.gaps.items():
        table.add_row(kind, f"{gap:.1e}")
    Console().print(table)
    for text in gauge.undetermined:
        Console().print(f"Not determined by spectra and norms: {text}.")
    report(certificate, output, ("rigpt", "verify", source, output))


def random_transformation(config: Any, frames: str, seed: int, t: float) -> Any:
    """A random element of the frames named in a list with commas, or the point at `t` on the path to one."""
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
    """The transformation in a file that `--save-transformation` wrote, or the point at `t` on the path to it."""
    from safetensors import SafetensorError

    from ..checkpoints.read import in_words
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
            f"configuration, got {str(path)!r}: {in_words(error)}"
        ) from error
    try:
        return g if t == 1 else g.at(t)
    except ValueError as error:
        raise ValueError(f"`t` must be 1 for the `transformation` in {str(path)!r}: {error}") from error
