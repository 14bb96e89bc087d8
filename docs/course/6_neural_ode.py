# %% [markdown]
# # 6. From layers to a flow
#
# A residual layer adds something small to what it gets. Read the number of the layer as time, and the network is a
# particle moved by a velocity field in steps of one. This chapter refines the steps, and then changes coordinates of
# space *and* time: the symmetries of layers become diffeomorphisms of a flow (Hashimoto, Hirono, Sannai).
#
# Letters: $x_l$ the state after $l$ layers, $L$ layers, $f_l$ what the next one adds, $N$ neurons, $t \in [0, L]$
# time, $F$ the map from the state at 0 to the state at $L$.

# %% [markdown]
# ## A residual network, written out
#
# States in the plane, so that everything can be seen. $L$ layers with $N$ neurons each:
#
# $$x_{l+1} = x_l + f_l(x_l), \qquad f_l(x) = W^{(2)}_l \tanh(W^{(1)}_l x + b_l).$$
#
# The task: two spirals, one label each. At the end a straight line has to separate them, so the layers have to unwind
# the plane.

# %%
import copy
import math
from itertools import pairwise

import torch
from torch.func import jvp

from rigpt_hf import RiGPTConfig, RiGPTForCausalLM
from rigpt_hf.flow.depth import layer_field
from rigpt_hf.flow.diffeomorphism import SpacetimeMap, transform_field
from rigpt_hf.lab import COLOURS, chosen_seed, panels, show


SEED = chosen_seed()
torch.set_default_dtype(torch.float64)
generator = torch.Generator().manual_seed(SEED)
LAYERS, NEURONS = 8, 16


def spirals(points: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points `[2 · points, 2]` on two spirals, and their labels, -1 and 1."""
    turn = torch.linspace(0.5, 6.0, points)
    arm = torch.stack([turn.cos(), turn.sin()], 1) * turn[:, None] / 3
    noise = 0.05 * torch.randn(2 * points, 2, generator=generator)
    return torch.cat([arm, -arm]) + noise, torch.cat([-torch.ones(points), torch.ones(points)])


def layer(weights: dict[str, torch.Tensor], i: int, x: torch.Tensor) -> torch.Tensor:
    """`f_l(x)` of points `[..., 2]`."""
    return torch.tanh(x @ weights["W1"][i].T + weights["b"][i]) @ weights["W2"][i].T


def network(weights: dict[str, torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
    """The states after all layers, the input first."""
    states = [x]
    for i in range(LAYERS):
        states.append(states[-1] + layer(weights, i, states[-1]))
    return states


x0, labels = spirals(150)
weights = {
    "W1": torch.randn(LAYERS, NEURONS, 2, generator=generator),
    "b": torch.randn(LAYERS, NEURONS, generator=generator),
    "W2": 0.1 * torch.randn(LAYERS, 2, NEURONS, generator=generator),
    "line": torch.randn(2, generator=generator),
}
for value in weights.values():
    value.requires_grad_()
optimizer = torch.optim.Adam(weights.values(), lr=0.02)
for _ in range(500):
    states = network(weights, x0)
    margin = labels * (states[-1] @ weights["line"])
    # The second term keeps the velocities small, so that steps of one follow the flow.
    effort = sum((after - before).square().mean() for before, after in pairwise(states))
    loss = torch.nn.functional.softplus(-margin).mean() + 0.02 * effort
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
weights = {name: value.detach() for name, value in weights.items()}


def accuracy(ends: torch.Tensor) -> float:
    return float((ends @ weights["line"] * labels > 0).double().mean())


states = network(weights, x0)
print(f"right before the layers: {accuracy(x0):.0%} by that line, after them {accuracy(states[-1]):.0%}")
assert accuracy(states[-1]) > 0.97 > accuracy(x0)

# %% [markdown]
# ## Finer steps
#
# Let the field be $f(t, x) = f_l(x)$ for $l \le t < l + 1$. Euler's method with the step $h$, $x \to x + h f$, is the
# network for $h = 1$, exactly. For $h \to 0$ it becomes the flow $\dot x = f(t, x)$. How fast? Taylor:
# $x(t + h) = x + h f + \tfrac{h^2}{2} (\partial_x f) f + \dots$, so a step of Euler is wrong by $O(h^2)$; there are
# $L/h$ of them, so the end is wrong by $O(h)$. The classical method of Runge and Kutta agrees with Taylor to $h^4$,
# and is of order 4. Both only as long as no step crosses a jump of the weights: here steps end at every layer.
#
# Two trajectories are never at one point at one time, or they would have been one: run back, the flow returns to every
# beginning. Their paths in the plane may cross, because the field changes with time. Steps of one can jump over each
# other.

# %%


def euler(field, t: float, x: torch.Tensor, h: float) -> torch.Tensor:
    return x + h * field(t, x)


def runge_kutta(field, t: float, x: torch.Tensor, h: float) -> torch.Tensor:
    a = field(t, x)
    b = field(t + h / 2, x + h / 2 * a)
    c = field(t + h / 2, x + h / 2 * b)
    return x + h / 6 * (a + 2 * b + 2 * c + field(t + h, x + h * c))


def flow(fields: list, x: torch.Tensor, steps: int, method=runge_kutta, times=range(LAYERS + 1)) -> torch.Tensor:
    """States `[LAYERS · steps + 1, ..., 2]`; field number i holds from `times[i]` to `times[i + 1]`."""
    states = [x]
    for i, field in enumerate(fields):
        h = (times[i + 1] - times[i]) / steps
        for step in range(steps):
            states.append(method(field, times[i] + step * h, states[-1], h))
    return torch.stack(states)


fields = [lambda t, x, i=i: layer(weights, i, x) for i in range(LAYERS)]
same = float((flow(fields, x0, 1, euler)[-1] - states[-1]).abs().max())
reference = flow(fields, x0, 128)[-1]
counts = [1, 2, 4, 8, 16, 32]
errors = {
    name: [float((flow(fields, x0, n, method)[-1] - reference).norm(dim=-1).mean()) for n in counts]
    for name, method in (("Euler", euler), ("Runge-Kutta", runge_kutta))
}


def order(values: list[float]) -> float:
    """The order from the last halving of the step."""
    return math.log2(values[-2] / values[-1])


orders = {name: order(values) for name, values in errors.items()}
measured = {name: round(value, 2) for name, value in orders.items()}
print(f"Euler with step 1 is the network: {same:.0e}; measured orders {measured}")
print(f"right answers: network {accuracy(states[-1]):.0%}, its flow {accuracy(reference):.0%}")
assert same < 1e-14 and abs(orders["Euler"] - 1) < 0.2 and abs(orders["Runge-Kutta"] - 4) < 0.4

back = [lambda t, x, field=field: -field(t, x) for field in fields]
returned, unordered = (float((flow(each, reference, 32)[-1] - x0).abs().max()) for each in (back[::-1], back))
elsewhere = float((fields[4](4.0, x0) - fields[0](0.0, x0)).norm(dim=-1).max())
print(f"run back, the flow returns to {returned:.0e}, with layers in the first order to {unordered:.1f};", end=" ")
print(f"fields at times 0 and 4 differ by {elsewhere:.1f} at one point")
assert returned < 1e-6 < 0.1 < min(unordered, elsewhere)

# %% [markdown]
# The first figure: the plane is unwound. The same points before and after the layers, with the paths of some points;
# and how the solvers converge.

# %%
fine = flow(fields, x0, 16)  # [129, points, 2]
chosen = torch.arange(0, len(x0), 12)
figure, (panel, second, third) = panels(
    3, "A residual network as a flow: two spirals are unwound", width=4.2, height=4
)
for label, colour in ((-1, COLOURS[0]), (1, COLOURS[1])):
    mine = labels == label
    panel.plot(*x0[mine].T, ".", ms=3, color=colour)
    second.plot(*fine[-1][mine].T, ".", ms=3, color=colour)
    for i in chosen[mine[chosen]]:
        second.plot(*fine[:, i].T, color=colour, lw=0.7, alpha=0.8)
along = torch.tensor([-weights["line"][1], weights["line"][0]]) / weights["line"].norm()
reach = float(fine[-1].norm(dim=-1).max())
second.plot(*torch.stack([-reach * along, reach * along]).T, "--", color="black", lw=1, label="separating line")
second.legend(frameon=False, fontsize=8, loc="lower right")
panel.set(title="before", xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
second.set(title="after the layers, with some paths", xlabel="$x_1$", aspect="equal", xlim=(-reach, reach))
for (name, values), marker, colour in zip(errors.items(), "os", COLOURS[2:], strict=False):
    third.loglog(
        [1 / n for n in counts], values, marker + "-", color=colour, label=f"{name}, order {orders[name]:.2f}"
    )
third.set(title="error against the flow", xlabel="step h", ylabel="mean distance at the end")
third.legend(frameon=False)
show(
    figure,
    "flow",
    f"Steps of one are {errors['Euler'][0]:.2f} away from the flow; Euler converges with order {orders['Euler']:.2f}, "
    f"Runge-Kutta with {orders['Runge-Kutta']:.2f}. The network answers {accuracy(states[-1]):.0%} right, its flow "
    f"{accuracy(reference):.0%}.",
)

# %% [markdown]
# ## New coordinates for space and time
#
# Let $y = \varphi_t(x)$, with an inverse for every $t$. Along a solution
#
# $$\dot y = \partial_t \varphi_t(x) + D\varphi_t(x)\, f(t, x) =: f'(t, y), \qquad x = \varphi_t^{-1}(y).$$
#
# So $y$ solves an ODE too, and the maps from beginning to end are related by
# $F' = \varphi_L \circ F \circ \varphi_0^{-1}$. If $\varphi_0$ and $\varphi_L$ are the identity, $F' = F$: another
# field, other trajectories, the same function. That is a gauge symmetry, and a very large one.
#
# The two terms are one directional derivative of $(t, x) \mapsto \varphi_t(x)$ along $(1, f)$, which `torch.func.jvp`
# gives at the cost of about one evaluation. Take a whirl: every circle around the origin is turned by an angle that
# depends on its radius and on time. Radii stay, so the inverse turns back by the same angle.
#
# $$\varphi_t(x) = R\big(\alpha(t)\, e^{-|x|^2/4}\big)\, x, \qquad \alpha(t) = a \sin^2(\pi t / L).$$
#
# The control is $\alpha(t) = a \sin^2(\pi t / 2L)$, which is not zero at the end.

# %%
STRENGTH = 2.0


def rotated(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Points `[..., 2]` turned by angles `[...]`."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos * x[..., 0] - sin * x[..., 1], sin * x[..., 0] + cos * x[..., 1]], -1)


def whirl(periods: float, sign: int = 1):
    """`phi(t, x)`, or its inverse with `sign=-1`."""

    def phi(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        angle = STRENGTH * (math.pi * periods * t / LAYERS).sin() ** 2 * (-x.square().sum(-1) / 4).exp()
        return rotated(x, sign * angle)

    return phi


def moved(field, phi, inverse):
    """`f'` by hand."""

    def new_field(t: float, y: torch.Tensor) -> torch.Tensor:
        time = torch.as_tensor(float(t))
        x = inverse(time, y)
        return jvp(phi, (time, x), (torch.ones_like(time), field(t, x)))[1]

    return new_field


def compare(periods: float, steps: int) -> tuple[torch.Tensor, float]:
    """Trajectories in the new coordinates, and how far the ends are from those of the old."""
    new = flow([moved(field, whirl(periods), whirl(periods, -1)) for field in fields], x0, steps)
    return new, float((new[-1] - reference).norm(dim=-1).max())


gaps = [compare(1, steps)[1] for steps in (8, 16, 32)]
whirled, gap = compare(1, 64)
open_ended, control = compare(0.5, 64)
expected = whirl(0.5)(torch.tensor(float(LAYERS)), reference)
off = float((open_ended[-1] - expected).norm(dim=-1).max())
print(f"ends apart: {[f'{value:.0e}' for value in gaps]} with 8, 16, 32 steps a layer; with 64 {gap:.0e}")
print(f"control, not the identity at the end: {control:.2f}, but phi_L of the old end to ", end="")
print(f"{off:.0e}")
assert gap < 1e-5 < 0.1 < control and gaps[0] / gaps[2] > 100, "the gap is the solver's, of order 4"
assert off < 1e-5

# %% [markdown]
# The library has this for any map, in `rigpt_hf.flow.diffeomorphism`; where no inverse is given it is found by
# Newton's method. It must agree with the field made by hand.

# %%
by_library = transform_field(fields[3], SpacetimeMap(space=whirl(1), space_inverse=whirl(1, -1)))
without_inverse = transform_field(fields[3], SpacetimeMap(space=whirl(1)))
here, instant = x0[::30], torch.tensor(3.4)
hand = moved(fields[3], whirl(1), whirl(1, -1))(3.4, here)
agreement = [float((field(instant, here) - hand).abs().max()) for field in (by_library, without_inverse)]
print(f"field by hand and by the library: {agreement[0]:.0e}; with an inverse by Newton's method {agreement[1]:.0e}")
assert max(agreement) < 1e-10 and float((fields[3](3.4, here) - hand).abs().max()) > 0.1

# %% [markdown]
# The second figure: trajectories of some points in old and new coordinates.

# %%
slow = flow(fields, x0, 64)
figure, axes = panels(
    2, "Other paths, the same ends: a diffeomorphism that moves with time", height=5.2, sharex=True, sharey=True
)
for panel, paths, name in zip(
    axes, (slow, whirled), ("old coordinates", "whirled, the identity at both ends"), strict=True
):
    for i in chosen:
        colour = COLOURS[0] if labels[i] < 0 else COLOURS[1]
        panel.plot(*paths[:, i].T, color=colour, lw=0.9, alpha=0.8)
        panel.plot(*paths[0, i], "o", ms=4, mfc="white", color=colour)
        panel.plot(*paths[-1, i], "o", ms=4, color=colour)
    panel.set(title=name, xlabel="$x_1$", aspect="equal")
axes[0].set_ylabel("$x_2$")
middle = float((slow - whirled).norm(dim=-1).max())
show(
    figure,
    "diffeomorphism",
    f"Open circles are beginnings, full ones ends. In between the paths are up to {middle:.1f} apart, at the end "
    f"{gap:.0e}; where the map is not the identity at the end, {control:.1f}.",
)
assert middle > 0.5

# %% [markdown]
# ## Time, and linear fields
#
# *Time.* Let $s = \tau(t)$ with $\dot\tau > 0$. Then $dx/ds = f / \dot\tau$: the same curve, run through at another
# pace. Layers may be of any length if what they add is scaled.
#
# *Linear fields.* For $\dot x = A(t) x$ and $y = Q(t) x$: $\dot y = \dot Q x + Q A x$, so
#
# $$A' = (\dot Q + Q A)\, Q^{-1}.$$
#
# A physicist knows this: it is how a gauge potential transforms. With $A = 0$ what is left, $\dot Q Q^{-1}$, is pure
# gauge: nothing moves, but the frame does.

# %%
rate, end = 1.3, float(LAYERS)
paced = [
    lambda s, x, field=field: field(s, x) * rate * end / (1 - math.exp(-rate)) * math.exp(-rate * s)
    for field in fields
]
# t(s) = L (1 - exp(-rate s)) / (1 - exp(-rate)) for s in [0, 1]; layers begin where t is whole.
borders = [-math.log(1 - (1 - math.exp(-rate)) * t / end) / rate for t in range(LAYERS + 1)]
pace = float((flow(paced, x0, 64, times=borders)[-1] - reference).norm(dim=-1).max())
print(f"layers of lengths {[round(b - a, 3) for a, b in pairwise(borders)]}: ends apart {pace:.0e}")
assert pace < 1e-5

n = 4
A, B = torch.randn(2, n, n, generator=generator)
B = B - B.T
exact = torch.linalg.matrix_exp(A)


def solved(A_of_t) -> torch.Tensor:
    """The map `[n, n]` of a linear field from 0 to 1."""
    x, steps = torch.eye(n), 400
    for step in range(steps):
        x = runge_kutta(lambda t, x: A_of_t(t) @ x, step / steps, x, 1 / steps)
    return x


def gauged(angle, rate):
    """`A'` for `Q(t) = exp(angle(t) B)`, whose derivative is `rate(t) B Q`."""

    def A_of_t(t: float) -> torch.Tensor:
        Q = torch.linalg.matrix_exp(angle(t) * B)
        return (rate(t) * B @ Q + Q @ A) @ Q.T

    return A_of_t


closed = solved(gauged(lambda t: math.sin(math.pi * t) ** 2, lambda t: math.pi * math.sin(2 * math.pi * t)))
opened = solved(gauged(lambda t: t, lambda t: 1.0))
forgotten = solved(gauged(lambda t: math.sin(math.pi * t) ** 2, lambda t: 0.0))
linear = float((closed - exact).norm() / exact.norm())
shifted = float((opened - torch.linalg.matrix_exp(B) @ exact).norm() / exact.norm())
print(f"Q the identity at both ends: {linear:.0e}; Q(1) = exp(B): F' = exp(B) F to {shifted:.0e}")
print(f"without the term of the moving frame: {float((forgotten - exact).norm() / exact.norm()):.2f}")
assert max(linear, shifted) < 1e-7 and float((forgotten - exact).norm() / exact.norm()) > 0.1

# %% [markdown]
# ## Back to layers: one frame for each
#
# Let every layer of the network have a frame of its own, $\tilde x_l = Q_l x_l$. Then
#
# $$\tilde x_{l+1} = \underbrace{Q_{l+1} Q_l^\top}_{\text{connection}} \big(\tilde x_l + Q_l\, f_l(Q_l^\top \tilde
# x_l)\big),$$
#
# and $Q_l f_l Q_l^\top$ is again a layer, with $W^{(1)} Q_l^\top$ and $Q_l W^{(2)}$. The skip path, which was the
# identity, now carries vectors from one frame to the next: parallel transport. For small steps
# $Q(t + h) Q(t)^\top = I + h\, \dot Q Q^\top + O(h^2)$, which is the pure gauge term above. The transports multiply to
# $Q_L Q_0^\top$ whatever happens in between: the connection is flat, and with the identity at both ends the network is
# the same function.

# %%
turns = torch.cat([torch.zeros(1), 2 * math.pi * torch.rand(LAYERS - 1, generator=generator), torch.zeros(1)])


def matrix(angle: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])


Q = torch.stack([matrix(angle) for angle in turns])  # [LAYERS + 1, 2, 2]
local = weights | {"W1": weights["W1"] @ Q[:-1].mT, "W2": Q[:-1] @ weights["W2"]}


def framed(transport: bool) -> torch.Tensor:
    x = x0 @ Q[0].T
    for i in range(LAYERS):
        x = x + layer(local, i, x)
        if transport:
            x = x @ (Q[i + 1] @ Q[i].T).T
    return x


with_transport, without = (float((framed(each) - states[-1]).abs().max()) for each in (True, False))
print(f"a frame for each layer: {with_transport:.0e}; transport forgotten: {without:.1f}")
steps = [0.1, 0.05, 0.025]
angle = torch.tensor([0.7])
pure = torch.tensor([[0.0, -1.0], [1.0, 0.0]])  # Q' Qᵀ for Q(t) = rotation by t
apart = [float(((matrix(angle[0] + h) @ matrix(angle[0]).T - torch.eye(2)) / h - pure).norm()) for h in steps]
print(f"(Q(t + h) Q(t)ᵀ - 1)/h against the continuum: {[f'{value:.1e}' for value in apart]}")
assert with_transport < 1e-12 < 0.1 < without and abs(math.log2(apart[0] / apart[1]) - 1) < 0.05

# %% [markdown]
# ## The same in a GPT
#
# Nothing in this needed the plane. A layer of a RiGPT is $x + f_l(x)$ on the streams of all positions together, which
# `layer_field` takes out of a model. Steps of one give the model's logits; halved steps give another function, nearer
# to the flow. How much another depends on what layers add beside what is there.

# %%
config = RiGPTConfig(vocab_size=31, hidden_size=16, num_hidden_layers=4, num_attention_heads=2)
torch.manual_seed(SEED)
gpt = RiGPTForCausalLM(config).double().eval()
ids = torch.randint(0, 31, (2, 10), generator=generator)


@torch.no_grad()
def logits_of(steps: int, size: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the model with all writers scaled by `size`: by Euler with `steps` a layer, and by itself."""
    scaled = copy.deepcopy(gpt)
    for block in scaled.model.layers:
        for writer in (block.self_attn.o_proj, block.mlp.down_proj):
            writer.weight.mul_(size)
    field, x = layer_field(scaled, ids)
    for step in range(config.num_hidden_layers * steps):
        x = x + field(torch.tensor(step / steps), x) / steps
    return scaled.lm_head(scaled.model.norm(x)), scaled(ids, use_cache=False).logits


def gap_of(steps: int, size: float) -> float:
    by_steps, by_model = logits_of(steps, size)
    return float((by_steps - by_model).abs().max() / by_model.abs().max())


unit = gap_of(1, 1.0)
halved = {size: gap_of(2, size) for size in (1.0, 0.3, 0.1)}
by_size = {size: f"{value:.1e}" for size, value in halved.items()}
print(f"steps of one: {unit:.0e}; steps of a half, by the size of what layers add: {by_size}")
assert unit < 1e-12 < 1e-6 < halved[0.1] < halved[0.3] < halved[1.0]

# %% [markdown]
# ## What we saw

# %%
print(f"- A residual network is Euler's method with step 1, to {same:.0e}; orders {orders['Euler']:.2f} and", end=" ")
print(f"{orders['Runge-Kutta']:.2f} for finer steps.")
print(f"- A whirl that is the identity at both ends moves trajectories by {middle:.1f} and the ends by {gap:.0e}.")
print(f"- Not the identity at the end: {control:.1f}. Other paces: {pace:.0e}. Linear fields: {linear:.0e}.")
print(f"- One frame per layer: the same network to {with_transport:.0e}, with parallel transport on the skip path.")

# %% [markdown]
# ## Exercises
#
# 1. A disc of one label lies inside a ring of the other, in the plane. A flow cannot move them to two sides of a line.
#    Which integer says so, and which layer of ReLU neurons can do it in one step of one?
# 2. Let $A' = 0$ in the formula for linear fields. Which $Q(t)$ does that, and what is gauge fixing of this kind
#    worth?
# 3. ReLU layers have the symmetry $W^{(1)} \to a W^{(1)}$, $b \to a b$, $W^{(2)} \to W^{(2)}/a$ with $a > 0$. What
#    does a diffeomorphism of $x$ see of it?
#
# <details><summary>Solutions</summary>
#
# 1. How often the ring winds around the centre of the disc. It changes continuously as long as the ring does not run
#    into the centre, which a flow forbids, so it stays 1; beyond a line it would be 0. A step of one may jump: with
#    $f(x) = 2 \max(-x, 0)$ the plane is folded, $x_i \to |x_i|$, and $|x_1| + |x_2|$ tells the two apart. (With one
#    more dimension, $\dot z = |x|^2$ does it by a flow: Dupont and others.)
# 2. $\dot Q = -QA$, so $Q(t) = F_t^{-1}$: coordinates that move along with the flow, in which nothing happens. All of
#    the function is then in $Q(L)$, the boundary condition: it cannot be gauged away.
# 3. Nothing: $f$ is the same field, so $f'$ is the same too. It is a redundancy of how a field is written, not of the
#    field.
# </details>

# %% [markdown]
# Solution 1 as code: a ring of radius 2 and its centre, moved by the flow of the trained network, and folded.

# %%
circle = torch.linspace(0, 2 * math.pi, 2001)
unit_circle = torch.stack([circle.cos(), circle.sin()], 1)  # the border of the disc
ring_and_centre = torch.cat([2 * unit_circle, torch.zeros(1, 2)])


def winding(points: torch.Tensor) -> float:
    """How often all points but the last go around the last."""
    around = torch.view_as_complex(points[:-1] - points[-1])
    return float((around[1:] / around[:-1]).angle().sum() / (2 * math.pi))


flowed = flow(fields, ring_and_centre, 16)[-1]
folded = ring_and_centre + 2 * torch.relu(-ring_and_centre)
disc_reach, ring_reach = unit_circle.abs().sum(1).max(), (2 * unit_circle).abs().sum(1).min()
windings = [abs(winding(points)) for points in (ring_and_centre, flowed, folded)]
print("windings: {:.3f} before, {:.3f} after the flow, {:.3f} folded".format(*windings), end="; ")
print(f"|x1| + |x2| up to {disc_reach:.2f} in the disc, from {ring_reach:.2f} on the ring")
assert max(abs(windings[0] - 1), abs(windings[1] - 1), windings[2]) < 1e-9 and disc_reach < ring_reach - 0.5
assert float((flowed - ring_and_centre).norm(dim=1).mean()) > 0.1, "the flow does move them"

# %% [markdown]
# Solution 2 as code: in the moving frame the field vanishes; without the motion of the frame it does not.

# %%
fields_there = []
for t in (0.0, 0.3, 0.9):
    Q_t, derivative = jvp(lambda t: torch.linalg.matrix_exp(-t * A), (torch.tensor(t),), (torch.tensor(1.0),))
    there = [float(((rate + Q_t @ A) @ torch.linalg.inv(Q_t)).abs().max()) for rate in (derivative, 0 * A)]
    fields_there.append(there)
    print(f"t = {t}: A' is {there[0]:.0e}, without the motion of the frame {there[1]:.1f}")
assert all(moved_with < 1e-12 < 0.1 < left_out for moved_with, left_out in fields_there)

# %% [markdown]
# Solution 3 as code: the field in whirled coordinates, before and after the stretch. With tanh it is another one.

# %%


def whirled_field(activation, a: float) -> torch.Tensor:
    """`f'` at the time 3.4 on the points `here`, of the layer 3 whose neurons are stretched by `a`."""
    W1, b, W2 = a * weights["W1"][3], a * weights["b"][3], weights["W2"][3] / a
    return moved(lambda t, x: activation(x @ W1.T + b) @ W2.T, whirl(1), whirl(1, -1))(3.4, here)


unseen, seen = (float((whirled_field(f, 3.0) - whirled_field(f, 1.0)).abs().max()) for f in (torch.relu, torch.tanh))
print(f"stretched by 3, f' of ReLU layers changes by {unseen:.0e}, of tanh layers by {seen:.1f}")
assert unseen < 1e-13 < 0.1 < seen

# %% [markdown]
# ## Further reading
#
# - K. Hashimoto, Y. Hirono, A. Sannai, *Unification of Symmetries Inside Neural Networks: Transformer, Feedforward and
#   Neural ODE*, arXiv 2402.02362.
# - R. T. Q. Chen, Y. Rubanova, J. Bettencourt, D. Duvenaud, *Neural Ordinary Differential Equations*, arXiv
#   1806.07366.
# - E. Dupont, A. Doucet, Y. W. Teh, *Augmented Neural ODEs*, arXiv 1904.01681.
# - D. Duvenaud, talks on neural ordinary differential equations.
# - E. Hairer, S. P. Nørsett, G. Wanner, *Solving Ordinary Differential Equations I*: orders of methods.
# - M. Nakahara, *Geometry, Topology and Physics*: connections and parallel transport.
