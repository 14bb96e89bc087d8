"""Gauge transformations leave the function of a model alone, and only they do."""

import pytest
import torch

from rigpt_hf import (
    RiGPTForQuestionAnswering,
    RiGPTForSequenceClassification,
    RiGPTForTokenClassification,
)
from rigpt_hf.symmetry import GaugeTransformation, gauge_error, haar, table_of
from rigpt_hf.symmetry.action import resolve_frames
from tests.models import COVER, DTYPES, EACH, OPTIONS, SYMMETRIES, over, randomise_, tiny_config, tiny_model, tokens
from tests.symmetry.options import SEARCHED, difference, disguise, generator
from tests.tolerances import SYMMETRY


HEADS = {
    RiGPTForSequenceClassification: "score",
    RiGPTForTokenClassification: "score",
    RiGPTForQuestionAnswering: "qa_outputs",
}


@over(COVER, SYMMETRIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_loss_and_decoding_are_invariant_and_hidden_states_turn_along(turned, option, dtype):
    model, other, g = turned(option, dtype)
    inputs, prefill, tolerance = tokens(2, 12), 4, SYMMETRY[dtype]
    labels = inputs.masked_fill(torch.rand(inputs.shape, generator=generator(15)) < 0.4, -100)
    assert (labels == -100).any()
    with torch.no_grad():
        before, after = (m(inputs, labels=labels, use_cache=False, output_hidden_states=True) for m in (model, other))
        unmasked = model(inputs, labels=inputs, use_cache=False).loss
    scale = before.logits.abs().max()
    assert (after.logits - before.logits).abs().max() <= tolerance * scale
    assert abs(after.loss - before.loss) <= tolerance * before.loss
    assert abs(unmasked - before.loss) > 1e-4 * before.loss, "the loss does not see its labels"
    moved = [(a - b).abs().max() for a, b in zip(model.parameters(), other.parameters(), strict=True)]
    assert sum(change > 0.01 for change in moved) > len(moved) / 3, "the transformation did nothing to speak of"
    step_by_step = [decode(m, inputs, prefill) for m in (model, other)]
    for logits in step_by_step:
        assert (logits - before.logits[:, prefill:]).abs().max() <= tolerance * scale
    # A cache is written in the frames of its model: another's is of no use, so the steps do read it.
    cache = model(inputs[:, :prefill], use_cache=True).past_key_values
    assert (decode(other, inputs, prefill, cache) - step_by_step[0]).abs().max() > 1e-3 * scale

    layers = model.config.num_hidden_layers
    assert len(before.hidden_states) == layers + 1
    stream = g.elements["stream"][0]
    inside = [g.elements[f"layers.{index}.local"][0] for index in range(layers - 1) if model.config.local_frames]
    rotations = [stream, *(inside or [stream] * (layers - 1)), stream]
    for x, y, rotation in zip(before.hidden_states, after.hidden_states, rotations, strict=True):
        assert (y - x @ rotation.to(dtype).T).abs().max() <= tolerance * x.abs().max()
        assert (y - x).abs().max() > 0.1 * x.abs().max(), "the hidden states did not turn"


@over(EACH, [*COVER, *SYMMETRIES])
@torch.no_grad()
def test_logits_are_invariant_under_each_frame_alone(turned, option):
    model = turned(option).model
    before, moved = model(tokens(2, 9)).logits, 0
    for kind in table_of(model.config).kinds:
        other = disguise(model, 1, [kind])
        error = (other(tokens(2, 9)).logits - before).abs().max()
        assert error <= SYMMETRY[torch.float64] * before.abs().max(), kind
        moved += difference(other, model) > 0.01
    assert moved >= 3


@over(["learned-projected", "squared-distance"], ["rotary", "distance"])
def test_cached_generation_is_invariant(turned, option):
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    model, other, _ = turned(option)
    assert torch.equal(model.generate(tokens(2, 5), **settings), other.generate(tokens(2, 5), **settings))


@torch.no_grad()
def decode(model, input_ids: torch.Tensor, prefill: int, cache=None) -> torch.Tensor:
    """Logits `[B, S - prefill, V]` of feeding one token at a time, after the first ones at once."""
    logits = []
    if cache is None:
        cache = model(input_ids[:, :prefill], use_cache=True).past_key_values
    for position in range(prefill, input_ids.shape[1]):
        output = model(input_ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(
    "options",
    [
        {"pad_token_id": 0},
        {"position_embedding_type": "learned"},
        {"position_embedding_type": "learned", "embedding_size": 24},
        {"embedding_size": 40, "attention_score": "squared_distance"},
    ],
    ids=["rotary", "learned", "learned-projected", "projected-squared-distance"],
)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_other_heads_are_invariant(options, tied):
    config = tiny_config(num_labels=3, tie_word_embeddings=tied, **options)
    inputs = tokens(4, 9)
    inputs[1, 6:] = config.pad_token_id
    g = GaugeTransformation.random(config, generator(17), "all")
    assert ("position_shift" in g.elements) == (not tied and "position_embedding_type" in options)
    for model_class, head in HEADS.items():
        model = randomise_(model_class(config).to(torch.float64), 0).eval()

        def answers(model):
            return torch.cat([out.flatten() for out in model(inputs, use_cache=False).to_tuple()])

        turned, expected = g(model), answers(model)
        assert (answers(turned) - expected).abs().max() <= SYMMETRY[torch.float64] * expected.abs().max()
        for (name, before), after in zip(model.named_parameters(), turned.parameters(), strict=True):
            moved = (after - before).abs().max()
            assert (moved == 0) if name == f"{head}.bias" else (moved > 0.01), f"{model_class.__name__}: {name}"
        turned.get_parameter(f"{head}.weight").data.copy_(model.get_parameter(f"{head}.weight").data)
        assert (answers(turned) - expected).abs().max() > 1e-2, "a head that did not turn along goes unnoticed"


@over(EACH, [*COVER, *SYMMETRIES])
def test_composition_and_inverse(turned, option):
    model, both, g = turned(option)
    h = GaugeTransformation.random(model.config, generator(5), "all")
    in_turn = h(both)
    assert difference((h @ g)(model), in_turn) <= SYMMETRY[torch.float64]
    assert difference(g.inverse()(both), model) <= SYMMETRY[torch.float64]


@over(SEARCHED, [*COVER, *SYMMETRIES])
def test_the_path_runs_from_the_identity_to_the_transformation(turned, option):
    model = turned(option).model
    config = model.config
    g = GaugeTransformation.random(config, generator(6), "all", special=True)
    start, middle, end = g.at(0.0), g.at(0.5), g.at(1.0)
    moved = 0
    for key, frame, element in g.items():
        name, identity = str(key), frame.group.identity(frame.copies)
        assert (start.elements[name] - identity).abs().max() <= SYMMETRY[torch.float64]
        assert (end.elements[name] - element).abs().max() <= SYMMETRY[torch.float64] * element.abs().max()
        if frame.group.dimension:
            assert (middle.elements[name] - identity).abs().max() > 0.01
            moved += 1
    assert moved >= (3 if config.depth_interpolation == "linear" else 7)
    assert gauge_error(model, middle, tokens(1, 7)) <= SYMMETRY[torch.float64]


def test_the_geodesic_of_the_stream_has_constant_speed():
    config = tiny_config()
    g = GaugeTransformation.random(config, generator(6), ["stream"], special=True)
    half = g.at(0.5).elements["stream"][0]
    assert (half @ half - g.elements["stream"][0]).abs().max() <= SYMMETRY[torch.float64]


def test_a_reflection_has_no_path():
    config = tiny_config()
    reflection = torch.eye(config.hidden_size, dtype=torch.float64)
    reflection[0, 0] = -1
    g = GaugeTransformation(config, {"stream": reflection[None]})
    assert gauge_error(tiny_model(), g, tokens(1, 5)) <= SYMMETRY[torch.float64]
    with pytest.raises(ValueError, match="determinant \\+1"):
        g.at(0.5)


def test_fixing_ones():
    config = tiny_config()
    rotation = GaugeTransformation.random(config, generator(7), ["stream"], fix_ones=True).elements["stream"][0]
    ones = torch.ones(config.hidden_size, dtype=torch.float64)
    eye = torch.eye(config.hidden_size, dtype=torch.float64)
    assert (rotation @ ones - ones).abs().max() <= SYMMETRY[torch.float64]
    assert (rotation @ rotation.T - eye).abs().max() <= SYMMETRY[torch.float64]
    assert (rotation - eye).abs().max() > 0.1


def test_a_matrix_outside_the_group_is_detected():
    model = tiny_model()
    shear = haar(model.config.hidden_size, generator(8))
    shear[0] *= 1.05
    assert gauge_error(model, GaugeTransformation(model.config, {"stream": shear[None]}), tokens(2, 9)) > 1e-3
    # A general matrix in the head, where lengths matter.
    learned = {"position_embedding_type": "learned"}
    dot = GaugeTransformation.random(tiny_config(**learned), generator(9), ["head_qk"])
    model = tiny_model(attention_score="squared_distance", **learned)
    assert gauge_error(model, GaugeTransformation(model.config, dot.elements), tokens(2, 9)) > 1e-3


def test_a_per_channel_gain_and_coordinate_dropout_are_detected():
    model = tiny_model()
    gain = torch.linspace(0.5, 1.5, model.config.hidden_size, dtype=torch.float64)
    keep = (torch.rand(model.config.hidden_size, generator=generator(12)) > 0.1).to(torch.float64)
    assert keep.min() == 0, "the mask drops nothing"
    other = disguise(model, 10, ["stream"])
    before = model(tokens(2, 9)).logits
    for factor, module in ((gain, lambda m: m.model.norm), (keep, lambda m: m.model.layers[0].mlp)):
        assert (other(tokens(2, 9)).logits - before).abs().max() <= SYMMETRY[torch.float64] * before.abs().max()
        handles = [
            module(m).register_forward_hook(lambda *args, factor=factor: args[-1] * factor) for m in (model, other)
        ]
        assert (other(tokens(2, 9)).logits - model(tokens(2, 9)).logits).abs().max() > 1e-2
        for handle in handles:
            handle.remove()


def test_state_dicts_transform_like_models():
    model = tiny_model(**OPTIONS["untied-projected"])
    g = GaugeTransformation.random(model.config, generator(13), "all")
    expected = g(model).state_dict()
    for name, tensor in g.state_dict(model.state_dict()).items():
        assert torch.equal(tensor, expected[name]), name


def test_unknown_parameters_and_frames_and_wrong_shapes_are_named():
    g = GaugeTransformation.random(tiny_config(), generator())
    with pytest.raises(ValueError, match="no parameter 'model.layers.0.self_attn.q_proj.lora_A.weight'"):
        g.transform("model.layers.0.self_attn.q_proj.lora_A.weight", torch.zeros(2, 2))
    with pytest.raises(ValueError, match="got 'spin'. It has head_qk, head_vo, heads, neurons, stream, value_shift"):
        GaugeTransformation.random(tiny_config(), generator(), ["spin"])
    with pytest.raises(ValueError, match="`frames` must name frames of this configuration, got 'key_shift'. It has"):
        GaugeTransformation.random(tiny_config(), generator(), ["stream", "key_shift"])
    with pytest.raises(ValueError, match=r"`elements\['stream'\]` must have the shape \(1, 32, 32\)"):
        GaugeTransformation(tiny_config(), {"stream": torch.eye(4)[None]})


def test_groups_of_frames():
    for option, options in SYMMETRIES.items():
        config = tiny_config(**options)
        known = list(table_of(config).kinds)
        assert resolve_frames(config, "all") == known, option
        assert resolve_frames(config, "head") == ["head_qk", "head_vo"]
        assert resolve_frames(config, "shifts") == [name for name in known if name.endswith("_shift")]
        assert resolve_frames(config, ["heads", "head", "head_qk"]) == ["heads", "head_qk", "head_vo"]
        assert resolve_frames(config, []) == []
        g = GaugeTransformation.random(config, generator(), "head")
        shared = config.depth_interpolation != "constant"
        layers = [""] if shared else [f"layers.{index}." for index in range(config.num_hidden_layers)]
        assert set(g.elements) == {f"{layer}{name}" for layer in layers for name in ("head_qk", "head_vo")}


TRANSLATIONS = {
    "rotary": ["value_shift"],
    "learned": ["key_shift", "value_shift"],
    "learned-untied": ["key_shift", "value_shift", "position_shift"],
    "rotary-partial": ["key_shift", "value_shift"],
    "rotary-zero-frequencies": ["key_shift", "value_shift"],
    "qk-norm-learned": ["value_shift"],
    "parallel": ["value_shift", "residual_shift"],
    "parallel-mlp-bias": ["value_shift"],
    "parallel-no-mlp-bias": ["value_shift"],
    "distance-learned": ["value_shift"],
    "no-biases": [],
}


def test_which_translations_there_are():
    for option, shifts in TRANSLATIONS.items():
        assert resolve_frames(tiny_config(**SYMMETRIES[option]), "shifts") == shifts, option


def test_what_translations_read():
    model = tiny_model(**SYMMETRIES["learned-untied-projected"])
    names = [name for name, _ in model.named_parameters()]
    g = GaugeTransformation.random(model.config, generator(18), "shifts")
    reads = g.reads(names)
    bias = "model.layers.0.self_attn.o_proj.bias"
    layers = [f"model.layers.{index}.self_attn.o_proj.bias" for index in range(3)]
    assert sorted(reads) == sorted(["model.embed_positions.weight", *layers])
    parameters = dict(model.named_parameters())
    still = [name for name in set(names) - set(reads) if g.transform(name, parameters[name]) is parameters[name]]
    assert 10 < len(still) < len(names) - len(reads), "biases of keys and values move without reading anything"
    with pytest.raises(ValueError, match=f"`read` must give the other parameters to translate `{bias}`, got none"):
        g.transform(bias, parameters[bias])
    assert (g.transform(bias, parameters[bias], parameters.get) - parameters[bias]).abs().max() > 0.01
    without = GaugeTransformation.random(model.config, generator(18), ["stream", "head", "heads", "neurons"])
    assert without.reads(names) == []
