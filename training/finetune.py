"""Fine-tune a RiGPT on text or on chats, all of its weights or an adapter.

All weights, on a text file (documents packed into windows) or on a data set of the Hub:

    python training/finetune.py gpt2-rigpt book.txt gpt2-book --epochs 3
    accelerate launch training/finetune.py gpt2-rigpt Salesforce/wikitext gpt2-wiki --data-config wikitext-2-raw-v1

A LoRA adapter on chats (rows with `messages`), the loss on the assistant's turns only; `--merge` adds it to the
weights, so that OUTPUT is a whole model with the adapter in OUTPUT/adapter:

    accelerate launch training/finetune.py llama-rigpt chats.jsonl llama-chat --lora 16 --merge --bf16

A tokenizer without a chat template needs one, best with {% generation %} around what the assistant says:

    python training/finetune.py gpt2-rigpt chats.jsonl gpt2-chat --chat-template chatml.jinja

An optimizer without a preferred basis, and a run that goes on where it was interrupted (same options, and --resume):

    python training/finetune.py gpt2-rigpt book.txt gpt2-book --optim equivariant --save-steps 200
    python training/finetune.py gpt2-rigpt book.txt gpt2-book --optim equivariant --save-steps 200 --resume

The loss on held-out rows is printed before and after. OUTPUT appears when it is complete; until then, checkpoints and
logs are in OUTPUT.checkpoints.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
import transformers
from accelerate import PartialState
from rich.console import Console
from transformers import AutoTokenizer, HfArgumentParser, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from rigpt_hf import __version__
from rigpt_hf.checkpoints.named import load_rigpt, rigpt_config
from rigpt_hf.command_line import as_options
from rigpt_hf.conversion.assemble import quiet_loading
from rigpt_hf.conversion.output import check_output, publish, temporary_sibling
from rigpt_hf.optim import EquivariantOptimizer, equivariant_param_groups
from rigpt_hf.training.finetune_data import IGNORED, Examples, HeldOut, PadRight, encode, hold_out, read_rows
from rigpt_hf.training.finetune_options import CONTEXT, FinetuneOptions, FinetuneReport, Settings, perplexity


RECORD = "finetune.json"
MEASURED = 256  # examples of the training data, where none are held out
LEARNING_RATES = {"full": 2e-5, "lora": 2e-4}
# What may change between a run and the one that resumes it.
FREE = ("output_dir", "keep_checkpoints", "save_steps", "report_to", "resume", "force", "quiet")


def finetune(options: FinetuneOptions, callbacks: Sequence[TrainerCallback] = ()) -> FinetuneReport:
    """
    Fine-tune a model and write the result; on an error nothing is written but checkpoints to resume from.

    Args:
        options: What to do.
        callbacks: For `Trainer`, beside those of the options.

    Raises:
        ValueError: if an option does not fit the model or the data; nothing has been trained then.
    """
    state = PartialState(cpu=options.cpu)
    check_places(options)
    options.make_working_dir()
    try:
        return _finetune(options, state, [*callbacks])
    except BaseException:
        working = options.working_dir
        if state.is_main_process and not options.resume and last_checkpoint(working) is None:
            shutil.rmtree(working, ignore_errors=True)
        raise


def _finetune(options: FinetuneOptions, state: PartialState, callbacks: list[TrainerCallback]) -> FinetuneReport:
    source = str(Path(options.model).resolve()) if Path(options.model).is_dir() else options.model
    config = named_model(rigpt_config, source, options.revision)
    tokenizer = load_tokenizer(options, source, config)
    context = options.context or min(config.max_position_embeddings, CONTEXT)
    if context > config.max_position_embeddings:
        raise ValueError(f"`context` must be at most the model's {config.max_position_embeddings}, got {context}.")
    with state.main_process_first():  # the others read what it cached
        rows = read_rows(
            options.data, options.data_split, options.data_config, options.data_revision, options.working_dir / "data"
        )
    held = hold_out(rows, options.eval_share)
    record = make_record(options, held)
    if options.resume:
        check_resumes(options, record)
    state.wait_for_everyone()
    if state.is_main_process:
        (options.working_dir / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    examples = encode(rows, ~held.mask, tokenizer, context)
    held_out = encode(rows, held.mask, tokenizer, context) if held.mask.any() else Examples()
    if state.is_main_process:
        examples.tell(context)
    measured = held_out if len(held_out) else Examples(examples.pairs[:MEASURED])

    saved_dtype = config.dtype or torch.float32
    transformers.set_seed(options.seed)  # an adapter starts at random
    model = load_model(options, source, saved_dtype)
    which: Literal["held-out", "training"] = "held-out" if len(held_out) else "training"
    trainer = make_trainer(options, model, tokenizer, examples, measured, [TellBefore(which), *callbacks])
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=last_checkpoint(options.working_dir) if options.resume else None)
    seconds = time.perf_counter() - started
    history = trainer.state.log_history
    report = FinetuneReport(
        output=options.output_dir,
        trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        examples=len(examples),
        held_out=len(held_out),
        measured_on=which,
        loss_before=next(entry["eval_nats"] for entry in history if "eval_nats" in entry),
        loss_after=trainer.evaluate()["eval_nats"],
        steps=trainer.state.global_step,
        tokens=int(trainer.state.num_input_tokens_seen),
        seconds=round(seconds, 1),
        curve=[(entry["step"], entry["loss"]) for entry in history if "loss" in entry],
    )
    if state.is_main_process:
        base = model if options.lora is None else model.get_base_model()
        base.config.use_cache = config.use_cache  # Trainer switches it off, and it would be saved that way
        write(options, model.eval(), tokenizer, saved_dtype, record | {"result": asdict(report)})
    state.wait_for_everyone()
    return report


def check_places(options: FinetuneOptions) -> None:
    """A `ValueError` if the result or the checkpoints would take the place of something else."""
    output, working = Path(options.output_dir), options.working_dir
    # What this program wrote may be replaced even if it is an adapter, which has no config.json.
    ours = options.force and (output / RECORD).is_file()
    for source in (Path(options.model).resolve(), Path(options.data).resolve()):
        if source.exists() and output.resolve() in (source, *source.parents):
            raise ValueError(f"`output_dir` must not hold what is read, got {str(output)!r}. Name another folder.")
    if not ours:
        check_output(output, options.model, options.force)
    if options.resume:
        if last_checkpoint(working) is None or not (working / RECORD).is_file():
            raise ValueError(f"`resume` needs a checkpoint, got none in {str(working)!r}. Leave it out to begin.")
        return
    if not working.exists() or not any(working.iterdir()):
        return
    if not options.force:
        raise ValueError(
            f"`output_dir` must have no checkpoints beside it, got an interrupted run in {str(working)!r}. Pass "
            "`resume=True` to go on, or `force=True` to begin anew."
        )
    if not (working / RECORD).is_file():
        raise ValueError(
            f"`output_dir` can begin anew only beside checkpoints of this program, got {str(working)!r}, which has no "
            f"`{RECORD}`. Remove it yourself."
        )
    PartialState().wait_for_everyone()  # all have looked
    if PartialState().is_main_process:
        shutil.rmtree(working)
    PartialState().wait_for_everyone()


def last_checkpoint(working: Path) -> str | None:
    """The last of `Trainer`'s checkpoints in a folder."""
    return get_last_checkpoint(str(working)) if working.is_dir() else None


def make_record(options: FinetuneOptions, held: HeldOut) -> dict[str, Any]:
    """What a result says of its making."""
    return {
        "options": asdict(options),
        "data": {"sha256": held.fingerprint, "rows": len(held.mask), "held_out": int(held.mask.sum())},
        "versions": {"rigpt_hf": __version__} | {m.__name__: m.__version__ for m in (torch, transformers, datasets)},
    }


def check_resumes(options: FinetuneOptions, record: dict[str, Any]) -> None:
    """A `ValueError` if the interrupted run had other options or data."""
    working = options.working_dir
    earlier = json.loads((working / RECORD).read_text(encoding="utf-8"))
    for name, value in record["options"].items():
        if name not in FREE and earlier["options"].get(name) != value:
            raise ValueError(
                f"`{name}` must be as in the interrupted run, which had {earlier['options'].get(name)!r}, got "
                f"{value!r}. Give the same options, or `force=True` instead of `resume=True` to begin anew."
            )
    if earlier["data"] != record["data"]:
        raise ValueError(
            f"`data` must be as in the interrupted run, got other rows in {options.data!r}. Pass `force=True` instead "
            "of `resume=True` to begin anew."
        )


def named_model(load: Any, *arguments: Any, **options: Any) -> Any:
    """What a function makes of a source, which is called `model` here."""
    try:
        return load(*arguments, **options)
    except ValueError as error:
        raise ValueError(str(error).replace("`source`", "`model`")) from error


def load_tokenizer(options: FinetuneOptions, source: str, config: Any) -> Any:
    """The model's tokenizer, with the template of the options."""
    where = {"revision": options.revision} if options.revision else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ValueError(
            f"`model` must have a tokenizer, got {source!r} with none that loads here: "
            f"{str(error).strip().splitlines()[0]} Add the tokenizer's files to the folder."
        ) from error
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"`model` must have an embedding for each of its tokenizer's {len(tokenizer)} tokens, got "
            f"{config.vocab_size} in {source!r}. Call `resize_token_embeddings` and save it."
        )
    if (template := options.read_template()) is not None:
        tokenizer.chat_template = template
    return tokenizer


def load_model(options: FinetuneOptions, source: str, dtype: torch.dtype) -> Any:
    """
    The model to train: itself in float32 at least, where small updates are not lost, or as it was saved
    (`dtype`) with an adapter in float32.
    """
    whole = torch.promote_types(dtype, torch.float32)
    model = named_model(load_rigpt, source, dtype if options.lora else whole, options.revision)
    if options.lora is None:
        return model
    import peft

    targets: Any = options.lora_target
    if targets not in (None, "all-linear"):
        targets = targets.split(",")
        if model.config.tie_word_embeddings and {"lm_head", "embed_tokens"} & set(targets):
            raise ValueError(
                f"`lora_target` must not be a table that is used twice, got {options.lora_target!r} in a model with "
                "tied embeddings. Adapt other layers."
            )
    adapter = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=options.lora,
        lora_alpha=options.lora_alpha or 2 * options.lora,
        lora_dropout=options.lora_dropout,
        target_modules=targets,
        revision=options.revision,
    )
    try:
        return peft.get_peft_model(model, adapter)
    except ValueError as error:
        raise ValueError(
            f"`lora_target` must name layers of the model, such as q_proj,up_proj, got {options.lora_target!r}: "
            f"{' '.join(str(error).split())}"
        ) from error


class TellBefore(TrainerCallback):
    """Prints the loss before the first step, on `which` examples."""

    def __init__(self, which: str):
        self.which = which

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if state.global_step == 0 and state.is_world_process_zero:
            loss = metrics["eval_nats"]
            print(f"Before: loss {loss:.4f}, perplexity {perplexity(loss):.2f} on {self.which} examples", flush=True)


def make_trainer(
    options: FinetuneOptions, model: Any, tokenizer: Any, examples: Examples, measured: Examples, callbacks: list
) -> Trainer:
    """A `Trainer` that logs the mean loss per predicted token of `measured` as `eval_nats`, first of all before."""
    rate = options.learning_rate or LEARNING_RATES["full" if options.lora is None else "lora"]
    # Named differently from Transformers 5.20 on.
    names = {entry.name for entry in fields(TrainingArguments)}
    recompute = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    arguments = TrainingArguments(
        output_dir=str(options.working_dir),
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        num_train_epochs=options.epochs or 1.0,
        max_steps=options.steps or -1,
        learning_rate=rate,
        weight_decay=options.weight_decay,
        lr_scheduler_type=options.scheduler,
        warmup_steps=options.warmup,
        max_grad_norm=options.max_grad_norm,
        bf16=options.bf16,
        **{recompute: options.gradient_checkpointing, f"{recompute}_kwargs": {"use_reentrant": False}},
        seed=options.seed,
        logging_steps=options.logging_steps,
        save_steps=options.save_steps,
        save_total_limit=2,
        # `evaluate` before `train` would leave the model unwrapped: on several processes, gradients of one's own.
        eval_on_start=not options.resume,
        include_num_input_tokens_seen="non_padding",
        label_names=["labels"],
        report_to=options.report_to.split(","),
        dataloader_pin_memory=torch.cuda.is_available() and not options.cpu,
        use_cpu=options.cpu,
        disable_tqdm=options.quiet,
    )
    optimizer = None
    if options.optim == "equivariant":
        groups = equivariant_param_groups(model, rate, options.weight_decay)
        optimizer = EquivariantOptimizer(groups, lr=rate, sharing="all")
    trainer = Trainer(
        model,
        arguments,
        data_collator=PadRight(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0),
        train_dataset=examples,
        eval_dataset=measured,
        compute_metrics=lambda sums: {"nats": float(sums.predictions[:, 0].sum() / sums.predictions[:, 1].sum())},
        preprocess_logits_for_metrics=summed_loss,
        callbacks=callbacks,
        optimizers=(optimizer, None),
    )
    if options.quiet:
        trainer.remove_callback(PrinterCallback)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError("`accelerate` must be configured for data parallelism, got FSDP or DeepSpeed. Use DDP.")
    return trainer


def summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Loss in nats and number of predicted tokens of each example, `[batch, 2]`, in float64."""
    labels = labels[:, 1:]
    nats = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
    )
    return torch.stack([nats.sum(1, dtype=torch.float64), (labels != IGNORED).sum(1).double()], dim=1)


def write(options: FinetuneOptions, model: Any, tokenizer: Any, dtype: torch.dtype, record: dict[str, Any]) -> None:
    """The finished folder in its place, and the checkpoints away."""
    output = Path(options.output_dir)
    temporary = temporary_sibling(output)
    temporary.mkdir(parents=True)
    try:
        with quiet_loading():
            if options.merge:
                model.save_pretrained(temporary / "adapter")
                model = model.to(torch.promote_types(dtype, torch.float32)).merge_and_unload()
            if options.lora is None or options.merge:
                model = model.to(dtype)
            model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        publish(temporary, output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if not options.keep_checkpoints:
        shutil.rmtree(options.working_dir)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    description, _, epilog = (__doc__ or "").partition("\n\n")
    parser = HfArgumentParser(
        Settings, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of a RiGPT, or its id on the Hub")
    parser.add_argument("data", help="file or folder (.txt, .json, .jsonl, .parquet), or id of a data set on the Hub")
    parser.add_argument("output_dir", metavar="output", help="folder to make")
    return parser


def main(arguments: list[str] | None = None) -> FinetuneReport:
    """
    Parse the command line, fine-tune, print the table.

    Raises:
        SystemExit: with code 2 and one line that says what to do, if the input is impossible.
    """
    args = make_parser().parse_args(arguments)
    state = None
    try:
        options = FinetuneOptions(**vars(args))
        state = PartialState(cpu=options.cpu)
        report = finetune(options)
    except ValueError as error:
        if state is None or state.is_main_process:
            print(f"finetune.py: {as_options(str(error))}", file=sys.stderr)
        raise SystemExit(2) from error
    finally:
        if state is not None:
            state.destroy_process_group()
    if state.is_main_process:
        console = Console()
        console.print(report.table())
        console.print(f"Written to {report.output}", soft_wrap=True)
    return report


if __name__ == "__main__":
    main()
