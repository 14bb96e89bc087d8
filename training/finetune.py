"""Fine-tune a RiGPT on text or on chats, all of its weights or an adapter.

All weights, on a text file (documents packed, none sees another) or on a data set of the Hub:

    python training/finetune.py gpt2-rigpt book.txt gpt2-book --num-train-epochs 3
    accelerate launch training/finetune.py gpt2-rigpt Salesforce/wikitext gpt2-wiki --data-config wikitext-2-raw-v1

A LoRA adapter on chats (rows with `messages`), the loss on the assistant's turns only; `--merge` adds it to the
weights, so that OUTPUT_DIR is a whole model with the adapter in OUTPUT_DIR/adapter:

    accelerate launch training/finetune.py llama-rigpt chats.jsonl llama-chat --lora 16 --merge --mixed-precision bf16

A tokenizer without a chat template needs one, best with {% generation %} around what the assistant says:

    python training/finetune.py gpt2-rigpt chats.jsonl gpt2-chat --chat-template chatml.jinja

An optimizer without a preferred basis, and a run that goes on where it was interrupted (same options, and --resume):

    python training/finetune.py gpt2-rigpt book.txt gpt2-book --optim equivariant --learning-rate 3e-3
    python training/finetune.py gpt2-rigpt book.txt gpt2-book --optim equivariant --learning-rate 3e-3 --resume

The loss on held-out rows is printed before and after. OUTPUT_DIR appears when it is complete; until then, checkpoints
and logs are in OUTPUT_DIR.checkpoints.
"""

import sys

from rigpt_hf.dataclass_options import program
from rigpt_hf.training.finetune_options import FinetuneOptions


def tell(options: FinetuneOptions) -> None:
    """Fine-tune, print the table."""
    from accelerate import PartialState

    from rigpt_hf.terminal import Console, say_next
    from rigpt_hf.training.tuning import finetune

    state = PartialState(cpu=options.cpu)
    try:
        report = finetune(options)
    finally:
        state.destroy_process_group()
    if state.is_main_process:
        console = Console()
        console.print(report.table())
        for line in report.sentences():
            console.print(line, soft_wrap=True, markup=False, highlight=False)
        console.print(f"Written to {report.output_dir}", soft_wrap=True, markup=False, highlight=False)
        adapter = options.lora and not options.merge
        where = (options.model, "TEXT", "--adapter", report.output_dir) if adapter else (report.output_dir, "TEXT")
        say_next(("rigpt", "generate", *where))


main = program(FinetuneOptions, tell, name="finetune.py", help=__doc__)

if __name__ == "__main__":
    sys.exit(main())
