"""Fingerprints: the same for all members of an orbit, near for relatives, far for others, small, and read in part."""

import itertools
import time

import pytest
import torch

from rigpt_hf.symmetry import Fingerprint, GaugeTransformation, fingerprint
from rigpt_hf.symmetry.fingerprint import BYTES, SHARE, count_probes, in_order, is_fingerprint, nearest_of
from rigpt_hf.symmetry.sketch import KINDS, signs, sketch
from tests.models import SYMMETRIES, noisy, over, tiny_model
from tests.symmetry.options import SEARCHED, SHALLOW, disguise, generator
from tests.tolerances import SYMMETRY


# Layers whose frames are shared have no sketch of their own.
SKETCHED = [name for name in SYMMETRIES if SYMMETRIES[name].get("depth_interpolation", "constant") == "constant"]
WIDE = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 200}


def sketched(model, probes: int = 8) -> torch.Tensor:
    weights = dict(model.named_parameters())
    return sketch(model.config, tuple(weights), lambda name: weights[name].detach(), probes)


@over(SEARCHED, SKETCHED)
def test_no_choice_of_frames_changes_a_sketch(option):
    model = tiny_model(**SYMMETRIES[option])
    sketches = sketched(model)
    assert sketches.shape == (model.config.num_hidden_layers, len(KINDS), 8, 8)
    assert torch.allclose(sketches.flatten(2).norm(dim=2), torch.ones(()).double()), "a map was left out"
    turned = GaugeTransformation.random(model.config, generator(1), "all")(model)
    assert (sketched(turned) - sketches).abs().max() <= 100 * SYMMETRY[torch.float64]
    with torch.no_grad():  # a shear of the stream is no choice of frames
        turned.model.embed_tokens.weight[:, 0] *= 1.5
    assert (sketched(turned) - sketches).abs().max() > 1e-3


@pytest.mark.parametrize("option", SEARCHED[:2])
def test_the_size_of_the_table_does_not_decide(option):
    """Its squares leave the range of float64."""
    model = tiny_model(**SYMMETRIES[option])
    before = sketched(model)
    for exponent in (-660, 660):
        with torch.no_grad():
            scaled = model.model.embed_tokens.weight.ldexp(torch.tensor(float(exponent)))
            weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        weights["model.embed_tokens.weight"] = scaled
        assert not scaled.square().norm().isfinite() or not scaled.square().any()
        found = sketch(model.config, tuple(weights), weights.__getitem__, 8)
        assert (found - before).abs().max() <= SYMMETRY[torch.float64]


@over(SEARCHED[:2], SEARCHED)
def test_relatives_are_nearer_than_others(option):
    model = tiny_model(**SHALLOW[option])
    own = fingerprint(model)
    apart = [own.distance(fingerprint(disguise(noisy(model, level)))) for level in (0.0, 0.03, 0.3)]
    assert apart[0] <= SYMMETRY[torch.float64] and apart[0] < apart[1] < apart[2] < 0.6
    assert own.distance(fingerprint(tiny_model(seed=9, **SHALLOW[option]))) > 0.8
    assert own.distance(fingerprint(disguise(model, dtype=torch.bfloat16))) < 1e-3


def test_models_of_other_widths_depths_and_vocabularies_are_comparable():
    model = tiny_model(**WIDE)
    own, weights = fingerprint(model), model.state_dict()
    pruned = tiny_model(**WIDE, intermediate_size=96)
    with torch.no_grad():
        for layer, source in zip(pruned.model.layers, model.model.layers, strict=True):
            layer.mlp.up_proj.weight.copy_(source.mlp.up_proj.weight[:96])
            layer.mlp.down_proj.weight.copy_(source.mlp.down_proj.weight[:, :96])
        for name, parameter in pruned.named_parameters():
            if ".mlp." not in name:
                parameter.copy_(weights[name])
    assert own.distance(fingerprint(disguise(pruned))) < 0.2
    longer = tiny_model(**WIDE | {"vocab_size": 210})
    with torch.no_grad():
        for name, parameter in longer.named_parameters():
            parameter[: len(weights[name])] = weights[name]
    assert own.distance(fingerprint(longer)) < 0.3
    other = fingerprint(tiny_model(**WIDE | {"hidden_size": 48, "num_hidden_layers": 5}, seed=3))
    assert own.distance(other) == pytest.approx(other.distance(own)) and own.distance(other) > 0.8


def test_layers_are_matched_in_order():
    draw = generator(2)
    for rows, columns in ((1, 1), (3, 3), (3, 7), (4, 5)):
        likeness = torch.rand(rows, columns, generator=draw, dtype=torch.float64) - 0.3
        pairs = in_order(likeness)
        assert all(a < c and b < d for (a, b), (c, d) in itertools.pairwise(pairs))
        best = max(
            sum(float(likeness[row, column]) for row, column in zip(chosen, others, strict=True))
            for count in range(rows + 1)
            for chosen in itertools.combinations(range(rows), count)
            for others in itertools.combinations(range(columns), count)
        )
        assert sum(float(likeness[row, column]) for row, column in pairs) == pytest.approx(best)


@torch.no_grad()
def test_what_no_token_uses_and_where_layers_stand_does_not_decide():
    """Attacks that change nothing, or a layer, of what a model does."""
    model = tiny_model(**WIDE)
    own = fingerprint(model)
    row = tiny_model(**WIDE)
    row.model.embed_tokens.weight[150] *= 1e4
    assert own.distance(fingerprint(row)) < 0.3
    shifted = tiny_model(**WIDE)
    layers = shifted.model.layers
    layers[1].load_state_dict(model.model.layers[0].state_dict())
    for parameter in layers[0].parameters():
        parameter.zero_()
    assert own.distance(fingerprint(shifted)) < 0.4


def test_signs_are_the_same_for_ever_and_as_good_as_drawn():
    assert signs(0, 2, 8).tolist() == [[-1, 1, 1, -1, 1, 1, -1, 1], [-1, -1, 1, 1, -1, 1, -1, -1]]
    whole = signs(0, 5000, 16)
    assert torch.equal(whole[1234:1300], signs(1234, 66, 16))
    assert torch.equal(whole[:, :8], signs(0, 5000, 8))
    correlations = whole.T @ whole / 5000 - torch.eye(16).double()
    assert correlations.abs().max() < 0.06 and whole.mean(dim=0).abs().max() < 0.06


def test_a_fingerprint_is_small():
    for layers, parameters in ((2, 10**5), (12, 124 * 10**6), (30, 135 * 10**6), (80, 70 * 10**9), (126, 405 * 10**9)):
        probes = count_probes(layers, parameters)
        numbers = layers * len(KINDS) * probes**2
        assert numbers <= max(SHARE * parameters, layers * len(KINDS) * 64)
        assert 4 * (numbers + layers * len(KINDS) * 64) + 4096 <= BYTES + 4096


def test_what_is_saved_is_read(tmp_path):
    own = fingerprint(tiny_model(**WIDE))
    own.save(tmp_path / "one")
    loaded = Fingerprint.load(tmp_path / "one")
    assert loaded.facts == dict(own.facts) and own.distance(loaded) <= 1e-12
    assert is_fingerprint(tmp_path / "one") and not is_fingerprint(tmp_path)
    content = (tmp_path / "one").read_bytes()
    for name, damaged in (("cut", content[:-9]), ("text", b"no fingerprint"), ("empty", b"")):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match="`fingerprint` must be a file that `rigpt fingerprint` wrote, got"):
            Fingerprint.load(tmp_path / name)


def test_the_nearest_of_many_is_found_quickly(tmp_path):
    own = fingerprint(tiny_model(**WIDE))
    draw, count = generator(4), 200
    for index in range(count):
        noise = torch.randn(own.sketches.shape, generator=draw, dtype=torch.float64)
        Fingerprint(noise, dict(own.facts, name=str(index))).save(tmp_path / f"{index}")
    near = Fingerprint(own.sketches + 0.02 * torch.randn(own.sketches.shape, generator=draw).double(), own.facts)
    near.save(tmp_path / "near")
    (tmp_path / "README").write_text("not one of them")
    before = time.process_time()
    found = nearest_of(own, tmp_path)
    assert time.process_time() - before < 0.6  # 3 s for a thousand
    assert found[0][0].name == "near" and len(found) == 5 and found[0][2] < 0.5 < found[1][2]
    assert all(first[2] <= second[2] for first, second in itertools.pairwise(found))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="`folder` must hold fingerprints, got .*empty"):
        nearest_of(own, tmp_path / "empty")


def test_layers_that_share_frames_are_refused():
    model = tiny_model(**SYMMETRIES["alibi-between"])
    with pytest.raises(ValueError, match="A fingerprint needs layers with frames of their own"):
        fingerprint(model)
