"""`export_gguf`: a RiGPT on disk becomes a GGUF file, which llama.cpp and the programs around it run."""

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..checkpoints.certificate import CERTIFICATE_NAME, Certificate, compare
from ..checkpoints.companions import check_companions
from ..checkpoints.dequantized import dequantized, in_words, method_of
from ..checkpoints.folder import check_output, new_folder
from ..checkpoints.logits import LogitsSnapshot, random_input_ids
from ..checkpoints.named import check_rigpt
from ..checkpoints.read import check_ids, load_config, load_model, load_tokenizer, local_folder
from ..checkpoints.source import VOCABULARY_FILES
from ..checkpoints.weights import name_some
from ..checkpoints.write import Reference
from ..extras import require
from ..modeling_rigpt import RiGPTForCausalLM
from ..terminal import notices_after
from .assemble import assemble
from .export import ExportPlan, plan_export
from .families import TARGETS
from .gguf_file import (
    ARCHITECTURES,
    CODES,
    GGUF_DTYPES,
    HEAD,
    ROUNDED,
    check_known,
    keeps_codes,
    kind_of,
    nbytes_of,
    read_gguf,
    write_gguf,
)
from .gguf_grid import BLOCK
from .neutral import fault, nearest, refused_options
from .onnx import untraced


logger = logging.get_logger(__name__)

CONVERSION = __name__.rpartition(".")[0]


@notices_after(CONVERSION)
def export_gguf(
    source: str | Path,
    output_dir: str | Path,
    *,
    revision: str | None = None,
    frame: str = "auto",
    dtype: str | None = None,
    force: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Certificate:
    """
    Export a RiGPT on disk or on the Hub to a folder with one GGUF file, `NAME-TYPE.gguf`, and its certificate.

    The stock class is the first that both expresses the model and is known to llama.cpp. A file in floating point is
    read back by Transformers, where that reads its architecture, and compared with the source. Of one whose weights
    are rounded to 8 or 4 bits, or of another architecture, the stock model is certified whose tensors the file holds.

    Args:
        source (`str` or `Path`): a folder, or the id of a repository; `revision` (`str`, *optional*) of the latter.
        output_dir (`str` or `Path`): the folder to make; it appears complete or not at all.
        frame (`str`, defaults to `"auto"`): as for [`export_model`].
        dtype (`str`, *optional*):
            "float32", "float16", "bfloat16", or llama.cpp's "q8_0" or "q4_0", which are 8.5 and 4.5 bits per weight.
            Vectors are always stored in float32. The source's if not given; float32 for float64. Of a source of
            codes each tensor is stored in the coarsest of the last two that holds all of its numbers exactly, and the
            stream is turned back only where its codes stay.
        force (`bool`, defaults to `False`): replace an earlier result in `output_dir`, once the new one is complete.
        seed (`int`, defaults to 0): for the certificate's random inputs.
        progress (`bool`, defaults to `True`): show a progress bar.

    Raises:
        CertificateError: if the result differs from the source by more than rounding.
        MissingPackage: if the package `gguf` is not installed.
        ValueError: if llama.cpp has no class that expresses the source, or its tokenizer cannot be expressed.
    """
    require("gguf")
    if dtype is not None and dtype not in GGUF_DTYPES:
        raise ValueError(
            f"`dtype` must be one of {', '.join(GGUF_DTYPES)}, got {dtype!r}, which GGUF lacks. Take one of these."
        )
    output, name = Path(output_dir), str(source)
    seen = check_output(output, name, force)
    folder = local_folder(name, revision)
    config, decoded = load_config(folder), None
    if method_of(config) is not None:
        logger.warning(f"{name} is quantized by {method_of(config)}{in_words(config)}, and was decoded.")
        decoded = dequantized(folder, config)
        config = decoded.config
    check_rigpt(config, name)
    check_companions(folder)
    if (tokenizer := _tokenizer(folder)) is not None:
        check_ids(tokenizer, config, name)
    model = load_model(folder, RiGPTForCausalLM) if decoded is None else decoded.load(None)
    plan = plan_for_llama_cpp(model, name, frame, even=decoded is None)
    if decoded is not None and frame == "auto" and not keeps_codes(plan):
        plan = plan_for_llama_cpp(model, name, "stream", even=False)
    whole = {torch.float64: "float32"}.get(model.dtype, str(model.dtype).removeprefix("torch."))
    stored = dtype or (whole if decoded is None else CODES)
    if stored != CODES:
        _say_what_untying_costs(config.tie_word_embeddings, plan, stored)
    file = f"{output.resolve().name}-{GGUF_DTYPES.get(stored, 'codes')}.gguf"
    in_digits = torch.float32 if stored in (*ROUNDED, CODES) else getattr(torch, stored)
    read_back = ARCHITECTURES[plan.config.model_type].read_back
    reference = Reference(
        lambda: model,
        random_input_ids(config.vocab_size, config.max_position_embeddings, seed=seed),
        seed,
        f"{name} ({type(model).__name__})",
        str(output / file),
    )

    def in_memory() -> Any:
        tensors = {entry.name: entry.make(in_digits) for entry in plan.entries}
        return assemble(plan.model_class, plan.config, tensors, in_digits, model, "sdpa")

    with new_folder(output, seen) as temporary:
        before = reference.record(lambda: model, hashed=False)
        bar = "Writing" if progress else None
        inexact = write_gguf(plan, temporary / file, stored, tokenizer, Path(name).name, bar)
        is_same = read_back and not inexact
        what = (
            "read back by Transformers" if is_same else "before its weights were rounded" if read_back else "in memory"
        )
        reference = replace(reference, target=f"{reference.target} ({plan.model_class.__name__}, {what})")
        if inexact and stored == CODES:
            logger.warning(f"{name_some(inexact)}: numbers that are no codes in groups of {BLOCK} were rounded.")
        after = reference.record(
            (lambda: read_gguf(temporary / file, plan, in_digits)) if is_same else in_memory, hashed=True
        )
        certificate = _compared(before, after, reference, config).check()
        (temporary / CERTIFICATE_NAME).write_text(certificate.to_json(), encoding="utf-8")
        if read_back and not is_same:
            rounded = reference.record(lambda: read_gguf(temporary / file, plan, in_digits), hashed=False)
            change = _compared(before, rounded, reference, config)
            logger.warning(
                f"Rounded to {'q8_0' if stored == CODES else stored} the logits change by "
                f"{change.relative_logit_error:.1%} of the largest: at most {change.max_abs_logit_error:.3g} of "
                f"{change.max_abs_logit:.3g}, on random tokens. The certificate is of the model before that; what the "
                "rounding costs on a text, llama-perplexity measures."
            )
    return certificate


def _compared(before: LogitsSnapshot, after: LogitsSnapshot, reference: Reference, config: Any) -> Certificate:
    return compare(
        before,
        after,
        reference.input_ids,
        source=reference.source,
        target=reference.target,
        seed=reference.seed,
        names=("source", "output_dir"),
        positions=config.max_position_embeddings,
    )


def plan_for_llama_cpp(model: RiGPTForCausalLM, source: str, frame: str = "auto", even: bool = True) -> ExportPlan:
    """
    The stock model that llama.cpp runs in the place of a RiGPT.

    Args:
        model (`RiGPTForCausalLM`), frame (`str`), even (`bool`): as for [`plan_export`].
        source (`str`): what error messages call the model.

    Raises:
        ValueError: if llama.cpp has none; the message says of the nearest why they are not.
    """
    reasons: dict[str, list[str]] = {}
    known = {target.model_class.config_class.model_type: name for name, target in TARGETS.items()}
    for name in (known[kind] for kind in ARCHITECTURES if kind in known):
        reasons[name] = refused_options(model.config, model.state_dict(), TARGETS[name])
        if not reasons[name]:
            try:
                plan = plan_export(model, name, frame, even)
                check_known(plan.config)
                return plan
            except ValueError as error:
                reasons[name] = [fault(error)]
    advice = "Keep it as RiGPT" if untraced(model.config) else "Export it with `--to onnx`, or keep it as RiGPT"
    raise ValueError(
        f"`source` must be a model that llama.cpp can run, got {source!r}, which is none: {nearest(reasons)}. "
        f"{advice}."
    )


def _tokenizer(folder: Path) -> Any:
    """The tokenizer of a model's folder, or `None` if there is none."""
    if any((folder / name).is_file() for name in VOCABULARY_FILES):
        return load_tokenizer(folder)
    logger.warning(f"{folder} has no tokenizer: programs can give this file ids of tokens alone.")
    return None


def _say_what_untying_costs(is_tied: bool, plan: ExportPlan, stored: str) -> None:
    if is_tied and not (plan.config.tie_word_embeddings and ARCHITECTURES[plan.config.model_type].tied):
        shape = (plan.config.vocab_size, plan.config.hidden_size)
        numbers = prod(shape)
        logger.warning(
            f"The head is a table of its own in this file, where the source has one table for both: {numbers:,} "
            f"numbers more, {nbytes_of(numbers, kind_of(HEAD, shape, stored)):,} bytes."
        )
