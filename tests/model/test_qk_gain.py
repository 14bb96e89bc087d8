"""Gains behind the normalisation of queries and keys: the network with a vector of them, and with metrics."""

import copy

import pytest
import torch
from torch import nn

from rigpt_hf import RiGPTConfig, RiGPTForCausalLM
from rigpt_hf.norms_rigpt import RiGPTHeadNorm, RiGPTMetricNorm
from tests.model.agreement import assert_different, assert_same
from tests.models import GAIN_METRIC, GAIN_PER_HEAD, GAIN_VECTOR, NORM_BIAS, TOGETHER, tiny_config, tiny_model, tokens


FORMS = {"vector": GAIN_VECTOR, "metric": GAIN_METRIC}
FORMS |= {f"{form}-together": TOGETHER | options for form, options in FORMS.items()}
FORMS |= {
    "per-head": GAIN_PER_HEAD,
    "per-head-bias": GAIN_PER_HEAD | NORM_BIAS,
    "metric-bias": GAIN_METRIC | NORM_BIAS,
}
over_forms = pytest.mark.parametrize("form", FORMS)


def test_a_gain_needs_the_norm_that_it_stands_behind():
    with pytest.raises(ValueError, match="`qk_norm_gain` needs `qk_norm=True`, got 'vector' with False"):
        RiGPTConfig(qk_norm_gain="vector")
    with pytest.raises(ValueError, match="`qk_norm_gain` must be one of vector, vector_per_head, metric, got 'form'"):
        RiGPTConfig(qk_norm=True, qk_norm_gain="form")
    with pytest.raises(ValueError, match="`qk_norm_over` needs `qk_norm=True`, got 'all' with False. Set"):
        RiGPTConfig(qk_norm_over="all")
    with pytest.raises(ValueError, match="`qk_norm_bias` needs `qk_norm=True`, got True with False. Set"):
        RiGPTConfig(qk_norm_bias=True)
    with pytest.raises(
        ValueError, match="`qk_norm_gain='vector_per_head'` is .*got `qk_norm_over='all'`.*Use 'vector'"
    ):
        RiGPTConfig(**(GAIN_PER_HEAD | TOGETHER))
    with pytest.raises(ValueError, match="`qk_norm_over` must be one of head, all, got 'heads'"):
        RiGPTConfig(qk_norm=True, qk_norm_over="heads")


def test_heads_together_have_one_length():
    """That of one head bears on all, and only then."""
    states = torch.randn(1, 4, 3, 8, dtype=torch.float64)
    longer = states.clone()
    longer[:, 1] *= 2
    for options, same in (({"qk_norm": True}, True), (TOGETHER, False)):
        norm = tiny_model(**options).model.layers[0].self_attn.q_norm
        assert torch.equal(norm(longer)[:, 0], norm(states)[:, 0]) == same
    root = states.square().mean((1, 3), keepdim=True).add(norm.eps).sqrt()
    assert_same(norm(states), states / root)


def test_every_head_has_its_own():
    """Gains and a bias of one head bear on no other; a gain that is shared bears on all."""
    states = torch.randn(1, 4, 3, 8, dtype=torch.float64)
    for options, shared in ((GAIN_PER_HEAD | NORM_BIAS, False), (GAIN_VECTOR | NORM_BIAS, True)):
        norm = tiny_model(**options).model.layers[0].self_attn.q_norm
        before = norm(states)
        unit = nn.functional.rms_norm(states, (8,), eps=norm.eps)
        gains, biases = (part.reshape(-1, 1, 8) for part in (norm.weight, norm.bias))
        assert_same(before, gains * unit + biases)
        for part, alone in (("weight", not shared), ("bias", True)):
            changed = copy.deepcopy(norm)
            with torch.no_grad():
                getattr(changed, part)[:8] += 1.0
            assert_different(changed(states)[:, 0], before[:, 0])
            assert torch.equal(changed(states)[:, 1:], before[:, 1:]) == alone


def test_without_gains_nothing_is_there():
    for options, norms in (({}, 0), ({"qk_norm": True}, 6)):
        model = tiny_model(**options)
        found = [module for module in model.modules() if isinstance(module, RiGPTHeadNorm)]
        assert len(found) == norms and not any(list(norm.parameters()) for norm in found)


@over_forms
def test_a_new_gain_does_nothing(form):
    """At first, and once more when the weights are initialised again, whatever they were."""
    torch.manual_seed(0)
    model = RiGPTForCausalLM(tiny_config(**FORMS[form])).double().eval()
    plain = RiGPTForCausalLM(tiny_config(**(FORMS[form] | {"qk_norm_gain": None, "qk_norm_bias": False})))
    plain = plain.double().eval()
    missing, odd = plain.load_state_dict(model.state_dict(), strict=False)
    assert not missing and len(odd) == 12 if "bias" in form else 6
    assert all(name.endswith(("_norm.weight", "_norm.bias")) for name in odd)
    assert_same(model(tokens(2, 9)).logits, plain(tokens(2, 9)).logits)
    norms = [module for module in model.modules() if isinstance(module, RiGPTHeadNorm)]
    with torch.no_grad():
        for parameter in (parameter for norm in norms for parameter in norm.parameters()):
            parameter += 0.5 * torch.randn_like(parameter)
    assert_different(model(tokens(2, 9)).logits, plain(tokens(2, 9)).logits)
    for norm in norms:
        model._init_weights(norm)
    assert_same(model(tokens(2, 9)).logits, plain(tokens(2, 9)).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@over_forms
def test_in_16_bits_a_norm_rounds_once(form, dtype):
    model = tiny_model(**FORMS[form])
    norm = model.model.layers[1].self_attn.q_norm
    states = (100 * torch.randn(2, 4, 5, 8, dtype=torch.float64)).to(dtype)  # whose squares float16 cannot hold
    exact = copy.deepcopy(norm).to(dtype).double()(states.double())
    rounded = copy.deepcopy(norm).to(dtype)(states)
    assert rounded.dtype is dtype
    assert (rounded.double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


@over_forms
def test_under_autocast(form):
    model = tiny_model(dtype=torch.float32, **FORMS[form])
    expected = model(tokens(2, 9)).logits
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens(2, 9), labels=tokens(2, 9)).loss
        found = model(tokens(2, 9)).logits
    assert (found - expected).abs().max() <= 0.1 * expected.abs().max()
    loss.backward()
    for name in ("q_norm", "k_norm"):
        for parameter in getattr(model.model.layers[0].self_attn, name).parameters():
            assert parameter.grad.dtype is torch.float32 and parameter.grad.abs().max() > 0


@over_forms
def test_gradients_are_those_of_finite_differences(form):
    norm = tiny_model(**FORMS[form]).model.layers[0].self_attn.k_norm
    states = torch.randn(1, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    names, values = zip(*norm.named_parameters(), strict=True)
    values = [value.detach().clone().requires_grad_() for value in values]
    assert torch.autograd.gradcheck(
        lambda states, *own: torch.func.functional_call(norm, dict(zip(names, own, strict=True)), states),
        (states, *values),
    )


def test_a_metric_is_positive_whatever_is_learned():
    norm = RiGPTMetricNorm(2, 8, 1e-5)
    nn.init.zeros_(norm.weight)
    states = torch.randn(1, 2, 3, 8)
    assert_same(norm(states), states / 1e-5**0.5)
    nn.init.normal_(norm.weight)
    assert norm(states).isfinite().all()


@over_forms
def test_saved_and_loaded_it_is_the_same(form, tmp_path):
    model = tiny_model(dtype=torch.float32, **FORMS[form])
    model.save_pretrained(tmp_path)
    loaded, report = RiGPTForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(loaded(tokens(2, 9)).logits, model(tokens(2, 9)).logits)
    # Under the library's own names for a Qwen3's.
    assert "model.layers.2.self_attn.q_norm.weight" in model.state_dict()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's compiler and the library's use of it
@pytest.mark.parametrize(
    "form",
    [form if form == "per-head-bias" else pytest.param(form, marks=pytest.mark.full) for form in FORMS],
)
@torch.no_grad()  # which flex attention has no backward pass for on a CPU
@pytest.mark.full
def test_every_backend_and_the_compiler_say_the_same(form):
    model = tiny_model(dtype=torch.float32, **FORMS[form])
    expected = model(tokens(2, 9)).logits
    for backend in ("eager", "flex_attention"):
        model.set_attn_implementation(backend)
        assert_same(model(tokens(2, 9)).logits, expected, backend)
    model.set_attn_implementation("sdpa")
    torch._dynamo.reset()  # which counts the forms before as recompilations of one function
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(compiled(tokens(2, 9)).logits, expected, "compiled")
