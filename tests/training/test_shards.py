"""States in shards: any number of processes reads what another number wrote, and saves beside the training."""

import errno
import shutil
import threading
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.checkpoints import write as writing
from rigpt_hf.optim import EquivariantOptimizer, equivariant_param_groups
from rigpt_hf.training import loop, records, saving
from rigpt_hf.training.averaging import AVERAGE
from rigpt_hf.training.checkpoints import CheckpointStore
from rigpt_hf.training.saving import export_checkpoint
from rigpt_hf.training.sharding import gather_optimizer, gather_weights
from rigpt_hf.training.shards import MOMENT, WEIGHT, StoredShards, local_state, save_shards
from tests.models import tiny_model, tokens
from tests.processes import together
from tests.training.runs import (
    MODEL,
    PEAK,
    interrupted,
    launch,
    losses_of,
    make_options,
    numbers_of,
    pretrain,
    same_run,
    weights_of,
)


# Rows that no number of processes divides, and fewer than four of them.
UNEVEN = {"config_overrides": MODEL | {"residual_dropout": 0.0, "attention_sinks": True}}
SHORT = {"max_steps": 2, "warmup_steps": 1, "save_steps": 2, "eval_steps": 2}
SHARDED = UNEVEN | SHORT | {"fsdp": True, "ema_decay": 0.8}
FULL = "No space left on device"


def last(output: Path) -> StoredShards:
    return StoredShards(output / "checkpoints" / "step-00000002" / "shards")


def assert_same_tensors(run: loop.PretrainingRun, shards: StoredShards) -> None:
    """Whether a run has gone on with what lies in files, whose weights are their average, and the other way round."""
    weights, moments = gather_weights(run.model), gather_optimizer(run.model, run.optimizer)
    found = {f"{MOMENT}{name}/{key}": value for name, state in moments.items() for key, value in state.items()}
    for name in moments:
        average = f"{MOMENT}{name}/{AVERAGE}"
        found[average], found[WEIGHT + name] = weights[name], found[average]
    found |= {WEIGHT + name: tensor for name, tensor in weights.items() if WEIGHT + name not in found}
    assert len(found) > 60 and found.keys() >= shards.shapes.keys()
    for name in shards.shapes:
        assert torch.equal(shards.read(name), found[name]), name


def go_on(rank: int, data: str, output: str) -> None:
    """In one of several processes: go on from what others wrote, look at it, and write it once more."""
    loop.peak_flops = lambda device, dtype: PEAK
    run = loop.PretrainingRun(make_options(Path(data), Path(output), **SHARDED), progress=False)
    run._resume()
    assert_same_tensors(run, last(Path(output)))
    with run.state.taken(apart=True) as write:
        if rank == 0:
            Path(output, "again").mkdir()
        run.workers.gather(None)
        write(Path(output, "again"))


@pytest.mark.slow
def test_two_write_one_and_four_read_the_same(data, tmp_path):
    launch(data, tmp_path / "two", 2, **SHARDED)
    two = last(tmp_path / "two")
    files = sorted(two.folder.iterdir())
    assert len(files) == 2 and all(file.suffix == ".safetensors" for file in files)
    parts, name = [], f"{WEIGHT}model.embed_tokens.weight"
    for file in files:
        with safe_open(file, framework="pt") as opened:
            parts.append(opened.get_tensor(name))
    assert [len(part) for part in parts] == [31, 30] and torch.equal(torch.cat(parts), two.read(name))
    one = loop.PretrainingRun(make_options(data, tmp_path / "two", **SHARDED | {"fsdp": False}), progress=False)
    one._resume()
    assert_same_tensors(one, two)
    together(go_on, str(data), str(tmp_path / "two"), world=4)
    four = StoredShards(tmp_path / "two" / "again" / "shards")
    assert len(list(four.folder.iterdir())) == 4 and four.shapes == two.shapes
    assert all(torch.equal(four.read(name), two.read(name)) for name in two.shapes)
    # The final model comes from these files, and is what is saved of a whole one.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "model")
    with one.average.applied():
        for name, weight in gather_weights(one.model).items():
            assert torch.equal(model.state_dict()[name], weight), name
    export_checkpoint(two.folder.parent, tmp_path / "exported")
    assert (tmp_path / "exported" / "model.safetensors").read_bytes() == weights_of(tmp_path / "two")
    with pytest.raises(ValueError, match="`output_dir` .*exported"):
        export_checkpoint(two.folder.parent, tmp_path / "exported")
    alone = pretrain(data, tmp_path / "alone", **SHARDED | {"fsdp": False})
    with pytest.raises(ValueError, match="`checkpoint` must be one in shards, got .*loads as it is"):
        export_checkpoint(tmp_path / "alone" / "checkpoints" / "step-00000002", tmp_path / "none")
    assert names_of(alone.model_folder) == names_of(tmp_path / "two" / "model")


def names_of(folder: Path) -> tuple[list[str], list[str]]:
    """Of files in a folder, and of tensors in its weights."""
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        return sorted(item.name for item in folder.iterdir()), sorted(opened.keys())


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("asynchronous", [False, True], ids=["waiting", "beside"])
def test_a_killed_run_in_shards_has_the_numbers_of_one_that_was_not(data, tmp_path, asynchronous):
    """With dropout; and of a run whose evaluations, of the average of its weights, fall between checkpoints."""
    options = {"fsdp": True, "ema_decay": 0.8, "max_steps": 28, "async_save": asynchronous}
    launch(data, tmp_path / "straight", 2, **options)
    killed = launch(data, tmp_path / "killed", 2, kills=4, **options)["killed_at"]
    assert len(set(killed)) >= 2 and max(killed) < 28, killed
    assert numbers_of(tmp_path / "straight") == numbers_of(tmp_path / "killed")
    assert same_run(tmp_path / "straight", tmp_path / "killed")
    launch(data, tmp_path / "judged", 2, **options | {"eval_steps": 1, "async_save": not asynchronous})
    assert same_run(tmp_path / "straight", tmp_path / "judged")


def test_files_of_a_model_are_written_with_one_tensor_at_a_time(tmp_path, monkeypatch):
    model = tiny_model().float()
    optimizer = EquivariantOptimizer(equivariant_param_groups(model, lr=1e-3))
    model(tokens(2, 9), labels=tokens(2, 9)).loss.backward()
    optimizer.step()
    tensors, others = local_state(model, optimizer)
    save_shards(tensors, tmp_path / "shards", None)
    shards = StoredShards(tmp_path / "shards")
    assert others == {} and shards.shapes.keys() == tensors.keys()
    assert all(torch.equal(shards.read(name), tensors[name]) for name in tensors)
    alive, read, most = weakref.WeakSet(), StoredShards.read, 0

    def watched(self, name):
        nonlocal most
        tensor = read(self, name)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(StoredShards, "read", watched)
    monkeypatch.setattr(writing, "DEFAULT_SHARD_SIZE", 40_000)
    records.write_model(model, shards, None, tmp_path / "model", {})
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 2 and most == 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert isinstance(loaded, RiGPTForCausalLM)
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in model.state_dict().items())
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    save_shards(local_state(model, optimizer)[0], tmp_path / "spoilt", None)
    with pytest.raises(ValueError, match="`learning_rate` must give weights that are finite numbers in float32, got"):
        records.write_model(model, StoredShards(tmp_path / "spoilt"), None, tmp_path / "none", {})
    assert not (tmp_path / "none").exists()


def test_training_goes_on_while_a_checkpoint_is_written(data, straight, tmp_path, monkeypatch):
    """A save that waits for the step after it: one beside the training ends, the other gives up."""
    met, save, advance = [], saving.save_state, loop.PretrainingRun._advance

    def slow(state, path):
        if "step-00000003" in str(path) and not met:
            met.append(stepped.wait(timeout=2))
        save(state, path)

    def watched(run):
        entry = advance(run)
        if run.step == 5:
            stepped.set()
        return entry

    monkeypatch.setattr(saving, "save_state", slow)
    monkeypatch.setattr(loop.PretrainingRun, "_advance", watched)
    for asynchronous in (True, False):
        stepped = threading.Event()
        met.clear()
        output = tmp_path / str(asynchronous)
        pretrain(data, output, async_save=asynchronous, save_total_limit=9)
        assert met == [asynchronous]
        assert same_run(output, straight)
        assert [one.step for one in CheckpointStore(output / "checkpoints").checkpoints()] == [3, 6, 9, 12]
    # What was written beside is what was there at the time.
    resumed = interrupted(tmp_path / "True", tmp_path / "resumed")
    assert pretrain(data, resumed).started == 9 and same_run(resumed, straight)


@pytest.mark.parametrize("step", [9, 12])
def test_a_save_beside_the_training_that_fails_ends_the_run_in_one_line(data, straight, tmp_path, monkeypatch, step):
    save = saving.save_state

    def full(state, path):
        if f"step-{step:08d}" in str(path):
            raise OSError(errno.ENOSPC, FULL)
        save(state, path)

    run = shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    with monkeypatch.context() as patched:
        patched.setattr(saving, "save_state", full)
        rule = f"^`output_dir` must take the checkpoint of step {step}, got .*{FULL}. The earlier checkpoints are unto"
        with pytest.raises(ValueError, match=rule) as told:
            pretrain(data, run, async_save=True, force=True)
    assert "\n" not in str(told.value) and len(losses_of(run)) in range(step, 13)
    assert CheckpointStore(run / "checkpoints").latest(verify=True).step == step - 3
    assert not list((run / "checkpoints").glob(".step*"))
    before = weights_of(run)
    assert pretrain(data, run, async_save=True).started == step - 3
    assert same_run(run, straight) and before == weights_of(run), "the model of an earlier run stays until the end"
