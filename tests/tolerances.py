"""The one table of tolerances. Relative to the largest value compared; a test never brings numbers of its own."""

import torch


# Symmetries: the same function evaluated in another frame.
SYMMETRY = {torch.float64: 1e-11, torch.float32: 2e-5}

# Conversions: the same function from folded weights.
CONVERSION = {torch.float64: 1e-12, torch.float32: 2e-5}

# Counting: the weakest singular value that counts is so many times the strongest redundant one.
JACOBIAN_GAP = 1e8

# Conservation: what Noether's theorem makes zero in float64, and the exact change of a charge in one step.
PAIRING = 1e-10

# Convergence: how far a measured order in the step size may be from the predicted one, in absolute terms.
ORDER = 0.1
