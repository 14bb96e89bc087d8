"""Results of a run besides checkpoints: a log of metrics, curves, and the model itself."""

import copy
import errno
import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from rigpt_hf.checkpoints.folder import DiskFullError, Seen, check_file, check_output, new_file, new_folder, write_text
from rigpt_hf.checkpoints.read import quiet_loading
from rigpt_hf.checkpoints.weights import check_made
from rigpt_hf.checkpoints.written import file_sha256, json_sha256, look, parse_json
from rigpt_hf.pictures.style import encoded
from rigpt_hf.pictures.training import plot_losses

from .options import PretrainOptions
from .shards import SLOWER, StoredShards


# The record of a run, its log, and what the record in a model's folder calls the hash of the weights.
OWNER, LOG, CURVES = "run.json", "metrics.jsonl", "loss.png"
# What the record of a final model binds it to: its weights, its log, and itself.
WEIGHTS, LOG_SHA256, SHA256 = "weights_sha256", "log_sha256", "sha256"


@dataclass
class RunReport:
    """
    The results of a run.

    Args:
        steps (`int`): done in all; started (`int`): the step at which this call began.
        losses (`list[float]`): of training, nats per token, one per step of this call.
        validation (`list[tuple[int, float]]`): step and loss.
        model_folder (`Path`, *optional*): the final model; `None` if the run was interrupted.
        symmetry_distance (`float`, *optional*): of the weights from the symmetry that they keep, when last measured.
    """

    steps: int
    started: int
    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    model_folder: Path | None = None
    symmetry_distance: float | None = None


def in_words(options: PretrainOptions, parameters: int, tokens: int, done: int) -> str:
    """Two lines on a run that begins after `done` steps: what is trained on what, for how long, and where to."""
    start = "random weights" if options.init_from is None else options.init_from
    data = options.data_dir if options.data is None else f"{options.data}, in {options.data_dir}"
    after = f", going on after step {done}" if done else ""
    return (
        f"A {options.model_kind} of {parameters:,} parameters, from {start}, on {tokens:,} tokens of {data}\n"
        f"{options.max_steps} steps of {options.global_batch_size} windows of {options.context_length} tokens{after}; "
        f"written to {options.output_dir}"
    )


class Records:
    """
    The log of a run, one JSON object per line, by step; what appears in its place meanwhile is left.

    Args:
        path (`Path`): of the file; only the main process writes.
    """

    def __init__(self, path: Path):
        self.path = path
        self.look()

    def look(self) -> None:
        """Take what is there for the log of this run."""
        self.seen = look(self.path)

    def append(self, entry: dict[str, Any]) -> None:
        """One more line; a `ValueError` if the disk does not take it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # By the size alone: time changes on a touch, and on some file systems later than the file is closed.
            if (self.seen or [-1])[0] != (look(self.path) or [-1])[0]:
                raise FileExistsError(errno.EEXIST, "it has appeared or changed while this runs, and was left")
            line = json.dumps(entry).encode() + b"\n"
            with self.path.open("ab" if self.seen else "xb") as file:
                file.write(line)
                file.flush()
                # The size that it must have: what was added by others meanwhile is not this run's.
                self.seen = [(self.seen or [0])[0] + len(line), os.fstat(file.fileno()).st_mtime_ns]
        except OSError as error:
            raise ValueError(
                f"`output_dir` must take the log, got {str(self.path)!r}: {error.strerror}. The checkpoints are "
                "untouched. Correct that (a full disk: free space) and call the same command again."
            ) from error

    def read(self) -> list[dict[str, Any]]:
        """All entries; a last line that a kill has cut is left out."""
        entries = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []:
            try:
                entries.append(parse_json(line))
            except ValueError:
                break
        return entries

    def cut(self, step: int) -> None:
        """Drop what came after `step`: it will be done again."""
        if self.seen is None:
            return
        kept = [entry for entry in self.read() if entry["step"] <= step]
        text = "".join(json.dumps(entry) + "\n" for entry in kept)
        self.seen = write_text(self.path, text, "output_dir", seen=self.seen)


def weights_digest(folder: Path) -> str:
    """SHA-256 of the files of weights in a folder, by name."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode() + bytes.fromhex(file_sha256(path)))
    return digest.hexdigest()


def bound(facts: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The record of a run with hashes of the weights and the log that are in a folder, and of itself."""
    record = facts | {WEIGHTS: weights_digest(folder), LOG_SHA256: file_sha256(folder / LOG)}
    return record | {SHA256: json_sha256(record)}


def check_results(folder: Path) -> tuple[Seen, list[int] | None]:
    """
    The stamps of an earlier final model and of earlier curves in the folder of a run, which alone are replaced.

    Raises:
        ValueError: if something else is in their place, or they were changed.
    """
    seen = check_output(folder / "model", None, force=True)
    return seen, check_file(folder / CURVES, "output_dir", force=True)


def write_model(
    model: nn.Module,
    weights: dict[str, torch.Tensor] | StoredShards,
    tokenizer: Any,
    folder: Path,
    seen: Seen,
    facts: dict[str, Any] | None = None,
    log: Path | None = None,
) -> None:
    """
    A folder that `AutoModelForCausalLM` loads; it appears complete, in the place of an earlier one.

    Args:
        model: Gives configuration and code; may be sharded.
        weights: Its state dict, gathered; or where it lies, to be written one file after the other.
        tokenizer: Saved with it if not `None`.
        folder: Where to.
        seen: What is there, as it was looked at before the work began.
        facts, log: Record and log of the run, which go with it, bound to these weights.

    Raises:
        OSError: if it cannot be written, as on a full disk.
        ValueError: if the weights are not finite.
    """
    if not isinstance(weights, StoredShards):
        check_made(weights, "learning_rate", SLOWER)
    with quiet_loading(), torch.device("meta"):
        shell: Any = type(model)(copy.deepcopy(model.config))
    try:
        with new_folder(folder, seen) as temporary, quiet_loading():
            if isinstance(weights, StoredShards):
                weights.write(shell, temporary)
            else:
                shell.save_pretrained(temporary, state_dict=weights, max_shard_size="1000GB")
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
            if facts is not None and log is not None:
                shutil.copyfile(log, temporary / LOG)
                text = json.dumps(bound(facts, temporary), indent=2) + "\n"
                (temporary / OWNER).write_text(text, encoding="utf-8")
    except Exception as error:
        # Of a failed write safetensors has an error of its own, and tokenizers raises the bare class.
        if isinstance(error, SafetensorError) or type(error) is Exception:
            raise OSError(str(error)) from error
        raise


def write_results(
    model: nn.Module,
    weights: dict[str, torch.Tensor] | StoredShards,
    tokenizer: Any,
    log: Path,
    facts: dict[str, Any],
    seen: tuple[Seen, list[int] | None],
) -> None:
    """
    The final model and the curves of a run, beside its log; arguments as of `write_model` and `check_results`.

    Raises:
        ValueError: if they cannot be written, as on a full disk.
    """
    try:
        write_model(model, weights, tokenizer, log.parent / "model", seen[0], facts, log)
        with new_file(log.parent / CURVES, "output_dir", seen[1], named=True) as place:
            place.write_bytes(encoded(plot_losses({log.parent.name: Records(log).read()})))
    except OSError as error:
        cause: Any = error.__cause__ if isinstance(error, DiskFullError) else error
        reason = getattr(cause, "strerror", None) or " ".join(str(cause).split())
        raise ValueError(
            f"`output_dir` must take the final model and the curves, got {str(log.parent)!r}: "
            f"{reason}. The checkpoints are untouched. Correct that (a full disk: free space) "
            "and call the same command again."
        ) from error
