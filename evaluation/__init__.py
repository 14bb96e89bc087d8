"""Evaluation of RiGPT beside stock GPT-2."""
