"""A small stock GPT-2, trained here with `Trainer`."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)


@dataclass(frozen=True)
class Recipe:
    """
    Size of the demo's GPT-2 and of its training; the defaults take about two minutes on two cores.

    `gain_spread` is the standard deviation of the logarithm of the norms' initial gains. Long training spreads gains,
    in some layers that far; two minutes would leave them all near 1, where LayerNorm has hardly a basis to prefer.
    """

    vocabulary: int = 4096
    context: int = 128
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    batch: int = 8
    steps: int = 600
    learning_rate: float = 4e-3
    gain_spread: float = 1.0


class Windows(Dataset):
    """Consecutive windows of one long row of tokens."""

    def __init__(self, tokens: torch.Tensor, length: int):
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.tokens[index * self.length : (index + 1) * self.length]
        return {"input_ids": window, "labels": window}


class LossCurve(TrainerCallback):
    """Keeps (step, loss) of everything that `Trainer` logs, and tells of every step."""

    def __init__(self, tick: Callable[[float | None], None]):
        self.points: list[tuple[int, float]] = []
        self.tick = tick

    def on_step_end(self, args, state, control, **kwargs):
        self.tick(self.points[-1][1] if self.points else None)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.points.append((state.global_step, float(logs["loss"])))


def train_gpt2(
    tokens: torch.Tensor,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    seed: int,
    tick: Callable[[float | None], None] = lambda loss: None,
) -> tuple[GPT2LMHeadModel, list[tuple[int, float]]]:
    """
    The trained model in evaluation mode, and its loss in nats per token as (step, loss).

    `tick` is called after every step with the latest loss that is known.
    """
    set_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=recipe.context,
        n_embd=recipe.hidden_size,
        n_layer=recipe.layers,
        n_head=recipe.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    model, curve = GPT2LMHeadModel(config), LossCurve(tick)
    spread_gains_(model, recipe.gain_spread)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=recipe.steps,
            per_device_train_batch_size=recipe.batch,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, recipe.steps // 10),
            weight_decay=0.1,
            adam_beta2=0.95,
            logging_steps=max(1, recipe.steps // 30),
            logging_strategy="steps",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=seed,
        )
        trainer = Trainer(model, arguments, train_dataset=Windows(tokens, recipe.context), callbacks=[curve])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.config.use_cache = True  # Trainer switches it off, and it would be saved that way
    return model.eval(), curve.points


@torch.no_grad()
def spread_gains_(model: GPT2LMHeadModel, spread: float):
    """Draw the gains of all norms from a log-normal law, in place; the randomness is the global generator's."""
    for name, parameter in model.named_parameters():
        if ".ln_" in name and name.endswith("weight"):
            parameter.copy_((spread * torch.randn_like(parameter)).exp())
