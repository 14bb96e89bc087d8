"""The demo's report: one page of Markdown and one figure."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from ..conversion import Certificate
from .rotation import Effect, Sweep


matplotlib.use("Agg")

INVARIANT, STOCK = "#1b6ca8", "#c8553d"
SHOWN_TOKENS = 8


@dataclass
class Findings:
    """Everything the report says, as it was measured."""

    source: str
    parameters: int
    seconds: dict[str, float]
    prompt: str
    certificates: list[Certificate]
    effect: Effect
    sweep: Sweep
    stock_loss: tuple[float, float]
    stock_text: tuple[str, str]
    round_trip: Certificate | None
    loaded_back: float
    loaded_as_remote_code: float
    probabilities: dict[str, Any]
    tokens: list[str]
    seed: int
    curve: list[tuple[int, float]] = field(default_factory=list)
    corpus: str = ""


def write_report(findings: Findings, folder: Path) -> Path:
    """Write `report.md` and `rotation.png` into a folder; returns the path of the page."""
    draw(findings).savefig(folder / "rotation.png", dpi=120)
    page = folder / "report.md"
    page.write_text(markdown(findings), encoding="utf-8")
    return page


def draw(findings: Findings) -> Figure:
    """Training curve (where there was one), the walk along the rotation, and next-token probabilities."""
    columns = 4 if findings.curve else 3
    figure = Figure(figsize=(4.6 * columns, 4.4), layout="constrained")
    panels = list(figure.subplots(1, columns))
    if findings.curve:
        panel = panels.pop(0)
        panel.plot(*zip(*findings.curve, strict=True), color=STOCK)
        panel.set(title="Stock GPT-2 learns", xlabel="step", ylabel="loss (nats per token)")
    walk, *bars = panels
    draw_walk(walk, findings.sweep)
    for panel, name, color in zip(bars, ("RiGPT", "stock GPT-2"), (INVARIANT, STOCK), strict=True):
        draw_probabilities(panel, findings, name, color)
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def draw_walk(panel: Any, sweep: Sweep):
    """Loss of both models on the way from the identity to the rotation."""
    panel.plot(sweep.t, sweep.stock_loss, "o-", color=STOCK, label="stock GPT-2")
    panel.plot(sweep.t, sweep.rigpt_loss, "o-", color=INVARIANT, label="RiGPT")
    panel.set(title="The hidden space turns", xlabel="share of the rotation", ylabel="loss (nats per token)")
    error = f"RiGPT (largest logit error {max(sweep.rigpt_error):.0e})"
    panel.lines[1].set_label(error)
    panel.legend(frameon=False, loc="upper left")
    lowest, highest = panel.get_ylim()
    panel.set_ylim(lowest, highest + 0.25 * (highest - lowest))  # room for the legend


def draw_probabilities(panel: Any, findings: Findings, name: str, color: str):
    """The most likely next tokens before the rotation, and the same tokens after it."""
    before, after = findings.probabilities[name]
    rows = range(len(findings.tokens))
    panel.barh([row - 0.2 for row in rows], before, height=0.38, color=color, label="before")
    panel.barh([row + 0.2 for row in rows], after, height=0.38, color=color, alpha=0.4, label="after the rotation")
    panel.set_yticks(list(rows), findings.tokens)
    panel.invert_yaxis()
    panel.set(title=f"{name}: the next token", xlabel="probability")
    panel.legend(frameon=False, loc="lower right")


def quoted(text: str) -> str:
    """A Markdown block quote."""
    return "\n".join(f"> {line}" if line else ">" for line in text.splitlines())


def same(pair: tuple[str, str]) -> str:
    """Whether two texts are the same, in a word."""
    return "identical" if pair[0] == pair[1] else "different"


def markdown(findings: Findings) -> str:
    """The page."""
    effect, certificates = findings.effect, findings.certificates
    certified = "\n".join(
        f"| {c.dtype} | {c.max_abs_logit_error:.2e} | {c.relative_logit_error:.2e} | {c.tolerance:.0e} "
        f"| {c.loss_difference:+.2e} | {'passed' if c.passed else 'FAILED'} |"
        for c in certificates
    )
    trip = findings.round_trip
    round_trip = (
        f"Exported back from the rotated frame to an unmodified `GPT2LMHeadModel`: relative logit error "
        f"{trip.relative_logit_error:.2e} to the original."
        if trip
        else "The source is not a GPT-2, so there is no way back to one to show."
    )
    corpus = f" It was trained here on {findings.corpus}." if findings.corpus else ""
    times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in findings.seconds.items())
    return f"""# A GPT-2 with no preferred basis

The source is {findings.source} with {findings.parameters / 1e6:.1f} M parameters.{corpus} It was converted into a
RiGPT, and then the whole hidden space was turned by a random rotation, uniform over all rotations (seed
{findings.seed}).

![What the rotation does](rotation.png)

## Converted: the same function

| dtype | max \\|Δlogit\\| | relative | tolerance | Δloss | |
|---|---|---|---|---|---|
{certified}

## Rotated: everything inside changes, nothing outside does

| RiGPT | measured |
|---|---|
| weights, relative change | {effect.weights:.2f} |
| hidden states, relative change | {effect.hidden_states:.2f} |
| hidden states against the turned old ones, relative | {effect.equivariance:.1e} |
| logits, relative change | {effect.logits:.1e} |
| loss (nats per token) | {effect.loss_before:.6f} → {effect.loss_after:.6f} |
| greedy text | {same(effect.greedy)} |
| sampled text, same seed | {same(effect.sampled)} |

The same rotation applied to the stock model, whose norms act on single coordinates and cannot follow: loss
{findings.stock_loss[0]:.2f} → {findings.stock_loss[1]:.2f}.

RiGPT, before and after:

{quoted(effect.greedy[1])}

Stock GPT-2 before:

{quoted(findings.stock_text[0])}

Stock GPT-2 after:

{quoted(findings.stock_text[1])}

## Saved and loaded back

`AutoModelForCausalLM.from_pretrained("model")` after `import rigpt_hf`: largest logit difference
{findings.loaded_back:.1e}. In a fresh process with `trust_remote_code=True`, from the code in the folder:
{findings.loaded_as_remote_code:.1e}. {round_trip}

Time: {times}.
"""
