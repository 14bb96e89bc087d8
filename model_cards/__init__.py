"""Model cards of RiGPT checkpoints."""
