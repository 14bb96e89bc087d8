"""Which matrices of other families outliers and rounding see, and that results name those they do not."""

import numpy as np
import pytest
import torch
from scipy.stats import kurtosis
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from rigpt_hf.evaluation.measures.outliers import blocks_of, outliers
from rigpt_hf.evaluation.measures.quantization_robustness import quantization_robustness, quantized
from rigpt_hf.evaluation.rounding import in_short, matrices_of, other_matrices, rounded
from tests.evaluation.toys import rows, tiny_gpt2
from tests.models import OPTIONS, tiny_model


LAYERS = 2
EXPERTS = ["model.layers.*.mlp.gate.weight", "model.layers.*.mlp.experts.gate_up_proj"]
EXPERTS.append("model.layers.*.mlp.experts.down_proj")


def shaken(model: PreTrainedModel) -> PreTrainedModel:
    """With weights that are all unlike."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def opt() -> PreTrainedModel:
    """A family whose feedforward maps read `[tokens, d]`, and lie in the layer itself."""
    config = OPTConfig(
        vocab_size=61, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=LAYERS,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    return shaken(OPTForCausalLM(config)).double()


@pytest.fixture(scope="module")
def mixtral() -> PreTrainedModel:
    """A family whose feedforward maps are experts in one parameter of three dimensions."""
    config = MixtralConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    return shaken(MixtralForCausalLM(config))


def entering(model: nn.Module, names: list[str], data: list[list[int]]) -> dict[str, list[torch.Tensor]]:
    """The inputs of modules, `[tokens, d]` for each row of token ids."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, arguments, name=name: seen[name].append(arguments[0].detach().reshape(-1, 32))
        )
        for name in names
    ]
    with torch.no_grad():
        for row in data:
            model(input_ids=torch.tensor([row]), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def test_inputs_without_a_batch_are_seen(opt):
    data = rows(3, 20)
    result = outliers(opt, data)
    maps = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2")
    names = [f"model.decoder.layers.{layer}.{name}" for layer in range(LAYERS) for name in maps]
    assert set(result["linear_inputs"]) == {*names, "lm_head"}
    assert result["protocol"]["not covered"] == []
    for name in ("model.decoder.layers.0.fc1", "model.decoder.layers.1.self_attn.q_proj"):
        states = entering(opt, [name], data)[name]
        for key, first in (("all", 0), ("without_first", 1)):
            expected = np.mean([kurtosis(each[first:].numpy(), axis=-1).mean() for each in states])
            found = result["linear_inputs"][name][key]["per_token"]["excess_kurtosis"]
            assert found == pytest.approx(expected, rel=1e-9), (name, key)


def test_the_published_definition_counts_feedforward_blocks(opt):
    """By hand: what enters attention and the first map of the feedforward block, not the second."""
    data = rows(3, 20)
    heads = ["self_attn.q_proj", "fc1"]
    names = [f"model.decoder.layers.{layer}.{name}" for layer in range(LAYERS) for name in heads]
    seen = entering(opt, names, data)
    values = {
        name: np.mean([kurtosis(each.numpy(), axis=-1).mean() for each in states]) for name, states in seen.items()
    }
    result = outliers(opt, data)
    found = result["summary"]["outlier_safe_pretraining"]
    assert found == pytest.approx(np.mean(list(values.values())), rel=1e-9)
    assert list(blocks_of([*result["linear_inputs"]]).values()) == names
    attention = np.mean([value for name, value in values.items() if "self_attn" in name])
    assert abs(found - attention) > 0.01, "attention alone must be another number"


def test_experts_are_said_to_be_left_out(mixtral):
    result = outliers(mixtral, rows(3, 20))
    assert result["protocol"]["not covered"] == EXPERTS
    assert not any("mlp" in name for name in result["linear_inputs"])
    assert len(result["linear_inputs"]) == 4 * LAYERS + 1
    # A number of attention alone would not be the published one.
    assert result["summary"]["outlier_safe_pretraining"] is None
    assert result["summary"]["excess_kurtosis"] is not None


def test_experts_are_said_to_keep_their_precision(mixtral):
    result = quantization_robustness(mixtral, rows(2, 20), schemes=("W4A4",), modules_to_not_convert=("v_proj",))
    assert result["protocol"]["left alone"] == ["output embeddings", "v_proj", *EXPERTS]
    rough = quantized(mixtral, 4, 4)
    layer, before = rough.model.layers[0], mixtral.model.layers[0]
    assert torch.equal(layer.mlp.experts.down_proj, before.mlp.experts.down_proj)
    assert torch.equal(layer.self_attn.q_proj.weight, rounded(before.self_attn.q_proj.weight, 4))


def test_nothing_of_a_rigpt_is_left_but_its_frequencies():
    for option in ("rotary", "recipe", "gated", "untied-projected", "rotary-learned"):
        model = tiny_model(**OPTIONS[option])
        expected = ["model.layers.*.self_attn.rotary_frequencies"] if option == "rotary-learned" else []
        assert in_short(model, other_matrices(model, matrices_of(model))) == expected
        result = outliers(model, rows(2, 20))
        assert result["protocol"]["not covered"] == expected
        assert result["summary"]["outlier_safe_pretraining"] is not None


def test_maps_between_local_frames_are_no_blocks():
    model = tiny_model(**OPTIONS["local-frames"])
    result = outliers(model, rows(2, 20))
    assert "model.layers.*.transport.weight" in result["protocol"]["not covered"]
    assert result["summary"]["outlier_safe_pretraining"] is not None


def test_layers_that_are_not_alike_are_named_one_by_one():
    model = tiny_gpt2()
    maps, other = list(matrices_of(model)), "transformer.h.1.attn.c_attn"
    assert in_short(model, other_matrices(model, [name for name in maps if "attn" not in name])) == [
        "transformer.h.*.attn.c_attn.weight",
        "transformer.h.*.attn.c_proj.weight",
    ]
    assert in_short(model, other_matrices(model, [name for name in maps if name != other])) == [f"{other}.weight"]


def test_inputs_of_some_tokens_are_not_taken_for_rows():
    """Of a map that gets 20 tokens in two windows and 7 in one nobody knows which was the first of a text."""
    model = tiny_gpt2()
    assert outliers(model, rows(3, 20))["protocol"]["not covered"] == []
    routed, calls = model.transformer.h[0].mlp.c_proj, []

    def part(module, arguments):
        calls.append(len(calls))
        return (arguments[0][:, :7],) if len(calls) == 2 else None

    handle = routed.register_forward_pre_hook(part)
    whole = model.transformer.h[0].mlp
    whole.register_forward_hook(lambda module, arguments, output: torch.zeros_like(arguments[0]))
    result = outliers(model, rows(3, 20))
    handle.remove()
    assert calls == [0, 1, 2], "every window must have gone through it"
    assert result["protocol"]["not covered"] == ["transformer.h.0.mlp.c_proj.weight"]
    assert "transformer.h.0.mlp.c_proj" not in result["linear_inputs"]
    assert "transformer.h.1.mlp.c_proj" in result["linear_inputs"]


class Own(nn.Module):
    """A linear map of a class that nobody knows."""

    def __init__(self, known: nn.Module):
        super().__init__()
        self.weight, self.bias = known.weight, known.bias

    def forward(self, x):
        return x @ self.weight + self.bias


def test_models_without_a_map_that_is_known_are_refused():
    for measure in (outliers, quantization_robustness):
        model = tiny_gpt2()
        options = {"schemes": ("W4A4",)} if measure is quantization_robustness else {}
        assert measure(model, rows(1, 20), **options)
        for name, module in matrices_of(model).items():
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, Own(module))
        with pytest.raises(
            ValueError, match=r"`model` must have linear maps \(`nn.Linear` or `Conv1D`\) .*GPT2LMHeadModel"
        ):
            measure(model, rows(1, 20), **options)
