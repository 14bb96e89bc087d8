"""The demo of a symmetry, small: three learners, what they answer, and a page that says so."""

import io

import pytest
from rich.console import Console

from rigpt_hf.demo import symmetry
from rigpt_hf.demo.options import DemoOptions
from rigpt_hf.demo.scan import grammar
from rigpt_hf.pictures.style import STYLE


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    options = DemoOptions("symmetry", output=folder / "out", steps=12)
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STYLE, "figure.dpi", 30)
        patch.setattr(symmetry, "LONGEST", 5)
        patch.setattr(symmetry, "SHAPE", (32, 2, 2))
        patch.setattr(symmetry, "SHOWN", ("jump twice", "walk and run"))
        report = symmetry.run_symmetry_demo(options, Console(file=output, width=150))
    return report, output.getvalue()


@pytest.mark.full
def test_the_page_says_what_was_measured(shown):
    report, output = shown
    page = report.read_text()
    assert (report.parent / "add-jump.png").read_bytes().startswith(b"\x89PNG")
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| ")]
    table = {cells[0].strip(): cells[1:] for cells in rows if cells[0].strip() in symmetry.LEARNERS}
    assert list(table) == list(symmetry.LEARNERS)
    errors = {name: float(cells[-1]) for name, cells in table.items()}
    assert errors[symmetry.SYMMETRIC] < 1e-3 < 0.05 < min(errors[symmetry.STOCK], errors[symmetry.FREE])
    sizes = {name: int(cells[0].replace(",", "")) for name, cells in table.items()}
    assert sizes[symmetry.SYMMETRIC] < sizes[symmetry.FREE] / 2
    for command in ("jump twice", "walk and run"):
        assert f"\n{command}\n" in output and page.count(f"| {command} |") == len(table)


@pytest.mark.full
def test_an_answer_is_what_a_model_generates(monkeypatch):
    commands = symmetry.Commands("add-jump", 5)
    options = DemoOptions("symmetry", steps=240)
    monkeypatch.setattr(symmetry, "SHOWN", ("walk", "jump twice", "walk and run", "look left"))
    monkeypatch.setattr(symmetry, "SHAPE", (32, 2, 2))
    found = symmetry.learn(symmetry.SYMMETRIC, commands, options, lambda step: None)
    said = dict(zip(symmetry.SHOWN, found.answers, strict=True))
    right = [said[one] == symmetry.meaning(one) for one in said]
    assert said["walk"] == "WALK" and sum(right) >= 2
    assert found.jump > 0.2 and len(found.curve) == symmetry.MEASUREMENTS and found.curve[-1][0] == 240
    assert all(symmetry.meaning(" ".join(one.command)) == " ".join(one.actions) for one in grammar()[:50])


@pytest.mark.parametrize("name, value", [("model", "gpt2"), ("points", 3), ("megabytes", 1.0), ("prompt", "A")])
def test_options_of_the_other_demo_refuse(name, value):
    with pytest.raises(ValueError, match=f"`{name}` is an option of the demo `rotation`"):
        DemoOptions("symmetry", **{name: value})
    assert DemoOptions("rotation", **{name: value})
