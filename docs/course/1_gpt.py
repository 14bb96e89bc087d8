# %% [markdown]
# # 1. A GPT in 100 lines
#
# You know backpropagation and linear algebra. This chapter leads from there to a GPT, a short one, because every later
# chapter takes it apart. It speaks as a physicist does: attention is a thermal average, and losses are measured
# against entropies that can be counted. Public lectures that go more slowly:
#
# - G. Strang, [*Linear Algebra*](https://ocw.mit.edu/courses/18-06sc-linear-algebra-fall-2011/) (MIT 18.06SC);
# - 3Blue1Brown, [*Neural networks*](https://www.3blue1brown.com/topics/neural-networks): gradients, then transformers;
# - A. Karpathy, [*Zero to Hero*](https://github.com/karpathy/nn-zero-to-hero): from one derivative to a GPT.
#
# Letters: $V$ characters, $d$ dimensions of the *residual stream*, $H$ heads of $h = d/H$ dimensions, $L$ layers, $T$
# positions, $B$ rows of text that are read at once (the *batch*).

# %% [markdown]
# ## From text to a loss
#
# A *token* is a piece of text with a number, here one character. The numbers have no order that means anything, so the
# first map is a table. The *embedding* $E$ has one row per token, a vector of $d$ numbers that are learned. Reading
# row $t$ is $E^\top e_t$ with the unit vector $e_t$: a linear map.
#
# These vectors begin the *residual stream* $x$, one vector per position. A layer reads it and adds to it,
# $x \to x + f(x)$: a step of a motion (chapter 6). Its derivative is $1 + f'$, so gradients come back through the 1,
# however small $f'$ is. In $f$ stand linear maps, *attention*, through which alone positions meet, and one function of
# single numbers, $\mathrm{gelu}(z) = z\, \Phi(z)$. It is a gate: $z$ passes with the probability $\Phi(z)$ that
# Gaussian noise of variance 1 lies below $z$. Without noise it would be $\max(z, 0)$, ReLU.
#
# At the end every token gets a score $s_c = E_c \cdot x$, its *logit*. The *softmax* $p_c = e^{s_c} / Z$,
# $Z = \sum_b e^{s_b}$, is Boltzmann's distribution for energies $-s_c$ at temperature 1, and the loss is $-\log p_c$
# of the token $c$ that comes next. Backpropagation begins there:
#
# $$-\log p_c = \log Z - s_c, \qquad \frac{\partial}{\partial s}(-\log p_c) = p - e_c,$$
#
# what the model expected less what came. The cell checks this and $\mathrm{gelu}$.

# %%
import itertools
import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from rigpt_hf.lab import COLOURS, chosen_seed, panels, show
from rigpt_hf.lab.text import library_text


logits, came = torch.linspace(-1, 2, 5, dtype=torch.float64, requires_grad=True), torch.tensor(3)
(slope,) = torch.autograd.grad(F.cross_entropy(logits, came), logits)
expected = logits.detach().softmax(0)
less_came = expected - F.one_hot(came, 5)
z = torch.linspace(-6, 6, 2001, dtype=torch.float64)
gate = z * torch.special.ndtr(z)
exact, by_tanh, relu = (float((f - gate).abs().max()) for f in (F.gelu(z), F.gelu(z, approximate="tanh"), F.relu(z)))
print(f"gradient less (p - e): {float((slope - less_came).abs().max()):.0e}")
print(f"z Φ(z) less gelu {exact:.0e}, less GPT-2's formula with tanh {by_tanh:.0e}, less ReLU {relu:.2f}")
assert torch.allclose(slope, less_came, atol=1e-14) and not torch.allclose(slope, expected, atol=0.1)
assert exact < 1e-14 < by_tanh < 1e-3 < 0.1 < relu

# %% [markdown]
# ## The text
#
# Documentation strings of Python's standard library, which every machine has. In lower case and with few signs, so
# that there is little to learn before it becomes interesting. One character is one token.

# %%
SEED = chosen_seed()
torch.manual_seed(SEED)

text, characters = library_text()
V = len(characters)
data = torch.tensor([characters.index(character) for character in text])  # [number of characters]
cut = int(0.9 * len(data))
train, held_out = data[:cut], data[cut:]
print(f"{len(train):,} characters to train on, {len(held_out):,} held out, V = {V}")
print(text[2000:2200])

# %% [markdown]
# ## What a loss is measured against
#
# A model gives a distribution $q(c \mid \text{past})$. Its loss is the mean of $-\log q$ over the text, in nats per
# character. If the text has the law $p$,
#
# $$\langle -\log q \rangle_p = \underbrace{\langle -\log p \rangle_p}_{\text{entropy } S(p)} +
# \underbrace{\langle \log (p / q) \rangle_p}_{D(p \| q)\ \ge\ 0},$$
#
# because $\log x \le x - 1$ gives $\langle \log (q/p) \rangle_p \le \sum p\,(q/p - 1) = 0$. So a loss is an entropy
# plus what the model still has to learn. Three models need no network, and their losses on held-out text are marks:
#
# - every character is as likely as any other: $\log V$;
# - a table of single characters, counted on the training text;
# - a table of pairs, counted there too: the law of a character given the one before.
#
# A table is a model like any other, so its loss is not an entropy either. The cell counts the pairs of the held-out
# text as well. Their entropy $S$ is what no model that sees one character gets below there, and $D$ is what the table
# of the training text loses on top.

# %%


def counted(ids: torch.Tensor) -> torch.Tensor:
    """How often each pair occurs, `[before, after]`."""
    counts = torch.zeros(V, V, dtype=torch.float64)
    return counts.index_put_((ids[:-1], ids[1:]), torch.ones((), dtype=torch.float64), accumulate=True)


pairs = counted(train) + 0.1  # so that no pair is impossible
singles = pairs.sum(0) / pairs.sum()
table = pairs / pairs.sum(1, keepdim=True)

marks = {
    "nothing": math.log(V),
    "characters": float(-singles[held_out[1:]].log().mean()),
    "pairs": float(-table[held_out[:-1], held_out[1:]].log().mean()),
}
assert marks["nothing"] > marks["characters"] > marks["pairs"]
print("held-out loss of the tables:", {name: round(value, 3) for name, value in marks.items()})

here = counted(held_out)
own = here / here.sum(1, keepdim=True).clamp_min(1)  # the table that this text would like
bound = -float(torch.xlogy(here, own).sum() / here.sum())
missing = float((torch.xlogy(here, own) - here * table.log()).sum() / here.sum())
print(f"the table of pairs: S + D = {bound:.3f} + {missing:.3f} = {bound + missing:.3f}")
assert abs(bound + missing - marks["pairs"]) < 1e-12 and missing > 0.05, "a table from elsewhere is above the bound"

# %% [markdown]
# ## Attention as a thermal average
#
# A position asks with a query $q$; position $j$ answers with a key $k_j$ and carries a value $v_j$. Call
# $\varepsilon_j = -q \cdot k_j$ an energy and $\sqrt h$ the temperature. Then
#
# $$p_j = \frac{e^{q \cdot k_j / \sqrt h}}{\sum_i e^{q \cdot k_i / \sqrt h}}, \qquad \text{output} = \sum_j p_j v_j =
# \langle v \rangle$$
#
# is a Boltzmann distribution and a thermal average. Two things follow at once.
#
# *Why $\sqrt h$.* If the $h$ entries of $q$ and $k$ are independent with mean 0 and variance 1, then $q \cdot k$ has
# variance $h$. Divided by $\sqrt h$ the scores are of order 1, whatever $h$: not frozen, not at infinite temperature.
#
# *The response is a fluctuation.* With $s_j$ the scores, $\partial p_i / \partial s_j = p_i (\delta_{ij} - p_j)$,
# hence
#
# $$\frac{\partial \langle v \rangle}{\partial s_j} = p_j \,(v_j - \langle v \rangle).$$
#
# The cell checks both: with $\sqrt h$ the spread of scores does not depend on $h$, without it it grows.

# %%
generator = torch.Generator().manual_seed(SEED)
for h in (4, 64, 1024):
    queries, keys = torch.randn(2, 4000, h, generator=generator)
    dots = (queries * keys).sum(-1)
    print(f"h = {h:4d}: spread of q·k / sqrt(h) {float((dots / h**0.5).std()):.2f}, of q·k {float(dots.std()):.1f}")
    assert abs(float((dots / h**0.5).std()) - 1) < 0.1

scores = torch.randn(6, generator=generator, dtype=torch.float64)
values = torch.randn(6, 3, generator=generator, dtype=torch.float64)  # [positions, h]
p = scores.softmax(0)
response = torch.autograd.functional.jacobian(lambda s: s.softmax(0) @ values, scores)  # [h, positions]
fluctuation = p[:, None] * (values - p @ values)
assert torch.allclose(response.T, fluctuation, atol=1e-14)
assert not torch.allclose(response.T, p[:, None] * values), "without the mean it would be wrong"

# %% [markdown]
# ## The network
#
# Let $x$ be the stream at position $p$, where token $t$ stands, and $E$, $P$ the tables of tokens and positions:
#
# $$\begin{aligned}
# x &= E_t + P_p \\
# q, k, v &= W_{q, k, v}\, \mathrm{LN}(x) + b_{q, k, v} \quad \text{in every head} \\
# x &\mathrel{+}= W_O\, [\langle v \rangle_1, \dots, \langle v \rangle_H] + b_O \\
# x &\mathrel{+}= W_2\, \mathrm{gelu}(W_1\, \mathrm{LN}(x) + b_1) + b_2 \\
# \text{logits} &= E\, \mathrm{LN}(x)
# \end{aligned}$$
#
# The middle three are a layer. Each of its two updates adds to the stream what it computes from the stream, and
# LayerNorm (LN) stands before every read; chapter 2 is about what that hides. `mask` says who sees whom: a lower
# triangle, so that nobody sees the future.

# %%


class Attention(nn.Module):
    def __init__(self, d: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(d, 3 * d)
        self.out = nn.Linear(d, d)

    def probabilities(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        T = x.shape[1]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, T, h]
        scores = q @ k.mT / q.shape[-1] ** 0.5  # [B, H, T, T]
        return scores.masked_fill(~mask[:T, :T], -math.inf).softmax(-1), v

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        p, v = self.probabilities(x, mask)
        return self.out((p @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, d: int, heads: int):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attention = Attention(d, heads)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm_1(x), mask)
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, mask: torch.Tensor, d: int = 48, heads: int = 4, layers: int = 2):
        super().__init__()
        self.register_buffer("mask", mask)  # [T, T]
        self.tokens = nn.Embedding(V, d)
        self.positions = nn.Embedding(len(mask), d)
        self.blocks = nn.ModuleList(Block(d, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(d)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.05)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits `[B, T, V]` of `ids` `[B, T]`."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, self.mask)
        return self.norm(x) @ self.tokens.weight.T  # the table of tokens serves twice


T = 32
causal = torch.ones(T, T, dtype=torch.bool).tril()
model = GPT(causal)
print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")

# %% [markdown]
# ## Three checks before training
#
# 1. An untrained model knows nothing: its loss is $\log V$, up to the size of its logits.
# 2. Causality: a change at position 20 changes no logit before it. Without the mask it does.
# 3. This *is* GPT-2: the class of the library with these weights gives the same logits. (It stores matrices as
#    `[inputs, outputs]`, hence the transposes.)

# %%


def windows(source: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Random windows `[count, T + 1]`."""
    starts = torch.randint(0, len(source) - T - 1, (count, 1), generator=generator)
    return source[starts + torch.arange(T + 1)]


def loss_of(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


def to_gpt2(model: GPT) -> GPT2LMHeadModel:
    d, T = model.tokens.weight.shape[1], len(model.mask)
    heads, layers = model.blocks[0].attention.heads, len(model.blocks)
    special = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(vocab_size=V, n_positions=T, n_embd=d, n_layer=layers, n_head=heads, **special)
    stock = GPT2LMHeadModel(config).eval()
    names = {"tokens": "wte", "positions": "wpe", "blocks": "h", "norm": "ln_f", "norm_1": "ln_1", "norm_2": "ln_2"}
    names |= {"attention": "attn", "qkv": "c_attn", "out": "c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
    target = stock.transformer.state_dict()
    for name, value in model.state_dict().items():
        if name != "mask":
            theirs = ".".join(names.get(piece, piece) for piece in name.split("."))
            linear = value.dim() == 2 and name.split(".")[-2] in ("qkv", "out", "up", "down")
            target[theirs].copy_(value.T if linear else value)
    return stock


measuring = windows(held_out, 128, torch.Generator().manual_seed(SEED))  # [128, T + 1]
with torch.no_grad():
    initial = float(loss_of(model, measuring))
    ids = measuring[:2, :-1]
    changed = ids.clone()
    changed[:, 20] = (changed[:, 20] + 1) % V
    change = (model(changed) - model(ids)).abs().amax((0, 2))  # [T]
    blind = GPT(torch.ones_like(causal))
    leak = float((blind(changed) - blind(ids)).abs()[:, :20].max())
    stock = float((to_gpt2(model)(ids).logits - model(ids)).abs().max() / model(ids).abs().max())

print(f"loss at the start {initial:.3f}, log V = {math.log(V):.3f}")
print(f"largest change before position 20: {float(change[:20].max()):.1e}, after: {float(change[20:].max()):.1e}")
print(f"without the mask: {leak:.1e} before position 20")
print(f"relative difference to transformers' GPT-2: {stock:.1e}")
assert abs(initial - math.log(V)) < 0.2
assert float(change[:20].max()) == 0 and float(change[20:].max()) > 1e-3 and leak > 1e-6
assert stock < 2e-5

# %% [markdown]
# ## Training, with a control
#
# The control is the same network, but every position sees itself only. Then the next character is predicted from this
# character (and from its place in the window, which says nothing). By the inequality above the bound for such a model
# is the conditional entropy of the text, however long it trains. The loss of the table lies $D$ above it. The control
# learns from the text that the table was counted on, so the two losses should be nearly equal. What the real one gains
# beyond them is gained by looking back. All three are measured on the same 128 windows of held-out text, which is why
# the table's loss differs in its last digits from the one above.

# %%
STEPS = 600


def trained(model: GPT, steps: int = STEPS) -> tuple[list[int], list[float]]:
    """Train in place; the steps at which the loss was measured on held-out text, and these losses."""
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-2, betas=(0.9, 0.98))
    rise_and_fall = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-2, total_steps=steps, pct_start=0.1)
    seen, losses = [], []
    for step in range(steps + 1):
        if step % 25 == 0:
            with torch.no_grad():
                seen.append(step)
                losses.append(float(loss_of(model, measuring)))
        if step < steps:
            loss = loss_of(model, windows(train, 24, generator))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rise_and_fall.step()
    return seen, losses


torch.manual_seed(SEED)
alone = GPT(torch.eye(T, dtype=torch.bool))
steps, losses = trained(model)
_, losses_alone = trained(alone)
pairs_here = float(-table[measuring[:, :-1], measuring[:, 1:]].log().mean())
print(
    f"held-out loss on the windows: GPT {losses[-1]:.3f}, without looking back {losses_alone[-1]:.3f}, "
    f"table of pairs {pairs_here:.3f}"
)
assert losses[-1] < pairs_here - 0.1, "it looks back, so it must beat the pairs"
assert abs(losses_alone[-1] - pairs_here) < 0.05, "it cannot look back, so it learns the table"

# %% [markdown]
# The first figure: both losses, and the three marks.

# %%
figure, (panel,) = panels(1, "A GPT beats the table of pairs because it looks back", width=6.4)
panel.plot(steps, losses, color=COLOURS[0], lw=2, label="GPT")
panel.plot(steps, losses_alone, color=COLOURS[1], lw=2, label="the same, sees only itself")
for style, (name, mark) in zip((":", "-.", "--"), (marks | {"pairs": pairs_here}).items(), strict=True):
    panel.axhline(mark, color="0.4", ls=style, lw=1, label=f"knows {name}: {mark:.2f}")
panel.set(
    xlabel="training step", ylabel="loss on held-out text (nats per character)", ylim=(1.5, 1.05 * marks["nothing"])
)
panel.legend(frameon=False)
show(
    figure,
    "loss",
    f"After {STEPS} steps the GPT has {losses[-1]:.2f} nats per character. A table of pairs has {pairs_here:.2f}, and "
    f"the same network without looking back {losses_alone[-1]:.2f}.",
)

# %% [markdown]
# ## Where it looks
#
# Attention probabilities of every head on a piece of held-out text: a row is the position that asks, and sums to 1.
# The entropy of a row, in units of the logarithm of the number of visible positions, says how hot the head is: 1 is
# infinite temperature, 0 is frozen. The figure shows the head that looks most at the character before it, and the
# hottest.

# %%
LENGTH = 32


@torch.no_grad()
def attention_maps(model: GPT, ids: torch.Tensor) -> list[torch.Tensor]:
    """Per layer the probabilities `[H, T, T]` of one row of ids `[1, T]`."""
    x, maps = model.tokens(ids) + model.positions.weight[: ids.shape[1]], []
    for block in model.blocks:
        maps.append(block.attention.probabilities(block.norm_1(x), model.mask)[0][0])
        x = block(x, model.mask)
    return maps


ids = measuring[:1, :LENGTH]
maps = attention_maps(model, ids)
rows = torch.cat(maps)  # [layers · H, T, T]
entropy = -(rows * rows.clamp_min(1e-12).log()).sum(-1)[:, 1:]
temperature = (entropy / torch.arange(2, LENGTH + 1).log()).mean(-1)  # [layers · H]
before = rows.diagonal(-1, 1, 2).mean(-1)  # [layers · H]
assert torch.allclose(rows.sum(-1), torch.ones(())) and float(rows.triu(1).max()) == 0

back, hottest = int(before.argmax()), int(temperature.argmax())
assert before[back] > 0.4 > before[hottest] and temperature[hottest] > 0.7 > temperature[back]
letters = [characters[i].replace("\n", "¶").replace(" ", "·") for i in ids[0]]
figure, axes = panels(2, "One head looks one character back, one looks everywhere", height=4.6)
for panel, head in zip(axes, (back, hottest), strict=True):
    drawn = panel.imshow(rows[head], cmap="cividis", vmin=0, vmax=1)
    panel.set_xticks(range(LENGTH), letters, fontsize=6)
    panel.set_yticks(range(LENGTH), letters, fontsize=6)
    layer, number = divmod(head, model.blocks[0].attention.heads)
    panel.set(title=f"layer {layer + 1}, head {number + 1}: entropy {float(temperature[head]):.2f} of the largest")
    panel.set(xlabel="looked at", ylabel="position that asks")
figure.colorbar(drawn, ax=axes, label="probability", shrink=0.8)
show(
    figure,
    "attention",
    f"Left the character before has {float(before[back]):.0%} of the probability on average, and the head has "
    f"{float(temperature[back]):.0%} of the largest entropy. The hottest head, right, has "
    f"{float(temperature[hottest]):.0%} of it and gives the character before {float(before[hottest]):.0%}.",
)

# %% [markdown]
# ## A sample
#
# Draw from the distribution, append, repeat.

# %%


@torch.no_grad()
def sample(model: GPT, start: str, length: int, generator: torch.Generator) -> str:
    ids = torch.tensor([[characters.index(character) for character in start]])
    for _ in range(length):
        p = model(ids[:, -T:])[0, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)[None]], 1)
    return "".join(characters[i] for i in ids[0])


print(sample(model, "return the ", 200, torch.Generator().manual_seed(SEED)))

# %% [markdown]
# ## What we saw

# %%
print(f"- An untrained GPT has a loss of {initial:.2f} nats, log V = {math.log(V):.2f}.")
print(f"- Counting pairs gives {pairs_here:.2f}; the GPT reaches {losses[-1]:.2f} in {STEPS} steps.")
print(f"- Confined to itself it stops at {losses_alone[-1]:.2f}: looking back is worth the rest.")
print(f"- It is the library's GPT-2 to {stock:.0e}, with heads between cold and hot.")

# %% [markdown]
# ## Exercises
#
# 1. Count the parameters of a GPT-2 with $L$ layers of $d$ dimensions, $V$ tokens and $T$ positions.
# 2. Take the positions away. Which permutations of the past leave the prediction for the last position alone?
# 3. What is $\partial^2 \log Z / \partial s_i \partial s_j$ for $Z = \sum_j e^{s_j}$, and what is it in the words
#    above?
#
# <details><summary>Solutions</summary>
#
# 1. Per layer: $3d^2 + 3d$ for queries, keys, values, $d^2 + d$ for the output, $4d^2 + 4d$ up, $4d^2 + d$ down,
#    $4d$ in two norms: $12 d^2 + 13 d$. Outside: $V d + T d + 2d$.
# 2. In one layer all of them: a sum over $j$ does not know an order. In two layers only the identity, for generic
#    weights and characters that differ: in the second layer the earlier positions have different pasts, and a position
#    with its past tells the order. (Equal characters may change places.) The check below tries all 120 orders of five.
# 3. First derivative: $p_i$. Second: $p_i \delta_{ij} - p_i p_j$, the covariance of the occupation numbers: the
#    fluctuation-dissipation theorem.
# </details>

# %% [markdown]
# Solution 1 as code: the count for our model, and for the published GPT-2, whose weights need not exist to be counted.


# %%
def count(L: int, d: int, V: int, T: int) -> int:
    return L * (12 * d**2 + 13 * d) + V * d + T * d + 2 * d


with torch.device("meta"):
    published = GPT2LMHeadModel(GPT2Config()).num_parameters()
ours = sum(parameter.numel() for parameter in model.parameters())
print(f"{ours:,} parameters here, {published:,} in GPT-2")
assert (ours, published) == (count(len(model.blocks), 48, V, T), count(12, 768, 50257, 1024))

# %% [markdown]
# Solution 2 as code: all orders of the past, with one layer and with two.

# %%


@torch.no_grad()
def changes_by_order(layers: int) -> torch.Tensor:
    """How much the last logits change with each order of five characters before it, without positions: `[120]`."""
    torch.manual_seed(SEED)
    network = GPT(causal, layers=layers).double()
    network.positions.weight.zero_()
    rows = torch.tensor([[*order, 5] for order in itertools.permutations(range(5))])  # the first is the identity
    last = network(rows)[:, -1]
    return (last - last[0]).abs().amax(1) / last[0].abs().max()


one, two = changes_by_order(1), changes_by_order(2)
print(f"{len(one)} orders, one layer: changes of at most {float(one.max()):.1e}")
print(f"two layers: {int((two < 1e-12).sum())} order changes nothing, the others at least {float(two[1:].min()):.1e}")
assert one.max() < 1e-12 < 1e-6 < two[1:].min()

# %% [markdown]
# Solution 3 as code, for the scores of the thermal average. Occupation numbers are rows of the unit matrix, row $i$
# with probability $p_i$. The control forgets to subtract their means.

# %%
hessian = torch.func.hessian(lambda s: s.logsumexp(0))(scores)
p, occupied = scores.softmax(0), torch.eye(len(scores), dtype=torch.float64)
covariance = (occupied - p).T @ (p[:, None] * (occupied - p))
by_covariance, by_square = (float((hessian - other).abs().max()) for other in (covariance, p.diag()))
print(f"Hessian less covariance {by_covariance:.0e}, less the mean square alone {by_square:.2f}")
assert by_covariance < 1e-14 < 0.01 < by_square

# %% [markdown]
# ## Further reading
#
# - A. Karpathy, nanoGPT: the same in one file that trains on a graphics card.
# - A. Vaswani and others, *Attention Is All You Need*, arXiv 1706.03762.
# - A. Radford and others, *Language Models are Unsupervised Multitask Learners* (2019): GPT-2.
# - N. Elhage and others, *A Mathematical Framework for Transformer Circuits* (2021): the stream, and who reads and
#   writes it.
# - C. Shannon, *Prediction and Entropy of Printed English*, Bell System Technical Journal 30 (1951).
