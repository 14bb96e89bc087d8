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
SHOWN_POSITIONS, SHOWN_DIMENSIONS = 24, 48
SHARE = "share of the rotation"
ROUNDING = 2.0**-24  # half a unit in the last place of a float32 near 1


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
    stock_logits: float
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
    """Left: inside, everything turned. Middle: what comes out. Right: all the way from no rotation to the full one."""
    figure = Figure(figsize=(13.5, 7.2), layout="constrained")
    (inside_before, rigpt, losses), (inside_after, stock, errors) = figure.subplots(2, 3)
    draw_hidden_states(inside_before, inside_after, findings.effect.pictures)
    for panel, name, color in ((rigpt, "RiGPT", INVARIANT), (stock, "stock GPT-2", STOCK)):
        draw_probabilities(panel, findings, name, color)
    draw_losses(losses, findings.sweep)
    draw_errors(errors, findings.sweep)
    for panel in (rigpt, stock, losses, errors):
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def draw_hidden_states(before_panel: Any, after_panel: Any, pictures: tuple[Any, Any]):
    """The same hidden states before and after, as pictures on one scale."""
    before, after = (picture[:SHOWN_POSITIONS, :SHOWN_DIMENSIONS] for picture in pictures)
    # A few large coordinates would leave the rest of the picture white.
    scale = max(picture.abs().flatten().quantile(0.97).item() for picture in (before, after))
    for panel, picture, when in ((before_panel, before, "before"), (after_panel, after, "after the rotation")):
        panel.imshow(picture.numpy(), cmap="RdBu", vmin=-scale, vmax=scale, aspect="auto", interpolation="nearest")
        panel.set(title=f"RiGPT inside, {when}", xlabel=f"first {before.shape[1]} dimensions", ylabel="token")


def draw_losses(panel: Any, sweep: Sweep):
    """Loss of both models on the way from the identity to the rotation."""
    panel.plot(sweep.t, sweep.stock_loss, "o-", color=STOCK, label="stock GPT-2")
    panel.plot(sweep.t, sweep.rigpt_loss, "o-", color=INVARIANT, label="RiGPT")
    panel.set(title="Loss while the hidden space turns", xlabel=SHARE, ylabel="nats per token")
    panel.legend(frameon=False)


def draw_errors(panel: Any, sweep: Sweep):
    """Change of the logits on the same way; the start, where it is 0, has no place on a logarithmic axis."""
    panel.semilogy(sweep.t[1:], sweep.stock_error[1:], "o-", color=STOCK, label="stock GPT-2")
    panel.semilogy(sweep.t[1:], sweep.rigpt_error[1:], "o-", color=INVARIANT, label="RiGPT")
    panel.axhline(ROUNDING, color="0.6", linestyle=":", label="rounding of float32")
    panel.set(title="Change of the logits", xlabel=SHARE, ylabel="largest change / largest logit")
    panel.set_xlim(-0.05, 1.05)
    panel.legend(frameon=False, loc="center right")


def draw_probabilities(panel: Any, findings: Findings, name: str, color: str):
    """The most likely next tokens before the rotation, and the same tokens after it."""
    before, after = findings.probabilities[name]
    rows = range(len(findings.tokens))
    panel.barh([row - 0.2 for row in rows], before, height=0.38, color=color, label="before")
    panel.barh([row + 0.2 for row in rows], after, height=0.38, color=color, alpha=0.4, label="after the rotation")
    panel.set_yticks(list(rows), findings.tokens)
    panel.invert_yaxis()
    panel.set(title=f"{name}: after \u201c{findings.prompt}\u201d", xlabel="probability of the next token")
    panel.legend(frameon=False, loc="lower right")


def cell(text: str) -> str:
    """Text as code in a cell of a Markdown table."""
    return "`" + " ".join(text.split()).replace("`", "'").replace("|", "\\|") + "`"


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
    times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in findings.seconds.items())
    return f"""# A GPT-2 with no preferred basis

{origin(findings)}

It was converted into a RiGPT, and then the whole hidden space was turned by a random rotation, uniform over all
rotations (seed {findings.seed}).

![What the rotation does](rotation.png)

## Converted: the same function

| dtype | max \\|Δlogit\\| | relative | tolerance | Δloss | |
|---|---|---|---|---|---|
{certified}

## Rotated: everything inside changes, nothing outside does

| | RiGPT | stock GPT-2 |
|---|---|---|
| weights, relative change | {effect.weights:.2f} | |
| hidden states, relative change | {effect.hidden_states:.2f} | |
| hidden states against the turned old ones | {effect.equivariance:.1e} | |
| **logits, relative change** | **{effect.logits:.1e}** | **{findings.stock_logits:.1e}** |
| loss (nats per token) | {effect.loss_before:.4f} → {effect.loss_after:.4f} | \
{findings.stock_loss[0]:.4f} → {findings.stock_loss[1]:.4f} |
| greedy text | {same(effect.greedy)} | |
| sampled text, same seed | {same(effect.sampled)} | {same(findings.stock_text)} |

The stock model got the same rotation in every matrix that reads or writes the hidden space. Only its norms could not
follow: they act on single coordinates.

| sampled with one seed | |
|---|---|
| RiGPT, before | {cell(effect.sampled[0])} |
| RiGPT, after | {cell(effect.sampled[1])} |
| stock GPT-2, before | {cell(findings.stock_text[0])} |
| stock GPT-2, after | {cell(findings.stock_text[1])} |
| RiGPT, greedy, before | {cell(effect.greedy[0])} |
| RiGPT, greedy, after | {cell(effect.greedy[1])} |

## Saved and loaded back

`AutoModelForCausalLM.from_pretrained("model")` after `import rigpt_hf`: largest logit difference
{findings.loaded_back:.1e}. In a fresh process with `trust_remote_code=True`, from the code in the folder:
{findings.loaded_as_remote_code:.1e}. {round_trip}

Time: {times}.
"""


def origin(findings: Findings) -> str:
    """Where the stock model comes from."""
    parameters = f"{findings.parameters / 1e6:.1f} M parameters"
    if not findings.curve:
        return f"The source is {findings.source} with {parameters}."
    (_, first), (steps, last) = findings.curve[0], findings.curve[-1]
    return (
        f"The source is {findings.source} with {parameters}, trained here on {findings.corpus}; in {steps} steps its "
        f"loss fell from {first:.2f} to {last:.2f} nats per token. The gains of its norms started spread out "
        "(log-normal) rather than all at 1: long training spreads them, minutes would not. With `--model`, nothing is "
        "set by hand."
    )
