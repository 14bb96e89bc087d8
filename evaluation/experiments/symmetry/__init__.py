"""
Experiments on symmetries of data: what a model gains that carries one. `docs/data-symmetry.md` reports them.

    python -m evaluation.experiments.symmetry.scan --help

Who learns, and how, is in `rigpt_hf/demo/learners.py`; runs that are done are kept by `../run_records.py`.
"""
