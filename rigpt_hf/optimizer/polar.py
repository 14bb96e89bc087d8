"""The polar factor of matrices: the nearest matrix with all singular values one."""

import torch


# Quintic iterations `x -> a x + b x³ + c x⁵` on singular values of at most 1, the last of a row again and again.
COEFFICIENTS = {
    # K. Jordan's choice for Muon, whose slope at 0 is as large as it can be. It leaves singular values between about
    # 0.7 and 1.2, not at 1, which training does not mind.
    "newton_schulz": [(3.4445, -4.7750, 2.0315)],
    # One after the other the best for what the one before leaves of the interval from 0.001 to 1, in the largest error
    # (Polar Express: Amsel et al., arXiv 2505.16932; solved here by Remez's algorithm). Five leave 1 ± 0.12 of it.
    "polar_express": [
        (8.470328803848073, -25.10807470666187, 18.629275599118007),
        (4.182834183293943, -3.108701109889242, 0.5806066813500492),
        (3.9618572789615976, -2.954063746359376, 0.5629761179538959),
        (3.2865862170279603, -2.4647201345312815, 0.5073576938614547),
        (2.273749994434038, -1.6446603679080687, 0.41619092749788617),
        (1.8887161973518285, -1.2651572253385992, 0.3765189255574899),
        (1.875, -1.25, 0.375),
    ],
}
STEPS = 5
# Added to norms that divide.
EPS = 1e-7
# By so much rounding to 16 bits may lift a singular value above 1, beyond which these polynomials grow without bounds;
# each step takes them as if they had been (a safety factor as in Polar Express).
LIFTED = 1.02


def newton_schulz(matrices: torch.Tensor, steps: int = STEPS, method: str = "newton_schulz") -> torch.Tensor:
    """
    Approximate polar factors `[..., m, n]` by Newton–Schulz iterations, matrix products only.

    The result is `p(M Mᵀ) M` for a polynomial p, hence turns exactly along with rotations on either side. Computed in
    bfloat16 on accelerators, in float32 on CPUs, and in float64 where the argument is.

    Args:
        matrices: `[..., m, n]`.
        steps: Number of iterations.
        method: A key of `COEFFICIENTS`.
    """
    dtype = working_dtype(matrices.dtype, matrices.device)
    # A step inside of `autocast` must not lose the digits that it asks for.
    with torch.autocast(matrices.device.type, enabled=False):
        return newton_schulz_in(matrices, steps, dtype, method)


def working_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type in which [`newton_schulz`] computes the factors of matrices of one dtype on one device."""
    if dtype == torch.float64:
        return dtype
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def newton_schulz_in(
    matrices: torch.Tensor, steps: int, dtype: torch.dtype, method: str = "newton_schulz"
) -> torch.Tensor:
    """[`newton_schulz`] in a type of numbers."""
    factor = matrices.to(dtype)
    wide = factor.shape[-2] <= factor.shape[-1]
    factor = factor if wide else factor.mT
    factor = factor / (torch.linalg.matrix_norm(factor, keepdim=True) + EPS)
    known = COEFFICIENTS[method]
    rounds = [known[min(step, len(known) - 1)] for step in range(steps)]
    coarse = dtype.itemsize < 4
    if coarse and method == "polar_express":
        rounds = [(a / LIFTED, b / LIFTED**3, c / LIFTED**5) for a, b, c in rounds]
    if coarse or 2 * factor.shape[-2] > factor.shape[-1]:
        for a, b, c in rounds:
            gram = factor @ factor.mT
            factor = a * factor + (b * gram + c * gram @ gram) @ factor
    else:
        # For long matrices all iterations run on the Gram matrix, and the product is done once. In 16 bits that matrix
        # would lose its small eigenvalues, and the iterations would blow up what is in their place.
        gram = factor @ factor.mT
        eye = torch.eye(gram.shape[-1], dtype=dtype, device=gram.device)
        total = None
        for step, (a, b, c) in enumerate(rounds):
            polynomial = a * eye + b * gram + c * gram @ gram
            total = polynomial if total is None else polynomial @ total
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
