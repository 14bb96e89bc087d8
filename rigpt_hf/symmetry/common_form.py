"""
Two models that are the same to whoever uses them, brought to one configuration: frames alone lie between them then.

Each step rewrites one model exactly, tensor by tensor when they are asked for: the function of the result is that of
the model, on the tokens and positions that both have. What is left out of one, as the other lacks it, is said.

    tied or not          a tied table becomes two; the head pairs with the copy
    projections or none  `E Uᵀ` and `H G` in the place of `E`, `H`; where the table is tied, or what is added in front
                         of it leaves no other way, identities, and dimensions of zeros up to the wider of the two
    biases               those that one lacks are 0
    vocabularies         rows beyond the smaller one are left out
    positions            rows of a learned table beyond the shorter one are left out
    the stream's scale   `x` by `c` and `eps` by `c²` is one function: writers take `c` over
    rotations, layers    other words for the same frequencies, or for layers that all see everything
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from ..checkpoints.opened import MadeWeights, OpenedModel
from ..checkpoints.write import Entry
from ..configuration_rigpt import ADAPTIVE_SOLVERS, RiGPTConfig
from ..frames import is_choice_of_frames, is_token_table, table_of
from ..layers_rigpt import FULL, is_turned, of_layer
from ..modeling_rigpt import RiGPTForCausalLM
from ..rope_rigpt import rotary_frequencies
from .alignment import check_alike, is_promised


BIASES = ("attention_bias", "attention_output_bias", "mlp_bias", "output_bias", "qk_norm_bias")
TABLE, HEAD, POSITIONS = "model.embed_tokens.weight", "lm_head.weight", "model.embed_positions.weight"
INTO, OUT, OUT_BIAS = "model.project_in.weight", "model.project_out.weight", "model.project_out.bias"
MAP = "model.embedding_map.weight"
# The scale of a stream explains two values of `eps` if it agrees with them within this part.
SAME_SCALE = 0.05
# Singular values of so many units in the last place are zeros that were rounded.
UNSEEN = 4
# Numbers in float64 that are held at a time.
BLOCK = 2**22
# What says more of models that have no common form.
ELSEWHERE = "`rigpt fingerprint` says how near models of different shape are."


def in_common_form(a: OpenedModel, b: OpenedModel) -> tuple[OpenedModel, OpenedModel, list[str]]:
    """
    Two models with one configuration, each the same function as before on what both have.

    Args:
        a, b (`OpenedModel`): not changed. Weights are read only where two values of `eps` must be explained.

    Returns:
        `tuple`: the two, and in words what was left out of one, or must be known of it.

    Raises:
        ValueError: if their configurations differ in more; the message names the first field that does.
    """
    notes: list[str] = []
    for step in STEPS:
        a, b = step(a, b, notes)
    try:
        check_alike(a.config, b.config, (a.name, b.name))
    except ValueError as error:
        raise ValueError(f"{error} {ELSEWHERE}") from error
    return a, b, notes


def all_in_common_form(models: Sequence[OpenedModel]) -> tuple[list[OpenedModel], list[str]]:
    """The same of any number of models; the first decides where there is a choice."""
    form, notes = models[0], list[str]()
    for model in models[1:]:
        form, _, said = in_common_form(form, model)
        notes += said
    return [form, *(in_common_form(form, model)[1] for model in models[1:])], list(dict.fromkeys(notes))


def changed(
    model: OpenedModel, fields: Mapping[str, Any], entries: Mapping[str, tuple[torch.dtype, Callable]] | None = None
) -> OpenedModel:
    """
    A model under another configuration, with some of its tensors made anew; biases that are new are 0.

    Args:
        model (`OpenedModel`): not changed.
        fields (`Mapping[str, Any]`): fields of the configuration, and their values.
        entries (`Mapping[str, tuple]`, *optional*): by name the dtype of a tensor, and what makes it in any.
    """
    if all(getattr(model.config, name) == value for name, value in fields.items()) and not entries:
        return model
    config = RiGPTConfig(**(model.config.to_dict() | {"token_symmetry": None} | dict(fields)))
    before, dtypes, made = model.weights.entries, {}, []
    with torch.device("meta"):
        skeleton = dict(RiGPTForCausalLM(config).named_parameters())
    for name, parameter in skeleton.items():
        shape = tuple(parameter.shape)
        if entries and name in entries:
            dtypes[name], make = entries[name]
        elif name in before:
            dtypes[name], make = model.weights.dtypes[name], before[name].make
        else:
            assert name.endswith("bias"), name
            dtypes[name], make = model.stored_dtype, _zeros(shape)
        made.append(Entry(name, shape, make))
    return replace(model, config=config, weights=MadeWeights(made, dtypes, model.weights.origin))


def _zeros(shape: tuple[int, ...]) -> Callable[[torch.dtype], torch.Tensor]:
    return lambda dtype: torch.zeros(shape, dtype=dtype)


def _computed(model: OpenedModel, *names: str) -> torch.dtype:
    """The dtype of what is computed from tensors of a model."""
    dtype = torch.float32
    for name in names:
        dtype = torch.promote_types(dtype, model.weights.dtypes[name])
    return dtype


def same_vocabulary(a: OpenedModel, b: OpenedModel, notes: list[str]) -> tuple[OpenedModel, OpenedModel]:
    """The tokens that both have."""
    size = min(a.config.vocab_size, b.config.vocab_size)
    return tuple(_cut(model, "vocab_size", size, "tokens", is_token_table, notes) for model in (a, b))  # type: ignore


def same_positions(a: OpenedModel, b: OpenedModel, notes: list[str]) -> tuple[OpenedModel, OpenedModel]:
    """The positions that both have, where they are rows of a table; a length that is only promised is that of both."""
    learned = [model.config.position_embedding_type == "learned" for model in (a, b)]
    size, field = min(model.config.max_position_embeddings for model in (a, b)), "max_position_embeddings"
    if all(learned):
        return tuple(_cut(model, field, size, "positions", POSITIONS.__eq__, notes) for model in (a, b))  # type: ignore
    if is_promised(a.config) and is_promised(b.config):
        return changed(a, {field: size}), changed(b, {field: size})
    return a, b


def _cut(
    model: OpenedModel, field: str, size: int, what: str, is_table: Callable[[str], bool], notes: list[str]
) -> OpenedModel:
    """The first rows of the tables of a model."""
    before = getattr(model.config, field)
    if before == size:
        return model
    notes.append(f"Of the {before:,} {what} of {model.name} the first {size:,} are compared; the other has no more.")

    def rows(make: Callable) -> Callable[[torch.dtype], torch.Tensor]:
        return lambda dtype: make(dtype)[:size].clone()

    weights = model.weights
    tables = {name: entry for name, entry in weights.entries.items() if is_table(name)}
    return changed(
        model, {field: size}, {name: (weights.dtypes[name], rows(entry.make)) for name, entry in tables.items()}
    )


def same_biases(a: OpenedModel, b: OpenedModel, notes: list[str]) -> tuple[OpenedModel, OpenedModel]:
    """Biases wherever one of the two has some."""
    wanted = {name: getattr(a.config, name) or getattr(b.config, name) for name in BIASES}
    for name, needed in (("qk_norm_bias", "qk_norm"), ("output_bias", "embedding_size")):
        if not (getattr(a.config, needed) and getattr(b.config, needed)):
            wanted[name] = False
    fields = {name: value for name, value in wanted.items() if value}
    return changed(a, fields), changed(b, fields)


def same_tables(a: OpenedModel, b: OpenedModel, notes: list[str]) -> tuple[OpenedModel, OpenedModel]:
    """Tables that are tied or not, in spaces of one size: that of the stream itself where that is possible."""
    tied = [model.config.tie_word_embeddings for model in (a, b)]
    if tied[0] == tied[1] and a.config.embedding_size == b.config.embedding_size:
        return a, b
    if a.config.hidden_size != b.config.hidden_size:
        return _untied(a, tied), _untied(b, tied)
    size = max(model.config.lexical_size for model in (a, b))
    if all(tied):
        return _widened(_with_projections(a), size), _widened(_with_projections(b), size)
    a, b = _untied(a, tied), _untied(b, tied)
    biased = any(model.config.output_bias for model in (a, b))
    sizes = {model.config.embedding_size for model in (a, b)}
    if not biased and (len(sizes) > 1 or None in sizes):
        return _without_projections(a), _without_projections(b)
    return _widened(_without_unseen(_with_projections(a)), size), _widened(_without_unseen(_with_projections(b)), size)


def _untied(model: OpenedModel, tied: list[bool]) -> OpenedModel:
    """A table of its own for the head of a model that shares one, unless both do."""
    if not model.config.tie_word_embeddings or all(tied):
        return model
    head = model.weights.dtypes[TABLE], model.weights.entries[TABLE].make
    return changed(model, {"tie_word_embeddings": False}, {HEAD: head})


def _without_projections(model: OpenedModel) -> OpenedModel:
    """`E Uᵀ` and `H G` `[V, d]`: the tables as the stream meets them."""
    if model.config.embedding_size is None:
        return model
    make = {name: model.weights.entries[name].make for name in (TABLE, INTO, HEAD, OUT)}
    tables = {
        TABLE: (_computed(model, TABLE, INTO), lambda dtype: _times(make[TABLE], make[INTO](torch.float64).T, dtype)),
        HEAD: (_computed(model, HEAD, OUT), lambda dtype: _times(make[HEAD], make[OUT](torch.float64), dtype)),
    }
    return changed(model, {"embedding_size": None}, tables)


def _without_unseen(model: OpenedModel) -> OpenedModel:
    """
    Zeros for what nobody sees of free tables: parts of `E` that `U` takes to 0, and parts of `H` to which neither `G`
    nor the bias behind it leads. They could be anything, and no frame turns them.
    """
    entries, eps = model.weights.entries, torch.finfo(model.stored_dtype).eps

    def read(name: str) -> torch.Tensor:
        return entries[name].make(torch.float64)

    @cache
    def seen(table: str) -> torch.Tensor:
        """A basis of what is seen of the space of a table, and columns of zeros: `[D, D]`."""
        ends = [read(INTO).T] if table == TABLE else [read(OUT)]
        if table == HEAD and OUT_BIAS in entries:
            ends.append(read(OUT_BIAS)[:, None])
        basis, sizes, _ = torch.linalg.svd(torch.cat(ends, dim=1), full_matrices=False)
        basis = basis[:, sizes > UNSEEN * eps * sizes[0]]
        return torch.nn.functional.pad(basis, (0, len(basis) - basis.shape[1]))

    made = {
        TABLE: lambda dtype: _times(entries[TABLE].make, seen(TABLE), dtype),
        INTO: lambda dtype: (read(INTO) @ seen(TABLE)).to(dtype),
        HEAD: lambda dtype: _times(entries[HEAD].make, seen(HEAD), dtype),
        OUT: lambda dtype: (seen(HEAD).T @ read(OUT)).to(dtype),
        OUT_BIAS: lambda dtype: (seen(HEAD).T @ read(OUT_BIAS)).to(dtype),
    }
    return changed(model, {}, {name: (_computed(model, name), make) for name, make in made.items() if name in entries})


def _times(table: Callable[[torch.dtype], torch.Tensor], matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A table `[V, n]` times a matrix `[n, m]`, in float64, some rows at a time."""
    rows = table(torch.promote_types(dtype, torch.float32))
    result = torch.empty(len(rows), matrix.shape[1], dtype=dtype)
    step = max(1, BLOCK // rows.shape[1])
    for part, place in zip(rows.split(step), result.split(step), strict=True):
        place.copy_(part.to(torch.float64) @ matrix)
    return result


def _with_projections(model: OpenedModel) -> OpenedModel:
    """Identities between the tables and the stream."""
    size = model.config.hidden_size
    if model.config.embedding_size is not None:
        return model
    eye = model.stored_dtype, lambda dtype: torch.eye(size, dtype=dtype)
    return changed(model, {"embedding_size": size}, {INTO: eye, OUT: eye})


def _widened(model: OpenedModel, size: int) -> OpenedModel:
    """Tables with more dimensions, all 0."""
    more = size - model.config.lexical_size
    if more == 0:
        return model

    def padded(make: Callable, *sides: int) -> Callable[[torch.dtype], torch.Tensor]:
        return lambda dtype: torch.nn.functional.pad(make(dtype), sides)

    weights, columns, rows = model.weights, (0, more), (0, 0, 0, more)
    sides = {TABLE: columns, HEAD: columns, INTO: columns, OUT: rows, OUT_BIAS: columns}
    return changed(
        model,
        {"embedding_size": size},
        {
            name: (weights.dtypes[name], padded(weights.entries[name].make, *where))
            for name, where in sides.items()
            if name in weights.entries
        },
    )


def same_scale(a: OpenedModel, b: OpenedModel, notes: list[str]) -> tuple[OpenedModel, OpenedModel]:
    """The stream of the second at the scale of the first, if that is what lies between two values of `eps`."""
    eps = a.config.rms_norm_eps, b.config.rms_norm_eps
    if eps[0] == eps[1] or min(eps) == 0 or not (_scales(a.config) and _scales(b.config)):
        return a, b
    if a.config.hidden_size != b.config.hidden_size:
        return a, b
    ratio = (stream_size(a) / max(stream_size(b), 1e-300)) ** 2
    if abs(ratio * eps[1] / eps[0] - 1) > SAME_SCALE:
        return a, b
    if any(model.config.tie_word_embeddings for model in (a, b)):
        a, b = _with_projections(a), _with_projections(b)
    notes.append(
        f"The residual stream of {b.name} is {(eps[1] / eps[0]) ** 0.5:.6g} times that of {a.name}, as its "
        "`rms_norm_eps` says; compared at one scale."
    )
    return a, _scaled(b, (eps[0] / eps[1]) ** 0.5, eps[0])


def _scales(config: RiGPTConfig) -> bool:
    """Whether a stream can have another scale: every number that it is compared with is one of `eps` or a weight."""
    begins = not config.embedding_norm or config.embedding_norm_map
    return config.pre_norm and not config.post_norm and begins and config.depth_solver not in ADAPTIVE_SOLVERS


def stream_size(model: OpenedModel) -> float:
    """The length of what tokens, less their mean, put into the residual stream: no frame has a say in it."""
    weights = model.weights
    if model.config.embedding_norm_map:
        return float(weights.read(MAP).double().norm())
    table = weights.read(TABLE)
    mean, gram = table.mean(0, dtype=torch.float64), torch.zeros(table.shape[1], table.shape[1], dtype=torch.float64)
    for rows in table.split(max(1, BLOCK // table.shape[1])):
        centred = rows.to(torch.float64) - mean
        gram += centred.T @ centred
    if model.config.embedding_size is None:
        return float(gram.trace()) ** 0.5
    into = weights.read(INTO).double()
    return float(((into @ gram) * into).sum()) ** 0.5


def _scaled(model: OpenedModel, scale: float, eps: float) -> OpenedModel:
    """The same function with a stream of another scale and the `eps` that goes with it."""
    table, weights = table_of(model.config), model.weights

    def times(make: Callable) -> Callable[[torch.dtype], torch.Tensor]:
        return lambda dtype: (make(torch.promote_types(dtype, torch.float32)) * scale).to(dtype)

    def grows(name: str) -> bool:
        # Norms of heads have the same `eps`.
        if model.config.qk_norm and name.rpartition(".")[0].endswith(("q_proj", "k_proj")):
            return True
        turns = [turned for turned in table.turns(name) if turned.key.kind in ("stream", "entry", "local")]
        return not is_choice_of_frames(name) and any(turned.role == "vector" for turned in turns)

    entries = {name: entry for name, entry in weights.entries.items() if grows(name)}
    return changed(
        model,
        {"rms_norm_eps": eps},
        {name: (_computed(model, name), times(entry.make)) for name, entry in entries.items()},
    )


def same_words(a: OpenedModel, b: OpenedModel, notes: list[str]) -> tuple[OpenedModel, OpenedModel]:
    """One way to say what layers see, and how positions turn them."""
    a, b = (
        changed(one, {"layer_types": None}) if set(one.config.layer_types or ()) == {FULL} else one for one in (a, b)
    )
    fields = ("position_embedding_type", "layer_types", "no_rope_layers", "num_hidden_layers", "head_dim")
    alike = all(getattr(a.config, name) == getattr(b.config, name) for name in fields)
    if not alike or a.config.rope_parameters == b.config.rope_parameters:
        return a, b
    if not (is_promised(a.config) and is_promised(b.config)):
        return a, b
    for layer in range(a.config.num_hidden_layers):
        if is_turned(a.config, layer):
            first, second = (rotary_frequencies(of_layer(model.config, layer)) for model in (a, b))
            if first[1] != second[1] or not torch.equal(first[0], second[0]):
                return a, b
    return a, changed(b, {"rope_parameters": a.config.rope_parameters})


STEPS = (
    same_words,
    same_vocabulary,
    same_positions,
    same_tables,
    same_biases,
    same_scale,
)
