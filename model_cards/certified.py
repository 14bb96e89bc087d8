"""Whether the certificate beside some weights is theirs."""

import hashlib
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rigpt_hf.checkpoints.certificate import CERTIFICATE_NAME, Certificate, next_token_loss, tolerance_of
from rigpt_hf.checkpoints.logits import random_input_ids, record_logits
from rigpt_hf.checkpoints.weights import DTYPES, stored_tensors, weights_sha256
from rigpt_hf.evaluation.models import EvaluatedModel


QUESTION = "whether it is what it was made from"
OTHER_WEIGHTS = "its certificate is of other weights"
OTHER_FUNCTION = "its weights no longer compute what its certificate says"
CONTRADICTION = "its certificate contradicts itself"
# A certificate with one of these says nothing of the model that it lies beside.
OF_ANOTHER = (OTHER_WEIGHTS, OTHER_FUNCTION, CONTRADICTION)
NOT_PASSED = "its certificate did not pass"
STATED_DTYPE = "its certificate passes only by the dtype that it states of the source, which cannot be checked"
NO_INPUTS = "the inputs of its certificate, which were given, are not here"
NO_WEIGHTS = "its certificate names no weights"
# Certificates are made on a few windows; a file may say anything.
MOST_TOKENS = 2**12


def certificate_of(folder: Path, subject: EvaluatedModel) -> tuple[Certificate | None, str]:
    """
    The certificate beside the weights, if it is still theirs. Otherwise `None`, and why.

    They must have the hash that it names, and give the loss and the largest logit that it says on the inputs that it
    names, as a configuration that was changed would not. The tolerance is that of their own dtype: that of the source,
    which is not here, is only stated, and the verbs that write certificates load no source in a coarser one.

    Raises:
        ValueError: if it cannot be read.
    """
    path = folder / CERTIFICATE_NAME
    if not path.exists():
        return None, ""
    try:
        certificate = Certificate.load(folder)
        ids = _inputs(certificate, subject.model.config)
        stored = {DTYPES.get(tensor.dtype) for tensor in stored_tensors(folder, "folder").values()}
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"`folder` must have a certificate that can be read or none, got {str(path)!r}. Remove it."
        ) from error
    checked = replace(certificate, tolerance=tolerance_of(certificate.dtype))
    doubt = _doubt(checked, subject.model, stored, ids)
    if not doubt and not checked.passed:
        doubt = STATED_DTYPE if certificate.passed else NOT_PASSED
    return (None, f"{QUESTION}: {doubt}") if doubt else (checked, "")


def _inputs(certificate: Certificate, config: Any) -> torch.Tensor | None:
    """The tokens of a certificate `[batch, seq]`, if its seed gives them once more and all of them count."""
    rows, length = map(int, certificate.inputs["shape"])
    seed, tokens = certificate.inputs.get("seed"), certificate.inputs["tokens"]
    if seed is None or tokens != rows * length or not 0 < tokens <= MOST_TOKENS:
        return None
    ids = random_input_ids(config.vocab_size, config.max_position_embeddings, rows, length, seed)
    same = hashlib.sha256(ids.contiguous().numpy().tobytes()).hexdigest() == certificate.inputs["sha256"]
    return ids if same else None


def _doubt(
    certificate: Certificate, model: Any, stored: Collection[torch.dtype | None], ids: torch.Tensor | None
) -> str:
    """
    Why a certificate is not known to be of this model; nothing if it is.

    Args:
        certificate, model: The two.
        stored: Dtypes of the tensors in its files; the configuration may name another one to load them in.
        ids: Inputs of the certificate `[batch, seq]`, if they are known.
    """
    if not certificate.weights_sha256:
        return NO_WEIGHTS
    if certificate.weights_sha256 != weights_sha256(model):
        return OTHER_WEIGHTS
    # No loss moves by more than twice what the logits do.
    apart = abs(certificate.loss_difference) > 2 * certificate.max_abs_logit_error + 1e-9
    if apart or f"torch.{certificate.dtype}" != str(model.dtype) or model.dtype not in stored:
        return CONTRADICTION
    # The same weights under another configuration compute something else.
    if ids is None:
        return NO_INPUTS
    return "" if _computes(certificate, model, ids, certificate.tolerance) else OTHER_FUNCTION


def _computes(certificate: Certificate, model: Any, ids: torch.Tensor, tolerance: float) -> bool:
    """Whether a model gives the loss and the largest logit of a certificate, up to rounding."""
    logits = record_logits(model, ids, hashed=False).logits
    loss = next_token_loss(logits, ids, torch.ones_like(ids, dtype=torch.bool))
    largest = certificate.max_abs_logit
    # No loss moves by more than twice what its logits do, which is less where they are small.
    allowed = tolerance * min(max(abs(certificate.loss_b), 1), 2 * largest)
    if not abs(loss - certificate.loss_b) <= allowed:
        return False
    # The largest of the source, from which that of these weights may be as far as any logit was.
    return abs(float(logits.abs().max()) - largest) <= certificate.max_abs_logit_error + tolerance * largest
