"""Every option of a pretraining run: dataclasses, a YAML file or the command line fills them."""

import importlib.util
from argparse import ArgumentError
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch


TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclass
class ModelOptions:
    """What is trained."""

    kind: str = "rigpt"
    """The class: `rigpt`; or to compare with, `stock-gpt2`. Experiments add their own to `training/kinds.py`'s."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of its configuration; the vocabulary comes from the data."""
    start: str | None = None
    """Folder or Hub id to go on from, instead of random weights."""
    revision: str | None = None
    """Branch, tag or commit of `start` on the Hub."""

    def __post_init__(self):
        from .kinds import KINDS

        if self.kind not in KINDS:
            raise ValueError(f"`model.kind` must be one of {', '.join(KINDS)}, got {self.kind!r}.")
        if self.start is not None and self.config:
            raise ValueError(
                f"`model.config` must be left out with `model.start`, got both. The model in {self.start!r} "
                "has its own."
            )
        if "vocab_size" in self.config:
            raise ValueError("`model.config` must not set vocab_size, which comes from the data. Leave it out.")


@dataclass
class DataOptions:
    """What it is trained on."""

    path: str = "runs/data/docs"
    """Folder of tokenised shards; made from `source` if it does not exist yet."""
    source: str | None = "docs"
    """`docs` (the documentation of the installed packages), a local text, JSONL or parquet file or folder, or a
    data set on the Hub."""
    source_options: dict[str, Any] = field(default_factory=dict)
    """What else the source needs: name, revision, split, text_column, separator (of text files), megabytes."""
    tokenizer: str = "train:4096"
    """Folder or Hub id of a tokenizer; `train:N` makes one with N tokens from the beginning of the source."""
    tokenizer_revision: str | None = None
    """Branch, tag or commit of a tokenizer on the Hub."""
    validation: float = 0.005
    """Share of documents held out, chosen by a hash of their text."""
    max_tokens: int | None = None
    """Stop tokenising after so many."""
    context: int = 256
    """Tokens per window."""
    verify: bool = True
    """Compare the shards with their hashes before the run begins."""
    cross_document: bool = False
    """Let tokens attend to earlier documents of their window; faster on some backends."""

    def __post_init__(self):
        if self.context < 2:
            raise ValueError(f"`data.context` must be at least 2, got {self.context}.")
        if not 0 < self.validation < 1:
            raise ValueError(f"`data.validation` must be between 0 and 1, got {self.validation}.")


@dataclass
class OptimizerOptions:
    """How its weights move."""

    name: Literal["equivariant", "adamw", "muon"] = "equivariant"
    """The optimizer: `adamw`; `muon` for matrices and AdamW for the rest; `equivariant` for RiGPT alone."""
    lr: float = 1e-2
    """Peak learning rate, in AdamW's units for both."""
    weight_decay: float = 0.1
    """Decoupled rate; not on biases and gains."""
    momentum: float = 0.95
    """Of matrices (equivariant)."""
    beta1: float = 0.9
    """Of Adam's first moments."""
    beta2: float = 0.95
    """Of Adam's second moments."""
    multipliers: dict[str, float] = field(default_factory=dict)
    """Of the learning rate, by update rule (equivariant) or module, such as `embed_tokens: 0.3` (also muon)."""
    average: float | None = None
    """Share kept per step of a moving average of the weights, which is validated and is the model of checkpoints and
    of the end."""
    clip: float | None = 1.0
    """Largest norm of the gradient."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the rate falls at the end."""
    warmup: int = 40
    """Steps of linear warm-up."""
    decay: float = 0.5
    """Share of all steps, at the end, over which it falls."""
    final: float = 0.02
    """Share of the peak that it falls to."""

    def __post_init__(self):
        for name, value, valid, rule in (
            ("lr", self.lr, self.lr > 0, "positive"),
            ("weight_decay", self.weight_decay, self.weight_decay >= 0, "at least 0"),
            ("momentum", self.momentum, 0 <= self.momentum < 1, "at least 0 and below 1"),
            ("beta1", self.beta1, 0 <= self.beta1 < 1, "at least 0 and below 1"),
            ("beta2", self.beta2, 0 <= self.beta2 < 1, "at least 0 and below 1"),
            (
                "average",
                self.average,
                self.average is None or 0 < self.average < 1,
                "between 0 and 1, or null for none",
            ),
            ("clip", self.clip, self.clip is None or self.clip > 0, "positive, or null for none"),
            ("warmup", self.warmup, self.warmup >= 0, "at least 0"),
            ("decay", self.decay, 0 <= self.decay <= 1, "a share between 0 and 1"),
            ("final", self.final, 0 <= self.final <= 1, "a share between 0 and 1"),
        ):
            if not valid:
                raise ValueError(f"`optimizer.{name}` must be {rule}, got {value}.")
        for name, factor in self.multipliers.items():
            if factor < 0:
                raise ValueError(f"`optimizer.multipliers` must be at least 0, got {factor} for {name!r}.")
        if self.multipliers and self.name == "adamw":
            raise ValueError("`optimizer.multipliers` must be left out with `adamw`, which has one rate for all.")


@dataclass
class RunOptions:
    """How long, how often, and where to."""

    output: str = "runs/pretrain"
    """Folder of the run: checkpoints, metrics, curves, the final model."""
    steps: int = 500
    """Optimizer steps."""
    batch_size: int = 16
    """Windows per step, over all processes."""
    micro_batch_size: int | None = None
    """Windows that one process puts through the model at once, also to evaluate; all of its share if not given."""
    seed: int = 0
    """Of initial weights, order of the data, and dropout."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision."""
    fsdp: bool = False
    """Shard parameters, gradients and optimizer among processes (FSDP2) instead of repeating them (DDP)."""
    compile: bool = False
    """Compile the model."""
    deterministic: bool = False
    """Only operations that give the same bits every time."""
    log_every: int = 1
    """Steps between entries of the log."""
    evaluate_every: int = 100
    """Steps between validation losses."""
    evaluate_batches: int = 12
    """Batches of the validation loss."""
    save_every: int = 100
    """Steps between checkpoints."""
    keep_last: int = 2
    """Checkpoints kept, the newest."""
    keep_best: int = 1
    """Checkpoints kept besides, with the lowest validation loss, which is measured before each is saved; 0: none."""
    diagnose_every: int = 0
    """Steps between measurements of kurtosis, update norm and invariance; 0: only at the end."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Where Accelerate sends the log besides: tensorboard, wandb, trackio."""
    force: bool = False
    """Replace the results of another run that lie in `output`, if there is no checkpoint to go on from."""
    allow_changes: bool = False
    """Go on from a checkpoint although options have changed since."""
    prepare_only: bool = False
    """Tokenise the data into `data.path`, say how much it is, and stop."""

    def __post_init__(self):
        for name in ("steps", "batch_size", "log_every", "evaluate_every", "evaluate_batches", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"`run.{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("keep_last", "keep_best", "diagnose_every"):
            if getattr(self, name) < (1 if name == "keep_last" else 0):
                raise ValueError(f"`run.{name}` is too small, got {getattr(self, name)}.")
        if self.precision == "fp16" and not torch.cuda.is_available():
            raise ValueError("`run.precision` must be `no` or `bf16` on a CPU, got `fp16`.")
        for name in self.trackers:
            if name not in TRACKERS or importlib.util.find_spec(name) is None:
                raise ValueError(
                    f"`run.trackers` must be installed ones of {', '.join(TRACKERS)}, got {name!r}. Install it, or "
                    "pass --run.trackers '[]'."
                )
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ValueError(f"`run.micro_batch_size` must be at least 1, got {self.micro_batch_size}.")


@dataclass
class PretrainOptions:
    """A pretraining run."""

    model: ModelOptions = field(default_factory=ModelOptions)
    """What is trained."""
    data: DataOptions = field(default_factory=DataOptions)
    """What it is trained on."""
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    """How its weights move."""
    run: RunOptions = field(default_factory=RunOptions)
    """How long, how often, and where to."""

    def __post_init__(self):
        from .kinds import KINDS

        if KINDS[self.model.kind].param_groups is None and self.optimizer.name == "equivariant":
            raise ValueError(
                f"`optimizer.name` must be `adamw` or `muon` for `model.kind` `{self.model.kind}`, got `equivariant`: "
                "its parameters are not in the table of frames. Pass --optimizer.name adamw."
            )
        if self.optimizer.warmup > self.run.steps:
            raise ValueError(
                f"`optimizer.warmup` must not be longer than `run.steps`, got {self.optimizer.warmup} and "
                f"{self.run.steps}. Shorten it."
            )
        falling = round(self.run.steps * self.optimizer.decay) if self.optimizer.schedule != "constant" else 0
        if self.optimizer.warmup + falling > self.run.steps:
            raise ValueError(
                f"`optimizer.warmup` and `optimizer.decay` must leave room for each other, got "
                f"{self.optimizer.warmup} and {falling} of {self.run.steps} steps. Shorten one."
            )

    def facts(self) -> dict[str, Any]:
        """What decides the numbers of a run; a checkpoint may only be continued with the same."""
        facts = asdict(self)
        for name in NOT_DECISIVE:
            facts["run"].pop(name)
        # What the shards hold is known by their hashes.
        for name in asdict(DataOptions()).keys() - {"context", "cross_document"}:
            facts["data"].pop(name)
        return facts

    @property
    def output(self) -> Path:
        """The run's folder."""
        return Path(self.run.output)


# Options that may change between a checkpoint and its continuation without changing what is computed. The data are
# compared by the hashes of their shards instead of by their place.
NOT_DECISIVE = (
    "output",
    "micro_batch_size",
    "fsdp",
    "compile",
    "deterministic",
    "log_every",
    "evaluate_every",
    "evaluate_batches",
    "save_every",
    "keep_last",
    "keep_best",
    "diagnose_every",
    "trackers",
    "allow_changes",
    "force",
    "prepare_only",
)
PRESETS = Path(__file__).parent / "presets"


def find_preset(name: str) -> str:
    """The path of a preset that is named alone (`smoke`) or as `presets/smoke.yaml`; anything else as it is."""
    given = Path(name)
    packaged = PRESETS / f"{given.name.removesuffix('.yaml')}.yaml"
    named = str(given.parent) in (".", "presets") and not name.startswith(".")
    # Looked for in the list first: what is given may also be YAML itself, too long for the name of a file.
    return str(packaged) if named and packaged in PRESETS.glob("*.yaml") and not given.is_file() else name


def make_parser() -> Any:
    """The command line, with every option and its help."""
    try:
        from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings
    except ImportError as error:
        raise ValueError(
            "The training programs need `jsonargparse`. Install it with: pip install rigpt-hf[train]"
        ) from error

    class PresetOrFile(ActionConfigFile):
        def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
            super().__call__(parser, cfg, find_preset(values), option_string)

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="pretrain.py",
        description="Pretrain a RiGPT, or a stock GPT-2 to compare with. Start it with `accelerate launch` or "
        "`torchrun`; called again on the same folder it goes on from the last checkpoint. Example: accelerate launch "
        "training/pretrain.py --config training/presets/smoke.yaml --run.steps 100",
        exit_on_error=False,
    )
    presets = ", ".join(sorted(path.stem for path in PRESETS.glob("*.yaml")))
    text = f"YAML file with any of the options, or the name of a preset: {presets}."
    parser.add_argument("--config", action=PresetOrFile, help=text)
    parser.add_class_arguments(PretrainOptions)
    return parser


def parse_options(arguments: list[str] | None = None) -> PretrainOptions:
    """
    Options from a command line; those of `--config` files first.

    Raises:
        ValueError: if one does not exist or does not fit.
    """
    parser = make_parser()
    try:
        parsed = parser.instantiate(parser.parse_args(arguments))
    except ArgumentError as error:
        raise ValueError(f"{str(error).rstrip('.')}. Try --help.") from error
    return PretrainOptions(parsed.model, parsed.data, parsed.optimizer, parsed.run)
