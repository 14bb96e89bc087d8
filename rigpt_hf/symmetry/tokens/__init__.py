"""Symmetries of data: exchanges of tokens that a model holds as gauge transformations."""
