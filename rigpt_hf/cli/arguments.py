"""Declarations of arguments and options; plain values only, so that `--help` waits for nothing."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..checkpoints.source import is_free, is_model, is_model_or_file
from ..command_line import ANSWERS, READS, WRITES, did_you_mean


# What options take, in words; modules that need torch have the same lists.
DTYPES = ("float64", "float32", "bfloat16", "float16")
TARGETS = (
    "gpt2",
    "llama",
    "mistral",
    "qwen2",
    "ministral",
    "ministral3",
    "arcee",
    "apertus",
    "ernie4_5",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "gpt_neo",
    "granite",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "nanochat",
    "olmo",
    "olmo2",
    "olmo3",
    "olmoe",
    "gpt_oss",
    "opt",
    "phi3",
    "qwen3",
    "smollm3",
    "stablelm",
    "starcoder2",
    "gpt_neox",
    "gptj",
    "phi",
    "persimmon",
    "falcon",
    "cohere",
    "cohere2",
    "mpt",
    "bloom",
)
STOCK_FRAMES = ("auto", "lexical", "stream")
DROPOUTS = ("vector", "none", "refuse")
QK_GAINS = ("vector", "metric")
# Files of other programs, which `--to` names beside stock classes, and what one of them has beside these dtypes.
FORMATS = ("gguf", "onnx", "compressed-tensors")
ROUNDED = ("q8_0", "q4_0")
METHODS = ("linear", "spherical")
SHIFTS = ("key_shift", "value_shift", "residual_shift", "router_shift", "router_bias_shift", "position_shift")
FRAMES = (
    "stream",
    "entry",
    "local",
    "lexical",
    "output",
    "gains",
    "head_qk",
    "query_norm",
    "key_norm",
    "head_vo",
    "heads",
    "neurons",
    "expert_neurons",
    "shared_neurons",
    "experts",
    *SHIFTS,
    "head",
    "shifts",
    "all",
)


def argument(text: str, default: str | None = None) -> Any:
    """A positional argument with its help; `default` says what happens without it."""
    return typer.Argument(help=text, show_default=default or True)


def option(text: str, default: str | None = None, *, name: str | None = None, **settings: Any) -> Any:
    """An option with its help; `default` says what happens without it, where the value does not."""
    return typer.Option(*([name] if name else []), help=text, show_default=default or True, **settings)


def flag(name: str, text: str, *spellings: str) -> Any:
    """An option without a value and without a `--no-` form; `spellings` are understood too."""
    return typer.Option(f"--{name}", *spellings, help=text, show_default="no")


def one_of(*choices: Any, several: bool = False) -> Callable[[Any, str, Mapping[str, Any]], None]:
    """A mark for [`guarded`]: a `ValueError` if a value, or one of `several` with commas, is none of the choices."""

    def check(value: Any, name: str, values: Mapping[str, Any]) -> None:
        given = [] if value is None else [value]
        for one in filter(None, map(str.strip, value.split(","))) if given and several else given:
            if one not in choices:
                near = did_you_mean(str(one), list(map(str, choices))) or " Take one of these."
                listed = ", ".join(map(str, choices))
                raise ValueError(f"`{name}` must be one of {listed}, got {str(one)[:80]!r}.{near}")

    return check


def numbers(text: str, argument: str) -> list[float]:
    """The numbers in a list with commas."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(
            f"`{argument}` must be numbers separated by commas, got {text[:80]!r}. Write them as 0.7,0.3."
        ) from error


def are_numbers(value: Any, name: str, values: Mapping[str, Any]) -> None:
    """A mark for [`guarded`]: a `ValueError` if a text is no list of numbers with commas."""
    if value is not None:
        numbers(value, name)


def suits_format(value: Any, name: str, values: Mapping[str, Any]) -> None:
    """A mark for [`guarded`]: a `ValueError` if what is made has no such dtype, or no frame to choose."""
    dtype, frame = values.get("dtype"), values.get("frame")
    if dtype in ROUNDED and value != "gguf":
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}, which `--to gguf` alone takes.")
    if value == "gguf" and dtype == "float64":
        allowed = ", ".join((*(one for one in DTYPES if one != dtype), *ROUNDED))
        raise ValueError(f"`dtype` must be one of {allowed} for `--to gguf`, got {dtype!r}. Take one of these.")
    if value == "onnx" and frame != "auto":
        raise ValueError(f"`frame` must be auto for `--to onnx`, which keeps the model as it is, got {frame!r}.")


# Arguments that many verbs take.
Source = Annotated[str, argument("RiGPT folder or Hub id."), READS, is_model]
# Every checkpoint that RiGPT can express, opened as one.
ANY = "a RiGPT or a stock model that converts: folder, Hub id, or file of GGUF, nanoGPT or llama2.c"
AnySource = Annotated[str, argument(f"{ANY[0].upper()}{ANY[1:]}."), READS, is_model_or_file]
GgufFile = Annotated[str | None, option("Name of a GGUF file in the folder SOURCE.", "none")]
AsSource = Annotated[bool, flag("as-source", "Write the stock class that the source has, not a RiGPT.")]
Output = Annotated[Path, argument("Folder to make."), WRITES, is_free]
Revision = Annotated[str | None, option("Branch, tag or commit on the Hub.", "main")]
Dtype = Annotated[str | None, option(f"Of the result: {', '.join(DTYPES)}.", "as the source"), one_of(*DTYPES)]
ShardSize = Annotated[str | None, option("Largest file.", "5GB")]
Device = Annotated[str | None, option("Where to compute, such as cpu or cuda:0.", "the best there is")]
Seed = Annotated[int, option("Of the inputs of the certificate.")]
Force = Annotated[
    bool, flag("force", "Replace an earlier model in OUTPUT that this program wrote and nobody changed.")
]
ForceFiles = Annotated[
    bool, flag("force", "Replace files and a model in OUTPUT that this program wrote and nobody changed.")
]
JsonFile = Annotated[
    Path | None,
    option("What is shown, for other programs: a file, or - for standard output.", "none", name="--json"),
    ANSWERS,
]
ForceFile = Annotated[bool, flag("force", "Replace files that this program wrote and nobody changed.")]
