"""Training inside of the weights that have a symmetry: which optimizers keep it, in which frames, in every loop."""

import copy

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from rigpt_hf import RiGPTConfig
from rigpt_hf.optim import EquivariantOptimizer, equivariant_param_groups
from rigpt_hf.symmetry import GaugeTransformation
from rigpt_hf.symmetry.contraction import weights_of
from rigpt_hf.symmetry.tokens import Representation, SymmetricTraining, SymmetryCallback
from rigpt_hf.symmetry.tokens.filling import Filling
from rigpt_hf.symmetry.tokens.training import recorded, representation_of
from rigpt_hf.training.muon import muon_param_groups
from tests.models import ALL, COVER, over, tiny_model, tokens
from tests.symmetry.options import generator
from tests.symmetry.tokens.groups import SYMMETRIES
from tests.tolerances import SYMMETRY, TRAINING


OPTION = "learned-untied-projected"
EXACT, ROUNDED = SYMMETRY[torch.float64], SYMMETRY[torch.float32]


def equivariant(model, rate=1e-2, **options):
    return EquivariantOptimizer(equivariant_param_groups(model, lr=rate, **options), lr=rate)


def adamw(model, rate=3e-3):
    return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)


def muon(model, rate=1e-2):
    return EquivariantOptimizer(muon_param_groups(model, rate, 0.1), rate)


def begun(option=OPTION, name="symmetric", kind="irreducible", dtype=torch.float64, **options):
    model = tiny_model(dtype=dtype, **ALL[option]).train()
    representation = Representation.choose(model.config, SYMMETRIES[name](), kind=kind)
    return model, SymmetricTraining(model, representation, **options)


def train(model, training, optimizer, steps=4, project=True):
    for step in range(steps):
        ids = tokens(4, 17, seed=step)
        model(ids, labels=ids, use_cache=False).loss.backward()
        if project:
            training.project_gradients_()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        training.end_step_()
    return training.distance()


@over(COVER, ALL)
def test_the_equivariant_optimizer_keeps_every_representation(option):
    if ALL[option].get("local_frames") or ALL[option].get("post_norm"):
        return
    model, training = begun(option, "conjugations")
    optimizer = equivariant(model, lr_multipliers={"rows": 0.5, "q_proj": 2.0}, weight_decay=0.3)
    training.begin_(optimizer)
    before = weights_of(copy.deepcopy(model))
    assert training.distance() < EXACT
    assert train(model, training, optimizer) < EXACT
    assert any((tensor - before[name]).abs().max() > 1e-3 for name, tensor in weights_of(model).items())
    assert train(model, training, optimizer, steps=1, project=False) > 1e-4, "the projection does nothing"


WAYS = {"adamw": adamw, "muon": muon}


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.by_default(1)
def test_coordinatewise_optimizers_keep_permutations_alone(name):
    model, training = begun(kind="permutation")
    training.begin_(optimizer := WAYS[name](model))
    assert train(model, training, optimizer) < EXACT
    model, training = begun()
    with pytest.raises(ValueError, match="`optim` must not scale coordinates that the symmetry mixes, got one that"):
        training.begin_(WAYS[name](model))
    free, unchecked = begun()
    unchecked.check_optimizer = lambda optimizer: None
    unchecked.begin_(optimizer := WAYS[name](free))
    assert train(free, unchecked, optimizer) > 1e-4, "it was refused for nothing"
    model, training = begun(project_weights=True)
    training.begin_(optimizer := WAYS[name](model))
    assert train(model, training, optimizer) < EXACT


def test_signs_and_linear_steps_are_no_mixture():
    """Exchanges of two tokens are represented by signs, which AdamW keeps; and SGD keeps everything."""
    model = tiny_model(**ALL[OPTION]).train()
    symmetry = SYMMETRIES["cyclic"]().named("cyclic", [[5, 6], [20, 21]], 61)
    signs = SymmetricTraining(model, Representation.choose(model.config, symmetry))
    signs.begin_(optimizer := adamw(model))
    assert train(model, signs, optimizer) < EXACT
    model, training = begun()
    training.begin_(optimizer := torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1))
    assert train(model, training, optimizer) < EXACT


def test_rows_of_an_orbit_have_equal_second_moments():
    model, training = begun()
    training.begin_(optimizer := equivariant(model))
    train(model, training, optimizer)
    moments = optimizer.state[model.model.embed_tokens.weight]["exp_avg_sq"]
    for orbit in training.representation.symmetry.orbits:
        assert (moments[orbit] - moments[orbit[0]]).abs().max() < EXACT * moments[orbit[0]]
    assert (moments - moments[orbit[0]]).abs().max() > 0.1 * moments[orbit[0]] > 0


def test_training_in_another_frame_is_the_training_turned_along():
    model, training = begun()
    h = GaugeTransformation.random(model.config, generator(3), ["stream", "head", "neurons", "heads"], compact=True)
    training.begin_(optimizer := equivariant(model))
    turned = h(model).train()
    there = SymmetricTraining(turned, training.representation.conjugated(h))
    assert there.distance() < EXACT < 1e-2 < SymmetricTraining(turned, training.representation).distance()
    train(model, training, optimizer)
    assert train(turned, there, equivariant(turned)) < 100 * EXACT
    for a, b in zip(h(model).parameters(), turned.parameters(), strict=True):
        assert (a - b).abs().max() <= TRAINING * max(1.0, float(a.detach().abs().max()))
    # A shift that the group leaves alone is no hindrance.
    resting = torch.zeros(24, dtype=torch.float64)
    resting[0] = 1.0
    moved = GaugeTransformation(model.config, {"position_shift": resting[None]}) @ h
    shifted = moved(model).train()
    there = SymmetricTraining(shifted, training.representation.conjugated(moved))
    assert there.distance() < EXACT and train(shifted, there, equivariant(shifted)) < 100 * EXACT
    stretched = GaugeTransformation.random(model.config, generator(3), ["head_vo"])
    with pytest.raises(ValueError, match="`representation` must keep lengths in training, got .* 'layers.0.head_vo'"):
        SymmetricTraining(stretched(model), training.representation.conjugated(stretched))
    shifted = GaugeTransformation.random(model.config, generator(3), ["position_shift"])
    with pytest.raises(ValueError, match="`representation` must keep lengths in training, got .* 'position_shift'"):
        SymmetricTraining(shifted(model), training.representation.conjugated(shifted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.by_default(1)
def test_rounding_stays_rounding(dtype):
    """Of weights that are in 16 bits all that is left is theirs."""
    model, training = begun(dtype=dtype)
    training.begin_(optimizer := equivariant(model))
    distance = train(model, training, optimizer, steps=20)
    assert distance < (ROUNDED if dtype == torch.float32 else 2e-2)
    free, other = begun(dtype=dtype)
    other.begin_(optimizer := equivariant(free))
    assert train(free, other, optimizer, steps=20, project=False) > 10 * distance


def test_nothing_is_done_without_a_symmetry():
    model, _ = begun()
    before = copy.deepcopy(model.state_dict())
    training = SymmetricTraining(model, None)
    training.begin_(adamw(model))
    training.project_gradients_()
    training.end_step_()
    assert training.resume_(model.config, adamw(model)) and training.distance() == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_record_comes_back(tmp_path):
    model, training = begun()
    model.config.token_symmetry = training.representation.to_config()
    model.config.save_pretrained(tmp_path)
    again = recorded(RiGPTConfig.from_pretrained(tmp_path))
    for one, other in zip(training.representation.transformations, again.transformations, strict=True):
        assert all(torch.equal(element, other.elements[name]) for name, element in one.elements.items())
    assert representation_of(model, SYMMETRIES["symmetric"](), "permutation").filling.matrices, "the recorded one"
    assert not representation_of(model, SYMMETRIES["cyclic"](), "permutation").filling.matrices
    assert representation_of(model, None, "irreducible") is None and model.config.token_symmetry is None


def test_irreducibles_in_another_basis_are_the_same_representation():
    """As another machine finds them."""
    model, training = begun()
    filling = training.representation.filling
    turn = torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64, generator=generator(1))).Q
    matrices = tuple(turn @ one @ turn.T if one.shape[-1] == 2 else one for one in filling.matrices)
    symmetry = training.representation.symmetry
    other = Representation.filled(model.config, symmetry, Filling(matrices, filling.permutations, filling.frames))
    assert other.free_parameters(model) == training.representation.free_parameters(model)
    other.project_(model)
    assert SymmetricTraining(model, other).distance() < EXACT < 1e-3 < training.distance()


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        ids = tokens(1, 9, seed=index)[0]
        return {"input_ids": ids, "labels": ids}


def trained_by_trainer(folder, optim, **options):
    model, training = begun(dtype=torch.float32)
    callback = SymmetryCallback(training.representation, **options)
    arguments = TrainingArguments(
        str(folder), optim=optim, max_steps=4, logging_steps=2, learning_rate=1e-2, report_to="none", use_cpu=True,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Rows(), callbacks=[callback])
    trainer.train()
    return model, [entry["symmetry_distance"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.full
def test_a_trainer_keeps_it(tmp_path, monkeypatch):
    model, logged = trained_by_trainer(tmp_path, "equivariant")
    assert len(logged) == 2 and max(logged) < ROUNDED and recorded(model.config) is not None
    with pytest.raises(ValueError, match=r"`optim` must not scale .*\(AdamW, in model.embed_tokens.weight\)"):
        trained_by_trainer(tmp_path, "adamw_torch")
    _, logged = trained_by_trainer(tmp_path, "adamw_torch", project_weights=True)
    assert max(logged) < ROUNDED
    monkeypatch.setattr(SymmetricTraining, "project_gradients_", lambda training: None)
    _, logged = trained_by_trainer(tmp_path, "equivariant")
    assert min(logged) > 1e-3
