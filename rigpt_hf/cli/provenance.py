"""Verbs that say which weights these are: fingerprints, the nearest of many, and whether B was made from A."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, groupby
from math import log10
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from ..checkpoints.source import is_model_or_file, names_of
from ..command_line import READS, WRITES
from ..extras import require
from ..terminal import Console, say_next
from .arguments import ANY, AnySource, Device, ForceFile, GgufFile, JsonFile, Revision, argument, one_of, option
from .common import (
    as_given,
    check_device,
    check_file,
    check_json,
    check_picture,
    new_files,
    save_json,
    save_picture,
    say,
)


# Width of a bar in a table, in characters, and what an empty one stands for.
BAR, SMALLEST = 12, 1e-6
# So many neighbouring layers become one row where their distances are within this factor of each other.
RUN, FACTOR = 3, 2.0
SEARCHES = ("auto", "always", "never")
# What stands behind a verdict that is no likelihood.
PROOFS = {
    "same": "This is proof, not likelihood: the weights were compared as they are, and so were the logits.",
    "disguise": "This is proof, not likelihood: one transformation brings all weights of A to those of B, and their "
    "logits agree. --save-transformation FILE keeps it.",
}
# Models in a matrix of distances, and fingerprints that `identify` shows.
WIDEST, NEAREST = 12, 5
# Tokens on which the certificate of a comparison is made.
TOKENS = 256


def fingerprint(
    sources: Annotated[
        list[str], argument(f"{ANY[0].upper()}{ANY[1:]}; or a file that this verb wrote."), READS, is_model_or_file
    ],
    output: Annotated[
        Path | None, option("File for the fingerprint, or, of several models, folder for theirs.", "none"), WRITES
    ] = None,
    json_file: JsonFile = None,
    revision: Revision = None,
    gguf_file: GgufFile = None,
    force: ForceFile = False,
):
    """
    Make the fingerprints of models, and show how far apart they are: 0 for one model in any frames, near 1 for
    unrelated ones.

    A fingerprint is a file of at most 1 MB, whatever the size of the model, from one pass over its weights; models of
    other widths and depths can be compared, if their tokens mean the same.

        rigpt fingerprint my-model --output my-model.fingerprint

        rigpt fingerprint model-a model-b model-c
    """
    from ..symmetry.fingerprint import Fingerprint, is_fingerprint
    from ..symmetry.fingerprint import fingerprint as fingerprint_of

    if len(sources) > WIDEST:
        raise ValueError(
            f"`sources` must be at most {WIDEST}, which fit into a table, got {len(sources)}. `rigpt identify` holds "
            "one against a folder of any size."
        )
    names = [f"{name}.fingerprint" for name in names_of(sources, "-")]
    if output is not None and len(set(names)) < len(names):
        raise ValueError(f"`sources` must be different models, got {', '.join(names)}. Name each once.")
    places = [output] if len(sources) == 1 else [None if output is None else output / name for name in names]
    seen = [check_file(place, "output", force) for place in places]
    seen_json = check_json(json_file, force)
    prints: list[Fingerprint] = []
    with new_files() as begin:
        for source, place, before in zip(sources, places, seen, strict=True):
            made = _print_of(source, revision, gguf_file, fingerprint_of)
            if place is not None:
                begin(place, "output", before).write_bytes(made.to_bytes())
            prints.append(made)
        apart = [[one.distance(other) for other in prints] for one in prints]
        facts = {"sources": sources, "facts": [dict(one.facts) for one in prints], "distances": apart}
        save_json(facts, json_file, seen_json, begin)
    console = Console()
    table = Table("", "model", "class", "parameters", "layers", "numbers", title="Fingerprints")
    for index, (source, one) in enumerate(zip(sources, prints, strict=True), 1):
        about = [str(one.facts[name]) for name in ("class", "layers")]
        table.add_row(
            str(index), source, about[0], f"{one.facts['parameters']:,}", about[1], f"{one.sketches.numel():,}"
        )
    console.print(table)
    if len(sources) > 1:
        table = Table("", *(str(index) for index in range(1, len(sources) + 1)), title="Distances")
        for index, row in enumerate(apart, 1):
            table.add_row(str(index), *(f"{value:.3g}" for value in row))
        console.print(table)
    for place in places:
        if place is not None:
            console.print(f"Written to {place}", markup=False)
    if output is not None:
        say_next(("rigpt", "identify", "MODEL", "--against", output if len(sources) > 1 else output.parent))
    else:
        of_source = as_given(revision=revision, gguf_file=gguf_file)
        kept = sources[0], "--output", f"{names_of(sources, '-')[0]}.fingerprint", *of_source
        nearest = min(combinations(range(len(sources)), 2), key=lambda pair: apart[pair[0]][pair[1]], default=())
        pair = [sources[index] for index in nearest if not is_fingerprint(sources[index])]
        if len(pair) == 2 and not of_source:
            say_next(("rigpt", "diff", *pair))
        elif is_fingerprint(sources[0]):
            say_next(("rigpt", "identify", "MODEL", "--against", Path(sources[0]).parent))
        else:
            say_next(("rigpt", "fingerprint", *kept))


def _print_of(source: str, revision: str | None, gguf_file: str | None, make: Any) -> Any:
    """The fingerprint of a model, or the one in a file."""
    from ..checkpoints.opened import open_model
    from ..symmetry.fingerprint import Fingerprint, is_fingerprint

    if is_fingerprint(source):
        return Fingerprint.load(source)
    model = open_model(source, argument="sources", revision=revision, gguf_file=gguf_file)
    say(model.notes)
    return make(model, progress=True)


def identify(
    source: Annotated[str, argument(f"{ANY[0].upper()}{ANY[1:]}; or a fingerprint."), READS, is_model_or_file],
    against: Annotated[Path, option("Folder of fingerprints that `rigpt fingerprint` wrote."), READS],
    nearest: Annotated[int, option("How many to show.")] = NEAREST,
    json_file: JsonFile = None,
    revision: Revision = None,
    gguf_file: GgufFile = None,
    force: ForceFile = False,
):
    """
    Find what a model was made from among many: those whose fingerprints are nearest to its own. Exit code 1 if none is
    near enough to be a relative.

        rigpt identify suspect --against fingerprints
    """
    from ..symmetry.fingerprint import fingerprint as fingerprint_of
    from ..symmetry.fingerprint import fingerprints_in, is_fingerprint, nearest_of
    from ..symmetry.rates import in_words, related

    if nearest < 1:
        raise ValueError(f"`nearest` must be at least 1, got {nearest}. Take {NEAREST}, as without it.")
    if not against.is_dir():
        raise ValueError(f"`against` must be a folder of fingerprints, got {str(against)!r}. Make it first.")
    seen = check_json(json_file, force)
    found = nearest_of(_print_of(source, revision, gguf_file, fingerprint_of), against, nearest)
    if others := fingerprints_in(against)[1]:
        such = f"or a damaged one, such as {others[0].name}"
        say([f"{len(others)} of the files in {against} hold no fingerprint, {such}."])
    table = Table("fingerprint", "of", "class", "distance", "", title=f"Nearest to {source}")
    shown: list[dict] = []
    for path, one, distance in found:
        verdict = "relative" if distance < related() else "unrelated"
        shown.append({"file": str(path), "facts": dict(one.facts), "distance": distance, "verdict": verdict})
        table.add_row(path.name, str(one.facts["name"]), str(one.facts["class"]), f"{distance:.3g}", verdict)
    console = Console()
    console.print(table)
    console.print(in_words(found[0][2]), markup=False)
    save_json({"source": source, "nearest": shown}, json_file, seen)
    _, one, distance = found[0]
    if distance >= related():
        say_next(("rigpt", "fingerprint", "MODEL", "--output", against / "MODEL.fingerprint"))
        raise typer.Exit(1)
    if is_fingerprint(source) or one.facts["name"] == source:
        say_next(("rigpt", "identify", "MODEL", "--against", against))
    else:
        say_next(("rigpt", "diff", one.facts["name"], source, *as_given(revision_b=revision)))


def diff(
    a: AnySource,
    b: Annotated[str, argument("Another one."), READS, is_model_or_file],
    search: Annotated[
        str,
        option("Look for what brings A to B: auto (if fingerprints are of relatives), always, or never."),
        one_of(*SEARCHES),
    ] = "auto",
    picture: Annotated[
        Path | None, option("File for a plot of the distances: PNG, SVG or PDF.", "none"), WRITES
    ] = None,
    json_file: JsonFile = None,
    save_transformation: Annotated[
        Path | None, option("File for the transformation that brings A to B.", "none"), WRITES
    ] = None,
    device: Device = None,
    seed: Annotated[int, option("Of the tokens of the certificate.")] = 0,
    revision_a: Annotated[str | None, option("Branch, tag or commit of A on the Hub.", "main")] = None,
    revision_b: Annotated[str | None, option("The same of B.", "main")] = None,
    force: ForceFile = False,
):
    """
    Say whether B was made from A: whether it is A in disguise, a relative of it, or unrelated. Exit code 1 unless they
    are the same up to frames and rounding.

    Fingerprints come first, whatever the shapes of the two are. Where one configuration holds both, A is brought as
    near to B as rotations, stretches and permutations of its frames allow, layer by layer, on a GPU where there is
    one; what is left is held against what rounding explains. A verdict that is no proof comes with the rate of its
    errors: see docs/provenance.md.

        rigpt diff my-model suspect --picture diff.png
    """
    require("align")
    from ..checkpoints.opened import open_model
    from ..checkpoints.vocabulary import shared_tokens
    from ..pictures.symmetry import plot_comparison
    from ..symmetry import compare
    from ..symmetry.common_form import in_common_form
    from ..symmetry.rates import in_words

    check_device(device, "float64")
    seen = check_picture(picture, force)
    seen_json = check_json(json_file, force)
    seen_transformation = check_file(save_transformation, "save_transformation", force)
    models = open_model(a, argument="a", revision=revision_a), open_model(b, argument="b", revision=revision_b)
    notes = shared_tokens(*(model.place for model in models))
    comparison = compare(*models, search=search, device=device, progress=True)
    say(notes + comparison.notes)
    console = Console()
    is_one, certificate = comparison.verdict in ("same", "disguise"), None
    if is_one:
        certificate = certified(*in_common_form(*models)[:2], seed)
        if not certificate.passed:
            is_one, comparison.verdict = False, "relative"
    is_equal = comparison.verdict == "same" and comparison.total.before == 0
    console.print(f"[bold]{comparison.meaning}[/bold]")
    if certificate and not is_one:
        console.print("The weights agree up to rounding, and yet the two are not one function.")
    if not is_equal:
        console.print(PROOFS.get(comparison.verdict, in_words(comparison.fingerprint)), markup=False)
    if comparison.incomparable is not None:
        console.print(
            f"Fingerprints alone decide, as no one configuration holds both. {comparison.incomparable}", markup=False
        )
    if comparison.total is not None:
        comparison.layers.name = "all layers"
        if not is_equal:
            show_distances(comparison, console)
    if certificate:
        console.print(str(certificate), highlight=False, markup=False, soft_wrap=True)
    if save_transformation is not None and comparison.transformation is None:
        reason = comparison.incomparable or "fingerprints are not of relatives. `--search always` looks all the same."
        say([f"No transformation is in {save_transformation}, as none was looked for: {reason}"])
    facts = {"a": a, "b": b} | comparison.to_dict() | {"certificate": certificate and certificate.to_dict()}
    with new_files() as begin:
        save_json(facts, json_file, seen_json, begin)
        if save_transformation is not None and comparison.transformation is not None:
            place = begin(save_transformation, "save_transformation", seen_transformation)
            place.write_bytes(comparison.transformation.to_bytes())
        save_picture(picture, seen, lambda: plot_comparison(comparison, (a, b)), begin)
    revisions = as_given(revision_a=revision_a, revision_b=revision_b)
    are_carried = not revisions and comparison.incomparable is None
    if comparison.verdict in ("disguise", "relative") and are_carried and not any(model.stock for model in models):
        say_next(("rigpt", "transport", "ADAPTER", "OUTPUT", "--from", a, "--to", b))
    elif is_one:  # from a model to itself there is nothing to carry
        say_next(("rigpt", "verify", a, b, *revisions))
    elif comparison.verdict == "relative" and are_carried:
        say_next(("rigpt", "merge", a, b, "OUTPUT"))
    else:
        say_next(("rigpt", "identify", b, "--against", "FINGERPRINTS", *as_given(revision=revision_b)))
    if not is_one:
        raise typer.Exit(1)


def certified(a: Any, b: Any, seed: int) -> Any:
    """The certificate that two models are one function on random tokens; one of them is in memory at a time."""
    from ..checkpoints.certificate import compare
    from ..checkpoints.logits import longest_of, random_input_ids, record_logits

    size = min(model.config.vocab_size for model in (a, b))
    length = min(TOKENS, *(longest_of(model.config) for model in (a, b)))
    input_ids = random_input_ids(size, length, seed=seed)
    before = record_logits(a.load(a.stored_dtype), input_ids, hashed=False)
    after = record_logits(b.load(b.stored_dtype), input_ids, hashed=False, like=before)
    return compare(before, after, input_ids, source=a.name, target=b.name, seed=seed, positions=length)


def show_distances(comparison: Any, console: Console) -> None:
    """The distances that the search left, part by part, and the frames that it turned."""
    rows = [*in_rows(comparison.parts, comparison.limit), comparison.layers, comparison.total]
    is_rounded = comparison.total.rounding is not None
    bars = Column(f"{SMALLEST:g} to 1", no_wrap=True)
    table = Table(Column("part", no_wrap=True), "before", "aligned", bars, *["rounding"] * is_rounded)
    table.title, table.caption = "Relative distances", "Bars: aligned distances, on a logarithmic scale."
    if len(rows) < len(comparison.parts) + 2:
        table.caption += "\nOf several layers the largest; --json FILE has every layer."
    for part in rows:
        explained = [f"{part.rounding:.2g}"] if is_rounded else []
        table.add_row(part.name, f"{part.before:.2g}", f"{part.distance:.2g}", bar(part.distance), *explained)
    console.print(table)
    if comparison.layers.distance > max(comparison.layers.before, comparison.limit):
        console.print(
            "Aligned distances are larger here: they are those of balanced weights, on which no stretch of a frame "
            "has a say. Hold them against what rounding explains, not against those before."
        )
    for kind, words in comparison.turned.items():
        console.print(f"{kind}: {words}")
    console.print(f"Precision of the weights: {' and '.join(comparison.precision)}")
    console.print(f"Rounding explains distances up to {comparison.limit:.2g}")


def in_rows(parts: Sequence[Any], limit: float) -> list[Any]:
    """The parts, with one in the place of each part of neighbouring layers that are alike: their largest distances."""
    blocks = [list(block) for _, block in groupby(parts, key=lambda part: _split(part.name)[0])]
    rows: list[Any] = []
    while blocks:
        run = [blocks.pop(0)]
        while blocks and _are_alike([*run, blocks[0]], limit):
            run.append(blocks.pop(0))
        if len(run) < RUN:
            rows += [part for block in run for part in block]
            continue
        for same in zip(*run, strict=True):
            first, last = (_split(part.name)[0].removeprefix("layers.") for part in (same[0], same[-1]))
            largest = {
                name: max((getattr(part, name) for part in same if getattr(part, name) is not None), default=None)
                for name in ("distance", "before", "rounding")
            }
            rows.append(replace(same[0], name=f"layers {first} to {last}, {_split(same[0].name)[1]}", **largest))
    return rows


def _split(name: str) -> tuple[str, str]:
    """The layer of a part and what it is there, such as `layers.3` and `self_attn`; or the name and nothing."""
    pieces = name.split(".", 2)
    return (".".join(pieces[:2]), pieces[2]) if pieces[0] == "layers" else (name, "")


def _are_alike(blocks: Sequence[Sequence[Any]], limit: float) -> bool:
    """Whether some layers have the same parts, at distances that differ by rounding or little."""
    if not all(block[0].name.startswith("layers.") for block in blocks):
        return False
    if len({tuple(_split(part.name)[1] for part in block) for block in blocks}) > 1:
        return False
    distances = [
        [max(getattr(part, name), limit) for part in same]
        for same in zip(*blocks, strict=True)
        for name in ("distance", "before")
    ]
    return all(max(values) <= FACTOR * min(values) for values in distances)


def bar(value: float) -> str:
    """A bar whose length grows with the logarithm of a value between `SMALLEST` and 1."""
    share = 1 - log10(max(value, SMALLEST)) / log10(SMALLEST)
    return "█" * round(BAR * min(max(share, 0.0), 1.0))
