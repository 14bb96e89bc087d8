"""The limits of a `config.json`: possible values for every kind of field, and nothing of how the library runs."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch

from ..configuration_rigpt import LARGEST, SIZES
from .source import shown


# How the library runs is for the program to say, and where a folder says so too, it is not followed: other outputs
# than are asked for, or a backend whose code would be fetched from the Hub.
UNREAD: dict[str, Any] = {
    "return_dict": True,
    "output_hidden_states": False,
    "output_attentions": False,
    "attn_implementation": None,
    "_attn_implementation": None,
    "experts_implementation": None,
    "_experts_implementation": None,
    "chunk_size_feed_forward": 0,
}
# Whole numbers by the name that most models have for them, with the least and the largest.
WHOLE = SIZES | {
    "sliding_window": (1, LARGEST),
    "original_max_position_embeddings": (1, LARGEST),
    "num_labels": (0, 50_000),  # a name is made for each, which takes 0.1 ms
}
SYNONYMS = {"n_inner": "intermediate_size", "n_ctx": "max_position_embeddings"}
# Real numbers by the form of their names: the words for the rule, and the rule.
REAL = {
    r".*(dropout|pdrop)": ("from 0 to 1", lambda value: 0 <= value <= 1),
    r".*(_eps|_epsilon)|initializer_range|attention_factor|mscale.*": ("at least 0", lambda value: value >= 0),
    r"rope_theta|(partial_rotary_|low_freq_|high_freq_|short_|long_)?factor|beta_(fast|slow)": (
        "above 0",
        lambda value: value > 0,
    ),
}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ROPE = ("rope_parameters", "rope_scaling")
REPAIR = "Correct it in the file, or restore the file"
# What the library says of one field: a value of another type, a rule of its class, numbers that a rotation lacks.
TYPE = re.compile(
    r"Field '(?P<field>[^']+)'(?: expected (?P<kind>\w+).*\(value: (?P<value>.*)\)"
    r"| with value (?P<other>.*) doesn't match any type in (?P<kinds>.*)\. Errors:)",
    re.DOTALL,
)
KNOWN = re.compile(r"The `(?P<field>\w+)` entries must be in .* but got (?P<value>.*)", re.DOTALL)
LACKING = re.compile(r"Missing required keys in `(?P<field>\w+)` for 'rope_type'='(?P<kind>\w+)': \{(?P<lacking>.*)\}")
RULE = re.compile(r"Validation error for field '(?P<field>\w+)':\s+ValueError: Value (?P<rule>.*)", re.DOTALL)
TYPES = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number with a decimal point",
    "str": "a text",
    "list": "a list",
    "dict": "an object",
    "NoneType": "null",
}


def check_fields(content: Mapping[str, Any], config_class: Any = None) -> None:
    """
    Raise if a field of a configuration has a value that no model can have, before the library makes anything of it.

    Args:
        content (`Mapping[str, Any]`): what the file holds.
        config_class (`type`, *optional*): the class of the configuration, which may have names of its own.

    Raises:
        ValueError: names the field as it is in the file, the rule and the value.
    """
    if config_class is None and "AutoConfig" not in (content.get("auto_map") or {}):
        raise ValueError(
            f"`model_type` must be a type of model that is known here, got {shown(repr(content.get('model_type')))}. "
            f"{REPAIR}, or install a newer `transformers`."
        )
    own = {field.name: field for field in fields(config_class)} if config_class else {}
    synonyms = SYNONYMS | {known: name for name, known in getattr(config_class, "attribute_map", {}).items()}
    for path, name, value in _walk(content):
        known = own.get(name)
        # Some models have another kind of value, or a value of their own, under a name that others have for a number.
        if known and (value == known.default or (isinstance(value, bool) and "bool" in str(known.type))):
            continue
        if name == "sliding_window" and content.get("use_sliding_window") is False:
            continue
        _check_value(path, synonyms.get(name, name), value, typed=known is not None)
    for name in ("dtype", "torch_dtype"):
        if (dtype := content.get(name)) is not None and getattr(torch, dtype, None) not in FLOATS:
            raise ValueError(
                f"`{name}` must be float32, bfloat16, float16 or float64, got {shown(repr(dtype))}. {REPAIR}."
            )
    if labels := content.get("id2label"):
        odd = [key for key in labels if not key.isdecimal()]
        if odd:
            raise ValueError(f"`id2label` must have whole numbers as keys, got {shown(repr(odd[0]))}. {REPAIR}.")
    for name in content if config_class else ():
        if name not in own and not _is_field(name, config_class):
            raise ValueError(f"`{name}` is no field of a configuration, got it with a value. Remove it from the file.")


def field_with(config: Any, value: Any) -> str:
    """The name of the first field of a configuration, or of its rotary part, that has this value; empty if none."""
    return next((path for path, _, held in _walk(config.to_dict()) if held == value and held is not None), "")


def about_field(text: str) -> str:
    """A library's message about one field, in the words of this package; empty if it is about something else."""
    if match := TYPE.search(text):
        kinds = re.findall(r"\w+", match["kind"] or match["kinds"])
        words = " or ".join(TYPES[kind] for kind in TYPES if kind in kinds) or "of another type"
        return f"`{match['field']}` must be {words}, got {shown(match['value'] or match['other'])}. {REPAIR}"
    if match := KNOWN.search(text):
        return f"`{match['field']}` must hold names that are known here, got {shown(match['value'])}. {REPAIR}"
    if match := LACKING.search(text):
        lacking = ", ".join(sorted(match["lacking"].split(", ")))
        return f"`{match['field']}` must have {lacking} where its `rope_type` is '{match['kind']}'. {REPAIR}"
    if match := RULE.search(text):
        return f"`{match['field']}` {shown(' '.join(match['rule'].split())).rstrip('.')}. {REPAIR}"
    return ""


def _walk(content: Mapping[str, Any], inside: str = "") -> Iterator[tuple[str, str, Any]]:
    """Fields as a message names them, their names and values; with those of the rotary part."""
    for name, value in content.items():
        yield f"{inside}['{name}']" if inside else name, name, value
        if isinstance(value, dict) and (inside or name in ROPE):
            yield from _walk(value, f"{inside}['{name}']" if inside else name)


def _check_value(path: str, name: str, value: Any, typed: bool) -> None:
    """Raise if a number is not possible; whether it is a number, the library says of a field with a type."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if name in WHOLE and (whole or not (typed or value is None)):
        least, most = WHOLE[name]
        rule = "a whole number" if not whole else f"at least {least}" if value < least else f"at most {most}"
        if not whole or not least <= value <= most:
            raise ValueError(f"`{path}` must be {rule}, got {_short(value)}. {REPAIR}.")
    for form, (rule, holds) in REAL.items():
        if not re.fullmatch(form, name):
            continue
        for number in value if isinstance(value, list) else [value]:
            real = isinstance(number, int | float) and not isinstance(number, bool) and abs(number) < math.inf
            if number is not None and not (real and holds(number)):
                raise ValueError(f"`{path}` must be a finite number {rule}, got {_short(number)}. {REPAIR}.")


def _short(value: Any) -> str:
    if isinstance(value, int) and abs(value) > 10**6:
        return f"{value:.3g}" if abs(value) < 10**300 else f"a number of {len(str(abs(value)))} digits"
    return shown(repr(value))


def _is_field(name: str, config_class: Any) -> bool:
    """Whether a file may give this attribute a value, and does not put it in the place of a part of the class."""
    part = getattr(config_class, name, None)
    settable = isinstance(part, property) and part.fset is not None
    return name in ("model_type", *UNREAD, *config_class.attribute_map) or settable or not hasattr(config_class, name)
