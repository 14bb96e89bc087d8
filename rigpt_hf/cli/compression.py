"""Verbs that make a model smaller: fewer bits for each weight, fewer weights."""

import re
import time
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any, cast

from rich.table import Table

from ..terminal import Console
from .arguments import DTYPES, AnySource, Dtype, Force, GgufFile, Output, Revision, one_of, option
from .common import save_model, say, say_written, to_dtype


# The documentation of the installed packages; and no text at all.
DEFAULT, NONE = "default", "none"
GROUPS = ("none", "32", "64", "128")
ROUNDING, ROUNDING_FRAMES = ("gptq", "round"), ("hadamard", "own")
# What rounding takes, in the time of the model for one token.
PASSES_TO_CALIBRATE, PASSES_TO_ROUND, PASSES_TO_TUNE, TOKENS_OF_A_STEP = 3, 20_000, 6, 512
SOON = 90  # seconds for which a bar says enough
# Steps of tuning.
STEPS = 48
# Fewer tokens to calibrate on are not asked for: windows are full ones, and a part of a text judges.
ASKED_TOKENS = 2048
Calibrate = Annotated[
    str,
    option(
        "Texts to calibrate on, separated by commas: files, folders or data sets, whose ends are kept apart to judge "
        "on; default is documentation of the installed packages, none tokens drawn at random. Take what the model "
        "shall be good at."
    ),
]
Tokens = Annotated[int, option("Tokens to calibrate on, at most.")]
Judge = Annotated[int, option("Tokens of other text on which losses are measured.")]


def quantize(
    source: AnySource,
    output: Output,
    bits: Annotated[int, option("Of each weight: 4 or 8."), one_of(4, 8)] = 4,
    group: Annotated[
        str, option("Neighbours in a row that share a scale: none (the whole row), 32, 64 or 128."), one_of(*GROUPS)
    ] = "32",
    method: Annotated[
        str,
        option(
            "gptq: what a weight loses is made good by others; or round: each to the nearest, which is sooner done."
        ),
        one_of(*ROUNDING),
    ] = "gptq",
    frame: Annotated[
        str,
        option("Of the residual stream: hadamard, in which no weight stands out, or own."),
        one_of(*ROUNDING_FRAMES),
    ] = "hadamard",
    tune: Annotated[
        int | None,
        option(
            "Steps in which scales and factors of inputs learn the logits of the model, on the calibration text. 0 "
            "where llama.cpp or vLLM shall read the codes, which know no such factors.",
            "48; 0 for round and without text",
        ),
    ] = None,
    activations: Annotated[
        int | None,
        option("Bits of what matrices read: 8 or 4; simulated, so nothing gets faster.", "whole"),
        one_of(4, 8),
    ] = None,
    cache: Annotated[int | None, option("Bits of keys and values: 4; simulated.", "whole"), one_of(4)] = None,
    calibrate: Calibrate = DEFAULT,
    tokens: Tokens = 32768,
    judge: Judge = 8192,
    revision: Revision = None,
    gguf_file: GgufFile = None,
    dtype: Annotated[str, option("Of what has no codes, and of the arithmetic."), one_of(*DTYPES)] = "bfloat16",
    seed: Annotated[int, option("Of the signs of Hadamard matrices, and the order of windows in tuning.")] = 0,
    force: Force = False,
):
    """
    Round a model to 4 or 8 bits, in a frame in which rounding costs least, and measure what it costs.

    The result loads by `AutoModelForCausalLM.from_pretrained`, after `import rigpt_hf` or with the code in the folder:

        rigpt quantize HuggingFaceTB/SmolLM2-135M small

        rigpt quantize my-rigpt small --group none --calibrate text.txt
    """
    from ..checkpoints.folder import check_output
    from ..quantization import Recipe, quantize_model
    from ..quantization.recipe import check_model
    from ..quantized_rigpt import RiGPTQuantizationConfig, to_quantized

    texts = names_of(calibrate)
    if tune is not None and (tune < 0 or (tune and NONE in texts)):
        raise ValueError(
            "`tune` must be a number of steps, and 0 without text, as logits on tokens drawn at random teach nothing, "
            f"got {tune}. Take 48 or so, with a text, or 0."
        )
    steps = tune if tune is not None else STEPS if method == "gptq" and NONE not in texts else 0
    size = None if group == "none" else int(group)
    recipe = Recipe(
        bits,
        size,
        cast(Any, method),  # one of those that are known
        cast(Any, frame),
        tune=steps,
        activations=activations,
        cache=cache,
        seed=seed,
    )
    model = unquantized(source, revision, gguf_file)
    seen = check_output(output, source, force)
    larger = model.load()
    check_model(larger, recipe)
    if larger.config.depth_interpolation != "constant":
        raise ValueError(
            f"`source` must have layers of its own, got `depth_interpolation={larger.config.depth_interpolation!r}`, "
            "which adds weights of neighbours: codes cannot be added. Use a model with 'constant'."
        )
    calibration, judges = texts_for(model.place, texts, tokens, judge)
    losses = Losses(judges)
    losses.add("before", larger)
    if larger.config.depth_solver is not None:  # whose layers see many streams each, so that there are no moments
        calibration = None
    say_cost(larger, losses.seconds_per_token, 0 if calibration is None else calibration.numel(), recipe.tune)
    rounded = quantize_model(larger, recipe, calibration, progress=True)
    say(rounded.notes)
    config = RiGPTQuantizationConfig(
        bits,
        size,
        cast(int, recipe.table_bits),
        activation_bits=activations,
        cache_bits=cache,
        recipe=asdict(recipe) | {"turned": list(rounded.turns)},
    )
    written = to_quantized(rounded.model.to(to_dtype(dtype)), rounded.codes, config)
    losses.add(f"{rounded.bits_per_weight:.2f} bits per weight", written)
    losses.print()
    if recipe.simulates:
        say([f"Simulated, as no kernel computes with it: {', '.join(recipe.simulates)}."])
    facts = {"source": source, "calibrate": calibrate, "recipe": asdict(recipe), "loss": losses.to_dict()}
    save_model(written, model.place, output, seen, {"quantize.json": facts})
    size_on_disk = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    # Factors of inputs, which are tuned, have no place in such a file.
    exported = [("rigpt", "export", output, "my-gguf", "--to", "gguf")] if recipe.tune == 0 else []
    weighs = f", {size_on_disk / 1e6:.0f} MB of weights"
    say_written(output, ("rigpt", "generate", output, "TEXT"), *exported, size=weighs)


def prune(
    source: AnySource,
    output: Output,
    neurons: Annotated[float, option("Part of the neurons of every layer to leave out, such as 0.2.")] = 0.0,
    heads: Annotated[int, option("Query heads of every layer to leave out, equally many of each group.")] = 0,
    rank: Annotated[int | None, option("Dimensions of each head that stay.", "all")] = None,
    recover: Annotated[
        int,
        option(
            "Steps in which the smaller model learns the logits of the larger, each on a window of the calibration "
            "text, of which as much is read."
        ),
    ] = 0,
    lora: Annotated[
        int | None,
        option(
            "Rank of an adapter that learns in these steps and is merged, such as 32, in a quarter of the time. "
            "All weights learn if none is given.",
            "none",
        ),
    ] = None,
    learning_rate: Annotated[float | None, option("Of these steps, the highest.", "3e-5, with --lora 5e-4")] = None,
    mixed_precision: Annotated[
        str,
        option("Products in these steps: no (float32), or bf16, where the machine has them."),
        one_of("no", "bf16"),
    ] = "no",
    calibrate: Calibrate = DEFAULT,
    tokens: Tokens = 32768,
    judge: Judge = 8192,
    revision: Revision = None,
    gguf_file: GgufFile = None,
    dtype: Dtype = None,
    seed: Annotated[int, option("Of the order of windows in recovery.")] = 0,
    force: Force = False,
):
    """
    Make a smaller model: leave out neurons, heads or dimensions of heads, and fit what stays to what was there.

    The result is an ordinary RiGPT, and exports to stock classes where shapes allow:

        rigpt prune my-rigpt smaller --neurons 0.2

        rigpt prune my-rigpt smaller --neurons 0.2 --recover 500 --lora 32 --calibrate text.txt
    """
    from ..checkpoints.folder import check_output
    from ..pruning import Sizes, check_recovery, prune, recovered
    from ..quantization import moments_by_layer

    if recover < 0:
        raise ValueError(f"`recover` must be a number of steps, at least 0, got {recover}. Take 500, or leave it out.")
    of_recovery: dict[str, Any] = {"lora": lora, "learning_rate": learning_rate, "mixed_precision": mixed_precision}
    for name, value in of_recovery.items():
        if not recover and value not in (None, "no"):
            raise ValueError(f"`{name}` is of the steps of `recover`, got {value} without any. Add --recover 500.")
    check_recovery(**of_recovery)
    if recover and NONE in names_of(calibrate):
        raise ValueError(
            "`recover` must be 0 without text, as logits on tokens drawn at random teach nothing, got "
            f"{recover} with `calibrate` none. Give a text, or leave it out."
        )
    sizes = Sizes(neurons, heads, rank)
    model = unquantized(source, revision, gguf_file)
    sizes.check(model.config)
    if rank == model.config.head_dim:
        raise ValueError(
            f"`rank` must be less than the {rank} dimensions of a head, got {rank}. Take less, or leave it out."
        )
    seen = check_output(output, source, force)
    calibration, judges = texts_for(model.place, names_of(calibrate), tokens, judge, recover)
    larger = model.load()
    losses = Losses(judges)
    losses.add("before", larger)
    seen_windows = calibration[:: max(1, -(-calibration.numel() // tokens))]  # of all texts alike
    smaller = prune(larger, moments_by_layer(larger, seen_windows, progress=True), sizes, progress=True)
    losses.add("pruned", smaller)
    if recover:
        smaller = recovered(smaller, larger, calibration, recover, seed=seed, progress=True, **of_recovery)
        losses.add(f"recovered, {recover} steps", smaller)
    losses.print()
    smaller = smaller.to(to_dtype(dtype) or model.stored_dtype)
    facts = {"source": source, "calibrate": calibrate, "recover": recover} | of_recovery | asdict(sizes)
    facts["loss"] = losses.to_dict()
    save_model(smaller, model.place, output, seen, {"prune.json": facts})
    say_written(output, ("rigpt", "finetune", output, "TEXT", "my-tuned"), ("rigpt", "export", output, "my-export"))


def unquantized(source: str, revision: str | None, gguf_file: str | None) -> Any:
    """The opened model in a place; a `ValueError` if it is made of codes, which would be rounded or fitted twice."""
    from ..checkpoints.dequantized import method_of
    from ..checkpoints.opened import find_model, opened

    found = find_model(source, revision=revision, gguf_file=gguf_file)
    if (known := method_of(found.config)) is not None:
        raise ValueError(
            f"`source` must not be quantized already, got {source!r}, which is by {known}. Start from the model "
            "before."
        )
    model = opened(found)
    say(model.notes)
    return model


def names_of(calibrate: str) -> list[str]:
    """The texts that are asked for; a `ValueError` if there are none."""
    names = [name.strip() for name in calibrate.split(",") if name.strip()]
    if not names:
        raise ValueError("`calibrate` must name a text, or be default or none, got nothing. Leave it out for default.")
    return names


def texts_for(source: Any, names: list[str], tokens: int, judge: int, least: int = 0) -> tuple[Any, dict[str, Any]]:
    """
    Windows `[N, S]` to calibrate on, of all texts alike, and windows of other text that judge, by its name.

    There are more than `tokens` where `least` windows are wanted.
    """
    import torch

    from ..checkpoints.logits import longest_of
    from ..quantization.calibration import CONTEXT, calibration_tokens, held_out_tokens, random_tokens
    from ..quantization.recipe import LEAST_TOKENS
    from ..text.sources import DOCUMENTATION

    context = min(CONTEXT, longest_of(source.config))
    for name, value in (("tokens", tokens), ("judge", judge)):
        smallest = max(2 * context * len(names), ASKED_TOKENS if name == "tokens" else 0)
        if value < smallest:
            raise ValueError(
                f"`{name}` must be at least {smallest}, and two windows of {context} tokens for each text, got "
                f"{value}. Take more."
            )
    for name in names:
        check_text(name)
    tokens = max(tokens, least * context)
    tokenizer = source.tokenizer()
    calibrating, judges = [], {"documentation": held_out_tokens(tokenizer, tokens=judge, context=context)}
    for name in names:
        if name == NONE:
            calibrating.append(random_tokens(source.config.vocab_size, tokens=tokens // len(names), context=context))
            continue
        text = DOCUMENTATION if name == DEFAULT else name
        try:
            windows = calibration_tokens(tokenizer, text, tokens=tokens // len(names), context=context)
        except ValueError as error:  # nobody typed one of several texts as a source, or the calibration
            raise ValueError(re.sub("^`(source|calibration)`", "`calibrate`", str(error))) from error
        if name != DEFAULT:
            end = max(1, min(judge // context, len(windows) // 5))
            if end == len(windows):
                raise ValueError(
                    f"`calibrate` must hold two windows of {context} tokens at least, the last to judge on, got one "
                    f"in {name!r}. Give a longer text."
                )
            windows, judges[f"end of {Path(name).name}"] = windows[:-end], windows[-end:]
        calibrating.append(windows)
    calibration = torch.cat(calibrating)
    if calibration.numel() < LEAST_TOKENS:
        raise ValueError(
            f"`calibrate` must hold at least {LEAST_TOKENS} tokens besides those that judge, got "
            f"{calibration.numel()} in {', '.join(names)}; 25,000 are better. Give a longer text."
        )
    return calibration, judges


def check_text(name: str) -> None:
    """Raise a `ValueError` for a text that is not there."""
    from ..text.sources import kind_of

    try:
        if name not in (DEFAULT, NONE):
            kind_of(name)
    except ValueError as error:
        raise ValueError(
            f"`calibrate` must be default, none, files, folders or ids of data sets on the Hub, got {name!r}, which "
            "is not there. Check the path."
        ) from error


def say_cost(model: Any, seconds_per_token: float, calibrating: int, steps: int) -> None:
    """About how long the rest takes, by how long the model took for a token just now, and what it holds in memory."""
    # In passes over a token, as measured at 135M: moments, the search for scales, steps that keep no matrix.
    passes = PASSES_TO_CALIBRATE * calibrating + PASSES_TO_ROUND + PASSES_TO_TUNE * TOKENS_OF_A_STEP * steps
    size = sum(4 * parameter.numel() for parameter in model.parameters()) * (4 if steps else 3)
    seconds = passes * seconds_per_token
    if seconds >= SOON:
        memory = f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
        say([f"About {seconds / 60:.0f} minutes more, and {memory} of memory."])


class Losses:
    """Losses of models on windows `[N, S]` of texts that nothing was fitted on."""

    def __init__(self, texts: dict[str, Any]):
        self.texts = texts
        self.values: dict[str, dict[str, list[float]]] = {}
        self.seconds_per_token = 0.0

    def add(self, name: str, model: Any) -> None:
        """Measure one more model."""
        import torch
        from tqdm.auto import tqdm

        from ..quantization.calibration import window_losses

        began, self.values[name] = time.perf_counter(), {}
        for text, windows in self.texts.items():
            rows = tqdm(windows.split(1), desc=f"Loss, {name}, on {text}", unit="window", leave=False)
            self.values[name][text] = [loss for row in rows for loss in window_losses(model, row)]
        self.seconds_per_token = (time.perf_counter() - began) / sum(map(torch.numel, self.texts.values()))

    def print(self) -> None:
        """A table of all, with paired intervals beside the first."""
        table = Table("model", *self.texts, title="Nats per token, on text that nothing was fitted on")
        first = next(iter(self.values.values()))
        for name, values in self.values.items():
            table.add_row(name, *(_cell(values[text], first[text], values is first) for text in self.texts))
        Console().print(table)

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Mean losses, by model and text."""
        return {name: {text: fmean(losses) for text, losses in values.items()} for name, values in self.values.items()}


def _cell(values: list[float], before: list[float], alone: bool) -> str:
    """The mean of some losses, and how much more than before it is, with twice the standard error."""
    if alone or len(values) < 2:
        return f"{fmean(values):.4f}"
    differences = [after - one for after, one in zip(values, before, strict=True)]
    error = stdev(differences) / len(differences) ** 0.5
    return f"{fmean(values):.4f} ({fmean(differences):+.4f} ± {2 * error:.4f})"
