"""Every linear map is an `nn.Linear`; products of few rows are quick unless somebody has to see the module called."""

import copy
from itertools import product

import peft
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from torch.overrides import TorchFunctionMode

from rigpt_hf import RiGPTForCausalLM, RiGPTForSequenceClassification, kernels_rigpt
from rigpt_hf.kernels_rigpt import FEW_ROWS, STREAMED, linear
from tests.model.agreement import assert_same, difference
from tests.models import ALL, over, tiny_config, tiny_model, tokens
from tests.tolerances import SYMMETRY


@over()
def test_every_linear_map_is_exactly_a_linear_module(option):
    """bitsandbytes, dynamic quantization and fine-grained fp8 replace modules of just that type."""
    for model_class in (RiGPTForCausalLM, RiGPTForSequenceClassification):
        model = model_class(tiny_config(**ALL[option]))
        maps = {name for name, each in model.named_modules() if type(each) is nn.Linear}
        assert maps == {name for name, each in model.named_modules() if isinstance(each, nn.Linear)}
        weights = {name.removesuffix(".weight") for name, p in model.named_parameters() if p.ndim == 2}
        others = ("embed_tokens", "embed_positions", "value_embedding", "transport", "carry", "rotary_frequencies")
        others += ("q_norm", "k_norm")  # which say what is a length, in each head
        others += (".mlp.gate",)  # which must not be rounded, as it decides where tokens go
        others += (".down_bias",)  # the biases of all experts
        assert maps >= {name for name in weights if not name.endswith(others)} and maps


@pytest.fixture
def calls(monkeypatch) -> list[nn.Module]:
    """The linear modules that are called, and not gone past."""
    seen, forward = [], nn.Linear.forward

    def counted(module, x):
        seen.append(module)
        return forward(module, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    monkeypatch.setitem(kernels_rigpt.FORWARD, nn.Linear, counted)
    monkeypatch.setattr(kernels_rigpt, "STREAMED", 0)
    return seen


def layer_and_rows(rows: int, bias: bool = True) -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(rows)
    return nn.Linear(24, 17, bias=bias), torch.randn(1, rows, 24)


@torch.no_grad()
def test_the_other_order_is_taken_only_for_weights_that_come_from_memory(calls, monkeypatch):
    monkeypatch.setattr(kernels_rigpt, "STREAMED", STREAMED)
    for inner, is_quick in ((STREAMED // 512, True), (STREAMED // 512 - 1, False)):
        calls.clear()
        layer = nn.Linear(inner, 512)
        linear(layer, torch.randn(1, inner))
        assert calls == [layer] * (not is_quick)


@torch.no_grad()
def test_few_rows_give_what_many_rows_give(calls):
    """The order of operands for few rows changes rounding and nothing else."""
    for rows, bias in product([0, 1, 2, FEW_ROWS, FEW_ROWS + 1], [True, False]):
        calls.clear()
        layer, x = layer_and_rows(rows, bias)
        quick, plain = linear(layer, x), nn.functional.linear(x, layer.weight, layer.bias)
        assert bool(calls) is not (0 < rows <= FEW_ROWS)
        assert quick.shape == plain.shape and quick.is_contiguous()
        if rows:
            assert difference(quick, plain) <= SYMMETRY[torch.float32]


class Shard(torch.Tensor):
    """A tensor with a mind of its own."""


CHANGES = {
    "a hook": lambda layer: layer.register_forward_hook(lambda module, arguments, output: output + 1),
    "a hook before": lambda layer: layer.register_forward_pre_hook(lambda module, arguments: (arguments[0] + 1,)),
    "offloaded": cpu_offload,
    "another forward": lambda layer: add_hook_to_module(layer, ModelHook()),
    "parametrised": nn.utils.parametrizations.weight_norm,
    "a shard": lambda layer: setattr(
        layer, "weight", nn.Parameter(torch.Tensor.as_subclass(layer.weight.detach(), Shard))
    ),
    "another device": lambda layer: layer.to("meta"),
}


@torch.no_grad()
def test_whoever_changes_a_module_sees_it_called(calls):
    for name, change in CHANGES.items():
        calls.clear()
        layer, x = layer_and_rows(2)
        expected = copy.deepcopy(layer)
        for each in (layer, expected):
            change(each)
        if name == "another device":
            assert linear(layer, x.to("meta")).is_meta
        else:
            assert torch.equal(linear(layer, x), expected(x)), name
        assert calls[0] is layer or name == "parametrised", name


class Watching(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_whoever_watches_all_modules_sees_them_called(calls, monkeypatch):
    layer, x = layer_and_rows(1)
    with Watching():
        linear(layer, x)
    assert calls == [layer]
    calls.clear()
    linear(layer, x)
    assert not calls, "the quick product would not be seen"
    # As observers and calibrators do it.
    monkeypatch.setitem(kernels_rigpt.FORWARD, nn.Linear, kernels_rigpt.FORWARD[nn.Embedding])
    linear(layer, x)
    assert calls == [layer]


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated:DeprecationWarning")
def test_modes_in_which_the_module_is_called(calls):
    layer, x = layer_and_rows(2)
    linear(layer, x)  # with gradients
    layer.requires_grad_(False)  # a trace takes no other constants
    with torch.no_grad():
        linear(layer.double(), x.double())
        layer.float()
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
        linear(layer, x)
        handle.remove()
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(layer, x).dtype == torch.bfloat16
        linear(layer, torch.Tensor.as_subclass(x, Shard))
        torch.jit.trace(lambda x: linear(layer, x), x, check_trace=False)
        torch.compile(lambda x: linear(layer, x), backend="eager", fullgraph=True)(x)
    assert len(calls) == 7
    with torch.inference_mode():
        linear(layer, x)
    assert len(calls) == 7, "the quick product would not be seen"


def test_decoding_goes_past_the_modules_and_training_does_not(calls):
    model = tiny_model(dtype=torch.float32, embedding_size=24, value_embedding_period=1)
    with torch.no_grad():
        cache = model(tokens(1, 7)).past_key_values
        assert len(calls) == 3 * 6 + 2 + 3
        calls.clear()
        quick = model(tokens(1, 8)[:, 7:], past_key_values=cache).logits
    assert not calls
    assert_same(quick, model(tokens(1, 8)).logits[:, 7:])
    assert calls


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@torch.no_grad()
def test_dynamic_quantization_finds_every_linear_map():
    model = tiny_model(dtype=torch.float32, tie_word_embeddings=False, embedding_size=24)
    expected = model(tokens(2, 9)).logits
    count = sum(type(module) is nn.Linear for module in model.modules())
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert sum(type(each) is torch.ao.nn.quantized.dynamic.Linear for each in quantized.modules()) == count
    for ids in (tokens(2, 9), tokens(1, 1)):
        error = difference(quantized(ids).logits, expected if len(ids) == 2 else model(ids).logits)
        assert 1e-4 < error < 0.2


@torch.no_grad()
def test_an_adapter_is_heard_in_few_rows():
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules="all-linear")
    model = peft.get_peft_model(tiny_model(dtype=torch.float32), config).eval()
    ids = tokens(1, 9)
    at_once = model(ids, use_cache=False).logits
    cache = model(ids[:, :8]).past_key_values
    assert_same(model(ids[:, 8:], past_key_values=cache).logits, at_once[:, 8:])
    with model.disable_adapter():
        assert difference(model(ids[:, 8:]).logits, at_once[:, 8:]) > 1e-2
