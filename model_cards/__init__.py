"""
Model cards of RiGPT checkpoints: `metadata` (what is known, grouped by who knows it), `card` (how it is said).

Nothing in a card is made up. What a folder, a training run, a certificate, an evaluation or the author does not say is
left out, and the card says that it is.
"""
