"""
Loss barriers between trained models before and after alignment: `python -m evaluation.experiments.merging --help`.

Pairs of small RiGPTs learn one text from other initial weights and in another order. The loss on held-out text is
measured along the straight path between them, and of their average: as they are, after alignment by weights, and after
an alignment that is learned on the training text; and, to see what rotations are good for, after the best permutations
alone. All of it again after twice as long a training.

The barrier is the largest loss on the path above the straight line between the losses of its ends, in nats per token
(Frankle et al., arXiv 1912.05671, with an added slope); matching by permutations is Git Re-Basin (arXiv 2209.04836),
learned alignment of transformers Theus et al. (arXiv 2506.22712).
"""

import math
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table
from torch import nn

from rigpt_hf import RiGPTConfig, RiGPTForCausalLM
from rigpt_hf.checkpoints.folder import check_output, new_folder
from rigpt_hf.command_line import READS, WRITES
from rigpt_hf.dataclass_options import program
from rigpt_hf.groups import assignment
from rigpt_hf.pictures import save
from rigpt_hf.pictures.style import Figure
from rigpt_hf.pictures.symmetry import plot_paths
from rigpt_hf.symmetry import Learning, LossPath, find_learned_alignment, gauge_distance, loss_path, merge
from rigpt_hf.symmetry.alignment import Search
from rigpt_hf.symmetry.contraction import weights_of
from rigpt_hf.symmetry.merging import METHODS, average, with_weights
from rigpt_hf.terminal import Console
from rigpt_hf.text.corpus import gather_documentation, read_text
from rigpt_hf.text.tokenizer import LARGEST, split, token_row, train_tokenizer
from rigpt_hf.training.options import POSITIVE, check

from .common import VERSIONS, check_heads, check_least, training_step, write_json


MEGABYTE = 10**6
MAX_SWEEPS = 30
SETTLED = 1e-6  # a sweep that lowers the distance by less ends the search for permutations
HELD_OUT_WINDOWS = 64  # of the context's length, on which losses are measured
UNALIGNED, PERMUTED, ALIGNED, LEARNED = "as they are", "permutations alone", "aligned", "learned"


@dataclass(frozen=True)
class Options:
    """The models, how they are trained, and what is measured."""

    pairs: int = 3
    """How many pairs; no model is in two of them."""
    seed: int = 0
    """Seed of the first model's initial weights and order; the others follow."""
    hidden_size: int = 64
    """Stream size."""
    layers: int = 2
    """Number of layers."""
    heads: int = 2
    """Attention heads."""
    activation: Literal["gelu", "relu", "relu2", "silu"] = "gelu"
    """As in RiGPTConfig."""
    vocabulary: int = 512
    """Tokens of the tokenizer that is trained on the text."""
    context: int = 64
    """Tokens per window."""
    batch: int = 32
    """Windows per step."""
    steps: int = 600
    """Steps of AdamW per model, one cycle of the learning rate."""
    learning_rate: float = 4e-3
    """The largest learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay of all parameters."""
    learn: int = 400
    """Steps in which each alignment is learned, of BATCH windows of the training text."""
    twice: bool = True
    """Measure pairs besides that are trained twice as long."""
    points: int = 11
    """Points on each path, both ends included."""
    megabytes: float = 8.0
    """How much documentation to gather at most."""
    text: Annotated[Path | None, READS] = None
    """Text to learn instead of documentation."""
    output: Annotated[Path, WRITES] = Path("runs/merging")
    """Folder to make, with results.json and paths.png."""
    force: bool = False
    """Replace an earlier result in OUTPUT."""

    def __post_init__(self):
        check_least(self, pairs=1, steps=2, learn=1, points=2, batch=1, context=2, weight_decay=0)
        check(self, POSITIVE, "learning_rate", "megabytes")
        check_heads(self)
        if not 256 < self.vocabulary <= LARGEST:
            raise ValueError(
                f"`vocabulary` must be more than the 256 bytes and at most {LARGEST:,}, got {self.vocabulary}."
            )
        self.config(self.vocabulary)  # has checks of its own

    def config(self, tokens: int) -> RiGPTConfig:
        """The configuration of all models."""
        return RiGPTConfig(
            vocab_size=tokens,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            hidden_act=self.activation,
            max_position_embeddings=self.context,
        )


@dataclass(frozen=True)
class Pair:
    """
    The measurements of one pair, losses in nats per token.

    Args:
        seeds (`tuple[int, int]`): of A and B.
        losses (`tuple[float, float]`): of A and B.
        distance (`float`): between their orbits, see `gauge_distance`.
        path (`LossPath`): from B to A.
        merged (`dict[str, dict[str, float]]`): losses half way, by method and by what was done before.
    """

    seeds: tuple[int, int]
    losses: tuple[float, float]
    distance: float
    path: LossPath
    merged: dict[str, dict[str, float]]

    @property
    def kept(self) -> float:
        """The part of the barrier that alignment leaves; not a number where there was none."""
        return self._part(self.path.barrier_after)

    @property
    def kept_learned(self) -> float:
        """The part that learned alignment leaves."""
        return self._part(self.path.barrier_learned or 0.0)

    def _part(self, barrier: float) -> float:
        before = self.path.barrier_before
        return barrier / before if before > 0 else math.nan

    def excess(self, method: str, how: str) -> float:
        """The loss of a merged model above the mean of the two."""
        return self.merged[method][how] - sum(self.losses) / 2

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return asdict(self) | {
            "path": self.path.to_dict(),
            "barrier_kept": self.kept,
            "barrier_kept_learned": self.kept_learned,
        }


def train(config: RiGPTConfig, windows: torch.Tensor, options: Options, seed: int, progress: Callable[[float], None]):
    """
    A RiGPT trained on `windows` `[N, context]`, in evaluation mode.

    `seed` decides the initial weights and the order of the windows; `progress` is called with every step's loss.
    """
    torch.manual_seed(seed)
    model = RiGPTForCausalLM(config).to(windows.device).train()
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(options.steps * options.batch / len(windows))
    order = torch.cat([torch.randperm(len(windows), generator=generator) for _ in range(epochs)])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=options.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.learning_rate, total_steps=options.steps, pct_start=0.1, cycle_momentum=False
    )
    for step in range(options.steps):
        batch = windows[order[step * options.batch : (step + 1) * options.batch].to(windows.device)]
        loss = training_step(model, optimizer, [batch], max_grad_norm=1.0)
        schedule.step()
        progress(loss)
    return model.eval()


@torch.no_grad()
def permuted_mean(a: nn.Module, b: nn.Module, method: str) -> nn.Module:
    """
    The average in the frames of B after A's dimensions, heads and neurons have been exchanged, and nothing turned.

    Dimensions of the stream and of values are matched by assignment, those of queries and keys stay, as rotary
    positions tell them apart.
    """
    search = Search(b.config, weights_of(a), weights_of(b))
    distances = [search.distance()]
    while len(distances) <= MAX_SWEEPS:
        for kind in ("stream", "head_vo"):
            views = search.views(kind)
            search.go({view.key: torch.stack([permutation(gains) for gains in view.total()]) for view in views})
        search.settle("heads")
        search.settle("neurons")
        distances.append(search.distance())
        if distances[-2] - distances[-1] < SETTLED:
            break
    return with_weights(b, average([search.target, search.weights], [0.5, 0.5], method))


def permutation(gains: torch.Tensor) -> torch.Tensor:
    """The permutation matrix `[n, n]` with the largest `tr(Pᵀ C)` for `C` `[n, n]`."""
    return torch.eye(len(gains), dtype=torch.float64)[assignment(gains)]


def measure(
    a: nn.Module,
    b: nn.Module,
    seeds: tuple[int, int],
    loss: Callable[[nn.Module], float],
    learning: Learning,
    points: int,
) -> Pair:
    """Everything about one pair of trained models."""
    learned = find_learned_alignment(a, b, learning)
    path = loss_path(a, b, loss, points=points, learned=learned)
    merged = {
        method: {
            UNALIGNED: loss(merge([a, b], method=method, aligned=False)),
            PERMUTED: loss(permuted_mean(a, b, method)),
            ALIGNED: loss(merge([a, b], method=method)),
            LEARNED: loss(merge([b, a], method=method, alignments=[learned])),
        }
        for method in METHODS
    }
    return Pair(seeds, (loss(a), loss(b)), gauge_distance(a, b), path, merged)


def spread(values: list[float]) -> dict[str, float]:
    """Mean, standard deviation over the pairs (0 for one), least and most."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "deviation": deviation, "least": min(values), "most": max(values)}


def summarise(pairs: list[Pair]) -> dict[str, Any]:
    """The spread over all pairs of barriers, of the part that is left, and of what merging costs."""
    return {
        "barrier_before": spread([pair.path.barrier_before for pair in pairs]),
        "barrier_after": spread([pair.path.barrier_after for pair in pairs]),
        "barrier_learned": spread([pair.path.barrier_learned or 0.0 for pair in pairs]),
        "barrier_kept": spread([pair.kept for pair in pairs]),
        "barrier_kept_learned": spread([pair.kept_learned for pair in pairs]),
        "distance": spread([pair.distance for pair in pairs]),
        "excess": {
            method: {how: spread([pair.excess(method, how) for pair in pairs]) for how in pairs[0].merged[method]}
            for method in METHODS
        },
    }


def drawn(paths: Sequence[LossPath]) -> Figure:
    """The picture of all pairs."""
    return plot_paths(paths, "Averaging two models trained apart costs less once one is turned to fit the other")


def as_table(pairs: list[Pair], summary: dict[str, Any], steps: int) -> Table:
    """The pairs for the terminal."""
    table = Table(title=f"Barriers in nats per token after {steps:,} steps (permuted: half way)")
    for column in ("seeds", "losses", "unaligned", "permuted", "aligned", "left", "learned", "left"):
        table.add_column(column, justify="right")
    for pair in pairs:
        table.add_row(
            f"{pair.seeds[0]}, {pair.seeds[1]}",
            f"{pair.losses[0]:.3f}, {pair.losses[1]:.3f}",
            f"{pair.path.barrier_before:.3f}",
            f"{pair.excess('linear', PERMUTED):.3f}",
            f"{pair.path.barrier_after:.3f}",
            share(pair.kept),
            f"{pair.path.barrier_learned:.3f}",
            share(pair.kept_learned),
        )
    columns = summary["barrier_before"], summary["excess"]["linear"][PERMUTED], summary["barrier_after"]
    table.add_section()
    *means, learned = (
        f"{each['mean']:.3f} ± {each['deviation']:.3f}" for each in (*columns, summary["barrier_learned"])
    )
    left, left_learned = (share(summary[name]["mean"]) for name in ("barrier_kept", "barrier_kept_learned"))
    table.add_row("mean", "", *means, left, learned, left_learned)
    return table


def share(kept: float) -> str:
    """The part of a barrier that is left, in words where there was none."""
    return f"{kept:.0%}" if math.isfinite(kept) else "no barrier"


def obtain_tokens(options: Options, progress: Progress) -> tuple[torch.Tensor, int, str]:
    """All tokens of the text in one row, the size of the vocabulary, and what the text is."""
    if options.text is not None:
        passages, what = read_text(options.text), options.text.name
    else:
        task = progress.add_task("reading the installed packages", total=None)
        limit = int(options.megabytes * MEGABYTE)
        # The text is the same for all seeds, so that results can be compared.
        passages = gather_documentation(limit, tick=lambda n: progress.advance(task, n))
        progress.update(task, total=1, completed=1)
        size = sum(len(passage.encode()) for passage in passages) / MEGABYTE
        what = f"{size:.1f} MB of documentation of the installed Python packages"
    task = progress.add_task("training a tokenizer", total=1)
    tokenizer = train_tokenizer(passages, options.vocabulary)
    tokens = token_row(tokenizer, passages)
    progress.advance(task)
    return tokens, len(tokenizer), what


def run(options: Options, console: Console | None = None) -> dict[str, Any]:
    """
    Measure how much alignment lowers the loss barrier between independently trained RiGPTs.

    Defaults take about fifteen minutes on one core. Without --text the models learn the documentation of the installed
    Python packages, which needs no network. Wider, longer trained or relu2 models:

        python -m evaluation.experiments.merging --hidden-size 128 --steps 1200 --activation relu2 --output runs/wide
    """
    console = console or Console()
    seen = check_output(options.output, None, options.force, "output")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as progress:
        tokens, vocabulary, what = obtain_tokens(options, progress)
        config = options.config(vocabulary)
        rows = split(tokens, options.context)
        windows, held_out = (row[: len(row) // options.context * options.context].to(device) for row in rows)
        windows, held_out = (row.view(-1, options.context) for row in (windows, held_out))
        held_out = held_out[:HELD_OUT_WINDOWS]

        @torch.no_grad()
        def loss(model: nn.Module) -> float:
            return model(held_out, labels=held_out, use_cache=False).loss.item()

        def pairs_of(options: Options) -> list[Pair]:
            return [measured(options, options.seed + 2 * index) for index in range(options.pairs)]

        def measured(options: Options, seed: int) -> Pair:
            models, seeds = [], (seed, seed + 1)
            for seed in seeds:
                task = progress.add_task(f"training model {seed}", total=options.steps)

                def advance(value: float, task=task, seed=seed):
                    progress.update(task, advance=1, description=f"training model {seed}, loss {value:.2f}")

                models.append(train(config, windows, options, seed, advance))
            task = progress.add_task(f"the way between models {seeds[0]} and {seeds[1]}", total=1)
            order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seeds[0]))
            learning = Learning(windows[order.to(device)].split(options.batch), options.learn)
            pair = measure(models[0], models[1], seeds, loss, learning, options.points)
            progress.advance(task)
            return pair

        pairs = pairs_of(options)
        longer = pairs_of(replace(options, steps=2 * options.steps)) if options.twice else []
    summary = summarise(pairs)
    results = {
        "versions": VERSIONS,
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "options": asdict(options),
        "text": what,
        "training_tokens": windows.numel(),
        "held_out_tokens": held_out.numel(),
        "parameters": RiGPTForCausalLM(config).num_parameters(),
        "unit": "nats per token",
        "pairs": [pair.to_dict() for pair in pairs],
        "summary": summary,
    }
    if longer:
        results["twice_the_steps"] = {"pairs": [pair.to_dict() for pair in longer], "summary": summarise(longer)}
    with new_folder(options.output, seen, "output") as folder:
        write_json(folder / "results.json", results)
        save(drawn([pair.path for pair in pairs]), folder / "paths.png")
    console.print(as_table(pairs, summary, options.steps))
    if longer:
        console.print(as_table(longer, summarise(longer), 2 * options.steps))
    if math.isfinite(summary["barrier_kept"]["mean"]):
        for words, name in (("Alignment", "barrier_kept"), ("Learned alignment", "barrier_kept_learned")):
            kept = summary[name]
            console.print(
                f"{words} leaves {kept['mean']:.0%} of the barrier ({kept['least']:.0%} to {kept['most']:.0%} over "
                f"{len(pairs)} pairs)."
            )
    else:
        console.print("Between models of some pair there was no barrier, of which alignment could leave a part.")
    console.print(f"Written to {options.output}", markup=False)
    return results


main = program(Options, run, name="python -m evaluation.experiments.merging")

if __name__ == "__main__":
    sys.exit(main())
