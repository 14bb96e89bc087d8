"""A text that every machine has, for models that learn in seconds."""

import ast
import re
import sysconfig
from pathlib import Path


# Modules of one file with much documentation, which are there in every version of Python that is supported.
MODULES = (
    "argparse ast bdb calendar cmd configparser difflib _pydecimal fractions ftplib functools heapq inspect ipaddress "
    "optparse os pdb pickletools random shutil smtplib socket statistics string subprocess tarfile tempfile textwrap "
    "threading turtle typing"
)


def library_text() -> tuple[str, list[str]]:
    """
    Documentation strings of Python's standard library, in lower case and with few signs; and its characters, sorted.

    It depends on the version of Python, but for one version it is the same everywhere.
    """
    places = [Path(sysconfig.get_path("stdlib")) / f"{name}.py" for name in MODULES.split()]
    trees = [ast.parse(place.read_text(encoding="utf-8")) for place in places if place.is_file()]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, documented)]
    text = "\n".join(filter(None, (ast.get_docstring(node) for node in nodes))).lower()
    text = re.sub(r" +", " ", re.sub(r"[^a-z .,'()\n]+", " ", text))
    text = re.sub(r"\s*\n\s*", "\n", text)
    return text, sorted(set(text))
