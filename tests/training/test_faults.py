"""One of four processes is killed, stops, or finds its disk full: one line of each other, and nothing is lost."""

import json
import re

import pytest

from rigpt_hf.training.checkpoints import CheckpointStore
from tests import processes
from tests.training.faults import FULL
from tests.training.runs import launch, numbers_of, same_run


WORLD = 4
SAVES = {"save_steps": 1, "save_best_limit": 0, "max_steps": 10, "warmup_steps": 1}
WAYS = {"ddp": {}, "fsdp2": {"fsdp": True}, "fsdp2-beside": {"fsdp": True, "async_save": True}}
TIMEOUT = 10


@pytest.fixture(scope="module", params=[pytest.param(way, id=way) for way in WAYS])
def unharmed(request, data, tmp_path_factory):
    """The options of a run of four processes, with dropout, and its folder after nothing has happened."""
    options = SAVES | WAYS[request.param] | {"ddp_timeout": TIMEOUT}
    launch(data, output := tmp_path_factory.mktemp("unharmed") / "run", WORLD, **options)
    return options, output


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("fault", ["kill", "stop", "disk"])
def test_a_fault_of_one_of_four_processes_costs_a_few_steps(fault, seed, unharmed, data, tmp_path):
    options, straight = unharmed
    words = ["-m", "tests.training.faults", data, tmp_path / "run", fault, seed, WORLD, json.dumps(options)]
    done = processes.run(*words, cwd=processes.ROOT, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    ends = [end for rank, end in enumerate(told["ends"]) if fault == "disk" or rank != told["victim"]]
    assert ends == [3] * len(ends), "every other process ends by itself, with an error"
    rule = (
        f"`output_dir` must take the checkpoint of step .*{FULL}" if fault == "disk" else "Another process of the run"
    )
    told_by = r"(RuntimeError: Process \d failed and took the others with it\. )?ValueError: "
    assert len(re.findall(f"^{told_by}{rule}.*$", done.stderr, re.MULTILINE)) == len(ends), done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    latest = CheckpointStore(tmp_path / "run" / "checkpoints").latest(verify=True)
    assert latest is None or latest.step < SAVES["max_steps"]
    launch(data, tmp_path / "run", WORLD, **options)
    assert numbers_of(tmp_path / "run") == numbers_of(straight) and same_run(tmp_path / "run", straight)
