"""Activations that are recomputed in the backward pass: the same numbers in every way to train, and less memory."""

import weakref
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.decoder_rigpt import RiGPTDecoderLayer
from rigpt_hf.training import loop, records
from rigpt_hf.training.build import check_run, recompute_activations_
from rigpt_hf.training.kinds import KINDS
from rigpt_hf.training.options import PretrainOptions
from rigpt_hf.training.tuning import finetune
from tests.models import tiny_config, tokens
from tests.processes import together
from tests.tolerances import DISTRIBUTED
from tests.training.runs import CALM, MODEL, PEAK, losses_of, pretrain, same_run


AGAIN = {"gradient_checkpointing": True}
SHORT = {"max_steps": 4, "warmup_steps": 1, "save_steps": 4}


class Living(TorchDispatchMode):
    """Counts the bytes of tensors that were made inside and are still there; views of the weights are not."""

    def __init__(self, model):
        super().__init__()
        self.weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self.made: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.weights:
                    self.made[storage._cdata] = weakref.ref(storage)
        return result

    def count(self) -> int:
        storages = [reference() for reference in self.made.values()]
        return sum(storage.nbytes() for storage in storages if storage is not None)


@pytest.fixture
def calls(monkeypatch):
    """How often layers were computed with gradients in mind."""
    seen, block = SimpleNamespace(count=0), RiGPTDecoderLayer.block

    def counted(*arguments, **options):
        seen.count += torch.is_grad_enabled()
        return block(*arguments, **options)

    monkeypatch.setattr(RiGPTDecoderLayer, "block", counted)
    return seen


@pytest.mark.parametrize("parts", [{}, {"per_device_train_batch_size": 1}], ids=["whole", "accumulated"])
def test_a_run_that_recomputes_is_the_same_run(data, straight, tmp_path, calls, parts):
    """Bit by bit, with dropout and with the masks of documents, which are those of the ordinary run."""
    once = straight
    if parts:
        pretrain(data, once := tmp_path / "once", **parts)
        assert calls.count == 12 * 4 * MODEL["num_hidden_layers"]
        calls.count = 0
    pretrain(data, tmp_path / "again", **AGAIN, **parts)
    assert calls.count == 2 * 12 * (4 if parts else 1) * MODEL["num_hidden_layers"]
    assert same_run(once, tmp_path / "again")
    pretrain(data, tmp_path / "across", **AGAIN, **parts, **SHORT, cross_document=True)
    assert losses_of(tmp_path / "across")[0] != losses_of(once)[0], "no mask of documents was at work"


def test_a_layer_leaves_its_input_alone():
    def left(layers: int, again: bool) -> int:
        model = RiGPTForCausalLM(tiny_config(num_hidden_layers=layers)).train()
        if again:
            recompute_activations_(model)
        with Living(model) as living:
            ids = tokens(4, 32)
            loss = model(ids, labels=ids, use_cache=False).loss
            held = living.count()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        return held

    left(2, True)  # numbers that are made once stay
    size = tiny_config().hidden_size * 4 * 32 * torch.get_default_dtype().itemsize
    assert left(3, True) - left(2, True) == size
    assert left(3, False) - left(2, False) > 10 * size


def test_a_kind_that_cannot_is_refused(monkeypatch):
    kind = SimpleNamespace(model=SimpleNamespace(supports_gradient_checkpointing=False), param_groups=None)
    monkeypatch.setitem(KINDS, "other", kind)
    options = {"model_kind": "other", "optim": "adamw"}
    check_run(PretrainOptions(**options))
    message = "`gradient_checkpointing` must be left out for `model_kind` `other`, .*got True. Take fewer windows"
    with pytest.raises(ValueError, match=message):
        check_run(PretrainOptions(**options, **AGAIN))
    check_run(PretrainOptions(**AGAIN))


def test_fine_tuning_recomputes_too(options, tmp_path, calls):
    counts = []
    for name, changes in (("once", {}), ("again", AGAIN)):
        calls.count = 0
        finetune(options(output_dir=str(tmp_path / name), max_steps=2, **changes))
        counts.append(calls.count)
    assert counts[1] == 2 * counts[0] > 0
    once, again = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("once", "again"))
    assert once == again


FLOWS = [
    {"depth_solver": "rk4", "depth_steps": 2},
    {"depth_solver": "dopri5", "depth_adjoint": True},
    {"depth_solver": "midpoint", "depth_interpolation": "linear"},
]


@pytest.mark.full
@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow["depth_solver"])
def test_flows_through_depth_recompute(data, tmp_path, flow):
    options = SHORT | {"config_overrides": CALM["config_overrides"] | {"value_embedding_period": None} | flow}
    for name, again in (("once", {}), ("again", AGAIN)):
        pretrain(data, tmp_path / name, **options, **again)
    assert same_run(tmp_path / "once", tmp_path / "again")


def in_buckets(rank: int, data: str, output: str, options: dict) -> None:
    """A run in one of several processes, with as many buckets of gradients as DDP would make of a large model."""
    records.encoded = lambda figure: b""
    loop.peak_flops = lambda device, dtype: PEAK
    compiled = torch.compile
    torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 1000
    wrapped = torch.nn.parallel.DistributedDataParallel
    wrapped.__init__ = partialmethod(wrapped.__init__, bucket_cap_mb=0.002)
    # Kernels take longer to compile than a test may; the graphs, which are cut between buckets, are the same.
    torch.compile = lambda model: compiled(model, backend="aot_eager")
    pretrain(Path(data), Path(output), **options)


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("torch_compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_recompute_too(data, tmp_path, fsdp, torch_compile):
    options = SHORT | {"fsdp": fsdp, "torch_compile": torch_compile, "per_device_train_batch_size": 1}
    for name, again in (("once", {}), ("again", AGAIN)):
        together(in_buckets, str(data), str(tmp_path / name), options | again)
    once, again = losses_of(tmp_path / "once"), losses_of(tmp_path / "again")
    assert len(once) == 4 and once[0] - once[-1] > 0.05
    assert max(abs(a - b) for a, b in zip(once, again, strict=True)) <= DISTRIBUTED
    assert torch_compile or same_run(tmp_path / "once", tmp_path / "again")
