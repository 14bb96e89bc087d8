"""Verbs that carry models between stock architectures and RiGPT, compare them, and say what a RiGPT is."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..extras import require
from .common import DTYPES, check_comparable, check_device, load, report, rigpt_config, text_ids, to_dtype


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
    require("demo")
    from ..demo import DemoOptions, run_demo

    run_demo(DemoOptions(output, model, text, megabytes, steps, seed, prompt, points, force))


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
    from ..conversion import convert_checkpoint

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
    report(certificate, output)


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
    from ..conversion import export_checkpoint

    certificate = export_checkpoint(
        source, output, target=to, frame=frame, dtype=to_dtype(dtype), force=force, seed=seed
    )
    report(certificate, output)


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
    from ..conversion import certify

    check_comparable(a, b)
    input_ids = None if text is None else text_ids(a, text)
    first, second = load(a, to_dtype(dtype)), load(b, to_dtype(dtype))
    certificate = certify(first, second, input_ids, seed=seed)
    Console().print(str(certificate), highlight=False)
    if not certificate.passed:
        raise typer.Exit(1)


def info(source: Annotated[str, typer.Argument(help="RiGPT folder or Hub id.")]):
    """
    Show shapes, parameter count and frames of a RiGPT, from its configuration alone.

        rigpt info my-rigpt
    """
    import torch

    from .. import RiGPTForCausalLM
    from ..frames import layer_of, table_of

    config = rigpt_config(source)
    known = table_of(config)
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
    for name, frame in known.kinds.items():
        copies = frame.copies * (config.num_hidden_layers if frame.per_layer else 1)
        total += copies * frame.group.dimension
        table.add_row(name, str(frame.group), str(copies), f"{copies * frame.group.dimension:,}")
    table.add_row("all", "", "", f"{total:,}")
    console.print(table)
    table = Table("parameter", "shape", "axes", title="Parameters and how their axes turn (frame:role)")
    for name, parameter in model.named_parameters():
        if layer_of(name) in (None, 0):
            turning = [
                " ".join(turn.frame if turn.role == "vector" else f"{turn.frame}:{turn.role}" for turn in axis) or "-"
                for axis in known.row(name)
            ]
            table.add_row(
                name.replace(".layers.0.", ".layers.*."), " x ".join(map(str, parameter.shape)), ", ".join(turning)
            )
    console.print(table)
