"""One bad input of each kind of `make fuzz`, or forty; and what the judge must not let pass."""

import pytest

from tests.fuzz import calls, files, judge, models  # noqa: F401  they register their kinds
from tests.fuzz.cases import KINDS, Case, lay_out, make
from tests.fuzz.world import COMMANDS, MODULES, build


SEED, FIRST = 1, 40
QUICK = ("rotate", "card", "prepare", "finetune")


# The first cases are of all kinds, and the others where tests marked `full` run.
@pytest.mark.parametrize(
    "index", [pytest.param(index, marks=[pytest.mark.full] * (index >= len(KINDS))) for index in range(FIRST)]
)
@pytest.mark.by_default(8)
def test_bad_input_is_answered_in_one_line_and_changes_nothing(index, tmp_path):
    case = make(SEED, index, tmp_path / "root/work", build())
    verdict = judge.judge(case, tmp_path / "root")
    assert verdict["outcome"] in ("refused", "accepted"), verdict
    assert verdict["why"]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in COMMANDS]
)
def test_good_input_is_taken(name, tmp_path, monkeypatch):
    """Else every bad input that is made of it would be refused for another reason."""
    monkeypatch.setattr(judge, "LIMIT", 600)  # bad input is to be answered sooner than good one
    lay_out(tmp_path / "root/work", build())
    verdict = judge.judge(Case(name, "nothing", "it is good"), tmp_path / "root")
    assert (verdict["outcome"], verdict["why"]) == ("accepted", "it is good"), verdict
    assert verdict["code"] == 0 or name in ("diff", "verify"), verdict


def test_the_first_cases_are_of_all_kinds_and_the_same_each_time(tmp_path):
    assert len(KINDS) <= FIRST
    drawn = [make(SEED, index, tmp_path / str(index), build()) for index in range(len(KINDS))]
    assert [case.kind for case in drawn] == list(KINDS)
    for name in ("a", "b"):
        assert make(SEED, 1, tmp_path / name, build()) == drawn[1]


# What a program does, and what the judge says of it.
CONTROLS = {
    "print('wrong.py: `SOURCE` must be a model.', file=sys.stderr); sys.exit(2)": "refused",
    "raise ValueError('no')": "a traceback",
    "print('wrong.py: one\\ntwo', file=sys.stderr); sys.exit(2)": "2 lines on standard error",
    "print('no', file=sys.stderr); sys.exit(2)": "does not begin with the name of the program",
    "print('wrong.py: KeyError: 3', file=sys.stderr); sys.exit(2)": "not our words: KeyError",
    "print('wrong.py: no' * 900, file=sys.stderr); sys.exit(2)": "10800 characters",
    "sys.exit(3)": "exit code 3",
    "pass": "bad input is taken",
    "open('left', 'w'); print('wrong.py: no', file=sys.stderr); sys.exit(2)": "left behind: work/left",
    "os.remove('mine/thesis.txt'); sys.exit(2)": "changed or gone: work/mine/thesis.txt",
    "open('in/text.txt', 'a').write('more'); sys.exit(2)": "changed or gone: work/in/text.txt",
    "open('canary', 'w'); sys.exit(2)": "foreign code was run",
    "print(os.environ['HF_TOKEN']); sys.exit(2)": "the token is shown",
    "import time; time.sleep(60)": "no answer after 2 s",
}


def test_the_judge_sees_what_is_wrong(tmp_path, monkeypatch):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/wrong.py").write_text("import os, sys\nexec(sys.argv[1])\n")
    monkeypatch.setitem(judge.ENVIRONMENT, "PYTHONPATH", str(tmp_path / "modules"))
    monkeypatch.setitem(MODULES, "wrong.py", "wrong")
    monkeypatch.setattr(judge, "LIMIT", 2)
    for number, (does, expected) in enumerate(CONTROLS.items()):
        root = tmp_path / str(number)
        make(SEED, 0, root / "work", build())
        verdict = judge.judge(Case("info", "a control", words=["wrong.py", does]), root)
        assert (verdict["outcome"] == expected) or verdict["why"].startswith(expected), (does, verdict)
