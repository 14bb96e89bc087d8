"""
What the equivariant optimizer costs beside fused AdamW: `python -m evaluation.experiments.optimizer_cost --help`.

Both optimizers act on copies of one model in one process and take turns. A training step is forward, backward and the
optimizer's step; the first two are the same for both, so they are timed once per turn and shared.
"""

import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from rigpt_hf import RiGPTConfig, RiGPTForCausalLM
from rigpt_hf.optim import EquivariantOptimizer, equivariant_param_groups


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
# Of a training step with the equivariant optimizer over one with fused AdamW.
GOALS = {"cpu": 1.10, "cuda": 1.03}


def main(
    shape: Annotated[str, typer.Option(help=f"Size of the model: {', '.join(SHAPES)}.")] = "124m",
    tokens: Annotated[int, typer.Option(help="Tokens per training step.")] = 8192,
    sequence: Annotated[int, typer.Option(help="Tokens per row.")] = 1024,
    rows: Annotated[int, typer.Option(help="Rows per pass; passes add up to the step.")] = 2,
    turns: Annotated[int, typer.Option(help="Turns of both.")] = 3,
    device: Annotated[str, typer.Option(help="Such as cpu or cuda; on cuda in bfloat16.")] = "cpu",
    output: Annotated[Path | None, typer.Option(help="File for the numbers, JSON.", show_default="none")] = None,
):
    """Time training steps with both optimizers, side by side, and print the ratio with its spread."""
    if shape not in SHAPES:
        raise typer.BadParameter(f"`shape` must be one of {', '.join(SHAPES)}, got {shape!r}.")
    if tokens % (sequence * rows):
        raise typer.BadParameter(f"`tokens` must be a multiple of {sequence} · {rows}, got {tokens}.")
    result = measure(SHAPES[shape], tokens, sequence, rows, turns, torch.device(device))
    table = Table("", "median", "lowest", "highest", title=f"{shape}, {tokens} tokens per step, {device}")
    for name in ("forward and backward", "fused AdamW", "equivariant", "ratio of training steps"):
        values = result[name]
        unit = "" if name.startswith("ratio") else " s"
        table.add_row(name, *(f"{pick(values):.3f}{unit}" for pick in (statistics.median, min, max)))
    console = Console()
    console.print(table)
    goal = GOALS[torch.device(device).type]
    reached = statistics.median(result["ratio of training steps"]) <= goal
    console.print(f"Goal: at most {goal}; {'reached' if reached else 'missed'}.")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        facts = {"shape": shape, "tokens": tokens, "threads": torch.get_num_threads(), "torch": torch.__version__}
        facts |= {"machine": platform.machine(), "device": device}
        output.write_text(json.dumps(facts | result, indent=2) + "\n", encoding="utf-8")


def measure(
    shape: dict[str, int], tokens: int, sequence: int, rows: int, turns: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds per turn: of forward and backward, of each optimizer, and the ratio of whole steps."""
    torch.manual_seed(0)
    model = RiGPTForCausalLM(RiGPTConfig(max_position_embeddings=sequence, **shape)).to(device)
    other = copy.deepcopy(model)
    optimizers: dict[str, torch.optim.Optimizer] = {
        "fused AdamW": torch.optim.AdamW(other.parameters(), lr=1e-4, fused=True),
        "equivariant": EquivariantOptimizer(equivariant_param_groups(model, lr=1e-4)),
    }
    ids = torch.randint(0, model.config.vocab_size, (rows, sequence), device=device)
    result: dict[str, list[float]] = {"forward and backward": [], **{name: [] for name in optimizers}, "ratio": []}
    # The first turn warms up.
    for turn in tqdm(range(turns + 1), desc="Turns"):
        model.zero_grad()
        passes = clock(device, lambda: descend(model, ids, tokens // ids.numel(), device))
        for mine, its in zip(model.parameters(), other.parameters(), strict=True):
            its.grad = mine.grad
        steps = {name: clock(device, optimizer.step) for name, optimizer in optimizers.items()}
        if turn:
            result["forward and backward"].append(passes)
            for name, seconds in steps.items():
                result[name].append(seconds)
            result["ratio"].append((passes + steps["equivariant"]) / (passes + steps["fused AdamW"]))
    result["ratio of training steps"] = result.pop("ratio")
    return result


def descend(model: Any, ids: torch.Tensor, passes: int, device: torch.device) -> None:
    """Gradients of a step, over several passes."""
    for _ in range(passes):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()


def clock(device: torch.device, function: Callable[[], Any]) -> float:
    """Seconds that a call takes, what it has queued included."""
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
