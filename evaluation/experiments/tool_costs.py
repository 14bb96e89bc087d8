"""
What the tools cost, and how that grows with the model: `python -m evaluation.experiments.tool_costs --help`.

Llama checkpoints of several sizes with random weights are written to disk, and every tool works on each in a process
of its own. Seconds are those of the processor; they and the peak of memory are what is there besides imports.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table

from rigpt_hf.checkpoints.folder import check_file
from rigpt_hf.command_line import WRITES
from rigpt_hf.dataclass_options import program
from rigpt_hf.processes import python
from rigpt_hf.terminal import Console

from .common import VERSIONS, check_known, write_json
from .fingerprint_limits import SIZES as LARGER
from .fingerprint_limits import write_synthetic


SIZES: dict[str, dict[str, int]] = {
    "42M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8}
    | {"vocab_size": 8192},
    **{name: LARGER[name] for name in ("135M", "360M")},
}
# Arguments of the verbs, with folders by their names; a verb finds what those before it have made.
TOOLS: dict[str, list[str]] = {
    "convert": ["convert", "{stock}", "{model}"],
    "rotate": ["rotate", "{model}", "{turned}", "--seed", "1"],
    "canonicalize": ["canonicalize", "{model}", "{canonical}"],
    "fingerprint": ["fingerprint", "{model}"],
    "diff": ["diff", "{model}", "{turned}"],
    "merge": ["merge", "{model}", "{turned}", "{merged}"],
}
# A process that says what importing takes, and what a verb takes besides: CPU seconds, and bytes at the peak.
CHILD = """
import json, sys, time
import rigpt_hf.conversion, rigpt_hf.symmetry.comparison
from rigpt_hf.cli import app
from rigpt_hf.command_line import execute
from rigpt_hf.evaluation.timing import own_peak_memory
before = [time.process_time(), own_peak_memory()]
code = execute(app, "rigpt", sys.argv[2:])
open(sys.argv[1], "w").write(json.dumps([before, [time.process_time(), own_peak_memory()]]))
sys.exit(code)
"""
# A cost grows no faster than the model if this power of its size, which loading in parts disturbs a little.
POWER = 1.1


@dataclass(frozen=True)
class Options:
    """The sizes and the tools."""

    sizes: Annotated[list[str], {"help": f"Some of {', '.join(SIZES)}."}] = field(default_factory=lambda: list(SIZES))
    tools: Annotated[list[str], {"help": f"Some of {', '.join(TOOLS)}, with those that they need."}] = field(
        default_factory=lambda: list(TOOLS)
    )
    output: Annotated[Path | None, WRITES] = None
    """File for the numbers, JSON."""

    def __post_init__(self):
        check_known("sizes", self.sizes, SIZES)
        check_known("tools", self.tools, TOOLS)


def run(options: Options) -> dict[str, Any]:
    """
    Let every tool work on models of several sizes, and say what each costs for each weight.

        python -m evaluation.experiments.tool_costs --output runs/bench/tool_costs.json
    """
    seen = check_file(options.output, "output", force=True)
    console = Console()
    costs: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(options.sizes) * (len(options.tools) + 1))
        for size in sorted(options.sizes, key=list(SIZES).index):
            with tempfile.TemporaryDirectory() as folder:
                progress.update(task, description=f"{size}: writing")
                parameters = write_synthetic(Path(folder, "stock"), SIZES[size])
                progress.advance(task)
                costs[size] = {"parameters": parameters, "tools": {}}
                for tool in (tool for tool in TOOLS if tool in options.tools):
                    progress.update(task, description=f"{size}: {tool}")
                    costs[size]["tools"][tool] = cost_of(TOOLS[tool], Path(folder))
                    progress.advance(task)
            # What is known after hours on a slow machine is not lost with it.
            facts = {"threads": 1, "versions": VERSIONS, "sizes": costs, "powers": powers(costs)}
            write_json(options.output, facts, seen=seen, named=True)
            seen = check_file(options.output, "output", force=True)
    console.print(table_of(costs, facts["powers"]))
    return facts


def cost_of(arguments: list[str], folder: Path) -> dict[str, float]:
    """
    CPU seconds of a verb and bytes at its peak, both besides imports, on one thread.

    Raises:
        ValueError: if the verb fails, with its last line.
    """
    places = {name: folder / name for name in ("stock", "model", "turned", "canonical", "merged")}
    command = python("-c", CHILD, folder / "cost.json", *(argument.format(**places) for argument in arguments))
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["nothing"]
        raise ValueError(f"`tools` must be ones that succeed, got {arguments[0]}, which ended with {said[-1]!r}.")
    before, after = json.loads((folder / "cost.json").read_text())
    return {
        "seconds": after[0] - before[0],
        "bytes": after[1] - before[1],
        "seconds of imports": before[0],
        "bytes of imports": before[1],
    }


def powers(costs: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The powers of the size that seconds and bytes grow with, between the smallest and the largest."""
    first, last = next(iter(costs.values())), list(costs.values())[-1]
    if first is last:
        return {}
    growth = math.log(last["parameters"] / first["parameters"])
    return {
        tool: {
            what: math.log(max(last["tools"][tool][what], 1e-9) / max(cost[what], 1e-9)) / growth
            for what in ("seconds", "bytes")
        }
        for tool, cost in first["tools"].items()
    }


def table_of(costs: dict[str, Any], grown: dict[str, dict[str, float]]) -> Table:
    """Seconds for each 100 million weights and bytes for each weight, and how both grow."""
    table = Table("tool", *costs, "grows with", title="CPU seconds per 100 million weights, bytes per weight")
    for tool in next(iter(costs.values()))["tools"]:
        cells = []
        for each in costs.values():
            cost, parameters = each["tools"][tool], each["parameters"]
            cells.append(f"{cost['seconds'] / parameters * 1e8:.1f} s, {cost['bytes'] / parameters:.1f} B")
        power = grown.get(tool)
        shown = "" if power is None else f"n^{power['seconds']:.2f}, n^{power['bytes']:.2f}"
        faster = power is not None and max(power.values()) > POWER
        table.add_row(tool, *cells, f"[red]{shown}[/red]" if faster else shown)
    return table


main = program(Options, run, name="python -m evaluation.experiments.tool_costs")

if __name__ == "__main__":
    sys.exit(main())
