"""What is made of a RiGPT and is none itself, in a repository of its own: an adapter of PEFT, or files in GGUF."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from ..checkpoints.adapters import ADAPTER_WEIGHTS, with_adapter
from ..checkpoints.certificate import CERTIFICATE_NAME
from ..checkpoints.read import load_model, reading
from ..checkpoints.source import ADAPTER, read_json
from ..checkpoints.weights import check_finite
from ..checkpoints.written import file_sha256, is_replaceable
from ..configuration_rigpt import RiGPTConfig
from ..extras import require
from ..model_cards.card import CARD
from ..model_cards.metadata import author_metadata
from ..model_cards.siblings import ADAPTERS, EMPTY, GGUF, sibling_card
from .cards import own_card, pictures_of
from .contents import (
    RepositoryContents,
    RepositoryFile,
    check_inside,
    check_nothing_forbidden,
    check_tokenizer,
    gathered,
    names_beside,
    refusal,
)


# Records that go along, beside the weights.
BESIDE = {ADAPTERS: ("finetune.json",), GGUF: (CERTIFICATE_NAME,)}


def kind_of(folder: Path) -> str | None:
    """What a folder holds: an adapter, files in GGUF, or `None` for a model or anything else."""
    if (folder / ADAPTER).is_file():
        return ADAPTERS
    return GGUF if any(folder.glob("*.gguf")) and not (folder / "config.json").exists() else None


def sibling_files(
    folder: Path,
    kind: str,
    *,
    repo_id: str | None = None,
    base: str | None = None,
    card: Path | None = None,
    metadata: Path | None = None,
    check_loading: bool = True,
) -> RepositoryContents:
    """
    The files that a repository holds of an adapter, or of a model in GGUF.

    Args:
        folder, kind: Of it, and what [`kind_of`] said.
        repo_id, card, metadata, check_loading: As for `repository_files`.
        base (`str`, *optional*): Id on the Hub of the model that it belongs to, or was made from; if not given,
            `base_model` of the metadata, or what an adapter names.

    Raises:
        ValueError: if no base is known, the weights do not load or are not finite, or the folder holds what must not
            go out.
    """
    if (folder / "config.json").exists():
        problem = f", which holds an adapter (`{ADAPTER}`) beside a model"
        raise refusal(folder, "hold a model or an adapter", problem, "Move one of them to a folder of its own.")
    check_nothing_forbidden(folder)
    files = sorted(path.name for path in folder.glob("*.gguf")) if kind == GGUF else [ADAPTER_WEIGHTS]
    names = [name for name in (*files, *BESIDE[kind]) if (folder / name).is_file()] + names_beside(folder)
    for name in (ADAPTER, CARD, *names):
        if (folder / name).exists():
            check_inside(folder, name)
    author, notes = author_metadata(metadata), []
    base, made = base or author.base_model, []
    if kind == ADAPTERS:
        if ADAPTER_WEIGHTS not in names:
            problem = f" without {ADAPTER_WEIGHTS}"
            raise refusal(folder, "hold the weights of its adapter", problem, "Save it once more with PEFT.")
        settings = read_json(folder / ADAPTER, "folder")
        made_on = str(settings.get("base_model_name_or_path") or "")
        is_here = Path(made_on).is_absolute() or Path(made_on).exists()
        base = _of_base(base or (None if is_here else made_on), folder, made_on)
        text = json.dumps(settings | {"base_model_name_or_path": base}, indent=2) + "\n"
        made.append(RepositoryFile(ADAPTER, text.encode()))
        known = check_loading and _fits(folder, made_on)
        if check_loading and not known:
            notes.append(f"The adapter was not put on its model: {made_on!r} is no folder of this machine.")
    else:
        base = _of_base(base, folder)
        _check_gguf(folder, files)
        if CERTIFICATE_NAME in names and (doubt := _doubt(folder, files)):
            names.remove(CERTIFICATE_NAME)
            notes.append(doubt)
        known = CERTIFICATE_NAME in names
    if check_loading:
        check_tokenizer(folder)
    own = own_card(folder, card, metadata, says_nothing=EMPTY)
    if own is None:
        author = replace(author, base_model=base)
        own = sibling_card(folder, kind, names, author, known=known, digest=_digest(folder, names), repo_id=repo_id)
    names += pictures_of(own, folder)
    return gathered(folder, names, [*made, RepositoryFile(CARD, own.encode())], notes)


def _digest(folder: Path, names: list[str]) -> str:
    """SHA-256 of files and their names."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name}: {file_sha256(folder / name)}".encode())
    return digest.hexdigest()


def _of_base(base: str | None, folder: Path, made_on: str = "") -> str:
    """The model that it belongs to, if anybody said which."""
    if base:
        return base
    raise ValueError(
        f"`base` must be the id of the model on the Hub that this one belongs to, got none for {str(folder)!r}"
        f"{f', which was made on {made_on!r}' if made_on else ''}. Publish that model first, then name it: --base "
        "me/my-rigpt."
    )


def _fits(folder: Path, base: str) -> bool:
    """
    Whether an adapter fits its model, a RiGPT; not if that is no folder of this machine.

    Raises:
        ValueError: if it does not load, or belongs to another model.
    """
    with reading("folder", folder, "hold the whole weights of an adapter as safetensors"):
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    for name, tensor in tensors.items():
        check_finite(name, tensor, str(folder))
    if not Path(base).is_dir():
        return False
    model = load_model(base, dtype=torch.float32)
    if not isinstance(model.config, RiGPTConfig):
        problem = f", which belongs to a {model.config.model_type}"
        raise refusal(folder, "hold an adapter of a RiGPT", problem, f"It goes as it is: hf upload REPO {folder}")
    with_adapter(model, folder, "folder")
    return True


def _check_gguf(folder: Path, files: list[str]) -> None:
    require("gguf")
    from gguf import GGUFReader

    for name in files:
        with reading("folder", folder / name, "hold whole files in GGUF"):
            GGUFReader(folder / name)


def _doubt(folder: Path, files: list[str]) -> str:
    """Why the certificate beside files in GGUF stays at home; nothing if it goes along."""
    written = is_replaceable(folder / CERTIFICATE_NAME) and is_replaceable(folder / files[0])
    if len(files) == 1 and written:
        return ""
    reason = f"it is of one of {len(files)} files" if len(files) > 1 else "it or its file was changed or copied since"
    return f"{CERTIFICATE_NAME} is not published: {reason}. Export once more for one that goes along."
