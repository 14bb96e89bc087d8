"""Recipes for engines that are not installed here: what is ours of them, on what stands for the engine."""

import importlib
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from torch import nn

from rigpt_hf.training.options import parse_options
from tests.models import tiny_model, tokens
from tests.processes import ROOT


FOLDER = ROOT / "training" / "engines"


def keyword_dataclass(name: str, base: type = object) -> type:
    return dataclass(kw_only=True, slots=True)(type(name, (base,), {}))


@dataclass
class OptimizerConfig:
    """As AutoModel's: a dataclass whose fields have defaults."""

    param_group_overrides: list = field(default_factory=list)


class BaseModel(nn.Module):
    Config = keyword_dataclass("Config")


class OptimizersContainer(torch.optim.Optimizer):
    @dataclass(kw_only=True, slots=True)
    class Config:
        param_groups: list = field(default_factory=list)
        optimizer_factory_kwargs_by_name: dict = field(default_factory=dict)

    def _post_init(self, parameters):
        torch.optim.Optimizer.__init__(self, parameters, {})


class StateDictAdapter:
    def __init__(self, model_config, hf_assets_path):
        self.model_config = model_config


def configured() -> SimpleNamespace:
    return SimpleNamespace(Config=SimpleNamespace)


# What our modules import of an engine.
STAND_INS = {
    "nemo_automodel.components.optim.optimizer": {"OptimizerConfig": OptimizerConfig},
    "torchtitan.components.checkpoint": {"CheckpointManager": configured()},
    "torchtitan.components.loss": {"CrossEntropyLoss": configured()},
    "torchtitan.components.optimizer": {
        "LRSchedulersContainer": configured(),
        "OptimizersContainer": OptimizersContainer,
    },
    "torchtitan.config": {"ParallelismConfig": SimpleNamespace, "TrainingConfig": SimpleNamespace},
    "torchtitan.hf_datasets.text_datasets": {"HuggingFaceTextDataLoader": configured()},
    "torchtitan.protocols": {"BaseModel": BaseModel},
    "torchtitan.protocols.model_spec": {"ModelSpec": SimpleNamespace},
    "torchtitan.protocols.state_dict_adapter": {"StateDictAdapter": StateDictAdapter},
    "torchtitan.trainer": {"Trainer": configured()},
}


@pytest.fixture
def engine(monkeypatch):
    """Imports a module of ours with stand-ins for its engine."""
    for name, content in STAND_INS.items():
        pieces = name.split(".")
        for end in range(1, len(pieces) + 1):
            package = ".".join(pieces[:end])
            if package not in sys.modules or end == len(pieces):
                monkeypatch.setitem(sys.modules, package, ModuleType(package))
        vars(sys.modules[name]).update(content)

    def load(name: str) -> ModuleType:
        full = f"rigpt_hf.training.engines.{name}"
        monkeypatch.delitem(sys.modules, full, raising=False)
        module = importlib.import_module(full)
        monkeypatch.delitem(sys.modules, full)
        return module

    return load


def losses(model, optimizer, count: int = 4) -> list[float]:
    ids, found = tokens(2, 12, vocab_size=model.config.vocab_size), []
    for _ in range(count):
        loss = model(ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def recipe() -> dict:
    return yaml.safe_load((FOLDER / "automodel.yaml").read_text())


def test_the_optimizer_of_the_automodel_recipe_trains(engine):
    options = recipe()["optimizer"]
    module, _, name = options.pop("_target_").rpartition(".")
    assert module == "rigpt_hf.training.engines.automodel" and options
    model = tiny_model(embedding_size=24, output_bias=True, num_hidden_layers=2)
    config = getattr(engine("automodel"), name)(**options | {"lr_multipliers": {"embed_tokens": 0.3}})
    (optimizer,) = config.build(model, device_mesh=None)
    first, *others = optimizer.param_groups
    assert (first["lr"], first["weight_decay"]) == (options["lr"], options["weight_decay"])
    assert {group["weight_decay"] for group in others} >= {0.0} and any(group["lr"] < 0.01 for group in others)
    before, *_, after = losses(model, optimizer)
    assert after < before
    parts = config.build(SimpleNamespace(parts=[model, model]))
    assert len(parts) == 2


def test_automodel_overrides_of_groups_are_refused(engine):
    module = engine("automodel")
    with pytest.raises(ValueError, match=r"`param_group_overrides` must be left out.*`lr_multipliers`"):
        module.EquivariantConfig(param_group_overrides=[{"pattern": "bias"}])
    with pytest.raises(TypeError, match="betta"):
        module.EquivariantConfig(betta=1)


def empty_wrapper(module: ModuleType, model) -> nn.Module:
    """The model of torchtitan's with the configuration of another, as it is before its weights are made."""
    with torch.device("meta"):
        wrapped = module.RiGPT(module.RiGPT.Config(fields=model.config.to_diff_dict()))
    return wrapped.to_empty(device="cpu")


def test_torchtitan_builds_fills_and_trains_the_model(engine):
    module, model = engine("torchtitan_rigpt"), tiny_model(embedding_size=24, output_bias=True, num_hidden_layers=2)
    wrapped, ids = empty_wrapper(module, model.float()), tokens(2, 12, vocab_size=model.config.vocab_size)
    wrapped.init_states()
    inner = wrapped.model
    assert inner.lm_head.weight is inner.model.embed_tokens.weight
    projection = next(part.weight for part in inner.modules() if getattr(part, "carries_between_frames", False))
    short = min(projection.shape)
    gram = projection @ projection.mT if projection.shape[0] == short else projection.mT @ projection
    torch.testing.assert_close(gram, torch.eye(short))
    adapter = module.RiGPTNames(module.RiGPT.Config(fields=model.config.to_diff_dict()), None)
    names = adapter.to_hf(wrapped.state_dict())
    assert "lm_head.weight" not in names and "model.embed_tokens.weight" in names
    weights = adapter.from_hf({name: weight for name, weight in model.state_dict().items() if name in names})
    assert set(weights) == set(adapter.from_hf(names))
    left = wrapped.load_state_dict(weights, strict=False)  # the head is the table
    assert (left.missing_keys, left.unexpected_keys) == (["model.lm_head.weight"], [])
    positions = torch.arange(12).expand(2, -1)
    torch.testing.assert_close(wrapped(ids, positions), model(ids).logits)
    torch.testing.assert_close(wrapped(ids), model(ids).logits)
    config = module.EquivariantOptimizers.Config(lr=1e-2, lr_multipliers={"embed_tokens": 0.3})
    container = module.EquivariantOptimizers(config, model_parts=[wrapped])
    (optimizer,) = container.optimizers
    named = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(named) == sorted(name for name, _ in wrapped.named_parameters()) and len(named) > 20
    before, *_, after = losses(inner, optimizer)
    assert after < before


def test_what_torchtitan_has_for_its_own_models_is_refused(engine):
    module = engine("torchtitan_rigpt")
    run = {name: SimpleNamespace(**options) for name, options in module.SUPPORTED.items()}
    module.check_supported(SimpleNamespace(**run))
    run["parallelism"].tensor_parallel_degree = 2
    with pytest.raises(ValueError, match=r"`parallelism.tensor_parallel_degree` must be 1 for a RiGPT, got 2"):
        module.check_supported(SimpleNamespace(**run))
    with pytest.raises(ValueError, match=r"`optimizer.param_groups` come from the table of frames"):
        module.EquivariantOptimizers(module.EquivariantOptimizers.Config(param_groups=[1]), model_parts=[])
    config = module.rigpt()
    assert config.model_spec.parallelize_fn is module.parallelize
    assert config.parallelism.spmd_backend == module.SUPPORTED["parallelism"]["spmd_backend"]


def commands(script: str, tmp_path: Path, nodes: int = 1) -> list[list[str]]:
    """What the `run` of the SkyPilot task gives to `python` and to `torchrun`, on the last of its machines."""
    notes = tmp_path / "notes"
    notes.unlink(missing_ok=True)
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text(f'#!/bin/bash\necho {name} "$@" >> {notes}\n')
        (tmp_path / name).chmod(0o755)
    task = yaml.safe_load((FOLDER / "skypilot.yaml").read_text())
    sky = {"SKYPILOT_NUM_NODES": str(nodes), "SKYPILOT_NODE_RANK": str(nodes - 1), "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    sky |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", script], env=os.environ | task["envs"] | sky, check=True, timeout=60)
    return [shlex.split(line) for line in notes.read_text().splitlines()]


def options_of(command: list[str]):
    return parse_options(command[command.index("training/pretrain.py") + 1 :])


def test_the_skypilot_task_starts_the_program_with_options_that_it_has(tmp_path):
    script = yaml.safe_load((FOLDER / "skypilot.yaml").read_text())["run"]
    prepare, run = commands(script, tmp_path)
    assert prepare[0] == "python" and options_of(prepare).prepare_only
    assert run[0] == "torchrun" and run[run.index("--master-addr") + 1] == "10.0.0.1"
    assert options_of(run).fsdp and options_of(run).mixed_precision == "bf16"
    (run,) = commands(script, tmp_path, nodes=2)
    assert run[run.index("--node-rank") + 1] == "1"
    with pytest.raises(ValueError, match="--fsdq"):
        options_of(commands(script.replace("--fsdp", "--fsdq"), tmp_path)[1])


def test_what_the_recipes_name_of_ours_exists():
    targets = [value["_target_"] for value in recipe().values() if isinstance(value, dict) and "_target_" in value]
    ours = [target for target in targets if target.startswith("rigpt_hf.")]
    assert len(targets) >= 5 and len(ours) == 1
    for target in ours:
        module, _, name = target.removeprefix("rigpt_hf.").rpartition(".")
        assert f"class {name}(" in (ROOT / f"{module.replace('.', '/')}.py").read_text()
    page = (ROOT / "docs" / "engines.md").read_text()
    for file in FOLDER.iterdir():
        assert file.name.startswith("__") or f"training/engines/{file.name}" in page, file
