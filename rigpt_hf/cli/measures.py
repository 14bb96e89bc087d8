"""Verbs that measure what models are, and change nothing."""

import json
from math import isnan, log10
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from ..checkpoints.source import is_model_or_file
from ..command_line import READS, WRITES
from ..extras import require
from ..terminal import Console
from .arguments import AnySource, GgufFile, Revision, are_numbers, argument, flag, numbers, option
from .common import check_file, check_picture, new_files, save_picture, say


# Width of a bar in a table, in characters, and what an empty one stands for.
BAR, SMALLEST = 12, 1e-6
# Orders farther from 1 than this show steps too large for the theory, not its failure.
ORDER_MARGIN = 0.25


def diff(
    a: AnySource,
    b: Annotated[str, argument("Another one."), READS, is_model_or_file],
    picture: Annotated[
        Path | None, option("File for a plot of the distances: PNG, SVG or PDF.", "none"), WRITES
    ] = None,
    json_file: Annotated[Path | None, option("File for all numbers.", "none", name="--json"), WRITES] = None,
    save_transformation: Annotated[
        Path | None, option("File for the transformation that brings A to B.", "none"), WRITES
    ] = None,
    seed: Annotated[int, option("Of the noise that stands for chance.")] = 0,
    revision_a: Annotated[str | None, option("Branch, tag or commit of A on the Hub.", "main")] = None,
    revision_b: Annotated[str | None, option("The same of B.", "main")] = None,
    force: Annotated[bool, flag("force", "Replace files that this program wrote and nobody changed.")] = False,
):
    """
    Say whether B is A in disguise, a relative of it, or unrelated, from the weights alone. Exit code 1 unless they are
    the same up to frames and rounding.

    A is brought as near to B as rotations, stretches and permutations of its frames allow. The distance that is left
    is held against what rounding explains and against what chance achieves, over all weights and part by part.

        rigpt diff my-rigpt suspect --picture diff.png
    """
    require("align")
    from ..checkpoints.opened import open_model
    from ..checkpoints.vocabulary import check_same_vocabulary
    from ..pictures.symmetry import plot_comparison
    from ..symmetry import compare
    from ..symmetry.common_form import in_common_form
    from ..symmetry.comparison import VERDICTS

    seen = check_picture(picture, force)
    seen_json = check_file(json_file, "json", force)
    seen_transformation = check_file(save_transformation, "save_transformation", force)
    models = open_model(a, argument="a", revision=revision_a), open_model(b, argument="b", revision=revision_b)
    check_same_vocabulary(*(model.place for model in models))
    first, second, notes = in_common_form(*models)
    say([note for model in models for note in model.notes] + notes)
    comparison = compare(*(model.load(model.stored_dtype) for model in (first, second)), seed=seed, progress=True)
    console = Console()
    table = Table(Column("part", no_wrap=True), "before", "aligned", Column(no_wrap=True), "rounding", "chance")
    table.title = "Relative distances"
    comparison.layers.name, comparison.total.name = "all layers", "all"
    for part in (*comparison.parts, comparison.layers, comparison.total):
        explained = [f"{value:.2g}" if value is not None else "-" for value in (part.rounding, part.chance)]
        table.add_row(part.name, f"{part.before:.2g}", f"{part.distance:.2g}", bar(part.distance), *explained)
    console.print(table)
    if comparison.layers.distance > comparison.layers.before:
        console.print(
            "Aligned distances are larger here: they are those of balanced weights, on which no stretch of a frame "
            "has a say. Hold them against rounding and chance, not against those before."
        )
    for kind, words in comparison.turned.items():
        console.print(f"{kind}: {words}")
    console.print(f"Precision of the weights: {' and '.join(comparison.precision)}")
    console.print(f"[bold]{VERDICTS[comparison.verdict]}[/bold]")
    with new_files() as begin:
        if json_file is not None:
            text = json.dumps({"a": a, "b": b} | comparison.to_dict(), indent=2) + "\n"
            begin(json_file, "json", seen_json).write_text(text, encoding="utf-8")
        if save_transformation is not None:
            place = begin(save_transformation, "save_transformation", seen_transformation)
            place.write_bytes(comparison.transformation.to_bytes())
        save_picture(picture, seen, lambda: plot_comparison(comparison, f"{a} and {b}"), begin)
    if comparison.verdict not in ("same", "disguise"):
        raise typer.Exit(1)


def bar(value: float) -> str:
    """A bar whose length grows with the logarithm of a value between `SMALLEST` and 1."""
    share = 1 - log10(max(value, SMALLEST)) / log10(SMALLEST)
    return "█" * round(BAR * min(max(share, 0.0), 1.0))


def charges(
    source: AnySource,
    measure: Annotated[bool, flag("measure", "Descend the loss and measure how the charges move.")] = False,
    text: Annotated[Path | None, option("Text to descend on, with --measure.", "random tokens"), READS] = None,
    learning_rates: Annotated[
        str, option("Step sizes, separated by commas, with --measure."), are_numbers
    ] = "0.02,0.01,0.005",
    time: Annotated[float, option("Steps times step size, with --measure.")] = 0.4,
    weight_decay: Annotated[float, option("Rate of decay, with --measure.")] = 0.0,
    picture: Annotated[Path | None, option("File for a plot, with --measure.", "none"), WRITES] = None,
    seed: Annotated[int, option("Of random tokens.")] = 0,
    revision: Revision = None,
    gguf_file: GgufFile = None,
    force: Annotated[bool, flag("force", "Replace a picture that this program wrote and nobody changed.")] = False,
):
    """
    Show the charges that gradient flow conserves, one set per symmetry that stretches, and whether descent keeps them.

    A charge of zero is balance: the representative of least norm, where weight decay leads. With --measure a copy of
    the model descends the loss with several step sizes over the same time: the drift must shrink as the step does.

        rigpt charges my-rigpt

        rigpt charges my-rigpt --measure --weight-decay 0.5 --picture charges.png
    """
    import torch

    from ..checkpoints.logits import random_input_ids
    from ..checkpoints.opened import open_model
    from ..frames import FrameKey, table_of
    from ..pictures.symmetry import plot_drift
    from ..symmetry import charge_drift
    from ..symmetry import charges as charges_of
    from ..symmetry.contraction import weights_of
    from ..symmetry.drift import step_counts
    from ..text.tokenizer import text_ids

    if picture is not None and not measure:
        raise ValueError(f"`picture` shows what is measured, got {str(picture)!r} without `--measure`. Add it.")
    seen = check_picture(picture, force)
    rates = numbers(learning_rates, "learning_rates")
    step_counts(rates, time, weight_decay)
    if text is not None and not measure:
        raise ValueError(f"`text` is what `--measure` descends on, got {str(text)!r} without it. Add it.")
    found = open_model(source, revision=revision, gguf_file=gguf_file)
    say(found.notes)
    model = found.load()
    config = model.config
    weights = weights_of(model)
    frames = table_of(config)
    table = Table("frame", "charge", "relative to the weights", title="Conserved charges")
    for key, value in charges_of(model).items():
        names = [name for name, _ in frames.carriers(FrameKey.parse(key)) if name in weights]
        scale = sum(float(weights[name].square().sum()) for name in names)
        relative = f"{float(value.norm()) / scale:.2e}" if scale else "-"
        table.add_row(key, f"{float(value.norm()):.3g}", relative)
    console = Console()
    console.print(table)
    if not measure:
        return
    if text is not None:
        input_ids = text_ids(found.place, text)
    else:
        input_ids = random_input_ids(config.vocab_size, min(config.max_position_embeddings, 64), seed=seed)
    with torch.enable_grad():
        drift = charge_drift(model, input_ids, learning_rates=rates, time=time, weight_decay=weight_decay)
    show_drift(drift, console)
    save_picture(picture, seen, lambda: plot_drift(drift))


def measured(value: float, form: str) -> str:
    """A number, or a stroke where nothing moved from which it could be told."""
    return "-" if isnan(value) else format(value, form)


def show_drift(drift: Any, console: Console):
    """A table of what `charge_drift` measured."""
    columns = [*(f"step {descent.learning_rate:g}" for descent in drift.descents), "order"]
    decays = drift.weight_decay > 0
    table = Table(Column("frame", no_wrap=True), *columns, *(["decay", "predicted"] if decays else []))
    table.title = "Drift under gradient descent (predicted order in the step: 1)"
    for kind, order in drift.orders.items():
        row = [kind, *(f"{descent.drift[kind][-1]:.2e}" for descent in drift.descents), measured(order, ".3f")]
        if decays:
            row += [measured(drift.measured_rates[kind], ".4f"), f"{drift.predicted_rates[kind]:.4f}"]
        table.add_row(*row)
    console.print(table)
    astray = [kind for kind, order in drift.orders.items() if abs(order - 1) > ORDER_MARGIN]
    if astray:
        console.print(
            f"Not near 1 in {', '.join(astray)}: these steps do not follow the flow. Lower --learning-rates (and "
            "--time with them)."
        )
