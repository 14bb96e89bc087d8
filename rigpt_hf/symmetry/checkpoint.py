"""`transform_checkpoint`: a gauge transformation of a model on disk or on the Hub, tensor by tensor."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from math import prod
from pathlib import Path

import torch
from transformers.utils import logging

from ..checkpoints.certificate import Certificate
from ..checkpoints.folder import Seen, check_output
from ..checkpoints.logits import random_input_ids
from ..checkpoints.opened import MadeWeights, OpenedModel, open_model
from ..checkpoints.write import Entry, Reference, finer_dtype, write_checkpoint
from ..configuration_rigpt import RiGPTConfig
from ..frames import table_of
from ..modeling_rigpt import RiGPTForCausalLM
from .action import GaugeTransformation
from .tokens.representation import Representation


logger = logging.get_logger(__name__)

# Bytes of a table in float64 that are transformed at once, where its rows do not mix.
CHUNK = 2**27


def transform_checkpoint(
    source: str | Path | OpenedModel,
    output_dir: str | Path,
    transformation: GaugeTransformation,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
    max_shard_size: int | str | None = None,
    seed: int = 0,
    progress: bool = True,
    certificate: bool = True,
    seen: Seen | None = None,
    explanation: str | None = None,
) -> Certificate | None:
    """
    Apply a gauge transformation to a checkpoint, and certify that the result is the same function.

    Tensor by tensor in float64 and shard by shard, see [`write_checkpoint`]: never are both models in memory, and the
    peak stays below the larger checkpoint's size plus 1 GB. The record of a token symmetry is conjugated along, if the
    source's weights have it; they are measured before, one after the other, in float64 copies of single tensors.

    Args:
        source, output_dir, revision, dtype, force, max_shard_size, seed, progress:
            As for [`rigpt_hf.conversion.convert_checkpoint`]; the source is a RiGPT, or any model that [`open_model`]
            opens as one, also if it is open already.
        transformation (`GaugeTransformation`):
            For models of the source's configuration.
        certificate (`bool`, defaults to `True`):
            Compare the result with the source. Without, a matrix outside of the group goes unnoticed.
        seen (`dict`, *optional*):
            What [`check_output`] gave, if `output_dir` was looked at before.
        explanation (`str`, *optional*):
            What it means if the result is not the same function, and what to do; by default of a transformation that
            may be outside of the group.

    Returns:
        `Certificate`, also written to `certificate.json` in the folder; `None` without one.

    Raises:
        CertificateError: if the result differs from the source by more than rounding.
        ValueError: if the source does not open as a RiGPT, its weights or the transformation do not belong to its
            configuration, or an argument is impossible; the message names which.
    """
    name, output = source.name if isinstance(source, OpenedModel) else str(source), Path(output_dir)
    seen = check_output(output, name, force) if seen is None else seen
    model = source if isinstance(source, OpenedModel) else open_model(source, revision=revision)
    config, original = deepcopy(model.config), model.place
    g = _belonging_to(transformation, config, name)
    entries = _entries(model, g)
    held = _held(model, entries, revision)
    config.token_symmetry = None
    written = dtype or model.stored_dtype
    reference = Reference(
        lambda: original.load(finer_dtype(model.stored_dtype, written)),
        random_input_ids(config.vocab_size, config.max_position_embeddings, seed=seed),
        seed,
        name,
        str(output),
        explanation=explanation
        or (
            f"`transformation` must leave the function of {name!r} alone up to rounding. Either it is not in the "
            "gauge group of this configuration, or its result needs more digits: ask for a finer `dtype`."
        ),
    )
    return write_checkpoint(
        entries,
        RiGPTForCausalLM,
        config,
        original.folder,
        output,
        seen,
        dtype=written,
        max_shard_size=max_shard_size,
        certify_against=reference if certificate else None,
        progress="Transforming" if progress else None,
        beside=None if held is None else held.conjugated(g).save,
        **original.tokenizer_options,
    )


def _held(model: OpenedModel, entries: Sequence[Entry], revision: str | None) -> Representation | None:
    """The token symmetry that is recorded of a source, if its weights have it."""
    if model.config.token_symmetry is None:
        return None
    held, weights = Representation.from_config(model.config, model.name, revision), model.weights
    names = [entry.name for entry in entries]
    away, most = held.distance_of(names, weights.read), max(held.tolerance(weights.dtypes[name]) for name in names)
    if away <= most:
        return held
    logger.warning(f"The token symmetry of {model.name} is not recorded: its weights are {away:.1e} from it.")
    return None


def _belonging_to(transformation: GaugeTransformation, config: RiGPTConfig, source: str) -> GaugeTransformation:
    """The same elements with the table of frames of `config`, if they fit it."""
    try:
        return GaugeTransformation(config, transformation.elements)
    except ValueError as error:
        raise ValueError(
            f"`transformation` must be one of models with the configuration of {source!r}. {error}"
        ) from error


def _entries(model: OpenedModel, g: GaugeTransformation) -> tuple[Entry, ...]:
    """Every tensor of the result and its recipe."""
    table, weights = table_of(model.config), model.weights
    return tuple(
        Entry(name, shape, _recipe(weights, g, name, any(turned.dim == 0 for turned in table.turns(name))))
        for name, shape in weights.shapes.items()
    )


def _recipe(
    weights: MadeWeights, g: GaugeTransformation, name: str, rows_mix: bool
) -> Callable[[torch.dtype], torch.Tensor]:
    def read(name: str) -> torch.Tensor:
        # What is computed is rounded once, in the end.
        return weights.read(name) if weights.entries[name].kept else weights.make(name, torch.float64)

    def make(dtype: torch.dtype) -> torch.Tensor:
        tensor = read(name)
        result = torch.empty(tensor.shape, dtype=dtype)
        rows = len(tensor) if rows_mix else max(1, CHUNK // (8 * prod(tensor.shape[1:])))
        for part, place in zip(tensor.split(rows), result.split(rows), strict=True):
            place.copy_(g.transform(name, part.to(torch.float64), read))
        return result

    return make
