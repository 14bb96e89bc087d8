"""`export_onnx`: a RiGPT on disk becomes a graph for ONNX Runtime, with its cache, by Transformers' own exporter."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from ..checkpoints.certificate import CERTIFICATE_NAME, Certificate, compare
from ..checkpoints.companions import check_companions, save_generation_config, save_tokenizer
from ..checkpoints.folder import check_output, new_folder
from ..checkpoints.logits import LogitsSnapshot, random_input_ids, record_logits
from ..checkpoints.named import check_rigpt
from ..checkpoints.read import load_config, load_model, local_folder, silent
from ..checkpoints.source import in_short
from ..extras import require
from ..modeling_rigpt import RiGPTForCausalLM
from ..terminal import notices_after


CONVERSION = __name__.rpartition(".")[0]
# What ONNX Runtime computes in on a CPU, where a result is certified: bfloat16 it does not, float64 not rightly.
DTYPES = (torch.float32, torch.float16)
# Sizes at which a graph is traced: none is the same as another, so none is taken for another.
BATCH, SEEN, LENGTH = 2, 5, 3


# Options whose graph the exporter does not take, or ONNX Runtime does not run, and why.
UNTRACED = {
    "sliding_window": "its graph gets a mask for each type of layer, which the exporter does not take",
    "num_experts": "which experts run is decided by numbers, and ONNX Runtime does not run the graph of that",
}


def untraced(config: Any) -> dict[str, str]:
    """Those of `UNTRACED` that a RiGPT with this configuration has in use."""
    return {option: reason for option, reason in UNTRACED.items() if getattr(config, option) is not None}


@notices_after(CONVERSION)
def export_onnx(
    source: str | Path,
    output_dir: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
    seed: int = 0,
) -> Certificate:
    """
    Export a RiGPT on disk or on the Hub, as it is, to a folder with an ONNX graph, and certify it by ONNX Runtime.

    The graph takes `input_ids` and `position_ids` `[B, S]`, `attention_mask` `[B, P + S]` with zeros for padding, and
    keys and values `[B, K, P, h]` of every layer, with `P = 0` at the beginning. It gives `logits` `[B, S, V]` and the
    longer keys and values. `ExportedModel.from_pretrained` of `transformers.exporters` runs it with a `DynamicCache`.
    The certificate compares what it gives in three steps through the cache with what the source gives at once.

    Args:
        source (`str` or `Path`): a folder, or the id of a repository; `revision` (`str`, *optional*) of the latter.
        output_dir (`str` or `Path`): the folder to make; it appears complete or not at all.
        dtype (`torch.dtype`, *optional*):
            Of the weights and the arithmetic, float32 or float16. The source's if not given, or float32.
        force (`bool`, defaults to `False`): replace an earlier result in `output_dir`, once the new one is complete.
        seed (`int`, defaults to 0): for the certificate's random inputs.

    Raises:
        CertificateError: if the result differs from the source by more than rounding.
        MissingPackage: if a package of the extra `onnx` is not installed.
        ValueError: if the source cannot be traced, or ONNX Runtime cannot run the result.
    """
    require("onnx")
    if dtype not in (None, *DTYPES):
        given, *known = (str(one).removeprefix("torch.") for one in (dtype, *DTYPES))
        raise ValueError(
            f"`dtype` must be one of {', '.join(known)} for ONNX Runtime, got {given!r}. Take one of these."
        )
    output, name = Path(output_dir), str(source)
    seen = check_output(output, name, force)
    folder = local_folder(name, revision)
    config = check_rigpt(load_config(folder), name)
    if config.depth_solver is not None:
        raise ValueError(
            f"`source` must be a network of layers to be traced, got {name!r} with `depth_solver="
            f"{config.depth_solver!r}`: torchdiffeq looks at numbers as it goes. Set it to null in `config.json` of "
            "a copy where it is 'euler' with `depth_steps=1`, which is the same network."
        )
    for option, reason in untraced(config).items():
        raise ValueError(
            f"`source` must be a network that the exporter can trace, got {name!r} with "
            f"`{option}={getattr(config, option)}`: {reason}. Export it to a stock class (`--to auto`)."
        )
    check_companions(folder)
    model = load_model(folder, RiGPTForCausalLM)
    input_ids = random_input_ids(config.vocab_size, config.max_position_embeddings, seed=seed)
    before = record_logits(model, input_ids, hashed=False)
    model = model.to(dtype or (model.dtype if model.dtype in DTYPES else torch.float32)).eval()
    with new_folder(output, seen) as temporary:
        with _one_line(name):
            trace(model).save_pretrained(temporary)
            after = LogitsSnapshot(run_in_steps(temporary, model, input_ids), model.dtype)
        certificate = compare(
            before,
            after,
            input_ids,
            source=f"{name} ({type(model).__name__})",
            target=f"{output} (by ONNX Runtime, through its cache)",
            seed=seed,
            names=("source", "output_dir"),
            positions=config.max_position_embeddings,
        ).check()
        save_generation_config(folder, temporary, config)
        save_tokenizer(folder, temporary)
        (temporary / CERTIFICATE_NAME).write_text(certificate.to_json(), encoding="utf-8")
    return certificate


@torch.no_grad()
def trace(model: RiGPTForCausalLM) -> Any:
    """The `ExportedModel` of a RiGPT, for any number of rows and tokens, with and without a past."""
    from transformers.exporters import OnnxConfig, OnnxExporter

    ids = torch.arange(BATCH * (SEEN + LENGTH)).reshape(BATCH, -1) % model.config.vocab_size
    cache = DynamicCache(config=model.config)
    model(ids[:, :SEEN], past_key_values=cache, use_cache=True)
    positions = torch.arange(SEEN, SEEN + LENGTH).expand(BATCH, -1).contiguous()
    inputs = {
        "input_ids": ids[:, SEEN:],
        "attention_mask": torch.ones_like(ids),
        "position_ids": positions,
        "past_key_values": cache,
    }
    free = torch.export.Dim.AUTO
    shapes: dict[str, Any] = {name: {0: free, 1: free} for name in inputs}
    shapes["past_key_values"] = [{0: free, 2: free}] * (2 * model.config.num_hidden_layers)
    with _quiet():
        return OnnxExporter().export(model, inputs, config=OnnxConfig(dynamic=True, dynamic_shapes=shapes))


@torch.no_grad()
def run_in_steps(folder: Path, model: RiGPTForCausalLM, input_ids: torch.Tensor) -> torch.Tensor:
    """ONNX Runtime's logits `[B, T, V]` for token ids `[B, T]`: the half of them at once, then one, then the rest."""
    from transformers.exporters import ExportedModel

    with _quiet():
        graph = ExportedModel.from_pretrained(folder, device="cpu")
    config, (batch, length) = model.config, input_ids.shape
    nothing = torch.zeros(batch, config.num_key_value_heads, 0, config.head_dim, dtype=model.dtype)
    cache, logits, first = DynamicCache([(nothing, nothing)] * config.num_hidden_layers), [], 0
    for ids in input_ids.split([half := length // 2, min(1, length - half), max(0, length - half - 1)], dim=1):
        if ids.shape[1]:
            last = first + ids.shape[1]
            given = {
                "attention_mask": torch.ones(batch, last, dtype=torch.long),
                "position_ids": torch.arange(first, last).expand(batch, -1).contiguous(),
            }
            outputs = graph(input_ids=ids.contiguous(), past_key_values=cache, **given)
            logits.append(outputs.logits)
            cache, first = outputs.past_key_values, last
    return torch.cat(logits, dim=1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters say of each other's versions and of their progress."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with silent(), warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)


@contextmanager
def _one_line(source: str) -> Iterator[None]:
    """Turns what a tracer or ONNX Runtime says into one line of ours."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise ValueError(
            f"`source` must be a model that torch.export can trace and ONNX Runtime can run, got {source!r}: "
            f"{in_short(error)}. Try an export to a stock class."
        ) from error
