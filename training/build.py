"""The model, the optimizer and the data that the options of a run describe."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedTokenizerFast, set_seed

from rigpt_hf.checkpoints.read import load_model
from rigpt_hf.checkpoints.written import parse_json
from rigpt_hf.command_line import check_above
from rigpt_hf.optim import EquivariantOptimizer, config_of
from rigpt_hf.symmetry.tokens.symmetry import read_content
from rigpt_hf.text.sources import check_source_options, documents, pinned
from rigpt_hf.text.tokenizer import LARGEST, load_tokenizer, train_tokenizer

from .data import Manifest, TokenShards, Windows, prepare, validation_batches
from .kinds import KINDS, kind_of
from .muon import muon_param_groups
from .options import DataOptions, ModelOptions, OptimizerOptions, PretrainOptions


# Characters of the source that a tokenizer of the run's own is made from.
TOKENIZER_TEXT = 20_000_000
# Options that a folder of shards was made for, besides those in its manifest.
REQUEST = "request.json"


def check_run(options: PretrainOptions) -> None:
    """
    Raise if nothing that the options ask for could be trained; before data are made.

    Raises:
        ValueError: if there is no such kind of model, the optimizer does not fit it, it cannot keep a symmetry or
            recompute activations, or the program was launched for DeepSpeed, which flattens the parameters that
            checkpoints name.
    """
    if options.model_kind not in KINDS:
        raise ValueError(f"`model_kind` must be one of {', '.join(KINDS)}, got {options.model_kind!r}. Correct it.")
    if KINDS[options.model_kind].param_groups is None and options.optim == "equivariant":
        raise ValueError(
            f"`optim` must be `adamw` or `muon` for `model_kind` `{options.model_kind}`, got `equivariant`: its "
            "parameters are not in the table of frames. Pass --optim adamw."
        )
    if options.symmetry is not None:
        if KINDS[options.model_kind].param_groups is None:
            raise ValueError(
                f"`symmetry` must be left out for `model_kind` `{options.model_kind}`, got {options.symmetry!r}: its "
                "parameters are not in the table of frames. Take the kind rigpt."
            )
        read_content(options.symmetry)
    if options.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("`mixed_precision` must be `no` or `bf16` on a CPU, got `fp16`.")
    if options.gradient_checkpointing and not KINDS[options.model_kind].model.supports_gradient_checkpointing:
        raise ValueError(
            f"`gradient_checkpointing` must be left out for `model_kind` `{options.model_kind}`, whose layers cannot "
            "recompute their activations, got True. Take fewer windows at once: --per-device-train-batch-size."
        )
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "`accelerate` must be configured for data parallelism, got DeepSpeed. Use DDP, or --fsdp to shard "
            "optimizer and parameters."
        )


def build_model(options: ModelOptions, vocab_size: int, context: int, end_of_text: int | None, seed: int) -> nn.Module:
    """
    A model with random weights, or that of `options.init_from`, in training mode.

    Raises:
        ValueError: if a field does not exist, values are impossible or do not fit each other, or the model to go on
            from has another vocabulary.
    """
    set_seed(seed)
    if options.init_from is not None:
        return start_from(options, vocab_size, context)
    kind = KINDS[options.model_kind]
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end_of_text)
    defaults = {"vocab_size": vocab_size, kind.positions: context} | tokens | dict(kind.defaults)
    given, _ = kind.fields(options.config_overrides)
    if unknown := sorted(set(given) - set(kind.config().to_dict())):
        raise ValueError(
            f"`config_overrides` must hold fields of {kind.config.__name__}, got {', '.join(unknown)}. See its "
            "docstring."
        )
    try:
        config = kind.config(**(defaults | given))
    except StrictDataclassError as error:
        raise ValueError(f"`config_overrides` must fit together: {' '.join(str(error).split())}") from error
    if context > config.max_position_embeddings:
        raise ValueError(
            f"`context_length` must be at most the positions of `config_overrides`, got {context} and "
            f"{config.max_position_embeddings}. Shorten one, or leave the positions out."
        )
    try:
        return kind.model(config).train()
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"`config_overrides` must hold values that {kind.model.__name__} can be made with, got "
            f"{given}: {type(error).__name__}: {error}. See the docstring of "
            f"{kind.config.__name__}."
        ) from error


def start_from(options: ModelOptions, vocab_size: int, context: int) -> nn.Module:
    """The model named by `options.init_from`, in float32 and training mode; raises as [`build_model`]."""
    start = options.init_from
    revision = options.model_revision
    assert start is not None
    model = load_model(start, argument="init_from", revision=revision, allow_unexpected=True, dtype=torch.float32)
    config = model.config
    if kind_of(config.model_type) != options.model_kind:
        raise ValueError(
            f"`model_kind` must be that of `init_from`, got {options.model_kind!r} for {start!r}, a "
            f"{config.model_type}. Pass --model-kind, or convert it with `rigpt convert`."
        )
    if context > config.max_position_embeddings:
        raise ValueError(
            f"`context_length` must be at most the {config.max_position_embeddings} positions of {start!r}, got "
            f"{context}. Shorten it."
        )
    if config.vocab_size < vocab_size:
        raise ValueError(
            f"`init_from` must know all {vocab_size} tokens of the data, got {start!r} with {config.vocab_size}. "
            "Tokenise the data with that model's tokenizer."
        )
    return model.train()


def recompute_activations_(model: nn.Module) -> None:
    """From now on a training step keeps the input of each layer, and computes what is in the layer twice."""
    # As the method is called from Transformers 5.20 on.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    # Entered anew in the backward pass: what is reentrant knows neither shards nor gradients that stay local.
    enable({"use_reentrant": False})


def build_optimizer(options: OptimizerOptions, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a wrapped model; every group keeps its share of the peak rate as `multiplier`."""
    optimizer: torch.optim.Optimizer
    rate, decay, betas = options.learning_rate, options.weight_decay, (options.adam_beta1, options.adam_beta2)
    if options.optim == "adamw":
        matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
        others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
        groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)
    else:
        of_model: Any = muon_param_groups
        if options.optim == "equivariant":
            of_model = KINDS[kind_of(config_of(model).model_type) or ""].param_groups
        groups = of_model(model, rate, decay, lr_multipliers=options.lr_multipliers)
        # All processes of a run train one model, step by step.
        optimizer = EquivariantOptimizer(groups, rate, momentum=options.momentum, betas=betas, sharing="all")
    for group in optimizer.param_groups:
        group["multiplier"] = group["lr"] / rate
    return optimizer


def ensure_data(options: DataOptions, progress: bool = True) -> Path:
    """
    The folder of tokenised shards, made first if it is not there; for the main process.

    Raises:
        ValueError: if there is neither a folder nor a source, or an option of the source is unknown.
    """
    check_source_options(options.data_options)
    path = Path(options.data_dir)
    check_above(path, "data_dir", is_folder=True)
    if (path / "manifest.json").is_file():
        check_data(options, Manifest.read(path), path)
        return path
    if options.data is None:
        raise ValueError(
            f"`data_dir` must be a folder of tokenised shards, got {str(path)!r}. Name `data` to make it from."
        )
    source_options = dict(options.data_options)
    # Before anything is read from it, so that a tokenizer made here and the shards see the same text.
    if (revision := pinned(options.data, source_options.get("revision"))) is not None:
        source_options["revision"] = revision
    request = {"tokenizer": options.tokenizer, "tokenizer_revision": options.tokenizer_revision}
    if "revision" in options.data_options:
        request["revision"] = options.data_options["revision"]
    try:
        prepare(
            options.data,
            build_tokenizer(options, source_options),
            path,
            validation=options.eval_share,
            max_tokens=options.max_tokens,
            progress=progress,
            companions={REQUEST: request},
            **source_options,
        )
    except ValueError as error:  # in whose words the folder is the output
        error.args = (str(error).replace("`output_dir`", "`data_dir`"), *error.args[1:])
        raise
    return path


def open_windows(
    options: PretrainOptions, train: TokenShards, held_out: TokenShards
) -> tuple[Windows, Iterator[dict[str, torch.Tensor]]]:
    """
    The windows that a run trains on, and the batches of its validation loss.

    Raises:
        ValueError: if the shards do not hold so many tokens.
    """
    context, plain = options.context_length, {"cross_document": options.cross_document}
    windows = Windows(train, context, **plain)
    return windows, validation_batches(held_out, context, options.global_batch_size, options.eval_batches, **plain)


def check_data(options: DataOptions, manifest: Manifest, path: Path) -> None:
    """
    Raise if a folder of shards was made from something else than the options say.

    Raises:
        ValueError: names the option; with `data: null` a folder is taken as it is.
    """
    if options.data is None:
        return
    request = path / REQUEST
    made: dict[str, Any] = {**manifest.source, "validation": manifest.validation}
    try:
        asked: Any = parse_json(request.read_bytes()) if request.is_file() else {"tokenizer": options.tokenizer}
        made |= asked.items()
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"`data_dir` must have an undamaged `{REQUEST}`, got {str(path)!r}. Make the folder again, or pass --data "
            "null to take it as it is."
        ) from error
    # Options by the names that the manifest has for them.
    wanted: dict[str, tuple[str, Any]] = {
        "data": ("source", options.data),
        "max_tokens": ("max_tokens", options.max_tokens),
    }
    wanted |= {f"data_options.{name}": (name, value) for name, value in options.data_options.items()}
    wanted |= {"eval_share": ("validation", options.eval_share), "tokenizer": ("tokenizer", options.tokenizer)}
    if options.tokenizer_revision:
        wanted["tokenizer_revision"] = ("tokenizer_revision", options.tokenizer_revision)
    for option, (name, value) in wanted.items():
        # A branch or tag that was asked for, or the commit that it was then.
        if value not in (made.get(name), manifest.source.get(name)):
            raise ValueError(
                f"`data_dir` must hold what `{option}` says, got {str(path)!r} made with {made.get(name)!r} "
                f"instead of {value!r}. Name another `data_dir`, or pass --data null to take it as it is."
            )


def build_tokenizer(options: DataOptions, source_options: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer named by the options, or one made from the beginning of the source."""
    kind, _, size = options.tokenizer.partition(":")
    if options.tokenizer_revision is not None and (size or Path(options.tokenizer).exists()):
        raise ValueError(
            f"`tokenizer_revision` names a version on the Hub, got {options.tokenizer_revision!r} with "
            f"{options.tokenizer!r}. Leave it out."
        )
    if kind != "train" or not size:
        return load_tokenizer(options.tokenizer, options.tokenizer_revision)
    if not size.isdigit() or not 300 <= int(size) <= LARGEST:
        raise ValueError(
            f"`tokenizer` must be a folder, a Hub id or train:N with N from 300 to {LARGEST:,}, got "
            f"{options.tokenizer!r}."
        )
    texts, length = [], 0
    assert options.data is not None
    for text in documents(options.data, **source_options):
        texts.append(text)
        length += len(text)
        if length > TOKENIZER_TEXT:
            break
    return train_tokenizer(texts, int(size))
