"""Pretrain a RiGPT, or a stock GPT-2 to compare with.

    accelerate launch training/pretrain.py --config smoke

`--help` lists every option, `--config` the presets. Called again on the same folder, a run goes on from its last
checkpoint. What a run on several processes reads is best made before it begins, by one:

    python training/pretrain.py --config smoke --prepare-only
"""

import os
import sys

from rigpt_hf.command_line import typed_again
from rigpt_hf.dataclass_options import program
from rigpt_hf.terminal import say, say_next
from rigpt_hf.training.options import PRESETS, PretrainOptions


def prepare_data(options: PretrainOptions) -> str:
    """
    Make the shards of a run, or check those that are there; one line on where and how much they are.

    Raises:
        ValueError: if this is one of several processes, or the run could not begin with these data.
    """
    from rigpt_hf.training.build import check_run, ensure_data, open_windows
    from rigpt_hf.training.data import TokenShards

    if (world := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise ValueError(
            f"`prepare_only` must have one process, got {world}. Start it with `python` instead of a launcher."
        )
    check_run(options)
    folder = ensure_data(options)
    train, held_out = TokenShards(folder, "train"), TokenShards(folder, "validation")
    open_windows(options, train, held_out)
    return f"{len(train):,} tokens to train on and {len(held_out):,} held out are in {folder}"


def pretrain(options: PretrainOptions) -> None:
    """Prepare the data, or train and say what came of it."""
    if options.prepare_only:
        say(prepare_data(options))
        say_next(typed_again("pretrain", without="--prepare-only"))
        return
    from rigpt_hf.training.kinds import KINDS
    from rigpt_hf.training.loop import PretrainingRun
    from rigpt_hf.training.symmetry import kept_in_words

    run = PretrainingRun(options)
    if run.accelerator.is_main_process and (left := KINDS[options.model_kind].fields(options.config_overrides)[1]):
        say(f"The model has the sizes that were asked for, and none of {', '.join(left)}, which only a RiGPT has.")
    report = run.train()
    if run.accelerator.is_main_process:
        if report.model_folder is None:
            say(f"Stopped after step {report.steps}, with a checkpoint. The same command goes on from there.")
            if run.accelerator.num_processes == 1:
                say_next(typed_again("pretrain"))
        else:
            last = f"validation loss {report.validation[-1][1]:.4f}" if report.validation else "nothing left to do"
            say(f"{report.steps} steps, {last}. Written to {report.model_folder}")
            if report.symmetry_distance is not None:
                say(kept_in_words(report.symmetry_distance))
            say_next(("rigpt", "generate", report.model_folder, "TEXT"))


main = program(PretrainOptions, pretrain, name="pretrain.py", help=__doc__, presets=PRESETS)

if __name__ == "__main__":
    sys.exit(main())
