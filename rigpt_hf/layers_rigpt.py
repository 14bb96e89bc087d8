"""Differences between layers: how far back they see, whether and how positions turn their heads, and experts."""

import copy
from collections.abc import Mapping
from typing import Any


FULL, SLIDING = "full_attention", "sliding_attention"
LAYER_TYPES = (FULL, SLIDING)


def layer_type(config: Any, layer: int) -> str:
    """How far back a layer sees."""
    return config.layer_types[layer] if config.layer_types else FULL


def window_of(config: Any, layer: int) -> int | None:
    """The positions that a query of a layer sees, its own among them; `None`: all before it."""
    return config.sliding_window if layer_type(config, layer) == SLIDING else None


def is_turned(config: Any, layer: int) -> bool:
    """Whether positions turn queries and keys of a layer."""
    return config.position_embedding_type == "rotary" and (
        not config.no_rope_layers or bool(config.no_rope_layers[layer])
    )


def is_sparse(config: Any, layer: int) -> bool:
    """Whether a layer has experts."""
    return config.num_experts is not None and layer not in (config.mlp_only_layers or ())


def by_layer_type(parameters: Any) -> bool:
    """Whether rope parameters are those of several types of layers."""
    return isinstance(parameters, Mapping) and any(kind in parameters for kind in LAYER_TYPES)


def of_layer_type(config: Any, kind: str) -> Any:
    """The configuration as layers of one type read it: with the rope parameters of that type alone."""
    if not by_layer_type(config.rope_parameters):
        return config
    own = copy.copy(config)
    own.rope_parameters = config.rope_parameters[kind]
    return own


def of_layer(config: Any, layer: int) -> Any:
    """The configuration as one layer reads it."""
    return of_layer_type(config, layer_type(config, layer))


def fill_in_layer_types(config: Any) -> None:
    """A window without a list of layers is that of all of them."""
    if config.layer_types is None and config.sliding_window is not None:
        config.layer_types = [SLIDING] * config.num_hidden_layers


def check_layers(config: Any) -> None:
    """Raise a `ValueError` if lists of layers are not of these layers, or say what the other fields do not."""
    count = config.num_hidden_layers
    for name, allowed in (("layer_types", LAYER_TYPES), ("no_rope_layers", (0, 1))):
        values = getattr(config, name)
        if values is None:
            continue
        if len(values) != count:
            raise ValueError(
                f"`{name}` must have an entry for each of `num_hidden_layers={count}` layers, got {len(values)}."
            )
        if odd := [value for value in values if value not in allowed]:
            raise ValueError(f"`{name}` must hold {' or '.join(map(repr, allowed))}, got {odd[0]!r:.80}.")
    slides = SLIDING in (config.layer_types or ())
    if slides and config.sliding_window is None:
        raise ValueError(f"`sliding_window` must be given for layers of the type {SLIDING!r}, got None.")
    if config.sliding_window is not None:
        if config.sliding_window < 2:
            raise ValueError(
                f"`sliding_window` must be at least 2, got {config.sliding_window}: a cache has no room for less."
            )
        if not slides and count:
            raise ValueError(
                f"`sliding_window` needs a layer of the type {SLIDING!r} in `layer_types`, got "
                f"{config.sliding_window} and none. Leave one of them out."
            )
    if config.no_rope_layers is not None and config.position_embedding_type != "rotary":
        raise ValueError(
            "`no_rope_layers` has a meaning only with `position_embedding_type='rotary'`, got it with "
            f"{config.position_embedding_type!r}. Leave it out."
        )
    nested = config.rope_parameters if by_layer_type(config.rope_parameters) else {}
    kinds = set(config.layer_types or [FULL])
    if nested and not kinds <= {kind for kind in nested if isinstance(nested[kind], Mapping)} <= set(nested):
        raise ValueError(
            f"`rope_parameters` by type of layer must be given for {' and '.join(sorted(kinds))}, got them for "
            f"{', '.join(kind for kind in nested if isinstance(nested[kind], Mapping))}. Name layers that positions "
            "do not turn in `no_rope_layers`."
        )
    if config.depth_interpolation == "linear" and not _are_alike(config):
        raise ValueError(
            "`depth_interpolation='linear'` adds weights of neighbouring layers, which must see and turn alike, got "
            f"`layer_types={config.layer_types}` and `no_rope_layers={config.no_rope_layers}`. Use 'constant'."
        )


def _are_alike(config: Any) -> bool:
    return len(set(config.layer_types or ())) <= 1 and len(set(config.no_rope_layers or ())) <= 1


def check_experts(config: Any) -> None:
    """Raise a `ValueError` if the fields of experts do not fit each other, or the rest of a configuration."""
    others = {
        "norm_topk_prob": False,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": None,
        "shared_expert_intermediate_size": None,
        "mlp_only_layers": None,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.0,
    }
    if config.num_experts is None:
        for name, default in others.items():
            if (value := getattr(config, name)) != default:
                raise ValueError(f"`{name}` needs `num_experts`, got {value!r} without. Set both, or leave it out.")
        return
    for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"):
        if (value := getattr(config, name)) is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if config.num_experts_per_tok > config.num_experts:
        raise ValueError(
            f"`num_experts_per_tok` must be at most `num_experts={config.num_experts}`, got "
            f"{config.num_experts_per_tok}."
        )
    if config.depth_solver is not None:
        raise ValueError(
            f"`depth_solver={config.depth_solver!r}` needs layers that are smooth in the stream, got `num_experts="
            f"{config.num_experts}`, between which tokens jump. Leave one of them out."
        )
    count = config.num_hidden_layers
    if odd := [layer for layer in config.mlp_only_layers or () if not 0 <= layer < count]:
        raise ValueError(f"`mlp_only_layers` must be numbers of layers from 0 to {count - 1}, got {odd[0]}.")
