"""
A canonical member of every orbit: each frame is fixed to one that the function alone determines.

In this order, each step on the result of the one before: translations to zero and stretches balanced (`balance.py`);
the stream to the eigenbasis of its Gram matrix; spaces of tokens and heads to those of theirs, planes of rotary
positions to their principal axis; signs by an odd moment; heads and neurons sorted by norm.
"""

from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.utils import logging

from ..configuration_rigpt import RiGPTConfig
from .action import GaugeTransformation
from .balance import balance
from .contraction import Weights, contract, weights_of
from .frames import Axis, axes, frame_keys, in_layer, kind_of, prefix_of, row
from .groups import MatrixGroup, Role
from .local_frames import along, without_transports
from .permutations import HeadPermutations, NeuronGroup


logger = logging.get_logger(__name__)
# Eigenvalues (relative to the largest) and sorting keys (relative) closer than this count as equal.
DEGENERATE = 1e-9
# An anchor leads if it is longer than this part of the longest.
LEADS = 1e-6
# Frames that are one after balancing.
STREAMS = ("stream", "local")
# An odd moment this small decides no sign.
UNSIGNED = 1e-9


@dataclass
class CanonicalGauge:
    """
    How a model becomes canonical, and how well determined that is.

    Args:
        transformation (`GaugeTransformation`): from the model to its canonical form.
        gaps (`dict[str, float]`):
            For each kind of frame the smallest relative distance between two eigenvalues or sorting keys, or the
            smallest odd moment. Noise in the weights moves the canonical form by about noise / gap.
        undetermined (`list[str]`):
            What the spectra and moments above do not determine, in words. There the vectors themselves decide (those
            of tokens, keys, values, in order), or a third moment for heads and neurons of equal norm; where these
            coincide too the form is not canonical, unless the weights in question are equal or zero.
    """

    transformation: GaugeTransformation
    gaps: dict[str, float] = field(default_factory=dict)
    undetermined: list[str] = field(default_factory=list)

    def note(self, kind: str, gap: float, threshold: float, text: str) -> None:
        """Keep the smallest gap of a kind, and say so where it is below the threshold."""
        self.gaps[kind] = min(gap, self.gaps.get(kind, float("inf")))
        if gap < threshold:
            self.undetermined.append(text)


def canonicalize(model: nn.Module) -> nn.Module:
    """
    The canonical member of a model's orbit, as a new model of the same dtype.

    All models of one orbit give the same weights (to about 1e-12 in float64 for weights of order one), whatever
    rotation, stretch, translation or permutation in any frame lies between them. What a degenerate spectrum leaves
    open is logged; [`canonical_gauge`] returns it, with the transformation.

    Args:
        model: A RiGPT; it stays as it is.
    """
    gauge = canonical_gauge(model)
    for text in gauge.undetermined:
        logger.warning(f"The canonical form is not determined everywhere: {text}.")
    return gauge.transformation(model)


@torch.no_grad()
def canonical_gauge(model: nn.Module) -> CanonicalGauge:
    """The transformation to the canonical member of a model's orbit, and how well it is determined."""
    config = model.config
    total, weights = balance(config, weights_of(model))
    gauge = CanonicalGauge(total)
    for orient in (_sort_planes, _orient_stream, _orient_spaces, _sort):
        step = orient(config, weights, gauge)
        gauge.transformation, weights = step @ gauge.transformation, step.state_dict(weights)
    return gauge


@torch.no_grad()
def invariants(model: nn.Module) -> dict[str, torch.Tensor]:
    """
    Spectra that no gauge transformation changes, in descending order, float64.

    - `stream` `[d]`: eigenvalues of the stream's Gram matrix (of everything read from and written to it);
    - `lexical`, `output` `[D]`: singular values of the product of embedding and projections;
    - `layers.{i}.head_vo`, `layers.{i}.head_qk`: singular values of the maps that the heads of a layer apply, resp.
      score with, all heads together (eigenvalues of the Gram matrix where lengths matter, one value per plane where
      positions are rotary);
    - `layers.{i}.neurons`: least norm of each neuron; `layers.{i}.heads` of each query head.
    """
    config = model.config
    _, weights = balance(config, weights_of(model))
    result = {"stream": torch.linalg.eigvalsh(_stream_gram(config, weights)).flip(0)}
    for key, roles in contract(config, weights, weights, lambda key: kind_of(key) not in STREAMS).items():
        group = frame_keys(config)[key].group
        if isinstance(group, MatrixGroup):
            gram = group.symmetric((roles["vector"] + roles["covector"]) / 2)
            values = torch.linalg.eigvalsh(gram).flatten()
        elif isinstance(group, HeadPermutations):
            values = roles["query"].flatten()
        else:
            values = sum(roles.values()).flatten()
        result[key] = values.sort(descending=True).values
    return result


def _stream_gram(config: RiGPTConfig, weights: Weights) -> torch.Tensor:
    """Of everything that is read from and written to the stream, `[d, d]`."""
    weights = without_transports(weights)
    found = contract(config, weights, weights, lambda key: kind_of(key) in STREAMS)
    return torch.stack([gram[0] for roles in found.values() for gram in roles.values()]).sum(dim=0)


def _orient_stream(config: RiGPTConfig, weights: Weights, gauge: CanonicalGauge) -> GaugeTransformation:
    basis = _eigenbasis(_stream_gram(config, weights), token_vectors(weights), "stream", gauge)
    return GaugeTransformation(config, along(config, basis))


def token_vectors(weights: Weights) -> torch.Tensor:
    """What tokens and positions put into the stream: vectors `[N, d]` that no other frame touches."""
    vectors = weights["model.embed_tokens.weight"]
    if "model.project_in.weight" in weights:
        vectors = vectors @ weights["model.project_in.weight"].T
    if "model.embed_positions.weight" in weights:
        vectors = torch.cat([vectors, weights["model.embed_positions.weight"]])
    return vectors


def _sort_planes(config: RiGPTConfig, weights: Weights, gauge: CanonicalGauge) -> GaugeTransformation:
    """Learned frequencies positive and descending; of equal ones the plane that carries most comes first."""
    elements = {}
    keys = frame_keys(config)
    wanted = [key for key, frame in keys.items() if isinstance(frame.group, MatrixGroup) and frame.group.movable]
    for key, roles in contract(config, weights, weights, lambda key: key in wanted).items():
        group = keys[key].group
        assert isinstance(group, MatrixGroup)
        frequencies = weights[in_layer(_carrier(config, "planes"), prefix_of(key))]
        values, order = frequencies.abs().sort(dim=1, descending=True)
        gaps = values.diff(dim=1).abs() / values[:, :1].clamp_min(1e-300)
        if gaps.numel():
            gauge.note("planes", float(gaps.min()), DEGENERATE, f"two frequencies of a head in {key} are equal")
        first, second = group.pairs
        strengths = (roles["vector"] + roles["covector"]).diagonal(dim1=1, dim2=2)
        strengths = (strengths[:, first] + strengths[:, second]).gather(1, order)
        # Stable sorts, the last one first: by strength inside runs of equal frequencies.
        by_strength = strengths.sort(dim=1, descending=True, stable=True).indices
        runs = torch.cat([torch.zeros_like(values[:, :1]), (gaps >= DEGENERATE).to(values).cumsum(dim=1)], dim=1)
        by_run = runs.gather(1, by_strength).sort(dim=1, stable=True).indices
        order = order.gather(1, by_strength.gather(1, by_run))
        mirrored = (frequencies < 0).gather(1, order)
        elements[key] = torch.stack([group.moved_planes(*pair) for pair in zip(order, mirrored, strict=True)])
    return GaugeTransformation(config, elements)


def _orient_spaces(config: RiGPTConfig, weights: Weights, gauge: CanonicalGauge) -> GaugeTransformation:
    """Every space but the stream to its eigenbasis; the stream is canonical already, so its axes decide signs."""
    elements = {}
    keys = frame_keys(config)
    spaces = [key for key in keys if kind_of(key) not in STREAMS]
    wanted = [key for key in spaces if isinstance(keys[key].group, MatrixGroup)]
    for key, roles in contract(config, weights, weights, lambda key: key in wanted).items():
        group, copies = keys[key].group, keys[key].copies
        assert isinstance(group, MatrixGroup)
        grams = roles["vector"] + roles["covector"]
        anchors = _anchors(config, weights, key)
        vectors = anchors.reshape(len(anchors), copies, group.n).transpose(0, 1)
        elements[key] = torch.stack(
            [_orientation(group, gram, around, key, gauge) for gram, around in zip(grams, vectors, strict=True)]
        )
    return GaugeTransformation(config, elements)


def _anchors(config: RiGPTConfig, weights: Weights, key: str) -> torch.Tensor:
    """
    All vectors `[N, copies · n]` in this frame that only the stream and the order of key-value heads turn; of those
    that every query head has of its own, the sums over the query heads of a key-value head.
    """
    kind, frame = kind_of(key), frame_keys(config)[key]
    found = []
    for name, entry in axes(config).items():
        dims = [dim for dim, axis in enumerate(entry) if any(turn.frame == kind for turn in axis)]
        parameter = weights.get(in_layer(name, prefix_of(key)))
        if parameter is None or len(entry) != 2 or not dims or not all(_is_inert(axis, kind) for axis in entry):
            continue
        assert isinstance(frame.group, MatrixGroup)
        vectors = parameter.movedim(dims[0], 0)
        summed = vectors.reshape(frame.copies, -1, frame.group.n, vectors.shape[1]).sum(dim=1)
        found.append(summed.reshape(frame.copies * frame.group.n, -1).T)
    return torch.cat(found)


def _is_inert(axis: Axis, kind: str) -> bool:
    return all(turn.frame in {*STREAMS, "heads", kind} for turn in axis)


def _carrier(config: RiGPTConfig, role: Role) -> str:
    """The parameter that carries a role which only one does."""
    return next(
        name for name, entry in axes(config).items() if any(turn.role == role for axis in entry for turn in axis)
    )


def _orientation(
    group: MatrixGroup, gram: torch.Tensor, anchors: torch.Tensor, key: str, gauge: CanonicalGauge
) -> torch.Tensor:
    """The compact element `[n, n]` that makes the Gram matrix diagonal as far as the group allows, signs fixed."""
    first, second = group.pairs
    # The principal axis of each plane becomes its first dimension.
    across, along = 2 * gram[first, second], gram[first, first] - gram[second, second]
    angles = -torch.atan2(across, along) / 2
    if group.planes:
        # Where there is none, the first anchor that has something in the plane does.
        size = (gram[first, first] + gram[second, second]).clamp_min(1e-300)
        lengths = torch.hypot(anchors[:, first], anchors[:, second])
        leader = (lengths > LEADS * lengths.max().clamp_min(1e-300)).double().argmax(dim=0, keepdim=True)
        leading = [anchors[:, index].gather(0, leader)[0] for index in (first, second)]
        round_one = torch.hypot(across, along) <= DEGENERATE * size
        angles = torch.where(round_one, -torch.atan2(leading[1], leading[0]), angles)
    element = group.from_planes(angles, torch.ones_like(angles))
    if group.planes:
        gap = float((torch.hypot(across, along) / size).min())
        gauge.note("planes", gap, DEGENERATE, f"a plane of {key} has no principal axis")
        moments = odd_moments((anchors @ element.T)[:, first])
        gauge.note("signs", float(moments.abs().min()), UNSIGNED, f"the sign of a plane of {key}")
        turn = torch.where(moments < 0, -1.0, 1.0).double()
        element[first], element[second] = turn[:, None] * element[first], turn[:, None] * element[second]
    if group.rest:
        index = torch.tensor(group.rest)
        block = index[:, None], index
        element[block] = _eigenbasis(gram[block], anchors[:, index], key, gauge)
    return element


def _eigenbasis(gram: torch.Tensor, anchors: torch.Tensor, key: str, gauge: CanonicalGauge) -> torch.Tensor:
    """
    Rows are the eigenvectors of `gram` `[n, n]`, by descending eigenvalue, with positive odd moment over `anchors`.

    Where eigenvalues coincide, the anchors `[N, n]` themselves, made orthogonal in their order, are the basis.
    """
    values, vectors = torch.linalg.eigh(gram)
    values, rows = values.flip(0), vectors.flip(1).T.clone()
    kind = kind_of(key)
    gaps = (values[:-1] - values[1:]) / values[0].clamp_min(1e-300)
    for start, end in _clusters(gaps):
        empty = float(values[start]) <= DEGENERATE * float(values[0])
        text = f"{end - start} equal eigenvalues in {key}" + (", all zero" if empty else "")
        gauge.note(kind, float(gaps[start : end - 1].min()), DEGENERATE, text)
        rows[start:end] = _orthogonalised(anchors @ rows[start:end].T, float(anchors.norm())) @ rows[start:end]
    if len(gaps):
        gauge.note(kind, float(gaps.min()), 0.0, "")
    coordinates = anchors @ rows.T
    moments = odd_moments(coordinates)
    filled = coordinates.norm(dim=0) > DEGENERATE * anchors.norm()  # elsewhere either sign is right
    if filled.any():
        weak = int((moments[filled].abs() < UNSIGNED).sum())
        gauge.note("signs", float(moments[filled].abs().min()), UNSIGNED, f"{weak} signs in {key}")
    return torch.where(moments < 0, -1.0, 1.0).double()[:, None] * rows


def _clusters(gaps: torch.Tensor) -> list[tuple[int, int]]:
    """Runs of eigenvalues without a gap between neighbours, as half-open ranges of more than one."""
    clusters, start = [], 0
    for index, gap in enumerate([*gaps.tolist(), 1.0]):
        if gap >= DEGENERATE:
            if index > start:
                clusters.append((start, index + 1))
            start = index + 1
    return clusters


def _orthogonalised(vectors: torch.Tensor, scale: float) -> torch.Tensor:
    """An orthogonal matrix `[m, m]` whose rows are the vectors `[N, m]`, orthogonalised in order; completed if few."""
    size = vectors.shape[1]
    rows: list[torch.Tensor] = []
    for vector in [*vectors, *torch.eye(size, dtype=vectors.dtype)]:
        if len(rows) == size:
            break
        for _ in range(2):  # once more, against rounding
            for previous in rows:
                vector = vector - (previous @ vector) * previous
        if vector.norm() > 1e-6 * max(scale, 1e-300) / len(vectors) ** 0.5:
            rows.append(vector / vector.norm())
    return torch.stack(rows)


def odd_moments(coordinates: torch.Tensor) -> torch.Tensor:
    """Third moments along the columns of `[N, n]`, relative to the second: they turn their sign with the axis."""
    norms = coordinates.square().sum(dim=0).sqrt().clamp_min(1e-300)
    return (coordinates / norms).pow(3).sum(dim=0) * len(coordinates) ** 0.5


def _sort(config: RiGPTConfig, weights: Weights, gauge: CanonicalGauge) -> GaugeTransformation:
    """Heads and neurons by descending norm; linear factors of gated neurons get a positive odd moment."""
    elements = {}
    keys = frame_keys(config)
    wanted = [key for key, frame in keys.items() if isinstance(frame.group, HeadPermutations | NeuronGroup)]
    for key, roles in contract(config, weights, weights, lambda key: key in wanted).items():
        group = keys[key].group
        if isinstance(group, HeadPermutations):
            queries = roles["query"][0].reshape(group.key_value_heads, group.repeats)
            second = _odd_sums(config, weights, key, "query").reshape(queries.shape)
            shared = _odd_sums(config, weights, key, "key_value") + second.sum(dim=1)
            heads = _descending(roles["key_value"][0] + queries.sum(dim=1), shared, key, gauge)
            inside = torch.stack(
                [_descending(*pair, key, gauge) for pair in zip(queries[heads], second[heads], strict=True)]
            )
            elements[key] = group.from_parts(heads, inside)
        elif isinstance(group, NeuronGroup):
            order = _descending(sum(roles.values())[0], _odd_sums(config, weights, key, "active"), key, gauge)
            signs = torch.ones(group.n).double()
            if group.gated:
                moments = odd_moments(weights[in_layer(_carrier(config, "linear"), prefix_of(key))].T)
                gauge.note("signs", float(moments.abs().min()), UNSIGNED, f"the sign of a neuron in {key}")
                signs = torch.where(moments < 0, -1.0, 1.0).double()
            elements[key] = group.element(order, torch.ones(group.n), signs)
    return GaugeTransformation(config, elements)


def _odd_sums(config: RiGPTConfig, weights: Weights, key: str, role: Role) -> torch.Tensor:
    """For each head or neuron the sum of the cubes of its weights in one role; other frames are canonical by now."""
    totals = []
    for name, tensor in weights.items():
        entry, layer = row(name, axes(config))
        for dim, axis in enumerate(entry):
            if layer == prefix_of(key) and any(turn.frame == kind_of(key) and turn.role == role for turn in axis):
                heads = {"query": config.num_attention_heads, "key_value": config.num_key_value_heads}
                count = heads.get(role, config.intermediate_size)
                front = tensor.flatten() if len(entry) == 1 else tensor.movedim(dim, 0)
                totals.append(front.reshape(count, -1).pow(3).sum(dim=1))
    return torch.stack(totals).sum(dim=0)


def _descending(values: torch.Tensor, spare: torch.Tensor, key: str, gauge: CanonicalGauge) -> torch.Tensor:
    """The order that sorts `values`; where they coincide, `spare` decides."""
    values, order = values.sort(descending=True)
    if len(values) > 1:
        gaps = (values[:-1] - values[1:]) / values[0].clamp_min(1e-300)
        ties = int((gaps < DEGENERATE).sum())
        gauge.note(kind_of(key), float(gaps.min()), DEGENERATE, f"{ties} equal norms in {key}")
        for start, end in _clusters(gaps):
            order[start:end] = order[start:end][spare[order[start:end]].argsort(descending=True)]
    return order
