"""`convert_checkpoint` and `export_checkpoint`: folders in, folders out, shard by shard."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.certificate import Certificate
from ..checkpoints.folder import Seen, check_output
from ..checkpoints.logits import longest_of, random_input_ids
from ..checkpoints.named import check_rigpt
from ..checkpoints.opened import OpenedModel, Stored, find_model
from ..checkpoints.read import check_sizes, load_config, load_model, local_folder
from ..checkpoints.workers import ALONE, Workers, together
from ..checkpoints.write import Reference, finer_dtype, write_checkpoint
from ..modeling_rigpt import RiGPTForCausalLM
from ..terminal import notices_after
from .export import plan_export
from .families import architecture_of
from .plan import Plan, make_plan


# Above the names of all loggers here, which speak once nothing is refused any more.
CONVERSION = __name__.rpartition(".")[0]


@notices_after(CONVERSION)
def convert_checkpoint(
    source: str | Path,
    output_dir: str | Path,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    dtype: torch.dtype | None = None,
    dropout: str = "vector",
    qk_gain: str = "vector",
    force: bool = False,
    max_shard_size: int | str | None = None,
    input_ids: torch.Tensor | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = True,
    workers: Workers = ALONE,
) -> Certificate:
    """
    Convert a checkpoint into a folder that `AutoModelForCausalLM` loads, with a certificate that it is the same
    function.

    Weights are read and folded in float64 one tensor at a time, and written shard by shard. For the certificate the
    source is loaded and freed before the result is: never are both in memory, and the peak stays below the larger
    checkpoint's size plus 1 GB. The folder appears under its name only when it is complete and certified; on any
    error nothing is left.

    Args:
        source (`str` or `Path`):
            A local folder with safetensors (one file, or shards and their index), the id of a repository on the
            Hub, or a file of GGUF, nanoGPT or llama2.c. The library decodes GGUF as a whole: twice the size of the
            weights in float32 is then needed.
        output_dir (`str` or `Path`):
            The folder to make.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        gguf_file (`str`, *optional*):
            Name of a GGUF file in the folder `source`.
        dtype (`torch.dtype`, *optional*):
            Of the result; the source's if not given.
        dropout (`str`, defaults to `"vector"`):
            What becomes of coordinate-wise dropout, see [`convert_model`].
        qk_gain (`str`, defaults to `"vector"`):
            What becomes of gains of queries and keys, see [`convert_model`].
        force (`bool`, defaults to `False`):
            Replace an earlier model in `output_dir`, once the new one is complete.
        max_shard_size (`int` or `str`, *optional*):
            Largest file, in bytes or as a text such as "5GB" (the default).
        input_ids (`torch.LongTensor` of shape `[batch, seq]`, *optional*):
            For the certificate; drawn at random from `seed` if not given.
        seed (`int`, defaults to 0):
            For the certificate's random inputs.
        device (`str`, defaults to `"cpu"`):
            Where the algebra and the certificate are computed.
        progress (`bool`, defaults to `True`):
            Show a progress bar.
        workers (`Workers`, *optional*):
            The processes to share the work with, see `training/convert.py`.

    Returns:
        `Certificate`, also written to `certificate.json` in the folder.

    Raises:
        CertificateError: if the result differs from the source by more than rounding.
        ValueError: if the source cannot be converted exactly or an argument is impossible; the message names which.
    """
    output, name = Path(output_dir), str(source)
    seen = together(workers, lambda: check_output(output, name, force) if workers.index == 0 else {})

    def prepare() -> tuple[Plan, Stored, torch.dtype, Reference]:
        stored = find_model(name, revision=revision, gguf_file=gguf_file)
        config = stored.config
        architecture = architecture_of(config)  # refuses a class before its weights are looked at
        weights = stored.weights(device)
        if not stored.is_whole:
            check_sizes(config, weights.shapes, "source", name)
        plan = make_plan(architecture, config, weights, dropout, device, qk_gain=qk_gain)
        written = dtype or plan.source_dtype
        drawn = random_input_ids(config.vocab_size, longest_of(config), seed=seed)
        return (
            plan,
            stored,
            written,
            Reference(
                lambda: stored.load(finer_dtype(plan.source_dtype, written)),
                drawn if input_ids is None else input_ids,
                seed if input_ids is None else None,
                f"{name} ({architecture.class_name})",
                f"{output} ({RiGPTForCausalLM.__name__})",
                device,
            ),
        )

    plan, stored, written, reference = together(workers, prepare)
    certificate = write_checkpoint(
        plan.entries,
        RiGPTForCausalLM,
        plan.config,
        stored.folder,
        output,
        seen,
        dtype=written,
        max_shard_size=max_shard_size,
        certify_against=reference,
        workers=workers,
        progress="Converting" if progress else None,
        **stored.tokenizer_options,
    )
    assert certificate is not None
    return certificate


@notices_after(CONVERSION)
def export_checkpoint(
    source: str | Path,
    output_dir: str | Path,
    *,
    revision: str | None = None,
    target: str | None = None,
    frame: str = "auto",
    dtype: torch.dtype | None = None,
    force: bool = False,
    seed: int = 0,
) -> Certificate:
    """
    Export a RiGPT on disk or on the Hub to a folder of an unmodified stock model, with a certificate. The source stays
    in memory beside the result.

    Args:
        source (`str` or `Path`): a folder, or the id of a repository; `revision` (`str`, *optional*) of the latter.
        output_dir (`str` or `Path`): the folder to make; it appears complete or not at all.
        target, frame, dtype: as for [`export_model`].
        force (`bool`, defaults to `False`): replace an earlier model in `output_dir`, once the new one is complete.
        seed (`int`, defaults to 0): for the certificate's random inputs.

    Raises:
        CertificateError: if the result differs from the source by more than rounding.
        ValueError: if the target cannot express the source, or an argument is impossible; the message names which.
    """
    output, name = Path(output_dir), str(source)
    seen = check_output(output, name, force)
    folder = local_folder(name, revision)
    check_rigpt(load_config(folder), name)
    model = load_model(folder, RiGPTForCausalLM)
    return _write_export(model, name, folder, output, seen, target=target, frame=frame, dtype=dtype, seed=seed)


@notices_after(CONVERSION)
def write_as_source(
    model: RiGPTForCausalLM,
    source: OpenedModel,
    output: Path,
    seen: Seen,
    *,
    name: str | None = None,
    frame: str = "auto",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    max_shard_size: int | str | None = None,
    beside: Callable[[Path], None] | None = None,
) -> Certificate:
    """
    Write a RiGPT as the stock class that the model it was made from has, with a certificate.

    Args:
        model (`RiGPTForCausalLM`): what is written; it stays in memory beside the result.
        source (`OpenedModel`): the model that it was made from.
        output, seen: the folder to make, and what [`check_output`] gave of it.
        name (`str`, *optional*): what the certificate calls `model`, which it compares the result with. If not given,
            the result must be the function of the source, and is compared with that.
        frame, dtype, seed, max_shard_size, beside: as for [`export_model`] and [`write_checkpoint`].

    Raises:
        CertificateError: if the result is another function.
        ValueError: if the source has no stock class, or that cannot express `model`.
    """
    check_has_class(source)
    stored, dtype = source.place, dtype or source.stored_dtype
    loaded = (lambda: model) if name else (lambda: stored.load(finer_dtype(source.stored_dtype, dtype)))
    return _write_export(
        model,
        name or source.name,
        stored.folder,
        output,
        seen,
        frame=frame,
        dtype=dtype,
        seed=seed,
        load=loaded,
        called=None if name else source.stock,
        max_shard_size=max_shard_size,
        beside=beside,
        **stored.tokenizer_options,
    )


def check_has_class(source: OpenedModel) -> None:
    """A `ValueError` if a model is a RiGPT on disk, so that there is no other class to go back to."""
    if source.stock is None:
        raise ValueError(
            f"`as_source` is for models of a stock class, got {source.name!r}, which is a RiGPT. Leave it out, and "
            "see `rigpt export` for the result."
        )


def _write_export(
    model: RiGPTForCausalLM,
    name: str,
    folder: Path,
    output: Path,
    seen: Seen,
    *,
    target: str | None = None,
    frame: str,
    dtype: torch.dtype | None,
    seed: int,
    load: Callable[[], Any] | None = None,
    called: str | None = None,
    **options: Any,
) -> Certificate:
    plan, config = plan_export(model, target, frame), model.config
    reference = Reference(
        load or (lambda: model),
        random_input_ids(config.vocab_size, config.max_position_embeddings, seed=seed),
        seed,
        f"{name} ({called or type(model).__name__})",
        f"{output} ({plan.model_class.__name__})",
    )
    certificate = write_checkpoint(
        plan.entries,
        plan.model_class,
        plan.config,
        folder,
        output,
        seen,
        dtype=dtype or model.dtype,
        certify_against=reference,
        **options,
    )
    assert certificate is not None
    return certificate
