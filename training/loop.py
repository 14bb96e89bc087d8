"""A pretraining run: steps, checkpoints, and going on from one as if nothing had happened."""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import nn
from tqdm.auto import tqdm
from transformers import set_seed
from transformers.utils import logging

from rigpt_hf.checkpoints.read import load_tokenizer
from rigpt_hf.checkpoints.workers import together
from rigpt_hf.checkpoints.written import look
from rigpt_hf.symmetry.tokens import SymmetricTraining
from rigpt_hf.symmetry.tokens.training import representation_of
from rigpt_hf.terminal import say

from .averaging import WeightAverage
from .build import build_model, build_optimizer, check_run, ensure_data, open_windows, recompute_activations_
from .checkpoints import CheckpointStore, restoring
from .data import TokenShards
from .diagnostics import (
    flops_per_token,
    in_parts,
    invariance_error,
    peak_flops,
    stream_kurtosis,
    summed_loss,
    update_norm,
)
from .facts import check_facts
from .folder import Lock, StopRequests, check_owner, check_place, claim
from .options import PretrainOptions
from .records import LOG, OWNER, Records, RunReport, check_results, in_words, write_results
from .saving import Background, GroupWorkers, TrainingState, stored_weights
from .schedule import make_schedule
from .sharding import (
    answering,
    check_processes,
    gather_weights,
    local_gradients,
    shard,
)
from .symmetry import absent_in_words, read_symmetry


logger = logging.get_logger(__name__)
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Tokens of the data that are looked through for those of a symmetry.
LOOKED_AT = 2**22
# Facts of a checkpoint besides the options; they change from one to the next.
PROGRESS = ("world", "best_validation", "windows", "averaged")


class PretrainingRun:
    """
    A run in a folder, on this process and its peers.

    Args:
        options (`PretrainOptions`): all options.
        progress (`bool`): whether the main process shows a bar.

    Raises:
        ValueError: if options do not fit each other, the data, the number of processes, or the checkpoint there is.
    """

    def __init__(self, options: PretrainOptions, progress: bool = True):
        self.options, self.progress = options, progress
        self.output = Path(options.output_dir)
        check_run(options)
        check_place(self.output)
        if options.deterministic:
            torch.use_deterministic_algorithms(True)
        timeout = None if options.ddp_timeout is None else timedelta(seconds=options.ddp_timeout)
        self.accelerator = Accelerator(
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
            mixed_precision="no" if options.fsdp else options.mixed_precision,
            cpu=not torch.cuda.is_available(),
            log_with=options.report_to or None,
            project_dir=options.output_dir,
        )
        self.workers = GroupWorkers(timeout)
        self.rank, self.world = self.workers.index, self.workers.count
        self.device = self.accelerator.device
        check_processes(options, self.world)
        # Windows of every batch that are this process's, and how many of them go through the model at once.
        self.own = options.global_batch_size // self.world
        self.rows = options.per_device_train_batch_size or self.own
        self._open_data()
        limits = options.save_total_limit, options.save_best_limit
        self.store = CheckpointStore(self.output / "checkpoints", *limits, self.workers)
        self.saving = Background(options.async_save)
        self.records = Records(self.output / LOG)
        self._build()
        self.step = 0
        self.best_validation: float | None = None
        self.skipped = 0
        self.requests = StopRequests()
        # All processes have agreed on this; a request is only one's own.
        self.stopping = False

    def _open_data(self) -> None:
        options = self.options
        with self.accelerator.main_process_first():
            folder = ensure_data(options, self.progress and self.accelerator.is_main_process)
        self.tokenizer = load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None
        train, held_out = TokenShards(folder, "train"), TokenShards(folder, "validation")
        if options.verify_data:
            for shards in (train, held_out):
                self._on_main(partial(shards.verify, progress=False))
        self.manifest = train.manifest
        self.windows, validation = open_windows(options, train, held_out)
        self.validation = list(validation)

    def _build(self) -> None:
        options = self.options
        vocabulary, end = self.manifest.vocab_size, self.manifest.end_of_text
        model = build_model(options, vocabulary, options.context_length, end, options.seed)
        self.plain = model
        if options.gradient_checkpointing:
            recompute_activations_(model)
        self.kept = read_symmetry(options.symmetry, model.config, self.tokenizer, vocabulary, end)
        if self.kept is not None and self.accelerator.is_main_process:
            read = self.windows.shards.read(0, min(LOOKED_AT, len(self.windows.shards)))
            if (absent := absent_in_words(self.kept, read, self.tokenizer)) is not None:
                logger.warning(absent)
        representation = representation_of(model, self.kept, options.symmetry_kind)
        self.flops = flops_per_token(model, options.context_length)
        if options.fsdp:
            self.model = shard(model.to(self.device), options.mixed_precision)
        else:
            self.model = self.accelerator.prepare(model)
        self.optimizer = build_optimizer(options, self.model)
        self.symmetric = SymmetricTraining(self.model, representation, options.symmetry_project_weights)
        self.symmetric.begin_(self.optimizer)
        self.average = WeightAverage(self.model, self.optimizer, options.ema_decay)
        self.forward = torch.compile(self.model) if options.torch_compile else self.model
        self.scaler = getattr(self.accelerator, "scaler", None)
        self.state = TrainingState(
            *(model, self.model, self.optimizer, self.symmetric, self.average, self.scaler),
            *(options.optim, self.workers, options.fsdp),
        )
        self.schedule = make_schedule(options, options.max_steps)
        # Weights are the same on every process, dropout must not be.
        set_seed(options.seed + 1 + self.rank)

    def train(self) -> RunReport:
        """Train to the last step, from the newest checkpoint of the folder if there is one."""
        held = self._on_main(self._enter)
        try:
            with answering(self.store.folder):
                return self._train()
        finally:
            with suppress(Exception):  # another one is on its way, or it was told
                self.saving.wait()
            if held is not None:
                held.release()
            if self.world > 1:
                # Gloo's worker needs the interpreter's lock to drop its last tensors; whoever drops the model and with
                # it the process group holds that lock and waits for the worker. Asleep, this thread lets it go first.
                time.sleep(SETTLE)

    def _train(self) -> RunReport:
        options = self.options
        self._resume()
        report = RunReport(self.step, self.step)
        self._on_main(lambda: claim(self.output, self._facts(), self.owner))
        self._on_main(lambda: self.records.cut(self.step))
        if self.progress and self.rank == 0:
            say(in_words(self.options, self.plain.num_parameters(), self.manifest.splits["train"].tokens, self.step))
        if options.report_to:
            self.accelerator.init_trackers("pretrain")
        peak = peak_flops(self.device, PRECISIONS[options.mixed_precision]) * self.world
        total, hidden = options.max_steps, not self.progress or self.rank > 0
        with self.requests, tqdm(None, "Pretraining", total, initial=self.step, unit="step", disable=hidden) as bar:
            while self.step < options.max_steps and not self.stopping:
                began = time.perf_counter()
                entry = self._advance()
                report.losses.append(entry["loss"])
                seconds = time.perf_counter() - began
                entry["tokens_per_second"] = options.global_batch_size * options.context_length / seconds
                entry["mfu"] = entry["tokens_per_second"] * self.flops / peak
                done = self.step == options.max_steps
                diagnosed = "update_norm" in entry
                due = done or self.step % options.save_steps == 0
                # Only what was judged can be kept as the best.
                if done or self.step % options.eval_steps == 0 or (due and options.save_best_limit):
                    entry["validation_loss"] = self._validate()
                    report.validation.append((self.step, entry["validation_loss"]))
                    if self.best_validation is None or entry["validation_loss"] < self.best_validation:
                        self.best_validation = entry["validation_loss"]
                if diagnosed:
                    entry |= self._diagnose()
                    report.symmetry_distance = entry.get("symmetry_distance")
                self._log(entry, bar)
                if due or self.stopping:
                    self._save(entry.get("validation_loss"))
        self.saving.wait()
        report.steps = self.step
        if self.step == options.max_steps:
            report.model_folder = self._finish()
        self.accelerator.end_training()
        return report

    def _enter(self) -> Any:
        """Take the folder, for this run alone; the lock goes with the process, however it ends."""
        held = Lock(self.output)
        try:
            self.store.clean()
            self.owner = look(self.output / OWNER)
            self.records.look()
            check_owner(self.output, self._facts(), bool(self.store.checkpoints()), self.options.force)
            self.results = check_results(self.output)
        except BaseException:
            held.release()
            raise
        return held

    def _on_main(self, act: Callable[[], Any]) -> Any:
        """Act on the main process alone; if it fails, all processes fail, and none waits."""
        return together(self.workers, lambda: act() if self.rank == 0 else None)

    def _advance(self) -> dict[str, Any]:
        """One optimizer step; what the log says of it."""
        options = self.options
        batch = self.windows.batch(
            self.step, options.global_batch_size, self.rank, self.world, seed=options.seed, offset=self.skipped
        )
        # Losses are means over all tokens of the step, wherever they are: so neither the number of processes nor
        # accumulation shows in them.
        count = self._summed((batch["labels"][:, 1:] != -100).sum())
        total = torch.zeros((), dtype=torch.float64)
        parts = list(in_parts(self._placed(batch), self.rows))
        for part in parts:
            with local_gradients(self.accelerator, self.model, part is parts[-1]), self.accelerator.autocast():
                # The sum over processes is what DDP and FSDP make a mean of.
                loss = self.forward(**part, use_cache=False, num_items_in_batch=count.to(self.device)).loss
                (self.scaler.scale(loss * self.world) if self.scaler else loss * self.world).backward()
            total += loss.detach().double().cpu()
        requested = torch.tensor(float(self.requests.received or self.saving.failed), dtype=torch.float64)
        loss, stop = self._summed(torch.stack([total, requested])).tolist()
        self.stopping = stop > 0
        if not math.isfinite(loss):
            raise ValueError(
                f"The loss is {loss} in step {self.step + 1}. The checkpoints in {str(self.store.folder)!r} are "
                "untouched. Go on from one with a lower --learning-rate, or more --warmup-steps, and "
                "--allow-changes."
            )
        rate = options.learning_rate * self.schedule(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["multiplier"]
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        self.symmetric.project_gradients_()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), options.max_grad_norm or math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if not self.scaler and not math.isfinite(float(norm)):  # a scaler skips such steps and goes on
            raise ValueError(
                f"The norm of the gradient is {float(norm)} in step {self.step + 1}, which would spoil all weights. "
                f"The checkpoints in {str(self.store.folder)!r} are untouched. Go on from one with a lower "
                "--learning-rate and --allow-changes."
            )
        before = [parameter.detach().clone() for parameter in self.model.parameters()] if self._diagnosed else []
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.symmetric.end_step_()
        self.step += 1
        self.average.update(self.step)
        entry = {"step": self.step, "loss": loss, "lr": rate, "gradient_norm": float(norm)}
        return entry | ({"update_norm": update_norm(self.model, before)} if before else {})

    @property
    def _diagnosed(self) -> bool:
        """Whether the step that is about to be done is one to measure everything of."""
        every, step = self.options.diagnose_steps, self.step + 1
        return step == self.options.max_steps or bool(every and step % every == 0)

    def _summed(self, value: torch.Tensor) -> torch.Tensor:
        if self.world == 1:
            return value
        value = value.to(self.device)
        dist.all_reduce(value)
        return value.cpu()

    @torch.no_grad()
    def _validate(self) -> float:
        """The mean loss over the validation batches, which are divided among processes by rows."""
        parts = (
            part
            for batch in self.validation
            for part in in_parts(self._placed(batch, self.rank * self.own), self.rows)
        )
        with self.average.applied(), self.accelerator.autocast():
            totals = summed_loss(self.model, parts)
        loss, count = self._summed(totals).tolist()
        return loss / count

    def _diagnose(self) -> dict[str, Any]:
        """Kurtosis of every layer, the distance from a symmetry, and for an unsharded RiGPT the invariance error."""
        batch = self._placed(self.validation[0])
        with self.average.applied():
            found: dict[str, Any] = {"kurtosis": stream_kurtosis(self.model, batch, self.rows)}
            if self.kept is not None:
                found["symmetry_distance"] = self.symmetric.distance()
            if self.plain.config.model_type == "rigpt" and not self.options.fsdp:
                # Not in mixed precision: the error is that of the model, not of rounding.
                bare = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
                found["invariance_error"] = invariance_error(bare.eval(), batch)
                self.model.train()
        return found

    def _placed(self, batch: dict[str, torch.Tensor], start: int = 0) -> dict[str, torch.Tensor]:
        """As many rows as a process has, on the device."""
        return {key: value[start : start + self.own].to(self.device) for key, value in batch.items()}

    def _facts(self) -> dict[str, Any]:
        hashes = {name: [shard.sha256 for shard in split.shards] for name, split in self.manifest.splits.items()}
        symmetry = {} if self.kept is None else {"symmetry": self.kept.generators}
        return self.options.facts() | {"data_hashes": hashes} | symmetry

    def _save(self, metric: float | None) -> None:
        windows = self.skipped + self.step * self.options.global_batch_size
        facts = self._facts() | {"world": self.world, "best_validation": self.best_validation, "windows": windows}
        facts["averaged"] = self.average.decay is not None
        with self.state.taken(apart=self.options.async_save) as write:
            self.saving.start(partial(self.store.save, self.step, write, metric=metric, facts=facts))

    def _resume(self) -> None:
        self._on_main(lambda: self.store.latest(verify=True))
        checkpoint = self.store.latest()
        if checkpoint is None:
            return
        if checkpoint.step > self.options.max_steps:
            raise ValueError(
                f"`max_steps` must be at least the {checkpoint.step} steps that are done in {str(self.output)!r}, got "
                f"{self.options.max_steps}. Name another folder for a shorter run."
            )
        if not self.options.allow_changes:
            saved = {key: value for key, value in checkpoint.facts.items() if key not in PROGRESS}
            check_facts(saved, self._facts(), override="--allow-changes")
        self._order_buckets()
        with restoring(checkpoint):
            together(self.workers, lambda: self.state.restore_(checkpoint))
        self.step, self.best_validation = checkpoint.step, checkpoint.facts["best_validation"]
        self.skipped = checkpoint.facts["windows"] - self.step * self.options.global_batch_size

    def _order_buckets(self) -> None:
        """
        One backward pass for nothing: by the first one DDP orders its buckets, and with them the terms of sums over
        three processes and more, which must be those of a run that had not been interrupted.
        """
        if not isinstance(self.model, nn.parallel.DistributedDataParallel):
            return
        batch = self.windows.batch(0, self.options.global_batch_size, self.rank, self.world, seed=self.options.seed)
        part = next(iter(in_parts(self._placed(batch), self.rows)))
        with self.accelerator.autocast():
            self.forward(**part, use_cache=False).loss.backward()
        self.optimizer.zero_grad()

    def _log(self, entry: dict[str, Any], bar: tqdm) -> None:
        bar.update()
        validation = f", validation {entry['validation_loss']:.3f}" if "validation_loss" in entry else ""
        speed = f"{entry['tokens_per_second']:.0f} tokens/s, MFU {entry['mfu']:.0%}"
        bar.set_postfix_str(f"loss {entry['loss']:.3f}{validation}, {speed}")
        if len(entry) == SHORT and entry["step"] % self.options.logging_steps:
            return
        if self.accelerator.is_main_process:
            self.records.append(entry)
        scalars = {key: value for key, value in entry.items() if isinstance(value, float)}
        for index, value in enumerate(entry.get("kurtosis", [])):
            scalars[f"kurtosis/{index}"] = value
        self.accelerator.log(scalars, step=entry["step"])

    def _finish(self) -> Path:
        """Write the final model and the curves."""
        with self.average.applied():
            # Under FSDP2 the checkpoint of the last step has the same weights, and nobody must hold them all.
            weights = stored_weights(self.store.latest()) or gather_weights(self.model)
            facts, log = self._facts(), self.records.path
            self._on_main(lambda: write_results(self.plain, weights, self.tokenizer, log, facts, self.results))
        return self.output / "model"


# Seconds for the threads of the process group to come to rest.
SETTLE = 0.2
# Entries of a step at which nothing but the step itself was measured.
SHORT = 6
