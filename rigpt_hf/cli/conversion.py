"""Verbs that carry models between stock architectures and RiGPT, compare them, and say what a RiGPT is."""

from dataclasses import replace
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from ..checkpoints.source import is_model_or_file
from ..command_line import READS
from ..demo.options import DemoOptions
from ..extras import require
from ..terminal import Console, say_next
from .arguments import (
    DROPOUTS,
    DTYPES,
    FORMATS,
    QK_GAINS,
    ROUNDED,
    STOCK_FRAMES,
    TARGETS,
    AnySource,
    Dtype,
    Force,
    ForceFile,
    GgufFile,
    JsonFile,
    Output,
    Revision,
    Seed,
    ShardSize,
    Source,
    argument,
    flag,
    one_of,
    option,
    suits_format,
)
from .common import as_given, check_device, check_json, is_rigpt_too, report, save_json, say, to_dtype, writes


def demo(options: DemoOptions):
    """
    Turn a stock GPT-2 into a RiGPT, prove it equal, rotate it, save it, and write a report.

    Without options a small GPT-2 is trained first, on the documentation of the installed packages: about two
    minutes on two cores. With a network, real weights:

        rigpt demo --model openai-community/gpt2

    A stock GPT-2, a RiGPT, and a RiGPT that carries the symmetry of its data learn what "jump" means beside other
    words from commands in which it stands alone:

        rigpt demo symmetry
    """
    require("demo")
    if options.about == "symmetry":
        from ..demo.symmetry import run_symmetry_demo

        run_symmetry_demo(options)
        say_next(("rigpt", "lab", "symmetry"))
        return
    from ..demo.run import run_demo

    run_demo(options)
    model = options.folder / "model"
    say_next(("rigpt", "generate", model, "TEXT"), ("rigpt", "rotate", model, "OUTPUT"))


def convert(
    source: Annotated[
        str,
        argument("Folder with safetensors, Hub id, or file of GGUF, nanoGPT or llama2.c."),
        READS,
        is_model_or_file,
    ],
    output: Output,
    revision: Revision = None,
    gguf_file: GgufFile = None,
    dtype: Dtype = None,
    dropout: Annotated[
        str,
        option("What coordinate-wise dropout becomes: vector (whole vectors), none, or refuse."),
        one_of(*DROPOUTS),
    ] = "vector",
    qk_gain: Annotated[
        str,
        option(
            "What gains of queries and keys become, as Qwen3 has them: vector (as they are), or metric (no basis)."
        ),
        one_of(*QK_GAINS),
    ] = "vector",
    max_shard_size: ShardSize = None,
    seed: Seed = 0,
    device: Annotated[str, option("Where to compute.")] = "cpu",
    force: Force = False,
):
    """
    Convert a stock checkpoint (GPT-2, Llama and their kin) into a RiGPT folder, with a certificate that it is the same
    function.

        rigpt convert openai-community/gpt2 my-rigpt
        rigpt convert nanoGPT/out/ckpt.pt my-rigpt
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
        qk_gain=qk_gain,
        force=force,
        max_shard_size=max_shard_size,
        seed=seed,
        device=device,
    )
    report(
        certificate,
        output,
        ("rigpt", "finetune", output, "TEXT", "my-tuned"),
        ("rigpt", "quantize", output, "my-codes"),
        ("rigpt", "card", output),
    )


def export(
    source: Source,
    output: Output,
    to: Annotated[
        str | None,
        option(
            f"Stock architecture: {', '.join(TARGETS)}, or auto: the one in which it is smallest; gguf, a file for "
            "llama.cpp; onnx, a graph; or compressed-tensors, which vLLM reads, from a folder of codes.",
            "the one that it was converted from",
        ),
        one_of("auto", *TARGETS, *FORMATS),
        suits_format,
    ] = None,
    frame: Annotated[
        str,
        option("Frame of the stock stream: lexical (undoes rotations), stream (keeps them), or auto."),
        one_of(*STOCK_FRAMES),
    ] = "auto",
    dtype: Annotated[
        str | None,
        option(f"Of the result: {', '.join(DTYPES)}; of gguf also {', '.join(ROUNDED)}.", "as the source"),
        one_of(*DTYPES, *ROUNDED),
    ] = None,
    seed: Seed = 0,
    force: Force = False,
):
    """
    Export a RiGPT to an unmodified stock model, with a certificate that it is the same function.

        rigpt export my-rigpt my-gpt2
        rigpt export my-rigpt my-llama --to llama
        rigpt export my-rigpt my-gguf --to gguf --dtype q8_0
        rigpt export my-rigpt my-onnx --to onnx
        rigpt export my-codes my-llama --to compressed-tensors
    """
    if to == "gguf":
        from ..conversion.gguf import export_gguf

        made = export_gguf(source, output, frame=frame, dtype=dtype, force=force, seed=seed)
        report(made, output, *(("llama-cli", "-m", file) for file in output.glob("*.gguf")))
        return
    if to == "onnx":
        from ..conversion.onnx import export_onnx

        made = export_onnx(source, output, dtype=to_dtype(dtype), force=force, seed=seed)
        runs = f"from transformers.exporters import ExportedModel; ExportedModel.from_pretrained({dumps(str(output))})"
        report(made, output, ("python", "-c", f"import rigpt_hf; {runs}"))
        return
    if to == "compressed-tensors":
        from ..conversion.compressed_tensors import export_compressed_tensors

        made = export_compressed_tensors(source, output, frame=frame, dtype=to_dtype(dtype), force=force, seed=seed)
        report(made, output, ("vllm", "serve", output, "--dtype", "float16"))
        return
    from ..conversion import export_checkpoint

    certificate = export_checkpoint(
        source, output, target=to, frame=frame, dtype=to_dtype(dtype), force=force, seed=seed
    )
    report(certificate, output, ("rigpt", "verify", source, output))


def verify(
    a: Annotated[str, argument("First model: folder, Hub id or file."), READS, is_model_or_file],
    b: Annotated[str, argument("Second model."), READS, is_model_or_file],
    text: Annotated[
        Path | None,
        option("Compare on this text.", "documentation of Python if A or B has a tokenizer, else random tokens"),
        READS,
    ] = None,
    random_tokens: Annotated[bool, flag("random-tokens", "Compare on random tokens.")] = False,
    dtype: Annotated[str | None, option(f"Compute in: {', '.join(DTYPES)}.", "as saved"), one_of(*DTYPES)] = None,
    seed: Annotated[int, option("Of random tokens.")] = 0,
    revision_a: Annotated[str | None, option("Branch, tag or commit of A on the Hub.", "main")] = None,
    revision_b: Annotated[str | None, option("The same of B.", "main")] = None,
    json_file: JsonFile = None,
    force: ForceFile = False,
):
    """
    Compare two models on the same inputs and print a certificate. Exit code 1 if they are not the same function.

    Each runs as the class that it has, of any architecture that Transformers loads: what another tool rotated, folded
    or quantized can be held against what it was made from. Vocabularies may differ by padding.

        rigpt verify openai-community/gpt2 my-rigpt
        rigpt verify before after --dtype float64
    """
    from ..checkpoints.opened import find_model
    from ..checkpoints.vocabulary import common_tokens
    from ..conversion import certify
    from ..text.tokenizer import documentation_ids, text_ids

    if text is not None and random_tokens:
        raise ValueError(f"`text` and `random_tokens` exclude each other, got {str(text)!r}. Leave one of them out.")
    seen = check_json(json_file, force)
    models = find_model(a, argument="a", revision=revision_a), find_model(b, argument="b", revision=revision_b)
    common_tokens(*models)
    if text is not None:
        input_ids, read = text_ids(models[0], text), f"of {text}"
    else:
        input_ids, read = None if random_tokens else documentation_ids(*models), "of the documentation of Python"
    say([note for model in models for note in model.notes])
    first, second = (model.load(to_dtype(dtype)) for model in models)
    certificate = certify(first, second, input_ids, seed=seed)
    sizes = {name: model.config.vocab_size for name, model in zip((a, b), models, strict=True)}
    longer = max(sizes, key=lambda name: sizes[name])
    if (least := min(sizes.values())) < sizes[longer]:
        say([f"Of the {sizes[longer]:,} tokens of {longer} the first {least:,} are compared; the other has no more."])
    source, target = f"{a} ({certificate.source})", f"{b} ({certificate.target})"
    inputs = certificate.inputs | ({} if input_ids is None else {"text": read})
    said = replace(certificate, source=source, target=target, inputs=inputs)
    Console().print(str(said), highlight=False, markup=False, soft_wrap=True)
    save_json(said.to_dict(), json_file, seen)
    if not certificate.passed:
        error, most = certificate.relative_logit_error, certificate.tolerance
        # Last, as it is what the exit code means.
        say([f"The two are not one function: logits differ by {error:.2g} of the largest, rounding by {most:.0e}."])
    of_the_two = a, b, *as_given(revision_a=revision_a, revision_b=revision_b)
    if certificate.passed and writes(models[1]):
        say_next(("rigpt", "generate", b, "TEXT", *as_given(revision=revision_b)))
    elif not certificate.passed and all(map(is_rigpt_too, models)):
        say_next(("rigpt", "diff", *of_the_two))
    else:  # other inputs
        say_next(("rigpt", "verify", *of_the_two, "--random-tokens", "--seed", seed + 1, *as_given(dtype=dtype)))
    if not certificate.passed:
        raise typer.Exit(1)


def families(json_file: JsonFile = None, force: ForceFile = False):
    """
    Show which stock models convert exactly, what is refused of them, what a conversion costs, and which stock classes
    it can be exported to.

        rigpt families
        rigpt families --json families.json
    """
    from ..conversion.activations import RIGPT_ACTIVATIONS
    from ..conversion.families import REASONS
    from ..conversion.gguf_file import ARCHITECTURES
    from ..conversion.overview import overview

    def cost(by_tie: dict[bool, float]) -> str:
        said = {tied: f"{more:+.2%}" if more >= 5e-5 else "nothing" for tied, more in by_tie.items()}
        return said[True] if said[True] == said[False] else f"{said[True]}, untied {said[False]}"

    seen, rows = check_json(json_file, force), overview()
    console = Console()
    exports = Column("exports to", min_width=max(map(len, TARGETS)))
    table = Table("family", Column("class", no_wrap=True), "parameters", Column("products", max_width=9), exports)
    table.title = "What converts exactly"
    refused: dict[str, list[str]] = {}
    for row in rows:
        targets = ", ".join(row.targets) or "-"
        table.add_row(row.name, row.class_name, cost(row.parameters), cost(row.products), targets)
        for name in row.refused:
            refused.setdefault(name, []).append(row.name)
    console.print(table)
    longest = max(len(word) for name in refused for word in name.split())
    table = Table(Column("option", width=longest), "families", title="What is refused of them")
    for name, families_with_it in refused.items():
        table.add_row(escape(name), ", ".join(families_with_it))
    console.print(table)
    activations = ", ".join(sorted(set(RIGPT_ACTIVATIONS.values())))
    console.print(
        "Costs are those of a model of the class's default size: parameters that are added, and products with maps "
        "per token, which take time. All families refuse quantized weights and activations that are none of "
        f"{activations}. Files of nanoGPT are read as gpt2, those of llama2.c as llama. Exports to "
        f"{', '.join(name for name in TARGETS if name in ARCHITECTURES)} become files of llama.cpp, too (`gguf`), "
        "if no layer slides.",
        markup=False,
    )
    table = Table("family", "why not", title="What does not convert, of what is asked for")
    for name, reason in REASONS.items():
        table.add_row(name, reason)
    console.print(table)
    facts = {"families": [row.to_dict() for row in rows], "refused": REASONS, "activations": activations.split(", ")}
    save_json(facts, json_file, seen)
    say_next(("rigpt", "info", "SOURCE"), ("rigpt", "convert", "SOURCE", "OUTPUT"))


def info(
    source: AnySource,
    revision: Revision = None,
    gguf_file: GgufFile = None,
    json_file: JsonFile = None,
    force: ForceFile = False,
):
    """
    Show shapes, parameter count and frames of a model as a RiGPT, from its configuration alone.

        rigpt info my-rigpt
        rigpt info HuggingFaceTB/SmolLM2-135M
    """
    import torch

    from .. import RiGPTConfig, RiGPTForCausalLM
    from ..checkpoints.dequantized import codes_in_words
    from ..checkpoints.named import check_rigpt
    from ..checkpoints.opened import open_model
    from ..checkpoints.read import load_config, reading
    from ..frames import table_of
    from ..symmetry.tokens import TokenSymmetry

    seen = check_json(json_file, force)
    is_folder = gguf_file is None and not Path(source).is_file()
    config, called, notes = load_config(source, revision=revision) if is_folder else None, "", tuple[str, ...]()
    verb = "rotate" if isinstance(config, RiGPTConfig) else "convert"
    if isinstance(config, RiGPTConfig):  # of which no weight is fetched
        if (words := codes_in_words(config)) is None:
            check_rigpt(config, source)
        else:
            del config.quantization_config  # frames and shapes are those of the weights behind the codes
            called, notes = f", stored as {words}", ()
    else:
        found = open_model(source, revision=revision, gguf_file=gguf_file)
        config, called, notes = found.config, f", as the RiGPT that this {found.stock} is", found.notes
    known = table_of(config)
    with torch.device("meta"):
        model = RiGPTForCausalLM(config)
    console = Console()
    console.print(f"[bold]{escape(source)}[/bold]: {model.num_parameters():,} parameters{called}")
    say(notes)
    table = Table("option", "value", title="Configuration")
    for name in type(config).__annotations__:
        value = getattr(config, name)
        if name == "token_symmetry" and value is not None:
            with reading("source", source, "have a record of a token symmetry that can be read"):
                symmetry = TokenSymmetry.from_dict(value["symmetry"])
            value = f"order {symmetry.order_in_words}, {len(symmetry.points)} tokens move (as recorded)"
        table.add_row(name, escape(str(value)))
    console.print(table)
    frames, axes = frames_of(known), axes_of(known, model)
    total = sum(frame["dimension"] for frame in frames)
    table = Table("frame", "group", "copies", "dimension", title="Frames: what may turn without changing the function")
    for frame in frames:
        layers = frame["layers"]
        where = f" of layers {', '.join(map(str, layers))}" if 0 < len(layers) < config.num_hidden_layers else ""
        table.add_row(frame["frame"] + where, frame["group"], str(frame["copies"]), f"{frame['dimension']:,}")
    table.add_row("all", "", "", f"{total:,}")
    console.print(table)
    table = Table(Column("parameter", no_wrap=True), "shape", Column("axes", overflow="fold"))
    table.title = "Parameters and how their axes turn (frame:role)"
    for name, one in axes.items():
        table.add_row(name, " x ".join(map(str, one["shape"])), ", ".join(one["axes"]))
    console.print(table)
    facts = {"source": source, "parameters": model.num_parameters(), "config": config.to_diff_dict()}
    save_json(facts | {"frames": frames, "dimension": total, "axes": axes}, json_file, seen)
    say_next(("rigpt", verb, source, "OUTPUT", *as_given(revision=revision, gguf_file=gguf_file)))


def frames_of(known: Any) -> list[dict[str, Any]]:
    """The frames of a table, those alike in one entry: of what kind and layers, their group, copies and dimension."""
    alike: dict[tuple[str, str], list[Any]] = {}
    for key, frame in known.frames.items():
        alike.setdefault((key.kind, str(frame.group)), []).append(key)
    return [
        {
            "frame": kind,
            "layers": sorted(key.layer for key in keys) if known.kinds[kind].per_layer else [],
            "group": group,
            "copies": sum(known.frames[key].copies for key in keys),
            "dimension": sum(known.frames[key].copies * known.frames[key].group.dimension for key in keys),
        }
        for (kind, group), keys in alike.items()
    ]


def axes_of(known: Any, model: Any) -> dict[str, dict[str, list]]:
    """By the name of a parameter, for all layers alike, its shape and how each axis turns, as `frame:role`."""
    from ..table import pattern_of

    axes: dict[str, dict[str, list]] = {}
    for name, parameter in model.named_parameters():
        if (pattern := pattern_of(name)) not in axes:
            turning = [
                " ".join(turn.frame if turn.role == "vector" else f"{turn.frame}:{turn.role}" for turn in axis) or "-"
                for axis in known.row(name)
            ]
            axes[pattern] = {"shape": list(parameter.shape), "axes": turning}
    return axes
