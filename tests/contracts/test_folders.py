"""A saved folder is all that other programs get: whichever class was saved, it loads as any of them."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig

from rigpt_hf import RiGPTConfig, RiGPTForCausalLM
from rigpt_hf.configuration_rigpt import AUTO_CLASSES
from tests.model.agreement import difference
from tests.model.test_remote_code import WITHOUT_PACKAGE
from tests.models import tiny_model, tokens
from tests.processes import run
from tests.tolerances import SYMMETRY


EVERYTHING = {
    "AutoConfig": "configuration_rigpt.RiGPTConfig",
    **{auto_class: f"modeling_rigpt.{name}" for auto_class, name in AUTO_CLASSES.items()},
}
LOAD_AS_ANY = """
import sys, torch, transformers
folder, *auto_classes = sys.argv[1:]
input_ids = torch.load(folder + "/input_ids.pt")
for name in auto_classes:
    model = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True, num_labels=3).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        base = model.base_model(input_ids).last_hidden_state
        assert model(input_ids)[0].isfinite().all()
    torch.save(base, f"{folder}/{name}.pt")
"""


def save(folder: Path) -> torch.Tensor:
    model = tiny_model(dtype=torch.float32, embedding_size=24)
    model.save_pretrained(folder)
    torch.save(tokens(2, 7), folder / "input_ids.pt")
    return model.model(tokens(2, 7)).last_hidden_state.detach()


def test_every_class_is_in_every_folder(tmp_path):
    for auto_class, name in AUTO_CLASSES.items():
        model_class = getattr(transformers.models.auto.modeling_auto, auto_class)._model_mapping[RiGPTConfig]
        assert model_class.__name__ == name
        model = model_class(tiny_model().config)
        model.save_pretrained(tmp_path / name)
        assert json.loads((tmp_path / name / "config.json").read_text())["auto_map"] == EVERYTHING, name
    code = {path.name for path in (tmp_path / name).glob("*.py")}
    # As a program that merges weights by itself does it: only the configuration is loaded and saved.
    AutoConfig.from_pretrained(tmp_path / name).save_pretrained(tmp_path / "alone")
    assert {path.name for path in (tmp_path / "alone").glob("*.py")} == code
    assert json.loads((tmp_path / "alone" / "config.json").read_text())["auto_map"] == EVERYTHING


def test_a_folder_loads_as_any_class_without_the_package(tmp_path):
    expected = save(tmp_path / "model")
    process = run("-c", WITHOUT_PACKAGE + LOAD_AS_ANY, tmp_path / "model", *AUTO_CLASSES, cwd=tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    for auto_class in AUTO_CLASSES:
        assert difference(torch.load(tmp_path / "model" / f"{auto_class}.pt"), expected) <= SYMMETRY[torch.float32]


@pytest.mark.parametrize("with_package", [True, False])
def test_what_a_merging_program_copies_loads_without_the_package(with_package, tmp_path):
    """The weights, and what the configuration brings when it alone is loaded and saved."""
    expected = save(tmp_path / "source")
    copy = "from transformers import AutoConfig\nimport sys\n"
    copy += "AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True).save_pretrained(sys.argv[2])"
    start = "import rigpt_hf\n" if with_package else WITHOUT_PACKAGE
    process = run("-c", start + copy, tmp_path / "source", tmp_path / "merged", cwd=tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    for name in ("model.safetensors", "input_ids.pt"):
        (tmp_path / "merged" / name).write_bytes((tmp_path / "source" / name).read_bytes())
    process = run("-c", WITHOUT_PACKAGE + LOAD_AS_ANY, tmp_path / "merged", "AutoModelForCausalLM", cwd=tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    found = torch.load(tmp_path / "merged" / "AutoModelForCausalLM.pt")
    assert difference(found, expected) <= SYMMETRY[torch.float32]


def test_a_class_of_the_users_own_stays_in_the_map(tmp_path):
    config = tiny_model().config
    config.auto_map = {"AutoModelForCausalLM": "own.Own"}
    config.save_pretrained(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert found == EVERYTHING | {"AutoModelForCausalLM": "own.Own"}


def test_the_server_of_transformers_finds_the_model(tmp_path):
    """`transformers serve` looks for the class in `transformers`."""
    serving = pytest.importorskip("transformers.cli.serving.model_manager")
    save(tmp_path)
    model = serving.ModelManager(device="cpu")._load_model(f"{tmp_path}@main")
    assert type(model) is RiGPTForCausalLM
