"""A RiGPT and a stock model while the hidden space of both turns by the same random rotation."""

import json
import os
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr

from rigpt_hf.pictures.rotation import draw_layer, draw_layers, draw_probabilities, likeliest
from rigpt_hf.publishing.rotation_view import MAX_SEED, Pair, RotationView, View, load_subjects
from rigpt_hf.text.markup import literal


SETTINGS = json.loads(Path(__file__).with_name("settings.json").read_text(encoding="utf-8"))
# Another model than the one of the settings, such as a folder on the machine where one tries this.
LOCAL = os.environ.get("RIGPT_SPACE_MODEL") or None
BASELINE = os.environ.get("RIGPT_SPACE_BASELINE") or (None if LOCAL else SETTINGS["baseline"])
MODEL, REVISION = (LOCAL, None) if LOCAL else (SETTINGS["model"], SETTINGS["revision"])

subjects = load_subjects(MODEL, revision=REVISION, baseline=BASELINE)
views = RotationView(subjects)

INTRODUCTION = f"""# {literal(SETTINGS["title"])}

Every matrix of both models that writes into the hidden space is turned by **one random rotation**, and every matrix
that reads it is turned back. RiGPT prefers no basis, so its distribution over the next token **stands still**. The
norms of {subjects.stock_name} act on single coordinates, cannot turn along, and its distribution **falls apart**.
"""
# The angle stays in sight above the pictures, which keep a readable size on a narrow page and scroll in their frames.
CSS = """
.gradio-container { overflow: clip !important; }
.form:has(> #angle) { position: sticky; top: 0; z-index: 20; }
.readout { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; }
.readout > div { border: 1px solid var(--border-color-primary); border-left: 6px solid; border-radius: 8px;
  padding: 10px 16px; }
.readout .rigpt { border-left-color: #0072B2; }
.readout .stock { border-left-color: #D55E00; }
.readout strong { font-size: 1.7em; font-variant-numeric: tabular-nums; }
.readout small { font-size: 0.95em; opacity: 0.8; }
@media (max-width: 640px) {
  .readout { grid-template-columns: 1fr; }
  .matplotlib { align-items: flex-start !important; overflow-x: auto; }
  .matplotlib img { width: 640px; max-width: none !important; }
}
"""


def readable(function):
    """Show an error about the input as a message on the page."""

    @wraps(function)
    def wrapped(*inputs):
        try:
            return function(*inputs)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return wrapped


def card(pair: Pair, kind: str) -> str:
    """How far one model's distribution has moved, and what it finds likeliest, as HTML."""
    before, now = (likeliest(state.probabilities)[0].item() for state in (pair.before, pair.now))
    was, is_now = (literal(repr(subjects.tokenizer.decode([token]))) for token in (before, now))
    shares = (pair.before.probabilities[before].item(), pair.now.probabilities[now].item())
    return (
        f'<div class="{kind}">{literal(pair.name)}<br>'
        f'<strong id="{kind}-distance">{pair.distance:.6f}</strong> total variation distance<br>'
        f"<small>likeliest: <code>{was}</code> {shares[0]:.0%} before, "
        f"<code>{is_now}</code> {shares[1]:.0%} now</small></div>"
    )


def readout(view: View) -> str:
    """Both models beside each other."""
    return f'<div class="readout">{card(view.rigpt, "rigpt")}{card(view.stock, "stock")}</div>'


def turned_by(view: View) -> str:
    """The angle in words."""
    return (
        f"Turned by up to **{view.angle:.1f}°** of {view.largest_angle:.1f}° "
        f"(the plane that turns furthest, of {subjects.rigpt.config.hidden_size // 2})"
    )


@readable
def show(prompt: str, t: float, seed: int, layer: float):
    """Everything that depends on the angle, in the order of the outputs."""
    view = views.at(prompt, t, seed)
    return (
        turned_by(view),
        readout(view),
        draw_probabilities(view, subjects.tokenizer),
        draw_layer(view, int(layer)),
        draw_layers(view),
    )


@readable
def show_layer(prompt: str, t: float, seed: int, layer: float):
    """The pictures of another layer."""
    return draw_layer(views.at(prompt, t, seed), int(layer))


with gr.Blocks(title=SETTINGS["title"], analytics_enabled=False) as demo:
    gr.Markdown(INTRODUCTION)
    with gr.Row(equal_height=True):
        prompt = gr.Textbox(
            SETTINGS["prompt"],
            label="Prompt",
            scale=4,
            min_width=280,  # on a narrow screen the seed goes below it
            max_lines=1,
            submit_btn=True,
            elem_id="prompt",
        )
        seed = gr.Number(
            0, label="Seed of the rotation", precision=0, minimum=0, maximum=MAX_SEED, scale=1, min_width=140
        )
    t = gr.Slider(0, 1, 0, step=0.01, label="Angle: from no rotation (0) to the whole random one (1)", elem_id="angle")
    degrees = gr.Markdown()
    distances = gr.HTML(padding=False)
    probabilities = gr.Plot(show_label=False, elem_id="probabilities")
    with gr.Accordion("Inside: the hidden states turn in both models"):
        gr.Markdown(
            "One row per token. In both models the coordinates change as they turn. In RiGPT that is all that "
            f"happens; in {subjects.stock_name} the layers compute something else."
        )
        layer = gr.Slider(
            0, views.layers, views.layers // 2, step=1, label="Layer (0: the embeddings)", elem_id="layer"
        )
        pictures = gr.Plot(show_label=False, elem_id="pictures")
        by_layer = gr.Plot(show_label=False, elem_id="by-layer")
    # The text is true of the models of the settings alone.
    if tuple(SETTINGS[name] for name in ("model", "revision", "baseline")) == (MODEL, REVISION, BASELINE):
        gr.Markdown(SETTINGS["sources"])

    inputs, outputs = [prompt, t, seed, layer], [degrees, distances, probabilities, pictures, by_layer]
    # While one drags, the angle that was reached last is shown next, and those passed meanwhile are not.
    drawing: dict[str, Any] = {
        "trigger_mode": "always_last",
        "show_progress": "minimal",
        "show_progress_on": [degrees],
        "concurrency_id": "models",
    }
    gr.on([demo.load, t.change, seed.change, prompt.submit], show, inputs, outputs, **drawing)
    layer.change(show_layer, inputs, pictures, **drawing)

if __name__ == "__main__":
    # Fonts of the reader's system: the page asks nothing of other hosts.
    theme = gr.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    demo.launch(theme=theme, css=CSS, ssr_mode=False, footer_links=["gradio"])
