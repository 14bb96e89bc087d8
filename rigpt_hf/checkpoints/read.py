"""Reading weights: the tensors of a folder or of a model in memory, and whole models with nothing missing."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from .companions import TEMPLATE_FILES, TOKENIZER_FILES


DOWNLOADED = ("config.json", "generation_config.json", "model*.safetensors", SAFE_WEIGHTS_INDEX_NAME)
# Names that safetensors has for the dtypes of weights (masks in old GPT-2 files are U8 or BOOL).
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Rows:
    """The rows of a part of a fused map: `length` from `start` on, of every `period`."""

    start: int
    length: int
    period: int

    def place(self, part: torch.Tensor, whole: torch.Tensor) -> None:
        """Write `part` into these rows of `whole`."""
        places = whole.unflatten(0, (-1, self.period)).narrow(1, self.start, self.length)
        places.copy_(part.unflatten(0, (-1, self.length)))


class Weights:
    """
    Named tensors of a model in memory.

    Args:
        tensors (`Mapping[str, torch.Tensor]`): a state dict.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self._tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}

    def read(self, name: str, rows: Rows | None = None, dim: int = 0) -> torch.Tensor:
        """
        A tensor, or some of its rows, which stand along `dim`; from a file, no more than those are read.

        Raises:
            ValueError: if its size is no multiple of the period of `rows`, or it holds numbers that are not finite.
        """
        if rows is None:
            tensor = self._get(name)
        elif (size := self.shapes[name][dim]) % rows.period:
            raise ValueError(
                f"`{name}` must be made of parts of {rows.period} rows by the configuration, got {size}. The "
                "checkpoint is damaged, or the configuration does not belong to it."
            )
        elif size == rows.period:
            tensor = self._slice(name, dim, rows.start, rows.length)
        else:
            parts = self._get(name).unflatten(dim, (-1, rows.period)).narrow(dim + 1, rows.start, rows.length)
            tensor = parts.flatten(dim, dim + 1)
        # Least and largest need no copy, and either is NaN where any number is.
        if tensor.is_floating_point() and tensor.numel() and not all(map(math.isfinite, tensor.aminmax())):
            raise ValueError(
                f"`{name}` must hold finite numbers, got NaN or infinity. The checkpoint is damaged; download or save "
                "it once more."
            )
        return tensor

    def _get(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach()

    def _slice(self, name: str, dim: int, start: int, length: int) -> torch.Tensor:
        return self._get(name).narrow(dim, start, length)

    def check_copy(self, copy: str, original: str) -> None:
        """Raise a `ValueError` if there is a second copy of a tied table that is none."""
        if copy in self.shapes and not torch.equal(self.read(copy), self.read(original)):
            raise ValueError(
                f"`{copy}` differs from `{original}` although `tie_word_embeddings=True`. Set "
                "`tie_word_embeddings=False` in the source's configuration to keep it, or remove it."
            )


class StoredWeights(Weights):
    """
    The tensors of a folder of safetensors, each read when asked for.

    Files are read with `pread`, not mapped: mapped pages stay resident and would count towards the peak of memory.

    Args:
        folder (`Path`): holds `model.safetensors`, or shards and `model.safetensors.index.json`.
        device (`str`, defaults to `"cpu"`): where tensors are put.

    Raises:
        ValueError: if the folder holds no safetensors, the index and the shards disagree, or a tensor holds codes.
    """

    def __init__(self, folder: Path, device: str = "cpu"):
        self.device = device
        self._files: dict[str, Path] = {}
        self._open: tuple[Path | None, Any] = (None, None)
        self.shapes, self.dtypes = {}, {}
        weight_map = None
        if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
            weight_map = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
        elif not (folder / SAFE_WEIGHTS_NAME).is_file():
            raise ValueError(
                f"`source` must be a folder with `{SAFE_WEIGHTS_NAME}` or `{SAFE_WEIGHTS_INDEX_NAME}`, got "
                f"{str(folder)!r}, which has neither. Older formats: load the model with `from_pretrained` and use "
                "`convert_model`, or save it once more with `save_pretrained`."
            )
        for file in [SAFE_WEIGHTS_NAME] if weight_map is None else sorted(set(weight_map.values())):
            if not (folder / file).is_file():
                raise ValueError(
                    f"`{SAFE_WEIGHTS_INDEX_NAME}` names the shard {file!r}, which is missing. Download it again."
                )
            self._scan(folder / file)
        if weight_map is not None and set(weight_map) != set(self._files):
            odd = sorted(set(weight_map) ^ set(self._files))
            raise ValueError(
                f"`{SAFE_WEIGHTS_INDEX_NAME}` and its shards disagree about {odd[0]!r}. Download them again."
            )

    def _scan(self, path: Path) -> None:
        """Names, shapes and dtypes, without the numbers."""
        handle = self._handle(path)
        for name in handle.keys():  # noqa: SIM118  it is no dict
            stored = handle.get_slice(name)
            if stored.get_dtype() not in DTYPES:
                raise ValueError(
                    f"`{name}` is stored as {stored.get_dtype()}; weights must be one of {', '.join(DTYPES)} to be "
                    "folded. Start from a checkpoint that is not quantized."
                )
            self._files[name] = path
            self.shapes[name], self.dtypes[name] = tuple(stored.get_shape()), DTYPES[stored.get_dtype()]

    def _handle(self, path: Path) -> Any:
        if self._open[0] != path:  # one open file at a time, however many shards there are
            self._open = path, safe_open(path, framework="pt", backend="pread")
        return self._open[1]

    def _get(self, name: str) -> torch.Tensor:
        return self._handle(self._files[name]).get_tensor(name).to(self.device)

    def _slice(self, name: str, dim: int, start: int, length: int) -> torch.Tensor:
        where = (slice(None),) * dim + (slice(start, start + length),)
        return self._handle(self._files[name]).get_slice(name)[where].to(self.device)


def check_names(
    argument: str,
    source: str,
    *,
    missing: Iterable[str] = (),
    unexpected: Iterable[str] = (),
    mismatched: Iterable[str] = (),
) -> None:
    """
    Raise if a checkpoint has not exactly the tensors that its configuration asks for.

    Args:
        argument (`str`), source (`str`): what the checkpoint is called, and its folder or id.
        missing, unexpected, mismatched (`Iterable[str]`): names of tensors; the last have another shape.

    Raises:
        ValueError: names the first few of them.
    """
    for problem, names in (
        ("lacks", missing),
        ("has no place for", unexpected),
        ("gives another shape to", mismatched),
    ):
        if names := list(names):
            raise ValueError(
                f"`{argument}` must hold the weights of its configuration, got {source!r}, which {problem} "
                f"{name_some(names)}. Save the whole model once more with `save_pretrained`."
            )


def load_model(
    source: str | Path,
    model_class: Any = AutoModelForCausalLM,
    *,
    argument: str = "source",
    allow_unexpected: bool = False,
    **options: Any,
) -> Any:
    """
    A model from a folder or the Hub, with the weights that its configuration asks for.

    The library alone would go on with random weights for those that are missing, and without some that are there.

    Args:
        source (`str` or `Path`): folder or id.
        model_class (`type`, *optional*): what loads it.
        argument (`str`, defaults to `"source"`): what error messages call it.
        allow_unexpected (`bool`, defaults to `False`): leave out weights that the model has no place for.
        options: passed to `from_pretrained`.

    Raises:
        ValueError: if there is no model, or weights are missing, unexpected or of another shape; they are named.
    """
    try:
        with quiet_loading():
            model, report = model_class.from_pretrained(source, output_loading_info=True, **options)
    except OSError as error:
        raise nothing_there(argument, source, error) from error
    check_names(
        argument,
        str(source),
        missing=report["missing_keys"],
        unexpected=() if allow_unexpected else report["unexpected_keys"],
        mismatched=[key[0] for key in report.get("mismatched_keys") or ()],
    )
    return model


def nothing_there(argument: str, source: str | Path, error: OSError) -> ValueError:
    """The refusal of a source from which nothing could be loaded, for the reason that the library gives."""
    return ValueError(
        f"`{argument}` must be the folder of a saved model or the id of a repository on the Hub, got "
        f"{str(source)!r}: {str(error).strip().splitlines()[0]}"
    )


def load_gguf(folder: Path, gguf_file: str, dtype: torch.dtype) -> Any:
    """
    A stock model from a GGUF file, its weights decoded to `dtype`.

    Raises:
        ValueError: if there is no such file.
    """
    if not (folder / gguf_file).is_file():
        raise ValueError(f"`gguf_file` must be a file in {str(folder)!r}, got {gguf_file!r}.")
    options = {}
    if hasattr(transformers, "GgufConfig"):  # releases without it always decode
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with quiet_loading():
        return AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=dtype, **options)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without the library's own bar for loading weights, which would say nothing here."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def local_folder(source: str, revision: str | None = None) -> Path:
    """
    The folder of a source: itself if it is local, else downloaded from the Hub, only the files that are used.

    Raises:
        ValueError: if there is neither such a folder nor such a repository, or `revision` is given with a folder.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise ValueError(f"`revision` names a version on the Hub, got {revision!r} with the folder {source!r}.")
        return Path(source)
    if source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise ValueError(f"`source` must be a folder or the id of a repository, got {source!r}: no such folder.")
    patterns = [*DOWNLOADED, *TOKENIZER_FILES, *TEMPLATE_FILES]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`source` must be a folder or the id of a repository on the Hub, got {source!r}. There is no such "
            f"folder, and the Hub gave: {str(error).strip().splitlines()[0]}"
        ) from error


def name_some(names: Iterable[str], limit: int = 5) -> str:
    """The first few of some names, quoted, and how many more there are."""
    ordered = sorted(names)
    shown = ", ".join(f"`{name}`" for name in ordered[:limit])
    return shown if len(ordered) <= limit else f"{shown} and {len(ordered) - limit} more"
