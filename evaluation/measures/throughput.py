"""How fast models are, in tokens per second side by side, so that ratios mean something on a busy machine."""

import inspect
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import StaticCache

from rigpt_hf.processes import python

from ..drawing import IN_TABLE, finish, number, panels
from ..likelihood import Progress, no_progress
from ..measure import Inputs, Measure, NotApplicable, Quantity
from ..models import EvaluatedModel, evaluated
from ..numbers import number as shown
from ..timing import Action, Prepared, own_peak_memory, ratios, spread, take_turns


# A prompt, and tokens that are generated after it.
PROMPT, NEW_TOKENS = 128, 32
# How the last line of a traceback begins.
ERROR = re.compile(r"^(?:\w+\.)*(\w+(?:Error|Exception|Interrupt|Exit))\b", re.MULTILINE)


def prefill(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    """One pass over the prompt that fills a cache and returns the last logits, as `generate` begins."""

    @torch.inference_mode()
    def run() -> None:
        model(ids, use_cache=True, logits_to_keep=1)

    return run


def decoding(model: Any, ids: torch.Tensor, new_tokens: int = NEW_TOKENS, static: bool = False) -> Prepared:
    """Greedy tokens after a prompt `[batch, seq]`, one cached step each; the prompt's own pass is the preparation."""
    length = ids.shape[1]

    @torch.inference_mode()
    def read() -> Any:
        eager = getattr(model, "_orig_mod", model)
        cache = StaticCache(config=model.config, max_cache_len=length + new_tokens) if static else None
        return eager(ids, use_cache=True, past_key_values=cache, logits_to_keep=1)

    @torch.inference_mode()
    def write(output: Any) -> None:
        cache = output.past_key_values
        for position in range(length, length + new_tokens):
            token = output.logits[:, -1:].argmax(dim=-1)
            output = model(token, past_key_values=cache, use_cache=True, position_ids=torch.full_like(token, position))

    return Prepared(read, write)


def generation(
    model: Any, ids: torch.Tensor, new_tokens: int = NEW_TOKENS, static: bool = False
) -> Callable[[], None]:
    """[`decoding`] and the pass over the prompt."""
    whole = decoding(model, ids, new_tokens, static)
    return lambda: whole.act(whole.prepare())


def first_token(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    """`generate` for one token."""

    def run() -> None:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, pad_token_id=0)

    return run


def throughput(
    models: Mapping[str, Any],
    *,
    prompt: int = PROMPT,
    new_tokens: int = NEW_TOKENS,
    batch_size: int = 1,
    turns: int = 7,
    memory: bool = True,
    seed: int = 0,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """
    Speed and memory of models, measured in turns in one process on the same prompt of random tokens.

    Args:
        models: One or more models, by what to call them; each as for [`evaluated`]. Ratios are to the last one.
        prompt (`int`, defaults to 128), new_tokens (`int`, defaults to 32): Tokens that are read and generated.
        batch_size (`int`, defaults to 1): Rows at once.
        turns (`int`, defaults to 7): Paired measurements, at least 3.
        memory (`bool`, defaults to `True`): Whether to measure peak memory too: on a GPU what was allocated, on a CPU
            the resident memory of a fresh process that loads the model and generates.
        seed (`int`, defaults to 0): Of the prompt.
        progress: Called with 1 after every turn; there are `3 * (turns + 1)`.

    Returns:
        `dict`: `models`: of each `prefill_tokens_per_second`, `decode_tokens_per_second` (without the pass over
        their prompt, the argmax included), `time_to_first_token` (seconds; a `generate` call of one token,
        with all that it does around the model), each with `median`, `lower` and `upper` quartile, and `peak_memory`
        (bytes); `ratios`: of every model but the last, its speed over the last one's in the same turn, so more is
        faster, with all `values`; `protocol`. Where memory could not be measured it is absent, and `peak_memory` of
        the protocol, a line for each model in their order, says why.

    Raises:
        ValueError: if an argument is impossible, or prompt and answer do not fit a model.
    """
    if not models:
        raise ValueError("`models` must hold at least one model, got none.")
    least = {"prompt": 1, "new_tokens": 1, "batch_size": 1, "turns": 3}
    for name, value in {"prompt": prompt, "new_tokens": new_tokens, "batch_size": batch_size, "turns": turns}.items():
        if value < least[name]:
            raise ValueError(f"`{name}` must be at least {least[name]}, got {value}.")
    evaluated_models = {name: evaluated(model) for name, model in models.items()}
    for name, model in evaluated_models.items():
        if model.positions is not None and prompt + new_tokens > model.positions:
            raise ValueError(
                f"`prompt` and `new_tokens` must fit into the {model.positions} positions of {name}, got "
                f"{prompt} and {new_tokens}."
            )
    size = min(int(model.model.config.vocab_size) for model in evaluated_models.values())
    ids = torch.randint(size, (batch_size, prompt), generator=torch.Generator().manual_seed(seed))
    device = next(iter(evaluated_models.values())).device

    def times(make: Callable[..., Action], *arguments: int, units: int = 1) -> dict[str, list[float]]:
        actions = {
            name: make(model.model, ids.to(model.device), *arguments) for name, model in evaluated_models.items()
        }
        return take_turns(actions, turns, lambda: progress(1), units)

    rates = {
        "prefill_tokens_per_second": (times(prefill), batch_size * prompt),
        "decode_tokens_per_second": (times(decoding, new_tokens, units=new_tokens), batch_size),
        "time_to_first_token": (times(first_token), 0),
    }
    results: dict[str, dict[str, Any]] = {name: {} for name in evaluated_models}
    compared: dict[str, dict[str, Any]] = {}
    *others, last = evaluated_models
    for key, (seconds, tokens) in rates.items():
        for name in evaluated_models:
            results[name][key] = spread([tokens / value if tokens else value for value in seconds[name]])
        for name in others:
            values = ratios(seconds[last], seconds[name])
            compared.setdefault(name, {})[key] = spread(values) | {"values": values}
    protocol: dict[str, Any] = {
        "prompt": prompt,
        "new_tokens": new_tokens,
        "batch_size": batch_size,
        "turns": turns,
        "decoding": "without the pass over the prompt",
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
    if memory:
        protocol["peak_memory"] = []
        for name, model in evaluated_models.items():
            try:
                results[name]["peak_memory"] = peak_memory(model, ids, new_tokens)
                line = (
                    "allocated on the device" if model.device.type == "cuda" else "resident, of a process of its own"
                )
            except (OSError, RuntimeError, subprocess.SubprocessError, ValueError) as error:
                # The times must not be lost with it.
                line = f"not measured: {reason(error)}"
            protocol["peak_memory"].append(line)
    return {"models": results, "ratios": compared, "protocol": protocol}


def own_bytes(model: Any) -> int:
    """Bytes that the weights of a model take; those that several names share count once."""
    storages = [tensor.untyped_storage() for tensor in model.state_dict().values()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def reason(error: Exception) -> str:
    """Why memory could not be measured, without what messages tell of this machine, such as paths."""
    if not isinstance(error, subprocess.CalledProcessError):
        return type(error).__name__
    kinds = ERROR.findall(error.stderr or "")
    return f"its process ended with status {error.returncode}" + (f" ({kinds[-1]})" if kinds else "")


def peak_memory(measured: EvaluatedModel, ids: torch.Tensor, new_tokens: int) -> int:
    """Peak memory in bytes while a model reads a prompt and generates."""
    device = measured.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        # Other models may lie there too.
        before = torch.cuda.memory_allocated(device)
        generation(measured.model, ids.to(device), new_tokens)()
        return torch.cuda.max_memory_allocated(device) - before + own_bytes(measured.model)
    with tempfile.TemporaryDirectory() as folder:
        measured.model.save_pretrained(folder)
        command = python("-c", f"from {__name__} import main; main()", folder, *ids.shape, new_tokens)
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def needs(model: EvaluatedModel, texts: Any, task: Any) -> Inputs:
    """A model that can generate token by token with `past_key_values`."""
    if "past_key_values" not in inspect.signature(model.model.forward).parameters:
        line = f"{type(model.model).__name__} takes no `past_key_values`, with which decoding is timed."
        raise NotApplicable(line)
    return Inputs(None, dict(task.arguments))


def fit(arguments: dict[str, Any], context: int | None, models: list[EvaluatedModel]) -> dict[str, Any]:
    """A prompt and an answer that fit into every model."""
    most = min((each.positions for each in models if each.positions is not None), default=None)
    if most is None:
        return arguments
    new = min(arguments.get("new_tokens", NEW_TOKENS), max(most // 2, 1))
    return arguments | {"new_tokens": new, "prompt": min(arguments.get("prompt", PROMPT), max(most - new, 1))}


# By their keys in a result: what speeds are called, their units, which is better, and the headings of their pictures.
TIMED: dict[str, tuple[str, str, Any, str]] = {
    "prefill_tokens_per_second": ("prefill", "tokens/s", "more", "prefill (tokens per second)"),
    "decode_tokens_per_second": ("decoding", "tokens/s", "more", "decoding (tokens per second)"),
    "time_to_first_token": ("time to first token", "s", "less", "time to the first token (seconds, less is faster)"),
}


def quantities(result: dict[str, Any]) -> list[Quantity]:
    """Medians and memory of one model, with its ratios to the baseline."""
    listed = []
    for key, (name, unit, better, _) in TIMED.items():
        values = result.get("ratios", {}).get(key, {}).get("values")
        listed.append(Quantity(name, unit, result[key]["median"], better, ratios=values))
    if "peak_memory" in result:
        listed.append(Quantity("peak memory", "bytes", result["peak_memory"]))
    return listed


def draw(picture: Any, task: dict[str, Any], names: dict[str, str]) -> str:
    """Speeds as they were measured."""
    for axes, (key, (_, _, _, label)) in zip(panels(picture, len(TIMED), len(names)), TIMED.items(), strict=True):
        most = 0.0
        for place, (name, colour) in enumerate(names.items()):
            measured = task["models"][name][key]
            value, ends = number(measured["median"]), [number(measured["lower"]), number(measured["upper"])]
            axes.barh(place, value, 0.7, color=colour, label=name)
            axes.plot(ends, [place, place], "|-", color="black", linewidth=1, markersize=5)
            end = max((each for each in (value, *ends) if math.isfinite(each)), default=0.0)
            beside: dict[str, Any] = {"textcoords": "offset points", "ha": "left", "va": "center", "fontsize": 7.5}
            axes.annotate(shown(value), (end, place), (4, 0), **beside)
            most = max(most, end)
        # Room for the number beyond the longest bar.
        axes.set_xlim(0, 1.15 * most or 1)
        finish(axes, label, len(names))
    return IN_TABLE


MEASURE = Measure(
    "throughput",
    "How fast is it? Models take turns on one machine.",
    throughput,
    quantities,
    "medians, and the quartiles around them",
    draw,
    needs=needs,
    fit=fit,
    note="Speeds of a model are medians over all turns. The ratio (×) of two is the geometric mean of their ratios in "
    "the same turn, as the machine's pace changes between turns; it is not the quotient of the medians.",
    card_words="speed",
    together=True,
)


def main() -> None:
    """The program that `peak_memory` runs: a folder, rows, tokens of the prompt, and new ones."""
    folder, *numbers = sys.argv[1:]
    batch, prompt, new_tokens = map(int, numbers)
    measured = evaluated(folder)
    generation(measured.model, torch.zeros(batch, prompt, dtype=torch.long), new_tokens)()
    print(own_peak_memory())
