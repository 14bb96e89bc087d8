"""State that survives a file: the same bits, nothing but tensors and plain values, and random numbers that go on."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from rigpt_hf.training.state import load_state, rng_state, save_state, set_rng_state


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
    for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool):
        values = torch.tensor([0, 1, 1], dtype=dtype)
        assert torch.equal(round_trip([values], tmp_path)[0], values)


def test_loaded_tensors_are_aligned(tmp_path):
    """In memory of their own: a file may have the second at any address."""
    back = round_trip([torch.zeros(7), torch.ones(1001), torch.zeros(3, dtype=torch.uint8)], tmp_path)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in back)


@pytest.mark.parametrize("value", [np.float64(1.0), len, nn.Linear(1, 1)], ids=lambda value: type(value).__name__)
def test_anything_else_is_refused(value, tmp_path):
    with pytest.raises(ValueError, match="^`state` must be of tensors and plain values, got ") as error:
        save_state({"groups": [{7: value}]}, tmp_path / "state.pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["absent", "empty", "cut", "of another program", "with code in it"])
def test_damaged_files_are_refused(damage, tmp_path):
    path = tmp_path / "state.pt"
    save_state({"a": torch.zeros(1000)}, path)
    data = path.read_bytes()
    if damage == "absent":
        path.unlink()
    elif damage == "with code in it":
        torch.save({"a": print}, path)
    else:
        path.write_bytes({"empty": b"", "cut": data[:-100], "of another program": b"{}" * 100}[damage])
    with pytest.raises(ValueError, match="^`path` must be a whole file of tensors and plain values, got ") as error:
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


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Rprop])
def test_an_optimizer_goes_on_to_the_bit(optimizer, tmp_path):
    def start(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 9), nn.Dropout(0.3), nn.Tanh(), nn.Linear(9, 1))
        return model, optimizer(model.parameters(), lr=0.01)

    def steps(model, optimizer, count):
        losses = []
        for _ in range(count):
            optimizer.zero_grad()
            loss = model(torch.randn(8, 4)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    model, running = start(0)
    steps(model, running, 4)
    saved = {"model": model.state_dict(), "optimizer": running.state_dict(), "rng": rng_state()}
    saved["model"] = dict(saved["model"])
    back = round_trip(saved, tmp_path)
    ahead = steps(model, running, 6)
    for left_out in (None, "model", "optimizer", "rng"):
        other, resumed = start(1)
        if left_out != "model":
            other.load_state_dict(back["model"])
        if left_out != "optimizer":
            resumed.load_state_dict(back["optimizer"])
        if left_out != "rng":
            set_rng_state(back["rng"])
        assert (steps(other, resumed, 6) == ahead) == (left_out is None), left_out
