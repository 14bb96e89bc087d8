"""`rigpt fingerprint`, `identify`, and `diff` of models that no one configuration holds."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from rigpt_hf.cli.provenance import in_rows, show_distances
from rigpt_hf.conversion import convert_model
from rigpt_hf.symmetry import Comparison, GaugeTransformation
from rigpt_hf.symmetry.comparison import Part
from rigpt_hf.terminal import Console
from tests.conversion.sources import stock_model
from tests.models import SYMMETRIES, tiny_model


OPTIONS = SYMMETRIES["gated"] | {"hidden_size": 64, "num_attention_heads": 4}
KINDS = ("self_attn", "mlp")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, a shorter one made from it in other frames, one of another seed, and a stock model and its disguise."""
    root = tmp_path_factory.mktemp("models")
    model = tiny_model(dtype=torch.float32, **OPTIONS)
    shorter = tiny_model(dtype=torch.float32, **OPTIONS, num_hidden_layers=2)
    shorter.load_state_dict({name: model.state_dict()[name] for name in shorter.state_dict()})
    draw = torch.Generator().manual_seed(1)
    stock = stock_model("llama").to(torch.float32)
    converted = convert_model(stock)
    models = {
        "model": model,
        "shorter": GaugeTransformation.random(shorter.config, draw, "all")(shorter),
        "unrelated": tiny_model(seed=7, dtype=torch.float32, **OPTIONS),
        "stock": stock,
        "disguise": GaugeTransformation.random(converted.config, draw, "all")(converted),
    }
    for name, each in models.items():
        each.save_pretrained(root / name)
    return root


def test_distances_of_several_models(done, folders, tmp_path):
    names = ("model", "shorter", "unrelated")
    out = done("fingerprint", *(folders / name for name in names), "--json", tmp_path / "f.json")
    assert "Distances" in out
    facts = json.loads((tmp_path / "f.json").read_text())
    apart = facts["distances"]
    assert [apart[i][i] for i in range(3)] == pytest.approx([0, 0, 0], abs=1e-12)
    assert apart[0][1] < 1e-6 and apart[0][2] > 0.8 and apart[0][2] == apart[2][0]
    assert [each["layers"] for each in facts["facts"]] == [3, 2, 3]


def test_models_whose_folders_have_one_name_get_fingerprints_of_their_own(done, folders, tmp_path):
    for run, name in (("one", "model"), ("two", "shorter")):
        shutil.copytree(folders / name, tmp_path / run / "model")
    done("fingerprint", tmp_path / "one/model", tmp_path / "two/model", "--output", tmp_path / "known")
    assert sorted(path.name for path in (tmp_path / "known").glob("*.fingerprint")) == [
        "one.fingerprint",
        "two.fingerprint",
    ]


def test_the_source_of_a_model_is_identified(rigpt, done, folders, tmp_path):
    (tmp_path / "known").mkdir()
    for name in ("model", "unrelated", "stock"):
        done("fingerprint", folders / name, "--output", tmp_path / "known" / name)
    for suspect, source in (("shorter", "model"), ("disguise", "stock")):
        out = done("identify", folders / suspect, "--against", tmp_path / "known", "--nearest", "1")
        assert source in out.split("distance")[1] and "relative" in out
    done("fingerprint", folders / "shorter", "--output", tmp_path / "one")
    assert "model" in done("identify", tmp_path / "one", "--against", tmp_path / "known", "--nearest", "1")
    (tmp_path / "known" / "model").unlink()
    code, out, _ = rigpt("identify", folders / "shorter", "--against", tmp_path / "known")
    assert code == 1 and "unrelated" in out


def test_a_cast_of_a_stock_model_is_that_model(done, folders, tmp_path):
    """Though a conversion folds gains into what was cast."""
    stock_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "cast")
    out = done("diff", folders / "stock", tmp_path / "cast")
    assert "B is A: every weight is equal up to rounding." in out and "float32 and bfloat16" in out


def test_diff_of_stock_folders_and_of_models_of_two_depths(rigpt, done, folders, tmp_path):
    out = done("diff", folders / "stock", folders / "disguise", "--json", tmp_path / "d.json")
    assert "B is A in disguise" in out and "equal up to rounding" in out
    certificate = json.loads((tmp_path / "d.json").read_text())["certificate"]
    assert certificate["relative_logit_error"] <= certificate["tolerance"]
    assert out.index("B is A in disguise") < out.index("proof, not likelihood") < out.index("Relative distances")
    assert out.index("Relative distances") < out.index("Certificate") and "pairs" not in out
    code, out, err = rigpt("diff", folders / "model", folders / "shorter", "--save-transformation", tmp_path / "g")
    assert not (tmp_path / "g").exists() and "none was looked for: `model` and `reference` must" in " ".join(
        (out + err).split()
    )
    assert code == 1 and "Fingerprints alone decide" in out and "B is a relative of A" in out
    code, out, _ = rigpt("diff", folders / "model", folders / "stock")
    assert code == 1 and "B is unrelated to A" in out and "made from another" in out
    out = done("diff", folders / "model", folders / "model")
    assert out.startswith("B is A: every weight is equal.\nCertificate"), "no statistics and no table of zeros"
    assert "transport" not in out and "Next: rigpt verify " in out, "there is nothing to carry from a model to itself"


def test_bars_end_full_however_soon_the_work_was_done(rigpt, folders):
    _, _, bars = rigpt("diff", folders / "stock", folders / "disguise")
    for name, count in (("Fingerprint", 2), ("Aligning", 1)):
        ends = [line for line in re.split(r"[\r\n]", bars) if line.startswith(f"{name}: 100%")]
        assert len(ends) >= count, bars


def made(distances, before=1.4, rounding=None):
    """A comparison of models whose layers are so far apart; two parts each, beside a token table."""
    parts = [Part("embed_tokens", 1e-3, before, rounding)]
    for index, distance in enumerate(distances):
        parts += [Part(f"layers.{index}.{kind}", distance, before, rounding) for kind in KINDS]
    total, layers = (Part(name, max(distances), before, rounding) for name in ("all", "layers"))
    return Comparison(
        0.1, [], "relative", total=total, layers=layers, parts=parts, limit=1e-5, precision=["float32"] * 2
    )


@pytest.mark.parametrize(
    ("distances", "largest", "rows"),
    [
        ([1e-6, 9e-6, 1e-7, 0.0], 9e-6, ["layers 0 to 3, self_attn", "layers 0 to 3, mlp"]),
        (
            [1e-3, 1.5e-3, 1.9e-3, 5e-3, 5e-2],
            1.9e-3,
            ["layers 0 to 2, self_attn", "layers 0 to 2, mlp", *(f"layers.{n}.{k}" for n in (3, 4) for k in KINDS)],
        ),
        ([1e-3, 1.1e-3], 1e-3, [f"layers.{n}.{kind}" for n in (0, 1) for kind in KINDS]),
    ],
    ids=["rounding", "one-differs", "few"],
)
def test_layers_that_are_alike_are_one_row(distances, largest, rows):
    found = made(distances)
    shown = in_rows(found.parts, found.limit)
    assert [row.name for row in shown] == ["embed_tokens", *rows] and len(found.parts) == 1 + 2 * len(distances)
    assert shown[1].distance == largest


@pytest.mark.parametrize("rounding", [None, 2e-3])
def test_the_table_of_distances_fits_and_names_what_it_shows(capsys, rounding):
    found = made([1.1e-3] * 29 + [0.9], rounding=rounding)
    show_distances(found, Console(width=80))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 and len(out.splitlines()) < 25
    assert "1e-06 to 1" in out and "logarithmic scale" in out and "--json FILE has every layer" in out
    assert "layers 0 to 28, self_attn" in out and "layers.29.mlp" in out
    assert ("┃ rounding" in out) is (rounding is not None) and "Rounding explains distances up to 1e-05" in out
    assert found.to_dict()["parts"][-1]["name"] == "layers.29.mlp" and len(found.parts) == 61


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fingerprint", "nowhere"), "`SOURCES` must"),
        (("fingerprint", *13 * ["model"]), "`SOURCES` must be at most 12"),
        (("fingerprint", "model", "model", "--output", "x"), "`SOURCES` must be different models"),
        (("fingerprint", "model", "--output", "stock"), "`--output` must"),
        (("identify", "model", "--against", "nowhere"), "`--against` must"),
        (("identify", "model", "--against", "stock"), "must hold fingerprints"),
        (("identify", "model", "--against", "stock", "--nearest", "0"), "`--nearest` must be at least 1"),
        (("diff", "model", "unrelated", "--search", "sometimes"), "`--search` must be one of"),
    ],
    ids=lambda value: "-".join(value)[:60] if isinstance(value, tuple) else "",
)
def test_refusals_are_one_line(rigpt, folders, arguments, message, monkeypatch):
    monkeypatch.chdir(folders)
    before = sorted(folders.iterdir())
    code, _, err = rigpt(*arguments)
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("rigpt: ") and message in last, last
    assert sorted(folders.iterdir()) == before, "something was left behind"


def test_what_identify_and_verify_say_is_in_a_file_too(done, rigpt, folders, tmp_path):
    done("fingerprint", folders / "stock", "--output", tmp_path / "known" / "stock")
    done("identify", folders / "disguise", "--against", tmp_path / "known", "--json", tmp_path / "i.json")
    (one,) = json.loads((tmp_path / "i.json").read_text())["nearest"]
    assert one["verdict"] == "relative" and one["distance"] < 1e-6 and Path(one["file"]).name == "stock"
    done("verify", folders / "stock", folders / "disguise", "--json", tmp_path / "v.json")
    assert json.loads((tmp_path / "v.json").read_text())["passed"] is True
    assert rigpt("verify", folders / "stock", folders / "model", "--json", tmp_path / "v.json", "--force")[0] == 1
    assert json.loads((tmp_path / "v.json").read_text())["passed"] is False
    assert "must not exist" in rigpt("verify", folders / "stock", folders / "model", "--json", tmp_path / "v.json")[2]
