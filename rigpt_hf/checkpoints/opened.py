"""
Any checkpoint as a RiGPT, whatever class it has on disk: nothing is written, and no tensor is made before it is asked
for.

Folders and Hub ids of RiGPTs are opened here. What turns stock models into RiGPTs lies above this room and registers
itself with [`register`].
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import Any, Protocol

import torch

from ..configuration_rigpt import RiGPTConfig
from ..modeling_rigpt import RiGPTForCausalLM
from ..status import doing
from .dequantized import dequantized, in_words, method_of
from .named import check_rigpt, load
from .read import load_config, load_gguf, load_tokenizer, local_folder, quiet_loading
from .source import split_gguf
from .weights import StoredWeights, Weights, check_finite, check_layers, check_shapes
from .write import Entry


@dataclass(frozen=True)
class Stored:
    """
    A model where it lies, of whatever class; no weight of a folder is read before it is asked for.

    Args:
        name (`str`): as the person typed it.
        argument (`str`): what error messages call it.
        config (`PreTrainedConfig`): its own.
        folder (`Path`): where its tokenizer is.
        load (`Callable`): `dtype -> model`: the model of its own class, in evaluation mode; `None`: as it is stored.
        weights (`Callable`): `device="cpu" -> Weights`: its tensors under its own names, as numbers.
        is_whole (`bool`, defaults to `False`): it is not a folder of the library, and is in memory as a whole.
        notes (`tuple[str, ...]`): what must be said of its numbers.
        tokenizer_options (`Mapping`): what its tokenizer is loaded with.
    """

    name: str
    argument: str
    config: Any
    folder: Path
    load: Callable[[torch.dtype | None], Any]
    weights: Callable[..., Weights]
    is_whole: bool = False
    notes: tuple[str, ...] = ()
    tokenizer_options: Mapping[str, Any] = field(default_factory=dict)

    def tokenizer(self) -> Any:
        """Its tokenizer; a `ValueError` if it has none that loads."""
        return load_tokenizer(self.folder, argument=self.argument, **self.tokenizer_options)


class Conversion(Protocol):
    """Functions that the room above gives: the reader of single files, and the way from a stock model to a RiGPT."""

    def read_file(self, path: Path, argument: str) -> Any: ...

    def as_rigpt(self, stored: Stored) -> "OpenedModel": ...


_conversion: Callable[[], Conversion] | None = None


def register(conversion: Callable[[], Conversion]) -> None:
    """Say where stock models become RiGPTs; called when the first of them is opened."""
    global _conversion
    _conversion = conversion


def _converting() -> Conversion:
    assert _conversion is not None, "`import rigpt_hf` registers it"
    return _conversion()


class MadeWeights(Weights):
    """
    Tensors of a RiGPT, each made when it is asked for.

    Args:
        entries (`Iterable[Entry]`): the recipes.
        dtypes (`Mapping[str, torch.dtype]`): what [`read`] makes each tensor in.
        origin (`str`): where messages say that the tensors are.
    """

    def __init__(self, entries: Iterable[Entry], dtypes: Mapping[str, torch.dtype], origin: str):
        self.entries, self.origin = {entry.name: entry for entry in entries}, origin
        self.shapes = {name: entry.shape for name, entry in self.entries.items()}
        self.dtypes = {name: dtypes[name] for name in self.entries}

    def make(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A tensor in a dtype of the caller's choice: what is computed is rounded to it once."""
        tensor = self.entries[name].make(dtype)
        check_finite(name, tensor, self.origin)
        return tensor

    def _get(self, name: str) -> torch.Tensor:
        return self.entries[name].make(self.dtypes[name])


@dataclass(frozen=True)
class OpenedModel:
    """
    A model as a RiGPT, whatever it is on disk.

    Args:
        name (`str`): as the person typed it.
        config (`RiGPTConfig`): of the model as a RiGPT.
        weights (`MadeWeights`): under RiGPT's parameter names, tied ones once; each tensor is made when it is asked
            for, in a dtype in which nothing is lost that is in the source.
        stock (`str`, *optional*): the class that it has on disk, such as "LlamaForCausalLM"; `None` for a RiGPT.
        notes (`tuple[str, ...]`): what must be said, such as that it was dequantised.
        stored_dtype (`torch.dtype`): the finest dtype in which the source has its numbers.
        stored (`Stored`, *optional*): the source itself.
    """

    name: str
    config: RiGPTConfig
    weights: MadeWeights
    stock: str | None
    notes: tuple[str, ...]
    stored_dtype: torch.dtype
    stored: Stored | None = None

    @property
    def place(self) -> Stored:
        """The source, of a model that has one."""
        assert self.stored is not None, self.name
        return self.stored

    @cached_property
    def dtype(self) -> torch.dtype:
        """A dtype that holds all of its weights as they are made."""
        return reduce(torch.promote_types, self.weights.dtypes.values())

    def load(self, dtype: torch.dtype | None = None) -> RiGPTForCausalLM:
        """
        The model in memory, in evaluation mode.

        Args:
            dtype (`torch.dtype`, *optional*): of all of its weights; one that holds them as they are made if not
                given.
        """
        dtype = dtype or self.dtype
        with doing(f"Loading {self.name}"), quiet_loading():
            tensors = {name: self.weights.make(name, dtype) for name in self.weights.shapes}
            model = RiGPTForCausalLM.from_pretrained(None, config=self.config, state_dict=tensors, dtype=dtype)
        return model.eval()


def find_model(
    source: str | os.PathLike, *, argument: str = "source", revision: str | None = None, gguf_file: str | None = None
) -> Stored:
    """
    A model of any class that Transformers loads, from a folder, the Hub, or a file of GGUF, nanoGPT or llama2.c.

    Args:
        source (`str` or `Path`): a folder, the id of a repository on the Hub, or a file.
        argument (`str`, defaults to `"source"`): what error messages call it.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        gguf_file (`str`, *optional*): name of a GGUF file in the folder `source`.

    Raises:
        ValueError: if there is no such model, or it cannot be read.
    """
    name = os.fspath(source)
    place, of_folder = split_gguf(name, gguf_file)
    if Path(place).is_file():
        if revision or gguf_file:
            option, value = ("revision", revision) if revision else ("gguf_file", gguf_file)
            raise ValueError(
                f"`{option}` belongs to a folder or an id, got {value!r} with the file {name!r}. Leave it out."
            )
        stock = _converting().read_file(Path(place), argument)
        return Stored(
            name,
            argument,
            stock.config,
            Path(place).parent,
            lambda dtype: stock.load(dtype or stock.dtype).eval(),
            lambda device="cpu": _on(stock.tensors, device),
            is_whole=True,
        )
    if of_folder is not None:
        folder = local_folder(place, revision, argument, config=False)
        called = "gguf_file" if gguf_file else argument
        decoded = load_gguf(folder, of_folder, torch.float32, called).eval()
        return Stored(
            name,
            argument,
            decoded.config,
            folder,
            lambda dtype: decoded.to(dtype or torch.float32),
            lambda device="cpu": _on(decoded.state_dict(), device),
            is_whole=True,
            notes=(f"{name} is GGUF, decoded to float32.",),
            tokenizer_options={"gguf_file": of_folder},
        )
    folder = local_folder(place, revision, argument)
    config = load_config(folder, argument=argument)
    return Stored(
        name,
        argument,
        config,
        folder,
        lambda dtype: load(name, dtype, argument=argument, revision=revision),
        lambda device="cpu": StoredWeights(folder, device, argument),
    )


def open_model(
    source: str | os.PathLike, *, argument: str = "source", revision: str | None = None, gguf_file: str | None = None
) -> OpenedModel:
    """
    Any checkpoint that RiGPT can express, as a RiGPT; arguments as for [`find_model`].

    Stock models of every family that converts are folded in float64 tensor by tensor, when tensors are asked for;
    quantised ones are decoded first, and GGUF files as a whole. Code that lies beside a model never runs.

    Raises:
        ValueError: if there is no such model, or it has no exact form as a RiGPT; the message says why.
    """
    return opened(find_model(source, argument=argument, revision=revision, gguf_file=gguf_file))


def opened(stored: Stored) -> OpenedModel:
    """The same of a model that was found."""
    if not stored.is_whole and (method := method_of(stored.config)) is not None:
        stored = _dequantized(stored, method)
    if isinstance(stored.config, RiGPTConfig):
        return _rigpt(stored)
    return _converting().as_rigpt(stored)


def _dequantized(stored: Stored, method: str) -> Stored:
    """The same model, whose codes have become numbers; it is in memory as a whole."""
    decoded = dequantized(stored.folder, stored.config, argument=stored.argument)
    return replace(
        stored,
        config=decoded.config,
        load=decoded.load,
        weights=lambda device="cpu": _on(decoded.weights, device),
        is_whole=True,
        notes=(*stored.notes, f"{stored.name} is quantized by {method}{in_words(stored.config)}, and was decoded."),
    )


def _on(tensors: Mapping[str, torch.Tensor], device: str) -> Weights:
    return Weights({name: tensor.to(device) for name, tensor in tensors.items()})


def _rigpt(stored: Stored) -> OpenedModel:
    """A RiGPT as it is stored."""
    config, argument, name = check_rigpt(stored.config, stored.name), stored.argument, stored.name
    weights = stored.weights()
    check_layers(config, weights.shapes, argument, name)
    with torch.device("meta"):
        model = RiGPTForCausalLM(config)
    shapes = check_shapes(model, weights.shapes, argument, name)
    for copy, original in (model._tied_weights_keys if config.tie_word_embeddings else {}).items():
        weights.check_copy(copy, original)
    return _as_it_is(name, config, weights, shapes, stored.notes, stored)


def in_memory(model: RiGPTForCausalLM, name: str) -> OpenedModel:
    """A RiGPT in memory as if it had been opened; its weights are not copied."""
    weights = Weights(dict(model.named_parameters()))
    return _as_it_is(name, model.config, weights, weights.shapes, (), None)


def _as_it_is(
    name: str,
    config: RiGPTConfig,
    weights: Weights,
    shapes: Mapping[str, tuple[int, ...]],
    notes: tuple[str, ...],
    stored: Stored | None,
) -> OpenedModel:
    entries = [Entry(one, shape, _reading(weights, one), weights.dtypes[one]) for one, shape in shapes.items()]
    made = MadeWeights(entries, weights.dtypes, name)
    return OpenedModel(name, config, made, None, notes, finest_dtype(made.dtypes), stored)


def finest_dtype(dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """The dtype in which no tensor of floating point loses digits."""
    return reduce(torch.promote_types, (dtype for dtype in dtypes.values() if dtype.is_floating_point))


def _reading(weights: Weights, name: str) -> Callable[[torch.dtype], torch.Tensor]:
    return lambda dtype: weights.read(name).to(dtype)
