"""Verbs that measure what models are, and change nothing."""

from dataclasses import asdict
from math import isnan
from pathlib import Path
from typing import Annotated, Any

from rich.table import Column, Table

from ..command_line import READS, WRITES
from ..terminal import Console, say_next
from .arguments import AnySource, ForceFile, GgufFile, JsonFile, Revision, are_numbers, flag, numbers, option
from .common import as_given, check_json, check_picture, save_json, save_picture, say


# Orders farther from 1 than this show steps too large for the theory, not its failure.
ORDER_MARGIN = 0.25


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
    json_file: JsonFile = None,
    force: ForceFile = False,
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
    seen, seen_json = check_picture(picture, force), check_json(json_file, force)
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
    facts: dict[str, Any] = {"source": source, "charges": {}}
    table = Table("frame", "charge", "relative to the weights", title="Conserved charges")
    for key, value in charges_of(model).items():
        names = [name for name, _ in frames.carriers(FrameKey.parse(key)) if name in weights]
        scale = sum(float(weights[name].square().sum()) for name in names)
        relative = f"{float(value.norm()) / scale:.2e}" if scale else "-"
        table.add_row(key, f"{float(value.norm()):.3g}", relative)
        facts["charges"][key] = {"norm": float(value.norm()), "squared_norm_of_weights": scale}
    console = Console()
    console.print(table)
    if not measure:
        save_json(facts, json_file, seen_json)
        say_next(("rigpt", "charges", source, "--measure", *as_given(revision=revision, gguf_file=gguf_file)))
        return
    if text is not None:
        input_ids = text_ids(found.place, text)
    else:
        input_ids = random_input_ids(config.vocab_size, min(config.max_position_embeddings, 64), seed=seed)
    with torch.enable_grad():
        drift = charge_drift(model, input_ids, learning_rates=rates, time=time, weight_decay=weight_decay)
    is_astray = show_drift(drift, console)
    save_json(facts | {"drift": asdict(drift)}, json_file, seen_json)
    save_picture(picture, seen, lambda: plot_drift(drift))
    same = as_given(text=text, revision=revision, gguf_file=gguf_file)
    if is_astray:
        shorter = {"learning_rates": ",".join(f"{rate / 4:g}" for rate in rates), "time": f"{time / 4:g}"}
        decay = {"weight_decay": weight_decay or None}
        say_next(("rigpt", "charges", source, "--measure", *as_given(**shorter, **decay), *same))
    elif weight_decay == 0:
        say_next(("rigpt", "charges", source, "--measure", "--weight-decay", 0.5, *same))
    else:
        say_next(("rigpt", "canonicalize", source, "OUTPUT", *as_given(revision=revision, gguf_file=gguf_file)))


def measured(value: float, form: str) -> str:
    """A number, or a stroke where nothing moved from which it could be told."""
    return "-" if isnan(value) else format(value, form)


def show_drift(drift: Any, console: Console) -> bool:
    """A table of what `charge_drift` measured; whether some of it shows steps that are too large."""
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
    return bool(astray)
