"""The card: what is known of a model, in the order in which a stranger asks for it."""

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from jinja2 import Environment, PackageLoader, StrictUndefined, Template, UndefinedError
from markupsafe import Markup

from rigpt_hf import RiGPTConfig, __version__
from rigpt_hf.checkpoints.disk import check_writable
from rigpt_hf.checkpoints.folder import write_text
from rigpt_hf.checkpoints.source import check_folder
from rigpt_hf.checkpoints.written import is_replaceable, look, parse_json
from rigpt_hf.evaluation.harness.cache import fingerprint
from rigpt_hf.evaluation.harness.standard_tasks import MEASURE as STANDARD
from rigpt_hf.evaluation.harness.suites import load_suite
from rigpt_hf.evaluation.harness.tables import as_markdown, measure_of
from rigpt_hf.evaluation.measures import MEASURES
from rigpt_hf.evaluation.models import evaluated
from rigpt_hf.text.markup import literal, literal_lines
from rigpt_hf.text.paths import without_path

from .certified import certificate_of
from .marker import PLACEHOLDER, marker_of, signed, title_of
from .metadata import (
    AuthorMetadata,
    CardMetadata,
    author_metadata,
    evaluation_of,
    invariance_of,
    model_metadata,
    sources_of_merge,
    symmetry_of,
    tuned_from,
)
from .runs import training_metadata
from .smaller import smaller_than


CARD = "README.md"
TAGS = ("rigpt", "gauge-symmetry", "rotation-invariance")
# Names that the Hub's widgets know, by the quantities of an evaluation.
HUB_TYPES = {name: kind for measure in (*MEASURES.values(), STANDARD) for name, kind in measure.hub_types.items()}
# A stranger asks for the measures of the core suite.
ASKED_FOR = list(dict.fromkeys(filter(None, (MEASURES[task.metric].card_words for task in load_suite("core").tasks))))
CITATION = """@misc{rigpt,
  title = {RiGPT: a GPT with no preferred basis},
  year = {2026},
  note = {Version VERSION. Gauge symmetry of networks: Hashimoto, Hirono, Sannai, arXiv 2402.02362}
}"""


def gather(folder: Path, results: Path | None = None, metadata: Path | AuthorMetadata | None = None) -> CardMetadata:
    """
    All that is known of a saved model.

    Args:
        folder (`Path`): Of the model; the record of its training is found there or above it.
        results (`Path`, *optional*): `results.json` of an evaluation; that of the folder if there is one.
        metadata (`Path` or `AuthorMetadata`, *optional*): What only people know, or the YAML file that holds it.

    Raises:
        ValueError: if something cannot be read, or is of another model.
    """
    if not folder.is_dir():
        raise ValueError(f"`folder` must be the folder of a saved model, got {str(folder)!r}.")
    check_folder(folder, "folder")
    if (made_for := _architecture(folder)).endswith("ForSequenceClassification"):
        raise ValueError(
            f"`folder` must hold a causal language model, got a {made_for}, of which nothing is measured here. Write "
            "its card by hand."
        )
    measured = evaluated(folder)
    if not isinstance(measured.model.config, RiGPTConfig):
        raise ValueError(
            f"`folder` must hold a RiGPT, got a {measured.model.config.model_type}. Convert it with rigpt convert."
        )
    if results is None and (folder / "results.json").exists():
        results = folder / "results.json"
    evaluation, name = evaluation_of(results, measured)
    certificate, doubt = certificate_of(folder, measured)
    return CardMetadata(
        model=model_metadata(measured),
        author=metadata if isinstance(metadata, AuthorMetadata) else author_metadata(metadata),
        training=training_metadata(folder),
        certificate=certificate,
        doubt=doubt,
        symmetry=symmetry_of(folder, measured),
        smaller=smaller_than(folder),
        merged=sources_of_merge(folder),
        tuned=tuned_from(folder),
        invariance=invariance_of(evaluation, name, measured),
        evaluation=evaluation,
        evaluated_as=name,
        fingerprint=fingerprint(measured),
    )


def _architecture(folder: Path) -> str:
    """The class that was saved, if the folder says."""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        return str(parse_json((folder / "config.json").read_text(encoding="utf-8")).get("architectures")[0])
    return ""


def card_text(
    folder: Path,
    *,
    repo_id: str | None = None,
    results: Path | None = None,
    metadata: Path | AuthorMetadata | None = None,
    tags: Sequence[str] = (),
) -> str:
    """
    The card of a saved model: metadata for the Hub, then Markdown, then a hidden line by which it is known again.

    Args:
        folder, results, metadata: As for [`gather`].
        repo_id (`str`, *optional*): Where it will be found on the Hub.
        tags (`Sequence[str]`): More tags than those of every RiGPT.

    Raises:
        ValueError: as [`gather`], or if `repo_id` is none.
    """
    if repo_id is not None:
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise ValueError(f"`repo_id` must be a name such as me/my-model, got {repo_id!r}.") from error
    known = gather(Path(folder), results, metadata)
    try:
        return render(known, repo_id, tags)
    except (LookupError, TypeError, ValueError, AttributeError, UndefinedError) as error:
        if known.evaluation is None:
            raise
        raise ValueError(
            f"`results` must be as rigpt evaluate wrote them, got some that cannot be shown: {error!r:.80}. Run it "
            "again."
        ) from error


def template(name: str) -> Template:
    """A template of this folder, which escapes what is not marked as Markdown and refuses what nobody knows."""
    environment = Environment(
        loader=PackageLoader("rigpt_hf.model_cards", "."),
        # Those of `ModelCard.from_template` would print nothing for what is undefined, and keep the lines of blocks.
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # that is for HTML
        finalize=lambda value: value if isinstance(value, Markup) else literal(value),
    )
    environment.filters |= {
        "number": _number,
        "duration": _duration,
        "lines": lambda text: Markup(literal_lines(text)),
    }
    return environment.get_template(name)


def citation_of(author: AuthorMetadata) -> str:
    """BibTeX of a model: its author's, or that of this package."""
    return author.citation or CITATION.replace("VERSION", __version__)


def fence_around(text: str) -> Markup:
    """Backquotes that nothing in a text can end."""
    return Markup("`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0)))


def render(known: CardMetadata, repo_id: str | None = None, tags: Sequence[str] = ()) -> str:
    """The text of a card; a `jinja2.UndefinedError` if the template asks for what nobody knows."""
    title, certificate = title_of(known.author, repo_id), known.certificate
    citation = citation_of(known.author)
    body = template("card.md.j2").render(
        vars(known),
        made_from=known.author.base_model or (without_path(certificate.source) if certificate else None),
        title=title,
        repo_id=repo_id or PLACEHOLDER,
        table=_table(known.evaluation) if known.evaluation else None,
        citation=citation,
        fence=fence_around(citation),
        absent=absent(known),
    )
    text = f"---\n{hub_metadata(known, title, tags).to_yaml()}\n---\n\n{body}"
    return signed(text, marker_of(known, title, repo_id))


def _table(evaluation: dict[str, Any]) -> str | None:
    """The numbers of an evaluation as Markdown; what could not be measured is among what is not known."""
    tasks = [task | {"errors": {}} for task in evaluation["tasks"] if task["quantities"]]
    return as_markdown(evaluation | {"tasks": tasks}) if tasks else None


def _number(value: float | None, form: str, unit: str = "") -> str:
    """A measured number in the form of `str.format`; of what overflowed JSON holds none."""
    return f"{value:{form}}{unit}" if value is not None and math.isfinite(value) else "not finite"


def _duration(seconds: float) -> str:
    """A time in the largest unit of which there is one; a tenth is enough, but for less than a second."""
    sizes = {"hours": 3600, "minutes": 60, "seconds": 1}
    unit = next((unit for unit, size in sizes.items() if round(seconds / size, 1) >= 1), "seconds")
    amount = seconds / sizes[unit]
    return f"{amount:{'.1f' if round(amount, 1) >= 1 else '.2g'}} {unit}"


def hub_metadata(known: CardMetadata, title: str, tags: Sequence[str] = ()) -> ModelCardData:
    """The metadata for the Hub: tags, licence, and the results that its widgets show."""
    author = known.author
    return ModelCardData(
        language=author.language,
        license=author.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys([*TAGS, *tags])),
        datasets=author.datasets or None,
        base_model=author.base_model,
        base_model_relation=relation(known) if author.base_model else None,
        model_name=title,
        eval_results=eval_results(known) or None,
    )


def relation(known: CardMetadata) -> str | None:
    """The Hub's word for what was made of the base model; it has none for a conversion, which is the same function."""
    records = {made.record for made in known.smaller}
    if "quantize.json" in records:
        return "quantized"
    if known.merged:
        return "merge"
    return "finetune" if known.tuned or records or (known.training and known.training.start) else None


def eval_results(known: CardMetadata) -> list[EvalResult]:
    """The numbers of an evaluation that the Hub has names for."""
    if known.evaluation is None:
        return []
    text = known.evaluation["suite"]["text"]
    results: list[EvalResult] = []
    for task in known.evaluation["tasks"]:
        dataset = {
            "dataset_type": text["source"],
            "dataset_name": f"{text['documents']} documents of {text['source']}",
            # Tasks on one text would be taken for one otherwise.
            "dataset_config": task["task"],
            "dataset_revision": text["revision"],
        }
        if measure_of(task) is STANDARD:
            dataset = {"dataset_type": task["task"], "dataset_name": task["task"]}
        for quantity in task["quantities"]:
            value: Any = quantity["models"].get(known.evaluated_as, {}).get("value")
            if quantity["name"] in HUB_TYPES and value is not None:
                result = EvalResult(
                    task_type="text-generation",
                    task_name=task["task"],
                    metric_args=task["models"][known.evaluated_as].get("protocol"),
                    metric_type=HUB_TYPES[quantity["name"]],
                    metric_name=quantity["name"],
                    metric_value=value,
                    **dataset,
                )
                results.append(result)
    return results


def absent(known: CardMetadata) -> list[str]:
    """The facts that a stranger would ask for and nobody has given or measured."""
    missing = []
    if known.training is None and known.tuned is None:
        missing.append("how it was trained")
    elif known.training is not None and known.training.source is None:
        missing.append("on what text it was trained")
    if known.doubt:
        missing.append(known.doubt)
    words = [words for words in ASKED_FOR if words not in _measured(known)]
    # All of them as one item.
    missing += words if known.evaluation else [f"{', '.join(words[:-1])} and {words[-1]}"]
    missing += unsaid(known.author)
    if not known.model.has_tokenizer:
        missing.append("a tokenizer")
    return missing


def unsaid(author: AuthorMetadata) -> list[str]:
    """The names of facts that only people know, and that nobody has stated."""
    names = ("license", "language", "intended_use", "limits", "authors")
    return [name.replace("_", " ") for name in names if getattr(author, name) is None]


def _measured(known: CardMetadata) -> set[str]:
    """The words for what an evaluation measured of this model."""
    tasks = [task for task in (known.evaluation or {}).get("tasks", ()) if known.evaluated_as in task["models"]]
    words = {measure_of(task).card_words for task in tasks}
    # Tasks of lm-eval count what was answered rightly.
    names = [q["name"] for task in tasks for q in task["quantities"] if known.evaluated_as in q["models"]]
    return words | ({"accuracy"} if any("accuracy" in HUB_TYPES.get(name, "") for name in names) else set())


def write_card(
    folder: Path,
    *,
    repo_id: str | None = None,
    results: Path | None = None,
    metadata: Path | None = None,
    force: bool = False,
) -> Path:
    """
    Write a card into the folder of its model, whole or not at all.

    Args:
        folder, repo_id, results, metadata: As for [`card_text`].
        force (`bool`, defaults to `False`): Whether to replace a card that this program wrote.

    Returns:
        `Path`: of the card.

    Raises:
        ValueError: as [`card_text`], or if there is a card and `force` is not given, or one that this program did not
            write or somebody has changed since.
    """
    path = Path(folder) / CARD
    seen = look(path)
    if seen and not is_replaceable(path):
        rule = "no card, or one that this program wrote there and nobody has changed since" if force else "no card yet"
        raise ValueError(
            f"`folder` must have {rule}, got {str(path)!r}, which somebody wrote, changed or copied there. Move or "
            "remove it yourself, then say this again."
        )
    if seen and not force:
        raise ValueError(f"`folder` must have no card yet, got {str(path)!r}. Pass `force=True` to replace it.")
    if folder.is_dir():
        check_writable(path, "folder")
    text = card_text(folder, repo_id=repo_id, results=results, metadata=metadata)
    write_text(path, text, "folder", seen, named=True)
    return path
