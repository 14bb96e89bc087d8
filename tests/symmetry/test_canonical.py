"""One canonical member per orbit: the same from everywhere, the same function, stable, and honest where it is not."""

import logging
from collections.abc import Callable

import pytest
import torch

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.conversion import convert_model
from rigpt_hf.groups import DEGENERATE
from rigpt_hf.groups.spectra import odd_moments
from rigpt_hf.symmetry import GaugeTransformation, canonical_gauge, canonicalize, gauge_error, invariants, table_of
from rigpt_hf.symmetry.contraction import token_vectors, weights_of
from tests.conversion.sources import gpt2_config, stock_model
from tests.models import SYMMETRIES, noisy, over, tiny_config, tiny_model, tokens
from tests.symmetry.options import SEARCHED, SHALLOW, cases, difference, disguise, generator
from tests.tolerances import CANONICAL, SYMMETRY


# Everything whose eigenvectors or axes are a basis; heads and neurons are put in order, which is right or wrong.
CONTINUOUS = {"stream", "lexical", "output", "head_qk", "head_vo", "planes"}
# With D > d there are directions of token vectors that project_in does not see.
UNSEEN = {"untied-projected": ["8 equal eigenvalues in lexical", "7 equal eigenvalues in output"]}
LAYER = 1


def assert_canonical(model, seeds=(0,)) -> list[str]:
    """Members of the orbit have one canonical form, with the same function; returns what is reported undetermined."""
    gauge = canonical_gauge(model)
    canonical = gauge.transformation(model)
    assert gauge_error(model, gauge.transformation, tokens(2, 9)) <= SYMMETRY[torch.float64]
    for seed in seeds:
        other = disguise(model, seed)
        assert difference(other, model) > 0.1, "the disguise did nothing to speak of"
        theirs = canonical_gauge(other)
        assert difference(theirs.transformation(other), canonical, other) <= CANONICAL[torch.float64]
        assert theirs.undetermined == gauge.undetermined
    assert difference(canonicalize(canonical), canonical, model) <= CANONICAL[torch.float64]
    return gauge.undetermined


@over(SEARCHED, SYMMETRIES)
@pytest.mark.by_default(2)
def test_members_of_an_orbit_have_one_canonical_form(turned, option):
    model = turned(option).model
    assert assert_canonical(model) == UNSEEN.get(option, [])
    assert difference(canonicalize(model), model) > 0.1, "the model was canonical before"


@pytest.mark.full
@pytest.mark.parametrize("name", ["rotary", "gated-relu2", "learned-untied-projected"])
def test_many_members_of_an_orbit_have_one_canonical_form(name):
    assert assert_canonical(tiny_model(2, **SYMMETRIES[name]), seeds=range(1, 6)) == []


@over(SEARCHED, SYMMETRIES)
@pytest.mark.by_default(2)
def test_each_frame_alone_changes_nothing(option):
    model = tiny_model(**SHALLOW[option])
    canonical = canonicalize(model)
    kinds = table_of(model.config).kinds
    for frame in kinds:
        other = disguise(model, 2, [frame])
        moved = difference(other, model)
        assert moved > 0.01 or (frame == "heads" and model.config.num_attention_heads == 1), frame
        assert difference(canonicalize(other), canonical, other) <= CANONICAL[torch.float64], frame
    assert len(kinds) >= 5


@over(SEARCHED, SYMMETRIES)
def test_in_float32(option):
    model = tiny_model(dtype=torch.float32, **SHALLOW[option])
    other = disguise(model, 3)
    gauge = canonical_gauge(model)
    canonical = gauge.transformation(model)
    assert {parameter.dtype for parameter in canonical.parameters()} == {torch.float32}
    assert gauge_error(model, gauge.transformation, tokens(2, 9)) <= SYMMETRY[torch.float32]
    assert difference(canonicalize(other), canonical, other) <= CANONICAL[torch.float32]


@over(SEARCHED, SYMMETRIES)
def test_noise_moves_the_canonical_form_by_noise_over_gap(option):
    model = tiny_model(**SHALLOW[option])
    gauge = canonical_gauge(model)
    gaps = [gap for gap in gauge.gaps.values() if gap >= DEGENERATE]
    noise = CANONICAL[torch.float64] / 10
    assert min(gaps) > noise, "the order itself may change"
    moved = difference(canonicalize(noisy(model, noise)), gauge.transformation(model))
    gap = min(gap for kind, gap in gauge.gaps.items() if kind in CONTINUOUS and gap >= DEGENERATE)
    assert noise / 10 <= moved <= noise / gap, "too far, or there was no noise"


@over(SEARCHED, SYMMETRIES)
@pytest.mark.by_default(2)
def test_invariants(turned, option):
    model, other, _ = turned(option)
    spectra, config = invariants(model), model.config
    assert spectra["stream"].shape == (config.hidden_size,)
    neurons = config.moe_intermediate_size and config.num_experts * config.moe_intermediate_size
    kind, count = ("expert_neurons", neurons) if neurons else ("neurons", config.intermediate_size)
    assert spectra[f"layers.0.{kind}"].shape == (count,)
    assert spectra["layers.0.heads"].shape == (config.num_attention_heads,)
    assert spectra["layers.2.head_vo"].shape == (config.num_key_value_heads * config.head_dim,)
    assert {"lexical", "output"} & set(spectra) == {"lexical", "output"} & set(table_of(config).kinds)

    def deviation(other) -> dict[str, float]:
        theirs = invariants(other)
        assert set(theirs) == set(spectra)
        return {key: float((theirs[key] - value).abs().max() / value.abs().max()) for key, value in spectra.items()}

    for value in spectra.values():
        assert value.dtype == torch.float64 and (value.diff() <= 0).all() and value[0] > 0
    assert max(deviation(other).values()) <= SYMMETRY[torch.float64]
    assert max(deviation(canonicalize(model)).values()) <= SYMMETRY[torch.float64]
    # Negative controls: another function, near or far.
    assert min(deviation(noisy(model, 1e-4)).values()) > 1e-7
    assert min(deviation(tiny_model(1, **SYMMETRIES[option])).values()) > 1e-3


def test_invariants_of_heads_are_singular_values_of_their_maps():
    model = tiny_model(**SYMMETRIES["learned"], num_key_value_heads=4, attention_bias=False)
    attention, spectra = model.model.layers[0].self_attn, invariants(model)
    heads = [weight.reshape(4, 8, 32) for weight in (attention.q_proj.weight, attention.k_proj.weight)]
    products = torch.linalg.svdvals(heads[0].mT @ heads[1])[:, :8].flatten().sort(descending=True).values
    assert (products - spectra["layers.0.head_qk"]).abs().max() <= SYMMETRY[torch.float64] * products.max()
    values = attention.v_proj.weight.reshape(4, 8, 32)
    outputs = attention.o_proj.weight.reshape(32, 4, 8).movedim(1, 0)
    products = torch.linalg.svdvals(outputs @ values)[:, :8].flatten().sort(descending=True).values
    assert (products - spectra["layers.0.head_vo"]).abs().max() <= SYMMETRY[torch.float64] * products.max()


def test_a_matrix_outside_the_group_has_another_canonical_form():
    model = tiny_model()
    shear = GaugeTransformation.random(model.config, generator(5), ["stream"]).elements["stream"].clone()
    shear[0, 0] *= 1.05
    other = GaugeTransformation(model.config, {"stream": shear})(model)
    assert difference(canonicalize(other), canonicalize(model)) > 1e-3


def test_the_canonical_frames_are_what_they_are_said_to_be():
    model = canonicalize(tiny_model(**SYMMETRIES["rotary-learned"], gated_mlp=True))
    weights = weights_of(model)
    moments = odd_moments(token_vectors(table_of(model.config), weights))
    assert moments.shape == (32,) and moments.min() > 0
    gram = torch.zeros(32, 32, dtype=torch.float64)
    for name, weight in weights.items():
        for turned in table_of(model.config).turns(name):
            if turned.key.kind == "stream":
                flat = weight.movedim(turned.dim, 0).reshape(32, -1)
                gram += flat @ flat.T
    diagonal = gram.diagonal()
    assert (gram - diagonal.diag()).abs().max() <= SYMMETRY[torch.float64] * diagonal.max()
    assert (diagonal.diff() < 0).all()
    for layer in model.model.layers:
        frequencies = layer.self_attn.rotary_frequencies
        assert (frequencies > 0).all() and (frequencies.diff(dim=1) <= 0).all()
        norms = sum(weight.square().sum(dim=1) for weight in (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight))
        norms = norms + layer.mlp.gate_proj.bias.square() + layer.mlp.up_proj.bias.square()
        assert ((norms + layer.mlp.down_proj.weight.square().sum(dim=0)).diff() < 0).all()
        assert odd_moments(layer.mlp.up_proj.weight.T).min() > 0


@over([*UNSEEN, "rotary-learned"], ["rotary", "learned-untied-projected", "distance", "gated"])
def test_a_fresh_model(option):
    """All biases zero, all heads with the same frequencies: nothing that the canonical form may lean on."""
    torch.manual_seed(0)
    model = RiGPTForCausalLM(tiny_config(**SHALLOW[option])).to(torch.float64).eval()
    assert any(parameter.abs().max() == 0 for parameter in model.parameters())
    assert len(assert_canonical(model)) == len(UNSEEN.get(option, []))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_converted_gpt2_has_a_direction_that_nothing_fills(tied):
    model = convert_model(stock_model("gpt2", tie_word_embeddings=tied))
    stream = invariants(model)["stream"]
    assert abs(stream[-1]) <= DEGENERATE * stream[0] < 0.01 * stream[-2]
    assert assert_canonical(model) == []


def test_a_fresh_gpt2():
    torch.manual_seed(1)
    stock = type(stock_model("gpt2"))(gpt2_config()).to(torch.float64).eval()
    assert assert_canonical(convert_model(stock)) == []


@torch.no_grad()
def confine_(model, frame: str, keep: int):
    """Project all that a frame of one copy carries on its first `keep` dimensions."""
    for name, parameter in model.named_parameters():
        for turned in table_of(model.config).turns(name):
            if turned.key.kind == frame:
                parameter.movedim(turned.dim, 0)[keep:] = 0
    return model


@over(["rotary", "untied-projected"], ["learned", "gated", "distance"])
def test_a_stream_with_empty_directions(option):
    model = confine_(tiny_model(**SHALLOW[option]), "stream", 29)
    assert "3 equal eigenvalues in stream, all zero" in assert_canonical(model)


@pytest.mark.parametrize("vocab_size", [5, 13, 35])
def test_fewer_tokens_than_dimensions_of_token_vectors(vocab_size):
    model = tiny_model(vocab_size=vocab_size, **SHALLOW["untied-projected"])
    other = disguise(model, 0)
    assert difference(canonicalize(other), canonicalize(model), other) <= CANONICAL[torch.float64]


def head_parts(model) -> dict[str, torch.Tensor]:
    """Parameters of one layer's attention, views `[K, G, ...]` of what query heads have, and `[K, 1, ...]`."""
    config, parts = model.config, {}
    for name, parameter in model.model.layers[LAYER].self_attn.named_parameters():
        if name == "o_proj.weight":
            heads = parameter.view(config.hidden_size, config.num_attention_heads, -1).movedim(1, 0)
            parts[name] = heads.unflatten(0, (config.num_key_value_heads, -1))
        elif name.startswith(("q_proj", "distance_weight")):
            repeats = config.num_attention_heads // config.num_key_value_heads
            parts[name] = parameter.view(config.num_key_value_heads, repeats, -1)
        elif name != "o_proj.bias":
            parts[name] = parameter.view(config.num_key_value_heads, 1, -1)
    return parts


def mlp_parts(model) -> dict[str, torch.Tensor]:
    """Views `[neurons, ...]` of one layer's MLP."""
    parts, bias = dict(model.model.layers[LAYER].mlp.named_parameters()), model.model.layers[LAYER].mlp.down_proj.bias
    return {name: part.T if name == "down_proj.weight" else part for name, part in parts.items() if part is not bias}


def twin_query_heads(name: str, part: torch.Tensor) -> None:
    if part.shape[1] > 1:
        part[0, 1] = part[0, 0]


def dead_query_head(name: str, part: torch.Tensor) -> None:
    if part.shape[1] > 1:
        part[0, 0] = 0


def emptied(*names: str, entries=slice(None)) -> Callable:
    def change(name: str, part: torch.Tensor) -> None:
        if name.startswith(names):
            part[entries] = 0

    return change


# Zero queries leave keys of any length, zero outputs values, as where residual branches start at zero.
CHANGES: dict[str, Callable] = {
    "twin heads": lambda name, part: part[1].copy_(part[0]),
    "twin query heads": twin_query_heads,
    "dead heads": emptied(""),
    "dead head": emptied("", entries=0),
    "dead query head": dead_query_head,
    "blind heads": emptied("q_proj"),
    "silent heads": emptied("o_proj"),
    "twin neurons": lambda name, part: part[5].copy_(part[3]),
    "dead neurons": emptied("", entries=[2, 7]),
    "silent neuron": emptied("down_proj", entries=2),
    "blind neuron": emptied("gate_proj", "up_proj", entries=2),
}


@torch.no_grad()
def changed(model, change: str):
    parts = mlp_parts(model) if "neuron" in change else head_parts(model)
    for name, part in parts.items():
        CHANGES[change](name, part)
    return model


# What must be said about it, as a part of one of the texts; where nothing is listed nothing need be.
REPORTED = {
    "twin heads": "equal norms in layers.1.heads",
    "twin query heads": "equal norms in layers.1.heads",
    "dead heads": "equal eigenvalues in layers.1.head_vo, all zero",
    "dead head": "equal eigenvalues in layers.1.head_vo, all zero",
    "silent heads": "equal eigenvalues in layers.1.head_vo",
    "twin neurons": "1 equal norms in layers.1.neurons",
    "dead neurons": "1 equal norms in layers.1.neurons",
}
HEADS = ("learned", "rotary-learned", "no-biases", "distance-learned")
MLPS = ("gated-relu2", "gated", "relu2", "rotary")
DEGENERATES = [(change, name) for change in CHANGES for name in (MLPS if "neuron" in change else HEADS)]


# By default one option set for each change, and all option sets.
@pytest.mark.parametrize(("change", "name"), cases([DEGENERATES[4 * i + i % 4] for i in range(11)], DEGENERATES))
@pytest.mark.by_default(3)
def test_equal_and_empty_heads_and_neurons(change, name):
    model = changed(tiny_model(**SHALLOW[name]), change)
    assert difference(model, tiny_model(**SHALLOW[name])) > 0.1, "the change did nothing"
    undetermined = assert_canonical(model)
    assert any(REPORTED.get(change, "") in text for text in [*undetermined, *([] if change in REPORTED else [""])])


def test_what_is_not_determined_is_logged(caplog):
    model = changed(tiny_model(), "twin neurons")
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        canonicalize(tiny_model())
        assert not caplog.records
        canonicalize(model)
    finally:
        logger.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records] == [
        "The canonical form is not determined everywhere: 1 equal norms in layers.1.neurons."
    ]


def test_an_ambiguity_is_reported():
    """Values of zero leave nothing that could orient what reads them, and different neurons may have equal norms."""
    model = tiny_model(**SYMMETRIES["learned"])
    with torch.no_grad():
        for name, part in head_parts(model).items():
            if name.startswith("v_proj"):
                part[:] = 0
    assert any("equal eigenvalues in layers.1.head_vo" in text for text in canonical_gauge(model).undetermined)
    model = tiny_model()
    with torch.no_grad():
        for part in mlp_parts(model).values():
            part[5] = -part[3]
    gauge = canonical_gauge(model)
    assert gauge.undetermined == ["1 equal norms in layers.1.neurons"]
    assert gauge.gaps["neurons"] < DEGENERATE < canonical_gauge(tiny_model()).gaps["neurons"]


@torch.no_grad()
def test_equal_learned_frequencies_are_told_apart_by_what_their_planes_carry():
    """As when learning starts from frequencies of zero: planes of one frequency may change places."""
    options = SYMMETRIES["rotary-learned"]
    model = tiny_model(**options)
    frequencies = model.model.layers[0].self_attn.rotary_frequencies
    frequencies[:, 1:3] = 0.3
    turned = GaugeTransformation.random(model.config, generator(8), "all")(model)
    gauges = [canonical_gauge(each) for each in (model, turned)]
    assert all(any("two frequencies" in text for text in gauge.undetermined) for gauge in gauges)
    a, b = (gauge.transformation(each) for gauge, each in zip(gauges, (model, turned), strict=True))
    assert difference(a, b) <= CANONICAL[torch.float64] < 0.1 < difference(model, turned)
