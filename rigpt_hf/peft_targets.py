"""Tells PEFT which layers of a RiGPT its adapters go to, so that no `target_modules` need be given."""

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType


MODEL_TYPE = "rigpt"
# RiGPT's linear maps have Llama's names, so whatever PEFT does with Llama by default it can do with RiGPT.
LIKE = "llama"
CONSTANTS = "peft.utils.constants"


def register_with_peft():
    """Register now if PEFT is loaded; otherwise when it gets loaded, since importing it takes seconds."""
    if CONSTANTS in sys.modules:
        fill_in(sys.modules[CONSTANTS])
    elif not any(isinstance(finder, _FillInOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _FillInOnImport())


def fill_in(constants: ModuleType):
    """Give `rigpt` Llama's entry in every table of default targets of PEFT's module of constants."""
    for name, table in vars(constants).items():
        if name.endswith("_MODULES_MAPPING") and isinstance(table, dict) and LIKE in table:
            table.setdefault(MODEL_TYPE, table[LIKE])


class _FillInOnImport(importlib.abc.MetaPathFinder):
    """Finds PEFT's constants as usual, and fills in the tables right after they are executed."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != CONSTANTS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_fill_in(module: ModuleType):
            execute(module)
            fill_in(module)

        spec.loader.exec_module = execute_and_fill_in  # type: ignore[method-assign]
        return spec
