"""The verdict on a pair of models: the same, a disguise, a relative or unrelated, and the numbers behind it."""

import json

import pytest
import torch
from torch import nn

from rigpt_hf.frames import is_transport
from rigpt_hf.pictures import save
from rigpt_hf.pictures.symmetry import plot_comparison
from rigpt_hf.symmetry import GaugeTransformation, compare, table_of
from rigpt_hf.symmetry.alignment import find_alignment
from rigpt_hf.symmetry.comparison import CHANCE_MARGIN, SWEEPS, VERDICTS, describe, part_of, stored_precision
from tests.models import SYMMETRIES, randomise_, tiny_config, tiny_model
from tests.symmetry.options import SHALLOW, shallow
from tests.tolerances import SYMMETRY


SOME = ("learned", "untied-projected", "rotary-learned", "squared-distance", "gated", "learned-untied-projected")
# So many tokens say less about the stream's rotation than it has dimensions (32).
FEW_TOKENS = 20
# How far the prediction of what rounding causes may be off, as a factor.
ROUNDING_FACTOR = 1.5
some, every = shallow(*SOME), shallow(*SHALLOW)


def disguised(model: nn.Module, seed: int = 1) -> nn.Module:
    """The model after a random element of the whole group."""
    g = GaugeTransformation.random(model.config, torch.Generator().manual_seed(seed), "all")
    return g(model)


@torch.no_grad()
def with_noise(model: nn.Module, level: float, seed: int = 3) -> nn.Module:
    """A copy with noise of `level` times the size of each parameter."""
    result = tiny_model(**model.config.to_diff_dict())
    noise = randomise_(tiny_model(**model.config.to_diff_dict()), seed, scale=1.0)
    for target, source, other in zip(result.parameters(), model.parameters(), noise.parameters(), strict=True):
        target.copy_(source + level * source.norm() / other.norm() * other)
    return result


@torch.no_grad()
def shuffled(model: nn.Module, seed: int = 4) -> nn.Module:
    """A copy in which the entries of every parameter have changed places."""
    result = tiny_model(**model.config.to_diff_dict())
    generator = torch.Generator().manual_seed(seed)
    for target, source in zip(result.parameters(), model.parameters(), strict=True):
        target.copy_(source.flatten()[torch.randperm(source.numel(), generator=generator)].reshape(source.shape))
    return result


@some
def test_the_same_weights(options):
    model = tiny_model(**options)
    found = compare(model, tiny_model(**options))
    assert found.verdict == "same"
    assert found.total.distance <= SYMMETRY[torch.float64] and found.total.before == 0
    assert set(found.turned.values()) == {"as it was"}
    assert compare(model, disguised(model)).verdict != "same"


@every
def test_a_disguise_in_bfloat16_is_recognised_and_its_distance_predicted(options):
    model = tiny_model(**options)
    found = compare(model, disguised(model).to(torch.bfloat16))
    assert found.verdict == "disguise"
    assert found.precision == ["float64", "bfloat16"]
    assert found.total.before > 0.5, "it is no disguise to speak of"
    assert found.total.rounding is not None and found.total.rounding > 1e-4, "there is no rounding to predict"
    ratio = found.total.distance / found.total.rounding
    print(f"distance {found.total.distance:.1e}, {ratio:.2f} of the prediction")
    assert 1 / ROUNDING_FACTOR <= ratio <= ROUNDING_FACTOR


@some
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_a_disguise_in_other_precisions(options, dtype):
    model = tiny_model(**options)
    found = compare(model, disguised(model).to(dtype))
    assert found.verdict == "disguise"
    assert found.precision == ["float64", str(dtype).removeprefix("torch.")]
    if dtype in SYMMETRY:
        assert found.total.distance <= SYMMETRY[dtype]


@some
def test_weights_once_rounded_and_stored_with_more_digits(options):
    model = tiny_model(**options).to(torch.float32)
    found = compare(model, disguised(model).to(torch.bfloat16).to(torch.float32))
    assert found.verdict == "disguise"
    assert found.precision == ["float32", "bfloat16"]


@some
def test_both_sides_rounded(options):
    model = tiny_model(**options)
    found = compare(disguised(model, 5).to(torch.bfloat16), disguised(model, 6).to(torch.bfloat16))
    assert found.verdict == "disguise"
    assert found.precision == ["bfloat16", "bfloat16"]


@every
def test_a_disguised_relative_is_no_disguise(options):
    model = tiny_model(**options)
    level = 0.3
    found = compare(model, disguised(with_noise(model, level)))
    assert found.verdict == "relative"
    # Alignment takes a part of the noise for a turn; balancing shares what is left out in another way.
    assert 0.5 * level < found.total.distance < 1.1 * level


@some
def test_a_close_relative_is_told_from_rounding(options):
    model = tiny_model(**options)
    level = 0.02
    for dtype in (torch.float64, torch.bfloat16):
        found = compare(model, disguised(with_noise(model, level)).to(dtype))
        assert found.verdict == "relative"
        assert 0.5 * level < found.total.distance < 1.1 * level


@some
def test_a_distant_relative_is_closer_than_chance(options):
    model = tiny_model(**options)
    found = compare(model, disguised(with_noise(model, 1.0)))
    assert found.verdict == "relative"
    assert found.layers.chance is not None and found.layers.distance < CHANCE_MARGIN * found.layers.chance


@every
def test_another_seed_is_unrelated(options):
    found = compare(tiny_model(**options), tiny_model(seed=9, **options))
    assert found.verdict == "unrelated"
    assert found.total.rounding is None and found.total.chance is not None
    assert found.total.distance > 0.95 * found.total.chance


@some
@torch.no_grad()
def test_shuffled_entries_are_unrelated(options):
    model = tiny_model(**options)
    found = compare(model, disguised(shuffled(model)))
    assert found.verdict == "unrelated"
    whole = [sum(float(p.square().sum()) for p in each.parameters()) for each in (model, shuffled(model))]
    assert abs(whole[0] - whole[1]) <= SYMMETRY[torch.float64] * whole[0], "the entries are others"


@pytest.mark.parametrize("seed", range(4))
def test_the_noise_that_stands_for_chance_does_not_decide(seed):
    model = tiny_model()
    assert compare(model, tiny_model(seed=9), seed=seed).verdict == "unrelated"
    assert compare(model, disguised(with_noise(model, 1.5)), seed=seed).verdict == "relative"


@pytest.mark.parametrize("name", ["learned", "rotary", "gated", "squared-distance"])
def test_fewer_tokens_than_dimensions(name):
    options = SYMMETRIES[name] | {"vocab_size": FEW_TOKENS}
    model = tiny_model(**options)
    assert model.config.vocab_size < model.config.hidden_size
    assert compare(model, disguised(model)).verdict == "disguise"
    assert compare(model, disguised(model).to(torch.bfloat16)).verdict == "disguise"
    assert compare(model, disguised(with_noise(model, 0.3))).verdict == "relative"
    assert compare(model, tiny_model(seed=9, **options)).verdict == "unrelated"


@some
def test_the_parts_are_the_whole(options):
    a, b = tiny_model(**options), disguised(with_noise(tiny_model(**options), 0.3))
    found, alignment = compare(a, b), find_alignment(a, b, max_sweeps=SWEEPS)
    # Maps between local frames are the identity in both, once balanced, and no part of the distance.
    names = [name for name, _ in a.named_parameters() if not is_transport(name)]
    assert {part.name for part in found.parts} == {part_of(name) for name in names}
    assert len(found.parts) >= 2 * a.config.num_hidden_layers + 1
    sizes = dict.fromkeys((part.name for part in found.parts), 0.0)
    for name in names:
        tensor = alignment.reference[name]
        sizes[part_of(name)] += float(tensor.square().sum() + alignment.aligned[name].square().sum()) / 2
    squared = sum(part.distance**2 * sizes[part.name] for part in found.parts) / sum(sizes.values())
    assert abs(squared**0.5 - found.total.distance) <= SYMMETRY[torch.float64]
    assert all(part.rounding is not None and part.chance is None for part in found.parts)


def test_a_change_in_one_layer_shows_there():
    model, changed = tiny_model(), tiny_model()
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight += 0.1
    found = compare(model, disguised(changed))
    assert max(found.parts, key=lambda part: part.distance).name == "layers.1.mlp"


def test_the_transformation_brings_a_to_b():
    a = tiny_model()
    b = disguised(a)
    for moved, parameter in zip(compare(a, b).transformation(a).parameters(), b.parameters(), strict=True):
        assert (moved - parameter).abs().max() <= SYMMETRY[torch.float64] * parameter.abs().max()


def test_neither_model_is_changed():
    a, b = tiny_model(), tiny_model(seed=9)
    before = [parameter.clone() for model in (a, b) for parameter in model.parameters()]
    compare(a, b)
    after = [parameter for model in (a, b) for parameter in model.parameters()]
    assert len(before) > 30 and all(torch.equal(*pair) for pair in zip(before, after, strict=True))


@torch.no_grad()
def test_stored_precision():
    model = tiny_model()
    assert stored_precision(model) is torch.float64
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rounded = tiny_model(dtype=dtype)
        assert stored_precision(rounded) is dtype
        assert stored_precision(rounded.to(torch.float64)) is dtype
    mixed = tiny_model(dtype=torch.bfloat16).to(torch.float32)
    mixed.model.norm_of_nothing = nn.Parameter(torch.tensor([1 + 2.0**-20]))
    assert stored_precision(mixed) is torch.float32


def test_what_it_found_can_be_written_and_read():
    model = tiny_model()
    for other, verdict in ((disguised(model), "disguise"), (tiny_model(seed=9), "unrelated")):
        found = compare(model, other)
        facts = json.loads(json.dumps(found.to_dict()))
        assert facts["verdict"] == verdict and facts["meaning"] == VERDICTS[verdict]
        assert facts["total"]["distance"] == found.total.distance
        assert [part["name"] for part in facts["parts"]] == [part.name for part in found.parts]
        assert set(facts) == {"verdict", "meaning", "total", "layers", "parts", "precision", "turned", "sweeps"}
        assert 1 <= facts["sweeps"] <= SWEEPS + 1


def test_a_picture_of_every_verdict(tmp_path):
    model = tiny_model()
    pairs = {"same": model, "disguise": disguised(model).to(torch.bfloat16), "unrelated": tiny_model(seed=9)}
    for verdict, other in pairs.items():
        found = compare(model, other)
        assert found.verdict == verdict
        save(plot_comparison(found, title="a and b"), tmp_path / f"{verdict}.png")
        assert (tmp_path / f"{verdict}.png").read_bytes().startswith(b"\x89PNG")
    save(plot_comparison(found), tmp_path / "no-suffix", "svg")
    assert "<svg" in (tmp_path / "no-suffix").read_text()


def test_words_for_what_a_transformation_does():
    config = tiny_config()
    generator = torch.Generator().manual_seed(2)
    still = dict.fromkeys(table_of(config).kinds, "as it was")
    assert describe(GaugeTransformation.identity(config)) == still
    turned = GaugeTransformation.random(config, generator, ["stream"])
    assert describe(turned) == still | {"stream": "1 of 1 moved"}
    turned = GaugeTransformation.random(config, generator, ["head_vo"])
    assert describe(turned) == still | {"head_vo": "6 of 6 moved"}
    one = torch.eye(config.head_dim, dtype=torch.float64).repeat(2, 1, 1)
    one[1] *= 1.5
    assert describe(GaugeTransformation(config, {"layers.0.head_vo": one})) == still | {"head_vo": "1 of 2 moved"}
    everything = GaugeTransformation.random(config, generator, "all")
    undone = everything @ everything.inverse()
    assert set(describe(undone).values()) == {"as it was"}
    assert "as it was" not in describe(everything).values() and len(describe(everything)) >= 5


def test_a_disguise_in_the_stream_alone_is_named():
    model = tiny_model()
    g = GaugeTransformation.random(model.config, torch.Generator().manual_seed(7), ["stream"])
    turned = compare(model, g(model)).turned
    assert turned.pop("stream") == "1 of 1 moved"
    assert set(turned.values()) == {"as it was"} and len(turned) >= 3


def test_models_of_two_shapes_are_refused():
    message = r"`reference` must have the same `hidden_size` as `model`, got 48 and 32\. Models of different shape"
    with pytest.raises(ValueError, match=message):
        compare(tiny_model(), tiny_model(hidden_size=48))
    with pytest.raises(ValueError, match="the same `hidden_act` as `model`, got 'relu2' and 'gelu_pytorch_tanh'"):
        compare(tiny_model(), tiny_model(hidden_act="relu2"))
