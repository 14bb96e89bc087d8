"""Dropout on the way in and out: coordinates of the stream cannot be dropped one by one without preferring a basis."""

from collections.abc import Sequence

from transformers.utils import logging

from ..configuration_rigpt import RiGPTConfig


logger = logging.get_logger(__name__)

CHOICES = ("vector", "none", "refuse")


def vector_dropout(probabilities: dict[str, float], choice: str | None) -> tuple[float, ...]:
    """
    The probabilities that replace coordinate-wise dropout; a warning says what changed.

    Args:
        probabilities (`dict[str, float]`): the source's options by name.
        choice (`str`, *optional*):
            `"vector"` keeps the probabilities and drops whole vectors, `"none"` drops nothing, `"refuse"` raises. If
            not given, nothing is dropped or said: for who only wants the shape of the result.

    Returns:
        `tuple[float, ...]`: one probability per option.

    Raises:
        ValueError: if `choice` is unknown, or is "refuse" and a probability is not 0.
    """
    if choice is not None and choice not in CHOICES:
        raise ValueError(f"`dropout` must be one of {', '.join(CHOICES)}, got {choice!r}.")
    none = (0.0,) * len(probabilities)
    used = ", ".join(f"`{name}={value}`" for name, value in probabilities.items() if value)
    if choice is None or not used:
        return none
    if choice == "refuse":
        raise ValueError(
            f"{used}: dropout of single coordinates of the stream has no invariant form. Pass `dropout='vector'` to "
            "drop whole vectors with the same probability, or `dropout='none'` to drop nothing."
        )
    if choice == "none":
        logger.warning(f"{used}: dropout of single coordinates of the stream was set to 0 (`dropout='none'`).")
        return none
    logger.warning(
        f"{used}: dropout of single coordinates of the stream has no invariant form and is carried over as dropout of "
        "whole vectors with the same probability. Evaluation is unaffected; training differs."
    )
    return tuple(probabilities.values())


def stock_dropouts(config: RiGPTConfig, name: str, fields: Sequence[str]) -> dict[str, float]:
    """
    The probabilities for a stock class, by what it calls them; says of those that it has not.

    Args:
        config (`RiGPTConfig`): of the model.
        name (`str`): of the class.
        fields (`Sequence[str]`): what it calls residual dropout and embedding dropout; the first of them, or none.
    """
    ours = ("residual_dropout", "embedding_dropout")
    lost = [f"`{field}={value}`" for field in ours[len(fields) :] if (value := getattr(config, field))]
    if lost:
        logger.warning(
            f"{' and '.join(lost)} {'has' if len(lost) == 1 else 'have'} no counterpart in {name} and "
            f"{'was' if len(lost) == 1 else 'were'} set to 0. Evaluation is unaffected; training differs."
        )
    return dict(zip(fields, coordinate_dropout(config, ours[: len(fields)]), strict=False))


def coordinate_dropout(
    config: RiGPTConfig, fields: Sequence[str] = ("residual_dropout", "embedding_dropout")
) -> tuple[float, float]:
    """The probabilities for a stock model that drops single coordinates; says so where they are not 0."""
    used = [name for name in fields if getattr(config, name)]
    if used:
        logger.warning(
            f"{' and '.join(f'`{name}`' for name in used)}: dropout of whole vectors is carried over as dropout of "
            "single coordinates with the same probability, which is all the stock model has. Evaluation is unaffected."
        )
    return config.residual_dropout, config.embedding_dropout
