"""
`rigpt demo`: a stock GPT-2 becomes a RiGPT, is proven equal, rotated, and saved, with a report to look at.

`options` says what it can be told, `run` does it, stage by stage.
"""
