"""Back to unmodified stock classes, from any frame the model was turned into, or a refusal that says why not."""

import copy
from itertools import product

import pytest
import torch
from huggingface_hub.dataclasses import strict
from transformers import GPT2LMHeadModel, GPTNeoXForCausalLM, LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM

from rigpt_hf import RiGPTConfig
from rigpt_hf.conversion import certify, convert_model, export_model
from rigpt_hf.conversion.families import TARGETS
from rigpt_hf.conversion.neutral import ANYWHERE, NEUTRAL, options_of, refuse_options
from rigpt_hf.scores_rigpt import SCORES, Score
from rigpt_hf.symmetry import GaugeTransformation
from rigpt_hf.symmetry.alignment import INCIDENTAL

from ..models import DTYPES, tiny_model, tokens
from ..tolerances import CONVERSION
from .families import converted_family, family_model
from .sources import QUICK, SOURCES, converted_pair, stock_model


GPT2_SOURCES = [name for name in SOURCES if name.startswith("gpt2")]
LLAMA_SOURCES = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.full)
    for name in SOURCES
    if not name.startswith("gpt2")
]


def rotated(model, seed: int = 0, **options):
    generator = torch.Generator().manual_seed(seed)
    turned = GaugeTransformation.random(model.config, generator, **options)(model)
    weights = [other.model.layers[0].mlp.up_proj.weight for other in (model, turned)]
    assert (weights[0] - weights[1]).abs().max() > 0.01
    return turned


def relative_error(a, b, dtype) -> float:
    error = certify(a, b, tokens(2, 30)).relative_logit_error
    print(f"{error:.2e}")
    assert error <= CONVERSION[dtype]
    return error


# Every frame with either kind of rotation in either precision, twice, over all sources in turn.
ROUND_TRIPS = [
    (GPT2_SOURCES[index % len(GPT2_SOURCES)], *way)
    for index, way in enumerate(list(product(["auto", "lexical", "stream"], [True, False], CONVERSION)) * 2)
]


@pytest.mark.parametrize("name, frame, fix_ones, dtype", ROUND_TRIPS, ids=str)
@pytest.mark.by_default(12)
def test_gpt2_round_trips_through_a_rotation(name, frame, fix_ones, dtype):
    source, converted = converted_pair(name, dtype)
    back = export_model(rotated(converted, frames=("stream",), fix_ones=fix_ones), "gpt2", frame=frame)
    assert type(back) is GPT2LMHeadModel and back.dtype is dtype
    relative_error(source, back, dtype)
    tied = source.config.tie_word_embeddings and frame != "stream"
    assert back.config.tie_word_embeddings is tied
    assert (back.lm_head.weight.data_ptr() == back.transformer.wte.weight.data_ptr()) is tied
    if frame != "stream":
        assert torch.equal(back.transformer.wte.weight, source.transformer.wte.weight)
    gain = back.transformer.h[0].ln_1.weight
    assert torch.equal(gain, torch.exp2(gain.log2().round()))


def test_the_round_trips_are_all_there_are():
    assert {name for name, *_ in ROUND_TRIPS} == set(GPT2_SOURCES) and len(set(ROUND_TRIPS)) == 24


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["gpt2", "qwen2-tied", "llama"])
def test_turned_heads_do_not_matter(name, dtype):
    turned = rotated(converted_pair(name, dtype)[1], frames=("stream", "head"))
    # GL(h) transformations stretch the heads and lose digits in float32, so the reference is the turned model.
    relative_error(turned, export_model(turned, "gpt2" if name == "gpt2" else "llama"), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LLAMA_SOURCES)
def test_the_llama_family_round_trips_through_a_rotation(name, dtype):
    source, converted = converted_pair(name, dtype)
    # A window is what Mistral has and Llama has not, however long it is.
    target = "llama" if converted.config.sliding_window is None else "mistral"
    back = export_model(rotated(converted, frames=("stream",)), target)
    assert type(back) is {"llama": LlamaForCausalLM, "mistral": MistralForCausalLM}[target]
    relative_error(source, back, dtype)
    assert back.config.tie_word_embeddings == source.config.tie_word_embeddings
    assert back.config.rope_parameters == source.config.rope_parameters


@pytest.mark.parametrize("name", ["qwen2", "qwen2-tied"])
def test_qwen2_comes_back_as_qwen2(name):
    source, converted = converted_pair(name)
    back = export_model(rotated(converted, frames=("stream",)), "qwen2")
    assert type(back) is Qwen2ForCausalLM
    relative_error(source, back, torch.float64)
    assert set(back.state_dict()) == set(source.state_dict())


NEOX_TRIPS = [("gpt_neox", "auto"), ("gpt_neox-serial", "lexical"), ("gpt_neox-unbiased", "stream")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, frame", NEOX_TRIPS)
def test_gpt_neox_round_trips_through_a_rotation(name, frame, dtype):
    source, converted = converted_family(name, dtype)
    back = export_model(rotated(converted, frames=("stream",)), "gpt_neox", frame=frame)
    assert type(back) is GPTNeoXForCausalLM and back.dtype is dtype
    relative_error(source, back, dtype)
    assert back.config.tie_word_embeddings is (source.config.tie_word_embeddings and frame != "stream")
    assert back.config.use_parallel_residual is source.config.use_parallel_residual
    assert back.config.rope_parameters == source.config.rope_parameters
    # Biases of the norms in front have moved into the maps, so there are some.
    assert back.config.attention_bias and back.gpt_neox.layers[0].attention.query_key_value.bias.any()


@pytest.mark.parametrize("name", ["gptj", "phi", "falcon-heads"])
def test_relatives_of_gpt_neox_become_one(name):
    options = {"num_key_value_heads": 4} if name == "phi" else {}
    source = family_model(name, **options)
    back = export_model(rotated(convert_model(source), frames=("stream",)), "gpt_neox")
    relative_error(source, back, torch.float64)
    back.config.use_parallel_residual = False
    serial = GPTNeoXForCausalLM(back.config).to(torch.float64).eval()
    serial.load_state_dict(back.state_dict())
    assert not certify(source, serial, tokens(2, 30)).passed


def test_dropouts_that_gpt_neox_has_only_one_of_are_named(caplog):
    converted = copy.deepcopy(converted_family("gpt_neox")[1])
    converted.config.embedding_dropout = 0.2
    assert export_model(converted, "gpt_neox").config.hidden_dropout == 0
    assert "`embedding_dropout=0.2` was set to 0.0: GPT-NeoX has one dropout for both" in caplog.text


@pytest.mark.parametrize("frame", ["lexical", "stream"])
def test_a_trained_projection_exports_with_its_head_untied(frame):
    source = stock_model("gpt2")
    model = convert_model(source)
    with torch.no_grad():
        model.model.project_out.weight += 0.1 * torch.randn_like(model.model.project_out.weight)
    back = export_model(model, "gpt2", frame=frame)
    assert not back.config.tie_word_embeddings
    relative_error(model, back, torch.float64)
    assert not certify(source, back, tokens(2, 30)).passed  # the change arrived


def test_a_model_with_a_narrow_lexical_frame_exports():
    model = tiny_model(
        position_embedding_type="rotary", embedding_size=24, gated_mlp=True, num_key_value_heads=2, mlp_bias=False
    )
    relative_error(model, export_model(model, "llama"), torch.float64)


@pytest.mark.parametrize("score", ["squared_distance", "distance"])
def test_a_distance_with_weight_zero_is_a_dot_product(score):
    model = convert_model(stock_model("gpt2"))
    distant = type(model)(type(model.config)(**(model.config.to_dict() | {"attention_score": score})))
    distant = distant.to(torch.float64).eval()
    missing, unexpected = distant.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and all(name.endswith("distance_weight") for name in missing)
    relative_error(distant, export_model(distant, "gpt2"), torch.float64)
    with torch.no_grad():
        distant.model.layers[0].self_attn.distance_weight.fill_(0.5)
    with pytest.raises(ValueError, match=f"`attention_score='{score}'`.*`distance_weight`"):
        export_model(distant, "gpt2")


NEUTRAL_OPTIONS = {"attention_score": "squared_distance", "value_embedding_period": 1}


@pytest.mark.parametrize("target", ["gpt2", "llama"])
def test_options_at_their_neutral_values_change_nothing(target, tmp_path):
    """A converted model may get every option with parameters of its own, and is what it was until it learns."""
    model = convert_model(stock_model(target))
    model.save_pretrained(tmp_path)
    richer, report = type(model).from_pretrained(
        tmp_path, dtype=torch.float64, output_loading_info=True, **NEUTRAL_OPTIONS
    )
    new = report["missing_keys"]
    endings = {ending for option in NEUTRAL_OPTIONS for ending in NEUTRAL[option]}
    assert {next(e for e in endings if key.endswith(f".{e}")) for key in new} == endings
    relative_error(model, richer.eval(), torch.float64)
    relative_error(richer, export_model(richer, target), torch.float64)
    for ending, option in ((e, o) for o in NEUTRAL_OPTIONS for e, value in NEUTRAL[o].items() if value is not None):
        changed = copy.deepcopy(richer)
        with torch.no_grad():
            next(p for key, p in changed.named_parameters() if key.endswith(f".{ending}")).add_(0.5)
        assert not certify(model, changed, tokens(2, 30)).passed
        with pytest.raises(ValueError, match=f"`{option}=.*`{ending}`"):
            export_model(changed, target)


@strict
class ConfigWithOption(RiGPTConfig):
    """A made-up option without parameters, which no target has heard of."""

    made_up: int = 0


@pytest.mark.parametrize("target", ["gpt2", "llama", "qwen2", "mistral", "arcee", "nanochat"])
def test_an_option_that_no_target_declares_is_refused(target):
    source, converted = converted_family(target)
    model = copy.deepcopy(converted)
    for value in (0, 1):
        model.config = ConfigWithOption(**(converted.config.to_dict() | {"made_up": value}))
        if value == 0:
            relative_error(source, export_model(model, target), torch.float64)
        else:
            with pytest.raises(ValueError, match="^`made_up=1` has no counterpart in"):
                export_model(model, target)


@pytest.mark.parametrize("target", ["gpt2", "llama", "qwen2", "mistral", "arcee", "nanochat"])
def test_a_score_that_nobody_has_heard_of_is_refused(target, monkeypatch):
    """One without a parameter, which would be judged by its values."""
    half = Score("half", as_dot=lambda query, key, value, weight: (query / 2, key, value))
    monkeypatch.setitem(SCORES, "half", half)
    model = copy.deepcopy(converted_family(target)[1])
    model.config.attention_score = "half"
    with pytest.raises(ValueError, match="^`attention_score='half'` has no counterpart in"):
        export_model(model, target)


def test_every_option_is_declared_or_refused():
    """Each of RiGPT's own options away from its default, or a change of it does not matter to what is computed."""
    converted = converted_pair("gpt2")[1]
    options = {
        "gated_mlp": True,
        "qk_norm": True,
        "embedding_norm": True,
        "use_parallel_residual": True,
        "depth_solver": "euler",
        "position_embedding_type": "rotary",
    }
    for option, value in options.items():
        config = RiGPTConfig(**(converted.config.to_dict() | {option: value}))
        with pytest.raises(ValueError, match=f"`{option}={value!r}`.*no counterpart in GPT-2"):
            refuse_options(config, {}, TARGETS["gpt2"])
    assert refuse_options(converted.config, {}, TARGETS["gpt2"]) == set()
    for target in TARGETS.values():
        declared = {*target.family.fields, *target.expresses, *INCIDENTAL, *ANYWHERE, *NEUTRAL}
        assert declared <= options_of(converted.config).keys()


def test_models_without_biases_get_zeros():
    options = {"position_embedding_type": "learned", "num_key_value_heads": 4}
    biases = {"attention_bias": False, "attention_output_bias": False, "mlp_bias": False}
    model = tiny_model(**options, **biases, embedding_size=32)
    assert export_model(model, "gpt2").config.n_embd == 36
    with torch.no_grad():  # leave a direction of its own unused
        direction = torch.nn.functional.normalize(torch.randn(32, dtype=torch.float64), dim=0)
        for name, parameter in model.named_parameters():
            if name.endswith(("project_in.weight", "o_proj.weight", "down_proj.weight")):
                parameter -= torch.outer(direction, direction @ parameter)
            elif name.endswith("embed_positions.weight"):
                parameter -= torch.outer(parameter @ direction, direction)
    back = export_model(model, "gpt2")
    assert back.config.n_embd == 32
    assert not back.transformer.h[0].attn.c_attn.bias.any()
    relative_error(model, back, torch.float64)


YARN = {"rope_type": "yarn", "factor": 4.0}


def test_what_a_target_cannot_express_is_named():
    learned, multi = {"position_embedding_type": "learned"}, {"num_key_value_heads": 4}
    for options, target, message in (
        ({}, "gpt2", "`num_key_value_heads=2` and `position_embedding_type='rotary'` have no counterpart in GPT-2"),
        (learned, "gpt2", "^`num_key_value_heads=2` has no counterpart in GPT-2"),
        (learned | {"gated_mlp": True}, "gpt2", "`gated_mlp=True`"),
        (learned | multi | {"qk_norm": True}, "gpt2", "`qk_norm=True`"),
        (learned, "llama", "`position_embedding_type='learned'` have no counterpart in L"),
        ({}, "llama", "`gated_mlp=False`"),
        ({"gated_mlp": True, "rotary_learned_frequencies": True}, "llama", "`rotary_learned_frequencies=True`"),
        (
            {"gated_mlp": True, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "llama",
            "`rope_parameters={.*'partial_rotary_factor': 0.5.*}` has no counterpart in Llama.* for whole heads",
        ),
        (
            {"gated_mlp": True},
            "qwen2",
            "`attention_output_bias=True`.*Try `target='llama'`, `target='ernie4_5'` or `target='granite'`.$",
        ),
        (
            {"gated_mlp": True},
            "mistral",
            "`attention_bias=True` and .*no biases. Try `target='llama'`, `target='ernie4_5'` or `target='granite'`.$",
        ),
        (
            {"gated_mlp": True},
            "arcee",
            "`gated_mlp=True` has no counterpart in Arcee, .* Try `target='llama'`, .* or `target='granite'`.$",
        ),
        ({"qk_norm": True}, "apertus", "`hidden_act='gelu_pytorch_tanh'` and `mlp_bias=True`.* ReLU².* Keep this"),
        (
            {"hidden_act": "relu2"},
            "nanochat",
            "`qk_norm=False` and `embedding_norm=False`.*Try `target='arcee'` or `target='starcoder2'`.$",
        ),
        (
            {
                "qk_norm": True,
                "mlp_bias": False,
                "embedding_norm": True,
                "rope_parameters": {"rope_type": "yarn", "factor": 4.0},
            },
            "nanochat",
            "`rope_parameters={.*'yarn'.*}` has no counterpart in NanoChat.* that leave len",
        ),
        ({"gated_mlp": True, "embedding_size": 32, "output_bias": True}, "llama", "`output_bias=True`"),
        ({"gated_mlp": True, "use_parallel_residual": True}, "llama", "`use_parallel_residual=True` has no count"),
        ({"gated_mlp": True, "use_parallel_residual": True}, "qwen2", "`use_parallel_residual=True` have no count"),
        ({"use_parallel_residual": True}, "gpt_neox", "^`num_key_value_heads=2` has no counterpart in GPT-NeoX"),
        (multi | {"gated_mlp": True}, "gpt_neox", "^`gated_mlp=True` has no counterpart in GPT-NeoX"),
        (multi | learned, "gpt_neox", "^`position_embedding_type='learned'` has no counterpart in GPT-NeoX"),
        (multi | {"rotary_learned_frequencies": True}, "gpt_neox", "^`rotary_learned_frequencies=True` has no"),
        (multi, "gpt_neox", "LayerNorm removes one direction of the stream in GPT-NeoX.* uses all 32"),
        (learned | {"embedding_norm": True}, "gpt2", "`embedding_norm=True` have no counterpart in GPT-2"),
        ({}, "t5", "`target` must be one of auto, gpt2, llama, mistral, .*, got 't5'"),
    ):
        with pytest.raises(ValueError, match=message):
            export_model(tiny_model(**options), target)


def test_a_frame_that_is_not_exact_is_refused_with_the_reason():
    model = convert_model(stock_model("gpt2"))
    with pytest.raises(ValueError, match="`frame` must be one of auto, lexical, stream, got 'head'"):
        export_model(model, frame="head")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight += 0.1
    with pytest.raises(ValueError, match="`model.layers.1.mlp.down_proj.weight` writes outside"):
        export_model(model, frame="lexical")
    with torch.no_grad():
        model.model.project_in.weight += torch.randn_like(model.model.project_in.weight)
    with pytest.raises(ValueError, match="`project_in` is no longer a rotation"):
        export_model(model, frame="lexical")
    assert export_model(model).config.n_embd == 28
