"""The demo's report: one page of Markdown and one figure."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..conversion import Certificate
from ..pictures import save
from ..pictures.rotation import draw_demo
from ..text.markup import literal
from .rotation import Effect, Sweep


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
    save(draw_demo(findings), folder / "rotation.png")
    page = folder / "report.md"
    page.write_text(markdown(findings), encoding="utf-8")
    return page


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
| RiGPT, before | {literal(effect.sampled[0])} |
| RiGPT, after | {literal(effect.sampled[1])} |
| stock GPT-2, before | {literal(findings.stock_text[0])} |
| stock GPT-2, after | {literal(findings.stock_text[1])} |
| RiGPT, greedy, before | {literal(effect.greedy[0])} |
| RiGPT, greedy, after | {literal(effect.greedy[1])} |

## Saved and loaded back

`AutoModelForCausalLM.from_pretrained("model")` after `import rigpt_hf`: largest logit difference
{findings.loaded_back:.1e}. In a fresh process with `trust_remote_code=True`, from the code in the folder:
{findings.loaded_as_remote_code:.1e}. {round_trip}

Time: {times}.
"""


def origin(findings: Findings) -> str:
    """Where the stock model comes from."""
    source = f"The source is {literal(findings.source)} with {findings.parameters / 1e6:.1f} M parameters"
    if not findings.curve:
        return f"{source}."
    (_, first), (steps, last) = findings.curve[0], findings.curve[-1]
    return (
        f"{source}, trained here on {literal(findings.corpus)}; in {steps} steps its loss fell from {first:.2f} to "
        f"{last:.2f} nats per token. The gains of its norms started spread out (log-normal) rather than all at 1: "
        "long training spreads them, minutes would not. With `--model`, nothing is set by hand."
    )
