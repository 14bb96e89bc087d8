"""The polar factor of matrices: the nearest matrix with all singular values one."""

import torch


# Quintic iterations `x -> a x + b x³ + c x⁵` on singular values: K. Jordan's choice for Muon, whose slope at 0 is as
# large as it can be. It leaves singular values between about 0.7 and 1.2, not at 1, which training does not mind.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
# Added to norms that divide.
EPS = 1e-7


def newton_schulz(matrices: torch.Tensor, steps: int = STEPS) -> torch.Tensor:
    """
    Approximate polar factors `[..., m, n]` by Newton–Schulz iterations, matrix products only.

    The result is `p(M Mᵀ) M` for a polynomial p, hence turns exactly along with rotations on either side. Computed in
    bfloat16 on accelerators, in float32 on CPUs, and in float64 where the argument is.

    Args:
        matrices: `[..., m, n]`.
        steps: Number of iterations.
    """
    dtype = working_dtype(matrices.dtype, matrices.device)
    # A step inside of `autocast` must not lose the digits that it asks for.
    with torch.autocast(matrices.device.type, enabled=False):
        return newton_schulz_in(matrices, steps, dtype)


def working_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type in which [`newton_schulz`] computes the factors of matrices of one dtype on one device."""
    if dtype == torch.float64:
        return dtype
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def newton_schulz_in(matrices: torch.Tensor, steps: int, dtype: torch.dtype) -> torch.Tensor:
    factor = matrices.to(dtype)
    wide = factor.shape[-2] <= factor.shape[-1]
    factor = factor if wide else factor.mT
    factor = factor / (torch.linalg.matrix_norm(factor, keepdim=True) + EPS)
    a, b, c = COEFFICIENTS
    if 2 * factor.shape[-2] > factor.shape[-1]:
        for _ in range(steps):
            gram = factor @ factor.mT
            factor = a * factor + (b * gram + c * gram @ gram) @ factor
    else:
        # For long matrices all iterations run on the Gram matrix, and the product is done once.
        gram = factor @ factor.mT
        eye = torch.eye(gram.shape[-1], dtype=dtype, device=gram.device)
        total = eye
        for step in range(steps):
            polynomial = a * eye + b * gram + c * gram @ gram
            total = polynomial @ total
            if step + 1 < steps:
                gram = polynomial @ gram @ polynomial
        factor = total @ factor
    return (factor if wide else factor.mT).to(matrices.dtype)


def exact_polar(matrices: torch.Tensor) -> torch.Tensor:
    """
    Polar factors `[..., m, n]` by singular values, in float64. Directions of singular value zero stay zero: any choice
    there would single out a basis.
    """
    u, values, vt = torch.linalg.svd(matrices.to(torch.float64), full_matrices=False)
    # The rounding of float64, not of the argument: that of bfloat16 times 128 is 1, and nothing would be left.
    tolerance = max(matrices.shape[-2:]) * torch.finfo(values.dtype).eps
    filled = values > tolerance * values[..., :1]
    return ((u * filled.to(u)[..., None, :]) @ vt).to(matrices.dtype)
