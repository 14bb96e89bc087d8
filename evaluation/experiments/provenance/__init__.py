"""
Error rates of statistics that say whether one model was made from another: `docs/provenance.md` reports them.

    python -m evaluation.experiments.provenance --help

`models` trains models that have nothing to do with each other, `derive` makes others from them, `statistics` says how
alike two are, `rates` how often that misleads, and `program` runs all of it and keeps what is done.
"""
