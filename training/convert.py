"""Convert a stock checkpoint into a RiGPT folder, on one process or on many.

On one process (the same as `rigpt convert`):

    python training/convert.py openai-community/gpt2 gpt2-rigpt

On all GPUs of a machine, each folding and writing its share of the output's shards:

    accelerate launch training/convert.py meta-llama/Llama-3.1-8B llama-rigpt --max-shard-size 2GB

On several CPU processes (`accelerate launch --cpu` would want MPI for that):

    accelerate launch --multi_gpu --num_processes 4 training/convert.py FOLDER OUTPUT --cpu

The main process also runs the source and the result, one after the other, for the certificate, so it alone needs
memory for one of the two models. The output folder appears when everything is written and certified; a failure of any
process leaves nothing.
"""

import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Literal

from rigpt_hf.checkpoints.source import is_free, is_model_or_file
from rigpt_hf.command_line import READS, WRITES
from rigpt_hf.dataclass_options import program
from rigpt_hf.terminal import say


# Others wait while the main process certifies a large model on a slow machine.
PATIENCE = timedelta(hours=12)


@dataclass
class ConvertOptions:
    """The model to convert, and where to."""

    source: Annotated[str, READS, is_model_or_file]
    """Folder with safetensors, id of a repository on the Hub, or file of GGUF, nanoGPT or llama2.c."""
    output_dir: Annotated[str, WRITES, is_free]
    """Folder to make."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; its main branch if not given."""
    gguf_file: str | None = None
    """A GGUF file in the folder SOURCE, decoded as a whole in memory."""
    dtype: Literal["float64", "float32", "float16", "bfloat16"] | None = None
    """Type of the result's weights; the source's if not given."""
    dropout: Literal["vector", "none", "refuse"] = "vector"
    """GPT-2 drops single coordinates of the stream, which prefers a basis: drop whole vectors with the same
    probability, drop none, or refuse such a source. Evaluation is the same with all."""
    qk_gain: Literal["vector", "metric"] = "vector"
    """Gains of queries and keys, as Qwen3 has them, stay vectors, or become metrics, which prefer no basis."""
    max_shard_size: str | None = None
    """Largest output file, such as 500MB; 5GB if not given, less if processes would be left without a file."""
    seed: int = 0
    """For the certificate's tokens."""
    force: bool = False
    """Replace an earlier model in OUTPUT_DIR once done."""
    cpu: bool = False
    """Use no accelerator."""
    quiet: bool = False
    """Say nothing but what is wrong."""


def convert(options: ConvertOptions) -> None:
    """Convert and print the certificate."""
    import torch
    from accelerate import PartialState
    from transformers.utils import logging

    from rigpt_hf.checkpoints.workers import AccelerateWorkers
    from rigpt_hf.conversion import convert_checkpoint

    # On one CPU process this starts no process group and takes no option of one.
    state = PartialState(cpu=options.cpu, timeout=PATIENCE)
    if not state.is_main_process:
        logging.set_verbosity_error()  # what there is to say is said once
    try:
        certificate = convert_checkpoint(
            options.source,
            options.output_dir,
            revision=options.revision,
            gguf_file=options.gguf_file,
            dtype=None if options.dtype is None else getattr(torch, options.dtype),
            dropout=options.dropout,
            qk_gain=options.qk_gain,
            force=options.force,
            max_shard_size=options.max_shard_size,
            seed=options.seed,
            device=str(state.device),
            progress=not options.quiet,
            workers=AccelerateWorkers(state),
        )
    finally:
        state.destroy_process_group()
    if state.is_main_process:
        say(certificate)


main = program(ConvertOptions, convert, name="convert.py", help=__doc__)

if __name__ == "__main__":
    sys.exit(main())
