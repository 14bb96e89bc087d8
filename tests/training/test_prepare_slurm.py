"""The batch script of the documentation, with stand-ins for the commands of a cluster."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest


PAGE = Path(__file__).resolve().parents[2] / "docs" / "training.md"
# Each notes what it did; `torchrun` ends some time after TERM, as a run does that writes a checkpoint first.
STUBS = {
    "srun": 'exec "$@"',
    "torchrun": """
        trap 'sleep 0.3; echo checkpoint >> "$NOTES"; exit 1' TERM
        echo $$ > "$NOTES.pid"
        echo "torchrun $*" >> "$NOTES"
        for _ in $(seq "$TURNS"); do sleep 0.05; done
        echo finished >> "$NOTES"
    """,
    "scancel": 'echo "scancel $*" >> "$NOTES"; kill -TERM "$(cat "$NOTES.pid")"',
    "scontrol": """
        if [ "$1" = show ]; then printf 'node1\\nnode2\\n'; else echo "scontrol $*" >> "$NOTES"; fi
    """,
}


@pytest.fixture
def job(tmp_path):
    """Starts the script, for so many turns of 0.05 s, and says where the notes are."""
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    notes = tmp_path / "notes"

    def start(turns: int, script: str = script):
        (tmp_path / "job.sh").write_text(script)
        slurm = {"SLURM_JOB_ID": "17", "SLURM_NNODES": "4", "SLURM_JOB_NODELIST": "node[1-2]"}
        ours = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NOTES": str(notes), "TURNS": str(turns)}
        return subprocess.Popen(["bash", tmp_path / "job.sh"], env=os.environ | slurm | ours), notes

    return start, script


def signalled(process: subprocess.Popen, notes: Path) -> list[str]:
    """What is noted by the end of a job that gets the signal while its run is going."""
    deadline = time.monotonic() + 10
    while not (notes.exists() and notes.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    process.wait(timeout=10)
    return notes.read_text().splitlines()


def test_at_its_time_limit_a_job_stops_its_run_and_is_queued_again(job):
    start, script = job
    assert "--signal=B:USR1@" in script and "--requeue" in script
    process, notes = start(200)
    began, *then = signalled(process, notes)
    assert "--nnodes 4" in began and "--rdzv-endpoint node1:29500 training/pretrain.py" in began
    assert then == ["scancel --signal=TERM 17", "checkpoint", "scontrol requeue 17"]


def test_without_the_trap_nothing_is_stopped_or_queued(job):
    start, script = job
    process, notes = start(20, script.replace("trap stop USR1\n", ""))
    assert len(signalled(process, notes)) == 1 and process.returncode == -signal.SIGUSR1


def test_a_job_that_ends_in_time_is_not_queued_again(job):
    process, notes = job[0](2)
    process.wait(timeout=10)
    assert notes.read_text().splitlines()[1:] == ["finished"]
