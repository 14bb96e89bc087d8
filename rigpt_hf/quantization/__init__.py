"""Fewer bits per weight, in a frame that is good for it."""

from .calibration import calibration_tokens, held_out_tokens, window_losses
from .gptq import gptq
from .grid import Codes, rounded_codes
from .hadamard import hadamard
from .moments import all_moments, moments_by_layer
from .recipe import Quantized, Recipe, quantize_model
from .tuning import tuned


__all__ = [
    "Codes",
    "Quantized",
    "Recipe",
    "all_moments",
    "calibration_tokens",
    "gptq",
    "hadamard",
    "held_out_tokens",
    "moments_by_layer",
    "quantize_model",
    "rounded_codes",
    "tuned",
    "window_losses",
]
