"""The picture of gauge fixing: descents of the norm along one orbit, and the charges and norm of trained models."""

from typing import Any

import torch

from ..flow.gauge_fixing import DecayRecord, MinimumNorm, follow_decay, minimum_norm
from ..modeling_rigpt import RiGPTForCausalLM
from ..symmetry.action import GaugeTransformation
from .models import gaussian_model
from .style import BLUE, GREEN, ORANGE, PURPLE, SKY, Figure, figure, picture


KINDS = {"head_qk": ("o", "q, k"), "head_vo": ("s", "v, o"), "lexical": ("^", "tokens"), "neurons": ("D", "neurons")}
VOCABULARY, LENGTH = 12, 16
# Members of one orbit from which the norm descends.
MEMBERS = 4
LEARNING_RATE, WEIGHT_DECAY = 0.025, 0.05
ADAM_LEARNING_RATE, ADAM_WEIGHT_DECAY = 0.005, 0.25


def toy_model(seed: int = 0) -> RiGPTForCausalLM:
    """A RiGPT of one layer in float64 with every kind of stretch and no translation, far from balanced."""
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"hidden_act": "relu2", "position_embedding_type": "learned"}
    options |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "embedding_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 24,
        "max_position_embeddings": LENGTH,
    }
    model = gaussian_model(generator, 0.3, **sizes, **options)
    return GaugeTransformation.random(model.config, generator, "all").apply_(model)


def toy_text(sequences: int = 16, seed: int = 0) -> torch.Tensor:
    """Tokens `[sequences, LENGTH]` of a random chain in which every token has few likely successors."""
    generator = torch.Generator().manual_seed(seed)
    successors = torch.softmax(3 * torch.randn(VOCABULARY, VOCABULARY, generator=generator), dim=-1)
    text = torch.randint(VOCABULARY, (sequences, LENGTH), generator=generator)
    for position in range(1, LENGTH):
        text[:, position] = torch.multinomial(successors[text[:, position - 1]], 1, generator=generator)[:, 0]
    return text


@picture
def plot_gauge_fixing(seed: int = 0, *, steps: int = 2400) -> Figure:
    """
    Three panels: the norm along one orbit under weight decay alone, from several members of the orbit; the charges of
    trained models with weight decay, without, and with AdamW, beside the predicted exponential; and how much longer
    the trained weights are than their balanced form.

    Args:
        seed: Of the model, its disguises and its text.
        steps: Of each training. The decay is so strong that 2400 steps of SGD take `exp(-6)` of the charges.
    """
    model, text = toy_model(seed), toy_text(seed=seed)
    members = [
        GaugeTransformation.random(model.config, torch.Generator().manual_seed(seed + index), "all")(model)
        for index in range(1, MEMBERS + 1)
    ]
    descents = [minimum_norm(member, step=0.1, tolerance=1e-6)[1] for member in members]
    settings: dict[str, tuple[float, float, Any]] = {
        "SGD, λ > 0": (LEARNING_RATE, WEIGHT_DECAY, torch.optim.SGD),
        "SGD, λ = 0": (LEARNING_RATE, 0.0, torch.optim.SGD),
        "AdamW, λ > 0": (ADAM_LEARNING_RATE, ADAM_WEIGHT_DECAY, torch.optim.AdamW),
    }
    every = max(1, steps // 20)
    trainings = {
        name: follow_decay(model, [text], rate, decay, steps, every, optimizer=optimizer)[1]
        for name, (rate, decay, optimizer) in settings.items()
    }
    title = "Of all weights that are one function, weight decay leads to the smallest, wherever it starts"
    made, (orbit, charge, norm) = figure(3, title=title, width=4.6, height=4.2)
    _draw_orbit(orbit, descents)
    _draw_charges(charge, trainings)
    _draw_norms(norm, trainings)
    return made


def _draw_orbit(panel: Any, descents: list[MinimumNorm]) -> None:
    for index, (descent, colour) in enumerate(zip(descents, (BLUE, SKY, GREEN, PURPLE), strict=True)):
        label = "weights of one function" if index == 0 else None
        panel.plot(descent.times, descent.norms, color=colour, lw=2, alpha=0.9, label=label)
        panel.plot(descent.times[:1], descent.norms[:1], "o", color=colour)
    least = descents[0].canonical_norm
    panel.axhline(least, color="black", ls="--", lw=1.2, label=f"smallest: the balanced form, {least:.3f}")
    panel.set(
        title="Many weights of one function shrink,\nby weight decay alone, to one norm",
        xlabel="time of weight decay × its rate λ",
        ylabel="norm of all weights",
        xlim=(-0.05, 3),
    )
    panel.legend()


def _draw_charges(panel: Any, trainings: dict[str, DecayRecord]) -> None:
    for (name, record), colour in zip(trainings.items(), (BLUE, GREEN, ORANGE), strict=True):
        for kind, (marker, words) in KINDS.items():
            label = f"{name}: {words}" if colour == BLUE else (name if kind == "head_qk" else None)
            style = {"marker": marker, "color": colour, "ms": 4.5, "lw": 0.7, "mfc": "none"}
            panel.semilogy(_decay_times(record), record.charges[kind], label=label, **style)
    record = trainings["SGD, λ > 0"]
    end = (_decay_times(record)[-1], record.charges["head_vo"][-1])
    offset: dict[str, Any] = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
    panel.annotate("floor: the\nstep size", end, fontsize=8, color=BLUE, **offset)
    panel.semilogy(
        _decay_times(record), record.predicted["head_qk"], "--", color="black", lw=1.5, label="predicted: exp(-2λt)"
    )
    panel.set(
        title="In training, weight decay forgets\nwhat gradient flow conserves",
        xlabel="time of training × rate λ of weight decay",
        ylabel="size of the charge / size at the start",
        xlim=(-0.1, 3.7),
    )
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def _draw_norms(panel: Any, trainings: dict[str, DecayRecord]) -> None:
    for (name, record), colour in zip(trainings.items(), (BLUE, GREEN, ORANGE), strict=True):
        times = _decay_times(record)
        panel.plot(times, record.norms, "-", color=colour, lw=2, label=f"{name}: trained")
        panel.plot(times, record.balanced_norms, ":", color=colour, lw=2, label=f"{name}: balanced form")
        panel.fill_between(times, record.balanced_norms, record.norms, color=colour, alpha=0.12, lw=0)
    panel.set(
        title="Trained weights come as short as their\nbalanced form, if SGD has weight decay",
        xlabel="time of training × rate λ of weight decay",
        ylabel="norm of all weights",
        ylim=(0, None),
    )
    # Beside the panel, where the row has room; panels keep their widths.
    panel.legend(loc="center left", bbox_to_anchor=(1.05, 0.5)).set_in_layout(False)


def _decay_times(record: DecayRecord) -> list[float]:
    """`λt`; without decay that of the SGD training it is compared with."""
    rate = record.weight_decay or WEIGHT_DECAY
    return [rate * time for time in record.times]
