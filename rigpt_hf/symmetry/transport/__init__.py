"""
What was made for one model, carried into the frames of another that is the same up to gauge, or its relative.

Reading order: `axes` (how what lives beside a parameter turns, read from the table of frames), `adapters` (LoRA, IA3),
`features` (vectors, probes, sparse autoencoders at named points), `moments` (states of the equivariant optimizer).
"""

from collections.abc import Mapping
from typing import Any

from ...configuration_rigpt import RiGPTConfig
from ..action import GaugeTransformation
from .adapters import is_adapter, transport_adapter
from .features import check_mean, transport_features
from .moments import transport_optimizer


__all__ = ["check_mean", "is_adapter", "transport", "transport_adapter", "transport_features", "transport_optimizer"]


def transport(
    state_dict: Mapping[str, Any],
    g: GaugeTransformation,
    config: RiGPTConfig | None = None,
    *,
    hook: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """
    What was made for a model A, for `B = g·A`: outputs with it are the same up to rounding.

    Args:
        state_dict (`Mapping`): an adapter (LoRA, IA3) by the names of PEFT; a sparse autoencoder by those of SAELens,
            steering vectors or linear probes; or the state of an `EquivariantOptimizer`.
        g (`GaugeTransformation`): brings A to B, as `align(a, b)` and `GaugeTransformation.load` give it.
        config (`RiGPTConfig`, *optional*): of A and B, if not that of `g`.
        hook (`str`, *optional*): the point of the network that vectors belong to, such as `blocks.3.hook_resid_post`.
        settings (`Mapping`, *optional*): what `adapter_config.json` or `cfg.json` says beside the tensors.

    Returns:
        `dict`: the same names and dtypes; a LoRA on the outputs of heads has biases more where `g` shifts these, for
        which its configuration needs `lora_bias=True`.

    Raises:
        ValueError: if it has no exact form in another frame, as DoRA and AdamW's second moments; the message says why.
    """
    if config is not None:
        g = GaugeTransformation(config, g.elements)
    if "param_groups" in state_dict:
        return transport_optimizer(state_dict, g)
    if is_adapter(state_dict):
        return transport_adapter(state_dict, g, settings)[0]
    return transport_features(state_dict, g, hook, settings)
