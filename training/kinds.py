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
        names: What fields of a RiGPT are called here, so that sizes in presets are those of this class too; all other
            fields of a RiGPT are left out then. Without it none of them is known.
    """

    config: Any
    model: Any
    param_groups: Callable[..., list[dict[str, Any]]] | None = None
    positions: str = "max_position_embeddings"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)

    def fields(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Fields of this configuration from those given, and which of a RiGPT's are left out; its own names win."""
        own, of_rigpt = self.config().to_dict(), RiGPTConfig().to_dict() if self.names else {}
        left = [name for name in given if name in of_rigpt and name not in {*own, *self.names}]
        called = {self.names[name]: value for name, value in given.items() if name in self.names}
        return called | {name: given[name] for name in given if name not in {*left, *self.names}}, left


NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
# The sizes, which a preset of a RiGPT has for both.
SIZES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
}
KINDS = {
    "rigpt": Kind(RiGPTConfig, RiGPTForCausalLM, equivariant_param_groups),
    "stock-gpt2": Kind(GPT2Config, GPT2LMHeadModel, positions="n_positions", defaults=NO_DROPOUT, names=SIZES),
}


def kind_of(model_type: str) -> str | None:
    """The kind whose configuration has this `model_type`; `None` if there is none."""
    return next((name for name, kind in KINDS.items() if kind.config.model_type == model_type), None)
