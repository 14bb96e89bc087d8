"""
What do few bits cost, and what does a frame save? `python -m evaluation.experiments.quantization --help`.

A model is rounded by every recipe of a table and judged on text that it was not calibrated on, WikiText and
documentation, window by window beside the model as it is. Baselines are the stock model's own weights, with its gains
in its norms: with the same moments, the same search for scales and the same tuning. Calibration is half the one text,
half the other; packages whose documentation judges are others than those it is calibrated on, and what they have
copied from each other is left out.

    python -m evaluation.experiments.quantization SmolLM2-135M.gguf wiki.valid.tokens wiki.test.tokens
    python -m evaluation.experiments.quantization smollm2 valid.txt test.txt --windows 8 --rows "Hadamard GPTQ per row"

What no kernel computes with here is marked as simulated.
"""

import hashlib
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from rich.table import Table

from rigpt_hf import RiGPTConfig, RiGPTForCausalLM
from rigpt_hf.checkpoints.folder import check_file
from rigpt_hf.checkpoints.read import load_gguf, load_model, load_tokenizer
from rigpt_hf.command_line import READS, WRITES
from rigpt_hf.conversion import convert_model
from rigpt_hf.dataclass_options import program
from rigpt_hf.evaluation.harness.statistics import paired_difference
from rigpt_hf.quantization import Quantized, Recipe, all_moments, quantize_model, tuned, window_losses
from rigpt_hf.quantization.calibration import random_tokens
from rigpt_hf.quantization.frames import turned_moments
from rigpt_hf.quantization.maps import parts_of
from rigpt_hf.terminal import Console
from rigpt_hf.text.corpus import gather_documentation, without_copies

from .common import VERSIONS, check_known, check_least, write_json
from .learned_rotation import learned_frame


# Bytes of documentation that are gathered for a token that is wanted, and at least.
BYTES_PER_TOKEN, LEAST_BYTES = 12, 1_000_000
# A gain of the stock norm explains the columns of a folded matrix but for rounding.
FOLDED = 1e-4


@dataclass(frozen=True)
class Row:
    """
    One line of the table.

    Args:
        recipe: How the model is rounded.
        stock: Whether it is the stock model, with its gains in its norms.
        tune: Whether it is measured a second time, tuned.
        moments: Of inputs: those that a model has on text, on tokens drawn at random, or none.
        learned: Whether the frame is learned, from the Hadamard one.
    """

    recipe: Recipe
    stock: bool = False
    tune: bool = False
    moments: Literal["text", "random", "none"] = "text"
    learned: bool = False


STOCK = Recipe(frame="own", gains=False, gauges=False)
ROUNDED = replace(STOCK, method="round", clip=False)
PLAIN = Recipe(method="round", frame="own")
HADAMARD = Recipe()
LEARNED = Recipe(frame="own", gains=False)
ROWS: dict[str, Row] = {
    "stock rounded per row": Row(ROUNDED, stock=True, moments="none"),
    "stock GPTQ per row": Row(STOCK, stock=True, tune=True),
    "Hadamard GPTQ per row": Row(HADAMARD, tune=True),
    "learned frame GPTQ per row": Row(LEARNED, learned=True),
    "no text: weights alone per row": Row(PLAIN, moments="none"),
    "no text: Hadamard GPTQ per row": Row(HADAMARD, moments="random"),
    "stock rounded per 32": Row(replace(ROUNDED, group=32), stock=True, moments="none"),
    "stock rounded per 32 with searched scales": Row(
        replace(ROUNDED, group=32, clip=True), stock=True, moments="none"
    ),
    "stock GPTQ per 32": Row(replace(STOCK, group=32), stock=True, tune=True),
    "Hadamard GPTQ per 32": Row(replace(HADAMARD, group=32), tune=True),
    "Hadamard GPTQ per 32 without gauges": Row(replace(HADAMARD, group=32, gauges=False)),
    "learned frame GPTQ per 32": Row(replace(LEARNED, group=32), learned=True),
    "own frame rounded per 32": Row(replace(PLAIN, group=32)),
    "no text: weights alone per 32": Row(replace(PLAIN, group=32), moments="none"),
    "no text: stock GPTQ per 32": Row(replace(STOCK, group=32), stock=True, moments="random"),
    "no text: own frame rounded per 32": Row(replace(PLAIN, group=32), moments="random"),
    "no text: Hadamard GPTQ per 32": Row(replace(HADAMARD, group=32), moments="random"),
    "stock GPTQ per 32 W4A8": Row(replace(STOCK, group=32, activations=8), stock=True),
    "Hadamard GPTQ per 32 W4A8": Row(replace(HADAMARD, group=32, activations=8)),
    "stock GPTQ per 32 W4A4": Row(replace(STOCK, group=32, activations=4), stock=True),
    "Hadamard GPTQ per 32 W4A4": Row(replace(HADAMARD, group=32, activations=4)),
    "stock GPTQ per 32 KV4": Row(replace(STOCK, group=32, cache=4), stock=True),
    "Hadamard GPTQ per 32 KV4": Row(replace(HADAMARD, group=32, cache=4)),
    "stock GPTQ per 32 3 bits": Row(replace(STOCK, group=32, bits=3), stock=True, tune=True),
    "Hadamard GPTQ per 32 3 bits": Row(replace(HADAMARD, group=32, bits=3), tune=True),
}
# Tokens drawn at random, where there is no text.
RANDOM_TOKENS = 8192


@dataclass(frozen=True)
class Options:
    """The model, the texts, and how much is measured."""

    model: Annotated[Path, READS, {"exists": True}]
    """Folder of a stock model or a RiGPT with its tokenizer, or a file in GGUF; baselines need a stock model."""
    calibration: Annotated[Path, READS, {"exists": True}]
    """A file of text to calibrate on, beside documentation, such as the validation part of WikiText-2."""
    text: Annotated[Path, READS, {"exists": True}]
    """A file of text to judge on, beside documentation, such as the test part of WikiText-2."""
    tokenizer: Annotated[Path | None, READS, {"exists": True}] = None
    """Folder of the tokenizer, where it is not with the model."""
    windows: int = 64
    """Windows of each text that judge."""
    context: int = 512
    """Tokens in a window."""
    calibration_windows: int = 64
    """Windows to calibrate on, half of each text."""
    tune: int = 64
    """Steps of tuning."""
    rotate: int = 300
    """Steps in which a frame is learned."""
    rows: tuple[str, ...] = ()
    """Rows of the table in the order in which they are made, by their names or by how several begin; all if none is
    given."""
    seed: int = 0
    """Seed of the signs of Hadamard matrices and the order of windows."""
    output: Annotated[Path | None, WRITES] = None
    """File for the results, JSON, written anew after every row."""
    force: bool = False
    """Replace a file that this program wrote and nobody changed."""

    def __post_init__(self):
        check_least(self, windows=1, context=2, calibration_windows=2, tune=0, rotate=0)
        for row in self.rows:
            if not any(name.startswith(row) for name in ROWS):
                check_known("rows", [row], ROWS)


def folders_of_packages() -> list[Path]:
    """The installed packages, without the folders of what was recorded at their installation."""
    sites = [
        Path(entry) for entry in dict.fromkeys(sys.path) if Path(entry).name in ("site-packages", "dist-packages")
    ]
    return sorted(folder for site in sites for folder in site.iterdir() if folder.is_dir() and "." not in folder.name)


def documentation(size: int) -> tuple[str, str]:
    """Documentation to calibrate on and to judge on, at most `size` bytes each, of different packages."""
    halves: tuple[list[Path], list[Path]] = [], []
    for folder in folders_of_packages():
        halves[hashlib.blake2b(folder.name.encode()).digest()[0] % 2].append(folder)
    calibrating, judging = (gather_documentation(size, roots=half) for half in halves)
    return "\n\n".join(calibrating), "\n\n".join(without_copies(judging, calibrating))


def windows_of(tokenizer: Any, text: str, count: int, context: int, name: str) -> torch.Tensor:
    """
    The first tokens of a text as windows `[count, context]`.

    Raises:
        ValueError: if there are too few.
    """
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    if len(ids) < count * context:
        raise ValueError(
            f"`{name}` must fit into the {len(ids):,} tokens of the text, got {count} windows of {context}. "
            "Take fewer."
        )
    return ids[: count * context].reshape(count, context)


def texts(options: Options, tokenizer: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Windows `[N, S]` to calibrate on, and windows that judge by the name of their text."""
    half = options.calibration_windows // 2
    calibrating, judging = documentation(max(LEAST_BYTES, BYTES_PER_TOKEN * options.windows * options.context))
    whole = options.calibration.read_text(encoding="utf-8")
    parts = [
        windows_of(tokenizer, text, count, options.context, "calibration_windows")
        for text, count in ((whole, options.calibration_windows - half), (calibrating, half))
    ]
    judged = {options.text.name: options.text.read_text(encoding="utf-8"), "documentation": judging}
    count, context = options.windows, options.context
    return torch.cat(parts), {
        name: windows_of(tokenizer, text, count, context, "windows") for name, text in judged.items()
    }


def models(options: Options) -> tuple[RiGPTForCausalLM, dict[str, torch.Tensor] | None]:
    """The RiGPT, and where it was made from a stock model the gains of that one by the modules that read them."""
    if options.model.is_file():
        stock = load_gguf(options.model.parent, options.model.name, torch.float32, "model")
    else:
        stock = load_model(options.model, dtype=torch.float32)
    if isinstance(stock.config, RiGPTConfig):
        return stock.eval(), None
    model = convert_model(stock).eval()
    return model, stock_gains(stock, model)


@torch.no_grad()
def stock_gains(stock: Any, model: RiGPTForCausalLM) -> dict[str, torch.Tensor] | None:
    """The gains of a stock model's norms by the modules behind them; `None` if matrices differ by more than these."""
    modules, gains = dict(stock.named_modules()), {}
    for name, part in parts_of(model).items():
        if part == "ends":
            continue
        if name not in modules or modules[name].weight.shape != model.get_submodule(name).weight.shape:
            return None
        plain, folded = (module.weight.double() for module in (modules[name], model.get_submodule(name)))
        gain = (plain * folded).sum(0) / plain.square().sum(0).clamp_min(1e-30)
        if float((plain * gain - folded).norm()) > FOLDED * float(folded.norm()):
            return None
        gains[name] = gain.float()
    return gains


def variants(
    row: Row,
    model: RiGPTForCausalLM,
    gains: dict[str, torch.Tensor] | None,
    calibration: Mapping[str, torch.Tensor],
    moments: Mapping[str, dict[str, torch.Tensor]],
    options: Options,
) -> Iterator[tuple[str, Quantized]]:
    """The model rounded by the recipe of a row, and the same tuned, each with what to add to the name of the row."""
    recipe = replace(row.recipe, seed=options.seed)
    seen, notes = moments.get(row.moments), []
    if row.learned:
        assert seen is not None
        g, left = learned_frame(model, seen, recipe.group, options.rotate, seed=options.seed, progress=True)
        undo, model = g.inverse(), g(model)
        seen = {name: turned_moments(undo, f"{name}.weight", of_inputs) for name, of_inputs in seen.items()}
        notes = [f"The sum of squared peaks is {left:.4f} of that in the Hadamard frame."]
    quantized = quantize_model(model, recipe, moments=seen, gains=gains if row.stock else None)
    quantized.notes += notes
    yield "", quantized
    if row.tune and options.tune:
        windows = calibration[row.moments]
        quantized.codes |= tuned(
            quantized, windows, options.tune, recipe.learning_rate, seed=options.seed, progress=True
        )
        yield " tuned", quantized


def measured(quantized: Quantized, judges: dict[str, torch.Tensor], before: dict[str, list[float]]) -> dict[str, Any]:
    """The increase of the loss on each text, with its paired interval, and what the model takes."""
    rounded = quantized.dense_model()
    result: dict[str, Any] = {
        "bits_per_weight": quantized.bits_per_weight,
        "simulated": quantized.recipe.simulates,
        "notes": quantized.notes,
    }
    for name, windows in judges.items():
        after = window_losses(rounded, windows)
        difference = paired_difference(after, before[name], [1.0] * len(after))
        result[name] = difference.to_dict() | {"losses": after}
    return result


def table_of_results(results: dict[str, Any], before: dict[str, list[float]]) -> Table:
    """The results as a table."""
    own = (f"{name} ({statistics.mean(values):.4f})" for name, values in before.items())
    table = Table("recipe", "bits", *own, title="Nats lost, with paired intervals of 95 %")
    for name, result in results.items():
        cells = (result[text] for text in before)
        marked = f"{name} (simulated)" if result["simulated"] else name
        numbers = (f"{cell['value']:+.4f} [{cell['low']:+.4f}, {cell['high']:+.4f}]" for cell in cells)
        table.add_row(marked, f"{result['bits_per_weight']:.2f}", *numbers)
    return table


def chosen_rows(options: Options) -> dict[str, Row]:
    """The rows that are asked for: one of this name, or all whose names begin so."""
    wanted = options.rows or ("",)
    return {
        name: row
        for begin in wanted
        for name, row in ROWS.items()
        if (name == begin if begin in ROWS else name.startswith(begin))
    }


def run(options: Options, console: Console | None = None) -> dict[str, Any]:
    """
    Round a model by every recipe and say what each costs, on text that it was not calibrated on.

        python -m evaluation.experiments.quantization SmolLM2-135M.gguf wiki.valid.tokens wiki.test.tokens

    The whole table takes hours on a CPU; `--windows 8` and `--rows` make it short.
    """
    console = console or Console()
    seen = check_file(options.output, "output", options.force)
    folder = options.model.parent if options.model.is_file() else options.model
    tokenizer = load_tokenizer(options.tokenizer or folder)
    known, judges = texts(options, tokenizer)
    model, gains = models(options)
    rows = chosen_rows(options)
    if gains is None and any(row.stock for row in rows.values()):
        console.print("Rows of the stock model are left out: its matrices are not those of the RiGPT but for gains.")
        rows = {name: row for name, row in rows.items() if not row.stock}

    def say(text: str) -> None:
        console.print(f"{time.strftime('%H:%M:%S')} {text}")

    say("Losses of the model as it is")
    before = {name: window_losses(model, windows) for name, windows in judges.items()}
    drawn = random_tokens(model.config.vocab_size, tokens=RANDOM_TOKENS, context=options.context, seed=options.seed)
    calibration = {"text": known, "random": drawn}
    moments = {
        name: all_moments(model, windows, progress=True)
        for name, windows in calibration.items()
        if any(row.moments == name for row in rows.values())
    }
    results: dict[str, Any] = {}
    facts = {
        "model": options.model.name,
        "windows": options.windows,
        "context": options.context,
        "calibration": {"windows": len(known), "texts": [options.calibration.name, "documentation"]},
        "tune": options.tune,
        "seed": options.seed,
        "versions": VERSIONS,
        "before": before,
    }
    for name, row in rows.items():
        for suffix, quantized in variants(row, model, gains, calibration, moments, options):
            result = measured(quantized, judges, before)
            results[name + suffix] = result
            say(
                f"{name}{suffix}: "
                + ", ".join(f"{result[text]['value']:+.4f} on {text}" for text in judges)
                + f" at {result['bits_per_weight']:.2f} bits"
            )
            write_json(options.output, facts | {"rows": results}, seen=seen, named=True)
            seen = check_file(options.output, "output", True)
    console.print(table_of_results(results, before))
    return facts | {"rows": results}


main = program(Options, run, name="python -m evaluation.experiments.quantization")

if __name__ == "__main__":
    sys.exit(main())
