"""The verb that merges models, in the frames of the first."""

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table

from ..checkpoints.source import is_model_or_file
from ..command_line import READS, WRITES
from ..extras import require
from ..terminal import Console
from .arguments import (
    ANY,
    METHODS,
    AsSource,
    ForceFiles,
    Output,
    argument,
    flag,
    numbers,
    one_of,
    option,
)
from .common import check_picture, new_file, report, save_facts, save_model, say, say_written


# Tokens of a window on which an alignment is learned, at most; windows per step; and those on which it is measured.
WINDOW, WINDOWS, HELD_OUT = 128, 16, 32


def are_several(sources: list[str], name: str, values: Mapping[str, Any]) -> None:
    """A mark for [`guarded`]: a `ValueError` if there is one source, as where OUTPUT was forgotten."""
    if len(sources) < 2:
        raise ValueError(
            f"`{name}` must be at least two, got {sources[0]!r} alone: the last name, {str(values['output'])!r}, is "
            "`OUTPUT`. Name another model before it; or, if it is a model itself, the folder to make after it."
        )


def are_shares(weights: str | None, name: str, values: Mapping[str, Any]) -> None:
    """A mark for [`guarded`]: a `ValueError` if weights are no numbers, or not one per source."""
    if weights is not None and (given := len(numbers(weights, name))) != (count := len(values["sources"])):
        raise ValueError(
            f"`{name}` must be {count} numbers, one per model, got {given} in {weights[:80]!r}. Give {count}, "
            "separated by commas, that sum to 1."
        )


def merge(
    sources: Annotated[list[str], argument(f"Two or more models, each {ANY}."), READS, are_several, is_model_or_file],
    output: Output,
    weights: Annotated[
        str | None, option("How much of each, separated by commas; their sum is 1.", "equal parts"), are_shares
    ] = None,
    method: Annotated[str, option("linear, or spherical (along great circles)."), one_of(*METHODS)] = "linear",
    unaligned: Annotated[
        bool, flag("unaligned", "Do not align first: the ordinary average.", "--as-they-are")
    ] = False,
    learn: Annotated[
        int | None,
        option(
            "Steps in which all of the gauge group is learned on TEXT, from the alignment on, so that the loss of the "
            "models between is least. Losses are measured on the end of the text, which is kept apart.",
            "none",
        ),
    ] = None,
    text: Annotated[
        Path | None, option("Text to measure the loss on, on the path between the first two models.", "none"), READS
    ] = None,
    picture: Annotated[Path | None, option("File for a plot of that loss, with TEXT.", "none"), WRITES] = None,
    points: Annotated[int, option("Points on the path, with TEXT.")] = 11,
    as_source: AsSource = False,
    force: ForceFiles = False,
):
    """
    Merge models: bring all into the frames of the first, average, and write an ordinary checkpoint.

    The result is a RiGPT, or, with `--as-source`, of the stock class that the first has.

        rigpt merge model-a model-b merged --weights 0.7,0.3 --text held-out.txt --picture path.png

        rigpt merge model-a model-b merged --learn 400 --text text.txt
    """
    from ..checkpoints.folder import check_output
    from ..checkpoints.opened import open_model
    from ..checkpoints.vocabulary import check_same_vocabulary
    from ..conversion.checkpoint import check_has_class, write_as_source
    from ..symmetry import find_learned_alignment
    from ..symmetry.common_form import all_in_common_form
    from ..symmetry.merging import check_weights
    from ..symmetry.merging import merge as merge_models
    from ..symmetry.tokens import Representation
    from ..text.tokenizer import text_ids

    if not unaligned:
        require("align")
    check_together(text, picture, points, learn, unaligned)
    seen_picture = check_picture(picture, force)
    parts = check_weights(sources, None if weights is None else numbers(weights, "weights"), method)
    opened = [open_model(source) for source in sources]
    first, places = opened[0], [model.place for model in opened]
    if as_source:
        check_has_class(first)
    formed, notes = all_in_common_form(opened)
    for source in sources:
        seen = check_output(output, source, force)
    learning, input_ids = None, None
    if text is not None and learn is not None:
        learning, input_ids = learned_and_held_out(places[0], text, learn)
    elif text is not None:
        input_ids = text_ids(places[0], text)
    for other in places[1:]:
        check_same_vocabulary(places[0], other)
    say([note for model in opened for note in model.notes] + notes)
    held = Representation.load(sources[0]) if formed[0].config.token_symmetry else None
    models = [model.load() for model in formed]
    settings: dict[str, Any] = {"method": method, "aligned": not unaligned}
    facts = {"sources": sources, "weights": parts} | settings
    if learning is not None:
        others = models[1:]
        settings["alignments"] = [find_learned_alignment(one, models[0], learning, progress=True) for one in others]
        facts["learned_steps"] = learn
    merged = merge_models(models, parts, progress=True, **settings)
    if held is not None and not (away := held.distance(merged)) <= held.tolerance(merged.dtype):
        Console().print(f"The token symmetry of {sources[0]} is not recorded: merged weights are {away:.1e} from it.")
        held = None
    better = "rigpt", "evaluate", output, "--against", sources[0]
    if input_ids is not None:
        path = measure_path(models, merged, input_ids, points, facts, settings.get("alignments"))
    with new_file(picture, "picture", seen_picture) if picture else nullcontext() as place:
        if picture is not None and place is not None:
            from ..pictures.style import encoded
            from ..pictures.symmetry import plot_paths

            place.write_bytes(encoded(plot_paths([path], names=(sources[0], sources[1])), picture.suffix[1:]))
        files = {"merge.json": facts}
        if as_source:
            beside = partial(save_facts, files)
            certificate = write_as_source(merged, first, output, seen, name="the merged model", beside=beside)
            report(certificate, output, better)
            return
        save_model(merged.to(first.stored_dtype), places[0], output, seen, files, held)
    say_written(output, better)


def check_together(text: Path | None, picture: Path | None, points: int, learn: int | None, unaligned: bool) -> None:
    """Raises a `ValueError` for options that say nothing without another."""
    if picture is not None and text is None:
        raise ValueError(f"`picture` shows the loss on a text, got {str(picture)!r} without one. Add `--text FILE`.")
    if points < 2:
        raise ValueError(f"`points` must be at least 2, the two ends, got {points}. Take 11, as without it.")
    if learn is not None and learn < 1:
        raise ValueError(f"`learn` must be a number of steps, at least 1, got {learn}. Take 400, or leave it out.")
    if learn is not None and text is None:
        raise ValueError(f"`learn` needs a text to learn on, got {learn} without one. Add `--text FILE`.")
    if learn is not None and unaligned:
        raise ValueError(
            f"`learn` goes on from an alignment, got {learn} beside `unaligned`. Leave one of the two out."
        )


def learned_and_held_out(source: Any, text: Path, steps: int) -> tuple[Any, Any]:
    """The text that an alignment is learned on, and the token ids `[windows, seq]` of the text that it never sees."""
    import torch

    from ..checkpoints.logits import longest_of
    from ..symmetry import Learning
    from ..text.tokenizer import split, text_row

    context = min(WINDOW, longest_of(source.config))
    learned, held_out = (
        row[: len(row) // context * context].view(-1, context)
        for row in split(text_row(source, text, steps * WINDOWS * context), context)
    )
    order = torch.randperm(len(learned), generator=torch.Generator().manual_seed(0))
    return Learning(learned[order].split(WINDOWS), steps), held_out[:HELD_OUT]


def measure_path(
    models: list, merged: Any, input_ids: Any, points: int, facts: dict, alignments: list | None = None
) -> Any:
    """The path between the first two models; its losses, and those of all models, are printed and noted in `facts`."""
    from ..symmetry import loss_path

    def loss(model: Any) -> float:
        value = model(input_ids, labels=input_ids, use_cache=False).loss.item()
        if not isfinite(value):
            raise ValueError(
                f"`sources` must give finite losses on the text, as their average must, got {value} of "
                f"{', '.join(facts['sources'])}. See whether their weights are damaged, or leave `text` out."
            )
        return value

    # The second is brought to the first, as in the merge; what is said is by the share of the first.
    learned = alignments and alignments[0]
    path = loss_path(models[1], models[0], loss, points=points, learned=learned, progress=True).reversed()
    merged_loss, losses = loss(merged), [loss(model) for model in models]
    table = Table("model", "loss (nats per token)")
    for index, value in enumerate(losses, 1):
        table.add_row(f"source {index}", f"{value:.4f}")
    table.add_row("merged" if learned is None else "merged, fitted to this text", f"{merged_loss:.4f}")
    Console().print(table)
    if learned is not None:
        Console().print(
            "The merged model was fitted to the text of which this is the end, its sources were not: only another "
            "text says which is better."
        )
    Console().print(
        f"Barrier on the straight path between the first two: {path.barrier_before:.4f} nats unaligned, "
        f"{path.barrier_after:.4f} aligned{'' if learned is None else f', {path.barrier_learned:.4f} learned'}."
    )
    facts["loss"] = path.to_dict() | {"merged": merged_loss, "sources": losses}
    return path
