"""What verbs do with a folder of codes: they read it and say so, or refuse it in one line."""

import json
import shutil

import pytest
import torch

from tests.checkpoints.folders import save_tokenizer
from tests.cli.conftest import in_one_line
from tests.cli.folders import copied, edit, tensors
from tests.codes import quantized


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    """A folder of codes, the weights behind them, and others."""
    place = tmp_path_factory.mktemp("codes")
    model = quantized("tied", torch.bfloat16)
    model.save_pretrained(place / "codes")
    model.dequantize(torch.float32).save_pretrained(place / "weights")
    quantized("tied", torch.float32, group=None).save_pretrained(place / "rows")
    for folder in list(place.iterdir()):
        save_tokenizer(folder)
    return place


WORDS = "codes of 4 bits in groups of 32, tables of 8 bits"


def test_verbs_read_codes(codes, done, rigpt, tmp_path):
    shown = done("info", codes / "codes")
    assert f"36,512 parameters, stored as {WORDS}" in shown and "neurons" in shown
    assert shown.splitlines()[1:-1] == done("info", codes / "weights").splitlines()[1:-1]
    code, out, err = rigpt("diff", codes / "codes", codes / "weights")
    assert code == 0 and "B is A: every weight is equal." in out
    assert f"is quantized by rigpt ({WORDS}), and was decoded" in out + err
    code, out, err = rigpt("diff", codes / "rows", codes / "weights")
    assert code == 1 and "is A" not in out
    code, out, err = rigpt("fingerprint", codes / "codes")
    assert code == 0 and "36,512" in out
    assert rigpt("verify", codes / "codes", codes / "codes")[0] == 0
    folder = copied(codes / "codes", tmp_path / "carded")
    done("card", folder)
    card = (folder / "README.md").read_text()
    assert f"| stored as | {WORDS}, in bfloat16 |" in card and "| neurons |" in card
    sent = done("publish", folder, "me/it", "--dry-run")
    assert "packed_rigpt.py" in sent and "quantized_rigpt.py" in sent
    assert "Written to" in done("rotate", codes / "codes", tmp_path / "turned")


MAP = "model.layers.0.mlp.up_proj"
DAMAGE = {
    "bits": (lambda folder: config(folder, bits=5), "`bits` of a `quantization_config` must be 3, 4 or 8, got 5"),
    "unknown": (lambda folder: config(folder, zeros=1), "must have fields that are known here, got 'zeros'"),
    "group": (lambda folder: config(folder, group=128), "`group` must divide the 32 inputs of"),
    "missing": (
        tensors(lambda held: {name: held[name] for name in held if name != f"{MAP}.codes"}),
        f"`{MAP}.codes` must be stored for a map that has codes, got none",
    ),
    "nan": (
        tensors(lambda held: held | {f"{MAP}.scales": held[f"{MAP}.scales"] / 0}),
        f"`{MAP}.scales`",
    ),
    "shape": (
        tensors(lambda held: held | {f"{MAP}.codes": held[f"{MAP}.codes"][:5].clone()}),
        f"{MAP}.codes",
    ),
    "two tables": (
        tensors(lambda held: held | {"lm_head.codes": held["model.embed_tokens.codes"].flip(0)}),
        "must have one table where its configuration ties two",
    ),
    "plain": (
        tensors(lambda held: {name: tensor.to(torch.float32) for name, tensor in held.items()}),
        "must hold what its `quantization_config` says",
    ),
}


def config(folder, **values):
    written = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit(folder, "config.json", quantization_config=written | values)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_codes_are_one_line(damage, codes, rigpt, tmp_path):
    spoil, words = DAMAGE[damage]
    folder = copied(codes / "codes", tmp_path / "model")
    spoil(folder)
    assert words in in_one_line(rigpt("verify", folder, codes / "weights"))
    shutil.rmtree(folder)


def test_weights_behind_what_is_turned_do_not_stand_alone(codes, rigpt, tmp_path):
    folder = copied(codes / "codes", tmp_path / "model")
    config(folder, activation_bits=8, recipe={"turned": [MAP]})
    assert "weights alone would be another function" in in_one_line(rigpt("fingerprint", folder, codes / "weights"))
    config(folder, activation_bits=None)
    assert "must say what" in in_one_line(rigpt("verify", folder, codes / "weights"))


def test_a_stock_class_has_no_place_for_codes(codes, rigpt, tmp_path):
    line = in_one_line(rigpt("export", codes / "codes", tmp_path / "out", "--to", "llama"))
    assert "must hold its weights themselves and no codes for them" in line and "--to gguf" in line
    assert not (tmp_path / "out").exists()
