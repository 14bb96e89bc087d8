"""Python in a process of its own, which imports nothing from the folder that a person happens to be in."""

import sys


def python(*arguments: object) -> list[str]:
    """
    The command that starts the Python of this process with these arguments, the first of them `-c` or `-m`.

    Python would put the current folder before all others that it imports from, and a `torch.py` that lies there, say
    among data that somebody else made, would run.
    """
    return [sys.executable, "-P", *map(str, arguments)]
