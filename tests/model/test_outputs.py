"""What the model returns: logits to keep, losses, hidden states, attentions; checkpointing, dtypes, classification."""

from functools import partial

import pytest
import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from rigpt_hf import RiGPTForSequenceClassification, RiGPTModel
from rigpt_hf.flow_rigpt import evaluations_per_layer
from rigpt_hf.mlp_rigpt import RiGPTRouter
from tests.model.agreement import assert_different, assert_same, assert_same_gradients, recompute_activations
from tests.models import (
    ALL,
    COVER,
    DTYPES,
    EACH,
    OPTIONS,
    backends,
    learned,
    over,
    randomise_,
    tiny_config,
    tiny_model,
    tokens,
)
from tests.tolerances import SYMMETRY


@pytest.mark.parametrize("size", [None, 24, 32], ids=["stream", "narrower", "as-wide"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_head_on_the_last_hidden_state_gives_the_logits(tied, size):
    """What programs that apply the head themselves rely on: TRL, vLLM."""
    model = tiny_model(tie_word_embeddings=tied, embedding_size=size, output_bias=size is not None)
    base, head = getattr(model, model.base_model_prefix), model.get_output_embeddings()
    expected = model(tokens(2, 11)).logits
    output = base(tokens(2, 11), output_hidden_states=True)
    assert output.last_hidden_state.shape == (2, 11, model.config.lexical_size)
    assert torch.equal(head(output.last_hidden_state), expected)
    assert torch.equal(base(tokens(2, 11), return_dict=False)[0], output.last_hidden_state)
    assert output.hidden_states[-1].shape == (2, 11, 32)
    if size is None:
        assert output.hidden_states[-1] is output.last_hidden_state
    elif size == 32:
        assert_different(head(output.hidden_states[-1]), expected, "without `project_out`")


def test_logits_to_keep():
    model = tiny_model(embedding_size=24)
    logits = model(tokens(2, 11)).logits
    for keep in (1, 3, torch.tensor([0, 4, 5]), torch.tensor([True, False] * 5 + [True])):
        expected = logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]
        assert_same(model(tokens(2, 11), logits_to_keep=keep).logits, expected)
    assert model(tokens(2, 11), logits_to_keep=0).logits.shape == (2, 11, 61)


@pytest.mark.parametrize("items", [None, 37, torch.tensor(37)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("dtype", SYMMETRY, ids=str)
def test_the_loss_is_the_librarys(items, dtype):
    model, reference = tiny_model(dtype=dtype), tiny_model(dtype=dtype)
    reference.loss_function = ForCausalLMLoss
    labels = tokens(3, 11, seed=1)
    labels[0, :4] = -100
    losses = []
    for each in (model, reference):
        loss = each(tokens(3, 11), labels=labels, num_items_in_batch=items).loss
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1].to(dtype), rtol=2e-7, atol=0)  # the library's sum is in float32
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() <= 2e-5 * b.grad.abs().max() + 1e-7


def test_the_loss_honours_labels_that_are_shifted_already():
    model, labels = tiny_model(), tokens(2, 11, seed=1)
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    expected = model(tokens(2, 11), labels=labels).loss
    assert_same(model(tokens(2, 11), labels=tokens(2, 11, seed=2), shift_labels=shifted).loss, expected)
    assert_different(model(tokens(2, 11), labels=labels, shift_labels=tokens(2, 11, seed=2)).loss, expected)


def test_keyword_arguments_reach_the_backend(monkeypatch):
    """Packed flash attention and others depend on it."""
    seen = []

    def attention(module, query, key, value, mask, **kwargs):
        seen.append(kwargs.get("cu_seq_lens_q"))
        return value.repeat_interleave(2, dim=1).transpose(1, 2), None

    monkeypatch.setattr("rigpt_hf.decoder_rigpt.eager_attention_forward", attention)
    model = tiny_model()
    model.set_attn_implementation("eager")
    model(tokens(1, 4), cu_seq_lens_q="mark")
    assert seen == ["mark"] * 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over()
@pytest.mark.by_default(9)
def test_every_backend_gives_the_same_and_what_it_is_asked_for(option, dtype):
    """Logits with and without padding, gradients, hidden states and attentions, in eager and in sdpa."""
    labels, mask = tokens(2, 7, seed=1), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    models, outputs, padded = {}, {}, {}
    for backend in backends(ALL[option]):
        model = models[backend] = tiny_model(dtype=dtype, **ALL[option])
        model.set_attn_implementation(backend)
        output = outputs[backend] = model(tokens(2, 7), labels=labels, output_hidden_states=True, use_cache=False)
        output.loss.backward()
        padded[backend] = model(tokens(2, 7), attention_mask=mask, use_cache=False).logits[mask.bool()]
        assert_same(padded[backend], padded["eager"], "padded")
        assert_different(padded[backend][:4], output.logits[0, 3:], "padding")
        assert_same(output.logits, outputs["eager"].logits)
        assert_same_gradients(model, models["eager"])
        assert [state.shape for state in output.hidden_states] == [(2, 7, 32)] * 4
        out = model.model.project_out or nn.Identity()
        assert_same(out(output.hidden_states[-1]), model.model(tokens(2, 7)).last_hidden_state)
        if model.config.local_frames:
            assert_different(model.model.norm(output.hidden_states[2]), output.hidden_states[3])
    calls = evaluations_per_layer(models["eager"].config)
    attentions = models["eager"](tokens(2, 7), output_attentions=True, use_cache=False).attentions
    assert [probabilities.shape for probabilities in attentions] == [(2, 4, 7, 7)] * 3 * calls
    for probabilities in attentions:
        total = probabilities.sum(-1)
        if models["eager"].config.attention_sinks:  # which have the rest
            assert (total < 1).all() and (total > 0.02).all()
        else:
            assert_same(total, torch.ones_like(total))
        assert (probabilities.triu(1) == 0).all()


def test_hidden_states_and_attentions_keep_their_gradients():
    model = RiGPTModel._from_config(tiny_config(embedding_size=24), attn_implementation="eager")
    output = model(tokens(2, 7), output_hidden_states=True, output_attentions=True)
    kept = (output.hidden_states[0], output.attentions[0])
    for tensor in kept:
        tensor.retain_grad()
    output.last_hidden_state.flatten()[0].backward(retain_graph=True)
    assert all(tensor.grad is not None for tensor in kept)
    some = model(tokens(2, 7), output_hidden_states=[0, 2]).hidden_states
    assert [state is None for state in some[:3]] == [False, True, False]


def test_outputs_as_a_tuple():
    model = tiny_model()
    output = model(tokens(2, 7), labels=tokens(2, 7), output_hidden_states=True, use_cache=True)
    as_tuple = model(tokens(2, 7), labels=tokens(2, 7), output_hidden_states=True, use_cache=True, return_dict=False)
    assert len(as_tuple) == 4 and torch.equal(as_tuple[0], output.loss) and torch.equal(as_tuple[1], output.logits)


@over(EACH, [*COVER, *OPTIONS])
@pytest.mark.by_default(4)
def test_gradient_checkpointing_changes_no_gradient(option):
    """Tokens go to the layers' tables of values besides the stream, and reentrant checkpoints are choosy."""
    expected = tiny_model(**ALL[option]).train()
    expected(tokens(2, 7), labels=tokens(2, 7), use_cache=False).loss.backward()
    assert all(
        p.grad.abs().max() > 0 for n, p in expected.named_parameters() if "k_proj.b" not in n and p.requires_grad
    )
    for reentrant in (True, False):
        model = tiny_model(**ALL[option]).train()
        recompute_activations(model, reentrant)
        model.enable_input_require_grads()
        calls = []
        model.model.layers[1].self_attn.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model(tokens(2, 7), labels=tokens(2, 7), use_cache=False).loss.backward()
        assert len(calls) == 2 * evaluations_per_layer(model.config), "the layer was not computed again"
        assert_same_gradients(model, expected)


def same_routes(exact, model):
    """Tokens of `model` go where those of `exact` went: another route, which rounding may choose, is no rounding."""
    routes = {}

    def replayed(router, args, output, name):
        weights = output[0].float().softmax(dim=-1).gather(1, routes[name])
        weights = weights / weights.sum(dim=-1, keepdim=True) if router.normalised else weights
        return output[0], weights.to(output[1]), routes[name]

    for name, module in exact.named_modules():
        if isinstance(module, RiGPTRouter):
            module.register_forward_hook(lambda _, args, output, name=name: routes.update({name: output[2]}))
            model.get_submodule(name).register_forward_hook(partial(replayed, name=name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)], ids=str)
@over(EACH, [*COVER, *OPTIONS])
def test_16_bits(option, dtype):
    exact = tiny_model(dtype=torch.float32, **ALL[option])
    model = tiny_model(dtype=dtype, **ALL[option])
    same_routes(exact, model)
    expected, logits = exact(tokens(2, 11)).logits, model(tokens(2, 11)).logits
    assert logits.dtype == dtype and logits.isfinite().all()
    error = (logits.float() - expected).abs().max() / logits.abs().max()
    assert error < (0.01 if dtype == torch.float16 else 0.08)
    model.train()(tokens(2, 11), labels=tokens(2, 11)).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in learned(model))


def test_one_input_and_only_one():
    model = tiny_model()
    for wrong in ({}, {"input_ids": tokens(1, 3), "inputs_embeds": torch.zeros(1, 3, 32, dtype=torch.float64)}):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            model.model(**wrong)


def test_sequence_classification():
    for problem_type, labels in (
        ("single_label_classification", torch.tensor([0, 2])),
        ("multi_label_classification", torch.tensor([[1.0, 0, 1], [0, 0, 1]])),
        ("regression", torch.tensor([[0.5, 1, 2], [1, 2, 3]])),
    ):
        config = tiny_config(embedding_size=24, num_labels=3, problem_type=problem_type)
        model = RiGPTForSequenceClassification(config)
        output = model(tokens(2, 7), labels=labels)
        assert output.logits.shape == (2, 3)
        output.loss.backward()
        assert model.score.weight.grad.abs().max() > 0, problem_type


def test_the_classifier_reads_the_last_token_that_is_no_padding():
    model = randomise_(RiGPTForSequenceClassification(tiny_config(num_labels=3)), 0).double().eval()
    input_ids = tokens(2, 7)
    padded = input_ids.clone()
    padded[0, 4:] = 0
    logits = model(padded).logits
    assert_same(logits[0], model(input_ids[:1, :4]).logits[0])
    assert_same(logits[1], model(input_ids[1:]).logits[0])
    left = torch.cat((torch.zeros(1, 3, dtype=torch.long), input_ids[:1, :4]), dim=1)
    positions = torch.tensor([[0, 0, 0, 0, 1, 2, 3]])
    assert_same(model(left, attention_mask=(left != 0).long(), position_ids=positions).logits, logits[:1])


def test_packed_sequences_in_a_batch_of_classifications_need_a_padding_token():
    model = RiGPTForSequenceClassification(tiny_config(pad_token_id=None))
    with pytest.raises(ValueError, match="padding token"):
        model(tokens(2, 7))
