"""The launcher that other tests trust: children start fresh, and their failures are seen."""

import time

import pytest

from tests.processes import run, together


def fail_alone(rank: int, failing: int):
    if rank == failing:
        raise RuntimeError(f"rank {rank} fails")
    time.sleep(60)


def test_children_have_libraries_and_nothing_of_ours(tmp_path):
    script = (
        "import os, sys; print(sys.argv[1:], os.getcwd(), os.environ['COLOUR'], 'torch' in sys.modules, end=' ')\n"
    )
    script += "print([name for name in sys.modules if name.partition('.')[0] in ('rigpt_hf', 'tests', 'pytest')])"
    done = run("-c", script, "a b", 7, cwd=tmp_path, COLOUR="red")
    assert done.returncode == 0 and done.stdout == f"['a b', '7'] {tmp_path} red True []\n", done
    assert run("-c", script).returncode == 1, "the environment of one child is not that of the next"


def test_statuses_are_those_of_processes():
    for script, status in (("1", 0), ("raise SystemExit(7)", 7), ("1 / 0", 1), ("raise SystemExit('no')", 1)):
        assert run("-c", script).returncode == status, script
    assert run("-c", "import os; os.kill(os.getpid(), 9)").returncode == -9
    assert run("-c", "import time; time.sleep(60)", timeout=1).returncode == -9
    done = run("-c", "import atexit; atexit.register(print, 'bye'); print('hello')")
    assert done.stdout == "hello\nbye\n"


def test_the_first_that_fails_ends_the_others():
    before = time.monotonic()
    with pytest.raises(AssertionError, match="rank 1 fails"):
        together(fail_alone, 1)
    assert time.monotonic() - before < 40
