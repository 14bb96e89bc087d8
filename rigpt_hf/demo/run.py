"""The stages of the demo, in order, as a person sees them."""

import copy
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from logging import NullHandler
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table
from transformers.utils import logging

from ..checkpoints.certificate import CERTIFICATE_NAME
from ..checkpoints.folder import Seen, check_output, new_folder
from ..checkpoints.read import check_ids, load_config, load_model, load_tokenizer, quiet_loading
from ..conversion import Certificate, certify, convert_model, export_model
from ..conversion.families import TARGETS, architecture_of
from ..conversion.stock_rotation import rotate_stock
from ..modeling_rigpt import RiGPTForCausalLM
from ..processes import python
from ..symmetry import GaugeTransformation
from ..terminal import Console
from ..text.corpus import gather_documentation, read_text
from ..text.tokenizer import split, token_row, train_tokenizer
from .options import DemoOptions
from .report import SHOWN_TOKENS, Findings, write_report
from .rotation import continue_both, mean_loss, measure_effect, next_token_probabilities, relative, sweep
from .stock import Recipe, train_gpt2


PROMPTS = {"trained here": "Return a new array", "real": "The meaning of a symmetry in physics is"}
MEGABYTE = 10**6


@contextmanager
def quiet_library() -> Iterator[None]:
    """Without the library's remarks about the stock model's own configuration, which nobody here can act on."""
    silence = NullHandler()
    logging.add_handler(silence)
    logging.disable_default_handler()
    try:
        yield
    finally:
        logging.enable_default_handler()
        logging.remove_handler(silence)


class Stages:
    """Says what is being done and keeps how long it took."""

    def __init__(self, console: Console):
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, what: str):
        self.console.rule(f"[bold]{len(self.seconds) + 1}. {escape(what)}", align="left")
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def run_demo(options: DemoOptions, console: Console | None = None) -> Path:
    """
    Run the demo and return the path of the report.

    Raises:
        ValueError: if an option is impossible or the output exists and `force` is not given.
    """
    console = console or Console()
    seen = check_output(options.folder, None, options.force, "output")
    with quiet_library():
        return _run(options, console, seen)


def _run(options: DemoOptions, console: Console, seen: Seen) -> Path:
    stages = Stages(console)
    source, stock, tokenizer, windows, training = obtain_stock(options, console, stages)
    windows = windows.to(stock.device)
    with stages.stage("convert", "Convert it into a RiGPT and certify that it is the same function"):
        model, certificates = convert_and_certify(stock, windows, console)
    with stages.stage("rotate", "Turn the whole hidden space by a random rotation"):
        turned = turn(model, stock, tokenizer, windows, options, console)
    with new_folder(options.folder, seen, "output") as folder:
        with stages.stage("save", "Save it, and load it back as anyone would"):
            with quiet_loading():
                model.save_pretrained(folder / "model")
            tokenizer.save_pretrained(folder / "model")
            (folder / "model" / CERTIFICATE_NAME).write_text(certificates[0].to_json(), encoding="utf-8")
            loaded_back = load_back(folder / "model", windows, model)
            as_remote_code = load_in_fresh_process(folder / "model", windows, model)
            console.print(f"largest logit difference after loading back: {loaded_back:.1e}")
            console.print(f"in a fresh process, from the code in the folder: {as_remote_code:.1e}")
        findings = Findings(
            source=source,
            parameters=stock.num_parameters(),
            seconds=stages.seconds,
            certificates=certificates,
            loaded_back=loaded_back,
            loaded_as_remote_code=as_remote_code,
            seed=options.seed,
            **turned,
            **training,
        )
        write_report(findings, folder)
    report = options.folder / "report.md"
    console.rule("[bold green]Done", align="left")
    places = {"Report": report, "Figure": options.folder / "rotation.png", "Model": options.folder / "model"}
    console.print("\n".join(f"{name + ':':<8}{place}" for name, place in places.items()), markup=False)
    return report


def convert_and_certify(
    stock: Any, windows: torch.Tensor, console: Console
) -> tuple[RiGPTForCausalLM, list[Certificate]]:
    """The RiGPT, and its certificates in the source's dtype and in float64."""
    model, wide = convert_model(stock).eval(), copy.deepcopy(stock).double()
    certificates = [certify(stock, model, windows), certify(wide, convert_model(wide), windows)]
    for certificate in certificates:
        console.print(str(certificate), highlight=False, markup=False)
        certificate.check()
    return model, certificates


def turn(
    model: RiGPTForCausalLM, stock: Any, tokenizer: Any, windows: torch.Tensor, options: DemoOptions, console: Console
) -> dict[str, Any]:
    """The measurements of one random rotation, by the names of `Findings`."""
    prompt = options.prompt or PROMPTS["trained here" if options.model is None else "real"]
    generator = torch.Generator().manual_seed(options.seed)
    g = GaugeTransformation.random(model.config, generator, ("stream", "head"), special=True)
    effect = measure_effect(model, g, tokenizer, windows, prompt)
    turned = g(model)
    stream = GaugeTransformation(model.config, {"stream": g.elements["stream"]})
    turned_stock = rotate_stock(stock, g.elements["stream"][0])
    stock_loss = mean_loss(stock, windows), mean_loss(turned_stock, windows)
    with torch.no_grad():
        stock_logits = relative(*(each(windows, use_cache=False).logits for each in (turned_stock, stock)))
    stock_text = continue_both((stock, turned_stock), tokenizer, prompt, sample=True)
    show_effect(console, effect, stock_loss, stock_logits, stock_text)
    with Progress(console=console) as progress:
        task = progress.add_task("walking along the rotation", total=options.points)
        walk = sweep(model, stock, stream, windows, options.points, lambda: progress.advance(task))
    probabilities, tokens = likely_tokens(model, turned, stock, turned_stock, tokenizer, prompt)
    is_gpt2 = architecture_of(stock.config).family is TARGETS["gpt2"].family
    return {
        "prompt": prompt,
        "effect": effect,
        "sweep": walk,
        "stock_loss": stock_loss,
        "stock_logits": stock_logits,
        "stock_text": stock_text,
        "round_trip": certify(stock, export_model(turned, "gpt2"), windows).check() if is_gpt2 else None,
        "probabilities": probabilities,
        "tokens": tokens,
    }


def obtain_stock(
    options: DemoOptions, console: Console, stages: Stages
) -> tuple[str, Any, Any, torch.Tensor, dict[str, Any]]:
    """The stock model: its description, itself, its tokenizer, held-out windows `[batch, seq]`, facts of training."""
    if options.model is not None:
        with stages.stage("load", f"Load {options.model}"):
            # Before gigabytes are fetched in vain.
            architecture_of(load_config(options.model, argument="model"))
            tokenizer = load_tokenizer(options.model, argument="model")
            check_ids(tokenizer, load_config(options.model, argument="model"), options.model)
            stock = load_model(options.model, argument="model", allow_unexpected=True).eval()
            architecture_of(stock.config, type(stock).__name__)
            with Progress(console=console) as progress:
                passages = documentation(1.0, options.seed, progress)
            tokens = token_row(tokenizer, passages)
            length = min(128, stock.config.max_position_embeddings)
            windows = tokens[: 4 * length].view(4, length)
        return options.model, stock, tokenizer, windows, {}

    recipe = replace(Recipe(), steps=options.training_steps)
    with stages.stage("text", "Gather English text"):
        if options.text is not None:
            passages, corpus = read_text(options.text), options.text.name
        else:
            with Progress(console=console) as progress:
                passages = documentation(options.megabytes, options.seed, progress)
            size = sum(len(passage.encode()) for passage in passages) / MEGABYTE
            corpus = f"{size:.1f} MB of documentation of the installed Python packages"
        console.print(f"{len(passages)} passages, {corpus}", markup=False)
    with stages.stage("tokenize", "Train a byte-level tokenizer"):
        tokenizer = train_tokenizer(passages, recipe.vocabulary)
        tokens, held_out = split(token_row(tokenizer, passages), recipe.context)
        console.print(f"{len(tokenizer)} tokens in the vocabulary, {len(tokens) / 1e6:.2f} M tokens to train on")
    with stages.stage("train", "Train a stock GPT-2 on it"):
        with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as progress:
            task = progress.add_task("training", total=recipe.steps)

            def tick(loss: float | None):
                progress.update(
                    task, advance=1, description="training" if loss is None else f"training, loss {loss:.2f}"
                )

            stock, curve = train_gpt2(tokens, tokenizer, recipe, options.seed, tick)
        windows = held_out[: 4 * recipe.context].view(4, recipe.context)
        console.print(f"loss on held-out text: {mean_loss(stock, windows.to(stock.device)):.3f} nats per token")
    return "a stock GPT2LMHeadModel", stock, tokenizer, windows, {"curve": curve, "corpus": corpus}


def documentation(megabytes: float, seed: int, progress: Progress) -> list[str]:
    """`gather_documentation` behind a progress bar."""
    task = progress.add_task("reading the installed packages", total=None)
    # The part that `rigpt evaluate` measures on is left out.
    return gather_documentation(int(megabytes * MEGABYTE), seed, lambda n: progress.advance(task, n), part="training")


def show_effect(
    console: Console, effect: Any, stock_loss: tuple[float, ...], stock_logits: float, stock_text: tuple[str, ...]
):
    """The table and the texts that a person compares."""
    table = Table("", "RiGPT", "stock GPT-2", title="The same rotation of the hidden space")
    table.add_row("weights, relative change", f"{effect.weights:.2f}", "")
    table.add_row("hidden states, relative change", f"{effect.hidden_states:.2f}", "")
    table.add_row("hidden states against the turned ones", f"{effect.equivariance:.1e}", "")
    table.add_row("logits, relative change", f"[green]{effect.logits:.1e}", f"[red]{stock_logits:.1e}")
    table.add_row(
        "loss, before and after",
        f"[green]{effect.loss_before:.4f} -> {effect.loss_after:.4f}",
        f"[red]{stock_loss[0]:.4f} -> {stock_loss[1]:.4f}",
    )
    console.print(table)
    for title, pair in (
        ("RiGPT, greedy", effect.greedy),
        ("RiGPT, sampled with one seed", effect.sampled),
        ("stock GPT-2, sampled with that seed", stock_text),
    ):
        verdict = "[green]identical" if pair[0] == pair[1] else "[red]different"
        console.print(f"[bold]{title}[/bold]: {verdict}")
        for name, text in zip(("before", "after "), pair, strict=True):
            console.print(f"  {name} {text!r}", highlight=False, markup=False)


def likely_tokens(
    model: Any, turned: Any, stock: Any, turned_stock: Any, tokenizer: Any, prompt: str
) -> tuple[dict[str, Any], list[str]]:
    """Probabilities before and after of the tokens that are likeliest before, and these tokens as text."""
    distributions = [
        next_token_probabilities(each, tokenizer, prompt) for each in (model, turned, stock, turned_stock)
    ]
    best = distributions[0].topk(SHOWN_TOKENS).indices
    picked = [distribution[best].tolist() for distribution in distributions]
    return {"RiGPT": picked[:2], "stock GPT-2": picked[2:]}, [repr(tokenizer.decode(int(index))) for index in best]


@torch.no_grad()
def load_back(folder: Path, windows: torch.Tensor, model: Any) -> float:
    """Largest difference of logits after loading through the Auto classes, with the tokenizer."""
    load_tokenizer(folder)
    loaded = load_model(folder).eval().to(windows.device)
    return (loaded(windows).logits - model(windows).logits).abs().max().item()


@torch.no_grad()
def load_in_fresh_process(folder: Path, windows: torch.Tensor, model: Any) -> float:
    """The same in a process that never imports this package and trusts the code in the folder."""
    inputs, outputs = folder.parent / "windows.pt", folder.parent / "logits.pt"
    torch.save(windows.cpu(), inputs)
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM; "
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval(); "
        "assert 'rigpt_hf' not in sys.modules; "
        "windows = torch.load(sys.argv[2], weights_only=True); "
        "torch.save(model(windows).logits.detach(), sys.argv[3])"
    )
    environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = python("-c", script, folder, inputs, outputs)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"Loading {folder} in a fresh process failed:\n{done.stderr.strip()}")
    logits = torch.load(outputs, weights_only=True)
    inputs.unlink()
    outputs.unlink()
    return (logits - model(windows).logits.cpu()).abs().max().item()
