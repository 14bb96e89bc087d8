"""The command `rigpt`: one verb per thing a person does with a model. `rigpt VERB --help` explains each."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .version import __version__


app = typer.Typer(
    help="RiGPT: a GPT with no preferred basis.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
DTYPES = ("float64", "float32", "bfloat16", "float16")


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
        str | None, typer.Option(help="Stock model to use instead of training one: a Hub id or a folder.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Text file to train on instead of documentation.")] = None,
    megabytes: Annotated[float, typer.Option(help="How much documentation to gather at most.")] = 20.0,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 350,
    seed: Annotated[int, typer.Option(help="Of the text's order, the training, the rotation, the samples.")] = 0,
    prompt: Annotated[str | None, typer.Option(help="What the models continue.")] = None,
    points: Annotated[int, typer.Option(help="Points on the way from the identity to the rotation.")] = 9,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier demo in OUTPUT.")] = False,
):
    """
    Turn a stock GPT-2 into a RiGPT, prove it equal, rotate it, save it, and write a report.

    Without options a small GPT-2 is trained first, on the documentation of the installed packages: about four minutes
    on two cores. With a network, real weights:

        rigpt demo --model openai-community/gpt2
    """
    from .demo import DemoOptions, run_demo

    run_demo(DemoOptions(output, model, text, megabytes, steps, seed, prompt, points, force))


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Folder with safetensors, or Hub id.")],
    output: Annotated[Path, typer.Argument(help="Folder to make.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    gguf_file: Annotated[str | None, typer.Option(help="Name of a GGUF file in the folder SOURCE.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"Of the result: {', '.join(DTYPES)}.", show_default="as the source")
    ] = None,
    dropout: Annotated[
        str, typer.Option(help="What coordinate-wise dropout becomes: vector (whole vectors), none, or refuse.")
    ] = "vector",
    max_shard_size: Annotated[str | None, typer.Option(help="Largest file.", show_default="5GB")] = None,
    seed: Annotated[int, typer.Option(help="Of the inputs of the certificate.")] = 0,
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier model in OUTPUT.")] = False,
):
    """
    Convert a GPT-2, Llama, Mistral or Qwen2 checkpoint into a RiGPT folder, with a certificate that it is the same
    function.

        rigpt convert openai-community/gpt2 my-rigpt
    """
    from .conversion import convert_checkpoint

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
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier model in OUTPUT.")] = False,
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

    config = AutoConfig.from_pretrained(source)
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
    table = Table("parameter", "shape", "axes", title="Parameters and how their axes turn (* covector)")
    for name, parameter in model.named_parameters():
        pattern = name.replace(".layers.0.", ".layers.*.")
        if pattern in entries:
            turning = [
                "-" if axis is None else axis.frame + ("*" if axis.covector else "") for axis in entries[pattern]
            ]
            table.add_row(pattern, " x ".join(map(str, parameter.shape)), ", ".join(turning))
    console.print(table)


def load(source: str, dtype: Any = None) -> Any:
    """A causal language model from a folder or the Hub, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    import rigpt_hf  # noqa: F401  so that the Auto classes know RiGPT

    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype or "auto").eval()


def text_ids(source: str, path: Path) -> Any:
    """Token ids `[1, seq]` of the beginning of a text file, by the tokenizer of `source`."""
    from transformers import AutoConfig, AutoTokenizer

    import rigpt_hf  # noqa: F401

    if not path.is_file():
        raise ValueError(f"`text` must be a file, got {str(path)!r}.")
    tokenizer = AutoTokenizer.from_pretrained(source)
    length = min(512, AutoConfig.from_pretrained(source).max_position_embeddings)
    text = path.read_text(encoding="utf-8")[: 16 * length]
    return tokenizer(text, return_tensors="pt")["input_ids"][:, :length]


def main():
    """Entry point: bad input ends in one line that says what to do, with exit code 2."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(arguments, prog_name="rigpt")
    except (ValueError, OSError) as error:
        if debug:
            raise
        message = " ".join(str(error).split())
        Console(stderr=True, soft_wrap=True).print(f"[red]rigpt:[/red] {message}", highlight=False, markup=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
