"""
What is measured of causal language models, as functions of a model and some text or rows of token ids.

`subjects` says what a model and a text are, `likelihood` scores tokens; on them stand `perplexity`, `accuracy`,
`invariance`, `outliers`, `quantization` (with `rounding` and `frames`) and `throughput`. Nothing here needs the
`evaluate` library: the modules in `evaluation/metrics` wrap these functions for it.
"""
