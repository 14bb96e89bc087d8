"""Shards of tokens: what went in comes out, the split is fixed, damage is found, and nothing is half there."""

import json
import tracemalloc
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
from transformers import AutoTokenizer

from rigpt_hf.text.tokenizer import END, fingerprint, train_tokenizer
from rigpt_hf.training.data import TokenShards, from_tokens, prepare, shards, split_of


TEXTS = [f"Document {n} says {'so ' * (n % 7)}much." for n in range(200)] + ["Twice the same."] * 2


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


@pytest.fixture
def source(tmp_path):
    """A JSONL file of `TEXTS`."""
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return path


@pytest.fixture
def folder(tmp_path, source, tokenizer):
    """`TEXTS` in shards of 200 tokens, a fifth held out."""
    prepare(source, tokenizer, tmp_path / "tokens", validation=0.2, shard_tokens=200, progress=False)
    return tmp_path / "tokens"


def decoded(folder, split, tokenizer) -> list[str]:
    """The documents of a split, from its tokens."""
    tokens = TokenShards(folder, split)
    return tokenizer.decode(tokens.read(0, len(tokens)).tolist()).split(END)


def test_the_documents_come_out_as_they_went_in_and_their_split_depends_on_them_alone(
    folder, source, tokenizer, tmp_path
):
    part = list(reversed(TEXTS[:100]))
    source.write_text("\n".join(json.dumps({"text": text}) for text in part))
    prepare(source, tokenizer, tmp_path / "part", validation=0.2, progress=False)
    for split in ("train", "validation"):
        for place, texts in ((folder, TEXTS), (tmp_path / "part", part)):
            expected = [text for text in texts if split_of(text, 0.2) == split]
            assert decoded(place, split, tokenizer) == [*expected, ""]  # an end of text after each
            assert TokenShards(place, split).manifest.splits[split].documents == len(expected) > 10


def test_the_manifest_tells_what_was_made_of_what(folder, source, tokenizer):
    manifest = TokenShards(folder).manifest
    assert manifest == shards.Manifest.read(folder)
    assert manifest.source == {"source": str(source), "max_tokens": None} and manifest.validation == 0.2
    assert manifest.dtype == "uint16" and manifest.vocab_size == len(tokenizer) == 300
    assert manifest.end_of_text == tokenizer.eos_token_id
    for split, facts in manifest.splits.items():
        *full, last = [shard.tokens for shard in facts.shards]
        assert set(full) == {200} and 0 < last <= 200 and sum(full) + last == facts.tokens
        assert facts.tokens == len(TokenShards(folder, split))
    tokenizer(["a", "longer"], padding=True, truncation=True, max_length=1)  # which leaves a trace in it
    assert fingerprint(AutoTokenizer.from_pretrained(folder)) == fingerprint(tokenizer) == manifest.tokenizer
    assert fingerprint(train_tokenizer(TEXTS, 290)) != manifest.tokenizer


def test_the_same_again_is_the_same_and_shards_do_not_matter(folder, source, tokenizer, tmp_path):
    again = prepare(source, tokenizer, tmp_path / "again", validation=0.2, shard_tokens=200, progress=False)
    assert again == TokenShards(folder).manifest
    prepare(source, tokenizer, tmp_path / "one", validation=0.2, progress=False)
    one, many = TokenShards(tmp_path / "one"), TokenShards(folder)
    assert len(one.shards) == 1 < len(many.shards) and len(one) == len(many)
    for start, length in [(0, len(one)), (199, 2), (200, 200), (123, 700), (len(one), 0), (len(one) - 1, 1)]:
        assert np.array_equal(one.read(start, length), many.read(start, length))
        assert len(one.read(start, length)) == length


def test_the_share_that_is_held_out():
    texts = [f"text {n}" for n in range(5000)]
    held_out = {share: {t for t in texts if split_of(t, share) == "validation"} for share in (0, 0.01, 0.1, 0.5)}
    assert held_out[0] == set() and held_out[0.01] < held_out[0.1] < held_out[0.5]
    for share, members in held_out.items():
        assert abs(len(members) - 5000 * share) <= 4 * (5000 * share) ** 0.5


def test_names_of_special_tokens_in_a_text_are_text(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": f"before{END}after"}))
    prepare(tmp_path / "a.jsonl", tokenizer, tmp_path / "tokens", validation=0, progress=False)
    tokens = TokenShards(tmp_path / "tokens")
    ends = np.flatnonzero(tokens.read(0, len(tokens)) == tokenizer.eos_token_id)
    assert ends.tolist() == [len(tokens) - 1]
    assert tokenizer.eos_token_id in tokenizer(f"before{END}after")["input_ids"]  # without the care taken


def test_max_tokens_ends_the_reading(tmp_path, tokenizer, monkeypatch):
    read = []

    def endless(source, **options):
        while True:
            read.append("Some words.")
            yield f"Some words, {len(read)}."

    monkeypatch.setattr(shards, "documents", endless)
    (tmp_path / "a.txt").touch()
    options = {"max_tokens": 333, "validation": 0.2}
    manifest = prepare(tmp_path / "a.txt", tokenizer, tmp_path / "tokens", progress=False, **options)
    assert sum(split.tokens for split in manifest.splits.values()) == 333
    assert len(read) <= shards.BATCH_DOCUMENTS


def test_a_large_vocabulary_takes_wider_numbers(tmp_path, source, tokenizer, monkeypatch):
    monkeypatch.setattr(shards, "vocabulary_size", lambda tokenizer: 2**16 + 1)
    prepare(source, tokenizer, tmp_path / "wide", validation=0.2, progress=False)
    assert TokenShards(tmp_path / "wide").read(0, 5).dtype == np.uint32
    assert decoded(tmp_path / "wide", "validation", tokenizer)[0] in TEXTS


def test_nothing_is_left_of_a_failure_and_an_earlier_folder_stays(folder, source, tokenizer, tmp_path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with source.open("a") as file:
        file.write("\nnot json")
    with pytest.raises(ValueError, match="`source` must hold files .* line 203 is not JSON"):
        prepare(source, tokenizer, folder, force=True, progress=False)
    with pytest.raises(ValueError, match="`source` must hold files .* line 203 is not JSON"):
        prepare(source, tokenizer, tmp_path / "new", progress=False)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.jsonl", "tokens"]
    source.write_text(json.dumps({"text": "All new."}))
    prepare(source, tokenizer, folder, force=True, validation=0, progress=False)
    assert decoded(folder, "train", tokenizer) == ["All new.", ""]


def test_outputs_that_may_not_be_written(folder, source, tokenizer, tmp_path):
    for output, force, message in [
        (folder, False, "`output_dir` must be empty or absent, got .* `force=True`"),
        (source, True, "`output_dir` must not hold the source"),
        (tmp_path, True, "`output_dir` must not hold the source"),
        (folder / "manifest.json", False, "`output_dir` must be a folder, got the file"),
        (folder / "manifest.json" / "x", False, "`output_dir` must be a folder, or a new name in one, got"),
    ]:
        with pytest.raises(ValueError, match=message):
            prepare(source, tokenizer, output, force=force, progress=False)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="`output_dir` can be replaced only if it is a folder of tokens, got"):
        prepare(source, tokenizer, tmp_path / "precious", force=True, progress=False)


def test_impossible_arguments(source, tmp_path, tokenizer):
    for options, message in [
        ({"validation": 1}, "`validation` must be at least 0 and less than 1, got 1"),
        ({"shard_tokens": 0}, "`shard_tokens` must be at least 1, got 0"),
        ({"max_tokens": 0}, "`max_tokens` must be at least 1, got 0"),
        ({"tokenizer": str(tmp_path / "none")}, "`tokenizer` must be the folder of a saved model or the id of a repo"),
        ({"tokenizer": source}, "`tokenizer` must be a tokenizer.json, or a folder or Hub id with a tokenizer, got"),
        ({"validation": 1 - 1e-12}, "`validation` must leave some documents to train on, got .* all 202 of"),
    ]:
        with pytest.raises(ValueError, match=message):
            prepare(source, **{"tokenizer": tokenizer, "output_dir": tmp_path / "x", "progress": False} | options)
        assert not (tmp_path / "x").exists()
    endless = train_tokenizer(TEXTS, 290)
    endless.eos_token = None
    with pytest.raises(ValueError, match="`tokenizer` must have an end-of-text token, got .* Set its `eos_token`"):
        prepare(source, endless, tmp_path / "x", progress=False)


def test_a_single_document_leaves_no_validation(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("Only one.")
    with pytest.raises(ValueError, match=r"`validation` must hold out some .* none of the 1 of .*`data_options: {sep"):
        prepare(tmp_path / "a.txt", tokenizer, tmp_path / "tokens", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    # Not if none were asked for.
    prepare(tmp_path / "a.txt", tokenizer, tmp_path / "tokens", validation=0, progress=False)
    with pytest.raises(ValueError, match="`split` must be one of train, which .* has, got 'validation'. Prepare it"):
        TokenShards(tmp_path / "tokens", "validation")


def test_reading_outside_and_in_a_worker(folder):
    tokens = TokenShards(folder)
    sent = bytes(ForkingPickler.dumps(tokens))
    assert len(sent) < 500 < 2 * len(tokens)  # not the files
    assert np.array_equal(ForkingPickler.loads(sent).read(10, 600), tokens.read(10, 600))
    for start, length in [(-1, 2), (len(tokens), 1), (0, len(tokens) + 1), (0, -1)]:
        with pytest.raises(ValueError, match="`start` and `length` must lie within the .* got"):
            tokens.read(start, length)


def test_damaged_folders_are_refused(folder):
    def refused(message):
        with pytest.raises(ValueError, match=message):
            TokenShards(folder)

    manifest, shard = folder / "manifest.json", folder / "train-00001.bin"
    data, text = shard.read_bytes(), manifest.read_text()
    shard.write_bytes(data[:-1])
    refused("`folder` must hold the shards of its manifest, got .*train-00001.bin' with 399 bytes for 400 bytes")
    shard.unlink()
    refused("`folder` must hold the shards of its manifest, got .*train-00001.bin' with no such file for 400 bytes")
    shard.write_bytes(data)
    manifest.write_text(text.replace('"version": 1', '"version": 2'))
    refused("`folder` must have a manifest of version 1 at most, got version 2 in .* Update rigpt-hf")
    for damage in (text[:100], "[]", "{}", text.replace("uint16", "uint8"), text.replace('"sha256"', '"sha"')):
        manifest.write_text(damage)
        refused("`folder` must have an undamaged `manifest.json`, got")
    manifest.unlink()
    refused("`folder` must be a folder of tokens with a `manifest.json`, got")
    manifest.write_text(text)
    TokenShards(folder).verify(progress=False)
    shard.write_bytes(data[:7] + bytes([data[7] ^ 1]) + data[8:])
    with pytest.raises(ValueError, match=r"got '.*train-00001.bin' with SHA-256 .* Copy it again"):
        TokenShards(folder).verify(progress=False)
    TokenShards(folder, "validation").verify(progress=False)


def token_file(path, values, dtype="<u2"):
    np.asarray(values, dtype).tofile(path)
    return path


def test_from_tokens_copies_what_is_there(tmp_path, tokenizer):
    values = np.random.default_rng(0).integers(0, 300, 1234)
    files = {"train": token_file(tmp_path / "a.bin", values), "validation": token_file(tmp_path / "b.bin", [5, 0, 6])}
    tokenizer.save_pretrained(tmp_path / "saved")
    options = {"vocab_size": 300, "end_of_text": 0, "tokenizer": tmp_path / "saved" / "tokenizer.json"}
    manifest = from_tokens(files, tmp_path / "tokens", **options, shard_tokens=500, progress=False)
    train = TokenShards(tmp_path / "tokens")
    train.verify(progress=False)
    assert np.array_equal(train.read(0, len(train)), values) and len(train.shards) == 3
    assert manifest.splits["train"].documents == (values == 0).sum() > 0
    assert manifest.splits["validation"].tokens == 3
    assert fingerprint(AutoTokenizer.from_pretrained(tmp_path / "tokens")) == manifest.tokenizer


def test_from_tokens_keeps_memory_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "CHUNK", 2**16)
    path = token_file(tmp_path / "a.bin", np.arange(4_000_000) % 1000)
    tracemalloc.start()
    from_tokens({"train": path}, tmp_path / "tokens", vocab_size=1000, end_of_text=None, progress=False)
    copied = tracemalloc.get_traced_memory()[1]
    assert len(TokenShards(tmp_path / "tokens")) == 4_000_000
    tracemalloc.reset_peak()
    np.fromfile(path, "<u2")
    read = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert copied < path.stat().st_size / 4 < path.stat().st_size <= read


def test_from_tokens_refuses(tmp_path, tokenizer):
    good = token_file(tmp_path / "a.bin", [1, 2, 3])
    odd = tmp_path / "odd.bin"
    odd.write_bytes(b"123")
    for options, message in [
        ({"files": {"validation": good}}, "`files` must name the splits 'train' and maybe 'validation', got"),
        ({"files": {"train": good, "test": good}}, "`files` must name the splits .*, got \\['test', 'train'\\]"),
        ({"files": {"train": odd}}, "`files` must be files of uint16 numbers, 2 bytes each, got .*: 3 bytes"),
        ({"files": {"train": tmp_path / "none"}}, "`files` must be files of uint16 .*: no file"),
        ({"dtype": "int8"}, "`dtype` must be one of uint16, uint32, got 'int8'"),
        ({"vocab_size": 3}, "`vocab_size` must be more than every token, got 3, and 3 in"),
        ({"end_of_text": 10}, "`end_of_text` must be in the vocabulary of 10 tokens, got 10"),
        ({"shard_tokens": 0}, "`shard_tokens` must be at least 1, got 0"),
        ({"tokenizer": tokenizer}, "`tokenizer` must have the vocabulary of the files, 10 tokens, got 300"),
        ({"output_dir": tmp_path}, "`output_dir` must not hold the source"),
    ]:
        usual = {"files": {"train": good}, "output_dir": tmp_path / "x", "vocab_size": 10, "end_of_text": None}
        with pytest.raises(ValueError, match=message):
            from_tokens(**usual | {"progress": False} | options)
        assert not (tmp_path / "x").exists()
