"""Pretrain a RiGPT, or a stock GPT-2 to compare with.

    accelerate launch training/pretrain.py --config training/presets/smoke.yaml

`--help` lists every option. Called again on the same folder, a run goes on from its last checkpoint. What a run on
several processes reads is best made before it begins, by one:

    python training/pretrain.py --config training/presets/smoke.yaml --run.prepare_only true
"""

import os
import sys

from huggingface_hub.errors import StrictDataclassError

from rigpt_hf.training.build import ensure_data
from rigpt_hf.training.data import TokenShards, Windows, validation_batches
from rigpt_hf.training.loop import PretrainingRun
from rigpt_hf.training.options import PretrainOptions, parse_options


def prepare_data(options: PretrainOptions) -> str:
    """
    Make the shards of a run, or check those that are there; one line on where and how much they are.

    Raises:
        ValueError: if this is one of several processes, or the run could not begin with these data.
    """
    data, run = options.data, options.run
    if (world := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise ValueError(
            f"`run.prepare_only` must have one process, got {world}. Start it with `python` instead of a launcher."
        )
    folder = ensure_data(data)
    train, held_out = TokenShards(folder, "train"), TokenShards(folder, "validation")
    plain = {"cross_document": data.cross_document}
    Windows(train, data.context, **plain)
    validation_batches(held_out, data.context, run.batch_size, run.evaluate_batches, **plain)
    return f"{len(train):,} tokens to train on and {len(held_out):,} held out are in {folder}"


def main(arguments: list[str] | None = None) -> int:
    """The program; bad input and failures end in one line and exit code 2."""
    try:
        options = parse_options(arguments)
        if options.run.prepare_only:
            print(prepare_data(options))
            return 0
        run = PretrainingRun(options)
        report = run.train()
    except (ValueError, OSError, StrictDataclassError) as error:
        print(f"pretrain: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if run.accelerator.is_main_process:
        if report.model_folder is None:
            print(f"Stopped after step {report.steps}, with a checkpoint. The same command goes on from there.")
        else:
            last = f"validation loss {report.validation[-1][1]:.4f}" if report.validation else "nothing left to do"
            print(f"{report.steps} steps, {last}. Written to {report.model_folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
