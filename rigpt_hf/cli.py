"""The command `rigpt`: one verb per thing a person does with a model. `rigpt VERB --help` explains each."""

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .version import __version__


app = typer.Typer(
    help="RiGPT: a GPT with no preferred basis.",
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
DTYPES = ("float64", "float32", "bfloat16", "float16")
# Typer has a copy of Click of its own or uses Click's, depending on its version: the class is the parent of this one.
UsageError: Any = typer.BadParameter.__mro__[1]
# Where Python says `force=True`, a person at the terminal says `--force`.
SPELLINGS = {"force": "--force", "dropout": "--dropout", "target": "--to", "frame": "--frame"}


def print_version(wanted: bool):
    """Print the version and stop, before a verb is asked for."""
    if wanted:
        print(f"rigpt {__version__}")
        raise typer.Exit


@app.callback(epilog="`rigpt --debug VERB ...` shows where an error comes from.")
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
):
    """RiGPT: a GPT with no preferred basis. Convert, check, rotate and export GPT-class models."""


def to_dtype(name: str | None) -> Any:
    """The torch dtype of this name."""
    import torch

    if name is not None and name not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {name!r}.")
    return None if name is None else getattr(torch, name)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the model and the report.")] = Path("runs/demo"),
    model: Annotated[
        str | None,
        typer.Option(help="Stock model to use instead of training one: a Hub id or a folder.", show_default="none"),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text file to train on instead of documentation.", show_default="none")
    ] = None,
    megabytes: Annotated[float, typer.Option(help="How much documentation to gather at most.")] = 20.0,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 800,
    seed: Annotated[int, typer.Option(help="Of the text's order, the training, the rotation, the samples.")] = 0,
    prompt: Annotated[
        str | None, typer.Option(help="What the models continue.", show_default="depends on the model")
    ] = None,
    points: Annotated[int, typer.Option(help="Points on the way from the identity to the rotation.")] = 9,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an earlier demo in OUTPUT.", show_default="no")
    ] = False,
):
    """
    Turn a stock GPT-2 into a RiGPT, prove it equal, rotate it, save it, and write a report.

    Without options a small GPT-2 is trained first, on the documentation of the installed packages: about three
    minutes on two cores. With a network, real weights:

        rigpt demo --model openai-community/gpt2
    """
    from .demo import DemoOptions, run_demo

    run_demo(DemoOptions(output, model, text, megabytes, steps, seed, prompt, points, force))


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Folder with safetensors, or Hub id.")],
    output: Annotated[Path, typer.Argument(help="Folder to make.")],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit on the Hub.", show_default="main")
    ] = None,
    gguf_file: Annotated[
        str | None, typer.Option(help="Name of a GGUF file in the folder SOURCE.", show_default="none")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"Of the result: {', '.join(DTYPES)}.", show_default="as the source")
    ] = None,
    dropout: Annotated[
        str, typer.Option(help="What coordinate-wise dropout becomes: vector (whole vectors), none, or refuse.")
    ] = "vector",
    max_shard_size: Annotated[str | None, typer.Option(help="Largest file.", show_default="5GB")] = None,
    seed: Annotated[int, typer.Option(help="Of the inputs of the certificate.")] = 0,
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cpu",
    force: Annotated[
        bool, typer.Option("--force", help="Replace an earlier model in OUTPUT.", show_default="no")
    ] = False,
):
    """
    Convert a GPT-2, Llama, Mistral or Qwen2 checkpoint into a RiGPT folder, with a certificate that it is the same
    function.

        rigpt convert openai-community/gpt2 my-rigpt
    """
    from .conversion import convert_checkpoint

    check_device(device)
    certificate = convert_checkpoint(
        source,
        output,
        revision=revision,
        gguf_file=gguf_file,
        dtype=to_dtype(dtype),
        dropout=dropout,
        force=force,
        max_shard_size=max_shard_size,
        seed=seed,
        device=device,
    )
    Console().print(str(certificate), highlight=False)
    Console().print(f"Written to {output}")


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="RiGPT folder or Hub id.")],
    output: Annotated[Path, typer.Argument(help="Folder to make.")],
    to: Annotated[str, typer.Option(help="Stock architecture: gpt2, llama or qwen2.")] = "gpt2",
    frame: Annotated[
        str, typer.Option(help="Frame of the stock stream: lexical (undoes rotations), stream (keeps them), or auto.")
    ] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help=f"Of the result: {', '.join(DTYPES)}.", show_default="as the source")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the inputs of the certificate.")] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an earlier model in OUTPUT.", show_default="no")
    ] = False,
):
    """
    Export a RiGPT to an unmodified stock model, with a certificate that it is the same function.

        rigpt export my-rigpt my-gpt2 --to gpt2
    """
    from .conversion import export_checkpoint

    certificate = export_checkpoint(
        source, output, target=to, frame=frame, dtype=to_dtype(dtype), force=force, seed=seed
    )
    Console().print(str(certificate), highlight=False)
    Console().print(f"Written to {output}")


@app.command()
def verify(
    a: Annotated[str, typer.Argument(help="First model: folder or Hub id.")],
    b: Annotated[str, typer.Argument(help="Second model.")],
    text: Annotated[Path | None, typer.Option(help="Compare on this text.", show_default="random tokens")] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"Compute in: {', '.join(DTYPES)}.", show_default="as saved")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random tokens.")] = 0,
):
    """
    Compare two models on the same inputs and print a certificate. Exit code 1 if they are not the same function.

        rigpt verify openai-community/gpt2 my-rigpt
    """
    from .conversion import certify

    check_comparable(a, b)
    input_ids = None if text is None else text_ids(a, text)
    first, second = load(a, to_dtype(dtype)), load(b, to_dtype(dtype))
    certificate = certify(first, second, input_ids, seed=seed)
    Console().print(str(certificate), highlight=False)
    if not certificate.passed:
        raise typer.Exit(1)


@app.command()
def info(source: Annotated[str, typer.Argument(help="RiGPT folder or Hub id.")]):
    """
    Show shapes, parameter count and frames of a RiGPT, from its configuration alone.

        rigpt info my-rigpt
    """
    import torch
    from transformers import AutoConfig

    from . import RiGPTConfig, RiGPTForCausalLM
    from .symmetry import axes, frames

    config = known(source, AutoConfig)
    if not isinstance(config, RiGPTConfig):
        raise ValueError(
            f"`source` must be a RiGPT, got {source!r} of model type {config.model_type!r}. Convert it first: "
            f"rigpt convert {source} OUTPUT"
        )
    with torch.device("meta"):
        model = RiGPTForCausalLM(config)
    console = Console()
    console.print(f"[bold]{source}[/bold]: {model.num_parameters():,} parameters")
    table = Table("option", "value", title="Configuration")
    for name in type(config).__annotations__:
        table.add_row(name, str(getattr(config, name)))
    console.print(table)
    table = Table("frame", "group", "copies", "dimension", title="Frames: what may turn without changing the function")
    total = 0
    for name, frame in frames(config).items():
        copies = frame.copies * (config.num_hidden_layers if frame.per_layer else 1)
        total += copies * frame.group.dimension
        table.add_row(name, str(frame.group), str(copies), f"{copies * frame.group.dimension:,}")
    table.add_row("all", "", "", f"{total:,}")
    console.print(table)
    entries = axes(config)
    table = Table("parameter", "shape", "axes", title="Parameters and how their axes turn (frame:role)")
    for name, parameter in model.named_parameters():
        pattern = name.replace(".layers.0.", ".layers.*.")
        if pattern in entries:
            turning = [
                " ".join(turn.frame if turn.role == "vector" else f"{turn.frame}:{turn.role}" for turn in axis) or "-"
                for axis in entries[pattern]
            ]
            table.add_row(pattern, " x ".join(map(str, parameter.shape)), ", ".join(turning))
    console.print(table)


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
    from transformers import AutoModelForCausalLM

    from .conversion.assemble import quiet_loading

    with quiet_loading():
        return known(source, AutoModelForCausalLM, dtype=dtype or "auto").eval()


def check_comparable(a: str, b: str):
    """A `ValueError` if two models cannot be given the same tokens; looked up before any weights are read."""
    from transformers import AutoConfig

    sizes = [known(source, AutoConfig).vocab_size for source in (a, b)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"`a` and `b` must have one vocabulary, got {sizes[0]} tokens in {a!r} and {sizes[1]} in {b!r}. Compare "
            "a model with what was made from it."
        )


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
    tokenizer = known(source, AutoTokenizer)
    length = min(512, known(source, AutoConfig).max_position_embeddings)
    input_ids = tokenizer(text[: 16 * length], return_tensors="pt", add_special_tokens=False)["input_ids"][:, :length]
    if input_ids.shape[1] < 2:
        raise ValueError(
            f"`text` must give at least two tokens by the tokenizer of {source!r}, got {input_ids.shape[1]}. Give a "
            "longer one, add the tokenizer's files to the folder, or leave it out to compare on random tokens."
        )
    return input_ids


def as_options(message: str) -> str:
    """A message in one line, with Python's `force=True` and `target='llama'` spelled as options."""

    def spell(match: re.Match) -> str:
        name, value = match.groups()
        return f"`{SPELLINGS[name]} {value}`" if value else f"`{SPELLINGS[name]}`"

    return re.sub(rf"`({'|'.join(SPELLINGS)})=(?:True|'(\w+)')`", spell, " ".join(message.split()))


def main():
    """Entry point: bad input ends in one line that says what to do, with exit code 2."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        # Outside of its standalone mode Typer raises what it would otherwise draw in a box, and returns exit codes.
        sys.exit(app(arguments or ["--help"], prog_name="rigpt", standalone_mode=False))
    except UsageError as error:
        verb = error.ctx.command_path if error.ctx else "rigpt"
        fail(f"{error.format_message().rstrip('.')}. See {verb} --help")
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, (ValueError, OSError)):
            fail(as_options(str(error)))
        fail(f"{type(error).__name__}: {as_options(str(error))}. To see where it comes from, say rigpt --debug ...")


def fail(message: str):
    """One line to standard error, and exit code 2."""
    console = Console(stderr=True, soft_wrap=True)
    # Not as markup: a message may hold anything in square brackets.
    console.print(Text.assemble(("rigpt: ", "red"), message))
    sys.exit(2)


if __name__ == "__main__":
    main()
