"""
Speed of RiGPT beside stock GPT-2 of the same shape: `python -m rigpt_hf.evaluation.speed --help`.

Both models live in one process and take turns, so that the machine's moods fall on both. A ratio is GPT-2's time over
RiGPT's in the same turn; its median and quartiles over all turns are reported. Only peak memory is measured in a
process of its own per model.
"""

import gc
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.progress import Progress
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from rigpt_hf import RiGPTConfig, RiGPTForCausalLM, __version__
from rigpt_hf.checkpoints.folder import check_file, write_text
from rigpt_hf.command_line import WRITES, execute, guarded, make_app
from rigpt_hf.evaluation.measures.throughput import NEW_TOKENS, generation, prefill
from rigpt_hf.evaluation.timing import device_name, own_peak_memory, ratios, spread, take_turns
from rigpt_hf.processes import python
from rigpt_hf.terminal import Console


@dataclass(frozen=True)
class Shape:
    """Size of both models and of what they are given."""

    hidden_size: int
    layers: int
    heads: int
    vocabulary: int
    context: int
    batch: int
    sequence: int


SHAPES = {
    "narrow": Shape(hidden_size=192, layers=6, heads=6, vocabulary=4096, context=512, batch=8, sequence=256),
    "small": Shape(hidden_size=256, layers=4, heads=4, vocabulary=4096, context=512, batch=8, sequence=256),
    "124m": Shape(hidden_size=768, layers=12, heads=12, vocabulary=50257, context=1024, batch=2, sequence=256),
}
GOALS = {"prefill": 1.10, "cached generation": 1.10, "training step": 1.40}
# Operators that multiply matrices; their share is the part that no rewriting of a layer can save.
MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


@dataclass(frozen=True)
class Row:
    """One measurement: seconds of both models (medians) and the ratio GPT-2 / RiGPT over paired turns."""

    shape: str
    mode: str
    what: str
    gpt2: float
    rigpt: float
    ratio: float
    quartiles: tuple[float, float]
    turns: int
    unit: str = "s"


def build(name: str, shape: Shape, attention: str) -> PreTrainedModel:
    """A freshly initialised `"gpt2"` or `"rigpt"` of this shape, without dropout."""
    if name == "gpt2":
        config = GPT2Config(
            n_embd=shape.hidden_size,
            n_layer=shape.layers,
            n_head=shape.heads,
            vocab_size=shape.vocabulary,
            n_positions=shape.context,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation=attention,
        )
        return GPT2LMHeadModel(config)
    config = RiGPTConfig(
        hidden_size=shape.hidden_size,
        embedding_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.context,
        position_embedding_type="learned",
        attention_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        output_bias=True,
        attn_implementation=attention,
    )
    return RiGPTForCausalLM(config)


def training(model: PreTrainedModel, ids: torch.Tensor) -> Callable[[], None]:
    """Forward, loss, backward and a fused AdamW step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def run() -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def summarise(shape: str, mode: str, what: str, seconds: dict[str, list[float]]) -> Row:
    """Medians of the times, and median and quartiles of the paired ratios."""
    over = spread(ratios(seconds["gpt2"], seconds["rigpt"]))
    gpt2, rigpt = (statistics.median(seconds[name]) for name in ("gpt2", "rigpt"))
    quartiles = over["lower"], over["upper"]
    return Row(shape, mode, what, gpt2, rigpt, over["median"], quartiles, len(seconds["gpt2"]))


def peak_memory(name: str, shape_name: str, attention: str) -> float:
    """Peak memory in bytes of a fresh process that builds one model and takes two training steps."""
    options = "--peak-memory-of", name, "--shape", shape_name, "--attention", attention
    command = python("-m", "rigpt_hf.evaluation.speed", *options)
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_own_peak_memory(name: str, shape: Shape, attention: str):
    """Print the number that `peak_memory` reads from a process of its own."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(name, shape, attention).to(device).train()
    step = training(model, torch.randint(0, shape.vocabulary, (shape.batch, shape.sequence), device=device))
    for _ in range(2):
        step()
    if device.type == "cuda":
        print(torch.cuda.max_memory_allocated(device))
    else:
        print(own_peak_memory())


def share_of_matrix_products(action: Callable[[], None]) -> float:
    """Part of an action's own operator time that is spent multiplying matrices."""
    action()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        action()
    events = profiler.key_averages()
    products = sum(event.self_cpu_time_total for event in events if event.key in MATRIX_PRODUCTS)
    return products / sum(event.self_cpu_time_total for event in events)


def measure(shape_name: str, mode: str, attention: str, turns: int, progress: Progress) -> tuple[list[Row], dict]:
    """All rows of one shape in one mode, and where the time of a training step goes."""
    shape = SHAPES[shape_name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    models = {name: build(name, shape, attention).to(device) for name in ("gpt2", "rigpt")}
    ids = torch.randint(0, shape.vocabulary, (shape.batch, shape.sequence), device=device)
    runners = models
    if mode == "compiled":
        torch._dynamo.reset()
        runners = {name: torch.compile(model) for name, model in models.items()}
    rows, shares = [], {}
    kinds: dict[str, Callable[[PreTrainedModel], Callable[[], None]]] = {
        "prefill": lambda model: prefill(model, ids),
        "cached generation": lambda model: generation(model, ids[:1, :NEW_TOKENS], static=mode == "compiled"),
        "training step": lambda model: training(model, ids),
    }
    for what, action in kinds.items():
        for model in models.values():
            model.train(what == "training step")
        actions = {name: action(model) for name, model in runners.items()}
        task = progress.add_task(f"{shape_name}, {mode}: {what}", total=turns + 1)
        units = NEW_TOKENS if what == "cached generation" else 1
        seconds = take_turns(actions, turns, lambda task=task: progress.advance(task), units)
        rows.append(summarise(shape_name, mode, what, seconds))
        if what == "training step" and mode == "eager" and device.type == "cpu":
            shares = {name: share_of_matrix_products(run) for name, run in actions.items()}
    if mode == "eager":
        rows.append(measure_loading(shape_name, models, turns, progress))
        task = progress.add_task(f"{shape_name}: peak memory", total=2)
        peaks = {}
        del runners, actions, models
        gc.collect()
        for name in ("gpt2", "rigpt"):
            peaks[name] = peak_memory(name, shape_name, attention)
            progress.advance(task)
        ratio = peaks["gpt2"] / peaks["rigpt"]
        how = (peaks["gpt2"], peaks["rigpt"], ratio, (ratio, ratio), 1, "bytes")
        rows.append(Row(shape_name, mode, "peak memory, training", *how))
    return rows, shares


def measure_loading(shape_name: str, models: dict[str, PreTrainedModel], turns: int, progress: Progress) -> Row:
    """`from_pretrained` of both from a local folder."""
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            model.save_pretrained(Path(folder, name))
        task = progress.add_task(f"{shape_name}: load time", total=turns + 1)

        actions = {name: partial(type(model).from_pretrained, Path(folder, name)) for name, model in models.items()}
        seconds = take_turns(actions, turns, lambda: progress.advance(task))
    return summarise(shape_name, "eager", "load time", seconds)


def as_table(rows: list[Row]) -> Table:
    """The rows for the terminal; ratios below their goal are marked."""
    table = Table(title="RiGPT beside stock GPT-2 (ratio: GPT-2 / RiGPT, more is better)")
    for column in ("shape", "mode", "what", "GPT-2", "RiGPT", "ratio", "quartiles", "goal"):
        table.add_column(column, justify="left" if column in ("shape", "mode", "what") else "right")
    for row in rows:
        scale, unit = (1e3, "ms") if row.unit == "s" else (1e-6, "MB")
        goal = GOALS.get(row.what, 1.0)
        color = "green" if row.ratio >= goal else "yellow" if row.ratio >= 1 else "red"
        table.add_row(
            row.shape,
            row.mode,
            row.what,
            f"{row.gpt2 * scale:.1f} {unit}",
            f"{row.rigpt * scale:.1f} {unit}",
            f"[{color}]{row.ratio:.3f}[/{color}]",
            f"{row.quartiles[0]:.3f} to {row.quartiles[1]:.3f}" if row.turns > 1 else "",
            f"{goal:.2f}",
        )
    return table


def main(
    shape: Annotated[
        list[str] | None, typer.Option(help=f"Shapes to measure: {', '.join(SHAPES)}. Default: all.")
    ] = None,
    mode: Annotated[list[str] | None, typer.Option(help="eager, compiled. Default: both.")] = None,
    attention: Annotated[str, typer.Option(help="Attention backend of both models: sdpa or eager.")] = "sdpa",
    turns: Annotated[int, typer.Option(help="Paired measurements per row, at least 3.", min=3)] = 11,
    output: Annotated[Path, typer.Option(help="Where the JSON goes."), WRITES] = Path("runs/bench/speed.json"),
    peak_memory_of: Annotated[str | None, typer.Option(hidden=True)] = None,
):
    """Measure prefill, cached generation, a training step, load time and peak memory against stock GPT-2."""
    shapes, modes = shape or list(SHAPES), mode or ["eager", "compiled"]
    if unknown := [*(set(shapes) - set(SHAPES)), *(set(modes) - {"eager", "compiled"})]:
        raise ValueError(f"got {unknown}; shapes are {list(SHAPES)}, modes are eager and compiled.")
    if attention not in ("sdpa", "eager"):
        raise ValueError(f"`attention` must be sdpa or eager, got {attention!r}.")
    if output.is_dir() or not next(folder for folder in output.parents if folder.exists()).is_dir():
        raise ValueError(f"`output` must be a file that can be made, got {str(output)!r}. Name another.")
    seen = check_file(output, "output", force=True)
    if peak_memory_of is not None:
        return print_own_peak_memory(peak_memory_of, SHAPES[shapes[0]], attention)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console()
    rows, shares = [], {}
    with Progress(console=console) as progress:
        for name in shapes:
            for each in modes:
                more, share = measure(name, each, attention, turns, progress)
                rows += more
                shares.update({name: share} if share else {})
    console.print(as_table(rows))
    for name, share in shares.items():
        console.print(
            f"{name}: matrix products are {share['gpt2']:.0%} of stock GPT-2's training step and {share['rigpt']:.0%} "
            "of RiGPT's; they are the same products, so only the rest can be gained on."
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    measured = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rigpt_hf": __version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": device_name(),
        "attention": attention,
        "shapes": {name: asdict(SHAPES[name]) for name in shapes},
        "share_of_matrix_products": shares,
        "rows": [asdict(row) for row in rows],
    }
    write_text(output, json.dumps(measured, indent=2) + "\n", seen=seen, named=True)
    console.print(f"Written to {output}", markup=False)


if __name__ == "__main__":
    app = make_app()
    app.command()(guarded(main))
    sys.exit(execute(app, "speed.py"))
