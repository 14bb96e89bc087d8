"""Verbs that make a model smaller: fewer bits for each weight, fewer weights."""

from dataclasses import asdict
from typing import Annotated, Any

from rich.table import Table

from ..terminal import Console
from .arguments import AnySource, Dtype, Force, GgufFile, Output, Revision, option
from .common import save_model, say, to_dtype


DEFAULT = "default"
Calibrate = Annotated[
    str,
    option(
        "Text to calibrate on, a file whose end is kept apart to judge on; or default: documentation of the "
        "installed packages."
    ),
]
Windows = Annotated[int, option("Windows of 512 tokens to calibrate on.")]
Judges = Annotated[int, option("Windows of 512 tokens, of other text, on which the loss is measured.")]


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
    windows: Windows = 64,
    judges: Judges = 8,
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
    from ..quantization.text import calibration_text

    if recover < 0 or windows < 1 or judges < 1:
        raise ValueError(
            f"`recover` must be at least 0, `windows` and `judges` at least 1, got {recover}, {windows} and {judges}."
        )
    sizes = Sizes(neurons, heads, rank)
    model = open_model(source, revision=revision, gguf_file=gguf_file)
    say(model.notes)
    sizes.check(model.config)
    seen = check_output(output, source, force)
    calibration, judging = calibration_text(model.place, calibrate, windows, judges)
    larger = model.load()
    losses = Losses(judging)
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
    facts = {"source": source, "calibrate": calibrate, "recover": recover} | asdict(sizes) | {"loss": losses.values}
    save_model(smaller, model.place, output, seen, {"prune.json": facts})
    Console().print(f"Written to {output}", markup=False)


class Losses:
    """Losses of models on windows `[N, S]` that nothing was fitted on; each is said when it is known."""

    def __init__(self, windows: Any):
        self.windows = windows
        self.values: dict[str, float] = {}
        self.parameters: dict[str, int] = {}

    def add(self, name: str, model: Any) -> None:
        """Measure one more."""
        import torch
        from tqdm.auto import tqdm

        values = []
        with torch.no_grad():
            for row in tqdm(self.windows.split(1), desc=f"Loss, {name}", unit="window"):
                values.append(float(model(input_ids=row, labels=row, use_cache=False).loss))
        self.values[name] = sum(values) / len(values)
        self.parameters[name] = sum(parameter.numel() for parameter in model.parameters())

    def print(self) -> None:
        """A table of all."""
        first = next(iter(self.values.values()))
        title = f"Loss on {self.windows.numel():,} tokens of other text"
        table = Table("model", "parameters", "nats per token", "lost", title=title)
        for name, value in self.values.items():
            table.add_row(name, f"{self.parameters[name]:,}", f"{value:.4f}", f"{value - first:+.4f}")
        Console().print(table)
