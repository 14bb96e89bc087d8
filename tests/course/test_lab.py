"""`rigpt lab`: pictures that are there, that are not blank, and what it refuses."""

import io
import re
import sys
import types

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from rigpt_hf.checkpoints.written import WRITTEN
from rigpt_hf.lab import chosen_seed, panels, registry, running, show
from rigpt_hf.lab.registry import LABS, Lab, file_names, is_there
from rigpt_hf.lab.running import run_lab
from rigpt_hf.lab.showing import session
from rigpt_hf.pictures import encoded as png


QUICK = "lie-groups"


def drawing(seed: int = 0) -> Figure:
    """A figure that depends on its seed."""
    figure, (panel,) = panels(1, f"Drawn with seed {seed}")
    panel.plot(torch.rand(20, generator=torch.Generator().manual_seed(seed)))
    return figure


@pytest.fixture
def labs(monkeypatch):
    """The registry with one lab that is quick, one whose module is missing, and one that fails."""
    module = types.ModuleType("drawing_for_tests")
    module.__spec__ = types.SimpleNamespace()
    module.drawing = drawing
    module.failing = lambda seed: (_ for _ in ()).throw(ModuleNotFoundError("No module", name="solver"))
    monkeypatch.setitem(sys.modules, "drawing_for_tests", module)
    table = {
        "quick": Lab("A line", function="drawing_for_tests:drawing"),
        "absent": Lab("Another", function="rigpt_hf.flow.no_such_module:plot"),
        "needy": Lab("One more", function="drawing_for_tests:failing"),
    }
    for name in list(LABS):
        monkeypatch.delitem(registry.LABS, name)
    for name, lab in table.items():
        monkeypatch.setitem(registry.LABS, name, lab)


def check_picture(data: bytes) -> None:
    """A picture of some size in which there is something to see."""
    image = matplotlib.image.imread(io.BytesIO(data), format="png")[..., :3]
    assert min(image.shape[:2]) > 200
    assert image.std() > 0.02 and len(np.unique((image * 255).astype(np.uint8).reshape(-1, 3), axis=0)) > 20


def test_a_blank_figure_would_be_noticed():
    with pytest.raises(AssertionError):
        check_picture(png(Figure()))


def test_without_a_name_all_are_listed(rigpt):
    code, out, err = rigpt("lab")
    assert code == 0, err
    for name, lab in LABS.items():
        assert name in out and lab.line.split(":")[0] in out


@pytest.mark.full
def test_a_chapter_becomes_pictures(rigpt, tmp_path):
    code, out, err = rigpt("lab", QUICK, "--output", tmp_path / "pictures", "--seed", 1)
    assert code == 0, err
    paths = sorted((tmp_path / "pictures").iterdir())
    assert [path.name for path in paths] == [WRITTEN, *sorted(file_names(QUICK))] and len(paths) == 4
    for path in paths[1:]:
        assert str(path) in out
        check_picture(path.read_bytes())
    assert "Every bent path is longer than the geodesic" in out
    assert torch.get_default_dtype() == torch.float32, "a chapter must leave the process as it was"


def test_earlier_pictures_are_kept_unless_forced(rigpt, labs, tmp_path):
    command = ("lab", "quick", "--output", tmp_path)
    assert rigpt(*command)[0] == 0
    before = (tmp_path / "quick.png").read_bytes()
    check_picture(before)
    code, _, err = rigpt(*command, "--seed", 1)
    assert code == 2 and "`--output` must not exist yet, got" in err and "`--force`" in err
    assert (tmp_path / "quick.png").read_bytes() == before
    code, out, _ = rigpt(*command, "--seed", 1, "--force")
    assert code == 0 and "Drawn with seed 1" in out
    assert (tmp_path / "quick.png").read_bytes() != before
    assert {path.name for path in tmp_path.iterdir()} == {WRITTEN, "quick.png"}
    (tmp_path / "quick.png").write_text("mine")
    code, _, err = rigpt(*command, "--force")
    assert code == 2 and "`--output` can be replaced only if this program wrote it" in err and "quick.png" in err
    assert (tmp_path / "quick.png").read_text() == "mine"


def test_a_chapter_is_refused_before_it_runs(rigpt, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "run_lab", lambda *args: pytest.fail("it ran"))
    (tmp_path / file_names(QUICK)[-1]).write_bytes(b"mine")
    code, _, err = rigpt("lab", QUICK, "--output", tmp_path)
    assert code == 2 and "must not exist yet" in err
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"mine"]


def test_all_makes_what_it_can_and_says_what_it_could_not(rigpt, labs, tmp_path):
    code, out, _ = rigpt("lab", "all", "--output", tmp_path)
    assert code == 1
    assert {path.name for path in tmp_path.iterdir()} == {WRITTEN, "quick.png"}
    assert "this version has no rigpt_hf.flow.no_such_module:plot" in out
    assert "which needs solver" in out and "Not made: absent, needy." in out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "lie-group",
            r"`NAME` must be a lab, got 'lie-group'. Did you mean 'lie-groups'? `rigpt lab` lists all of them.",
        ),
        ("qqq", "`NAME` must be a lab, got 'qqq'. `rigpt lab` lists all of them."),
    ],
)
def test_an_unknown_name_suggests_the_nearest(rigpt, tmp_path, name, message):
    code, _, err = rigpt("lab", name, "--output", tmp_path)
    assert code == 2 and message in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "message"), [("absent", "this version has no"), ("needy", "which needs solver")])
def test_what_is_missing_is_one_line(rigpt, labs, tmp_path, name, message):
    code, _, err = rigpt("lab", name, "--output", tmp_path)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_output_must_be_a_folder(rigpt, tmp_path):
    (tmp_path / "file").touch()
    code, _, err = rigpt("lab", QUICK, "--output", tmp_path / "file")
    assert code == 2 and "`--output` must be a folder, got the file" in err


@pytest.mark.parametrize("name", [name for name, lab in LABS.items() if is_there(lab)])
def test_names_that_exist_resolve(name):
    lab = LABS[name]
    assert file_names(name) and all(re.fullmatch(r"[\w-]+\.png", file) for file in file_names(name))
    assert bool(lab.chapter) != bool(lab.function)
    if lab.function:
        module, _, function = lab.function.partition(":")
        assert callable(getattr(__import__(module, fromlist=["x"]), function))


def test_seeds_reach_chapters_and_make_the_same_picture_twice(tmp_path, monkeypatch):
    script = tmp_path / "1_short.py"
    script.write_text(
        "import torch\nfrom rigpt_hf.lab import chosen_seed, panels, show\n"
        "torch.set_default_dtype(torch.float64)\nfigure, (panel,) = panels(1, 'x')\n"
        "torch.manual_seed(chosen_seed())\npanel.plot(torch.rand(9))\nprint('text')\n"
        "assert chosen_seed() < 5, 'too large'\nshow(figure, 'one', f'seed {chosen_seed()}')\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(registry, "course_folder", lambda: tmp_path)
    monkeypatch.setitem(registry.LABS, "short", Lab("A line", chapter="1_short"))
    state = torch.random.get_rng_state()
    (first,), (again,), (other,) = (run_lab("short", seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state()) and torch.get_default_dtype() == torch.float32
    assert (first.name, first.seen, other.seen) == ("one", "seed 0", "seed 1")
    assert png(first.figure) == png(again.figure) != png(other.figure)
    with pytest.raises(
        ValueError, match=r"`seed` must be one with which the checks of 'short' hold, got 7: too large"
    ):
        run_lab("short", 7)


def test_two_figures_of_one_name_are_refused(capsys):
    with session(0), pytest.raises(ValueError, match="`name` must be new in its chapter, got 'a' twice"):
        show(drawing(), "a", "x")
        show(drawing(), "a", "y")
    show(drawing(), "a", "what is seen")
    assert capsys.readouterr().out == "[a] what is seen\n"
    assert chosen_seed() == 0 and chosen_seed(3) == 3
