"""The one place that writes to a terminal: texts of others cannot steer it, and an output that fails is said last."""

import io
import logging
import logging.handlers
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from rich import console, segment


# Control characters, and those that let text be read in another order than it is written.
UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: object) -> str:
    """A text in one line, in which characters that would steer a terminal are seen as Python writes them."""
    return re.sub(rf"{UNSEEN.pattern}|[\n\t]", _written, str(text))


def visible_lines(text: object) -> str:
    """The same of a text of several lines."""
    return UNSEEN.sub(_written, str(text))


def _written(match: re.Match) -> str:
    return ascii(match[0])[1:-1]


class Console(console.Console):
    """A console on which texts are seen as they are, but for styles of our own."""

    silent = False

    def __init__(self, **options: Any):
        super().__init__(**{"quiet": self.silent} | options)

    def render(self, *arguments: Any, **options: Any) -> Iterator[segment.Segment]:
        """The parts of what is printed."""
        for part in super().render(*arguments, **options):
            yield part if part.control else part._replace(text=visible_lines(part.text))


def say(text: object) -> None:
    """Print lines as they are."""
    if not Console.silent:
        print(visible_lines(text), flush=True)


def say_next(*commands: Iterable[object]) -> None:
    """Name commands, each in words, that a person may want next; those without words are none."""
    console = Console(soft_wrap=True)
    for number, words in enumerate(filter(None, commands)):
        # A path that begins like an option would be taken for one.
        plain = (f"./{word}" if isinstance(word, Path) and str(word)[0] == "-" else str(word) for word in words)
        line = shlex.join(plain)
        console.print(f"{'      ' if number else 'Next: '}{line}", markup=False, highlight=False)


class Nowhere(io.TextIOBase):
    """A stream that takes all and keeps nothing, for as long as anybody has it."""

    def write(self, text: str) -> int:
        return len(text)


@contextmanager
def silenced() -> Iterator[None]:
    """
    Inside, nothing is said but what a program is called for and prints: no table, progress, remark or warning. What is
    wrong is raised, and said behind it.
    """
    silent, level = Console.silent, logging.root.manager.disable
    with redirect_stderr(Nowhere()):
        Console.silent = True
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            Console.silent = silent
            logging.disable(level)


_answers: list[Any] = []


@contextmanager
def answering() -> Iterator[None]:
    """
    Inside, standard output is for what [`answer`] is given: no table or remark is said, and what others print goes to
    standard error, where progress and warnings are.
    """
    silent, stream = Console.silent, sys.stdout
    with redirect_stdout(sys.stderr):
        Console.silent = True
        _answers.append(stream)
        try:
            yield
        finally:
            _answers.pop()
            Console.silent = silent


def answer(text: str) -> None:
    """Write what a program asked for to standard output."""
    stream = _answers[-1] if _answers else sys.stdout
    stream.write(text)
    stream.flush()


@contextmanager
def notices_after(*names: str) -> Iterator[None]:
    """Holds back what loggers of these names say until all is done; if it is refused, the reason is all there is."""
    with notices_held(*names) as held:
        yield
    say_notices(held)


@contextmanager
def notices_held(*names: str) -> Iterator[list[logging.LogRecord]]:
    """Collects what loggers of these names say, for [`say_notices`] or for nobody."""
    loggers, held = list(map(logging.getLogger, names)), logging.handlers.MemoryHandler(sys.maxsize, sys.maxsize)
    # Whoever holds them outside of this block gets them once, when they are said.
    before = [(logger.propagate, logger.handlers) for logger in loggers]
    for logger in loggers:
        logger.propagate, logger.handlers = False, [held]
    try:
        yield held.buffer
    finally:
        for logger, state in zip(loggers, before, strict=True):
            logger.propagate, logger.handlers = state


def say_notices(notices: list[logging.LogRecord]) -> None:
    """Say what was held back."""
    for record in notices:
        logging.getLogger(record.name).handle(record)


class Output:
    """
    Standard output that keeps its failure for the end, so that nothing else is left undone for it.

    Args:
        stream: What to write to; what its encoding lacks is written as Python writes it.
    """

    def __init__(self, stream: Any):
        self.stream = stream
        self.failed = False
        self.failure: OSError | None = None
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write a text, unless something has failed before."""
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Bring out what was written."""
        self._try(self.stream.flush)

    def _try(self, act: Callable[[], Any]) -> None:
        try:
            if not self.failed:
                act()
        except OSError as error:
            self.failed = True
            if not isinstance(error, BrokenPipeError):  # whoever read it, such as `head`, has seen enough
                self.failure = error
            with suppress(OSError, ValueError):  # the interpreter tries once more when it ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


@contextmanager
def safe_output() -> Iterator[Output]:
    """Inside, standard output is an [`Output`], and records of logs are visible as they are."""
    before, make = sys.stdout, logging.getLogRecordFactory()

    def record(*arguments: Any, **options: Any) -> logging.LogRecord:
        made = make(*arguments, **options)
        made.msg, made.args = visible_lines(made.getMessage()), None
        return made

    output = Output(before)
    sys.stdout = output
    logging.setLogRecordFactory(record)
    try:
        yield output
    finally:
        output.flush()
        sys.stdout = before
        logging.setLogRecordFactory(make)
