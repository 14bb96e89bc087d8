# %% [markdown]
# # 4. Redundant directions and conserved charges
#
# A change of weights that leaves the function alone is a gauge transformation. Two things follow from such a symmetry
# by differentiation, and both can be measured: the derivative of the function has a null space as large as the group
# (so redundant directions can be *counted*), and the gradient is perpendicular to every one of them (so some functions
# of the weights are *conserved* while a network learns).
#
# Letters: $\theta$ all weights as one vector, $f(\theta)$ the outputs, $L$ a loss that depends on $\theta$ through $f$
# only, $X$ the matrix of a generator: $\theta \to e^{tX} \theta$.

# %% [markdown]
# ## Two weights
#
# The smallest network with a symmetry is $f = w_1 w_2 x$. The stretch $w_1 \to a w_1$, $w_2 \to w_2 / a$ changes
# nothing; its orbits are hyperbolas $w_1 w_2 = \text{const}$. With $a = e^t$ the generator is
# $X = \operatorname{diag}(1, -1)$. From $L(e^{tX} \theta) = L(\theta)$, at $t = 0$:
#
# $$\nabla L \cdot X\theta = 0.$$
#
# Let the weights flow down the gradient, $\dot\theta = -\nabla L$. For a symmetric $X$
#
# $$\frac{d}{dt}\, \theta^\top X \theta = 2\, \theta^\top X \dot\theta = -2\, \nabla L \cdot X \theta = 0:$$
#
# the charge $w_1^2 - w_2^2$ is conserved, whatever the loss. (An antisymmetric $X$, a rotation, has
# $\theta^\top X \theta = 0$ anyway: no charge of this kind.) One step of size $\eta$ does not flow but jumps. Multiply
# out $(\theta - \eta \nabla L)^\top X (\theta - \eta \nabla L)$; the middle term vanishes, and the charge $Q$ changes
# by *exactly*
#
# $$\Delta Q = \eta^2\, \nabla L^\top X\, \nabla L.$$
#
# Over a fixed time there are $1/\eta$ steps, so the drift is of order $\eta$.

# %%
import copy
import math

import torch

from rigpt_hf import RiGPTConfig, RiGPTForCausalLM
from rigpt_hf.lab import COLOURS, chosen_seed, panels, show
from rigpt_hf.symmetry import charge_drift, charges, gradient_pairing, jacobian_spectrum, redundant_dimensions


SEED = chosen_seed()
torch.set_default_dtype(torch.float64)
generator = torch.Generator().manual_seed(SEED)


def gradient(w: torch.Tensor) -> torch.Tensor:
    """Of L = (w1 w2 - 1)² / 2."""
    return (w[0] * w[1] - 1) * w.flip(0)


def charge(w: torch.Tensor) -> float:
    return float(w[0] ** 2 - w[1] ** 2)


def descend(start: torch.Tensor, rate: float, steps: int) -> torch.Tensor:
    """The points `[steps + 1, 2]` of gradient descent."""
    path = [start]
    for _ in range(steps):
        path.append(path[-1] - rate * gradient(path[-1]))
    return torch.stack(path)


def adam(start: torch.Tensor, rate: float, steps: int) -> torch.Tensor:
    """The same with Adam, from the library."""
    w = start.clone().requires_grad_()
    optimizer, path = torch.optim.Adam([w], lr=rate), [start]
    for _ in range(steps):
        w.grad = gradient(w.detach())
        optimizer.step()
        path.append(w.detach().clone())
    return torch.stack(path)


start = torch.tensor([2.0, -0.8])
step = gradient(start)
exact = charge(start - 0.1 * step) - charge(start) - 0.1**2 * charge(step)
paths = {
    "nearly the flow: descent, η = 0.001": descend(start, 0.001, 5000),
    "descent, η = 0.1": descend(start, 0.1, 60),
    "Adam, step 0.05": adam(start, 0.05, 200),
}
for name, path in paths.items():
    print(f"{name}: charge {charge(start):.3f} -> {charge(path[-1]):.3f}, ends at {path[-1].numpy().round(3)}")
drifts = [charge(path[-1]) - charge(start) for path in paths.values()]
print(f"one step, predicted change of the charge less the measured one: {exact:.0e}")
assert abs(exact) < 1e-14 and abs(drifts[0]) < 0.01 < abs(drifts[1]) and abs(drifts[2]) > 0.3
assert all(abs(float(path[-1].prod()) - 1) < 0.02 for path in paths.values()), "all must have learned"

# %% [markdown]
# The figure: grey hyperbolas are orbits (one function each), the dashed one is the solution. The flow crosses them at
# right angles, along the broad hyperbola of constant charge.

# %%
figure, (panel,) = panels(1, "Gradient flow conserves $w_1^2 - w_2^2$, Adam does not", width=6.4, height=5.4)
grid = torch.linspace(-1.1, 3, 300)
first, second = torch.meshgrid(grid, grid, indexing="xy")
# Without a style of line, negative levels would be dashed, as the solution is.
solid = {"colors": "0.75", "linewidths": 0.8, "linestyles": "solid"}
panel.contour(first, second, first * second, levels=[-1.6, -1.1, -0.6, -0.1, 0.4, 1.6], **solid)
panel.contour(first, second, first * second, levels=[1.0], colors="black", linestyles="--", linewidths=1)
panel.contour(first, second, first**2 - second**2, levels=[charge(start)], colors=COLOURS[2], linewidths=4, alpha=0.3)
for (name, path), colour, marker in zip(
    paths.items(), (COLOURS[2], COLOURS[0], COLOURS[1]), ("", "o", "."), strict=True
):
    panel.plot(*path.T, marker + "-", ms=4, lw=1.2, color=colour, label=name)
panel.plot(*start, "k*", ms=11)
panel.set(xlabel="$w_1$", ylabel="$w_2$", xlim=(0.4, 2.9), ylim=(-1.1, 1.2), aspect="equal")
panel.legend(frameon=False, loc="lower left", fontsize=8)
show(
    figure,
    "orbits",
    f"All three end on the dashed orbit. The flow keeps $w_1^2 - w_2^2$ (change {drifts[0]:+.3f}), descent in large "
    f"steps does not quite ({drifts[1]:+.2f}), and Adam does not at all ({drifts[2]:+.2f}).".replace("$", ""),
)

# %% [markdown]
# ## Counting by a rank
#
# Differentiate $f(e^{tX} \theta) = f(\theta)$ at $t = 0$: $J X\theta = 0$ with $J = \partial f / \partial \theta$. So
# every generator gives a null vector $X\theta$ of the Jacobian, and for generic weights these are independent: the
# rank of $J$ falls short of the number of weights by at least the dimension of the group. For $W_2\, \sigma(W_1 x)$
# with $F$ neurons:
#
# - $\sigma(z) = z$: $W_1 \to M W_1$, $W_2 \to W_2 M^{-1}$ with any invertible $M$: $F^2$ dimensions;
# - ReLU: $\sigma(az) = a\,\sigma(z)$ for $a > 0$ only, one number per neuron: $F$ dimensions;
# - tanh: signs and permutations only, which are no directions: 0.

# %%
F, INPUTS, OUTPUTS = 4, 5, 6
points = torch.randn(60, INPUTS, generator=generator)
weights = torch.randn(F * INPUTS + OUTPUTS * F, generator=generator)


def deficiency(activation) -> int:
    """Number of weights less the rank of the Jacobian of all outputs on all points."""

    def outputs(theta: torch.Tensor) -> torch.Tensor:
        W1, W2 = theta[: F * INPUTS].reshape(F, INPUTS), theta[F * INPUTS :].reshape(OUTPUTS, F)
        return (activation(points @ W1.T) @ W2.T).flatten()

    J = torch.func.jacrev(outputs)(weights)  # [60 · OUTPUTS, weights]
    values = torch.linalg.svdvals(J)
    return int((values < 1e-10 * values[0]).sum())


measured = {name: deficiency(f) for name, f in {"linear": lambda z: z, "ReLU": torch.relu, "tanh": torch.tanh}.items()}
print(f"{len(weights)} weights, redundant directions: {measured}")
assert measured == {"linear": F**2, "ReLU": F, "tanh": 0}

# %% [markdown]
# ## Counting in a GPT
#
# The same for a RiGPT (its equations: end of chapter 2), small enough that all singular values can be had. A *frame*
# is a basis of one of its inner spaces that may be chosen freely; the library's table of frames says for every weight
# in which frames its rows and columns are written. It counts $O(d)$ for the stream, $GL(h)$ for queries and keys and
# for values and outputs of every head, and $GL(D)$ for the *lexical* frame: a row of the token table has $D$ numbers,
# which one matrix brings into the stream and another one brings back. Each number must be found again in the Jacobian.
#
# Three controls. A tanh of every coordinate after one norm has a basis: the rotations of the stream are no symmetry
# any more, and $d(d-1)/2$ directions less are redundant. A gain in its place does *not* change the number: the
# matrices after it can follow a rotation by $W \to W g Q^\top g^{-1}$. It changes how the group acts (as chapter 2
# folds it away), and the next section will see that. With $\epsilon = 0$ in the norms one direction more is redundant,
# the size of the stream (exercise 2 of chapter 2). With a small $\epsilon$ scaling the stream is *nearly* redundant,
# which would blur the count, so the cell takes a large one.

# %%
options = {"vocab_size": 9, "embedding_size": 6, "hidden_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2}
options |= {"head_dim": 3, "intermediate_size": 5, "max_position_embeddings": 7}
options |= {"position_embedding_type": "learned", "initializer_range": 0.5}


def small_model(eps: float) -> RiGPTForCausalLM:
    torch.manual_seed(SEED)
    return RiGPTForCausalLM(RiGPTConfig(**options, rms_norm_eps=eps)).double().eval()


tiny = small_model(eps=0.1)
ids = torch.randint(0, 9, (24, 7), generator=generator)

counted = redundant_dimensions(tiny.config)
spectrum = jacobian_spectrum(tiny, ids, torch.Generator().manual_seed(SEED))
d, h, H, D = 6, 3, 2, 6
by_hand = {"stream": d * (d - 1) // 2, "lexical": D**2, "head_qk": H * h**2, "head_vo": H * h**2}
by_hand["total"] = sum(by_hand.values())
print({name: number for name, number in counted.items() if number})
size = len(spectrum.singular_values)
print(f"{size} weights, rank {spectrum.rank}, {spectrum.deficiency} redundant, gap {spectrum.gap:.0e}")
assert {name: number for name, number in counted.items() if number} == by_hand
assert spectrum.deficiency == by_hand["total"] and spectrum.gap > 1e8


def after_norm(change) -> RiGPTForCausalLM:
    """A copy of the model in which what leaves the first norm is changed, by no weight of its own."""
    changed = copy.deepcopy(tiny)
    changed.model.layers[0].input_layernorm.register_forward_hook(lambda module, inputs, output: change(output))
    return changed


gain = 1 + 0.3 * torch.randn(d, generator=generator)
with_gain, with_tanh = after_norm(lambda x: x * gain), after_norm(torch.tanh)
controls = [
    jacobian_spectrum(each, ids, torch.Generator().manual_seed(SEED)).deficiency
    for each in (with_gain, with_tanh, small_model(eps=0.0))
]
print(f"with a gain after one norm: {controls[0]} redundant; with tanh of every coordinate: {controls[1]};", end=" ")
print(f"without eps: {controls[2]}")
assert controls == [by_hand["total"], by_hand["total"] - by_hand["stream"], by_hand["total"] + 1]

# %% [markdown]
# The figure: all singular values in order. The cliff is where redundancy begins.

# %%
figure, (panel,) = panels(1, "Singular values of the derivative of a GPT by its weights", width=6.4)
panel.semilogy(range(1, size + 1), spectrum.singular_values.clamp_min(1e-18), ".", ms=4, color=COLOURS[0])
panel.axvline(size - counted["total"] + 0.5, color=COLOURS[1], ls="--", lw=1, label="counted from the table of frames")
panel.axvspan(size - counted["total"] + 0.5, size + 0.5, color=COLOURS[1], alpha=0.12)
panel.set(xlabel="number of the singular value", ylabel="singular value")
panel.legend(frameon=False, loc="lower left")
show(
    figure,
    "spectrum",
    f"{spectrum.deficiency} directions in the space of {size} weights change nothing, as many as the table of frames "
    f"counts; the singular values fall by a factor of {spectrum.gap:.0e} there.",
)

# %% [markdown]
# ## Noether's pairing for the stream
#
# For the stream all generators are antisymmetric. Writers move by $W \to e^{tX} W$, readers by $W \to W e^{-tX}$. So
# the pairing of the gradient with $X$ is
#
# $$\sum_{\text{writers}} \langle \nabla W, X W \rangle - \sum_{\text{readers}} \langle \nabla W, W X \rangle =
# \Big\langle X,\ \sum_{\text{writers}} \nabla W\, W^\top - \sum_{\text{readers}} W^\top \nabla W \Big\rangle,$$
#
# and it is zero for all antisymmetric $X$ exactly if the antisymmetric part of that matrix is zero: one $d \times d$
# equation among all gradients of the network. It holds for every loss and every text.

# %%


def noether_matrix(model: torch.nn.Module) -> tuple[torch.Tensor, float]:
    """The antisymmetric matrix by hand, and the size of what cancels in it."""
    loss = model(ids, labels=ids, use_cache=False).loss
    parameters = dict(model.named_parameters())
    gradients = dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))
    total, scale = torch.zeros(d, d), 0.0
    for name, W in parameters.items():
        W, g = W.detach(), gradients[name]
        if name.endswith(("o_proj.weight", "down_proj.weight", "project_in.weight")):  # [d, anything]
            term = g @ W.T
        elif name.endswith("embed_positions.weight"):  # rows are vectors of the stream
            term = g.T @ W
        elif name.endswith("embed_tokens.weight"):
            continue  # lives in the lexical frame
        else:
            term = -(W.T @ g)
        total, scale = total + (term - term.T), scale + float(term.norm())
    return total, scale


matrix, scale = noether_matrix(tiny)
broken, broken_scale = noether_matrix(with_gain)
pairing = gradient_pairing(tiny, lambda model: model(ids, labels=ids, use_cache=False).loss)
print(f"by hand {float(matrix.norm()) / scale:.0e}; with a gain {float(broken.norm()) / broken_scale:.1e}")
print("by the library:", {name: f"{value.relative:.0e}" for name, value in pairing.items()})
assert float(matrix.norm()) / scale < 1e-14 < 1e-4 < float(broken.norm()) / broken_scale
assert all(value.relative < 1e-12 for value in pairing.values())

# %% [markdown]
# ## Charges of a GPT
#
# Stretches of a head's space are symmetric generators. Values and outputs, $v \to M v$, $o \to o M^{-1}$ with
# $M = e^{tX}$, $X = X^\top$, give one conserved matrix per head, $v v^\top - o^\top o$; queries and keys
# $q q^\top - k k^\top$; the tokens one more. Rotations give none. First by hand for one head, then all of them at
# three step sizes: the order in the step must be 1. With weight decay, $\dot\theta = -\nabla L - \mu \theta$, the same
# differentiation gives $\dot Q = -2\mu Q$: decay forgets the charges at a rate that no loss can change.

# %%
attention = tiny.model.layers[0].self_attn
v, o = attention.v_proj.weight.detach()[:h], attention.o_proj.weight.detach()[:, :h]
by_library = charges(tiny)["layers.0.head_vo"]  # [heads, h, h]
same, other = (float((v @ v.T - o.T @ o - by_library[head]).norm() / by_library[head].norm()) for head in (0, 1))
print(f"v vᵀ - oᵀo by hand against the library's charge: {same:.0e}; against that of the other head: {other:.1f}")
assert same < 1e-14 < 0.1 < other

RATES = (0.04, 0.02, 0.01)
TIME = 0.8
report = charge_drift(tiny, ids, learning_rates=RATES, time=TIME, progress=False)
decaying = charge_drift(tiny, ids, learning_rates=(0.01,), time=TIME, weight_decay=0.5, progress=False)
kinds = [kind for kind, order in report.orders.items() if order == order]
for kind in kinds:
    kept = f"{decaying.measured_rates[kind]:.3f} (predicted {decaying.predicted_rates[kind]:.3f})"
    print(f"{kind}: order of the drift {report.orders[kind]:.3f}, rate of decay {kept}")
assert len(kinds) == 3 and all(abs(report.orders[kind] - 1) < 0.1 for kind in kinds)

# %% [markdown]
# ## Adam destroys them
#
# Adam divides every entry of the gradient by a length of its own, so the update is not $\nabla L$ and the pairing says
# nothing about it. Small steps do not help: it follows another flow. To compare fairly, Adam goes on from the same
# weights until it has the loss that descent ended with.

# %%


def drift_of_adam(rate: float, goal: float) -> tuple[float, int]:
    """Drift of all charges, relative to the squared norm of the weights, when Adam has reached the loss `goal`."""
    model = copy.deepcopy(tiny)
    before, optimizer = charges(model), torch.optim.Adam(model.parameters(), lr=rate)
    size = sum(float(parameter.detach().square().sum()) for parameter in model.parameters())
    steps = 0
    while (loss := model(ids, labels=ids, use_cache=False).loss).item() > goal:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    moved = [charges(model)[key] - value for key, value in before.items()]
    return float(torch.cat([change.flatten() for change in moved]).norm()) / size, steps


def drift_of_descent(rate: float) -> tuple[float, float]:
    """The same for gradient descent over the time TIME, and the loss it ends with."""
    model = copy.deepcopy(tiny)
    before = charges(model)
    size = sum(float(parameter.detach().square().sum()) for parameter in model.parameters())
    for _ in range(round(TIME / rate)):
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= rate * parameter.grad
    moved = [charges(model)[key] - value for key, value in before.items()]
    loss = float(model(ids, labels=ids, use_cache=False).loss.detach())
    return float(torch.cat([change.flatten() for change in moved]).norm()) / size, loss


by_descent = [drift_of_descent(rate) for rate in RATES]
by_adam = [drift_of_adam(rate, by_descent[-1][1]) for rate in (0.004, 0.002, 0.001)]
begin = float(tiny(ids, labels=ids, use_cache=False).loss.detach())
print(f"loss {begin:.3f} -> {by_descent[-1][1]:.3f}")
print("descent:", {rate: f"{drift:.1e}" for rate, (drift, _) in zip(RATES, by_descent, strict=True)})
print("Adam:", {steps: f"{drift:.1e}" for drift, steps in by_adam}, "(by number of steps)")
assert by_descent[0][0] / by_descent[-1][0] > 3.5, "four times smaller steps, four times less drift"
assert 0.7 < by_adam[0][0] / by_adam[-1][0] < 1.5, "smaller steps of Adam do not help"
assert by_adam[-1][0] > 5 * by_descent[-1][0]

# %% [markdown]
# The last figure: drift against the size of a step, each relative to its own largest.

# %%
figure, (panel, second) = panels(
    2, "Descent keeps charges as steps shrink; Adam does not; decay takes them at the rate 2μ"
)
relative = [1.0, 0.5, 0.25]
panel.loglog(relative, [drift for drift, _ in by_descent], "o-", color=COLOURS[0], label="gradient descent")
panel.loglog(relative, [drift for drift, _ in by_adam], "s-", color=COLOURS[1], label="Adam, to the same loss")
panel.loglog(relative, [by_descent[0][0] * x for x in relative], ":", color="0.4", label="order 1")
panel.set(xlabel="step size, relative to the largest", ylabel="drift of all charges / |θ|²")
panel.set_xticks(relative, ["1", "1/2", "1/4"])
panel.minorticks_off()
panel.legend(frameon=False)
descent = decaying.descents[0]
for kind, colour, marker in zip(kinds, COLOURS, "os^", strict=False):
    second.semilogy(descent.times, descent.kept[kind], marker, color=colour, mfc="none", label=kind)
second.semilogy(descent.times, [math.exp(-time) for time in descent.times], color="0.5", label="exp(-2μt), μ = 0.5")
second.set(xlabel="time (steps × step size)", ylabel="what is left of a charge")
second.legend(frameon=False)
show(
    figure,
    "drift",
    f"Descent in steps four times smaller drifts {by_descent[0][0] / by_descent[-1][0]:.1f} times less, so its drift "
    f"goes to zero with the step. Adam's stays at {by_adam[-1][0]:.1%} of |θ|² at all three sizes. Weight decay takes "
    "all charges away at one rate.",
)

# %% [markdown]
# ## What we saw

# %%
print(f"- Redundant directions of W2 σ(W1 x): {measured}, as the groups say.")
print(f"- A GPT of {size} weights has {spectrum.deficiency} redundant directions, counted and measured.")
print(f"- One antisymmetric matrix of its gradients vanishes to {float(matrix.norm()) / scale:.0e}.")
print(f"- Charges drift with the order {report.orders['head_vo']:.2f} in the step under gradient descent.")
print(f"- Adam, at the same loss, moves them by {by_adam[-1][0]:.1%} of |θ|² however small its steps.")

# %% [markdown]
# ## Exercises
#
# 1. Find the charge of a neuron with the activation $\max(z, 0)^2$.
# 2. The softmax does not change when one number is added to all scores. Which weights does that make redundant if keys
#    have biases, and what is conserved?
# 3. Show that among all points of one hyperbola $w_1 w_2 = c$ the shortest has zero charge. What does weight decay do?
#
# <details><summary>Solutions</summary>
#
# 1. $w \to a w$ (row of the first matrix), $d \to a^{-2} d$ (column of the second): $X$ has the entries 1 and $-2$, so
#    $|w|^2 - 2 |d|^2$.
# 2. A vector $c$ added to all keys of a head adds $q \cdot c$ to all scores of a query: the bias of the keys is
#    redundant. The symmetry is a translation, so $\nabla L \cdot c = 0$: the bias has no gradient and stays.
# 3. $|\theta|^2$ along $(e^t w_1, e^{-t} w_2)$ has the derivative $2 (w_1^2 - w_2^2)$ at $t = 0$ and is convex. Decay
#    makes the charge $e^{-2\mu t}$ times smaller, so it leads to the shortest point: it fixes the gauge.
# </details>

# %% [markdown]
# Solution 1 as code: the gradient of a random loss is perpendicular to the motion of each neuron, for the activation
# $\max(z, 0)^2$ and the degree 2 only.

# %%
W1 = torch.randn(F, INPUTS, generator=generator, requires_grad=True)
W2 = torch.randn(OUTPUTS, F, generator=generator, requires_grad=True)
shapes = {"relu²": lambda z: z.relu() ** 2, "tanh": torch.tanh}
along = {}
for name, degree in (("relu²", 2), ("relu²", 1), ("tanh", 2)):
    loss = (shapes[name](points @ W1.T) @ W2.T).sin().mean()
    first, second = torch.autograd.grad(loss, (W1, W2))
    along[name, degree] = float(((first * W1).sum(1) - degree * (second * W2).sum(0)).detach().abs().max())
    print(f"{name}, degree {degree}: <∇L, Xθ> = {along[name, degree]:.0e}")
assert along.pop(("relu²", 2)) < 1e-14 < min(along.values())

# %% [markdown]
# Solution 2 as code: one head of attention with biases on queries and keys. The bias of the queries is the control.

# %%
x, W_q, W_k, W_v = torch.randn(4, 8, 8, generator=generator)
biases = torch.randn(2, 8, generator=generator)


def attended(biases: torch.Tensor) -> torch.Tensor:
    """Outputs `[positions, 8]` with biases `[2, 8]` on queries and keys."""
    scores = (x @ W_q + biases[0]) @ (x @ W_k + biases[1]).T / 8**0.5
    return scores.softmax(-1) @ x @ W_v


for_queries, for_keys = torch.func.grad(lambda biases: attended(biases).sin().mean())(biases).norm(dim=-1)
added = [float((attended(biases + shift) - attended(biases)).abs().max()) for shift in torch.eye(2)[..., None]]
print(f"gradients: of the bias of queries {float(for_queries):.0e}, of keys {float(for_keys):.0e}")
print(f"1 added to the bias of queries changes outputs by {added[0]:.1f}, of keys by {added[1]:.0e}")
assert max(for_keys, added[1]) < 1e-13 < 1e-4 < min(for_queries, added[0])

# %% [markdown]
# Solution 3 as code: the shortest of many points of a hyperbola, and descent with decay and without. Where decay ends
# can be computed: there $(w^2 - 1)\, w + \mu w = 0$, so $w_1 = w_2 = \sqrt{1 - \mu}$.

# %%
stretch = torch.linspace(-2, 2, 4001).exp()
hyperbola = torch.stack([1.7 * stretch, 0.4 / stretch], 1)  # [4001, 2], all with the product 0.68
shortest = hyperbola[hyperbola.square().sum(1).argmin()]
mu, rate, begin = 0.3, 0.01, torch.tensor([2.0, 0.2])
w, free = begin, descend(begin, rate, 4000)[-1]
kept = []
for _ in range(4000):
    kept.append(charge(w) / charge(begin))
    w = w - rate * (gradient(w) + mu * w)
print(f"shortest point {shortest.numpy().round(2)}: charge {charge(shortest):.3f}")
print(f"with decay {kept[200]:.4f} of the charge after the time 2, exp(-4μ) = {math.exp(-4 * mu):.4f}", end="")
print(f"; at the end {w.numpy().round(4)}, without decay {free.numpy().round(2)}")
assert abs(charge(shortest)) < 2e-3 < 1 < charge(hyperbola[-1]) and abs(kept[200] / math.exp(-4 * mu) - 1) < 0.02
assert torch.allclose(w, torch.full((2,), (1 - mu) ** 0.5), atol=1e-4) and charge(free) > 0.9 * charge(begin)

# %% [markdown]
# ## Further reading
#
# - E. Noether, *Invariante Variationsprobleme* (1918).
# - D. Kunin and others, *Neural Mechanics: Symmetry and Broken Conservation Laws in Deep Learning Dynamics*, arXiv
#   2012.04728.
# - K. Hashimoto, Y. Hirono, A. Sannai, *Unification of Symmetries Inside Neural Networks: Transformer, Feedforward and
#   Neural ODE*, arXiv 2402.02362.
# - A. Saxe, J. McClelland, S. Ganguli, *Exact solutions to the nonlinear dynamics of learning in deep linear neural
#   networks*, arXiv 1312.6120.
# - L. Susskind, *The Theoretical Minimum: Classical Mechanics*, lectures at Stanford: symmetries and what they
#   conserve.
# - G. Kempf, L. Ness, *The length of vectors in representation spaces* (1979): shortest points of orbits.
# - `docs/symmetry.md` of this project, sections 4 to 6.
