"""
Modules for the `evaluate` library, one folder each.

    import evaluate
    perplexity = evaluate.load("evaluation/metrics/perplexity")  # from a checkout
    perplexity.compute(predictions=["Some text."], model=model, tokenizer=tokenizer)

[`load`] finds them wherever the package is installed. Each wraps a function of `rigpt_hf.evaluation.measures`, which
can be called without `evaluate` just as well.
"""

from pathlib import Path
from typing import Any


FOLDER = Path(__file__).parent
NAMES = tuple(sorted(path.name for path in FOLDER.iterdir() if (path / f"{path.name}.py").exists()))


def load(name: str, **options: Any) -> Any:
    """
    A module of this package, as `evaluate.load` gives it.

    Args:
        name (`str`): Such as `"perplexity"`.
        options: For `evaluate.load`.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in NAMES:
        raise ValueError(f"`name` must be one of {', '.join(NAMES)}, got {name!r}.")
    import evaluate

    return evaluate.load(str(FOLDER / name), **options)
