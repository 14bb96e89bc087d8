"""
The one place that loads models, configurations and tokenizers, from a folder or the Hub.

Nobody else calls an Auto class of Transformers. Code that lies beside a model is never run, and what a library says of
a damaged file becomes one line: which argument, which file, which rule, what to do.
"""

import os
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from ..command_line import OF_FILE
from ..extras import advice
from ..status import doing
from ..token_symmetry_rigpt import SYMMETRY_FRAME
from .fields import REPAIR, UNREAD, about_field, check_fields, field_with
from .source import (
    AGAIN,
    OTHER_VOCABULARIES,
    TEMPLATE_FILES,
    TOKENIZER_FILES,
    check_name,
    find_source,
    in_short,
    read_json,
    shown,
)
from .weights import (
    DTYPES,
    MASKS,
    check_finite,
    check_layers,
    check_names,
    check_shapes,
    name_some,
    stored_tensors,
    wrapper_of,
)


logger = logging.get_logger(__name__)

DOWNLOADED = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    SAFE_WEIGHTS_INDEX_NAME,
    SYMMETRY_FRAME,
)
FOREIGN = (
    "it asks for code from its folder (`auto_map`), which is not run here. If you trust that code, load the model in "
    "Python with `trust_remote_code=True` and pass it to a function of `rigpt_hf` that takes models, such as "
    "`rigpt_hf.conversion.convert_model`"
)
PICKLED = (
    "its weights are pickles of more than tensors, which run code when they are read. Save them as safetensors where "
    "you trust them"
)
GENERATION = "generation.configuration_utils"  # the library's module that checks how to sample
POSSIBLE = f"have a {OF_FILE}"


def load_config(source: str | os.PathLike, *, argument: str = "source", revision: str | None = None) -> Any:
    """
    A configuration from a folder or the Hub.

    Args:
        source (`str` or `Path`): folder or id; revision (`str`, *optional*): branch, tag or commit of the latter.
        argument (`str`, defaults to `"source"`): what error messages call it.

    Raises:
        ValueError: if there is none, it cannot be read, its values are impossible, or it asks for code of its own.
    """
    content = read_json(find_source(source, argument, revision) / "config.json", argument)
    # What the library says of odd values, it says again when a model is made.
    with reading(argument, source, POSSIBLE), silent():
        kind = content.get("model_type")
        known = CONFIG_MAPPING[kind] if kind in CONFIG_MAPPING else None  # noqa: SIM401  `get` loads none
        check_fields(content, known)
        config = AutoConfig.from_pretrained(os.fspath(source), trust_remote_code=False, **UNREAD, **at(revision))
    return config


def load_tokenizer(
    source: str | os.PathLike, *, argument: str = "source", revision: str | None = None, **options: Any
) -> Any:
    """
    A tokenizer from a folder or the Hub; arguments as for [`load_config`], and options of `from_pretrained`.

    Raises:
        ValueError: if there is none, its files are damaged, or it needs code of its own or a library that is absent.
    """
    if not os.path.isdir(source):
        check_name(os.fspath(source), argument)
    with reading(argument, source, "come with a tokenizer that loads"):
        folder = Path(source)
        for file in (folder / name for name in TOKENIZER_FILES if name.endswith(".json")):
            if file.is_file():
                read_json(file, argument)
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                os.fspath(source), trust_remote_code=False, **at(revision), **options
            )
            # The library makes up an empty one where there is none.
            if not tokenizer("A word.", add_special_tokens=False)["input_ids"]:
                raise ValueError(f"`{argument}` must come with its tokenizer, got {str(source)!r}, which has none.")
        except ImportError as error:
            raise ValueError(in_short(error)) from error
        except (AttributeError, TypeError, LookupError, ArithmeticError, StrictDataclassError):
            if (folder / "config.json").is_file():
                load_config(source, argument=argument)  # says more where that is at fault
            raise
        return tokenizer


def check_ids(tokenizer: Any, config: Any, source: str) -> None:
    """A `ValueError` if a model, which messages call `model`, has no row for an id that its tokenizer gives."""
    if (rows := 1 + max(tokenizer.get_vocab().values(), default=0)) > config.vocab_size:
        raise ValueError(
            f"`model` must have an embedding for each id of its tokenizer, {rows} in all, got {config.vocab_size} in "
            f"{source!r}. Call `resize_token_embeddings` and save it."
        )


def load_model(
    source: str | os.PathLike,
    model_class: Any = AutoModelForCausalLM,
    *,
    argument: str = "source",
    revision: str | None = None,
    allow_unexpected: bool = False,
    dequantize: bool = False,
    **options: Any,
) -> Any:
    """
    A model from a folder or the Hub, with the weights that its configuration asks for.

    The library alone would go on with random weights for those that are missing, and without some that are there.

    Args:
        source (`str` or `Path`), argument, revision: as for [`load_config`].
        model_class (`type`, *optional*): what loads it.
        allow_unexpected (`bool`, defaults to `False`): leave out weights that a stock model has no place for.
        dequantize (`bool`, defaults to `False`): ask the method by which weights are quantized, if they are, for plain
            numbers in their place, where it can give them while it loads.
        options: passed to `from_pretrained`.

    Raises:
        ValueError: if there is no model, it asks for code of its own, or weights are missing, unexpected, of another
            shape or not finite; they are named.
    """
    config, prefix = check_model(source, model_class, argument=argument, revision=revision)
    if dequantize and isinstance(getattr(config, "quantization_config", None), dict):
        config.quantization_config["dequantize"] = True  # which methods that do not know it leave alone
    if prefix:
        logger.warning(f"The names of the tensors in {source} begin with {prefix!r}, which is left out.")
        options["key_mapping"] = {f"^{re.escape(prefix)}": ""}
    with doing(f"Loading {source}"), reading(argument, source, "be a model that loads"), quiet_loading():
        model, report = model_class.from_pretrained(
            os.fspath(source),
            config=config,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are reported, and refused below
            **at(revision),
            **options,
        )
    check_names(
        argument,
        str(source),
        missing=report["missing_keys"],
        unexpected=() if allow_unexpected and model.config.model_type != "rigpt" else report["unexpected_keys"],
        mismatched={key[0]: (tuple(key[1]), tuple(key[2])) for key in report.get("mismatched_keys") or ()},
    )
    tied = (model._tied_weights_keys or {}) if getattr(model.config, "tie_word_embeddings", False) else {}
    named = dict(model.named_parameters(remove_duplicate=False))
    for copy, original in tied.items():
        if copy in named and original in named and named[copy] is not named[original]:
            raise ValueError(
                f"`{argument}` must have one table where its configuration ties two, got {str(source)!r}, whose "
                f"`{copy}` differs from `{original}`. Set `tie_word_embeddings` to false in its `config.json`."
            )
    if report["unexpected_keys"]:
        logger.warning(f"{source} has weights that are not used: {name_some(report['unexpected_keys'])}.")
    if prefix:  # what is saved later has the names of the model
        model._weight_conversions = []
    for name, tensor in model.state_dict().items():
        # Codes that are a kind of tensor of their own can do little but multiply.
        if type(tensor) is torch.Tensor and tensor.dtype in DTYPES.values() and not tensor.is_meta:
            check_finite(name, tensor, str(source))
    return model


def load_skeleton(source: str | os.PathLike) -> Any:
    """The causal language model that a folder's configuration describes, on the meta device, without numbers."""
    with quiet_loading(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(load_config(source), trust_remote_code=False)


def check_model(
    source: str | os.PathLike,
    model_class: Any = AutoModelForCausalLM,
    *,
    argument: str = "source",
    revision: str | None = None,
) -> tuple[Any, str]:
    """
    Look at all that a model is loaded from but the numbers; arguments as for [`load_model`].

    Returns:
        `tuple`: the configuration, and what stands in front of the names of all tensors, because a wrapped model was
        saved.

    Raises:
        ValueError: if it will not load.
    """
    config = load_config(source, argument=argument, revision=revision)
    folder = local_folder(source, revision, argument)
    prefix, safe = "", (folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME)
    if any(path.is_file() for path in safe) or not list(folder.glob("pytorch_model*.bin*")):
        stored = stored_tensors(folder, argument)
        prefix = wrapper_of(stored)
        shapes = {name.removeprefix(prefix): tensor.shape for name, tensor in stored.items()}
        check_sizes(config, shapes, argument, source, model_class)
        plain = {tensor.dtype for tensor in stored.values()} <= {"F64", "F32", "F16", "BF16"}
        if plain and getattr(config, "quantization_config", None) is not None:
            raise ValueError(
                f"`{argument}` must hold what its `quantization_config` says, got {str(source)!r}, whose weights are "
                "plain numbers. Take that out of its `config.json`, or quantize the model and save it."
            )
        # Codes may be whole numbers; complex numbers are none.
        codes = "C" if getattr(config, "quantization_config", None) is not None else "CIUB"
        odd = {name: tensor.dtype for name, tensor in stored.items() if name.endswith((".weight", ".bias"))}
        odd = {name: dtype for name, dtype in odd.items() if dtype[0] in codes and dtype != "BF16"}
        if odd := {name: dtype for name, dtype in odd.items() if dtype[0] in "CI" or not name.endswith(MASKS)}:
            raise ValueError(
                f"`{argument}` must hold weights of floating point, got {str(source)!r} with {name_some(odd)} stored "
                f"as {sorted(odd.values())[0]}. Save the whole model once more with `save_pretrained`."
            )
    return config, prefix


def check_sizes(
    config: Any,
    shapes: Mapping[str, tuple[int, ...]],
    argument: str,
    source: str | os.PathLike,
    model_class: Any = AutoModelForCausalLM,
) -> None:
    """
    Raise if a configuration asks for other weights than there are, before anything of that size is made.

    Numbers are counted, and shapes compared where the names are those of the model: files may use others.

    Raises:
        ValueError: names the field or the tensors.
    """
    check_layers(config, shapes, argument, source)
    with reading(argument, source, POSSIBLE), torch.device("meta"):
        is_auto = hasattr(model_class, "from_config")
        mould = deepcopy(config)  # which making a model would change
        try:
            model = model_class.from_config(mould, trust_remote_code=False) if is_auto else model_class(mould)
        except KeyError as error:
            if not (field := field_with(config, error.args[0])):
                raise
            given = shown(repr(error.args[0]))
            raise ValueError(f"`{field}` must be a value that is known here, got {given}. {REPAIR}.") from error
    if getattr(config, "quantization_config", None) is not None:  # codes have shapes of their own
        return
    check_shapes(model, shapes, argument, source, only_shapes=True)
    asked, there = model.num_parameters(), sum(prod(shape) for shape in shapes.values())
    if asked > 2 * there:
        raise ValueError(
            f"`{argument}` must have a configuration that belongs to its weights, got {str(source)!r}: it asks for "
            f"{asked:.3g} numbers, and the files hold {there:.3g}. Restore its `config.json`."
        )


@contextmanager
def reading(argument: str, source: str | os.PathLike, rule: str) -> Iterator[None]:
    """
    Turns whatever a library says while it reads into one line of ours.

    Args:
        argument (`str`), source (`str` or `Path`): what is read is called, and where it is.
        rule (`str`): what it must be or have, with the verb.

    Raises:
        ValueError: instead of every other error but a missing package that an extra brings.
    """
    try:
        yield
    except Exception as error:
        text = str(error)
        # One of ours that says which argument is meant needs no more words.
        if (isinstance(error, ImportError) and advice(error)) or text.startswith(f"`{argument}` "):
            raise
        raise ValueError(f"`{argument}` must {rule}, got {str(source)!r}: {in_words(error).rstrip('.')}.") from error


def in_words(error: BaseException) -> str:
    """The reason of an error of a library, in the words of this one where it has any, and what to do."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for link in chain:
        text = str(link)
        if isinstance(link, ValueError) and text.startswith("`"):
            return text
        if words := about_field(text):
            return words
    text = str(error)
    if "trust_remote_code" in text:
        return FOREIGN
    if any(isinstance(link, pickle.UnpicklingError) for link in chain) or "weights_only" in text:
        return PICKLED
    if any(isinstance(link, SafetensorError) for link in chain):
        return f"a file of tensors in it is cut or damaged. {AGAIN}"
    if isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text:
        return "it does not fit into memory. Take a smaller dtype or model"
    if isinstance(error, StrictDataclassError):
        return in_short(chain[1] if len(chain) > 1 else error)
    return f"{in_short(error)}. {AGAIN}".replace("....", "...")


def at(revision: str | None) -> dict[str, Any]:
    """The keyword argument for a revision, if there is one."""
    return {} if revision is None else {"revision": revision}


def load_gguf(folder: Path, gguf_file: str, dtype: torch.dtype, argument: str = "gguf_file") -> Any:
    """
    A stock model from a GGUF file, its weights decoded to `dtype`; error messages call the file `argument`.

    Raises:
        ValueError: if there is no such file, or it cannot be decoded.
    """
    if Path(gguf_file).name != gguf_file or not (folder / gguf_file).is_file():
        raise ValueError(f"`{argument}` must be a file in {str(folder)!r}, got {gguf_file!r}.")
    options = {}
    if hasattr(transformers, "GgufConfig"):  # releases without it always decode
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with doing(f"Decoding {gguf_file}"), reading(argument, folder / gguf_file, "be a file in GGUF"), quiet_loading():
        return AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=gguf_file, dtype=dtype, trust_remote_code=False, **options
        )


@contextmanager
def silent() -> Iterator[None]:
    """Without the library's warnings."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without the library's own bar, its table of names and what it says of sampling, which would say nothing here."""
    has_bar = logging.is_progress_bar_enabled()
    reports = [logging.get_logger(f"transformers.{name}") for name in ("modeling_utils", GENERATION)]

    def is_error(record: Any) -> bool:
        return record.levelno >= logging.ERROR

    logging.disable_progress_bar()
    for report in reports:
        report.addFilter(is_error)  # a level would be read by the library as a wish for other checks
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            yield
    finally:
        for report in reports:
            report.removeFilter(is_error)
        if has_bar:
            logging.enable_progress_bar()


def local_folder(
    source: str | os.PathLike, revision: str | None = None, argument: str = "source", *, config: bool = True
) -> Path:
    """
    The folder of a source: itself if it is local, else downloaded from the Hub, only the files that are used.

    Raises:
        ValueError: as [`find_source`], whose arguments these are.
    """
    folder = find_source(source, argument, revision, config=config)
    if os.path.isdir(source):
        return folder
    wanted = [*DOWNLOADED, *TOKENIZER_FILES, *TEMPLATE_FILES, *OTHER_VOCABULARIES]
    with reading(argument, source, "be a repository that can be downloaded"):
        place = snapshot_download(os.fspath(source), revision=revision, allow_patterns=wanted, ignore_patterns="*/*")
    return Path(place)
