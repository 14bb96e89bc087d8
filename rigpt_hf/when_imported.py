"""Something to do to another library's module once it is loaded, without loading it now, which may take seconds."""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable
from types import ModuleType


def when_imported(name: str, act: Callable[[ModuleType], None]) -> None:
    """
    Call `act` with the module `name`: now if it is loaded, otherwise right after it is executed.

    Args:
        name: Full name of a module.
        act: Must do no harm if it is called twice; of two with one name the first stays.
    """
    if name in sys.modules:
        act(sys.modules[name])
    elif not any(isinstance(finder, _ActOnImport) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _ActOnImport(name, act))


class _ActOnImport(importlib.abc.MetaPathFinder):
    """Finds one module as usual, and acts right after it is executed."""

    def __init__(self, name: str, act: Callable[[ModuleType], None]):
        self.name, self.act = name, act

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType):
            execute(module)
            self.act(module)

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec
