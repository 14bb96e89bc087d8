"""The error rates that stand behind a verdict, as `evaluation/experiments/provenance` measured them."""

RELATED = 0.5
