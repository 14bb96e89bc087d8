"""Verbs that train: the programs of `rigpt_hf.training`, which a launcher starts on several processes."""

from ..extras import needs
from ..training.finetune_options import FinetuneOptions
from ..training.options import PretrainOptions


def pretrain(options: PretrainOptions):
    """
    Train a RiGPT from random weights, or go on from a model; a run that was interrupted goes on by the same command.

        rigpt pretrain --config smoke

        rigpt pretrain --config smoke --prepare-only

        accelerate launch -m rigpt_hf.cli pretrain --config smoke
    """
    with needs("train"):
        from ..training.pretrain import pretrain as run
    run(options)


def finetune(options: FinetuneOptions):
    """
    Fine-tune a RiGPT on text or on chats, all of its weights or an adapter.

        rigpt finetune my-rigpt book.txt my-book

        rigpt finetune my-rigpt chats.jsonl my-chat --lora 16 --merge

        accelerate launch -m rigpt_hf.cli finetune my-rigpt book.txt my-book --mixed-precision bf16
    """
    with needs("train"):
        from ..training.finetune import tell as run
    run(options)
