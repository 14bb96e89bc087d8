"""The style of all pictures, and files that appear whole or not at all."""

import matplotlib as mpl
import pytest

from rigpt_hf.checkpoints.written import WRITTEN
from rigpt_hf.pictures import COLOURS, encoded, figure, picture, save, style


@picture
def line(title: str = "A line"):
    made, (panel, _) = figure(2, title=title, width=3, height=2)
    panel.plot([1, 2], [2, 1], label="falls")
    panel.legend()
    return made


def test_pictures_look_the_same_whatever_the_settings_of_the_user():
    expected, other = encoded(line()), encoded(line("Another"))
    with mpl.rc_context({"axes.spines.top": True, "legend.fontsize": 30, "figure.dpi": 40, "axes.facecolor": "red"}):
        drawn = line()
        assert mpl.rcParams["legend.fontsize"] == 30, "the settings are the user's again"
    (panel, _) = drawn.axes
    assert drawn.dpi == style.STYLE["figure.dpi"] and not panel.spines["top"].get_visible()
    assert panel.get_lines()[0].get_color() == COLOURS[0] and not panel.get_legend().get_frame_on()
    assert encoded(drawn) == expected != other
    assert encoded(line(), "svg") == encoded(line(), "svg")


@pytest.mark.parametrize(
    ("name", "start"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF"), ("a", b"\x89PNG")]
)
@pytest.mark.by_default(2)
def test_the_format_is_that_of_the_name(name, start, tmp_path):
    assert save(line(), tmp_path / name).read_bytes().startswith(start)
    assert save(line(), tmp_path / "b", "svg").read_bytes().startswith(b"<?xml")
    assert {path.name for path in tmp_path.iterdir()} == {name, "b", WRITTEN}


def test_a_link_stays(tmp_path):
    (tmp_path / "link.png").symlink_to(save(line(), tmp_path / "a.png"))
    before = (tmp_path / "a.png").stat().st_mtime_ns
    with pytest.raises(ValueError, match="`path` must be a file itself to be replaced, got .*link.png', a link to"):
        save(line("Another"), tmp_path / "link.png")
    assert (tmp_path / "link.png").is_symlink() and (tmp_path / "a.png").stat().st_mtime_ns == before


def test_a_picture_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch):
    path = save(line(), tmp_path / "a.png")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not supported"):
        save(line("Another"), path, "no-format")
    assert path.read_bytes() == before and {path.name for path in tmp_path.iterdir()} == {"a.png", WRITTEN}
    assert save(line("Another"), path).read_bytes() != before


def test_panels_are_counted_along_the_rows():
    _, panels = figure(2, 2, solid=(1,), sharex=False)
    assert [hasattr(panel, "zaxis") for panel in panels] == [False, True, False, False]
    assert [panel.get_subplotspec().num1 for panel in panels] == [0, 1, 2, 3]
