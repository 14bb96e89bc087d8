"""Kept results, by the hash of everything they depend on: nothing is measured twice."""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

import rigpt_hf
from rigpt_hf.checkpoints.certificate import library_versions
from rigpt_hf.checkpoints.folder import write_text
from rigpt_hf.checkpoints.written import look, parse_json
from rigpt_hf.training import diagnostics

from .. import models
from ..models import EvaluatedModel


def fingerprint(model: EvaluatedModel) -> str:
    """SHA-256 of a model's weights, configuration and tokenizer, wherever they come from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    config = model.model.config.to_dict()
    # Where a model lies and what saved it say nothing about what it computes.
    kept = {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}
    digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
    digest.update(tokenizer_fingerprint(model.tokenizer).encode())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """The rules and special tokens of a tokenizer, as text; nothing if there is none."""
    if tokenizer is None:
        return ""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = tokenizer.get_vocab() if backend is None else backend.to_str()
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    return json.dumps([rules, special, type(tokenizer).__name__], sort_keys=True, default=str)


@cache
def code_fingerprint() -> str:
    """SHA-256 of all code of this package that a measurement may run, and of the libraries' versions."""
    digest = hashlib.sha256(json.dumps(library_versions()).encode())
    for module in (rigpt_hf, models, diagnostics):
        folder = Path(module.__file__ or "").parent
        for path in sorted(folder.rglob("*.py")):
            # Experiments lie there in a checkout, and measure nothing here.
            if folder / "experiments" not in path.parents:
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _digest(key: str, result: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([key, result]).encode()).hexdigest()


class Cache:
    """
    Results in a folder, one file each.

    Args:
        folder (`Path`): Made when something is first kept.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def key(self, **depends_on: Any) -> str:
        """The name of a result that depends on these values and on the code that measures."""
        values = json.dumps(depends_on | {"code": code_fingerprint()}, sort_keys=True)
        return hashlib.sha256(values.encode()).hexdigest()

    def get(self, key: str) -> dict[str, Any] | None:
        """The result that is kept under a name; `None` if there is none, a `ValueError` if it was changed."""
        path = self.folder / f"{key}.json"
        if look(path) is None:
            return None
        with suppress(
            OSError, ValueError, TypeError, LookupError
        ):  # whatever is wrong with it, it is not as it was kept
            kept = parse_json(path.read_text(encoding="utf-8"))
            if kept["sha256"] == _digest(key, kept["result"]):
                return kept["result"]
        raise ValueError(
            f"`output` must have results as they were kept, got {str(path)!r}, which was changed. Move or remove it, "
            "and it is measured again."
        )

    def put(self, key: str, result: dict[str, Any]) -> None:
        """Keep a result; the file appears whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{key}.json"
        seen = look(path)
        self.get(key)  # another process may have kept it meanwhile
        kept = {"sha256": _digest(key, result), "result": result}
        write_text(path, json.dumps(kept) + "\n", seen=seen)

    def drop(self, key: str) -> None:
        """Forget a result, if it is kept."""
        (self.folder / f"{key}.json").unlink(missing_ok=True)


class Parts:
    """
    Parts of a measurement that takes long, kept until it is whole.

    Args:
        cache (`Cache`): Where they are kept.
        whole (`str`): The name of the whole's result, which depends on everything that its parts depend on.
    """

    def __init__(self, cache: Cache, whole: str):
        self.cache, self.whole = cache, whole
        self.keys: list[str] = []

    def __call__(self, part: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The kept result of a part, which is made where there is none."""
        key = self.cache.key(part=part, whole=self.whole)
        self.keys.append(key)
        if (kept := self.cache.get(key)) is None:
            kept = make()
            self.cache.put(key, kept)
        return kept

    def drop(self) -> None:
        """Forget the parts; for when the whole is kept."""
        while self.keys:
            self.cache.drop(self.keys.pop())
