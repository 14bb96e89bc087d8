"""
The cost of the equivariant optimizer beside fused AdamW: `python -m evaluation.experiments.optimizer_cost --help`.

Both optimizers act on copies of one model in one process and take turns. A training step is forward, backward and the
optimizer's step; the first two are the same for both, so they are timed once per turn and shared.
"""

import copy
import platform
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from rigpt_hf import RiGPTConfig, RiGPTForCausalLM
from rigpt_hf.checkpoints.folder import check_file
from rigpt_hf.command_line import WRITES
from rigpt_hf.dataclass_options import program
from rigpt_hf.evaluation.timing import ratios, take_turns
from rigpt_hf.optim import EquivariantOptimizer, equivariant_param_groups
from rigpt_hf.terminal import Console

from .common import check_least, median_and_range, write_json


SHAPES: dict[str, dict[str, int]] = {
    "small": {
        "hidden_size": 192,
        "embedding_size": 192,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "vocab_size": 4096,
    },
    "124m": {"hidden_size": 768, "embedding_size": 768},
}
# Time of a training step with the equivariant optimizer over one with fused AdamW.
GOALS = {"cpu": 1.10, "cuda": 1.03}
# Of products of matrices, which bound what the optimizer must cost.
OPERATIONS = "operations of the equivariant optimizer over those of forward and backward"


@dataclass(frozen=True)
class Options:
    """The model, and the steps that are timed."""

    shape: Literal["small", "124m"] = "124m"
    """Size of the model."""
    tokens: int = 8192
    """Tokens per training step."""
    sequence: int = 1024
    """Tokens per row."""
    rows: int = 2
    """Rows per pass; passes add up to the step."""
    turns: int = 3
    """Turns of both."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to train; on cuda in bfloat16."""
    output: Annotated[Path | None, WRITES] = None
    """File for the numbers, JSON."""

    def __post_init__(self):
        check_least(self, tokens=1, sequence=2, rows=1, turns=1)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("`device` must be one that PyTorch can use here, got 'cuda'. Take cpu.")
        if self.tokens % (self.sequence * self.rows):
            raise ValueError(f"`tokens` must be a multiple of {self.sequence} · {self.rows}, got {self.tokens}.")


def run(options: Options) -> None:
    """Time training steps with both optimizers, side by side, and print the ratio with its spread."""
    seen = check_file(options.output, "output", force=True)
    device = torch.device(options.device)
    result = measure(SHAPES[options.shape], options.tokens, options.sequence, options.rows, options.turns, device)
    title = f"{options.shape}, {options.tokens} tokens per step, {device}"
    table = Table("", "median", "lowest", "highest", title=title)
    for name in ("forward and backward", "fused AdamW", "equivariant", "ratio of training steps"):
        table.add_row(name, *median_and_range(result[name], "{:.3f}" if name.startswith("ratio") else "{:.3f} s"))
    console = Console()
    console.print(table)
    console.print(f"Its products are {result[OPERATIONS][0]:.1%} of those of forward and backward.", highlight=False)
    goal = GOALS[device.type]
    reached = statistics.median(result["ratio of training steps"]) <= goal
    console.print(f"Goal: at most {goal}; {'reached' if reached else 'missed'}.")
    how = {"shape": options.shape, "tokens": options.tokens, "threads": torch.get_num_threads()}
    how |= {"torch": torch.__version__, "machine": platform.machine(), "device": options.device}
    write_json(options.output, how | result, seen=seen, named=True)


def measure(
    shape: dict[str, int], tokens: int, sequence: int, rows: int, turns: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds per turn, of forward and backward and of each optimizer; ratios of whole steps; share of operations."""
    torch.manual_seed(0)
    model = RiGPTForCausalLM(RiGPTConfig(max_position_embeddings=sequence, **shape)).to(device)
    other = copy.deepcopy(model)
    optimizers: dict[str, torch.optim.Optimizer] = {
        "fused AdamW": torch.optim.AdamW(other.parameters(), lr=1e-4, fused=True),
        "equivariant": EquivariantOptimizer(equivariant_param_groups(model, lr=1e-4)),
    }
    ids = torch.randint(0, model.config.vocab_size, (rows, sequence), device=device)

    def descend() -> None:
        model.zero_grad(set_to_none=False)
        for _ in range(tokens // ids.numel()):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()

    with FlopCounterMode(display=False) as passes_counted:
        descend()
    # Which stay those of the model, as they are added to in place.
    for own, its in zip(model.parameters(), other.parameters(), strict=True):
        its.grad = own.grad
    with FlopCounterMode(display=False) as steps_counted:
        optimizers["equivariant"].step()
    actions = {"forward and backward": descend} | {name: optimizer.step for name, optimizer in optimizers.items()}
    with tqdm(total=turns + 1, desc="Turns") as bar:
        seconds = take_turns(actions, turns, bar.update)
    passes = seconds["forward and backward"]
    steps = {name: [a + b for a, b in zip(passes, seconds[name], strict=True)] for name in optimizers}
    seconds["ratio of training steps"] = ratios(steps["equivariant"], steps["fused AdamW"])
    return seconds | {OPERATIONS: [steps_counted.get_total_flops() / passes_counted.get_total_flops()]}


main = program(Options, run, name="python -m evaluation.experiments.optimizer_cost")

if __name__ == "__main__":
    sys.exit(main())
