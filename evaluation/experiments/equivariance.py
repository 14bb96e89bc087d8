"""
Is training from a rotated start the rotated training? `python -m evaluation.experiments.equivariance --help`.

A small RiGPT is trained twice with the equivariant optimizer, once from its weights and once from a random rotation of
them, in several precisions, and once more with AdamW. What is reported is the distance between the rotated result of
the first and the result of the second, relative to the way that training has gone, and the difference of the losses.
"""

import copy
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.table import Table
from tqdm.auto import tqdm

from rigpt_hf import RiGPTConfig, RiGPTForCausalLM
from rigpt_hf.checkpoints.folder import check_file
from rigpt_hf.command_line import WRITES
from rigpt_hf.dataclass_options import program
from rigpt_hf.optim import EquivariantOptimizer, equivariant_param_groups
from rigpt_hf.symmetry import GaugeTransformation
from rigpt_hf.terminal import Console

from .common import check_least, median_and_range, training_step, write_json


KINDS = ("float64", "float32", "bfloat16 autocast", "bfloat16 weights", "float64, AdamW")
SIZE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "embedding_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "qk_norm": True,
    "hidden_act": "relu2",
    "max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Options:
    """How pairs are trained."""

    steps: int = 200
    """Steps of training."""
    lr: float = 3e-3
    """Learning rate."""
    seeds: int = 3
    """How many pairs of a start and a rotation."""
    output: Annotated[Path | None, WRITES] = None
    """File for the numbers, JSON."""

    def __post_init__(self):
        check_least(self, steps=1, seeds=1)
        if not 0 < self.lr < math.inf:
            raise ValueError(
                f"`lr` must be positive, got {self.lr}. Distances are relative to the way gone: give more."
            )


def run(options: Options) -> None:
    """Train pairs and print how far apart they end; the last line is the control that must be far."""
    seen = check_file(options.output, "output", force=True)
    steps, lr, seeds = options.steps, options.lr, options.seeds
    results: dict[str, list[dict[str, float]]] = {}
    with tqdm(total=len(KINDS) * seeds * 2 * steps, unit="step") as bar:
        for kind in KINDS:
            results[kind] = [pair(kind, steps, lr, seed, bar) for seed in range(seeds)]
    table = Table("training", "distance", "lowest", "highest", "difference of the last losses")
    for kind, entries in results.items():
        distances = [entry["distance"] for entry in entries]
        losses = statistics.median(entry["loss_difference"] for entry in entries)
        table.add_row(kind, *median_and_range(distances, "{:.1e}"), f"{losses:.1e}")
    Console().print(table)
    how = {"steps": steps, "lr": lr, "size": SIZE, "torch": torch.__version__}
    write_json(options.output, how | {"results": results}, seen=seen, named=True)


def pair(kind: str, steps: int, lr: float, seed: int, bar: tqdm) -> dict[str, float]:
    """Train from a start and from its rotation."""
    dtype = torch.bfloat16 if kind == "bfloat16 weights" else torch.float32 if "64" not in kind else torch.float64
    torch.manual_seed(seed)
    model = RiGPTForCausalLM(RiGPTConfig(**SIZE)).to(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    g = GaugeTransformation.random(model.config, generator, "all", compact=True)
    start = copy.deepcopy(model)
    turned = g(model).to(dtype)
    model = model.to(dtype)
    losses = [train(network, kind, steps, lr, seed, bar) for network in (model, turned)]
    ends = [dict(network.to(torch.float64).named_parameters()) for network in (g(model.to(torch.float64)), turned)]
    begin = dict(g(start).named_parameters())
    gap, way = 0.0, 0.0
    for name, end in ends[0].items():
        gap += float((end - ends[1][name]).square().sum().detach())
        way += float((end - begin[name]).square().sum().detach())
    return {"distance": (gap / way) ** 0.5, "loss_difference": abs(losses[0] - losses[1]), "loss": losses[0]}


def train(model: Any, kind: str, steps: int, lr: float, seed: int, bar: tqdm) -> float:
    """Descend on sequences with something to learn: each token is the one before plus one, most of the time."""
    optimizer: torch.optim.Optimizer
    if "AdamW" in kind:
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    else:
        optimizer = EquivariantOptimizer(equivariant_param_groups(model, lr=lr))
    draw = torch.Generator().manual_seed(seed)
    loss = 0.0
    for _ in range(steps):
        jumps = torch.where(torch.rand(8, 64, generator=draw) < 0.1, torch.randint(0, 256, (8, 64), generator=draw), 1)
        ids = jumps.cumsum(1) % 256
        loss = training_step(model, optimizer, [ids], mixed="autocast" in kind)
        bar.update()
    return loss


main = program(Options, run, name="python -m evaluation.experiments.equivariance")

if __name__ == "__main__":
    sys.exit(main())
