"""One line on a terminal that says what goes on for as long as nothing else is written there, such as a bar."""

import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.cells import cell_len, set_cell_size

from .terminal import visible


# Seconds without a word after which the line is there; and between two looks.
PAUSE, PERIOD = 0.5, 0.25
# What moves nothing on a terminal: colours, erasing to the end of a line, and whether the cursor is seen.
STAYING = re.compile(r"\x1b\[[0-9;?]*[Khlm]")
# Of everything that is written to the terminal, by whatever thread, also from within a handler of signals.
_lock = threading.RLock()


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # who held the other one may not live here


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Status:
    """
    The line, on a terminal.

    Args:
        terminal: What it is written to.
    """

    now: "Status | None" = None  # the one that is running

    def __init__(self, terminal: TextIO):
        self.terminal, self.words, self.shown = terminal, ["Working"], ""
        self.began = self.last = time.monotonic()
        # Whether the cursor is at the beginning of an empty line: behind a bar or a question nothing is to be said.
        self.is_free = True
        self.ended = threading.Event()

    def run(self) -> None:
        """Look again and again whether there is something to say."""
        while not self.ended.wait(PERIOD):
            with _lock:
                now = time.monotonic()
                is_silent = now - self.last >= PAUSE and not self.ended.is_set()
                if is_silent and self.is_free:
                    self._show(f"{visible(self.words[-1])}, {now - self.began:.0f} s")
            if is_silent and not self.is_free:
                refresh_bars()

    def give_way(self, text: str = "") -> None:
        """Leave an empty line to somebody who writes a text there."""
        self._show("")
        *_, rest = parts = re.split(r"[\r\n]", text)
        if rest := STAYING.sub("", rest):
            self.is_free = False
        elif len(parts) > 1:
            self.is_free = True
        self.last = time.monotonic()

    def _show(self, line: str) -> None:
        columns = shutil.get_terminal_size().columns - 1
        line = line if cell_len(line) <= columns else set_cell_size(line, columns)
        if line != self.shown:
            blank = f"\r{' ' * cell_len(self.shown)}\r" if self.shown else ""
            self.terminal.write(blank + line)
            self.terminal.flush()
            self.shown = line


def refresh_bars() -> None:
    """Have the bars on the terminal, which wait for their next step, show how long they have been there."""
    if (library := sys.modules.get("tqdm")) is not None:  # importing it would take its time
        for bar in list(library.tqdm._instances):
            # Others are just being made, or have not appeared yet.
            if hasattr(bar, "start_t") and bar.last_print_t >= bar.start_t + bar.delay:
                bar.refresh()


class Watched:
    """
    A stream to the terminal on which the line is.

    Args:
        stream: Where texts go.
        status: The line, which gives way to them.
    """

    def __init__(self, stream: Any, status: Status):
        self.stream, self.status = stream, status

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write a text, with the line gone."""
        with _lock:
            if not self.status.ended.is_set():  # loggers keep their streams for longer
                self.status.give_way(text)
            return self.stream.write(text)


@contextmanager
def status() -> Iterator[None]:
    """Inside, a line on standard error says what goes on, see [`doing`]; only on a terminal, and of one process."""
    is_seen = sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and os.environ.get("RANK", "0") == "0"
    if not is_seen or Status.now is not None:
        yield
        return
    before = sys.stdout, sys.stderr
    line = Status.now = Status(sys.stderr)
    if sys.stdout.isatty():
        sys.stdout = Watched(sys.stdout, line)
    sys.stderr = Watched(sys.stderr, line)
    thread = threading.Thread(target=line.run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        with _lock:
            line.give_way()
            line.ended.set()
        sys.stdout, sys.stderr = before
        Status.now = None
        thread.join()


@contextmanager
def doing(words: str) -> Iterator[None]:
    """Inside, the line of [`status`] says this, if there is one; also a decorator."""
    if (line := Status.now) is None:
        yield
        return
    line.words.append(words)
    try:
        yield
    finally:
        line.words.remove(words)
