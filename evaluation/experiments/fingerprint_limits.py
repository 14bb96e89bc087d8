"""
What a fingerprint costs, and what it gives away: `python -m evaluation.experiments.fingerprint_limits --help`.

Cost: Llama checkpoints of growing sizes with random weights are written to disk, and a process of its own makes the
fingerprint of each.

Limits, on a small trained model A, by descent through the fingerprint itself:

- *rebuild*: from random weights towards A's fingerprint. How good a language model is what comes out?
- *forge*: an independently trained model towards A's fingerprint, while it stays a language model. A near fingerprint
  proves nothing against somebody who made it on purpose.
- *evade*: a copy of A away from A's fingerprint, while it stays a language model.
- the last two against *any probes*: others at every step, as nobody knows those that `rigpt diff` will have.

Each is looked at with the probes of the attack, and with those that the result itself chooses, as `rigpt diff` does.
"""

import copy
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.checkpoints.folder import check_file
from rigpt_hf.command_line import WRITES
from rigpt_hf.dataclass_options import program
from rigpt_hf.processes import python
from rigpt_hf.symmetry import fingerprint, gauge_distance
from rigpt_hf.symmetry.fingerprint import salt_of
from rigpt_hf.symmetry.sketch import sketch
from rigpt_hf.terminal import Console
from rigpt_hf.text.tokenizer import split

from . import merging
from .common import VERSIONS, check_known, check_least, write_json


SIZES: dict[str, dict[str, int]] = {
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
    "360M": {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15},
    "1.5B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 28, "num_attention_heads": 32},
}
# A process that says what importing takes, and what a fingerprint takes besides: CPU seconds, and kB at the peak.
CHILD = """
import json, resource, sys, time
from rigpt_hf.symmetry import fingerprint
def used():
    return [time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]
before = used()
made = fingerprint(sys.argv[1])
print(json.dumps([before, used(), len(made.to_bytes()), made.sketches.numel(), made.facts["parameters"]]))
"""


@dataclass(frozen=True)
class Options:
    """The sizes, and the attacks."""

    sizes: Annotated[list[str], {"help": f"Some of {', '.join(SIZES)}, or none."}] = field(
        default_factory=lambda: list(SIZES)
    )
    steps: int = 600
    """Steps of Adam of every attack, and of training each of the two models."""
    learning_rate: float = 2e-3
    """The rate of the attacks."""
    seed: int = 0
    """Seed of everything."""
    output: Annotated[Path | None, WRITES] = None
    """File for the numbers, JSON."""

    def __post_init__(self):
        if self.sizes:
            check_known("sizes", self.sizes, SIZES)
        check_least(self, steps=2, learning_rate=0)


def write_synthetic(folder: Path, size: dict[str, int]) -> int:
    """
    A Llama checkpoint with random weights in bfloat16, a shard per layer, none of it in memory as a whole; the number
    of its parameters.
    """
    fields = {"vocab_size": 49152, "num_key_value_heads": size["num_attention_heads"]} | size
    config = LlamaConfig(tie_word_embeddings=True, **fields)
    config.architectures = [LlamaForCausalLM.__name__]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        layer = name.split(".")[2] if ".layers." in name else "ends"
        shards.setdefault(f"model-{layer}.safetensors", []).append(name)
    for file, names in shards.items():
        tensors = {name: torch.randn(shapes[name], generator=generator).mul_(0.02).bfloat16() for name in names}
        save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return sum(shape.numel() for shape in shapes.values())


def cost(size: dict[str, int]) -> dict[str, float]:
    """The cost of a fingerprint of a checkpoint of this size."""
    with tempfile.TemporaryDirectory() as folder:
        write_synthetic(Path(folder), size)
        said = subprocess.run(python("-c", CHILD, folder), capture_output=True, text=True, check=True).stdout
    before, after, size_in_bytes, numbers, parameters = json.loads(said.splitlines()[-1])
    return {
        "parameters": parameters,
        "seconds_of_import": before[0],
        "seconds": after[0] - before[0],
        "megabytes_of_import": before[1] / 1e3,
        "megabytes_besides": (after[1] - before[1]) / 1e3,
        "largest_tensor_megabytes": 49152 * size["hidden_size"] * 2 / 1e6,
        "file_kilobytes": size_in_bytes / 1e3,
        "numbers_per_parameter": numbers / parameters,
    }


def apart(model: nn.Module, target: nn.Module, probes: int, salt: int) -> torch.Tensor:
    """The distance of the fingerprints of two models of one shape, differentiable in the first."""
    sides = []
    for side, is_fixed in ((model, False), (target, True)):
        weights = {name: weight.detach() if is_fixed else weight for name, weight in side.named_parameters()}
        sides.append(sketch(side.config, tuple(weights), weights.__getitem__, probes, salt))
    return 1 - (sides[0] * sides[1]).flatten(2).sum(-1).mean()


@dataclass(frozen=True)
class Attack:
    """
    Descent towards A's fingerprint, or away from it.

    Args:
        start (`str`): the model that it begins with.
        away (`bool`): from A's fingerprint, not towards it.
        keeps (`bool`): the loss on text counts, too.
        any_probes (`bool`): against other probes at every step, not those of files.
    """

    start: str
    away: bool = False
    keeps: bool = True
    any_probes: bool = False


ATTACKS = {
    "rebuild": Attack("random", keeps=False),
    "forge": Attack("independent"),
    "forge, any probes": Attack("independent", any_probes=True),
    "evade": Attack("A", away=True),
    "evade, any probes": Attack("A", away=True, any_probes=True),
}


def descend(
    attack: Attack, models: dict[str, nn.Module], windows: torch.Tensor, options: Options, progress: Callable[[], Any]
) -> nn.Module:
    """The result of the descent from a copy of the model that it begins with."""
    model = copy.deepcopy(models[attack.start]).train()
    probes = fingerprint(models["A"]).sketches.shape[-1]
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
    generator = torch.Generator().manual_seed(options.seed)
    for step in range(options.steps):
        salt = step + 1 if attack.any_probes else 0
        objective = (-1 if attack.away else 1) * apart(model, models["A"], probes, salt)
        if attack.keeps:
            batch = windows[torch.randint(len(windows), (16,), generator=generator)]
            objective = objective + model(batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
        progress()
    return model.eval()


def fresh_distance(a: nn.Module, b: nn.Module) -> float:
    """The distance that `rigpt diff` finds, with probes that the weights of both choose."""
    salt = salt_of(a, b)
    return fingerprint(a, salt=salt).distance(fingerprint(b, salt=salt))


def limits(options: Options, progress: Progress) -> dict[str, Any]:
    """The model that an optimizer makes of a fingerprint."""
    settings = merging.Options(steps=options.steps)
    tokens, vocabulary, what = merging.obtain_tokens(settings, progress)
    config, rows = settings.config(vocabulary), split(tokens, settings.context)
    windows, held_out = (
        row[: len(row) // settings.context * settings.context].view(-1, settings.context) for row in rows
    )
    held_out = held_out[: merging.HELD_OUT_WINDOWS]
    trained = []
    for seed in (options.seed, options.seed + 1):
        task = progress.add_task(f"training model {seed}", total=options.steps)
        trained.append(
            merging.train(config, windows, settings, seed, lambda _, task=task: progress.advance(task))  # type: ignore[misc]
        )
    torch.manual_seed(options.seed + 2)
    fresh = RiGPTForCausalLM(config)
    own = fingerprint(trained[0])
    models = {"A": trained[0], "independent": trained[1], "random": fresh}
    for name, attack in ATTACKS.items():
        task = progress.add_task(name, total=options.steps)
        models[name] = descend(attack, models, windows, options, lambda task=task: progress.advance(task))  # type: ignore[misc]

    @torch.no_grad()
    def loss(model: nn.Module) -> float:
        return float(model(held_out, labels=held_out, use_cache=False).loss)

    return {
        "text": what,
        "parameters": fresh.num_parameters(),
        "numbers": own.sketches.numel(),
        "models": {
            name: {
                "loss": loss(model),
                "fingerprint": own.distance(fingerprint(model)),
                "fresh_probes": fresh_distance(trained[0], model),
                "weights": gauge_distance(model, trained[0], max_sweeps=20),
            }
            for name, model in models.items()
        },
    }


def run(options: Options, console: Console | None = None) -> dict[str, Any]:
    """
    Measure what fingerprints cost on disk-sized models, and what descent through a fingerprint can rebuild, forge and
    evade on a small one. Defaults write 3 GB to a temporary folder and take about ten minutes.

        python -m evaluation.experiments.fingerprint_limits --output evaluation/results/fingerprint_limits.json
    """
    console = console or Console()
    seen = check_file(options.output, "output", force=True)
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as progress:
        task, costs = progress.add_task("cost", total=len(options.sizes)), {}
        for name in options.sizes:
            progress.update(task, description=f"cost at {name}")
            costs[name] = cost(SIZES[name])
            progress.advance(task)
        tried = limits(options, progress)
    results = {"versions": VERSIONS, "machine": platform.machine(), "threads": torch.get_num_threads()}
    results |= {"options": asdict(options), "cost": costs, "limits": tried}
    write_json(options.output, results, seen=seen, named=True)
    table = Table("size", "parameters", "CPU s", "MB besides imports", "largest tensor", "kB", title="Cost")
    for name, row in costs.items():
        table.add_row(
            name,
            f"{row['parameters']:,}",
            f"{row['seconds']:.1f}",
            f"{row['megabytes_besides']:.0f}",
            f"{row['largest_tensor_megabytes']:.0f}",
            f"{row['file_kilobytes']:.0f}",
        )
    console.print(table)
    table = Table(
        "model",
        "loss (nats)",
        "fingerprint apart",
        "by fresh probes",
        "aligned weights apart",
        title="From and against A",
    )
    for name, row in tried["models"].items():
        table.add_row(name, *(f"{row[key]:.3f}" for key in ("loss", "fingerprint", "fresh_probes", "weights")))
    console.print(table)
    return results


main = program(Options, run, name="python -m evaluation.experiments.fingerprint_limits")

if __name__ == "__main__":
    sys.exit(main())
