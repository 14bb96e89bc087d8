"""Every option of a fine-tuning run, and what it reports in the end."""

import importlib.util
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.table import Table


CONTEXT = 1024  # more would rarely fit by default
SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup")


def option(default: Any, text: str) -> Any:
    """A field of an options dataclass with its help, which names the default if it is a value."""
    shown = "" if default is None or default is False else f" (default: {default})"
    return field(default=default, metadata={"help": text + shown})


@dataclass(kw_only=True)
class Settings:
    """What has a default; each field's help is its documentation."""

    revision: str | None = option(None, "branch, tag or commit of MODEL on the Hub")
    data_split: str = option("train", "part of DATA to use, where it has parts")
    data_config: str | None = option(None, "configuration of a data set on the Hub")
    data_revision: str | None = option(None, "branch, tag or commit of a data set on the Hub")
    context: int | None = option(None, f"tokens per example (default: the model's longest, at most {CONTEXT})")
    chat_template: str | None = option(None, "a Jinja file, used and saved instead of the tokenizer's template")
    eval_share: float = option(0.05, "share of the rows held out; 0 measures on rows that are trained on")
    lora: int | None = option(None, "train a LoRA adapter of this rank and leave the weights (default: train them)")
    lora_alpha: float | None = option(None, "the adapter counts alpha / rank times (default: alpha is twice the rank)")
    lora_dropout: float = option(0.0, "dropout before the adapter")
    lora_target: str | None = option(None, "layers with an adapter, or all-linear (default: q_proj,v_proj)")
    merge: bool = option(False, "save the weights with the adapter added, and the adapter in OUTPUT/adapter")
    optim: Literal["adamw", "equivariant"] = option("adamw", "the optimizer; equivariant: without preferred basis")
    learning_rate: float | None = option(None, "largest learning rate (default: 2e-5, with --lora 2e-4)")
    weight_decay: float = option(0.01, "decoupled weight decay")
    epochs: float | None = option(None, "times through the data (default: 1)")
    steps: int | None = option(None, "steps of the optimizer, instead of epochs")
    batch_size: int = option(8, "examples per device and pass")
    accumulation: int = option(1, "passes per step")
    warmup: float = option(0.03, "steps of warm-up, or their share of all steps if below 1")
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = option("cosine", "after the warm-up")
    max_grad_norm: float = option(1.0, "gradients are shortened to this norm; 0 leaves them")
    bf16: bool = option(False, "compute in bfloat16, with weights and moments in float32")
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, a third more time")
    seed: int = option(0, "of the order of examples, dropout and the adapter's start")
    logging_steps: int = option(10, "steps between two reports of the loss")
    save_steps: int = option(500, "steps between two checkpoints to resume from")
    resume: bool = option(False, "go on from the last checkpoint of an interrupted run with the same options")
    keep_checkpoints: bool = option(False, "leave OUTPUT.checkpoints when done")
    report_to: str = option("none", "loggers of Trainer, such as tensorboard,wandb")
    force: bool = option(False, "replace an earlier result in OUTPUT once done, and forget an interrupted run's")
    cpu: bool = option(False, "use no accelerator")
    quiet: bool = option(False, "show no progress")


@dataclass(kw_only=True)
class FinetuneOptions(Settings):
    """
    What to fine-tune, on what, and where to; [`Settings`] has the rest.

    Args:
        model: Folder of a RiGPT, or its id on the Hub.
        data: A file (.txt, .json, .jsonl, .parquet), a folder of them, or the id of a data set on the Hub.
        output_dir: Folder to make.

    Raises:
        ValueError: if a number is out of its range, or two options exclude each other.
    """

    model: str
    data: str
    output_dir: str

    def __post_init__(self):
        for name, smallest in (
            *((name, 1) for name in ("lora", "steps", "batch_size", "accumulation", "logging_steps", "save_steps")),
            *((name, 0) for name in ("weight_decay", "warmup", "max_grad_norm")),
            ("context", 2),
        ):
            value = getattr(self, name)
            if value is not None and not smallest <= value < math.inf:
                raise ValueError(f"`{name}` must be at least {smallest}, got {value}.")
        for name in ("learning_rate", "epochs", "lora_alpha"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        for name in ("eval_share", "lora_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)}.")
        for name, allowed in (("optim", ("adamw", "equivariant")), ("scheduler", SCHEDULERS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"`epochs` must not be given with `steps`, got {self.epochs} and {self.steps}. Drop one.")
        if self.lora is None:
            for name in ("lora_alpha", "lora_dropout", "lora_target", "merge"):
                if getattr(self, name):
                    raise ValueError(f"`{name}` needs `lora`, got {getattr(self, name)} without it. Add a rank.")
        elif self.optim == "equivariant":
            raise ValueError(
                "`optim` must be 'adamw' with `lora`, got 'equivariant': the table of frames has no row for adapters. "
                "Drop one of the two."
            )
        elif importlib.util.find_spec("peft") is None:
            raise ValueError(f"`lora` needs peft, got {self.lora} without it. pip install 'rigpt-hf[train]'")
        self.read_template()

    @property
    def working_dir(self) -> Path:
        """Where checkpoints and logs are until the result is complete."""
        output = Path(self.output_dir)
        return output.with_name(output.name + ".checkpoints")

    def make_working_dir(self) -> None:
        """Make it, before `datasets` writes into it; a `ValueError` if it cannot be made."""
        try:
            self.working_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"`output_dir` must be a place that can be written to, got {self.output_dir!r}: {error.strerror}. "
                "Name another."
            ) from error

    def read_template(self) -> str | None:
        """The chat template, if one was named; a `ValueError` if it is no file or not text in UTF-8."""
        if self.chat_template is None:
            return None
        if not Path(self.chat_template).is_file():
            raise ValueError(f"`chat_template` must be a file, got {self.chat_template!r}. Check the path.")
        try:
            return Path(self.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"`chat_template` must be a readable file of text in UTF-8, got {self.chat_template!r}: {error}. Save "
                "it as one."
            ) from error


@dataclass(frozen=True)
class FinetuneReport:
    """
    What came of it.

    Args:
        output: The folder that was written.
        trained, parameters: How many parameters were trained, and of how many.
        examples, held_out: Examples to train on and held out.
        measured_on: Whether the losses are of held-out or of training examples.
        loss_before, loss_after: In nats per token.
        steps, tokens: Steps of the optimizer and tokens read in them, all epochs and interrupted runs together.
        seconds: Of this run's training, the first measurement included.
        curve: (step, loss) as logged.
    """

    output: str
    trained: int
    parameters: int
    examples: int
    held_out: int
    measured_on: Literal["held-out", "training"]
    loss_before: float
    loss_after: float
    steps: int
    tokens: int
    seconds: float
    curve: list[tuple[int, float]]

    def table(self) -> Table:
        """For the terminal."""
        table = Table(title="Fine-tuning", title_justify="left")
        for heading in ("", "before", "after"):
            table.add_column(heading, justify="right" if heading else "left")
        losses = (self.loss_before, self.loss_after)
        table.add_row(f"loss, {self.measured_on} examples (nats/token)", *(f"{loss:.4f}" for loss in losses))
        table.add_row("perplexity", *(f"{perplexity(loss):.2f}" for loss in losses))
        table.add_row("parameters trained, of all", f"{self.trained:,}", f"{self.parameters:,}")
        table.add_row("tokens read, in steps", f"{self.tokens:,}", f"{self.steps:,}")
        table.add_row("time (seconds)", "", f"{self.seconds:.1f}")
        return table


def perplexity(loss: float) -> float:
    """Of a loss in nats per token."""
    return math.exp(min(loss, 700.0))
