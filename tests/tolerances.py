"""The one table of tolerances. Relative to the largest value compared; a test never brings numbers of its own."""

import torch


# Symmetries: the same function evaluated in another frame.
SYMMETRY = {torch.float64: 1e-11, torch.float32: 2e-5}

# Conversions: the same function from folded weights.
CONVERSION = {torch.float64: 1e-12, torch.float32: 2e-5}
