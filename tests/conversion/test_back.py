"""Every stock class that converts, and back to it: from every frame, with its options, loaded without us."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from rigpt_hf.conversion import certify, convert_checkpoint, convert_model, export_checkpoint, export_model
from rigpt_hf.conversion.families import ARCHITECTURES, TARGETS
from rigpt_hf.symmetry import GaugeTransformation
from rigpt_hf.table import FrameKey

from ..models import ALIBI, tiny_model, tokens
from ..tolerances import CONVERSION, SYMMETRY
from .families import FAMILIES, architecture, converted_family, family_model
from .test_families import FIRST, KINDS
from .test_targets import CENTRED, load_without_the_package


# With a map behind the norm of embeddings, their own frame says what is a gain.
LEXICAL = {"bloom"}
# Classes whose heads have LayerNorms: with gains of each, and with gains and biases that all heads share.
OF_EACH, SHARED = ("cohere-heads", "stablelm-heads"), ("phi-heads", "persimmon")
LOOKED_AT = dict.fromkeys([*FIRST.values(), *OF_EACH, *SHARED])
# Those that nothing else is exported to, and of the targets of `test_targets.py` a class of each kind.
BACK = [name for name in LOOKED_AT if architecture(name) in CENTRED or name in KINDS]
over_variants = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] * (name not in BACK)) for name in FAMILIES]
)
over_centred = pytest.mark.parametrize("name", [name for name in LOOKED_AT if architecture(name) in CENTRED])
over_heads = pytest.mark.parametrize("name", [*OF_EACH, *SHARED])


def turned(model, frames: Any = "all", seed: int = 0):
    """The model in another frame; `frames` by name, or all but some."""
    kinds = {FrameKey.parse(str(key)).kind for key in GaugeTransformation.random(model.config, frames="all").elements}
    wanted = tuple(sorted(kinds - set(frames))) if isinstance(frames, set) else frames
    result = GaugeTransformation.random(model.config, torch.Generator().manual_seed(seed), frames=wanted)(model)
    assert not torch.equal(*(each.model.layers[0].self_attn.q_proj.weight for each in (model, result)))
    return result


def test_every_architecture_has_a_way_back():
    assert set(ARCHITECTURES) <= set(TARGETS)


@over_variants
@pytest.mark.by_default(8)
def test_a_family_comes_back_from_every_frame(name):
    source, converted = converted_family(name)
    scrambled = turned(converted, {"lexical", "output"} if architecture(name) in LEXICAL else "all")
    kept = turned(converted, ("stream", "heads"))
    tied = source.config.tie_word_embeddings
    # A lexical space of another size than the stream has no table of its own in a class that lacks such maps.
    lexical = converted.config.embedding_size in (None, 24, 25)
    for model, stays in ((kept, tied and lexical), (scrambled, None)):
        back = export_model(model)
        assert type(back) is type(source)
        certificate = certify(model, back, tokens(2, 36))
        print(f"{name}: {certificate.relative_logit_error:.1e}")
        assert certificate.relative_logit_error <= CONVERSION[torch.float64] and certificate.max_abs_logit > 0.1
        assert certify(source, back, tokens(2, 36)).relative_logit_error <= SYMMETRY[torch.float64]
        shared = back.get_input_embeddings().weight.data_ptr() == back.get_output_embeddings().weight.data_ptr()
        assert shared is back.config.tie_word_embeddings and (stays is None or shared is stays)
        # But for one with a constant that is 1 now, and one without maps between its table and the stream.
        if shared and model is kept and architecture(name) not in ("granite", "nanochat"):
            ours, theirs = (each.get_input_embeddings().weight for each in (back, source))
            assert (ours - theirs).abs().max() <= CONVERSION[torch.float64] * theirs.abs().max()
    # Norms that a class has without centring leave the head of a turned lexical frame tied, too.
    if tied and not TARGETS[architecture(name)].family.centred:
        assert back.config.tie_word_embeddings


@over_centred
@pytest.mark.by_default(4)
def test_every_tensor_of_a_way_back_matters(name):
    """As for targets that models of our own are exported to; biases of zero are those that a source has not."""
    model, ids = export_model(converted_family(name)[1]), tokens(2, 36)
    expected, looked = model(ids).logits, 0
    for key, tensor in model.state_dict().items():
        if key.endswith(".bias") and not tensor.any():
            continue
        if name == "opt" and key.endswith("k_proj.bias"):  # nothing sees a constant in all keys
            continue
        if name == "opt" and key.endswith("embed_positions.weight"):
            tensor = tensor[2:]
        before = tensor.clone()
        tensor.mul_(1.5).add_(0.3 * torch.rand(tensor.shape, dtype=tensor.dtype))
        assert (model(ids).logits - expected).abs().max() > 1e-4, key
        tensor.copy_(before)
        looked += 1
    assert looked > 20 and torch.equal(model(ids).logits, expected)


def off(name: str, monkeypatch, model=None, rules=None, **changes) -> float:
    """The relative error of a way back whose map is changed, rules by the last part of their targets."""
    source, target = family_model(name), TARGETS[architecture(name)]
    model = model or convert_model(source)
    assert certify(model, export_model(model), tokens(2, 36)).passed

    def changed(family):
        kept = (replace(rule, **(rules or {}).get(rule.target.rpartition(".")[2], {})) for rule in family.rules)
        return replace(family, **({"rules": tuple(kept)} | changes))

    assert changed(target.family) != target.family
    variant = None if target.variant is None else lambda config: changed(target.variant(config))
    wrong = replace(target, family=changed(target.family), variant=variant)
    monkeypatch.setitem(TARGETS, architecture(name), wrong)
    error = certify(model, export_model(model), tokens(2, 36)).relative_logit_error
    print(f"{name}, {', '.join([*(rules or {}), *changes])}: {error:.1e}")
    return error


class TestNegativeControls:
    """What a mechanism left out gives: `pytest -s` prints how far off."""

    @pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3_text"])
    def test_gains_without_the_1(self, name, monkeypatch):
        assert off(name, monkeypatch, gain_offset=0.0) > 0.1

    @pytest.mark.parametrize(
        "name, rule",
        [
            ("gemma", "embed_tokens"),
            ("gemma-untied", "embed_tokens"),
            ("gpt_neo", "q_proj"),
        ],
    )
    def test_a_constant_that_is_left_out(self, name, rule, monkeypatch):
        assert off(name, monkeypatch, rules={rule: {"scale": None, "buffer": None}}) > 0.01

    @pytest.mark.parametrize("name", ["ernie4_5", "glm", "gptj", "cohere"])
    def test_pairs_that_do_not_become_neighbours(self, name, monkeypatch):
        assert off(name, monkeypatch, rules={each: {"rows": None} for each in ("q_proj", "k_proj")}) > 0.1

    def test_positions_from_the_first_row_on(self, monkeypatch):
        rows = next(rule.rows for rule in TARGETS["opt"].family.rules if rule.target == "model.embed_positions")
        unmoved = {"rows": lambda config: replace(rows(config), start=0)}
        assert off("opt", monkeypatch, rules={"embed_positions": unmoved}) > 0.1

    def test_a_bias_of_the_head_that_is_left_out(self, monkeypatch):
        for name in ("gptj", "phi"):
            model = convert_model(family_model(name))
            back = export_model(model)
            with torch.no_grad():
                back.lm_head.bias.zero_()
            assert certify(model, back, tokens(2, 36)).relative_logit_error > 0.01

    def test_gains_behind_blocks_of_another_frame(self, monkeypatch):
        from rigpt_hf.conversion import frames

        model = turned(converted_family("olmo2")[1], ("stream",))
        monkeypatch.setattr(frames._Ends, "lexical_obstacle", lambda ends: "none")
        monkeypatch.setattr(frames._Ends, "eigenframe", lambda ends: (None, ""))
        assert certify(model, export_model(model), tokens(2, 36)).passed
        initial = frames._Ends.__init__

        def without_carry(ends, *arguments):
            initial(ends, *arguments)
            ends.carry = None

        monkeypatch.setattr(frames._Ends, "__init__", without_carry)
        assert certify(model, export_model(model), tokens(2, 36)).relative_logit_error > 0.01

    @pytest.mark.parametrize("name", ["gpt_neo", "gptj", "stablelm"])
    def test_biases_that_norms_do_not_take_over(self, name):
        model = convert_model(family_model(name))
        back = export_model(model)
        with torch.no_grad():
            biases = [module for key, module in back.named_modules() if ".1." in key and "Norm" in str(type(module))]
            assert any(norm.bias.any() for norm in biases)
            for norm in biases:
                norm.bias.zero_()
        assert certify(model, back, tokens(2, 36)).relative_logit_error > 0.01

    def test_heads_that_keep_their_order(self, monkeypatch):
        from rigpt_hf.conversion import export

        model = turned(converted_family("mpt")[1], ("heads",), seed=3)
        slopes = [layer.self_attn.alibi.weight for layer in model.model.layers]
        assert any(not torch.equal(each, each.sort(descending=True).values) for each in slopes)
        assert certify(model, export_model(model), tokens(2, 36)).passed
        monkeypatch.setattr(export, "in_stock_order", lambda config, state, *others: state)
        assert certify(model, export_model(model), tokens(2, 36)).relative_logit_error > 0.01

    @over_heads
    def test_signs_that_are_left_out(self, name, monkeypatch):
        from rigpt_hf.conversion import head_norms

        model = turned(converted_family(name)[1], ("gains", "head_qk"))
        assert certify(model, export_model(model), tokens(2, 36)).passed
        monkeypatch.setattr(head_norms, "_without_signs", lambda config, state, tolerance: state)
        with pytest.raises(ValueError, match="^`model.layers.0.self_attn.q_proj.weight` has no counterpart in"):
            export_model(model)
        monkeypatch.setattr(head_norms, "ROUNDING", dict.fromkeys(head_norms.ROUNDING, float("inf")))
        assert certify(model, export_model(model), tokens(2, 36)).relative_logit_error > 0.01

    @pytest.mark.parametrize(
        "name, field, value",
        [
            ("granite", "attention_multiplier", 1.0),
            ("cohere", "logit_scale", 0.0625),
            ("gemma2", "query_pre_attn_scalar", 256),
            ("glm", "rope_parameters", {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}),
            ("falcon-serial", "parallel_attn", True),
            ("gemma3_text", "sliding_window", 64),
            ("gpt_neo", "window_size", 64),
            ("cohere2", "layer_types", ["full_attention"] * 3),
        ],
    )
    @pytest.mark.by_default(4)
    def test_a_field_of_the_configuration_with_another_value(self, name, field, value):
        model = convert_model(family_model(name))
        back = export_model(model)
        assert certify(model, back, tokens(2, 36)).passed and getattr(back.config, field) != value
        back.config.attention_layers = ["global"] * 3 if field == "window_size" else None
        setattr(back.config, field, value)
        other = type(back)(back.config).double().eval()
        other.load_state_dict(back.state_dict(), strict=field != "parallel_attn")
        assert certify(model, other, tokens(2, 36)).relative_logit_error > 1e-3


def test_a_dtype_of_fewer_digits_is_that_of_the_constants_too():
    """A Gemma in 16 bits multiplies its embeddings by a rounded constant, whatever it was exported from."""
    source, converted = converted_family("gemma")
    back = export_model(turned(converted, ("stream",)), dtype=torch.bfloat16)
    rounded = float(torch.tensor(24**0.5, dtype=torch.bfloat16))
    assert float(back.model.embed_tokens.embed_scale) == rounded != 24**0.5
    expected = source.model.embed_tokens.weight * 24**0.5 / rounded
    assert torch.equal(back.model.embed_tokens.weight, expected.to(torch.bfloat16))


def test_biases_without_a_place_are_named():
    model = convert_model(family_model("mpt"))
    with pytest.raises(ValueError, match=r"^`attention_bias=True` has no counterpart in MPT"):
        config = type(model.config)(**(model.config.to_dict() | {"attention_bias": True}))
        export_model(type(model)(config).double())
    model = convert_model(family_model("stablelm"))
    with torch.no_grad():
        noise = torch.randn(24, dtype=torch.float64)
        model.model.layers[1].mlp.down_proj.bias += noise - noise.mean()
    with pytest.raises(
        ValueError, match=r"^`model.layers.1.mlp.down_proj.bias` of the source has no place in StableLM"
    ):
        export_model(model)


def test_slopes_that_a_class_does_not_compute_are_named():
    model = convert_model(family_model("mpt"))
    with torch.no_grad():
        model.model.layers[1].self_attn.alibi.weight[0] *= 1.5
    with pytest.raises(
        ValueError, match=r"`model.layers.1.self_attn.alibi.weight` has no counterpart in MPT, which co"
    ):
        export_model(model)


def test_a_map_of_embeddings_in_a_lexical_frame_of_its_own_is_refused():
    model = convert_model(family_model("bloom"))
    for wrong in (turned(model), tiny_model(**ALIBI, embedding_norm=True, embedding_norm_map=True)):
        with pytest.raises(
            ValueError, match="^`embedding_norm_map=True` has no counterpart in BLOOM unless|`num_key_v"
        ):
            export_model(wrong, "bloom")
    with pytest.raises(ValueError, match="and `frame` is not 'stream'"):
        export_model(model, frame="stream")


@pytest.mark.parametrize("name", ["bloom", "bloom-untied"])
def test_gains_of_embeddings_may_have_any_sign(name):
    source = family_model(name)
    with torch.no_grad():
        for norm in (source.transformer.word_embeddings_layernorm, source.transformer.ln_f):
            norm.weight[::3] *= -1
    back = export_model(turned(convert_model(source), {"lexical", "output"}))
    assert certify(source, back, tokens(2, 36)).relative_logit_error <= CONVERSION[torch.float64]


def test_a_gain_of_zero_is_refused_where_it_hides_the_frame():
    source = family_model("bloom")
    with torch.no_grad():
        source.transformer.ln_f.weight[3] = 0
    with pytest.raises(ValueError, match="^`embedding_norm_map=True` has no counterpart in BLOOM unless"):
        export_model(convert_model(source))


@pytest.mark.parametrize("name", ["olmo2", "gemma3_text", *OF_EACH, *SHARED])
def test_metrics_become_gains_again(name):
    source = family_model(name)
    model = turned(convert_model(source, qk_gain="metric"), ("stream", "heads"))
    assert model.config.qk_norm_gain == "metric"
    assert certify(source, export_model(model), tokens(2, 36)).relative_logit_error <= CONVERSION[torch.float64]


# Biases moved into norms or the head, blocks side by side, slopes, and the others where tests marked `full` run.
FOLDERS = ("gptj", "falcon", "cohere2", "bloom")
OTHERS = [name for name in FIRST.values() if architecture(name) in CENTRED and name not in FOLDERS]


@pytest.mark.slow
@pytest.mark.parametrize("names", [FOLDERS, pytest.param(OTHERS, marks=pytest.mark.full)], ids=["some", "others"])
def test_folders_that_came_back_load_without_the_package(names, tmp_path):
    load_without_the_package({name: turned(converted_family(name)[1], ("stream",)) for name in names}, tmp_path)


@pytest.mark.parametrize("name", ["mpt", "bloom"])
@pytest.mark.by_default(1)
def test_a_class_without_the_common_word_for_the_longest_sequence(name, tmp_path):
    """Its own, or none at all, as in configurations that were not made here."""
    source = family_model(name, torch.float32)
    del source.config.max_position_embeddings
    source.save_pretrained(tmp_path / "source")
    assert "max_position_embeddings" not in json.loads((tmp_path / "source" / "config.json").read_text())
    certificate = convert_checkpoint(tmp_path / "source", tmp_path / "rigpt", progress=False)
    assert certificate.passed and export_checkpoint(tmp_path / "rigpt", tmp_path / "back").passed
    back = type(source).from_pretrained(tmp_path / "back")
    assert not hasattr(back.config, "max_position_embeddings") and certify(source, back).passed


def changed(name: str, change=None, gains=None, **options: Any):
    """What a stock model becomes, with other gains and options of these, and changed in one layer."""
    model = convert_model(family_model(name))
    state = model.state_dict() | (gains or {})
    other = type(model)(type(model.config)(**(model.config.to_dict() | options))).double().eval()
    kept = {key: state[key] for key in other.state_dict()}
    other.load_state_dict(kept)
    if change is not None:
        with torch.no_grad():
            change(other.model.layers[1].self_attn)
    return other


def negate(attention, head: int) -> None:
    """Turn a head of keys, and those of the queries that read it, by half a turn in all planes."""
    for each, heads in ((attention.q_proj, attention.num_key_value_groups), (attention.k_proj, 1)):
        norm = attention.q_norm if each is attention.q_proj else attention.k_norm
        rows = slice(head * heads * attention.head_dim, (head + 1) * heads * attention.head_dim)
        for tensor in (each.weight, each.bias, norm.bias):
            tensor[rows] *= -1


@pytest.mark.parametrize("name", SHARED)
def test_biases_say_which_heads_are_turned_round(name):
    """Rows without a mean have none with all signs changed either."""
    model = changed(name, lambda attention: negate(attention, 1))
    source, plain = converted_family(name)
    assert not torch.equal(model.model.layers[1].self_attn.q_norm.bias, plain.model.layers[1].self_attn.q_norm.bias)
    back = export_model(model)
    assert certify(source, back, tokens(2, 36)).relative_logit_error <= CONVERSION[torch.float64]


@over_heads
def test_rows_that_no_signs_leave_without_a_mean_are_named(name):
    """The last head of keys, and the first of queries, as training leaves them."""
    part, word = ("a head", "k") if name in OF_EACH else ("heads which share gains", "q")

    def train(attention):
        rows = getattr(attention, f"{word}_proj").weight[-attention.head_dim :]
        rows += 1e-6 * torch.randn(rows.shape, dtype=torch.float64)

    model = changed(name, train)
    head = (model.config.num_key_value_heads if word == "k" else model.config.num_attention_heads) - 1
    for wrong in (model, turned(model, ("stream", "gains", "head_qk"))):
        with pytest.raises(
            ValueError,
            match=rf"^`model.layers.1.self_attn.{word}_proj.weight` has no counterpart in .*, whose norms of heads "
            rf"subtract a mean: with no signs that {part} can take are the rows of head {head} without one, \d.* of "
            "their size. Export the model as it was before its queries and keys were trained",
        ) as caught:
            export_model(wrong)
        assert "\n" not in str(caught.value)


@over_heads
def test_signs_of_one_head_alone_need_gains_of_its_own(name):
    """Of one dimension of a plane: where heads share gains no half turn says the same."""

    def change(attention):
        attention.q_proj.weight[attention.head_dim] *= -1
        attention.q_proj.bias[attention.head_dim] *= -1

    model = changed(name, change)
    assert certify(converted_family(name)[1], model, tokens(2, 36)).relative_logit_error > 1e-4
    if name in OF_EACH:
        assert certify(model, export_model(model), tokens(2, 36)).relative_logit_error <= CONVERSION[torch.float64]
    else:
        with pytest.raises(ValueError, match="with no signs that heads which share gains can take are the rows of he"):
            export_model(model)


@pytest.mark.parametrize("name", SHARED)
def test_biases_that_heads_do_not_share_are_named(name):
    def change(attention):
        attention.q_norm.bias[-1] += 0.1

    with pytest.raises(
        ValueError, match="^`model.layers.1.self_attn.q_norm.bias` has no counterpart in .*, whose heads share one"
    ):
        export_model(changed(name, change))


@pytest.mark.parametrize("gain", [None, "vector"])
@over_heads
@pytest.mark.by_default(4)
def test_gains_that_heads_share_go_to_a_class_with_those_of_each(name, gain):
    """And gains of 1 where there are none; a class with biases may have them all at 0."""
    converted = converted_family(name)[1]
    shared = {
        key: tensor[: converted.config.head_dim]
        for key, tensor in converted.state_dict().items()
        if "_norm.weight" in key
    }
    model = changed(name, gains=shared, qk_norm_gain=gain, qk_norm_bias=False)
    back = export_model(model if gain is None else turned(model))
    assert type(back) is type(family_model(name))
    assert certify(model, back, tokens(2, 36)).relative_logit_error <= CONVERSION[torch.float64]
    weights = [weight for key, weight in back.state_dict().items() if re.search(r"self_attn.*norm.*weight", key)]
    assert len(weights) >= 6 and all((weight == 1).all() for weight in weights) is (gain is None)


@pytest.mark.parametrize("name", SHARED)
def test_gains_of_each_head_go_to_no_class_that_shares_them(name):
    state = converted_family(name)[1].state_dict()
    gains = {
        key: gain.repeat(len(state[key.replace("norm.weight", "proj.bias")]) // len(gain))
        for key, gain in state.items()
        if "_norm.weight" in key
    }
    with pytest.raises(ValueError, match="^`qk_norm_gain='vector_per_head'` has no counterpart in P"):
        export_model(changed(name, gains=gains, qk_norm_gain="vector_per_head"))
