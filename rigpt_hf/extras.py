"""
The packages of each extra of the distribution, and one line for one that is not installed.

    with needs("pictures"):
        from matplotlib.figure import Figure

Loading, converting, checking and turning models need no extra.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec


# By the names that are imported, as in pyproject.toml; smallest first.
EXTRAS = {
    "pictures": ("matplotlib",),
    "align": ("scipy",),
    "cards": ("jinja2",),
    "lm-eval": ("lm_eval",),
    "space": ("gradio",),
    "gguf": ("gguf", "accelerate"),
    "demo": ("accelerate", "matplotlib"),
    "flow": ("torchdiffeq", "scipy", "matplotlib"),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "course": ("jupytext", "nbclient", "nbformat", "ipykernel", "IPython"),
    "eval": ("accelerate", "datasets", "evaluate", "scipy", "jinja2", "matplotlib"),
    "train": ("accelerate", "datasets", "pyarrow", "peft", "trl", "tensorboard", "jinja2", "matplotlib"),
}


class MissingPackage(ImportError):
    """A package that an extra brings is not installed; the message says which extra."""


def advice(error: ImportError, extra: str | None = None) -> str | None:
    """
    The command after which a failed import succeeds, in one line; `None` if no extra has the package.

    Args:
        error: As Python raised it.
        extra: That of the program, preferred to smaller ones if it has the package.
    """
    if isinstance(error, MissingPackage):
        return str(error)
    package = (error.name or "").partition(".")[0]
    having = [name for name, packages in EXTRAS.items() if package in packages]
    if not having:
        return None
    chosen = extra if extra in having else having[0]
    return f"The package {package} is needed for this, and not installed. Run `pip install 'rigpt-hf[{chosen}]'`."


def require(extra: str):
    """
    Refuse at once what would fail at the end of long work.

    Raises:
        MissingPackage: if a package of the extra is not installed, with the line of [`advice`].
    """
    for package in EXTRAS[extra]:
        if find_spec(package) is None:
            raise MissingPackage(advice(ImportError(name=package), extra), name=package)


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """
    Inside of this block an import that fails says what to install.

    Raises:
        MissingPackage: for a package that some extra brings, with the line of [`advice`].
    """
    try:
        yield
    except ImportError as error:
        line = advice(error, extra)
        if line is None:
            raise
        raise MissingPackage(line, name=error.name) from error
