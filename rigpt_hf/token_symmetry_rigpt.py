"""The record of a token symmetry in a configuration: its form, its frame in a file, and when it may be saved."""

import hashlib
import os
import shutil
from contextlib import suppress
from typing import Any

from transformers.utils import cached_file


# The frame of a token symmetry, beside the weights; what its record must hold; the models that it is of.
SYMMETRY_FRAME = "token_symmetry.safetensors"
SYMMETRY_RECORD: dict[str, Any] = {"symmetry": dict, "filling": dict, "frame": (str, type(None))}
# The hash of that file, in records that have a frame; those of earlier versions are without.
FRAME_SHA256 = "frame_sha256"
SYMMETRIC = ("RiGPTModel", "RiGPTForCausalLM")


def check_token_symmetry(config: Any) -> None:
    """A `ValueError` if the record of a configuration is none, or is of more tokens than the configuration has."""
    record: dict = config.token_symmetry or {}
    odd = [name for name, kind in SYMMETRY_RECORD.items() if not isinstance(record.get(name, ...), kind)]
    odd += [FRAME_SHA256] * (not isinstance(record.get(FRAME_SHA256, ""), str))
    others = record.keys() - {FRAME_SHA256} != SYMMETRY_RECORD.keys()
    if odd or others or record["frame"] not in (None, SYMMETRY_FRAME):
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
    The reason why what is saved cannot be said to have the symmetry that its configuration records; empty if it can,
    and then its frame is copied into the folder.

    The frame is known by its hash. Whether weights that were changed in memory still have the symmetry is not looked
    at here, which would take longer than saving: a record states it, and `Representation.distance` measures it.
    """
    if getattr(config, "quantization_config", None) is not None:
        return "rounding to codes does not keep it"
    if (config.architectures or SYMMETRIC)[0] not in SYMMETRIC:
        return f"it is of a language model, and this is a {config.architectures[0]}"
    record = config.token_symmetry or {}
    if record["frame"] is None:
        return ""
    place = symmetry_frame(config.name_or_path, getattr(config, "_commit_hash", None))
    target = os.path.join(folder, SYMMETRY_FRAME)
    if place is None:
        return f"{SYMMETRY_FRAME} is not where the model was loaded from, {config.name_or_path!r}"
    if not record.get(FRAME_SHA256):
        return f"its record does not say of which {SYMMETRY_FRAME} it is, which `rigpt rotate` writes down"
    if not is_frame_of(record, place):
        return f"{SYMMETRY_FRAME} in {config.name_or_path!r} is another one than when the model was loaded"
    if os.path.realpath(place) == os.path.realpath(target):
        return ""
    if os.path.islink(target) or (os.path.exists(target) and not os.path.isfile(target)):
        return f"{target!r} is a link or no file, and is left as it is"
    os.makedirs(folder, exist_ok=True)
    shutil.copyfile(place, target)
    return ""


def is_frame_of(record: dict[str, Any], place: str | os.PathLike) -> bool:
    """Whether a file is the frame of a record, by its hash; of records without one nobody can tell."""
    with open(place, "rb") as file:
        return record.get(FRAME_SHA256) in (None, hashlib.file_digest(file, "sha256").hexdigest())


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
