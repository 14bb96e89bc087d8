"""Pretrain a RiGPT, or a stock GPT-2 to compare with.

    accelerate launch training/pretrain.py --config training/presets/smoke.yaml

`--help` lists every option. Called again on the same folder, a run goes on from its last checkpoint.
"""

import sys

from huggingface_hub.errors import StrictDataclassError

from rigpt_hf.training.loop import PretrainingRun
from rigpt_hf.training.options import parse_options


def main(arguments: list[str] | None = None) -> int:
    """The program; bad input and failures end in one line and exit code 2."""
    try:
        run = PretrainingRun(parse_options(arguments))
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
