"""`rigpt canonicalize`, `diff`, `merge` and `charges`: what they print, what they write, and what they refuse."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from rigpt_hf import symmetry as symmetries
from rigpt_hf.checkpoints.named import load_rigpt
from rigpt_hf.checkpoints.weights import StoredWeights
from rigpt_hf.checkpoints.written import WRITTEN, foreign, record_of
from rigpt_hf.pictures import symmetry as pictures
from rigpt_hf.symmetry import GaugeTransformation, gauge_distance
from rigpt_hf.text import tokenizer
from tests.cli.conftest import in_one_line
from tests.conversion.sources import stock_model
from tests.devices import StandIn
from tests.models import SYMMETRIES, tiny_model
from tests.tolerances import SYMMETRY


OPTIONS = SYMMETRIES["learned-projected"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, its disguise in bfloat16, an unrelated one, and one of another shape."""
    root = tmp_path_factory.mktemp("models")
    model = tiny_model(dtype=torch.float32, **OPTIONS)
    g = GaugeTransformation.random(model.config, torch.Generator().manual_seed(1), "all")
    models = {
        "model": model,
        "disguise": g(model).to(torch.bfloat16),
        "unrelated": tiny_model(seed=7, dtype=torch.float32, **OPTIONS),
        "wider": tiny_model(dtype=torch.float32, **OPTIONS, intermediate_size=40),
    }
    for name, each in models.items():
        each.save_pretrained(root / name)
    stock_model("gpt2").save_pretrained(root / "stock")
    (root / "text.txt").write_text("no tokenizer here")
    (root / "nothing.png").symlink_to("nothing")
    return root


def check_equal(a, b):
    """Two folders hold the same weights up to rounding."""
    first, second = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in (a, b))
    for x, y in zip(first.parameters(), second.parameters(), strict=True):
        assert (x - y).abs().max() <= SYMMETRY[torch.float32] * x.abs().max()


def test_canonical_forms_of_one_orbit_are_one_model(rigpt, done, folders, tmp_path):
    saved, wide = tmp_path / "g.safetensors", ("--dtype", "float64")
    for command in (
        ("rotate", folders / "model", tmp_path / "turned", "--frames", "all", *wide),
        ("canonicalize", tmp_path / "turned", tmp_path / "a", *wide),
        ("canonicalize", folders / "model", tmp_path / "b", "--save-transformation", saved, *wide),
        ("rotate", tmp_path / "b", tmp_path / "back", "--transformation", saved, "--inverse"),
    ):
        out = done(*command)
        assert "equal up to rounding" in out
        assert ("smallest gap" in out and "stream" in out) is (command[0] == "canonicalize")
    check_equal(tmp_path / "a", tmp_path / "b")
    assert "B is A: every weight is equal up to rounding." in done("diff", tmp_path / "a", tmp_path / "b")
    check_equal(folders / "model", tmp_path / "back")
    code, _, err = rigpt("canonicalize", folders / "model", tmp_path / "b", "--save-transformation", saved)
    assert code == 2 and "must be empty or absent" in err and "--force" in err


def test_diff_recognises_a_disguise(done, folders, tmp_path):
    places = ("--picture", tmp_path / "d.png", "--json", tmp_path / "d.json", "--save-transformation", tmp_path / "g")
    out = done("diff", folders / "model", folders / "disguise", *places)
    assert "B is A in disguise" in out and "layers 0 to 2, self_attn" in out and "float32 and bfloat16" in out
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")
    facts = json.loads((tmp_path / "d.json").read_text())
    assert facts["verdict"] == "disguise" and len(facts["parts"]) >= 8
    assert sorted(path.name for path in tmp_path.iterdir()) == [WRITTEN, "d.json", "d.png", "g"]
    done("rotate", folders / "model", tmp_path / "as-b", "--transformation", tmp_path / "g")
    aligned = AutoModelForCausalLM.from_pretrained(tmp_path / "as-b")
    disguise = AutoModelForCausalLM.from_pretrained(folders / "disguise", dtype=torch.float32)
    for a, b in zip(aligned.parameters(), disguise.parameters(), strict=True):
        assert (a - b).norm() < 0.02 * b.norm(), "not within the rounding of bfloat16"


def test_diff_searches_where_it_is_told(done, folders):
    command = ("diff", folders / "model", folders / "disguise", "--device")
    with StandIn() as device:
        out = done(*command, "cpu")
        assert not device.seen
        assert done(*command, "cuda") == out
    assert device.seen["matmul"] > 20


def test_a_device_without_float64_is_refused(rigpt, folders, monkeypatch):
    def empty(*size, device, dtype):
        raise TypeError(f"Cannot convert a {device} Tensor to {dtype}")

    monkeypatch.setattr(torch, "empty", empty)
    result = rigpt("diff", folders / "model", folders / "disguise", "--device", "mps")
    assert "`--device` must be one that PyTorch can use here" in in_one_line(result)


def test_diff_tells_the_unrelated_by_its_exit_code(rigpt, folders):
    code, out, _ = rigpt("diff", folders / "model", folders / "unrelated")
    assert code == 1 and "unrelated" in out
    code, out, _ = rigpt("diff", folders / "model", folders / "model")
    assert code == 0 and "every weight is equal" in out


def test_distances_of_balanced_weights_that_grew_are_explained(rigpt, folders, monkeypatch):
    models = (load_rigpt(str(folders / name)) for name in ("model", "unrelated"))
    found = symmetries.compare(*models, search="always")
    monkeypatch.setattr(symmetries, "compare", lambda *models, **options: found)
    for before, explained in ((0.5 * found.layers.distance, True), (2 * found.layers.distance, False)):
        found.layers.before = before
        _, out, _ = rigpt("diff", folders / "model", folders / "unrelated")
        assert ("Aligned distances are larger here" in out) is explained and "all layers" in out


@pytest.mark.full
def test_files_of_one_verb_appear_together_or_not_at_all(rigpt, folders, tmp_path, monkeypatch):
    """Also where a file of somebody else has appeared when the first of them has its name already."""
    plot, said = pictures.plot_comparison, tmp_path / "said.json"

    def appear(*arguments):
        said.write_text("theirs")
        return plot(*arguments)

    files = ("--json", said, "--picture", tmp_path / "p.png", "--save-transformation", tmp_path / "g.safetensors")
    with monkeypatch.context() as patched:
        patched.setattr(pictures, "plot_comparison", appear)
        code, _, err = rigpt("diff", folders / "model", folders / "disguise", *files)
    assert code == 2 and "`--json` must stay as it is while this runs" in err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"said.json": "theirs"}
    said.unlink()
    assert rigpt("diff", folders / "model", folders / "disguise", *files)[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {WRITTEN, "said.json", "p.png", "g.safetensors"}
    assert foreign(tmp_path) == []


def test_force_replaces_only_files_that_were_written_here(rigpt, folders, tmp_path):
    """Also of two files; the one that cannot be replaced is named, and the other is left."""
    files = {"json": tmp_path / "d.json", "save-transformation": tmp_path / "g"}
    command = ("diff", folders / "model", folders / "disguise")
    given = [word for name, path in files.items() for word in (f"--{name}", path)]
    assert rigpt(*command, *given)[0] == 0 and rigpt(*command, *given, "--force")[0] == 0
    assert foreign(tmp_path) == [] and set(record_of(tmp_path).files) == {"d.json", "g"}
    for name, path in files.items():
        path.write_text("mine")
        before = {file: file.read_bytes() for file in tmp_path.iterdir()}
        code, _, err = rigpt(*command, *given, "--force")
        assert code == 2 and f"`--{name}` can be replaced only if this program wrote it and" in err, err
        assert f"got {str(path)!r}. Move or remove it yourself" in err
        assert before == {file: file.read_bytes() for file in tmp_path.iterdir()}
        path.unlink()
        assert rigpt(*command, *given, "--force")[0] == 0


def test_the_path_of_a_merge_is_by_the_share_of_the_first(done, folders, tmp_path, monkeypatch):
    """Losses of the two ends are those of the models, in merge.json and in the picture."""
    drawn, plot = [], pictures.plot_paths
    monkeypatch.setattr(pictures, "plot_paths", lambda *args, **named: drawn.append(plot(*args, **named)) or drawn[0])
    monkeypatch.setattr(tokenizer, "text_ids", lambda source, path: torch.arange(40).view(2, 20))
    measured = ("--text", folders / "text.txt", "--picture", tmp_path / "p.png", "--points", 3)
    done("merge", folders / "model", folders / "unrelated", tmp_path / "m", "--unaligned", *measured)
    said = json.loads((tmp_path / "m/merge.json").read_text())["loss"]
    first, second = said["sources"]
    assert abs(first - second) > 0.01, "two models that differ"
    assert said["t"] == [0, 0.5, 1] and said["before"][::2] == pytest.approx([second, first], rel=1e-5)
    assert said["after"][::2] == pytest.approx([second, first], rel=1e-5)
    (panel,) = drawn[0].axes
    assert panel.get_xlabel() == "share of the model on the right" and len(panel.lines) == 2
    ends = [label.get_text() for label in panel.get_xticklabels()]
    assert ends[0].startswith("0\n") and ends[0].endswith("unrelated")
    assert ends[-1].startswith("1\n") and ends[-1].endswith("model")
    for line in panel.lines:
        assert line.get_ydata()[-1] == pytest.approx(first, rel=1e-5)


@pytest.mark.full
def test_an_alignment_is_learned_on_the_text_but_for_its_end(done, folders, tmp_path, monkeypatch):
    """The losses are those of the text's end, the path has a third line, and what was learned is the merged model."""
    drawn, plot, asked = [], pictures.plot_paths, []
    monkeypatch.setattr(pictures, "plot_paths", lambda *args, **named: drawn.append(plot(*args, **named)) or drawn[0])
    row = torch.randint(40, (3000,), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(tokenizer, "text_row", lambda source, path, length: asked.append(length) or row)
    learned_on, find = [], symmetries.find_learned_alignment
    monkeypatch.setattr(
        symmetries,
        "find_learned_alignment",
        lambda a, b, learning, **settings: learned_on.append(learning) or find(a, b, learning, **settings),
    )
    command = "merge", folders / "model", folders / "unrelated"
    measured = ("--text", folders / "text.txt", "--points", 3)
    done(*command, tmp_path / "plain", *measured[:2], "--learn", 1, "--points", 2)
    said = done(*command, tmp_path / "m", *measured, "--learn", 4, "--picture", tmp_path / "p.png")
    facts = json.loads((tmp_path / "m/merge.json").read_text())
    assert (
        facts["learned_steps"] == 4 and facts["aligned"] and f"{facts['loss']['barrier_learned']:.4f} learned" in said
    )
    assert "merged, fitted to this text" in said and "only another text says which is better" in " ".join(said.split())
    first, second = facts["loss"]["sources"]
    assert facts["loss"]["learned"][::2] == pytest.approx([second, first], rel=1e-5)
    assert facts["loss"]["learned"][1] == pytest.approx(facts["loss"]["merged"], rel=1e-5)
    assert abs(facts["loss"]["after"][1] - facts["loss"]["merged"]) > 1e-5, "nothing was learned"
    (panel,) = drawn[0].axes
    assert len(panel.lines) == 3
    learning = learned_on[-1]
    seen = torch.cat([batch.flatten() for batch in learning.batches])
    context = learning.batches[0].shape[1]
    assert learning.steps == 4 and asked[-1] == 4 * 16 * context
    assert context <= len(row) - len(seen) and len(seen) > 0.8 * len(row)
    held_out = row[-4 * context :].view(-1, context)
    windows = seen.view(-1, context)
    assert not (windows[:, None] == held_out[None]).all(-1).any(), "the end of the text was learned on"


@pytest.mark.full
def test_numbers_that_leave_the_range_are_said_to_be_of_the_model(rigpt, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "text_ids", lambda source, path: torch.arange(40).view(2, 20))
    model, source, text = tiny_model(dtype=torch.float32, **OPTIONS), tmp_path / "model", tmp_path / "text.txt"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter[0] *= 1e30
    model.save_pretrained(source)
    text.touch()
    merge = "merge", source, source, tmp_path / "out", "--text", text
    for command, message in (
        (merge, "`SOURCES` must give weights that are finite"),
        ((*merge, "--unaligned"), "`SOURCES` must give finite losses on the text"),
        (("canonicalize", source, tmp_path / "out"), "`SOURCE` must "),
        (("rotate", source, tmp_path / "out"), "`SOURCE` must "),
        (("verify", source, source), "`A` must "),
    ):
        code, _, err = rigpt(*command)
        assert code == 2 and message in err and ("range" in err or "damaged" in err), err
        assert not (tmp_path / "out").exists()


def test_merging_a_model_with_its_disguise_gives_it_back(done, folders, tmp_path):
    pair = folders / "model", folders / "disguise"
    done("merge", *pair, tmp_path / "m", "--weights", "0.75,0.25")
    done("merge", *pair, tmp_path / "n", "--as-they-are", "--method", "spherical")
    model, merged, plain = (
        AutoModelForCausalLM.from_pretrained(path) for path in (pair[0], tmp_path / "m", tmp_path / "n")
    )
    assert gauge_distance(merged, model) < 0.002
    assert gauge_distance(plain, model) > 0.1, "merging without alignment did no harm, so the test shows nothing"
    facts = json.loads((tmp_path / "m" / "merge.json").read_text())
    assert facts["weights"] == [0.75, 0.25] and facts["aligned"] and facts["method"] == "linear"


def test_models_of_other_options_are_named_before_they_are_read(rigpt, folders, tmp_path, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(folders / "model", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    monkeypatch.delattr(StoredWeights, "_get")
    line = in_one_line(rigpt("merge", folders / "model", folders / "disguise", other, tmp_path / "new"))
    named = f"got {config['hidden_act']!r} in {str(folders / 'model')!r} and 'relu' in {str(other)!r}. Under another"
    assert f"all of `SOURCES` must have the same `hidden_act`, {named}" in line, line
    assert not (tmp_path / "new").exists()


def test_charges_are_listed_and_measured(done, folders, tmp_path):
    out = done("charges", folders / "model")
    for expected in ("lexical", "layers.2.head_qk", "layers.0.key_shift"):
        assert expected in out
    settings = ("--measure", "--time", "0.1", "--weight-decay", "0.5", "--picture", tmp_path / "c.svg")
    out = done("charges", folders / "model", *settings, "--json", tmp_path / "charges.json")
    facts = json.loads((tmp_path / "charges.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert len(facts["drift"]["descents"]) == 3 and "head_qk" in facts["drift"]["orders"]
    assert "layers.2.head_qk" in facts["charges"] and any(one["norm"] > 0 for one in facts["charges"].values())
    assert "order" in out and "decay" in out and "nan" not in out
    assert "<svg" in (tmp_path / "c.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("merge", "model", "wider", "new"), "`intermediate_size`"),
        (("merge", "model", "new"), "`SOURCES` must be at least two"),
        (("merge", "model", "unrelated", "new", "--weights", "1,1"), "sum to 1"),
        (("merge", "model", "unrelated", "new", "--weights", "a,b"), "`--weights` must be numbers"),
        (("merge", "model", "unrelated", "new", "--method", "cubic"), "`--method` must be one of"),
        (("merge", "model", "unrelated", "new", "--picture", "p.png"), "Add `--text FILE`"),
        (("merge", "model", "unrelated", "new", "--learn", "9"), "`--learn` needs a text to learn on, got 9"),
        (
            ("merge", "model", "unrelated", "new", "--learn", "0", "--text", "text.txt"),
            "must be a number of steps, at least 1, got 0",
        ),
        (("merge", "model", "unrelated", "model"), "`OUTPUT` must not replace what is read, got"),
        (("charges", "model", "--picture", "p.png"), "without `--measure`"),
        (("charges", "model", "--measure", "--picture", "p.bmp"), "must end in one of"),
        (("diff", "model", "unrelated", "--picture", "text.txt"), "must not exist yet"),
        (("charges", "model", "--measure", "--picture", "nothing.png"), "`--picture` must not exist yet, got"),
        (("diff", "model", "unrelated", "--json", "stock"), "must be a file, got the folder"),
        (("diff", "model", "unrelated", "--json", "model"), "`--json` must not replace what is read"),
        (
            ("diff", "model", "unrelated", "--json", "model/config.json", "--force"),
            "`--json` must not replace what is",
        ),
        (("diff", "model", "unrelated", "--json", "x", "--picture", "./x"), "must not lie in each other"),
        (
            ("merge", "model", "unrelated", "new", "--text", "text.txt", "--picture", "text.txt"),
            "not replace what",
        ),
        (("charges", "model", "--measure", "--learning-rates", "fast"), "`--learning-rates` must be numbers"),
        (("charges", "model", "--measure", "--time", "nan"), "`--time` must be positive and finite"),
        (
            ("charges", "model", "--measure", "--learning-rates", "inf"),
            "`--learning-rates` must be one or more",
        ),
        (("charges", "model", "--measure", "--weight-decay", "-1"), "`--weight-decay` must not be negative"),
        (("charges", "model", "--measure", "--text", "text.txt"), "`--text` needs a tokenizer"),
        (("charges", "model", "--text", "text.txt"), "`--measure` descends on"),
        (("merge", "model", "unrelated", "new", "--points", "1"), "`--points` must be at least 2"),
        (
            ("diff", "model", "disguise", "--json", "text.txt/d.json"),
            "`--json` must be a name in a folder",
        ),
        (("canonicalize", "nowhere", "new"), "`SOURCE` must be"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_refusals_are_one_line(rigpt, folders, arguments, message, monkeypatch):
    monkeypatch.chdir(folders)
    before = sorted(folders.iterdir())
    code, _, err = rigpt(*arguments)
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("rigpt: ") and message in last
    assert sorted(folders.iterdir()) == before, "something was left behind"
