"""The picture of gauge fixing: descents of the norm along one orbit, and the charges and norm of trained models."""

import torch
from matplotlib.figure import Figure

from ..configuration_rigpt import RiGPTConfig
from ..modeling_rigpt import RiGPTForCausalLM
from ..symmetry.action import GaugeTransformation
from .gauge_fixing import DecayRecord, MinimumNorm, follow_decay, minimum_norm


# Okabe and Ito's palette, which people with any kind of colour vision can tell apart.
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"
KINDS = {"head_qk": ("o", "q, k"), "head_vo": ("s", "v, o"), "lexical": ("^", "tokens"), "neurons": ("D", "neurons")}
VOCABULARY, LENGTH = 12, 16
# Members of one orbit from which the norm descends.
MEMBERS = 4
LEARNING_RATE, WEIGHT_DECAY = 0.025, 0.05
ADAM_LEARNING_RATE, ADAM_WEIGHT_DECAY = 0.005, 0.25


def toy_model(seed: int = 0) -> RiGPTForCausalLM:
    """A RiGPT of one layer in float64 with every kind of stretch and no translation, far from balanced."""
    config = RiGPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        embedding_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        max_position_embeddings=LENGTH,
        hidden_act="relu2",
        position_embedding_type="learned",
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    generator = torch.Generator().manual_seed(seed)
    model = RiGPTForCausalLM(config).to(torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return GaugeTransformation.random(config, generator, "all").apply_(model)


def toy_text(sequences: int = 16, seed: int = 0) -> torch.Tensor:
    """Tokens `[sequences, LENGTH]` of a random chain in which every token has few likely successors."""
    generator = torch.Generator().manual_seed(seed)
    successors = torch.softmax(3 * torch.randn(VOCABULARY, VOCABULARY, generator=generator), dim=-1)
    text = torch.randint(VOCABULARY, (sequences, LENGTH), generator=generator)
    for position in range(1, LENGTH):
        text[:, position] = torch.multinomial(successors[text[:, position - 1]], 1, generator=generator)[:, 0]
    return text


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
    every = max(1, steps // 20)
    trainings = {
        "SGD, λ > 0": follow_decay(model, [text], LEARNING_RATE, WEIGHT_DECAY, steps, every)[1],
        "SGD, λ = 0": follow_decay(model, [text], LEARNING_RATE, 0.0, steps, every)[1],
        "AdamW, λ > 0": follow_decay(
            model, [text], ADAM_LEARNING_RATE, ADAM_WEIGHT_DECAY, steps, every, optimizer=torch.optim.AdamW
        )[1],
    }
    figure = Figure(figsize=(14.5, 4.8), layout="constrained")
    orbit, charge, norm = figure.subplots(1, 3)
    _draw_orbit(orbit, descents)
    _draw_charges(charge, trainings)
    _draw_norms(norm, trainings)
    return figure


def _draw_orbit(panel, descents: list[MinimumNorm]) -> None:
    for index, descent in enumerate(descents):
        label = "members of one orbit" if index == 0 else None
        panel.plot(descent.times, descent.norms, color=(BLUE, SKY, GREEN, PURPLE)[index], lw=2, alpha=0.9, label=label)
        panel.plot(descent.times[:1], descent.norms[:1], "o", color=(BLUE, SKY, GREEN, PURPLE)[index])
    least = descents[0].canonical_norm
    panel.axhline(least, color="black", ls="--", lw=1.2, label=f"canonical form: |θ| = {least:.3f}")
    panel.set(
        title="One function, many weights:\nthe norm falls to that of the balanced form",
        xlabel="time of weight decay along the orbit, λt",
        ylabel="norm of all weights |θ|",
        xlim=(-0.05, 3),
    )
    panel.legend(frameon=False)


def _draw_charges(panel, trainings: dict[str, DecayRecord]) -> None:
    for (name, record), colour in zip(trainings.items(), (BLUE, GREEN, ORANGE), strict=True):
        for kind, (marker, label) in KINDS.items():
            panel.semilogy(
                _decay_times(record),
                record.charges[kind],
                marker + "-",
                color=colour,
                ms=4.5,
                lw=0.7,
                mfc="none",
                label=f"{name}: {label}" if colour == BLUE else (name if kind == "head_qk" else None),
            )
    record = trainings["SGD, λ > 0"]
    panel.annotate(
        "floor: step η",
        (_decay_times(record)[-1], record.charges["head_vo"][-1]),
        xytext=(4, 9),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=BLUE,
    )
    panel.semilogy(_decay_times(record), record.predicted["head_qk"], "--", color="black", lw=1.5, label="exp(-2λt)")
    panel.set(
        title="Charges of models in training:\nweight decay forgets them at the rate 2λ",
        xlabel="time of training, λt  (λ of the first for λ = 0)",
        ylabel="|Q(t)| / |Q(0)|",
    )
    panel.legend(frameon=False, fontsize=8)


def _draw_norms(panel, trainings: dict[str, DecayRecord]) -> None:
    for (name, record), colour in zip(trainings.items(), (BLUE, GREEN, ORANGE), strict=True):
        panel.plot(_decay_times(record), record.norms, "-", color=colour, lw=2, label=f"{name}: trained")
        panel.plot(
            _decay_times(record), record.balanced_norms, ":", color=colour, lw=2, label=f"{name}: balanced form"
        )
        panel.fill_between(_decay_times(record), record.balanced_norms, record.norms, color=colour, alpha=0.12, lw=0)
    panel.set(
        title="Trained weights beside their balanced form:\nweight decay under SGD closes the gap",
        xlabel="time of training, λt",
        ylabel="norm of all weights |θ|",
        ylim=(0, None),
    )
    panel.legend(frameon=False, fontsize=8)


def _decay_times(record: DecayRecord) -> list[float]:
    """`λt`; without decay that of the SGD training it is compared with."""
    rate = record.weight_decay or WEIGHT_DECAY
    return [rate * time for time in record.times]
