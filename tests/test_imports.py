"""What importing the package loads, whom it registers with, and what works without the packages that extras bring."""

import os
import re
import resource
import subprocess
import sys
import tomllib

import pytest

import rigpt_hf
from rigpt_hf.extras import EXTRAS, MissingPackage, advice, needs
from rigpt_hf.processes import python
from tests.processes import ROOT, run


# What takes seconds to import, or comes with an extra.
HEAVY = ("torch", "transformers", "numpy", "scipy", "matplotlib", "datasets", "accelerate", "peft", "pandas")
# Names of packages where those of their modules differ.
DISTRIBUTIONS = {"lm_eval": "lm-eval[hf]", "IPython": "ipython"}


def fresh(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """Run a script in a process of its own."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )


LOADED = f"; import sys; print([name for name in {HEAVY} if name in sys.modules])"
HELP = """
import sys
from rigpt_hf.cli import app
from rigpt_hf.command_line import execute
code = execute(app, "rigpt", sys.argv[1:])
print(code, file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", ["--help", "convret x", "evaluate -h"])
def test_the_command_line_answers_at_once(arguments):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = fresh(HELP + LOADED[2:], *arguments.split())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr
    assert done.stderr.strip().endswith("2" if "x" in arguments else "0")
    # 0.2 to 0.4 where nothing else runs; with torch and transformers it would be several.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_public_names_are_those_of_the_package():
    for name in rigpt_hf.__all__:
        assert name in dir(rigpt_hf)
        assert name == "__version__" or getattr(rigpt_hf, name).__module__.startswith("rigpt_hf.")
    with pytest.raises(AttributeError, match="module 'rigpt_hf' has no attribute 'RiGPTForEverything'"):
        rigpt_hf.RiGPTForEverything  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from rigpt_hf import nothing  # noqa: F401


SHAPE = "vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=8"
NOTHING_YET = f"""
import rigpt_hf, sys
assert not [name for name in {HEAVY} if name in sys.modules], "importing the package loads what is heavy"
assert set(rigpt_hf.__all__) <= set(dir(rigpt_hf))
"""
# Every order of imports ends in this.
KNOWN = f"""
import sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
config = AutoConfig.for_model("rigpt", {SHAPE})
for auto in (AutoModel, AutoModelForSequenceClassification, AutoModelForCausalLM):
    model = auto.from_config(config)
    assert type(model).__module__ == "rigpt_hf.modeling_rigpt" and type(model)._auto_class == auto.__name__
assert type(config)._auto_class == "AutoConfig"
model.save_pretrained(sys.argv[1])
import rigpt_hf, peft
from transformers import TrainingArguments
assert isinstance(model, rigpt_hf.RiGPTForCausalLM)
targets = peft.get_peft_model(model, peft.LoraConfig()).peft_config["default"].target_modules
assert targets == {{"q_proj", "v_proj"}}, targets
assert TrainingArguments(sys.argv[1], optim="equivariant", report_to="none").optim.value == "equivariant"
assert "torch" in sys.modules and "transformers" in sys.modules, "else not seeing them above would say nothing"
print("known")
"""
ORDERS = {
    "before all": NOTHING_YET,
    # A module of Transformers that imports the Auto classes in the middle of itself, and that our models import.
    "in between": "import rigpt_hf.symmetry\nfrom transformers import LlamaForCausalLM\nimport transformers.trainer",
    "before another model": NOTHING_YET + "from transformers import LlamaForCausalLM\n"
    "from rigpt_hf.pictures import rotation, symmetry, training, style\n"
    "assert 'matplotlib' not in sys.modules, 'it is loaded when something is drawn'",
}


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(order, marks=[pytest.mark.full] * (name != "before another model"), id=name)
        for name, order in ORDERS.items()
    ],
)
@pytest.mark.full
def test_other_libraries_know_it_in_every_order(order, tmp_path):
    done = fresh(order + KNOWN, tmp_path / "model")
    assert done.stdout.strip() == "known", done.stderr[-2000:]
    assert (tmp_path / "model" / "modeling_rigpt.py").is_file(), "the code goes along with the weights"


def test_libraries_that_are_there_before_know_it_afterwards(tmp_path):
    done = run(
        "-c", "import sys; assert 'peft' in sys.modules and 'transformers.trainer' in sys.modules\n" + KNOWN, tmp_path
    )
    assert done.returncode and "rigpt" in done.stderr.splitlines()[-1], "they do not know it without the package"
    done = run("-c", "import rigpt_hf\n" + KNOWN, tmp_path)
    assert done.stdout.strip() == "known", done.stderr[-2000:]


# Takes packages away from a process, as if they were not installed.
WITHOUT = """
import sys
class Without:
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, *rest):
        absent = name.partition(".")[0] in {packages}
        return None if absent else self.finder.find_spec(name, *rest)
    def __getattr__(self, name): return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
BASE = WITHOUT.format(packages={name for names in EXTRAS.values() for name in names} | {"pandas", "sklearn"})
VERBS = """
from rigpt_hf.cli import app
from rigpt_hf.command_line import execute
folder = sys.argv[1]
for line in (
    "convert GPT2 OUT/rigpt", "info OUT/rigpt", "verify GPT2 OUT/rigpt", "export OUT/rigpt OUT/back",
    "rotate OUT/rigpt OUT/turned --save-transformation OUT/g.safetensors",
    "rotate OUT/turned OUT/again --inverse --transformation OUT/g.safetensors", "verify OUT/rigpt OUT/again",
    "canonicalize OUT/rigpt OUT/canonical", "charges OUT/rigpt",
):
    arguments = [word.replace("GPT2", sys.argv[1]).replace("OUT", sys.argv[2]) for word in line.split()]
    assert execute(app, "rigpt", [*arguments, "--debug"]) == 0, line
    print("done:", line)
"""
NEEDY = """
for line in (
    "charges OUT/rigpt --measure --picture OUT/c.png", "lab lie-groups --output OUT/lab", "card OUT/rigpt",
    "publish OUT/rigpt me/it --dry-run", "demo --output OUT/demo", "evaluate OUT/rigpt --output OUT/evaluation",
):
    arguments = [word.replace("OUT", sys.argv[2]) for word in line.split()]
    print("asked:", line.split()[0], execute(app, "rigpt", arguments))
"""


def test_loading_converting_and_turning_need_no_extra(tmp_path):
    from tests.conversion.sources import stock_model

    stock_model("gpt2").save_pretrained(tmp_path / "gpt2")
    done = fresh(BASE + VERBS + NEEDY, tmp_path / "gpt2", tmp_path, COLUMNS="200")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("done: ") == 9
    # Everything else ends in one line with the smallest extra that is enough.
    asked = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("asked: ")]
    assert asked == [[verb, "2"] for verb in ("charges", "lab", "card", "publish", "demo", "evaluate")]
    lines = [line for line in done.stderr.splitlines() if line.startswith("rigpt: ")]
    extras = ("pictures", "pictures", "cards", "cards", "demo", "eval")
    for line, extra in zip(lines, extras, strict=True):
        assert f"is needed for this, and not installed. Run `pip install 'rigpt-hf[{extra}]'`." in line, line


# What the README says that an extra is for, with that extra alone.
ALONE = {
    "cards": (
        "convert GPT2 OUT/rigpt",
        "rotate OUT/rigpt OUT/turned",
        "card OUT/turned",
        "publish OUT/turned me/it --dry-run",
    ),
    "gguf": (
        "convert GPT2 OUT/rigpt",
        "export OUT/rigpt OUT/gguf --to gguf",
        "convert OUT/gguf/gguf-F32.gguf OUT/back",
    ),
    "align": (
        "convert GPT2 OUT/rigpt",
        "rotate OUT/rigpt OUT/turned",
        "diff OUT/rigpt OUT/turned",
        "merge OUT/rigpt OUT/turned OUT/merged",
    ),
}
RUN = """
from rigpt_hf.cli import app
from rigpt_hf.command_line import execute
for line in sys.argv[3:]:
    words = [word.replace("GPT2", sys.argv[1]).replace("OUT", sys.argv[2]) for word in line.split()]
    code = execute(app, "rigpt", words)
    print("code", code, "of", line)
"""


@pytest.mark.parametrize("extra", ALONE)
def test_an_extra_is_enough_for_what_it_is_for(extra, tmp_path):
    from tests.conversion.sources import stock_model

    stock_model("llama-tied").save_pretrained(tmp_path / "stock")
    others = {name for names in EXTRAS.values() for name in names} - {*EXTRAS[extra]}
    done = fresh(WITHOUT.format(packages=others) + RUN, tmp_path / "stock", tmp_path, *ALONE[extra])
    assert [line for line in done.stdout.splitlines() if line.startswith("code ")] == [
        f"code 0 of {line}" for line in ALONE[extra]
    ], done.stderr[-3000:]


@pytest.mark.full
def test_the_demo_needs_no_other_extra(tmp_path):
    others = {name for names in EXTRAS.values() for name in names} - {*EXTRAS["demo"]}
    line = "from rigpt_hf.demo import run, symmetry\nprint(len(symmetry.symmetries()))"
    done = fresh(WITHOUT.format(packages=others) + line)
    assert done.stdout.strip() == "3", done.stderr[-2000:]
    assert {"datasets", "scipy"} & others and "matplotlib" not in others


def test_extras_are_those_of_the_distribution():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = declared["optional-dependencies"]
    names = {
        extra: {requirement.partition(">")[0].lower() for requirement in requirements}
        for extra, requirements in extras.items()
    }
    names["eval"].remove("sympy")  # torch brings it in any case
    assert names.keys() == EXTRAS.keys() | {"contracts", "dev", "docs", "all"}
    assert set(extras["all"][0].partition("[")[2].rstrip("]").split(",")) == EXTRAS.keys() | {"dev"}
    for extra, packages in EXTRAS.items():
        assert {DISTRIBUTIONS.get(package, package).lower() for package in packages} == names[extra]
    sizes = [len(packages) for packages in EXTRAS.values()]
    assert sizes == sorted(sizes), "the smallest extra comes first"
    base = {requirement.partition(">")[0].lower() for requirement in declared["dependencies"]}
    assert not base & {package.lower() for packages in EXTRAS.values() for package in packages}


def test_a_missing_package_is_answered_by_the_smallest_extra():
    missing = ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib.figure")
    assert "`pip install 'rigpt-hf[pictures]'`" in advice(missing)
    assert "`pip install 'rigpt-hf[eval]'`" in advice(missing, "eval")
    assert "`pip install 'rigpt-hf[pictures]'`" in advice(missing, "gguf")
    assert advice(ModuleNotFoundError("No module named 'colours'", name="colours")) is None
    with pytest.raises(MissingPackage, match="package jinja2 is needed") as caught, needs("cards"):
        raise ModuleNotFoundError("No module named 'jinja2'", name="jinja2")
    assert advice(caught.value) == str(caught.value)
    with pytest.raises(ModuleNotFoundError, match="colours"), needs("cards"):
        raise ModuleNotFoundError("No module named 'colours'", name="colours")


PROGRAMS = ("rigpt_hf", "evaluation", "training", "model_cards")
STARTS = re.compile(r"sys\.executable|multiprocessing|ProcessPool|os\.(?:exec|spawn|popen|system)")


def test_only_one_file_says_how_python_is_started():
    """That file leaves out the current folder, which others forget."""
    files = [file for folder in PROGRAMS for file in (ROOT / folder).rglob("*.py")]
    assert [file.name for file in files if STARTS.search(file.read_text())] == ["processes.py"]


def test_a_process_imports_nothing_from_the_current_folder(tmp_path):
    (tmp_path / "canary.py").write_text("print('sang')")
    for arguments in (("-c", "import canary"), ("-m", "canary")):
        done = subprocess.run(python(*arguments), cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode and "No module named" in done.stderr and not done.stdout, arguments
