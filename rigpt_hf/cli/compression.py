"""Verbs that make a model smaller: fewer bits for each weight, fewer weights."""

from dataclasses import asdict
from statistics import fmean, stdev
from typing import Annotated, Any

from rich.table import Table

from ..terminal import Console
from .arguments import AnySource, Dtype, Force, GgufFile, Output, Revision, option
from .common import save_model, say, to_dtype


# The documentation of the installed packages.
DEFAULT = "default"
Calibrate = Annotated[
    str,
    option(
        "Text to calibrate on: a file, folder or data set, whose end is kept apart to judge on; or default: "
        "documentation of the installed packages."
    ),
]
Tokens = Annotated[int, option("Tokens to calibrate on, at most.")]
Judge = Annotated[int, option("Tokens of other text on which losses are measured.")]


def prune(
    source: AnySource,
    output: Output,
    neurons: Annotated[float, option("Part of the neurons of every layer to leave out, such as 0.2.")] = 0.0,
    heads: Annotated[int, option("Query heads of every layer to leave out, equally many of each group.")] = 0,
    rank: Annotated[int | None, option("Dimensions of each head that stay.", "all")] = None,
    recover: Annotated[
        int, option("Steps in which the smaller model learns the logits of the larger, on the calibration text.")
    ] = 0,
    learning_rate: Annotated[float, option("Of these steps.")] = 1e-4,
    calibrate: Calibrate = DEFAULT,
    tokens: Tokens = 32768,
    judge: Judge = 8192,
    revision: Revision = None,
    gguf_file: GgufFile = None,
    dtype: Dtype = None,
    seed: Annotated[int, option("Of the order of windows in recovery.")] = 0,
    force: Force = False,
):
    """
    Make a smaller model: leave out neurons, heads or dimensions of heads, and fit what stays to what was there.

    The result is an ordinary RiGPT, and exports to stock classes where shapes allow:

        rigpt prune my-rigpt smaller --neurons 0.2

        rigpt prune my-rigpt smaller --neurons 0.2 --recover 500 --calibrate text.txt
    """
    from ..checkpoints.folder import check_output
    from ..checkpoints.opened import open_model
    from ..pruning import Sizes, prune, recovered
    from ..quantization import moments_by_layer

    if recover < 0:
        raise ValueError(f"`recover` must be a number of steps, at least 0, got {recover}.")
    sizes = Sizes(neurons, heads, rank)
    model = open_model(source, revision=revision, gguf_file=gguf_file)
    say(model.notes)
    sizes.check(model.config)
    seen = check_output(output, source, force)
    calibration, judges = texts_for(model.place, calibrate, tokens, judge)
    larger = model.load()
    losses = Losses(judges)
    losses.add("before", larger)
    smaller = prune(larger, moments_by_layer(larger, calibration, progress=True), sizes, progress=True)
    losses.add("pruned", smaller)
    if recover:
        smaller = recovered(
            smaller, larger, calibration, recover, learning_rate=learning_rate, seed=seed, progress=True
        )
        losses.add(f"recovered, {recover} steps", smaller)
    losses.print()
    smaller = smaller.to(to_dtype(dtype) or model.stored_dtype)
    facts = {"source": source, "calibrate": calibrate, "recover": recover} | asdict(sizes) | {"loss": losses.to_dict()}
    save_model(smaller, model.place, output, seen, {"prune.json": facts})
    Console().print(f"Written to {output}", markup=False)


def texts_for(source: Any, calibrate: str, tokens: int, judge: int) -> tuple[Any, dict[str, Any]]:
    """Windows `[N, S]` to calibrate on, and windows of other text that judge, by the names of the texts."""
    from ..checkpoints.logits import longest_of
    from ..quantization.calibration import CONTEXT, calibration_tokens, held_out_tokens
    from ..text.sources import DOCUMENTATION

    context = min(CONTEXT, longest_of(source.config))
    for name, value in (("tokens", tokens), ("judge", judge)):
        if value < 2 * context:
            raise ValueError(f"`{name}` must be at least two windows of {context} tokens, got {value}.")
    tokenizer = source.tokenizer()
    text = DOCUMENTATION if calibrate == DEFAULT else calibrate
    calibration = calibration_tokens(tokenizer, text, tokens=tokens, context=context)
    judges = {"documentation": held_out_tokens(tokenizer, tokens=judge, context=context)}
    if calibrate != DEFAULT:
        end = max(1, min(judge // context, len(calibration) // 5))
        if end == len(calibration):
            raise ValueError(
                f"`calibrate` must hold at least two windows of {context} tokens, the last to judge on, got one in "
                f"{calibrate!r}. Give a longer text."
            )
        calibration, judges[f"end of {calibrate}"] = calibration[:-end], calibration[-end:]
    return calibration, judges


class Losses:
    """Losses of models on windows `[N, S]` of texts that nothing was fitted on."""

    def __init__(self, texts: dict[str, Any]):
        self.texts = texts
        self.values: dict[str, dict[str, list[float]]] = {}

    def add(self, name: str, model: Any) -> None:
        """Measure one more model."""
        from ..quantization.calibration import window_losses

        self.values[name] = {text: window_losses(model, windows) for text, windows in self.texts.items()}

    def print(self) -> None:
        """A table of all, with paired intervals beside the first."""
        table = Table("model", *self.texts, title="Nats per token, on text that nothing was fitted on")
        first = next(iter(self.values.values()))
        for name, values in self.values.items():
            table.add_row(name, *(_cell(values[text], first[text], values is first) for text in self.texts))
        Console().print(table)

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Mean losses, by model and text."""
        return {name: {text: fmean(losses) for text, losses in values.items()} for name, values in self.values.items()}


def _cell(values: list[float], before: list[float], alone: bool) -> str:
    """The mean of some losses, and how much more than before it is, with twice the standard error."""
    if alone or len(values) < 2:
        return f"{fmean(values):.4f}"
    differences = [after - one for after, one in zip(values, before, strict=True)]
    error = stdev(differences) / len(differences) ** 0.5
    return f"{fmean(values):.4f} ({fmean(differences):+.4f} ± {2 * error:.4f})"
