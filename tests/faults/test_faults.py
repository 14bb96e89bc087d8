"""The tool that makes faults: a statement is found by its meaning, changed, and changed back."""

import pytest

from tests.faults.mutation import NowhereError, applied, statements, variants


SOURCE = '''"""Toy."""


class Counter:
    def add(self, numbers, start=1):  # the sum ...
        total = start  # of ε
        for number in numbers:
            if number > 0: total += number
            elif number is None:
                raise ValueError("no " + "number")
        return total
'''
MOVED = SOURCE.replace("class Counter:\n", "# moved\nclass Other:\n").replace(
    "total = start  # of ε", "total  =  (start)"
)
FAULT = {"file": "toy.py", "function": "Counter.add"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("total += number", "total -= number"),
        ("if number > 0:", "if number >= 0:"),
        ("if number is None:", "if number is not None:"),
        ("def add(self, numbers, start=1):", "def add(self, numbers, start=2):"),
    ],
)
def test_a_drawn_fault_is_made_and_undone_also_after_code_moved(old, new):
    drawn = {(found.scope, found.text): [text for _, text in variants(found)] for found in statements(SOURCE)}
    assert new in drawn["Counter.add", old]
    fault = FAULT | {"old": old, "new": new}
    for sources in ({"toy.py": SOURCE}, {"other.py": "def total():\n    pass\n", "house/new.py": MOVED}):
        path, changed = applied(sources, fault)
        assert changed != sources[path]
        undone = applied({path: changed}, fault | {"file": path, "old": new, "new": old})
        assert undone[0] == path and len(undone[1].splitlines()) == len(sources[path].splitlines())
        assert [found.text for found in statements(undone[1])] == [found.text for found in statements(sources[path])]


def test_what_raises_is_not_touched():
    assert all("raise" not in found.text for found in statements(SOURCE) if list(variants(found)))


def test_a_statement_that_stands_nowhere_or_twice_is_reported_and_can_be_stated_again():
    fault = FAULT | {"old": "total *= number", "new": "pass"}
    with pytest.raises(NowhereError, match="`total .= number` of `Counter.add` .*add the same meaning"):
        applied({"toy.py": SOURCE}, fault)
    with pytest.raises(NowhereError, match="more places than one"):
        applied({"a.py": SOURCE, "b.py": SOURCE}, FAULT | {"old": "total = start", "new": "pass"})
    again = {"file": "toy.py", "function": "Counter.add", "old": "return total", "new": "return -total"}
    assert "return -total" in applied({"toy.py": SOURCE}, fault | {"again": [again]})[1]
