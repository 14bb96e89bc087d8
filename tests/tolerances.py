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

# Training in float64 from a turned start against the turned training, relative to the way that was gone.
TRAINING = 1e-10

# Balancing: charges in float64, relative to the squared norm of all weights, and the equations that it solves.
BALANCE = 1e-12

# Canonical forms: two members of one orbit give the same weights. Rounding counts by 1 / smallest gap.
CANONICAL = {torch.float64: 1e-8, torch.float32: 1e-4}

# Distance between orbits, which is relative to the norm of all weights: of a disguise of the same dtype, and
# how much may depend on the member of the orbit, and on the order of the two, when they are not the same.
DISTANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2}
LOCAL_MINIMUM = 1e-3

# Noise of a known relative size, as the distance shows it: relative.
NOISE = 0.05

# The same training in float32, in other orders of summation: over processes, batches or compiled.
DISTRIBUTED = 1e-5

# The same stock model in float32, computed by another program; and where that reads an activation from a table of
# halves, against one that does too: numbers that lie between two of its entries go to either.
RUNTIME, RUNTIME_TABLE = 1e-4, 3e-4
