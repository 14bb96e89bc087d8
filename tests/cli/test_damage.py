"""Damage to the folder of a model: every verb and program names the file in one line."""

import json
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import in_one_line
from tests.cli.folders import copied, edit, tensors


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[20] ^= 0xFF
    (folder / "model.safetensors").write_bytes(content)


def put(name: str, content):
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def shard_map(change):
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": change(json.loads(path.read_text())["weight_map"])}))

    return damage


def grown(stored: dict) -> None:
    name = "model.embed_tokens.weight"
    stored[name] = torch.cat([stored[name], torch.zeros(30, stored[name].shape[1])])


def spoilt(stored: dict) -> None:
    stored["model.embed_tokens.weight"][3:6] = float("nan")


def lost(stored: dict) -> None:
    del stored[UP]


UP = "model.layers.1.mlp.up_proj.weight"
# What is wrong: the folder, the damage, and what the line says.
DAMAGED = {
    "cut weights": ("rigpt", cut, ("model.safetensors'", "cut or damaged")),
    "flipped header": ("rigpt", flip, ("model.safetensors'", "cut or damaged")),
    "cut configuration": ("rigpt", put("config.json", '{"a":'), ("config.json'", "no JSON at line 1")),
    "no configuration": ("rigpt", lambda folder: (folder / "config.json").unlink(), ("has no `config.json`",)),
    "empty configuration": ("rigpt", put("config.json", ""), ("config.json'", "no JSON at line 1, column 1")),
    "not UTF-8": ("rigpt", put("config.json", b'{"\xff": 1}'), ("config.json'", "not UTF-8 at byte 2")),
    "two tables that are tied": (
        "rigpt-untied",
        lambda folder: edit(folder, "config.json", tie_word_embeddings=True),
        ("`lm_head.weight` differs from `model.embed_tokens.weight`", "tie_word_embeddings"),
    ),
    "a list": ("rigpt", put("config.json", "[1]"), ("config.json'", "a list and no object")),
    "deep": ("rigpt", put("config.json", '{"a":' * 99999 + "1" + "}" * 99999), ("config.json'", "nested too deeply")),
    "generation": ("rigpt", put("generation_config.json", "{"), ("generation_config.json'", "no JSON")),
    "a wrong type": (
        "rigpt",
        lambda f: edit(f, "config.json", num_hidden_layers="two"),
        ("`num_hidden_layers`", "two"),
    ),
    "an odd map": ("rigpt", lambda f: edit(f, "config.json", auto_map=-1), ("whose 'auto_map' is a dict, got -1",)),
    "an odd dtype": ("rigpt", lambda f: edit(f, "config.json", dtype=1.5), ("whose 'dtype' is a str, got 1.5",)),
    "odd codes": (
        "rigpt",
        lambda f: edit(f, "config.json", quantization_config="x"),
        ("'quantization_config' is",),
    ),
    "absurd tokens of a stock model": (
        "gpt2",
        lambda f: edit(f, "config.json", vocab_size=10**30),
        ("`vocab_size` must be at most 2147483647, got 1e+30",),
    ),
    "codes": (
        "rigpt",
        lambda f: edit(f, "config.json", quantization_config={"quant_method": 7}),
        ("`quantization_config`",),
    ),
    "complex numbers": ("rigpt", tensors(lambda w: w.update({UP: w[UP].to(torch.complex64)})), (UP, "C64")),
    "whole numbers": ("rigpt", tensors(lambda w: w.update({UP: w[UP].long()})), (UP, "I64")),
    "a long value": (
        "rigpt",
        lambda f: edit(f, "config.json", hidden_act="x" * 9999),
        ("`hidden_act` must be one of",),
    ),
    "too many layers": (
        "rigpt",
        lambda f: edit(f, "config.json", num_hidden_layers=5000),
        ("`num_hidden_layers`", "5000"),
    ),
    "absurd layers": (
        "rigpt",
        lambda f: edit(f, "config.json", num_hidden_layers=10**9),
        ("`num_hidden_layers`", "1e+09"),
    ),
    "absurd tokens": (
        "rigpt",
        lambda f: edit(f, "config.json", vocab_size=10**9),
        ("embed_tokens", "[61, 32], not [1000"),
    ),
    "a lost tensor": ("rigpt", tensors(lost), ("lacks", UP)),
    "a tensor too many": (
        "rigpt",
        tensors(lambda stored: stored.update({"model.more.weight": torch.ones(2)})),
        ("has no place for `model.more.weight`",),
    ),
    "another shape": (
        "rigpt",
        tensors(grown),
        ("another shape to `model.embed_tokens.weight` ([91, 32], not [61, 32])",),
    ),
    "no numbers": ("rigpt", tensors(spoilt), ("`model.embed_tokens.weight`", "3 of 61 rows, the first of them row 3")),
    "no index": ("shards", put("model.safetensors.index.json", "{"), ("index.json'", "no JSON")),
    "no map": ("shards", put("model.safetensors.index.json", '{"a": 1}'), ("index.json'", "`weight_map`")),
    "a map of numbers": ("shards", shard_map(lambda files: dict.fromkeys(files, 3)), ("index.json'", "`weight_map`")),
    "a file above": ("shards", shard_map(lambda files: dict.fromkeys(files, "../x")), ("own folder", "'../x'")),
    "a file anywhere": (
        "shards",
        shard_map(lambda files: dict.fromkeys(files, "/etc/passwd")),
        ("own folder", "passwd"),
    ),
    "a lost shard": (
        "shards",
        lambda folder: next(folder.glob("model-00002*")).unlink(),
        ("names the shard 'model-00002", "is missing"),
    ),
    "an adapter beside": (
        "rigpt",
        put("adapter_config.json", "{}"),
        ("an adapter (`adapter_config.json`). Merge it",),
    ),
    "an adapter's link": (
        "rigpt",
        lambda folder: (folder / "adapter_config.json").symlink_to("nothing"),
        ("an adapter (`adapter_config.json`). Merge it",),
    ),
    "an adapter alone": (
        "rigpt",
        lambda f: (put("adapter_config.json", "{}")(f), (f / "config.json").unlink()),
        ("an adapter (`adapter_config.json`). Merge it",),
    ),
}
# Of the library, or of Python.
UPSTREAM = ("Traceback", "Error:", "ignore_mismatched", "Errno", "Exception", "x" * 100, "Validation error")


# Damage to weights, to a configuration and to shards, in which every other verb and a program are looked at, too.
EVERYWHERE = ("cut weights", "an odd dtype", "no numbers", "a lost shard", "an adapter alone")


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.by_default(18)
def test_damage_is_named_in_one_line(damage, folders, answer, tmp_path):
    source, spoil, words = DAMAGED[damage]
    model = copied(folders / source, tmp_path / "model")
    spoil(model)
    line = in_one_line(answer("rigpt", "rotate", model, tmp_path / "out"))
    assert all(word in line for word in words), line
    assert not any(word in line for word in UPSTREAM) and len(line) < 700, line
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize(
    "damage", [pytest.param(name, marks=[pytest.mark.full] * (name not in EVERYWHERE)) for name in DAMAGED]
)
def test_damage_is_named_by_all_that_read_a_model(damage, folders, answer, tmp_path):
    source, spoil, words = DAMAGED[damage]
    model, out = copied(folders / source, tmp_path / "model"), tmp_path / "out"
    spoil(model)
    for call in (("export", model, out), ("verify", model, model), ("card", model)):
        line = in_one_line(answer("rigpt", *call))
        if call[0] != "card":
            assert all(word in line for word in words), line
            assert not any(word in line for word in UPSTREAM) and len(line) < 700, line
    line = in_one_line(answer("finetune", model, folders / "text.txt", out))
    assert not any(word in line for word in UPSTREAM), line
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_weights_of_a_stock_model_are_no_booleans(folders, answer, tmp_path):
    """Masks of old files are, under names that end like those of biases."""
    model, out, name = copied(folders / "gpt2", tmp_path / "model"), tmp_path / "out", "transformer.h.1.ln_1.bias"
    tensors(lambda w: w.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool)}))(model)
    assert answer("rigpt", "convert", model, tmp_path / "good")[0] == 0
    tensors(lambda w: w.update({name: w[name].bool()}))(model)
    for call in (("convert", model, out), ("verify", model, model), ("demo", "--model", model, "--output", out)):
        line = in_one_line(answer("rigpt", *call))
        assert name in line and "floating point" in line and not out.exists(), line


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_may_not_be_read_is_no_damage(name, folders, answer, tmp_path, monkeypatch):
    """Whoever runs these tests may read all, so opening is refused here."""
    model, out, open_file = copied(folders / "rigpt", tmp_path / "model"), tmp_path / "out", Path.open

    def refuse(self, *arguments, **options):
        if self == model / name:
            raise PermissionError(13, "Permission denied", str(self))
        return open_file(self, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", refuse)
        for call in (("rotate", model, out), ("canonicalize", model, out)):
            line = in_one_line(answer("rigpt", *call))
            assert f"`SOURCE` must have files that may be read, got '{model / name}': Permission denied" in line, line
            assert not any(word in line for word in ("damaged", "Download", "`source`", *UPSTREAM)), line
        line = in_one_line(answer("finetune", model, folders / "text.txt", out))
        assert f"'{model / name}': Permission denied" in line and "`source`" not in line, line
        assert not out.exists()
    assert answer("rigpt", "rotate", model, out)[0] == 0
