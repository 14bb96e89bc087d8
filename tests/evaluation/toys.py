"""Models and tokenizers for tests of the evaluation, some of which have numbers that can be worked out by hand."""

from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast


class Bigrams(nn.Module):
    """
    A model whose next token depends on the last one only, by a table `[n, n]` of probabilities.

    Behind the tokens of a row it reads how many were real before, as models with positions do, and takes part of the
    padding for an error.
    """

    def __init__(self, table: torch.Tensor, positions: int = 16):
        super().__init__()
        self.logits = table.double().log()
        self.config = SimpleNamespace(vocab_size=len(table), max_position_embeddings=positions, bos_token_id=0)
        self.longest = 0
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, position_ids: Any = None, **options: Any):
        self.shapes.append(tuple(input_ids.shape))
        assert input_ids.shape[1] <= self.config.max_position_embeddings
        if position_ids is not None:
            real = attention_mask.bool()
            expected = torch.cat([torch.arange(int(row.sum())) for row in real])
            assert torch.equal(position_ids[real], expected)
        return SimpleNamespace(logits=self.logits[input_ids])


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """One token per word, in the order of the list; spaces belong to the word after them, as for GPT-2."""
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_next")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=words[0])


def tiny_gpt2(seed: int = 0, **options: Any) -> GPT2LMHeadModel:
    """A stock GPT-2 of two layers with nothing left at a value that would hide a mistake."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} | options
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0 if "ln_" in name and name.endswith("weight") else 0.0, 0.3)
        else:
            nn.init.normal_(parameter, 0.0, 0.3)
    return model


def rows(count: int = 6, length: int = 40, vocabulary: int = 61, seed: int = 0) -> list[list[int]]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (count, length), generator=generator).tolist()
