"""What is made of a RiGPT and is none itself, in a repository of its own: an adapter of PEFT, or files in GGUF."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
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
from ..model_cards.marker import METADATA, is_unchanged, read_marker
from ..model_cards.metadata import AuthorMetadata, author_metadata
from ..model_cards.siblings import ADAPTERS, GGUF, sibling_card
from ..text.paths import without_path
from .cards import is_id, own_card, pictures_of
from .contents import (
    RepositoryContents,
    RepositoryFile,
    as_json,
    check_inside,
    check_nothing_forbidden,
    check_tokenizer,
    gathered,
    names_beside,
    refusal,
    without_paths,
)


# Records that go along, beside the weights.
BESIDE = {ADAPTERS: ("finetune.json",), GGUF: (CERTIFICATE_NAME,)}


def kind_of(folder: Path) -> str | None:
    """The kind of thing in a folder: an adapter, files in GGUF, or `None` for a model or anything else."""
    if (folder / ADAPTER).is_file():
        return ADAPTERS
    return GGUF if _gguf_files(folder) and not (folder / "config.json").exists() else None


def _gguf_files(folder: Path) -> list[str]:
    """Their names, however the ending is written."""
    return sorted(path.name for path in folder.iterdir() if path.suffix.lower() == ".gguf") if folder.is_dir() else []


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
        ValueError: if no base is known, or the card names another, the weights do not load, an adapter is none of LoRA
            or does not fit its model, or the folder holds what must not go out.
    """
    if (folder / "config.json").exists():
        problem = f", which holds an adapter (`{ADAPTER}`) beside a model"
        raise refusal(folder, "hold a model or an adapter", problem, "Move one of them to a folder of its own.")
    check_nothing_forbidden(folder)
    files = _gguf_files(folder) if kind == GGUF else [ADAPTER_WEIGHTS]
    names = [name for name in (*files, *BESIDE[kind]) if (folder / name).is_file()] + names_beside(folder)
    for name in (ADAPTER, CARD, *names):
        if (folder / name).exists():
            check_inside(folder, name)
    settings = _settings(folder, names) if kind == ADAPTERS else {}
    made_on, given = str(settings.get("base_model_name_or_path") or ""), author_metadata(metadata)
    digest = _digest(folder, names)
    own = _own_card(folder, card, metadata, base or given.base_model, digest)
    # A name of one part may be a folder of another place.
    stated = made_on if "/" in made_on and not Path(made_on).exists() and is_id(made_on) else None
    base = base or given.base_model or own.base or stated
    if base is None:
        raise ValueError(
            f"`base` must be the id of the model on the Hub that this one belongs to, got none for {str(folder)!r}"
            f"{f', which was made on {made_on!r}' if made_on else ''}. Publish that model first, then name it: --base "
            "me/my-rigpt."
        )
    notes, known, made = [], False, []
    if kind == ADAPTERS:
        if base != made_on:
            settings |= {"base_model_name_or_path": base, "revision": None}
        made.append(RepositoryFile(ADAPTER, as_json(without_paths(settings))))
        known = check_loading and _fits(folder, made_on)
        if check_loading and not known:
            notes.append(f"The adapter was not put on its model: {made_on!r} is no folder of this machine.")
    else:
        notes += _check_gguf(folder, files)
        if CERTIFICATE_NAME in names and (doubt := _doubt(folder, files)):
            names.remove(CERTIFICATE_NAME)
            notes.append(doubt)
        known = CERTIFICATE_NAME in names
    if check_loading:
        check_tokenizer(folder)
    author = replace(own.author or given, base_model=base)
    text = own.text or sibling_card(folder, kind, names, author, known=known, digest=digest, repo_id=repo_id)
    names += pictures_of(text, folder)
    return gathered(folder, names, [*made, RepositoryFile(CARD, text.encode())], notes)


def _settings(folder: Path, names: list[str]) -> dict[str, Any]:
    """The configuration of an adapter, LoRA or DoRA."""
    if ADAPTER_WEIGHTS not in names:
        problem = f" without {ADAPTER_WEIGHTS}"
        raise refusal(folder, "hold the weights of its adapter", problem, "Save it once more with PEFT.")
    settings = read_json(folder / ADAPTER, "folder")
    if settings.get("peft_type") != "LORA":
        problem = f" with one of type {settings.get('peft_type')!r:.80}"
        raise refusal(folder, "hold an adapter of LoRA", problem, f"It goes as it is: hf upload REPO {folder}")
    return settings


@dataclass(frozen=True)
class _OwnCard:
    """
    The card that is there.

    Args:
        text (`str`, *optional*): That is published; one is written where there is none.
        base (`str`, *optional*): The model that it names.
        author (`AuthorMetadata`, *optional*): What people had said, of one of our making that is written once more.
    """

    text: str | None = None
    base: str | None = None
    author: AuthorMetadata | None = None


def _own_card(folder: Path, card: Path | None, metadata: Path | None, base: str | None, digest: str) -> _OwnCard:
    """
    A card of a person as it is; one of ours is written once more, and that of PEFT, if nothing was filled in.

    Raises:
        ValueError: if it names no model, or another than `base`, or is one of ours of other files that was changed.
    """
    path = card or folder / CARD
    if card is None and path.is_file() and _says_nothing(path):
        return _OwnCard()
    text = own_card(folder, card, metadata)
    if text is None:
        return _OwnCard()
    named = getattr(ModelCard(text, ignore_metadata_errors=True).data, "base_model", None)
    marker = read_marker(text)
    if marker is not None and is_unchanged(text, marker):
        return _OwnCard(base=named, author=marker.author_metadata)
    if marker is not None and marker.weights != digest:
        raise ValueError(
            f"`card` must be of these files, got {str(path)!r}, which was written for others and changed since. "
            "Remove it, or remove its last line if all holds."
        )
    if not isinstance(named, str) or not is_id(named) or (base is not None and named != base):
        raise ValueError(
            f"`card` must name the model on the Hub that this one belongs to as base_model"
            f"{f', {base!r}' if base else ''}, got {named!r:.80} in {str(path)!r}. Mend it there, or remove the card "
            "for one that is written."
        )
    return _OwnCard(text, named)


def _says_nothing(path: Path) -> bool:
    """Whether a card is the one that PEFT saves, as it was."""
    text = path.read_text(encoding="utf-8", errors="replace")
    body = METADATA.sub("", text).partition("### Framework versions")[0]
    empty = METADATA.sub("", str(ModelCard.from_template(ModelCardData())))
    return body.split() == empty.split()


def _digest(folder: Path, names: list[str]) -> str:
    """SHA-256 of files and their names."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name}: {file_sha256(folder / name)}".encode())
    return digest.hexdigest()


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
    if not base or not Path(base).is_dir():
        return False
    model = load_model(base, dtype="auto")
    if not isinstance(model.config, RiGPTConfig):
        problem = f", which belongs to a {model.config.model_type}"
        raise refusal(folder, "hold an adapter of a RiGPT", problem, f"It goes as it is: hf upload REPO {folder}")
    with_adapter(model, folder, "folder")
    return True


def _check_gguf(folder: Path, files: list[str]) -> list[str]:
    """What to say of paths in headers, which are published as they are."""
    require("gguf")
    from gguf import GGUFReader, GGUFValueType

    notes = []
    for name in files:
        if not name.endswith(".gguf"):
            problem, advice = f" with {name!r}", f"Name it {Path(name).stem}.gguf, which the Hub knows."
            raise refusal(folder, "hold files that end in .gguf", problem, advice)
        with reading("folder", folder / name, "hold whole files in GGUF"):
            fields = GGUFReader(folder / name).fields
            header = {
                key: str(field.contents())
                for key, field in fields.items()
                if field.types[:1] == [GGUFValueType.STRING] and not key.startswith("tokenizer.")
            }
        for key, text in header.items():
            if without_path(text) != text:
                notes.append(f"{name} has a path in its header, which goes along: {key} is {text!r:.80}.")
    return notes


def _doubt(folder: Path, files: list[str]) -> str:
    """Why the certificate beside files in GGUF stays at home; nothing if it goes along."""
    written = is_replaceable(folder / CERTIFICATE_NAME) and is_replaceable(folder / files[0])
    if len(files) == 1 and written:
        return ""
    reason = f"it is of one of {len(files)} files" if len(files) > 1 else "it or its file was changed or copied since"
    return f"{CERTIFICATE_NAME} is not published: {reason}. Export once more for one that goes along."
