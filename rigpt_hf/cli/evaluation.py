"""Verbs that measure models and say what came out."""

from pathlib import Path
from typing import Annotated

import typer

from ..checkpoints.source import is_model
from ..command_line import READS, WRITES, check_apart, typed_again
from ..extras import needs
from ..terminal import Console, say_next
from .arguments import DTYPES, Device, argument, one_of, option
from .common import check_device


def evaluate(
    model: Annotated[
        str, argument("Folder or Hub id of a causal language model, RiGPT or any other."), READS, is_model
    ],
    against: Annotated[
        str | None, option("Folder or Hub id of the baseline to compare with.", "none"), READS, is_model
    ] = None,
    suite: Annotated[str, option("What is measured: core, full, or a YAML file of your own.")] = "core",
    output: Annotated[
        Path | None,
        option("Folder for results.json, table.md, report.html.", "one named for the models, in runs/evaluation"),
        WRITES,
    ] = None,
    text: Annotated[
        str | None,
        option(
            "Text to measure on: docs, a file or folder, a .bin of token ids, a data set on the Hub. A .txt file "
            "is one document unless <|endoftext|> stands between several; each row of JSONL or parquet is one.",
            "what the suite says",
        ),
        READS,
    ] = None,
    documents: Annotated[int | None, option("How many documents.", "what the suite says")] = None,
    fraction: Annotated[
        float, option("Share of the suite's documents and examples, for a model too slow for all.")
    ] = 1.0,
    standard_tasks: Annotated[
        str, option("Tasks of lm-eval, with commas, such as lambada_openai,hellaswag,piqa.")
    ] = "",
    include_path: Annotated[Path | None, option("Folder of lm-eval task files of your own.", "none"), READS] = None,
    limit: Annotated[int | None, option("Examples of each lm-eval task at most.", "all")] = None,
    fewshot: Annotated[
        int | None, option("Solved examples before each question of lm-eval.", "as the task says", min=0)
    ] = None,
    max_length: Annotated[int | None, option("Tokens of an lm-eval request at most.", "what both models take")] = None,
    batch_size: Annotated[int, option("Rows that go through a model at once.", min=1)] = 8,
    device: Device = None,
    dtype: Annotated[
        str | None, option(f"Compute in: {', '.join(DTYPES)}.", "as the weights are stored"), one_of(*DTYPES)
    ] = None,
    names: Annotated[str, option("What to call the two, with a comma.")] = "model,baseline",
    force: Annotated[bool, option("Replace results of other models in the output folder.")] = False,
):
    """
    Measure a model, beside a baseline if there is one, and say what the difference is worth.

    Writes numbers (results.json), a table for a README (table.md) and a page with pictures (report.html). What was
    measured before is taken from the folder, so a run that was stopped goes on where it was. A measurement that fails
    is one line, and the others are kept; the exit code is 1 then. What says nothing about a model is not applicable,
    and no failure.

        rigpt evaluate my-rigpt --against gpt2 --output runs/mine

        rigpt evaluate my-rigpt --suite full --standard-tasks lambada_openai,blimp --batch-size 16

        rigpt evaluate my-rigpt --against gpt2 --standard-tasks hellaswag,arc_challenge --fewshot 5

        accelerate launch --multi_gpu -m rigpt_hf.cli evaluate my-rigpt --against gpt2
    """
    with needs("eval"):
        from accelerate import PartialState

        from ..checkpoints.read import check_model, quiet_loading
        from ..evaluation.harness.results import failures
        from ..evaluation.harness.runner import EvaluateOptions
        from ..evaluation.harness.runner import evaluate as run
        from ..evaluation.harness.standard_tasks import StandardOptions
        from ..evaluation.harness.tables import on_terminal

    check_device(device)
    kinds = [  # before texts are gathered
        check_model(source, argument=name)[0].model_type
        for name, source in (("model", model), ("against", against))
        if source is not None
    ]
    called = tuple(name.strip() for name in names.split(","))
    if len(called) != 2 or not all(called):
        raise ValueError(f"`names` must be two names with a comma, got {names!r}. Write them as new,old.")
    console = Console(markup=False)
    options = EvaluateOptions(
        model=model,
        against=against,
        suite=suite,
        output=output,
        text=text,
        documents=documents,
        fraction=fraction,
        standard_tasks=tuple(name.strip() for name in standard_tasks.split(",") if name.strip()),
        standard=StandardOptions(
            include_path=str(include_path) if include_path else None,
            limit=limit,
            fewshot=fewshot,
            max_length=max_length,
        ),
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        names=called,
        force=force,
    )
    output = options.folder
    check_apart({"MODEL": model, "--against": against}, {"--output": output})
    with quiet_loading():
        results = run(options, console)
    # Every process has the results; one says them.
    if PartialState().is_main_process:
        console.print(on_terminal(results))
        where = f"Report in {output / 'report.html'}, all intervals in {output / 'table.md'}"
        console.print(where, markup=False, soft_wrap=True)
        if failures(results):  # what was measured stays
            say_next(typed_again("evaluate"))
        elif kinds[0] == "rigpt" and dtype is None:  # a card is of weights as they are stored
            say_next(("rigpt", "card", model, "--results", output / "results.json"))
        else:
            say_next(("rigpt", "generate", model, "TEXT"))
    if failures(results):
        raise typer.Exit(1)
