"""`convert_checkpoint`: a stock checkpoint on disk or on the Hub becomes a RiGPT folder, tensor by tensor."""

import gc
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from ..configuration_rigpt import RiGPTConfig
from ..modeling_rigpt import RiGPTForCausalLM
from .assemble import load_gguf, quiet_loading
from .certificate import Certificate, Observation, compare, observe, random_input_ids
from .companions import TEMPLATE_FILES, TOKENIZER_FILES, save_config, save_generation_config, save_tokenizer
from .export import export_model
from .families import architecture_of
from .output import check_output, publish, temporary_sibling
from .plan import Plan, make_plan
from .shards import Shard, split_into_shards, write_index, write_shard
from .sources import SafetensorsSource, StateDictSource, WeightSource
from .workers import SingleWorker, Workers, together


DOWNLOADED = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json")


def convert_checkpoint(
    source: str | Path,
    output_dir: str | Path,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    dtype: torch.dtype | None = None,
    dropout: str = "vector",
    force: bool = False,
    max_shard_size: int | str | None = None,
    input_ids: torch.Tensor | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = True,
    workers: Workers | None = None,
) -> Certificate:
    """
    Convert a checkpoint into a folder that `AutoModelForCausalLM` loads, with a certificate that it is the same
    function.

    Weights are read, folded in float64 and written one tensor at a time. For the certificate the source is loaded and
    freed before the result is: never are both in memory, and the peak stays below the larger checkpoint's size plus
    1 GB. The folder appears under its name only when it is complete and certified; on any error nothing is left.

    Args:
        source (`str` or `Path`):
            A local folder with safetensors (one file, or shards and their index), or the id of a repository on the
            Hub.
        output_dir (`str` or `Path`):
            The folder to make.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        gguf_file (`str`, *optional*):
            Name of a GGUF file in the folder `source`, which the library decodes as a whole: twice the size of the
            decoded weights is then needed.
        dtype (`torch.dtype`, *optional*):
            Of the result; the source's if not given.
        dropout (`str`, defaults to `"vector"`):
            What becomes of coordinate-wise dropout, see [`convert_model`].
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
    workers = workers or SingleWorker()
    output = Path(output_dir)
    job = _Job(str(source), output, device=device, dtype=dtype, dropout=dropout, input_ids=input_ids, seed=seed)
    together(workers, lambda: check_output(output, str(source), force))
    together(workers, lambda: job.open(revision, gguf_file))
    shards = split_into_shards(job.plan.entries, job.dtype, max_shard_size, workers.count)
    temporary = workers.gather(temporary_sibling(output))[0]
    is_main = workers.index == 0
    try:
        together(workers, lambda: temporary.mkdir(parents=True) if is_main else None)
        together(workers, lambda: job.write(shards, temporary, workers, progress))
        certificate = together(workers, lambda: job.finish(shards, temporary) if is_main else None)
        together(workers, lambda: publish(temporary, output) if is_main else None)
    except BaseException:
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return workers.gather(certificate)[0]


class _Job:
    """One conversion: what is read, what is made, and what was seen of the source."""

    plan: Plan
    dtype: torch.dtype
    folder: Path

    def __init__(self, name: str, output: Path, *, device: str, dtype, dropout: str, input_ids, seed: int):
        self.name, self.output, self.device, self.dropout = name, output, device, dropout
        self.requested_dtype, self.input_ids, self.seed = dtype, input_ids, seed
        self.was_given = input_ids is not None
        self.gguf_file: str | None = None
        self.observation: Observation | None = None

    def open(self, revision: str | None, gguf_file: str | None) -> None:
        """Find the source, read its configuration and match its keys; no weights yet unless they are in a GGUF."""
        self.folder = local_folder(self.name, revision)
        self.gguf_file = gguf_file
        weights: WeightSource
        if gguf_file is None:
            config = AutoConfig.from_pretrained(self.folder)
            architecture = architecture_of(config)
            weights = SafetensorsSource(self.folder, self.device)
        else:
            if not (self.folder / gguf_file).is_file():
                raise ValueError(f"`gguf_file` must be a file in {str(self.folder)!r}, got {gguf_file!r}.")
            dtype = self.requested_dtype or torch.float32
            model = load_gguf(self.folder, gguf_file, dtype)
            config = model.config
            architecture = architecture_of(config)
            self._observe_source(model.to(self.device))
            weights = StateDictSource(model.state_dict())
        self.plan = make_plan(architecture, config, weights, self.dropout, self.device)
        self.dtype = self.requested_dtype or self.plan.source_dtype
        self.class_name = architecture.class_name

    def _observe_source(self, model: Any) -> None:
        if self.input_ids is None:
            config = model.config
            self.input_ids = random_input_ids(config.vocab_size, config.max_position_embeddings, seed=self.seed)
        self.observation = observe(model, self.input_ids, hashed=False)

    def write(self, shards: list[Shard], folder: Path, workers: Workers, progress: bool) -> None:
        """This process's share of the shards; the main process looks at the source first."""
        is_main = workers.index == 0
        if is_main and self.observation is None:
            with quiet_loading():
                model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=self._observed_dtype())
            self._observe_source(model.to(self.device))
            del model
            gc.collect()
        mine = shards[workers.index :: workers.count]
        total = sum(entry.nbytes(self.dtype) for shard in mine for entry in shard.entries)
        show = progress and is_main
        with tqdm(total=total, unit="B", unit_scale=True, desc="Converting") if show else nullcontext() as bar:
            for shard in mine:
                write_shard(shard, folder, self.dtype, (lambda n: None) if bar is None else bar.update)

    def _observed_dtype(self) -> torch.dtype:
        """The finer of source and result, where one is: a cast to fewer digits is part of what is certified."""
        finer = torch.promote_types(self.plan.source_dtype, self.dtype)
        return finer if finer in (self.plan.source_dtype, self.dtype) else self.plan.source_dtype

    def finish(self, shards: list[Shard], folder: Path) -> Certificate:
        """Everything beside the weights, and the certificate, for which the result is loaded as any user would."""
        write_index(shards, folder, self.dtype)
        save_config(self.plan.config, folder, self.dtype)
        save_generation_config(self.folder, folder, self.plan.config)
        save_tokenizer(self.folder, folder, **({"gguf_file": self.gguf_file} if self.gguf_file else {}))
        with quiet_loading():
            model = RiGPTForCausalLM.from_pretrained(folder, dtype=self.dtype).to(self.device)
        assert self.observation is not None and self.input_ids is not None
        certificate = compare(
            self.observation,
            observe(model, self.input_ids),
            self.input_ids,
            source=f"{self.name} ({self.class_name})",
            target=f"{self.output} ({type(model).__name__})",
            seed=None if self.was_given else self.seed,
        ).check()
        certificate.save(folder)
        return certificate


def export_checkpoint(
    source: str | Path,
    output_dir: str | Path,
    *,
    revision: str | None = None,
    target: str = "gpt2",
    frame: str = "auto",
    dtype: torch.dtype | None = None,
    force: bool = False,
    seed: int = 0,
) -> Certificate:
    """
    Export a RiGPT on disk or on the Hub to a folder of an unmodified stock model, with a certificate. Both models are
    in memory at once.

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
    output = Path(output_dir)
    check_output(output, str(source), force)
    folder = local_folder(str(source), revision)
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != RiGPTConfig.model_type:
        raise ValueError(f"`source` must be a RiGPT, got {str(source)!r} with `model_type={config.model_type!r}`.")
    with quiet_loading():
        model = RiGPTForCausalLM.from_pretrained(folder)
    stock = export_model(model, target, frame=frame, dtype=dtype)
    ids = random_input_ids(config.vocab_size, config.max_position_embeddings, seed=seed)
    certificate = compare(
        observe(model, ids, hashed=False),
        observe(stock, ids),
        ids,
        source=f"{source} ({type(model).__name__})",
        target=f"{output} ({type(stock).__name__})",
        seed=seed,
    ).check()
    temporary = temporary_sibling(output)
    temporary.mkdir(parents=True)
    try:
        with quiet_loading():
            stock.save_pretrained(temporary)
        save_tokenizer(folder, temporary)
        certificate.save(temporary)
        publish(temporary, output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return certificate


def local_folder(source: str, revision: str | None = None) -> Path:
    """
    The folder of a source: itself if it is local, else downloaded from the Hub, only the files that are used.

    Raises:
        ValueError: if there is neither such a folder nor such a repository, or `revision` is given with a folder.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise ValueError(f"`revision` names a version on the Hub, got {revision!r} with the folder {source!r}.")
        return Path(source)
    if source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise ValueError(f"`source` must be a folder or the id of a repository, got {source!r}: no such folder.")
    patterns = [*DOWNLOADED, *TOKENIZER_FILES, *TEMPLATE_FILES]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`source` must be a folder or the id of a repository on the Hub, got {source!r}. There is no such "
            f"folder, and the Hub gave: {str(error).strip().splitlines()[0]}"
        ) from error
