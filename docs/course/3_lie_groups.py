# %% [markdown]
# # 3. Rotations
#
# Everything in this project that may be turned is turned by matrices with $Q^\top Q = I$. This chapter makes friends
# with them: how they are generated, which path between two of them is straight, how to draw one at random without
# favouring any, and what positions may do to queries and keys. Rotary positions (RoPE) are a one-parameter subgroup of
# the rotations, and the general case if one linear map of a position acts on queries and keys alike.
#
# Letters: $O(n)$ all $n \times n$ matrices with $Q^\top Q = I$; $SO(n)$ those with determinant 1; $\mathfrak{so}(n)$
# its Lie algebra; $[X, Y] = XY - YX$; $|X|$ the root of the sum of squares of all entries.

# %% [markdown]
# ## Generators
#
# Let $Q(t)$ be a curve in $O(n)$ with $Q(0) = I$. Differentiate $Q^\top Q = I$ at 0: $\dot Q^\top + \dot Q = 0$.
# Velocities at the identity are skew: $A^\top = -A$, which leaves $n(n-1)/2$ numbers, one for every plane $(i, j)$.
# Back again: $e^{A} = \sum_k A^k / k!$ has $(e^{A})^\top e^{A} = e^{-A} e^{A} = I$, and
# $\det e^{A} = e^{\operatorname{tr} A} = 1$.
#
# In three dimensions let $K$ turn around a unit axis: $K v = k \times v$. Then $K^3 = -K$, and the series falls into
# three parts (Rodrigues):
#
# $$e^{\theta K} = I + \sin\theta\, K + (1 - \cos\theta)\, K^2.$$
#
# In $n$ dimensions a skew matrix is a sum $\sum_i \omega_i J_i$ of generators of rotations in perpendicular planes (it
# is normal with imaginary eigenvalues $\pm i \omega_i$). These commute, so its exponential is the product of the
# rotations by $\omega_i$. The logarithm reads these angles off a rotation, in $(-\pi, \pi]$.

# %%
import math

import torch
from scipy import stats

from rigpt_hf import RiGPTConfig
from rigpt_hf.lab import COLOURS, chosen_seed, panels, show
from rigpt_hf.symmetry import haar, rotary_form, so_exp, so_log, table_of


SEED = chosen_seed()
torch.set_default_dtype(torch.float64)
generator = torch.Generator().manual_seed(SEED)


def skew(n: int) -> torch.Tensor:
    """A random element of so(n)."""
    X = torch.randn(n, n, generator=generator)
    return (X - X.T) / 2


axis = torch.nn.functional.normalize(torch.randn(3, generator=generator), dim=0)
K = torch.linalg.cross(axis.expand(3, 3), torch.eye(3)).T  # its columns are k × e_j
theta = 1.3
rodrigues = torch.eye(3) + math.sin(theta) * K + (1 - math.cos(theta)) * K @ K
n = 6
A = skew(n)
A = A * 2.5 / torch.linalg.matrix_norm(A, 2)  # its largest angle is 2.5 < π
Q = so_exp(A)
symmetric = torch.randn(n, n, generator=generator)

print(f"Rodrigues: {float((rodrigues - so_exp(theta * K)).abs().max()):.0e}")
print(f"exp(A) is orthogonal to {float((Q.T @ Q - torch.eye(n)).abs().max()):.0e}, det {float(torch.det(Q)):.6f}")
print(f"log exp(A) = A: {float((so_log(Q) - A).abs().max()):.0e}")
angles = torch.linalg.eigvals(Q).angle().sort().values
print("angles of the planes:", [round(float(angle), 3) for angle in angles[n // 2 :]])
omegas, planes = rotary_form(A)  # plane i is spanned by the columns i and i + n/2
pairs = zip(omegas, planes.T[: n // 2], planes.T[n // 2 :], strict=True)
parts = [omega * (second.outer(first) - first.outer(second)) for omega, first, second in pairs]
product = torch.linalg.multi_dot([so_exp(part) for part in parts])
corner = torch.zeros(n, n)
corner[0], corner[:, 0] = A[0], A[:, 0]
mixed = so_exp(corner) @ so_exp(A - corner)  # A is the sum of these two as well, but they do not commute
print(f"A - Σ ωJ: {float((A - sum(parts)).abs().max()):.0e}, ", end="")
print(f"Q - Π exp(ωJ): {float((Q - product).abs().max()):.0e}, ", end="")
print(f"for two parts that do not commute {float((Q - mixed).abs().max()):.1f}")
assert torch.allclose(sum(parts), A, atol=1e-12) and torch.allclose(product, Q, atol=1e-12)
assert not torch.allclose(mixed, Q, atol=0.05), "the corner does not commute with the rest"
assert torch.allclose(rodrigues, so_exp(theta * K), atol=1e-14) and torch.allclose(so_log(Q), A, atol=1e-12)
assert torch.allclose(Q.T @ Q, torch.eye(n), atol=1e-14)
wrong = so_exp(symmetric + symmetric.T)
assert not torch.allclose(wrong.T @ wrong, torch.eye(n), atol=0.1), "what is not skew generates no rotation"

# %% [markdown]
# $O(n)$ has two pieces: the determinant is continuous and takes no values but $\pm 1$, so no path joins a reflection
# to the identity, and a reflection has no logarithm.

# %%
mirror = torch.diag(torch.tensor([-1.0] + [1.0] * (n - 1)))
try:
    so_log(mirror @ Q)
    raise AssertionError("a reflection must have no logarithm")
except ValueError as error:
    print(error)

# %% [markdown]
# ## How far rotations are from commuting
#
# Expand $e^{sX} e^{sY}$ to second order in $s$ and compare with $e^{s(X + Y)}$: the first has
# $s^2 (X^2/2 + XY + Y^2/2)$, the second $s^2 (X^2 + XY + YX + Y^2)/2$. The difference is $s^2 [X, Y] / 2$ (Baker,
# Campbell, Hausdorff):
#
# $$e^{sX} e^{sY} = \exp\!\big(s(X + Y) + \tfrac{s^2}{2} [X, Y] + O(s^3)\big).$$
#
# So the error is of order 2 without the bracket and of order 3 with it. If $[X, Y] = 0$ there is none.

# %%
X, Y = skew(n), skew(n)
sizes = torch.tensor([0.1, 0.05, 0.025, 0.0125])
plain, with_bracket, commuting = [], [], []
for s in sizes:
    product = so_exp(s * X) @ so_exp(s * Y)
    plain.append((product - so_exp(s * (X + Y))).norm())
    with_bracket.append((product - so_exp(s * (X + Y) + s**2 / 2 * (X @ Y - Y @ X))).norm())
    commuting.append((so_exp(s * X) @ so_exp(2 * s * X) - so_exp(3 * s * X)).norm())


def order(errors: list[torch.Tensor]) -> float:
    """The slope of log error against log size."""
    return float((errors[0] / errors[-1]).log() / (sizes[0] / sizes[-1]).log())


orders = order(plain), order(with_bracket)
print(f"orders {orders[0]:.2f} and {orders[1]:.2f}; for commuting generators {float(max(commuting)):.0e}")
assert abs(orders[0] - 2) < 0.1 and abs(orders[1] - 3) < 0.1 and max(commuting) < 1e-10

# %% [markdown]
# ## Straight lines in a curved space
#
# Let $\Omega = Q^\top \dot Q$ be the angular velocity. Which path between two rotations has the least energy
# $\tfrac12 \int |\Omega|^2 dt$? Vary $Q \to Q e^{\epsilon \eta}$ with $\eta = 0$ at the ends. Then
# $\delta \Omega = \dot\eta + [\Omega, \eta]$, and
#
# $$\delta E = \int \langle \Omega, \dot\eta + [\Omega, \eta] \rangle\, dt = -\int \langle \dot\Omega, \eta
# \rangle\, dt,$$
#
# because $\langle \Omega, [\Omega, \eta] \rangle = 0$ (the trace is cyclic). So $\dot\Omega = 0$: a free spherical top
# spins at a constant rate, and geodesics are $Q(t) = e^{tA}$. The distance of $Q$ from the identity is $|A| =
# |\log Q| = \sqrt{2 \sum \omega_i^2}$.
#
# The straight line $(1 - t) I + t Q$ leaves the group. In a plane of angle $\omega$ it is $1 - t + t e^{i\omega}$,
# whose size in the middle is $\cos(\omega / 2)$: a vector halfway has kept that share of its length and lost
# $1 - \cos(\omega / 2)$.

# %%
t = torch.linspace(0, 1, 201)
geodesic = torch.stack([so_exp(s * A) for s in t])  # [201, n, n]
straight = torch.eye(n) + t[:, None, None] * (Q - torch.eye(n))


def length(path: torch.Tensor) -> float:
    """Length of a path `[points, n, n]`, from point to point."""
    return float((path[1:] - path[:-1]).norm(dim=(1, 2)).sum())


detours = []
for size in (0.0, 0.05, 0.1, 0.2, 0.4):
    bend = skew(n)
    bent = torch.stack([so_exp(s * A) @ so_exp(size * math.sin(math.pi * s) * bend / bend.norm()) for s in t])
    detours.append((size, length(bent)))
print(f"|log Q| = {float(A.norm()):.4f}, length of the geodesic {length(geodesic):.4f}")
print("with a bend:", {size: f"{value:.4f}" for size, value in detours})
lowest = torch.linalg.svdvals(straight)[:, -1]  # [201]
print(f"middle of the straight line: a vector keeps {float(lowest[100]):.4f}, cos(ω/2) = {math.cos(1.25):.4f}")
assert abs(length(geodesic) - float(A.norm())) < 1e-3 and abs(float(lowest[100]) - math.cos(1.25)) < 1e-12
assert all(value > length(geodesic) for size, value in detours if size), "a bend must be a detour"
assert torch.allclose(torch.linalg.svdvals(geodesic), torch.ones(()), atol=1e-12)

# %% [markdown]
# The figure: what both paths do to lengths. The upper edge of the shaded band is the longest image of a unit vector,
# the lower edge the shortest.

# %%
figure, (panel, second) = panels(2, "The geodesic keeps all lengths, the straight line does not")
for path, name, colour in ((straight, "straight line", COLOURS[1]), (geodesic, "geodesic", COLOURS[0])):
    values = torch.linalg.svdvals(path)
    panel.fill_between(t, values[:, -1], values[:, 0], color=colour, alpha=0.3)
    panel.plot(t, values[:, -1], color=colour, lw=2, label=name)
panel.set(xlabel="t", ylabel="length of the image of a unit vector", ylim=(0, 1.1))
panel.legend(frameon=False, loc="lower left")
second.plot(*zip(*[(size, value - length(geodesic)) for size, value in detours], strict=True), "o-", color=COLOURS[2])
second.set(xlabel="size of the bend", ylabel="longer than the geodesic by")
show(
    figure,
    "geodesic",
    f"Halfway along the straight line some vectors have shrunk to {float(lowest[100]):.2f} of their length. "
    f"Every bent path is longer than the geodesic, whose length is |log Q| = {float(A.norm()):.3f}.",
)

# %% [markdown]
# ## A random rotation
#
# "Uniform" on a group means: the law does not change if everything is multiplied by a fixed $R$. There is exactly one
# such law on a compact group, its Haar measure. For $O(n)$ it is easily made: let $G$ have independent Gaussian
# entries; then $RG$ has the law of $G$. Split $G = Q R_+$ with $Q$ orthogonal and $R_+$ upper triangular. If this
# splitting were unique, $RG = (RQ) R_+$ would say that $RQ$ belongs to $RG$, so $RQ$ would have the law of $Q$.
#
# It is unique only if the diagonal of $R_+$ is positive: with any signs $D$, $Q R_+ = (QD)(D R_+)$. A library's QR
# takes whatever signs its algorithm finds. LAPACK's Householder reflections choose
# $r_{11} = -\operatorname{sign}(g_{11})\, |g_1|$, with $g_1$ the first column of $G$, to avoid cancellation. So
# $q_{11} = g_{11} / r_{11} = -|g_{11}| / |g_1|$ is *never positive*. Multiplying the columns of $Q$ by the signs of
# the diagonal repairs it.
#
# A check that can be done by hand: for $n = 3$ the first column is uniform on a sphere, and by Archimedes a coordinate
# of a uniform point on a sphere is uniform in $[-1, 1]$.

# %%
SAMPLES = 8000
gaussian = torch.randn(SAMPLES, 3, 3, generator=generator)
raw, R = torch.linalg.qr(gaussian)
fixed = raw * R.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]
uniform = stats.uniform(-1, 2)
p_raw, p_fixed = (max(stats.kstest(each[:, 0, 0].numpy(), uniform.cdf).pvalue, 1e-300) for each in (raw, fixed))
print(f"first entry uniform on [-1, 1]? p = {p_raw:.0e} without the signs, {p_fixed:.2f} with them")
print(f"share of positive first entries without the signs: {float((raw[:, 0, 0] > 0).double().mean()):.2f}")
assert p_raw < 1e-10 and p_fixed > 1e-4
library = torch.stack([haar(3, generator) for _ in range(1000)])
assert stats.kstest(library[:, 0, 0].numpy(), uniform.cdf).pvalue > 1e-4
assert 0.4 < float((torch.det(library) > 0).double().mean()) < 0.6, "reflections are half of O(n)"

# %% [markdown]
# And the angle? Rotations of $SO(3)$ are points $\theta k$ of a ball of radius $\pi$. Uniform in the angle is *not*
# uniform on the group. As unit quaternions $(\cos\tfrac\theta2, k \sin\tfrac\theta2)$ they are points of a 3-sphere
# (two for each), on which a fixed rotation acts by a rotation of four dimensions, so Haar is the area of that sphere.
# A polar angle $\tfrac\theta2$ has the area $4\pi \sin^2\tfrac\theta2$: the density of the angle is
#
# $$\rho(\theta) = \frac{2}{\pi} \sin^2\frac\theta2 = \frac{1 - \cos\theta}{\pi}, \qquad 0 \le \theta \le \pi.$$

# %%


def angle_of(rotation: torch.Tensor) -> torch.Tensor:
    """Rotation angles of `[..., 3, 3]`: the trace is 1 + 2 cos θ."""
    return ((rotation.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2).clamp(-1, 1).acos()


proper = fixed * torch.det(fixed)[:, None, None]  # -I has determinant -1 and commutes with everything
haar_angles = angle_of(proper)
p_angle = float(stats.kstest(haar_angles.numpy(), lambda x: (x - torch.as_tensor(x).sin().numpy()) / math.pi).pvalue)
p_uniform = max(stats.kstest(haar_angles.numpy(), stats.uniform(0, math.pi).cdf).pvalue, 1e-300)
print(f"angles: p = {p_angle:.2f} for (1 - cos θ)/π, {p_uniform:.0e} for uniform angles")
assert p_angle > 1e-4 and p_uniform < 1e-10

figure, (panel, second) = panels(2, "What uniform means: the first entry, and the angle, of random matrices (n = 3)")
bins = torch.linspace(-1, 1, 41)
panel.hist(raw[:, 0, 0].numpy(), bins.numpy(), density=True, color=COLOURS[1], alpha=0.6, label="QR as it comes")
panel.hist(
    fixed[:, 0, 0].numpy(),
    bins.numpy(),
    density=True,
    histtype="step",
    color=COLOURS[0],
    lw=2,
    label="signs moved into Q",
)
panel.axhline(0.5, color="black", ls="--", lw=1, label="Haar: uniform")
panel.set(xlabel="first entry", ylabel="density")
panel.legend(frameon=False, fontsize=8)
grid = torch.linspace(0, math.pi, 101)
second.hist(haar_angles.numpy(), 40, density=True, histtype="step", color=COLOURS[0], lw=2, label="Haar, sampled")
second.plot(grid, (1 - grid.cos()) / math.pi, "--", color="black", lw=1, label="(1 - cos θ) / π")
second.axhline(1 / math.pi, color=COLOURS[1], lw=2, label="uniform angle: not Haar")
second.set(xlabel="angle θ (radians)", ylabel="density")
second.legend(frameon=False, fontsize=8)
show(
    figure,
    "haar",
    f"Without the signs the first entry is positive in {float((raw[:, 0, 0] > 0).double().mean()):.0%} of samples; "
    f"with them it is uniform (p = {p_fixed:.2f}). Large angles are likelier than small ones, as (1 - cos θ)/π says.",
)

# %% [markdown]
# ## Rotary positions, derived
#
# Let a position $p$ act on queries and keys of $h$ dimensions by one and the same matrix $f(p)$, with $f(0)$
# invertible, and let the score of $m$ and $n$ depend on the distance only:
#
# $$(f(m) q) \cdot (f(n) k) = q \cdot F(n - m)\, k, \qquad\text{that is}\qquad f(m)^\top f(n) = F(n - m).$$
#
# The common factor $f(0)$ can be moved into $q$ and $k$, so let $f(0) = I$. Then $m = 0$ gives $f = F$, and $n = m$
# gives $f(m)^\top f(m) = I$: rotations. So $f(n - m) = f(m)^{-1} f(n)$, or $f(m + r) = f(m) f(r)$: $f$ is a
# homomorphism from the positions to $O(h)$. A smooth one solves $f' = A f$ with $A = f'(0)$ skew:
#
# $$f(p) = e^{pA}.$$
#
# In the basis of its planes this *is* RoPE with frequencies $\omega_i$; the basis itself goes into the weights of $q$
# and $k$. So RoPE is the general case of one linear map for queries and keys. If $f$ is no homomorphism, scores depend
# on where one stands. Two maps may do more: $e^{nS}$ for keys and $e^{-mS^\top}$ for queries give $F(n - m) =
# e^{(n - m)S}$ for any $S$, skew or not.

# %%
h, POSITIONS = 8, 24
A = skew(h)
frequencies, basis = rotary_form(A)
q, k = torch.randn(2, h, generator=generator)
place = torch.arange(POSITIONS, dtype=torch.float64)


def score_map(f, f_k=None) -> torch.Tensor:
    """Scores `[m, n]` of one query and one key at all pairs of positions; `f_k` is a map of its own for keys."""
    queries, keys = (torch.stack([each(p) for p in place]) for each in (f, f_k or f))  # [positions, h, h]
    return (queries @ q) @ (keys @ k).T


def plane_by_plane(p: torch.Tensor) -> torch.Tensor:
    """RoPE: dimension i turns with dimension i + h/2."""
    cos, sin = (p * frequencies).cos().diag(), (p * frequencies).sin().diag()
    return torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)])


B = 0.02 * skew(h)
exact = score_map(lambda p: so_exp(p * A))
bent = score_map(lambda p: so_exp(p * A) @ so_exp(p**2 * B))
S = 0.1 * A + 0.02 * torch.randn(h, h, generator=generator)  # not skew
two_maps = score_map(lambda p: torch.matrix_exp(-p * S.T), lambda p: torch.matrix_exp(p * S))
one_map = score_map(lambda p: torch.matrix_exp(p * S))


def spread(scores: torch.Tensor) -> float:
    """How much scores of one distance differ, relative to the largest."""
    diagonals = [scores.diagonal(offset) for offset in range(1 - POSITIONS, POSITIONS)]
    return max(float(diagonal.max() - diagonal.min()) for diagonal in diagonals) / float(scores.abs().max())


rope = max(float((basis.T @ so_exp(p * A) @ basis - plane_by_plane(p)).abs().max()) for p in place)
print(f"exp(pA) is RoPE in another basis: {rope:.0e}; frequencies {[round(float(w), 2) for w in frequencies]}")
print(f"scores of one distance differ by {spread(exact):.0e}; for exp(pA) exp(p²B) by {spread(bent):.2f}")
print(f"S not skew, two maps: {spread(two_maps):.0e}; one map exp(pS): {spread(one_map):.2f}")
assert rope < 1e-12 and spread(exact) < 1e-12 and spread(bent) > 0.1
assert spread(two_maps) < 1e-11 and spread(one_map) > 0.01

figure, axes = panels(2, "With a homomorphism scores depend on the distance only", sharey=True)
limit = float(torch.cat([exact, bent]).abs().max())
for panel, scores, name in zip(
    axes, (exact, bent), ("exp(pA): a homomorphism", "exp(pA) exp(p²B): no homomorphism"), strict=True
):
    drawn = panel.imshow(scores, cmap="PuOr", vmin=-limit, vmax=limit, origin="lower")
    panel.set(title=name, xlabel="position of the key")
axes[0].set_ylabel("position of the query")
figure.colorbar(drawn, ax=axes, label="score", shrink=0.8)
show(
    figure,
    "rope",
    f"Left every diagonal is one colour, to {spread(exact):.0e}: only the distance counts. Right one distance gives "
    f"scores that differ by {spread(bent):.0%} of the largest, because the positions do not act as a group.",
)

# %% [markdown]
# ## What rotary positions leave free
#
# Without positions $q \to Mq$, $k \to M^{-\top} k$ leaves all scores alone, for any invertible $M$: $h^2$ dimensions.
# With them it must pass through $e^{pA}$: $M e^{pA} = e^{pA} M$ for all $p$, that is $[A, M] = 0$. In the basis of the
# planes $A = \operatorname{diag}(i\omega_1, i\omega_2, \dots)$ acts on $\mathbb C^{h/2}$. A real $M$ is a complex
# linear part plus one that conjugates, and $[A, M] = 0$ says: the linear part may join planes with
# $\omega_i = \omega_j$, the other those with $\omega_i = -\omega_j$. For frequencies that differ in size one complex
# number is left per plane: a rotation and a stretch, $h$ dimensions. The commutant is a null space, so its dimension
# can be counted.

# %%


def commutant(frequencies: list[float]) -> int:
    """The dimension of all M with [A, M] = 0, for A with these frequencies."""
    w = torch.tensor(frequencies).diag()
    A = torch.cat([torch.cat([torch.zeros_like(w), -w], 1), torch.cat([w, torch.zeros_like(w)], 1)])
    eye = torch.eye(len(A))
    bracket = torch.kron(A, eye) - torch.kron(eye, A.T.contiguous())  # M as a long vector
    return int((torch.linalg.svdvals(bracket) < 1e-10).sum())


cases = {"all different": [1.0, 0.5, 0.2, 0.1], "all alike": [1.0] * 4, "two alike": [1.0, 1.0, 0.2, 0.1]}
cases["one at rest"] = [1.0, 0.5, 0.2, 0.0]
counted = {name: commutant(frequencies) for name, frequencies in cases.items()}
print(counted)
assert counted == {"all different": h, "all alike": 2 * 4**2, "two alike": 2 * 2**2 + 2 + 2, "one at rest": 6 + 2**2}

config = RiGPTConfig(vocab_size=11, hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
group = table_of(config).kinds["head_qk"].group
print(f"the library's group for a rotary head of {config.head_dim} dimensions: {group}, dimension {group.dimension}")
assert group.dimension == counted["all different"]

# %% [markdown]
# ## What we saw

# %%
print(f"- exp of skew matrices is orthogonal to rounding; products fail to commute at order {orders[0]:.2f}.")
print(f"- The geodesic keeps lengths; the straight line shrinks some vectors to {float(lowest[100]):.2f}.")
print(f"- QR without signs is not uniform (p = {p_raw:.0e}); with them it is (p = {p_fixed:.2f}).")
print(f"- Positions that act as a group are exp(pA), which is RoPE in some basis, to {rope:.0e}.")
print(f"- Of {h**2} dimensions of freedom in a head, rotary positions leave {counted['all different']}.")

# %% [markdown]
# ## Exercises
#
# 1. Show that $|\log (Q^\top R)|$ does not change when both are multiplied by one rotation from either side.
# 2. Let $u$ be uniform on the unit sphere in $d$ dimensions. Find $\langle u_1^2 \rangle$ and $\langle u_1^4 \rangle$
#    without an integral. (Chapter 5 needs them.)
# 3. Half of the matrices that `haar` draws are reflections. How does one make proper rotations of them, still uniform?
#
# <details><summary>Solutions</summary>
#
# 1. From the left: $(SQ)^\top SR = Q^\top R$. From the right: $S^\top Q^\top R S$ has the same angles.
# 2. $\sum u_i^2 = 1$ gives $\langle u_1^2 \rangle = 1/d$. A Gaussian vector is $x = r u$ with $r$ and $u$ independent,
#    so $\langle x_1^4 \rangle = 3 = \langle r^4 \rangle \langle u_1^4 \rangle$, and
#    $\langle r^4 \rangle = \langle (\sum x_i^2)^2 \rangle = 3d + d(d - 1) = d(d + 2)$. So
#    $\langle u_1^4 \rangle = 3 / (d (d + 2))$.
# 3. Turn the sign of the first column round where the determinant is $-1$. Multiplication by a fixed rotation from the
#    left does not change which matrices that hits, so the law stays invariant.
# </details>

# %% [markdown]
# Solution 1 as code: both multiplied from the left, both from the right, and one of them alone.

# %%
near, far, spin = (haar(n, generator, special=True) for _ in range(3))


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """The distance of two rotations."""
    return float(so_log(a.T @ b).norm())


before = apart(near, far)
left, right, alone = (
    abs(apart(*pair) - before) for pair in ((spin @ near, spin @ far), (near @ spin, far @ spin), (spin @ near, far))
)
print(f"distance {before:.3f}; changed from the left {left:.0e}, from the right {right:.0e}, one alone {alone:.2f}")
assert max(left, right) < 1e-12 < 1e-4 < alone

# %% [markdown]
# Solution 2 measured on normalised Gaussian vectors, which are uniform on the sphere: their law does not change under
# rotations. Normalised points of a cube are the control.

# %%
d = 5
gauss, cube = torch.randn(200_000, d, generator=generator), 2 * torch.rand(200_000, d, generator=generator) - 1
uniform_entry, cube_entry = (torch.nn.functional.normalize(x, dim=-1)[:, 0] for x in (gauss, cube))
predicted = {2: 1 / d, 4: 3 / (d * (d + 2))}
off = {
    name: [float(u.pow(power).mean()) / exact_moment - 1 for power, exact_moment in predicted.items()]
    for name, u in (("sphere", uniform_entry), ("cube", cube_entry))
}
for name, (second_moment, fourth_moment) in off.items():
    print(f"{name}: <u²> is {second_moment:+.1%} off the prediction, <u⁴> {fourth_moment:+.1%}")
assert max(map(abs, off["sphere"])) < 0.02 and abs(off["cube"][0]) < 0.02 < 0.05 < abs(off["cube"][1])

# %% [markdown]
# Solution 3 as code, on the matrices from above: determinants, and the law of the angles. Two answers that fail: the
# sign of the whole matrix, which in even dimensions does not change the determinant, and the exponential of a random
# generator, which is a rotation but not uniform.

# %%
repaired = fixed.clone()
repaired[..., 0] *= torch.det(fixed).sign()[:, None]
four = torch.stack([haar(4, generator) for _ in range(50)])
still = torch.det(four * torch.det(four)[:, None, None])
generated = torch.linalg.matrix_exp(gaussian - gaussian.mT)
p_repaired, p_generated = (
    float(stats.kstest(angle_of(x).numpy(), lambda x: (x - torch.as_tensor(x).sin().numpy()) / math.pi).pvalue)
    for x in (repaired, generated)
)
print(f"determinants at least {float(torch.det(repaired).min()):.2f}; angles: p = {p_repaired:.2f}", end="")
print(
    f", of generated ones {p_generated:.0e}; whole matrices turned round in four dimensions {float(still.min()):.2f}"
)
assert float(torch.det(repaired).min()) > 1 - 1e-12 and p_repaired > 1e-4
assert p_generated < 1e-10 and float(still.min()) < -1 + 1e-12

# %% [markdown]
# ## Further reading
#
# - F. Schuller, *Lectures on the Geometrical Anatomy of Theoretical Physics* (videos); lecture 13 is on Lie groups and
#   their Lie algebras.
# - F. Mezzadri, *How to generate random matrices from the classical compact groups*, arXiv math-ph/0609050.
# - V. I. Arnold, *Mathematical Methods of Classical Mechanics*, appendix 2: geodesics of groups and rigid bodies.
# - B. C. Hall, *Lie Groups, Lie Algebras, and Representations*.
# - J. Su and others, *RoFormer: Enhanced Transformer with Rotary Position Embedding*, arXiv 2104.09864.
# - C. Schenck and others, *Learning the RoPEs: Better 2D and 3D Position Encodings with STRING*, arXiv 2502.02562.
