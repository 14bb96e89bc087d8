"""
Experiments that the documentation reports; run from a checkout, and in no wheel.

    python -m evaluation.experiments.merging --help

`compare` trains the recipes of `candidates` (with the baselines `modern` and `affine_norm`), `step_time` times their
steps; `equivariance`, `optimizer_cost` and `sharding_plan` measure the optimizer, `four_bits`, `export_gains` and
`quantization` rounding, `merging` alignment, `group_words` symmetry in data; `decoded` makes documents of token ids.
Numbers that they gave are in `evaluation/results/`.
"""
