"""
A RiGPT and a stock model while the hidden space of both turns, as any program may show them.

Shapes: V vocabulary, d hidden size, L layers.
"""

import math
import threading
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from ..checkpoints.read import load_model, load_tokenizer
from ..configuration_rigpt import RiGPTConfig
from ..conversion.export import TARGETS, export_model
from ..conversion.families import architecture_of
from ..conversion.stock_rotation import rotate_stock
from ..symmetry import GaugeTransformation, haar, so_exp, so_log


MAX_TOKENS = 128  # a prompt; every hidden state of it is kept
MAX_SEED = 2**31 - 1
REMEMBERED = 16  # views, prompts and rotations


@dataclass(frozen=True)
class Subjects:
    """A RiGPT, a stock model of the same vocabulary, what to call the latter, and the tokenizer of both."""

    rigpt: Any
    stock: Any
    stock_name: str
    tokenizer: Any


@dataclass(frozen=True)
class State:
    """The next-token probabilities `[V]` and hidden states `[L + 1, tokens, d]` of a model on a prompt."""

    probabilities: torch.Tensor
    hidden_states: torch.Tensor


@dataclass(frozen=True)
class Pair:
    """One model in its own frame and in the turned one."""

    name: str
    before: State
    now: State
    rotation: torch.Tensor
    """`[d, d]`, float64."""

    @property
    def distance(self) -> float:
        """
        Total variation distance `Σ |p - q| / 2` of the two distributions, 0 to 1: the largest difference in the
        probability of any event.
        """
        return 0.5 * (self.now.probabilities - self.before.probabilities).abs().sum().item()

    @property
    def changes(self) -> list[float]:
        """`|h_now - h| / |h|` of the embeddings and of every layer."""
        return self._relative(self.before.hidden_states.double())

    @property
    def departures(self) -> list[float]:
        """`|h_now - R h| / |h|` of the embeddings and of every layer: 0 if the hidden states only turned along."""
        return self._relative(self.before.hidden_states.double() @ self.rotation.T)

    def _relative(self, expected: torch.Tensor) -> list[float]:
        difference = (self.now.hidden_states.double() - expected).flatten(1).norm(dim=1)
        return (difference / expected.flatten(1).norm(dim=1).clamp_min(1e-300)).tolist()


@dataclass(frozen=True)
class View:
    """Both models at one point of the path; angles in degrees."""

    prompt: str
    tokens: list[str]
    t: float
    angle: float
    largest_angle: float
    rigpt: Pair
    stock: Pair


class RotationView:
    """
    Two models whose hidden spaces turn by one random rotation, uniform over SO(d) for every seed.

    The path of each seed and the unrotated states of a prompt are computed once. The turned models are kept until
    another angle or seed is asked for. Threads take turns.

    Args:
        subjects ([`Subjects`]): The models; not changed.
    """

    def __init__(self, subjects: Subjects):
        self.subjects = subjects
        self._models = (subjects.rigpt, subjects.stock)
        self._turned: tuple[Any, tuple[Any, Any]] | None = None
        self._lock = threading.Lock()
        remember = lru_cache(REMEMBERED)
        self._path, self._before, self._view = remember(_path), remember(self._observe), remember(self._compute)

    @property
    def layers(self) -> int:
        """Layers that both models have."""
        return min(model.config.num_hidden_layers for model in self._models)

    def at(self, prompt: str, t: float, seed: int = 0) -> View:
        """
        Both models at `t` on the geodesic from no rotation (0) to the random one of `seed` (1).

        Raises:
            ValueError: if `t` or `seed` is out of range, or the prompt has no tokens or too many.
        """
        if not 0 <= t <= 1:
            raise ValueError(f"`t` must be between 0 (no rotation) and 1 (the whole one), got {t}.")
        if seed is None or int(seed) != seed or not 0 <= seed <= MAX_SEED:
            raise ValueError(f"`seed` must be a whole number between 0 and {MAX_SEED}, got {seed}.")
        with self._lock:
            return self._view(prompt, float(t), int(seed))

    def _compute(self, prompt: str, t: float, seed: int) -> View:
        input_ids, before = self._before(prompt)
        paths = [self._path(model.config.hidden_size, seed) for model in self._models]
        rotations = (so_exp(t * paths[0]), so_exp(t * paths[1]))
        now = before
        if t > 0:  # else nothing is turned, and copies of the same weights elsewhere in memory may round otherwise
            turned = self._turn(t, seed, rotations)
            now = (observe(turned[0], input_ids), observe(turned[1], input_ids))
        names = ("RiGPT", self.subjects.stock_name)
        rigpt, stock = (Pair(*fields) for fields in zip(names, before, now, rotations, strict=True))
        # The largest singular value is the angle of the plane that turns furthest.
        largest = math.degrees(torch.linalg.matrix_norm(paths[0], ord=2).item())
        tokens = [self.subjects.tokenizer.decode([index]) for index in input_ids[0].tolist()]
        return View(prompt, tokens, t, t * largest, largest, rigpt, stock)

    def _observe(self, prompt: str) -> tuple[torch.Tensor, tuple[State, State]]:
        """The tokens of a prompt `[1, tokens]`, and what both models make of them unrotated."""
        input_ids = self._input_ids(prompt)
        return input_ids, (observe(self._models[0], input_ids), observe(self._models[1], input_ids))

    def _turn(self, t: float, seed: int, rotations: tuple[torch.Tensor, torch.Tensor]) -> tuple[Any, Any]:
        """Both models in their turned frames."""
        if self._turned is None or self._turned[0] != (t, seed):
            self._turned = None  # frees the last ones before there are new ones
            rigpt, stock = self._models
            self._turned = ((t, seed), (turn_rigpt(rigpt, rotations[0]), rotate_stock(stock, rotations[1])))
        return self._turned[1]

    def _input_ids(self, prompt: str) -> torch.Tensor:
        """Token ids `[1, tokens]`."""
        longest = min(MAX_TOKENS, *(model.config.max_position_embeddings for model in self._models))
        input_ids = self.subjects.tokenizer(prompt)["input_ids"]
        if not 0 < len(input_ids) <= longest:
            raise ValueError(
                f"`prompt` must have 1 to {longest} tokens, got {len(input_ids)}. Write "
                f"{'a shorter' if input_ids else 'another'} one."
            )
        return torch.tensor([input_ids])


def load_subjects(model: str, *, revision: str | None = None, baseline: str | None = None) -> Subjects:
    """
    A RiGPT and the stock model to show beside it, in float32 on the CPU.

    Args:
        model: Folder or Hub id of the RiGPT, with its tokenizer.
        revision (`str`, *optional*): Branch, tag or commit of `model` on the Hub.
        baseline (`str`, *optional*): Folder or Hub id of the stock model. If not given, it is the export of the RiGPT,
            whose norms inside the layers have gain 1 as they were folded: it has less to lose by a rotation than the
            model the RiGPT came from.

    Raises:
        ValueError: if one of them is not there or not of its kind, the tokenizer is missing, the vocabularies differ,
            or there is no baseline and nothing stock to export to.
    """
    rigpt = obtain(model, "model", revision=revision)
    if not isinstance(rigpt.config, RiGPTConfig):
        raise ValueError(
            f"`model` must be a RiGPT, got {model!r} of model type {rigpt.config.model_type!r}. Convert it first: "
            f"rigpt convert {model} OUTPUT"
        )
    tokenizer = tokenizer_for(model, revision)
    if baseline is None:
        stock = exported(rigpt, model)
    else:
        stock = obtain(baseline, "baseline")
        architecture_of(stock.config, type(stock).__name__)
        check_vocabulary(rigpt, stock, tokenizer, baseline)
    name = type(stock).__name__.removesuffix("LMHeadModel").removesuffix("ForCausalLM")
    return Subjects(rigpt, stock, f"stock {'GPT-2' if name == 'GPT2' else name}", tokenizer)


def obtain(source: str, argument: str, **options: Any) -> Any:
    """A causal language model from a folder or the Hub; a `ValueError` that names `argument` if there is none."""
    return load_model(source, argument=argument, allow_unexpected=True, dtype=torch.float32, **options).eval()


def tokenizer_for(model: str, revision: str | None) -> Any:
    """The tokenizer of a folder or Hub id; a `ValueError` that says what to do if it has none."""
    with suppress(OSError, ValueError, ImportError, KeyError):
        tokenizer = load_tokenizer(model, revision=revision)
        if tokenizer("A word.")["input_ids"]:  # the library makes up an empty one where there is none
            return tokenizer
    raise ValueError(
        f"`model` must come with its tokenizer, got {model!r}, which has none that loads here. Save it beside the "
        "weights with `tokenizer.save_pretrained`."
    )


def exported(rigpt: Any, model: str) -> Any:
    """The stock model that a RiGPT computes the function of."""
    for target in TARGETS:
        with suppress(ValueError):
            return export_model(rigpt, target).eval()
    raise ValueError(
        f"`baseline` must be given for {model!r}, which no stock model computes (`rigpt families`). Name one with "
        "the same tokenizer."
    )


def check_vocabulary(rigpt: Any, stock: Any, tokenizer: Any, baseline: str):
    """A `ValueError` if the tokens of the RiGPT mean something else, or nothing, to the baseline."""
    advice = "Take the model that the RiGPT was made from, or one with its tokenizer."
    sizes = [model.config.vocab_size for model in (rigpt, stock)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"`baseline` must have {sizes[0]} tokens, got {sizes[1]} in {baseline!r}. {advice}")
    try:
        theirs = tokenizer_for(baseline, None).get_vocab()
    except ValueError:
        return
    if theirs != tokenizer.get_vocab():
        raise ValueError(f"`baseline` must have the tokenizer of the RiGPT, got another in {baseline!r}. {advice}")


def turn_rigpt(model: Any, rotation: torch.Tensor) -> Any:
    """A copy of a RiGPT whose stream is turned by `rotation` `[d, d]`."""
    return GaugeTransformation(model.config, {"stream": rotation[None]})(model)


@torch.no_grad()
def observe(model: Any, input_ids: torch.Tensor) -> State:
    """The state of a model on `input_ids` `[1, tokens]`."""
    output = model(input_ids, logits_to_keep=1, output_hidden_states=True, use_cache=False)
    return State(output.logits[0, -1].double().softmax(dim=-1), torch.cat(output.hidden_states))


def _path(size: int, seed: int) -> torch.Tensor:
    """The direction `[d, d]` of the geodesic of a seed, skew-symmetric; `exp` of it is the whole rotation."""
    return so_log(haar(size, torch.Generator().manual_seed(seed), special=True))
