"""Two forms of one model become one configuration, and each stays the function that it was."""

import pytest
import torch

from rigpt_hf import RiGPTConfig, RiGPTForCausalLM
from rigpt_hf.checkpoints.logits import record_logits
from rigpt_hf.checkpoints.opened import in_memory, open_model
from rigpt_hf.symmetry import GaugeTransformation, common_form, gauge_distance
from rigpt_hf.symmetry.alignment import check_alike
from rigpt_hf.symmetry.common_form import in_common_form
from tests.conversion.families import family_model
from tests.conversion.sources import stock_model
from tests.models import ALIBI, EXPERTS, MAPPED, NORM_BIAS, SHARED_EXPERT, tiny_model, tokens
from tests.tolerances import CONVERSION, DISTANCE, SYMMETRY


LEARNED, UNTIED = {"position_embedding_type": "learned"}, {"tie_word_embeddings": False}
NARROW, WIDE = {"embedding_size": 24}, {"embedding_size": 40}
BIASED, NO_BIASES = (
    {"output_bias": True},
    dict.fromkeys(("attention_bias", "attention_output_bias", "mlp_bias"), False),
)
VALUES, LARGER = {"value_embedding_period": 2}, {"vocab_size": 64}
# Options of two models, and those of the form that both take.
FORMS: dict[str, tuple[dict, dict, dict]] = {
    "tied and not": ({}, UNTIED, UNTIED),
    "tied, projected, and not": (NARROW | BIASED, UNTIED, UNTIED | {"embedding_size": 32} | BIASED),
    "projected or not, untied": (UNTIED | NARROW, UNTIED, UNTIED | {"embedding_size": None}),
    "projected or not, tied": (WIDE, {}, WIDE),
    "narrow and wide": (NARROW | BIASED, WIDE, WIDE | BIASED),
    "narrow and wide, untied": (NARROW | UNTIED, WIDE, UNTIED | {"embedding_size": None}),
    "projected, and tied into a map": (MAPPED | NARROW, MAPPED | UNTIED, UNTIED | {"embedding_size": None}),
    "padded": (LARGER | VALUES | UNTIED, VALUES | NARROW, UNTIED | {"vocab_size": 61, "embedding_size": None}),
    "shorter": (LEARNED | {"max_position_embeddings": 40}, LEARNED, LEARNED | {"max_position_embeddings": 40}),
    "promised": ({"max_position_embeddings": 40}, {}, {"max_position_embeddings": 40}),
    "promised to slopes": (ALIBI | {"max_position_embeddings": 40}, ALIBI, {"max_position_embeddings": 40}),
    "biases": (NO_BIASES, {}, {"attention_bias": True, "mlp_bias": True}),
    "biases of heads": ({"qk_norm": True}, NORM_BIAS, NORM_BIAS),
    "biases of experts": (EXPERTS | {"mlp_bias": False}, EXPERTS, {"mlp_bias": True}),
    "all at once": (
        LEARNED | NARROW | BIASED | LARGER | NO_BIASES | {"max_position_embeddings": 30},
        LEARNED | UNTIED,
        LEARNED | UNTIED | BIASED | {"embedding_size": 32, "vocab_size": 61, "max_position_embeddings": 30},
    ),
}


def error(a, b, size: int = 61) -> float:
    """Between the logits of two models on the first tokens of the vocabulary, relative."""
    first, second = (record_logits(model, tokens(2, 20)).logits[..., :size] for model in (a, b))
    return float((first - second).abs().max() / first.abs().max())


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def untied(model: RiGPTForCausalLM, **changes) -> RiGPTForCausalLM:
    """A model with a head of its own, copied by hand."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return made(model.config, state, tie_word_embeddings=False, **changes)


def made(config: RiGPTConfig, state: dict, **changes) -> RiGPTForCausalLM:
    other = RiGPTForCausalLM(RiGPTConfig(**(config.to_dict() | changes))).to(torch.float64).eval()
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.by_default(4)
def test_both_take_one_form_and_stay_what_they_are(name):
    first, second, form = FORMS[name]
    models = [tiny_model(seed, **options) for seed, options in enumerate((first, second))]
    found = in_common_form(*(in_memory(model, name) for model, name in zip(models, "ab", strict=True)))
    check_alike(found[0].config, found[1].config)
    for model, common in zip(models, found[:2], strict=True):
        assert {field: getattr(common.config, field) for field in form} == form
        loaded = common.load()
        assert {key: tuple(each.shape) for key, each in loaded.named_parameters()} == common.weights.shapes
        assert error(model, loaded) <= SYMMETRY[torch.float64]
    # The two are not alike, so that neither stands for the other.
    assert error(*models) > 0.1
    cut = "padded" in name or "all" in name or name == "shorter"
    assert bool(found[2]) is cut
    # And the other way round, with what is said of each.
    turned = in_common_form(*(in_memory(model, name) for model, name in zip(models[::-1], "ba", strict=True)))
    check_alike(turned[0].config, found[0].config)
    assert sorted(turned[2]) == sorted(found[2])


def test_models_of_one_form_are_left_as_they_are():
    a, b = (in_memory(tiny_model(seed), name) for seed, name in enumerate("ab"))
    assert in_common_form(a, b) == (a, b, [])


@pytest.mark.parametrize("options", [{}, NARROW | BIASED | LEARNED], ids=["alone", "projected"])
@pytest.mark.by_default(1)
def test_a_disguise_in_another_form_is_at_no_distance(options):
    """Untied by hand, turned in all frames of that form, its tables padded: found to be the model itself."""
    model = tiny_model(**options)
    other = untied(model)
    other = GaugeTransformation.random(other.config, torch.Generator().manual_seed(5), "all")(other)
    with torch.no_grad():
        other.resize_token_embeddings(64, mean_resizing=False)
    a, b, notes = in_common_form(in_memory(model, "a"), in_memory(other, "b"))
    assert notes == ["Of the 64 tokens of b the first 61 are compared; the other has no more."]
    assert gauge_distance(a.load(), b.load()) <= DISTANCE[torch.float64]
    relative = in_common_form(in_memory(tiny_model(1, **options), "a"), b)[0]
    assert gauge_distance(relative.load(), b.load()) > 0.1


@pytest.mark.parametrize("bias", [True, False])
def test_what_nobody_sees_of_a_table_is_no_difference(bias, monkeypatch):
    """As in the conversion of a model that centres its stream, whose maps between tables and stream have a kernel."""
    model = tiny_model(**NARROW | BIASED)
    into, out = model.model.project_in, model.model.project_out
    kernel, unseen = torch.nn.functional.normalize(torch.randn(2, 24, dtype=torch.float64, generator=generator()))
    with torch.no_grad():
        into.weight -= torch.outer(into.weight @ kernel, kernel)
        out.weight -= torch.outer(unseen, unseen @ out.weight)
        out.bias -= unseen * (unseen @ out.bias) if bias else out.bias
    other = untied(model)
    junk = torch.randn(2, 61, dtype=torch.float64, generator=generator())
    with torch.no_grad():
        other.model.embed_tokens.weight += torch.outer(junk[0], kernel)
        other.lm_head.weight += torch.outer(junk[1], unseen)
    assert error(model, other) <= SYMMETRY[torch.float64]
    pair = in_memory(model, "a"), in_memory(other, "b")
    a, b, _ = in_common_form(*pair)
    assert gauge_distance(a.load(), b.load()) <= DISTANCE[torch.float64]
    monkeypatch.setattr(common_form, "_without_unseen", lambda one: one)
    a, b, _ = in_common_form(*pair)
    assert gauge_distance(a.load(), b.load()) > 1e-4


SCALED = {
    "plain": NARROW,
    "tied": {},
    "positions": LEARNED | UNTIED,
    "norms of heads": NARROW | NORM_BIAS | {"qk_norm_gain": "metric"},
    "map": NARROW | MAPPED,
    "experts": UNTIED | SHARED_EXPERT,
    "local": NARROW | {"local_frames": True},
    "values": UNTIED | VALUES | {"depth_solver": "euler"},
}


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.by_default(3)
def test_the_scale_of_the_stream_is_no_difference(name, monkeypatch):
    model = tiny_model(**SCALED[name], rms_norm_eps=0.05)
    projected = common_form._with_projections(in_memory(model, "a")) if name == "tied" else in_memory(model, "a")
    other = common_form._scaled(projected, 3.0, 0.45)
    assert other.config.rms_norm_eps == 0.45 and error(model, other.load()) <= SYMMETRY[torch.float64]
    g = GaugeTransformation.random(other.config, torch.Generator().manual_seed(5), "all")
    turned = g(other.load())
    a, b, notes = in_common_form(in_memory(model, "a"), in_memory(turned, "b"))
    assert notes and notes[0].startswith("The residual stream of b is 3 times that of a, as its `rms_norm_eps` says")
    assert b.config.rms_norm_eps == 0.05
    assert error(model, b.load()) <= SYMMETRY[torch.float64] and error(model, a.load()) <= SYMMETRY[torch.float64]
    # `eps` alone is another function: it counts here.
    state = turned.state_dict() if turned.config.tie_word_embeddings else dict(turned.named_parameters())
    wrong = made(turned.config, {key: each.detach().clone() for key, each in state.items()}, rms_norm_eps=0.05)
    assert error(model, wrong) > 1e-4
    with pytest.raises(ValueError, match="must have the same `rms_norm_eps`, got 0.05 in 'a' and 0.06 in 'b'"):
        in_common_form(in_memory(model, "a"), in_memory(tiny_model(**SCALED[name], rms_norm_eps=0.06), "b"))


def test_a_scale_without_what_norms_of_heads_read_is_another_function(monkeypatch):
    """The control: the same step, where a table of frames is asked that lacks a row."""
    model = tiny_model(**NARROW, qk_norm=True, rms_norm_eps=0.05)
    grown = common_form._scaled(in_memory(model, "a"), 3.0, 0.45)
    entries = grown.weights.entries
    name = "model.layers.1.self_attn.k_proj.weight"
    before = in_memory(model, "a").weights.entries[name]
    entries[name] = before
    assert error(model, grown.load()) > 1e-4


def test_stock_models_are_compared_with_what_tools_make_of_them(tmp_path):
    """A tied Llama against its untied, padded and shortened copy, both as they lie on disk."""
    model = stock_model("llama-tied")
    model.save_pretrained(tmp_path / "tied")
    copy = stock_model("llama-tied")
    copy.resize_token_embeddings(64, mean_resizing=False)
    config, state = copy.config, {key: each.clone() for key, each in copy.state_dict().items()}
    config.tie_word_embeddings, config.max_position_embeddings = False, 32
    other = type(copy)(config).to(torch.float64)
    other.load_state_dict(state)
    other.save_pretrained(tmp_path / "untied")
    a, b, notes = in_common_form(open_model(tmp_path / "tied"), open_model(tmp_path / "untied"))
    assert a.config.vocab_size == 61 and len(notes) == 1
    assert gauge_distance(a.load(), b.load()) <= DISTANCE[torch.float64]
    for each in (a, b):
        assert error(model, each.load()) <= CONVERSION[torch.float64]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({}, {"intermediate_size": 40}, "must have the same `intermediate_size`, got 128 in 'a' and 40 in 'b'"),
        ({}, {"hidden_act": "relu2"}, "`hidden_act`, .* Under another option the same weights are another function"),
        ({}, LEARNED, "must have the same `position_embedding_type`"),
        ({"num_hidden_layers": 2}, {}, "must have the same `num_hidden_layers`"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 40},
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "must have the same `max_position_embeddings`, got 40 in 'a' and 48 in 'b'",
        ),
    ],
    ids=["size", "activation", "positions", "layers", "length that counts"],
)
def test_what_has_no_common_form_is_said_with_what_else_to_do(first, second, message):
    models = (in_memory(tiny_model(**options), name) for options, name in zip((first, second), "ab", strict=True))
    with pytest.raises(ValueError, match=message) as caught:
        in_common_form(*models)
    assert str(caught.value).endswith("`rigpt fingerprint` says how near models of different shape are.")


def test_one_rotation_in_other_words():
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    scaled = {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 1.0}}
    twice = {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}}
    model, said, other = (tiny_model(**options) for options in (plain, scaled, twice))
    assert error(model, said) == 0 and error(model, other) > 1e-3
    a, b, _ = in_common_form(in_memory(model, "a"), in_memory(said, "b"))
    assert a.config.rope_parameters == b.config.rope_parameters and gauge_distance(a.load(), b.load()) < 1e-6
    with pytest.raises(ValueError, match="the same `rope_parameters`"):
        in_common_form(in_memory(model, "a"), in_memory(other, "b"))


def test_families_that_are_kin_are_brought_together(tmp_path):
    """A Llama with biases of zero is a Qwen2 without, and a Qwen2 a Llama with biases of zero elsewhere."""
    source = family_model("qwen2")
    source.save_pretrained(tmp_path)
    qwen = open_model(tmp_path)
    llama = in_memory(tiny_model(**{name: getattr(qwen.config, name) for name in KIN}), "llama")
    a, b, _ = in_common_form(qwen, llama)
    assert a.config.attention_output_bias and b.config.attention_output_bias
    assert error(source, a.load()) <= CONVERSION[torch.float64]


KIN = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "hidden_act", "gated_mlp", "rope_parameters", "rms_norm_eps", "max_position_embeddings"),
)
