"""Checkpoints when a process is killed in the middle of a save, or the disk is full."""

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rigpt_hf.training.checkpoints import CheckpointStore
from tests.training.saves import content, names, writer


# Programs of their own load the files alone, without all of PyTorch, and start in a fraction of a second.
ROOT = Path(__file__).resolve().parents[2]
PREAMBLE = """
import os, resource, shutil, signal, sys
from pathlib import Path
from types import ModuleType
sys.path.append(sys.argv[1])
for name, place in (("rigpt_hf", "rigpt_hf"), ("rigpt_hf.training", "training")):
    sys.modules[name] = ModuleType(name)
    sys.modules[name].__path__ = [str(Path(sys.argv[1]) / place)]
from rigpt_hf.training.checkpoints import CheckpointStore
from tests.training.saves import writer
folder = Path(sys.argv[2])
os.fsync = lambda descriptor: None
"""


def command(program: str, *arguments) -> list[str]:
    return [sys.executable, "-c", PREAMBLE + program, str(ROOT), *map(str, arguments)]


FULL = """
if sys.argv[3] == "limit":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = CheckpointStore(folder, save_total_limit=1)
store.save(1, writer(1))
if sys.argv[3] == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    store.save(2, writer(2, 100_000))
except ValueError as error:
    print(error)
print(sorted(item.name for item in folder.iterdir()), store.latest(verify=True).step)
store.save(3, writer(3))
print(sorted(item.name for item in folder.iterdir()), store.latest(verify=True).step)
"""


@pytest.mark.parametrize(("kind", "reason"), [("limit", "File too large"), ("disk", "No space left on device")])
def test_a_disk_truly_full_loses_nothing(kind, reason, tmp_path):
    program = command(FULL, tmp_path, kind)
    if kind == "disk":
        mount = f"mount -t tmpfs -o size=300k none '{tmp_path}'"
        space = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
        if shutil.which("unshare") is None or subprocess.run([*space, mount], capture_output=True).returncode:
            pytest.skip("needs `unshare` and leave to mount a small disk in memory")
        program = [*space, f'{mount} && exec "$@"', "sh", *program]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    message, failed, later = done.stdout.splitlines()
    assert message.startswith(f"`output_dir` must take the checkpoint of step 2, got {str(tmp_path)!r}: ")
    # This is what safetensors says, which raises an error of its own.
    assert "Error while serializing" in message and reason in message
    assert message.endswith("untouched. Correct that (a full disk: free space, or keep fewer) and resume.")
    assert failed == "['step-00000001'] 1" and later == "['step-00000003'] 3"


# One process per system call that changes the disk, killed just before it; the last one is not killed.
KILLS = """
CHANGES = {"mkdir", "rename", "replace", "unlink", "rmdir", "open", "write", "close", "serialize_file"}

class Naive(CheckpointStore):
    def save(self, step, write, metric):
        path = self._path(step)
        record = self._begin(step, path, metric, {})
        write(path)
        self._commit(step, path, record)

kind, template = {"safe": CheckpointStore, "naive": Naive}[sys.argv[3]], folder / "template"
CheckpointStore(template, save_total_limit=1).save(1, writer(1, 200), metric=1.0)
CheckpointStore(template, save_total_limit=1).save(2, writer(2, 200), metric=2.0)
for number in range(1000):
    shutil.copytree(template, folder / str(number))
    child = os.fork()
    if child == 0:
        seen = 0
        def count(frame, event, function):
            global seen
            if event == "c_call" and function.__name__ in CHANGES:
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1
        store = kind(folder / str(number), save_total_limit=1)
        sys.setprofile(count)
        store.save(3, writer(3, 200), metric=0.5)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(number, status)
    if status == 0:
        break
"""


def killed_everywhere(kind: str, folder: Path) -> tuple[int, int, set[int]]:
    """Kills, those among them that lost or spoiled something, and the steps found after the others."""
    done = subprocess.run(command(KILLS, folder, kind), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    statuses = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert set(statuses[:-1]) == {signal.SIGKILL} and statuses[-1] == 0
    lost, found = 0, set()
    for number in range(len(statuses)):
        store = CheckpointStore(folder / str(number), save_total_limit=1)
        try:
            assert all(content(one) == one.step for one in store.checkpoints())
            newest, best = store.latest(verify=True).step, store.best().step
            # Step 1 has the best metric until step 3 is there.
            assert newest in (2, 3) and best == {2: 1, 3: 3}[newest]
            assert number < len(statuses) - 1 or newest == 3
            store.clean()
            assert all(name.startswith("step-") for name in names(store.folder))
            store.save(newest + 1, writer(newest + 1), metric=0.1)
            assert names(store.folder) == [f"step-{newest + 1:08d}"] and content(store.latest()) == newest + 1
            found.add(newest)
        except (ValueError, AssertionError):
            lost += 1
        shutil.rmtree(folder / str(number))
    return len(statuses) - 1, lost, found


def test_a_kill_before_any_system_call_loses_nothing(tmp_path):
    kills, lost, found = killed_everywhere("safe", tmp_path)
    assert kills > 40 and found == {2, 3}, "kills must fall before and after the moment of the rename"
    assert lost == 0


@pytest.mark.full
def test_kills_are_seen_by_a_store_without_temporary_names(tmp_path):
    kills, lost, _ = killed_everywhere("naive", tmp_path)
    assert kills > 40 and lost > 10


LOOP = """
store = CheckpointStore(folder, save_total_limit=2)
store.clean()
found = store.latest()
step = found.step if found else 0
while True:
    step += 1
    store.save(step, writer(step, 5_000), metric=float(step % 7))
    print(step, flush=True)
"""


@pytest.mark.parametrize("kills", [5, pytest.param(30, marks=pytest.mark.full)])
def test_kills_at_random_moments_lose_nothing(kills, tmp_path):
    store, moments, reported, cut = CheckpointStore(tmp_path), random.Random(0), 0, 0
    # Where a kill falls depends on the machine: runs go on until one has fallen into a save.
    for number in range(10 * kills):
        if number >= kills and cut:
            break
        run = subprocess.Popen(command(LOOP, tmp_path), stdout=subprocess.PIPE, text=True)
        assert run.stdout is not None
        first = run.stdout.readline()
        assert int(first) in (reported + 1, reported + 2), "a run goes on after what the one before saved"
        time.sleep(moments.uniform(0, 0.06))
        run.kill()
        rest = run.stdout.read().splitlines()
        run.wait()
        reported = int((rest or [first])[-1])
        newest = store.latest(verify=True)
        assert content(newest) == newest.step and newest.step in (reported, reported + 1)
        assert all(content(one) == one.step for one in store.checkpoints())
        cut += any(name.startswith(".") for name in names(tmp_path))
    assert reported > kills and cut > 0, "some kills must fall into a save"
