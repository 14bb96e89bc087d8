"""A fine-tuning run on TRL's `SFTTrainer`: places, model, adapter, the measured loss, and the folder in the end."""

import copy
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
import transformers
import trl
from accelerate import PartialState
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils import logging

from rigpt_hf import __version__
from rigpt_hf.checkpoints.companions import plain_generation
from rigpt_hf.checkpoints.folder import Seen, check_output, new_folder
from rigpt_hf.checkpoints.named import load_rigpt, rigpt_config
from rigpt_hf.checkpoints.read import check_ids, quiet_loading
from rigpt_hf.checkpoints.read import load_tokenizer as read_tokenizer
from rigpt_hf.checkpoints.weights import check_made
from rigpt_hf.checkpoints.workers import AccelerateWorkers, together
from rigpt_hf.optim import EquivariantOptimizer, equivariant_param_groups
from rigpt_hf.symmetry.tokens import Representation, SymmetricTraining, SymmetryCallback
from rigpt_hf.symmetry.tokens.training import representation_of
from rigpt_hf.terminal import notices_after, say

from .diagnostics import summed_loss
from .finetune_data import HeldOut, encode, hold_out, read_rows
from .finetune_options import LONGEST, FinetuneOptions, FinetuneReport, make_adapter, perplexity
from .folder import Lock
from .symmetry import absent_in_words, read_symmetry, resumed
from .working import (
    RECORD,
    begin,
    check_places,
    check_resumes,
    clear,
    has_left,
    last_checkpoint,
    loading,
    not_of_a_run,
    retain,
)


MEASURED = 256  # examples of the training data, where none are held out
LOOKED_AT = 4096  # examples that are looked through for the tokens of a symmetry

logger = logging.get_logger(__name__)


class Bar(ProgressCallback):
    """A bar that has the loss behind it, where that of the library prints all that is logged."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        """Show the loss of an entry of the log."""
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")


class Tuner(trl.SFTTrainer):
    """
    An `SFTTrainer` that sends nothing about a run to anybody, measures the loss token by token, and has checkpoints
    that are whole or do not count.
    """

    checkpoints_kept = 1
    saving_to: Path | None = None

    def _send_telemetry(self) -> None:
        pass

    def create_model_card(self, *arguments: Any, **options: Any) -> None:
        """None beside the checkpoints: what is there is not to be published."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        working, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        workers, is_main = AccelerateWorkers(self.accelerator), self.accelerator.is_main_process
        seen = together(workers, lambda: check_output(working / name, None, force=True) if is_main else {})
        with new_folder(working / name, seen, workers=workers) as folder:
            self.saving_to = folder
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                for path in (folder / name).iterdir():
                    path.rename(folder / path.name)
                (folder / name).rmdir()
        if self.args.should_save:
            retain(working, self.checkpoints_kept)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.saving_to or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with loading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with loading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with loading(checkpoint):
            super()._load_rng_state(checkpoint)

    def mean_loss(self, examples: datasets.Dataset) -> float:
        """The mean loss in nats per predicted token, over all examples and processes; not over batches."""
        own = examples.select(range(self.args.process_index, len(examples), self.args.world_size))
        size = self.args.per_device_train_batch_size

        def batches() -> Iterator[dict[str, Any]]:
            for start in range(0, len(own), size):
                batch = self.data_collator([own[index] for index in range(start, min(start + size, len(own)))])
                yield {
                    key: value.to(self.args.device) if isinstance(value, torch.Tensor) else value
                    for key, value in batch.items()
                }

        with self.compute_loss_context_manager():
            totals = summed_loss(self.model, batches())
        loss, count = self.accelerator.reduce(totals.to(self.args.device)).tolist()
        return loss / count


def finetune(options: FinetuneOptions, callbacks: Sequence[TrainerCallback] = ()) -> FinetuneReport:
    """
    Fine-tune a model and write the result; on an error nothing is written but checkpoints to resume from.

    Args:
        options: What to do.
        callbacks: For the trainer.

    Raises:
        ValueError: if an option does not fit the model or the data; nothing has been trained then.
    """
    state = PartialState(cpu=options.cpu)
    working = options.working_dir
    check_places(options)
    workers = AccelerateWorkers(state)
    held = together(workers, lambda: Lock(working, transient=has_left(working)) if state.is_main_process else None)
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        seen = check_places(options)  # another run may have ended since
        with warnings.catch_warnings(), ExitStack() as notices:
            # PEFT and TRL ask by the name that Transformers had before.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            notices.enter_context(notices_after("rigpt_hf.symmetry", __name__))
            return _finetune(options, state, [*callbacks], seen, notices.close)
    except BaseException:
        if held is not None and last_checkpoint(working) is None:
            clear(working)
        raise
    finally:
        if held is not None:
            held.release()
        if shown:
            datasets.enable_progress_bars()


def _finetune(
    options: FinetuneOptions,
    state: PartialState,
    callbacks: list[TrainerCallback],
    seen: Seen,
    speak: Callable[[], None],
) -> FinetuneReport:
    # `speak` brings out what was to wait until nothing refuses any more.
    source = str(Path(options.model).resolve()) if Path(options.model).is_dir() else options.model
    config = named_model(rigpt_config, source, options.model_revision)
    tokenizer = load_tokenizer(options, source, config)
    symmetry = read_symmetry(options.symmetry, config, tokenizer)
    context = options.context_length or min(config.max_position_embeddings, LONGEST)
    if context > config.max_position_embeddings:
        raise ValueError(
            f"`context_length` must be at most the model's {config.max_position_embeddings}, got {context}."
        )
    saved_dtype = config.dtype or torch.float32
    # Small updates would be lost in 16 bits; an adapter is in float32 and leaves the weights.
    dtype = saved_dtype if options.lora else torch.promote_types(saved_dtype, torch.float32)
    model = named_model(load_rigpt, source, dtype, options.model_revision)
    resumed(options, model, symmetry, last_checkpoint(options.working_dir) if options.resume else None)
    representation = representation_of(model, symmetry, options.symmetry_kind)
    special, generation = (model.config.use_cache, model.config.pad_token_id), model.generation_config
    # The library loads what it would not save: how to sample, beside the wish not to.
    model.generation_config = plain_generation(generation)
    with state.main_process_first():  # the others read what it cached
        where = options.data_split, options.data_config, options.data_revision
        rows = read_rows(options.data, *where)
    shown = state.is_main_process and not options.quiet
    held = hold_out(rows, options.eval_share, shown)
    if rows.blank and state.is_main_process:
        logger.warning(f"{rows.blank} row(s) of {options.data!r} have neither a text nor a chat; they are left out.")
    record = make_record(options, held)
    if options.resume:
        check_resumes(options, record)
    examples = encode(rows, ~held.mask, tokenizer, context, shown)
    held_out = encode(rows, held.mask, tokenizer, context) if held.mask.any() else None
    if symmetry is not None and state.is_main_process:
        read = np.concatenate([np.zeros(0, int), *examples[:LOOKED_AT]["input_ids"]])
        if (absent := absent_in_words(symmetry, read, tokenizer)) is not None:
            logger.warning(absent)

    transformers.set_seed(options.seed)  # an adapter starts at random
    own = copy.deepcopy(tokenizer)
    trainer = make_trainer(options, model, own, examples, held_out, context, callbacks, representation)
    trained: Any = trainer.model
    learned, measured = trainer.train_dataset, trainer.eval_dataset
    if not len(learned):
        raise ValueError(
            f"`data` must give at least one example, got {len(examples)} chats from {options.data!r} with no "
            f"assistant's token in their first {context} tokens. Give a longer context or other data."
        )
    if len(learned) < len(examples) and not trainer.args.packing and state.is_main_process:
        logger.warning(
            f"{len(examples) - len(learned)} chats were left out because the assistant says nothing in their first "
            f"{context} tokens: other data, or a longer `--context-length`, would keep them."
        )
    kind: Literal["held-out", "training"] = "held-out" if measured else "training"
    measured = measured or learned.select(range(min(MEASURED, len(learned))))
    before = trainer.mean_loss(measured)
    if not math.isfinite(before):
        raise ValueError(
            f"`model` must have a finite loss on {kind} examples, got {before} by {source!r} before any training. "
            "Download or save it once more, or give other data."
        )
    projected = symmetric = None
    if representation is not None:  # as the trainer would first; what that does to the loss is not training's
        symmetric = SymmetricTraining(model, representation, project_weights=True)
        symmetric.begin_(None)
        projected = trainer.mean_loss(measured)
    if state.is_main_process:
        begin(options, record)  # nothing is left that could refuse
        say(f"Before: loss {before:.4f}, perplexity {perplexity(before):.2f} on {kind} examples")
        if projected is not None:
            say(f"Projected on the symmetry: loss {projected:.4f}, perplexity {perplexity(projected):.2f}")
    speak()
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(last_checkpoint(options.working_dir)) if options.resume else None)
    seconds = time.perf_counter() - started
    after = trainer.mean_loss(measured)
    if not (math.isfinite(after) and all(parameter.isfinite().all() for parameter in trained.parameters())):
        raise ValueError(
            f"`learning_rate` must leave weights and loss finite, got {options.peak_rate} and a loss of {after} at "
            "the end. Nothing was written. Begin anew with a lower one, and `force=True`."
        )
    report = FinetuneReport(
        output_dir=options.output_dir,
        trained=sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad),
        parameters=sum(parameter.numel() for parameter in trained.parameters()),
        examples=len(learned),
        held_out=len(measured) if kind == "held-out" else 0,
        measured_on=kind,
        loss_before=before,
        loss_projected=projected,
        loss_after=after,
        steps=trainer.state.global_step,
        tokens=int(trainer.state.num_input_tokens_seen),
        seconds=round(seconds, 1),
        symmetry_distance=None if symmetric is None else symmetric.distance(),
        curve=[(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry],
    )
    if state.is_main_process:
        # Trainers set these for themselves, and they would be saved that way.
        model.config.use_cache, model.config.pad_token_id = special
        generation.bos_token_id = model.generation_config.bos_token_id
        generation.eos_token_id = model.generation_config.eos_token_id
        record |= {"result": asdict(report)}
        write(options, seen, trained.eval(), tokenizer, generation, saved_dtype, record)
    state.wait_for_everyone()
    return report


def make_record(options: FinetuneOptions, held: HeldOut) -> dict[str, Any]:
    """The options, the data and the versions that a result was made with."""
    libraries = (torch, transformers, datasets, trl)
    return {
        "options": asdict(options),
        "data": {"sha256": held.fingerprint, "rows": len(held.mask), "held_out": int(held.mask.sum())},
        "versions": {"rigpt_hf": __version__} | {library.__name__: library.__version__ for library in libraries},
    }


def named_model(load: Any, *arguments: Any) -> Any:
    """Load something from a source, which messages call `model` here."""
    try:
        return load(*arguments)
    except ValueError as error:
        raise ValueError(str(error).replace("`source`", "`model`")) from error


def load_tokenizer(options: FinetuneOptions, source: str, config: Any) -> Any:
    """The model's tokenizer, with the template of the options."""
    try:
        tokenizer = read_tokenizer(source, argument="model", revision=options.model_revision)
    except ValueError as error:
        raise ValueError(
            f"`model` must have a tokenizer, got {source!r} with none that loads here: {error} Add the tokenizer's "
            "files to the folder."
        ) from error
    check_ids(tokenizer, config, source)
    if (template := options.read_template()) is not None:
        tokenizer.chat_template = template
    return tokenizer


def make_trainer(
    options: FinetuneOptions,
    model: Any,
    tokenizer: Any,
    examples: datasets.Dataset,
    held_out: datasets.Dataset | None,
    context: int,
    callbacks: list[TrainerCallback],
    representation: Representation | None = None,
) -> Tuner:
    """The trainer of the options; documents are packed, so that no token sees another document, chats are not."""
    packed = examples["labels"] == examples["input_ids"]
    rate, decay = options.peak_rate, options.weight_decay
    names = {entry.name for entry in fields(trl.SFTConfig)} - {"optim"}  # which is made below
    # Options of the same name are the same.
    settings = {name: value for name, value in vars(options).items() if name in names and value is not None}
    settings |= {
        "output_dir": str(options.working_dir),
        "max_length": context,
        "packing": packed,
        "num_train_epochs": options.num_train_epochs or 1.0,
        "learning_rate": rate,
        "bf16": options.mixed_precision == "bf16",
        # Packed batches have neither padding nor a mask to count by.
        "include_num_input_tokens_seen": "all" if packed else "non_padding",
        "dataloader_pin_memory": torch.cuda.is_available() and not options.cpu,
        "use_cpu": options.cpu,
        "disable_tqdm": options.quiet,
        "save_total_limit": None,  # see `retain`
    }
    if "activation_checkpointing" in names:  # as it is called from Transformers 5.20 on
        settings["activation_checkpointing"] = settings.pop("gradient_checkpointing")
    arguments = trl.SFTConfig(**settings)
    optimizer = None
    if options.optim == "equivariant":
        groups = equivariant_param_groups(model, rate, decay)
        optimizer = EquivariantOptimizer(groups, lr=rate, sharing="all")
    if representation is not None:
        keeping = representation, options.symmetry_project_weights
        SymmetricTraining(model, *keeping).check_optimizer(optimizer or torch.optim.AdamW(model.parameters()))
        callbacks = [*callbacks, SymmetryCallback(*keeping)]
    adapter = make_adapter(options, model.config)
    # It would say that special tokens have changed, which are set back in the end.
    logging.get_logger("transformers.trainer_utils").setLevel(logging.ERROR)
    try:
        trainer = Tuner(
            model,
            arguments,
            train_dataset=examples,
            eval_dataset=held_out,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=(optimizer, None),
            peft_config=adapter,
        )
    except ValueError as error:
        if adapter is None:
            raise
        raise ValueError(
            "`lora_target_modules` must name layers of the model, such as q_proj,up_proj, got "
            f"{','.join(options.lora_target_modules)!r}: {' '.join(str(error).split())}"
        ) from error
    trainer.checkpoints_kept = options.save_total_limit
    # What they print of each entry is in the log, and of the last one in the table.
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    if not options.quiet:
        trainer.add_callback(Bar)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError("`accelerate` must be configured for data parallelism, got FSDP or DeepSpeed. Use DDP.")
    return trainer


def write(
    options: FinetuneOptions,
    seen: Seen,
    model: Any,
    tokenizer: Any,
    generation: transformers.GenerationConfig,
    dtype: torch.dtype,
    record: dict[str, Any],
) -> None:
    """The finished folder in its place, and the checkpoints away."""
    with new_folder(Path(options.output_dir), seen) as folder:
        with quiet_loading():
            if options.merge:
                model.save_pretrained(folder / "adapter")
                model = model.to(torch.promote_types(dtype, torch.float32)).merge_and_unload()
            if options.lora is None or options.merge:
                model = model.to(dtype)
            check_made(model.state_dict(), "learning_rate", "Nothing was written. Begin anew with a lower one.")
            model.save_pretrained(folder)
        if (file := folder / "generation_config.json").is_file():  # an adapter has none
            generation.to_json_file(file)
        tokenizer.save_pretrained(folder)
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if not options.keep_checkpoints:
        clear(options.working_dir)
        if others := not_of_a_run(options.working_dir):
            names = ", ".join(others)
            logger.warning(f"{str(options.working_dir)!r} has {names} of something else; the folder is left.")
