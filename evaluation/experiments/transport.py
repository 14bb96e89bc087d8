"""
The worth of adapters and autoencoders in relatives: `python -m evaluation.experiments.transport --help`.

A small RiGPT A learns one half of a text, a LoRA on it the text in capitals, a sparse autoencoder its hidden states.
Both are then used with relatives of A: A trained on with the other half, in a disguise; and B, which learned the
first half from other initial weights and in another order. They are used as they are, and carried through the
alignment that is found from the weights alone (`rigpt_hf.symmetry.transport`). Between a model and its disguise that
is exact; here it is measured what it is worth where the two are different functions.

Explained variance is 1 - |x - x̂|² / |x - mean x|² over all positions of held-out windows; losses are nats per token
on held-out text in capitals. The autoencoder is the standard one, with an L1 penalty on its features (Bricken et al.,
Towards Monosemanticity, 2023).
"""

import copy
import math
import platform
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import peft
import torch
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table
from torch import nn

from rigpt_hf import RiGPTConfig, RiGPTForCausalLM
from rigpt_hf.checkpoints.folder import check_output, new_folder
from rigpt_hf.command_line import READS, WRITES
from rigpt_hf.dataclass_options import program
from rigpt_hf.groups import orthogonal
from rigpt_hf.symmetry import GaugeTransformation, find_alignment, transport
from rigpt_hf.symmetry.transport import transport_adapter
from rigpt_hf.terminal import Console
from rigpt_hf.text.corpus import gather_documentation, read_text
from rigpt_hf.text.tokenizer import LARGEST, split, token_row, train_tokenizer
from rigpt_hf.training.options import POSITIVE, check

from .common import VERSIONS, check_heads, check_least, training_step, write_json
from .merging import HELD_OUT_WINDOWS, MEGABYTE, spread


AS_IT_IS, CARRIED, KNOWN, FITTED, OWN, WITHOUT = (
    "as it is",
    "carried through the alignment",
    "carried through the known disguise",
    "carried through a rotation fitted to hidden states",
    "made for that model",
    "none",
)
TUNED, OTHER = "A trained on, disguised", "B, from another seed"
ROWS = 1024  # hidden states per step of an autoencoder


@dataclass(frozen=True)
class Options:
    """The models, what is made for them, and what is measured."""

    runs: int = 3
    """How many pairs A and B; no model is in two of them."""
    seed: int = 0
    """Seed of the first model; the others follow."""
    hidden_size: int = 64
    """Stream size."""
    layers: int = 2
    """Number of layers."""
    heads: int = 2
    """Attention heads."""
    vocabulary: int = 512
    """Tokens of the tokenizer that is trained on the text, also in capitals."""
    context: int = 64
    """Tokens per window."""
    batch: int = 16
    """Windows per step."""
    steps: int = 300
    """Steps of AdamW for A and B."""
    learning_rate: float = 4e-3
    """The largest learning rate of A and B."""
    tuning_steps: int = 100
    """Steps with which A is trained on."""
    tuning_rate: float = 2e-3
    """The largest learning rate of these."""
    rank: int = 8
    """Rank of the LoRA, which is on all linear maps of the layers."""
    adapter_steps: int = 150
    """Steps of the LoRA."""
    features: int = 256
    """Features of the autoencoder."""
    feature_steps: int = 300
    """Steps of the autoencoder."""
    sparsity: float = 0.03
    """Weight of the L1 penalty beside the unexplained share of the variance."""
    megabytes: float = 3.0
    """How much documentation to gather at most."""
    text: Annotated[Path | None, READS] = None
    """Text to learn instead of documentation."""
    output: Annotated[Path, WRITES] = Path("runs/transport")
    """Folder to make, with results.json."""
    force: bool = False
    """Replace an earlier result in OUTPUT."""

    def __post_init__(self):
        check_least(self, runs=1, steps=2, tuning_steps=2, adapter_steps=2, feature_steps=2, batch=1, context=2)
        check_least(self, rank=1, features=1, sparsity=0)
        check(self, POSITIVE, "learning_rate", "tuning_rate", "megabytes")
        check_heads(self)
        if not 256 < self.vocabulary <= LARGEST:
            raise ValueError(
                f"`vocabulary` must be more than the 256 bytes and at most {LARGEST:,}, got {self.vocabulary}."
            )
        self.config(self.vocabulary)  # has checks of its own

    @property
    def hook(self) -> str:
        """The point whose hidden states the autoencoder learns: after the layers of the first half."""
        return f"blocks.{(self.layers - 1) // 2}.hook_resid_post"

    def config(self, tokens: int) -> RiGPTConfig:
        """The configuration of all models."""
        return RiGPTConfig(
            vocab_size=tokens,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=self.context,
        )


@dataclass(frozen=True)
class Texts:
    """Windows `[N, context]`: two halves to learn, the text in capitals, and what is held out of both."""

    first: torch.Tensor
    second: torch.Tensor
    capitals: torch.Tensor
    held_out: torch.Tensor
    held_out_capitals: torch.Tensor
    vocabulary: int
    what: str


def prepare(options: Options) -> Texts:
    """The text, read and cut."""
    if options.text is not None:
        passages, what = read_text(options.text), options.text.name
    else:
        passages = gather_documentation(int(options.megabytes * MEGABYTE))
        size = sum(len(passage.encode()) for passage in passages) / MEGABYTE
        what = f"{size:.1f} MB of documentation of the installed Python packages"
    capitals = [passage.upper() for passage in passages]
    tokenizer = train_tokenizer([*passages, *capitals], options.vocabulary)

    def windows(rows: list[str]) -> list[torch.Tensor]:
        parts = split(token_row(tokenizer, rows), options.context)
        return [part[: len(part) // options.context * options.context].view(-1, options.context) for part in parts]

    (learned, held_out), (shouted, held_out_shouted) = windows(passages), windows(capitals)
    half = len(learned) // 2
    held = (held_out[:HELD_OUT_WINDOWS], held_out_shouted[:HELD_OUT_WINDOWS])
    return Texts(learned[:half], learned[half:], shouted, *held, len(tokenizer), what)


def fit(model: nn.Module, windows: torch.Tensor, steps: int, rate: float, batch: int, seed: int) -> nn.Module:
    """Train what is trainable in a model with AdamW and one cycle of the learning rate, in place."""
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(steps * batch / len(windows))
    order = torch.cat([torch.randperm(len(windows), generator=generator) for _ in range(epochs)])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    model.train()
    for step in range(steps):
        training_step(model, optimizer, [windows[order[step * batch : (step + 1) * batch]]], max_grad_norm=1.0)
        schedule.step()
    return model.eval()


def lora(model: nn.Module, options: Options, state: dict | None = None, bias: bool = False) -> nn.Module:
    """A copy of a model with a LoRA on all linear maps of its layers: a new one, or the one given."""
    names = [name for name, module in model.named_modules() if ".layers." in name and type(module) is nn.Linear]
    settings = peft.LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=names, lora_bias=bias)
    adapted = peft.get_peft_model(copy.deepcopy(model), settings)
    if state is not None:
        peft.set_peft_model_state_dict(adapted, state)
    return adapted.eval()


@torch.no_grad()
def hidden_states(model: nn.Module, hook: str, windows: torch.Tensor) -> torch.Tensor:
    """The hidden states `[N · context, d]` after a layer."""
    states: list[torch.Tensor] = []
    layer = model.model.layers[int(hook.split(".")[1])]
    handle = layer.register_forward_hook(lambda _, inputs, output: states.append(output.flatten(0, 1)))
    try:
        for part in windows.split(64):
            model(part, use_cache=False)
    finally:
        handle.remove()
    return torch.cat(states)


def learn_features(x: torch.Tensor, options: Options, seed: int) -> dict[str, torch.Tensor]:
    """A sparse autoencoder of hidden states `x` `[N, d]`, by SAELens' names."""
    generator = torch.Generator().manual_seed(seed)
    rows = nn.functional.normalize(torch.randn(options.features, x.shape[1], generator=generator), dim=1)
    size = x.norm(dim=1).mean()
    state = {"W_enc": rows.T.clone(), "W_dec": rows.clone(), "b_enc": torch.zeros(len(rows)), "b_dec": x.mean(dim=0)}
    state = {name: tensor.requires_grad_() for name, tensor in state.items()}
    optimizer = torch.optim.Adam(state.values(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.feature_steps)
    variance = (x - x.mean(dim=0)).square().sum(dim=1).mean()
    for _ in range(options.feature_steps):
        batch = x[torch.randint(len(x), (ROWS,), generator=generator)]
        features, given_back = reconstruct(state, batch)
        missed = (batch - given_back).square().sum(dim=1).mean() / variance
        penalty = (features * state["W_dec"].norm(dim=1)).sum(dim=1).mean() / size
        optimizer.zero_grad()
        (missed + options.sparsity * penalty).backward()
        optimizer.step()
        schedule.step()
    return {name: tensor.detach() for name, tensor in state.items()}


def reconstruct(state: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features `[N, features]` of hidden states, and what they give back."""
    features = ((x - state["b_dec"]) @ state["W_enc"] + state["b_enc"]).relu()
    return features, features @ state["W_dec"] + state["b_dec"]


@torch.no_grad()
def explained(state: dict[str, torch.Tensor], x: torch.Tensor) -> float:
    """The share of the variance of hidden states that an autoencoder gives back; below 0 it is worse than the mean."""
    missed = (x - reconstruct(state, x)[1]).square().sum()
    return float(1 - missed / (x - x.mean(dim=0)).square().sum())


def with_rotation(config: RiGPTConfig, of_a: torch.Tensor, of_b: torch.Tensor) -> GaugeTransformation:
    """The rotation of the stream that brings hidden states of A nearest to those of B on the same text."""
    cross = (of_b - of_b.mean(dim=0)).double().T @ (of_a - of_a.mean(dim=0)).double()
    return GaugeTransformation(config, {"stream": orthogonal(config.hidden_size).procrustes(cross[None])})


@torch.no_grad()
def relative_change(a: nn.Module, b: nn.Module) -> float:
    """The distance of two models' weights as they are, relative to A's."""
    pairs = list(zip(a.parameters(), b.parameters(), strict=True))
    return float((sum((p - q).square().sum() for p, q in pairs) / sum(p.square().sum() for p, _ in pairs)) ** 0.5)


def measure(options: Options, texts: Texts, seed: int, step: Callable[[str], None]) -> dict[str, Any]:
    """Everything about one pair of seeds."""
    config = options.config(texts.vocabulary)

    def made(number: int) -> nn.Module:
        torch.manual_seed(number)
        return fit(RiGPTForCausalLM(config), texts.first, options.steps, options.learning_rate, options.batch, number)

    step("training A")
    a = made(seed)
    step("training B")
    b = made(seed + 1)
    step("training A on")
    tuned = fit(copy.deepcopy(a), texts.second, options.tuning_steps, options.tuning_rate, options.batch, seed + 2)
    disguise = GaugeTransformation.random(config, torch.Generator().manual_seed(seed), "all")
    relatives = {TUNED: disguise(tuned), OTHER: b}
    step("training the LoRA")
    torch.manual_seed(seed)
    adapted = fit(
        lora(a, options), texts.capitals, options.adapter_steps, options.learning_rate, options.batch, seed + 3
    )
    adapter = peft.get_peft_model_state_dict(adapted)
    step("training the autoencoders")
    seen = {name: hidden_states(model, options.hook, texts.first[:512]) for name, model in relatives.items()}
    seen_a = hidden_states(a, options.hook, texts.first[:512])
    features = learn_features(seen_a, options, seed)

    @torch.no_grad()
    def loss(model: nn.Module) -> float:
        ids = texts.held_out_capitals
        return model(ids, labels=ids, use_cache=False).loss.item()

    def with_adapter(model: nn.Module, g: GaugeTransformation | None) -> float:
        state, settings = (adapter, {}) if g is None else transport_adapter(adapter, g)
        return loss(lora(model, options, state, settings.get("lora_bias", False)))

    held_a = hidden_states(a, options.hook, texts.held_out)
    result: dict[str, Any] = {
        "seeds": (seed, seed + 1),
        "tuned_change": relative_change(a, tuned),
        "A": {
            "loss": {WITHOUT: loss(a), OWN: loss(adapted)},
            "explained_variance": {OWN: explained(features, held_a)},
            "active_features": float((reconstruct(features, held_a)[0] > 0).sum(dim=1).float().mean()),
        },
    }
    for name, model in relatives.items():
        step(f"carrying to {name}")
        found = find_alignment(a, model)
        ways = {AS_IT_IS: None, CARRIED: found.transformation} | ({KNOWN: disguise} if name == TUNED else {})
        held = hidden_states(model, options.hook, texts.held_out)
        ways_of_features = ways | {FITTED: with_rotation(config, seen_a, seen[name])}
        result[name] = {
            "distance": found.distance,
            "loss": {WITHOUT: loss(model)} | {way: with_adapter(model, g) for way, g in ways.items()},
            "explained_variance": {
                way: explained(features if g is None else transport(features, g, hook=options.hook), held)
                for way, g in ways_of_features.items()
            }
            | {OWN: explained(learn_features(seen[name], options, seed), held)},
        }
    return result


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The spread over all runs of every number of every model."""
    models = [name for name in results[0] if name in ("A", TUNED, OTHER)]
    return {
        name: {
            what: {way: spread([one[name][what][way] for one in results]) for way in results[0][name][what]}
            for what in ("loss", "explained_variance")
        }
        for name in models
    }


def as_table(summary: dict[str, Any]) -> Table:
    """The summary for the terminal."""
    table = Table("used with", "way", "loss in capitals", "explained variance", title="Means and deviations")
    for name, measured in summary.items():
        ways: Iterable[str] = dict.fromkeys([*measured["loss"], *measured["explained_variance"]])
        for way in ways:
            cells = [measured[what].get(way) for what in ("loss", "explained_variance")]
            table.add_row(name, way, *(f"{one['mean']:.3f} ± {one['deviation']:.3f}" if one else "-" for one in cells))
        table.add_section()
    return table


def run(options: Options, console: Console | None = None) -> dict[str, Any]:
    """
    Measure what adapters and autoencoders of one RiGPT are worth in its relatives, carried there and as they are.

    Defaults take about four minutes on one core. Without --text the models learn the documentation of the installed
    Python packages, which needs no network. A gentler fine-tuning, or wider models:

        python -m evaluation.experiments.transport --tuning-steps 20 --tuning-rate 1e-3 --output runs/gentle
    """
    console = console or Console()
    seen = check_output(options.output, None, options.force, "output")
    results = []
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("reading the text", total=7 * options.runs + 1)
        texts = prepare(options)
        for index in range(options.runs):
            results.append(
                measure(
                    options,
                    texts,
                    options.seed + 10 * index,
                    lambda words: progress.update(task, advance=1, description=words),
                )
            )
    summary = summarise(results)
    everything = {
        "versions": VERSIONS | {"peft": peft.__version__},
        "machine": platform.machine(),
        "options": asdict(options),
        "text": texts.what,
        "training_tokens": texts.first.numel(),
        "held_out_tokens": texts.held_out.numel(),
        "hook": options.hook,
        "unit": "nats per token, share of the variance",
        "runs": results,
        "summary": summary,
    }
    with new_folder(options.output, seen, "output") as folder:
        write_json(folder / "results.json", everything)
    console.print(as_table(summary))
    console.print(f"Written to {options.output}", markup=False)
    return everything


main = program(Options, run, name="python -m evaluation.experiments.transport")

if __name__ == "__main__":
    sys.exit(main())
