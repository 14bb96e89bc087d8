"""One gradient of a table that both ends share: the same numbers, no second table, and only where nobody minds."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from torch.func import functional_call, grad, jvp
from torch.utils._python_dispatch import TorchDispatchMode

from rigpt_hf import kernels_rigpt
from rigpt_hf.kernels_rigpt import tied_ends
from tests.model.agreement import assert_different, assert_same, assert_same_gradients, recompute_activations
from tests.models import tiny_model, tokens


class Operations(TorchDispatchMode):
    """The names of the operations that are done meanwhile."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        self.names.add(operation.overloadpacket.__name__)
        return operation(*arguments, **(options or {}))


def learn(model: nn.Module, ids: torch.Tensor, times: int = 1) -> bool:
    """Gradients of the loss, `times` added up; whether a table was filled for the tokens alone."""
    model.zero_grad()
    with Operations() as seen:
        for _ in range(times):
            model(ids, labels=ids, use_cache=False).loss.backward()
    return "embedding_dense_backward" in seen.names


@pytest.fixture
def plain(monkeypatch):
    """`plain(action)`: the same as torch does it."""

    def call(action):
        with monkeypatch.context() as patch:
            patch.setattr("rigpt_hf.modeling_rigpt.tied_ends", lambda *_: (None, None))
            return action()

    return call


@pytest.mark.parametrize("options", [{}, {"embedding_size": 24}, {"value_embedding_period": 1}], ids=str)
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("recomputed", [False, True])
def test_gradients_are_those_of_torch(options, times, recomputed, plain):
    ids = tokens(2, 9)
    ids[0, :5] = ids[0, 0]  # one token many times
    model = tiny_model(**options).train()
    if recomputed:
        recompute_activations(model)
    expected = copy.deepcopy(model)
    assert plain(lambda: learn(expected, ids, times))
    # Value embeddings have tables of their own.
    assert learn(model, ids, times) is ("value_embedding_period" in options)
    assert_same_gradients(model, expected)
    # What is looked up has a part in it: the head's alone is another gradient.
    embeddings = model.get_input_embeddings()(ids).detach()
    model.zero_grad()
    if not options.get("value_embedding_period"):
        model(inputs_embeds=embeddings, labels=ids).loss.backward()
        assert_different(model.lm_head.weight.grad, expected.lm_head.weight.grad)


def test_whatever_is_derived_has_every_row(plain):
    """The tokens without the head, the head without the tokens, neither, and one thing after another."""
    model, ids = tiny_model(), tokens(2, 9)
    table = model.lm_head.weight

    def parts() -> list[torch.Tensor | None]:
        output = model(ids, output_hidden_states=True)
        wanted = output.hidden_states[1].square().sum(), output.logits.square().sum()
        alone = model(inputs_embeds=model.get_input_embeddings()(ids).detach()).logits.square().sum()
        return [torch.autograd.grad(each, table, retain_graph=True)[0] for each in (*wanted, wanted[0], alone)]

    for found, expected in zip(parts(), plain(parts), strict=True):
        assert found.layout == torch.strided
        assert_same(found, expected)


def test_second_derivatives_are_those_of_torch(plain):
    model, ids = tiny_model(attn_implementation="eager"), tokens(2, 9)
    table = model.lm_head.weight

    def second() -> torch.Tensor:
        loss = model(ids, labels=ids, use_cache=False).loss
        (first,) = torch.autograd.grad(loss, table, create_graph=True)
        return torch.autograd.grad(first.square().sum(), table)[0]

    assert_same(second(), plain(second))


def test_many_gradients_at_once_are_those_one_by_one(plain):
    model, ids = tiny_model(attn_implementation="eager"), tokens(2, 9)
    table, logits = model.lm_head.weight, model(ids, use_cache=False).logits
    directions = torch.randn(3, *logits.shape, generator=torch.Generator().manual_seed(0), dtype=logits.dtype)
    (found,) = torch.autograd.grad(logits, table, directions, is_grads_batched=True, retain_graph=True)
    for one, direction in zip(found, directions, strict=True):
        assert_same(one, torch.autograd.grad(logits, table, direction, retain_graph=True)[0])


CHANGES = {
    "a hook": lambda model: model.get_input_embeddings().register_forward_hook(lambda module, _, output: output + 1),
    "a hook of the head": lambda model: model.lm_head.register_forward_pre_hook(lambda module, x: (x[0] + 1,)),
    "a hook of gradients": lambda model: model.lm_head.register_full_backward_hook(lambda module, *_: None),
    "offloaded": cpu_offload,
    "untied": lambda model: setattr(model.lm_head, "weight", nn.Parameter(model.lm_head.weight.detach().clone())),
    "padding": lambda model: setattr(model.get_input_embeddings(), "padding_idx", 1),
    "a bias": lambda model: setattr(model.lm_head, "bias", nn.Parameter(torch.ones(61, dtype=torch.float64))),
    "16 bits": lambda model: model.bfloat16(),
    "a subclass": lambda model: setattr(model.model, "embed_tokens", type("Own", (nn.Embedding,), {})(61, 8)),
    "frozen": lambda model: model.requires_grad_(False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whoever_changes_an_end_sees_it_called(change):
    model = tiny_model()
    assert all(each is not None for each in tied_ends(model.model.embed_tokens, model.lm_head, tokens(2, 9)))
    CHANGES[change](model)
    assert tied_ends(model.model.embed_tokens, model.lm_head, tokens(2, 9)) == (None, None)


def test_recomputing_changes_no_bit():
    """Though the library has a hook on the table then, by which embeddings have a gradient, as they have here."""
    model, ids = tiny_model().train(), tokens(2, 9)
    again = copy.deepcopy(model)
    recompute_activations(again)
    assert again.get_input_embeddings()._forward_hooks
    for each in (model, again):
        assert learn(each, ids) is False
    assert torch.equal(model.lm_head.weight.grad, again.lm_head.weight.grad)


def test_another_base_model_is_given_what_it_knows():
    class Base(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache):
            return self.inner(input_ids, use_cache=use_cache)

    model, ids = tiny_model(), tokens(2, 9)
    expected = model(ids, labels=ids, use_cache=False).loss
    model.model = Base(model.model)
    assert_same(model(ids, labels=ids, use_cache=False).loss, expected)


def test_hooks_are_heard():
    model, ids = tiny_model(), tokens(2, 9)
    before = model(ids).logits
    model.get_input_embeddings().register_forward_hook(lambda module, _, output: output + 1)
    assert_different(model(ids).logits, before)


def test_transformations_and_the_compiler_are_given_the_modules(monkeypatch, plain):
    model, ids = tiny_model(attn_implementation="eager"), tokens(2, 9)
    weights = {name: each.detach() for name, each in model.named_parameters()}

    def loss(weights):
        return functional_call(model, weights, (ids,), {"labels": ids, "use_cache": False}).loss

    transformed = grad(loss)(weights)["model.embed_tokens.weight"]
    assert learn(model, ids) is False
    gradient = model.lm_head.weight.grad
    assert_same(transformed, gradient)
    _, slope = jvp(loss, (weights,), ({name: each.sign() for name, each in weights.items()},))
    by_gradients = sum((each.grad * each.sign()).sum() for each in model.parameters())
    assert_same(slope, by_gradients)
    with torch.no_grad():
        assert tied_ends(model.model.embed_tokens, model.lm_head, tokens(2, 9)) == (None, None)
    seen = []
    monkeypatch.setattr(kernels_rigpt._TiedEnds, "apply", lambda *_: seen.append(1))
    torch.compile(lambda: model(ids, use_cache=False).logits, backend="eager")()
    assert not seen
