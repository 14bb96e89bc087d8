"""State that survives a file: the same bits, nothing but tensors and plain values, and random numbers that go on."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

from rigpt_hf.training.state import load_state, rng_state, save_state, set_rng_state


DTYPES = "float64 float32 float16 bfloat16 float8_e4m3fn complex64 int64 int32 int16 int8 uint8 bool"


def round_trip(state, folder):
    save_state(state, folder / "state.pt")
    return load_state(folder / "state.pt")


def test_what_is_saved_comes_back_and_does_not_follow_the_run(tmp_path):
    base = torch.arange(6.0)
    state = {"name": "adamw", 0: [1, 2.5, None, True, (float("inf"), "x")], "base": base, "view": base[2:], "none": {}}
    back = round_trip(state, tmp_path)
    base.add_(1)
    assert back["base"].tolist() == [0, 1, 2, 3, 4, 5] and back["view"].tolist() == [2, 3, 4, 5]
    assert all(back[key] == state[key] and type(back[key]) is type(state[key]) for key in ("name", 0, "none"))
    bits = torch.randint(0, 256, (64,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for name in DTYPES.split():
        # NaNs and infinities are among the floats.
        values = (bits % 2 if name == "bool" else bits).view(getattr(torch, name))
        state = [values, values[0], values[:0], values.reshape(2, -1).T, values[1::3]]
        for now, then in zip(round_trip(state, tmp_path), state, strict=True):
            assert (now.dtype, now.shape) == (then.dtype, then.shape)
            assert torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (now, then)))


def test_loaded_tensors_are_aligned(tmp_path):
    """In memory of their own: a file may have the second at any address."""
    back = round_trip([torch.zeros(7), torch.ones(1001), torch.zeros(3, dtype=torch.uint8)], tmp_path)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in back)


def test_anything_else_is_refused(tmp_path):
    for value in (np.float64(1.0), len, nn.Linear(1, 1)):
        with pytest.raises(ValueError, match="^`state` must be of tensors and plain values, got ") as error:
            save_state({"groups": [{7: value}]}, tmp_path / "state.pt")
        assert "\n" not in str(error.value)


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "state.pt"
    torch.save({"a": print}, tmp_path / "code.pt")
    save_state({"a": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    for damage in (None, b"", whole[:-100], b"{}" * 100, (tmp_path / "code.pt").read_bytes()):
        path.unlink() if damage is None else path.write_bytes(damage)
        with pytest.raises(
            ValueError, match="^`path` must be a whole file of tensors and plain values, got "
        ) as error:
            load_state(path)
        assert str(path) in str(error.value) and "Resume from an earlier checkpoint." in str(error.value)
        assert "\n" not in str(error.value) and "weights_only" not in str(error.value)


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
    state = rng_state()
    assert state["python"][2] is not None and state["numpy"][3] == 1, "a Gaussian lies in store"
    save_state(state, tmp_path / "rng.pt")
    ahead = draws()
    random.seed(4), np.random.seed(5), torch.manual_seed(6)
    other = draws()
    assert all(a != b for a, b in zip(ahead, other, strict=True))
    set_rng_state(load_state(tmp_path / "rng.pt"))
    assert draws() == ahead


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


OPTIMIZERS = {
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=0.01, amsgrad=True),
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.01, momentum=0.9),
    "rprop": lambda weights: torch.optim.Rprop(weights, lr=0.01),
}
SCHEDULERS = {
    "lambda": lambda optimizer: schedulers.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "cosine": lambda optimizer: schedulers.CosineAnnealingLR(optimizer, 20),
    "milestones": lambda optimizer: schedulers.MultiStepLR(optimizer, [2, 5, 5, 7], gamma=0.3),
    "plateau": lambda optimizer: schedulers.ReduceLROnPlateau(optimizer, patience=1),
    "one-cycle": lambda optimizer: schedulers.OneCycleLR(optimizer, 0.1, 30, cycle_momentum=False),
}
PARTS = ("model", "optimizer", "scheduler")


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.by_default(8)
def test_a_run_goes_on_to_the_bit(optimizer, scheduler, tmp_path):
    def start(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 9), nn.Dropout(0.3), nn.Tanh(), nn.Linear(9, 1))
        running = OPTIMIZERS[optimizer](model.parameters())
        return model, running, SCHEDULERS[scheduler](running)

    def steps(model, running, schedule, count):
        losses = []
        for _ in range(count):
            running.zero_grad()
            loss = model(torch.randn(8, 4)).square().mean()
            loss.backward()
            running.step()
            schedule.step(*[loss.item()] * (scheduler == "plateau"))
            losses.append(loss.item())
        return losses

    run = start(0)
    steps(*run, 4)
    saved = {name: dict(part.state_dict()) for name, part in zip(PARTS, run, strict=True)}
    back = round_trip(saved | {"rng": rng_state()}, tmp_path)
    ahead = steps(*run, 8)
    for left_out in (None, *PARTS, "rng"):
        resumed = start(1)
        for name, part in zip(PARTS, resumed, strict=True):
            if name != left_out:
                part.load_state_dict(back[name])
        if left_out != "rng":
            set_rng_state(back["rng"])
        assert (steps(*resumed, 8) == ahead) == (left_out is None), left_out
