"""Windows of tokens as batches: packed without attention across documents, the same for any number of processes."""

from collections.abc import Iterator

import numpy as np
import torch

from .order import window_index
from .shards import TokenShards


IGNORED = -100  # label of what is not to be predicted
VALIDATION_SEED = 0  # a constant, so that all runs are measured on the same windows


class Windows:
    """
    The consecutive, non-overlapping windows of a split, and the batches that training takes from them in shuffled
    order. The last tokens, fewer than a window, are left out.

    Args:
        shards ([`TokenShards`]): The tokens.
        context (`int`): Tokens in a window, S.
        end_of_text (`int`, *optional*): The token that ends a document; that of the manifest if not given.
        cross_document (`bool`, defaults to `False`):
            Attend across documents: no `position_ids`, and labels equal to the inputs. Faster, as attention then needs
            no mask.

    Raises:
        ValueError: if `context` is less than 2 or more than there are tokens, or no token marks the ends of documents
            and `cross_document` is not set.
    """

    def __init__(
        self, shards: TokenShards, context: int, end_of_text: int | None = None, *, cross_document: bool = False
    ):
        if not 2 <= context <= len(shards):
            raise ValueError(
                f"`context` must be from 2 to the {len(shards)} tokens of split {shards.split!r}, got {context}. Make "
                "it shorter, or prepare more text."
            )
        self.end_of_text = shards.manifest.end_of_text if end_of_text is None else end_of_text
        if self.end_of_text is None and not cross_document:
            raise ValueError(
                f"`end_of_text` must be given or in the manifest, got None for {str(shards.folder)!r}. Name the token "
                "that ends a document, or pass `cross_document=True`."
            )
        self.shards, self.context, self.cross_document = shards, context, cross_document

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.shards) // self.context

    def batch(
        self, step: int, batch_size: int, rank: int = 0, world: int = 1, seed: int = 0, offset: int = 0
    ) -> dict[str, torch.Tensor]:
        """
        One process's share of a step: of the windows at the positions `step * batch_size` and following of the endless
        shuffled order, its contiguous part. All it depends on is given here, so training resumes at any step.

        Args:
            step (`int`): From 0; an epoch ends within a step where it ends.
            batch_size (`int`): Windows in a step, on all processes together.
            rank (`int`), world (`int`): This process among how many.
            seed (`int`): Of the order.
            offset (`int`): Added to all positions; for a run whose batch size has changed on the way.

        Returns:
            `dict` as of [`packed`], b = `batch_size / world`.

        Raises:
            ValueError: if `batch_size` is not a multiple of `world`, or `rank` is not below it.
        """
        if batch_size < 1 or world < 1 or batch_size % world:
            raise ValueError(
                f"`batch_size` must be a multiple of the number of processes, got {batch_size} for {world}. Change "
                "one."
            )
        if not 0 <= rank < world:
            raise ValueError(f"`rank` must be from 0 to {world - 1}, got {rank}.")
        size = batch_size // world
        positions = offset + step * batch_size + np.arange(rank * size, (rank + 1) * size)
        return self.take(window_index(positions, len(self), seed))

    def take(self, windows: np.ndarray) -> dict[str, torch.Tensor]:
        """The batch of the windows with these numbers `[b]`."""
        rows = [self.shards.read(int(window) * self.context, self.context) for window in windows]
        input_ids = torch.from_numpy(np.stack(rows).astype(np.int64))
        if self.end_of_text is None or self.cross_document:
            return {"input_ids": input_ids, "labels": input_ids.clone()}
        return packed(input_ids, self.end_of_text)


def packed(input_ids: torch.Tensor, end_of_text: int) -> dict[str, torch.Tensor]:
    """
    Inputs with which a causal model treats the documents in each row as if each were alone.

    Transformers masks attention between them where `position_ids` restart, provided that it is given no attention mask
    and no cache (`use_cache=False`). Flash attention does so for batches of one row alone: use sdpa, flex or eager
    attention with more.

    Args:
        input_ids (`torch.Tensor` of shape `[b, S]`): Rows of documents, each ended by `end_of_text`.
        end_of_text (`int`): That token.

    Returns:
        `dict` of int64 tensors `[b, S]`: `input_ids`; `position_ids`, from 0 after each end of text; `labels`, not
        shifted, -100 at the first token of every document but the one that begins the row, as nothing before it tells
        of it.
    """
    places = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    begins = torch.zeros_like(input_ids, dtype=torch.bool)
    begins[:, 1:] = input_ids[:, :-1] == end_of_text
    first = torch.where(begins, places, 0).cummax(dim=1).values  # [b, S], where the document of each token begins
    return {
        "input_ids": input_ids,
        "position_ids": places - first,
        "labels": input_ids.masked_fill(begins, IGNORED),
    }


def validation_batches(
    shards: TokenShards, context: int, batch_size: int, batches: int, *, cross_document: bool = False
) -> Iterator[dict[str, torch.Tensor]]:
    """
    The same windows of a split each time, drawn from all of it without repetition; fewer batches are a part of more.

    Args:
        shards ([`TokenShards`]): Of the split `"validation"`.
        context, cross_document: As for [`Windows`].
        batch_size (`int`): Windows in a batch.
        batches (`int`): How many at most; as many whole ones as there are, if fewer.

    Raises:
        ValueError: as [`Windows`] does, or if there are not enough windows for one batch.
    """
    windows = Windows(shards, context, cross_document=cross_document)
    if batches < 1 or not 1 <= batch_size <= len(windows):
        raise ValueError(
            f"`batch_size` must be at most the {len(windows)} windows of split {shards.split!r}, and `batches` at "
            f"least 1, got {batch_size} and {batches}. Make the batches smaller, or hold out more, with a larger "
            "`eval_share` in another `data_dir`."
        )
    steps = range(min(batches, len(windows) // batch_size))
    return (windows.batch(step, batch_size, seed=VALIDATION_SEED) for step in steps)
