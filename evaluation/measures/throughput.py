"""How fast models are, side by side: they take turns, so that the machine's moods fall on all of them."""

import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import StaticCache

from .likelihood import Tick, no_tick
from .subjects import Subject, subject


# A prompt, and tokens that are generated after it.
PROMPT, NEW_TOKENS = 128, 32
Action = Callable[[], float]
# How the last line of a traceback begins.
ERROR = re.compile(r"^(?:\w+\.)*(\w+(?:Error|Exception|Interrupt|Exit))\b", re.MULTILINE)


@dataclass(frozen=True)
class Prepared:
    """An action that needs something first, which takes time that is not its own."""

    prepare: Callable[[], Any]
    act: Callable[[Any], float]


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock read now means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def prefill(model: Any, ids: torch.Tensor) -> Action:
    """One pass over the prompt that fills a cache and returns the last logits, as `generate` begins."""

    @torch.inference_mode()
    def run() -> float:
        model(ids, use_cache=True, logits_to_keep=1)
        return 1.0

    return run


def generation(model: Any, ids: torch.Tensor, new_tokens: int = NEW_TOKENS, static: bool = False) -> Action:
    """Greedy tokens after a prompt `[batch, seq]`, one cached step each; the timing counts a single step."""
    length = ids.shape[1]

    @torch.inference_mode()
    def run() -> float:
        eager = getattr(model, "_orig_mod", model)
        cache = StaticCache(config=model.config, max_cache_len=length + new_tokens) if static else None
        output = eager(ids, use_cache=True, past_key_values=cache, logits_to_keep=1)
        cache = output.past_key_values
        for position in range(length, length + new_tokens):
            token = output.logits[:, -1:].argmax(dim=-1)
            output = model(token, past_key_values=cache, use_cache=True, position_ids=torch.full_like(token, position))
        return float(new_tokens)

    return run


def decoding(model: Any, ids: torch.Tensor, new_tokens: int = NEW_TOKENS) -> Prepared:
    """Greedy tokens after a prompt `[batch, seq]`, whose own pass is not timed; the timing counts a single step."""
    length = ids.shape[1]

    @torch.inference_mode()
    def read() -> Any:
        return model(ids, use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def write(output: Any) -> float:
        cache = output.past_key_values
        for position in range(length, length + new_tokens):
            token = output.logits[:, -1:].argmax(dim=-1)
            output = model(token, past_key_values=cache, use_cache=True, position_ids=torch.full_like(token, position))
        return float(new_tokens)

    return Prepared(read, write)


def take_turns(
    actions: Mapping[str, Action | Prepared], turns: int, device: torch.device, tick: Callable[[], Any]
) -> dict[str, list[float]]:
    """Seconds per unit of work for each action, measured in alternation after one unmeasured turn."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(turns + 1):
        # The one that goes first changes, so that none always finds the caches as another left them.
        for name in list(actions) if turn % 2 else list(actions)[::-1]:
            action = actions[name]
            given = (action.prepare(),) if isinstance(action, Prepared) else ()
            act: Callable[..., float] = action.act if isinstance(action, Prepared) else action
            synchronize(device)
            start = time.perf_counter()
            units = act(*given)
            synchronize(device)
            if turn:
                seconds[name].append((time.perf_counter() - start) / units)
        tick()
    return seconds


def own_peak_memory() -> int:
    """Peak resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # `getrusage` starts from the peak of the parent process there
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])  # type: ignore[index]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def throughput(
    models: Mapping[str, Any],
    *,
    prompt: int = PROMPT,
    new_tokens: int = NEW_TOKENS,
    batch_size: int = 1,
    turns: int = 7,
    memory: bool = True,
    seed: int = 0,
    tick: Tick = no_tick,
) -> dict[str, Any]:
    """
    Speed and memory of models, measured in turns in one process on the same prompt of random tokens.

    Args:
        models: One or more models, by what to call them; each as for [`subject`]. Ratios are to the last one.
        prompt (`int`, defaults to 128), new_tokens (`int`, defaults to 32): Tokens that are read and generated.
        batch_size (`int`, defaults to 1): Rows at once.
        turns (`int`, defaults to 7): Paired measurements, at least 3.
        memory (`bool`, defaults to `True`): Whether to measure peak memory too: on a GPU what was allocated, on a CPU
            the resident memory of a fresh process that loads the model and generates.
        seed (`int`, defaults to 0): Of the prompt.
        tick: Called with 1 after every turn; there are `3 * (turns + 1)`.

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
    subjects = {name: subject(model) for name, model in models.items()}
    for name, each in subjects.items():
        if each.positions is not None and prompt + new_tokens > each.positions:
            raise ValueError(
                f"`prompt` and `new_tokens` must fit into the {each.positions} positions of {name}, got "
                f"{prompt} and {new_tokens}."
            )
    size = min(int(each.model.config.vocab_size) for each in subjects.values())
    ids = torch.randint(size, (batch_size, prompt), generator=torch.Generator().manual_seed(seed))
    device = next(iter(subjects.values())).device

    def times(make: Callable[[Any, torch.Tensor], Action | Prepared]) -> dict[str, list[float]]:
        actions = {name: make(each.model, ids.to(each.device)) for name, each in subjects.items()}
        return take_turns(actions, turns, device, lambda: tick(1))

    rates = {
        "prefill_tokens_per_second": (times(prefill), batch_size * prompt),
        "decode_tokens_per_second": (times(lambda model, ids: decoding(model, ids, new_tokens)), batch_size),
        "time_to_first_token": (times(first_token), 0),
    }
    found: dict[str, dict[str, Any]] = {name: {} for name in subjects}
    ratios: dict[str, dict[str, Any]] = {}
    *others, last = subjects
    for key, (seconds, tokens) in rates.items():
        for name in subjects:
            found[name][key] = spread([tokens / value if tokens else value for value in seconds[name]])
        for name in others:
            pairs = zip(seconds[last], seconds[name], strict=True)
            turns_of = [theirs / own for theirs, own in pairs]
            ratios.setdefault(name, {})[key] = spread(turns_of) | {"values": turns_of}
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
        for name, each in subjects.items():
            try:
                found[name]["peak_memory"] = peak_memory(each, ids, new_tokens)
                line = "allocated on the device" if each.device.type == "cuda" else "resident, of a process of its own"
            except (OSError, RuntimeError, subprocess.SubprocessError, ValueError) as error:
                # What was timed before must not be lost with it.
                line = f"not measured: {reason(error)}"
            protocol["peak_memory"].append(line)
    return {"models": found, "ratios": ratios, "protocol": protocol}


def first_token(model: Any, ids: torch.Tensor) -> Action:
    """`generate` for one token."""

    def run() -> float:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, pad_token_id=0)
        return 1.0

    return run


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    lower, median, upper = statistics.quantiles(values, n=4)
    return {"median": median, "lower": lower, "upper": upper}


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


def peak_memory(measured: Subject, ids: torch.Tensor, new_tokens: int) -> int:
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
        shape = [str(size) for size in ids.shape]
        command = [sys.executable, "-m", __name__, folder, *shape, str(new_tokens)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def main() -> None:
    """What `peak_memory` runs in a process of its own: a folder, rows, tokens of the prompt, and new ones."""
    folder, *numbers = sys.argv[1:]
    batch, prompt, new_tokens = map(int, numbers)
    measured = subject(folder)
    generation(measured.model, torch.zeros(batch, prompt, dtype=torch.long), new_tokens)()
    print(own_peak_memory())


if __name__ == "__main__":
    main()
