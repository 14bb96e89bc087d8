"""A run of several processes of which one meets with a fault; a program, which says how the others ended."""

import errno
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from rigpt_hf.training import saving
from tests import processes
from tests.training.runs import start


FULL = "No space left on device"


def fill_disk(victim: int, step: int) -> None:
    """From `step` on nothing of what one process holds can be written; for all that are forked afterwards."""
    write = saving.save_state

    def full(state, path):
        if os.environ["RANK"] == str(victim) and int(path.parent.name.split(".")[1].removeprefix("step-")) >= step:
            raise OSError(errno.ENOSPC, FULL)
        write(state, path)

    saving.save_state = full


def main(data: str, output: str, fault: str, seed: int, world: int, options: dict) -> None:
    """Ends once all processes have: with exit codes by rank, `None` of one that had to be ended."""
    draw = random.Random(seed)
    victim, steps, port = draw.randrange(world), draw.randint(1, 6), processes.free_port()
    if fault == "disk":
        fill_disk(victim, steps)
    children = [start(rank, world, port, Path(data), Path(output), options) for rank in range(world)]
    log = Path(output) / "metrics.jsonl"
    ends: dict[int, int | None] = {}
    if fault != "disk":
        while not (log.exists() and len(log.read_text().splitlines()) >= steps):
            time.sleep(0.001)
        time.sleep(draw.random() * 0.05)
        os.kill(children[victim], signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
        ends[victim] = None
    for rank, child in enumerate(children):
        if rank not in ends:
            ends[rank] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if ends.get(victim, 0) is None:
        os.kill(children[victim], signal.SIGKILL)
        os.waitpid(children[victim], 0)
    print(json.dumps({"victim": victim, "ends": [ends[rank] for rank in range(world)]}))


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:6]), json.loads(sys.argv[6]))
