"""A stock class can express the options that it declares, and all others at values that do nothing."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..checkpoints.source import shown
from ..configuration_rigpt import RiGPTConfig
from ..symmetry.alignment import INCIDENTAL
from .maps import Target


# Parameters of an option by the end of their names, with the value at which it does nothing. A gate in front of
# vectors that are zero may be anything.
NEUTRAL: dict[str, dict[str, float | None]] = {
    "attention_score": {"distance_weight": 0.0},
    "value_embedding_period": {"value_embedding.weight": 0.0, "value_gate.weight": None},
}
# So many targets are named in a message, and reasons of each.
NAMED = 3
# `choose_frame` puts the first two into the tables of tokens; only a solver reads the others.
ANYWHERE = {"embedding_size", "tie_word_embeddings", "depth_rtol", "depth_atol"}


def refuse_options(
    config: RiGPTConfig,
    state: Mapping[str, torch.Tensor],
    target: Target,
    others: Mapping[str, Target] | None = None,
) -> set[str]:
    """
    Names of the parameters that a stock model can do without.

    An option that neither the target nor this file declares must be at its default: who adds one to RiGPT need not
    think of every target, and no target computes something else in silence.

    Args:
        config (`RiGPTConfig`), state (`Mapping[str, torch.Tensor]`): of the RiGPT to export.
        target (`Target`): what it is exported to.
        others (`Mapping[str, Target]`, *optional*): by name, what it could be exported to instead.

    Raises:
        ValueError: if an option is in use that the target does not have; the message names all of them.
    """
    if refused := refused_options(config, state, target):
        able = joined([f"`target={name!r}`" for name in able_targets(config, state, others or {})], "or")
        raise ValueError(
            f"{' and '.join(refused)} {'has' if len(refused) == 1 else 'have'} no counterpart in {target.name}, which "
            f"has {target.summary}. {f'Try {able}' if able else 'Keep this model as RiGPT'}."
        )
    return _idle(config, state)


def able_targets(config: RiGPTConfig, state: Mapping[str, torch.Tensor], targets: Mapping[str, Target]) -> list[str]:
    """The names of the first few among some targets that have all options of a RiGPT."""
    able = (name for name, target in targets.items() if not refused_options(config, state, target))
    return list(islice(able, NAMED))


def nearest(reasons: Mapping[str, Sequence[str]]) -> str:
    """The targets that lack the least of a model, by the reasons against each of them, in words."""
    least = sorted(reasons, key=lambda name: len(reasons[name]))[:NAMED]
    said = [f"not {name}: {joined([shown(reason) for reason in reasons[name][:NAMED]], 'and')}" for name in least]
    return "; ".join(said)


def fault(error: ValueError) -> str:
    """The fault that an error of an export names, without the options of the class and where else to go."""
    return re.split(r", which |[.:] ", str(error), maxsplit=1)[0].rstrip(".")


def joined(names: Sequence[str], word: str) -> str:
    """`a, b or c`."""
    return f" {word} ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def refused_options(config: RiGPTConfig, state: Mapping[str, torch.Tensor], target: Target) -> list[str]:
    """The options in use that a target does not have, with their values."""
    # An option with parameters is judged by their values; a value without them may be anything and is refused.
    endings = {".".join(name.split(".")[-count:]) for name in state for count in (1, 2)}
    judged = {option for option, parameters in NEUTRAL.items() if parameters.keys() <= endings}
    free = {*target.family.fields, *INCIDENTAL, *ANYWHERE, *judged}
    refused = []
    values = vars(config)  # much quicker than `getattr`, which Transformers wraps
    for option, default in options_of(config).items():
        value = values[option]
        if option in target.expresses:
            expressed = target.expresses[option]
            possible = expressed is None or expressed(config)
        else:
            possible = option in free or value == default
        if not possible:
            refused.append(f"`{option}={value!r}`")
    return refused


def options_of(config: RiGPTConfig) -> dict[str, object]:
    """Every field that a RiGPT's configuration has beyond the library's, with its default."""
    return _defaults(type(config))  # type: ignore[arg-type]  # of a class, which has a hash


@cache
def _defaults(kind: Any) -> dict[str, object]:
    shared = {field.name for field in fields(PreTrainedConfig)}
    return {field.name: field.default for field in fields(kind) if field.name not in shared}


def _idle(config: RiGPTConfig, state: Mapping[str, torch.Tensor]) -> set[str]:
    idle = set()
    for option, parameters in NEUTRAL.items():
        for ending, neutral in parameters.items():
            for name in (name for name in state if name.endswith(f".{ending}")):
                if neutral is not None and not bool((state[name] == neutral).all()):
                    raise ValueError(
                        f"`{option}={getattr(config, option)!r}` has no counterpart in stock models unless every "
                        f"`{ending}` is {neutral:g}, where it does nothing. Keep this model as RiGPT."
                    )
                idle.add(name)
    return idle
