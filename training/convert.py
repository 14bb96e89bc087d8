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

import argparse
import sys
from datetime import timedelta

import torch
from accelerate import PartialState
from transformers.utils import logging

from rigpt_hf.conversion import Certificate, convert_checkpoint
from rigpt_hf.conversion.dropout import CHOICES
from rigpt_hf.conversion.workers import AccelerateWorkers


DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Others wait while the main process certifies a large model on a slow machine.
PATIENCE = timedelta(hours=12)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    description, _, epilog = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="folder with safetensors, or id of a repository on the Hub")
    parser.add_argument("output_dir", help="folder to make")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub (default: its main branch)")
    parser.add_argument("--gguf-file", help="a GGUF file in the folder SOURCE, decoded as a whole in memory")
    parser.add_argument("--dtype", choices=DTYPES, help="of the result (default: the source's)")
    parser.add_argument(
        "--dropout",
        choices=CHOICES,
        default="vector",
        help="GPT-2 drops single coordinates of the stream, which prefers a basis: drop whole vectors with the same "
        "probability, drop none, or refuse such a source (default: %(default)s; evaluation is the same with all)",
    )
    parser.add_argument(
        "--max-shard-size",
        help="largest output file, such as 500MB (default: 5GB, less if processes would be left without a file)",
    )
    parser.add_argument("--seed", type=int, default=0, help="for the certificate's tokens (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace an earlier model in OUTPUT_DIR once done")
    parser.add_argument("--cpu", action="store_true", help="use no accelerator")
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
    return parser


def main(arguments: list[str] | None = None) -> Certificate:
    """
    Parse the command line, convert, print the certificate.

    Raises:
        SystemExit: with code 2 and one line that says what to do, if the input is impossible.
    """
    parser = make_parser()
    args = parser.parse_args(arguments)
    # On one CPU process this starts no process group and takes no option of one.
    state = PartialState(cpu=args.cpu, timeout=PATIENCE)
    if not state.is_main_process:
        logging.set_verbosity_error()  # what there is to say is said once
    try:
        certificate = convert_checkpoint(
            args.source,
            args.output_dir,
            revision=args.revision,
            gguf_file=args.gguf_file,
            dtype=DTYPES.get(args.dtype),
            dropout=args.dropout,
            force=args.force,
            max_shard_size=args.max_shard_size,
            seed=args.seed,
            device=str(state.device),
            progress=not args.quiet,
            workers=AccelerateWorkers(state),
        )
    except ValueError as error:
        if state.is_main_process:
            print(f"convert.py: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    finally:
        state.destroy_process_group()
    if state.is_main_process:
        print(certificate)
    return certificate


if __name__ == "__main__":
    main()
