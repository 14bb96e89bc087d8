"""The process of a case: a program of the project, with answers on its standard input, and what befalls it."""

import errno
import json
import os
import resource
import runpy
import signal
import sys
import tempfile
from pathlib import Path


SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink"}
# What a full disk refuses: a rename needs no room.
FILLS = {"open", "os.mkdir", "os.link", "os.symlink"}


def arm(event: dict, run) -> None:
    """Let `event["do"]` happen at the `event["at"]`-th change of a file below `event["root"]`, and be noted."""
    if event["do"] == "device":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        return
    if event["do"] == "limit":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (event["at"], event["at"]))
        return
    seen, busy = 0, False

    def hook(name: str, arguments: tuple) -> None:
        nonlocal seen, busy
        writes = name == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if busy or not (writes or name in CHANGES) or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        if not os.path.abspath(os.fsdecode(arguments[0])).startswith(event["root"]):
            return
        seen += 1
        if seen < event["at"] or (seen > event["at"] and event["do"] != "full"):
            return
        busy = True
        Path(event["note"]).touch()
        try:
            if event["do"] in SIGNALS:
                os.kill(os.getpid(), SIGNALS[event["do"]])
            elif event["do"] == "full" and name in FILLS:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), arguments[0])
            elif event["do"] == "appear":
                place = Path(event["place"])
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_text("years of work")
            elif event["do"] == "twin":
                twin = os.fork()
                if not twin:
                    os._exit(status(run))
                Path(event["note"]).write_text(str(os.waitstatus_to_exitcode(os.waitpid(twin, 0)[1])))
        finally:
            busy = False

    sys.addaudithook(hook)


def status(run) -> int:
    """The exit code of a program, called."""
    try:
        run()
    except SystemExit as asked:
        return asked.code if isinstance(asked.code, int) else 0
    except BaseException:
        return 99
    return 0


def main() -> None:
    event, module, *words = json.loads(sys.argv[1])
    answers, given = os.pipe()
    os.write(given, b"y\n" * 1000)
    os.close(given)
    os.dup2(answers, 0)
    tempfile.tempdir = None
    sys.argv = words

    def run():
        if module is None:
            from rigpt_hf.cli import main as rigpt

            rigpt()
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)

    if event:
        from rigpt_hf.checkpoints import disk

        rename = disk._rename  # no hook hears of this system call
        disk._rename = lambda a, b, flag: (sys.audit("os.rename", a, b, -1, -1), rename(a, b, flag))[1]
        arm(event, run)
    run()


main()
