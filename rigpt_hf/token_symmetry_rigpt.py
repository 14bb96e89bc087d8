"""The record of a token symmetry in a configuration: its form, its frame in a file, and when it may be saved."""

import os
import shutil
from contextlib import suppress
from typing import Any

from transformers.utils import cached_file


# The frame of a token symmetry, beside the weights; what its record must hold; the models that it is of.
SYMMETRY_FRAME = "token_symmetry.safetensors"
SYMMETRY_RECORD: dict[str, Any] = {"symmetry": dict, "filling": dict, "frame": (str, type(None))}
SYMMETRIC = ("RiGPTModel", "RiGPTForCausalLM")


def check_token_symmetry(config: Any) -> None:
    """A `ValueError` if the record of a configuration is none, or is of more tokens than the configuration has."""
    record: dict = config.token_symmetry or {}
    odd = [name for name, kind in SYMMETRY_RECORD.items() if not isinstance(record.get(name, ...), kind)]
    if odd or record.keys() != SYMMETRY_RECORD.keys() or record["frame"] not in (None, SYMMETRY_FRAME):
        raise ValueError(
            "`token_symmetry` must have objects `symmetry` and `filling`, and a `frame` that is null or "
            f"{SYMMETRY_FRAME!r}, got {str(record)[:80]!r}. Take that of `Representation.to_config`, or null."
        )
    tokens = record["symmetry"].get("vocab_size")
    if not isinstance(tokens, int) or not 0 <= tokens <= config.vocab_size:
        raise ValueError(
            f"`token_symmetry` must be of the model's vocabulary, {config.vocab_size} tokens or fewer, got one of "
            f"{str(tokens)[:80]}. Record it for this model, or set it to null."
        )


def reason_not_to_save(config: Any, folder: str | os.PathLike) -> str:
    """
    The reason why what is saved does not have the symmetry that its configuration records; empty if it has, and then
    its frame is copied into the folder.
    """
    if getattr(config, "quantization_config", None) is not None:
        return "rounding to codes does not keep it"
    if (config.architectures or SYMMETRIC)[0] not in SYMMETRIC:
        return f"it is of a language model, and this is a {config.architectures[0]}"
    if (config.token_symmetry or {})["frame"] is None:
        return ""
    place = symmetry_frame(config.name_or_path, getattr(config, "_commit_hash", None))
    target = os.path.join(folder, SYMMETRY_FRAME)
    if place is None:
        return f"{SYMMETRY_FRAME} is not where the model was loaded from, {config.name_or_path!r}"
    if os.path.realpath(place) != os.path.realpath(target):
        os.makedirs(folder, exist_ok=True)
        shutil.copyfile(place, target)
    return ""


def symmetry_frame(source: str | os.PathLike, revision: str | None = None) -> str | None:
    """The file with the frame of a token symmetry in a folder or on the Hub; `None` if it is not in reach."""
    with suppress(OSError, ValueError):
        return cached_file(
            os.fspath(source),
            SYMMETRY_FRAME,
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    return None
