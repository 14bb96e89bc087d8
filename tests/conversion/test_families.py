"""Every architecture that converts: one function, in every frame, tied as before, from memory and from a folder."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from transformers import CONFIG_MAPPING

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.checkpoints.precision import in_own_precision
from rigpt_hf.checkpoints.weights import Rows, Weights
from rigpt_hf.configuration_rigpt import rotary_frequencies
from rigpt_hf.conversion import Certificate, certify, convert_checkpoint, convert_model
from rigpt_hf.conversion.experts import Layout
from rigpt_hf.conversion.families import ARCHITECTURES, architecture_of
from rigpt_hf.conversion.plan import make_plan
from rigpt_hf.conversion.stock_rotation import rotate_stock
from rigpt_hf.layers_rigpt import FULL, SLIDING
from rigpt_hf.neurons_rigpt import bounds_of
from rigpt_hf.symmetry import GaugeTransformation, gauge_error, haar

from ..models import DTYPES, tokens
from ..tolerances import CONVERSION, SYMMETRY
from .families import BY_TYPE, FAMILIES, YARN, architecture, converted_family, family_model


over_families = pytest.mark.parametrize("name", FAMILIES)
# One variant of every architecture, and the others where tests marked `full` run.
FIRST = {architecture(name): name for name in reversed(FAMILIES)}
over_architectures = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FIRST.values() else pytest.mark.full) for name in FAMILIES]
)


def test_every_architecture_has_a_source():
    assert {architecture(name) for name in FAMILIES} == set(ARCHITECTURES)


@over_architectures
def test_nothing_of_a_source_does_nothing(name):
    """No gain is 1, no bias 0, and no two layers are alike."""
    state = family_model(name).state_dict()
    assert all(tensor.std() > 0.05 and (tensor - tensor.round()).abs().mean() > 0.05 for tensor in state.values())
    first = next(key for key in state if ".1." in key)
    assert not torch.equal(state[first], state[first.replace(".1.", ".0.")])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over_families
def test_a_family_is_the_same_function(name, dtype):
    certificate = certify(*converted_family(name, dtype), tokens(2, 36))
    print(f"{name}: {certificate.relative_logit_error:.1e}")
    assert certificate.relative_logit_error <= CONVERSION[dtype]
    assert certificate.max_abs_logit > 0.1


@over_architectures
def test_all_frames_act_on_a_converted_family(name):
    converted = converted_family(name)[1]
    g = GaugeTransformation.random(converted.config, torch.Generator().manual_seed(1), frames="all")
    error = gauge_error(converted, g, tokens(2, 36))
    print(f"{name}: {error:.1e}")
    assert error <= SYMMETRY[torch.float64]
    turned = dict(g(converted).named_parameters())
    still = [key for key, old in converted.named_parameters() if old.any() and torch.equal(old, turned[key])]
    still = [key for key in still if not key.endswith("_output_norm.weight")]  # whose gains have a frame of their own
    assert set(still) <= {"model.embed_tokens.weight", "lm_head.weight"}


@over_architectures
def test_a_stock_model_turns_but_for_its_norms(name):
    source, size = converted_family(name)[0], converted_family(name)[1].config.hidden_size
    expected = source(tokens(2, 36)).logits
    generator = torch.Generator().manual_seed(0)
    # Norms without gains that do not centre turn too, as far as float32 goes, in which NanoChat's compute.
    turned = (0, SYMMETRY[torch.float32]) if architecture(name) == "nanochat" else (0.1, float("inf"))
    for rotation, (least, most) in ((torch.eye(size), (0, 0)), (haar(size, generator), turned)):
        error = (rotate_stock(source, rotation)(tokens(2, 36)).logits - expected).abs().max() / expected.abs().max()
        assert least <= error <= most


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe-tied", "gpt_oss"])
def test_a_stock_model_with_experts_and_without_gains_turns(name):
    source = family_model(name)
    with torch.no_grad():
        for key, parameter in source.named_parameters():
            if key.endswith("norm.weight"):
                parameter.fill_(1.0)
    turned = rotate_stock(source, haar(converted_family(name)[1].config.hidden_size))
    assert certify(source, turned, tokens(2, 36)).relative_logit_error <= SYMMETRY[torch.float64]
    moved = [key for key, new in turned.named_parameters() if not torch.equal(new, source.get_parameter(key))]
    assert sum("experts." in key for key in moved) >= 6


@over_architectures
def test_tied_stays_tied(name):
    source, converted = converted_family(name)
    tied = source.config.tie_word_embeddings
    assert (converted.lm_head.weight.data_ptr() == converted.model.embed_tokens.weight.data_ptr()) is tied
    if tied:
        embeddings = source.get_input_embeddings().weight
        assert torch.equal(converted.model.embed_tokens.weight[:, : embeddings.shape[1]], embeddings)


@over_architectures
def test_generation_with_a_cache_is_generation_without(name):
    ids = tokens(3, 8)
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[2, :5] = 0
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    source, converted = converted_family(name)
    with in_own_precision(source):  # or eager attention of padding is not a number
        expected = source.generate(ids, attention_mask=mask, use_cache=True, **settings)
    cached, without = (
        converted.generate(ids, attention_mask=mask, use_cache=use_cache, **settings) for use_cache in (True, False)
    )
    assert torch.equal(cached, expected) and torch.equal(without, expected)
    assert len({tuple(row.tolist()) for row in expected}) == 3


@over_architectures
def test_a_folder_becomes_what_its_model_becomes(name, tmp_path):
    dtype = torch.bfloat16 if architecture(name) == "gemma" else torch.float32  # which rounds its constant
    source = family_model(name, dtype)
    source.save_pretrained(tmp_path / "source", max_shard_size=20_000)
    certificate = convert_checkpoint(tmp_path / "source", tmp_path / "out", progress=False)
    assert certificate.passed and Certificate.load(tmp_path / "out") == certificate
    converted, expected = type(convert_model(source)).from_pretrained(tmp_path / "out"), convert_model(source)
    assert converted.dtype is dtype
    for key, tensor in converted.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[key]), key


@pytest.mark.parametrize("name", ["llama", "gemma", "ernie4_5", "olmo", "nanochat", "cohere"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_certificate_in_float64_sees_past_what_the_library_rounds(name, backend):
    """Its norms, a rotation and eager attention compute in float32; a model of float32 is left as it is."""
    source, converted = family_model(name), converted_family(name)[1]
    source.set_attn_implementation(backend)
    assert certify(source, converted, tokens(2, 36)).relative_logit_error <= CONVERSION[torch.float64]
    for dtype, least, most in ((torch.float64, 1e-9, 1e-5), (torch.float32, 0, 0)):
        source.to(dtype)
        plain = source(tokens(2, 36)).logits
        with in_own_precision(source):
            error = (source(tokens(2, 36)).logits - plain).abs().max() / plain.abs().max()
        assert least <= error <= most


@pytest.mark.parametrize("made", [torch.float32, torch.float64], ids=str)
def test_a_certificate_in_float64_sees_past_a_table_of_angles(made):
    """Which GPT-J keeps, as it was rounded when the model was made; afterwards it is what it was."""
    source = family_model("gptj", made).to(torch.float64)
    converted, tables = convert_model(source), [layer.attn.embed_positions for layer in source.transformer.h]
    assert certify(source, converted, tokens(2, 36)).relative_logit_error <= CONVERSION[torch.float64]
    assert all(layer.attn.embed_positions is table for layer, table in zip(source.transformer.h, tables, strict=True))
    plain = source(tokens(2, 36)).logits
    error = (converted(tokens(2, 36)).logits - plain).abs().max() / plain.abs().max()
    print(f"{made}: {error:.1e}")
    assert 1e-10 < error < 1e-6


class TestNegativeControls:
    """What a mechanism left out gives: `pytest -s` prints how far off."""

    @staticmethod
    def off(name, monkeypatch, rule=None, **changes) -> float:
        """The relative error of a family whose map is changed, `rule` by the last part of its target."""
        source, entry = family_model(name), ARCHITECTURES[architecture(name)]
        assert certify(source, convert_model(source), tokens(2, 36)).passed
        rules = tuple(
            replace(each, **(rule or {}).get(each.target.rpartition(".")[2], {})) for each in entry.family.rules
        )
        family = replace(entry.family, **({"rules": rules} | changes))
        assert family != entry.family
        monkeypatch.setitem(ARCHITECTURES, architecture(name), replace(entry, family=family, variant=None))
        error = certify(source, convert_model(source), tokens(2, 36)).relative_logit_error
        print(f"{name}, {', '.join([*(rule or {}), *changes])}: {error:.1e}")
        return error

    def test_gains_without_the_1(self, monkeypatch):
        assert self.off("gemma", monkeypatch, gain_offset=0.0) > 0.1

    def test_a_norm_without_gains_that_is_not_centred(self, monkeypatch):
        assert self.off("olmo", monkeypatch, centred=False) > 0.01

    @pytest.mark.parametrize(
        "name, target",
        [
            ("gemma", "project_in"),
            ("gemma-untied", "embed_tokens"),
            ("granite", "embed_tokens"),
            ("granite-tied", "project_in"),
            ("granite", "q_proj"),
            ("granite", "o_proj"),
            ("granite", "down_proj"),
            ("granite", "lm_head"),
            ("granite-tied", "project_out"),
            ("cohere", "project_out"),
            ("cohere-untied", "lm_head"),
        ],
    )
    def test_a_constant_that_is_left_out(self, name, target, monkeypatch):
        assert self.off(name, monkeypatch, {target: {"scale": None, "buffer": None}}) > 0.01

    def test_a_shared_table_takes_no_constant(self, monkeypatch):
        """Which the projection into the stream has taken: the head reads the table too."""
        assert self.off("granite-tied", monkeypatch, {"project_in": {"scale": lambda config, layer: 9.0}}) > 0.01

    @pytest.mark.parametrize("name", ["ernie4_5", "gptj", "cohere", "glm"])
    def test_pairs_of_neighbours_that_stay_so(self, name, monkeypatch):
        size = converted_family(name)[1].config.head_dim
        unpaired = {"rows": lambda config: Rows(0, size, size)}
        assert self.off(name, monkeypatch, {"q_proj": unpaired, "k_proj": unpaired}) > 0.1

    def test_positions_from_the_first_row_on(self, monkeypatch):
        unmoved = {"rows": lambda config: Rows(0, config.max_position_embeddings, config.max_position_embeddings + 2)}
        assert self.off("opt", monkeypatch, {"embed_positions": unmoved}) > 0.1

    def test_a_norm_with_a_mean_that_is_not_centred(self, monkeypatch):
        for name in ("opt", "starcoder2"):
            assert self.off(name, monkeypatch, centred=False) > 0.01

    def test_a_rotation_the_other_way(self, monkeypatch):
        forwards = {"rows": lambda config: Rows(0, config.head_dim, config.head_dim)}
        assert self.off("nanochat", monkeypatch, {"q_proj": forwards, "k_proj": forwards}) > 0.1

    @pytest.mark.parametrize(
        "name, option",
        [
            ("nanochat-tied", "final_logit_softcapping"),
            ("gemma2", "final_logit_softcapping"),
            ("gemma2", "attn_logit_softcapping"),
            ("gemma2", "sliding_window"),
            ("gemma3_text", "sliding_window"),
            ("gemma3_text", "final_logit_softcapping"),
            ("smollm3", "no_rope_layers"),
            ("cohere2", "no_rope_layers"),
            ("cohere2", "sliding_window"),
            ("gpt_neo", "sliding_window"),
            ("gpt_oss", "sliding_window"),
        ],
    )
    def test_an_option_that_is_left_out(self, name, option, monkeypatch):
        source, entry = family_model(name), ARCHITECTURES[architecture(name)]

        def without(*arguments):
            result = entry.rigpt_config(*arguments)
            setattr(result, option, None)
            result.layer_types = result.layer_types if result.sliding_window else None
            return result

        monkeypatch.setitem(ARCHITECTURES, architecture(name), replace(entry, rigpt_config=without))
        error = certify(source, convert_model(source), tokens(2, 36)).relative_logit_error
        print(f"{name}, {option}: {error:.1e}")
        assert error > 1e-3

    @pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "glm4"])
    def test_gains_behind_a_block_that_are_left_out(self, name):
        source = family_model(name)
        converted = convert_model(source)
        assert certify(source, converted, tokens(2, 36)).passed
        with torch.no_grad():
            for layer in converted.model.layers:
                layer.mlp_output_norm.weight.fill_(1.0)
        assert certify(source, converted, tokens(2, 36)).relative_logit_error > 0.01

    @pytest.mark.parametrize("name", ["gemma3_text", "olmo3"])
    def test_rotations_of_the_other_type_of_layer(self, name):
        source = family_model(name)
        config = convert_model(source).config
        config.rope_parameters = dict(
            zip(config.rope_parameters, [*config.rope_parameters.values()][::-1], strict=True)
        )
        exchanged = RiGPTForCausalLM(config).double().eval()
        exchanged.load_state_dict(convert_model(source).state_dict())
        error = certify(source, exchanged, tokens(2, 36)).relative_logit_error
        print(f"{name}: {error:.1e}")
        assert error > 1e-3

    def test_a_norm_in_front_that_is_not_there(self):
        source = family_model("olmo2")
        converted = convert_model(source)
        for layer in converted.model.layers:
            layer.input_layernorm = converted.model.norm
        assert certify(source, converted, tokens(2, 36)).relative_logit_error > 0.01

    def test_gains_of_another_head(self):
        source = family_model("olmo2")
        converted = convert_model(source)
        with torch.no_grad():
            for layer in converted.model.layers:
                gains = layer.self_attn.q_norm.weight
                gains.copy_(gains.roll(converted.config.head_dim))
        assert certify(source, converted, tokens(2, 36)).relative_logit_error > 0.01

    def test_heads_of_lengths_of_their_own(self):
        source = family_model("olmo2")
        converted = convert_model(source, qk_gain="metric")
        assert certify(source, converted, tokens(2, 36)).passed
        for layer in converted.model.layers:
            layer.self_attn.k_norm.together = False
        assert certify(source, converted, tokens(2, 36)).relative_logit_error > 0.01

    @pytest.mark.parametrize("name", ["cohere-heads", "stablelm-heads", "phi-heads", "persimmon"])
    def test_heads_whose_mean_stays(self, name, monkeypatch):
        source, entry = family_model(name), ARCHITECTURES[architecture(name)]

        def with_means(config):
            family = entry.variant(config)
            assert sum(rule.mean for rule in family.rules) == 2
            return replace(family, rules=tuple(replace(rule, mean=False) for rule in family.rules))

        monkeypatch.setitem(ARCHITECTURES, architecture(name), replace(entry, variant=with_means))
        error = certify(source, convert_model(source), tokens(2, 36)).relative_logit_error
        print(f"{name}, means of heads: {error:.1e}")
        assert error > 0.01

    @pytest.mark.parametrize(
        "name, part", [("cohere-heads", "weight"), ("stablelm-heads", "weight"), ("phi-heads", "bias")]
    )
    def test_what_stands_behind_the_norm_of_another_head(self, name, part):
        """Or a bias behind a norm that is left out."""
        source = family_model(name)
        converted = convert_model(source)
        with torch.no_grad():
            for layer in converted.model.layers:
                values = getattr(layer.self_attn.q_norm, part)
                values.copy_(values.roll(converted.config.head_dim) if part == "weight" else torch.zeros_like(values))
        assert certify(source, converted, tokens(2, 36)).relative_logit_error > 0.01

    def test_gains_of_pairs_of_neighbours_that_stay_so(self, monkeypatch):
        source, entry = family_model("cohere-heads"), ARCHITECTURES["cohere"]

        def unpaired(config):
            family = entry.variant(config)
            rules = (replace(rule, rows=None) if rule.gain else rule for rule in family.rules)
            return replace(family, rules=tuple(rules))

        monkeypatch.setitem(ARCHITECTURES, "cohere", replace(entry, variant=unpaired))
        assert certify(source, convert_model(source), tokens(2, 36)).relative_logit_error > 0.01

    @pytest.mark.parametrize("option, value", [("swiglu_limit", 0.6), ("swiglu_alpha", 1.0), ("swiglu_limit", None)])
    def test_other_bounds_of_neurons(self, option, value):
        source = family_model("gpt_oss")
        converted = convert_model(source)
        assert certify(source, converted, tokens(2, 36)).passed
        setattr(converted.config, option, value)
        for layer in converted.model.layers:
            layer.mlp.experts.bounds = bounds_of(converted.config)
        error = certify(source, converted, tokens(2, 36)).relative_logit_error
        print(f"gpt_oss, {option}={value}: {error:.1e}")
        assert error > 1e-3

    @pytest.mark.parametrize(
        "name", ["self_attn.sinks", "mlp.gate.bias", "mlp.experts.down_bias", "mlp.experts.up_proj.bias"]
    )
    def test_sinks_and_biases_of_other_heads_and_experts(self, name):
        source = family_model("gpt_oss")
        converted = convert_model(source)
        with torch.no_grad():
            for layer in converted.model.layers:
                parameter = layer.get_parameter(name)
                parameter.copy_(parameter.roll(1, -1))
        error = certify(source, converted, tokens(2, 36)).relative_logit_error
        print(f"gpt_oss, {name}: {error:.1e}")
        assert error > 0.01

    def test_gains_of_queries_on_keys(self, monkeypatch):
        norms = {of: {"source": f"model.layers.{{i}}.self_attn.{of}_norm"} for of in "qk"}
        assert self.off("qwen3", monkeypatch, {"q_norm": norms["k"], "k_norm": norms["q"]}) > 0.01

    @pytest.mark.parametrize("name", ["mpt", "bloom"])
    def test_slopes_of_other_heads(self, name, monkeypatch):
        family = ARCHITECTURES[name].family
        own = next(rule.values for rule in family.rules if rule.target.endswith(".alibi"))
        assert self.off(name, monkeypatch, {"alibi": {"values": lambda config: own(config)[::-1]}}) > 0.01

    def test_a_norm_of_embeddings_without_its_gain_and_bias(self):
        source = family_model("bloom")
        converted = convert_model(source)
        assert certify(source, converted, tokens(2, 36)).passed
        for part, neutral in (("weight", torch.eye(24)), ("bias", torch.zeros(24))):
            changed = deepcopy(converted)
            getattr(changed.model.embedding_map, part).data.copy_(neutral)
            assert certify(source, changed, tokens(2, 36)).relative_logit_error > 0.01

    @pytest.mark.parametrize("name", ["mpt", "bloom"])
    def test_a_product_of_slope_and_position_that_is_rounded(self, name):
        """With 16 heads slopes are no powers of two, and the classes multiply in float32."""
        heads = {"mpt": {"n_heads": 16, "hidden_size": 32}, "bloom": {"n_head": 16, "hidden_size": 32}}[name]
        source = family_model(name, **heads)
        converted = convert_model(source)
        assert certify(source, converted, tokens(2, 36)).relative_logit_error <= CONVERSION[torch.float64]
        plain = source(tokens(2, 36)).logits
        assert (converted(tokens(2, 36)).logits - plain).abs().max() > 1e-10

    def test_the_other_gelu(self, monkeypatch):
        source, entry = family_model("opt-untied"), ARCHITECTURES["opt"]

        def exact_gelu(*arguments):
            result = entry.rigpt_config(*arguments)
            result.hidden_act = "gelu"
            return result

        monkeypatch.setitem(ARCHITECTURES, "opt", replace(entry, rigpt_config=exact_gelu))
        error = certify(source, convert_model(source), tokens(2, 36)).relative_logit_error
        print(f"opt, gelu: {error:.1e}")
        assert error > 1e-5

    def test_gates_in_the_place_of_what_they_are_multiplied_with(self, monkeypatch):
        assert self.off("gpt_oss", monkeypatch, experts=Layout(transposed=True)) > 0.1

    @pytest.mark.parametrize(
        "name, first, second",
        [
            ("phi3", "gate_proj", "up_proj"),
            ("phi3", "k_proj", "v_proj"),
            ("glm4", "gate_proj", "up_proj"),
            ("gpt_neox", "q_proj", "k_proj"),
            ("gpt_neox", "q_proj", "v_proj"),
            ("falcon-multi-query", "k_proj", "v_proj"),
        ],
    )
    def test_parts_of_a_fused_map_in_another_order(self, name, first, second, monkeypatch):
        family = ARCHITECTURES[architecture(name)].family
        rows = {rule.target.rpartition(".")[2]: {"rows": rule.rows} for rule in family.rules}
        assert self.off(name, monkeypatch, {first: rows[second], second: rows[first]}) > 0.1

    def test_queries_of_all_heads_before_the_keys(self, monkeypatch):
        """As in other fused maps; here a head has all three together."""
        size = converted_family("gpt_neox")[1].config.hidden_size

        def third(index: int) -> dict:
            return {"rows": lambda config: Rows(index * size, size, 3 * size)}

        thirds = {name: third(index) for index, name in enumerate(("q_proj", "k_proj", "v_proj"))}
        assert self.off("gpt_neox", monkeypatch, thirds) > 0.1

    def test_a_norm_that_belongs_to_the_other_block(self, monkeypatch):
        first, second = ({"norm": f"gpt_neox.layers.{{i}}.{name}_layernorm"} for name in ("input", "post_attention"))
        exchanged = dict.fromkeys(("q_proj", "k_proj", "v_proj"), second) | {"up_proj": first}
        assert self.off("gpt_neox", monkeypatch, exchanged) > 0.1

    @pytest.mark.parametrize("name", ["gpt_neox", "gptj", "phi", "falcon-multi-query", "cohere", "cohere2"])
    def test_blocks_in_turn_that_are_side_by_side(self, name, monkeypatch):
        source, entry = family_model(name), ARCHITECTURES[architecture(name)]

        def in_turn(*arguments):
            result = entry.rigpt_config(*arguments)
            assert result.use_parallel_residual
            result.use_parallel_residual = False
            return result

        monkeypatch.setitem(ARCHITECTURES, architecture(name), replace(entry, rigpt_config=in_turn))
        error = certify(source, convert_model(source), tokens(2, 36)).relative_logit_error
        print(f"{name}, in turn: {error:.1e}")
        assert error > 0.05

    @pytest.mark.parametrize("name", ["gptj", "gptj-tied", "phi", "phi-tied"])
    def test_a_bias_of_the_head_that_is_left_out(self, name):
        source, without = family_model(name), family_model(name)
        with torch.no_grad():
            without.lm_head.bias.zero_()
        error = certify(source, convert_model(without), tokens(2, 36)).relative_logit_error
        print(f"{name}, bias of the head: {error:.1e}")
        assert error > 0.05


def test_a_constant_is_the_one_that_a_model_in_memory_has():
    """Gemma keeps `sqrt(d)` as it was rounded when the model was made, whatever dtype it has now."""
    for name in ("gemma", "gemma-untied"):
        for made, now, apart in ((torch.float32, torch.float64, 1e-9), (torch.bfloat16, torch.float32, 1e-4)):
            source = family_model(name, made).to(now)
            assert certify(source, convert_model(source), tokens(2, 36)).relative_logit_error <= CONVERSION[now]
            # The same weights in a file know nothing of that.
            entry, state = architecture_of(source.config), source.state_dict()
            plan = make_plan(entry, source.config, Weights(state))
            as_stored = convert_model(source)
            missing, odd = as_stored.load_state_dict(
                {each.name: each.make(now) for each in plan.entries}, strict=False
            )
            assert not odd and set(missing) <= {"lm_head.weight"}  # which is tied
            error = certify(source, as_stored, tokens(2, 36)).relative_logit_error
            print(f"{name}: {error:.1e}")
            assert error > apart


@pytest.mark.parametrize("name", ["gptj", "gptj-tied", "phi", "phi-tied"])
def test_the_bias_of_the_head_is_a_dimension_of_its_own(name):
    """It never enters the stream, and the stream never reaches it."""
    source, converted = converted_family(name)
    model, size = converted.model, converted.config.hidden_size
    assert converted.config.embedding_size == size + 1
    assert not model.project_in.weight[:, size].any() and not model.project_out.weight[size].any()
    assert model.project_out.bias[size] == 1 and torch.equal(converted.lm_head.weight[:, size], source.lm_head.bias)
    assert source.config.tie_word_embeddings or not model.embed_tokens.weight[:, size].any()


def test_frequencies_that_are_not_truncated_stay_so():
    """As gpt-oss has them: the ends of the ramp between frequencies are no whole dimensions."""
    rope = YARN | {"original_max_position_embeddings": 32, "beta_fast": 4.0}
    frequencies = {}
    for truncate in (False, True):
        source = family_model("gpt_oss", rope_parameters=rope | {"truncate": truncate})
        found, scaling = rotary_frequencies(convert_model(source).config)
        assert torch.equal(found, source.model.rotary_emb.inv_freq)
        assert scaling == source.model.rotary_emb.attention_scaling != 1
        frequencies[truncate] = found
    assert not torch.equal(frequencies[True], frequencies[False])


def test_a_bias_of_the_head_that_is_missing_is_named():
    state = {name: tensor for name, tensor in family_model("gptj").state_dict().items() if name != "lm_head.bias"}
    with pytest.raises(ValueError, match="`lm_head.bias` is missing from the source.*match GPT-J"):
        make_plan(ARCHITECTURES["gptj"], family_model("gptj").config, Weights(state))


def test_a_head_under_its_former_name():
    source = family_model("gpt_neox")
    state = {name.replace("lm_head.", "embed_out."): tensor for name, tensor in source.state_dict().items()}
    assert "embed_out.weight" in state
    plan = make_plan(ARCHITECTURES["gpt_neox"], source.config, Weights(state))
    made = {each.name: each.make(torch.float64) for each in plan.entries}
    assert torch.equal(made["lm_head.weight"], source.lm_head.weight)


@pytest.mark.parametrize("size, turned", [(44, 30), (47, 6), (49, 2), (64, 64)])
def test_so_many_dimensions_turn_as_the_configuration_says(size, turned):
    """Also where a part of the size of a head is no whole number of them by rounding."""
    assert size == turned or int(size * (turned / size)) < turned
    config = CONFIG_MAPPING["gptj"](n_embd=2 * size, n_head=2, rotary_dim=turned)
    assert 2 * len(rotary_frequencies(ARCHITECTURES["gptj"].result(config))[0]) == turned


def test_every_refusal_has_a_case():
    cases = [(ARCHITECTURES[architecture(name)], family_model(name, **options).config) for name, options, _ in REFUSED]
    said = {option for entry, config in cases for option, words in entry.refused.items() if words(config)}
    assert said == {option for entry in ARCHITECTURES.values() for option in entry.refused}


SLIDING_FAMILIES = {
    architecture(name): name for name in FAMILIES if hasattr(family_model(name).config, "sliding_window")
}


@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
@pytest.mark.parametrize("name", SLIDING_FAMILIES)
def test_layers_slide_if_the_class_looks_through_a_window(name, kind):
    """Whether `layer_types` decides is a property of the class."""
    options = FAMILIES[name] | {"layer_types": [kind] * 3, "use_sliding_window": True, "sliding_window": 8}
    source, ids = family_model(name, **options), tokens(2, 36)
    free = family_model(name, **(options | {"sliding_window": 64}))
    slides = not torch.equal(source(ids).logits, free(ids).logits)
    for model, window in ((source, 8 if slides else None), (free, 64 if slides else None)):
        converted = convert_model(model)
        assert converted.config.sliding_window == window and certify(model, converted, ids).passed


LONG = {"max_position_embeddings": 128}
REFUSED: list[tuple[str, dict, str]] = [
    ("mixtral", {"router_jitter_noise": 0.1}, "`router_jitter_noise=0.1` cannot be converted"),
    ("qwen3_moe", {"num_experts": 0}, "`num_experts` must be at least 1 to be converted"),
    ("gpt2", {"add_cross_attention": True}, "`add_cross_attention=True` cannot be converted.*without an encoder"),
    ("ministral3", LONG, r"`rope_parameters\['llama_4_scaling_beta'\]=0.1` scales.* from position 64 on.*set"),
    ("gemma", {"use_bidirectional_attention": True}, "`use_bidirectional_attention=True` cannot be converted"),
    ("gemma", {"partial_rotary_factor": 0.5}, r"`rope_parameters\['partial_rotary_factor'\]=0.5` is not honoured"),
    ("gemma", {"hidden_act": "mish"}, "`hidden_act` must be one of.*'mish'"),
    ("olmo", {"clip_qkv": 8.0}, "`clip_qkv=8.0` cannot be converted: it cuts off single coordinates"),
    ("olmoe", {"clip_qkv": 8.0}, "`clip_qkv=8.0` cannot be converted: it cuts off single coordinates"),
    ("gpt_neox", {"hidden_act": "mish"}, "`hidden_act` must be one of.*'mish'"),
    (
        "gpt_neox",
        {"head_dim": 10},
        "`head_dim=10` cannot be converted.* = 6, of which 3 dimensions cannot.* Remove it",
    ),
    ("stablelm", {"head_dim": 9}, "`head_dim=9` cannot be converted.* = 6, of which 3 dimensions cannot"),
    ("persimmon", {"head_dim": 5}, "`head_dim=5` cannot be converted.* = 6, of which 3 dimensions cannot"),
    ("gpt_neox-rotation", {"head_dim": 20}, "`head_dim=20` cannot be converted.* = 6, of which 8 dimensions cannot"),
    ("gptj", {"rotary_dim": 3}, "`rotary_dim=3` cannot be converted.* a head of 6 "),
    ("gptj", {"rotary_dim": 8}, "`rotary_dim=8` cannot be converted.* a head of 6 "),
    (
        "persimmon",
        {"hidden_dropout": 0.1},
        "`hidden_dropout=0.1` cannot be converted: it drops what the MLP.*Set it to",
    ),
    ("falcon-serial", {"alibi": True}, "`alibi=True` cannot be converted.*to bfloat16.* with rotary positions"),
    ("falcon-serial", {"attention_dropout": 0.1}, "`attention_dropout=0.1` cannot.*`hidden_dropout=0.0`.*training"),
    ("falcon", {"parallel_attn": False}, "`parallel_attn=False` with `new_decoder_architecture=True` cannot"),
    ("falcon-heads", {"num_ln_in_parallel_attn": 2}, "`num_ln_in_parallel_attn=2` with `new_decoder_arch.*=False`"),
    ("falcon", {"partial_rotary_factor": 0.5}, r"`rope_parameters\['partial_rotary_factor'\]=0.5` is not honoured"),
    ("cohere2", {"partial_rotary_factor": 0.5}, r"`rope_parameters\['partial_rotary_factor'\]=0.5` is not honoured"),
    ("cohere", {"partial_rotary_factor": 0.5}, r"`rope_parameters\['partial_rotary_factor'\]=0.5` is not honoured"),
    ("opt", {"do_layer_norm_before": False}, "`do_layer_norm_before=False` cannot.*residual path itself.*350m"),
    ("opt", {"_remove_final_layer_norm": True}, "`_remove_final_layer_norm=True` cannot.*a stream without a norm"),
    ("opt", {"layerdrop": 0.1}, "`layerdrop=0.1` cannot be converted.*Set it to 0.0"),
    ("opt", {"activation_function": "quick_gelu"}, "`activation_function` must be one of.*'quick_gelu'"),
    *(
        (
            "mpt",
            {"attn_config": {option: value}},
            f"`attn_config.{option}={value}` cannot be.* as if it were {honoured}",
        )
        for option, value, honoured in (
            ("qk_ln", True, False),
            ("prefix_lm", True, False),
            ("attn_uses_sequence_id", True, False),
            ("alibi", False, True),
            ("alibi_bias_max", 4, 8),
        )
    ),
    ("mpt", {"attn_config": {"clip_qkv": 6.0}}, "`attn_config.clip_qkv=6.0` cannot.*cuts off single coordinates"),
    ("mpt", {"logit_scale": 0.5}, "`logit_scale=0.5` cannot be converted: .* as if it were None"),
    ("mpt", {"no_bias": False}, "`no_bias=False` cannot be converted: .* as if it were True"),
    ("mpt", {"expansion_ratio": 2}, "`expansion_ratio=2` cannot be converted: .* as if it were 4"),
    (
        "bloom",
        {"apply_residual_connection_post_layernorm": True},
        "`apply_residual_connection_post_layernorm=True` cannot.*residual path itself",
    ),
    ("gemma3_text", {"use_bidirectional_attention": True}, "`use_bidirectional_attention=True` cannot be converted"),
    (
        "gemma3_text",
        {"rope_parameters": BY_TYPE | {FULL: BY_TYPE[SLIDING] | {"partial_rotary_factor": 0.5}}},
        r"`rope_parameters\['partial_rotary_factor'\]=0.5` is not honoured",
    ),
    ("gemma2", {"use_bidirectional_attention": True}, "`use_bidirectional_attention=True` cannot be converted"),
    ("gemma2", {"partial_rotary_factor": 0.5}, r"`rope_parameters\['partial_rotary_factor'\]=0.5` is not honoured"),
    (
        "nanochat",
        {"rope_parameters": YARN},
        r"'yarn'` makes.* 1.139 times as long.*`rope_parameters\['attention_fa",
    ),
    ("phi3-longrope", LONG, r"'longrope'.* beyond position 64.* `rope_parameters\['factor'\]` to 8"),
]


@pytest.mark.parametrize("name, options, message", REFUSED)
def test_what_a_family_cannot_express_is_named(name, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        convert_model(family_model(name, **options))
    assert "\n" not in str(caught.value)


def test_the_advice_on_long_rotations_is_the_same_function():
    """With the factor that follows from the lengths written down, and the lengths then shortened."""
    options = {"rope_parameters": FAMILIES["phi3-longrope"]["rope_parameters"] | {"factor": None}}
    long = family_model("phi3-longrope", **options, **LONG)
    with pytest.raises(ValueError, match=r"`max_position_embeddings` to 64 and `rope_parameters\['factor'\]` to 2 in"):
        convert_model(long)
    long.config.max_position_embeddings, long.config.rope_parameters["factor"] = 64, 2.0
    assert certify(long, convert_model(long), tokens(2, 36)).passed
    long.config.rope_parameters["factor"] = None  # the scaling of the rotation would follow the shorter length
    assert not certify(long, convert_model(long), tokens(2, 36)).passed
