"""Batches: the same for any number of processes, and documents in one window that know nothing of each other."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from rigpt_hf.training.data import TokenShards, Windows, from_tokens, packed, validation_batches
from tests.models import ALL, backends, over, tiny_model
from tests.tolerances import CONVERSION


END, CONTEXT, WINDOWS = 2, 24, 40
TOLERANCE = CONVERSION[torch.float64]
IGNORED = -100


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Random tokens in documents of 1 to 15 tokens, over several shards, with some left over after the last window."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    tokens = generator.integers(3, 61, CONTEXT * WINDOWS + 5)
    tokens[np.cumsum(generator.integers(1, 15, 200))[:110]] = END
    tokens.astype("<u2").tofile(folder / "tokens.bin")
    options = {"vocab_size": 61, "end_of_text": END, "shard_tokens": 100, "progress": False}
    from_tokens({"train": folder / "tokens.bin"}, folder / "tokens", **options)
    return TokenShards(folder / "tokens")


def pieces(row: torch.Tensor) -> list[torch.Tensor]:
    """The documents in a row, each with its end."""
    ends = (row == END).nonzero().flatten().tolist()
    borders = [0, *(end + 1 for end in ends), len(row)]
    return [row[a:b] for a, b in pairwise(borders) if a < b]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_an_epoch_holds_every_window_once(shards):
    windows = Windows(shards, CONTEXT)
    assert len(windows) == WINDOWS
    rows = torch.cat([windows.batch(step, 8, seed=3)["input_ids"] for step in range(WINDOWS // 8)])
    stream = torch.from_numpy(shards.read(0, CONTEXT * WINDOWS).astype(np.int64)).view(WINDOWS, CONTEXT)
    assert {tuple(row) for row in rows.tolist()} == {tuple(row) for row in stream.tolist()}
    assert not torch.equal(rows, stream)


def test_batches_do_not_depend_on_the_number_of_processes(shards):
    # A process that starts anywhere has what one that came there has.
    for step, world in ((0, 2), (7, 8), (10**6, 2)):
        windows = Windows(shards, CONTEXT)
        whole = windows.batch(step, 8, seed=1)
        parts = [Windows(shards, CONTEXT).batch(step, 8, rank, world, seed=1) for rank in range(world)]
        assert same(whole, {name: torch.cat([part[name] for part in parts]) for name in whole})
        assert not same(whole, windows.batch(step, 8, seed=2))
        assert not same(whole, windows.batch(step + 1, 8, seed=1))
        assert not same(parts[0], parts[1])


def test_positions_and_labels_of_packed_documents():
    batch = packed(torch.tensor([[7, 8, END, 9, END, END, 5], [END, 4, 4, 4, 4, 4, END]]), END)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0], [0, 0, 1, 2, 3, 4, 5]]
    expected = [[7, 8, END, IGNORED, END, IGNORED, IGNORED], [END, IGNORED, 4, 4, 4, 4, END]]
    assert batch["labels"].tolist() == expected
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


@over()
@pytest.mark.by_default(6)
def test_a_document_in_a_window_is_as_if_alone(shards, option):
    model = tiny_model(**ALL[option])
    batch = Windows(shards, CONTEXT).batch(0, 3)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    documents = [piece for row in batch["input_ids"] for piece in pieces(row)]
    assert len(documents) > 8
    for backend in backends(ALL[option]):
        model.set_attn_implementation(backend)
        with torch.no_grad():
            alone = torch.cat([model(piece[None], use_cache=False).logits[0] for piece in documents])
            together = model(**inputs, use_cache=False).logits.flatten(0, 1)
            blind = model(batch["input_ids"], use_cache=False).logits.flatten(0, 1)
        scale = alone.abs().max()
        assert (together - alone).abs().max() < TOLERANCE * scale
        assert (blind - alone).abs().max() > 1e6 * TOLERANCE * scale  # without `position_ids`


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_the_loss_predicts_nothing_from_another_document(shards, positions):
    model = tiny_model(position_embedding_type=positions)
    batch = Windows(shards, CONTEXT).batch(1, 4)
    documents = [piece for row in batch["input_ids"] for piece in pieces(row) if len(piece) > 1]
    with torch.no_grad():
        losses = [
            model(piece[None], labels=piece[None], use_cache=False).loss * (len(piece) - 1) for piece in documents
        ]
        expected = sum(losses) / sum(len(piece) - 1 for piece in documents)
        assert torch.isclose(model(**batch, use_cache=False).loss, expected, rtol=TOLERANCE, atol=0)
        wrong = model(**batch | {"labels": batch["input_ids"]}, use_cache=False).loss
    assert not torch.isclose(wrong, expected, rtol=1e6 * TOLERANCE, atol=0)


def test_windows_across_documents(shards):
    plain, aware = Windows(shards, CONTEXT, cross_document=True).batch(0, 4), Windows(shards, CONTEXT).batch(0, 4)
    assert plain.keys() == {"input_ids", "labels"}
    assert torch.equal(plain["input_ids"], aware["input_ids"])
    assert torch.equal(plain["labels"], plain["input_ids"])
    assert plain["labels"].data_ptr() != plain["input_ids"].data_ptr()
    assert not torch.equal(aware["labels"], plain["labels"])


def test_validation_takes_the_same_windows_each_time(shards):
    first, again = (list(validation_batches(shards, CONTEXT, 8, 3)) for _ in range(2))
    assert len(first) == 3 and all(map(same, first, again))
    rows = torch.cat([batch["input_ids"] for batch in first])
    assert len({tuple(row) for row in rows.tolist()}) == 24
    more = list(validation_batches(shards, CONTEXT, 8, 100))
    assert len(more) == WINDOWS // 8 and all(map(same, first, more))


def test_impossible_batches(shards, tmp_path):
    windows = Windows(shards, CONTEXT)
    for arguments, message in [
        ((0, 8, 0, 3), "`batch_size` must be a multiple of the number of processes, got 8 for 3"),
        ((0, 0), "`batch_size` must be a multiple of the number of processes, got 0 for 1"),
        ((0, 8, 2, 2), "`rank` must be from 0 to 1, got 2"),
        ((-1, 8), "`position` must not be negative, got -8"),
    ]:
        with pytest.raises(ValueError, match=message):
            windows.batch(*arguments)
    for context in (1, len(shards) + 1):
        with pytest.raises(ValueError, match=f"`context` must be from 2 to the .* of split 'train', got {context}"):
            Windows(shards, context)
    for batch_size, batches in [(WINDOWS + 1, 1), (8, 0)]:
        with pytest.raises(ValueError, match=f"`batch_size` must be at most the 40 windows .*got {batch_size} and"):
            validation_batches(shards, CONTEXT, batch_size, batches)
    np.arange(99, dtype="<u2").tofile(tmp_path / "a.bin")
    from_tokens({"train": tmp_path / "a.bin"}, tmp_path / "unmarked", vocab_size=99, end_of_text=None, progress=False)
    unmarked = TokenShards(tmp_path / "unmarked")
    with pytest.raises(ValueError, match="`end_of_text` must be given or in the manifest, got None .*cross_document"):
        Windows(unmarked, 10)
    assert Windows(unmarked, 10, cross_document=True).batch(0, 2).keys() == {"input_ids", "labels"}
    assert "position_ids" in Windows(unmarked, 10, 5).batch(0, 2)
