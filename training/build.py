"""The model, the optimizer and the data that the options of a run describe."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed

from rigpt_hf.optim import EquivariantOptimizer, config_of
from rigpt_hf.text.sources import check_source_options, documents, pinned
from rigpt_hf.text.tokenizer import load_tokenizer, train_tokenizer

from .data import Manifest, prepare
from .kinds import KINDS, kind_of
from .muon import muon_param_groups
from .options import DataOptions, ModelOptions, OptimizerOptions


# Characters of the source that a tokenizer of the run's own is made from.
TOKENIZER_TEXT = 20_000_000
# What a folder of shards was asked for, besides what its manifest says.
REQUEST = "request.json"


def check_launch() -> None:
    """
    Raise if the program was launched for DeepSpeed, which flattens the parameters that checkpoints name.

    Raises:
        ValueError: says what to launch instead.
    """
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "`accelerate` must be configured for data parallelism, got DeepSpeed. Use DDP, or --run.fsdp true to "
            "shard optimizer and parameters."
        )


def build_model(options: ModelOptions, vocab_size: int, context: int, end_of_text: int | None, seed: int) -> nn.Module:
    """
    A model with random weights, or that of `options.start`.

    Raises:
        ValueError: if a field does not exist, values are impossible or do not fit each other, or the start has another
            vocabulary.
    """
    set_seed(seed)
    if options.start is not None:
        model = start_from(options)
        longest = model.config.max_position_embeddings
        if context > longest:
            raise ValueError(
                f"`data.context` must be at most the {longest} positions of {options.start!r}, got {context}. "
                "Shorten it."
            )
        if model.config.vocab_size < vocab_size:
            raise ValueError(
                f"`model.start` must know all {vocab_size} tokens of the data, got {options.start!r} with "
                f"{model.config.vocab_size}. Tokenise the data with that model's tokenizer."
            )
        return model.train()
    kind = KINDS[options.kind]
    config_class, model_class = kind.config, kind.model
    defaults: dict[str, Any] = {
        "vocab_size": vocab_size,
        kind.positions: context,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
        **kind.defaults,
    }
    unknown = sorted(set(options.config) - set(config_class().to_dict()))
    if unknown:
        raise ValueError(
            f"`model.config` must hold fields of {config_class.__name__}, got {', '.join(unknown)}. See its docstring."
        )
    config = config_class(**(defaults | options.config))
    if context > config.max_position_embeddings:
        raise ValueError(
            f"`data.context` must be at most the positions of `model.config`, got {context} and "
            f"{config.max_position_embeddings}. Shorten one, or leave the positions out."
        )
    try:
        return model_class(config).train()
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"`model.config` must hold values that {model_class.__name__} can be made with, got {options.config}: "
            f"{type(error).__name__}: {error}. See the docstring of {config_class.__name__}."
        ) from error


def start_from(options: ModelOptions) -> nn.Module:
    """The model named by `options.start`, in float32."""
    try:
        model = AutoModelForCausalLM.from_pretrained(options.start, revision=options.revision, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`model.start` must be the folder of a saved model or the id of a repository on the Hub, got "
            f"{options.start!r}: {str(error).strip().splitlines()[0]}"
        ) from error
    if kind_of(model.config.model_type) != options.kind:
        raise ValueError(
            f"`model.kind` must be that of `model.start`, got {options.kind!r} for {options.start!r}, a "
            f"{model.config.model_type}. Pass --model.kind, or convert it with `rigpt convert`."
        )
    return model


def build_optimizer(options: OptimizerOptions, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a wrapped model; every group keeps its share of the peak rate as `multiplier`."""
    optimizer: torch.optim.Optimizer
    betas = options.beta1, options.beta2
    # All processes of a run train one model, step by step.
    settings: dict[str, Any] = {"momentum": options.momentum, "betas": betas, "sharing": "all"}
    if options.name == "equivariant":
        model_type = config_of(model).model_type
        kind = KINDS.get(kind_of(model_type) or "")
        if kind is None or kind.param_groups is None:
            raise ValueError(
                f"`optimizer.name` must be `adamw` or `muon` for a {model_type}, got `equivariant`: "
                "its parameters are not in the table of frames. Convert it first with `rigpt convert`."
            )
        groups = kind.param_groups(model, options.lr, options.weight_decay, lr_multipliers=options.multipliers)
        optimizer = EquivariantOptimizer(groups, options.lr, **settings)
    elif options.name == "muon":
        groups = muon_param_groups(model, options.lr, options.weight_decay, lr_multipliers=options.multipliers)
        optimizer = EquivariantOptimizer(groups, options.lr, **settings)
    else:
        matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
        others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": options.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=betas, fused=True)
    for group in optimizer.param_groups:
        group["multiplier"] = group["lr"] / options.lr
    return optimizer


def ensure_data(options: DataOptions, progress: bool = True) -> Path:
    """
    The folder of tokenised shards, made first if it is not there; for the main process.

    Raises:
        ValueError: if there is neither a folder nor a source, or an option of the source is unknown.
    """
    check_source_options(options.source_options)
    path = Path(options.path)
    if (path / "manifest.json").is_file():
        check_data(options, Manifest.read(path), path)
        return path
    if options.source is None:
        raise ValueError(
            f"`data.path` must be a folder of tokenised shards, got {str(path)!r}. Name a `data.source` "
            "to make it from."
        )
    source_options = dict(options.source_options)
    # Before anything is read from it, so that a tokenizer made here and the shards see the same text.
    if (revision := pinned(options.source, source_options.get("revision"))) is not None:
        source_options["revision"] = revision
    prepare(
        options.source,
        build_tokenizer(options, source_options),
        path,
        validation=options.validation,
        max_tokens=options.max_tokens,
        progress=progress,
        **source_options,
    )
    request = {"tokenizer": options.tokenizer, "tokenizer_revision": options.tokenizer_revision}
    if "revision" in options.source_options:
        request["revision"] = options.source_options["revision"]
    (path / REQUEST).write_text(json.dumps(request) + "\n", encoding="utf-8")
    return path


def check_data(options: DataOptions, manifest: Manifest, path: Path) -> None:
    """
    Raise if a folder of shards was made from something else than the options say.

    Raises:
        ValueError: names the option; with `source: null` a folder is taken as it is.
    """
    if options.source is None:
        return
    request = path / REQUEST
    made: dict[str, Any] = {**manifest.source, "validation": manifest.validation}
    made |= json.loads(request.read_text(encoding="utf-8")) if request.is_file() else {"tokenizer": options.tokenizer}
    wanted = {"source": options.source, **options.source_options, "max_tokens": options.max_tokens}
    wanted |= {"validation": options.validation, "tokenizer": options.tokenizer}
    wanted |= {"tokenizer_revision": options.tokenizer_revision} if options.tokenizer_revision else {}
    for name, value in wanted.items():
        # A branch or tag that was asked for, or the commit that it was then.
        if value not in (made.get(name), manifest.source.get(name)):
            place = f"source_options.{name}" if name in options.source_options else name
            raise ValueError(
                f"`data.path` must hold what `data.{place}` says, got {str(path)!r} made with {made.get(name)!r} "
                f"instead of {value!r}. Name another `data.path`, or pass --data.source null to take it as it is."
            )


def build_tokenizer(options: DataOptions, source_options: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer named by the options, or one made from the beginning of the source."""
    kind, _, size = options.tokenizer.partition(":")
    if kind != "train" or not size:
        return load_tokenizer(options.tokenizer, options.tokenizer_revision)
    if not size.isdigit() or int(size) < 300:
        raise ValueError(
            f"`data.tokenizer` must be a folder, a Hub id or train:N with N at least 300, got {options.tokenizer!r}."
        )
    texts, length = [], 0
    assert options.source is not None
    for text in documents(options.source, **source_options):
        texts.append(text)
        length += len(text)
        if length > TOKENIZER_TEXT:
            break
    return train_tokenizer(texts, int(size))
