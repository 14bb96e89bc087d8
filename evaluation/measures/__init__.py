"""
Measures of causal language models: each file here is one measure, and whoever adds another adds a file.

A measure is a function of a model and some text or rows of token ids, and a record named `MEASURE`
([`rigpt_hf.evaluation.measure.Measure`]) from which suites, tables, pictures, report and card read all they say of it.
Nothing here needs the `evaluate` library: the modules in `evaluation/metrics` wrap these functions for it.
"""

from importlib import import_module
from pkgutil import iter_modules

from ..measure import Measure


MEASURES: dict[str, Measure] = {
    record.name: record
    for record in (import_module(f"{__name__}.{module.name}").MEASURE for module in iter_modules(__path__))
}
