"""The verdict on a pair of models: the same, a disguise, a relative or unrelated, and the numbers behind it."""

import json

import pytest
import torch
from torch import nn

from rigpt_hf.frames import is_transport
from rigpt_hf.pictures import save
from rigpt_hf.pictures.symmetry import plot_comparison
from rigpt_hf.symmetry import GaugeTransformation, canonical_gauge, compare, table_of
from rigpt_hf.symmetry.alignment import find_alignment
from rigpt_hf.symmetry.comparison import ROUNDED, SWEEPS, VERDICTS, Comparison, Part, describe
from rigpt_hf.symmetry.expectation import unaligned
from rigpt_hf.symmetry.given import given
from rigpt_hf.symmetry.layered import part_of
from tests.models import noisy, over, tiny_config, tiny_model
from tests.symmetry.options import SEARCHED, SHALLOW, cases, disguise, generator
from tests.tolerances import SYMMETRY


# So many tokens say less about the stream's rotation than it has dimensions (32).
ALL_TOKENS, FEW_TOKENS = 61, 20
# How far the prediction of what rounding causes may be off, as a factor.
ROUNDING_FACTOR = 1.5
FEW = [(name, FEW_TOKENS) for name in ("gated", "learned", "rotary", "squared-distance")]
EVERY = [(name, ALL_TOKENS) for name in SHALLOW]
one = over(SEARCHED[1:2], SEARCHED)


@torch.no_grad()
def shuffled(model: nn.Module, seed: int = 4) -> nn.Module:
    """A copy in which the entries of every parameter have changed places."""
    result = tiny_model(**model.config.to_diff_dict())
    draw = generator(seed)
    for target, source in zip(result.parameters(), model.parameters(), strict=True):
        target.copy_(source.flatten()[torch.randperm(source.numel(), generator=draw)].reshape(source.shape))
    return result


@pytest.mark.parametrize(
    ("name", "vocab_size"), cases([*((name, ALL_TOKENS) for name in SEARCHED), FEW[0]], EVERY + FEW)
)
@pytest.mark.by_default(2)
def test_the_four_verdicts(name, vocab_size):
    options, level = SHALLOW[name] | {"vocab_size": vocab_size}, 0.3
    model = tiny_model(**options)
    same = compare(model, tiny_model(**options))
    assert same.verdict == "same" and set(same.turned.values()) == {"as it was"}
    assert same.total.distance <= SYMMETRY[torch.float64] and same.total.before == 0

    rounded = compare(model, disguise(model, dtype=torch.bfloat16))
    assert rounded.verdict == "disguise" and rounded.precision == ["float64", "bfloat16"]
    assert rounded.total.before > 0.5, "it is no disguise to speak of"
    assert rounded.total.rounding is not None and rounded.total.rounding > 1e-4, "there is no rounding to predict"
    ratio = rounded.total.distance / rounded.total.rounding
    assert 1 / ROUNDING_FACTOR <= ratio <= ROUNDING_FACTOR

    relative = compare(model, disguise(noisy(model, level)))
    assert relative.verdict == "relative"
    # Alignment takes a part of the noise for a turn; balancing shares what is left out in another way.
    assert 0.5 * level < relative.total.distance < 1.1 * level

    other = tiny_model(seed=9, **options)
    glance = compare(model, other, search="never")
    assert glance.verdict == "unrelated" and glance.fingerprint > 0.75 and glance.total is None
    unrelated = compare(model, other, search="always")
    assert unrelated.verdict == "unrelated"
    assert unrelated.total.rounding is None and unrelated.layers.distance > 0.8


@one
@pytest.mark.full
def test_a_disguise_in_other_precisions(option):
    model = tiny_model(**SHALLOW[option])
    for dtype in (torch.float64, torch.float32, torch.float16):
        found = compare(model, disguise(model, dtype=dtype))
        assert found.verdict == "disguise"
        assert found.precision == ["float64", str(dtype).removeprefix("torch.")]
        if dtype in SYMMETRY:
            assert found.total.distance <= SYMMETRY[dtype]
    single = tiny_model(dtype=torch.float32, **SHALLOW[option])
    stored_finer = compare(single, disguise(single, dtype=torch.bfloat16).to(torch.float32))
    assert stored_finer.verdict == "disguise" and stored_finer.precision == ["float32", "bfloat16"]
    both = compare(*(disguise(model, seed, dtype=torch.bfloat16) for seed in (5, 6)))
    assert both.verdict == "disguise" and both.precision == ["bfloat16", "bfloat16"]


@one
def test_a_close_relative_is_told_from_rounding(option):
    model, level = tiny_model(**SHALLOW[option]), 0.02
    for dtype in (torch.float64, torch.bfloat16):
        found = compare(model, disguise(noisy(model, level), dtype=dtype))
        assert found.verdict == "relative"
        assert 0.5 * level < found.total.distance < 1.1 * level


@one
@torch.no_grad()
def test_shuffled_entries_are_unrelated(option):
    model = tiny_model(**SHALLOW[option])
    other = shuffled(model)
    assert compare(model, disguise(other)).verdict == "unrelated"
    squares = [sum(float(p.square().sum()) for p in side.parameters()) for side in (model, other)]
    assert abs(squares[0] - squares[1]) <= SYMMETRY[torch.float64] * squares[0], "the entries are others"


@torch.no_grad()
def exchanged(model: nn.Module, neurons: int = 2) -> nn.Module:
    """A copy in which the first neurons of the first layer are in the other order."""
    other = tiny_model(**model.config.to_diff_dict())
    other.load_state_dict(model.state_dict())
    mlp = other.model.layers[0].mlp
    for name, parameter in mlp.named_parameters():
        rows = parameter.T if name == "down_proj.weight" else parameter
        if rows.shape[0] == model.config.intermediate_size:
            rows[:neurons] = rows[:neurons].flip(0).clone()
    return other


@one
@torch.no_grad()
def test_weights_that_are_equal_up_to_rounding_are_the_same(option):
    """And not those that differ by two neurons, which are little among all weights."""
    model = tiny_model(**SHALLOW[option])
    single, half = (tiny_model(**SHALLOW[option]).to(dtype) for dtype in (torch.float32, torch.bfloat16))
    noise = noisy(single, torch.finfo(torch.float32).eps)
    for a, b in ((single, noise), (model, half), (half, model)):
        found = compare(a, b)
        assert found.verdict == "same" and found.meaning == ROUNDED and 0 < found.total.before <= found.limit
        assert set(found.turned.values()) == {"as it was"}
        moved = found.transformation(a).to(torch.float64)
        for one_weight, same in zip(moved.parameters(), a.to(torch.float64).parameters(), strict=True):
            assert torch.equal(one_weight, same), "the identity brings A to B"
    mlp = model.model.layers[0].mlp
    for size in (1.0, 0.05):
        for name, parameter in mlp.named_parameters():
            rows = parameter.T if name == "down_proj.weight" else parameter
            if rows.shape[0] == model.config.intermediate_size:
                rows[:2] *= size
        found = compare(model, exchanged(model).to(torch.bfloat16))
        assert found.verdict == "disguise" and found.turned["neurons"] == "1 of 2 moved"
    assert found.total.before < 2 * found.limit, "the neurons are not little"


@over(SEARCHED[3:], SEARCHED)
def test_the_parts_are_the_whole(option):
    a = tiny_model(**SHALLOW[option])
    b = disguise(noisy(a, 0.3))
    found, alignment = compare(a, b), find_alignment(a, b, max_sweeps=SWEEPS)
    # Maps between local frames are the identity in both, once balanced, and no part of the distance.
    names = [name for name, _ in a.named_parameters() if not is_transport(name)]
    assert {part.name for part in found.parts} == {part_of(name) for name in names}
    assert len(found.parts) >= 2 * a.config.num_hidden_layers + 1
    sizes = dict.fromkeys((part.name for part in found.parts), 0.0)
    for name in names:
        squares = (side[name].square().sum() for side in (alignment.reference, alignment.aligned))
        sizes[part_of(name)] += float(sum(squares)) / 2
    squared = sum(part.distance**2 * sizes[part.name] for part in found.parts) / sum(sizes.values())
    assert abs(squared**0.5 - found.total.distance) <= SYMMETRY[torch.float64]
    assert all(part.rounding is None for part in found.parts), "rounding explains none of it"
    rounded = compare(a, disguise(a, dtype=torch.bfloat16))
    assert all(part.rounding is not None for part in rounded.parts)


def test_a_change_in_one_layer_shows_there():
    model, changed = tiny_model(), tiny_model()
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight += 0.1
    found = compare(model, disguise(changed))
    assert max(found.parts, key=lambda part: part.distance).name == "layers.1.mlp"


@torch.no_grad()
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.by_default(3)
def test_the_size_of_weights_does_not_decide(dtype, size):
    """Products of them leave the range of float32, and powers of those at both ends that of float64."""
    options = {**SHALLOW["gated"], "num_attention_heads": 4, "num_key_value_heads": 2}
    model = tiny_model(dtype=torch.float32, **options)
    turned = GaugeTransformation.random(model.config, generator(1), compact=True)(model)
    with torch.no_grad():
        for each in (model, turned):
            for parameter in each.parameters():
                parameter.mul_(size)
    found = compare(model.to(dtype), turned.to(dtype))
    assert found.verdict == "disguise" and found.total.distance < 0.02, found.total
    assert compare(model, model).verdict == "same"


def test_a_row_that_dwarfs_all_others_is_refused():
    model = tiny_model(**SHALLOW["gated"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter[0] *= 1e30
    with pytest.raises(ValueError, match="`model` must have weights of sizes that float64 can hold side by side"):
        canonical_gauge(model)


def stored_precision(model: nn.Module) -> torch.dtype:
    return unaligned(given(model), given(tiny_model()))[1][0]


def test_stored_precision():
    model = tiny_model()
    assert stored_precision(model) is torch.float64
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rounded = tiny_model(dtype=dtype)
        assert stored_precision(rounded) is dtype
        assert stored_precision(rounded.to(torch.float64)) is dtype
    mixed = tiny_model(dtype=torch.bfloat16).to(torch.float32)
    mixed.model.layers[0].mlp.up_proj.bias.data[0] = 1 + 2.0**-20
    assert stored_precision(mixed) is torch.float32


def test_the_outcome_can_be_written_and_read_and_drawn(turned, tmp_path):
    a, b, _ = turned("rotary")
    outcomes = {
        "disguise": compare(a, b),
        "same": compare(a, a),
        "unrelated": compare(a, tiny_model(seed=9), search="always"),
    }
    for moved, parameter in zip(outcomes["disguise"].transformation(a).parameters(), b.parameters(), strict=True):
        assert (moved - parameter).abs().max() <= SYMMETRY[torch.float64] * parameter.abs().max()
    for verdict, found in outcomes.items():
        facts = json.loads(json.dumps(found.to_dict()))
        assert facts["verdict"] == verdict and facts["meaning"] == VERDICTS[verdict]
        assert facts["total"]["distance"] == found.total.distance
        assert [part["name"] for part in facts["parts"]] == [part.name for part in found.parts]
        told = {"verdict", "meaning", "total", "layers", "parts", "precision", "turned", "sweeps", "notes"}
        assert set(facts) == told | {"limit", "fingerprint", "layers_apart", "incomparable"}
        assert (verdict != "same") <= facts["sweeps"] <= SWEEPS
        save(plot_comparison(found, ("a", "b")), tmp_path / f"{verdict}.png")
        assert (tmp_path / f"{verdict}.png").read_bytes().startswith(b"\x89PNG")
    save(plot_comparison(found), tmp_path / "no-suffix", "svg")
    assert "<svg" in (tmp_path / "no-suffix").read_text()


def drawn_of(layers, distance, limit=1e-5):
    """The picture of models of so many layers, and its size in pixels."""
    names = ["embed_tokens", *(f"layers.{index}.{kind}" for index in range(layers) for kind in ("self_attn", "mlp"))]
    parts = [Part(name, distance, distance) for name in names]
    whole = Part("all", distance, distance)
    found = Comparison(0.1, [], "relative", total=whole, layers=whole, parts=parts, limit=limit)
    made = plot_comparison(found, ("a", "b"))
    made.canvas.draw()
    return made.axes[0], made.get_size_inches() * made.dpi


@pytest.mark.parametrize("layers", [2, 5, 6, 30, 100])
def test_a_picture_of_many_layers_is_a_line_over_depth(layers):
    panel, (width, _) = drawn_of(layers, 0.003)
    assert width < 800, "no wider than a page"
    names = [label.get_text() for label in panel.get_xticklabels()]
    if layers <= 5:
        assert len(panel.patches) == 2 * layers + 1 and names[1] == "0.self_attn"
        return
    assert not panel.patches and len(names) <= 12 and names[0] == "embed_tokens"
    assert all(name.isdigit() for name in names[1:]) and panel.get_xlabel() == "layer"
    lines = [line for line in panel.lines if str(line.get_label()).startswith("aligned: ")]
    assert [len(line.get_xdata()) for line in lines] == [layers, layers, 1]
    places = [label.get_window_extent().x0 for label in panel.get_xticklabels()]
    assert places == sorted(places)


@pytest.mark.parametrize("distance", [0.003, 1e-7, 0.0])
def test_the_axis_of_distances_goes_from_rounding_to_one(distance):
    panel, _ = drawn_of(2, distance, None if distance == 0 else 1e-5)
    low, high = panel.get_ylim()
    words = [text.get_text() for text in panel.texts]
    assert high > 1 and any(text.startswith("1: as large as") for text in words)
    assert (low <= min(distance, 1e-5) and "1e-05: up to here\nit may be rounding" in words) is (distance > 0)
    assert ("all distances are 0" in words) is (distance == 0)


def test_layers_of_fingerprints_are_counted_in_whole_numbers():
    made = plot_comparison(Comparison(0.99, [0.99, 0.98], "unrelated"))
    made.canvas.draw()
    assert all(float(tick).is_integer() for tick in made.axes[0].get_xticks())


def test_words_for_what_a_transformation_does():
    config = tiny_config()
    draw = generator(2)
    still = dict.fromkeys(table_of(config).kinds, "as it was")
    assert describe(GaugeTransformation.identity(config)) == still
    turned = GaugeTransformation.random(config, draw, ["stream"])
    assert describe(turned) == still | {"stream": "1 of 1 moved"}
    turned = GaugeTransformation.random(config, draw, ["head_vo"])
    assert describe(turned) == still | {"head_vo": "6 of 6 moved"}
    one = torch.eye(config.head_dim, dtype=torch.float64).repeat(2, 1, 1)
    one[1] *= 1.5
    assert describe(GaugeTransformation(config, {"layers.0.head_vo": one})) == still | {"head_vo": "1 of 2 moved"}
    everything = GaugeTransformation.random(config, draw, "all")
    undone = everything @ everything.inverse()
    assert set(describe(undone).values()) == {"as it was"}
    assert "as it was" not in describe(everything).values() and len(describe(everything)) >= 5


def test_a_disguise_in_the_stream_alone_is_named():
    model = tiny_model()
    turned = compare(model, disguise(model, 7, ["stream"])).turned
    assert turned.pop("stream") == "1 of 1 moved"
    assert set(turned.values()) == {"as it was"} and len(turned) >= 3


def test_fingerprints_alone_decide_between_models_of_two_shapes():
    found = compare(tiny_model(), tiny_model(hidden_size=48), search="always")
    assert found.verdict == "unrelated" and found.total is None and "`hidden_size`, got 32" in found.incomparable
    model, shorter = tiny_model(), tiny_model(num_hidden_layers=2)
    kept = {name.replace("layers.2.", "layers.1."): weight for name, weight in model.state_dict().items()}
    kept |= {name: weight for name, weight in model.state_dict().items() if "layers.0." in name}
    shorter.load_state_dict({name: kept[name] for name in shorter.state_dict()})
    found = compare(model, disguise(shorter))
    assert found.verdict == "relative" and "`num_hidden_layers`, got 3" in found.incomparable
    assert found.fingerprint <= SYMMETRY[torch.float64] and len(found.layers_apart) == 2
    other = compare(tiny_model(), tiny_model(hidden_act="relu2"))
    assert other.verdict == "relative", "the weights are the same"
    assert "`hidden_act`, got 'gelu_pytorch_tanh'" in other.incomparable
