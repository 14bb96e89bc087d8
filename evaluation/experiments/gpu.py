"""
What a GPU is asked once it is at hand, in minutes: `python -m rigpt_hf.evaluation.experiments.gpu --help`.

Parts, each written down as soon as it is done, so that a second call goes on where the first one ended:

    backends    all attention functions that are there, beside eager ones in float32: logits and gradients
    speed       prefill, cached generation and a training step beside stock GPT-2 and Llama, eager and compiled
    optimizer   what the equivariant optimizer adds to a step
    tools       conversion, comparison and fingerprint of stock GPT-2
    training    RiGPT and stock GPT-2 on the same tokens, with the minutes that are left

    python -m rigpt_hf.evaluation.experiments.gpu gpu.json --data tokens
    python -m rigpt_hf.evaluation.experiments.gpu toy.json --device cpu --shape toy --minutes 1
"""

import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import transformers
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rigpt_hf.checkpoints.folder import check_file
from rigpt_hf.command_line import READS, WRITES
from rigpt_hf.conversion import convert_model
from rigpt_hf.dataclass_options import program
from rigpt_hf.evaluation import speed
from rigpt_hf.evaluation.measures.throughput import NEW_TOKENS, generation, prefill
from rigpt_hf.evaluation.timing import device_name, ratios, spread, take_turns
from rigpt_hf.optim import EquivariantOptimizer, equivariant_param_groups
from rigpt_hf.symmetry import GaugeTransformation
from rigpt_hf.symmetry.comparison import compare
from rigpt_hf.symmetry.fingerprint import fingerprint
from rigpt_hf.terminal import Console
from rigpt_hf.training.data import TokenShards

from .common import VERSIONS, check_least, write_json
from .optimizer_cost import measure as optimizer_cost


SHAPES = {
    "124m": speed.Shape(768, 12, 12, 50257, 1024, 8, 1024),
    "toy": speed.Shape(32, 2, 2, 64, 64, 2, 32),
}
BACKENDS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
# 16 bits round both alike; what is further than this from eager ones in 16 bits is another function.
AGREES = 2.0
# Dense products of bfloat16 in a second, by what the name of a GPU holds (data sheets of the maker).
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
# Minutes of the whole that training leaves for its validation.
LAST = 0.3


@dataclass(frozen=True)
class Options:
    """Where, at what size and for how long."""

    output: Annotated[Path, WRITES]
    """File for the results, JSON; one of the same options is gone on with."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where to run."""
    shape: Literal["124m", "toy"] = "124m"
    """Size of the models."""
    minutes: float = 9.0
    """For all of it; parts that time does not allow are named."""
    turns: int = 7
    """Paired measurements of a row."""
    data: Annotated[Path | None, READS, {"exists": True}] = None
    """Folder of tokens to train on, made by prepare_data; random tokens that follow a rule if none is given."""
    rows: int = 8
    """Windows in a step of training."""
    learning_rate: float = 1e-3
    """Highest rate of the equivariant optimizer, and of AdamW for stock GPT-2."""
    parts: tuple[str, ...] = ()
    """Parts to run; all if none is named."""

    def __post_init__(self):
        check_least(self, minutes=0, turns=3, rows=1)
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"`learning_rate` must be positive, got {self.learning_rate}. Take 1e-3 or so.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("`device` must be one that PyTorch can use here, got 'cuda'. Take cpu and the shape toy.")
        if unknown := [part for part in self.parts if part not in PARTS]:
            raise ValueError(f"`parts` must name some of {', '.join(PARTS)}, got {unknown[0]!r}.")


class Bench:
    """The shape, the device and the time that is left, which all parts share."""

    def __init__(self, options: Options):
        self.options, self.shape = options, SHAPES[options.shape]
        self.device = torch.device(options.device)
        self.end = time.monotonic() + 60 * options.minutes

    def left(self) -> float:
        """Minutes."""
        return (self.end - time.monotonic()) / 60

    def model(self, name: str, attention: str = "sdpa", dtype: torch.dtype = torch.bfloat16) -> Any:
        """A `"rigpt"`, `"gpt2"` or `"llama"` of the shape, of always the same numbers."""
        torch.manual_seed(0)
        if name != "llama":
            return speed.build(name, self.shape, attention).to(self.device, dtype)
        config = LlamaConfig(
            hidden_size=self.shape.hidden_size,
            intermediate_size=8 * self.shape.hidden_size // 3,  # as many weights as with two matrices of four times
            num_hidden_layers=self.shape.layers,
            num_attention_heads=self.shape.heads,
            vocab_size=self.shape.vocabulary,
            max_position_embeddings=self.shape.context,
            tie_word_embeddings=True,
            attn_implementation=attention,
        )
        return LlamaForCausalLM(config).to(self.device, dtype)

    def ids(self, rows: int, length: int) -> torch.Tensor:
        """Random tokens `[rows, length]`, of always the same numbers."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(0, self.shape.vocabulary, (rows, length), generator=generator).to(self.device)


def backends(bench: Bench) -> dict[str, Any]:
    """Errors of logits and gradients in bfloat16, relative to eager attention in float32."""
    ids = bench.ids(2, min(bench.shape.context, 512))
    reference = _logits_and_gradients(bench.model("rigpt", "eager", torch.float32), ids)
    result: dict[str, Any] = {}
    for name in BACKENDS:
        try:
            found = _logits_and_gradients(bench.model("rigpt", name), ids)
        except Exception as error:  # of a library that is absent, or of a kernel that does not know this device
            result[name] = {"absent": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
            continue
        errors = (float((a - b).norm() / b.norm()) for a, b in zip(found, reference, strict=True))
        result[name] = dict(zip(("logits", "gradients"), errors, strict=True))
    for errors in result.values():
        if "logits" in errors:
            errors["agrees"] = all(errors[key] <= AGREES * result["eager"][key] for key in ("logits", "gradients"))
    return result


def _logits_and_gradients(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    output = model(ids, labels=ids, use_cache=False)
    output.loss.backward()
    gradients = [parameter.grad.float().flatten() for parameter in model.parameters() if parameter.grad is not None]
    return [output.logits.detach().float(), torch.cat(gradients)]


def speeds(bench: Bench) -> dict[str, Any]:
    """Seconds in turns, tokens per second, the share of the peak, ratios to RiGPT, and peak memory of a step."""
    rows: dict[str, Any] = {}
    ids = bench.ids(bench.shape.batch, bench.shape.sequence)
    peak = next((flops for name, flops in PEAKS.items() if name in device_name()), None)
    for mode in ("eager", "compiled"):
        models = {name: bench.model(name) for name in ("gpt2", "llama", "rigpt")}
        weights = sum(parameter.numel() for parameter in models["rigpt"].parameters())
        torch._dynamo.reset()
        runners = {name: torch.compile(model) if mode == "compiled" else model for name, model in models.items()}
        # What is done, its tokens, and products for each weight and token.
        kinds: dict[str, tuple[Callable[[Any], Any], int, int]] = {
            "prefill": (partial(prefill, ids=ids), ids.numel(), 2),
            "cached generation": (
                partial(generation, ids=ids[:1, :NEW_TOKENS], static=mode == "compiled"),
                NEW_TOKENS,
                2,
            ),
            "training step": (partial(speed.training, ids=ids), ids.numel(), 6),
        }
        for what, (action, tokens, products) in kinds.items():
            for model in models.values():
                model.train(what == "training step")
            seconds = take_turns({name: action(model) for name, model in runners.items()}, bench.options.turns)
            median = {name: statistics.median(values) for name, values in seconds.items()}
            row = {
                "seconds": median,
                "tokens_per_second": {name: tokens / value for name, value in median.items()},
                "faster_than": {
                    name: spread(ratios(seconds[name], seconds["rigpt"])) for name in seconds if name != "rigpt"
                },
            }
            if peak is not None:
                row["share_of_peak"] = {
                    name: products * weights * tokens / value / peak for name, value in median.items()
                }
            rows[f"{what}, {mode}"] = row
    if bench.device.type == "cuda":
        rows["peak memory of a training step, bytes"] = {name: _peak(bench, name, ids) for name in models}
    return rows


def _peak(bench: Bench, name: str, ids: torch.Tensor) -> int:
    model = bench.model(name).train()
    torch.cuda.reset_peak_memory_stats()
    step = speed.training(model, ids)
    for _ in range(2):
        step()
    return torch.cuda.max_memory_allocated()


def optimizer(bench: Bench) -> dict[str, Any]:
    """Seconds of passes and of both optimizers, and the ratio of whole steps."""
    shape = bench.shape
    fields = {
        "hidden_size": shape.hidden_size,
        "embedding_size": shape.hidden_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "vocab_size": shape.vocabulary,
    }
    tokens = shape.batch * shape.sequence
    return optimizer_cost(fields, tokens, shape.sequence, shape.batch, bench.options.turns, bench.device)


def tools(bench: Bench) -> dict[str, Any]:
    """Seconds of conversion, rotation, fingerprint and comparison, and what the comparison says of a disguise."""
    stock = bench.model("gpt2", dtype=torch.float32).cpu()
    seconds: dict[str, float] = {}
    with _timed(seconds, "convert"):
        model = convert_model(stock)
    with _timed(seconds, "rotate"):
        turned = GaugeTransformation.random(model.config, torch.Generator().manual_seed(2))(model)
    with _timed(seconds, "fingerprint"):
        fingerprint(model)
    with _timed(seconds, "diff"):
        found = compare(model, turned, device=bench.device)
    return {"seconds": seconds, "verdict": found.verdict}


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[name] = time.perf_counter() - start


def training(bench: Bench) -> dict[str, Any]:
    """Losses of both models, which take steps in turns on the same windows, as long as there is time."""
    windows, held_out = _windows(bench)
    models = {name: bench.model(name, dtype=torch.float32).train() for name in ("rigpt", "gpt2")}
    rate = bench.options.learning_rate
    optimizers: dict[str, torch.optim.Optimizer] = {
        "rigpt": EquivariantOptimizer(equivariant_param_groups(models["rigpt"], rate)),
        "gpt2": torch.optim.AdamW(models["gpt2"].parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1),
    }
    curves: dict[str, list[float]] = {name: [] for name in models}
    seconds = dict.fromkeys(models, 0.0)
    began, order = bench.left() - LAST, torch.Generator().manual_seed(3)
    while (share := 1 - (bench.left() - LAST) / began) < 1 and began > 0:
        chosen = torch.randint(len(windows), (bench.options.rows,), generator=order)
        ids = windows[chosen].to(bench.device)
        # Up in a twentieth of the time, then down in a line, as far as the clock is.
        now = rate * min(1.0, 20 * share + 1e-3) * (1 - 0.95 * share)
        for name, model in models.items():
            start = time.perf_counter()
            for group in optimizers[name].param_groups:
                group["lr"] = now
            curves[name].append(_step(model, optimizers[name], ids))
            seconds[name] += time.perf_counter() - start
    return {
        "corpus": "rule" if bench.options.data is None else bench.options.data.name,
        "steps": len(curves["rigpt"]),
        "tokens_per_step": bench.options.rows * windows.shape[1],
        "seconds": seconds,
        "loss": curves,
        "validation": {name: _loss(model, held_out) for name, model in models.items()},
    }


def _windows(bench: Bench) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows to train on and others to judge on, `[N, S]`."""
    length = bench.shape.context
    if bench.options.data is None:
        # Each token follows from the two before it, but for one in eight.
        generator = torch.Generator().manual_seed(4)
        ids = torch.randint(0, bench.shape.vocabulary, (72, length), generator=generator)
        for place in range(2, length):
            follows = (3 * ids[:, place - 1] + ids[:, place - 2]) % bench.shape.vocabulary
            ids[:, place] = torch.where(torch.rand(72, generator=generator) < 0.125, ids[:, place], follows)
        return ids[:64], ids[64:]
    parts = []
    for split in ("train", "validation"):
        shards = TokenShards(bench.options.data, split)
        if shards.manifest.vocab_size > bench.shape.vocabulary or len(shards) < length:
            raise ValueError(
                f"`data` must hold tokens below {bench.shape.vocabulary}, and {length} of each split, got "
                f"{shards.manifest.vocab_size} and {len(shards)}. Prepare it with the tokenizer of GPT-2."
            )
        count = len(shards) // length if split == "train" else min(len(shards) // length, 64)
        tokens = torch.from_numpy(shards.read(0, count * length).astype("int64"))
        parts.append(tokens.view(count, length))
    return parts[0], parts[1]


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    with torch.autocast(ids.device.type, torch.bfloat16):
        loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


@torch.no_grad()
def _loss(model: nn.Module, windows: torch.Tensor) -> float:
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16):
        losses = [float(model(ids, labels=ids, use_cache=False).loss) for ids in windows.to(device).split(1)]
    return statistics.mean(losses)


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "backends": backends,
    "speed": speeds,
    "optimizer": optimizer,
    "tools": tools,
    "training": training,
}


def earlier(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The parts that an earlier call with the same options has written; a `ValueError` if it had others."""
    if not path.is_file():
        return {}
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        parts, own = written["parts"], {key: written[key] for key in facts}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"`output` must be new or a file of this program, got {str(path)!r}, which is none. Name another."
        ) from error
    if own != json.loads(json.dumps(facts)):
        differs = ", ".join(key for key in facts if own[key] != json.loads(json.dumps(facts[key])))
        raise ValueError(
            f"`output` must be new or of the same options, got {str(path)!r} with another {differs}. Name another."
        )
    return {name: part for name, part in parts.items() if "not run" not in part}


def run(options: Options) -> dict[str, Any]:
    """
    Ask a GPU all that is asked of one, in a few minutes; a second call goes on.

        python -m rigpt_hf.evaluation.experiments.gpu gpu.json --data tokens
    """
    transformers.logging.set_verbosity_error()
    console, bench = Console(), Bench(options)
    facts = {"device": device_name() if options.device == "cuda" else "cpu", "shape": options.shape}
    facts |= {"versions": VERSIONS, "turns": options.turns, "rows": options.rows, "rate": options.learning_rate}
    parts = earlier(options.output, facts)
    seen = check_file(options.output, "output", force=True)
    for name, part in PARTS.items():
        if name in parts or (options.parts and name not in options.parts):
            continue
        start = time.monotonic()
        if bench.left() <= (LAST if name == "training" else 0):
            parts[name] = {"not run": "no time was left"}
        else:
            console.print(f"{name}, {bench.left():.1f} minutes left")
            parts[name] = part(bench) | {"minutes": (time.monotonic() - start) / 60}
        write_json(options.output, facts | {"parts": parts}, seen=seen, named=True)
        seen = check_file(options.output, "output", force=True)
    console.print(_table(parts))
    return parts


def _table(parts: dict[str, Any]) -> Table:
    table = Table("part", "figures", title="What the GPU said")
    for name, part in parts.items():
        shown = copy.deepcopy(part)
        shown.pop("loss", None)
        for key, value in shown.items():
            text = json.dumps(value, default=str).replace('"', "")
            table.add_row(name, f"{key}: {text}"[:200])
    return table


main = program(Options, run, name="python -m evaluation.experiments.gpu")

if __name__ == "__main__":
    sys.exit(main())
