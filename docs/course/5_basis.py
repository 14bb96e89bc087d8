# %% [markdown]
# # 5. Adam's favourite basis, and four bits
#
# A network without a preferred basis, trained by an optimizer with one, ends up with one. This chapter shows where it
# comes from, how to see it, what it has to do with rounding to four bits, and where that story stops being true.
#
# Letters: $\theta$ weights, $Q$ a rotation of the stream (or what it does to all weights), $g = \nabla L(\theta)$,
# $\kappa$ excess kurtosis.

# %% [markdown]
# ## Which updates turn along
#
# Let $L(Q\theta) = L(\theta)$. By the chain rule $Q^\top \nabla L(Q\theta) = \nabla L(\theta)$, so
# $\nabla L(Q\theta) = Q g$: the gradient turns along. An update $\theta \to \theta - \eta\, u(g)$ is *equivariant* if
# $u(Qg) = Q\, u(g)$; then training from $Q\theta$ is the training from $\theta$, turned, step by step.
#
# - *Gradient descent*, $u(g) = g$, and momentum, a linear combination of gradients: equivariant.
# - *Adam* divides every entry by the root of its own mean square. Its first step is $u(g) = \operatorname{sign}(g)$.
#   In two dimensions that takes four values only: it commutes with signed permutations and nothing else.
# - *The polar factor* of a matrix of gradients, $G = U \Sigma V^\top \to U V^\top = G (G^\top G)^{-1/2}$ (Muon's
#   update). For $G \to Q G R^\top$ it becomes $Q\, U V^\top R^\top$: equivariant on both sides. For one column it is
#   $g / |g|$.
# - *The equivariant optimizer* of this project updates matrices by the polar factor of their momentum (one head at a
#   time), tables whose rows are vectors by Adam with one second moment per row (exercise 2), biases by Adam with one
#   per vector, and what does not turn by Adam.

# %%
import copy
import math

import torch

from rigpt_hf import RiGPTConfig, RiGPTForCausalLM
from rigpt_hf.evaluation.rounding import rounded
from rigpt_hf.lab import COLOURS, chosen_seed, panels, show
from rigpt_hf.lab.text import library_text
from rigpt_hf.optim import EquivariantOptimizer, equivariant_param_groups
from rigpt_hf.symmetry import GaugeTransformation, haar
from rigpt_hf.training.diagnostics import excess_kurtosis


SEED = chosen_seed()
generator = torch.Generator().manual_seed(SEED)


def polar(G: torch.Tensor) -> torch.Tensor:
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return U @ Vh


G = torch.randn(6, 4, generator=generator, dtype=torch.float64)
Q, R = haar(6, generator), haar(4, generator)
turned_along = {
    name: float((u(Q @ G @ R.T) - Q @ u(G) @ R.T).norm() / u(G).norm())
    for name, u in {"gradient": lambda G: G, "Adam": torch.sign, "polar factor": polar}.items()
}
print({name: f"{value:.0e}" for name, value in turned_along.items()})
assert turned_along["gradient"] < 1e-14 and turned_along["polar factor"] < 1e-13 and turned_along["Adam"] > 0.1

# %% [markdown]
# The figure: gradients all around the circle, and the first step that each optimizer makes of them. The library's own
# Adam is asked, not the formula.

# %%
angles = torch.linspace(0, 2 * math.pi, 49)[:-1] + 0.02
directions = torch.stack([angles.cos(), angles.sin()], 1)  # [48, 2]


def first_adam_step(g: torch.Tensor) -> torch.Tensor:
    w = torch.zeros_like(g).requires_grad_()
    w.grad = g.clone()
    torch.optim.Adam([w], lr=1.0).step()
    return -w.detach()


adam_steps = torch.stack([first_adam_step(g) for g in directions])
assert torch.allclose(adam_steps, directions.sign(), atol=1e-5)
figure, axes = panels(2, "The first step for gradients of all directions", width=3.9, sharex=True, sharey=True)
for panel, steps, name in zip(
    axes, (directions, adam_steps), ("descent, polar: any direction", "Adam: four"), strict=True
):
    for g, u, angle in zip(directions, steps, angles / (2 * math.pi), strict=True):
        shade = (0.2 + 0.6 * abs(2 * float(angle) - 1), 0.45, 0.75 - 0.5 * abs(2 * float(angle) - 1))
        panel.plot(*torch.stack([g * 0.45, u]).T, color=shade, lw=0.8)
        panel.plot(*u, "o", color=shade, ms=5)
        panel.plot(*(g * 0.45), ".", color=shade, ms=4)
    panel.set(title=name, aspect="equal", xlabel="first weight")
axes[0].set_ylabel("second weight")
corners = len(torch.unique(adam_steps.round(), dim=0))
show(
    figure,
    "steps",
    f"Inner dots are gradients of {len(directions)} directions, outer ones the first steps, joined by lines. Descent "
    f"follows them all; Adam knows {corners} directions, the diagonals of the basis.",
)

# %% [markdown]
# ## Training from a turned start
#
# A small RiGPT and the same one in a random frame: the same function, other weights. Both are trained on the same
# batches in float64, and the distance between $Q \cdot \mathrm{train}(\theta)$ and $\mathrm{train}(Q \cdot \theta)$ is
# measured, relative to the path that the first has gone.

# %%
text, characters = library_text()
V, T = len(characters), 32
data = torch.tensor([characters.index(character) for character in text])
cut = int(0.9 * len(data))
train, held_out = data[:cut], data[cut:]


def windows(source: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Random windows `[count, T]`."""
    return source[torch.randint(0, len(source) - T, (count, 1), generator=generator) + torch.arange(T)]


def new_model(d: int, layers: int, seed: int) -> RiGPTForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": V, "hidden_size": d, "num_hidden_layers": layers, "num_attention_heads": 4}
    return RiGPTForCausalLM(RiGPTConfig(**sizes, max_position_embeddings=T))


OPTIMIZERS = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.03, betas=(0.9, 0.95), weight_decay=0.1),
    "equivariant": lambda model: EquivariantOptimizer(equivariant_param_groups(model, lr=0.02, weight_decay=0.1)),
}


def step_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> None:
    loss = model(ids, labels=ids, use_cache=False).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def distance(a: torch.nn.Module, b: torch.nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return math.sqrt(sum(float((x - y).detach().square().sum()) for x, y in pairs))


start = new_model(16, 1, SEED).double()
turn = GaugeTransformation.random(start.config, torch.Generator().manual_seed(SEED), ("stream",))
apart: dict[str, list[float]] = {}
for name, make in OPTIMIZERS.items():
    here, there = copy.deepcopy(start), turn(start)
    optimizers = make(here), make(there)
    batches, apart[name] = torch.Generator().manual_seed(SEED), []
    for _ in range(50):
        ids = windows(train, 4, batches)
        for model, optimizer in zip((here, there), optimizers, strict=True):
            step_of(model, optimizer, ids)
        apart[name].append(distance(turn(here), there) / distance(here, start))
    print(f"{name}: after one step {apart[name][0]:.0e}, after {len(apart[name])} {apart[name][-1]:.0e}")
assert apart["SGD"][-1] < 1e-10 and apart["equivariant"][-1] < 1e-10 and apart["AdamW"][-1] > 0.1

figure, (panel,) = panels(1, "Two trainings of one function, from two frames", width=6.4)
for (name, values), colour in zip(apart.items(), COLOURS, strict=False):
    panel.semilogy(range(1, len(values) + 1), values, color=colour, lw=2, label=name)
panel.set(xlabel="step", ylabel="distance of the two, turned back / path gone", ylim=(1e-17, 10))
panel.legend(frameon=False, loc="center right")
show(
    figure,
    "equivariance",
    f"With AdamW the two are {apart['AdamW'][-1]:.0%} of their path apart after {len(apart['AdamW'])} steps. With SGD "
    f"and the equivariant optimizer they stay the same (to {apart['SGD'][-1]:.0e}, {apart['equivariant'][-1]:.0e}).",
)

# %% [markdown]
# ## How to see a basis: kurtosis
#
# Take a vector $x$ of the stream, subtract its mean over coordinates, $y = x - \bar x \mathbf 1$, and let
#
# $$\kappa = \frac{\frac1d \sum_i y_i^4}{(\frac1d \sum_i y_i^2)^2} - 3 .$$
#
# It is large if few coordinates carry much. What is normal? Turn $x$ by random rotations. Then $y$ has a uniform
# direction among the $d - 1$ dimensions perpendicular to $\mathbf 1$. A coordinate is the product of $y$ with the part
# of an axis in this space, whose squared length is $1 - 1/d$. With the fourth moment of a uniform direction in $m$
# dimensions, $3 / (m (m + 2))$ (exercise 2 of chapter 3), and $m = d - 1$:
#
# $$\langle \kappa \rangle = d^2 \Big(1 - \frac1d\Big)^2 \frac{3}{(d - 1)(d + 1)} - 3 = -\frac{6}{d + 1}.$$
#
# For *every* vector, outliers or not: a model whose frame is as good as any other has a $\kappa$ near this, and one
# that is far from it has a basis. The cell checks the mean on the worst vector, one with a single entry.

# %%
d = 48
lone = torch.zeros(d, dtype=torch.float64)
lone[0] = 1.0
samples = torch.stack([excess_kurtosis(haar(d, generator) @ lone) for _ in range(3000)])
mean, error = float(samples.mean()), float(samples.std()) / len(samples) ** 0.5
print(f"one entry: κ = {float(excess_kurtosis(lone)):.0f}; in random frames {mean:.3f} ± {error:.3f}", end="")
print(f", predicted {-6 / (d + 1):.3f}")
assert abs(mean + 6 / (d + 1)) < 5 * error and float(excess_kurtosis(lone)) > 10

# %% [markdown]
# ## Four trainings
#
# One network, one text, three optimizers; AdamW once more with a third of its step. Then $\kappa$ of the stream after
# the layers, in the frame that training ended in and in random ones. The random frames say how much of a deviation is
# chance.

# %%
STEPS, FRAMES = 300, 24
measuring = windows(held_out, 96, torch.Generator().manual_seed(SEED))
CANDIDATES = OPTIMIZERS | {
    "AdamW, 1/3": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
}


@torch.no_grad()
def loss_of(model: torch.nn.Module) -> float:
    return float(model(measuring, labels=measuring, use_cache=False).loss)


def trained(make) -> RiGPTForCausalLM:
    model = new_model(d, 2, SEED)
    optimizer, batches = make(model), torch.Generator().manual_seed(SEED)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 40, 1, 1.02 - i / STEPS))
    for _ in range(STEPS):
        step_of(model, optimizer, windows(train, 16, batches))
        schedule.step()
    return model


@torch.no_grad()
def stream(model: torch.nn.Module) -> torch.Tensor:
    """Vectors after the last layer `[tokens, d]`, float64."""
    return model(measuring, output_hidden_states=True, use_cache=False).hidden_states[-1].flatten(0, 1).double()


rotations = [haar(d, generator) for _ in range(FRAMES)]
models = {name: trained(make) for name, make in CANDIDATES.items()}
kurtosis: dict[str, tuple[float, torch.Tensor]] = {}
for name, model in models.items():
    x = stream(model)
    elsewhere = torch.stack([excess_kurtosis(x @ Q.T).mean() for Q in rotations])
    kurtosis[name] = float(excess_kurtosis(x).mean()), elsewhere
    print(
        f"{name}: loss {loss_of(model):.3f}, κ {kurtosis[name][0]:+.2f}; "
        f"in random frames {float(elsewhere.mean()):+.2f} ± {float(elsewhere.std()):.2f}"
    )


def deviations(name: str) -> float:
    """How many standard deviations of random frames the own frame is away."""
    own, elsewhere = kurtosis[name]
    return (own - float(elsewhere.mean())) / float(elsewhere.std())


assert deviations("AdamW") > 3, "Adam at this step must have found its basis"
assert abs(deviations("SGD")) < 3 and abs(deviations("equivariant")) < 3, "these have none"

# %% [markdown]
# ## Rounding
#
# Four bits leave the numbers $-7, \dots, 7$ times a scale, and the largest entry of a row sets it: the step is
# $\Delta = \max|x| / 7$. Rounding to nearest is off by something uniform in $\pm \Delta / 2$, of variance
# $\Delta^2 / 12$. With the *crest factor* $c = \max|x| / \sqrt{\overline{x^2}}$ the relative error is
#
# $$\varepsilon = \frac{\Delta / \sqrt{12}}{\sqrt{\overline{x^2}}} = \frac{c}{7 \sqrt{12}}.$$
#
# How large is $c$? From $\max^4 \le \sum x_i^4$: $c \le (d (\kappa + 3))^{1/4}$ if the mean is zero. One outlier among
# many small entries has $c \to \sqrt d$; a random rotation makes of it something like a Gaussian vector, with $c$ near
# $\sqrt{2 \ln d}$. That is the idea of QuaRot: turn first, then round, then turn back. (The formula takes entries to
# be spread over many steps, so with an outlier it overstates: small entries are rounded to zero, which costs no more
# than they are.)

# %%


def error_of(x: torch.Tensor) -> float:
    """Relative error of rows `[rows, n]` rounded to four bits, the mean over rows."""
    return float(((rounded(x) - x).norm(dim=-1) / x.norm(dim=-1)).mean())


def crest(x: torch.Tensor) -> float:
    return float((x.abs().amax(-1) / x.square().mean(-1).sqrt()).mean())


wide = 512
calm = torch.randn(200, wide, generator=generator, dtype=torch.float64)
spiky = calm.clone()
spiky[:, 7] = 30.0
around = haar(wide, generator)
for name, x in (("calm", calm), ("one outlier", spiky), ("one outlier, turned", spiky @ around.T)):
    print(f"{name}: crest {crest(x):.1f}, error {error_of(x):.3f}, formula {crest(x) / (7 * 12**0.5):.3f}")
assert error_of(spiky) > 2.5 * error_of(spiky @ around.T)
assert abs(error_of(calm) / (crest(calm) / (7 * 12**0.5)) - 1) < 0.05

# %% [markdown]
# ## What it is worth in the four models
#
# Two questions that are often taken for one:
#
# 1. *Activations*: the vectors of the stream, rounded to four bits, in the own frame and in random ones.
# 2. *Weights*: all matrices but the table of tokens, rounded to four bits row by row, and the loss measured again; in
#    the own frame, and after random rotations of the stream (which change no loss before rounding).


# %%
@torch.no_grad()
def loss_in_four_bits(model: torch.nn.Module) -> float:
    """The loss after rounding the weights."""
    small = copy.deepcopy(model)
    for name, parameter in small.named_parameters():
        if parameter.dim() == 2 and "embed_tokens" not in name:
            parameter.copy_(rounded(parameter))
    return loss_of(small)


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """The mean and the standard deviation."""
    return float(torch.tensor(values).mean()), float(torch.tensor(values).std())


@torch.no_grad()
def gain_of(model: torch.nn.Module) -> float:
    """|W x| sqrt(n) / (|W| |x|), the median over matrices: how well matrices answer to their inputs."""
    found: list[float] = []

    def look(module: torch.nn.Linear, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        found.append(float(output.norm() * module.in_features**0.5 / (module.weight.norm() * inputs[0].norm())))

    maps = [module for name, module in model.model.named_modules() if isinstance(module, torch.nn.Linear)]
    handles = [module.register_forward_hook(look) for module in maps]
    model(measuring, use_cache=False)
    for handle in handles:
        handle.remove()
    return float(torch.tensor(found).median())


results: dict[str, dict[str, float]] = {}
stream_frames = [
    GaugeTransformation.random(models["SGD"].config, torch.Generator().manual_seed(SEED + i), ("stream",))
    for i in range(FRAMES)
]
for name, model in models.items():
    x, before = stream(model), loss_of(model)
    elsewhere = {
        "activations": mean_and_spread([error_of(x @ Q.T) for Q in rotations]),
        "weights": mean_and_spread([loss_in_four_bits(frame(model)) - before for frame in stream_frames]),
    }
    results[name] = {
        "activations, own": error_of(x),
        "weights, own": loss_in_four_bits(model) - before,
        **{f"{kind}, random": mean for kind, (mean, _) in elsewhere.items()},
        **{f"{kind}, spread": spread for kind, (_, spread) in elsewhere.items()},
        "gain": gain_of(model),
    }
    print(name, {key: round(value, 4) for key, value in results[name].items()})
adam, equivariant = results["AdamW"], results["equivariant"]
assert adam["activations, own"] > 1.05 * adam["activations, random"], "a rotation must help where there is a basis"
calm = equivariant["activations, own"] / equivariant["activations, random"]
assert abs(calm - 1) < 0.1, "and not where there is none"
assert adam["gain"] > 1.2 * equivariant["gain"] and adam["weights, own"] < equivariant["weights, own"]

# %% [markdown]
# Is a difference between frames more than chance? The spread of random frames says so, as it did for $\kappa$.

# %%


def spreads(name: str, kind: str) -> float:
    """How many standard deviations of random frames the own frame loses more than they do."""
    entry = results[name]
    return (entry[f"{kind}, own"] - entry[f"{kind}, random"]) / entry[f"{kind}, spread"]


far = {name: round(spreads(name, "weights"), 1) for name in results}
ratio = equivariant["weights, random"] / adam["weights, random"]
print(f"weights, own frame less random ones, in standard deviations: {far}; ", end="")
print(f"activations of AdamW: {spreads('AdamW', 'activations'):.1f}")
print(f"weights of the equivariant model lose {ratio:.1f} times as much as AdamW's, in the mean over frames")
assert max(map(abs, far.values())) < 3 < spreads("AdamW", "activations"), "frames matter to activations alone"
assert all(
    equivariant["weights, random"] > 2 * results[name]["weights, random"] for name in results if name != "equivariant"
)

# %% [markdown]
# Read it with care.
#
# - *Activations* behave as the story says: where Adam has left outliers a rotation takes the extra error away, where
#   there are none it changes nothing. At a third of the step Adam leaves little to see at this size: kurtosis is a
#   matter of optimizer *and* step size, and grows with width, depth and length of training.
# - *Weights* do not. Their loss does not tell the frame of training from random ones: it lies within their spread, in
#   AdamW's model too. It tells the optimizers apart: the equivariant one's model has no outliers and loses most,
#   several times as much as AdamW's. Rounding spreads its noise evenly over all directions, a share $\varepsilon$ of
#   $|W| |x| / \sqrt n$ in the output. A matrix that answers its inputs with a few strong directions puts out much more
#   than that (its *gain* is large) and hardly notices; polar updates keep singular values alike, so their gain is near
#   one and the output takes all of $\varepsilon$. (The models also differ in what they have learned, and a better one
#   has more to lose: this is no proof by itself.)
#
# `docs/comparison.md` has the same finding for models of 3.5 million parameters: RiGPT's weights suffer more from four
# bits than GPT-2's, although its kurtosis is near zero; and scales per 32 weights and compensation repair most of it.
# So a calm stream is no promise that weights can be rounded.

# %%
figure, (panel, second, third) = panels(
    3, "A rotation removes AdamW's extra error in activations, not the loss of weights", width=4.2
)
for place, (own, elsewhere) in enumerate(kurtosis.values()):
    panel.plot(
        torch.full((FRAMES,), place), elsewhere, "o", ms=4, color="0.6", label=None if place else "random frames"
    )
    panel.plot(place, own, "D", ms=8, color=COLOURS[1], label=None if place else "frame of training")
panel.axhline(-6 / (d + 1), color="black", ls="--", lw=1, label="mean, -6/(d+1)")
panel.set(ylabel="excess kurtosis after the last layer")
panel.set_yscale("symlog", linthresh=1)
panel.set_ylim(-1.2, 4 * max(own for own, _ in kurtosis.values()))
names = {"random": "random frames, ± standard deviation", "own": "frame of training"}
for other, key, label in (
    (second, "activations", "relative error of the stream in 4 bits"),
    (third, "weights", "loss added by weights in 4 bits (nats)"),
):
    for shift, frame, colour in ((-0.2, "random", "0.6"), (0.2, "own", COLOURS[1])):
        values = [entry[f"{key}, {frame}"] for entry in results.values()]
        spread = [entry[f"{key}, spread"] for entry in results.values()] if frame == "random" else None
        places = [place + shift for place in range(len(values))]
        other.bar(places, values, 0.38, yerr=spread, ecolor="black", capsize=3, color=colour, label=names[frame])
    other.set(ylabel=label, ylim=(0, 1.3 * other.get_ylim()[1]))
for each in (panel, second, third):
    each.set_xticks(range(len(results)), [name.replace(", ", ",\n") for name in results], fontsize=8)
panel.legend(frameon=False, fontsize=8, loc="upper right")
second.legend(frameon=False, fontsize=8, loc="upper right")
show(
    figure,
    "four-bits",
    f"AdamW's frame is {deviations('AdamW'):.0f} standard deviations away from random ones, the equivariant "
    f"optimizer's {deviations('equivariant'):.1f}. A rotation takes "
    f"{1 - adam['activations, random'] / adam['activations, own']:.0%} of AdamW's error in the stream away. "
    f"Rounded weights cost {adam['weights, random']:.4f} ± {adam['weights, spread']:.4f} nats there, "
    f"{adam['weights, own']:.4f} in the frame of training; in the equivariant model "
    f"{equivariant['weights, random']:.4f} ± {equivariant['weights, spread']:.4f} and "
    f"{equivariant['weights, own']:.4f}.",
)

# %% [markdown]
# ## What we saw

# %%
print(f"- From a turned start AdamW ends {apart['AdamW'][-1]:.0%} of the path apart, SGD {apart['SGD'][-1]:.0e}.")
found = {name: f"{own:+.2f}" for name, (own, _) in kurtosis.items()}
print(f"- κ after the last layer: {found}; in random frames {-6 / (d + 1):+.2f}.")
losses = {name: f"{loss_of(model):.2f}" for name, model in models.items()}
print(
    f"- Gains: AdamW {adam['gain']:.1f}, equivariant {equivariant['gain']:.1f}. Weights in four bits add to the loss"
)
print(f"  {adam['weights, own']:.4f} and {equivariant['weights, own']:.4f} nats; random frames spread by", end=" ")
print(f"{adam['weights, spread']:.4f} and {equivariant['weights, spread']:.4f}. Losses before: {losses}.")

# %% [markdown]
# ## Exercises
#
# 1. Which orthogonal matrices commute with taking the sign of every entry? How many are there in two dimensions?
# 2. Adam with one second moment per row of a table, shared along the row: equivariant under which rotations?
# 3. Let $d$ entries be Gaussian. Show that $c \approx \sqrt{2 \ln d}$ for large $d$.
#
# <details><summary>Solutions</summary>
#
# 1. $\operatorname{sign}(Qg) = Q s$ with $s = \operatorname{sign}(g)$, which may be any pattern of signs. So every
#    entry of $Q s$ is $\pm 1$; turning one sign of $s$ round changes it by $2 Q_{ij}$, which must be $0$ or $\pm 2$.
#    Rows of length 1 with entries $0, \pm 1$ have one that is not zero: signed permutations, $2^d\, d!$ of them.
# 2. Under rotations of the space that the rows live in: lengths of rows do not change. This is what the equivariant
#    optimizer does for the table of tokens. Not under those that mix rows.
# 3. One entry exceeds $m$ in size with the probability $\operatorname{erfc}(m / \sqrt 2)$, the largest of $d$ with
#    about $d$ times that. With $\operatorname{erfc}(m / \sqrt 2) \approx e^{-m^2/2} \sqrt{2/\pi} / m$ this is of order
#    one at $m^2 = 2 \ln d$, less a part of order $\ln \ln d$.
# </details>

# %% [markdown]
# Solution 1 as code: rotations and reflections of the plane in steps of a degree.

# %%
degrees = torch.deg2rad(torch.arange(360, dtype=torch.float64))
cos, sin = degrees.cos(), degrees.sin()
rotated = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)  # [360, 2, 2]
plane = torch.cat([rotated, rotated * torch.tensor([1.0, -1.0])])
g = torch.randn(200, 2, generator=generator, dtype=torch.float64)
misses = ((g @ plane.mT).sign() - g.sign() @ plane.mT).abs().amax((1, 2))  # [720]
commuting = misses < 1e-12
nearest = float(misses[~commuting].min())
print(f"{int(commuting.sum())} of {len(plane)} commute with the sign; the others miss by {nearest:.2f} or more")
assert int(commuting.sum()) == 2**2 * math.factorial(2) and nearest > 0.01

# %% [markdown]
# Solution 2 as code: one step of Adam with a shared second moment, from a table and from the turned table.

# %%


def shared_step(g: torch.Tensor) -> torch.Tensor:
    """Adam's first step with one second moment per row."""
    return g / g.square().mean(1, keepdim=True).sqrt()


table = torch.randn(9, d, generator=generator, dtype=torch.float64)
spin, mixing = haar(d, generator), haar(9, generator)
shared, entrywise = (
    float((u(table @ spin.T) - u(table) @ spin.T).norm() / u(table).norm()) for u in (shared_step, torch.sign)
)
mixed = float((shared_step(mixing @ table) - mixing @ shared_step(table)).norm() / shared_step(table).norm())
print(f"shared along the row {shared:.0e}, every entry by itself {entrywise:.1f}; rows mixed {mixed:.2f}")
assert shared < 1e-13 and entrywise > 0.5 and mixed > 0.01

# %% [markdown]
# Solution 3 as code: the median $m$ of the largest of $d$, exactly and in samples, against $\sqrt{2 \ln d}$. It comes
# near slowly, as a logarithm of a logarithm does; $\sqrt{\ln d}$ stays away from it.

# %%


def median_of_largest(d: float) -> float:
    """The m with P(|x| < m)^d = 1/2."""
    exceeds = -math.expm1(-math.log(2) / d)
    return -float(torch.special.ndtri(torch.tensor(exceeds / 2, dtype=torch.float64)))


sampled = float(torch.randn(4000, wide, generator=generator).abs().amax(1).median())
shares = {d: median_of_largest(d) / math.sqrt(2 * math.log(d)) for d in (1e2, 1e4, 1e16, 1e64, 1e256)}
print(f"d = {wide}: median {median_of_largest(wide):.3f}, in samples {sampled:.3f}; m / sqrt(2 ln d):", end=" ")
print({f"{d:.0e}": f"{share:.3f}" for d, share in shares.items()})
assert abs(sampled / median_of_largest(wide) - 1) < 0.02 and list(shares.values()) == sorted(shares.values())
assert 0.99 < shares[1e256] < 1 and 2**0.5 * shares[1e256] > 1.3

# %% [markdown]
# ## Further reading
#
# - N. Elhage, R. Lasenby, C. Olah, *Privileged Bases in the Transformer Residual Stream* (2023).
# - D. P. Kingma, J. Ba, *Adam: A Method for Stochastic Optimization*, arXiv 1412.6980.
# - K. Jordan and others, *Muon: An optimizer for hidden layers in neural networks* (2024).
# - S. Ashkboos and others, *QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs*, arXiv 2404.00456.
# - Z. Liu and others, *SpinQuant: LLM quantization with learned rotations*, arXiv 2405.16406.
# - S. Han, *TinyML and Efficient Deep Learning Computing*, lectures at MIT: those on quantization.
# - E. Frantar and others, *GPTQ*, arXiv 2210.17323: what a column loses is made good by the others.
# - `docs/comparison.md` of this project, sections "Kurtosis in a model without a basis" and "Four bits".
