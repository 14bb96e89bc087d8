"""Runs a case in a process of its own, and judges the answer."""

import hashlib
import json
import os
import re
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from rigpt_hf.checkpoints.read import quiet_loading
from rigpt_hf.checkpoints.written import WRITTEN
from tests import processes

from .cases import Case
from .models import CANARY
from .world import COMMANDS, MODULES


LIMIT = 60
ONE = threading.Lock()  # models are loaded by one thread at a time
CHILD = Path(__file__).with_name("child.py")
TOKEN = "hf_" + "canary" * 5
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg", "COLUMNS": "200", "HF_TOKEN": TOKEN}
CODES = {"term": 143, "int": 130, "kill": -9}
PROGRESS = re.compile(r"\d+%\||\[\d\d:\d\d")
# Words of libraries that say nothing to a person at the terminal.
FOREIGN = re.compile(
    r"--debug \.\.\.|ignore_mismatched_sizes|weights_only|Expecting value|StrictDataclass"
    r"|SafetensorError|object has no attribute|NoneType|not subscriptable|KeyError|unexpected keyword"
    r"|ZeroDivisionError|RuntimeError|ImportError|invalid literal|matrix contains|Errno 28|^\S+ \[Errno"
)


class Failed(Exception):
    """The answer is wrong, and how."""


def snapshot(folder: Path) -> dict[str, str]:
    """The content of a folder by relative names: hashes of files, targets of links."""
    found = {}
    for place, folders, files in os.walk(folder):
        for path in (Path(place, name) for name in (*folders, *files)):
            if path.is_symlink():
                what = f"-> {os.readlink(path)}"
            else:
                what = "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
            found[os.path.relpath(path, folder)] = what
    return found


def said(err: str) -> list[str]:
    """The lines on standard error but for progress bars."""
    parts = (line.strip() for line in re.split(r"[\r\n]", err))
    return [line for line in parts if line and not PROGRESS.search(line)]


class Answer:
    """
    The outcome of a command line in the folder `root`, in which nothing else may change.

    Args:
        before: The `snapshot` before.
        event: What befalls the process.
    """

    def __init__(self, root: Path, words: list[str], before: dict[str, str], event: dict[str, Any]):
        note, event = root.with_name(f"{root.name}.note"), dict(event)
        if "at" in event:
            work = root / "work"
            event |= {"note": str(note), "root": str(work), "place": str(work / event.get("place", ""))}
        request = json.dumps([event if "at" in event else None, MODULES.get(words[0]), *words])
        homes = {"HOME": str(root / "home"), "TMPDIR": str(root / "tmp")}
        started = time.monotonic()
        done = processes.run(CHILD, request, cwd=root / "work", timeout=LIMIT, **ENVIRONMENT | homes)
        self.seconds, self.code = time.monotonic() - started, done.returncode
        self.printed, self.err = done.stdout + done.stderr, said(done.stderr)
        self.happened = note.exists() and (note.read_text() or "yes")
        note.unlink(missing_ok=True)
        after = snapshot(root)
        # Libraries have caches; and what is written is put down in the record beside it.
        self.new = sorted(name for name in after.keys() - before.keys() if not name.startswith("home/.c"))
        self.changed = [name for name, what in before.items() if after.get(name) != what]
        wrote = {os.path.dirname(name) for name in self.new if not is_record(name)}
        self.new, self.changed = (
            [name for name in names if not (is_record(name) and os.path.dirname(name) in wrote)]
            for names in (self.new, self.changed)
        )
        if self.code == CODES["kill"]:  # the record comes first
            self.changed = [name for name in self.changed if not is_record(name)]


def is_record(name: str) -> bool:
    """Whether a file says what was written beside it."""
    return os.path.basename(name) == WRITTEN


def judge(case: Case, root: Path) -> dict[str, Any]:
    """Run a case, whose inputs are in `root / "work"`, and judge how it is answered: refused, accepted or failed."""
    for name in ("home", "tmp"):
        (root / name).mkdir()
    before = snapshot(root)
    answer = Answer(root, case.words, before, case.event)
    try:
        outcome, why = weigh(case, root, answer)
        if answer.code == -9:
            after_kill(case, root, before)
    except Failed as failed:
        outcome, why = "failed", str(failed)
    short = [word if len(word) < 400 else f"{word[:60]}...({len(word)})" for word in case.words]
    facts = {"outcome": outcome, "why": why, "code": answer.code, "seconds": round(answer.seconds, 1)}
    return asdict(case) | facts | {"words": short, "err": "\n".join(answer.err)[-2000:]}


def weigh(case: Case, root: Path, answer: Answer) -> tuple[str, str]:
    """The outcome of a process, and why; raises `Failed` if the answer is wrong."""
    do = case.event.get("do") if answer.happened else None
    if answer.seconds >= LIMIT:
        raise Failed(f"no answer after {LIMIT} s")
    if "Traceback" in answer.printed:
        raise Failed(f"a traceback: {answer.err[-1:]}")
    if any(Path(name).name == CANARY for name in answer.new):
        raise Failed("foreign code was run")
    if answer.changed:
        raise Failed(f"changed or gone: {', '.join(answer.changed[:4])}")
    files = [root / name for name in answer.new if (root / name).is_file()]
    if TOKEN in answer.printed or any(TOKEN.encode() in file.read_bytes() for file in files):
        raise Failed("the token is shown")
    if do == "kill":
        return "refused", "the next run is whole"
    if do == "appear":
        place = root / "work" / case.event["place"]
        if not place.is_file() or place.read_text() != "years of work":
            raise Failed("what appeared is gone")
        if answer.code == 0:
            return "accepted", "what appeared is still there"
        answer.new = [name for name in answer.new if root / name not in (place, *place.parents)]
    if do == "twin" and "0" in (answer.happened, str(answer.code)):
        # With --force the later of the two may replace what the earlier has finished.
        alone = case.command not in ("evaluate", "card", "pretrain") and "--force" not in case.words
        if answer.happened == str(answer.code) and alone:
            raise Failed("two at once, and both say that they wrote")
        return "refused", complete(case, root, answer, "one of two")
    if answer.code == 0 and do in CODES:
        return "accepted", "it ended well, or stopped at a checkpoint"
    verdict = answer.code == 1 and not answer.err and case.command in ("verify", "verify-stock", "diff", "evaluate")
    if answer.code == 0 or verdict:
        if not case.fine:
            raise Failed("bad input gets a verdict" if verdict else "bad input is taken")
        return "accepted", case.fine if verdict else complete(case, root, answer, case.fine)
    if answer.code not in ({CODES[do]} if do in CODES else {1, 2}):
        raise Failed(f"exit code {answer.code}: {answer.err[-1:]}")
    check_words(case, root, answer.err)
    if case.event.get("do") == "device" and "All else is done" in answer.err[0]:
        return "refused", complete(case, root, answer, "standard output was full")
    goes_on = case.command in ("pretrain", "evaluate", "finetune", "chat") and "at" in case.event
    if left := [name for name in answer.new if not (goes_on and name.startswith("work/out"))]:
        raise Failed(f"left behind: {', '.join(left[:4])}")
    return "refused", answer.err[0]


def check_words(case: Case, root: Path, err: list[str]) -> None:
    """One line, in words that are ours, no longer than a person reads."""
    if len(err) != 1:
        raise Failed(f"{len(err)} lines on standard error")
    if not err[0].startswith(f"{case.words[0]}: "):
        raise Failed(f"does not begin with the name of the program: {err[0][:100]}")
    # A template is a program, and how it failed is the reason.
    if (found := FOREIGN.search(err[0])) and "that the chat template accepts" not in err[0]:
        raise Failed(f"not our words: {found[0]}: {err[0][:200]}")
    if len(err[0].replace("x" * 300, "").replace(str(root), "")) > 800:
        raise Failed(f"{len(err[0])} characters: {err[0][:150]}")


def complete(case: Case, root: Path, answer: Answer, why: str) -> str:
    """Raise unless all that the command makes is there, loads, and nothing else is new; returns `why`."""
    makes, out = COMMANDS[case.command].makes, case.event.get("out", "out")
    if case.command == "card":  # beside the model, whatever that is called
        makes = (f"{case.words[2]}/README.md",)
    ours = (f"work/{out}", "work/out", *(f"work/{name}" for name in makes))
    if stray := [name for name in answer.new if not name.startswith(ours) or ".partial" in name]:
        raise Failed(f"accepted, and left behind: {', '.join(stray[:4])}")
    if "out" in case.event:
        return why
    if missing := [name for name in makes if not (root / "work" / name).exists()]:
        raise Failed(f"accepted, but there is no {', '.join(missing)}")
    if "out/config.json" in makes:
        try:
            with ONE, quiet_loading():
                model = AutoModelForCausalLM.from_pretrained(root / "work/out")
        except Exception as error:
            raise Failed(f"accepted, and the result does not load: {error}") from error
        if not all(value.isfinite().all() for value in model.parameters()):
            raise Failed("accepted, and the result is not finite")
    return why


def after_kill(case: Case, root: Path, before: dict[str, str]) -> None:
    """Raise unless the same command, said again, removes what is left, and ends well; it may advise one option."""
    answer = Answer(root, case.words, before, {})
    if answer.code == 2 and (advised := re.findall("--(?:force|resume)", answer.printed)):
        answer = Answer(root, [*case.words, advised[0]], before, {})
    if answer.code:
        raise Failed(f"killed, then said again: exit code {answer.code}: {answer.err[-1:]}")
    if answer.changed:
        raise Failed(f"killed, then said again: changed or gone: {', '.join(answer.changed[:4])}")
    complete(case, root, answer, "")
