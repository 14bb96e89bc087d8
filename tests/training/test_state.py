"""State that survives a file: every type to the bit, and a run that goes on as if it had never stopped."""

import math
import random
import struct
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rigpt_hf.training import state as module
from rigpt_hf.training.state import (
    DTYPES,
    flatten_state,
    load_state,
    restore_state,
    rng_state,
    save_state,
    set_rng_state,
)


def bits(number: float) -> bytes:
    return struct.pack(">d", number)


def same(a, b) -> bool:
    """Whether two states are equal in types, order of keys, and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)
    if isinstance(a, float):
        return bits(a) == bits(b)
    if isinstance(a, dict):
        return [*map(repr, a)] == [*map(repr, b)] and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def round_trip(state, folder):
    return load_state(save_state(state, folder / "state"))


NAN_WITH_PAYLOAD = struct.unpack(">d", bytes.fromhex("fff8000000000123"))[0]
LEAVES: dict[str, Any] = {
    "none": None,
    "booleans": [True, False, 1, 0],
    "integers": [0, -1, 2**63, -(2**100)],
    "floats": [0.0, -0.0, 0.1, 5e-324, 1.7976931348623157e308, 1 / 3],
    "not-finite": [math.inf, -math.inf, math.nan, NAN_WITH_PAYLOAD],
    "strings": ["", "ümläut → 日本", "\ud800", '"\\\n'],
    "tuples": ((), (1, (2.0, [None])), []),
    "keys": {0: "integer", "0": "string", -5: 1, "": 2, "a.b": {"c": 3}, "a": {"b.c": 4}},
    "mappings": [{}, OrderedDict([("b", 1), ("a", 2)]), Counter({3: 2, 1: 1})],
    # Such dicts must not be taken for the marks that stand in the skeleton.
    "marks": [{"tensor": "state"}, {"tuple": [1]}, {"float": "00"}, {"dict": []}],
}


@pytest.mark.parametrize("name", LEAVES)
def test_every_kind_of_value_comes_back(name, tmp_path):
    assert same(round_trip({"value": LEAVES[name]}, tmp_path)["value"], LEAVES[name])
    assert same(round_trip(LEAVES[name], tmp_path), LEAVES[name])


def test_comparison_sees_types_bits_and_order():
    pairs = [
        *((1, True), (1, 1.0), (0.0, -0.0), (math.nan, NAN_WITH_PAYLOAD), ((1,), [1]), ({0: 1}, {"0": 1})),
        *(({"a": 1, "b": 2}, {"b": 2, "a": 1}), ({}, OrderedDict()), (torch.zeros(1), torch.zeros(()))),
        *((torch.zeros(1), -torch.zeros(1)), (torch.zeros(1), torch.zeros(1, dtype=torch.int32))),
    ]
    assert not any(same(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_every_dtype_and_shape_comes_back(dtype, tmp_path):
    size = torch.empty((), dtype=dtype).element_size()
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (12 * size,), generator=generator, dtype=torch.uint8)
    values = raw.view(dtype)  # with the bits of NaNs and infinities among the floats
    state = [values, values.reshape(3, 4), values[0], values[:0], values.reshape(3, 4).T, values[1::3]]
    back = round_trip(state, tmp_path)
    assert same(back, state)
    assert not same(back[1:], state[:-1])


def test_shared_and_odd_tensors_are_copied(tmp_path):
    base = torch.arange(6.0)
    state = {"a": base, "view": base[2:], "again": base, "wide": base[:1].expand(4), "weight": nn.Parameter(base)}
    back = round_trip(state, tmp_path)
    state["weight"] = base
    assert same(back, state)
    assert len({tensor.data_ptr() for tensor in back.values()}) == len(back)
    base.add_(1)
    assert not same(back, state), "what was saved must not follow the run"


def test_flattened_state_does_not_follow_the_run():
    base = torch.zeros(3)
    tensors, skeleton = flatten_state({"base": base})
    base.add_(1)
    assert restore_state(tensors, skeleton)["base"].sum() == 0


def test_conjugate_and_negative_views_come_back(tmp_path):
    values = torch.tensor([1 + 2j, 3 - 4j])
    views = [values.conj(), values.conj().imag]
    assert views[0].is_conj() and views[1].is_neg()
    assert [view.tolist() for view in round_trip(views, tmp_path)] == [[1 - 2j, 3 + 4j], [-2.0, 4.0]]


def test_loaded_tensors_are_aligned(tmp_path):
    # The first tensor has an odd length, so that a mapped file has the second at an odd address.
    path = save_state([torch.zeros(7), torch.ones(1001)], tmp_path / "state")
    assert all(tensor.data_ptr() % 64 == 0 for tensor in load_state(path))
    with module.safe_open(path, framework="pt") as file:
        assert any(file.get_tensor(name).data_ptr() % 64 for name in file.keys())  # noqa: SIM118


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (object(), "builtins.object at state['groups'][0][7]"),
        (np.float64(1.0), "numpy.float64 at state['groups'][0][7]"),
        (np.zeros(2), "numpy.ndarray at state['groups'][0][7]"),
        (torch.Size([2]), "torch.Size at state['groups'][0][7]"),
        ({1, 2}, "builtins.set at state['groups'][0][7]"),
        (len, "builtins.builtin_function_or_method at state['groups'][0][7]"),
        ({"deep": (None, b"")}, "builtins.bytes at state['groups'][0][7]['deep'][1]"),
        ({True: 1}, "keys, got True (bool) in state['groups'][0][7]"),
        ({1.5: 1}, "keys, got 1.5 (float) in state['groups'][0][7]"),
        ({(1, 2): 1}, "keys, got (1, 2) (tuple) in state['groups'][0][7]"),
        (torch.zeros(2).to_sparse(), "torch.float32 (torch.sparse_coo, cpu) at state['groups'][0][7]"),
        (torch.zeros(2, dtype=torch.complex128), "torch.complex128 (torch.strided, cpu) at state['groups'][0][7]"),
        (torch.zeros(2, device="meta"), "torch.float32 (torch.strided, meta) at state['groups'][0][7]"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_anything_else_is_refused_where_it_lies(value, place):
    with pytest.raises(ValueError, match="^`state` must ") as error:
        flatten_state({"groups": [{7: value}]})
    assert place in str(error.value) and "before saving" in str(error.value)
    assert "\n" not in str(error.value)


def test_tensors_must_fit_the_skeleton():
    tensors, skeleton = flatten_state({"a": torch.zeros(1), "b": torch.ones(1)})
    with pytest.raises(ValueError, match=r"^`tensors` must have all .* \"state\['a'\]\" is missing"):
        restore_state({"state['b']": tensors["state['b']"]}, skeleton)
    with pytest.raises(ValueError, match="^`tensors` must all have a place in `skeleton`, got 1 without, such as 'c'"):
        restore_state(tensors | {"c": torch.zeros(1)}, skeleton)


@pytest.mark.parametrize("damage", ["absent", "empty", "cut in the header", "cut", "no header", "of another program"])
def test_damaged_files_are_refused(damage, tmp_path):
    path = save_state({"a": torch.zeros(1000)}, tmp_path / "state")
    load_state(path)
    data = path.read_bytes()
    if damage == "absent":
        path.unlink()
    elif damage == "of another program":
        save_file({"a": torch.zeros(1)}, path)
    else:
        path.write_bytes(
            {"empty": b"", "cut in the header": data[:40], "cut": data[:-1], "no header": data[8:]}[damage]
        )
    with pytest.raises(ValueError, match="^`path` must be a whole file written by `save_state`, got ") as error:
        load_state(path)
    assert str(path) in str(error.value) and "Resume from an earlier checkpoint." in str(error.value)
    assert "\n" not in str(error.value)


def draws() -> list:
    """Random numbers of every generator, an odd number of Gaussians so that one lies in store."""
    return [
        [random.random(), random.gauss(0, 1)],
        [*np.random.rand(2).tolist(), np.random.randn(), np.random.randint(100)],
        [*torch.rand(3).tolist(), torch.randn(()).item(), *torch.randperm(5).tolist()],
    ]


def test_random_generators_go_on_where_they_were(tmp_path):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    draws()
    path = save_state(rng_state(), tmp_path / "rng")
    ahead = draws()
    random.seed(4), np.random.seed(5), torch.manual_seed(6)
    other = draws()
    assert all(a != b for a, b in zip(ahead, other, strict=True))
    set_rng_state(load_state(path))
    assert draws() == ahead


def test_gauss_in_store_is_kept(tmp_path):
    random.seed(1), np.random.seed(2)
    random.gauss(0, 1), np.random.randn()
    state = rng_state()
    assert state["python"]["gauss_next"] is not None and state["numpy"]["has_gauss"] == 1
    ahead = [random.gauss(0, 1), np.random.randn()]
    state = round_trip(state, tmp_path)
    set_rng_state(state)
    assert [random.gauss(0, 1), np.random.randn()] == ahead
    state["python"]["gauss_next"], state["numpy"]["has_gauss"] = None, 0
    set_rng_state(state)
    assert [random.gauss(0, 1), np.random.randn()] != ahead


def test_other_number_of_gpus_is_refused_before_anything_is_set():
    state = rng_state()
    count = torch.cuda.device_count() + 1
    before = torch.get_rng_state()
    torch.rand(1)
    other = torch.get_rng_state()
    with pytest.raises(ValueError, match=rf"^`state` must be of as many GPUs as .* got {count}\. Make as many"):
        set_rng_state(state | {"cuda": [torch.get_rng_state()] * count})
    assert torch.equal(torch.get_rng_state(), other) and not torch.equal(before, other)
    set_rng_state(state | {"cuda": []})
    assert torch.equal(torch.get_rng_state(), before)


SCHEDULERS = {
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
    "milestones": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 5, 5, 7], gamma=0.3),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "one-cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, 30, cycle_momentum=False),
    "sequence": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3), torch.optim.lr_scheduler.CosineAnnealingLR(o, 9)],
        [3],
    ),
}
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}


class Run:
    """A tiny training run that draws from every generator."""

    def __init__(self, optimizer: str, scheduler: str, seed: int):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 9), nn.Dropout(0.3), nn.Tanh(), nn.Linear(9, 1))
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.scheduler = SCHEDULERS[scheduler](self.optimizer)

    def steps(self, count: int) -> list[bytes]:
        losses = []
        for _ in range(count):
            inputs = torch.randn(8, 4) * random.random() + float(np.random.rand())
            loss = (self.model(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            is_plateau = isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            self.scheduler.step(*([loss.item()] if is_plateau else []))
            losses.append(bits(loss.item()))
        return losses

    def state(self) -> dict:
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        return {name: dict(part.state_dict()) for name, part in parts.items()} | {"rng": rng_state()}

    def load(self, state: dict, *names: str):
        for name in names:
            if name == "rng":
                set_rng_state(state["rng"])
            else:
                getattr(self, name).load_state_dict(state[name])


PARTS = ("model", "optimizer", "scheduler", "rng")


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resumed_run_is_identical_to_the_bit(optimizer, scheduler, tmp_path):
    run = Run(optimizer, scheduler, seed=0)
    run.steps(4)
    state = run.state()
    path = save_state(state, tmp_path / "state")
    assert same(load_state(path), state)
    ahead = run.steps(8)
    resumed = Run(optimizer, scheduler, seed=1)
    resumed.load(load_state(path), *PARTS)
    assert resumed.steps(8) == ahead
    assert same(resumed.state(), run.state())


@pytest.mark.parametrize("part", PARTS)
def test_no_part_of_the_state_can_be_left_out(part, tmp_path):
    run = Run("adamw", "cosine", seed=0)
    run.steps(4)
    path = save_state(run.state(), tmp_path / "state")
    ahead = run.steps(8)
    resumed = Run("adamw", "cosine", seed=1)
    resumed.load(load_state(path), *(name for name in PARTS if name != part))
    assert resumed.steps(8) != ahead
