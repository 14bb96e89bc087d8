"""The zoo: small models of several shapes, trained independently of each other, and the text that they learn."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import kl_div
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rigpt_hf import RiGPTConfig, RiGPTForCausalLM
from rigpt_hf.checkpoints.folder import new_folder
from rigpt_hf.checkpoints.read import load_model
from rigpt_hf.text.corpus import gather_documentation, read_text
from rigpt_hf.text.tokenizer import token_row, train_tokenizer

from ..common import write_json
from .code import gather_code


MEGABYTE = 10**6
HELD_OUT_WINDOWS = 64
# What models are trained on, what they are fine-tuned on, and what others are trained on, or these further.
DOCUMENTATION, MORE_DOCUMENTATION, CODE = "documentation", "more documentation", "code"
TEXTS = {DOCUMENTATION: 5.0, MORE_DOCUMENTATION: 2.0, CODE: 5.0}  # megabytes


class Size(NamedTuple):
    """How large a model is, and for how many steps of which rate it is trained."""

    hidden_size: int
    layers: int
    heads: int
    steps: int
    learning_rate: float


def make_gpt2(size: Size, vocabulary: int, context: int) -> GPT2LMHeadModel:
    """A stock GPT-2."""
    config = GPT2Config(
        vocab_size=vocabulary,
        n_embd=size.hidden_size,
        n_layer=size.layers,
        n_head=size.heads,
        n_positions=context,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), 0),
    )
    return GPT2LMHeadModel(config)


def make_llama(size: Size, vocabulary: int, context: int) -> LlamaForCausalLM:
    """A stock Llama with tied embeddings."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=size.hidden_size,
        intermediate_size=8 * size.hidden_size // 3 // 8 * 8,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        **dict.fromkeys(("bos_token_id", "eos_token_id"), 0),
    )
    return LlamaForCausalLM(config)


def make_rigpt(size: Size, vocabulary: int, context: int) -> RiGPTForCausalLM:
    """A native RiGPT."""
    config = RiGPTConfig(
        vocab_size=vocabulary,
        hidden_size=size.hidden_size,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=context,
    )
    return RiGPTForCausalLM(config)


SIZES = {"small": Size(64, 2, 4, 300, 4e-3), "large": Size(96, 4, 3, 250, 3e-3)}
SHAPES: dict[str, Callable[[Size, int, int], Any]] = {"gpt2": make_gpt2, "llama": make_llama, "rigpt": make_rigpt}


class Role(NamedTuple):
    """The text that a model of a group learns, and which of the group is its teacher, if one is."""

    data: str = DOCUMENTATION
    teacher: int | None = None


# Even ones are in one half of the zoo, odd ones in the other; so are their teachers.
ROLES = (*3 * (Role(),), Role(CODE), *(Role(teacher=index) for index in (0, 1, 0, 1)))


@dataclass(frozen=True)
class Base:
    """A model that was trained from random weights of its own: number `index` of its size and shape."""

    size: str
    shape: str
    index: int

    @property
    def name(self) -> str:
        """Also that of its folder."""
        return f"{self.size}-{self.shape}-{self.index}"

    @property
    def role(self) -> Role:
        """Its text and its teacher."""
        return ROLES[self.index]

    @property
    def half(self) -> int:
        """0 or 1."""
        return self.index % 2

    @property
    def seed(self) -> int:
        """Seed of its initial weights: the same wherever it is trained, and another for every name."""
        return crc32(self.name.encode())

    @property
    def teacher(self) -> "Base | None":
        """The model from whose logits it learns."""
        return None if self.role.teacher is None else Base(self.size, self.shape, self.role.teacher)

    @property
    def stranger(self) -> "Base":
        """A model of its shape and half that was trained independently of it, to be merged with."""
        return Base(self.size, self.shape, (self.index + 2) % len(ROLES))

    @property
    def bystander(self) -> "Base":
        """Another of those, from which nothing was taken, to be held against what is made from this one."""
        return Base(self.size, self.shape, (self.index + 4) % len(ROLES))


def bases(sizes: Sequence[str], shapes: Sequence[str]) -> list[Base]:
    """All models that are trained on their own, teachers before their students."""
    return [Base(size, shape, index) for size, shape in product(sizes, shapes) for index in range(len(ROLES))]


def relation(a: Base, b: Base) -> str:
    """Why two independent models might be alike: the kind of an independent pair."""
    if (a.size, a.shape) != (b.size, b.shape):
        return "another size or shape"
    pair = {a, b}
    if {a.teacher, b.teacher} & pair or (a.teacher is not None and a.teacher == b.teacher):
        return "distilled"
    return "other data" if a.role.data != b.role.data else "other seed"


def independent_pairs(models: Sequence[Base]) -> Iterator[tuple[Base, Base]]:
    """All pairs of one shape, and of others those with the same number."""
    for a, b in combinations(models, 2):
        if (a.size, a.shape) == (b.size, b.shape) or a.index == b.index:
            yield a, b


class Zoo:
    """
    Models in a folder, each trained when it is asked for first, and read from then on.

    Args:
        cache (`Path`): the folder; it need not exist.
        text (`Path`, *optional*): what to learn instead of documentation and code.
        vocabulary, context, batch (`int`): tokens of the tokenizer, of a window, and windows of a step.
        steps (`float`): of all trainings, in units of what is usual.

    Raises:
        ValueError: if the folder is of a zoo with other settings.
    """

    def __init__(
        self,
        cache: Path,
        text: Path | None = None,
        vocabulary: int = 512,
        context: int = 64,
        batch: int = 8,
        steps: float = 1.0,
        console: Callable[[str], None] = lambda line: None,
    ):
        self.cache, self.text, self.say = cache, text, console
        self.vocabulary, self.context, self.batch, self.scale = vocabulary, context, batch, steps
        settings = {"vocabulary": vocabulary, "context": context, "batch": batch, "steps": steps}
        file = cache / "settings.json"
        if file.is_file():
            if (found := json.loads(file.read_text(encoding="utf-8"))) != settings:
                raise ValueError(
                    f"`cache` must be of a zoo with the same settings, got {str(cache)!r} with {found} instead of "
                    f"{settings}. Name another folder, or take its settings."
                )
        else:
            write_json(file, settings)
        self._rows: dict[str, torch.Tensor] | None = None

    def steps(self, usual: int) -> int:
        """Steps of a training that usually has so many."""
        return max(round(usual * self.scale), 2)

    @property
    def rows(self) -> dict[str, torch.Tensor]:
        """A row of token ids for each of `TEXTS`."""
        if self._rows is None:
            folder = self.cache / "text"
            if not folder.is_dir():
                self.say("reading the text")
                passages = self._passages()
                tokenizer = train_tokenizer([text for part in passages.values() for text in part], self.vocabulary)
                rows = {name: token_row(tokenizer, part).int() for name, part in passages.items()}
                with new_folder(folder, {}, "cache") as made:
                    tokenizer.save_pretrained(made)
                    save_file(rows, made / "tokens.safetensors")
            self._rows = {name: row.long() for name, row in load_file(folder / "tokens.safetensors").items()}
        return self._rows

    def _passages(self) -> dict[str, list[str]]:
        if self.text is not None:
            passages = read_text(self.text)
            third = len(passages) // len(TEXTS)
            return {name: passages[i * third : (i + 1) * third] for i, name in enumerate(TEXTS)}
        sizes = {name: int(size * MEGABYTE) for name, size in TEXTS.items()}
        passages = gather_documentation(sizes[DOCUMENTATION] + sizes[MORE_DOCUMENTATION])
        cut = len(passages) * sizes[DOCUMENTATION] // (sizes[DOCUMENTATION] + sizes[MORE_DOCUMENTATION])
        return {
            DOCUMENTATION: passages[:cut],
            MORE_DOCUMENTATION: passages[cut:],
            CODE: gather_code(sizes[CODE]),
        }

    def windows(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows `[N, context]` of a text to train on, and those of its end that are held out."""
        row = self.rows[text]
        windows = row[: len(row) // self.context * self.context].view(-1, self.context)
        held_out = min(HELD_OUT_WINDOWS, len(windows) // 4)
        return windows[:-held_out], windows[-held_out:]

    def unigram_loss(self, text: str) -> float:
        """Nats per held-out token of a model that knows how frequent tokens are, and nothing else."""
        trained, held_out = self.windows(text)
        counts = torch.bincount(trained.flatten(), minlength=self.vocabulary).double() + 1
        return float(-(counts / counts.sum()).log()[held_out.flatten()].mean())

    @torch.no_grad()
    def loss(self, model: Any, text: str = DOCUMENTATION) -> float:
        """Nats per held-out token of a text."""
        held_out = self.windows(text)[1]
        return float(model(held_out, labels=held_out, use_cache=False).loss)

    def base(self, base: Base) -> Any:
        """A base model."""

        def make() -> tuple[Any, dict[str, Any]]:
            size, teacher = SIZES[base.size], base.teacher
            torch.manual_seed(base.seed)
            model = SHAPES[base.shape](size, self.vocabulary, self.context)
            first = self.loss(model, base.role.data)
            # Those that learn by themselves see the same windows in the same order.
            order = 0 if teacher is None else base.seed
            options: dict[str, Any] = {
                "steps": self.steps(size.steps),
                "learning_rate": size.learning_rate,
                "order": order,
            }
            self.train(model, base.role.data, **options, teacher=None if teacher is None else self.base(teacher))
            losses = {"first": first, "loss": self.loss(model, base.role.data)}
            return model, asdict(base) | options | losses | {"unigram": self.unigram_loss(base.role.data)}

        return self.kept(base.name, make)

    def kept(self, name: str, make: Callable[[], tuple[Any, dict[str, Any]]]) -> Any:
        """The model of this name, made if it is not there, with what is to be written down beside it."""
        folder = self.cache / name
        if not folder.is_dir():
            model, facts = make()
            self.say(f"{name}: " + ", ".join(f"{key} {value}" for key, value in facts.items()))
            with new_folder(folder, {}, "cache") as made:
                model.save_pretrained(made)
                write_json(made / "facts.json", facts)
        return load_model(folder, argument="cache").eval()

    def train(
        self,
        model: Any,
        text: str,
        *,
        steps: int,
        learning_rate: float,
        order: int,
        teacher: Any = None,
        weight_decay: float = 0.1,
    ) -> Any:
        """Train a model, in place, on a text or on what a teacher says of it; one cycle of the learning rate."""
        windows = self.windows(text)[0]
        generator = torch.Generator().manual_seed(order)
        epochs = math.ceil(steps * self.batch / len(windows))
        rows = torch.cat([torch.randperm(len(windows), generator=generator) for _ in range(epochs)])
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, learning_rate, total_steps=steps, pct_start=0.1, cycle_momentum=False
        )
        model.train()
        for step in range(steps):
            ids = windows[rows[step * self.batch : (step + 1) * self.batch]]
            if teacher is None:
                loss = model(ids, labels=ids, use_cache=False).loss
            else:
                with torch.no_grad():
                    wanted = teacher(ids, use_cache=False).logits.log_softmax(-1)
                said = model(ids, use_cache=False).logits.log_softmax(-1)
                loss = kl_div(said.flatten(0, 1), wanted.flatten(0, 1), reduction="batchmean", log_target=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        return model.eval()
