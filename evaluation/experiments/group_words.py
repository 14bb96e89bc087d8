"""
Does invariance help to capture symmetry in data? Products in groups: see `--help`.

A word is a row of elements of a finite group; after each of them the model is to name the product so far. Models learn
words of one length and are asked for new ones of that length and for longer ones, which nothing but the rule of the
group can answer. Groups: steps of a rotation in the plane (cyclic, a subgroup of SO(2)), all permutations of three
things (S3), the rotations of a cube (octahedral, as permutations of its four diagonals), those of an icosahedron
(A5, the smallest group that is not solvable).

Learning rates of every model are swept on the first seed, by the loss on new words of the trained length, and the best
one is repeated with the other seeds.
"""

import math
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table
from sympy.combinatorics import PermutationGroup
from sympy.combinatorics.named_groups import AlternatingGroup, CyclicGroup, SymmetricGroup
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainingArguments

from rigpt_hf import RiGPTConfig, RiGPTForCausalLM
from rigpt_hf.checkpoints.folder import check_output, new_folder
from rigpt_hf.command_line import WRITES
from rigpt_hf.dataclass_options import program
from rigpt_hf.pictures import figure, picture, save
from rigpt_hf.pictures.style import BESIDE, Figure
from rigpt_hf.terminal import Console

from .common import VERSIONS, band, check_heads, check_known, check_least, sweep, write_json


# Steps of 30 degrees; as the rotations of a cube exchange its diagonals, they are all permutations of four things.
GROUPS = {
    "SO(2) steps": lambda: CyclicGroup(12),
    "S3": lambda: SymmetricGroup(3),
    "octahedral": lambda: SymmetricGroup(4),
    "A5": lambda: AlternatingGroup(5),
}
ADAMW_RATES, EQUIVARIANT_RATES = (1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 3e-2)
# Held-out words of each length.
HELD_OUT = 256
# Of all words of a training, which are drawn at once: 8 bytes each, some four times.
MOST_ELEMENTS = 2**26


@dataclass(frozen=True)
class Contender:
    """A model, and how it is trained: its options, its optimizer and the rates to sweep."""

    options: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "equivariant"

    @property
    def rates(self) -> tuple[float, ...]:
        return EQUIVARIANT_RATES if self.optimizer == "equivariant" else ADAMW_RATES


CONTENDERS = {
    "stock GPT-2": Contender(optimizer="adamw_torch"),
    "RiGPT": Contender(),
    "RiGPT, AdamW": Contender(optimizer="adamw_torch"),
    "RiGPT, learned positions": Contender({"position_embedding_type": "learned"}),
    "RiGPT, squared distance": Contender({"attention_score": "squared_distance"}),
    "RiGPT, no q/k norm": Contender({"qk_norm": False}),
}


@dataclass(frozen=True)
class Options:
    """The learners, their words, and the training."""

    only: Annotated[str, {"help": f"Some of {', '.join(CONTENDERS)}; separated by semicolons."}] = ";".join(CONTENDERS)
    groups: Annotated[str, {"help": f"Some of {', '.join(GROUPS)}; separated by commas."}] = ",".join(GROUPS)
    seeds: int = 3
    """Seeds at the best rate; the sweep is done with the first."""
    rates: Annotated[str, {"show_default": "each model's own"}] = ""
    """Learning rates to sweep, separated by commas."""
    steps: int = 800
    """Steps of training."""
    batch: int = 64
    """Words per step."""
    length: int = 8
    """Elements of a word that is trained on."""
    longer: int = 16
    """Elements of the longest held-out words."""
    hidden_size: int = 64
    """Stream size."""
    layers: int = 3
    """Number of layers."""
    heads: int = 4
    """Attention heads."""
    output: Annotated[Path, WRITES] = Path("runs/group-words")
    """Folder for results.json and the figure."""
    force: bool = False
    """Replace an earlier result."""

    def __post_init__(self):
        check_known("only", self.contenders, CONTENDERS)
        check_known("groups", self.group_names, GROUPS)
        for name in self.contenders:
            self.sweep(name)
        check_least(self, seeds=1, steps=1, batch=1, length=1)
        check_heads(self)
        if self.longer <= self.length:
            raise ValueError(f"`longer` must be more than `length`, got {self.longer} and {self.length}.")

    @property
    def contenders(self) -> list[str]:
        return [name.strip() for name in self.only.split(";")]

    @property
    def group_names(self) -> list[str]:
        return [name.strip() for name in self.groups.split(",")]

    def sweep(self, name: str) -> tuple[float, ...]:
        """The rates that a contender is trained with."""
        try:
            swept = tuple(float(rate) for rate in self.rates.split(",")) if self.rates else CONTENDERS[name].rates
        except ValueError:
            swept = ()
        if not swept or not all(0 < rate < math.inf for rate in swept):
            raise ValueError(f"`rates` must be positive numbers separated by commas, got {self.rates!r}.")
        return swept


def multiplication_table(group: PermutationGroup) -> np.ndarray:
    """`[n, n]`: the number of the element that is `i` followed by `j`, elements in sympy's order."""
    elements = np.array([element.array_form for element in group.elements])
    number = {tuple(element): index for index, element in enumerate(elements)}
    # `second[first]` takes every point where `first` and then `second` takes it.
    return np.array([[number[tuple(second[first])] for second in elements] for first in elements])


class Words(torch.utils.data.Dataset):
    """
    Random words and their products: `input_ids` `[length + 1]`, a word and an end; `labels` `[length + 1]`, for every
    position but the first the product of what comes before it, so that the library's shifted loss asks for it.

    Args:
        table (`np.ndarray` of shape `[n, n]`): Of the group.
        count, length (`int`): Words, and elements in each.
        seed (`int`): Of the draw.

    Raises:
        ValueError: if they would not fit into memory.
    """

    def __init__(self, table: np.ndarray, count: int, length: int, seed: int):
        if count * length > MOST_ELEMENTS:
            raise ValueError(
                f"`steps`, `batch` and `length` must ask for at most {MOST_ELEMENTS:,} elements together, got "
                f"{count:,} words of {length:,}. Take less of one of them."
            )
        words = np.random.default_rng(seed).integers(0, len(table), (count, length))
        products = words.copy()
        for place in range(1, length):
            products[:, place] = table[products[:, place - 1], words[:, place]]
        edge = np.full((count, 1), len(table))
        self.input_ids = torch.from_numpy(np.concatenate([words, edge], axis=1))
        self.labels = torch.from_numpy(np.concatenate([np.full((count, 1), -100), products], axis=1))

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}


def make_model(name: str, vocabulary: int, options: Options, seed: int) -> nn.Module:
    """A contender with random weights."""
    torch.manual_seed(seed)
    positions = options.longer + 1
    if name == "stock GPT-2":
        sizes = {"n_embd": options.hidden_size, "n_layer": options.layers, "n_head": options.heads}
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        ends = {"bos_token_id": None, "eos_token_id": None}
        return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_positions=positions, **sizes, **dropout, **ends))
    settings: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": options.hidden_size,
        "embedding_size": options.hidden_size,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "max_position_embeddings": positions,
        "hidden_act": "relu2",
        "qk_norm": True,
    }
    return RiGPTForCausalLM(RiGPTConfig(**(settings | CONTENDERS[name].options)))


def train(name: str, table: np.ndarray, options: Options, rate: float, seed: int) -> nn.Module:
    """Train a contender on words that its seed draws."""
    model = make_model(name, len(table) + 1, options, seed)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=options.batch,
            max_steps=options.steps,
            learning_rate=rate,
            weight_decay=0.1,
            adam_beta2=0.95,
            warmup_steps=min(40, options.steps // 4),
            lr_scheduler_type="linear",
            optim=CONTENDERS[name].optimizer,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        # Words of training have seeds of their own, away from those of the held-out ones.
        words = Words(table, options.steps * options.batch, options.length, seed=1000 + seed)
        trainer = Trainer(model, arguments, train_dataset=words)
        trainer.remove_callback(PrinterCallback)  # the bar of all runs says enough
        trainer.train()
    return model.eval()


@torch.no_grad()
def measure(model: nn.Module, table: np.ndarray, options: Options) -> dict[str, Any]:
    """Loss at the trained length, and the fraction correct at every place of longer words."""
    words = Words(table, HELD_OUT, options.longer, seed=0)
    device = next(model.parameters()).device
    logits = model(input_ids=words.input_ids.to(device), use_cache=False).logits[:, :-1].double().cpu()
    asked = words.labels[:, 1:]
    short = slice(0, options.length)
    loss = nn.functional.cross_entropy(logits[:, short].flatten(0, 1), asked[:, short].flatten())
    right = (logits.argmax(-1) == asked).double().mean(dim=0)
    return {
        "loss": float(loss),
        "accuracy": right.tolist(),
        "trained_length": float(right[short].mean()),
        "longer": float(right[options.length :].mean()),
    }


def run(options: Options, console: Console | None = None) -> dict[str, Any]:
    """
    Compare RiGPT, its ablations and stock GPT-2 on products in finite groups.

    Defaults take about an hour on one core. A quick look at one group:

        python -m evaluation.experiments.group_words --groups S3 --seeds 1 --steps 200
    """
    console = console or Console()
    seen = check_output(options.output, None, options.force, "output")
    runs = []
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as progress:
        total = sum(len(options.sweep(name)) + options.seeds - 1 for name in options.contenders)
        task = progress.add_task("words", total=total * len(options.group_names))
        for group in options.group_names:
            table = multiplication_table(GROUPS[group]())
            for name in options.contenders:

                def one(rate: float, seed: int, group=group, name=name, table=table) -> dict[str, Any]:
                    progress.update(task, description=f"{group}: {name}, rate {rate:g}, seed {seed}")
                    model = train(name, table, options, rate, seed)
                    found = {"group": group, "model": name, "rate": rate, "seed": seed}
                    found |= {"parameters": sum(p.numel() for p in model.parameters())}
                    runs.append(found | measure(model, table, options))
                    progress.advance(task)
                    return runs[-1]

                for result in sweep(one, options.sweep(name), options.seeds, "loss")[1]:
                    result["chosen"] = True
    results = {
        "versions": VERSIONS,
        "options": asdict(options),
        "chance": {name: 1 / int(GROUPS[name]().order()) for name in options.group_names},
        "held_out_words": HELD_OUT,
        "runs": runs,
    }
    with new_folder(options.output, seen, "output") as folder:
        write_json(folder / "results.json", results)
        save(plot(results, options), folder / "group-words.png")
    console.print(as_table(results, options))
    return results


def chosen(results: dict[str, Any], group: str, name: str) -> list[dict[str, Any]]:
    """The runs of one contender on one group at its best rate."""
    return [run for run in results["runs"] if run.get("chosen") and (run["group"], run["model"]) == (group, name)]


def as_table(results: dict[str, Any], options: Options) -> Table:
    """Accuracy at the trained length and beyond it: means over seeds with least and largest."""
    table = Table("model", *options.group_names, title="fraction correct at the trained length / beyond it")
    for name in options.contenders:
        cells = []
        for group in options.group_names:
            parts = []
            for key in ("trained_length", "longer"):
                values = [run[key] for run in chosen(results, group, name)]
                parts.append(f"{statistics.mean(values):.0%} ({min(values):.0%}–{max(values):.0%})")
            cells.append(" / ".join(parts))
        table.add_row(name, *cells)
    return table


@picture
def plot(results: dict[str, Any], options: Options) -> Figure:
    """Accuracy by the length of the word: one panel per group, a band from the worst seed to the best."""
    title = f"Products in groups that are named right, by the length of the word (trained up to {options.length})"
    made, panels = figure(len(options.group_names), title=title, width=3.4, height=2.8, sharey=True)
    for panel, group in zip(panels, options.group_names, strict=True):
        places = range(1, options.longer + 1)
        for name in options.contenders:
            curves = np.array([run["accuracy"] for run in chosen(results, group, name)])
            band(panel, places, curves, name, alpha=0.15)
        panel.axvline(options.length + 0.5, color="0.6", linestyle=":")
        panel.axhline(results["chance"][group], color="0.6", linewidth=0.8)
        panel.set(title=group, xlabel="length of the word", ylim=(0, 1.02))
    for first in panels[::BESIDE]:
        first.set_ylabel("fraction correct")
    made.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return made


main = program(Options, run, name="python -m evaluation.experiments.group_words")

if __name__ == "__main__":
    sys.exit(main())
