"""What verbs share: finding and loading models, checks before any weights are read, files that appear complete."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from ..command_line import as_options as as_options
from ..extras import require


PICTURES = (".png", ".svg", ".pdf")
DTYPES = ("float64", "float32", "bfloat16", "float16")


def to_dtype(name: str | None) -> Any:
    """The torch dtype of this name."""
    import torch

    if name is not None and name not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {name!r}.")
    return None if name is None else getattr(torch, name)


def known(source: str, loader: Any, **options: Any) -> Any:
    """What `loader` gives for a folder or Hub id; a `ValueError` that names it if there is nothing."""
    import rigpt_hf  # noqa: F401  so that the Auto classes know RiGPT

    try:
        return loader.from_pretrained(source, **options)
    except OSError as error:
        raise ValueError(
            f"`source` must be the folder of a saved model or the id of a repository on the Hub, got {source!r}: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error


def load(source: str, dtype: Any = None) -> Any:
    """A causal language model from a folder or the Hub, in evaluation mode."""
    from ..checkpoints.read import load_model

    return load_model(source, dtype=dtype or "auto", allow_unexpected=True).eval()


def rigpt_config(source: str, revision: str | None = None) -> Any:
    """The configuration of a RiGPT; a `ValueError` that says what to do if `source` is anything else."""
    from transformers import AutoConfig

    from ..symmetry.checkpoint import check_rigpt

    return check_rigpt(known(source, AutoConfig, **({"revision": revision} if revision else {})), source)


def load_rigpt(source: str, dtype: Any = None, revision: str | None = None) -> Any:
    """
    A `RiGPTForCausalLM` from a folder or the Hub, in evaluation mode.

    Args:
        source: Folder or Hub id.
        dtype (`torch.dtype`, *optional*): To load as; as saved if not given.
        revision: Branch, tag or commit on the Hub.

    Raises:
        ValueError: if it is not a RiGPT, or its weights are not those that its configuration asks for.
    """
    from .. import RiGPTForCausalLM
    from ..checkpoints.read import load_model

    rigpt_config(source, revision)
    where: Any = {"revision": revision} if revision else {}
    return load_model(source, RiGPTForCausalLM, dtype=dtype or "auto", **where).eval()


def check_comparable(a: str, b: str):
    """A `ValueError` if two models cannot be given the same tokens; looked up before any weights are read."""
    from transformers import AutoConfig

    sizes = [known(source, AutoConfig).vocab_size for source in (a, b)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"`a` and `b` must have one vocabulary, got {sizes[0]} tokens in {a!r} and {sizes[1]} in {b!r}. Compare "
            "a model with what was made from it."
        )


def check_same_vocabulary(a: str, b: str):
    """
    A `ValueError` if the tokens of two models mean different things: vocabularies of two sizes, or, where both have a
    tokenizer, one token with two ids, or other merges. Looked up before any weights are read.
    """
    check_comparable(a, b)
    first, second = tokenizer_of(a), tokenizer_of(b)
    if first is None or second is None:
        return
    advice = "Take two models that were made with one tokenizer; tokens of one id must mean the same in both."
    ids, others = first.get_vocab(), second.get_vocab()
    differing = sorted(token for token in ids.keys() | others.keys() if ids.get(token) != others.get(token))
    if differing:
        token = differing[0]
        places = [f"id {table[token]}" if token in table else "absent" for table in (ids, others)]
        raise ValueError(
            f"`a` and `b` must have one tokenizer, got two that differ in {len(differing)} tokens, such as {token!r}: "
            f"{places[0]} in {a!r}, {places[1]} in {b!r}. {advice}"
        )
    if merges_of(first) != merges_of(second):
        raise ValueError(
            f"`a` and `b` must have one tokenizer, got two that merge characters differently, in {a!r} and {b!r}. "
            f"{advice}"
        )


def tokenizer_of(source: str) -> Any:
    """The tokenizer of a folder or Hub id; `None` if it has none, or none that loads here."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, ImportError, KeyError):
        return None


def merges_of(tokenizer: Any) -> Any:
    """The merges of a byte-pair tokenizer; `None` for other kinds."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else json.loads(backend.to_str())["model"].get("merges")


def check_device(device: str):
    """A `ValueError` if PyTorch cannot put anything on this device."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"`device` must be one that PyTorch can use here, such as cpu, got {device!r}: {reason}"
        ) from error


def text_ids(source: str, path: Path) -> Any:
    """Token ids `[1, seq]` of the beginning of a text file, by the tokenizer of `source`."""
    from transformers import AutoConfig, AutoTokenizer

    if not path.is_file():
        raise ValueError(f"`text` must be a file, got {str(path)!r}.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"`text` must be UTF-8, got {str(path)!r}: {error}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ValueError(
            f"`text` needs a tokenizer, and {source!r} has none that loads here: "
            f"{str(error).strip().splitlines()[0]} Add the tokenizer's files to the folder, or leave the text out."
        ) from error
    length = min(512, known(source, AutoConfig).max_position_embeddings)
    input_ids = tokenizer(text[: 16 * length], return_tensors="pt", add_special_tokens=False)["input_ids"][:, :length]
    if input_ids.shape[1] < 2:
        raise ValueError(
            f"`text` must give at least two tokens by the tokenizer of {source!r}, got {input_ids.shape[1]}. Give a "
            "longer one, add the tokenizer's files to the folder, or leave it out to compare on random tokens."
        )
    return input_ids


def check_file(path: Path | None, argument: str, force: bool):
    """A `ValueError` if no file can be written under this name: a folder, or a file without `force`. None is fine."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"`{argument}` must be a file, got the folder {str(path)!r}. Name a file in it.")
    if path.exists() and not force:
        raise ValueError(
            f"`{argument}` must not exist yet, got {str(path)!r}. Name another file, or pass `force=True`."
        )


@contextmanager
def new_file(path: Path, argument: str, force: bool) -> Iterator[Path]:
    """
    A place beside `path` to write a file to; it becomes `path` when the block ends well, and is removed if not.

    Args:
        path: Where the file shall appear.
        argument: Name of the argument that says so.
        force: Whether an earlier file may be replaced.

    Raises:
        ValueError: if `path` is a folder, or a file without `force`.
    """
    from ..checkpoints.folder import new_file as whole_file

    check_file(path, argument, force)
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = stack.enter_context(whole_file(path))
            temporary.touch()
        except OSError as error:
            raise ValueError(
                f"`{argument}` must be a place that can be written to, got {str(path)!r}: {error.strerror}. Name "
                "another."
            ) from error
        yield temporary


def check_picture(path: Path | None, force: bool):
    """A `ValueError` if no picture can be written under this name, or none can be drawn. None is fine."""
    check_file(path, "picture", force)
    if path is None:
        return
    if path.suffix not in PICTURES:
        raise ValueError(f"`picture` must end in one of {', '.join(PICTURES)}, got {str(path)!r}.")
    require("pictures")


def numbers(text: str, argument: str) -> list[float]:
    """The numbers in a list with commas."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"`{argument}` must be numbers separated by commas, got {text!r}.") from error


def save_model(model: Any, source: str, output: Path, facts: dict[str, dict]):
    """
    Write a model with the tokenizer of `source` and some JSON files; the folder appears complete or not at all.

    `output` must have been looked at by `check_output` before.
    """
    from ..checkpoints.companions import save_tokenizer
    from ..checkpoints.folder import new_folder
    from ..checkpoints.read import local_folder, quiet_loading

    with new_folder(output) as folder:
        with quiet_loading():
            model.save_pretrained(folder)
        save_tokenizer(local_folder(source), folder)
        for name, values in facts.items():
            (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def report(certificate: Any, output: Path):
    """Print the certificate of what was written, and where it is."""
    console = Console()
    console.print(str(certificate), highlight=False)
    console.print(f"Written to {output}")
