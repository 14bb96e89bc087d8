"""Whole models: the function in the new frame, what gauges and gains are for, tuning, what is simulated, refusals."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from rigpt_hf.quantization import Codes, Quantized, Recipe, all_moments, quantize_model, rounded_codes, tuned
from rigpt_hf.quantization import frames as quantization_frames
from rigpt_hf.quantization.frames import gains_in_closed_form, geometric_mean
from rigpt_hf.quantization.maps import parts_of
from rigpt_hf.quantization.simulated import rounded_tokens
from rigpt_hf.quantization.tuning import TunedLinear
from rigpt_hf.symmetry.contraction import weights_of

from ..models import ALL, contents, tiny_model, tokens
from ..tolerances import CANONICAL, SYMMETRY


# Groups that divide the widths of the tiny models.
GROUPED = Recipe(group=4)
CALIBRATION = tokens(26, 40, seed=5)
SETS = ("gated", "parallel-local-projected", "experts-shared", "post-norm-alone")


def logits(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=rows, use_cache=False).logits


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max() / a.detach().abs().max())


def kl(model: nn.Module, other: nn.Module, rows: torch.Tensor) -> float:
    a, b = (logits(each, rows).log_softmax(-1) for each in (model, other))
    return float((a.exp() * (a - b)).sum(-1).mean())


@pytest.fixture(scope="module")
def gated():
    return tiny_model(**ALL["gated"])


@pytest.fixture(scope="module")
def moments(gated):
    return all_moments(gated, CALIBRATION)


@pytest.mark.parametrize("option", SETS)
@pytest.mark.by_default(2)
def test_frames_leave_the_function_alone_and_eight_bits_nearly(option):
    model, rows = tiny_model(**ALL[option]), tokens(2, 16)
    before, plain = contents(model), logits(model, rows)
    measured = all_moments(model, CALIBRATION)
    for recipe in (replace(GROUPED, frame="own", method="round"), Recipe(activations=8, cache=8)):
        found = {
            bits: quantize_model(model, replace(recipe, bits=bits), CALIBRATION, moments=measured) for bits in (2, 8)
        }
        assert contents(model) == before
        turned = found[8].model
        assert difference(plain, logits(turned, rows)) <= SYMMETRY[torch.float64]
        weights, own = weights_of(model), weights_of(turned)
        changed = [name for name, weight in weights.items() if not torch.equal(weight, own[name])]
        assert len(changed) > 3 and set(found[8].codes) > set(parts_of(model))
        # Part of a change of frame is another function.
        half = copy.deepcopy(turned)
        half.get_parameter(changed[0]).data.copy_(weights[changed[0]])
        assert difference(plain, logits(half, rows)) > 1e3 * SYMMETRY[torch.float64]
        # In the mean, as a token whose experts are others is somewhere else.
        errors = {bits: float((plain - logits(each.dense_model(), rows)).abs().mean()) for bits, each in found.items()}
        assert errors[8] < 0.2 * errors[2]


def test_what_is_calibrated_as_it_goes_is_what_was_measured_before(gated, moments):
    now, before = (quantize_model(gated, GROUPED, CALIBRATION, moments=given) for given in (None, moments))
    assert set(now.codes) == set(before.codes)
    assert all(torch.equal(now.codes[name].codes, before.codes[name].codes) for name in now.codes)
    other = quantize_model(gated, replace(GROUPED, seed=1), moments=moments)
    assert not torch.equal(
        other.codes["model.layers.0.mlp.up_proj"].codes, now.codes["model.layers.0.mlp.up_proj"].codes
    )


@pytest.mark.parametrize("option", ["gated", "multi-head"])
@pytest.mark.by_default(1)
def test_gauges_make_what_is_read_as_long_as_what_reads_it(option, monkeypatch):
    monkeypatch.setattr(quantization_frames, "DAMPING", 0.0)
    model = tiny_model(**ALL[option])
    turned = quantize_model(model, GROUPED, CALIBRATION).model
    checked = 0
    for own, same in ((model, False), (turned, True)):
        found = all_moments(own, CALIBRATION)
        for index, layer in enumerate(own.model.layers):
            seen = found[f"model.layers.{index}.self_attn.o_proj"]
            weight = layer.self_attn.o_proj.weight.detach()
            size = own.config.head_dim
            heads = range(own.config.num_attention_heads // own.config.num_key_value_heads)  # those of the first
            parts = [slice(head * size, (head + 1) * size) for head in heads]
            read = sum(seen[part, part] for part in parts)
            gram = sum(weight[:, part].T @ weight[:, part] for part in parts)
            assert (difference(read / read.norm(), gram / gram.norm()) < CANONICAL[torch.float64]) is same
            checked += 1
            if own.config.gated_mlp:
                seen = found[f"model.layers.{index}.mlp.down_proj"].diagonal()
                lengths = layer.mlp.down_proj.weight.detach().square().sum(0)
                ratio = seen / lengths
                assert bool(ratio.std() / ratio.mean() < CANONICAL[torch.float64]) is same
    assert checked == 6


def test_the_geometric_mean_solves_its_equation():
    a, b = (part @ part.mT for part in torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0)).double())
    mean = geometric_mean(a, b)
    assert difference(b, mean @ torch.linalg.inv(a) @ mean) < CANONICAL[torch.float64]
    assert difference(mean, geometric_mean(b, a)) < CANONICAL[torch.float64]


@pytest.mark.parametrize("measured", [False, True])
def test_gains_in_closed_form_are_the_best(gated, moments, measured):
    weights = {f"{name}.weight": gated.get_submodule(name).weight.detach() for name in parts_of(gated)}
    seen = {f"{name}.weight": values for name, values in moments.items()} if measured else None
    gains = gains_in_closed_form(gated.config, weights, seen)
    assert len(gains) == 15
    name, generator = "model.layers.1.self_attn.q_proj.weight", torch.Generator().manual_seed(0)
    squares = seen[name].diagonal() if seen else torch.ones(len(gains[name]))

    def cost(gain: torch.Tensor) -> float:
        return float((weights[name] / gain).square().sum() * (gain.square() * squares).sum())

    gain = gains[name]
    for _ in range(5):
        other = gain * (0.05 * torch.randn(len(gain), generator=generator, dtype=torch.float64)).exp()
        assert cost(gain) < cost(other)
    assert cost(gain) < min(cost(torch.ones_like(gain)), cost(gains["model.layers.1.mlp.up_proj.weight"]))


def test_tuning_brings_logits_nearer_and_leaves_codes_alone(gated, moments):
    quantized = quantize_model(gated, replace(GROUPED, bits=3, table_bits=None), moments=moments)
    before = {name: codes.codes.clone() for name, codes in quantized.codes.items()}
    lost = kl(gated, quantized.dense_model(), CALIBRATION)
    still = tuned(quantized, CALIBRATION, 1, 0.0)
    assert all(torch.equal(still[name].scales, codes.scales) for name, codes in quantized.codes.items())
    found = tuned(quantized, CALIBRATION, 20, 1e-2)
    assert set(found) == set(before)
    for name, codes in found.items():
        assert torch.equal(codes.codes, before[name])
        for factors in (codes.scales, codes.gain):
            assert torch.equal(factors, factors.half().float())
    better = Quantized(quantized.model, quantized.codes | found, quantized.recipe)
    assert kl(gated, better.dense_model(), CALIBRATION) < 0.7 * lost
    assert better.bits_per_weight > quantized.bits_per_weight


def test_a_recipe_with_tuning_tunes(gated, moments):
    recipe = replace(GROUPED, tune=2, bits=3)
    quantized = quantize_model(gated, recipe, CALIBRATION, moments=moments)
    assert quantized.codes["model.layers.0.mlp.up_proj"].gain is not None
    assert quantized.codes["model.embed_tokens"].bits == 8


@pytest.mark.parametrize("group", [None, 4])
def test_derivatives_of_scales_gains_and_inputs(group):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    codes = rounded_codes(weight, 4, group, gain=torch.rand(8, generator=generator) + 0.5)
    layer = TunedLinear(codes, torch.randn(6, generator=generator).double(), torch.float64)
    with torch.no_grad():
        layer.scale_change.normal_(0, 0.1, generator=generator)
        layer.gain_change.normal_(0, 0.1, generator=generator)
    x = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    inputs = (x, layer.scale_change, layer.gain_change)
    scales, gain = layer.factors()
    dense = Codes(codes.codes, scales, 4, group, gain).dense(torch.float64)
    plain, found = nn.functional.linear(x, dense, layer.bias), layer(x)
    assert difference(plain, found) <= SYMMETRY[torch.float64]
    along = torch.randn(plain.shape, generator=generator, dtype=torch.float64)
    expected, given = (torch.autograd.grad((output * along).sum(), inputs) for output in (plain, found))
    for a, b in zip(expected, given, strict=True):
        assert a.abs().max() > 0 and difference(a, b) <= SYMMETRY[torch.float64]


def test_tables_are_rounded_row_by_row_and_stay_tied(gated, moments):
    quantized = quantize_model(gated, GROUPED, moments=moments)
    codes, model = quantized.codes["model.embed_tokens"], quantized.dense_model()
    assert codes.bits == 8 and codes.group is None and "lm_head" not in quantized.codes
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, codes.dense(torch.float64))
    whole = quantize_model(gated, replace(GROUPED, table_bits=None), moments=moments)
    assert "model.embed_tokens" not in whole.codes


def test_tokens_are_rounded_one_by_one():
    states = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 30, 1e-3])[:, None]
    for bits in (8, 4):
        found = rounded_tokens(states, bits)
        torch.testing.assert_close(found[0, 1], rounded_tokens(states[0, 1], bits))
        assert all(len(row.unique()) <= 2**bits for row in found.flatten(0, 1))
        for constant in (torch.zeros(2, 4), torch.full((2, 4), 3.0)):
            assert torch.equal(rounded_tokens(constant, bits), constant)
        # An offset each: what is added to all comes back as it was.
        assert difference(found + 5, rounded_tokens(states + 5, bits)) < 1e-5
    errors = {bits: difference(states, rounded_tokens(states, bits)) for bits in (4, 8)}
    assert errors[8] < 0.1 * errors[4] < 0.1


def test_simulated_activations_and_caches_cost_something(gated, moments):
    rows, plain = tokens(2, 16), logits(gated, tokens(2, 16))
    errors = {}
    for name, options in {
        "whole": {},
        "A8": {"activations": 8},
        "A4": {"activations": 4},
        "KV4": {"cache": 4},
    }.items():
        quantized = quantize_model(gated, Recipe(bits=8, **options), moments=moments)
        errors[name] = difference(plain, logits(quantized.dense_model(), rows))
        assert len(quantized.recipe.simulates) == len(options)
        # Neurons are turned on their way, so what reads them must be given them so.
        assert len(quantized.turns) == (3 if "activations" in options else 0)
    assert errors["whole"] < errors["A4"] and errors["A8"] < errors["A4"] and errors["whole"] < errors["KV4"]


def test_gains_of_a_stock_model_are_kept(gated, moments):
    given = {
        name: torch.rand(32, generator=torch.Generator().manual_seed(0)) + 0.5 for name in moments if "q_proj" in name
    }
    quantized = quantize_model(gated, Recipe(frame="own", gains=False), moments=moments, gains=given)
    codes = quantized.codes["model.layers.0.self_attn.q_proj"]
    assert torch.equal(codes.gain, given["model.layers.0.self_attn.q_proj"].half().float())
    assert quantized.codes["model.layers.0.self_attn.k_proj"].gain is None


def test_what_cannot_be_rounded_is_refused(gated, moments):
    for match, recipe, given in [
        ("`calibration` must be given for `method='gptq'`, and none is", Recipe(), {}),
        ("`calibration` must be given for `tune`, and none is", Recipe(method="round", tune=3), {}),
        ("`calibration` must hold at least 1024 tokens, got 20", Recipe(), {"calibration": tokens(2, 10)}),
        ("`group` must divide the 32 numbers in a row of model.layers.0", Recipe(group=5), {"moments": moments}),
    ]:
        with pytest.raises(ValueError, match=match):
            quantize_model(gated, recipe, **given)
    for match, options in [
        ("`gauges` need `group`", {"gauges": True}),
        ("`method` must be one of gptq, round, got 'awq'", {"method": "awq"}),
        ("`frame` must be one of hadamard, own, got 'haar'", {"frame": "haar"}),
        ("`activations` must be from 2 to 8 bits, or None to leave it whole, got 16", {"activations": 16}),
        ("`tune` must be a number of steps, at least 0, got -1", {"tune": -1}),
        ("`bits` must be from 2 to 8, got 16", {"bits": 16}),
    ]:
        with pytest.raises(ValueError, match=match):
            Recipe(**options)
    with pytest.raises(ValueError, match="`frame` must be 'own' for a width of 30, for which no"):
        quantize_model(tiny_model(hidden_size=30, num_attention_heads=3, num_key_value_heads=1), Recipe(), CALIBRATION)
    quantized = tiny_model()
    quantized.config.quantization_config = {"quant_method": "rigpt"}
    with pytest.raises(ValueError, match="`model` must not be quantized already, got one that is"):
        quantize_model(quantized, Recipe(), CALIBRATION)
    with pytest.raises(ValueError, match="`model` must be a RiGPTForCausalLM, got RiGPTModel"):
        quantize_model(gated.model, Recipe(), CALIBRATION)


@pytest.mark.parametrize("option", ["depth", "linear"])
def test_flows_are_rounded_to_nearest(option):
    model, rows = tiny_model(**ALL[option]), tokens(2, 12)
    with pytest.raises(ValueError, match="Quantize with `method='round'` and no calibration"):
        quantize_model(model, Recipe(), CALIBRATION)
    quantized = quantize_model(model, Recipe(bits=8, method="round"))
    plain = logits(model, rows)
    assert difference(plain, logits(quantized.model, rows)) <= SYMMETRY[torch.float64]
    assert 0 < difference(plain, logits(quantized.dense_model(), rows)) < 0.1
