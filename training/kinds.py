"""The kinds of models that can be pretrained, by name; whoever has another one adds it to `KINDS`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import GPT2Config, GPT2LMHeadModel

from rigpt_hf import RiGPTConfig, RiGPTForCausalLM
from rigpt_hf.optim import equivariant_param_groups


@dataclass(frozen=True)
class Kind:
    """
    A class of models.

    Args:
        config, model: Classes of the library; `config` without arguments must work.
        param_groups (*optional*): Called as [`equivariant_param_groups`]; `None` where matrices have no rows in the
            table of frames, so that the equivariant optimizer cannot train them.
        positions (`str`): The field of the configuration that holds the longest row.
        defaults: Values of other fields.
    """

    config: Any
    model: Any
    param_groups: Callable[..., list[dict[str, Any]]] | None = None
    positions: str = "max_position_embeddings"
    defaults: Mapping[str, Any] = field(default_factory=dict)


NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
KINDS = {
    "rigpt": Kind(RiGPTConfig, RiGPTForCausalLM, equivariant_param_groups),
    "stock-gpt2": Kind(GPT2Config, GPT2LMHeadModel, positions="n_positions", defaults=NO_DROPOUT),
}


def kind_of(model_type: str) -> str | None:
    """The kind whose configuration has this `model_type`; `None` if there is none."""
    return next((name for name, kind in KINDS.items() if kind.config.model_type == model_type), None)
