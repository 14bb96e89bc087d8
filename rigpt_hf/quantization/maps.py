"""The matrices of a RiGPT that are rounded, and what they are to their layer, as the table of frames says."""

from typing import Literal

from torch import nn

from ..frames import Table, is_token_table, layer_of, table_of
from ..modeling_rigpt import RiGPTForCausalLM
from ..table import NEURONS


# Whose error the moments of the inputs are weighted by: the stream after attention or the next, or what keys and
# values become in the softmax; "ends" for what leads into the stream and out of it.
Part = Literal["query", "key", "value", "output", "neurons", "experts", "ends"]


def parts_of(model: RiGPTForCausalLM) -> dict[str, Part]:
    """
    The linear maps that are rounded, by the names of their modules, in the order of the layers: all that write into
    spaces of heads or neurons or read from them, and those that lead into the stream and out of it.

    Gates of one number per head or token are not among them, nor the head, which is a table of tokens.
    """
    table = table_of(model.config)
    parts = {}
    for name, module in model.named_modules():
        is_map = type(module) is nn.Linear and not is_token_table(f"{name}.weight")
        if is_map and (part := part_of(table, f"{name}.weight")) is not None:
            parts[name] = part
    return parts


def part_of(table: Table, name: str) -> Part | None:
    """The part that a parameter plays in its layer; `None` if it is none of these."""
    if layer_of(name) is None:
        return "ends"
    turns = table.turns(name)
    if any(turned.key.kind == "experts" and turned.role in NEURONS for turned in turns):
        return "experts"
    for turned in turns:
        match turned.key.kind:
            case "head_qk":
                return "query" if turned.role == "vector" else "key"
            case "head_vo":
                return "value" if turned.dim == 0 else "output"
        if turned.role in NEURONS:
            return "neurons"
    return None


def token_tables(model: RiGPTForCausalLM) -> list[str]:
    """The modules whose rows are vectors of tokens, tied ones once."""
    seen: set[int] = set()
    names = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if (
            isinstance(module, nn.Linear | nn.Embedding)
            and is_token_table(f"{name}.weight")
            and id(weight) not in seen
        ):
            seen.add(id(weight))
            names.append(name)
    return names
