"""A run of several processes of which one meets with a fault; a program, which says how the others ended."""

import errno
import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

from torch.distributed.checkpoint import HuggingFaceStorageWriter

from rigpt_hf.training import saving
from tests import processes
from tests.training.runs import start


FULL = "No space left on device"


def fill_disk(victim: int, step: int, shards: bool) -> None:
    """From `step` on one process cannot write its random state, or not even its `shards`; for all forked later."""

    def refuse(path):
        if os.environ["RANK"] == str(victim) and int(re.search(r"step-(\d+)", str(path))[1]) >= step:
            raise OSError(errno.ENOSPC, FULL)

    def full(state, path):
        refuse(path)
        save(state, path)

    def full_of_shards(writer, *arguments):
        refuse(writer.path)
        return write(writer, *arguments)

    save, saving.save_state = saving.save_state, full
    if shards:
        write, HuggingFaceStorageWriter.write_data = HuggingFaceStorageWriter.write_data, full_of_shards


def main(data: str, output: str, fault: str, seed: int, world: int, options: dict) -> None:
    """Ends once all processes have: with exit codes by rank, `None` of one that had to be ended."""
    draw = random.Random(seed)
    victim, steps, port = draw.randrange(world), draw.randint(1, 6), processes.free_port()
    if fault == "disk":
        fill_disk(victim, steps, shards=seed % 2 == 1)
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
