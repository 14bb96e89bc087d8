"""A frame per layer, seen: coordinates that jump, logits that do not, and a connection without curvature."""

import math

import torch
from matplotlib.figure import Figure

from .. import RiGPTConfig, RiGPTForCausalLM
from ..symmetry import connection, curvature, haar, holonomy, so_exp, so_log, to_local_frames


# Okabe and Ito's colours, told apart by people who see few.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
LAYERS, SIZE, SHOWN = 8, 48, 24


def small_model(seed: int) -> RiGPTForCausalLM:
    """A model in float64 whose layers write as much as they find."""
    generator = torch.Generator().manual_seed(seed)
    config = RiGPTConfig(
        vocab_size=61,
        hidden_size=SIZE,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    model = RiGPTForCausalLM(config).to(torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def curve(times: torch.Tensor, generators: torch.Tensor) -> torch.Tensor:
    """`Q(t) = exp(sin(t) A) exp(t² B / 4)`, `[T, d, d]`, for two skew matrices `[2, d, d]`."""
    first, second = generators
    return so_exp(times.sin()[:, None, None] * first) @ so_exp(times.square()[:, None, None] / 4 * second)


def velocity(time: torch.Tensor, generators: torch.Tensor) -> torch.Tensor:
    """`∂_t Q Qᵀ` of [`curve`] at one time, `[d, d]`."""
    first, second = generators
    turn = so_exp(time.sin() * first)
    return time.cos() * first + time / 2 * turn @ second @ turn.mT


def connection_errors(steps: list[float], seed: int = 0, size: int = 6) -> list[float]:
    """How far `log(Q(t + h) Q(t)ᵀ) / h` is from `∂_t Q Qᵀ` halfway, relative, for each step `h`."""
    generator = torch.Generator().manual_seed(seed)
    skew = torch.randn(2, size, size, generator=generator, dtype=torch.float64)
    generators = (skew - skew.mT) / size
    time = torch.tensor(0.7, dtype=torch.float64)
    exact = velocity(time, generators)
    errors = []
    for step in steps:
        before, after = curve(torch.stack([time - step / 2, time + step / 2]), generators)
        errors.append(float((so_log(after @ before.mT) / step - exact).norm() / exact.norm()))
    return errors


@torch.no_grad()
def plot_local_frames(seed: int = 0) -> Figure:
    """Coordinates of one token's stream in both kinds of frames, and what the connection between them is."""
    model, generator = small_model(seed), torch.Generator().manual_seed(seed + 1)
    turns = torch.stack([haar(SIZE, generator, special=True) for _ in range(LAYERS)])
    local = to_local_frames(model, turns)
    ids = torch.randint(3, 61, (1, 12), generator=generator)
    plain, moved = (each(ids, output_hidden_states=True, use_cache=False) for each in (model, local))
    broken = to_local_frames(model, turns)
    broken.model.layers[LAYERS // 2].transport.weight.copy_(torch.eye(SIZE))
    scale = plain.logits.abs().max()
    differences = {
        "local frames": (moved.logits - plain.logits).abs().max() / scale,
        "one transport\nleft out": (broken(ids, use_cache=False).logits - plain.logits).abs().max() / scale,
    }
    transports = connection(local)
    everywhere = transports[:, None].expand(-1, 12, -1, -1)
    skew = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    bent = everywhere.clone()
    bent[LAYERS // 2, 6] = so_exp(0.02 * (skew - skew.T)) @ bent[LAYERS // 2, 6]
    differences |= {
        "curvature": torch.tensor(curvature(everywhere)),
        "holonomy": torch.tensor(holonomy(local)),
        "curvature, one\ntransport by\nposition": torch.tensor(curvature(bent)),
    }

    figure = Figure(figsize=(15, 4.4), layout="constrained")
    figure.suptitle("One frame per layer: every coordinate of the stream is another, and the function is the same")
    left, middle, bars, slope = figure.subplots(1, 4, width_ratios=[1, 1, 1.4, 1.1])
    titles = {"one frame for all layers": plain, "a frame per layer": moved}
    for panel, (title, output) in zip((left, middle), titles.items(), strict=True):
        stream = torch.stack([state[0, -1, :SHOWN] for state in output.hidden_states[:-1]])
        bound = float(stream.abs().max())
        image = panel.imshow(stream.T, aspect="auto", cmap="RdBu", vmin=-bound, vmax=bound)
        panel.set(title=title, xlabel="behind layer", ylabel=f"coordinate (first {SHOWN} of {SIZE})")
    figure.colorbar(image, ax=[left, middle], label="stream of the last token", shrink=0.8)

    floor = 1e-17
    values = [max(float(value), floor) for value in differences.values()]
    colours = [ORANGE if "\n" in name else BLUE for name in differences]
    bars.barh(list(differences), values, color=colours, left=floor)
    bars.set(xscale="log", xlim=(floor, 10), xlabel="largest difference (logits relative)", title="what is left")
    bars.invert_yaxis()
    for row, value in enumerate(values):
        bars.annotate(f"{value:.0e}", (value, row), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)

    steps = [2.0**-k for k in range(1, 8)]
    errors = connection_errors(steps, seed)
    slope.loglog(steps, errors, "o-", color=GREEN, label="measured")
    slope.loglog(steps, [errors[0] * (h / steps[0]) ** 2 for h in steps], "--", color="0.5", label="slope 2")
    order = math.log(errors[0] / errors[-1]) / math.log(steps[0] / steps[-1])
    slope.set(
        xlabel="step of depth h",
        ylabel="relative error",
        title=f"transport → exp(h ∂Q Qᵀ): order {order:.2f}",
    )
    slope.legend(frameon=False)
    for panel in (bars, slope):
        panel.spines[["top", "right"]].set_visible(False)
    return figure
