"""The facts about a model, grouped by who knows them; a group is absent where nobody does."""

import json
import re
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from rigpt_hf.checkpoints.certificate import Certificate
from rigpt_hf.checkpoints.dequantized import dtype_in_words, method_of, numbers_of
from rigpt_hf.checkpoints.logits import random_input_ids
from rigpt_hf.dataclass_options import yaml_fault
from rigpt_hf.evaluation.harness.cache import fingerprint
from rigpt_hf.evaluation.harness.results import SCHEMA
from rigpt_hf.evaluation.measures.invariance import invariance
from rigpt_hf.evaluation.models import EvaluatedModel
from rigpt_hf.symmetry.merging import check_weights
from rigpt_hf.symmetry.tokens import Representation, symmetry_error

from .numbers import check_numbers
from .runs import UNREADABLE, ImpossibleValue, TrainingMetadata, name_of_source, of_record
from .smaller import SmallerMetadata


LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]{2,4})?")
# Rows of random tokens on which the error is measured where no evaluation did.
ROWS, LENGTH = 2, 64
# Tokens of a symmetry that a card names.
SHOWN = 4
# Positions of the two rows that are relabelled; every second token is one that moves.
RELABELLED = 64
# What relabelling may change, in nats, for each unit of the distance that weights may have.
FELT = 100


@dataclass(frozen=True)
class ModelMetadata:
    """The facts that configuration and weights hold."""

    type: str
    parameters: int
    layers: int
    hidden_size: int
    heads: int
    key_value_heads: int
    vocabulary: int
    positions: int
    position_type: str
    attention_score: str
    tied: bool
    dtype: str
    has_tokenizer: bool
    options: list[str]
    """Options of the architecture that are on."""
    quantized: bool = False
    """Whether its weights are codes, which cannot be turned."""


@dataclass(frozen=True)
class AuthorMetadata:
    """The facts that only people know; the fields of a YAML file."""

    title: str | None = None
    """The name of the model."""
    description: str | None = None
    """A sentence or two."""
    license: str | None = None
    """An identifier of the Hub, such as apache-2.0."""
    language: str | list[str] | None = None
    """Codes such as en."""
    datasets: list[str] = field(default_factory=list)
    """Ids on the Hub."""
    base_model: str | None = None
    """Id on the Hub of the model that this one comes from."""
    authors: str | None = None
    """Its makers."""
    intended_use: str | None = None
    """The tasks that it is for."""
    limits: str | None = None
    """The tasks that it must not be used for, or cannot do."""
    citation: str | None = None
    """BibTeX."""

    def __post_init__(self):
        texts = ("title", "description", "license", "base_model", "authors", "intended_use", "limits", "citation")
        for name, value in ((name, getattr(self, name)) for name in texts):
            if value is None:
                continue
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"`{name}` in `metadata` must be some text, got {value!r}.")
            if name in ("title", "license", "base_model") and len(value.splitlines()) > 1:
                raise ValueError(f"`{name}` in `metadata` must be one line, got {value!r}.")
        codes = [self.language] if isinstance(self.language, str) else self.language
        if codes is not None and not (
            isinstance(codes, list)
            and codes
            and all(isinstance(code, str) and LANGUAGE.fullmatch(code) for code in codes)
        ):
            raise ValueError(
                f"`language` in `metadata` must be codes such as en, in quotes where YAML takes them for a word, got "
                f"{self.language!r}."
            )
        for value in [*(self.datasets if isinstance(self.datasets, list) else [self.datasets]), self.base_model]:
            try:
                validate_repo_id(value)
            except HFValidationError as error:
                raise ValueError(
                    f"`datasets` and `base_model` in `metadata` must be ids on the Hub, got {value!r}."
                ) from error


@dataclass(frozen=True)
class SymmetryMetadata:
    """A symmetry of the tokens that a configuration records, held against the weights."""

    order: str
    """Elements of the group, in words."""
    tokens: int
    """How many it moves."""
    shown: list[str]
    """Some of them."""
    distance: float
    """Distance of the weights from having it, as a share of their norm."""
    error: float
    """Largest difference that relabelling makes to log-probabilities, in nats."""
    holds: bool


@dataclass(frozen=True)
class CardMetadata:
    """All that a card is made of."""

    model: ModelMetadata
    author: AuthorMetadata
    training: TrainingMetadata | None
    certificate: Certificate | None
    doubt: str
    """Why there is none, if there is a file of one."""
    merged: list[tuple[str, float]]
    """Sources and weights."""
    tuned: str | None
    """The model that was fine-tuned."""
    invariance: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    evaluated_as: str | None
    """Name of the model in the evaluation."""
    fingerprint: str
    """SHA-256 of weights, configuration and tokenizer."""
    symmetry: SymmetryMetadata | None = None
    smaller: list[SmallerMetadata] = field(default_factory=list)
    """How it was made so."""


def model_metadata(subject: EvaluatedModel) -> ModelMetadata:
    """From the configuration and the weights of a RiGPT."""
    config = subject.model.config
    switches = {
        "gated_mlp": "gated feedforward",
        "use_parallel_residual": "attention and feedforward in parallel",
        "qk_norm": "query-key norm",
        "qk_norm_gain": "gains of queries and keys",
        "qk_norm_bias": "biases behind their norms",
        "embedding_norm": "normalised embeddings",
        "embedding_norm_map": "an affine map of normalised embeddings",
        "local_frames": "a frame per layer",
        "value_embedding_period": "value embeddings",
        "depth_solver": "depth as time",
        "rotary_learned_frequencies": "learned rotary frequencies",
    }
    return ModelMetadata(
        type=config.model_type,
        parameters=numbers_of(subject.model),
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        heads=config.num_attention_heads,
        key_value_heads=config.num_key_value_heads,
        vocabulary=config.vocab_size,
        positions=config.max_position_embeddings,
        position_type=config.position_embedding_type,
        attention_score=config.attention_score,
        tied=config.tie_word_embeddings,
        dtype=dtype_in_words(subject.model),
        has_tokenizer=subject.tokenizer is not None,
        options=[words for name, words in switches.items() if getattr(config, name)],
        quantized=method_of(config) is not None,
    )


def symmetry_of(folder: Path, subject: EvaluatedModel) -> SymmetryMetadata | None:
    """The token symmetry that is recorded of a model, measured; a `ValueError` if the record cannot be read."""
    model, tokenizer = subject.model, subject.tokenizer
    if model.config.token_symmetry is None:
        return None
    representation = Representation.from_config(model.config, folder)
    symmetry, distance = representation.symmetry, representation.distance(model)
    tolerance, points = representation.tolerance(model.dtype), torch.from_numpy(symmetry.points)
    inputs = random_input_ids(symmetry.vocab_size, model.config.max_position_embeddings, length=RELABELLED)
    inputs[:, ::2] = points[random_input_ids(len(points), inputs[:, ::2].shape[1], len(inputs), seed=1)]
    error = symmetry_error(model, symmetry, inputs.to(model.device)).max
    first = symmetry.points[:SHOWN].tolist()
    return SymmetryMetadata(
        order=symmetry.order_in_words,
        tokens=len(symmetry.points),
        shown=list(map(str, first if tokenizer is None else tokenizer.convert_ids_to_tokens(first))),
        distance=distance,
        error=error,
        holds=distance <= tolerance and error <= FELT * tolerance,
    )


def author_metadata(path: Path | None) -> AuthorMetadata:
    """
    From a YAML file.

    Raises:
        ValueError: if there is no such file, or something in it is unknown.
    """
    if path is None:
        return AuthorMetadata()
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        fault = yaml_fault(error)
        raise ValueError(f"`metadata` must be a YAML file, got {str(path)!r}: {fault}. Mend it.") from error
    known = [field.name for field in fields(AuthorMetadata)]
    if not isinstance(values, dict) or set(values) - set(known):
        strange = sorted(set(values) - set(known))[0] if isinstance(values, dict) else values
        raise ValueError(f"`metadata` must hold some of {', '.join(known)}, got {strange!r}.")
    return AuthorMetadata(**values)


def sources_of_merge(folder: Path) -> list[tuple[str, float]]:
    """The sources of a merged model, and the weight of each; nothing if it was not merged."""

    def sources(record: Any) -> list[tuple[str, float]]:
        # There is no fraction of what is not finite.
        weights = [float(Fraction(weight)) for weight in record["weights"]]
        try:
            check_weights(record["sources"], weights, record.get("method", "linear"))
        except ValueError as error:
            raise ImpossibleValue(str(error)) from error
        return list(zip([name_of_source(str(source)) for source in record["sources"]], weights, strict=True))

    return of_record(folder / "merge.json", sources) or []


def tuned_from(folder: Path) -> str | None:
    """The model that a fine-tuned one started from; `None` if it was not fine-tuned here."""
    return of_record(folder / "finetune.json", lambda record: name_of_source(record["options"]["model"]))


def evaluation_of(path: Path | None, subject: EvaluatedModel) -> tuple[dict[str, Any] | None, str | None]:
    """
    An evaluation, and what the model is called in it.

    Raises:
        ValueError: if the file cannot be read, none of its models has these weights, or a number in it is impossible
            or contradicts another.
    """
    if path is None:
        return None, None
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        schema, models = results["schema"], results["models"]
    except UNREADABLE as error:
        raise ValueError(f"`results` must be a results.json of rigpt evaluate, got {str(path)!r}.") from error
    if schema != SCHEMA:
        raise ValueError(f"`results` must have the schema {SCHEMA}, got {schema}. Run rigpt evaluate again.")
    own = fingerprint(subject)
    tasks = results.get("tasks")
    whole = isinstance(models, dict) and isinstance(tasks, list) and all(isinstance(task, dict) for task in tasks)
    for name, entry in models.items() if whole else ():
        if isinstance(entry, dict) and entry.get("sha256") == own:
            facts = vars(model_metadata(subject))
            check_numbers(path, results, name, {key: facts[key] for key in ("type", "parameters", "dtype")})
            return results, name
    raise ValueError(
        f"`results` must be of this model, with its weights and tokenizer as they are stored, got those of "
        f"{', '.join(models) if isinstance(models, dict) else repr(models)[:80]}. Run rigpt evaluate on this folder."
    )


def invariance_of(results: dict[str, Any] | None, name: str | None, subject: EvaluatedModel) -> dict[str, Any]:
    """The gauge error of the weights: of the evaluation, or measured now on random tokens."""
    for task in (results or {}).get("tasks", []):
        if task.get("metric") == "invariance" and name in (task.get("models") or ()):
            # Only what is measured here may say so.
            return {key: value for key, value in task["models"][name].items() if key != "random_tokens"}
    generator = torch.Generator().manual_seed(0)
    length = min(LENGTH, subject.context(None))
    rows = torch.randint(subject.model.config.vocab_size, (ROWS, length), generator=generator).tolist()
    return invariance(subject, rows, draws=1) | {"random_tokens": True}
