"""The card: facts in the order in which a stranger asks for them."""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from jinja2 import Environment, PackageLoader, StrictUndefined

from rigpt_hf import RiGPTConfig, __version__
from rigpt_hf.conversion.output import temporary_sibling
from rigpt_hf.evaluation.harness.cache import fingerprint
from rigpt_hf.evaluation.harness.standard_tasks import MEASURE as STANDARD
from rigpt_hf.evaluation.harness.suites import load_suite
from rigpt_hf.evaluation.harness.tables import as_markdown, measure_of
from rigpt_hf.evaluation.measures import MEASURES
from rigpt_hf.evaluation.models import evaluated
from rigpt_hf.text.paths import without_path

from .certified import certificate_of
from .facts import (
    AuthorFacts,
    CardFacts,
    author_facts,
    evaluation_of,
    invariance_of,
    model_facts,
    sources_of_merge,
    training_facts,
    tuned_from,
)
from .marker import PLACEHOLDER, marker_of, signed, title_of


CARD = "README.md"
TAGS = ("rigpt", "gauge-symmetry", "rotation-invariance")
# Names that the Hub's widgets know, by the quantities of an evaluation.
HUB_TYPES = {name: kind for measure in (*MEASURES.values(), STANDARD) for name, kind in measure.hub_types.items()}
# What a stranger asks for: what the core suite measures.
ASKED_FOR = list(dict.fromkeys(filter(None, (MEASURES[task.metric].card_words for task in load_suite("core").tasks))))
CITATION = """@misc{rigpt,
  title = {RiGPT: a GPT with no preferred basis},
  year = {2026},
  note = {Version VERSION. Gauge symmetry of networks: Hashimoto, Hirono, Sannai, arXiv 2402.02362}
}"""


def gather(folder: Path, results: Path | None = None, facts: Path | AuthorFacts | None = None) -> CardFacts:
    """
    All that is known of a saved model.

    Args:
        folder (`Path`): Of the model; the record of its training is found there or above it.
        results (`Path`, *optional*): `results.json` of an evaluation; that of the folder if there is one.
        facts (`Path` or `AuthorFacts`, *optional*): What only people know, or the YAML file that holds it.

    Raises:
        ValueError: if something cannot be read, or is of another model.
    """
    if not folder.is_dir():
        raise ValueError(f"`folder` must be the folder of a saved model, got {str(folder)!r}.")
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
    author = facts if isinstance(facts, AuthorFacts) else author_facts(facts)
    evaluation, name = evaluation_of(results, measured)
    certificate, doubt = certificate_of(folder, measured)
    return CardFacts(
        model=model_facts(measured),
        author=author,
        training=training_facts(folder),
        certificate=certificate,
        doubt=doubt,
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
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures")[0])
    return ""


def card_text(
    folder: Path,
    *,
    repo_id: str | None = None,
    results: Path | None = None,
    facts: Path | AuthorFacts | None = None,
    tags: Sequence[str] = (),
) -> str:
    """
    The card of a saved model: metadata for the Hub, then Markdown, then a hidden line by which it is known again.

    Args:
        folder, results, facts: As for [`gather`].
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
    return render(gather(Path(folder), results, facts), repo_id, tags)


def render(facts: CardFacts, repo_id: str | None = None, tags: Sequence[str] = ()) -> str:
    """The text of a card."""
    environment = Environment(
        loader=PackageLoader("rigpt_hf.model_cards", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML
    )
    environment.filters["number"] = _number
    title = title_of(facts.author, repo_id)
    body = environment.get_template("card.md.j2").render(
        facts=facts,
        model=facts.model,
        author=facts.author,
        training=facts.training,
        certificate=facts.certificate,
        made_from=facts.author.base_model or (without_path(facts.certificate.source) if facts.certificate else None),
        invariance=facts.invariance,
        title=title,
        repo_id=repo_id or PLACEHOLDER,
        table=as_markdown(facts.evaluation) if facts.evaluation else None,
        citation=facts.author.citation or CITATION.replace("VERSION", __version__),
        absent=absent(facts),
    )
    text = f"---\n{metadata(facts, title, tags).to_yaml()}\n---\n\n{body}"
    return signed(text, marker_of(facts, title, repo_id))


def _number(value: float | None, form: str, unit: str = "") -> str:
    """A measured number in the form of `str.format`; of what overflowed JSON holds none."""
    return f"{value:{form}}{unit}" if value is not None and math.isfinite(value) else "not finite"


def metadata(facts: CardFacts, title: str, tags: Sequence[str] = ()) -> ModelCardData:
    """What the Hub reads: tags, licence, and the results that its widgets show."""
    author = facts.author
    return ModelCardData(
        language=author.language,
        license=author.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys([*TAGS, *tags])),
        datasets=author.datasets or None,
        base_model=author.base_model,
        model_name=title,
        eval_results=eval_results(facts) or None,
    )


def eval_results(facts: CardFacts) -> list[EvalResult]:
    """The numbers of an evaluation that the Hub has names for."""
    if facts.evaluation is None:
        return []
    text = facts.evaluation["suite"]["text"]
    found: list[EvalResult] = []
    for task in facts.evaluation["tasks"]:
        standard = measure_of(task) is STANDARD
        for quantity in task["quantities"]:
            value: Any = quantity["models"].get(facts.evaluated_as, {}).get("value")
            if quantity["name"] not in HUB_TYPES or value is None:
                continue
            found.append(
                EvalResult(
                    task_type="text-generation",
                    task_name=task["task"],
                    dataset_type=task["task"] if standard else text["source"],
                    dataset_name=task["task"] if standard else f"{text['documents']} documents of {text['source']}",
                    # Tasks on one text would be taken for one otherwise.
                    dataset_config=None if standard else task["task"],
                    dataset_revision=None if standard else text["revision"],
                    metric_args=task["models"][facts.evaluated_as].get("protocol"),
                    metric_type=HUB_TYPES[quantity["name"]],
                    metric_name=quantity["name"],
                    metric_value=value,
                )
            )
    return found


def absent(facts: CardFacts) -> list[str]:
    """What a stranger would ask for and nobody has said or measured."""
    author, missing = facts.author, []
    if facts.training is None and facts.tuned is None:
        missing.append("how it was trained")
    elif facts.training is not None and facts.training.source is None:
        missing.append("on what text it was trained")
    if facts.doubt:
        missing.append(facts.doubt)
    if facts.evaluation is None:
        missing.append(f"{', '.join(ASKED_FOR[:-1])} and {ASKED_FOR[-1]}")
    else:
        own = [task for task in facts.evaluation["tasks"] if facts.evaluated_as in task["models"]]
        measured = {measure_of(task).card_words for task in own}
        # Tasks of lm-eval count what was answered rightly.
        types = {
            HUB_TYPES.get(quantity["name"], "")
            for task in facts.evaluation["tasks"]
            for quantity in task["quantities"]
            if facts.evaluated_as in quantity["models"]
        }
        if any(kind.startswith("accuracy") for kind in types):
            measured.add("accuracy")
        missing += [words for words in ASKED_FOR if words not in measured]
    for name in ("license", "language", "intended_use", "limits", "authors"):
        if getattr(author, name) is None:
            missing.append(name.replace("_", " "))
    if not facts.model.has_tokenizer:
        missing.append("a tokenizer")
    return missing


def write_card(
    folder: Path,
    *,
    repo_id: str | None = None,
    results: Path | None = None,
    facts: Path | None = None,
    force: bool = False,
) -> Path:
    """
    Write a card into the folder of its model, whole or not at all.

    Args:
        folder, repo_id, results, facts: As for [`card_text`].
        force (`bool`, defaults to `False`): Whether to replace a card that is there.

    Returns:
        `Path`: of the card.

    Raises:
        ValueError: as [`card_text`], or if there is a card and `force` is not given.
    """
    path = Path(folder) / CARD
    if path.exists() and not force:
        raise ValueError(f"`folder` must have no card yet, got {str(path)!r}. Pass `force=True` to replace it.")
    text = card_text(folder, repo_id=repo_id, results=results, facts=facts)
    temporary = temporary_sibling(path)
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path
