"""Evaluation of RiGPT beside stock GPT-2."""

from rigpt_hf.stops import answer_while_importing


answer_while_importing()
