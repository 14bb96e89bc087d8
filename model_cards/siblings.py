"""The cards of what is made of a RiGPT and is none itself: adapters of PEFT, and files in GGUF."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from rich.filesize import decimal

from rigpt_hf.checkpoints.certificate import CERTIFICATE_NAME, Certificate
from rigpt_hf.checkpoints.source import ADAPTER, read_json
from rigpt_hf.text.paths import without_path

from .card import citation_of, fence_around, template, unsaid
from .marker import PLACEHOLDER, Marker, signed, title_of
from .metadata import AuthorMetadata
from .runs import of_record


ADAPTERS, GGUF = "adapter", "gguf"


def sibling_card(
    folder: Path,
    kind: str,
    names: list[str],
    author: AuthorMetadata,
    *,
    known: bool,
    digest: str,
    repo_id: str | None = None,
) -> str:
    """
    The card of an adapter or of files in GGUF, from what lies beside them.

    Args:
        folder, kind: Of it, and whether it is an adapter or GGUF.
        names (`list[str]`): The files that are published.
        author (`AuthorMetadata`): What people said; `base_model` is known.
        known (`bool`): Whether it was seen that it belongs to a RiGPT, or was exported from one.
        digest (`str`): SHA-256 that stands for the weights.
        repo_id (`str`, *optional*): Where it will be found on the Hub.

    Raises:
        ValueError: if a record of the folder cannot be read.
    """
    title = title_of(author, repo_id)
    citation = citation_of(author)
    sizes = {name: decimal((folder / name).stat().st_size) for name in names if name.endswith(".gguf")}
    body = template("sibling.md.j2").render(
        title=title,
        kind=kind,
        known=known,
        author=author,
        repo_id=repo_id or PLACEHOLDER,
        has_tokenizer="tokenizer.json" in names,
        adapter=_of_adapter(read_json(folder / ADAPTER, "folder")) if kind == ADAPTERS else None,
        tuned=of_record(folder / "finetune.json", _of_tuning) if "finetune.json" in names else None,
        sizes=sizes,
        certificate=_without_paths(Certificate.load(folder)) if CERTIFICATE_NAME in names else None,
        citation=citation,
        fence=fence_around(citation),
        absent=unsaid(author),
    )
    metadata = ModelCardData(
        language=author.language,
        license=author.license,
        library_name="peft" if kind == ADAPTERS else None,
        pipeline_tag="text-generation",
        tags=["rigpt", "lora" if kind == ADAPTERS else "gguf"],
        datasets=author.datasets or None,
        base_model=author.base_model,
        base_model_relation="adapter" if kind == ADAPTERS else "quantized",
        model_name=title,
    )
    said = {name: value for name, value in asdict(author).items() if value}
    return signed(f"---\n{metadata.to_yaml()}\n---\n\n{body}", Marker(digest, None, repo_id, title, said))


def _without_paths(certificate: Certificate) -> Certificate:
    return replace(certificate, source=without_path(certificate.source), target=without_path(certificate.target))


def _of_adapter(settings: dict[str, Any]) -> dict[str, Any]:
    targets, rank = settings.get("target_modules"), settings.get("r")
    root = "√" if settings.get("use_rslora") else ""
    others = ", others for some maps" if settings.get("rank_pattern") or settings.get("alpha_pattern") else ""
    return {
        "method": "DoRA" if settings.get("use_dora") else "LoRA",
        "rank": f"{rank}, scaled by {settings.get('lora_alpha')} / {root}{rank}{others}",
        "targets": ", ".join(sorted(map(str, targets))) if isinstance(targets, list) else str(targets or "unknown"),
    }


def _of_tuning(record: Any) -> dict[str, Any]:
    options, result = record["options"], record["result"]
    return {
        "data": without_path(str(options["data"])),
        "steps": int(result["steps"]),
        "tokens": int(result["tokens"]),
        "measured_on": str(result["measured_on"]),
        "before": float(result["loss_before"]),
        "after": float(result["loss_after"]),
    }
