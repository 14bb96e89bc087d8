"""Exact conversion between RiGPT and stock checkpoints, with a certificate for every one."""

from ..checkpoints.certificate import TOLERANCES, Certificate, CertificateError, certify
from .checkpoint import convert_checkpoint, export_checkpoint
from .convert import convert_model
from .export import export_model


__all__ = [
    "TOLERANCES",
    "Certificate",
    "CertificateError",
    "certify",
    "convert_checkpoint",
    "convert_model",
    "export_checkpoint",
    "export_model",
]
