"""Signals while a program is still importing its libraries."""

import os
import signal
import subprocess
import sys

import pytest

from tests.processes import ROOT


@pytest.mark.parametrize("module", ["evaluation.experiments.symmetry.words", "rigpt_hf.evaluation.speed"])
@pytest.mark.parametrize(
    ("number", "said"), [(signal.SIGINT, "stopped from the keyboard."), (signal.SIGTERM, "stopped by SIGTERM.")]
)
def test_a_stop_while_a_program_imports_is_one_line(module, number, said, tmp_path):
    (tmp_path / "torch.py").write_text("import time; print('importing', flush=True); time.sleep(60)")
    (tmp_path / "numpy.py").write_text("import torch")
    command = [sys.executable, "-m", module, "--output", str(tmp_path / "out.json")]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell's background jobs, such as these tests may be, ignore the keyboard, and their children do.
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, env=environment, cwd=tmp_path, **pipes) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert error == f"python -m {module}: {said}\n" and process.returncode == 128 + number
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"torch.py", "numpy.py"}
