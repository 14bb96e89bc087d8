"""
Experiments on symmetries of data: what a model gains that carries one. `docs/data-symmetry.md` reports them.

    python -m evaluation.experiments.symmetry.scan --help

Learners and their training are in `learners`, runs that are done in `run_records`.
"""
