"""
Sketches of the maps inside a network that no choice of frames changes, from one pass over its weights.

Shapes: `d` residual stream, `k` probes, `V` vocabulary.

Tokens are the same in every frame, so a sum of token vectors with fixed signs is a direction of the residual stream
that turns with it: a *probe*. A map from the stream into a head or a layer of neurons and out again, `Σ covector
vectorᵀ` over the inner frame, does not depend on that frame; between two probes it is a number that depends on no
frame at all. The sums are taken of the dual vectors `E (EᵀE)⁻¹`, in which the large directions of a token table, which
show the text and not the model, are small.

Every weight meets the probes once: 2 · k multiplications per parameter, one tensor in memory at a time.
"""

from collections.abc import Callable, Collection, Iterator
from math import ceil, frexp

import numpy as np
import torch

from ..configuration_rigpt import RiGPTConfig
from ..frames import CARRY, FrameKey, Table, is_token_table, layer_of, table_of
from ..groups import NeuronGroup
from ..table import STREAMS, Turned


Read = Callable[[str], torch.Tensor]
# Maps that are sketched: of queries and keys, of values and outputs, of neurons (of experts too).
KINDS = ("head_qk", "head_vo", "neurons")
# Roles of the two sides of a map, by kind; where several may be, the first that is there.
SIDES = {
    "head_qk": (("vector",), ("covector",)),
    "head_vo": (("covector",), ("vector",)),
    "neurons": (("down",), ("linear", "active")),
}
# Rows of queries and keys, and the gains of their norms.
GAINS = {"query_rows": "query_gain", "key_rows": "key_gain"}
TOKENS = "model.embed_tokens.weight"
# Rows that are brought to float64 at a time: few enough that they stay near the processor.
CHUNK = 256
# Rows of the token table of which `EᵀE` is taken: so many per dimension, up to a multiple of another number, which all
# fingerprints have had from the first; and the share of its mean eigenvalue that is added.
ROWS, MULTIPLE, SHRINKAGE = 8, 4096, 1e-2
# Token vectors count as if they were no longer than so many times their median.
LONGEST = 3.0


def signs(first: int, count: int, probes: int, salt: int = 0) -> torch.Tensor:
    """
    The sign of tokens `first` to `first + count` in every probe, `[count, probes]`; the same for ever and everywhere.

    Bits of the finaliser of MurmurHash3 on 64 bits, of the token's number, the probe's and `salt`.
    """
    token = np.arange(first, first + count, dtype=np.uint64)[:, None]
    hashed: np.ndarray = (token << np.uint64(8)) + np.arange(probes, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    hashed = hashed ^ np.uint64(salt)
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        hashed = (hashed ^ (hashed >> np.uint64(33))) * np.uint64(factor)
    bits = (hashed ^ (hashed >> np.uint64(33))) & np.uint64(1)
    return torch.from_numpy(bits.astype(np.float64) * 2 - 1)


def sketch(
    config: RiGPTConfig,
    names: Collection[str],
    read: Read,
    probes: int,
    salt: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """
    The sketches of a model, `[layers, kinds, k, k]` in float64, each of norm 1; zero where a layer has no such map.

    Args:
        config: The model's configuration.
        names: Its parameters.
        read: Gives a parameter.
        probes: Their number `k`.
        salt: Of their signs, 64 bits.
        tick: Called after every tensor.
    """
    table = table_of(config)
    directions = _directions(table, names, read, probes, salt)
    result = torch.zeros(config.num_hidden_layers, len(KINDS), probes, probes, dtype=torch.float64)
    for layer in range(config.num_hidden_layers):
        met: dict[tuple[str, str], list[tuple[str, torch.Tensor]]] = {}
        for name in (name for name in names if layer_of(name) == layer):
            for kind, turned in _inner(table, name):
                projected = _projected(table, turned, name, names, read, directions)
                met.setdefault((kind, turned.key.kind), []).append((turned.role, projected))
            tick()
        for (kind, frame), parts in met.items():
            copies = table.frames.get(FrameKey(frame, layer), table.kinds[frame]).copies
            result[layer, KINDS.index(kind)] += _contracted(kind, parts, copies)
    return result / result.flatten(2).norm(dim=2).clamp_min(1e-300)[..., None, None]


def _directions(
    table: Table, names: Collection[str], read: Read, probes: int, salt: int
) -> dict[FrameKey | None, torch.Tensor]:
    """
    The probes `[k, d]` as every frame of the residual stream has them; under `None` as the frame without freedom that
    lies behind the norms of outputs has them.
    """
    stream = FrameKey("stream")
    directions: dict[FrameKey | None, torch.Tensor] = {stream: _probes(table, names, read, probes, salt)}
    here = directions[stream]
    for name, key in zip(table.transports, table.streams[1:], strict=False):
        here = directions[key] = here @ read(name).double().T
    if CARRY in names:
        directions[None] = directions[stream] @ read(CARRY).double()
    return directions


def _probes(table: Table, names: Collection[str], read: Read, probes: int, salt: int) -> torch.Tensor:
    """Sums of the duals of token vectors with signs, `[k, d]`, each of norm 1."""
    tokens, inward = read(TOKENS), None
    for name in names:  # from the tokens' own frame into the stream
        if any(table.role_on(name, kind) == "reads" for kind in ("lexical", "entry")) and _is_inward(table, name):
            inward = read(name).double() if inward is None else read(name).double() @ inward

    inward = None if inward is None else inward * _near_one(inward)
    scale = _near_one(tokens)
    # A row that dwarfs all others, say of a token that is never used, must not be all that a probe is made of. Few
    # digits of lengths will do, as long as they are the same in every frame.
    algebra = torch.promote_types(tokens.dtype, torch.float32)
    guess = None if inward is None else inward.to(algebra)
    parts = [(start, tokens[start : start + CHUNK]) for start in range(0, len(tokens), CHUNK)]
    lengths = torch.cat([_into(guess, (part.double() * scale).to(algebra)).norm(dim=1) for _, part in parts]).double()
    shares = scale * (LONGEST * lengths.median() / lengths.clamp_min(1e-300)).clamp_max(1.0)[:, None]
    mean = torch.stack([shares[i : i + CHUNK].T @ part.double() for i, part in parts]).sum(0) / len(tokens)
    sums, gram = mean.new_zeros(probes, mean.shape[1]), mean.new_zeros(mean.shape[1], mean.shape[1])
    for start, part in parts:
        rows = part.double() * shares[start : start + CHUNK] - mean
        sums += signs(start, len(rows), probes, salt).T @ rows
        if start < MULTIPLE * ceil(ROWS * rows.shape[1] / MULTIPLE):
            gram += rows.T @ rows
    values, directions = torch.linalg.eigh(_into(inward, _into(inward, gram).T))
    dual = (_into(inward, sums) @ directions / (values.clamp_min(0) + SHRINKAGE * values.mean())) @ directions.T
    return dual / dual.norm(dim=1, keepdim=True)


def _near_one(tensor: torch.Tensor) -> float:
    """The power of two that brings the largest absolute value near 1, so that no square of it is out of range."""
    return 2.0 ** min(-frexp(max(abs(float(value)) for value in tensor.aminmax()))[1], 1000)


def _into(inward: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
    """Rows of the tokens' own frame in that of the stream, into which `inward` leads, if it is another."""
    return rows if inward is None else rows @ inward.T


def _is_inward(table: Table, name: str) -> bool:
    """Whether a map leads towards the stream: its first axis is one of the stream, or of where it begins."""
    return any(turned.dim == 0 and turned.key.kind in ("stream", "entry") for turned in table.turns(name))


def _inner(table: Table, name: str) -> Iterator[tuple[str, Turned]]:
    """The kind of map that a parameter is one side of, and the entry of its axis that is not the stream's."""
    turns = table.turns(name)
    inner = {turned.dim for turned in turns if turned.key.kind not in STREAMS}
    if table.rank(name) != 2 or len(inner) != 1 or is_token_table(name):
        return
    for turned in turns:
        if turned.stacked or turned.key not in table.frames:
            continue
        is_neuron = isinstance(table.frames[turned.key].group, NeuronGroup)
        kind = "neurons" if is_neuron else turned.key.kind
        if kind in KINDS and any(turned.role in roles for roles in SIDES[kind]):
            yield kind, turned


def _projected(
    table: Table,
    inner: Turned,
    name: str,
    names: Collection[str],
    read: Read,
    directions: dict[FrameKey | None, torch.Tensor],
) -> torch.Tensor:
    """One side of a map with its stream side replaced by the probes, `[rows, k]`."""
    outer = next((turned.key for turned in table.turns(name) if turned.key.kind in STREAMS), None)
    group = table.frames[inner.key].group
    axes = directions[outer].T
    projected = torch.cat([rows.double() @ axes for rows in inner.unfold(read(name)).split(CHUNK)])
    if isinstance(group, NeuronGroup) and group.degree is not None and inner.role != "down":
        # An activation of degree p lets out a scale with that power, which the other side undoes.
        active = next(other for other, _ in table.carriers(inner.key, "active") if other in names)
        lengths = inner.unfold(read(active)).double().norm(dim=1, keepdim=True)
        projected = projected * lengths ** (group.degree - (inner.role == "active"))
    for turned in table.turns(name):
        if turned.role in GAINS:  # by gains, with which they may change signs and scales
            gain = next((other for other, _ in table.carriers(turned.key, GAINS[turned.role]) if other in names), None)
            values = read(gain).double().flatten() if gain else torch.ones(1).double()
            projected = projected * values.repeat(len(projected) // len(values))[:, None]
    return projected


def _contracted(kind: str, parts: list[tuple[str, torch.Tensor]], copies: int) -> torch.Tensor:
    """`Σ` over the inner frame of both sides of a map, `[k, k]`; query heads of one copy are added up first."""
    sides = []
    for roles in SIDES[kind]:
        there = next((role for role in roles if any(role == other for other, _ in parts)), None)
        if there is None:
            return torch.zeros(parts[0][1].shape[1], parts[0][1].shape[1], dtype=torch.float64)
        sides.append(torch.stack([rows for role, rows in parts if role == there]).sum(dim=0))
    size = min(map(len, sides)) // copies
    first, second = (side.reshape(copies, -1, size, side.shape[1]).sum(dim=1).flatten(0, 1) for side in sides)
    return first.T @ second
