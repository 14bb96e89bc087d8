# %% [markdown]
# # 2. What LayerNorm hides
#
# Turn the hidden space of a GPT-2 by a rotation, weights included, and the logits change. One part is to blame:
# LayerNorm, which acts on single coordinates. In this chapter its gains, biases and means are moved by hand into the
# neighbouring matrices. What is left commutes with every rotation, and the network computes the same function.
#
# Letters: $d$ dimensions of the stream, $\mathbf 1$ the vector of ones, $\odot$ the product entry by entry.

# %% [markdown]
# ## LayerNorm in two factors
#
# $$\mathrm{LN}(x) = g \odot \frac{x - \bar x \mathbf 1}{\sqrt{\tfrac1d \sum_i (x_i - \bar x)^2 + \epsilon}} + \beta,
# \qquad \bar x = \tfrac1d \mathbf 1 \cdot x.$$
#
# Subtracting the mean is linear: $x - \bar x \mathbf 1 = C x$ with the *centring matrix*
# $C = I - \mathbf 1 \mathbf 1^\top / d$. It is a projector, $C^2 = C = C^\top$, of rank $d - 1$: it removes the
# direction $\mathbf 1$. The root is the length of $C x$ over $\sqrt d$. So with
#
# $$n(x) = \frac{x}{\sqrt{|x|^2 / d + \epsilon}} \qquad\text{we have}\qquad \mathrm{LN}(x) = \operatorname{diag}(g)\,
# n(C x) + \beta.$$
#
# Now let $Q$ be a rotation or reflection, $Q^\top Q = I$. Because $|Qx| = |x|$, $n(Q x) = Q\, n(x)$: $n$ has no basis.
# $C$ and $\operatorname{diag}(g)$ have one. Which $Q$ commute with $C$? $QC = CQ$ means
# $Q \mathbf 1 \mathbf 1^\top = \mathbf 1 \mathbf 1^\top Q$; applied to $\mathbf 1$: $Q \mathbf 1 = \lambda \mathbf 1$,
# so $Q \mathbf 1 = \pm \mathbf 1$: the rotations around the direction of ones. And which commute with
# $\operatorname{diag}(g)$ for different gains? $Q_{ij} (g_j - g_i) = 0$: diagonal ones, that is changes of sign.

# %%
import copy

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rigpt_hf.conversion import convert_model, export_model
from rigpt_hf.lab import COLOURS, chosen_seed, panels, show
from rigpt_hf.symmetry import GaugeTransformation, gauge_error, haar, jacobian_spectrum, so_exp, so_log, table_of


SEED = chosen_seed()
torch.set_default_dtype(torch.float64)
generator = torch.Generator().manual_seed(SEED)
EPS = 1e-5


def n(x: torch.Tensor) -> torch.Tensor:
    """`x / sqrt(mean(x²) + eps)`: all that will be left of LayerNorm."""
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


d = 24
g, beta = 1 + 0.3 * torch.randn(d, generator=generator), 0.3 * torch.randn(d, generator=generator)
C = torch.eye(d) - torch.ones(d, d) / d
x = torch.randn(50, d, generator=generator)
stock = torch.nn.functional.layer_norm(x, (d,), g, beta, EPS)
Q = haar(d, generator)
# The last d - 1 columns of an orthogonal matrix whose first is 1/√d span what C leaves.
basis = torch.linalg.qr(torch.cat([torch.ones(d, 1), torch.randn(d, d - 1, generator=generator)], 1))[0]
around = basis @ torch.block_diag(torch.eye(1), haar(d - 1, generator)) @ basis.T  # fixes the ones

print(f"LN = diag(g) n(Cx) + beta: {relative(n(x @ C) * g + beta, stock):.0e}")
print(f"n(Qx) = Q n(x): {relative(n(x @ Q.T), n(x) @ Q.T):.0e}")
print(f"n(CQx) = Q n(Cx): any Q {relative(n(x @ Q.T @ C), n(x @ C) @ Q.T):.2f}", end="")
print(f", Q that fixes the ones {relative(n(x @ around.T @ C), n(x @ C) @ around.T):.0e}")
print(f"diag(g) Q = Q diag(g), Q that fixes the ones: {relative(g[:, None] * around, around * g):.2f}")
assert relative(n(x @ C) * g + beta, stock) < 1e-14
assert relative(n(x @ Q.T), n(x) @ Q.T) < 1e-14 and relative(n(x @ around.T @ C), n(x @ C) @ around.T) < 1e-13
assert relative(n(x @ Q.T @ C), n(x @ C) @ Q.T) > 0.1 and relative(g[:, None] * around, around * g) > 0.1

# %% [markdown]
# In three dimensions it can be seen. $C$ flattens space to the plane perpendicular to $\mathbf 1$, $n$ puts everything
# on a circle of radius $\sqrt 3$ in it, and the gains make an ellipse of the circle, in a plane of its own. The circle
# can be turned without being changed; the ellipse cannot. The picture looks along $\mathbf 1$.

# %%
view = torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, -2.0]]) / torch.tensor([[2.0**0.5], [6.0**0.5]])  # [2, 3]
ones = torch.ones(3) / 3**0.5
cloud = torch.randn(400, 3, generator=generator)
gains = torch.tensor([1.8, 0.6, 1.0])
seventh = 2 * torch.pi / 7
spin = so_exp(seventh * (torch.outer(view[1], view[0]) - torch.outer(view[0], view[1])))  # turns the plane of the view
assert torch.allclose(spin @ ones, ones)


def norm_of(points: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
    """LayerNorm without bias of points `[..., 3]`."""
    return torch.nn.functional.layer_norm(points, (3,), gains, eps=0.0)


figure, axes = panels(2, "LayerNorm in three dimensions, seen along the vector of ones", sharex=True, sharey=True)
apart = []
cases = ((torch.ones(3), "gain 1: a circle, turning it is no change"), (gains, "gains differ: an ellipse"))
for panel, (scale, title) in zip(axes, cases, strict=True):
    norm_first, turn_first = norm_of(cloud, scale) @ spin.T, norm_of(cloud @ spin.T, scale)
    apart.append(float((norm_first - turn_first).norm(dim=-1).mean()))
    panel.plot(*(norm_first @ view.T).T, ".", ms=6, color=COLOURS[1], label="norm first, then turn")
    panel.plot(*(turn_first @ view.T).T, ".", ms=2.5, color=COLOURS[0], label="turn first, then norm")
    for before, after in zip((norm_first @ view.T)[:12], (turn_first @ view.T)[:12], strict=True):
        panel.annotate("", after, before, arrowprops={"arrowstyle": "->", "color": "0.3", "lw": 0.8})
    panel.set(title=title, aspect="equal", xlabel="first axis of the plane", ylabel="second axis")
axes[0].legend(frameon=False, fontsize=8, loc="center", markerscale=1.5)
show(
    figure,
    "ellipse",
    f"Turning before or after the norm: the same point with gain 1 (distance {apart[0]:.0e}), and points "
    f"{apart[1]:.2f} apart on average with gains {gains.tolist()}. Arrows join some of them.",
)
assert apart[0] < 1e-12 and apart[1] > 0.1

# %% [markdown]
# ## A GPT-2 to work on
#
# Random weights, and gains and biases that are not 1 and 0: with the values of a fresh model half of the mistakes one
# can make would not be seen.

# %%
VOCABULARY, LENGTH, HEADS, LAYERS = 61, 20, 4, 3
special = {"bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
config = GPT2Config(vocab_size=VOCABULARY, n_positions=40, n_embd=d, n_layer=LAYERS, n_head=HEADS, **special)
torch.manual_seed(SEED)
gpt2 = GPT2LMHeadModel(config).double().eval()
with torch.no_grad():
    for parameter in gpt2.parameters():
        parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
ids = torch.randint(3, VOCABULARY, (4, LENGTH), generator=generator)
logits = gpt2(ids).logits.detach()  # [4, LENGTH, VOCABULARY]
print(f"{gpt2.num_parameters():,} parameters, logits {tuple(logits.shape)}")

# %% [markdown]
# ## The folds
#
# The stream is written by *writers* (tokens, positions, the outputs of attention and MLP) and read by *readers*
# (queries, keys, values, up, the head), each reader after a LayerNorm.
#
# *Gain and bias go into the reader.* A reader computes
# $W\, \mathrm{LN}(x) + b = W \operatorname{diag}(g)\, n(Cx) + W \beta + b$. So $W' = W \operatorname{diag}(g)$ and
# $b' = b + W \beta$, and the norm keeps nothing.
#
# *The centring goes into the writers.* If every writer writes $C\,(\dots)$, then the stream is a sum of centred
# vectors, and for such $x$, $C x = x$: the norm need not centre. The function has not changed, because every reader
# centres what it reads anyway: $C (x_1 + x_2 + \dots) = C x_1 + C x_2 + \dots$
#
# *Readers may be centred too.* $n$ only shortens or lengthens, so $n$ of a centred stream is centred, and
# $W \operatorname{diag}(g)\, C$ reads the same from it as $W \operatorname{diag}(g)$. The code below and the library
# write the first, so that a reader has no part along $\mathbf 1$, where nothing is to be read.
#
# *The table of tokens $E$ is both*: a writer at the beginning, and after the last norm it is the head. To leave it as
# it is, two matrices are put beside it: $U = C$ carries tokens into the stream, and $G = \operatorname{diag}(g_f)\, C$
# with $b = \beta_f$ carries the result back.

# %%


def fold(model: GPT2LMHeadModel, skip_gain: bool = False) -> dict[str, torch.Tensor]:
    """The weights of the invariant form; `skip_gain` forgets one gain, as a control."""
    w = {name.removeprefix("transformer."): value.detach() for name, value in model.state_dict().items()}
    C = torch.eye(d) - torch.ones(d, d) / d
    folded = {"E": w["wte.weight"], "U": C, "P": w["wpe.weight"] @ C}
    folded |= {"G": torch.diag(w["ln_f.weight"]) @ C, "b": w["ln_f.bias"]}
    for i in range(LAYERS):
        for norm, reader, name in (("ln_1", "attn.c_attn", "qkv"), ("ln_2", "mlp.c_fc", "up")):
            gain, bias = w[f"h.{i}.{norm}.weight"], w[f"h.{i}.{norm}.bias"]
            W, b = w[f"h.{i}.{reader}.weight"].T, w[f"h.{i}.{reader}.bias"]  # stored as [inputs, outputs]
            if skip_gain and (i, norm) == (1, "ln_2"):
                gain = torch.ones_like(gain)
            folded[f"{i}.{name}.W"] = W * gain @ C  # C reads the same from a centred stream
            folded[f"{i}.{name}.b"] = b + W @ bias
        for writer, name in (("attn.c_proj", "out"), ("mlp.c_proj", "down")):
            folded[f"{i}.{name}.W"] = C @ w[f"h.{i}.{writer}.weight"].T
            folded[f"{i}.{name}.b"] = C @ w[f"h.{i}.{writer}.bias"]
    return folded


def run(w: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Logits of the invariant form: no gain, no bias in a norm, no mean."""
    T = ids.shape[1]
    x = w["E"][ids] @ w["U"].T + w["P"][:T]
    for i in range(LAYERS):
        q, k, v = (n(x) @ w[f"{i}.qkv.W"].T + w[f"{i}.qkv.b"]).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ w[f"{i}.out.W"].T + w[f"{i}.out.b"]
        up = torch.nn.functional.gelu(n(x) @ w[f"{i}.up.W"].T + w[f"{i}.up.b"], approximate="tanh")
        x = x + up @ w[f"{i}.down.W"].T + w[f"{i}.down.b"]
    return (n(x) @ w["G"].T + w["b"]) @ w["E"].T


mine = fold(gpt2)
by_hand, forgotten = relative(run(mine, ids), logits), relative(run(fold(gpt2, skip_gain=True), ids), logits)
print(f"the same function: {by_hand:.0e}; with one gain forgotten: {forgotten:.2f}")
assert by_hand < 1e-12 and forgotten > 1e-3
centred, free = mine["E"][ids] @ C, mine["E"][ids]
print(f"C n(x) = n(x): {relative(n(centred) @ C, n(centred)):.0e}; for a stream that is not centred ", end="")
print(f"{relative(n(free) @ C, n(free)):.2f}")
assert relative(n(centred) @ C, n(centred)) < 1e-14 and relative(n(free) @ C, n(free)) > 0.01

# %% [markdown]
# ## Now it can be turned
#
# Let the stream be $\tilde x = Q x$. Writers become $Q W$ and $Q b$, readers $W Q^\top$, and the norms follow by
# themselves, $n(Qx) = Q n(x)$. By induction over the layers every stream turns along, and every reader reads what it
# did before. The same replacement in GPT-2 as it is fails at the first norm.

# %%


def turn(w: dict[str, torch.Tensor], Q: torch.Tensor) -> dict[str, torch.Tensor]:
    turned = dict(w) | {"U": Q @ w["U"], "P": w["P"] @ Q.T, "G": w["G"] @ Q.T}
    for i in range(LAYERS):
        for reader in ("qkv", "up"):
            turned[f"{i}.{reader}.W"] = w[f"{i}.{reader}.W"] @ Q.T
        for writer in ("out", "down"):
            turned[f"{i}.{writer}.W"], turned[f"{i}.{writer}.b"] = Q @ w[f"{i}.{writer}.W"], Q @ w[f"{i}.{writer}.b"]
    return turned


@torch.no_grad()
def turn_stock(model: GPT2LMHeadModel, Q: torch.Tensor) -> GPT2LMHeadModel:
    """The same in GPT-2: tables, writers and readers turn, only the norms cannot."""
    turned = copy.deepcopy(model)
    body = turned.transformer
    body.wte.weight.copy_(body.wte.weight @ Q.T)  # the head is the same table, and reads
    body.wpe.weight.copy_(body.wpe.weight @ Q.T)
    for block in body.h:
        for writer in (block.attn.c_proj, block.mlp.c_proj):
            writer.weight.copy_(writer.weight @ Q.T)
            writer.bias.copy_(Q @ writer.bias)
        for reader in (block.attn.c_attn, block.mlp.c_fc):
            reader.weight.copy_(Q @ reader.weight)
    return turned


rotation = haar(d, generator, special=True)
angle = so_log(rotation)
path = torch.linspace(0, 1, 13)
errors: dict[str, list[float]] = {"folded by hand": [], "GPT-2 as it is": []}
for t in path:
    here = so_exp(t * angle)
    errors["folded by hand"].append(relative(run(turn(mine, here), ids), logits))
    errors["GPT-2 as it is"].append(relative(turn_stock(gpt2, here)(ids).logits, logits))
assert max(errors["folded by hand"]) < 1e-12 and min(errors["GPT-2 as it is"][1:]) > 1e-2
print({name: f"{values[-1]:.1e}" for name, values in errors.items()})

# %% [markdown]
# The figure goes along the geodesic from the identity to that rotation (chapter 3), on a logarithmic scale.

# %%
figure, (panel,) = panels(1, "Turning the stream: GPT-2 breaks, its invariant form does not", width=6.4)
for (name, values), marker, colour in zip(errors.items(), "os", COLOURS, strict=False):
    panel.semilogy(path, [max(value, 1e-17) for value in values], marker + "-", color=colour, label=name)
panel.set(xlabel="t, share of the path to a random rotation", ylabel="max |Δlogit| / max |logit|", ylim=(1e-17, 30))
panel.legend(frameon=False, loc="center right")
show(
    figure,
    "rotation",
    f"At the end of the path the logits of GPT-2 have changed by {errors['GPT-2 as it is'][-1]:.0%} of the largest, "
    f"those of its invariant form by {errors['folded by hand'][-1]:.0e}, which is rounding.",
)

# %% [markdown]
# ## The library does the same
#
# `convert_model` reads these folds from one table of rules. All weights must be those made by hand.

# %%
model = convert_model(gpt2)
theirs = {name: value.detach() for name, value in model.state_dict().items()}
expected = {"model.embed_tokens": mine["E"], "model.project_in": mine["U"], "model.embed_positions": mine["P"]}
expected |= {"model.project_out": mine["G"]}
for i in range(LAYERS):
    layer = f"model.layers.{i}."
    for part, rows in zip("qkv", mine[f"{i}.qkv.W"].chunk(3), strict=True):
        expected[f"{layer}self_attn.{part}_proj"] = rows
    expected |= {f"{layer}self_attn.o_proj": mine[f"{i}.out.W"], f"{layer}mlp.up_proj": mine[f"{i}.up.W"]}
    expected[f"{layer}mlp.down_proj"] = mine[f"{i}.down.W"]
agreement = max(relative(theirs[f"{name}.weight"], value) for name, value in expected.items())
biases = max(
    relative(theirs[f"model.layers.{i}.{theirs_is}.bias"], mine[f"{i}.{mine_is}.b"])
    for i in range(LAYERS)
    for theirs_is, mine_is in (("mlp.up_proj", "up"), ("mlp.down_proj", "down"), ("self_attn.o_proj", "out"))
)
library = relative(model(ids).logits, logits)
print(f"{len(expected)} matrices agree to {agreement:.0e}, biases to {biases:.0e}, logits to {library:.0e}")
assert max(agreement, biases, library) < 1e-12

# %% [markdown]
# ## Which numbers were redundant
#
# Readers inside the layers can do what the gains and biases before them did, so these were redundant. The last norm is
# another case: its reader $E$ is the table of tokens too and cannot follow, so $G$ and $b$ keep what was in it. The
# rank of the derivative of all logits by all weights tells the two apart. It falls without a number exactly if the
# other weights cannot do what that number does (chapter 4).

# %%
small = GPT2Config(vocab_size=9, n_positions=6, n_embd=6, n_layer=1, n_head=2, n_inner=8, **special)
tiny = GPT2LMHeadModel(small).double().eval()
with torch.no_grad():
    for parameter in tiny.parameters():
        parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
rows = torch.randint(0, 9, (12, 6), generator=generator)


def rank_without(*norms: str) -> int:
    """The rank of the derivative by all weights but those of the norms."""
    for name, parameter in tiny.named_parameters():
        parameter.requires_grad_(not any(norm in name for norm in norms))
    return jacobian_spectrum(tiny, rows, torch.Generator().manual_seed(SEED)).rank


whole, without_layers, without_last = rank_without(), rank_without("ln_1", "ln_2"), rank_without("ln_f")
print(f"rank {whole}; without the 24 numbers of the layers' norms {without_layers}, ", end="")
print(f"without the 12 of the last norm {without_last}")
assert whole == without_layers == without_last + 12

# %% [markdown]
# ## The vector of ones is still there
#
# $C$ has a null direction, $e = \mathbf 1 / \sqrt d$: the converted stream never leaves the $d - 1$ dimensions
# perpendicular to it. After a rotation the empty direction is $Q e$. A stock LayerNorm empties $\mathbf 1$ and nothing
# else. With an untied head, and norms without bias except the last, the turned weights run in the stock class exactly
# if $Q \mathbf 1 = \pm \mathbf 1$. That is the group of the first section, $O(d-1)$ and a sign.
#
# The head then is $E G$, and a stock head has no bias for $E b$. The empty direction can carry it: let the last norm
# have the bias $Q e$. Then $\big(E G + E b\,(Q e)^\top\big) (n(x) + Q e) = E\, (G\, n(x) + b)$, because
# $G\, Q e = 0 = (Q e) \cdot n(x)$.

# %%
fixing = GaugeTransformation.random(model.config, generator, ("stream",), fix_ones=True)
any_rotation = GaugeTransformation.random(model.config, generator, ("stream",))
for g_ in (fixing, any_rotation):
    assert gauge_error(model, g_, ids) < 1e-12


def empty_direction(model: torch.nn.Module) -> torch.Tensor:
    """The direction `[d]` into which tokens and positions never write."""
    written = torch.cat([model.model.project_in.weight.T, model.model.embed_positions.weight]).detach()
    return torch.linalg.svd(written).Vh[-1]


@torch.no_grad()
def in_stock(w: dict[str, torch.Tensor], empty: torch.Tensor) -> GPT2LMHeadModel:
    """An invariant form as GPT-2 with an untied head: gains 1, and no bias in a norm but the last."""
    untied = copy.deepcopy(config)
    untied.tie_word_embeddings = False
    stock = GPT2LMHeadModel(untied).double().eval()  # its norms are fresh: gains 1, biases 0
    stock.transformer.wte.weight.copy_(w["E"] @ w["U"].T)
    stock.transformer.wpe.weight.copy_(w["P"])
    for i, block in enumerate(stock.transformer.h):
        maps = {"qkv": block.attn.c_attn, "out": block.attn.c_proj, "up": block.mlp.c_fc, "down": block.mlp.c_proj}
        for name, place in maps.items():
            place.weight.copy_(w[f"{i}.{name}.W"].T)
            place.bias.copy_(w[f"{i}.{name}.b"])
    stock.transformer.ln_f.bias.copy_(empty)
    stock.lm_head.weight.copy_(w["E"] @ (w["G"] + torch.outer(w["b"], empty)))
    return stock


e = torch.ones(d) / d**0.5
kept, moved = (abs(float(empty_direction(each(model)) @ e)) for each in (fixing, any_rotation))
fixes, turns = (each.elements["stream"][0] for each in (fixing, any_rotation))
in_class = [relative(in_stock(turn(mine, R), R @ e)(ids).logits, logits) for R in (fixes, -fixes, turns)]
print(f"cosine between the empty direction and the ones: {kept:.6f} if fixed, {moved:.2f} if not")
print(f"turned, in the stock class: Q1 = 1 {in_class[0]:.0e}, Q1 = -1 {in_class[1]:.0e}, any Q {in_class[2]:.2f}")
assert abs(kept - 1) < 1e-10 and moved < 0.9 and max(in_class[:2]) < 1e-12 and in_class[2] > 0.1

# %% [markdown]
# A tied head is another matter. `export_model` turns the stream back first, whatever the rotation was, and gives the
# weights that the unturned model would give. Gains are free there, so it takes powers of two, which round nothing, and
# by which the weights after them are alike.

# %%
plain = export_model(model, "gpt2")
backs = [export_model(each(model), "gpt2") for each in (fixing, any_rotation)]
exported = max(relative(back(ids).logits, logits) for back in backs)
first = [each.transformer.h[0].attn.c_proj.weight for each in (plain, *backs)]
undone = max(relative(each, first[0]) for each in first[1:])
turned_away = relative(turn(mine, turns)["0.out.W"], mine["0.out.W"])
gains_chosen = backs[0].transformer.h[0].ln_1.weight.detach().log2()
print(
    f"exports: logits {exported:.0e}, weights as if never turned {undone:.0e}; turned they were {turned_away:.1f} off"
)
assert exported < 1e-12 and undone < 1e-12 and turned_away > 0.1
assert torch.equal(gains_chosen, gains_chosen.round())

# %% [markdown]
# ## A network without a basis
#
# What is left is a RiGPT. Its four equations, with $O$, $A$, $D$ the maps out of attention and up and down in the MLP:
#
# $$\begin{aligned}
# x &= U E_t + P_p \\
# x &\mathrel{+}= O\, \mathrm{attention}(n(x)) \\
# x &\mathrel{+}= D\, \mathrm{act}(A\, n(x)) \\
# \text{logits} &= E\, (G\, n(x) + b)
# \end{aligned}$$
#
# A *frame* is a space whose basis is a free choice, and its *group* says which changes of basis leave the function
# alone. `stream` is the space of $x$, where $n$ allows rotations and reflections, $O(d)$. `lexical` is the space of
# the rows of $E$: nothing stands between $U$ and $E_t$, so any invertible matrix $M$ will do, $GL(d)$. `head_qk` is
# the space of queries and keys of a head, `head_vo` that of its values. In a frame a *vector* goes to $M x$ and a
# *covector* to $M^{-\top} x$, so that their product stays.
#
# The *table of frames* says for each axis of each parameter in which frames it lies, and in which role. The cell
# prints the frames of our GPT-2 ($S_n$ are permutations, $\mathbb R^n$ shifts of biases). Then it changes the lexical
# frame by hand: the rows of $E$ are vectors, and $U$, $G$ and $b$ carry covectors, because $E$ is the head too.

# %%
for kind, frame in table_of(model.config).kinds.items():
    copies = frame.copies * (LAYERS if frame.per_layer else 1)
    print(f"{kind:12}{copies:3} × {frame.group}")
M = torch.randn(d, d, generator=generator)
inverse = torch.linalg.inv(M)
half = mine | {"E": mine["E"] @ M.T, "U": mine["U"] @ inverse}
lexical = half | {"G": inverse.T @ mine["G"], "b": inverse.T @ mine["b"]}
lexical_error, half_error = relative(run(lexical, ids), logits), relative(run(half, ids), logits)
everything = gauge_error(model, GaugeTransformation.random(model.config, generator, "all"), ids)
print(f"lexical frame by hand {lexical_error:.0e}, G and b forgotten {half_error:.1f}; all frames {everything:.0e}")
assert max(lexical_error, everything) < 1e-10 and half_error > 0.1

# %% [markdown]
# ## What we saw

# %%
print(f"- LayerNorm is diag(g) n(C x) + beta; folded by hand the function is the same to {by_hand:.0e}.")
print(f"- One gain forgotten costs {forgotten:.0%} of the largest logit: the check can fail.")
print(f"- A rotation changes GPT-2's logits by {errors['GPT-2 as it is'][-1]:.0%}, its invariant form's by rounding.")
print(f"- The library's weights are those made by hand, to {max(agreement, biases):.0e}.")
norms = 2 * LAYERS * 2 * d
print(f"- The {norms} numbers in the layers' norms were redundant, {norms / gpt2.num_parameters():.1%} of all.")
print(f"- Gain and bias of the last norm are not (rank {without_last} of {whole} without); G and b keep them.")
print(f"- The stock class runs turned weights if Q fixes the ones ({in_class[0]:.0e}), else not ({in_class[2]:.2f}).")

# %% [markdown]
# ## Exercises
#
# 1. RMSNorm is $g \odot n(x)$, without a mean. Which folds remain for Llama? What goes wrong if one centres the
#    writers all the same?
# 2. Show that for $\epsilon = 0$ scaling the whole stream by a number changes nothing after a norm. Why is it still
#    no gauge symmetry of the network for $\epsilon > 0$, and what has to change with the scale to make it one?
# 3. In two layers let gain and bias of a norm be ten times larger in one coordinate, and the weights that read this
#    coordinate ten times smaller. Is a direction of the stream special for the function now?
#
# <details><summary>Solutions</summary>
#
# 1. Only $W' = W \operatorname{diag}(g)$. Centring is wrong: $n(Cx) \ne n(x)$. Readers of an RMSNorm see the mean of
#    the stream.
# 2. $n(a x) = a x / |a x| \cdot \sqrt d = n(x)$ for $a > 0$. With $\epsilon$,
#    $n(ax) = x / \sqrt{|x|^2/d + \epsilon/a^2}$: another $\epsilon$. If $a^2 \epsilon$ takes the place of $\epsilon$
#    while writers grow by $a$, the function stays.
# 3. No: only the products $W \operatorname{diag}(g)$ and $W \beta$ count, and they have not changed: the fold gives
#    the same weights. Special directions of a *function* are in the products, such as their singular vectors.
# </details>

# %% [markdown]
# Solution 1 as code: a stock RMSNorm and its reader, folded, with and without centring.

# %%
stream = 0.5 + torch.randn(50, d, generator=generator)  # with a mean
reader = torch.randn(7, d, generator=generator)
stock_read = torch.nn.functional.rms_norm(stream, (d,), g, EPS) @ reader.T
folded_read, centred_read = (relative(n(x) @ (reader * g).T, stock_read) for x in (stream, stream @ C))
print(f"the gain folded: {folded_read:.0e}; writers centred too: {centred_read:.2f}")
assert folded_read < 1e-13 < 0.1 < centred_read

# %% [markdown]
# Solution 2 as code: all writers a hundred times smaller, with $\epsilon$ as it was and with $a^2 \epsilon$.

# %%
a = 0.01
writers = {name for name in mine if name in ("U", "P") or ".out." in name or ".down." in name}
scaled = {name: a * value if name in writers else value for name, value in mine.items()}
same_eps = relative(run(scaled, ids), logits)
EPS *= a**2
scaled_eps = relative(run(scaled, ids), logits)
EPS /= a**2
print(f"stream scaled by {a}: ε as it was {same_eps:.1e}, a²ε in its place {scaled_eps:.0e}")
assert scaled_eps < 1e-12 < 1e-3 < same_eps

# %% [markdown]
# Solution 3 as code: logits, and the folded weights. As a control the readers are left as they were.

# %%
louder, only_louder = copy.deepcopy(gpt2), copy.deepcopy(gpt2)
with torch.no_grad():
    for i in (0, 2):
        for block in (louder.transformer.h[i], only_louder.transformer.h[i]):
            block.ln_1.weight[5] *= 10
            block.ln_1.bias[5] *= 10
        louder.transformer.h[i].attn.c_attn.weight[5] /= 10  # stored as [inputs, outputs]
hidden, heard = (relative(each(ids).logits, logits) for each in (louder, only_louder))
unseen = max(relative(value, mine[name]) for name, value in fold(louder).items())
print(f"logits {hidden:.0e}, folded weights {unseen:.0e}; without the readers logits {heard:.2f}")
assert max(hidden, unseen) < 1e-12 < 1e-3 < heard

# %% [markdown]
# ## Further reading
#
# - 3Blue1Brown, *Attention in transformers* (video, chapter 6 of the series on deep learning).
# - C. Manning and others, *CS224N: Natural Language Processing with Deep Learning*, Stanford (videos): the lecture on
#   self-attention and transformers.
# - J. L. Ba, J. R. Kiros, G. E. Hinton, *Layer Normalization*, arXiv 1607.06450.
# - B. Zhang, R. Sennrich, *Root Mean Square Layer Normalization*, arXiv 1910.07467.
# - S. Ashkboos and others, *SliceGPT*, arXiv 2401.15024: the same folds, used to cut dimensions off.
# - S. Ashkboos and others, *QuaRot*, arXiv 2404.00456: used to quantise.
# - N. Elhage and others, *A Mathematical Framework for Transformer Circuits* (2021), on folding norms.
# - `docs/symmetry.md` of this project: how every parameter turns.
