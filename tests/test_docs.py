"""The documentation names code that exists."""

import importlib
import re
import shlex
import shutil
import subprocess
import tempfile
import tomllib
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import typer
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import rigpt_hf
from rigpt_hf.cli import app
from rigpt_hf.command_line import UsageError, hyphenated
from rigpt_hf.conversion.families import ARCHITECTURES
from rigpt_hf.extras import EXTRAS
from rigpt_hf.symmetry.tokens import TokenSymmetry
from rigpt_hf.training.options import parse_options
from tests.conversion.sources import stock_model
from tests.evaluation.toys import word_tokenizer
from tests.extras import PROJECT, megabytes, needed
from tests.models import tiny_model


ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
HOW_TO = sorted((ROOT / "docs/how-to").glob("*.md"))
# Programs of others, which are not here, or fetch; SLURM's job, which `bash -n` reads; and what writes a file.
FOREIGN = {"automodel", "git", "jupyter", "llama-cli", "llama-server", "lms", "mlx_lm.convert", "sky", "vllm"}
FOREIGN |= {"sglang.launch_server", "torchtitan.train"}
FOREIGN |= {
    "#!/bin/bash",
    "#SBATCH",
    "scancel",
    "scontrol",
    "wait",
    "trap",
    "train",
    "train()",
    "stop()",
    "}",
    "$SLURM_JOB_NODELIST",
}
FOREIGN |= {"cat", "echo", ""}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_reference_to_code_leads_somewhere(page):
    text = page.read_text(encoding="utf-8")
    references = re.findall(r"`([\w/]+)\.py::([\w.]+)`", text)
    for module, path in references:
        full = module if "/" in module else f"rigpt_hf/symmetry/{module}"
        place = importlib.import_module(full.replace("/", "."))
        for name in path.split("."):
            place = getattr(place, name)
    paths = set(re.findall(r"(?<!\.co/)(?:training|evaluation|tests|docs|rigpt_hf)/[\w/.-]+\w", text))
    missing = {path for path in paths if not (ROOT / path).exists()}
    assert not missing, f"the page names files that do not exist: {missing}"
    assert len(references) + len(paths) > 5, "the page refers to no code"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_named_exists(page):
    names = set(re.findall(r"\b(test_\w+\.py)", page.read_text(encoding="utf-8")))
    assert names
    missing = {name for name in names if not list((ROOT / "tests").rglob(name))}
    assert not missing, f"the page names tests that do not exist: {missing}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_every_pretraining_line_is_understood(page, tmp_path, monkeypatch):
    """Presets that exist, and options that the program takes."""
    monkeypatch.chdir(tmp_path)
    Path("digits.json").touch()
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"training/pretrain\.py( --config [^#\n`]*)", text)
    assert lines or page.stem not in ("training", "comparison", "README")
    for line in lines:
        options = parse_options([word.replace("training/", f"{ROOT}/training/") for word in line.split()])
        assert options.max_steps >= 100


def test_the_blocks_of_the_readme_run_as_pasted(monkeypatch, capsys):
    """One after the other, with a small GPT-2 in the place of the one that must be fetched."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name: stock_model("gpt2", torch.float32))
    words = word_tokenizer(["<s>", *["Turn", "the", "hidden", "space", ",", "and", "model"], *map(str, range(20))])
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name: words)
    namespace: dict = {}
    for block in blocks:
        exec(block, namespace)
    printed = capsys.readouterr().out
    assert len(blocks) == 2 and "equal up to rounding" in printed
    first, *others = re.findall("^.*Turn .*$", printed, re.MULTILINE)
    assert others == [first, first] and len(first.split()) > 10, "three models do not say the same"
    assert namespace["gauge_error"](namespace["model"], namespace["g"], namespace["inputs"].input_ids) < 1e-5
    assert namespace["compare"](namespace["model"], namespace["turned"]).verdict == "disguise"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


CODE = [page for page in (*PAGES, *HOW_TO) if blocks(page, "python")]


@pytest.mark.parametrize("page", CODE, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run_as_pasted(page, monkeypatch, tmp_path):
    """One after the other, beside a model that was converted before and a text; with fewer steps of a descent."""
    tokenizer = word_tokenizer(["<s>", " a", " b"])
    tokenizer.eos_token = "<s>"
    tokenizer.save_pretrained(tmp_path / "my-rigpt")
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path / "my-rigpt")
    shutil.copytree(tmp_path / "my-rigpt", tmp_path / "runs/pets/model")
    (tmp_path / "pets.json").write_text('{"format": "rigpt token symmetry", "generators": [[[" a", " b"]]]}')
    (tmp_path / "text.txt").write_text(" a b" * 9 + "\n\n" + " b a" * 9)
    (tmp_path / "evaluation").symlink_to(ROOT / "evaluation")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_MODULES_CACHE", str(tmp_path / "modules"))
    fewer = {"(1200, 2400)": "(12, 24)", "SGD, 1440": "SGD, 14", "AdamW, 2400": "AdamW, 24"}
    fewer |= {"context=1024, stride=512": "context=32, stride=16"}
    namespace: dict = {}
    for block in blocks(page, "python"):
        for old, new in fewer.items():
            block = block.replace(old, new)
        exec(block, namespace)
    assert namespace.keys() > {"__builtins__"}, "no block has left a name"


def test_every_block_has_a_language_that_a_test_reads():
    """Python and lines of a shell run, or are looked at; a file of JSON is loaded; nothing else is left unnamed."""
    pages = (*PAGES, *HOW_TO, ROOT / "README.md", ROOT / "docs/course/README.md")
    languages = partial(re.findall, r"^```(\S+)$", flags=re.MULTILINE)
    fences = [(page, kind) for page in pages for kind in languages(page.read_text(encoding="utf-8"))]
    assert {kind for _, kind in fences} == {"python", "bash", "json"}
    assert len(CODE) == len({page for page, kind in fences if kind == "python"}) - 1 > 9, "all but the README"
    (written,) = (block for page in pages for block in blocks(page, "json"))
    words = re.findall(r'"(\w+)"', written.partition("generators")[2])
    tokenizer = word_tokenizer([*words, *map(str, range(40 - len(words)))])
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(written)
        file.flush()
        symmetry = TokenSymmetry.load(file.name, tokenizer=tokenizer)
    assert symmetry.order == 4 and len(words) == 8


def lines_of(page: Path) -> list[str]:
    """The command lines of a page, without comments, and without what a `cat` takes up to `END`."""
    text = re.sub(r"<<'END'\n.*?\nEND$", "", "".join(blocks(page, "bash")), flags=re.DOTALL | re.MULTILINE)
    return [line.partition(" #")[0].strip() for line in text.replace("\\\n", " ").splitlines()]


def options_are_known(name: str, words: list[str], folder: Path) -> None:
    """Raise what is wrong with the words behind a program of ours, whose files are there."""
    if not name.startswith(("evaluation.", "training.")):  # a chapter of the course would run when it is imported
        return
    module = importlib.import_module(f"rigpt_hf.{name}")
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"rigpt_hf.{name}.program")
    assert isinstance(module.main, partial), name
    program = typer.main.get_command(module.main.args[0])
    named = []
    for word in hyphenated(words):
        place = ROOT / word if word.endswith(".yaml") else folder / Path(word).name
        is_file = re.search(r"\.[a-z]+$", word, re.I) is not None
        if is_file and not place.exists():
            place.touch()
        named.append(str(place) if is_file else word)
    program.make_context(name, named)


def test_every_command_line_is_understood(tmp_path):
    """Verbs and options that there are, files, modules and targets that exist, and extras with these names."""
    verbs, seen = typer.main.get_command(app).commands, []
    extras = PROJECT["optional-dependencies"]
    for page in (*PAGES, *HOW_TO, ROOT / "README.md", ROOT / "docs/course/README.md"):
        for line in lines_of(page):
            program, *words = shlex.split(line) or [""]
            while re.match(r"\w+=", program):  # variables
                program, *words = words or [""]
            if program == "rigpt":
                verbs[words[0]].make_context(words[0], hyphenated(words[1:]))
            elif program == "make":
                assert f"\n{words[0]}:" in (ROOT / "Makefile").read_text(), line
            elif program == "pip":
                assert set(re.findall(r"\w[\w-]*", "".join(re.findall(r"\[(.*?)\]", line)))) <= set(extras), line
            elif program == "python" and words[0] == "-m":
                assert find_spec(words[1]), line
                options_are_known(words[1], words[2:], tmp_path)
            elif files := [word for word in words if word.endswith(".py")]:
                assert all((ROOT / file).is_file() for file in files), line
                module = files[0].removesuffix(".py").replace("/", ".")
                options_are_known(module, words[words.index(files[0]) + 1 :], tmp_path)
            else:
                assert {program, *words} & FOREIGN, f"{page.name}: {line}"
                continue
            seen.append(program)
    assert {"rigpt", "make", "pip", "python", "accelerate", "torchrun"} <= set(seen) and len(seen) > 30
    with pytest.raises(UsageError):
        verbs["rotate"].make_context("rotate", ["a", "b", "--spin"])
    with pytest.raises(UsageError):
        options_are_known("evaluation.experiments.compare", ["a", "b", "--spin"], tmp_path)


def test_the_job_for_slurm_is_a_script():
    (job,) = (block for block in blocks(ROOT / "docs/training.md", "bash") if block.startswith("#!"))
    for script, right in ((job, True), (job.replace("\n}\n", "\n", 1), False)):
        assert (subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).returncode == 0) is right


def test_the_file_for_citations_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == rigpt_hf.__version__ and cited["license"] == PROJECT["license"]


def address_faults(root: Path) -> set[str]:
    """The files that do not name the address of `[project.urls]`, or name one where there is none."""
    urls = tomllib.loads((root / "pyproject.toml").read_text())["project"].get("urls", {})
    readme = (root / "README.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", readme)
    assert pictures
    source = urls.get("Source")
    if source is None:
        placed = "URL-OF-THIS-REPOSITORY" in readme and not any("://" in picture for picture in pictures)
    else:
        placed = "URL-OF-THIS-REPOSITORY" not in readme and all(one.startswith(f"{source}/raw/") for one in pictures)
    site = re.search(r"^  repository: *(\S*)$", (root / "mkdocs.yml").read_text(), re.MULTILINE)
    assert site is not None
    cited = yaml.safe_load((root / "CITATION.cff").read_text()).get("repository-code")
    held = {
        "README.md": placed,
        "mkdocs.yml": site[1].startswith(source) if source else not site[1],
        "CITATION.cff": cited == source,
    }
    return {file for file, right in held.items() if not right}


def test_the_address_is_the_same_everywhere(tmp_path):
    """None is known yet; once one is, README, site and citation name it, and pictures show on an index page."""
    assert not address_faults(ROOT)
    for file in ("README.md", "mkdocs.yml", "CITATION.cff", "pyproject.toml"):
        shutil.copy(ROOT / file, tmp_path / file)
    project = (tmp_path / "pyproject.toml").read_text()
    assert "[project.urls]" not in project, "then the copy is to be changed from that address"
    (tmp_path / "pyproject.toml").write_text(f'{project}\n[project.urls]\nSource = "https://a.b/me/rigpt"\n')
    assert address_faults(tmp_path) == {"README.md", "mkdocs.yml", "CITATION.cff"}
    changes = {
        "README.md": [
            ("URL-OF-THIS-REPOSITORY", "https://a.b/me/rigpt"),
            ("](docs/fig", "](https://a.b/me/rigpt/raw/main/docs/fig"),
        ],
        "mkdocs.yml": [("\n  repository:", "\n  repository: https://a.b/me/rigpt/blob/main")],
        "CITATION.cff": [("license: ", "repository-code: https://a.b/me/rigpt\nlicense: ")],
    }
    for file, pairs in changes.items():
        text = (tmp_path / file).read_text(encoding="utf-8")
        for old, new in pairs:
            text = text.replace(old, new)
        (tmp_path / file).write_text(text, encoding="utf-8")
    assert not address_faults(tmp_path)


def test_what_the_readme_says_below_its_title_is_true():
    _, _, line, *_ = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    needed = " ".join([PROJECT["requires-python"], *PROJECT["dependencies"]])
    python, torch_, transformers = re.findall(r"(?:(?<=^)|torch|transformers)>=([\d.]+)", needed)
    assert re.findall("`(.*?)`", line) == [
        PROJECT["license"],
        f"Python {python}+",
        f"torch {torch_}+",
        f"Transformers {transformers}+",
        f"{len(ARCHITECTURES)} architectures",
    ]


def test_the_readme_names_every_extra():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"`{extra}`" in text for extra in EXTRAS) and len(EXTRAS) > 9
    # And about how much it takes, of small ones that are installed.
    base, compared = needed(PROJECT["dependencies"], set()), 0
    for extra, size in re.findall(r"`([\w-]+)`(?: \|)? \(?(\d+) MB", text):
        if extra in ("pictures", "align", "gguf") and all(map(find_spec, EXTRAS[extra])):
            found = megabytes(needed(PROJECT["optional-dependencies"][extra], set()) - base)
            assert 0.6 * int(size) < found + 1 < 1.6 * int(size) + 2, (extra, found)
            compared += 1
    assert compared
