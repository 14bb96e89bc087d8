"""`rigpt evaluate` as a person runs it: one process, several, and a page in a real browser."""

import errno
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rigpt_hf.cli import app
from rigpt_hf.command_line import execute
from tests.processes import run


SUITE = """
text: {{source: {source}, documents: 10, window: 33}}
tasks:
  - {{metric: perplexity, arguments: {{context: 32}}}}
  - {{metric: outliers, arguments: {{context: 32}}}}
  - {{metric: throughput, arguments: {{prompt: 8, new_tokens: 4, turns: 3, memory: false}}}}
"""


@pytest.fixture(scope="module")
def models(world, tmp_path_factory):
    """The models of `world`, with a suite of their own."""
    folder = shutil.copytree(world, tmp_path_factory.mktemp("models"), dirs_exist_ok=True)
    (folder / "suite.yaml").write_text(SUITE.format(source=folder / "tokens.bin"))
    return folder


def command(models, output):
    named = [str(models / "rigpt"), "--against", str(models / "gpt2"), "--names", "RiGPT,GPT-2", "--device", "cpu"]
    return ["evaluate", *named, "--suite", str(models / "suite.yaml"), "--output", str(output)]


def test_the_command(models, tmp_path):
    result = CliRunner().invoke(app, command(models, tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert "report.html" in result.output
    assert (tmp_path / "out/report.html").stat().st_size > 10_000


def test_standard_output_has_results_alone(models, tmp_path):
    """In a file there is no progress at all; a terminal has it on standard error."""
    done = run("-m", "rigpt_hf.cli", *command(models, tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout and "━" not in done.stdout and "measuring" not in done.stdout + done.stderr


def test_a_failed_measurement_shows_in_the_exit_code(models, tmp_path):
    suite = tmp_path / "suite.yaml"
    first = (models / "suite.yaml").read_text().partition("  - {metric: outliers")[0]
    suite.write_text(first.replace("context: 32", "context: 0"))
    arguments = command(models, tmp_path / "out")
    arguments[arguments.index("--suite") + 1] = str(suite)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    line = re.sub(r"\s+", " ", result.output)
    assert "perplexity, RiGPT: `context` must be at least 1, got 0." in line


def test_refusals(models, tmp_path):
    for change, message in (
        (("--names", "one"), "`--names` must be two names with a comma, got 'one'"),
        (("--names", "a,a"), "`--names` must differ, got 'a' twice"),
        (("--device", "nowhere"), "`--device` must be one that PyTorch can use here"),
        (
            ("--device", "meta"),
            "`--device` must be one that PyTorch can use here, such as cpu, got 'meta': it holds no",
        ),
        (("--fewshot", "3"), "`--fewshot` is for `--standard-tasks`, got 3 and no such task"),
        (("--dtype", "int3"), "`--dtype` must be one of"),
        (("--suite", "none.yaml"), "`--suite` must be one of core, full or a YAML file"),
        (("--text", "/no/such/file.bin"), "`--text` must be a file of token ids"),
        (("--against", "/no/such/model"), "`--against` must be the folder of a saved model or the id"),
    ):
        result = CliRunner().invoke(app, [*command(models, tmp_path / "out"), *change])
        assert isinstance(result.exception, ValueError) and message in str(result.exception)
        assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_line_that_names_the_file(models, tmp_path, monkeypatch, capsys):
    """Where a result is kept, and at the end: nothing but whole files is left, and the next run has all."""
    write = Path.write_text
    for index, last in enumerate((".json.", ".results.json.", ".report.html.")):

        def full(path, *arguments, last=last, **options):
            if last in path.name:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(path, *arguments, **options)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "write_text", full)
            assert execute(app, "rigpt", command(models, tmp_path / "out")) == 2
        (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rigpt: ")]
        assert f"must be on a disk that has room for it, got '{tmp_path / 'out'}/" in said
        assert said.endswith(
            "No space left on device. Free space, or name another place; what was being written was taken away."
        )
        assert index == 0 or f"/out/{last.strip('.')}'" in said
        assert not list(tmp_path.rglob("*.partial"))
    assert execute(app, "rigpt", command(models, tmp_path / "out")) == 0


@pytest.mark.slow
def test_two_processes_find_what_one_finds(models, tmp_path):
    outputs = {}
    for world, name in ((1, "one"), (2, "two")):
        outputs[name] = tmp_path / name
        done = run("-m", "rigpt_hf.cli", *command(models, outputs[name]), world=world, ACCELERATE_USE_CPU="true")
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((folder / "results.json").read_text()) for folder in outputs.values())
    for a, b in zip(one["tasks"][:2], two["tasks"][:2], strict=True):
        assert a == b
    assert not any(task["errors"] for task in two["tasks"])
    assert len(list((tmp_path / "two/cache").iterdir())) == 5


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no headless browser on this machine")
def test_the_report_in_a_browser(evaluation, tmp_path):
    """
    What the browser makes of the page, in a wide and a narrow window: every picture fills the column or is scrolled in
    it, nothing stands out of the page, and nothing was asked of a network.
    """
    output, results = evaluation
    # Measured in frames of two widths, so that one browser is enough.
    widths = (900, 400)
    page = html.escape((output / "report.html").read_text())
    frames = "".join(f'<iframe width="{width}" height="900" srcdoc="{page}"></iframe>' for width in widths)
    probe = """
    const measured = frame => {
      const page = frame.contentDocument, column = page.querySelector('main').getBoundingClientRect();
      const boxes = selector => [...page.querySelectorAll(selector)].map(each => each.getBoundingClientRect());
      const all = boxes('figure, .forest, .forest tr, .track *, .scroll, nav, h1, h2');
      const inside = each => each.left >= 0 && each.right <= page.documentElement.clientWidth && each.height > 0;
      return {
        shares: boxes('svg').map(each => each.width / column.width),
       widths: boxes('svg').map(each => each.width),
        flat: boxes('svg').filter(each => each.height < 0.1 * each.width).length,
        rows: boxes('.forest tr.row').length,
        outside: all.filter(each => !inside(each)).length,
        seen: all.length,
        overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
        resources: frame.contentWindow.performance.getEntriesByType('resource').length,
      };
    };
    onload = () => { document.title = JSON.stringify([...document.querySelectorAll('iframe')].map(measured)); };
    """
    probed = tmp_path / "probed.html"
    probed.write_text(f"<title></title><script>{probe}</script>{frames}")
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,1200"]
    folder = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [*browser, folder, "--dump-dom", probed.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    pages = json.loads(re.search(r"<title>(.*?)</title>", done.stdout)[1])
    tested = sum("difference" in each for task in results["tasks"] for each in task["quantities"])
    for width, found in zip(widths, pages, strict=True):
        # One for each task: loss, gauge error, kurtosis by layer, rounding, speed.
        assert len(found["shares"]) == len(results["tasks"]) == 5, width
        assert min(found["shares"]) > 0.8 and found["flat"] == 0, width
        # On a narrow page pictures keep a width at which they can be read, and are scrolled.
        assert max(found["shares"]) <= 1 or width < 640 <= min(found["widths"]), width
        assert found["rows"] == tested > 3 and found["seen"] > 50, width
        assert found["outside"] == 0 and found["overflow"] <= 0 and found["resources"] == 0, width
