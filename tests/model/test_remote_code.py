"""Saved folders carry the code: they load in a fresh process with the package and without it."""

import ast
import json
import sys
from pathlib import Path

import pytest
import torch

from rigpt_hf import RiGPTConfig, RiGPTForCausalLM, RiGPTForSequenceClassification, RiGPTModel
from tests.model.agreement import difference
from tests.models import OPTIONS, randomise_, tiny_config, tokens
from tests.processes import run
from tests.tolerances import SYMMETRY


# Wherever the package may be installed, this process cannot import it.
WITHOUT_PACKAGE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "rigpt_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
try:
    import rigpt_hf
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("rigpt_hf can be imported")
"""
LOAD = """
import sys, torch, transformers
folder, auto_class, trust = sys.argv[1:]
model = getattr(transformers, auto_class).from_pretrained(folder, **({"trust_remote_code": True} if trust else {}))
input_ids = torch.load(folder + "/input_ids.pt")
with torch.no_grad():
    torch.save(model.eval()(input_ids)[0], folder + "/output.pt")
if auto_class == "AutoModelForCausalLM":
    model.generate(input_ids, max_new_tokens=3, do_sample=False)
    model.save_pretrained(folder + "/again")
print(type(model).__module__)
"""
AUTO_CLASSES = {
    "AutoModelForCausalLM": RiGPTForCausalLM,
    "AutoModelForSequenceClassification": RiGPTForSequenceClassification,
    "AutoModel": RiGPTModel,
}


def save(model_class, folder: Path, **options) -> torch.Tensor:
    torch.manual_seed(0)
    model = randomise_(model_class(tiny_config(num_labels=3, **options)), 0).eval()
    model.save_pretrained(folder)
    torch.save(tokens(2, 7), folder / "input_ids.pt")
    return model(tokens(2, 7))[0].detach()


def test_all_is_in_the_folder(tmp_path):
    save(RiGPTForCausalLM, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= names
    assert {"configuration_rigpt.py", "scores_rigpt.py", "modeling_rigpt.py"} <= names
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "rigpt" and config["dtype"] == "float32"
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_rigpt.RiGPTForCausalLM"
    assert set(RiGPTConfig.__annotations__) - {"bos_token_id", "eos_token_id", "pad_token_id"} <= set(config)
    imported = set()
    for path in tmp_path.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    assert imported - set(sys.stdlib_module_names) <= {"torch", "transformers", "huggingface_hub"}, imported


def load(folder: Path, code: str, auto_class: str = "AutoModelForCausalLM", trust: str = "trust"):
    return run("-c", code + LOAD, folder, auto_class, trust, cwd=folder.parent)


@pytest.mark.parametrize(
    ("auto_class", "option"),
    [
        ("AutoModelForCausalLM", "squared-distance"),
        ("AutoModelForCausalLM", "distance"),
        ("AutoModelForSequenceClassification", "rotary"),
        ("AutoModel", "rotary"),
    ],
)
def test_a_folder_loads_where_the_package_is_not_installed(auto_class, option, tmp_path):
    folder = tmp_path / "model"
    expected = save(AUTO_CLASSES[auto_class], folder, embedding_size=24, **OPTIONS[option])
    process = load(folder, WITHOUT_PACKAGE, auto_class)
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.strip().splitlines()[-1].startswith("transformers_modules.")
    assert difference(torch.load(folder / "output.pt"), expected) <= SYMMETRY[torch.float32]
    if option == "distance":  # and what that process saved carries the code on
        (folder / "again" / "input_ids.pt").write_bytes((folder / "input_ids.pt").read_bytes())
        process = load(folder / "again", WITHOUT_PACKAGE)
        assert process.returncode == 0, process.stderr[-3000:]


def test_a_folder_needs_the_package_or_trust(tmp_path):
    folder = tmp_path / "model"
    expected = save(RiGPTForCausalLM, folder, embedding_size=24)
    process = load(folder, "import rigpt_hf\n", trust="")
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.strip().splitlines()[-1] == "rigpt_hf.modeling_rigpt"
    assert difference(torch.load(folder / "output.pt"), expected) <= SYMMETRY[torch.float32]
    process = load(folder, WITHOUT_PACKAGE, trust="")
    assert process.returncode != 0 and "trust_remote_code" in process.stderr
