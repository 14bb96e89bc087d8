"""Processes of their own that start at once: forked from one that has imported the libraries, but nothing of ours.

`run` and `together` take the place of `subprocess.run` and of a launcher of several processes. All tests of a session
share one parent, which the first of them starts. A child has the environment, folder and arguments it is given; only
what libraries read when they are imported (`HF_HOME` and its like) is the parent's.
"""

import atexit
import contextlib
import importlib
import json
import os
import runpy
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

from filelock import FileLock


ROOT = Path(__file__).resolve().parents[1]
FOLDER = "RIGPT_TESTS_PROCESSES"
LIBRARIES = [
    "torch._dynamo",
    "transformers.trainer",
    "transformers.generation.utils",
    "transformers.models.gpt2.modeling_gpt2",
    "accelerate",
    "datasets",
    "evaluate",
    "peft",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.utils.tensorboard",
    "scipy.optimize",
    "matplotlib.pyplot",
    "typer",
]


def run(*command: object, world: int = 1, cwd: Path | None = None, timeout: int = 300, **environment: str):
    """
    `subprocess.run([sys.executable, *command])` with its output captured; as a launcher does it, if `world` > 1.

    Args:
        command: `-c`, a script and arguments; `-m`, a module and arguments; or a file and arguments. `-P` before them
            keeps the first place that Python imports from out, as it does there.
        world: Processes, each told its rank; the first to fail ends the others.
        environment: Added to that of the test.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        request = {"command": [str(word) for word in command], "world": world, "timeout": timeout}
        request |= {"cwd": str(cwd or Path.cwd()), "files": [str(file) for file in files], "port": free_port()}
        with socket.socket(socket.AF_UNIX) as link:
            link.connect(str(parent() / "socket"))
            link.sendall(json.dumps(request | {"environment": dict(os.environ) | environment}).encode() + b"\n")
            code = int(link.makefile().readline() or 1)
        return subprocess.CompletedProcess(command, code, *(file.read_text(errors="replace") for file in files))


def together(function, *arguments, world: int = 2, **options) -> subprocess.CompletedProcess:
    """Call `function(rank, *arguments)`, a module's own, in each of `world` processes; an error of one is ours."""
    call = f"from {function.__module__} import {function.__name__} as function\n"
    call += "import json, os, sys\nfunction(int(os.environ['RANK']), *json.loads(sys.argv[1]))"
    done = run("-c", call, json.dumps(arguments), world=world, cwd=ROOT, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def parent() -> Path:
    """The folder of the process that forks, which is started here if it is not there."""
    folder = Path(os.environ[FOLDER])
    with FileLock(folder / "lock"):
        if not (folder / "socket").exists():
            environment = os.environ | {"HF_HOME": str(folder / "hf"), "HF_EVALUATE_OFFLINE": "1"}
            environment = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
            started = subprocess.Popen(
                [sys.executable, "-W", "ignore", __file__, folder],
                env=environment,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
            assert started.stdout and started.stdout.readline() == b"ready\n", "no process to fork from"
    return folder


def begin():
    """Make the folder of a session; the process that all others of the session come from calls it."""
    # What a shell runs in the background ignores interrupts, and so would all that tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ[FOLDER] = tempfile.mkdtemp(prefix="processes-")
    (Path(os.environ[FOLDER]) / "session").write_text(str(os.getpid()))


def end():
    """End what `parent` started, and remove the folder."""
    folder = Path(os.environ.pop(FOLDER))
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        os.kill(int((folder / "pid").read_text()), signal.SIGTERM)
    shutil.rmtree(folder, ignore_errors=True)


class Server(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    """Answers each request in a fork of itself, and ends with the session."""

    session: int
    block_on_close = False

    def service_actions(self):
        super().service_actions()
        try:
            os.kill(self.session, 0)
        except ProcessLookupError:
            raise SystemExit from None


class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        """Start what is asked for, wait for it, and answer with an exit status."""
        request = json.loads(self.rfile.readline())
        world, children = request["world"], {}
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for rank in range(world):
            child = os.fork()
            if not child:
                os._exit(become(request, rank))
            children[child] = rank

        def end(kind: int):
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, kind)

        signal.signal(signal.SIGALRM, lambda *_: end(signal.SIGKILL))
        signal.alarm(request["timeout"])
        status = 0
        while children:
            child, code = os.waitpid(-1, 0)
            children.pop(child, None)
            if code and not status:
                status = os.waitstatus_to_exitcode(code)
                end(signal.SIGTERM)
        self.wfile.write(f"{status}\n".encode())


def become(request: dict, rank: int) -> int:
    """Be the process that was asked for, and return its exit status."""
    os.setsid()
    os.environ.clear()
    os.environ.update(request["environment"])
    os.environ.pop("PYTEST_CURRENT_TEST", None)
    if request["world"] > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request["world"]}
        names |= {"LOCAL_WORLD_SIZE": request["world"], "MASTER_ADDR": "localhost", "MASTER_PORT": request["port"]}
        os.environ.update({name: str(value) for name, value in names.items()})
    os.chdir(request["cwd"])
    for stream, file in zip((1, 2), request["files"], strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    safe = request["command"][0] == "-P"
    kind, *rest = words = request["command"][safe:]
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    first = str(Path(kind).parent) if kind not in ("-c", "-m") else request["cwd"]
    sys.path[:0] = [*[first] * (not safe), *filter(None, path)]
    sys.argv = words if kind not in ("-c", "-m") else ["-c", *rest[1:]]
    status = 0
    try:
        if kind == "-c":
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        elif kind == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as asked:
        status = asked.code if isinstance(asked.code, int) else int(asked.code is not None)
        if isinstance(asked.code, str):
            print(asked.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    # What a process does at its end: a fork of a server would leave it out.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    del sys.path[0]
    for library in LIBRARIES:
        with contextlib.suppress(ImportError):  # an environment with fewer packages has slower children
            importlib.import_module(library)
    place = Path(sys.argv[1])
    (place / "pid").write_text(str(os.getpid()))
    with Server(str(place / "partial"), Handler) as server:
        server.session = int((place / "session").read_text())
        (place / "partial").rename(place / "socket")
        print("ready", flush=True)
        try:
            server.serve_forever(poll_interval=1)
        finally:  # the session was killed
            shutil.rmtree(place, ignore_errors=True)
