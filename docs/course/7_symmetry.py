# %% [markdown]
# # 7. Symmetry in data
#
# Whoever knows what "walk twice" means and hears of a new verb knows what "jump twice" means. Data have symmetries:
# exchanges of words that keep what is said. A network that does not care about its frame has none of them by that
# alone. But it can *carry* them: in such a network an exchange of tokens can be a change of frame. This chapter
# derives how, and lets a small GPT use a word in ways in which it was never seen.
#
# Letters: $G$ a finite group, $g$ and $h$ its elements; $\theta$ weights, $f_\theta$ the network, $y$ the vector that
# its answer is read from, $\pi(g)$ an exchange of tokens, $\rho(g)$ a rotation of frames, $d$ the width of the
# residual stream, $V$ tokens.

# %% [markdown]
# ## An exchange of tokens
#
# Five tokens: the letters a, b, c, which the group $S_3$ permutes, and two signs that stay. One layer of attention,
# small enough to be written out, that looks from the last token at all of them. With rows $E_t$ of the table as
# vectors $x_i$:
#
# $$y = x_T + B \sum_i \operatorname{softmax}_i\!\big(x_T \cdot A\, x_i / \sqrt d\big)\, x_i, \qquad
# f_\theta = U y, \qquad \theta = (E, A, B, U).$$
#
# Two groups act on the weights. An exchange moves rows of the tables, $(\pi(g) E)_{g t} = E_t$, as a matrix with
# $\pi_{gt,\,t} = 1$. A rotation $R$ of the stream (or a reflection) turns columns of the tables and both sides of the
# matrices:
#
# $$E \to \pi(g)\, E\, R^\top, \quad U \to \pi(g)\, U R^\top, \quad A \to R A R^\top, \quad B \to R B R^\top .$$
#
# What do they do to the function?
#
# - $f_{R\theta}(x) = f_\theta(x)$: that is what chapters 2 and 4 were about.
# - $f_{\pi(g)\theta}(\pi(g) x) = \pi(g) f_\theta(x)$: if tables *and* tokens are renamed, answers are renamed. That is
#   true of every network, and says nothing.
# - $f_\theta(\pi(g) x) = \pi(g) f_\theta(x)$, the same weights on both sides, is a symmetry, and in general false.
#
# From the second, the third holds exactly if $f_{\pi(g)\theta} = f_\theta$. Invariance, the first, does not give that.
# It gives many $\theta$ for one function; and that makes room for it.

# %%
import math
from itertools import permutations

import torch

from rigpt_hf import RiGPTConfig, RiGPTForCausalLM
from rigpt_hf.demo.commands import Commands, share_right
from rigpt_hf.demo.learners import Learner, Sizes, make_model, sizes_of, symmetry_of, train
from rigpt_hf.demo.scan import VERBS, VOCABULARY, Example, symmetries
from rigpt_hf.lab import COLOURS, chosen_seed, panels, show
from rigpt_hf.optim import EquivariantOptimizer, equivariant_param_groups
from rigpt_hf.pictures.symmetry import draw_generalisation
from rigpt_hf.symmetry import GaugeTransformation, haar
from rigpt_hf.symmetry.tokens import Representation, SymmetricTraining, TokenSymmetry, symmetrize, symmetry_error


SEED = chosen_seed()
torch.set_default_dtype(torch.float64)
generator = torch.Generator().manual_seed(SEED)
TOKENS, d = "abc.?", 8
V, LETTERS = len(TOKENS), 3
TABLES = ("E", "U")

elements = list(permutations(range(LETTERS)))  # g as the tuple of images; the first is the unit
product = torch.tensor([[elements.index(tuple(g[i] for i in h)) for h in elements] for g in elements])  # of g h
images = torch.tensor([[*g, 3, 4] for g in elements])  # where each element moves each token, [6, V]
pi = torch.nn.functional.one_hot(images, V).mT.double()  # [6, V, V]


def new_weights() -> dict[str, torch.Tensor]:
    shapes = {"E": (V, d), "A": (d, d), "B": (d, d), "U": (V, d)}
    return {name: torch.randn(shape, generator=generator) / math.sqrt(d) for name, shape in shapes.items()}


def network(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Logits `[B, V]` after tokens `[B, T]`."""
    x = weights["E"][ids]  # [B, T, d]
    scores = x[:, -1:] @ weights["A"] @ x.mT / math.sqrt(d)  # [B, 1, T]
    return (x[:, -1] + (scores.softmax(-1) @ x)[:, 0] @ weights["B"].T) @ weights["U"].T


def act(weights: dict[str, torch.Tensor], exchange: torch.Tensor, R: torch.Tensor) -> dict[str, torch.Tensor]:
    """The weights after an exchange of tokens `[V, V]` and a rotation `[d, d]`."""
    return {name: (exchange if name in TABLES else R) @ W @ R.T for name, W in weights.items()}


def asymmetry(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> float:
    """`max |f(πx) - πf(x)| / max |f(x)|` over the group."""
    here = network(weights, ids)
    there = [network(weights, image[ids])[:, image] for image in images]
    return float((torch.stack(there) - here).abs().max() / here.abs().max())


theta, ids = new_weights(), torch.randint(0, V, (64, 6), generator=generator)
logits, R, g = network(theta, ids), haar(d, generator), 3
invariance = float((network(act(theta, pi[0], R), ids) - logits).abs().max())
renamed = float((network(act(theta, pi[g], R), images[g][ids])[:, images[g]] - logits).abs().max())
free_asymmetry = asymmetry(theta, ids)
print(f"rotated {invariance:.0e}; weights and tokens renamed {renamed:.0e}; only tokens renamed {free_asymmetry:.1f}")
assert invariance < 1e-13 and renamed < 1e-13 and free_asymmetry > 0.1

# %% [markdown]
# ## Let relabelling be a rotation
#
# Suppose that for every $g$ there is a rotation $\rho(g)$ that undoes the exchange: $\pi(g)\rho(g)\theta = \theta$.
# Then $f_{\pi(g)\theta} = f_{\rho(g)^{-1}\theta} = f_\theta$ by invariance, and the network has the symmetry. For
# products to fit, $\rho(g)\rho(h) = \rho(gh)$: $\rho$ is a *representation* of $G$ in the group of rotations of the
# stream. Any will do, and all are known as soon as the smallest ones are.
#
# A representation is *irreducible* if no smaller space is mapped to itself. All irreducible ones are in one place, the
# regular representation: $G$ acting on functions on itself, $L(g)\, e_h = e_{gh}$. How to find them there? Take a
# random symmetric matrix and average it over the group:
#
# $$M = \frac1{|G|} \sum_g L(g)\, X\, L(g)^\top \quad\Rightarrow\quad L(g) M = M L(g).$$
#
# So $L(g)$ maps each eigenspace of $M$ to itself, and for a random $X$ no two irreducible parts share an eigenvalue
# but by chance: *the eigenspaces are irreducible*. With an orthonormal basis $Q$ of one, $D(g) = Q^\top L(g) Q$.
#
# Which of them are the same in another basis? Traces do not depend on a basis: the *character* is
# $\chi(g) = \operatorname{tr} D(g)$, equal characters mean equivalent. And two sums say whether all was found:
#
# $$\langle\chi, \chi\rangle = \frac1{|G|} \sum_g \chi(g)^2 = \dim \mathrm{End}, \qquad
# \sum_{\text{inequivalent}} \frac{\dim^2}{\dim \mathrm{End}} = |G| .$$
#
# $\mathrm{End}$ are the matrices that commute with all $D(g)$: multiples of one (dimension 1), or, for real matrices,
# also a copy of the complex numbers (2) or of the quaternions (4). A rotation by a quarter, with $Z_4$, commutes with
# itself: 2.

# %%


def regular(product: torch.Tensor) -> torch.Tensor:
    """`L(g)` of a multiplication table, `[|G|, |G|, |G|]`."""
    return torch.nn.functional.one_hot(product, len(product)).mT.double()


def eigenspaces(M: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Eigenvalues, and for each different one a basis `[n, multiplicity]`."""
    values, vectors = torch.linalg.eigh(M)
    return values, list(vectors.tensor_split((values.diff() > 1e-9).nonzero()[:, 0] + 1, dim=1))


def character(D: torch.Tensor) -> torch.Tensor:
    return D.diagonal(dim1=-2, dim2=-1).sum(-1)


def broken(D: torch.Tensor, product: torch.Tensor) -> float:
    """`max |D(g) D(h) - D(gh)|`."""
    return float((D[:, None] @ D[None] - D[product]).abs().max())


def inequivalent(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """One of each character, the smallest first."""
    chosen: list[torch.Tensor] = []
    for D in sorted(parts, key=lambda D: (D.shape[-1], -float(character(D).sum()))):
        if all((character(D) - character(other)).abs().max() > 1e-6 for other in chosen):
            chosen.append(D)
    return chosen


quarter = torch.arange(4)
GROUPS = {"S3": product, "Z4": (quarter[:, None] + quarter) % 4}
irreducibles, bases, spectra = {}, {}, {}
for name, table in GROUPS.items():
    L, n = regular(table), len(table)
    X = torch.randn(n, n, generator=generator)
    X = X + X.T
    values, bases[name] = eigenspaces((L @ X @ L.mT).mean(0))
    spectra[name] = values, torch.linalg.eigvalsh(X)
    parts = [Q.T @ L @ Q for Q in bases[name]]
    irreducibles[name] = inequivalent(parts)
    dims = [D.shape[-1] for D in irreducibles[name]]
    kinds = [float(character(D).square().mean()) for D in irreducibles[name]]
    counted = sum(dim**2 / kind for dim, kind in zip(dims, kinds, strict=True))
    worst = max(broken(D, table) for D in parts)
    # The control: a space of the same size that belongs to no averaged matrix.
    Q = torch.linalg.eigh(X)[1][:, :2]
    unaveraged = broken(Q.T @ L @ Q, table)
    print(
        f"{name}: {len(parts)} eigenspaces, dimensions {dims} up to equivalence, dim End {[round(k) for k in kinds]}"
    )
    print(f"    products kept to {worst:.0e}, without the mean {unaveraged:.1f}; counted {counted:.6f} of {n}")
    assert worst < 1e-12 < 0.1 < unaveraged and abs(counted - n) < 1e-9
assert sum(D.shape[-1] ** 2 for D in irreducibles["Z4"]) > 4, "without dim End the sum must fail for Z4"
table_of_characters = torch.stack([character(D) for D in irreducibles["S3"]])
print("characters of S3, one column for each element:\n", table_of_characters.round().int().numpy())
orthogonal = float((table_of_characters @ table_of_characters.T / 6 - torch.eye(3)).abs().max())
assert orthogonal < 1e-12, "characters of inequivalent representations are orthogonal"

# %% [markdown]
# The first figure: eigenvalues come together only if the mean was taken; and what the two irreducible representations
# of dimension 2 do to a point. $S_3$ is the triangle's group, three rotations and three reflections; $Z_4$ a turn by a
# quarter.

# %%
figure, (panel, second, third) = panels(3, "Irreducible representations, out of a random matrix", width=4.0)
averaged, random = spectra["S3"]
panel.plot(range(1, 7), random, "o", ms=5, color="0.6", label="random")
panel.plot(range(1, 7), averaged, "D", ms=6, color=COLOURS[0], label="averaged over S3")
panel.set(title="eigenvalues of a matrix on S3", xlabel="number", ylabel="eigenvalue")
panel.legend(frameon=False)
for other, name, colour in ((second, "S3", COLOURS[0]), (third, "Z4", COLOURS[1])):
    D = irreducibles[name][-1]
    points = D @ torch.tensor([1.0, 0.4])  # the images of a point, [|G|, 2]
    around = points[torch.atan2(*points.T.flip(0)).argsort()]
    other.fill(*around.T, color=colour, alpha=0.15)
    other.plot(*points.T, "o", ms=7, color=colour)
    other.plot(*points[0], "o", ms=11, mfc="none", color="black")
    other.set(title=f"{name}: {len(D)} images of one point", aspect="equal", xlim=(-1.5, 1.5), ylim=(-1.5, 1.5))
together = int((averaged.diff() < 1e-9).sum())
show(
    figure,
    "irreducibles",
    f"{together} of six eigenvalues equal their neighbour after the mean, and none before. The two-dimensional "
    "irreducible of S3 is a triangle's group, three rotations and three reflections; that of Z4 a turn by a quarter.",
)
assert together == 2 and float(random.diff().min()) > 1e-6

# %% [markdown]
# ## The projection
#
# $\pi$ moves rows and $\rho$ turns columns. They commute, so $\theta \to \pi(g)\rho(g)\theta$ is one linear action of
# $G$ on all weights. Those that it leaves alone are a linear space, and the way there is the mean:
#
# $$P\theta = \frac1{|G|} \sum_{g} \pi(g)\rho(g)\, \theta .$$
#
# *Proof.* With $T_g = \pi(g)\rho(g)$ and $T_h T_g = T_{hg}$: $T_h P = P$, since $hg$ runs through the group as $g$
# does. So $P\theta$ is left alone, and $P^2 = P$. Each $T_g$ is orthogonal and the mean
# has its inverse too, so $P = P^\top$: $P\theta$ is the nearest.
# Its trace is the number of free numbers: $\dim = \frac1{|G|} \sum_g \operatorname{tr} T_g$, a mean of characters.
#
# The proof needs $T_h T_g = T_{hg}$. With the wrong order, $g \to \pi(g) \rho(g)^{-1}$, which looks as natural ("undo
# on one side what was done on the other"), $\rho(h)^{-1}\rho(g)^{-1} = \rho(gh)^{-1}$: no action unless $G$ is
# abelian, and the mean is no projection.
#
# As $\rho$ take the regular representation and two coordinates that rest; and the same in the basis of eigenspaces. An
# orthogonal $C$ leads from one to the other. To a network that does not care about frames they are the same.

# %%


def projected(weights: dict[str, torch.Tensor], rho: torch.Tensor, exchanges: torch.Tensor) -> dict[str, torch.Tensor]:
    """The mean over the group; `rho` is `[|G|, d, d]`, `exchanges` `[|G|, V, V]`."""
    return {name: ((exchanges if name in TABLES else rho) @ W @ rho.mT).mean(0) for name, W in weights.items()}


def flat(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([W.flatten() for W in weights.values()])


def away(weights: dict[str, torch.Tensor], rho: torch.Tensor, exchanges: torch.Tensor) -> float:
    """`|θ - Pθ| / |θ|`."""
    return float((flat(weights) - flat(projected(weights, rho, exchanges))).norm() / flat(weights).norm())


def with_rest(D: torch.Tensor) -> torch.Tensor:
    """A representation with coordinates in front that rest, up to `d`."""
    return torch.stack([torch.block_diag(torch.eye(d - D.shape[-1]), one) for one in D])


C = with_rest(torch.cat(bases["S3"], 1)[None])[0]
RHO = {"permuting": with_rest(regular(product))}
RHO["irreducible"] = C.T @ RHO["permuting"] @ C
rho = RHO["irreducible"]
symmetric = projected(theta, rho, pi)
idempotent, carried = away(symmetric, rho, pi), asymmetry(symmetric, ids)
print(f"P P = P to {idempotent:.0e}; symmetry before {free_asymmetry:.1f}, after {carried:.0e}")

samples = torch.stack([flat(projected(new_weights(), rho, pi)) for _ in range(250)])
free, numbers = int(torch.linalg.matrix_rank(samples)), samples.shape[1]
predicted = float((2 * character(pi) * character(rho) + 2 * character(rho) ** 2).mean())
print(f"{numbers} weights, {free} of them free; from characters {predicted:.6f}")

wrong = projected(theta, rho.mT, pi)
wrong_order, wrong_function = away(wrong, rho.mT, pi), asymmetry(wrong, ids)
# Z4 turns three letters and the point into each other; it is abelian, so both orders are actions.
circle = torch.nn.functional.one_hot(torch.tensor([[(i + k) % 4 for i in range(4)] + [4] for k in range(4)]), V)
abelian = with_rest(regular(GROUPS["Z4"])), circle.mT.double()
abelian_order = away(projected(theta, abelian[0].mT, abelian[1]), abelian[0].mT, abelian[1])
print(
    f"the wrong order: P P off by {wrong_order:.2f}, symmetry {wrong_function:.1f}; for Z4 off by {abelian_order:.0e}"
)
changed = {name: (W if name in TABLES else C @ W) @ C.T for name, W in symmetric.items()}
same = float((network(changed, ids) - network(symmetric, ids)).abs().max())
moved, stale = (away(changed, one, pi) for one in (RHO["permuting"], rho))
print(
    f"in the other basis: the same function to {same:.0e}, {moved:.0e} away; from the old representation {stale:.1f}"
)
assert idempotent < 1e-14 and carried < 1e-13 and free == round(predicted) < numbers
assert wrong_order > 0.1 and wrong_function > 0.1 and abelian_order < 1e-14
assert same < 1e-13 and moved < 1e-14 and stale > 0.1

# %% [markdown]
# ## Training that stays
#
# Start at $P\theta$, and replace every gradient $\gamma$ by $P\gamma$. Gradient descent never leaves the space, as it
# is linear. What of an update $u$ that is not linear? If $u(T_h \gamma) = T_h u(\gamma)$ for all $h$, then
# $T_h \gamma = \gamma$ gives $T_h u(\gamma) = u(\gamma)$: it stays. Chapter 5 had the list. Polar factors turn with
# every rotation. Adam divides each coordinate by its own root mean square, and commutes with permutations of
# coordinates and signs, nothing else. So the same representation is safe for Adam in one basis and not in another.
#
# Why project at all, if the data have the symmetry? Because a batch does not: it has more of a than of b.
#
# A task that $S_3$ leaves alone: five letters or points and a question mark; which letter is there most often?

# %%
STEPS = 200


def batch(size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows `[size, 6]` and the letter that is most frequent in each, where there is one."""
    ids = torch.cat([torch.randint(0, 4, (4 * size, 5), generator=generator), torch.full((4 * size, 1), 4)], 1)
    counts = torch.nn.functional.one_hot(ids, V)[..., :LETTERS].sum(1)
    top = counts.sort(-1).values
    clear = (top[:, -1] > top[:, -2]).nonzero()[:size, 0]
    return ids[clear], counts[clear].argmax(-1)


def polar(G: torch.Tensor) -> torch.Tensor:
    # As in Adam a small number is added: a direction that has no gradient would be a rounding error, made large.
    L, S, Rh = torch.linalg.svd(G, full_matrices=False)
    return L @ torch.diag(S / (S.square() + 1e-8).sqrt()) @ Rh


def trained(rule: str, rho: torch.Tensor, project: bool = True) -> tuple[list[float], float]:
    """How far the weights are from the symmetry after each step, and the share of right answers at the end."""
    # The same function at the start, whatever the basis.
    start = symmetric if rho is RHO["irreducible"] else changed
    weights = {name: W.clone().requires_grad_() for name, W in start.items()}
    adam = torch.optim.AdamW(weights.values(), lr=0.02, weight_decay=0.01)
    batches, distances = torch.Generator().manual_seed(SEED), []
    for step in range(STEPS):
        ids, answers = batch(32, batches)
        gradients = torch.autograd.grad(
            torch.nn.functional.cross_entropy(network(weights, ids), answers), list(weights.values())
        )
        named = dict(zip(weights, gradients, strict=True))
        named = projected(named, rho, pi) if project else named
        if rule == "AdamW":
            for name, W in weights.items():
                W.grad = named[name]
            adam.step()
        else:
            with torch.no_grad():
                for name, W in weights.items():
                    W -= named[name] if rule == "descent" else 0.05 * (1 - step / STEPS) * polar(named[name])
        distances.append(away({name: W.detach() for name, W in weights.items()}, rho, pi))
    ids, answers = batch(2000, torch.Generator().manual_seed(SEED + 1))
    return distances, float((network(weights, ids).argmax(-1) == answers).double().mean())


runs = {
    "descent": trained("descent", RHO["irreducible"]),
    "descent, gradients as they come": trained("descent", RHO["irreducible"], project=False),
    "polar factors": trained("polar", RHO["irreducible"]),
    "AdamW, irreducible": trained("AdamW", RHO["irreducible"]),
    "AdamW, permuting": trained("AdamW", RHO["permuting"]),
}
for name, (distances, right) in runs.items():
    print(f"{name}: after {STEPS} steps {distances[-1]:.0e} away, {right:.0%} right")
stay = ("descent", "polar factors", "AdamW, permuting")
assert max(max(runs[name][0]) for name in stay) < 1e-11
assert all(runs[name][0][-1] > 1e-3 for name in runs if name not in stay)

# %% [markdown]
# The second figure: the distance along the training.

# %%
figure, (panel,) = panels(1, "Who stays among the weights that carry a symmetry", width=6.4, height=4.2)
for (name, (distances, _)), colour in zip(runs.items(), COLOURS, strict=False):
    panel.semilogy(range(1, STEPS + 1), [max(value, 1e-17) for value in distances], color=colour, lw=1.8, label=name)
panel.set(xlabel="step", ylabel="|θ - Pθ| / |θ|", ylim=(1e-17, 10))
panel.legend(frameon=False, loc="center right", fontsize=8)
show(
    figure,
    "training",
    f"Two starts that are one function in two bases. With AdamW the one in the basis of irreducibles ends "
    f"{runs['AdamW, irreducible'][0][-1]:.2f} away, the one whose coordinates are permuted "
    f"{runs['AdamW, permuting'][0][-1]:.0e}; polar factors stay in every basis.",
)

# %% [markdown]
# ## The library
#
# `rigpt_hf.symmetry.tokens` does this for a whole RiGPT: the residual stream, values of each head, and neurons, which
# can only change places. Queries and keys take part where positions are learned. Here they are rotary, and the group
# leaves queries and keys alone (exercise 3). `TokenSymmetry` is $\pi$, `Representation.choose` fills the frames with
# irreducible parts and gives $\rho$, `symmetrize` is $P$ (and gives each matrix its norm back), and `symmetry_error`
# measures the function, in nats.

# %%
sizes = {"vocab_size": V, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
config = RiGPTConfig(**sizes)
torch.manual_seed(SEED)
gpt = RiGPTForCausalLM(config).double().eval()
symmetry = TokenSymmetry.named("symmetric", [[0, 1, 2]], V)  # S3 on a, b, c
representation = Representation.choose(config, symmetry)
acted_on = set(representation.filling.frames)
learned = RiGPTConfig(**sizes, position_embedding_type="learned")
only_learned = set(Representation.choose(learned, symmetry).filling.frames) - acted_on
print(f"the group acts on {sorted(acted_on)}; with learned positions also on {sorted(only_learned)}")
assert acted_on == {"stream", "head_vo", "neurons"} and only_learned == {"head_qk"}
by_library = torch.stack([one.character for one in symmetry.group.irreducibles])
# Elements are in another order there: the values of characters are compared, sorted.
characters_apart = float((by_library.sort(1).values - table_of_characters.sort(1).values).abs().max())
print(f"order {symmetry.order}; irreducibles of dimensions {[one.dim for one in symmetry.group.irreducibles]}", end="")
print(f", characters as those by hand to {characters_apart:.0e}")

turned = GaugeTransformation.random(config, torch.Generator().manual_seed(SEED), ("stream",))(gpt)
with torch.no_grad():
    same_logits = float((turned(ids, use_cache=False).logits - gpt(ids, use_cache=False).logits).abs().max())
carrying = symmetrize(gpt, representation)
gpt_error, carrying_error = (symmetry_error(model, symmetry, ids).max for model in (gpt, carrying))
# An exchange that is not in the group: a and the point.
outside = symmetry_error(carrying, TokenSymmetry(V, [[[0, 3]]]), ids).max
gpt_free, gpt_numbers = representation.free_parameters(gpt), gpt.num_parameters()
print(
    f"rotated, RiGPT is the same to {same_logits:.0e}; as a function of renamed tokens it is {gpt_error:.1f} nats off"
)
print(f"symmetrized {carrying_error:.0e} nats; with an exchange outside of the group {outside:.1f}")
print(f"{gpt_numbers} parameters, of which {gpt_free} are free; distance {representation.distance(carrying):.0e}")
assert characters_apart < 1e-9 and same_logits < 1e-12
assert carrying_error < 1e-12 < 0.1 < min(gpt_error, outside) and gpt_free < gpt_numbers

# %% [markdown]
# Training: `SymmetricTraining` projects gradients, and refuses an optimizer whose steps would leave.

# %%
symmetric_training = SymmetricTraining(carrying, representation)
try:
    symmetric_training.begin_(torch.optim.AdamW(carrying.parameters()))
    refusal = ""
except ValueError as error:
    refusal = str(error)
print(refusal)


def twenty_steps(project: bool) -> float:
    """The distance from the symmetry after some steps."""
    model = symmetrize(gpt, representation)
    optimizer = EquivariantOptimizer(equivariant_param_groups(model, lr=0.02))
    training = SymmetricTraining(model, representation)
    training.begin_(optimizer)
    batches = torch.Generator().manual_seed(SEED)
    for _ in range(20):
        rows, _ = batch(16, batches)
        model(rows, labels=rows, use_cache=False).loss.backward()
        if project:
            training.project_gradients_()
        optimizer.step()
        optimizer.zero_grad()
    return training.distance()


kept, left = twenty_steps(True), twenty_steps(False)
print(f"equivariant optimizer, 20 steps: {kept:.0e} away; without projecting gradients {left:.0e}")
assert "whose steps leave it" in refusal and kept < 1e-10 and left > 1e-3

# %% [markdown]
# ## A word in new company
#
# SCAN (Lake and Baroni) has commands and the actions that they mean: "run around left twice", "look and walk right".
# In its split "add jump" a model sees "jump" only alone, JUMP being the answer, while walk, look and run come in all
# kinds of commands. The test consists of commands in which "jump" stands beside other words. Networks that are good at
# everything else fail: nothing tells them that "jump" is a verb like others.
#
# The symmetry: an exchange of the four verbs in a circle, in commands and in actions alike. This is knowledge that is
# put in; no model found it. There are two ways to put it in: in the weights, or in the data, whose verbs are exchanged
# at random in each row. Both are tried, beside a model that is told nothing. Answers have at most six actions, so that
# it takes seconds. An answer is right if all of its tokens are, the end too, each the likeliest after those before it.

# %%
# Training is in single precision, as it is elsewhere.
torch.set_default_dtype(torch.float32)
commands, verbs = Commands("add-jump", longest=6), symmetries()["verbs"]
LEARNERS = {
    "told nothing": (Learner(), 0.01),
    "carries it": (Learner(carries="verbs"), 0.01),
    "sees it in data": (Learner(sees="verbs"), 0.01),
}
SIZES, SCAN_STEPS = Sizes(hidden_size=48, layers=2, heads=4, positions=commands.longest), 400
print(
    f"{len(commands.trained)} commands, such as {' '.join(commands.trained[-1].command)!r}, and 'jump' alone;", end=" "
)
print(f"{len(commands.test)} to test on, such as {' '.join(commands.test[-1].command)!r}")
assert {one.command for one in commands.often} == {("jump",)}
assert all(one.command == ("jump",) for one in commands.trained if "jump" in one.command)

curves, scan, models = {}, {}, {}
for name, (learner, rate) in LEARNERS.items():
    model, points = make_model(learner, len(VOCABULARY), SIZES, SEED), []

    def measure(step: int, loss: float, model=model, points=points) -> None:
        if step % (SCAN_STEPS // 5) == 0:
            model.eval()
            samples = commands.kept_back[:96], commands.sample(96)
            points.append((step, *(share_right(model, sample)[1] for sample in samples)))
            model.train()

    batches = commands.batches(32, SEED + 1000)
    carried_by = train(
        learner, model, batches, steps=SCAN_STEPS, rate=rate, seed=SEED, symmetries={"verbs": verbs}, on_step=measure
    )
    curves[name], models[name] = points, model
    scan[name] = {
        "other verbs": share_right(model, commands.kept_back)[1],
        "jump": share_right(model, commands.test)[1],
        "nats": symmetry_of(model, verbs, carried_by, commands.asked[:64])["symmetry_error_max"],
        "free": sizes_of(model, carried_by)["free_parameters"],
    }
    shares = ", ".join(f"{key} {scan[name][key]:.1%}" for key in ("other verbs", "jump"))
    print(f"{name}: {shares} right; {scan[name]['nats']:.0e} nats off; {scan[name]['free']} free parameters")
untold, carries, sees = scan.values()
assert untold["other verbs"] > 0.9 and untold["jump"] < 0.1, "it learns all but that jump is a verb"
assert carries["jump"] > 0.9 and carries["other verbs"] > 0.85
assert carries["nats"] < 1e-2 < 0.1 < min(untold["nats"], sees["nats"])

# %% [markdown]
# Are these commands new? None was in the training as it stands. To a model that carries the symmetry, though, a
# trained command is trained under all names that exchanges give it. The cell counts how many commands are such, and
# asks each model for one command under its four names.

# %%


def exchanged(one: Example, places: int) -> Example:
    """The command and its actions after each verb went so many places around the circle."""
    new = {verb: VERBS[(i + places) % 4] for i, verb in enumerate(VERBS)}
    new |= {verb.upper(): other.upper() for verb, other in new.items()}
    return Example(*(tuple(new.get(word, word) for word in words) for words in one))


seen = {one.command for one in commands.trained}
new = {}
for name, asked in (("jump", commands.test), ("other verbs", commands.kept_back)):
    new[name] = [one for one in asked if not any(exchanged(one, i).command in seen for i in range(4))]
    known = len(asked) - len(new[name])
    print(f"{name}: {known} of {len(asked)} are trained commands after an exchange, none before")
    assert 0 < len(new[name]) < 0.2 * len(asked) and not any(one.command in seen for one in asked)
orbit, spread = [exchanged(commands.test[-1], i) for i in range(4)], {}
for name, model in models.items():
    losses = [share_right(model, [one])[0] for one in orbit]
    spread[name] = max(losses) - min(losses)
    right = share_right(model, new["other verbs"])[1]
    shown = ", ".join(f"{loss:.4f}" for loss in losses)
    print(f"{name}: {shown} nats per token; {right:.0%} right of the kept-back commands that stay new")
assert spread["carries it"] < 1e-3 < 0.1 < spread["told nothing"]

# %% [markdown]
# The third figure: commands answered right along the training. Dotted are other verbs, solid is "jump".

# %%
figure = draw_generalisation(curves)
figure.suptitle("Only models told of the symmetry answer jump")
figure.axes[0].set_ylabel("commands answered right")
show(
    figure,
    "add-jump",
    "Kept-back commands with other verbs all three learn. With jump the model that was told nothing answers "
    f"{untold['jump']:.1%} right, the one that carries the symmetry {carries['jump']:.1%}, and the one that sees it "
    f"in its data {sees['jump']:.1%}.",
)

# %% [markdown]
# Read it with care.
#
# - The model that sees exchanged data learns "jump" too, here about as well. That is no surprise: it was shown "jump"
#   in new company, under the name of an exchange. The difference is what it has at the end: a symmetry where it was
#   shown, and off by several nats at worst, instead of one up to rounding, everywhere. And all of its numbers were
#   free.
# - To the model that carries the symmetry nearly every command with "jump" is a trained command renamed. Its solid
#   line shows what it learned by heart, so the solid and the dotted line need not agree. One command under its four
#   names must give one loss, and does.
# - A symmetry that is not one of the data would be carried as faithfully, and cost.

# %% [markdown]
# ## What we saw

# %%
print(
    f"- Rotated weights: the same function, {invariance:.0e}. Renamed tokens: {free_asymmetry:.1f} off, {carried:.0e}"
)
print(f"  after the projection, with {free} free numbers instead of {numbers}.")
print(f"- Wrong order: no projection, by {wrong_order:.2f}; for an abelian group one, to {abelian_order:.0e}.")
print(f"- AdamW ends {runs['AdamW, irreducible'][0][-1]:.0e} away in the basis of irreducibles,", end=" ")
print(f"{runs['AdamW, permuting'][0][-1]:.0e} where coordinates are permuted.")
print(f"- RiGPT: {gpt_error:.1f} nats off, {carrying_error:.0e} when symmetrized.")
print(f"- jump in new company: told nothing {untold['jump']:.1%}, carried {carries['jump']:.1%}", end=" ")
print(f"({carries['nats']:.0e} nats off), seen in data {sees['jump']:.1%} ({sees['nats']:.1f} nats off).")

# %% [markdown]
# ## Exercises
#
# 1. Let $D$ be the irreducible representation of $S_3$ of dimension 2. What is the wrong mean,
#    $\frac16 \sum_g D(g)\, X\, D(g)$, and what the right one, $\frac16 \sum_g D(g)\, X\, D(g)^\top$?
# 2. A stock network multiplies its stream by gains, $x_i \to \gamma_i x_i$. Which gains let it carry $\rho$?
# 3. Rotary positions turn planes of queries and keys by angles that grow with the distance. Why can $S_3$ do nothing
#    there but through $\pm 1$?
#
# <details><summary>Solutions</summary>
#
# 1. Schur: $\frac1{|G|} \sum_g D_{ij}(g) D_{kl}(g) = \delta_{ik}\delta_{jl} / \dim$ (for $\dim \mathrm{End} = 1$). The
#    right mean is $\operatorname{tr}(X)/2$ times one, a projection. The wrong one is $X^\top/2$, and
#    taken twice $X/4$.
# 2. The diagonal matrix has to commute with all $\rho(g)$. In a basis of irreducibles its gains are equal inside each
#    of them; in the permuting basis, equal along each orbit. Nothing in a stock training keeps them so.
# 3. What commutes with turns of different planes by different angles turns and stretches each plane, and such maps
#    commute with each other (chapter 3). So every $g h g^{-1} h^{-1}$ is mapped to 1. In $S_3$ these are the three
#    rotations: what is left is a sign for the exchanges of two.
# </details>

# %% [markdown]
# Solution 1 as code.

# %%
D = irreducibles["S3"][-1]
X = torch.randn(2, 2, generator=generator, dtype=D.dtype)
right_mean, wrong_mean = (D @ X @ D.mT).mean(0), (D @ X @ D).mean(0)
assert torch.allclose(right_mean, X.trace() / 2 * torch.eye(2, dtype=D.dtype), atol=1e-12)
assert torch.allclose(wrong_mean, X.T / 2, atol=1e-12) and not torch.allclose(wrong_mean, X / 2, atol=1e-2)
print("The right mean is a multiple of one, the wrong one half of the transpose.")

# %% [markdown]
# Solution 2 as code. The representation's coordinates are two that rest, then the eigenspaces in their order.

# %%
sizes = torch.tensor([1, 1, *(basis.shape[1] for basis in bases["S3"])])
constant = torch.repeat_interleave(torch.arange(1.0, len(sizes) + 1, dtype=D.dtype), sizes)
differing = constant + 0.3 * torch.arange(d, dtype=D.dtype)
orbits = torch.tensor([1.0, 2.0, *[3.0] * 6], dtype=D.dtype)
permuting = RHO["permuting"]
alike, unlike, along, across = (
    float((gains[:, None] * R - R * gains).abs().max())
    for gains, R in ((constant, rho), (differing, rho), (orbits, permuting), (constant, permuting))
)
print(
    f"gains equal inside irreducibles: off by {alike:.0e}, different there: {unlike:.1f}; where coordinates are",
    end="",
)
print(f" permuted, equal along orbits: {along:.0e}, those of the irreducibles: {across:.1f}")
assert max(alike, along) < 1e-12 < 0.1 < min(unlike, across)

# %% [markdown]
# Solution 3 as code: whether all that commutes with the turns of two planes commutes with each other. The control
# turns both planes alike: there $S_3$ has room, as $D$ that acts on the two planes and not inside of them.

# %%
quarter_turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=D.dtype)


def commutant(*frequencies: float) -> torch.Tensor:
    """A basis `[n, 4, 4]` of all M that commute with the turns of two planes."""
    A = torch.block_diag(*(w * quarter_turn for w in frequencies))
    bracket = torch.kron(A, torch.eye(4, dtype=D.dtype)) - torch.kron(torch.eye(4, dtype=D.dtype), A.T.contiguous())
    _, values, Vh = torch.linalg.svd(bracket)
    return Vh[values < 1e-10].reshape(-1, 4, 4)


def brackets(M: torch.Tensor) -> float:
    """The largest `[M_i, M_j]`."""
    return float((M[:, None] @ M[None] - M[None] @ M[:, None]).abs().max())


different, equal = commutant(1.0, 0.1), commutant(1.0, 1.0)
both = torch.stack([torch.kron(one, torch.eye(2, dtype=D.dtype)) for one in D])
outside = [
    float((both.flatten(1) - both.flatten(1) @ M.flatten(1).T @ M.flatten(1)).norm()) for M in (equal, different)
]
inverse = (product == 0).int().argmax(1)
commutators = {int(product[product[g, h], product[inverse[g], inverse[h]]]) for g in range(6) for h in range(6)}
print(f"angles differ: {len(different)} dimensions, brackets {brackets(different):.0e}; alike: {len(equal)},", end=" ")
print(f"{brackets(equal):.1f}; D is outside by {outside[1]:.1f} and {outside[0]:.0e}; {len(commutators)} commutators")
assert brackets(different) < 1e-12 < 0.1 < brackets(equal) and outside[0] < 1e-12 < 0.1 < outside[1]
assert commutators == {i for i in range(6) if round(float(torch.det(D[i]))) == 1} and len(commutators) == 3

# %% [markdown]
# ## Further reading
#
# - J.-P. Serre, *Linear Representations of Finite Groups*: characters, in forty pages.
# - J. D. Dixon, *Computing Irreducible Representations of Groups* (1970): the mean of a random matrix.
# - B. Lake, M. Baroni, *Generalization without Systematicity*, arXiv 1711.00350: SCAN.
# - J. Gordon, D. Lopez-Paz, M. Baroni, D. Bouchacourt, *Permutation Equivariant Models for Compositional
#   Generalization in Language* (ICLR 2020): a network made for SCAN's symmetry.
# - T. Cohen, M. Welling, *Group Equivariant Convolutional Networks*, arXiv 1602.07576.
# - Y. Schiff and others, *Caduceus*, arXiv 2403.03234: DNA read from both ends.
# - E. Bekkers, *Group Equivariant Deep Learning*, lectures at the University of Amsterdam.
# - M. Bronstein, J. Bruna, T. Cohen, P. Veličković, *Geometric Deep Learning*, lectures.
# - `docs/symmetry.md` of this project, section 9.
