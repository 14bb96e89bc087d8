"""Small pretraining runs for tests; as a program, one that is killed and started again until it is done."""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np

from rigpt_hf.optim import EquivariantOptimizer
from rigpt_hf.training.data import from_tokens
from rigpt_hf.training.loop import PretrainingRun, RunReport
from rigpt_hf.training.options import PretrainOptions
from tests import processes


MODEL = {
    "hidden_size": 16,
    "embedding_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "attention_bias": True,
    "embedding_norm": True,
    "value_embedding_period": 1,
    "residual_dropout": 0.1,
}
CALM = {"config_overrides": MODEL | {"residual_dropout": 0.0}}
VOCABULARY, END = 61, 0
PEAK = 1e9  # operations per second that a machine is taken to reach
# What a clock, and not the run, decides.
CLOCKS = ("tokens_per_second", "mfu")


def make_data(folder: Path) -> Path:
    """Tokens with something to learn: each is the one before plus one, most of the time."""
    draw = np.random.default_rng(0)
    files = {}
    for split, size in (("train", 20_000), ("validation", 4_000)):
        jumps = np.where(draw.random(size) < 0.1, draw.integers(0, VOCABULARY, size), 1)
        files[split] = folder / f"{split}.bin"
        (np.cumsum(jumps) % VOCABULARY).astype("<u2").tofile(files[split])
    from_tokens(files, folder / "data", vocab_size=VOCABULARY, end_of_text=END, progress=False)
    return folder / "data"


def make_options(data: Path, output: Path, **changes) -> PretrainOptions:
    """Options of a small run, changed by the arguments."""
    usual = {"config_overrides": MODEL, "data_dir": str(data), "data": None, "context_length": 16}
    usual |= {"learning_rate": 1e-2, "warmup_steps": 3, "output_dir": str(output), "report_to": []}
    usual |= {"max_steps": 12, "global_batch_size": 4, "eval_steps": 6, "eval_batches": 2, "save_steps": 3}
    return PretrainOptions(**(usual | {"deterministic": True} | changes))


def pretrain(data: Path, output: Path, **options) -> RunReport:
    return PretrainingRun(make_options(data, output, **options), progress=False).train()


def log_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def numbers_of(output: Path) -> list[dict]:
    return [{key: value for key, value in entry.items() if key not in CLOCKS} for entry in log_of(output)]


def losses_of(output: Path) -> list[float]:
    return [entry["loss"] for entry in log_of(output)]


def weights_of(output: Path) -> bytes:
    return (output / "model" / "model.safetensors").read_bytes()


def same_run(a: Path, b: Path) -> bool:
    """Whether two runs have the same losses and weights, bit by bit."""
    return losses_of(a) == losses_of(b) and weights_of(a) == weights_of(b)


def interrupted(run: Path, copy: Path, step: int = 12) -> Path:
    """A copy of a run as if it had been killed before the checkpoint of `step` was complete."""
    shutil.copytree(run, copy)
    for path in (copy / "checkpoints" / f"step-{step:08d}", copy / "model"):
        shutil.rmtree(path)
    return copy


def launch(data: Path, output: Path, world: int = 1, kills: int = 0, **options) -> dict:
    """A run in processes of its own."""
    words = ["-m", "tests.training.runs", data, output, world, kills, json.dumps(options)]
    done = processes.run(*words, cwd=processes.ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def start(rank: int, world: int, port: int, data: Path, output: Path, options: dict) -> int:
    """A child process that trains as one of `world`."""
    child = os.fork()
    if child:
        return child
    if world > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    signalled = options.pop("signalled", None)
    if signalled is not None:
        step = EquivariantOptimizer.step

        def interrupted(self, closure=None):
            signalled[1] -= 1
            if rank == signalled[0] and signalled[1] == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(self, closure)

        EquivariantOptimizer.step = interrupted
    try:
        pretrain(data, output, **options)
        os._exit(0)
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")  # at once, as others write there too
        os._exit(3)


def main(data: str, output: str, world: int, kills: int, options: dict) -> None:
    """
    Kill the processes of a run `kills` times with SIGKILL, each time start them again; then let it end.

    Of `options`, `victims` are the ranks that are killed, all if left out; the others must end by themselves.
    """
    draw, killed_at = random.Random(0), []
    victims = options.pop("victims", range(world))
    log = Path(output) / "metrics.jsonl"
    while True:
        port = processes.free_port()
        children = [start(rank, world, port, Path(data), Path(output), options) for rank in range(world)]
        killing = len(killed_at) < kills
        if killing:
            # Steps are short beside the start of a process, so the wait is for a step, and then a part of one more.
            before = len(log.read_text().splitlines()) if log.exists() else 0
            wanted = before + draw.randint(0, 3)
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                if log.exists() and len(log.read_text().splitlines()) > wanted:
                    break
                if os.waitid(os.P_PID, children[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                    break
                time.sleep(0.001)
            time.sleep(draw.random() * 0.05)
            for rank in victims:
                os.kill(children[rank], signal.SIGKILL)
            killed_at.append(len(log.read_text().splitlines()) if log.exists() else 0)
        codes = [os.waitpid(child, 0)[1] for child in children]
        if all(code == 0 for code in codes) and len(killed_at) >= kills:
            break
        if any(os.WIFEXITED(code) and os.WEXITSTATUS(code) == 3 for code in codes) and not killing:
            sys.exit("a process failed")
    print(json.dumps({"killed_at": killed_at}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), json.loads(sys.argv[5]))
