"""A logit without a key in every softmax, `attention_sinks`."""

from types import SimpleNamespace

import pytest
import torch
from transformers.integrations import flex_attention

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.scores_rigpt import SCORES, beside_sinks, eager_attention_forward, flex_attention_forward
from rigpt_hf.symmetry import GaugeTransformation, redundant_dimensions
from tests.model.agreement import assert_different, assert_same
from tests.model.test_attention import causal_mask
from tests.models import ALIBI, SINKS, tiny_config, tiny_model, tokens
from tests.processes import together


def test_without_them_nothing_of_their_name_is_there():
    assert not any(hasattr(layer.self_attn, "sinks") for layer in tiny_model().model.layers)
    model = RiGPTForCausalLM(tiny_config(**SINKS))
    assert all(layer.self_attn.sinks.shape == (4,) and not layer.self_attn.sinks.any() for layer in model.model.layers)


@torch.no_grad()
@pytest.mark.parametrize("cap", [None, 0.7])
def test_it_is_the_formula(cap):
    model = tiny_model(**SINKS, attn_logit_softcapping=cap, position_embedding_type="learned")
    attention, x = model.model.layers[1].self_attn, torch.randn(2, 7, 32, dtype=torch.float64)
    query, key, value = (proj(x).view(2, 7, -1, 8) for proj in (attention.q_proj, attention.k_proj, attention.v_proj))
    output, total = torch.zeros_like(query), torch.zeros(2, 4, 7, dtype=torch.float64)
    for head in range(4):
        for position in range(7):
            k, v = (states[:, : position + 1, head // 2] for states in (key, value))
            scores = (query[:, position, head, None] * k).sum(-1) / 8**0.5
            shares = (scores if cap is None else cap * torch.tanh(scores / cap)).exp()
            shares = shares / (shares.sum(-1, keepdim=True) + attention.sinks[head].exp())
            output[:, position, head], total[:, head, position] = (shares[..., None] * v).sum(1), shares.sum(-1)
    mask, expected = causal_mask(7, torch.float64), attention.o_proj(output.flatten(2))
    found, probabilities = attention(x, attention_mask=mask)
    assert_same(found, expected)
    assert_same(probabilities.sum(-1), total)
    assert probabilities.shape == (2, 4, 7, 7) and total.max() < 0.999
    attention.sinks.add_(0.1)
    assert_different(attention(x, attention_mask=mask)[0], expected)


def test_heads_and_their_sinks_change_places_together():
    model = tiny_model(**SINKS)
    g = GaugeTransformation.random(model.config, torch.Generator().manual_seed(4), ["heads"])
    turned = g(model)
    assert_same(turned(tokens(2, 9)).logits, model(tokens(2, 9)).logits)
    with torch.no_grad():
        for layer, before in zip(turned.model.layers, model.model.layers, strict=True):
            layer.self_attn.sinks.copy_(before.self_attn.sinks)
    assert_different(turned(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


@torch.no_grad()
@pytest.mark.parametrize(("name", "frame"), [("k_proj", "key_shift"), ("v_proj", "value_shift")])
def test_constants_of_keys_and_of_values_are_seen(name, frame):
    """Which they are not where probabilities sum to 1."""
    options = {"position_embedding_type": "learned", "num_key_value_heads": 4}
    for sinks, check in (({}, assert_same), (SINKS, assert_different)):
        model = tiny_model(**options, **sinks)
        assert (frame in redundant_dimensions(model.config)) is not bool(sinks)
        before, attention = model(tokens(2, 9)).logits, model.model.layers[1].self_attn
        constant = torch.linspace(-2, 2, 32, dtype=torch.float64)
        getattr(attention, name).bias += constant
        if name == "v_proj":
            attention.o_proj.bias -= attention.o_proj.weight @ constant
        after = model(tokens(2, 9)).logits
        print(
            f"{frame}, {'beside' if sinks else 'without'} sinks: {(after - before).abs().max() / before.abs().max()}"
        )
        check(after, before)


def test_what_cannot_take_them_is_refused():
    model = tiny_model(**SINKS)
    assert model.config._attn_implementation == "eager"
    words = "must be one of eager, flex_attention, flash_attention_4 for `attention_sinks=True`, which puts a logit "
    for backend in ("sdpa", "flash_attention_2", "flash_attention_3"):
        with pytest.raises(ValueError, match=f"{words}.*got '{backend}'"):
            model.set_attn_implementation(backend)
    both = tiny_model(**SINKS, **ALIBI)
    with pytest.raises(
        ValueError, match="one of eager, flex_attention for .position_embedding_type.*got .flash_attention_4"
    ):
        both.set_attn_implementation("flash_attention_4")


def test_flex_attention_is_the_eager_one(monkeypatch):
    """From the logarithm of what its softmax divides by, in either form in which PyTorch returns it."""
    query, key, value, sinks = (torch.randn(*shape) for shape in ((2, 4, 5, 8), (2, 2, 9, 8), (2, 2, 9, 8), (4,)))
    module = SimpleNamespace(num_key_value_groups=2, score=SCORES["dot"], alibi=None, training=False)
    mask = causal_mask(9, torch.float32)[..., 4:, :]
    expected = eager_attention_forward(module, query, key, value, mask, 0.3, s_aux=sinks)[0]
    scores = 0.3 * query @ key.repeat_interleave(2, dim=1).mT + mask
    plain = eager_attention_forward(module, query, key, value, mask, 0.3)[0].transpose(1, 2)
    assert_same(beside_sinks(plain, scores.logsumexp(-1), sinks).transpose(1, 2), expected)
    assert_different(plain.transpose(1, 2), expected)
    with pytest.raises(ValueError, match="must be 'eager' for `attention_sinks=True` on a CPU.*got 'flex_attention'"):
        flex_attention_forward(module, query, key, value, mask, 0.3, s_aux=sinks)
    monkeypatch.setattr("rigpt_hf.scores_rigpt.needs_eager", lambda states: False)
    for as_it_is in (True, False):

        def with_logsumexp(*_, as_it_is=as_it_is, **options):
            assert options.keys() & flex_attention.get_flex_attention_lse_kwargs(True).keys()
            logsumexp = scores.logsumexp(-1)
            return plain, logsumexp if as_it_is else SimpleNamespace(lse=logsumexp)

        monkeypatch.setattr(flex_attention, "compile_friendly_flex_attention", with_logsumexp)
        assert_same(flex_attention_forward(module, query, key, value, mask, 0.3, s_aux=sinks)[0], expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's compiler
@pytest.mark.full
def test_compiled_it_is_the_same():
    model = tiny_model(dtype=torch.float32, **SINKS)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(compiled(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


def run_sharded(rank, folder):
    from transformers.distributed.configuration_utils import DistributedConfig

    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = RiGPTForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
    reference = RiGPTForCausalLM.from_pretrained(folder)
    assert model.model.layers[0].self_attn.sinks.to_local().shape == (2,)
    for each in (model, reference):
        each(tokens(2, 9), labels=tokens(2, 9)).loss.backward()
    with torch.no_grad():
        assert_same(model(tokens(2, 9)).logits, reference(tokens(2, 9)).logits)
    gradient = model.model.layers[1].self_attn.sinks.grad.full_tensor()
    assert_same(gradient, reference.model.layers[1].self_attn.sinks.grad)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_tensor_parallelism_over_two_processes(tmp_path):
    tiny_model(dtype=torch.float32, **SINKS).save_pretrained(tmp_path)
    together(run_sharded, str(tmp_path))
