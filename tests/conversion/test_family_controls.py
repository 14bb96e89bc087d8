"""Weight maps of families with one thing wrong: `pytest -s` prints how far off that is."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.checkpoints.weights import Rows
from rigpt_hf.conversion import certify, convert_model
from rigpt_hf.conversion.experts import Layout
from rigpt_hf.conversion.families import ARCHITECTURES
from rigpt_hf.neurons_rigpt import bounds_of

from ..models import tokens
from ..tolerances import CONVERSION
from .families import architecture, converted_family, family_model


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
    @pytest.mark.by_default(6)
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
