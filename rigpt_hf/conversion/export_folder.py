"""`export_checkpoint`: a RiGPT folder becomes a folder of an unmodified stock model."""

import shutil
from pathlib import Path

import torch
from transformers import AutoConfig

from ..configuration_rigpt import RiGPTConfig
from ..modeling_rigpt import RiGPTForCausalLM
from .assemble import quiet_loading
from .certificate import Certificate, certify
from .checkpoint import local_folder
from .companions import save_tokenizer
from .export import export_model
from .output import check_output, publish, temporary_sibling


def export_checkpoint(
    source: str | Path,
    output_dir: str | Path,
    *,
    target: str = "gpt2",
    frame: str = "auto",
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
    seed: int = 0,
) -> Certificate:
    """
    Export a RiGPT folder to a stock one, with tokenizer, generation config and certificate.

    Args:
        source (`str` or `Path`): folder or Hub id of a RiGPT.
        output_dir (`str` or `Path`): the folder to make; it appears only when it is complete and certified.
        target, frame: as in [`export_model`].
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        dtype (`torch.dtype`, *optional*): of the result; the source's if not given.
        force (`bool`, defaults to `False`): replace an earlier model in `output_dir`.
        seed (`int`, defaults to 0): for the certificate's random inputs.

    Raises:
        CertificateError: if the result differs from the source by more than rounding.
        ValueError: if the source is no RiGPT, or the target cannot express it; the message names what.
    """
    output = Path(output_dir)
    check_output(output, str(source), force)
    folder = local_folder(str(source), revision)
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, RiGPTConfig):
        raise ValueError(
            f"`source` must be a RiGPT, got {str(source)!r} of model type {config.model_type!r}. Only a RiGPT can be "
            "exported."
        )
    with quiet_loading():
        model = RiGPTForCausalLM.from_pretrained(folder, dtype="auto").eval()
    exported = export_model(model, target, frame=frame, dtype=dtype)
    certificate = certify(model, exported, seed=seed).check()
    temporary = temporary_sibling(output)
    try:
        with quiet_loading():
            exported.save_pretrained(temporary)
        save_tokenizer(folder, temporary)
        certificate.save(temporary)
        publish(temporary, output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return certificate
