"""Sharing one piece of work among processes: who does what, and how all learn that one of them failed."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar


Result = TypeVar("Result")


class Workers(Protocol):
    """The processes that work together; `index` 0 is the main one."""

    index: int
    count: int

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in order, on every process; waits for all of them."""
        ...


class SingleWorker:
    """One process, which does everything."""

    index = 0
    count = 1

    def gather(self, value: Any) -> list[Any]:
        return [value]


ALONE = SingleWorker()


class AccelerateWorkers:
    """
    The processes that `accelerate launch` started.

    Args:
        state (`accelerate.PartialState`): this process's view of them.
    """

    def __init__(self, state: Any):
        self.index, self.count = state.process_index, state.num_processes

    def gather(self, value: Any) -> list[Any]:
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])


def together(workers: Workers, step: Callable[[], Result]) -> Result:
    """
    Run a step on every process; if it fails on one, it fails on all, and none waits for ever.

    Raises:
        RuntimeError: if the step failed on another process.
    """
    failure: Exception | None = None
    result: Any = None
    try:
        result = step()
    except Exception as error:
        failure = error
    messages = workers.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for index, message in enumerate(messages):
        if message is not None:
            raise RuntimeError(f"Process {index} failed and took the others with it. {message}")
    return result
