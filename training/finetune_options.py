"""Every option of a fine-tuning run, and what it reports in the end."""

import importlib.util
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from rigpt_hf.command_line import READS, WRITES

from .options import AT_LEAST_0, AT_LEAST_1, BELOW_1, POSITIVE, check, check_alone


LONGEST = 1024  # tokens per example by default; more would rarely fit
LEARNING_RATES = {"full": 2e-5, "lora": 2e-4}


@dataclass
class FinetuneOptions:
    """The model to fine-tune, the data, the recipe, and the folder to make."""

    model: Annotated[str, READS]
    """Folder of a RiGPT, or its id on the Hub."""
    data: Annotated[str, READS]
    """A file (.txt, .jsonl, .json, .parquet), a folder of them, or the id of a data set on the Hub."""
    output_dir: Annotated[str, WRITES]
    """Folder to make."""
    model_revision: str | None = None
    """Branch, tag or commit of MODEL on the Hub."""
    data_split: str = "train"
    """Part of DATA to use, where it has parts; also a slice, such as train[:1000]."""
    data_config: str | None = None
    """Configuration of a data set on the Hub."""
    data_revision: str | None = None
    """Branch, tag or commit of a data set on the Hub."""
    context_length: int | None = None
    """Tokens per example; the model's longest, at most 1024, if not given."""
    chat_template: Annotated[str | None, READS] = None
    """A Jinja file, used and saved instead of the tokenizer's template."""
    eval_share: float = 0.05
    """Share of the rows held out, chosen by a hash of what is in them; 0 measures on rows that are trained on."""
    lora: int | None = None
    """Train a LoRA adapter of this rank and leave the weights."""
    lora_alpha: float | None = None
    """The adapter counts alpha / rank times; alpha is twice the rank if not given."""
    lora_dropout: float = 0.0
    """Dropout before the adapter."""
    lora_target_modules: list[str] = field(default_factory=list)
    """Layers with an adapter, or all-linear; q_proj,v_proj if not given."""
    merge: bool = False
    """Save the weights with the adapter added, and the adapter in OUTPUT_DIR/adapter."""
    symmetry: Annotated[str | None, READS] = None
    """File of a symmetry of the data (exchanges of tokens, as `TokenSymmetry.save` writes) that the model gets and
    keeps."""
    symmetry_kind: Literal["irreducible", "permutation"] = "irreducible"
    """How the model carries it, unless MODEL has it on record: its way goes on."""
    symmetry_project_weights: bool = False
    """Project the weights on it after every step, for optimizers that leave it: not only the gradients."""
    optim: Literal["adamw", "equivariant"] = "adamw"
    """The optimizer; equivariant: without preferred basis. Its rates are not AdamW's: give --learning-rate."""
    learning_rate: float | None = None
    """Largest learning rate; 2e-5 if not given, with --lora 2e-4. No result says yet which is usual for equivariant,
    which needs a larger one than AdamW: try 1e-3 to 1e-2."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    num_train_epochs: float | None = None
    """Times through the data; 1 if not given."""
    max_steps: int | None = None
    """Steps of the optimizer, instead of epochs."""
    per_device_train_batch_size: int = 8
    """Examples per device and pass."""
    gradient_accumulation_steps: int = 1
    """Passes per step."""
    warmup_steps: float = 0.03
    """Steps of warm-up, or their share of all steps if below 1."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    """How the rate goes on after the warm-up."""
    max_grad_norm: float = 1.0
    """Largest norm of the gradient; 0 leaves it."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Precision in which the model computes; weights and moments stay in float32."""
    gradient_checkpointing: bool = False
    """Recompute activations: less memory for another forward pass."""
    seed: int = 0
    """Seed of the order of examples, dropout and the adapter's start."""
    logging_steps: int = 10
    """Steps between two reports of the loss."""
    save_steps: int = 500
    """Steps between two checkpoints to resume from."""
    save_total_limit: int = 2
    """Checkpoints kept, the newest."""
    resume: bool = False
    """Go on from the last checkpoint of an interrupted run with the same options."""
    keep_checkpoints: bool = False
    """Leave OUTPUT_DIR.checkpoints when done."""
    report_to: list[str] = field(default_factory=lambda: ["none"])
    """Loggers of Trainer, such as tensorboard,wandb."""
    force: bool = False
    """Replace an earlier result in OUTPUT_DIR once done, and forget an interrupted run's."""
    cpu: bool = False
    """Use no accelerator."""
    quiet: bool = False
    """Say nothing but what is wrong."""

    def __post_init__(self):
        counts = ("lora", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps")
        check(self, AT_LEAST_1, *counts, "save_steps", "save_total_limit")
        check(self, AT_LEAST_0, "weight_decay", "warmup_steps", "max_grad_norm")
        check(self, POSITIVE, "learning_rate", "num_train_epochs", "lora_alpha")
        check(self, BELOW_1, "eval_share", "lora_dropout")
        check(self, ("at least 2", lambda value: value >= 2), "context_length")
        if self.num_train_epochs is not None and self.max_steps is not None:
            raise ValueError(
                f"`num_train_epochs` must not be given with `max_steps`, got {self.num_train_epochs} and "
                f"{self.max_steps}. Drop one."
            )
        check_alone(self)
        if self.lora is not None and self.symmetry is not None:
            raise ValueError(
                f"`symmetry` must be left out with `lora`, got {self.symmetry!r}: two factors have no rows in the "
                "table of frames, and what is added to a symmetric model takes its symmetry. Drop one of the two."
            )
        if self.lora is None:
            for name in ("lora_alpha", "lora_dropout", "lora_target_modules", "merge"):
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

    @property
    def peak_rate(self) -> float:
        """The learning rate that was asked for, or the usual one."""
        return self.learning_rate or LEARNING_RATES["full" if self.lora is None else "lora"]

    def read_template(self) -> str | None:
        """The chat template, if one was named; a `ValueError` if it is no file or not text in UTF-8."""
        if self.chat_template is None:
            return None
        try:
            return Path(self.chat_template).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"`chat_template` must be a readable file of text in UTF-8, got {self.chat_template!r}: "
                f"{getattr(error, 'strerror', None) or error}. Check the path, and save it as one."
            ) from error


@dataclass(frozen=True)
class FinetuneReport:
    """
    The results of a fine-tuning run.

    Args:
        output_dir: The folder that was written.
        trained, parameters: How many parameters were trained, and of how many.
        examples, held_out: Examples to train on and held out.
        measured_on: Whether the losses are of held-out or of training examples.
        loss_before, loss_after: In nats per token.
        loss_projected: That of the weights that training began with, projected on a symmetry, if there is one.
        symmetry_distance: Of the trained weights from that symmetry, as a share of their norm.
        steps, tokens: Steps of the optimizer and tokens read in them, all epochs and interrupted runs together.
        seconds: Of this run's training.
        curve: (step, loss) as logged.
    """

    output_dir: str
    trained: int
    parameters: int
    examples: int
    held_out: int
    measured_on: Literal["held-out", "training"]
    loss_before: float
    loss_projected: float | None
    loss_after: float
    steps: int
    tokens: int
    seconds: float
    curve: list[tuple[int, float]]
    symmetry_distance: float | None = None

    def table(self) -> Any:
        """For the terminal, a `rich.table.Table`."""
        from rich.table import Table

        table = Table(title="Fine-tuning", title_justify="left")
        losses = {"before": self.loss_before, "projected": self.loss_projected, "after": self.loss_after}
        measured = {heading: loss for heading, loss in losses.items() if loss is not None}
        for heading in ("", *measured):
            table.add_column(heading, justify="right" if heading else "left")
        table.add_row(
            f"loss, {self.measured_on} examples (nats/token)", *(f"{loss:.4f}" for loss in measured.values())
        )
        table.add_row("perplexity", *(f"{perplexity(loss):.2f}" for loss in measured.values()))
        return table

    def sentences(self) -> list[str]:
        """The sentences under the table, on what has no before and after."""
        which = "All" if self.trained == self.parameters else f"{self.trained:,} of"
        trained = f"{which} {self.parameters:,} parameters were trained on {self.tokens:,} tokens"
        said = [f"{trained} in {self.steps:,} steps, in {self.seconds:.1f} seconds."]
        if self.symmetry_distance is not None:
            from .symmetry import kept_in_words

            said.append(kept_in_words(self.symmetry_distance))
        return said


def perplexity(loss: float) -> float:
    """The perplexity of a loss in nats per token."""
    return math.exp(min(loss, 700.0))


def make_adapter(options: FinetuneOptions, config: Any) -> Any:
    """The `peft.LoraConfig` of the options, if they ask for one."""
    if options.lora is None:
        return None
    import peft

    targets: Any = options.lora_target_modules or None
    if config.tie_word_embeddings and {"lm_head", "embed_tokens"} & set(targets or ()):
        raise ValueError(
            f"`lora_target_modules` must not be a table that is used twice, got {','.join(targets)!r} in a model with "
            "tied embeddings. Adapt other layers."
        )
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=options.lora,
        lora_alpha=options.lora_alpha or 2 * options.lora,
        lora_dropout=options.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        revision=options.model_revision,
    )
