"""
Why do weights of high stable rank suffer more from four bits? `python -m evaluation.experiments.four_bits --help`.

Every matrix but the head is rounded to nearest, with one scale per row or per group of neighbours in a row, and the
loss on held-out tokens is measured again; once more with what a column loses made good by the others (GPTQ). Beside it
stand the stable rank of the matrices, `|W|²_F / |W|²_2`, and how far rounding to nearest moves what they put out,
relative to its size, on inputs from other tokens.

Rounding to `b` bits adds to every row noise of a fixed share `ε` of its length, spread evenly over all directions. A
matrix that answers its inputs with its strongest directions puts out much more than `|W|_F |x| / √n`, and the noise is
small beside it; one whose singular values are alike puts out just that, and gets all of `ε`:

    relative error of the output = ε · (|W|_F |x| / √n) / |W x|

So what counts is not stable rank alone but the gain of the inputs, `|W x| √n / (|W|_F |x|)`, which is listed too. How
much a model minds is another matter: the last column is the loss when the same noise is scaled until every output is
wrong by 5 %.
"""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from rich.progress import track
from rich.table import Table
from torch import nn

from rigpt_hf.checkpoints.folder import check_file
from rigpt_hf.checkpoints.read import load_model
from rigpt_hf.command_line import READS, WRITES
from rigpt_hf.dataclass_options import program
from rigpt_hf.evaluation.rounding import compensated, matrices_of, rounded, rows_of
from rigpt_hf.terminal import Console

from . import modern  # noqa: F401  so that the Auto classes know the baseline
from .common import check_least, write_json


# Relative error of every output where models are compared at equal noise.
EQUAL_ERROR = 0.05
# Scales per row (0), and per so many neighbours in a row.
GROUPS = (0, 64, 32)
# Key of the result, neighbours that share a scale, and whether others make good what a column loses.
SCHEMES = [
    (f"loss, {also}scale per {f'group {group}' if group else 'row'}", group, bool(also))
    for also, groups in (("", GROUPS), ("compensated, ", (0, GROUPS[-1])))
    for group in groups
]
# Windows on which inputs are looked at, behind those on which the loss is measured.
CALIBRATION = 8


@dataclass(frozen=True)
class Options:
    """Models, and what they are measured on."""

    tokens: Annotated[Path, READS, {"exists": True}]
    """Held-out tokens, little-endian uint16."""
    models: Annotated[list[Path], READS, {"exists": True}]
    """Folders of models."""
    windows: int = 64
    """Windows of held-out tokens."""
    context: int = 256
    """Tokens in a window."""
    modules_to_not_convert: tuple[str, ...] = ()
    """Modules to leave alone, by the ends of their names."""
    output: Annotated[Path | None, WRITES] = None
    """File for the results, JSON."""
    force: bool = False
    """Replace a file that this program wrote and nobody changed."""

    def __post_init__(self):
        check_least(self, windows=1, context=1)


@torch.no_grad()
def mean_loss(model: nn.Module, windows: torch.Tensor) -> float:
    """Nats per token on windows `[N, context + 1]`."""
    losses = [float(model(input_ids=part, labels=part, use_cache=False).loss) for part in windows.split(16)]
    return statistics.mean(losses)


@torch.no_grad()
def measure(
    folder: Path, windows: torch.Tensor, calibration: torch.Tensor, leave: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The effects of rounding one model; inputs of its matrices are those on windows of their own."""
    model: Any = load_model(folder, dtype=torch.float32).eval()
    matrices = matrices_of(model, leave)
    answers: dict[str, list[dict[str, float]]] = {name: [] for name in matrices}
    moments: dict[str, torch.Tensor] = {}

    def look(name: str):
        def hook(module: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
            weight = rows_of(module)
            inputs = arguments[0].flatten(0, -2)[:, : weight.shape[1]]  # a gate may read the first coordinates only
            moments[name] = inputs.double().T @ inputs.double()
            answer, size = inputs @ weight.T, float(weight.norm() * inputs.norm() / weight.shape[1] ** 0.5)
            noise = inputs @ (rounded(weight) - weight).T
            answers[name].append(
                {
                    "gain": float(answer.norm()) / size,
                    "output_error": float(noise.norm() / answer.norm()),
                    "weight_error": float((rounded(weight) - weight).norm() / weight.norm()),
                    "stable_rank": float(weight.square().sum() / torch.linalg.matrix_norm(weight, 2) ** 2),
                }
            )

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in matrices.items()]
    model(input_ids=calibration, use_cache=False)
    for handle in handles:
        handle.remove()
    per_matrix = {name: entries[0] for name, entries in answers.items() if entries}
    result: dict[str, Any] = {"model": folder.name, "loss": mean_loss(model, windows), "per_matrix": per_matrix}
    for key in ("stable_rank", "gain", "weight_error", "output_error"):
        result[key] = statistics.median(entry[key] for entry in per_matrix.values())
    kept = {name: rows_of(module).clone() for name, module in matrices.items()}
    for key, group, is_compensated in SCHEMES:
        for name, weight in kept.items():
            fits = not group or weight.shape[1] % group == 0
            if is_compensated and name in per_matrix:
                weight = compensated(weight, moments[name], group=group if fits else 0)
            elif fits and not is_compensated:
                weight = rounded(weight, group=group)
            rows_of(matrices[name]).copy_(weight)
        result[key] = mean_loss(model, windows)
    for name, weight in kept.items():
        rows_of(matrices[name]).copy_(weight)
        if name in per_matrix:
            share = EQUAL_ERROR / max(per_matrix[name]["output_error"], 1e-12)
            rows_of(matrices[name]).lerp_(rounded(weight), share)
    result["loss at equal error"] = mean_loss(model, windows)
    return result


def run(options: Options, console: Console | None = None) -> list[dict[str, Any]]:
    """
    Round the weights of models to four bits and say what that costs, and why.

        python -m evaluation.experiments.four_bits val.bin runs/a/model runs/b/model
    """
    console = console or Console()
    seen = check_file(options.output, "output", options.force)
    tokens = np.memmap(options.tokens, dtype="<u2", mode="r")
    count = options.windows + CALIBRATION
    if len(tokens) < count * (options.context + 1):
        raise ValueError(
            f"`windows` must fit into the {len(tokens)} tokens of {str(options.tokens)!r} with {CALIBRATION} more to "
            f"look at, got {options.windows}."
        )
    rows = np.array(tokens[: count * (options.context + 1)]).reshape(count, -1)
    windows, calibration = torch.from_numpy(rows.astype(np.int64)).split([options.windows, CALIBRATION])
    leave = tuple(filter(None, options.modules_to_not_convert))
    results = [
        measure(folder, windows, calibration, leave) | {"folder": str(folder), "left alone": list(leave)}
        for folder in track(options.models, console=console)
    ]
    losses = [key for key, _, _ in SCHEMES]
    columns = *(f"+ {key[6:]}" for key in losses), "stable rank", "gain", "output error", f"+ at {EQUAL_ERROR:.0%}"
    table = Table("model", "loss", *columns)
    for result in results:
        more = tuple(f"{result[key] - result['loss']:+.4f}" for key in losses)
        numbers = f"{result['stable_rank']:.1f}", f"{result['gain']:.2f}", f"{result['output_error']:.1%}"
        more = *more, *numbers, f"{result['loss at equal error'] - result['loss']:+.4f}"
        table.add_row(result["folder"], f"{result['loss']:.4f}", *more)
    console.print(table)
    write_json(options.output, results, seen=seen, named=True)
    return results


main = program(Options, run, name="python -m evaluation.experiments.four_bits")

if __name__ == "__main__":
    sys.exit(main())
