"""Every option of a pretraining run: dataclasses that a YAML file or the command line fills."""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from rigpt_hf.command_line import READS, WRITES
from rigpt_hf.dataclass_options import parse
from rigpt_hf.extras import advice


PRESETS = Path(__file__).parent / "presets"
TRACKERS = ("tensorboard", "wandb", "trackio")
# A rule for a number, in words and as a function.
Rule = tuple[str, Callable[[float], bool]]
POSITIVE: Rule = ("positive", lambda value: 0 < value < math.inf)
AT_LEAST_0: Rule = ("at least 0", lambda value: 0 <= value < math.inf)
AT_LEAST_1: Rule = ("at least 1", lambda value: 1 <= value < math.inf)
BELOW_1: Rule = ("at least 0 and below 1", lambda value: 0 <= value < 1)
BETWEEN: Rule = ("between 0 and 1", lambda value: 0 < value < 1)
SHARE: Rule = ("a share between 0 and 1", lambda value: 0 <= value <= 1)


def check(options: Any, rule: Rule, *names: str) -> None:
    """
    Raise if an option breaks a rule; `None` breaks none.

    Raises:
        ValueError: names the option, the rule and the value.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and not rule[1](value):
            usual = next((field.default for field in fields(options) if field.name == name), None)
            is_usual = isinstance(usual, (int, float)) and not isinstance(usual, bool) and rule[1](usual)
            advice = f"Take {usual}, as without it" if is_usual else "Take another, or leave it out"
            raise ValueError(f"`{name}` must be {rule[0]}, got {value}. {advice}.")


@dataclass
class ModelOptions:
    """The model that is trained."""

    model_kind: str = "rigpt"
    """The class: `rigpt`, or to compare with, `stock-gpt2`, which needs --optim adamw and has the sizes of the preset.
    Experiments add their own to `training/kinds.py`'s."""
    config_overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of its configuration; the vocabulary comes from the data."""
    init_from: Annotated[str | None, READS] = None
    """Folder or Hub id of a model to go on from, instead of random weights."""
    model_revision: str | None = None
    """Branch, tag or commit of `init_from` on the Hub."""

    def __post_init__(self):
        if self.init_from is not None and self.config_overrides:
            raise ValueError(
                f"`config_overrides` must be left out with `init_from`, got both. The model in {self.init_from!r} "
                "has its own."
            )
        if "vocab_size" in self.config_overrides:
            raise ValueError("`config_overrides` must not set vocab_size, which comes from the data. Leave it out.")


@dataclass
class DataOptions:
    """The data that it is trained on."""

    data_dir: str = "runs/data/docs"
    """Folder of tokenised shards; made from `data` if it does not exist yet."""
    data: str | None = "docs"
    """`docs` (the documentation of the installed packages), a local text, JSONL or parquet file or folder, or a
    data set on the Hub; null takes `data_dir` as it is."""
    data_options: dict[str, Any] = field(default_factory=dict)
    """Further options of the source: name, revision, split, text_column, separator (of text files), megabytes."""
    tokenizer: str = "train:4096"
    """Folder or Hub id of a tokenizer; `train:N` makes one with N tokens from the beginning of the source."""
    tokenizer_revision: str | None = None
    """Branch, tag or commit of a tokenizer on the Hub."""
    eval_share: float = 0.005
    """Share of documents held out, chosen by a hash of their text."""
    max_tokens: int | None = None
    """Stop tokenising after so many."""
    context_length: int = 256
    """Tokens per window."""
    verify_data: bool = True
    """Compare the shards with their hashes before the run begins."""
    cross_document: bool = False
    """Let tokens attend to earlier documents of their window; faster on some backends."""

    def __post_init__(self):
        if self.context_length < 2:
            raise ValueError(f"`context_length` must be at least 2, got {self.context_length}.")
        check(self, BETWEEN, "eval_share")


@dataclass
class OptimizerOptions:
    """How its weights move."""

    optim: Literal["equivariant", "adamw", "muon"] = "equivariant"
    """The optimizer: `adamw`; `muon` for matrices and AdamW for the rest; `equivariant` for RiGPT alone."""
    learning_rate: float = 1e-2
    """Peak learning rate, in AdamW's units for all."""
    weight_decay: float = 0.1
    """Decoupled rate; not on biases and gains."""
    momentum: float = 0.95
    """Momentum of matrices (equivariant, muon)."""
    adam_beta1: float = 0.9
    """Decay of Adam's first moments."""
    adam_beta2: float = 0.95
    """Decay of Adam's second moments."""
    lr_multipliers: dict[str, float] = field(default_factory=dict)
    """Factors of the rate, by update rule (equivariant) or module, such as `embed_tokens: 0.3` (also muon)."""
    ema_decay: float | None = None
    """Share kept per step of a moving average of the weights, which is validated and is the model of checkpoints and
    of the end; null for none."""
    max_grad_norm: float = 1.0
    """Largest norm of the gradient; 0 leaves it."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """How the rate falls at the end."""
    warmup_steps: int = 40
    """Steps of linear warm-up."""
    decay_fraction: float = 0.5
    """Share of all steps, at the end, over which it falls."""
    min_lr_rate: float = 0.02
    """Share of the peak that it falls to."""

    def __post_init__(self):
        check(self, POSITIVE, "learning_rate")
        check(self, AT_LEAST_0, "weight_decay", "max_grad_norm", "warmup_steps")
        check(self, BELOW_1, "momentum", "adam_beta1", "adam_beta2")
        check(self, BETWEEN, "ema_decay")
        check(self, SHARE, "decay_fraction", "min_lr_rate")
        for name, factor in self.lr_multipliers.items():
            if factor < 0:
                raise ValueError(f"`lr_multipliers` must be at least 0, got {factor} for {name!r}.")
        if self.lr_multipliers and self.optim == "adamw":
            raise ValueError(
                f"`lr_multipliers` must be empty with `adamw`, which has one rate for all, got {self.lr_multipliers}. "
                "Pass --lr-multipliers {}."
            )


@dataclass
class SymmetryOptions:
    """The symmetry that its weights keep."""

    symmetry: Annotated[str | None, READS] = None
    """File of a symmetry of the data (exchanges of tokens, as `TokenSymmetry.save` writes) that the model gets and
    keeps."""
    symmetry_kind: Literal["irreducible", "permutation"] = "irreducible"
    """How the model carries it, unless `init_from` has it on record: its way goes on."""
    symmetry_project_weights: bool = False
    """Project the weights on it after every step, for optimizers that leave it: not only the gradients."""

    def __post_init__(self):
        check_alone(self)


def check_alone(options: Any) -> None:
    """A `ValueError` if the file of a symmetry is not there, or options of a symmetry are given without one."""
    if options.symmetry is not None and not Path(options.symmetry).is_file():
        raise ValueError(
            f'`symmetry` must be a file, got {options.symmetry!r}. Write one as docs/training.md, "A symmetry of the '
            'data", shows.'
        )
    for name in ("symmetry_project_weights", "symmetry_kind"):
        value = getattr(options, name)
        if options.symmetry is None and value != getattr(SymmetryOptions, name):
            raise ValueError(f"`{name}` needs `symmetry`, got {value!r} without it. Name the file of a symmetry.")


@dataclass
class RunOptions:
    """How long, how often, and where to."""

    output_dir: Annotated[str, WRITES] = "runs/pretrain"
    """Folder of the run: checkpoints, metrics, curves, the final model."""
    max_steps: int = 500
    """Optimizer steps."""
    global_batch_size: int = 16
    """Windows per step, over all processes."""
    per_device_train_batch_size: int | None = None
    """Windows that one process puts through the model at once, also to evaluate; all of its share if not given."""
    seed: int = 0
    """Seed of initial weights, order of the data, and dropout."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision in which the model computes; its weights stay in float32."""
    fsdp: bool = False
    """Shard parameters, gradients and optimizer among processes (FSDP2) instead of repeating them (DDP)."""
    ddp_timeout: int | None = None
    """Seconds that processes wait for one that does not answer, before the run ends; those of PyTorch if not given."""
    torch_compile: bool = False
    """Compile the model."""
    gradient_checkpointing: bool = False
    """Recompute activations: less memory for another forward pass, the same numbers."""
    deterministic: bool = False
    """Only operations that give the same bits every time."""
    logging_steps: int = 1
    """Steps between entries of the log."""
    eval_steps: int = 100
    """Steps between validation losses."""
    eval_batches: int = 12
    """Batches of the validation loss."""
    save_steps: int = 100
    """Steps between checkpoints."""
    async_save: bool = False
    """Write checkpoints while training goes on, from a copy in the CPU's memory."""
    save_total_limit: int = 2
    """Checkpoints kept, the newest."""
    save_best_limit: int = 1
    """Checkpoints kept besides, with the lowest validation loss, which is measured before each is saved; 0: none."""
    diagnose_steps: int = 0
    """Steps between measurements of kurtosis, update norm and invariance; 0: only at the end."""
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Where Accelerate sends the log besides: tensorboard, wandb, trackio, or none."""
    force: bool = False
    """Replace the results of another run that lie in `output_dir`, if there is no checkpoint to go on from."""
    allow_changes: bool = False
    """Go on from a checkpoint although options have changed since."""
    prepare_only: bool = False
    """Tokenise the data into `data_dir`, say how much it is, and stop."""

    def __post_init__(self):
        counts = ("max_steps", "global_batch_size", "per_device_train_batch_size", "logging_steps", "eval_steps")
        check(self, AT_LEAST_1, *counts, "eval_batches", "save_steps", "save_total_limit")
        check(self, AT_LEAST_1, "ddp_timeout")
        check(self, AT_LEAST_0, "save_best_limit", "diagnose_steps")
        if self.report_to == ["none"]:
            self.report_to = []
        for name in self.report_to:
            if name not in TRACKERS or importlib.util.find_spec(name) is None:
                needed = advice(ImportError(name=name), "train") or "Install it, or pass --report-to none."
                raise ValueError(
                    f"`report_to` must be installed ones of {', '.join(TRACKERS)}, got {name!r}. {needed}"
                )


# Options that may change between a checkpoint and its continuation without changing what is computed. What the shards
# hold is known by their hashes, and a symmetry by its generators.
NOT_DECISIVE = (
    *(name for name in DataOptions.__dataclass_fields__ if name not in ("context_length", "cross_document")),
    *("output_dir", "per_device_train_batch_size", "fsdp", "torch_compile", "gradient_checkpointing", "deterministic"),
    *("logging_steps", "eval_steps", "eval_batches", "save_steps", "async_save", "save_total_limit"),
    *("save_best_limit", "diagnose_steps", "ddp_timeout"),
    *("report_to", "force", "allow_changes", "prepare_only", "symmetry"),
)


@dataclass
class PretrainOptions(RunOptions, SymmetryOptions, OptimizerOptions, DataOptions, ModelOptions):
    """A pretraining run; its fields are those of the five it is made of."""

    def __post_init__(self):
        for part in PretrainOptions.__bases__:
            part.__post_init__(self)  # type: ignore[attr-defined]
        if self.warmup_steps > self.max_steps:
            raise ValueError(
                f"`warmup_steps` must not be more than `max_steps`, got {self.warmup_steps} and {self.max_steps}. "
                "Shorten it."
            )
        falling = round(self.max_steps * self.decay_fraction) if self.lr_scheduler_type != "constant" else 0
        if self.warmup_steps + falling > self.max_steps:
            raise ValueError(
                f"`warmup_steps` and `decay_fraction` must leave room for each other, got {self.warmup_steps} and "
                f"{falling} of {self.max_steps} steps. Shorten one."
            )

    def facts(self) -> dict[str, Any]:
        """The options that decide the numbers of a run; a checkpoint may only be continued with the same."""
        return {name: value for name, value in asdict(self).items() if name not in NOT_DECISIVE}


def parse_options(arguments: list[str]) -> PretrainOptions:
    """
    Options from a command line; those of `--config` files first.

    Raises:
        ValueError: if one does not exist or does not fit.
    """
    return parse(PretrainOptions, arguments, name="pretrain.py", presets=PRESETS)
