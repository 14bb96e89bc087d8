"""Earlier place of `rigpt_hf.checkpoints.certificate`."""

from ..checkpoints.certificate import (
    CERTIFICATE_NAME,
    TOLERANCES,
    Certificate,
    CertificateError,
    library_versions,
    next_token_loss,
    random_input_ids,
    weights_sha256,
)
from ..checkpoints.certificate import record_logits as observe


__all__ = [
    "CERTIFICATE_NAME",
    "TOLERANCES",
    "Certificate",
    "CertificateError",
    "library_versions",
    "next_token_loss",
    "observe",
    "random_input_ids",
    "weights_sha256",
]
