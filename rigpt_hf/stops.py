"""
Stops by signals at moments of their own: while a program is still importing its libraries, one line and the exit code,
as `execute` has for later ones; and between steps that belong together, after the last of them.

Imports nothing but the standard library, so that little comes before it.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


SAID = {signal.SIGINT: "stopped from the keyboard.", signal.SIGTERM: "stopped by SIGTERM."}


def answer_while_importing() -> None:
    """For a package whose programs import much before they begin: answer signals until [`leave_to_program`]."""
    if sys.argv[:1] != ["-m"]:  # what stands there while `python -m` imports what is above a program
        return
    for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is default:
            signal.signal(number, _stop)


def leave_to_program() -> None:
    """Have signals as Python has them, for the program that begins now."""
    for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is _stop:
            signal.signal(number, default)


@contextmanager
def deferred() -> Iterator[None]:
    """Has stops by signals wait while a few short steps belong together; in the main thread, which alone gets them."""
    came: list[int] = []
    earlier = {}
    try:
        for one in SAID:
            earlier[one] = signal.signal(one, lambda number, frame: came.append(number))
    except ValueError:  # another thread
        yield
        return
    try:
        yield
    finally:
        for one, answer in earlier.items():
            signal.signal(one, signal.SIG_DFL if answer is None else answer)
        for number in came:
            signal.raise_signal(number)


def _stop(number: int, frame: FrameType | None) -> None:
    words = sys.orig_argv
    name = " ".join(["python", *words[words.index("-m") :][:2]]) if "-m" in words else "python"
    # Nothing has been begun that would have to be taken away.
    os.write(2, f"{name}: {SAID[signal.Signals(number)]}\n".encode())
    os._exit(128 + number)
