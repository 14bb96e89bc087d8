"""Tells PEFT which layers of a RiGPT its adapters go to, so that no `target_modules` need be given."""

from types import ModuleType

from .when_imported import when_imported


MODEL_TYPE = "rigpt"
# RiGPT's linear maps have Llama's names, so whatever PEFT does with Llama by default it can do with RiGPT.
LIKE = "llama"
CONSTANTS = "peft.utils.constants"


def register_with_peft():
    """Register now if PEFT is loaded; otherwise when it gets loaded, since importing it takes seconds."""
    when_imported(CONSTANTS, fill_in)


def fill_in(constants: ModuleType):
    """Give `rigpt` Llama's entry in every table of default targets of PEFT's module of constants."""
    for name, table in vars(constants).items():
        if name.endswith("_MODULES_MAPPING") and isinstance(table, dict) and LIKE in table:
            table.setdefault(MODEL_TYPE, table[LIKE])
